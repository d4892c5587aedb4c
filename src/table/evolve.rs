//! Columns that this taod knows and an older table lacks.
//!
//! A column that may be null is added when a table is opened, by a metadata commit of its own before anything else is
//! done with the table; the rows that are there read as null. It never happens in the middle of a session: a column that
//! vanishes under a writer is a foreign change, which ends it. A column that every row must fill cannot be added, and
//! columns that only a newer taod knows are left alone.

use deltalake::kernel::Snapshot;
use deltalake::kernel::transaction::TransactionError;
use deltalake::logstore::{CommitOrBytes, LogStoreRef};
use serde_json::{Value, json};
use uuid::Uuid;

use super::TableError;
use super::commit::now_ms;
use super::log::{self, Metadata, Protocol};
use super::schema::TableSpec;

/// How many commits of others may come in between.
const ATTEMPTS: u32 = 20;

/// Adds the columns that are missing, if any.
pub(super) async fn add_columns(log: &LogStoreRef, name: &str, spec: &TableSpec) -> Result<(), TableError> {
    for _ in 0..ATTEMPTS {
        let snapshot = Snapshot::try_new(log.as_ref(), None).await;
        let snapshot = snapshot.map_err(|e| TableError::store("cannot open", name, e))?;
        let version = snapshot.version();
        let retell = |source| TableError::Log { table: name.to_owned(), version, source };
        let mut metadata = serde_json::to_value(snapshot.metadata()).map_err(retell)?;
        let added = complete(&mut metadata, spec).map_err(retell)?;
        if added.is_empty() {
            return Ok(());
        }
        // What does not fit for another reason is left as it is, for the opening to refuse.
        let protocol = serde_json::to_value(snapshot.protocol()).map_err(retell)?;
        serde_json::from_value::<Protocol>(protocol).map_err(retell)?.check(name)?;
        serde_json::from_value::<Metadata>(metadata.clone()).map_err(retell)?.check(name, spec)?;
        let id = Uuid::new_v4();
        let bytes = log::new_metadata(id, version, &metadata, &added, now_ms());
        match log.write_commit_entry(version + 1, CommitOrBytes::LogBytes(bytes), id).await {
            Ok(()) => {
                tracing::info!(table = name, version = version + 1, columns = added.join(", "), "columns were added");
                return Ok(());
            }
            Err(TransactionError::VersionAlreadyExists(_)) => {}
            // Should it have landed all the same, the next opening finds nothing to add.
            Err(error) => return Err(TableError::store("cannot add columns to", name, error)),
        }
    }
    Err(TableError::Conflict { table: name.to_owned() })
}

/// Returns the columns that [`add_columns`] would add; an error where the table does not fit for another reason.
pub(super) async fn lacking(log: &LogStoreRef, name: &str, spec: &TableSpec) -> Result<Vec<String>, TableError> {
    let snapshot = Snapshot::try_new(log.as_ref(), None).await;
    let snapshot = snapshot.map_err(|e| TableError::store("cannot open", name, e))?;
    let retell = |source| TableError::Log { table: name.to_owned(), version: snapshot.version(), source };
    let mut metadata = serde_json::to_value(snapshot.metadata()).map_err(retell)?;
    let added = complete(&mut metadata, spec).map_err(retell)?;
    serde_json::from_value::<Metadata>(metadata).map_err(retell)?.check(name, spec)?;
    Ok(added)
}

/// Adds to the schema in `metadata` the optional columns it lacks, and returns their names.
fn complete(metadata: &mut Value, spec: &TableSpec) -> serde_json::Result<Vec<String>> {
    let text = metadata["schemaString"].as_str().unwrap_or_default();
    let mut schema: Value = serde_json::from_str(text)?;
    let wanted = spec.delta_schema();
    let mut added = Vec::new();
    if let (Some(fields), Some(wanted)) = (schema["fields"].as_array_mut(), wanted["fields"].as_array()) {
        for field in wanted.iter().filter(|field| field["nullable"] == json!(true)) {
            if !fields.iter().any(|found| found["name"] == field["name"]) {
                fields.push(field.clone());
                added.extend(field["name"].as_str().map(str::to_owned));
            }
        }
    }
    metadata["schemaString"] = json!(schema.to_string());
    Ok(added)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::schema::{self, Column, Kind};
    use crate::table::{Table, TableLocation, TxnStep};

    fn without(spec: &TableSpec, name: &str) -> &'static TableSpec {
        let columns: Vec<Column> = spec.columns.iter().filter(|c| c.name != name).copied().collect();
        Box::leak(Box::new(TableSpec { name: spec.name, columns: Box::leak(columns.into_boxed_slice()) }))
    }

    fn row(step: i64) -> Value {
        json!({ "cluster": "c", "trial": "t", "step": step })
    }

    async fn append(table: &mut Table, step: i64) {
        table.refresh().await.unwrap();
        let expect = table.txn("test").await.unwrap();
        let txn = TxnStep { app_id: "test".into(), expect, set: step };
        table.append_rows(&[row(step)], &[txn]).await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_column_that_an_older_table_lacks_is_added_once_and_its_old_rows_are_null() {
        let folder = tempfile::tempdir().unwrap();
        let place = TableLocation::parse(&folder.path().to_string_lossy(), &Default::default()).unwrap();
        let older = without(&schema::GATE_USAGE, "time");
        let mut old = Table::open_or_create(&place, older).await.unwrap();
        append(&mut old, 1).await;
        let mut new = Table::open_or_create(&place, &schema::GATE_USAGE).await.unwrap();
        assert_eq!(new.version(), 2, "one commit for the column");
        let now = json!({ "cluster": "c", "trial": "t", "step": 2, "time": "2026-02-03T04:05:06Z" });
        new.append_rows(&[now], &[TxnStep { app_id: "test".into(), expect: Some(1), set: 2 }]).await.unwrap();
        append(&mut old, 3).await;
        let again = Table::open_or_create(&place, &schema::GATE_USAGE).await.unwrap();
        assert_eq!(again.version(), 4, "nothing left to add, and the older writer went on");
        #[derive(Debug, serde::Deserialize, PartialEq, Eq)]
        struct Row {
            step: i64,
            time: Option<String>,
        }
        let rows: Vec<Row> = again.select("select step, time from t order by step").await.unwrap();
        let time = |row: &Row| row.time.is_some();
        assert_eq!(rows.iter().map(time).collect::<Vec<_>>(), [false, true, false], "{rows:?}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_column_that_every_row_must_fill_is_not_added() {
        let folder = tempfile::tempdir().unwrap();
        let place = TableLocation::parse(&folder.path().to_string_lossy(), &Default::default()).unwrap();
        Table::open_or_create(&place, without(&schema::GATE_USAGE, "trial")).await.unwrap();
        let error = Table::open_or_create(&place, &schema::GATE_USAGE).await.err().unwrap();
        assert!(error.to_string().contains("it has no column \"trial\""), "{error}");
    }

    #[test]
    fn both_kinds_of_column_are_told_apart() {
        let mut metadata = json!({ "schemaString": json!({ "type": "struct", "fields": [] }).to_string() });
        let added = complete(&mut metadata, &schema::ROUNDS).unwrap();
        assert_eq!(added, ["reason", "seed", "detail"]);
        assert!(schema::ROUNDS.column("detail").is_some_and(|c| c.kind == Kind::Rest));
    }
}
