//! OTLP as it comes over the wire, JSON or protobuf, brought into one plain form: batches of [`Entry`].
//!
//! The protobuf messages are those of opentelemetry-proto 1.x (see [`proto`]). What is not read of an entry is kept under
//! the names that it has in JSON.

use std::cell::Cell;
use std::rc::Rc;

use prost::Message as _;

use super::proto;
use crate::json::{Map, Name, Value};
use crate::query_log::format::fields::{Fields, integer};

/// Largest attributes of a process, in bytes of JSON, that every row of it keeps.
const LARGE: usize = 4096;

/// The same for what a library says of itself.
const LARGE_SCOPE: usize = 1024;

/// Largest attribute, in bytes of JSON, that every row keeps where there is more than that.
const SMALL: usize = 128;

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
    pub(super) attributes: Map,
    /// The process that sent it.
    pub(super) resource: Rc<Shared>,
    /// The library that made it.
    pub(super) scope: Rc<Shared>,
    /// Of a span.
    pub(super) events: Vec<Event>,
    /// Of a log record.
    pub(super) body: Value,
    /// What else it says, by its names in JSON.
    pub(super) more: Map,
}

/// Something that happened during a span.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Event {
    pub(super) name: String,
    pub(super) attributes: Map,
    /// What else it says, by its names in JSON.
    pub(super) more: Map,
}

/// What a process or a library says of itself, shared by all that it sent in one batch.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Shared {
    whole: Map,
    /// Where that is large: names and signs.
    brief: Option<Map>,
    /// True once a row has the whole.
    told: Cell<bool>,
}

impl Shared {
    fn new(whole: Map, large: usize) -> Rc<Self> {
        let length = |value: &Value| serde_json::to_string(value).map_or(usize::MAX, |text| text.len());
        let size: usize = whole.iter().map(|(name, value)| name.len() + length(value)).sum();
        let brief = (size > large).then(|| {
            let (names, mut left) = (["workload", "service.name", "tenant.id", "tenant"], large / 2);
            let named = names.iter().filter_map(|name| whole.get_key_value(name));
            let small = named.chain(&whole).filter(|(name, value)| name.len() <= SMALL && length(value) <= SMALL);
            let fits = |(name, value): &(&Name, &Value)| {
                let rest = left.checked_sub(name.len() + length(value));
                rest.is_some_and(|rest| {
                    left = rest;
                    true
                })
            };
            small.take_while(fits).map(|(name, value)| (name.clone(), value.clone())).collect()
        });
        Rc::new(Shared { whole, brief, told: Cell::new(false) })
    }

    /// Returns all of it, whatever its size.
    pub(super) fn whole(&self) -> &Map {
        &self.whole
    }

    /// Returns it for a row. What is large goes to one row of the batch, the others keep what is small of it: a batch of
    /// thousands of spans must not become thousands of times as large.
    pub(super) fn for_row(&self) -> Map {
        let brief = self.brief.as_ref().filter(|_| self.told.replace(true));
        brief.unwrap_or(&self.whole).clone()
    }
}

/// Returns true where a JSON object is an OTLP batch of spans or logs.
pub(super) fn is_batch(fields: &Map) -> bool {
    ["resourceSpans", "resourceLogs"].iter().any(|name| fields.get(name).is_some_and(Value::is_array))
}

/// Reads a JSON batch. Lists that are none, and entries that are no objects, hold nothing.
pub(super) fn from_json(mut batch: Map) -> Vec<Entry> {
    let mut entries = Vec::new();
    for (resources, scopes, list) in
        [("resourceSpans", "scopeSpans", "spans"), ("resourceLogs", "scopeLogs", "logRecords")]
    {
        for mut resource in objects(&mut batch, resources) {
            let mut about = object(&mut resource, "resource");
            let own = attributes(&mut about);
            let sender = sender(own, about.into_iter().chain(url(&mut resource)));
            for mut scope in objects(&mut resource, scopes) {
                let mut about = object(&mut scope, "scope");
                let own = attributes(&mut about);
                let library = library(own, about.into_iter().chain(url(&mut scope)));
                for entry in objects(&mut scope, list) {
                    let (resource, scope) = (Rc::clone(&sender), Rc::clone(&library));
                    entries.push(Entry { resource, scope, ..entry_of(entry, list == "logRecords") });
                }
            }
        }
    }
    entries
}

/// Takes a list; what is no object in it says nothing, as an empty one.
fn objects(map: &mut Map, name: &str) -> Vec<Map> {
    let Some(Value::Array(items)) = map.get_mut(name).map(Value::take) else { return Vec::new() };
    let object = |item| match item {
        Value::Object(map) => map,
        _ => Map::new(),
    };
    items.into_iter().map(object).collect()
}

fn object(map: &mut Map, name: &str) -> Map {
    match map.get_mut(name).map(Value::take) {
        Some(Value::Object(map)) => map,
        _ => Map::new(),
    }
}

/// Takes the conventions' version that attributes follow.
fn url(map: &mut Map) -> Option<(Name, Value)> {
    let url =
        map.get_mut("schemaUrl").map(Value::take).filter(|url| url.as_str().is_some_and(|url| !url.is_empty()))?;
    Some(("schemaUrl".into(), url))
}

/// Returns what a process says: its attributes, with the little else that there is beside them.
pub(super) fn sender(mut attributes: Map, more: impl Iterator<Item = (Name, Value)>) -> Rc<Shared> {
    attributes.extend(more.filter(|(_, value)| !value.is_null()));
    Shared::new(attributes, LARGE)
}

/// Returns what a library says: its name and version, and its attributes in a field of that name.
pub(super) fn library(attributes: Map, more: impl Iterator<Item = (Name, Value)>) -> Rc<Shared> {
    let mut about: Map = more.filter(|(_, value)| !value.is_null()).collect();
    if !attributes.is_empty() {
        about.insert("attributes", Value::Object(attributes));
    }
    Shared::new(about, LARGE_SCOPE)
}

fn entry_of(mut entry: Map, is_log: bool) -> Entry {
    let attributes = attributes(&mut entry);
    let body = entry.get_mut("body").map(Value::take).map(|body| plain(&body)).unwrap_or_default();
    let events = objects(&mut entry, "events").into_iter().map(event_of).collect();
    let mut status = object(&mut entry, "status");
    let code = status.get_mut("code").map(Value::take).unwrap_or_default();
    let mut fields = Fields::new(entry);
    fields.put_rest("status", status);
    let mut id = |name: &str| fields.text(&[name]).unwrap_or_default().to_ascii_lowercase();
    let (trace_id, span_id) = (id("traceId"), id("spanId"));
    // 64-bit numbers are strings in proto3 JSON; 0 means that the time is unknown.
    let mut time = |name: &str| fields.integer(&[name]).filter(|&ns| ns > 0);
    let start_ns = time(if is_log { "timeUnixNano" } else { "startTimeUnixNano" });
    let (start_ns, end_ns) = (start_ns.or_else(|| time("observedTimeUnixNano")), time("endTimeUnixNano"));
    Entry {
        is_log,
        trace_id,
        span_id,
        name: fields.text(&[if is_log { "eventName" } else { "name" }]).unwrap_or_default(),
        start_ns,
        end_ns,
        failed: code == 2 || code == "STATUS_CODE_ERROR",
        attributes,
        events,
        body,
        more: fields.rest(),
        ..Entry::default()
    }
}

fn event_of(mut event: Map) -> Event {
    let attributes = attributes(&mut event);
    let mut fields = Fields::new(event);
    Event { name: fields.text(&["name"]).unwrap_or_default(), attributes, more: fields.rest() }
}

/// Takes the attributes of an object.
fn attributes(map: &mut Map) -> Map {
    let pair = |pair: &Value| {
        let key = pair.get("key")?.as_str()?;
        Some((key.to_owned(), pair.get("value").map(plain).unwrap_or_default()))
    };
    let list = map.get_mut("attributes").map(Value::take).unwrap_or_default();
    list.as_array().into_iter().flatten().filter_map(pair).collect()
}

/// Returns what a JSON `AnyValue` holds. One of an unknown kind is kept as it is.
fn plain(value: &Value) -> Value {
    let Some((kind, inner)) = value.as_object().and_then(|map| map.iter().next()) else { return value.clone() };
    let values = || inner.get("values").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    match kind.as_str() {
        "stringValue" | "boolValue" | "doubleValue" | "bytesValue" => inner.clone(),
        "intValue" => integer(inner).map_or_else(|| inner.clone(), Value::from),
        "arrayValue" => values().iter().map(plain).collect(),
        "kvlistValue" => {
            let pair = |pair: &Value| {
                Some((pair.get("key")?.as_str()?.to_owned(), pair.get("value").map(plain).unwrap_or_default()))
            };
            Value::Object(values().iter().filter_map(pair).collect())
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
