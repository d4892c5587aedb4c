//! Ingestion against a broker in this process.

use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};

use super::ledger::Ledger;
use super::*;
use crate::query_log::TopicPartition;
use crate::query_log::embedded::EmbeddedBroker;
use crate::table::{Name, TxnStep};

const TOPIC: &str = "queries";

struct Bench {
    broker: EmbeddedBroker,
    folder: tempfile::TempDir,
    producer: BaseProducer,
}

impl Bench {
    fn new(partitions: i32) -> Self {
        let broker = EmbeddedBroker::start(TOPIC, partitions).unwrap();
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", broker.brokers());
        Bench { producer: config.create().unwrap(), broker, folder: tempfile::tempdir().unwrap() }
    }

    fn send(&self, partition: i32, payload: &str) {
        let record = BaseRecord::<(), str>::to(TOPIC).partition(partition).payload(payload);
        self.producer.send(record).map_err(|(error, _)| error).unwrap();
        self.producer.flush(Duration::from_secs(10)).unwrap();
    }

    fn settings(&self) -> Settings {
        let kafka = kafka::Settings {
            brokers: self.broker.brokers().into(),
            topic: TOPIC.into(),
            connect_timeout_s: 5,
            ..kafka::Settings::default()
        };
        Settings { kafka, idle_s: 1, stall_s: 20, end_interval_s: 3600, ..Settings::default() }
    }

    fn tables(&self) -> Tables {
        Tables::open(self.folder.path()).unwrap()
    }

    async fn ingest(&self, settings: &Settings) -> Result<Summary, IngestError> {
        // The sender lives until the run is over: a dropped one means shutdown.
        let (_keep, shutdown) = watch::channel(false);
        run(settings, &self.tables(), Arc::default(), shutdown, Mode::UntilIdle).await
    }

    async fn offsets(&self, name: Name) -> Vec<(i64, i64)> {
        #[derive(Deserialize)]
        struct Place {
            partition: i64,
            offset: i64,
        }
        let table = self.tables().open_one(name).await.unwrap();
        let batches = table.query("select \"partition\", \"offset\" from t order by 1, 2").await.unwrap();
        let mut text = arrow::json::ArrayWriter::new(Vec::new());
        batches.iter().for_each(|batch| text.write(batch).unwrap());
        text.finish().unwrap();
        let places: Vec<Place> = serde_json::from_slice(&text.into_inner()).unwrap_or_default();
        places.iter().map(|place| (place.partition, place.offset)).collect()
    }
}

fn call(text: &str) -> String {
    serde_json::json!({
        "request": { "model": "m", "messages": [{ "role": "user", "content": text }], "user": "alice" },
        "response": { "id": "r", "object": "chat.completion", "model": "m", "choices": [
            { "index": 0, "message": { "role": "assistant", "content": "fine" }, "finish_reason": "stop" } ] },
    })
    .to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_record_is_stored_once_over_two_runs() {
    let bench = Bench::new(2);
    bench.send(0, &call("a"));
    bench.send(1, "no json");
    bench.send(1, &call("b"));
    let first = bench.ingest(&bench.settings()).await.unwrap();
    assert_eq!((first.records, first.rows, first.dead_letters.values().sum::<u64>()), (3, 2, 1));
    bench.send(1, &call("c"));
    let second = bench.ingest(&bench.settings()).await.unwrap();
    assert_eq!((second.records, second.rows), (1, 1));
    assert_eq!(bench.offsets(Name::Queries).await, [(0, 0), (1, 1), (1, 2)]);
    assert_eq!(bench.offsets(Name::DeadLetters).await, [(1, 0)]);
    let mut queries = bench.tables().open_one(Name::Queries).await.unwrap();
    assert_eq!(queries.txn(&bench.settings().kafka.app_id(&TopicPartition::new(TOPIC, 1))).await.unwrap(), Some(3));
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_that_a_crash_left_ahead_are_not_doubled() {
    let bench = Bench::new(1);
    for payload in ["bad one", &call("a"), "bad two"] {
        bench.send(0, payload);
    }
    bench.ingest(&bench.settings()).await.unwrap();
    // As after a crash between the two commits: the rows and their offset are gone, the dead letters stand.
    std::fs::remove_dir_all(bench.folder.path().join("queries")).unwrap();
    bench.send(0, "bad three");
    bench.ingest(&bench.settings()).await.unwrap();
    assert_eq!(bench.offsets(Name::DeadLetters).await, [(0, 0), (0, 2), (0, 3)]);
    assert_eq!(bench.offsets(Name::Queries).await, [(0, 1)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn letters_of_a_generation_before_say_nothing_of_what_is_read_now() {
    let bench = Bench::new(1);
    for payload in ["bad one", &call("a"), r#"{"question":"hi"}"#] {
        bench.send(0, payload);
    }
    bench.ingest(&bench.settings()).await.unwrap();
    assert_eq!(bench.offsets(Name::DeadLetters).await, [(0, 0), (0, 2)]);
    let own = r#"{ "name": "own", "when": "/question", "parts": { "messages": "/question" } }"#;
    let mut settings = Settings { mapping: vec![serde_json::from_str(own).unwrap()], ..bench.settings() };
    settings.kafka.generation = 1;
    // As after a crash of the new generation between its two commits, with nothing but the first record read.
    let app_id = settings.kafka.app_id(&TopicPartition::new(TOPIC, 0));
    let mut letters = bench.tables().open_one(Name::DeadLetters).await.unwrap();
    letters.append(&[], &[TxnStep { app_id, expect: None, set: 1 }]).await.unwrap();
    assert_eq!(bench.ingest(&settings).await.unwrap().rows, 2);
    assert_eq!(bench.offsets(Name::Queries).await, [(0, 1), (0, 1), (0, 2)]);
    assert_eq!(bench.offsets(Name::DeadLetters).await, [(0, 0), (0, 2)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn latest_counts_at_first_sight_only() {
    let bench = Bench::new(1);
    bench.send(0, &call("before"));
    let mut settings = bench.settings();
    settings.kafka.start = kafka::Start::Latest;
    assert_eq!(bench.ingest(&settings).await.unwrap().rows, 0);
    bench.send(0, &call("after"));
    assert_eq!(bench.ingest(&settings).await.unwrap().rows, 1);
    assert_eq!(bench.offsets(Name::Queries).await, [(0, 1)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreachable_broker_is_named_with_its_cause_and_nothing_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let tables = Tables::open(folder.path()).unwrap();
    let mut settings = Settings::default();
    settings.kafka.brokers = "127.0.0.1:1".into();
    settings.kafka.connect_timeout_s = 1;
    let (_keep, shutdown) = watch::channel(false);
    let error = run(&settings, &tables, Arc::default(), shutdown, Mode::UntilIdle).await.unwrap_err().to_string();
    assert!(error.contains("127.0.0.1:1") && error.contains("Connection refused"), "{error}");
    assert!(!error.contains('\n'), "{error}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "nothing half-made");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_in_flight_is_stored_when_told_to_stop() {
    let bench = Bench::new(1);
    bench.send(0, &call("a"));
    let counters = Arc::new(Counters::default());
    let (stop, shutdown) = watch::channel(false);
    let (settings, tables, shared) = (bench.settings(), bench.tables(), Arc::clone(&counters));
    let task = tokio::spawn(async move { run(&settings, &tables, shared, shutdown, Mode::Forever).await });
    let deadline = Instant::now() + Duration::from_secs(30);
    while counters.buffered.load(Ordering::Relaxed) == 0 {
        assert!(Instant::now() < deadline, "the record was never read");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(counters.rows.load(Ordering::Relaxed), 0, "stored before its time");
    stop.send(true).unwrap();
    assert_eq!(task.await.unwrap().unwrap().rows, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn at_the_end_of_the_log_a_row_does_not_wait_for_the_long_interval() {
    let bench = Bench::new(2);
    bench.send(0, &call("a"));
    let counters = Arc::new(Counters::default());
    let (stop, shutdown) = watch::channel(false);
    let settings = Settings { end_interval_s: 1, commit_interval_s: 3600, ..bench.settings() };
    let (tables, shared) = (bench.tables(), Arc::clone(&counters));
    let task = tokio::spawn(async move { run(&settings, &tables, shared, shutdown, Mode::Forever).await });
    let deadline = Instant::now() + Duration::from_secs(30);
    while counters.rows.load(Ordering::Relaxed) == 0 {
        assert!(Instant::now() < deadline, "the row still waits");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    stop.send(true).unwrap();
    assert_eq!(task.await.unwrap().unwrap().commits, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_lag_is_told_where_nothing_happens_and_ends_with_the_commit_and_with_the_session() {
    let bench = Bench::new(1);
    bench.send(0, &call("a"));
    let counters = Arc::new(Counters::default());
    let (stop, shutdown) = watch::channel(false);
    let mut settings = Settings { end_interval_s: 8, ..bench.settings() };
    settings.kafka.properties.insert("statistics.interval.ms".into(), "100".into());
    let (tables, shared) = (bench.tables(), Arc::clone(&counters));
    let task = tokio::spawn(async move { run(&settings, &tables, shared, shutdown, Mode::Forever).await });
    let get = |number: &std::sync::atomic::AtomicI64| number.load(Ordering::Relaxed);
    let until = async |what: &str, holds: &dyn Fn() -> bool| {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !holds() {
            assert!(Instant::now() < deadline, "{what}: {counters:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    until("nothing is behind", &|| get(&counters.lag) == 1 && get(&counters.behind_since_ms) > 0).await;
    assert_eq!(counters.rows.load(Ordering::Relaxed), 0, "stored before its time");
    until("all is stored and still behind", &|| get(&counters.lag) + get(&counters.behind_since_ms) == 0).await;
    assert_eq!((counters.rows.load(Ordering::Relaxed), get(&counters.assigned)), (1, 1));
    stop.send(true).unwrap();
    task.await.unwrap().unwrap();
    assert_eq!(get(&counters.assigned), 0);
}

#[tokio::test]
async fn a_dead_letter_counts_as_often_as_it_is_held() {
    let folder = tempfile::tempdir().unwrap();
    let (tables, settings) = (Tables::open(folder.path()).unwrap(), kafka::Settings::default());
    let reader = Settings::default().reader().unwrap();
    let mut ledger = Ledger::open(&tables, &settings, Arc::new(reader)).await.unwrap();
    let place = TopicPartition::new(&settings.topic, 0);
    let unseen = ledger.assign(std::slice::from_ref(&place)).await.unwrap_err();
    assert!(matches!(&unseen, IngestError::Unseen { place: at } if *at == place) && unseen.is_restart(), "{unseen}");
    let extents = vec![kafka::Extent { place: place.clone(), low: 0, high: 0 }];
    ledger.first_sight(&[kafka::Topic { name: settings.topic.clone(), id: None, extents }]).await.unwrap();
    ledger.assign(std::slice::from_ref(&place)).await.unwrap();
    let record = |offset, payload: String| crate::query_log::Record {
        place: place.clone(),
        offset,
        time_ms: None,
        key: None,
        headers: Vec::new(),
        payload: Some(payload.into_bytes()),
    };
    let good = call("a");
    ledger.read(vec![record(0, good.clone())]).await.unwrap();
    assert_eq!(ledger.held(), good.len() as u64);
    ledger.read(vec![record(1, "x".repeat(1000))]).await.unwrap();
    assert_eq!(ledger.held(), good.len() as u64 + 4000 + 512);
    // Of small ones what stands beside the bytes is most.
    ledger.read((2..102).map(|offset| record(offset, "x".to_owned())).collect()).await.unwrap();
    assert_eq!(ledger.held(), good.len() as u64 + 4000 + 512 + 100 * (4 + 512));
    ledger.seal().await.unwrap();
    assert_eq!(ledger.held(), 0);
}

#[test]
fn parts_that_do_not_fit_into_the_memory_are_refused() {
    Settings::default().validate().unwrap();
    let mut settings = Settings { memory_mib: 256, ..Settings::default() };
    let refusal = settings.validate().unwrap_err();
    assert!(refusal.contains("memory_mib is 256") && refusal.contains("fetch_mib"), "{refusal}");
    (settings.kafka.fetch_mib, settings.batch_bytes) = (8, 8 << 20);
    settings.validate().unwrap();
    // Every part counts.
    settings.memory_mib = settings.memory_needed();
    settings.validate().unwrap();
    settings.batch_bytes += 1;
    assert!(settings.validate().is_err());
    settings.batch_bytes -= 1;
    settings.kafka.fetch_mib += 1;
    assert!(settings.validate().is_err());
}
