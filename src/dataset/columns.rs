//! Columns of a batch as plain values. Readers may hand out text in several layouts, so each is brought into one.

use std::collections::BTreeMap;

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Float64Type, Int32Type, Int64Type, TimeUnit};

use crate::record::Kind;

use super::DatasetError;
use super::census::Row;

/// What is read of every row: nothing that is text of the log.
pub(super) const LIGHT: &str = r#"topic, partition, "offset", record_index, kind, ingest_date, event_time, request_id, trace_id,
    conversation_id, workload, tenant, model, served_version, "format", user_hash, prompt_hash, train_ok, reason, redacted,
    truncated"#;

/// The columns of a batch by their names.
pub(super) struct Columns {
    table: &'static str,
    columns: BTreeMap<String, ArrayRef>,
}

impl Columns {
    /// Brings every column of a batch into its plain layout.
    pub(super) fn of(table: &'static str, batch: &RecordBatch) -> Result<Self, DatasetError> {
        let mut columns = BTreeMap::new();
        for (field, column) in batch.schema().fields().iter().zip(batch.columns()) {
            let misfit = |e: arrow::error::ArrowError| DatasetError::Column {
                table,
                column: field.name().clone(),
                why: e.to_string(),
            };
            let mut plain = column.clone();
            for wanted in layout(column.data_type()) {
                plain = cast(&plain, wanted).map_err(misfit)?;
            }
            columns.insert(field.name().clone(), plain);
        }
        Ok(Columns { table, columns })
    }

    /// Returns the light columns of a row of `queries`.
    pub(super) fn row(&self, i: usize) -> Result<Row<'_>, DatasetError> {
        Ok(Row {
            topic: self.text("topic", i)?,
            partition: self.narrow("partition", i)?,
            offset: self.number("offset", i)?,
            record_index: self.narrow("record_index", i)?,
            kind: if self.text("kind", i)? == Kind::Feedback.as_str() { Kind::Feedback } else { Kind::Call },
            ingest_day: self.number("ingest_date", i)? as i32,
            event_time_us: self.number("event_time", i)?,
            request_id: self.optional("request_id", i),
            trace_id: self.optional("trace_id", i),
            conversation_id: self.optional("conversation_id", i),
            workload: self.optional("workload", i),
            tenant: self.optional("tenant", i),
            model: self.optional("model", i),
            served_version: self.optional("served_version", i),
            format: self.optional("format", i).unwrap_or_default(),
            user_hash: self.optional("user_hash", i),
            headers: self.optional("headers", i),
            extra: self.optional("extra", i),
            is_wanted: self.columns.get("is_wanted").is_none_or(|_| self.flag("is_wanted", i).unwrap_or(false)),
            prompt_hash: self.text("prompt_hash", i)?,
            train_ok: self.flag("train_ok", i)?,
            reason: self.optional("reason", i),
            redacted: self.flag("redacted", i)?,
            truncated: self.flag("truncated", i)?,
        })
    }

    fn column(&self, name: &str) -> Result<&ArrayRef, DatasetError> {
        self.columns.get(name).ok_or_else(|| self.fault(name, "is missing"))
    }

    fn fault(&self, name: &str, why: impl Into<String>) -> DatasetError {
        DatasetError::Column { table: self.table, column: name.to_owned(), why: why.into() }
    }

    fn null(&self, name: &str) -> DatasetError {
        self.fault(name, "is null in a row")
    }

    /// Returns a text, or nothing where it is null or no text.
    pub(super) fn optional(&self, name: &str, i: usize) -> Option<&str> {
        let column = self.columns.get(name)?.as_string_opt::<i32>()?;
        column.is_valid(i).then(|| column.value(i))
    }

    pub(super) fn text(&self, name: &str, i: usize) -> Result<&str, DatasetError> {
        self.column(name)?;
        self.optional(name, i).ok_or_else(|| self.null(name))
    }

    pub(super) fn optional_number(&self, name: &str, i: usize) -> Option<i64> {
        let column = self.columns.get(name).filter(|column| column.is_valid(i))?;
        match column.data_type() {
            DataType::Int32 => Some(column.as_primitive::<Int32Type>().value(i).into()),
            DataType::Int64 => Some(column.as_primitive::<Int64Type>().value(i)),
            _ => None,
        }
    }

    pub(super) fn number(&self, name: &str, i: usize) -> Result<i64, DatasetError> {
        self.column(name)?;
        self.optional_number(name, i).ok_or_else(|| self.null(name))
    }

    pub(super) fn narrow(&self, name: &str, i: usize) -> Result<i32, DatasetError> {
        let value = self.number(name, i)?;
        i32::try_from(value).map_err(|_| self.fault(name, format!("holds {value}")))
    }

    pub(super) fn fraction(&self, name: &str, i: usize) -> Option<f64> {
        let column = self.columns.get(name)?.as_primitive_opt::<Float64Type>()?;
        column.is_valid(i).then(|| column.value(i))
    }

    pub(super) fn bytes(&self, name: &str, i: usize) -> Option<&[u8]> {
        let column = self.columns.get(name)?.as_binary_opt::<i32>()?;
        column.is_valid(i).then(|| column.value(i))
    }

    pub(super) fn flag(&self, name: &str, i: usize) -> Result<bool, DatasetError> {
        let column = self.column(name)?.as_boolean_opt().filter(|column| column.is_valid(i));
        Ok(column.ok_or_else(|| self.null(name))?.value(i))
    }
}

/// Returns the layouts through which a column is brought into its plain one.
fn layout(found: &DataType) -> &'static [DataType] {
    const MICROS: DataType = DataType::Timestamp(TimeUnit::Microsecond, None);
    match found {
        DataType::Dictionary(..) | DataType::LargeUtf8 | DataType::Utf8View => &[DataType::Utf8],
        DataType::LargeBinary | DataType::BinaryView => &[DataType::Binary],
        DataType::Date32 => &[DataType::Int32],
        DataType::Timestamp(..) => &[MICROS, DataType::Int64],
        DataType::UInt64 => &[DataType::Int64],
        _ => &[],
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{
        BooleanArray, Date32Array, DictionaryArray, Int32Array, Int64Array, LargeStringArray, StringArray,
        StringViewArray, TimestampMicrosecondArray,
    };
    use arrow::datatypes::Int32Type;

    use super::*;

    #[test]
    fn rows_are_read_from_any_text_layout() {
        let words: DictionaryArray<Int32Type> = vec!["calls"].into_iter().collect();
        let batch = RecordBatch::try_from_iter([
            ("topic", Arc::new(words) as ArrayRef),
            ("partition", Arc::new(Int32Array::from(vec![3]))),
            ("offset", Arc::new(Int64Array::from(vec![1i64 << 40]))),
            ("record_index", Arc::new(Int32Array::from(vec![1]))),
            ("kind", Arc::new(StringViewArray::from(vec!["call"]))),
            ("ingest_date", Arc::new(Date32Array::from(vec![20_000]))),
            ("event_time", Arc::new(TimestampMicrosecondArray::from(vec![1_772_366_400_250_000]).with_timezone("UTC"))),
            ("request_id", Arc::new(StringArray::from(vec!["r"]))),
            ("trace_id", Arc::new(StringArray::from(vec![None::<&str>]))),
            ("conversation_id", Arc::new(StringArray::from(vec![None::<&str>]))),
            ("feedback", Arc::new(StringArray::from(vec![r#"{"thumb":"up"}"#]))),
            ("workload", Arc::new(LargeStringArray::from(vec!["w"]))),
            ("tenant", Arc::new(StringArray::from(vec![None::<&str>]))),
            ("prompt_hash", Arc::new(StringArray::from(vec!["h"]))),
            ("messages", Arc::new(StringViewArray::from(vec!["[]"]))),
            ("tools", Arc::new(StringArray::from(vec![None::<&str>]))),
            ("train_ok", Arc::new(BooleanArray::from(vec![false]))),
            ("reason", Arc::new(StringArray::from(vec!["self"]))),
            ("redacted", Arc::new(BooleanArray::from(vec![false]))),
            ("truncated", Arc::new(BooleanArray::from(vec![true]))),
        ])
        .unwrap();
        let columns = Columns::of("queries", &batch).unwrap();
        let row = columns.row(0).unwrap();
        assert_eq!((row.topic, row.partition, row.offset, row.record_index), ("calls", 3, 1 << 40, 1));
        assert_eq!((row.ingest_day, row.event_time_us), (20_000, 1_772_366_400_250_000));
        assert_eq!((row.workload, row.tenant, row.reason), (Some("w"), None, Some("self")));
        assert_eq!((row.request_id, columns.optional("feedback", 0)), (Some("r"), Some(r#"{"thumb":"up"}"#)));
        assert!(!row.train_ok && row.truncated);
        let fewer = batch.project(&[0, 1]).unwrap();
        let error = Columns::of("queries", &fewer).unwrap().row(0).unwrap_err().to_string();
        assert!(error.contains("offset") && error.contains("missing"), "{error}");
    }
}
