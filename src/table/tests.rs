//! What must hold of a table: rows and positions land together, once, whatever the store answers and whoever else writes.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use deltalake::logstore::object_store::memory::InMemory;
use deltalake::logstore::object_store::path::Path;
use deltalake::logstore::object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result as StoreResult,
};
use futures::StreamExt;
use futures::stream::BoxStream;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use url::Url;

use super::*;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Usage {
    cluster: String,
    trial: String,
    step: i64,
    /// Has no column: lives in `detail`.
    note: Option<String>,
}

fn usage(step: i64) -> Usage {
    Usage { cluster: format!("c{step}"), trial: "t1".into(), step, note: Some("\"quoted\"".into()) }
}

fn step(expect: Option<i64>, set: i64) -> TxnStep {
    TxnStep { app_id: "test".into(), expect, set }
}

/// What the store does to one write of a log entry.
#[derive(Debug, Clone)]
enum Fault {
    /// Nothing is written and the caller hears an error.
    Refuse,
    /// The entry is written and the caller hears an error.
    LandThenFail,
    /// Another writer's entry is written first.
    Rival(Value),
    /// The caller hears that the entry exists although nothing was written (an S3 409).
    FalseConflict,
    /// The entry is written and the caller hears that it exists (a client repeated its own request after a 500).
    LandThenConflict,
    /// Another writer's entry is written while the caller waits for an answer that never comes.
    RivalThenFail(Value),
    /// The entry is written, whatever stands there (a store that does not know conditional writes).
    Overwrite,
}

fn exists(location: &Path) -> Error {
    Error::AlreadyExists { path: location.to_string(), source: "conditional request conflict".into() }
}

/// A store in memory that misbehaves on log entries, as told.
#[derive(Debug)]
struct Faulty {
    store: InMemory,
    faults: Mutex<Vec<Fault>>,
    /// Log entries that were read.
    read: AtomicUsize,
}

impl std::fmt::Display for Faulty {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Faulty")
    }
}

#[async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> StoreResult<PutResult> {
        let broken = || Error::Generic { store: "faulty", source: "connection reset".into() };
        let is_entry = location.as_ref().contains("_delta_log") && location.as_ref().ends_with(".json");
        let fault = if is_entry { self.faults.lock().unwrap().pop() } else { None };
        match fault {
            None => self.store.put_opts(location, payload, opts).await,
            Some(Fault::Refuse) => Err(broken()),
            Some(Fault::LandThenFail) => self.store.put_opts(location, payload, opts).await.and(Err(broken())),
            Some(Fault::Rival(entry)) => {
                self.store.put_opts(location, entry.to_string().into(), opts.clone()).await?;
                self.store.put_opts(location, payload, opts).await
            }
            Some(Fault::LandThenConflict) => {
                self.store.put_opts(location, payload, opts).await?;
                Err(exists(location))
            }
            Some(Fault::RivalThenFail(entry)) => {
                self.store.put_opts(location, entry.to_string().into(), opts).await.and(Err(broken()))
            }
            Some(Fault::FalseConflict) => Err(exists(location)),
            Some(Fault::Overwrite) => self.store.put_opts(location, payload, PutOptions::default()).await,
        }
    }

    async fn put_multipart_opts(&self, at: &Path, opts: PutMultipartOptions) -> StoreResult<Box<dyn MultipartUpload>> {
        self.store.put_multipart_opts(at, opts).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> StoreResult<GetResult> {
        self.read.fetch_add(usize::from(location.as_ref().ends_with(".json")), Ordering::Relaxed);
        self.store.get_opts(location, options).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, StoreResult<Path>>) -> BoxStream<'static, StoreResult<Path>> {
        self.store.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, StoreResult<ObjectMeta>> {
        self.store.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> StoreResult<ListResult> {
        self.store.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> StoreResult<()> {
        self.store.copy_opts(from, to, options).await
    }
}

/// A table to be made in a faulty store; the last of the faults comes first.
async fn made_with(faults: Vec<Fault>) -> (Result<Table, TableError>, Arc<Faulty>) {
    let store = Arc::new(Faulty { store: InMemory::new(), faults: Mutex::new(faults), read: AtomicUsize::new(0) });
    let url = Url::parse("memory:///tables/").unwrap();
    let location = TableLocation::with_store(url, store.clone()).join("gate_usage");
    (Table::open_or_create(&location, &schema::GATE_USAGE).await, store)
}

/// A table in a faulty store, and the store.
async fn faulty() -> (Table, Arc<Faulty>) {
    let (table, store) = made_with(Vec::new()).await;
    (table.unwrap(), store)
}

#[tokio::test(flavor = "multi_thread")]
async fn however_many_positions_are_asked_about_the_log_is_read_twice() {
    const COMMITS: usize = 40;
    let (mut table, store) = faulty().await;
    for n in 0..COMMITS {
        let app_id = format!("app-{}", n % 10);
        let expect = table.txn(&app_id).await.unwrap();
        table.append(&[], &[TxnStep { app_id, expect, set: n as i64 }]).await.unwrap();
    }
    let mut table = Table::attach(table.log.clone(), &schema::GATE_USAGE).await.unwrap();
    let opened = store.read.swap(0, Ordering::Relaxed);
    for n in 0..10 {
        assert_eq!(table.txn(&format!("app-{n}")).await.unwrap(), Some(30 + n), "the newest of each");
    }
    assert_eq!(table.txn("stranger").await.unwrap(), None);
    let asked = store.read.load(Ordering::Relaxed);
    // Once for protocol and metadata, once for the positions.
    assert!((COMMITS..=2 * COMMITS + 4).contains(&asked), "{asked} of {opened} at the opening");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_overwrites_log_entries_is_refused() {
    let (made, store) = made_with(vec![Fault::Overwrite, Fault::Overwrite]).await;
    let error = made.err().unwrap();
    assert!(error.is_foreign() && error.to_string().contains("If-None-Match"), "{error}");
    assert!(store.store.list(None).next().await.is_none(), "the next start tries it again");
    // A lost race and a lost reply are none of this.
    assert!(made_with(vec![Fault::LandThenConflict]).await.0.is_ok());
    assert!(made_with(vec![Fault::LandThenConflict, Fault::Overwrite]).await.0.is_ok());
}

async fn local(folder: &std::path::Path) -> Table {
    Tables::open(folder).unwrap().open_one(Name::GateUsage).await.unwrap()
}

async fn steps_of(table: &Table) -> Vec<i64> {
    let mut rows: Vec<Usage> = table.rows(None).await.unwrap();
    rows.sort_by_key(|row| row.step);
    rows.iter().map(|row| row.step).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn upkeep_is_due_once_when_a_round_number_is_passed_whoever_made_that_commit() {
    let folder = tempfile::tempdir().unwrap();
    let (mut table, mut other) = (local(folder.path()).await, local(folder.path()).await);
    for version in 1..100 {
        table.append(&[], &[step((version > 1).then_some(version - 1), version)]).await.unwrap();
    }
    assert!(table.upkeep().is_none());
    other.append(&[], &[TxnStep { app_id: "other".into(), expect: None, set: 1 }]).await.unwrap();
    table.append(&[], &[step(Some(99), 100)]).await.unwrap();
    assert_eq!(table.version(), 101);
    assert!(table.upkeep().is_some());
    assert!(table.upkeep().is_none());
    assert!(local(folder.path()).await.upkeep().is_none(), "opening a table makes nothing due");
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_come_back_as_they_went_in_and_positions_survive_a_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let mut table = local(folder.path()).await;
    table.append_rows(&[usage(1), usage(2)], &[step(None, 7)]).await.unwrap();
    table.append(&[], &[step(Some(7), 9)]).await.unwrap();
    table.maintain().await.unwrap();
    let mut again = local(folder.path()).await;
    assert_eq!((again.version(), again.txn("test").await.unwrap()), (2, Some(9)));
    assert_eq!(again.txn("other").await.unwrap(), None);
    let mut rows: Vec<Usage> = again.rows(Some("step > 0")).await.unwrap();
    rows.sort_by_key(|row| row.step);
    assert_eq!(rows, [usage(1), usage(2)]);
    assert_eq!(again.count().await.unwrap(), 2);
    assert!(again.rows::<Usage>(Some("step > 5")).await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn two_writers_of_other_positions_both_land() {
    let folder = tempfile::tempdir().unwrap();
    let (mut a, mut b) = (local(folder.path()).await, local(folder.path()).await);
    let other = TxnStep { app_id: "other".into(), expect: None, set: 1 };
    let (first, second) = tokio::join!(async { a.append_rows(&[usage(1)], &[step(None, 1)]).await }, async {
        b.append_rows(&[usage(2)], &[other]).await
    });
    let mut versions = [first.unwrap().version, second.unwrap().version];
    versions.sort_unstable();
    assert_eq!(versions, [1, 2]);
    a.refresh().await.unwrap();
    assert_eq!(steps_of(&a).await, [1, 2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_writers_of_one_position_one_is_fenced_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (mut a, mut b) = (local(folder.path()).await, local(folder.path()).await);
    assert_eq!(b.txn("test").await.unwrap(), None);
    a.append_rows(&[usage(1)], &[step(None, 5)]).await.unwrap();
    // The same step to the same value, as a second daemon would take it: still not ours.
    let error = b.append_rows(&[usage(2)], &[step(None, 5)]).await.unwrap_err();
    assert!(matches!(&error, TableError::Fenced { found: Some(5), expected: None, .. }), "{error}");
    assert!(error.is_restart());
    a.refresh().await.unwrap();
    assert_eq!(steps_of(&a).await, [1]);
    let files = std::fs::read_dir(folder.path().join("gate_usage")).unwrap().count();
    assert_eq!(files, 2, "one data file and the log");
}

#[tokio::test]
async fn a_lost_reply_is_settled_by_the_log() {
    let (mut table, store) = faulty().await;
    store.faults.lock().unwrap().push(Fault::LandThenFail);
    table.append_rows(&[usage(1)], &[step(None, 1)]).await.unwrap();
    store.faults.lock().unwrap().extend([Fault::Refuse, Fault::FalseConflict]);
    table.append_rows(&[usage(2)], &[step(Some(1), 2)]).await.unwrap();
    store.faults.lock().unwrap().push(Fault::LandThenConflict);
    table.append_rows(&[usage(3)], &[step(Some(2), 3)]).await.unwrap();
    assert_eq!((table.version(), steps_of(&table).await), (3, vec![1, 2, 3]));
}

#[tokio::test]
async fn a_rival_between_check_and_write_fences_only_its_own_positions() {
    let rival = |id: &str| Fault::Rival(json!({ "txn": { "appId": id, "version": 9 } }));
    let (mut table, store) = faulty().await;
    store.faults.lock().unwrap().push(rival("another"));
    table.append_rows(&[usage(1)], &[step(None, 1)]).await.unwrap();
    assert_eq!(table.version(), 2);
    let unheard = json!({ "txn": { "appId": "another", "version": 10 } });
    store.faults.lock().unwrap().push(Fault::RivalThenFail(unheard));
    table.append_rows(&[usage(2)], &[step(Some(1), 2)]).await.unwrap();
    assert_eq!((table.version(), table.txn("another").await.unwrap()), (4, Some(10)));
    store.faults.lock().unwrap().push(rival("test"));
    let error = table.append_rows(&[usage(3)], &[step(Some(2), 3)]).await.unwrap_err();
    assert!(matches!(error, TableError::Fenced { found: Some(9), .. }), "{error}");
    assert_eq!(steps_of(&table).await, [1, 2]);
}

#[tokio::test]
async fn a_store_that_never_answers_ends_in_one_line() {
    let (mut table, store) = faulty().await;
    store.faults.lock().unwrap().extend(vec![Fault::Refuse; 20]);
    let error = table.append_rows(&[usage(1)], &[step(None, 1)]).await.unwrap_err();
    assert!(matches!(error, TableError::Unsettled { version: 1, .. }), "{error}");
    assert!(error.to_string().contains("connection reset"), "{error}");
}

#[tokio::test]
async fn a_feature_that_someone_turns_on_stops_the_writer() {
    let protocol = json!({ "protocol": {
        "minReaderVersion": 1, "minWriterVersion": 7, "writerFeatures": ["identityColumns"],
    }});
    let (mut table, store) = faulty().await;
    store.faults.lock().unwrap().push(Fault::Rival(protocol));
    let error = table.append_rows(&[usage(1)], &[step(None, 1)]).await.unwrap_err();
    assert!(error.is_foreign() && error.to_string().contains("identityColumns"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_does_not_fit_is_refused_whole() {
    #[derive(Serialize)]
    struct Wrong {
        topic: &'static str,
        unheard_of: i32,
    }
    let folder = tempfile::tempdir().unwrap();
    let mut letters = Tables::open(folder.path()).unwrap().open_one(Name::DeadLetters).await.unwrap();
    let error = letters.append_rows(&[Wrong { topic: "t", unheard_of: 1 }], &[]).await.unwrap_err();
    assert!(error.to_string().contains("unheard_of"), "{error}");
    let error = letters.append_rows(&[json!({ "topic": "t" })], &[]).await.unwrap_err();
    assert!(matches!(error, TableError::Rows { .. }), "{error}");
    assert_eq!(letters.version(), 0);
}

#[test]
fn statistics_are_bounds_of_what_the_file_holds() {
    let row = |offset: i64, micros: i64| {
        json!({ "topic": "t", "partition": 1, "offset": offset, "record_index": 0, "kafka_time": micros,
                "ingest_date": "2026-02-03", "payload": "00", "reason": "r", "message": "secret text",
                "taod_version": "0", "config_hash": "c" })
    };
    let low = write::batch_of_any(&schema::DEAD_LETTERS, &[row(5, 1_700_000_000_000_001)]).unwrap();
    let high =
        write::batch_of_any(&schema::DEAD_LETTERS, &[row(9, 1_700_000_000_000_999), row(7, 1_700_000_000_000_000)])
            .unwrap();
    let text = write::stats(&schema::DEAD_LETTERS, &[low, high]);
    assert!(!text.contains("secret"), "{text}");
    let stats: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(stats["numRecords"], 3);
    assert_eq!((&stats["minValues"]["offset"], &stats["maxValues"]["offset"]), (&json!(5), &json!(9)));
    assert_eq!(stats["minValues"]["kafka_time"], "2023-11-14T22:13:20.000Z");
    assert_eq!(stats["maxValues"]["kafka_time"], "2023-11-14T22:13:20.001Z");
    assert_eq!(stats["minValues"]["ingest_date"], "2026-02-03");
    assert_eq!(stats["nullCount"]["kafka_time"], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_log_says_of_a_file_is_true_and_bounded_to_harmless_columns() {
    let folder = tempfile::tempdir().unwrap();
    let mut table = local(folder.path()).await;
    table.append_rows(&[usage(1), usage(2)], &[step(None, 1)]).await.unwrap();
    let entry = std::fs::read_to_string(folder.path().join("gate_usage/_delta_log/00000000000000000001.json")).unwrap();
    let lines: Vec<Value> = entry.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines[0]["commitInfo"]["isBlindAppend"], true);
    assert_eq!(lines[1]["txn"], json!({ "appId": "test", "version": 1 }));
    let add = &lines[2]["add"];
    let file = folder.path().join("gate_usage").join(add["path"].as_str().unwrap());
    assert_eq!(add["size"], std::fs::metadata(file).unwrap().len());
    let stats: Value = serde_json::from_str(add["stats"].as_str().unwrap()).unwrap();
    assert_eq!(stats, json!({ "numRecords": 2, "minValues": {}, "maxValues": {}, "nullCount": {} }));
}
