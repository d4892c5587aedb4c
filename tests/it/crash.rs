//! Each crash point on the way of a record is really come by, and what a kill there leaves is made whole by the next run.

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use serde::Deserialize;
use serde_json::json;
use taod::crash::{CRASH_AT, Point};
use taod::query_log::embedded::EmbeddedBroker;
use taod::table::{Name, Tables, TxnStep, batch_of_any, schema};

use crate::harness::taod_in;

const TOPIC: &str = "queries";
const SIGKILL: i32 = 9;
/// A checkpoint is due where the version is a multiple of this.
const CHECKPOINT_EVERY: u64 = 100;

/// A broker with one record that can be read and one that cannot, and a config.
struct Bench {
    _broker: EmbeddedBroker,
    folder: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let broker = EmbeddedBroker::start(TOPIC, 1).unwrap();
        let mut config = ClientConfig::new();
        let producer: BaseProducer = config.set("bootstrap.servers", broker.brokers()).create().unwrap();
        let call = json!({
            "request": { "model": "m", "messages": [{ "role": "user", "content": "hello" }] },
            "response": { "choices": [{ "message": { "role": "assistant", "content": "hi" } }] },
        });
        for payload in [call.to_string(), "no json".to_owned()] {
            let record = BaseRecord::<(), str>::to(TOPIC).partition(0).payload(&payload);
            producer.send(record).map_err(|(error, _)| error).unwrap();
        }
        producer.flush(Duration::from_secs(10)).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let text = format!(
            "[state]\ndir = {:?}\n[ingest]\nidle_s = 1\n[ingest.kafka]\nbrokers = \"{}\"\ntopic = \"{TOPIC}\"\n\
             [ingest.kafka.properties]\n\"session.timeout.ms\" = \"6000\"\n",
            folder.path().join("state"),
            broker.brokers(),
        );
        std::fs::write(folder.path().join("taod.toml"), text).unwrap();
        Bench { _broker: broker, folder }
    }

    fn root(&self) -> PathBuf {
        self.folder.path().join("state/tables")
    }

    fn ingest(&self, crash_at: &str) -> ExitStatus {
        let mut command = Command::new(env!("CARGO_BIN_EXE_taod"));
        command.args(["ingest", "--until-idle", "--config"]).arg(self.folder.path().join("taod.toml"));
        command.env(CRASH_AT, crash_at).stdin(Stdio::null()).stdout(Stdio::null());
        command.status().unwrap()
    }
}

#[derive(Debug, PartialEq, Deserialize)]
struct Place {
    offset: i64,
}

async fn places(root: &Path, name: Name) -> Vec<i64> {
    let rows: Vec<Place> = Tables::open(root).unwrap().open_one(name).await.unwrap().rows(None).await.unwrap();
    rows.iter().map(|row| row.offset).collect()
}

/// Fills the table with commits of somebody else's until the next one but `before` brings a checkpoint.
async fn fill(root: &Path, before: u64) {
    let mut table = Tables::open(root).unwrap().open_one(Name::Queries).await.unwrap();
    let mut expect = None;
    while table.version() + before + 1 < CHECKPOINT_EVERY {
        let set = table.version() as i64;
        table.append(&[], &[TxnStep { app_id: "other".into(), expect, set }]).await.unwrap();
        expect = Some(set);
    }
}

async fn check(point: Point) {
    let bench = Bench::new();
    if point == Point::DuringCheckpoint {
        // The start offset is a commit of its own, and so is taking the partition, which gets the round number here: the
        // commit of rows after it must bring the checkpoint all the same.
        fill(&bench.root(), 1).await;
    }
    let killed = bench.ingest(point.name());
    assert_eq!(killed.signal(), Some(SIGKILL), "{point:?} was not come by: {killed}");
    assert!(bench.ingest("").success(), "{point:?}");
    assert_eq!(places(&bench.root(), Name::Queries).await, [0], "{point:?}");
    assert_eq!(places(&bench.root(), Name::DeadLetters).await, [1], "{point:?}");
}

// A thread for each point: they mostly wait for a broker that believes the killed member to be alive.
#[tokio::test(flavor = "multi_thread", worker_threads = 7)]
async fn a_kill_at_any_point_of_ingestion_loses_and_doubles_nothing() {
    for checked in Point::OF_INGESTION.map(|point| tokio::spawn(check(point))) {
        checked.await.unwrap();
    }
}

const FILES: i64 = 20;

/// Makes a table of small files under the default state folder: every letter of an even offset is from one tenant.
async fn small_files(folder: &Path) -> PathBuf {
    let root = folder.join("var/tables");
    let mut table = Tables::open(&root).unwrap().open_one(Name::Queries).await.unwrap();
    for offset in 0..FILES {
        let row = json!({ "topic": "t", "partition": 0, "offset": offset, "record_index": 0, "event_time": 0,
            "ingest_date": "2026-02-03", "kind": "call", "status": 200, "messages": "[]", "params": "{}",
            "tenant": if offset % 2 == 0 { "acme" } else { "other" }, "prompt_hash": "h", "format": "openai",
            "redacted": false, "train_ok": true, "sample_weight": 1.0, "truncated": false, "taod_version": "0",
            "config_hash": "c", "extra": "{}" });
        table.append(&[batch_of_any(&schema::QUERIES, &[row]).unwrap()], &[]).await.unwrap();
    }
    root
}

async fn offsets(root: &Path) -> Vec<i64> {
    let mut found = places(root, Name::Queries).await;
    found.sort_unstable();
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compaction_killed_before_or_after_its_commit_is_made_whole_by_the_next() {
    for nth in ["1", "2"] {
        let folder = tempfile::tempdir().unwrap();
        let root = small_files(folder.path()).await;
        let point = format!("{}:{nth}", Point::DuringCompaction.name());
        let killed = taod_in(folder.path(), &["table", "maintain"], &[(CRASH_AT, &point)]);
        assert!(killed.code(1).err.contains("SIGKILL"), "{point} was not come by");
        assert_eq!(offsets(&root).await, (0..FILES).collect::<Vec<_>>(), "after {point}");
        taod_in(folder.path(), &["table", "maintain"], &[]).code(0);
        assert_eq!(offsets(&root).await, (0..FILES).collect::<Vec<_>>());
        assert_eq!(taod_in(folder.path(), &["table", "check"], &[]).code(0).out, "nothing is wrong\n");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_erasure_killed_at_any_step_is_finished_by_the_next_maintenance() {
    for nth in ["1", "2", "3"] {
        let folder = tempfile::tempdir().unwrap();
        let root = small_files(folder.path()).await;
        let point = format!("{}:{nth}", Point::DuringErasure.name());
        let erase = ["table", "erase", "--where", "tenant = 'acme'"];
        let mut command = Command::new(env!("CARGO_BIN_EXE_taod"));
        command.args(erase).current_dir(folder.path()).env(CRASH_AT, &point).stdin(Stdio::null()).stdout(Stdio::null());
        assert_eq!(command.status().unwrap().signal(), Some(SIGKILL), "{point} was not come by");
        taod_in(folder.path(), &["table", "maintain"], &[]).code(0);
        let left: Vec<i64> = (0..FILES).filter(|offset| offset % 2 == 1).collect();
        assert_eq!(offsets(&root).await, left, "after {point}");
    }
}
