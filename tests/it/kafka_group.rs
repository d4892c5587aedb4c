//! Names in a consumer group (static membership), under both group protocols, on a real broker.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use taod::table::Name;

use crate::harness::kafka::{Instance, Kafka, once_each, places, table, until};

/// A session lasts as long under both protocols: long enough for a restart, short enough for a test to wait for its end.
const BROKER: [&str; 2] = ["group.consumer.min.session.timeout.ms=500", "group.consumer.session.timeout.ms=10000"];

/// The protocols, by what a member says for each.
const PROTOCOLS: [(&str, &[(&str, &str)]); 2] = [
    ("classic", &[("session.timeout.ms", "10000"), ("heartbeat.interval.ms", "300")]),
    ("consumer", &[("group.protocol", "consumer")]),
];

fn config(kafka: &Kafka, folder: &Path, topic: &str, protocol: &[(&str, &str)], instance: &str) -> PathBuf {
    let properties = [protocol, &[("group.instance.id", instance)]].concat();
    let written = kafka.member(topic).properties(&properties).write(folder);
    let path = folder.join(format!("{instance}.toml"));
    std::fs::rename(written, &path).unwrap();
    path
}

/// Waits until the table holds each of the first `count` records of each partition, none twice.
async fn until_stored(folder: &Path, partitions: i64, count: i64) {
    let all = once_each(partitions, 0..count);
    until(&format!("{count} rows are stored"), async || places(folder, Name::Queries).await == all).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_in_the_group_is_one_member_s() {
    let Some(kafka) = Kafka::start(&BROKER) else { return };
    for (name, protocol) in PROTOCOLS {
        two_with_one_name_store_every_row_once(&kafka, name, protocol).await;
        a_restart_under_a_name_leaves_the_others_alone(&kafka, name, protocol).await;
    }
}

/// The classic protocol drives out the member that has the name, the new one keeps out the member that wants it. Neither
/// ends, and the one that waits says so once.
async fn two_with_one_name_store_every_row_once(kafka: &Kafka, name: &str, protocol: &[(&str, &str)]) {
    let topic = format!("one-name-{name}");
    kafka.create_topic(&topic, 2).await;
    let folder = tempfile::tempdir().unwrap();
    let config = config(kafka, folder.path(), &topic, protocol, "x");
    kafka.send_calls(&topic, 2, 50);
    let mut first = Instance::start(&config, "first");
    until_stored(folder.path(), 2, 50).await;

    let mut second = Instance::start(&config, "second");
    let (fenced, line) = match name {
        "classic" => (&first, "has taken over group.instance.id x"),
        _ => (&second, "holds group.instance.id x"),
    };
    until("one of the two is fenced", async || fenced.said(&["WARN", line]) > 0).await;
    kafka.send_calls(&topic, 2, 50);
    until_stored(folder.path(), 2, 100).await;
    if name == "consumer" {
        until("it has looked again", async || second.said(&["DEBUG", "still another's"]) > 0).await;
        assert_eq!((first.said(&["instance.id"]), second.said(&["WARN", line])), (0, 1), "{}", second.log());
    }
    assert!(first.is_alive() && second.is_alive());

    first.kill();
    kafka.send_calls(&topic, 2, 50);
    until_stored(folder.path(), 2, 150).await;
    second.stop();
}

/// Returns how often each partition of a topic was taken on.
async fn holdings(folder: &Path, topic: &str, partitions: i32) -> BTreeMap<i32, i64> {
    let mut queries = table(folder, Name::Queries).await;
    let mut holdings = BTreeMap::new();
    for partition in 0..partitions {
        let app_id = format!("taod/kafka/0/{topic}/{partition}/holding");
        holdings.insert(partition, queries.txn(&app_id).await.unwrap().unwrap_or(0));
    }
    holdings
}

async fn a_restart_under_a_name_leaves_the_others_alone(kafka: &Kafka, name: &str, protocol: &[(&str, &str)]) {
    const PARTITIONS: i32 = 4;
    let topic = format!("names-{name}");
    kafka.create_topic(&topic, PARTITIONS).await;
    let folder = tempfile::tempdir().unwrap();
    let of = |instance| config(kafka, folder.path(), &topic, protocol, instance);
    let (one, other) = (of("one"), of("other"));
    let first = Instance::start(&one, "first");
    let mut second = Instance::start(&other, "second");
    let mut sent = 0;
    until("both have partitions", async || {
        kafka.send_calls(&topic, PARTITIONS, 1);
        sent += 1;
        [&first, &second].iter().all(|instance| instance.said(&["epoch stored"]) > 0)
    })
    .await;
    until_stored(folder.path(), PARTITIONS.into(), sent).await;
    let before = holdings(folder.path(), &topic, PARTITIONS).await;

    second.stop();
    let again = Instance::start(&other, "again");
    kafka.send_calls(&topic, PARTITIONS, 50);
    until_stored(folder.path(), PARTITIONS.into(), sent + 50).await;
    let after = holdings(folder.path(), &topic, PARTITIONS).await;
    let taken: Vec<i64> = before.iter().map(|(partition, before)| after[partition] - before).collect();
    // Two are taken on once more, by the member that came back; the others stayed where they were.
    assert_eq!(taken.iter().filter(|n| **n == 1).count(), 2, "{name}: {taken:?}\n{}", again.log());
    assert_eq!(taken.iter().filter(|n| **n == 0).count(), 2, "{name}: {taken:?}\n{}", first.log());
}
