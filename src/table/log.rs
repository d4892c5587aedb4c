//! The lines of a commit: what taod writes into the Delta log, and what it must understand of what others write there.
//!
//! taod's commits bypass delta-rs's own checks (they cost a listing and a replay per commit), so every protocol or
//! metadata action that appears is judged here against what these commits can honour.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;

use super::TableError;
use super::schema::TableSpec;

/// Table features that a blind append honours without doing anything more.
const FEATURES: [&str; 6] =
    ["appendOnly", "invariants", "deletionVectors", "domainMetadata", "v2Checkpoint", "vacuumProtocolCheck"];

/// One line of a commit, with the actions that matter here; all others are read over.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Line {
    pub(super) txn: Option<Txn>,
    pub(super) protocol: Option<Protocol>,
    pub(super) meta_data: Option<Metadata>,
    pub(super) add: Option<Added>,
    pub(super) remove: Option<Removed>,
}

/// A data file that someone's commit adds.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Added {
    pub(super) path: String,
    pub(super) size: u64,
    #[serde(default)]
    pub(super) stats: Option<String>,
    #[serde(default)]
    pub(super) deletion_vector: Option<Value>,
}

/// A data file that someone's commit takes out of the table.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Removed {
    pub(super) path: String,
}

/// How far an application got; stored in the commit that took it there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Txn {
    pub(super) app_id: String,
    pub(super) version: i64,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Protocol {
    min_reader_version: i32,
    min_writer_version: i32,
    #[serde(default)]
    reader_features: Option<Vec<String>>,
    #[serde(default)]
    writer_features: Option<Vec<String>>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Metadata {
    schema_string: String,
    #[serde(default)]
    partition_columns: Vec<String>,
    #[serde(default)]
    configuration: BTreeMap<String, Option<String>>,
}

/// A data file that a commit adds.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Add {
    pub(super) path: String,
    pub(super) partition_values: BTreeMap<String, String>,
    pub(super) size: u64,
    pub(super) modification_time: i64,
    pub(super) data_change: bool,
    pub(super) stats: String,
}

/// Reads the lines of a commit.
pub(super) fn parse(table: &str, version: u64, bytes: &[u8]) -> Result<Vec<Line>, TableError> {
    let lines = serde_json::Deserializer::from_slice(bytes).into_iter::<Line>();
    lines.collect::<Result<_, _>>().map_err(|source| TableError::Log { table: table.to_owned(), version, source })
}

/// Returns the bytes of an append. `id` makes them unlike any other writer's, so that a commit can be recognised.
///
/// `note` says why in the commit's info, where the reason is more than new rows.
pub(super) fn append(
    id: Uuid,
    read_version: u64,
    adds: &[Add],
    txns: &[Txn],
    note: Option<&Value>,
    now_ms: i64,
) -> Bytes {
    let mut info = json!({ "commitInfo": {
        "timestamp": now_ms,
        "operation": "WRITE",
        "operationParameters": { "mode": "Append", "partitionBy": "[]" },
        "operationMetrics": { "num_added_files": adds.len() },
        "readVersion": read_version,
        "isolationLevel": "Serializable",
        "isBlindAppend": true,
        "engineInfo": engine(),
        "txnId": id,
    }});
    if let Some(note) = note {
        info["commitInfo"]["taod"] = note.clone();
    }
    let mut lines = vec![info];
    lines.extend(txns.iter().map(|txn| json!({ "txn": txn })));
    lines.extend(adds.iter().map(|add| json!({ "add": add })));
    join(&lines)
}

/// A data file that one of our commits takes out of the table.
#[derive(Debug, Clone)]
pub(super) struct Remove {
    pub(super) path: String,
    pub(super) size: u64,
}

/// Why files stand in the place of others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rewrite {
    /// They hold the same rows.
    Compaction,
    /// They hold what is left of the rows. The commit tells no predicate: that would name whom the others were about.
    Erasure,
}

/// Returns the bytes of a commit that puts `adds` in the place of `removes`.
pub(super) fn rewrite(
    id: Uuid,
    read_version: u64,
    rewrite: Rewrite,
    removes: &[Remove],
    adds: &[Add],
    now_ms: i64,
) -> Bytes {
    let (operation, parameters, isolation) = match rewrite {
        Rewrite::Compaction => ("OPTIMIZE", json!({ "predicate": "[]" }), "SnapshotIsolation"),
        Rewrite::Erasure => ("DELETE", json!({}), "Serializable"),
    };
    let mut lines = vec![json!({ "commitInfo": {
        "timestamp": now_ms,
        "operation": operation,
        "operationParameters": parameters,
        "operationMetrics": { "num_removed_files": removes.len(), "num_added_files": adds.len() },
        "readVersion": read_version,
        "isolationLevel": isolation,
        "isBlindAppend": false,
        "engineInfo": engine(),
        "txnId": id,
    }})];
    lines.extend(removes.iter().map(|remove| {
        json!({ "remove": {
            "path": remove.path,
            "deletionTimestamp": now_ms,
            "dataChange": rewrite == Rewrite::Erasure,
            "extendedFileMetadata": true,
            "partitionValues": {},
            "size": remove.size,
        }})
    }));
    lines.extend(adds.iter().map(|add| json!({ "add": add })));
    join(&lines)
}

/// Returns the bytes of a commit that adds columns by new metadata.
pub(super) fn new_metadata(id: Uuid, read_version: u64, metadata: &Value, added: &[String], now_ms: i64) -> Bytes {
    join(&[
        json!({ "commitInfo": {
            "timestamp": now_ms,
            "operation": "ADD COLUMNS",
            "operationParameters": { "columns": json!(added).to_string() },
            "readVersion": read_version,
            "isBlindAppend": false,
            "engineInfo": engine(),
            "txnId": id,
        }}),
        json!({ "metaData": metadata }),
    ])
}

/// Returns the bytes of the commit that creates a table.
pub(super) fn create(id: Uuid, spec: &TableSpec, now_ms: i64) -> Bytes {
    let mut configuration = json!({
        "delta.logRetentionDuration": "interval 2 days",
        "delta.deletedFileRetentionDuration": "interval 2 days",
    });
    match spec.stats_columns() {
        none if none.is_empty() => configuration["delta.dataSkippingNumIndexedCols"] = json!("0"),
        names => configuration["delta.dataSkippingStatsColumns"] = json!(names),
    }
    join(&[
        json!({ "commitInfo": {
            "timestamp": now_ms,
            "operation": "CREATE TABLE",
            "operationParameters": {},
            "isBlindAppend": true,
            "engineInfo": engine(),
            "txnId": id,
        }}),
        json!({ "protocol": { "minReaderVersion": 1, "minWriterVersion": 2 } }),
        json!({ "metaData": {
            "id": id,
            "name": spec.name,
            "format": { "provider": "parquet", "options": {} },
            "schemaString": spec.delta_schema().to_string(),
            "partitionColumns": [],
            "createdTime": now_ms,
            "configuration": configuration,
        }}),
    ])
}

fn engine() -> String {
    format!("taod/{}", env!("CARGO_PKG_VERSION"))
}

fn join(lines: &[Value]) -> Bytes {
    let text: Vec<String> = lines.iter().map(Value::to_string).collect();
    Bytes::from(text.join("\n"))
}

impl Protocol {
    /// Returns true where the table asks for this feature.
    pub(super) fn has(&self, feature: &str) -> bool {
        self.reader_features.iter().chain(&self.writer_features).flatten().any(|asked| asked == feature)
    }

    /// Refuses a table that asks of its writers what taod's commits do not do.
    pub(super) fn check(&self, table: &str) -> Result<(), TableError> {
        let refuse = |feature: String| TableError::Feature { table: table.to_owned(), feature };
        // By name first: a feature can be dropped, a version cannot.
        let mut asked = self.writer_features.iter().chain(&self.reader_features).flatten();
        if let Some(feature) = asked.find(|feature| !FEATURES.contains(&feature.as_str())) {
            return Err(refuse(format!("table feature {feature}")));
        }
        match (self.min_reader_version, self.min_writer_version) {
            (1 | 3, 7) | (1, ..=2) => Ok(()),
            // Before there were features, a version asked for all that came up to it.
            (reader, writer @ ..=6) => Err(refuse(format!(
                "reader version {reader} and writer version {writer} ({})",
                match writer {
                    ..=3 => "table feature checkConstraints",
                    4 => "table feature changeDataFeed and table feature generatedColumns",
                    5 => "table feature columnMapping",
                    _ => "table feature identityColumns",
                }
            ))),
            (reader, writer) => Err(refuse(format!("reader version {reader} and writer version {writer}"))),
        }
    }
}

impl Metadata {
    /// Returns true where rows may only come.
    pub(super) fn is_append_only(&self) -> bool {
        self.configuration.get("delta.appendOnly").and_then(Option::as_deref).is_some_and(|v| v.trim() == "true")
    }

    /// Refuses a table whose columns or properties do not let these rows and offsets be kept.
    ///
    /// Columns that someone added are fine where they may be null.
    pub(super) fn check(&self, table: &str, spec: &TableSpec) -> Result<(), TableError> {
        let refuse = |why: String| TableError::Schema { table: table.to_owned(), why };
        if !self.partition_columns.is_empty() {
            return Err(refuse(format!("it is partitioned by {}", self.partition_columns.join(", "))));
        }
        for key in self.configuration.keys() {
            if key == "delta.setTransactionRetentionDuration" || key.starts_with("delta.constraints.") {
                return Err(refuse(format!("the property {key} is set; unset it")));
            }
        }
        let schema: Value = serde_json::from_str(&self.schema_string).map_err(|e| refuse(e.to_string()))?;
        let found = schema["fields"].as_array().cloned().unwrap_or_default();
        let wanted = spec.delta_schema();
        for field in wanted["fields"].as_array().into_iter().flatten() {
            let same = found.iter().find(|f| f["name"] == field["name"]);
            let same = same.ok_or_else(|| refuse(format!("it has no column {}", field["name"])))?;
            if same["type"] != field["type"] {
                return Err(refuse(format!(
                    "column {} has type {}, not {}",
                    field["name"], same["type"], field["type"]
                )));
            }
        }
        for field in &found {
            let known = field["name"].as_str().is_some_and(|name| spec.column(name).is_some());
            let invariant = field["metadata"].get("delta.invariants").is_some();
            if invariant || (!known && field["nullable"] == json!(false)) {
                return Err(refuse(format!("column {} asks for values that taod does not give", field["name"])));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::schema::QUERIES;

    fn lines(bytes: &[u8]) -> Vec<Line> {
        parse("t", 0, bytes).unwrap()
    }

    #[test]
    fn a_table_as_created_here_passes_its_own_checks() {
        let created = lines(&create(Uuid::nil(), &QUERIES, 0));
        created[1].protocol.as_ref().unwrap().check("queries").unwrap();
        created[2].meta_data.as_ref().unwrap().check("queries", &QUERIES).unwrap();
    }

    #[test]
    fn features_that_a_blind_append_would_break_are_refused_by_name() {
        let protocol = |text: &str| serde_json::from_str::<Protocol>(text).unwrap().check("queries");
        protocol(r#"{"minReaderVersion":3,"minWriterVersion":7,"readerFeatures":["deletionVectors"],"writerFeatures":["deletionVectors"]}"#).unwrap();
        let error =
            protocol(r#"{"minReaderVersion":1,"minWriterVersion":7,"writerFeatures":["appendOnly","rowTracking"]}"#);
        assert!(error.unwrap_err().to_string().contains("rowTracking"));
        let error = protocol(r#"{"minReaderVersion":2,"minWriterVersion":5}"#).unwrap_err().to_string();
        assert!(error.contains("reader version 2 and writer version 5 (table feature columnMapping)"), "{error}");
        let error = protocol(r#"{"minReaderVersion":2,"minWriterVersion":7,"writerFeatures":["columnMapping"]}"#);
        assert!(error.unwrap_err().to_string().contains("table feature columnMapping"));
        assert!(protocol(r#"{"minReaderVersion":1,"minWriterVersion":4}"#).is_err());
        assert!(protocol(r#"{"minReaderVersion":4,"minWriterVersion":7}"#).is_err());
    }

    #[test]
    fn a_foreign_change_of_columns_or_properties_is_judged() {
        let with = |edit: &dyn Fn(&mut Value, &mut Value)| {
            let mut schema = QUERIES.delta_schema();
            let mut metadata = json!({ "schemaString": "", "partitionColumns": [], "configuration": {} });
            edit(&mut schema, &mut metadata);
            metadata["schemaString"] = json!(schema.to_string());
            serde_json::from_value::<Metadata>(metadata).unwrap().check("queries", &QUERIES)
        };
        let add = |nullable: bool| {
            move |schema: &mut Value, _: &mut Value| {
                let field = json!({ "name": "x", "type": "string", "nullable": nullable, "metadata": {} });
                schema["fields"].as_array_mut().unwrap().push(field);
            }
        };
        with(&add(true)).unwrap();
        with(&add(false)).unwrap_err();
        with(&|schema, _| schema["fields"][2]["type"] = json!("string")).unwrap_err();
        with(&|schema, _| drop(schema["fields"].as_array_mut().unwrap().remove(2))).unwrap_err();
        with(&|_, meta| meta["partitionColumns"] = json!(["topic"])).unwrap_err();
        with(&|_, meta| meta["configuration"]["delta.setTransactionRetentionDuration"] = json!("interval 1 day"))
            .unwrap_err();
    }
}
