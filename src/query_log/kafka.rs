//! Kafka as a source: a consumer group member on a thread of its own.
//!
//! Offsets never come from Kafka. When partitions are assigned, the rebalance callback asks for their start offsets
//! ([`Event::Assigned`]) and assigns none without; when they are revoked, it waits until what was read of them is stored
//! ([`Event::Revoked`]). Both waits end at a deadline below the group's own, after which the member gives up.
//! What is committed back to Kafka is advice for lag tools.

mod certificate;
mod connect;
mod ends;
mod refusal;
mod settings;
mod topic_ids;

use std::collections::BTreeMap;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer as _, ConsumerContext, RebalanceProtocol};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, Headers, Message};
use rdkafka::types::RDKafkaRespErr;
use rdkafka::{ClientContext, Offset, Statistics, TopicPartitionList};
use tokio::sync::mpsc;

pub use self::connect::{Connection, Extent, Topic};
use self::refusal::Refusal;
pub use self::settings::{Settings, Start};
use self::topic_ids::{Ids, Look};
use super::{Event, Record, SourceError, TopicPartition};

/// Bytes and records of one hand-over to the reader.
const CHUNK_BYTES: usize = 1 << 20;
const CHUNK_RECORDS: usize = 4096;
/// Hand-overs that may wait for the reader.
const CHUNKS_WAITING: usize = 8;

/// Bytes that wait for the reader at most, but for the one record that makes a hand-over full: those in the queue, the
/// one being gathered and the one being read.
pub const MOST_HANDED_OVER: usize = (CHUNKS_WAITING + 2) * CHUNK_BYTES;

/// How often the ids of the topics are compared, and how long an answer is waited for: nothing is read meanwhile.
const IDS_EVERY: Duration = Duration::from_secs(5);
const IDS_PATIENCE: Duration = Duration::from_secs(1);
/// How long a client may take to close; it leaves its group within that time where it can.
const CLOSING: Duration = Duration::from_secs(15);
/// After how long without an answer to that question a client is given up: where the brokers are there, the next one finds
/// them, and where they are not, it says so.
const SILENCE: Duration = Duration::from_secs(60);

/// A member of the group, read through its events.
pub struct Consumer {
    client: Arc<BaseConsumer<Context>>,
    events: mpsc::Receiver<Event>,
    thread: JoinHandle<()>,
}

impl Consumer {
    /// Returns the next event; `None` once the source has ended.
    pub async fn recv(&mut self) -> Option<Event> {
        self.events.recv().await
    }

    /// Tells Kafka how far the tables are, for lag tools. Nothing depends on it.
    pub fn advise(&self, offsets: &BTreeMap<TopicPartition, i64>) {
        let mut list = TopicPartitionList::new();
        for (place, next) in offsets {
            if let Err(error) = list.add_partition_offset(&place.topic, place.partition, Offset::Offset(*next)) {
                tracing::debug!(%error, ?place, "offset not told to kafka");
            }
        }
        if list.count() > 0
            && let Err(error) = self.client.commit(&list, CommitMode::Async)
        {
            tracing::debug!(%error, "offsets not told to kafka");
        }
    }

    /// Returns the end of each partition as last reported by the broker.
    pub fn ends(&self) -> BTreeMap<TopicPartition, i64> {
        self.client.context().lock().ends.clone()
    }

    /// Returns what the broker connection last complained of.
    pub fn cause(&self) -> Option<String> {
        self.client.context().cause()
    }

    /// Leaves the group and waits until the client is gone, but not for ever: one that met a fatal error, such as under KIP-848 when
    /// a broker comes back without its group, waits for an answer that nobody can give.
    pub async fn close(self) {
        let Consumer { client, events, thread, .. } = self;
        // Without a receiver the thread stops and no callback waits.
        drop(events);
        // Whoever drops the last reference runs the client's callbacks, which may block.
        let closing = tokio::task::spawn_blocking(move || {
            drop(client);
            thread.join().is_ok()
        });
        match tokio::time::timeout(CLOSING, closing).await {
            Ok(Ok(true)) => {}
            Ok(_) => tracing::warn!("the kafka thread did not end cleanly"),
            Err(_) => tracing::warn!("kafka's client does not close and is left behind"),
        }
    }
}

/// What the callbacks and the thread share.
#[derive(Default)]
struct Shared {
    chunk: Vec<Record>,
    bytes: usize,
    cause: Option<String>,
    refusal: Option<Refusal>,
    ends: BTreeMap<TopicPartition, i64>,
    /// Where each partition began that was assigned and taken on.
    starts: BTreeMap<TopicPartition, i64>,
    /// Where the end of a partition was last told, until there is another record of it.
    told: BTreeMap<TopicPartition, i64>,
}

struct Context {
    settings: Settings,
    events: mpsc::Sender<Event>,
    shared: Mutex<Shared>,
}

impl Context {
    fn lock(&self) -> std::sync::MutexGuard<'_, Shared> {
        // The shared state is plain data: it is whole even where a holder panicked.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cause(&self) -> Option<String> {
        self.lock().cause.clone()
    }

    fn take_refusal(&self) -> Option<Refusal> {
        self.lock().refusal.take()
    }

    fn patience(&self) -> Duration {
        Duration::from_secs(self.settings.rebalance_timeout_s)
    }

    /// Returns what an error that does not pass by itself means for the operator. `why` is all that the client says.
    fn unreadable(&self, code: RDKafkaErrorCode, why: Option<String>) -> SourceError {
        let Settings { topic, group, brokers, properties, .. } = self.settings.clone();
        let instance = properties.get("group.instance.id").cloned().unwrap_or_default();
        match code {
            RDKafkaErrorCode::UnreleasedInstanceId => SourceError::Unreleased { instance, group },
            RDKafkaErrorCode::FencedInstanceId => SourceError::Fenced { instance, group },
            RDKafkaErrorCode::TopicAuthorizationFailed | RDKafkaErrorCode::GroupAuthorizationFailed => {
                SourceError::Forbidden { topic, group, brokers, cause: code.to_string() }
            }
            _ => SourceError::Consume { topic, cause: why.unwrap_or_else(|| code.to_string()) },
        }
    }

    /// Sends an event; false once nobody listens.
    fn send(&self, event: Event) -> bool {
        self.events.blocking_send(event).is_ok()
    }

    /// Hands over what was read so far. Comes before every other event, so that events keep their order.
    fn flush(&self) -> bool {
        let chunk = {
            let mut shared = self.lock();
            shared.bytes = 0;
            std::mem::take(&mut shared.chunk)
        };
        chunk.is_empty() || self.send(Event::Records(chunk))
    }

    /// Adds a record; false once nobody listens.
    fn push(&self, record: Record) -> bool {
        let full = {
            let mut shared = self.lock();
            if !shared.told.is_empty() {
                shared.told.remove(&record.place);
            }
            shared.bytes += record.size();
            shared.chunk.push(record);
            shared.bytes >= CHUNK_BYTES || shared.chunk.len() >= CHUNK_RECORDS
        };
        !full || self.flush()
    }

    /// Asks for start offsets and puts them into the list; false where there are none for all of it.
    fn set_starts(&self, list: &mut TopicPartitionList) -> bool {
        let (reply, starts) = sync_channel(1);
        let partitions = partitions_of(list);
        if !self.send(Event::Assigned { partitions: partitions.clone(), reply }) {
            return false;
        }
        let Ok(starts) = starts.recv_timeout(self.patience()) else { return false };
        let all = partitions.iter().all(|partition| {
            let TopicPartition { topic, partition: number } = partition;
            let start = starts.get(partition).copied();
            start.is_some_and(|n| list.set_partition_offset(topic, *number, Offset::Offset(n)).is_ok())
        });
        if all {
            let mut shared = self.lock();
            for partition in &partitions {
                shared.told.remove(partition);
            }
            shared.starts.extend(starts);
        }
        all
    }

    fn assign(&self, consumer: &BaseConsumer<Self>, list: &mut TopicPartitionList) -> KafkaResult<()> {
        if list.count() > 0 && !self.set_starts(list) {
            // Nobody answered in time: read nothing, and leave the group so that others can have the partitions.
            let (topic, seconds) = (self.settings.topic.clone(), self.patience().as_secs());
            self.send(Event::Failed(SourceError::Late { topic, seconds }));
            let answered = take_on(consumer, &TopicPartitionList::new());
            consumer.unsubscribe();
            return answered;
        }
        if list.count() == 0 {
            let (reply, _) = sync_channel(1);
            self.send(Event::Assigned { partitions: Vec::new(), reply });
        }
        take_on(consumer, list)
    }

    fn revoke(&self, consumer: &BaseConsumer<Self>, list: &TopicPartitionList) -> KafkaResult<()> {
        if let Some((code, why)) = consumer.client().fatal_error() {
            self.send(Event::Failed(self.unreadable(code, Some(why))));
        } else if consumer.assignment_lost() {
            self.send(Event::Lost);
        } else if list.count() > 0 {
            let (reply, stored) = sync_channel(1);
            if self.send(Event::Revoked { partitions: partitions_of(list), reply })
                && stored.recv_timeout(self.patience()).is_err()
            {
                tracing::warn!(
                    "partitions go without their last rows stored: they will be read again by the next owner"
                );
            }
        }
        let held = self.give_up(list);
        match consumer.rebalance_protocol() {
            RebalanceProtocol::Cooperative => consumer.incremental_unassign(&held),
            _ => consumer.unassign(),
        }
    }

    /// Forgets partitions, and returns those of them that were taken on: the group's idea of what a member has goes ahead of
    /// what it took, and the client refuses to take away more than that, whereupon it waits for ever.
    fn give_up(&self, list: &TopicPartitionList) -> TopicPartitionList {
        let mut shared = self.lock();
        let mut held = TopicPartitionList::new();
        for partition in partitions_of(list) {
            shared.told.remove(&partition);
            if shared.starts.remove(&partition).is_some() {
                held.add_partition(&partition.topic, partition.partition);
            }
        }
        held
    }
}

/// Answers an assignment with the partitions that are read, or with none of them.
fn take_on(consumer: &BaseConsumer<Context>, list: &TopicPartitionList) -> KafkaResult<()> {
    match consumer.rebalance_protocol() {
        RebalanceProtocol::Cooperative => consumer.incremental_assign(list),
        _ => consumer.assign(list),
    }
}

fn partitions_of(list: &TopicPartitionList) -> Vec<TopicPartition> {
    // `elements` of an empty list is not safe to call.
    match list.count() {
        0 => Vec::new(),
        _ => list.elements().iter().map(|e| TopicPartition::new(e.topic(), e.partition())).collect(),
    }
}

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        // Causes reach the operator through `error`; the client's own log only repeats them.
        tracing::debug!(target: "librdkafka", ?level, facility, message);
    }

    fn stats(&self, statistics: Statistics) {
        let mut shared = self.lock();
        for topic in statistics.topics.values() {
            let ends = topic.partitions.values().filter(|p| p.partition >= 0 && p.ls_offset >= 0);
            shared.ends.extend(ends.map(|p| (TopicPartition::new(&topic.topic, p.partition), p.ls_offset)));
        }
    }

    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(target: "librdkafka", %error, reason);
        // The end of a partition is no trouble at all.
        if error.rdkafka_error_code() == Some(RDKafkaErrorCode::PartitionEOF) {
            return;
        }
        let mut shared = self.lock();
        if let Some(refusal) = error.rdkafka_error_code().and_then(|code| Refusal::heard(code, reason)) {
            shared.refusal = Some(refusal);
        }
        // It follows each cause and says less.
        let vague = error.rdkafka_error_code() == Some(RDKafkaErrorCode::AllBrokersDown);
        if !vague || shared.cause.is_none() {
            shared.cause = Some(reason.to_owned());
        }
    }
}

impl ConsumerContext for Context {
    fn rebalance(&self, consumer: &BaseConsumer<Self>, event: RDKafkaRespErr, list: &mut TopicPartitionList) {
        let listening = self.flush();
        let done = match event {
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS if listening => self.assign(consumer, list),
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS => take_on(consumer, &TopicPartitionList::new()),
            _ => self.revoke(consumer, list),
        };
        if let Err(error) = done {
            // Without an answer the client waits for one, also when it is to be closed.
            consumer.unassign().ok();
            self.send(Event::Failed(SourceError::Consume {
                topic: self.settings.topic.clone(),
                cause: error.to_string(),
            }));
        }
    }
}

/// Reads until nobody listens. The rebalance callbacks run in here.
fn poll(client: &BaseConsumer<Context>, mut ids: Ids) {
    let context = Arc::clone(client.context());
    let (mut waiting, mut asked) = (false, Instant::now());
    let mut silent_since = None;
    let mut names = Names::default();
    while !context.events.is_closed() {
        if asked.elapsed() >= IDS_EVERY {
            match ids.look(client.client(), IDS_PATIENCE) {
                Look::Same => silent_since = None,
                Look::Other(topic) => {
                    // What was gathered may be of the new topic: it is not handed over.
                    context.send(Event::Failed(SourceError::Recreated { topic }));
                    break;
                }
                Look::Silence(why) if silent_since.get_or_insert(asked).elapsed() >= SILENCE => {
                    let (brokers, cause) = (context.settings.brokers.clone(), context.cause().unwrap_or(why));
                    context.send(Event::Failed(SourceError::Unreachable { brokers, cause }));
                    break;
                }
                Look::Silence(why) => tracing::debug!(why, "the ids of topics were not told"),
            }
            asked = Instant::now();
        }
        // While records are at hand they are gathered; the first pause hands them over.
        let patience = if waiting { Duration::from_millis(100) } else { Duration::ZERO };
        let listening = match client.poll(patience) {
            Some(Ok(message)) => {
                waiting = false;
                context.push(record(&message, names.of(message.topic())))
            }
            None => {
                waiting = true;
                context.flush()
            }
            // The position counts what was served in order, control records included: nothing below it is still to come.
            Some(Err(KafkaError::PartitionEOF(partition))) => {
                context.flush() && ends::ends(client, partition).into_iter().all(|end| context.send(end))
            }
            Some(Err(error)) => context.flush() && context.send(event(client, &context, error)),
        };
        if !listening {
            break;
        }
    }
}

/// The names of topics, each kept once for all of its records.
#[derive(Default)]
struct Names(Vec<Arc<str>>);

impl Names {
    fn of(&mut self, topic: &str) -> Arc<str> {
        if let Some(known) = self.0.iter().find(|known| ***known == *topic) {
            return Arc::clone(known);
        }
        let name: Arc<str> = topic.into();
        self.0.push(Arc::clone(&name));
        name
    }
}

fn record(message: &BorrowedMessage<'_>, topic: Arc<str>) -> Record {
    let headers = message.headers().map(|headers| {
        let owned = headers.iter().map(|h| (h.key.to_owned(), h.value.map(<[u8]>::to_vec)));
        owned.collect()
    });
    Record {
        place: TopicPartition { topic, partition: message.partition() },
        offset: message.offset(),
        time_ms: message.timestamp().to_millis(),
        key: message.key().map(<[u8]>::to_vec),
        headers: headers.unwrap_or_default(),
        payload: message.payload().map(<[u8]>::to_vec),
    }
}

/// Returns what an error on poll means: an end, a passing trouble, or the end of the source.
fn event(client: &BaseConsumer<Context>, context: &Context, error: KafkaError) -> Event {
    let topic = context.settings.topic.clone();
    if let Some(refusal) = context.take_refusal() {
        // A new client reads its certificates and secrets anew: they may have been renewed since.
        return Event::Failed(refusal.error(&context.settings));
    }
    if let Some((code, why)) = client.client().fatal_error() {
        return Event::Failed(context.unreadable(code, Some(why)));
    }
    let cause = context.cause().unwrap_or_else(|| error.to_string());
    match error {
        KafkaError::MessageConsumption(code) => match code {
            RDKafkaErrorCode::AutoOffsetReset | RDKafkaErrorCode::OffsetOutOfRange => {
                Event::Failed(SourceError::OutOfRange { topic, cause })
            }
            RDKafkaErrorCode::UnknownTopicOrPartition
            | RDKafkaErrorCode::UnknownTopic
            | RDKafkaErrorCode::UnknownPartition
            | RDKafkaErrorCode::TopicAuthorizationFailed
            | RDKafkaErrorCode::GroupAuthorizationFailed => Event::Failed(context.unreadable(code, Some(cause))),
            _ => Event::Trouble(cause),
        },
        _ => Event::Trouble(cause),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_partition_is_never_the_cause_of_anything() {
        let (events, _receiver) = mpsc::channel(1);
        let context = Context { settings: Settings::default(), events, shared: Mutex::default() };
        context.error(KafkaError::Global(RDKafkaErrorCode::PartitionEOF), "reached end of partition");
        assert_eq!(context.cause(), None);
        context.error(KafkaError::Global(RDKafkaErrorCode::BrokerTransportFailure), "Connection refused");
        context.error(KafkaError::Global(RDKafkaErrorCode::AllBrokersDown), "1/1 brokers are down");
        context.error(KafkaError::Global(RDKafkaErrorCode::PartitionEOF), "reached end of partition");
        assert_eq!(context.cause().as_deref(), Some("Connection refused"));
    }

    /// A client that does not know when all brokers are down never goes back to its bootstrap servers: one that was built
    /// without the compiler's atomics did not (tools/librdkafka.cmake).
    #[test]
    fn a_client_notices_that_all_brokers_are_down() {
        let (events, _receiver) = mpsc::channel(1);
        let settings = Settings { brokers: "127.0.0.1:1".into(), ..Settings::default() };
        let client = settings.client().unwrap();
        let context = Context { settings, events, shared: Mutex::default() };
        let consumer: BaseConsumer<Context> = client.create_with_context(context).unwrap();
        let end = Instant::now() + Duration::from_secs(30);
        let is_down =
            |polled| matches!(polled, Some(Err(KafkaError::MessageConsumption(RDKafkaErrorCode::AllBrokersDown))));
        while !is_down(consumer.poll(Duration::from_millis(100))) {
            assert!(Instant::now() < end, "no word of it for 30 s");
        }
    }
}
