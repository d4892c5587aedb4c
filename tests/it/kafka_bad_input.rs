//! What a real topic can do to a reader: go away, forget, hold what no one can read.

use std::path::Path;
use std::time::Duration;

use rdkafka::admin::AdminOptions;
use rdkafka::{Offset, TopicPartitionList};
use serde_json::Value;
use taod::table::Name;

use crate::harness::kafka::{Kafka, Member, call, once_each, places, table, until};
use crate::harness::{Outcome, taod_in};

const MANY: usize = 20;

fn ingest(member: &Member, folder: &Path) -> Outcome {
    let config = member.write(folder).display().to_string();
    taod_in(folder, &["ingest", "--until-idle", "--json", "--config", &config], &[])
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_topic_can_do_is_a_row_a_dead_letter_or_a_line() {
    let Some(kafka) = Kafka::start(&["message.max.bytes=33554432"]) else { return };
    a_topic_made_anew_stops_ingestion(&kafka).await;
    retention_that_overtook_the_tables_stops_ingestion(&kafka).await;
    poison_anywhere_harms_no_other_record(&kafka).await;
    a_record_of_10_mb_passes_a_small_buffer(&kafka).await;
}

/// Checks that ingestion stops with the remedy, and that what was stored stays as it is.
async fn stops(member: &Member, folder: &Path, why: &[&str]) {
    let before = places(folder, Name::Queries).await;
    ingest(member, folder).refused(why);
    assert!(places(folder, Name::Queries).await == before);
}

async fn a_topic_made_anew_stops_ingestion(kafka: &Kafka) {
    let (topic, folder) = ("anew", tempfile::tempdir().unwrap());
    let member = kafka.member(topic);
    kafka.create_topic(topic, 1).await;
    kafka.send_calls(topic, 1, MANY);
    ingest(&member, folder.path()).code(0);
    kafka.admin().delete_topics(&[topic], &AdminOptions::new()).await.unwrap()[0].as_ref().unwrap();
    until("the topic is gone", async || {
        let metadata = kafka.admin().inner().fetch_metadata(None, Duration::from_secs(10)).unwrap();
        metadata.topics().iter().all(|one| one.name() != topic)
    })
    .await;
    kafka.create_topic(topic, 1).await;
    // More than before: by its offsets alone nobody could tell.
    kafka.send_calls(topic, 1, MANY + 5);
    stops(&member, folder.path(), &["made anew", "taod table offsets new-generation"]).await;

    // The remedy: the topic is read as a new one.
    let outcome = ingest(&member.setting("generation = 1"), folder.path()).code(0);
    let summary: Value = serde_json::from_str(&outcome.out).unwrap();
    assert_eq!(summary["rows"], MANY + 5, "{summary}");
}

async fn retention_that_overtook_the_tables_stops_ingestion(kafka: &Kafka) {
    let (topic, folder) = ("forgotten", tempfile::tempdir().unwrap());
    let member = kafka.member(topic);
    kafka.create_topic(topic, 1).await;
    kafka.send_calls(topic, 1, MANY);
    ingest(&member, folder.path()).code(0);
    kafka.send_calls(topic, 1, MANY);
    let mut kept = TopicPartitionList::new();
    kept.add_partition_offset(topic, 0, Offset::Offset(30)).unwrap();
    kafka.admin().delete_records(&kept, &AdminOptions::new()).await.unwrap();
    stops(&member, folder.path(), &["kafka no longer holds the next offset", "taod table offsets set"]).await;

    // The remedy: what is still there is stored, and nothing of what was.
    ingest(&member.setting("generation = 1"), folder.path()).code(0);
    let mut expected = once_each(1, 0..20);
    expected.extend(once_each(1, 30..40));
    assert!(places(folder.path(), Name::Queries).await == expected);
}

async fn poison_anywhere_harms_no_other_record(kafka: &Kafka) {
    let (topic, folder) = ("poisoned", tempfile::tempdir().unwrap());
    kafka.create_topic(topic, 3).await;
    let good = call("fine");
    let good = Some(good.as_bytes());
    let (text, bytes, deep) = (Some(&b"no json"[..]), Some(&b"{\"a\": \"\xff\xfe"[..]), "[".repeat(10_000));
    let deep = Some(deep.as_bytes());
    // First, in the middle, last, alone, and nothing but.
    kafka.send(topic, 0, [text, good, None, good, bytes, good, deep]);
    kafka.send(topic, 1, [None, good, good, None]);
    kafka.send(topic, 2, [deep]);
    let outcome = ingest(&kafka.member(topic), folder.path()).code(0);
    let summary: Value = serde_json::from_str(&outcome.out).unwrap();
    assert_eq!((&summary["records"], &summary["skipped"]["empty"]), (&12.into(), &3.into()), "{summary}");
    let keys = |of: [(i64, i64); 5]| of.map(|place| (place, 1)).into();
    assert_eq!(places(folder.path(), Name::Queries).await, keys([(0, 1), (0, 3), (0, 5), (1, 1), (1, 2)]));
    let dead = places(folder.path(), Name::DeadLetters).await;
    assert_eq!(dead, [(0, 0), (0, 4), (0, 6), (2, 0)].map(|place| (place, 1)).into());
    let again = ingest(&kafka.member(topic), folder.path()).code(0);
    let summary: Value = serde_json::from_str(&again.out).unwrap();
    assert_eq!(summary["records"], 0, "{summary}");
}

/// More than the buffer for fetched records, and than the text that a row keeps.
async fn a_record_of_10_mb_passes_a_small_buffer(kafka: &Kafka) {
    let (topic, folder) = ("large", tempfile::tempdir().unwrap());
    kafka.create_topic_with(topic, 1, &[("max.message.bytes", "33554432")]).await;
    let (small, large) = (call("small"), call(&"x".repeat(10 << 20)));
    kafka.send(topic, 0, [&small, &large, &small, &large].map(|text| Some(text.as_bytes())));
    ingest(&kafka.member(topic).setting("fetch_mib = 1"), folder.path()).code(0);
    assert!(places(folder.path(), Name::Queries).await == once_each(1, 0..4));
    let rows: Vec<Value> = table(folder.path(), Name::Queries).await.rows(Some("truncated")).await.unwrap();
    let mut offsets: Vec<i64> = rows.iter().map(|row| row["offset"].as_i64().unwrap()).collect();
    offsets.sort_unstable();
    assert_eq!(offsets, [1, 3]);
    assert!(rows.iter().all(|row| row["extra"].to_string().contains("full_bytes")));
}
