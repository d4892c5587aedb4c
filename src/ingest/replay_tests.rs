//! Replay against tables in memory: killed between commits, run twice, two at once, and letters that fail again.

use std::sync::Arc;

use deltalake::logstore::object_store::memory::InMemory;
use serde_json::json;
use url::Url;

use super::*;
use crate::query_log::format::Mapping;
use crate::table::{TableLocation, batch_of_any, schema};

const TOPIC: &str = "t";

fn tables() -> Tables {
    let url = Url::parse("memory:///tables/").unwrap();
    Tables::at(TableLocation::with_store(url, Arc::new(InMemory::new())))
}

/// Settings under which `{"q": ..., "a": ...}` is a call. A chunk is as small as it can be: one record.
fn settings() -> Settings {
    let mapping: Mapping = serde_json::from_value(
        json!({ "name": "ours", "when": "/q", "parts": { "messages": "/q", "response": "/a" } }),
    )
    .unwrap();
    let mut settings = Settings { batch_bytes: 1, mapping: vec![mapping], ..Settings::default() };
    settings.kafka.topic = TOPIC.into();
    settings
}

fn letter(offset: i64, index: i32, payload: &str, reason: &str) -> Value {
    json!({ "topic": TOPIC, "partition": 0, "offset": offset, "record_index": index, "ingest_date": "2026-02-03",
            "key": "ff00", "headers": r#"[["a","x"],["b",{"hex":"ff"}],["c",null]]"#,
            "kafka_time": 1_700_000_000_000_000i64 + offset * 1_000_000, "payload": hex::encode(payload),
            "reason": reason, "message": "m", "taod_version": "0", "config_hash": "c" })
}

fn call(text: &str) -> String {
    json!({ "q": text, "a": "fine" }).to_string()
}

/// Stores letters, and the offset that the ingestion got to.
async fn given(letters: &[Value], stored: i64) -> Tables {
    let tables = tables();
    let mut table = tables.open_one(Name::DeadLetters).await.unwrap();
    table.append(&[batch_of_any(&schema::DEAD_LETTERS, letters).unwrap()], &[]).await.unwrap();
    let mut queries = tables.open_one(Name::Queries).await.unwrap();
    let step = TxnStep { app_id: settings().kafka.app_id(&TopicPartition::new(TOPIC, 0)), expect: None, set: stored };
    queries.append(&[], &[step]).await.unwrap();
    tables
}

#[derive(Debug, Deserialize, PartialEq, Eq)]
struct Place {
    offset: i64,
    record_index: i32,
}

async fn rows(tables: &Tables) -> Vec<(i64, i32)> {
    let table = tables.open_one(Name::Queries).await.unwrap();
    let sql = "select \"offset\", record_index from t order by 1, 2";
    let places: Vec<Place> = table.select(sql).await.unwrap();
    places.into_iter().map(|place| (place.offset, place.record_index)).collect()
}

async fn replay(tables: &Tables) -> Replayed {
    run(&settings(), tables, &Choice::default()).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn letters_become_rows_once_and_what_still_fails_stays() {
    let letters = [
        letter(1, 0, &call("one"), "unknown_format"),
        letter(2, 0, "not json", "not_json"),
        letter(3, 0, &call("three"), "unknown_format"),
        letter(9, 0, &call("not passed yet"), "unknown_format"),
    ];
    let tables = given(&letters, 5).await;
    let dry = run(&settings(), &tables, &Choice { dry_run: true, ..Choice::default() }).await.unwrap();
    assert_eq!((dry.rows, dry.commits, rows(&tables).await), (2, 0, vec![]));
    let first = replay(&tables).await;
    assert_eq!((first.letters, first.rows, first.unsettled, first.commits), (4, 2, 1, 2));
    assert_eq!(first.failed, BTreeMap::from([("not_json", 1)]));
    let second = replay(&tables).await;
    assert_eq!((second.rows, second.before, second.commits), (0, 2, 0));
    assert_eq!(rows(&tables).await, [(1, 0), (3, 0)]);
    let letters = tables.open_one(Name::DeadLetters).await.unwrap();
    assert_eq!(letters.count().await.unwrap(), 4, "no letter goes, none comes");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_of_a_letter_is_the_record_as_it_came() {
    let tables = given(&[letter(1, 0, &call("one"), "unknown_format")], 5).await;
    replay(&tables).await;
    #[derive(Debug, Deserialize)]
    struct Row {
        key: String,
        headers: Value,
        kafka_time: DateTime<Utc>,
        messages: Value,
    }
    let table = tables.open_one(Name::Queries).await.unwrap();
    let row: Row = table.select("select key, headers, kafka_time, messages from t").await.unwrap().pop().unwrap();
    assert_eq!((row.key.as_str(), row.headers), ("ff00", json!([["a", "x"], ["b", { "hex": "ff" }], ["c", null]])));
    assert_eq!(row.kafka_time.timestamp_micros(), 1_700_000_001_000_000);
    assert!(row.messages.to_string().contains("one"));
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_chosen_letters_are_replayed() {
    let letters = [letter(1, 0, &call("one"), "bad_request"), letter(2, 0, &call("two"), "unknown_format")];
    let tables = given(&letters, 5).await;
    let by_reason = Choice { reason: Some("bad_request".into()), ..Choice::default() };
    assert_eq!(run(&settings(), &tables, &by_reason).await.unwrap().rows, 1);
    assert_eq!(rows(&tables).await, [(1, 0)]);
    let later = Choice { since: DateTime::from_timestamp(1_700_000_002, 0), ..Choice::default() };
    assert_eq!(run(&settings(), &tables, &later).await.unwrap().letters, 1);
    assert_eq!(rows(&tables).await, [(1, 0), (2, 0)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_is_killed_between_commits_is_gone_on_with() {
    let letters: Vec<Value> = (0..6).map(|offset| letter(offset, 0, &call("x"), "unknown_format")).collect();
    let tables = given(&letters, 6).await;
    let (task, settings) = (tables.clone(), settings());
    let killed = tokio::spawn(async move { run(&settings, &task, &Choice::default()).await });
    let mut queries = tables.open_one(Name::Queries).await.unwrap();
    let two_stored = async {
        while queries.version() < 3 {
            tokio::task::yield_now().await;
            queries.refresh().await.unwrap();
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(60), two_stored).await.unwrap();
    killed.abort();
    killed.await.ok();
    let rest = replay(&tables).await;
    assert_eq!(rest.before + rest.rows, 6);
    assert_eq!(rows(&tables).await, (0..6).map(|offset| (offset, 0)).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn two_at_once_store_each_row_once() {
    let letters: Vec<Value> = (0..8).map(|offset| letter(offset, 0, &call("x"), "unknown_format")).collect();
    let tables = given(&letters, 8).await;
    let (first, second) = tokio::join!(replay(&tables), replay(&tables));
    assert_eq!(first.rows + second.rows, 8, "{first:?} {second:?}");
    assert_eq!(rows(&tables).await, (0..8).map(|offset| (offset, 0)).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_failed_whole_may_become_several_rows_and_a_part_only_itself() {
    let many = json!([{ "id": "1", "call_type": "completion", "model": "m", "messages": [{ "role": "user", "content": "a" }], "response": "x" },
                      { "id": "2", "call_type": "completion", "model": "m", "messages": [{ "role": "user", "content": "b" }], "response": "y" }])
    .to_string();
    let tables = given(&[letter(1, 0, &many, "unknown_format"), letter(2, 1, &many, "unknown_format")], 5).await;
    let done = replay(&tables).await;
    assert_eq!((done.letters, done.rows), (2, 3), "{done:?}");
    assert_eq!(rows(&tables).await, [(1, 0), (1, 1), (2, 1)]);
    assert_eq!(replay(&tables).await.rows, 0);
}

#[test]
fn a_chunk_never_cuts_a_record_and_leaves_out_what_is_not_chosen() {
    let key = |partition, offset, record_index, chosen| {
        let topic = TOPIC.to_owned();
        Key { topic, partition, offset, record_index, chosen, bytes: 10 }
    };
    let keys =
        vec![key(0, 1, 0, true), key(0, 1, 1, false), key(0, 2, 0, false), key(0, 3, 0, true), key(1, 3, 0, true)];
    let found: Vec<(i32, Vec<i64>)> =
        chunks(keys, 20).into_iter().map(|(place, chunk)| (place.partition, chunk.into_keys().collect())).collect();
    assert_eq!(found, [(0, vec![1]), (0, vec![3]), (1, vec![3])]);
}
