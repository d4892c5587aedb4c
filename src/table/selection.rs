//! Which rows of a table are to go.
//!
//! A selection is judged batch by batch on the few columns that it names, or by a file's bounds in the log where those
//! suffice.

use std::collections::HashSet;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, BooleanArray, RecordBatch};
use arrow::compute::{cast, or};
use arrow::datatypes::{DataType, Int32Type, Int64Type, Schema, SchemaRef, TimestampMicrosecondType};
use arrow::error::ArrowError;
use deltalake::datafusion::common::{DFSchema, DataFusionError};
use deltalake::datafusion::physical_plan::PhysicalExpr;
use deltalake::delta_datafusion::create_session;
use serde_json::Value;

use super::TableError;
use super::schema::{Kind, TableSpec};

/// Rows that are to go.
#[derive(Debug)]
pub enum Selection {
    /// The text of a column is one of these.
    OneOf { column: &'static str, values: HashSet<String> },
    /// One of these byte strings stands in one of these columns, not inside a longer word.
    Containing { columns: Vec<&'static str>, needles: Vec<Vec<u8>> },
    /// The rows came from these Kafka records: topic, partition, offset.
    Records(HashSet<(String, i32, i64)>),
    /// The time or date of a column lies before this one, in microseconds since the epoch.
    Before { column: &'static str, micros: i64 },
    /// A condition in SQL holds.
    Where(Condition),
    /// One of several holds.
    Any(Vec<Selection>),
}

/// A condition in SQL over the columns of one table, parsed.
#[derive(Debug)]
pub struct Condition {
    columns: Vec<&'static str>,
    schema: SchemaRef,
    holds: Arc<dyn PhysicalExpr>,
}

/// What the bounds of a file say about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ByBounds {
    /// None of its rows is selected.
    None,
    /// All of them are.
    All,
    /// It has to be read.
    Unknown,
}

impl Selection {
    /// Parses a condition over the columns of a table.
    pub fn parse(spec: &'static TableSpec, sql: &str) -> Result<Selection, TableError> {
        let condition = Condition::parse(spec, sql).map_err(|e| TableError::Condition {
            table: spec.name,
            condition: sql.to_owned(),
            why: e.strip_backtrace().lines().next().unwrap_or_default().to_owned(),
        })?;
        Ok(Selection::Where(condition))
    }

    /// Returns the columns that have to be read to judge a row.
    pub(super) fn columns(&self) -> Vec<&'static str> {
        match self {
            Selection::OneOf { column, .. } | Selection::Before { column, .. } => vec![*column],
            Selection::Containing { columns, .. } => columns.clone(),
            Selection::Records(_) => vec!["topic", "partition", "offset"],
            Selection::Where(condition) => condition.columns.clone(),
            Selection::Any(parts) => parts.iter().flat_map(Selection::columns).collect(),
        }
    }

    /// Judges a file by its bounds.
    pub(super) fn by_bounds(&self, spec: &TableSpec, stats: Option<&str>) -> ByBounds {
        let Selection::Before { column, micros } = self else { return ByBounds::Unknown };
        let stats: Value = stats.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
        let bound = |side: &str| micros_of(spec, column, stats[side][*column].as_str()?);
        let nulls = stats["nullCount"][*column].as_u64();
        match (bound("minValues"), bound("maxValues")) {
            (Some(low), _) if low >= *micros => ByBounds::None,
            (_, Some(high)) if high < *micros && nulls == Some(0) => ByBounds::All,
            _ => ByBounds::Unknown,
        }
    }

    /// Returns which rows of a batch are selected; its columns have the types of the table.
    pub(super) fn judge(&self, batch: &RecordBatch) -> Result<BooleanArray, ArrowError> {
        let column = |name: &str| {
            batch.column_by_name(name).ok_or_else(|| ArrowError::SchemaError(format!("there is no column {name}")))
        };
        let rows = 0..batch.num_rows();
        Ok(match self {
            Selection::OneOf { column: name, values } => {
                let texts = column(name)?.as_string::<i32>();
                rows.map(|i| texts.is_valid(i) && values.contains(texts.value(i))).collect::<Vec<_>>().into()
            }
            Selection::Containing { columns, needles } => {
                let arrays: Vec<&ArrayRef> = columns.iter().map(|name| column(name)).collect::<Result<_, _>>()?;
                let hit = |i| arrays.iter().any(|array| bytes(array, i).is_some_and(|text| holds_one(text, needles)));
                rows.map(hit).collect::<Vec<bool>>().into()
            }
            Selection::Records(records) => {
                let topics = column("topic")?.as_string::<i32>();
                let partitions = column("partition")?.as_primitive::<Int32Type>();
                let offsets = column("offset")?.as_primitive::<Int64Type>();
                let place = |i| (topics.value(i).to_owned(), partitions.value(i), offsets.value(i));
                rows.map(|i| records.contains(&place(i))).collect::<Vec<bool>>().into()
            }
            Selection::Before { column: name, micros } => {
                let times = cast(column(name)?, &DataType::Timestamp(arrow::datatypes::TimeUnit::Microsecond, None))?;
                let times = times.as_primitive::<TimestampMicrosecondType>();
                rows.map(|i| times.is_valid(i) && times.value(i) < *micros).collect::<Vec<bool>>().into()
            }
            Selection::Where(condition) => condition.judge(batch)?,
            Selection::Any(parts) => {
                let mut any = BooleanArray::from(vec![false; batch.num_rows()]);
                for part in parts {
                    any = or(&any, &part.judge(batch)?)?;
                }
                any
            }
        })
    }
}

impl Condition {
    fn parse(spec: &'static TableSpec, sql: &str) -> Result<Self, DataFusionError> {
        let context = create_session().into_inner();
        let whole = spec.arrow_schema();
        let expr = context.parse_sql_expr(sql, &DFSchema::try_from(whole.as_ref().clone())?)?;
        let named: HashSet<String> = expr.column_refs().into_iter().map(|c| c.name.clone()).collect();
        let columns: Vec<&'static str> = spec.columns.iter().map(|c| c.name).filter(|c| named.contains(*c)).collect();
        let fields: Vec<_> = whole.fields().iter().filter(|f| named.contains(f.name())).cloned().collect();
        let schema = Arc::new(Schema::new(fields));
        let df_schema = DFSchema::try_from(schema.as_ref().clone())?;
        let holds = context.create_physical_expr(expr, &df_schema)?;
        match holds.data_type(&schema)? {
            DataType::Boolean => Ok(Condition { columns, schema, holds }),
            other => Err(DataFusionError::Plan(format!("it is a value of type {other}, not true or false"))),
        }
    }

    fn judge(&self, batch: &RecordBatch) -> Result<BooleanArray, ArrowError> {
        let names: Vec<usize> =
            self.schema.fields().iter().map(|f| batch.schema().index_of(f.name())).collect::<Result<_, _>>()?;
        let fail = |e: DataFusionError| ArrowError::ComputeError(e.strip_backtrace());
        let holds = self.holds.evaluate(&batch.project(&names)?).map_err(fail)?;
        let holds = holds.into_array(batch.num_rows()).map_err(fail)?;
        let holds = holds.as_boolean();
        // What is neither true nor false is not selected.
        Ok((0..holds.len()).map(|i| holds.is_valid(i) && holds.value(i)).collect::<Vec<bool>>().into())
    }
}

fn bytes(array: &ArrayRef, i: usize) -> Option<&[u8]> {
    match array.data_type() {
        _ if array.is_null(i) => None,
        DataType::Binary => Some(array.as_binary::<i32>().value(i)),
        DataType::Utf8 => Some(array.as_string::<i32>().value(i).as_bytes()),
        _ => None,
    }
}

/// Returns true where one of the needles stands in `text` and is no part of a longer word.
fn holds_one(text: &[u8], needles: &[Vec<u8>]) -> bool {
    let word = |byte: Option<&u8>| byte.is_some_and(|b| b.is_ascii_alphanumeric() || *b == b'_' || *b == b'-');
    needles.iter().filter(|needle| !needle.is_empty()).any(|needle| {
        let alone = |at: usize| {
            let before = at.checked_sub(1).and_then(|i| text.get(i));
            !word(before) && !word(text.get(at + needle.len()))
        };
        text.windows(needle.len()).enumerate().any(|(at, window)| window == needle.as_slice() && alone(at))
    })
}

/// Returns a bound of the log in microseconds since the epoch.
fn micros_of(spec: &TableSpec, column: &str, text: &str) -> Option<i64> {
    match spec.column(column)?.kind {
        Kind::Date => {
            let day = chrono::NaiveDate::parse_from_str(text, "%Y-%m-%d").ok()?;
            Some(day.and_hms_opt(0, 0, 0)?.and_utc().timestamp_micros())
        }
        Kind::Time => Some(chrono::DateTime::parse_from_rfc3339(text).ok()?.timestamp_micros()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::schema::QUERIES;

    #[test]
    fn a_needle_inside_a_longer_word_is_no_match() {
        let needles = [b"al-1".to_vec()];
        assert!(holds_one(br#"{"user":"al-1"}"#, &needles));
        assert!(holds_one(b"al-1", &needles));
        for longer in [&b"al-12"[..], b"xal-1", b"al-1-2", b"al-"] {
            assert!(!holds_one(longer, &needles), "{}", String::from_utf8_lossy(longer));
        }
    }

    #[test]
    fn a_condition_that_cannot_hold_is_refused_with_its_cause() {
        assert!(Selection::parse(&QUERIES, "tenant = 'a' and \"offset\" > 5").is_ok());
        for (sql, cause) in [("tenantt = 'a'", "tenantt"), ("tenant = ", ""), ("status + 1", "not true or false")] {
            let error = Selection::parse(&QUERIES, sql).unwrap_err().to_string();
            assert!(error.contains(sql) && error.contains(cause), "{error}");
        }
    }
}
