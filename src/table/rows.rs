//! Rows of small tables as plain structs, in and out.
//!
//! A field with a column goes there. A field without one goes into the table's `detail` column, a JSON object, and comes
//! back from it: a stage can record every number behind a decision without a column for each.

use arrow::array::RecordBatch;
use arrow::json::ArrayWriter;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};

use super::TableError;
use super::batch_of_any;
use super::schema::TableSpec;

/// Returns the batch of `rows`.
pub(super) fn to_batch<T: Serialize>(table: &str, spec: &TableSpec, rows: &[T]) -> Result<RecordBatch, TableError> {
    let misfit = |why: String| TableError::Rows { table: table.to_owned(), why };
    let mut fitted = Vec::with_capacity(rows.len());
    for row in rows {
        match serde_json::to_value(row).map_err(|e| misfit(e.to_string()))? {
            Value::Object(fields) => fitted.push(fit(spec, fields).map_err(misfit)?),
            other => return Err(misfit(format!("a row is {other}, not an object"))),
        }
    }
    batch_of_any(spec, &fitted)
}

/// Sorts the fields of a row into the columns of its table.
fn fit(spec: &TableSpec, fields: Map<String, Value>) -> Result<Map<String, Value>, String> {
    let (mut row, mut rest) = (Map::new(), Map::new());
    for (name, value) in fields {
        match spec.column(&name) {
            Some(column) if spec.rest().is_some_and(|r| r.name == column.name) => match value {
                Value::Object(detail) => rest.extend(detail),
                Value::Null => {}
                other => return Err(format!("{name} is {other}, not an object")),
            },
            Some(column) if column.holds_json() && !value.is_null() => {
                row.insert(name, Value::String(value.to_string()));
            }
            Some(_) => {
                row.insert(name, value);
            }
            None => {
                rest.insert(name, value);
            }
        }
    }
    match spec.rest() {
        Some(column) if !rest.is_empty() => {
            row.insert(column.name.to_owned(), Value::String(Value::Object(rest).to_string()));
        }
        None if !rest.is_empty() => {
            let names: Vec<&String> = rest.keys().collect();
            return Err(format!("there is no column for {names:?}"));
        }
        _ => {}
    }
    Ok(row)
}

/// Returns the rows of `batches`. Fields of `detail` stand beside the columns again.
pub(super) fn from_batches<T: DeserializeOwned>(
    table: &str,
    spec: &TableSpec,
    batches: &[RecordBatch],
) -> Result<Vec<T>, TableError> {
    let misfit = |why: String| TableError::Rows { table: table.to_owned(), why };
    let mut writer = ArrayWriter::new(Vec::new());
    let write = batches.iter().try_for_each(|batch| writer.write(batch)).and_then(|()| writer.finish());
    write.map_err(|e| misfit(e.to_string()))?;
    let text = writer.into_inner();
    if text.is_empty() {
        return Ok(Vec::new());
    }
    let found: Vec<Map<String, Value>> = serde_json::from_slice(&text).map_err(|e| misfit(e.to_string()))?;
    let read = |row| serde_json::from_value(Value::Object(unfold(spec, row)?)).map_err(|e| e.to_string());
    found.into_iter().map(read).collect::<Result<_, String>>().map_err(misfit)
}

fn unfold(spec: &TableSpec, row: Map<String, Value>) -> Result<Map<String, Value>, String> {
    let mut fields = Map::new();
    for (name, value) in row {
        let column = spec.column(&name).filter(|c| c.holds_json());
        let (Some(column), Value::String(text)) = (column, &value) else {
            fields.insert(name, value);
            continue;
        };
        let parsed: Value = serde_json::from_str(text).map_err(|e| format!("{name} is not JSON: {e}"))?;
        match parsed {
            Value::Object(detail) if spec.rest().is_some_and(|r| r.name == column.name) => {
                fields.extend(detail.clone());
                fields.insert(name, Value::Object(detail));
            }
            other => {
                fields.insert(name, other);
            }
        }
    }
    Ok(fields)
}
