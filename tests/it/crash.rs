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
use taod::table::{Name, Tables, TxnStep};

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
    for checked in Point::ALL.map(|point| tokio::spawn(check(point))) {
        checked.await.unwrap();
    }
}
