//! A rebalance that is answered too late, under every protocol, on a real broker: the member gives up within its deadline,
//! it can be closed, and the partitions are another's soon after.

use std::time::Duration;

use taod::query_log::kafka::{Connection, Consumer, Settings};
use taod::query_log::{Event, SourceError, TopicPartition};

use crate::harness::kafka::Kafka;

const BROKER: [&str; 3] = [
    "group.min.session.timeout.ms=500",
    "group.consumer.min.session.timeout.ms=500",
    "group.consumer.session.timeout.ms=3000",
];

/// The protocols, by what a member says for each.
const PROTOCOLS: [(&str, &[(&str, &str)]); 3] = [
    (
        "range",
        &[("session.timeout.ms", "3000"), ("heartbeat.interval.ms", "300"), ("partition.assignment.strategy", "range")],
    ),
    (
        "cooperative",
        &[
            ("session.timeout.ms", "3000"),
            ("heartbeat.interval.ms", "300"),
            ("partition.assignment.strategy", "cooperative-sticky"),
        ],
    ),
    ("consumer", &[("group.protocol", "consumer")]),
];

/// How long a member may take for what it does by itself.
const SOON: Duration = Duration::from_secs(30);

async fn soon<T>(what: &str, work: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, work).await.unwrap_or_else(|_| panic!("not within {SOON:?}: {what}"))
}

async fn member(kafka: &Kafka, topic: &str, protocol: &[(&str, &str)]) -> Consumer {
    let properties = protocol.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    let settings = Settings {
        brokers: kafka.brokers(),
        topic: topic.into(),
        group: topic.into(),
        rebalance_timeout_s: 1,
        properties,
        ..Settings::default()
    };
    let joined = tokio::task::spawn_blocking(move || Connection::open(&settings)?.subscribe());
    soon("a member joins", joined).await.unwrap().unwrap()
}

/// Waits for an event that is not about records.
async fn next(member: &mut Consumer, what: &str) -> Event {
    soon(what, async {
        loop {
            match member.recv().await.unwrap() {
                Event::Records(_) | Event::End { .. } | Event::Trouble(_) => {}
                event => return event,
            }
        }
    })
    .await
}

/// Answers assignments and revocations until so many partitions are held.
async fn hold(member: &mut Consumer, count: usize) {
    let mut held: Vec<TopicPartition> = Vec::new();
    while held.len() != count {
        match next(member, "partitions are assigned").await {
            Event::Assigned { partitions, reply } => {
                reply.send(partitions.iter().map(|place| (place.clone(), 0)).collect()).ok();
                held.extend(partitions);
            }
            Event::Revoked { partitions, reply } => {
                held.retain(|place| !partitions.contains(place));
                reply.send(()).ok();
            }
            other => panic!("{other:?}"),
        }
    }
}

/// Returns an assignment of partitions, unanswered.
async fn assignment(member: &mut Consumer, protocol: &str) -> Event {
    loop {
        match next(member, &format!("{protocol}: an assignment")).await {
            Event::Assigned { partitions, .. } if partitions.is_empty() => {}
            event @ Event::Assigned { .. } => return event,
            other => panic!("{protocol}: {other:?}"),
        }
    }
}

/// Returns a revocation, unanswered.
async fn revocation(member: &mut Consumer, protocol: &str) -> Event {
    loop {
        match next(member, &format!("{protocol}: a revocation")).await {
            Event::Assigned { partitions, .. } if partitions.is_empty() => {}
            event @ Event::Revoked { .. } => return event,
            other => panic!("{protocol}: {other:?}"),
        }
    }
}

async fn close(member: Consumer, protocol: &str, when: &str) {
    soon(&format!("{protocol}: a member closes {when}"), member.close()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rebalance_that_is_answered_too_late_holds_nobody_up() {
    let Some(kafka) = Kafka::start(&BROKER) else { return };
    for (name, protocol) in PROTOCOLS {
        let topic = format!("late-{name}");
        kafka.create_topic(&topic, 4).await;
        kafka.send_calls(&topic, 4, 20);
        let join = || member(&kafka, &topic, protocol);

        let mut first = join().await;
        let unanswered = assignment(&mut first, name).await;
        match next(&mut first, &format!("{name}: it gives up")).await {
            Event::Failed(SourceError::Late { .. }) => {}
            other => panic!("{name}: {other:?}"),
        }
        drop(unanswered);
        close(first, name, "after it has given up").await;

        let mut second = join().await;
        let unanswered = assignment(&mut second, name).await;
        close(second, name, "while an assignment waits").await;
        drop(unanswered);

        let mut third = join().await;
        hold(&mut third, 4).await;
        let mut fourth = join().await;
        let unanswered = revocation(&mut third, name).await;
        close(third, name, "while a revocation waits").await;
        drop(unanswered);
        hold(&mut fourth, 4).await;
        close(fourth, name, "in order").await;
    }
}

/// Some clients never find their brokers again by themselves.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_whose_brokers_are_silent_is_given_up() {
    let Some(kafka) = Kafka::start(&BROKER) else { return };
    kafka.create_topic("silent", 1).await;
    let mut member = member(&kafka, "silent", PROTOCOLS[0].1).await;
    hold(&mut member, 1).await;
    drop(kafka);
    let given_up = async {
        loop {
            match member.recv().await.unwrap() {
                Event::Failed(error) => return error,
                Event::Revoked { reply, .. } => drop(reply.send(())),
                _ => {}
            }
        }
    };
    let error = tokio::time::timeout(Duration::from_secs(120), given_up).await.unwrap();
    assert!(matches!(error, SourceError::Unreachable { .. }), "{error}");
    close(member, "range", "after its brokers are gone").await;
}
