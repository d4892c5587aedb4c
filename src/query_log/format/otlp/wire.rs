//! OTLP as it comes over the wire, JSON or protobuf, brought into one plain form: batches of [`Entry`].
//!
//! The protobuf messages name only the fields that are read (opentelemetry-proto 1.x, `trace.proto`, `logs.proto`,
//! `common.proto`, `resource.proto`); `prost` skips the others and limits the depth.

use std::cell::Cell;
use std::rc::Rc;

use prost::Message as _;
use serde_json::{Map, Value};

use crate::query_log::format::fields::integer;

/// Largest attributes of a process, in bytes of JSON, that every row of it keeps.
const LARGE: usize = 4096;

/// One span or one log record.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Entry {
    pub(super) is_log: bool,
    /// Lower-case hex.
    pub(super) trace_id: String,
    pub(super) span_id: String,
    /// The span's name or the log record's event name.
    pub(super) name: String,
    pub(super) start_ns: Option<i64>,
    pub(super) end_ns: Option<i64>,
    /// True where the span says that it failed.
    pub(super) failed: bool,
    pub(super) attributes: Map<String, Value>,
    /// The process that sent it.
    pub(super) resource: Rc<Resource>,
    /// Of a span: its events by name.
    pub(super) events: Vec<(String, Map<String, Value>)>,
    /// Of a log record.
    pub(super) body: Value,
}

/// What a process says of itself, shared by all that it sent in one batch.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Resource {
    attributes: Map<String, Value>,
    is_large: bool,
    /// True once a row has the attributes.
    told: Cell<bool>,
}

impl Resource {
    fn new(attributes: Map<String, Value>) -> Rc<Self> {
        let is_large = serde_json::to_string(&attributes).is_ok_and(|text| text.len() > LARGE);
        Rc::new(Resource { attributes, is_large, told: Cell::new(false) })
    }

    /// Returns the attributes for a row. Large ones go to one row of the batch, the others keep names alone: a batch of
    /// thousands of spans must not become thousands of times as large.
    pub(super) fn for_row(&self) -> Map<String, Value> {
        if !self.is_large || !self.told.replace(true) {
            return self.attributes.clone();
        }
        let is_name = |value: &Value| value.as_str().is_some_and(|text| text.len() <= 128);
        let names = ["workload", "service.name", "tenant.id", "tenant"].into_iter();
        let found = names.filter_map(|name| Some((name, self.attributes.get(name).filter(|value| is_name(value))?)));
        found.map(|(name, value)| (name.to_owned(), value.clone())).collect()
    }
}

/// Returns true where a JSON object is an OTLP batch of spans or logs.
pub(super) fn is_batch(fields: &Map<String, Value>) -> bool {
    ["resourceSpans", "resourceLogs"].iter().any(|name| fields.get(*name).is_some_and(Value::is_array))
}

/// Reads a JSON batch. Lists that are none, and entries that are no objects, hold nothing.
pub(super) fn from_json(batch: &Value) -> Vec<Entry> {
    let mut entries = Vec::new();
    for (resources, scopes, list) in
        [("resourceSpans", "scopeSpans", "spans"), ("resourceLogs", "scopeLogs", "logRecords")]
    {
        for resource in items(batch, resources) {
            let sender = Resource::new(attributes_of(resource.get("resource").unwrap_or(&Value::Null)));
            for scope in items(resource, scopes) {
                let read = |entry| Entry { resource: Rc::clone(&sender), ..entry_of(entry, list == "logRecords") };
                entries.extend(items(scope, list).iter().map(read));
            }
        }
    }
    entries
}

fn items<'a>(value: &'a Value, name: &str) -> &'a [Value] {
    value.get(name).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}

fn entry_of(entry: &Value, is_log: bool) -> Entry {
    let text = |name: &str| entry.get(name).and_then(Value::as_str).unwrap_or_default();
    // 64-bit numbers are strings in proto3 JSON; 0 means that the time is unknown.
    let time = |name: &str| entry.get(name).and_then(integer).filter(|&ns| ns > 0);
    let attributes = attributes_of(entry);
    let event = |event: &Value| {
        let name = event.get("name").and_then(Value::as_str).unwrap_or_default();
        (name.to_owned(), attributes_of(event))
    };
    let code = entry.get("status").and_then(|status| status.get("code"));
    Entry {
        is_log,
        trace_id: text("traceId").to_ascii_lowercase(),
        span_id: text("spanId").to_ascii_lowercase(),
        name: text(if is_log { "eventName" } else { "name" }).to_owned(),
        start_ns: time(if is_log { "timeUnixNano" } else { "startTimeUnixNano" })
            .or_else(|| time("observedTimeUnixNano")),
        end_ns: time("endTimeUnixNano"),
        failed: code.is_some_and(|code| *code == 2 || *code == "STATUS_CODE_ERROR"),
        attributes,
        resource: Rc::default(),
        events: items(entry, "events").iter().map(event).collect(),
        body: entry.get("body").map(plain).unwrap_or_default(),
    }
}

fn attributes_of(value: &Value) -> Map<String, Value> {
    let pair = |pair: &Value| {
        let key = pair.get("key")?.as_str()?;
        Some((key.to_owned(), pair.get("value").map(plain).unwrap_or_default()))
    };
    items(value, "attributes").iter().filter_map(pair).collect()
}

/// Returns what a JSON `AnyValue` holds. One of an unknown kind is kept as it is.
fn plain(value: &Value) -> Value {
    let Some((kind, inner)) = value.as_object().and_then(|map| map.iter().next()) else { return value.clone() };
    match kind.as_str() {
        "stringValue" | "boolValue" | "doubleValue" | "bytesValue" => inner.clone(),
        "intValue" => integer(inner).map_or_else(|| inner.clone(), Value::from),
        "arrayValue" => items(inner, "values").iter().map(plain).collect(),
        "kvlistValue" => {
            let pair = |pair: &Value| Some((pair.get("key")?.as_str()?.to_owned(), plain(pair.get("value")?)));
            Value::Object(items(inner, "values").iter().filter_map(pair).collect())
        }
        _ => value.clone(),
    }
}

/// Reads a protobuf batch (`TracesData`, `LogsData` and the requests that export them have one shape). `None` where the
/// bytes are neither: every span has ids of 16 and 8 bytes, which tells them from metrics and from noise.
pub(super) fn from_protobuf(bytes: &[u8]) -> Option<Vec<Entry>> {
    let spans = proto::Traces::decode(bytes).ok().map(|traces| traces.resource_spans);
    let is_span = |span: &proto::Span| span.trace_id.len() == 16 && span.span_id.len() == 8;
    let all_spans = |resource: &proto::ResourceSpans| resource.scopes.iter().flat_map(|s| &s.spans).all(is_span);
    if let Some(spans) = spans.filter(|spans| spans.iter().all(all_spans) && holds(spans, |r| &r.scopes)) {
        return Some(spans.into_iter().flat_map(proto::ResourceSpans::entries).collect());
    }
    let logs = proto::Logs::decode(bytes).ok()?.resource_logs;
    let is_log = |log: &proto::LogRecord| matches!(log.trace_id.len(), 0 | 16) && matches!(log.span_id.len(), 0 | 8);
    let all_logs = |resource: &proto::ResourceLogs| resource.scopes.iter().flat_map(|s| &s.logs).all(is_log);
    let whole = logs.iter().all(all_logs) && holds(&logs, |r| &r.scopes);
    whole.then(|| logs.into_iter().flat_map(proto::ResourceLogs::entries).collect())
}

/// Returns true where a batch has any scope; bytes that decode to nothing are no batch.
fn holds<R, S>(resources: &[R], scopes: impl Fn(&R) -> &Vec<S>) -> bool {
    resources.iter().any(|resource| !scopes(resource).is_empty())
}

mod proto {
    use super::{Entry, Map, Rc, Resource as Sender, Value};

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Traces {
        #[prost(message, repeated, tag = "1")]
        pub(super) resource_spans: Vec<ResourceSpans>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct ResourceSpans {
        #[prost(message, optional, tag = "1")]
        resource: Option<Resource>,
        #[prost(message, repeated, tag = "2")]
        pub(super) scopes: Vec<ScopeSpans>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct ScopeSpans {
        #[prost(message, repeated, tag = "2")]
        pub(super) spans: Vec<Span>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Span {
        #[prost(bytes = "vec", tag = "1")]
        pub(super) trace_id: Vec<u8>,
        #[prost(bytes = "vec", tag = "2")]
        pub(super) span_id: Vec<u8>,
        #[prost(string, tag = "5")]
        name: String,
        #[prost(fixed64, tag = "7")]
        start_time_unix_nano: u64,
        #[prost(fixed64, tag = "8")]
        end_time_unix_nano: u64,
        #[prost(message, repeated, tag = "9")]
        attributes: Vec<KeyValue>,
        #[prost(message, repeated, tag = "11")]
        events: Vec<Event>,
        #[prost(message, optional, tag = "15")]
        status: Option<Status>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Event {
        #[prost(string, tag = "2")]
        name: String,
        #[prost(message, repeated, tag = "3")]
        attributes: Vec<KeyValue>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Status {
        #[prost(int32, tag = "3")]
        code: i32,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Logs {
        #[prost(message, repeated, tag = "1")]
        pub(super) resource_logs: Vec<ResourceLogs>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct ResourceLogs {
        #[prost(message, optional, tag = "1")]
        resource: Option<Resource>,
        #[prost(message, repeated, tag = "2")]
        pub(super) scopes: Vec<ScopeLogs>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct ScopeLogs {
        #[prost(message, repeated, tag = "2")]
        pub(super) logs: Vec<LogRecord>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct LogRecord {
        #[prost(fixed64, tag = "1")]
        time_unix_nano: u64,
        #[prost(message, optional, tag = "5")]
        body: Option<AnyValue>,
        #[prost(message, repeated, tag = "6")]
        attributes: Vec<KeyValue>,
        #[prost(bytes = "vec", tag = "9")]
        pub(super) trace_id: Vec<u8>,
        #[prost(bytes = "vec", tag = "10")]
        pub(super) span_id: Vec<u8>,
        #[prost(fixed64, tag = "11")]
        observed_time_unix_nano: u64,
        #[prost(string, tag = "12")]
        event_name: String,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Resource {
        #[prost(message, repeated, tag = "1")]
        attributes: Vec<KeyValue>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct KeyValue {
        #[prost(string, tag = "1")]
        key: String,
        #[prost(message, optional, tag = "2")]
        value: Option<AnyValue>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct AnyValue {
        #[prost(oneof = "Kind", tags = "1, 2, 3, 4, 5, 6, 7")]
        kind: Option<Kind>,
    }

    #[derive(Clone, PartialEq, prost::Oneof)]
    pub(super) enum Kind {
        #[prost(string, tag = "1")]
        String(String),
        #[prost(bool, tag = "2")]
        Bool(bool),
        #[prost(int64, tag = "3")]
        Int(i64),
        #[prost(double, tag = "4")]
        Double(f64),
        #[prost(message, tag = "5")]
        Array(Array),
        #[prost(message, tag = "6")]
        Pairs(Pairs),
        #[prost(bytes = "vec", tag = "7")]
        Bytes(Vec<u8>),
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Array {
        #[prost(message, repeated, tag = "1")]
        values: Vec<AnyValue>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Pairs {
        #[prost(message, repeated, tag = "1")]
        values: Vec<KeyValue>,
    }

    impl ResourceSpans {
        pub(super) fn entries(self) -> impl Iterator<Item = Entry> {
            let sender = Sender::new(object(self.resource.unwrap_or_default().attributes));
            let spans = self.scopes.into_iter().flat_map(|scope| scope.spans);
            spans.map(move |span| Entry { resource: Rc::clone(&sender), ..span.entry() })
        }
    }

    impl Span {
        fn entry(self) -> Entry {
            Entry {
                is_log: false,
                trace_id: hex::encode(self.trace_id),
                span_id: hex::encode(self.span_id),
                name: self.name,
                start_ns: time(self.start_time_unix_nano),
                end_ns: time(self.end_time_unix_nano),
                failed: self.status.is_some_and(|status| status.code == 2),
                attributes: object(self.attributes),
                resource: Rc::default(),
                events: self.events.into_iter().map(|event| (event.name, object(event.attributes))).collect(),
                body: Value::Null,
            }
        }
    }

    impl ResourceLogs {
        pub(super) fn entries(self) -> impl Iterator<Item = Entry> {
            let sender = Sender::new(object(self.resource.unwrap_or_default().attributes));
            let logs = self.scopes.into_iter().flat_map(|scope| scope.logs);
            logs.map(move |log| Entry { resource: Rc::clone(&sender), ..log.entry() })
        }
    }

    impl LogRecord {
        fn entry(self) -> Entry {
            Entry {
                is_log: true,
                trace_id: hex::encode(self.trace_id),
                span_id: hex::encode(self.span_id),
                name: self.event_name,
                start_ns: time(self.time_unix_nano).or_else(|| time(self.observed_time_unix_nano)),
                attributes: object(self.attributes),
                body: self.body.map(AnyValue::plain).unwrap_or_default(),
                ..Entry::default()
            }
        }
    }

    impl AnyValue {
        fn plain(self) -> Value {
            match self.kind {
                None => Value::Null,
                Some(Kind::String(text)) => text.into(),
                Some(Kind::Bool(truth)) => truth.into(),
                Some(Kind::Int(number)) => number.into(),
                Some(Kind::Double(number)) => number.into(),
                Some(Kind::Array(array)) => array.values.into_iter().map(AnyValue::plain).collect(),
                Some(Kind::Pairs(pairs)) => Value::Object(object(pairs.values)),
                Some(Kind::Bytes(bytes)) => hex::encode(bytes).into(),
            }
        }
    }

    fn object(pairs: Vec<KeyValue>) -> Map<String, Value> {
        pairs.into_iter().map(|pair| (pair.key, pair.value.map(AnyValue::plain).unwrap_or_default())).collect()
    }

    fn time(ns: u64) -> Option<i64> {
        i64::try_from(ns).ok().filter(|&ns| ns > 0)
    }
}
