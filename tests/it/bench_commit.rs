//! The time of a commit of one row on a table that holds 0 to 100,000 files: it must not grow with them.
//!
//! The files are named in the log and do not exist: no commit looks at them, which is what is shown.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use taod::table::{Name, Table, Tables, TxnStep};

const COMMITS: usize = 300;
/// Files that one log entry of the preparation names.
const FILES_PER_ENTRY: usize = 500;

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a benchmark: `make bench`"]
async fn bench_commit() {
    println!("{:>8} {:>8} {:>10} {:>10} {:>10} {:>10}", "files", "commits", "open ms", "p50 ms", "p99 ms", "max ms");
    let mut slowest = Vec::new();
    for files in [0, 1_000, 10_000, 100_000] {
        let folder = tempfile::tempdir().unwrap();
        let tables = Tables::open(folder.path()).unwrap();
        tables.open_one(Name::GateUsage).await.unwrap();
        fill(&folder.path().join("gate_usage/_delta_log"), files);
        tables.open_one(Name::GateUsage).await.unwrap().maintain().await.unwrap();
        // What the preparation left to be written would be waited for by the fsyncs of the commits.
        assert!(Command::new("sync").status().unwrap().success());
        let begun = Instant::now();
        let mut table = tables.open_one(Name::GateUsage).await.unwrap();
        table.txn("bench").await.unwrap();
        let open = begun.elapsed();
        let mut times = Vec::new();
        for step in 0..COMMITS as i64 {
            times.push(commit(&mut table, step).await);
        }
        times.sort();
        let (p50, p99, max) = (times[COMMITS / 2], times[COMMITS * 99 / 100], times[COMMITS - 1]);
        let ms = |time: Duration| time.as_secs_f64() * 1000.0;
        println!("{files:>8} {COMMITS:>8} {:>10.1} {:>10.2} {:>10.2} {:>10.2}", ms(open), ms(p50), ms(p99), ms(max));
        slowest.push(p50);
    }
    // Generous, for a machine that others use: a cost that grows with the files would be a hundredfold here.
    assert!(slowest[3] < slowest[0] * 5, "{slowest:?}");
}

async fn commit(table: &mut Table, step: i64) -> Duration {
    let row = json!({ "cluster": "c", "trial": "t", "step": step });
    let txn = TxnStep { app_id: "bench".into(), expect: (step > 0).then_some(step), set: step + 1 };
    let begun = Instant::now();
    table.append_rows(&[row], &[txn]).await.unwrap();
    begun.elapsed()
}

/// Writes log entries that name `files` files.
fn fill(log: &Path, files: usize) {
    let add = |i: usize| {
        let stats = json!({ "numRecords": 1, "minValues": {}, "maxValues": {}, "nullCount": {} }).to_string();
        json!({ "add": { "path": format!("part-00000-{i:08x}-0000-4000-8000-000000000000-c000.zstd.parquet"),
            "partitionValues": {}, "size": 1000, "modificationTime": 0, "dataChange": true, "stats": stats } })
    };
    for (entry, first) in (0..files).step_by(FILES_PER_ENTRY).enumerate() {
        let lines: Vec<Value> = (first..(first + FILES_PER_ENTRY).min(files)).map(add).collect();
        let text: Vec<String> = lines.iter().map(Value::to_string).collect();
        std::fs::write(log.join(format!("{:020}.json", entry + 1)), text.join("\n")).unwrap();
    }
}
