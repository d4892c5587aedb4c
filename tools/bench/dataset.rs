//! Freezing at scale: generated prompts in a real table, a first night over all of them and a second over a few more.
//!
//! `dataset PROMPTS NEW FOLDER` prints wall and CPU seconds, the peak of the resident memory, what the index takes, and how
//! many of the planted near duplicates (a tenth of the prompts, one word in twenty replaced) share a cluster.

use std::path::Path;
use std::time::Instant;

use serde_json::{Value, json};
use taod::dataset::{Freezing, Match, Settings, WorkloadView, freeze};
use taod::record::{Message, derive_seed, prompt_hash};
use taod::table::{Name, Tables};

/// Rows of one commit.
const COMMIT: usize = 50_000;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [prompts, new, folder] = arguments.as_slice() else { return Err("usage: dataset PROMPTS NEW FOLDER".into()) };
    let (prompts, new, folder): (usize, usize, &Path) = (prompts.parse()?, new.parse()?, Path::new(folder));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let tables = Tables::open(&folder.join("tables"))?;
    for (round, range) in [("first", 0..prompts), ("second", prompts..prompts + new)] {
        runtime.block_on(fill(&tables, range.clone()))?;
        let before = (Instant::now(), cpu_seconds()?);
        let freezing = Freezing {
            round,
            settings: &Settings::default(),
            workloads: &[WorkloadView {
                name: "w".into(),
                matching: Match::Name,
                house_rules: String::new(),
                has_rules: true,
            }],
            seed: 1,
            index: &folder.join("prompts"),
        };
        let dataset = runtime.block_on(freeze(&tables, freezing, &folder.join(round)))?;
        println!(
            "{round} night: {} new prompts of {}, {:.1} s, {:.1} CPU s, peak {:.2} GiB, index {:.2} GiB, {} near duplicates",
            range.len(),
            dataset.manifest.rows,
            before.0.elapsed().as_secs_f64(),
            cpu_seconds()? - before.1,
            peak_gib()?,
            size(&folder.join("prompts"))? as f64 / f64::from(1 << 30),
            dataset.manifest.excluded.get("near_duplicate").copied().unwrap_or(0)
                + dataset.manifest.excluded.get("same_cluster").copied().unwrap_or(0),
        );
    }
    Ok(())
}

async fn fill(tables: &Tables, range: std::ops::Range<usize>) -> Result<(), Box<dyn std::error::Error>> {
    let mut queries = tables.open_one(Name::Queries).await?;
    for start in range.clone().step_by(COMMIT) {
        let rows: Vec<Value> = (start..range.end.min(start + COMMIT)).map(row).collect();
        queries.append_rows(&rows, &[]).await?;
    }
    Ok(())
}

fn row(i: usize) -> Value {
    let messages = [Message::text("user", text(i))];
    json!({
        "topic": "t", "partition": 0, "offset": i, "record_index": 0, "kind": "call", "ingest_date": "2026-03-11",
        "event_time": 1_772_366_400_000_000i64 + i as i64, "workload": "w", "status": 200,
        "messages": messages, "params": {}, "prompt_hash": prompt_hash(&messages, None), "format": "bench",
        "redacted": false, "train_ok": true, "sample_weight": 1.0, "truncated": false, "taod_version": "0",
        "config_hash": "c", "extra": {}
    })
}

/// About 300 characters of drawn words; every tenth prompt repeats the one before with some words replaced.
fn text(i: usize) -> String {
    let (of, is_copy) = if i % 10 == 9 { (i - 1, true) } else { (i, false) };
    let words = 30 + derive_seed(1, &[&of.to_string()]) % 30;
    let mut seed = derive_seed(2, &[&of.to_string()]);
    let mut own = derive_seed(3, &[&i.to_string()]);
    let mut text = String::new();
    for _ in 0..words {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        own = own.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let word = if is_copy && own >> 40 & 31 == 0 { own } else { seed };
        text.push_str(&format!("{:x} ", word >> 44));
    }
    text
}

fn cpu_seconds() -> Result<f64, Box<dyn std::error::Error>> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
    Ok((fields[11].parse::<f64>()? + fields[12].parse::<f64>()?) / 100.0)
}

fn peak_gib() -> Result<f64, Box<dyn std::error::Error>> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap_or_default();
    Ok(line.split_whitespace().nth(1).unwrap_or("0").parse::<f64>()? / f64::from(1 << 20))
}

fn size(folder: &Path) -> std::io::Result<u64> {
    std::fs::read_dir(folder)?.map(|entry| Ok(entry?.metadata()?.len())).sum()
}
