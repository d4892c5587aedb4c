//! Apache Spark beside us: it reads every table as we do, and what it does to a table between two of our commits does no
//! harm. An instance of `taod ingest` runs while Spark compacts, deletes and switches features on.
//!
//! One session serves all cases: it takes as long to start as they take to run.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use serde::Deserialize;
use serde_json::{Value, json};
use taod::query_log::embedded::EmbeddedBroker;
use taod::table::{Name, Table, Tables};

use crate::{harness, readers};

const TOPIC: &str = "queries";
const PARTITIONS: i32 = 2;
const PATIENCE: Duration = Duration::from_secs(60);

/// The session; dropping it ends it.
struct Spark {
    child: Child,
    requests: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Spark {
    fn start() -> Option<Self> {
        let (python, jars) = harness::spark()?;
        let mut command = Command::new(python);
        command.arg(harness::root().join("tests/tools/spark.py")).arg(jars);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let (requests, answers) = (child.stdin.take(), BufReader::new(child.stdout.take().unwrap()));
        Some(Spark { child, requests, answers })
    }

    fn ask(&mut self, request: Value) -> Value {
        writeln!(self.requests.as_mut().unwrap(), "{request}").unwrap();
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        let answer: Value = serde_json::from_str(&line).unwrap_or_else(|_| panic!("Spark ended at {request}"));
        assert!(answer.get("error").is_none(), "{request}: {}", answer["error"]);
        answer
    }

    /// Runs a statement, in which `{}` stands for the table, and returns its rows.
    fn sql(&mut self, table: &Path, statement: &str) -> Value {
        let name = format!("delta.`{}`", table.display());
        self.ask(json!({ "sql": statement.replace("{}", &name) }))["rows"].take()
    }
}

impl Drop for Spark {
    fn drop(&mut self) {
        // The script ends with its input, and Java with the script.
        drop(self.requests.take());
        self.child.wait().ok();
    }
}

/// A log with two partitions, a table, and an instance that may be at work between them.
struct Bench {
    _broker: EmbeddedBroker,
    producer: BaseProducer,
    folder: tempfile::TempDir,
    instance: Option<Child>,
    sent: i64,
}

impl Bench {
    fn new() -> Self {
        let broker = EmbeddedBroker::start(TOPIC, PARTITIONS).unwrap();
        let mut config = ClientConfig::new();
        let producer: BaseProducer = config.set("bootstrap.servers", broker.brokers()).create().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let text = format!(
            "[state]\ndir = {:?}\n[ingest]\ncommit_interval_s = 1\nidle_s = 1\n[ingest.kafka]\nbrokers = \"{}\"\n\
             topic = \"{TOPIC}\"\n[ingest.kafka.properties]\n\"session.timeout.ms\" = \"6000\"\n",
            folder.path().join("state"),
            broker.brokers(),
        );
        std::fs::write(folder.path().join("taod.toml"), text).unwrap();
        Bench { _broker: broker, producer, folder, instance: None, sent: 0 }
    }

    fn root(&self) -> PathBuf {
        self.folder.path().join("state/tables")
    }

    fn table(&self) -> PathBuf {
        self.root().join("queries")
    }

    async fn open(&self) -> Table {
        Tables::open(&self.root()).unwrap().open_one(Name::Queries).await.unwrap()
    }

    /// Logs `count` more calls in each partition.
    fn send(&mut self, count: i64) {
        for offset in self.sent..self.sent + count {
            for partition in 0..PARTITIONS {
                let payload = json!({
                    "request": { "model": "m", "messages": [{ "role": "user", "content": format!("{partition}/{offset}") }] },
                    "response": { "choices": [{ "message": { "role": "assistant", "content": "hi" } }] },
                })
                .to_string();
                let record = BaseRecord::<(), str>::to(TOPIC).partition(partition).payload(&payload);
                self.producer.send(record).map_err(|(error, _)| error).unwrap();
            }
        }
        self.producer.flush(PATIENCE).unwrap();
        self.sent += count;
    }

    /// Logs calls and returns once the instance, started where there is none, has stored them.
    async fn ingest(&mut self, count: i64) {
        self.send(count);
        if self.instance.is_none() {
            let mut command = Command::new(env!("CARGO_BIN_EXE_taod"));
            command.args(["ingest", "--config"]).arg(self.folder.path().join("taod.toml"));
            self.instance = Some(command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap());
        }
        let mut table = self.open().await;
        let deadline = Instant::now() + PATIENCE;
        while positions(&mut table).await != [Some(self.sent); PARTITIONS as usize] {
            let ended = self.instance.as_mut().unwrap().try_wait().unwrap();
            assert!(ended.is_none(), "ingestion ended: {ended:?}");
            assert!(Instant::now() < deadline, "ingestion does not reach {}", self.sent);
            tokio::time::sleep(Duration::from_millis(50)).await;
            table.refresh().await.unwrap();
        }
    }

    /// Ends the instance at once, as a crash would.
    fn kill(&mut self) {
        if let Some(mut instance) = self.instance.take() {
            instance.kill().unwrap();
            instance.wait().unwrap();
        }
    }

    /// Checks that the table holds each logged call once, but for those that `gone` names; and that all readers agree.
    async fn check(&self, spark: &mut Spark, gone: impl Fn(i64) -> bool) {
        let mut table = self.open().await;
        let rows: Vec<Place> = table.rows(None).await.unwrap();
        let found: BTreeSet<(i32, i64)> = rows.iter().map(|row| (row.partition, row.offset)).collect();
        assert_eq!(found.len(), rows.len(), "some rows are there twice");
        let offsets = (0..self.sent).filter(|offset| !gone(*offset));
        let wanted: BTreeSet<(i32, i64)> =
            offsets.flat_map(|offset| (0..PARTITIONS).map(move |p| (p, offset))).collect();
        assert_eq!(found, wanted);

        let ours = readers::digest(&table.query("select * from t").await.unwrap());
        let mut said = spark.ask(json!({ "read": self.table() }));
        assert_eq!(said.as_object_mut().unwrap().remove("version"), Some(json!(table.version())));
        assert_eq!(said, ours, "Spark");
        let txns = spark.ask(json!({ "txns": self.table() }));
        for (partition, position) in positions(&mut table).await.into_iter().enumerate() {
            assert_eq!(txns[app_id(partition)], json!(position), "the position of partition {partition}");
        }
        if let Some(python) = harness::readers() {
            let said = readers::read(&python, &[self.table().display().to_string()]);
            readers::assert_same(&table, &said[0]).await;
        }
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.kill();
    }
}

#[derive(Debug, Deserialize)]
struct Place {
    partition: i32,
    offset: i64,
}

fn app_id(partition: usize) -> String {
    format!("taod/kafka/0/{TOPIC}/{partition}")
}

async fn positions(table: &mut Table) -> Vec<Option<i64>> {
    let ids: Vec<String> = (0..PARTITIONS as usize).map(app_id).collect();
    table.txns(&ids).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn spark_reads_and_rewrites_our_tables_without_harm() {
    let Some(mut spark) = Spark::start() else { return };
    every_table_is_read_as_we_read_it(&mut spark).await;
    compaction_and_deletion_lose_and_double_nothing(&mut spark).await;
    deletion_vectors_are_honoured(&mut spark).await;
    a_restore_takes_rows_back_and_no_offsets(&mut spark).await;
    features_that_we_do_not_write_stop_us_by_name(&mut spark).await;
}

async fn every_table_is_read_as_we_read_it(spark: &mut Spark) {
    let folder = tempfile::tempdir().unwrap();
    let folders = readers::every_table(folder.path()).await;
    let tables = Tables::open(folder.path()).unwrap();
    for (name, folder) in Name::ALL.into_iter().zip(folders) {
        let table = tables.open_one(name).await.unwrap();
        let mut said = spark.ask(json!({ "read": folder }));
        assert_eq!(said.as_object_mut().unwrap().remove("version"), Some(json!(table.version())));
        assert_eq!(said, readers::digest(&table.query("select * from t").await.unwrap()), "{folder}");
        assert_eq!(spark.ask(json!({ "txns": folder })), json!({ "test": 3 }), "{folder}");
    }
}

/// The instance lives through all of it; a second one starts from a checkpoint that Spark wrote.
async fn compaction_and_deletion_lose_and_double_nothing(spark: &mut Spark) {
    let mut bench = Bench::new();
    for _ in 0..3 {
        bench.ingest(10).await;
    }
    let said = spark.sql(&bench.table(), "OPTIMIZE {}");
    assert!(said[0]["metrics"]["numFilesRemoved"].as_i64().unwrap() >= 3, "{said}");
    bench.ingest(10).await;
    let said = spark.sql(&bench.table(), "DELETE FROM {} WHERE offset % 3 = 0");
    assert_eq!(said[0]["num_affected_rows"], json!(14 * PARTITIONS));
    bench.ingest(10).await;
    let gone = |offset| offset < 40 && offset % 3 == 0;
    bench.check(spark, gone).await;

    bench.kill();
    spark.sql(&bench.table(), "OPTIMIZE {}");
    bench.ingest(10).await;
    bench.check(spark, gone).await;
}

async fn deletion_vectors_are_honoured(spark: &mut Spark) {
    let mut bench = Bench::new();
    bench.ingest(20).await;
    spark.sql(&bench.table(), "ALTER TABLE {} SET TBLPROPERTIES ('delta.enableDeletionVectors' = 'true')");
    let detail = spark.sql(&bench.table(), "DESCRIBE DETAIL {}");
    assert_eq!((&detail[0]["minReaderVersion"], &detail[0]["minWriterVersion"]), (&json!(3), &json!(7)));
    // The instance meets the new protocol in the log, beside its own next commit.
    bench.ingest(10).await;
    spark.sql(&bench.table(), "DELETE FROM {} WHERE offset % 3 = 0");
    let history = spark.sql(&bench.table(), "DESCRIBE HISTORY {} LIMIT 1");
    let added = history[0]["operationMetrics"]["numDeletionVectorsAdded"].as_str().unwrap();
    assert!(added.parse::<u32>().unwrap() > 0, "{history}");
    bench.ingest(10).await;
    let gone = |offset| offset < 30 && offset % 3 == 0;
    bench.check(spark, gone).await;

    // Another instance opens a table that has them from the start; compaction then makes an end of them.
    bench.kill();
    bench.ingest(10).await;
    bench.check(spark, gone).await;
    spark.sql(&bench.table(), "OPTIMIZE {}");
    bench.ingest(10).await;
    bench.check(spark, gone).await;
}

/// A restore is of files, not of positions: rows taken back stay away until somebody replays them, and none comes twice.
async fn a_restore_takes_rows_back_and_no_offsets(spark: &mut Spark) {
    let mut bench = Bench::new();
    bench.ingest(10).await;
    let version = bench.open().await.version();
    bench.ingest(10).await;
    spark.sql(&bench.table(), &format!("RESTORE TABLE {{}} TO VERSION AS OF {version}"));
    bench.ingest(10).await;
    let gone = |offset| (10..20).contains(&offset);
    bench.check(spark, gone).await;
    bench.kill();
    bench.ingest(10).await;
    bench.check(spark, gone).await;
}

async fn features_that_we_do_not_write_stop_us_by_name(spark: &mut Spark) {
    let features =
        [("delta.enableRowTracking' = 'true", "rowTracking"), ("delta.columnMapping.mode' = 'name", "columnMapping")];
    for (property, feature) in features {
        let mut bench = Bench::new();
        bench.ingest(5).await;
        bench.kill();
        spark.sql(&bench.table(), &format!("ALTER TABLE {{}} SET TBLPROPERTIES ('{property}')"));
        bench.send(5);
        let config = bench.folder.path().join("taod.toml").display().to_string();
        let outcome = harness::taod(&["ingest", "--config", &config]);
        outcome.refused(&["queries", &format!("table feature {feature}"), "drop the feature or use another table"]);
    }
}
