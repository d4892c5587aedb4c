//! Before the group: a broker that answers, a topic that exists, and what it holds.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::metadata::{Metadata, MetadataBroker, MetadataTopic};
use rdkafka::types::RDKafkaRespErr;
use rdkafka::{Offset, TopicPartitionList};
use tokio::sync::mpsc;

use super::refusal::Refusal;
use super::topic_ids::Ids;
use super::{CHUNKS_WAITING, Consumer, Context, Settings, poll, topic_ids};
use crate::query_log::{Event, SourceError, TopicPartition};

/// How long a broker may take to answer before what another one refused counts.
const FIRST_PATIENCE: Duration = Duration::from_secs(3);

/// A topic that is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topic {
    pub name: String,
    /// What tells it from another topic that had the same name; `None` where the broker does not say.
    pub id: Option<i64>,
    pub extents: Vec<Extent>,
}

/// What Kafka holds of one partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extent {
    pub place: TopicPartition,
    /// The oldest offset.
    pub low: i64,
    /// The offset that the next record will get.
    pub high: i64,
}

/// A broker that answers and a topic that exists; not yet a member of the group.
pub struct Connection {
    settings: Settings,
    client: Arc<BaseConsumer<Context>>,
    events: mpsc::Receiver<Event>,
    topics: Vec<Topic>,
    ids: Ids,
}

impl Connection {
    /// Looks for the broker and the topic. Blocks for at most the connect time-out (per answer awaited).
    pub fn open(settings: &Settings) -> Result<Self, SourceError> {
        let (sender, events) = mpsc::channel(CHUNKS_WAITING);
        let context = Context { settings: settings.clone(), events: sender, shared: Mutex::default() };
        let client: BaseConsumer<Context> =
            settings.client()?.create_with_context(context).map_err(|e| refused(settings, e))?;
        let (topics, ids) = look(settings, &client)?;
        // A broker that only stands in the list and is not needed may refuse what it likes.
        hear(&client);
        Ok(Connection { settings: settings.clone(), client: Arc::new(client), events, topics, ids })
    }

    /// Returns the topics to be read, and what Kafka held of each partition when the connection was made.
    pub fn topics(&self) -> &[Topic] {
        &self.topics
    }

    /// Returns the partitions that hold a record stamped at or after this time, in milliseconds since the epoch. Who stamps, the
    /// producer or the broker, is the topic's to say.
    pub fn stamped_from(&self, time_ms: i64) -> Result<Vec<TopicPartition>, SourceError> {
        let mut asked = TopicPartitionList::new();
        for extent in self.topics.iter().flat_map(|topic| &topic.extents).filter(|extent| extent.low < extent.high) {
            let added =
                asked.add_partition_offset(&extent.place.topic, extent.place.partition, Offset::Offset(time_ms));
            added.map_err(|e| refused(&self.settings, e))?;
        }
        if asked.count() == 0 {
            return Ok(Vec::new());
        }
        let answered =
            persist(&self.settings, &self.client, |patience| self.client.offsets_for_times(asked.clone(), patience))?;
        let elements = answered.elements();
        let stamped = elements.iter().filter(|element| matches!(element.offset(), Offset::Offset(at) if at >= 0));
        Ok(stamped.map(|element| TopicPartition::new(element.topic(), element.partition())).collect())
    }

    /// Joins the group and begins to read. Called, as everything that may drop a connection, where blocking is allowed.
    pub fn subscribe(self) -> Result<Consumer, SourceError> {
        let topic = self.settings.subscription();
        let fail = |cause: String| SourceError::Consume { topic: self.settings.topic.clone(), cause };
        self.client.subscribe(&[&topic]).map_err(|e| fail(e.to_string()))?;
        let (client, ids) = (Arc::clone(&self.client), self.ids);
        let thread = thread::Builder::new().name("kafka".into()).spawn(move || poll(&client, ids));
        let thread = thread.map_err(|e| fail(e.to_string()))?;
        Ok(Consumer { client: self.client, events: self.events, thread })
    }
}

/// Asks for the topics, their ids and the extent of their partitions.
fn look(settings: &Settings, client: &BaseConsumer<Context>) -> Result<(Vec<Topic>, Ids), SourceError> {
    let no_topic = || SourceError::NoTopic { topic: settings.topic.clone(), brokers: settings.brokers.clone() };
    let one = (!settings.is_pattern()).then_some(settings.topic.as_str());
    let metadata = persist(settings, client, |patience| client.fetch_metadata(one, patience))?;
    let reads = settings.chooser();
    let found: Vec<&MetadataTopic> = metadata.topics().iter().filter(|t| reads(t.name())).collect();
    if found.is_empty() {
        return Err(no_topic());
    }
    let ids = ids(settings, client, &metadata, &found);
    let topic = |topic: &&MetadataTopic| {
        let name = topic.name();
        match topic.error() {
            None if topic.partitions().is_empty() => return Err(no_topic()),
            None => {}
            Some(
                RDKafkaRespErr::RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART
                | RDKafkaRespErr::RD_KAFKA_RESP_ERR__UNKNOWN_TOPIC
                | RDKafkaRespErr::RD_KAFKA_RESP_ERR_TOPIC_EXCEPTION,
            ) => return Err(no_topic()),
            Some(error) => return Err(client.context().unreadable(error.into(), None)),
        }
        let extent = |partition| {
            let watermarks = |patience| client.fetch_watermarks(name, partition, patience);
            let (low, high) = persist(settings, client, watermarks)?;
            Ok(Extent { place: TopicPartition::new(name, partition), low, high })
        };
        let extents = topic.partitions().iter().map(|partition| extent(partition.id()));
        Ok(Topic { name: name.to_owned(), id: ids.of.get(name).copied(), extents: extents.collect::<Result<_, _>>()? })
    };
    let topics: Vec<Topic> = found.iter().map(topic).collect::<Result<_, _>>()?;
    Ok((topics, ids))
}

/// Asks for the ids of topics. A broker that does not tell them is no reason not to read.
fn ids(settings: &Settings, client: &BaseConsumer<Context>, metadata: &Metadata, topics: &[&MetadataTopic]) -> Ids {
    let names: Vec<&str> = topics.iter().map(|topic| topic.name()).collect();
    let brokers: Vec<i32> = metadata.brokers().iter().map(MetadataBroker::id).collect();
    let patience = Duration::from_secs(settings.connect_timeout_s);
    let of = topic_ids::ask(client.client(), brokers.first().copied().unwrap_or(-1), &names, patience);
    let of = of.unwrap_or_else(|why| {
        tracing::warn!(why, "the ids of topics are unknown: a topic that is made anew is told by its offsets alone");
        BTreeMap::new()
    });
    Ids { of, brokers }
}

/// Asks until there is an answer, the time is up, or a broker has said that it never will give one. The client would ask
/// until the time is up even then, so that it asks several times, with more patience each.
fn persist<T>(
    settings: &Settings,
    client: &BaseConsumer<Context>,
    ask: impl Fn(Duration) -> KafkaResult<T>,
) -> Result<T, SourceError> {
    let deadline = Instant::now() + Duration::from_secs(settings.connect_timeout_s);
    let mut patience = FIRST_PATIENCE;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let error = match ask(patience.min(left)) {
            Ok(answer) => return Ok(answer),
            Err(error) => error,
        };
        if let Some(refusal) = hear(client) {
            return Err(refusal.error(settings));
        }
        let silent = matches!(
            error.rdkafka_error_code(),
            Some(RDKafkaErrorCode::OperationTimedOut | RDKafkaErrorCode::BrokerTransportFailure)
        );
        if !silent || Instant::now() >= deadline {
            let cause = client.context().cause().unwrap_or_else(|| error.to_string());
            return Err(SourceError::Unreachable { brokers: settings.brokers.clone(), cause });
        }
        patience *= 2;
    }
}

/// Takes in what the brokers said so far, which comes in by the error callback only, inside poll; returns a refusal.
fn hear(client: &BaseConsumer<Context>) -> Option<Refusal> {
    while client.poll(Duration::from_millis(10)).is_some() {}
    client.context().take_refusal()
}

fn refused(settings: &Settings, error: KafkaError) -> SourceError {
    match error {
        KafkaError::ClientConfig(_, why, key, _) => SourceError::Property { key, why },
        KafkaError::ClientCreation(why) => SourceError::Client { why },
        other => SourceError::Unreachable { brokers: settings.brokers.clone(), cause: other.to_string() },
    }
}
