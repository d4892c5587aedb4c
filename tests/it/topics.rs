//! Several topics by one expression, from a real Apache Kafka: each to its own end, each with its own offsets.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use rdkafka::admin::AdminOptions;
use rdkafka::{Offset, TopicPartitionList};
use serde_json::Value;
use taod::query_log::TopicPartition;
use taod::query_log::kafka::Settings;
use taod::table::Name;

use crate::harness::kafka::{Instance, Kafka, Member, places, table, until};
use crate::harness::taod_in;

fn ingest(member: &Member, folder: &Path) -> Value {
    let config = member.write(folder).display().to_string();
    let outcome = taod_in(folder, &["ingest", "--until-idle", "--json", "--config", &config], &[]);
    serde_json::from_str(&outcome.code(0).out).unwrap()
}

/// Returns how many rows there are of each partition, and checks that their offsets are those from 0 on.
async fn rows(folder: &Path) -> BTreeMap<(String, i64), i64> {
    let mut offsets: BTreeMap<(String, i64), Vec<i64>> = BTreeMap::new();
    for row in table(folder, Name::Queries).await.rows::<Value>(None).await.unwrap() {
        let place = (row["topic"].as_str().unwrap().to_owned(), row["partition"].as_i64().unwrap());
        offsets.entry(place).or_default().push(row["offset"].as_i64().unwrap());
    }
    let counted = offsets.into_iter().map(|(place, mut found)| {
        found.sort_unstable();
        assert_eq!(found, (0..found.len() as i64).collect::<Vec<_>>(), "{place:?}");
        (place, found.len() as i64)
    });
    counted.collect()
}

fn expected<const N: usize>(counts: [(&str, i64, i64); N]) -> BTreeMap<(String, i64), i64> {
    counts.map(|(topic, partition, count)| ((topic.to_owned(), partition), count)).into()
}

#[tokio::test(flavor = "multi_thread")]
async fn topics_by_an_expression_are_each_read_to_their_end_and_later_ones_from_their_beginning() {
    let Some(kafka) = Kafka::start(&[]) else { return };
    let folder = tempfile::tempdir().unwrap();
    for (topic, partitions) in [("llm-a", 2), ("llm-b", 1), ("web", 1)] {
        kafka.create_topic(topic, partitions).await;
        kafka.send_calls(topic, partitions, 10);
    }
    let member = kafka.member("^llm-");
    assert_eq!(ingest(&member, folder.path())["rows"], 30);
    assert_eq!(rows(folder.path()).await, expected([("llm-a", 0, 10), ("llm-a", 1, 10), ("llm-b", 0, 10)]));

    // `start` counts where nothing was read yet: of a topic that comes later nothing is left out.
    kafka.create_topic("llm-c", 1).await;
    kafka.send_calls("llm-c", 1, 3);
    kafka.send_calls("llm-a", 1, 4);
    assert_eq!(ingest(&member.clone().setting("start = \"latest\""), folder.path())["rows"], 7);
    let all = expected([("llm-a", 0, 14), ("llm-a", 1, 10), ("llm-b", 0, 10), ("llm-c", 0, 3)]);
    assert_eq!(rows(folder.path()).await, all);

    // Nothing is new: it ends by itself, although no record tells of which topic an end is.
    assert_eq!(ingest(&member, folder.path())["rows"], 0);

    // The offsets stand under the topic's own name, so that the expression may change.
    let mut queries = table(folder.path(), Name::Queries).await;
    let app_id = Settings::default().app_id(&TopicPartition::new("llm-a", 0));
    assert_eq!(queries.txn(&app_id).await.unwrap(), Some(14));
    assert_eq!(ingest(&kafka.member("llm-a"), folder.path())["rows"], 0);

    let shown = member.write(folder.path()).display().to_string();
    let shown = taod_in(folder.path(), &["table", "offsets", "show", "--json", "--config", &shown], &[]).code(0).out;
    let shown: Value = serde_json::from_str(&shown).unwrap();
    let stored = shown["partitions"].as_array().unwrap().iter().map(|p| p["stored"].as_i64().unwrap());
    assert_eq!((stored.sum::<i64>(), shown["kafka"].is_null()), (37, true), "{shown}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_compares_whole_names_finds_the_same_topics_and_none_of_its_own() {
    let Some(kafka) = Kafka::start(&[]) else { return };
    let folder = tempfile::tempdir().unwrap();
    for topic in ["llm-a", "llm-b", "web"] {
        kafka.create_topic(topic, 1).await;
        kafka.send_calls(topic, 1, 10);
    }
    // A member of the group of old makes the broker's own topic, which holds the group.
    assert_eq!(ingest(&kafka.member("web"), folder.path())["rows"], 10);
    let new = |topic| kafka.member(topic).properties(&[("group.protocol", "consumer")]);
    assert_eq!(ingest(&new("^llm-"), folder.path())["rows"], 20);
    assert_eq!(ingest(&new("^llm-"), folder.path())["rows"], 0);
    assert_eq!(ingest(&new("^.*"), folder.path())["rows"], 0);
    kafka.send_calls("web", 1, 1);
    assert_eq!(ingest(&new("^web$|^none"), folder.path())["rows"], 1);
    assert_eq!(rows(folder.path()).await, expected([("llm-a", 0, 10), ("llm-b", 0, 10), ("web", 0, 11)]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_made_anew_under_a_running_member_is_told_and_the_remedy_names_it() {
    let Some(kafka) = Kafka::start(&[]) else { return };
    let folder = tempfile::tempdir().unwrap();
    for topic in ["llm-a", "llm-b"] {
        kafka.create_topic(topic, 1).await;
        kafka.send_calls(topic, 1, 10);
    }
    let config = kafka.member("^llm-").write(folder.path());
    let mut instance = Instance::start(&config, "running");
    until("all is stored", async || places(folder.path(), Name::Queries).await.values().sum::<usize>() == 20).await;
    kafka.admin().delete_topics(&["llm-b"], &AdminOptions::new()).await.unwrap()[0].as_ref().unwrap();
    until("the topic is gone", async || {
        let metadata = kafka.admin().inner().fetch_metadata(None, Duration::from_secs(10)).unwrap();
        metadata.topics().iter().all(|one| one.name() != "llm-b")
    })
    .await;
    kafka.create_topic("llm-b", 1).await;
    kafka.send_calls("llm-b", 1, 10);
    until("it is told", async || instance.said(&["topic llm-b was deleted and made anew"]) > 0).await;
    assert!(instance.is_alive());
    instance.kill();
    assert_eq!(rows(folder.path()).await, expected([("llm-a", 0, 10), ("llm-b", 0, 10)]));

    let offsets = |arguments: &[&str]| {
        let config = config.display().to_string();
        taod_in(folder.path(), &[&["table", "offsets"], arguments, &["--config", &config]].concat(), &[])
    };
    let shown = offsets(&["show"]).code(0).out;
    assert_eq!(shown.lines().filter(|line| line.contains("llm-b  the topic was made anew")).count(), 1, "{shown}");
    let set = |to| ["set", "0", to, "--accept-loss", "--topic", "llm-a"];
    assert!(offsets(&set("12")).code(64).err.contains("is 10: 12 would give up"));
    // Retention: what the table of offsets prints is what helps.
    kafka.send_calls("llm-a", 1, 5);
    let mut kept = TopicPartitionList::new();
    kept.add_partition_offset("llm-a", 0, Offset::Offset(12)).unwrap();
    kafka.admin().delete_records(&kept, &AdminOptions::new()).await.unwrap();
    let shown = offsets(&["show"]).code(0).out;
    assert!(shown.contains("2 records are gone: set 0 12 --accept-loss --topic llm-a"), "{shown}");
    offsets(&set("12")).code(0);
    assert_eq!(ingest(&kafka.member("llm-a"), folder.path())["rows"], 3);
}
