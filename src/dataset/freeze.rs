//! Freezing: the tables in, a dataset's files out.
//!
//! Decisions about new prompts are stored in `splits` before anything can use them. Every writer of `splits` moves one
//! position by one, so of two that decide at once the second finds out, reads again and follows the first.

use std::collections::BTreeMap;
use std::path::Path;

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Int32Type, Int64Type, TimeUnit};

use crate::record::{Coordinates, Kind};
use crate::table::{Name, Suppressions, Table, Tables, TxnStep};

use super::manifest::{self, Inputs};
use super::{Dataset, DatasetError, QueryRow, Settings, SplitRow, WorkloadView, assemble, load};

/// The position that all writers of `splits` move.
const POSITION: &str = "taod/splits";

/// The reason under which rows are counted that an erasure has yet to take out.
const ERASED: &str = "erased";

/// How often a decision that another writer overtook is made again.
const ATTEMPTS: usize = 5;

/// What is read of `queries`.
const QUERY: &str = r#"select topic, partition, "offset", record_index, kind, ingest_date, event_time, request_id,
    trace_id, conversation_id, workload, tenant, feedback, prompt_hash, messages, tools, train_ok, reason, redacted,
    truncated, user_hash from t"#;

/// Freezes a round's dataset into `out`. Where one is there already, a resumed round gets that one.
pub async fn freeze(
    tables: &Tables,
    round: &str,
    settings: &Settings,
    workloads: &[WorkloadView],
    seed: u64,
    out: &Path,
) -> Result<Dataset, DatasetError> {
    if manifest::exists(out) {
        return load(out);
    }
    for _ in 0..ATTEMPTS {
        let erased = Suppressions::load(tables).await?;
        let queries = tables.open_one(Name::Queries).await?;
        let mut splits = tables.open_one(Name::Splits).await?;
        let position = splits.txn(POSITION).await?;
        let known: Vec<SplitRow> = splits.rows(None).await?;
        let (rows, hidden) = read(&queries, &erased).await?;
        let mut inputs = Inputs::of(BTreeMap::from([("queries".to_owned(), queries.version())]), &rows);
        let mut assembled = assemble(rows, known, workloads, settings, round, seed);
        if hidden > 0 {
            assembled.excluded.insert(ERASED.to_owned(), hidden);
            assembled.rows += hidden;
        }
        if !assembled.new_splits.is_empty() {
            let next = TxnStep { app_id: POSITION.to_owned(), expect: position, set: position.unwrap_or(0) + 1 };
            match splits.append_rows(&assembled.new_splits, &[next]).await {
                Ok(_) => {}
                Err(error) if error.is_restart() => continue,
                Err(error) => return Err(error.into()),
            }
        }
        inputs.tables.insert("splits".to_owned(), splits.version());
        return manifest::store(out, round, inputs, assembled, settings, seed);
    }
    Err(DatasetError::Contended { attempts: ATTEMPTS })
}

/// Returns the rows that may be looked at, and how many an erasure under way has yet to take out.
async fn read(queries: &Table, erased: &Suppressions) -> Result<(Vec<QueryRow>, u64), DatasetError> {
    let batches = queries.query(QUERY).await?;
    let mut rows = Vec::with_capacity(batches.iter().map(RecordBatch::num_rows).sum());
    let mut hidden = 0;
    for batch in &batches {
        let columns = Columns::of(batch)?;
        let whose = ["user_hash", "request_id"].map(|name| column(batch, name, &[DataType::Utf8]));
        let [users, requests] = whose;
        let (users, requests) = (users?, requests?);
        let text = |array: &ArrayRef, i| array.is_valid(i).then(|| array.as_string::<i32>().value(i).to_owned());
        for i in 0..batch.num_rows() {
            if !erased.is_empty() && erased.hides_call(text(&users, i).as_deref(), text(&requests, i).as_deref()) {
                hidden += 1;
                continue;
            }
            rows.push(columns.row(i)?);
        }
    }
    Ok((rows, hidden))
}

/// The columns of a batch. Readers may hand out text in several layouts, so each is brought into one.
struct Columns {
    text: BTreeMap<&'static str, ArrayRef>,
    numbers: BTreeMap<&'static str, ArrayRef>,
    flags: BTreeMap<&'static str, ArrayRef>,
}

impl Columns {
    fn of(batch: &RecordBatch) -> Result<Self, DatasetError> {
        let all = |names: &[&'static str], types: &[DataType]| -> Result<BTreeMap<_, _>, DatasetError> {
            names.iter().map(|&name| Ok((name, column(batch, name, types)?))).collect()
        };
        let ids = ["topic", "kind", "request_id", "trace_id", "conversation_id", "workload", "tenant", "prompt_hash"];
        let text = [&ids[..], &["feedback", "messages", "tools", "reason"]].concat();
        let micros = DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()));
        let mut numbers = all(&["partition", "offset", "record_index"], &[DataType::Int64])?;
        numbers.extend(all(&["ingest_date"], &[DataType::Date32, DataType::Int32])?);
        numbers.extend(all(&["event_time"], &[micros, DataType::Int64])?);
        Ok(Columns {
            text: all(&text, &[DataType::Utf8])?,
            numbers,
            flags: all(&["train_ok", "redacted", "truncated"], &[DataType::Boolean])?,
        })
    }

    fn row(&self, i: usize) -> Result<QueryRow, DatasetError> {
        Ok(QueryRow {
            coordinates: Coordinates {
                topic: self.required("topic", i)?,
                partition: self.narrow("partition", i)?,
                offset: self.number("offset", i)?,
                record_index: self.narrow("record_index", i)?,
            },
            kind: if self.required("kind", i)? == Kind::Feedback.as_str() { Kind::Feedback } else { Kind::Call },
            ingest_day: self.number("ingest_date", i)? as i32,
            event_time_us: self.number("event_time", i)?,
            request_id: self.optional("request_id", i),
            trace_id: self.optional("trace_id", i),
            conversation_id: self.optional("conversation_id", i),
            workload: self.optional("workload", i),
            tenant: self.optional("tenant", i),
            feedback: self.optional("feedback", i),
            prompt_hash: self.required("prompt_hash", i)?,
            messages: self.required("messages", i)?,
            tools: self.optional("tools", i),
            train_ok: self.flag("train_ok", i)?,
            reason: self.optional("reason", i),
            redacted: self.flag("redacted", i)?,
            truncated: self.flag("truncated", i)?,
        })
    }

    fn optional(&self, name: &'static str, i: usize) -> Option<String> {
        let column = self.text.get(name)?;
        column.is_valid(i).then(|| column.as_string::<i32>().value(i).to_owned())
    }

    fn required(&self, name: &'static str, i: usize) -> Result<String, DatasetError> {
        self.optional(name, i).ok_or_else(|| null(name))
    }

    fn number(&self, name: &'static str, i: usize) -> Result<i64, DatasetError> {
        let column = self.numbers.get(name).filter(|column| column.is_valid(i)).ok_or_else(|| null(name))?;
        Ok(match column.data_type() {
            DataType::Int32 => column.as_primitive::<Int32Type>().value(i).into(),
            _ => column.as_primitive::<Int64Type>().value(i),
        })
    }

    fn narrow(&self, name: &'static str, i: usize) -> Result<i32, DatasetError> {
        let value = self.number(name, i)?;
        i32::try_from(value).map_err(|_| DatasetError::Column { column: name, why: format!("holds {value}") })
    }

    fn flag(&self, name: &'static str, i: usize) -> Result<bool, DatasetError> {
        let column = self.flags.get(name).filter(|column| column.is_valid(i)).ok_or_else(|| null(name))?;
        Ok(column.as_boolean().value(i))
    }
}

/// Returns a column after casting it through the types given.
fn column(batch: &RecordBatch, name: &'static str, types: &[DataType]) -> Result<ArrayRef, DatasetError> {
    let missing = || DatasetError::Column { column: name, why: "is missing".to_owned() };
    let found = batch.column_by_name(name).cloned().ok_or_else(missing)?;
    let misfit = |e: arrow::error::ArrowError| DatasetError::Column { column: name, why: e.to_string() };
    types.iter().try_fold(found, |array, wanted| cast(&array, wanted).map_err(misfit))
}

fn null(column: &'static str) -> DatasetError {
    DatasetError::Column { column, why: "is null in a row".to_owned() }
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
        let row = Columns::of(&batch).unwrap().row(0).unwrap();
        let place = Coordinates { topic: "calls".into(), partition: 3, offset: 1 << 40, record_index: 1 };
        assert_eq!((row.coordinates, row.ingest_day, row.event_time_us), (place, 20_000, 1_772_366_400_250_000));
        assert_eq!((row.workload.as_deref(), row.tenant, row.reason.as_deref()), (Some("w"), None, Some("self")));
        assert_eq!((row.request_id.as_deref(), row.feedback.as_deref()), (Some("r"), Some(r#"{"thumb":"up"}"#)));
        assert!(!row.train_ok && row.truncated);
        let fewer = batch.project(&[0, 1]).unwrap();
        let error = Columns::of(&fewer).err().unwrap().to_string();
        assert!(error.contains("offset") && error.contains("missing"), "{error}");
    }
}
