//! `taod table offsets`: how far the tables are in the query log, and what to do when Kafka no longer holds what is next.

use anyhow::Context;
use clap::{Args, Subcommand};
use serde::Serialize;
use serde_json::json;

use super::{Exit, Global};
use crate::cli::lines::Output;
use crate::cli::{Usage, block_on};
use crate::config::Config;
use crate::query_log::kafka::{Connection, Extent, Settings, Topic};
use crate::query_log::{SourceError, TopicPartition};
use crate::table::{Name, Table, TxnStep};

/// What can be done with the offsets.
#[derive(Debug, Subcommand)]
pub enum Command {
    Show(Show),
    Set(Set),
    NewGeneration(NewGeneration),
}

/// Show, for each partition, the stored next offset beside what Kafka holds.
#[derive(Debug, Args)]
pub struct Show {
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

/// Move a stored offset forward, past records that are lost. A running ingestion begins again from there.
#[derive(Debug, Args)]
pub struct Set {
    /// The partition.
    #[arg(value_name = "PARTITION", value_parser = clap::value_parser!(i32).range(0..))]
    partition: i32,
    /// The offset of the next record to read; never below the stored one.
    #[arg(value_name = "OFFSET", value_parser = clap::value_parser!(i64).range(0..))]
    offset: i64,
    /// Say that the records between the stored offset and the new one are given up. Recorded in the table's log.
    #[arg(long, required = true)]
    accept_loss: bool,
    /// The topic, where the config names several by an expression.
    #[arg(long, value_name = "NAME")]
    topic: Option<String>,
}

/// Explain how to read the topic anew, from the config's side.
#[derive(Debug, Args)]
pub struct NewGeneration {}

pub(super) fn run(global: &Global, command: &Command) -> anyhow::Result<Exit> {
    let config = global.load()?.config;
    let mut out = Output::stdout();
    match command {
        Command::Show(args) => {
            let (offsets, trouble) = block_on(show(&config))??;
            match args.json {
                true => {
                    out.line(&json!({ "topic": config.ingest.kafka.topic, "partitions": offsets, "kafka": trouble }))?
                }
                false => out.text(&table_of(&config.ingest.kafka.topic, &offsets, trouble.as_deref()))?,
            }
        }
        Command::Set(args) => out.text(&block_on(set(&config, args))??)?,
        Command::NewGeneration(_) => out.text(&new_generation(&config))?,
    }
    out.flush()?;
    Ok(Exit::Done)
}

/// One partition, by the table and by Kafka.
#[derive(Debug, Serialize)]
struct Offsets {
    topic: String,
    partition: i32,
    stored: Option<i64>,
    low: Option<i64>,
    high: Option<i64>,
    /// Records that Kafka no longer holds although they are not stored.
    lost: i64,
    /// True where the topic has another id than the one whose offsets are stored.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    made_anew: bool,
}

/// How many partitions are looked for in the table where Kafka cannot be asked.
const BLIND: i32 = 64;

/// Asks Kafka which topics there are and what it holds of them.
async fn ask(kafka: &Settings) -> anyhow::Result<Result<Vec<Topic>, SourceError>> {
    let kafka = kafka.clone();
    Ok(tokio::task::spawn_blocking(move || Connection::open(&kafka).map(|c| c.topics().to_vec())).await?)
}

async fn show(config: &Config) -> anyhow::Result<(Vec<Offsets>, Option<String>)> {
    let kafka = &config.ingest.kafka;
    let (topics, trouble) = match ask(kafka).await? {
        Ok(topics) => (topics, None),
        Err(error) => (Vec::new(), Some(error.to_string())),
    };
    let mut table = queries(config).await?;
    let ids: Vec<String> = topics.iter().map(|topic| kafka.topic_id(&topic.name)).collect();
    let stored_ids = table.txns(&ids).await?;
    let anew =
        topics.iter().zip(stored_ids).filter(|(topic, stored)| topic.id.zip(*stored).is_some_and(|(a, b)| a != b));
    let anew: Vec<&str> = anew.map(|(topic, _)| topic.name.as_str()).collect();
    let extents: Vec<&Extent> = topics.iter().flat_map(|topic| &topic.extents).collect();
    let places: Vec<TopicPartition> = match trouble {
        None => extents.iter().map(|extent| extent.place.clone()).collect(),
        Some(_) => (0..BLIND).map(|partition| TopicPartition::new(&kafka.topic, partition)).collect(),
    };
    let ids: Vec<String> = places.iter().map(|place| kafka.app_id(place)).collect();
    let stored = table.txns(&ids).await?;
    let extent = |place: &TopicPartition| extents.iter().find(|extent| extent.place == *place).copied();
    let rows = places.iter().zip(stored).map(|(place, stored)| {
        let made_anew = anew.contains(&&*place.topic);
        Offsets { made_anew, ..offsets(place, stored, extent(place)) }
    });
    Ok((rows.filter(|row| row.stored.is_some() || row.high.is_some()).collect(), trouble))
}

fn offsets(place: &TopicPartition, stored: Option<i64>, extent: Option<&Extent>) -> Offsets {
    let TopicPartition { topic, partition } = place;
    let lost = stored.zip(extent).map_or(0, |(stored, extent)| (extent.low - stored).max(0));
    Offsets {
        topic: topic.to_string(),
        partition: *partition,
        stored,
        low: extent.map(|e| e.low),
        high: extent.map(|e| e.high),
        lost,
        made_anew: false,
    }
}

fn table_of(configured: &str, offsets: &[Offsets], trouble: Option<&str>) -> String {
    let number = |value: Option<i64>| value.map_or("-".to_owned(), |value| value.to_string());
    let mut text = format!("{:>9} {:>14} {:>14} {:>14}  topic\n", "partition", "stored", "oldest", "next");
    for row in offsets {
        let Offsets { topic, partition, stored, low, high, lost, made_anew } = row;
        // Under an expression the remedy must say which topic it is for.
        let named = if topic == configured { String::new() } else { format!(" --topic {topic}") };
        let remark = match (stored.zip(*high), lost) {
            _ if *made_anew => "the topic was made anew: see new-generation".to_owned(),
            (_, 1..) => {
                format!("{lost} records are gone: set {partition} {} --accept-loss{named}", low.unwrap_or_default())
            }
            (Some((stored, high)), _) if stored > high => "the topic was made anew: see new-generation".to_owned(),
            _ => String::new(),
        };
        let line = format!(
            "{partition:>9} {:>14} {:>14} {:>14}  {topic}  {remark}",
            number(*stored),
            number(*low),
            number(*high)
        );
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text + &trouble.map_or(String::new(), |why| format!("{why}\n"))
}

async fn set(config: &Config, args: &Set) -> anyhow::Result<String> {
    let mut table = queries(config).await?;
    let kafka = &config.ingest.kafka;
    let topic = args.topic.as_ref().unwrap_or(&kafka.topic);
    if !kafka.reads(topic) || topic.starts_with('^') {
        return Err(Usage(format!(
            "{topic} is no topic that ingest.kafka.topic ({}) names: give --topic",
            kafka.topic
        ))
        .into());
    }
    let app_id = kafka.app_id(&TopicPartition::new(topic, args.partition));
    let stored = table.txn(&app_id).await?;
    if let Some(stored) = stored.filter(|stored| *stored >= args.offset) {
        let (partition, offset) = (args.partition, args.offset);
        return Err(Usage(format!(
            "the stored offset of topic {topic}, partition {partition} is {stored}: {offset} is not past it, and going \
             back would store rows twice; to read the topic anew see `taod table offsets new-generation`"
        ))
        .into());
    }
    let unchecked = match ask(kafka).await? {
        Ok(topics) => check_there(&topics, topic, args).map(|()| String::new())?,
        Err(error) => format!("kafka could not be asked whether it comes to this offset at all: {error}\n"),
    };
    let note = json!({
        "action": "accept-loss", "topic": topic, "partition": args.partition, "from": stored, "to": args.offset,
    });
    let version = table.move_positions(&[TxnStep { app_id, expect: stored, set: args.offset }], &note).await?;
    let from = stored.map_or("none".to_owned(), |stored| stored.to_string());
    tracing::warn!(topic, partition = args.partition, from, to = args.offset, "records were given up");
    Ok(format!(
        "topic {}, partition {}: the next offset is {} (was {from}), since version {version}; the records between are \
         given up\n{unchecked}",
        topic, args.partition, args.offset
    ))
}

/// Refuses an offset that Kafka has not come to: records that are still to be logged would be given up.
fn check_there(topics: &[Topic], topic: &str, args: &Set) -> anyhow::Result<()> {
    let Set { partition, offset, .. } = args;
    let place = TopicPartition::new(topic, *partition);
    let extent = topics.iter().flat_map(|topic| &topic.extents).find(|extent| extent.place == place);
    match extent.map(|extent| extent.high) {
        Some(high) if *offset <= high => Ok(()),
        Some(high) => Err(Usage(format!(
            "kafka's next offset of topic {topic}, partition {partition} is {high}: {offset} would give up records that \
             are still to come; choose {high} or less"
        ))
        .into()),
        None => Err(Usage(format!(
            "kafka holds no partition {partition} of topic {topic}: see `taod table offsets show`"
        ))
        .into()),
    }
}

fn new_generation(config: &Config) -> String {
    let kafka = &config.ingest.kafka;
    format!(
        "To read topic {} anew, set in the config and start taod again:\n\n\
         [ingest.kafka]\ngeneration = {}\nstart = \"earliest\"  # or \"latest\": only what is logged from now on\n\n\
         Offsets of generation {} stay in the table, unused. This is for a topic that was made anew; its records have \
         coordinates of old rows. Of every other topic and partition the rows already stored are stored again where Kafka \
         still holds their records: where only some records are lost, go on without them by `taod table offsets set`.\n",
        kafka.topic,
        kafka.generation + 1,
        kafka.generation
    )
}

async fn queries(config: &Config) -> anyhow::Result<Table> {
    let tables = config.state.open_tables()?;
    let table = tables.open_existing(Name::Queries).await?;
    table.with_context(|| {
        format!("there is no table queries under {}; nothing was ingested yet", config.state.dir.display())
    })
}
