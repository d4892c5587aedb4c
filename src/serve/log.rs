//! The query log: each call becomes one Kafka record, as a production endpoint's logger writes it.
//!
//! Logging never blocks or fails an answer: a record that does not fit the producer's queue, or that the broker does
//! not take in time, is counted and lost.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rdkafka::ClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::message::{DeliveryResult, Header, OwnedHeaders};
use rdkafka::producer::{BaseRecord, Producer, ProducerContext, ThreadedProducer};
use serde::Serialize;
use serde_json::Value;

/// Request headers that are copied to the record's headers: who asked, and whether the row may train.
pub(crate) const COPIED_HEADERS: [&str; 3] = ["x-taod-internal", "x-taod-train", "x-workload"];

/// One call as it is logged: the raw OpenAI request and response with what surrounds them.
#[derive(Debug, Serialize)]
pub(crate) struct Call<'a> {
    /// When the request arrived, RFC 3339 with microseconds.
    pub(crate) timestamp: String,
    pub(crate) request: &'a Value,
    pub(crate) response: &'a Value,
    pub(crate) status: u16,
    pub(crate) duration_ms: f64,
    /// Name of the base or of the adapter that answered; null where none did.
    pub(crate) served_version: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) workload_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) client_id: Option<&'a str>,
}

/// Where calls are logged.
pub enum CallLog {
    Kafka(KafkaLog),
    None,
}

/// A producer for one topic.
pub struct KafkaLog {
    producer: ThreadedProducer<Deliveries>,
    topic: String,
    lost: Arc<AtomicU64>,
}

/// The query log cannot be written at all.
#[derive(Debug, thiserror::Error)]
#[error("cannot make a producer for the query log at {brokers}: {source}; check serve.log_brokers")]
pub struct LogError {
    brokers: String,
    source: rdkafka::error::KafkaError,
}

impl CallLog {
    /// Logs to `topic` at `brokers`, or nowhere where `brokers` is empty. Connects in the background.
    pub fn open(brokers: &str, topic: &str) -> Result<Self, LogError> {
        if brokers.is_empty() {
            return Ok(CallLog::None);
        }
        let lost = Arc::new(AtomicU64::new(0));
        let producer = ClientConfig::new()
            .set("bootstrap.servers", brokers)
            .set("client.id", "taod-serve")
            .set("linger.ms", "5")
            .set("message.timeout.ms", "30000")
            .create_with_context(Deliveries { lost: lost.clone() })
            .map_err(|source| LogError { brokers: brokers.to_owned(), source })?;
        Ok(CallLog::Kafka(KafkaLog { producer, topic: topic.to_owned(), lost }))
    }

    /// Hands a call to the producer under the request's id; returns at once.
    pub(crate) fn write(&self, request_id: &str, headers: &BTreeMap<String, String>, call: &Call<'_>) {
        let CallLog::Kafka(log) = self else { return };
        let Ok(payload) = serde_json::to_vec(call) else {
            log.lost.fetch_add(1, Ordering::Relaxed);
            return;
        };
        let copied = headers
            .iter()
            .fold(OwnedHeaders::new(), |all, (key, value)| all.insert(Header { key, value: Some(value.as_bytes()) }));
        let record = BaseRecord::to(&log.topic).key(request_id).payload(&payload).headers(copied);
        if let Err((error, _)) = log.producer.send(record) {
            log.lost.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(%error, "a call was not logged");
        }
    }

    /// Returns how many calls were lost so far.
    pub fn lost(&self) -> u64 {
        match self {
            CallLog::Kafka(log) => log.lost.load(Ordering::Relaxed),
            CallLog::None => 0,
        }
    }

    /// Waits until the broker has every call, at most `limit`. Blocks its thread.
    pub fn flush(&self, limit: Duration) {
        let CallLog::Kafka(log) = self else { return };
        if let Err(error) = log.producer.flush(limit) {
            let unsent = log.producer.in_flight_count();
            tracing::warn!(%error, unsent, "the query log could not be flushed");
        }
    }
}

/// Counts the records that no broker took.
struct Deliveries {
    lost: Arc<AtomicU64>,
}

impl ClientContext for Deliveries {}

impl ProducerContext for Deliveries {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        if let Err((error, _)) = result {
            self.lost.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(%error, "a call was not logged");
        }
    }
}
