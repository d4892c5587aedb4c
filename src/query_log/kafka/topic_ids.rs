//! The ids that Kafka gives to topics (KIP-516): a topic that is deleted and made anew keeps its name and gets another id.
//!
//! The `rdkafka` crate has no call for librdkafka's `DescribeTopics`, so it is made here through the crate's bindings.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_int};
use std::time::Duration;

use rdkafka::ClientContext;
use rdkafka::bindings as rd;
use rdkafka::client::Client;

/// The ids of the topics that are read, as they were when the connection was made, and the brokers that can be asked.
#[derive(Debug, Default)]
pub(super) struct Ids {
    pub(super) of: BTreeMap<String, i64>,
    pub(super) brokers: Vec<i32>,
}

/// What a look at the ids found.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Look {
    /// They are what they were, or nobody tells ids here.
    Same,
    /// This topic has another id.
    Other(String),
    /// The broker that was asked did not answer, for this reason.
    Silence(String),
}

impl Ids {
    /// Compares the ids with what a broker tells now.
    pub(super) fn look<C: ClientContext>(&mut self, client: &Client<C>, patience: Duration) -> Look {
        if self.of.is_empty() || self.brokers.is_empty() {
            return Look::Same;
        }
        // Another one each time: one that is gone does not keep the others from being asked.
        self.brokers.rotate_left(1);
        let names: Vec<&str> = self.of.keys().map(String::as_str).collect();
        match ask(client, self.brokers[0], &names, patience) {
            Ok(now) => {
                let other = self.of.iter().find(|(name, id)| now.get(*name).is_some_and(|now| now != *id));
                other.map_or(Look::Same, |(name, _)| Look::Other(name.clone()))
            }
            Err(why) => Look::Silence(why),
        }
    }
}

/// Frees what a call handed out, on every way out.
struct Owned<T>(*mut T, unsafe extern "C" fn(*mut T));

impl<T> Drop for Owned<T> {
    #[expect(unsafe_code, reason = "librdkafka's objects are freed by its own calls")]
    fn drop(&mut self) {
        // SAFETY: the pointer came from the constructor that belongs to this destructor, and is freed once.
        unsafe { (self.1)(self.0) };
    }
}

/// Asks a broker for the ids of topics, as 63 bits of each. A topic that does not exist, or of a broker older than 2.8, has none.
/// Blocks for at most `patience`.
#[expect(unsafe_code, reason = "the rdkafka crate does not offer DescribeTopics")]
pub(super) fn ask<C: ClientContext>(
    client: &Client<C>,
    broker: i32,
    topics: &[&str],
    patience: Duration,
) -> Result<BTreeMap<String, i64>, String> {
    let client = client.native_ptr();
    let names: Vec<CString> = topics.iter().filter_map(|name| CString::new(*name).ok()).collect();
    let mut pointers: Vec<*const c_char> = names.iter().map(|name| name.as_ptr()).collect();
    let patience = c_int::try_from(patience.as_millis()).unwrap_or(c_int::MAX);
    let mut error = [0; 512];
    // SAFETY: `client` is borrowed, so alive during this call. Every pointer that a call returns is checked where it may be null, used
    // while its owner lives, and freed by `Owned`; the names and the buffer outlive the calls that read and write them.
    unsafe {
        let operation = rd::rd_kafka_admin_op_t::RD_KAFKA_ADMIN_OP_DESCRIBETOPICS;
        let options = Owned(rd::rd_kafka_AdminOptions_new(client, operation), rd::rd_kafka_AdminOptions_destroy);
        rd::rd_kafka_AdminOptions_set_request_timeout(options.0, patience, error.as_mut_ptr(), error.len());
        // Every broker knows; without this the client looks for the controller.
        rd::rd_kafka_AdminOptions_set_broker(options.0, broker, error.as_mut_ptr(), error.len());
        let queue = Owned(rd::rd_kafka_queue_new(client), rd::rd_kafka_queue_destroy);
        let asked = rd::rd_kafka_TopicCollection_of_topic_names(pointers.as_mut_ptr(), pointers.len());
        let asked = Owned(asked, rd::rd_kafka_TopicCollection_destroy);
        rd::rd_kafka_DescribeTopics(client, asked.0, options.0, queue.0);
        let event = rd::rd_kafka_queue_poll(queue.0, patience);
        if event.is_null() {
            return Err("no answer in time".to_owned());
        }
        let event = Owned(event, rd::rd_kafka_event_destroy);
        if rd::rd_kafka_event_error(event.0) != rd::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_NO_ERROR {
            return Err(text(rd::rd_kafka_event_error_string(event.0)));
        }
        let result = rd::rd_kafka_event_DescribeTopics_result(event.0);
        if result.is_null() {
            return Err("the answer is not about topics".to_owned());
        }
        let mut count = 0;
        let found = rd::rd_kafka_DescribeTopics_result_topics(result, &mut count);
        let mut ids = BTreeMap::new();
        for i in 0..count {
            let topic = *found.add(i);
            let id = rd::rd_kafka_TopicDescription_topic_id(topic);
            if id.is_null() {
                continue;
            }
            let (most, least) =
                (rd::rd_kafka_Uuid_most_significant_bits(id), rd::rd_kafka_Uuid_least_significant_bits(id));
            // All zero: the broker gives no ids.
            if (most, least) != (0, 0) {
                ids.insert(text(rd::rd_kafka_TopicDescription_name(topic)), (most ^ least) & i64::MAX);
            }
        }
        Ok(ids)
    }
}

/// Returns a text of librdkafka's.
#[expect(unsafe_code, reason = "librdkafka hands out C strings")]
fn text(pointer: *const c_char) -> String {
    match pointer.is_null() {
        true => String::new(),
        // SAFETY: not null, and librdkafka ends its texts with a zero.
        false => unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned(),
    }
}
