//! Ingestion from a real Apache Kafka: every row exactly once, whatever kills the program on the way.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use arrow::array::AsArray;
use arrow::datatypes::{Int32Type, Int64Type};
use rdkafka::client::ClientContext;
use rdkafka::message::{DeliveryResult, Message};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer, ProducerContext, ThreadedProducer};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use taod::table::{Name, Tables};

use crate::harness::kafka::Kafka;
use crate::{harness, readers};

const ROWS: u64 = 100_000;
const PARTITIONS: i32 = 6;
const TOPIC: &str = "llm-queries";

type Hash = [u8; 32];
type Ledger = HashMap<(i32, i64), Hash>;

/// What the broker acknowledged: where each row went, and the hash of its text.
#[derive(Clone, Default)]
struct Acknowledged(Arc<Mutex<Ledger>>);

impl ClientContext for Acknowledged {}

impl ProducerContext for Acknowledged {
    type DeliveryOpaque = Box<Hash>;

    fn delivery(&self, result: &DeliveryResult<'_>, hash: Box<Hash>) {
        let message = result.as_ref().unwrap_or_else(|(error, _)| panic!("not delivered: {error}"));
        self.0.lock().unwrap().insert((message.partition(), message.offset()), *hash);
    }
}

/// Returns the prompt and the answer of row `i`: about 1.3 KB of text with what JSON must escape.
fn texts(i: u64) -> (String, String) {
    let mut state = i.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut words = |count: usize| {
        let mut text = String::new();
        for _ in 0..count {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            text.push_str(
                ["lorem ", "ipsum\n", "\"dolor\" ", "sit\\", "ämet ", "消息 ", "tab\t", "plain words "]
                    [(state >> 61) as usize],
            );
        }
        text
    };
    (format!("row {i}: {}", words(70)), words(85))
}

fn hash(prompt: &str, answer: &str) -> Hash {
    let mut hasher = Sha256::new();
    hasher.update((prompt.len() as u64).to_le_bytes());
    hasher.update(prompt);
    hasher.update(answer);
    hasher.finalize().into()
}

fn record(prompt: &str, answer: &str) -> String {
    json!({
        "timestamp": "2026-05-01T12:00:00.25Z",
        "request": { "model": "m", "messages": [{ "role": "user", "content": prompt }], "temperature": 0.7, "user": "u" },
        "response": { "id": "r", "object": "chat.completion", "model": "m", "usage": { "prompt_tokens": 9, "completion_tokens": 9 },
            "choices": [{ "index": 0, "message": { "role": "assistant", "content": answer }, "finish_reason": "stop" }] },
        "status": 200,
    })
    .to_string()
}

/// Produces the rows and returns where the broker put each.
fn produce(kafka: &Kafka) -> Ledger {
    let acknowledged = Acknowledged::default();
    let mut config = kafka.client();
    config.set("compression.type", "zstd").set("enable.idempotence", "true").set("linger.ms", "20");
    config.set("queue.buffering.max.kbytes", "65536");
    let producer: ThreadedProducer<Acknowledged> = config.create_with_context(acknowledged.clone()).unwrap();
    for i in 0..ROWS {
        let (prompt, answer) = texts(i);
        let (payload, hash) = (record(&prompt, &answer), Box::new(hash(&prompt, &answer)));
        let partition = (i % PARTITIONS as u64) as i32;
        let mut pending =
            BaseRecord::with_opaque_to(TOPIC, hash).partition(partition).payload(payload.as_str()).key("k");
        // The producer's queue is bounded: it is full until the broker has taken some.
        while let Err((_, back)) = producer.send(pending) {
            pending = back;
            producer.flush(Duration::from_millis(100)).ok();
        }
    }
    producer.flush(Duration::from_secs(60)).unwrap();
    let ledger = acknowledged.0.lock().unwrap().clone();
    assert_eq!(ledger.len() as u64, ROWS);
    ledger
}

/// Writes a config for `topic` whose tables lie in `folder`. A killed member must leave the group soon, or each restart waits
/// for it.
fn config(kafka: &Kafka, folder: &Path, topic: &str) -> PathBuf {
    let properties = [("session.timeout.ms", "1000"), ("heartbeat.interval.ms", "300")];
    kafka.member(topic).setting("connect_timeout_s = 10").properties(&properties).write(folder)
}

fn ingest(config: &Path) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_taod"));
    command.args(["ingest", "--until-idle", "--config"]).arg(config);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::inherit()).spawn().unwrap()
}

/// Returns the newest version in a table's log; 0 where there is no table.
fn version(table: &Path) -> u64 {
    let entries = std::fs::read_dir(table.join("_delta_log")).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    names.filter_map(|name| name.strip_suffix(".json")?.parse().ok()).max().unwrap_or(0)
}

/// Reads the table as a ledger; a place that is there twice is an error.
async fn stored(tables: &Tables) -> Ledger {
    let queries = tables.open_one(Name::Queries).await.unwrap();
    let sql = "select \"partition\", \"offset\", cast(messages as varchar), cast(response as varchar) from t";
    let mut ledger = Ledger::new();
    for batch in queries.query(sql).await.unwrap() {
        let (partitions, offsets) =
            (batch.column(0).as_primitive::<Int32Type>(), batch.column(1).as_primitive::<Int64Type>());
        let text = |column: usize, row: usize| match batch.column(column).as_string_opt::<i32>() {
            Some(strings) => strings.value(row).to_owned(),
            None => batch.column(column).as_string_view().value(row).to_owned(),
        };
        for row in 0..batch.num_rows() {
            let messages: Value = serde_json::from_str(&text(2, row)).unwrap();
            let prompt = messages[0]["content"].as_str().unwrap();
            let place = (partitions.value(row), offsets.value(row));
            assert!(ledger.insert(place, hash(prompt, &text(3, row))).is_none(), "{place:?} is there twice");
        }
    }
    ledger
}

#[tokio::test(flavor = "multi_thread")]
async fn every_row_of_kafka_is_stored_once_whatever_is_killed() {
    let Some(kafka) = Kafka::start(&["group.min.session.timeout.ms=500"]) else { return };
    kafka.create_topic(TOPIC, PARTITIONS).await;
    let ledger = produce(&kafka);
    let folder = tempfile::tempdir().unwrap();
    let config = config(&kafka, folder.path(), TOPIC);
    let root = folder.path().join("state/tables");
    let table = root.join("queries");

    let mut kills = Vec::new();
    for _ in 0..3 {
        let target = version(&table) + 8;
        let mut child = ingest(&config);
        let deadline = Instant::now() + Duration::from_secs(120);
        while version(&table) < target {
            assert!(Instant::now() < deadline, "no progress past version {}", version(&table));
            assert!(child.try_wait().unwrap().is_none(), "ingestion ended before it was killed");
            std::thread::sleep(Duration::from_millis(2));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        kills.push(version(&table));
    }
    assert!(kills[2] - kills[0] >= 10, "kills at versions {kills:?}");

    assert!(ingest(&config).wait().unwrap().success());
    let after = version(&table);
    assert!(after > kills[2], "the last kill came after the last row");
    let tables = Tables::open(&root).unwrap();
    let found = stored(&tables).await;
    assert_eq!(found.len(), ledger.len());
    assert!(found == ledger, "some rows are not what was produced");
    assert_eq!(tables.open_one(Name::DeadLetters).await.unwrap().count().await.unwrap(), 0);

    // With nothing new another run takes the partitions, which is one commit without a row, and stores nothing.
    assert!(ingest(&config).wait().unwrap().success());
    assert_eq!(version(&table), after + 1);
    assert_eq!(tables.open_one(Name::Queries).await.unwrap().count().await.unwrap(), ledger.len() as u64);

    if let Some(python) = harness::readers() {
        let said = readers::read(&python, &[table.display().to_string()]);
        readers::assert_same(&tables.open_one(Name::Queries).await.unwrap(), &said[0]).await;
    }
    control_records_count_as_read(&kafka, folder.path()).await;
    a_missing_topic_is_one_line(&kafka, folder.path());
}

/// Transactions leave control records and aborted rows, which are no rows and yet move the offset to the end.
async fn control_records_count_as_read(kafka: &Kafka, folder: &Path) {
    let topic = "transactional";
    kafka.create_topic(topic, 1).await;
    let mut client = kafka.client();
    let producer: BaseProducer = client.set("transactional.id", "t").create().unwrap();
    producer.init_transactions(Duration::from_secs(30)).unwrap();
    for commit in [true, false] {
        producer.begin_transaction().unwrap();
        let payload = record("hello", if commit { "kept" } else { "aborted" });
        producer.send(BaseRecord::<(), str>::to(topic).payload(&payload)).map_err(|(e, _)| e).unwrap();
        producer.flush(Duration::from_secs(30)).unwrap();
        match commit {
            true => producer.commit_transaction(Duration::from_secs(30)).unwrap(),
            false => producer.abort_transaction(Duration::from_secs(30)).unwrap(),
        }
    }
    let folder = folder.join(topic);
    std::fs::create_dir(&folder).unwrap();
    assert!(ingest(&config(kafka, &folder, topic)).wait().unwrap().success());
    let mut queries = Tables::open(&folder.join("state/tables")).unwrap().open_one(Name::Queries).await.unwrap();
    assert_eq!(queries.count().await.unwrap(), 1);
    // A row and its commit marker, a row and its abort marker.
    assert_eq!(queries.txn(&format!("taod/kafka/0/{topic}/0")).await.unwrap(), Some(4));
}

fn a_missing_topic_is_one_line(kafka: &Kafka, folder: &Path) {
    let config = config(kafka, folder, "nowhere").display().to_string();
    let outcome = harness::taod(&["ingest", "--until-idle", "--config", &config]).code(1);
    let lines: Vec<&str> = outcome.err.lines().filter(|line| line.contains("nowhere")).collect();
    assert_eq!(lines.len(), 1, "{}", outcome.err);
    assert!(
        lines[0].contains("topic nowhere does not exist") && lines[0].contains("ingest.kafka.topic"),
        "{}",
        lines[0]
    );
}
