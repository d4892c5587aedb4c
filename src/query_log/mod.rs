//! The query log: where records come from and how their bytes are read.
//!
//! A source hands out [`Record`]s with their coordinates and knows nothing about tables. It does not remember how far
//! it got: whoever stores the rows also stores the positions, and a source asks for them ([`Event::Assigned`]) before it
//! reads a partition. Sources: [`kafka`] in production, [`embedded`] for the demo (a broker in this process, read
//! through [`kafka`]), [`mod@file`] for trying a format out.

#[cfg(feature = "daemon")]
pub mod embedded;
#[cfg(feature = "daemon")]
pub mod file;
pub mod format;
#[cfg(feature = "daemon")]
pub mod kafka;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;

/// One partition of one topic.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TopicPartition {
    pub topic: Arc<str>,
    pub partition: i32,
}

impl TopicPartition {
    /// Names a partition.
    pub fn new(topic: &str, partition: i32) -> Self {
        TopicPartition { topic: topic.into(), partition }
    }
}

/// One record as the log holds it.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    pub place: TopicPartition,
    pub offset: i64,
    /// Milliseconds since the epoch, by the producer's or the broker's clock.
    pub time_ms: Option<i64>,
    pub key: Option<Vec<u8>>,
    pub headers: Vec<(String, Option<Vec<u8>>)>,
    /// `None` for a tombstone.
    pub payload: Option<Vec<u8>>,
}

impl Record {
    /// Returns the size that budgets count.
    pub fn size(&self) -> usize {
        let headers: usize = self.headers.iter().map(|(k, v)| k.len() + v.as_ref().map_or(0, Vec::len)).sum();
        headers + self.key.as_ref().map_or(0, Vec::len) + self.payload.as_ref().map_or(0, Vec::len)
    }
}

/// What a source says, in order.
#[derive(Debug)]
pub enum Event {
    /// These partitions are ours once `reply` names the next offset of each. Without a reply they are not read.
    Assigned { partitions: Vec<TopicPartition>, reply: SyncSender<BTreeMap<TopicPartition, i64>> },
    /// Records in offset order within each partition.
    Records(Vec<Record>),
    /// Everything of this partition has been handed out; the next record will have at least offset `next`.
    End { partition: TopicPartition, next: Option<i64> },
    /// These partitions go to someone else once `reply` is sent; what was read of them can still be stored until then.
    Revoked { partitions: Vec<TopicPartition>, reply: SyncSender<()> },
    /// Partitions were taken away already: nothing that is not stored yet may be.
    Lost,
    /// Something is wrong that may pass, in the source's words.
    Trouble(String),
    /// The source cannot go on.
    Failed(SourceError),
}

/// Why a source cannot be read. Every message names the thing, its value and the remedy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SourceError {
    #[error("kafka property {key} is refused ({why}): correct ingest.kafka.properties")]
    Property { key: String, why: String },
    #[error("kafka's client does not take its properties ({why}): correct ingest.kafka.properties")]
    Client { why: String },
    #[error("secret file {path} for kafka property {key} cannot be read: {why}")]
    Secret { key: String, path: String, why: String },
    #[error(
        "cannot reach kafka at {brokers}: {cause}: check ingest.kafka.brokers, its security.protocol, and that the broker is up"
    )]
    Unreachable { brokers: String, cause: String },
    #[error("kafka at {brokers} and taod do not trust each other ({cause}): {remedy}")]
    Refused { brokers: String, cause: String, remedy: &'static str },
    #[error(
        "kafka at {brokers} forbids to read topic {topic} in group {group} ({cause}): allow this user Read and Describe on \
             the topic and Read on the group"
    )]
    Forbidden { topic: String, group: String, brokers: String, cause: String },
    #[error(
        "another member of group {group} holds group.instance.id {instance}: it is free once that one's session has \
             ended; daemons that run side by side need an id each"
    )]
    Unreleased { instance: String, group: String },
    #[error(
        "another member of group {group} has taken over group.instance.id {instance}: give each daemon an id of its own \
             in ingest.kafka.properties"
    )]
    Fenced { instance: String, group: String },
    #[error("topic {topic} does not exist at {brokers}: create it or correct ingest.kafka.topic")]
    NoTopic { topic: String, brokers: String },
    #[error(
        "kafka no longer holds the next offset of topic {topic} ({cause}): retention was faster than ingestion; see \
             `taod table offsets show`, then go on without what is lost by \
             `taod table offsets set PARTITION OFFSET --accept-loss`"
    )]
    OutOfRange { topic: String, cause: String },
    #[error(
        "topic {topic} was deleted and made anew since it was last read: what stands under its old offsets is not what \
             kafka holds now; read it under a new ingest.kafka.generation, see `taod table offsets new-generation`"
    )]
    Recreated { topic: String },
    #[error(
        "the tables told no start offsets for topic {topic} within {seconds} s: look whether their store is slow, or raise \
             ingest.kafka.rebalance_timeout_s"
    )]
    Late { topic: String, seconds: u64 },
    #[error("reading topic {topic} failed: {cause}")]
    Consume { topic: String, cause: String },
    #[error("topic {topic} gave nothing for {seconds} s and its end is not reached; kafka at {brokers} said: {cause}")]
    Stalled { topic: String, brokers: String, seconds: u64, cause: String },
    #[error("cannot start the embedded broker: {cause}")]
    Embedded { cause: String },
    #[error("{action} {path}: {why}")]
    File { action: &'static str, path: String, why: String },
}

impl SourceError {
    /// Returns true where only a change of the settings helps.
    pub fn is_settings(&self) -> bool {
        matches!(self, SourceError::Property { .. } | SourceError::Client { .. } | SourceError::Secret { .. })
    }

    /// Returns true where this member's name in the group is another's.
    pub fn is_fenced(&self) -> bool {
        matches!(self, SourceError::Unreleased { .. } | SourceError::Fenced { .. })
    }

    /// Returns true where it does not get better unless someone acts, on the broker or on the settings.
    pub fn needs_hands(&self) -> bool {
        matches!(
            self,
            SourceError::Refused { .. }
                | SourceError::Forbidden { .. }
                | SourceError::NoTopic { .. }
                | SourceError::OutOfRange { .. }
                | SourceError::Recreated { .. }
        )
    }
}
