//! `taod table` as an operator runs it: the child process of maintenance, findings with their exit code, offsets.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use taod::table::{Name, Tables, TxnStep};

use crate::harness::taod_in;

const ROWS: i64 = 20;

/// Fills `dead_letters` under the default state folder with files of one row each, and starts `queries`.
async fn fill(folder: &Path) -> PathBuf {
    let root = folder.join("var/tables");
    let tables = Tables::open(&root).unwrap();
    let mut table = tables.open_one(Name::DeadLetters).await.unwrap();
    for offset in 0..ROWS {
        let letter = json!({ "topic": "llm-queries", "partition": 0, "offset": offset, "record_index": 0,
            "ingest_date": "2026-02-03", "payload": "00", "reason": "r", "message": "m", "taod_version": "0",
            "config_hash": "c" });
        table.append_rows(&[letter], &[step((offset > 0).then_some(offset), offset + 1)]).await.unwrap();
    }
    let mut queries = tables.open_one(Name::Queries).await.unwrap();
    queries.append(&[], &[step(None, ROWS)]).await.unwrap();
    root
}

fn step(expect: Option<i64>, set: i64) -> TxnStep {
    TxnStep { app_id: "taod/kafka/0/llm-queries/0".into(), expect, set }
}

#[tokio::test(flavor = "multi_thread")]
async fn maintenance_runs_in_its_child_and_a_damaged_table_ends_a_check_with_1() {
    let folder = tempfile::tempdir().unwrap();
    let root = fill(folder.path()).await;
    let run = |arguments: &[&str]| taod_in(folder.path(), arguments, &[("TAOD__MAINTENANCE__MEMORY_MIB", "256")]);
    let reports: Vec<Value> = serde_json::from_str(&run(&["table", "maintain", "--json"]).code(0).out).unwrap();
    let letters = reports.iter().find(|report| report["table"] == "dead_letters").unwrap();
    assert_eq!((&letters["files"], &letters["log_entries"]), (&json!(1), &json!(0)), "{letters}");
    let compaction = letters["tasks"].as_array().unwrap().iter().find(|task| task["task"] == "compact").unwrap();
    assert_eq!(compaction["outcome"], "done", "{letters}");
    assert_eq!(run(&["table", "check"]).code(0).out, "nothing is wrong\n");
    let tables = Tables::open(&root).unwrap();
    assert_eq!(tables.open_one(Name::DeadLetters).await.unwrap().count().await.unwrap(), ROWS as u64);
    for entry in std::fs::read_dir(root.join("dead_letters")).unwrap().map(|entry| entry.unwrap().path()) {
        if entry.is_file() {
            std::fs::remove_file(entry).unwrap();
        }
    }
    let found: Vec<Value> = serde_json::from_str(&run(&["table", "check", "--json"]).code(1).out).unwrap();
    assert_eq!((found.len(), &found[0]["fault"]), (1, &json!("file_missing")), "{found:?}");
    assert!(found[0]["repair"].as_str().unwrap().contains("backup"));
    assert_eq!(run(&["table", "check", "--table", "queries"]).code(0).out, "nothing is wrong\n");
    assert!(run(&["table", "check", "--table", "nonsense"]).code(64).err.contains("dead_letters"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_offset_goes_forward_on_demand_and_never_back() {
    let folder = tempfile::tempdir().unwrap();
    let root = fill(folder.path()).await;
    let run = |arguments: &[&str]| {
        let unreachable =
            [("TAOD__INGEST__KAFKA__BROKERS", "127.0.0.1:1"), ("TAOD__INGEST__KAFKA__CONNECT_TIMEOUT_S", "1")];
        taod_in(folder.path(), &[&["table", "offsets"], arguments].concat(), &unreachable)
    };
    assert!(run(&["set", "0", "50"]).code(64).err.contains("--accept-loss"));
    for back in ["19", "20"] {
        assert!(run(&["set", "0", back, "--accept-loss"]).code(64).err.contains("is 20"));
    }
    assert!(run(&["set", "0", "50", "--accept-loss"]).code(0).out.contains("is 50 (was 20)"));
    let entry = std::fs::read_to_string(root.join("queries/_delta_log/00000000000000000002.json")).unwrap();
    let info: Value = serde_json::from_str(entry.lines().next().unwrap()).unwrap();
    assert_eq!(info["commitInfo"]["taod"]["action"], "accept-loss");
    assert_eq!((&info["commitInfo"]["taod"]["from"], &info["commitInfo"]["taod"]["to"]), (&json!(20), &json!(50)));
    // Kafka cannot be asked: what the table says is shown all the same, with the reason.
    let shown: Value = serde_json::from_str(&run(&["show", "--json"]).code(0).out).unwrap();
    assert_eq!(
        shown["partitions"],
        json!([{ "topic": "llm-queries", "partition": 0, "stored": 50, "low": null, "high": null, "lost": 0 }])
    );
    assert!(shown["kafka"].as_str().unwrap().contains("127.0.0.1:1"));
    assert!(run(&["new-generation"]).code(0).out.contains("generation = 1"));
}
