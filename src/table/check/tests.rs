//! A table is damaged in every way that is looked for, one at a time, and each is found and nothing else.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::*;
use crate::table::{TxnStep, batch_of_any, schema};

const APP: &str = "taod/kafka/0/t/0";

struct Bench {
    folder: tempfile::TempDir,
    tables: Tables,
}

impl Bench {
    /// Three commits of two letters each.
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let tables = Tables::open(folder.path()).unwrap();
        let bench = Bench { folder, tables };
        for commit in 0..3 {
            bench.append(&[commit * 2, commit * 2 + 1], commit * 2 + 2).await;
        }
        bench
    }

    async fn append(&self, offsets: &[i64], next: i64) {
        let mut table = self.tables.open_one(Name::DeadLetters).await.unwrap();
        let letter = |offset: &i64| {
            json!({ "topic": "t", "partition": 0, "offset": offset, "record_index": 0, "ingest_date": "2026-02-03",
                    "kafka_time": 1_700_000_000_000_001i64, "payload": "00", "reason": "r", "message": "m",
                    "taod_version": "0", "config_hash": "c" })
        };
        let letters: Vec<Value> = offsets.iter().map(letter).collect();
        let expect = table.txn(APP).await.unwrap();
        let step = TxnStep { app_id: APP.into(), expect, set: next };
        table.append(&[batch_of_any(&schema::DEAD_LETTERS, &letters).unwrap()], &[step]).await.unwrap();
    }

    fn place(&self) -> PathBuf {
        self.folder.path().join("dead_letters")
    }

    fn entry(&self, version: u64) -> PathBuf {
        self.place().join(format!("_delta_log/{version:020}.json"))
    }

    /// Rewrites the lines of a log entry.
    fn edit(&self, version: u64, edit: impl Fn(&mut Value)) {
        let text = fs::read_to_string(self.entry(version)).unwrap();
        let lines = text.lines().map(|line| {
            let mut line: Value = serde_json::from_str(line).unwrap();
            edit(&mut line);
            line.to_string()
        });
        let lines: Vec<String> = lines.collect();
        fs::write(self.entry(version), lines.join("\n")).unwrap();
    }

    fn edit_stats(&self, version: u64, edit: impl Fn(&mut Value)) {
        self.edit(version, |line| {
            if let Some(text) = line["add"]["stats"].as_str() {
                let mut stats: Value = serde_json::from_str(text).unwrap();
                edit(&mut stats);
                line["add"]["stats"] = json!(stats.to_string());
            }
        });
    }

    fn data_file(&self) -> PathBuf {
        let is_data = |path: &PathBuf| path.extension().is_some_and(|e| e == "parquet");
        fs::read_dir(self.place()).unwrap().map(|e| e.unwrap().path()).find(is_data).unwrap()
    }

    async fn faults(&self) -> Vec<Fault> {
        let ids = |topic: &str, partition: i32| vec![format!("taod/kafka/0/{topic}/{partition}")];
        let findings = all(&self.tables, &Name::ALL, &ids).await.unwrap();
        assert!(findings.iter().all(|f| !f.detail.is_empty() && f.table == "dead_letters"), "{findings:?}");
        let mut faults: Vec<Fault> = findings.iter().map(|f| f.fault).collect();
        faults.sort();
        faults
    }
}

fn shorten(path: &Path) {
    let bytes = fs::read(path).unwrap();
    fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sound_table_has_no_finding_before_and_after_a_checkpoint() {
    let bench = Bench::new().await;
    assert_eq!(bench.faults().await, []);
    bench.tables.open_one(Name::DeadLetters).await.unwrap().maintain().await.unwrap();
    fs::remove_file(bench.entry(0)).unwrap();
    assert_eq!(bench.faults().await, [], "the checkpoint stands for what was cleaned up");
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_to_files_is_found() {
    let bench = Bench::new().await;
    let bytes = fs::read(bench.data_file()).unwrap();
    fs::write(bench.data_file(), [&bytes[..], b"x"].concat()).unwrap();
    assert_eq!(bench.faults().await, [Fault::FileSize, Fault::FileUnreadable]);
    shorten(&bench.data_file());
    assert_eq!(bench.faults().await, [Fault::FileSize, Fault::FileUnreadable]);
    fs::remove_file(bench.data_file()).unwrap();
    assert_eq!(bench.faults().await, [Fault::FileMissing]);
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_to_the_log_is_found() {
    let bench = Bench::new().await;
    bench.edit(3, |line| {
        if line["txn"].is_object() {
            line["txn"]["version"] = json!(3);
        }
    });
    assert_eq!(bench.faults().await, [Fault::PositionBackwards, Fault::RowPastPosition]);
    fs::write(bench.entry(3), "{\"add\":").unwrap();
    assert_eq!(bench.faults().await, [Fault::LogEntry, Fault::Unreadable]);
    let bench = Bench::new().await;
    fs::remove_file(bench.entry(2)).unwrap();
    assert_eq!(bench.faults().await, [Fault::LogGap, Fault::Unreadable]);
    let bench = Bench::new().await;
    fs::remove_file(bench.entry(0)).unwrap();
    assert_eq!(bench.faults().await, [Fault::LogGap, Fault::Unreadable]);
}

#[tokio::test(flavor = "multi_thread")]
async fn statistics_that_are_not_true_are_found_and_wider_bounds_are_not() {
    let bench = Bench::new().await;
    bench.edit_stats(1, |stats| stats["minValues"]["offset"] = json!(-5));
    // Spark cuts times to the millisecond, and reads its own bounds so.
    bench.edit_stats(1, |stats| stats["maxValues"]["kafka_time"] = json!("2023-11-14T22:13:20.000Z"));
    assert_eq!(bench.faults().await, []);
    for edit in [
        (|stats: &mut Value| stats["numRecords"] = json!(3)) as fn(&mut Value),
        |stats| stats["minValues"]["offset"] = json!(1),
        |stats| stats["maxValues"]["offset"] = json!(0),
        |stats| stats["nullCount"]["kafka_time"] = json!(1),
        |stats| stats["maxValues"]["kafka_time"] = json!("2023-11-14T22:13:19.999Z"),
        |stats| stats["maxValues"]["ingest_date"] = json!("2026-02-02"),
    ] {
        let bench = Bench::new().await;
        bench.edit_stats(1, edit);
        assert_eq!(bench.faults().await, [Fault::Statistics]);
    }
    bench.edit_stats(1, |stats| stats["maxValues"]["message"] = json!("m"));
    assert_eq!(bench.faults().await, [Fault::TextInLog]);
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_should_not_be_are_found() {
    let bench = Bench::new().await;
    bench.append(&[4], 7).await;
    assert_eq!(bench.faults().await, [Fault::DuplicateRows]);
    let bench = Bench::new().await;
    bench.append(&[9], 9).await;
    assert_eq!(bench.faults().await, [Fault::RowPastPosition]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_protocol_or_schema_is_found() {
    let bench = Bench::new().await;
    let protocol = json!({ "protocol": { "minReaderVersion": 1, "minWriterVersion": 7,
        "writerFeatures": ["identityColumns"] } });
    fs::write(bench.entry(4), protocol.to_string()).unwrap();
    assert_eq!(bench.faults().await, [Fault::Foreign]);
    let bench = Bench::new().await;
    bench.edit(0, |line| {
        if let Some(text) = line["metaData"]["schemaString"].as_str() {
            line["metaData"]["schemaString"] = json!(text.replace("\"reason\"", "\"why\""));
        }
    });
    assert_eq!(bench.faults().await, [Fault::Foreign]);
}
