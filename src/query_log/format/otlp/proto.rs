//! The messages of opentelemetry-proto 1.x: `trace.proto`, `logs.proto`, `common.proto` and `resource.proto`. Fields that a
//! later version adds are skipped, and the depth is limited, by `prost`.

use std::rc::Rc;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;

use super::wire::{Entry, Event as SpanEvent, Shared, library, sender};
use crate::json::{Map, Name, Value, json};

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
    #[prost(string, tag = "3")]
    schema_url: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct ScopeSpans {
    #[prost(message, optional, tag = "1")]
    scope: Option<Scope>,
    #[prost(message, repeated, tag = "2")]
    pub(super) spans: Vec<Span>,
    #[prost(string, tag = "3")]
    schema_url: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Scope {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    version: String,
    #[prost(message, repeated, tag = "3")]
    attributes: Vec<KeyValue>,
    #[prost(uint32, tag = "4")]
    dropped_attributes_count: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Span {
    #[prost(bytes = "vec", tag = "1")]
    pub(super) trace_id: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub(super) span_id: Vec<u8>,
    #[prost(string, tag = "3")]
    trace_state: String,
    #[prost(bytes = "vec", tag = "4")]
    parent_span_id: Vec<u8>,
    #[prost(string, tag = "5")]
    name: String,
    #[prost(int32, tag = "6")]
    kind: i32,
    #[prost(fixed64, tag = "7")]
    start_time_unix_nano: u64,
    #[prost(fixed64, tag = "8")]
    end_time_unix_nano: u64,
    #[prost(message, repeated, tag = "9")]
    attributes: Vec<KeyValue>,
    #[prost(uint32, tag = "10")]
    dropped_attributes_count: u32,
    #[prost(message, repeated, tag = "11")]
    events: Vec<Event>,
    #[prost(uint32, tag = "12")]
    dropped_events_count: u32,
    #[prost(message, repeated, tag = "13")]
    links: Vec<Link>,
    #[prost(uint32, tag = "14")]
    dropped_links_count: u32,
    #[prost(message, optional, tag = "15")]
    status: Option<Status>,
    #[prost(fixed32, tag = "16")]
    flags: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Event {
    #[prost(fixed64, tag = "1")]
    time_unix_nano: u64,
    #[prost(string, tag = "2")]
    name: String,
    #[prost(message, repeated, tag = "3")]
    attributes: Vec<KeyValue>,
    #[prost(uint32, tag = "4")]
    dropped_attributes_count: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Link {
    #[prost(bytes = "vec", tag = "1")]
    trace_id: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    span_id: Vec<u8>,
    #[prost(string, tag = "3")]
    trace_state: String,
    #[prost(message, repeated, tag = "4")]
    attributes: Vec<KeyValue>,
    #[prost(uint32, tag = "5")]
    dropped_attributes_count: u32,
    #[prost(fixed32, tag = "6")]
    flags: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Status {
    #[prost(string, tag = "2")]
    message: String,
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
    #[prost(string, tag = "3")]
    schema_url: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct ScopeLogs {
    #[prost(message, optional, tag = "1")]
    scope: Option<Scope>,
    #[prost(message, repeated, tag = "2")]
    pub(super) logs: Vec<LogRecord>,
    #[prost(string, tag = "3")]
    schema_url: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct LogRecord {
    #[prost(fixed64, tag = "1")]
    time_unix_nano: u64,
    #[prost(int32, tag = "2")]
    severity_number: i32,
    #[prost(string, tag = "3")]
    severity_text: String,
    #[prost(message, optional, tag = "5")]
    body: Option<AnyValue>,
    #[prost(message, repeated, tag = "6")]
    attributes: Vec<KeyValue>,
    #[prost(uint32, tag = "7")]
    dropped_attributes_count: u32,
    #[prost(fixed32, tag = "8")]
    flags: u32,
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
struct Resource {
    #[prost(message, repeated, tag = "1")]
    attributes: Vec<KeyValue>,
    #[prost(uint32, tag = "2")]
    dropped_attributes_count: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct KeyValue {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(message, optional, tag = "2")]
    value: Option<AnyValue>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct AnyValue {
    #[prost(oneof = "Kind", tags = "1, 2, 3, 4, 5, 6, 7")]
    kind: Option<Kind>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum Kind {
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
struct Array {
    #[prost(message, repeated, tag = "1")]
    values: Vec<AnyValue>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Pairs {
    #[prost(message, repeated, tag = "1")]
    values: Vec<KeyValue>,
}

impl ResourceSpans {
    pub(super) fn entries(self) -> impl Iterator<Item = Entry> {
        let sender = sent(self.resource, self.schema_url);
        self.scopes.into_iter().flat_map(move |scope| {
            let (sender, library) = (Rc::clone(&sender), made(scope.scope, scope.schema_url));
            let shared = move || (Rc::clone(&sender), Rc::clone(&library));
            scope.spans.into_iter().map(move |span| {
                let (resource, scope) = shared();
                Entry { resource, scope, ..span.entry() }
            })
        })
    }
}

impl ResourceLogs {
    pub(super) fn entries(self) -> impl Iterator<Item = Entry> {
        let sender = sent(self.resource, self.schema_url);
        self.scopes.into_iter().flat_map(move |scope| {
            let (sender, library) = (Rc::clone(&sender), made(scope.scope, scope.schema_url));
            let shared = move || (Rc::clone(&sender), Rc::clone(&library));
            scope.logs.into_iter().map(move |log| {
                let (resource, scope) = shared();
                Entry { resource, scope, ..log.entry() }
            })
        })
    }
}

fn sent(resource: Option<Resource>, schema_url: String) -> Rc<Shared> {
    let resource = resource.unwrap_or_default();
    let more = [dropped("Attributes", resource.dropped_attributes_count), text("schemaUrl", schema_url)];
    sender(object(resource.attributes), more.into_iter().flatten())
}

fn made(scope: Option<Scope>, schema_url: String) -> Rc<Shared> {
    let scope = scope.unwrap_or_default();
    let dropped = dropped("Attributes", scope.dropped_attributes_count);
    let more = [text("name", scope.name), text("version", scope.version), dropped, text("schemaUrl", schema_url)];
    library(object(scope.attributes), more.into_iter().flatten())
}

impl Span {
    fn entry(self) -> Entry {
        let status = self.status.unwrap_or_default();
        let message = text("message", status.message).map(|(name, message)| json!({ name: message }));
        let links: Vec<Value> = self.links.into_iter().map(Link::plain).collect();
        let more = [
            text("parentSpanId", hex::encode(self.parent_span_id)),
            text("traceState", self.trace_state),
            number("kind", self.kind),
            number("flags", self.flags),
            dropped("Attributes", self.dropped_attributes_count),
            dropped("Events", self.dropped_events_count),
            dropped("Links", self.dropped_links_count),
            (!links.is_empty()).then(|| ("links".into(), links.into())),
            message.map(|message| ("status".into(), message)),
        ];
        Entry {
            trace_id: hex::encode(self.trace_id),
            span_id: hex::encode(self.span_id),
            name: self.name,
            start_ns: time(self.start_time_unix_nano),
            end_ns: time(self.end_time_unix_nano),
            failed: status.code == 2,
            attributes: object(self.attributes),
            events: self.events.into_iter().map(Event::plain).collect(),
            more: more.into_iter().flatten().collect(),
            ..Entry::default()
        }
    }
}

impl Event {
    fn plain(self) -> SpanEvent {
        let more = [
            dropped("Attributes", self.dropped_attributes_count),
            text("timeUnixNano", time(self.time_unix_nano).map(|ns| ns.to_string()).unwrap_or_default()),
        ];
        let more = more.into_iter().flatten().collect();
        SpanEvent { name: self.name, attributes: object(self.attributes), more }
    }
}

impl Link {
    /// Returns the link as JSON has it, but for its attributes, which are an object.
    fn plain(self) -> Value {
        let attributes = object(self.attributes);
        let fields = [
            text("traceId", hex::encode(self.trace_id)),
            text("spanId", hex::encode(self.span_id)),
            text("traceState", self.trace_state),
            (!attributes.is_empty()).then(|| ("attributes".into(), Value::Object(attributes))),
            dropped("Attributes", self.dropped_attributes_count),
            number("flags", self.flags),
        ];
        Value::Object(fields.into_iter().flatten().collect())
    }
}

impl LogRecord {
    fn entry(self) -> Entry {
        let (time_ns, observed_ns) = (time(self.time_unix_nano), time(self.observed_time_unix_nano));
        let observed = observed_ns.filter(|_| time_ns.is_some()).map(|ns| ns.to_string());
        let more = [
            text("observedTimeUnixNano", observed.unwrap_or_default()),
            number("severityNumber", self.severity_number),
            text("severityText", self.severity_text),
            dropped("Attributes", self.dropped_attributes_count),
            number("flags", self.flags),
        ];
        Entry {
            is_log: true,
            trace_id: hex::encode(self.trace_id),
            span_id: hex::encode(self.span_id),
            name: self.event_name,
            start_ns: time_ns.or(observed_ns),
            attributes: object(self.attributes),
            body: self.body.map(AnyValue::plain).unwrap_or_default(),
            more: more.into_iter().flatten().collect(),
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
            // As JSON has them.
            Some(Kind::Bytes(bytes)) => BASE64_STANDARD.encode(bytes).into(),
        }
    }
}

fn object(pairs: Vec<KeyValue>) -> Map {
    pairs.into_iter().map(|pair| (pair.key, pair.value.map(AnyValue::plain).unwrap_or_default())).collect()
}

fn time(ns: u64) -> Option<i64> {
    i64::try_from(ns).ok().filter(|&ns| ns > 0)
}

/// Returns a field for what is not the default, which is as good as absent.
fn text(name: &str, text: String) -> Option<(Name, Value)> {
    (!text.is_empty()).then(|| (name.into(), text.into()))
}

fn number<N: Default + PartialEq + Into<Value>>(name: &str, number: N) -> Option<(Name, Value)> {
    (number != N::default()).then(|| (name.into(), number.into()))
}

fn dropped(what: &str, count: u32) -> Option<(Name, Value)> {
    number(&format!("dropped{what}Count"), count)
}
