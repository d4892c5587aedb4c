//! Several topics by one expression, from a real Apache Kafka: each to its own end, each with its own offsets.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;
use taod::query_log::TopicPartition;
use taod::query_log::kafka::Settings;
use taod::table::Name;

use crate::harness::kafka::{Kafka, Member, table};
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
