//! The query log: a broker that answers, the topic, and whether what the tables lack is still there.

use std::collections::BTreeMap;

use chrono::{TimeDelta, Utc};

use super::{Check, Finding};
use crate::config::Config;
use crate::query_log::kafka::{Connection, Extent, Settings, Topic};
use crate::query_log::{SourceError, TopicPartition};
use crate::table::{Look, Name};

/// How far a record may be stamped ahead of this machine's clock.
const AHEAD: TimeDelta = TimeDelta::seconds(60);
/// Partitions that are named in one finding at most.
const NAMED: usize = 4;

/// Asks the broker for the topic, and compares what it holds with what is stored.
pub(super) async fn check(config: &Config) -> Vec<Finding> {
    let kafka = config.ingest.kafka.clone();
    let soon = (Utc::now() + AHEAD).timestamp_millis();
    let look = move || Connection::open(&kafka).map(|c| (c.topics().to_vec(), c.stamped_from(soon)));
    let (topics, stamped) = match tokio::task::spawn_blocking(look).await {
        Ok(Ok(found)) => found,
        Ok(Err(error)) => return refused(&config.ingest.kafka, &error),
        Err(_) => {
            return vec![Finding::failure(
                Check::Broker,
                "the look at kafka broke off",
                "run it again with --log debug",
            )];
        }
    };
    let mut findings = vec![Finding::ok(Check::Broker, format!("{} answers", config.ingest.kafka.brokers))];
    let stored = match stored(config, &topics).await {
        Ok(stored) => stored,
        Err(error) => {
            let remedy = "see the check `tables`; until then it is not known whether records are lost";
            findings.push(Finding::warning(
                Check::Topic,
                format!("the stored offsets cannot be read: {error}"),
                remedy,
            ));
            Stored::default()
        }
    };
    findings.extend(topics.iter().map(|topic| judge(topic, &stored)));
    findings.extend(clock(stamped));
    findings
}

/// Warns where the log holds records of the future: Kafka tells no time but theirs.
fn clock(stamped: Result<Vec<TopicPartition>, SourceError>) -> Option<Finding> {
    let ahead = match stamped {
        Ok(ahead) => ahead,
        Err(error) => {
            let says = format!("kafka did not say whether it holds records of the future: {error}");
            return Some(Finding::warning(
                Check::Clock,
                says,
                "see that this machine keeps time by NTP (`timedatectl`)",
            ));
        }
    };
    let first = ahead.first()?;
    let says = format!(
        "{} holds records stamped {} s and more ahead of this machine, such as in partition {}",
        first.topic,
        AHEAD.num_seconds(),
        first.partition
    );
    let remedy = "let this machine and whoever logs keep time by NTP (`timedatectl`): data ages, windows and the watch over promotions go by it";
    Some(Finding::warning(Check::Clock, says, remedy))
}

/// Returns what an error of the source says about the broker, and about the topic where the broker answered.
fn refused(kafka: &Settings, error: &SourceError) -> Vec<Finding> {
    let fails = |check, remedy: &str| Finding::failure(check, error.to_string(), remedy);
    let answers = || Finding::ok(Check::Broker, format!("{} answers", kafka.brokers));
    match error {
        SourceError::NoTopic { .. } => {
            vec![
                answers(),
                fails(Check::Topic, "create the topic, or set ingest.kafka.topic to the one that is logged to"),
            ]
        }
        SourceError::Forbidden { .. } => {
            vec![answers(), fails(Check::Topic, "let the broker's administrator allow it")]
        }
        SourceError::Unreachable { .. } => {
            vec![fails(
                Check::Broker,
                "see that the broker runs and that this machine reaches it; until then nothing is lost as long as the \
                 topic's retention lasts",
            )]
        }
        _ => vec![fails(Check::Broker, "correct what the message names under [ingest.kafka]")],
    }
}

/// What the tables say of the log: the next offset of each partition, and each topic's id.
#[derive(Default)]
struct Stored {
    next: BTreeMap<TopicPartition, i64>,
    ids: BTreeMap<String, i64>,
}

async fn stored(config: &Config, topics: &[Topic]) -> Result<Stored, crate::table::TableError> {
    let (kafka, mut stored) = (&config.ingest.kafka, Stored::default());
    let Look::Ready(mut queries) = config.state.open_tables()?.look(Name::Queries).await? else { return Ok(stored) };
    for topic in topics {
        if let Some(id) = queries.txn(&kafka.topic_id(&topic.name)).await? {
            stored.ids.insert(topic.name.clone(), id);
        }
        let ids: Vec<String> = topic.extents.iter().map(|extent| kafka.app_id(&extent.place)).collect();
        let next = queries.txns(&ids).await?;
        let known = topic.extents.iter().zip(next).filter_map(|(extent, next)| Some((extent.place.clone(), next?)));
        stored.next.extend(known);
    }
    Ok(stored)
}

fn judge(topic: &Topic, stored: &Stored) -> Finding {
    let name = &topic.name;
    if let (Some(now), Some(then)) = (topic.id, stored.ids.get(name))
        && now != *then
    {
        let says = format!("{name} was deleted and made anew since it was last read, so ingestion stands still");
        return Finding::failure(
            Check::Topic,
            says,
            "read it under a new ingest.kafka.generation: `taod table offsets new-generation`",
        );
    }
    let next = |extent: &Extent| stored.next.get(&extent.place).copied();
    let lost = |extent: &&Extent| next(extent).is_some_and(|next| next < extent.low);
    let beyond = |extent: &&Extent| next(extent).is_some_and(|next| next > extent.high);
    let named = |extents: Vec<&Extent>| {
        let each = extents.iter().take(NAMED).map(|e| {
            let next = next(e).unwrap_or_default();
            format!("partition {} (next {next}, kafka holds {} to {})", e.place.partition, e.low, e.high)
        });
        let more = if extents.len() > NAMED { " and more" } else { "" };
        format!("{}{more}", each.collect::<Vec<_>>().join(", "))
    };
    let (gone, ahead): (Vec<_>, Vec<_>) =
        (topic.extents.iter().filter(lost).collect(), topic.extents.iter().filter(beyond).collect());
    if !gone.is_empty() {
        let says = format!("{name} no longer holds the next record of {}: retention was faster", named(gone));
        let remedy = "accept the loss by `taod table offsets set PARTITION OFFSET --accept-loss`, and raise the topic's retention";
        return Finding::failure(Check::Topic, says, remedy);
    }
    if !ahead.is_empty() {
        let says = format!(
            "{name} ends before the next record of {}: it is another log, or a broker lost records",
            named(ahead)
        );
        return Finding::failure(
            Check::Topic,
            says,
            "see docs/kafka.md; a log made anew is read by `taod table offsets new-generation`",
        );
    }
    let behind: i64 = topic.extents.iter().map(|e| e.high - next(e).unwrap_or(e.low).max(e.low)).sum();
    Finding::ok(
        Check::Topic,
        format!("{name} has {} partitions; {behind} records are not stored yet", topic.extents.len()),
    )
}
