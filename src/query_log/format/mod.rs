//! Log formats: bytes of one Kafka record in, canonical calls out.
//!
//! [`read`] never fails and never panics: whatever the bytes are, they end as rows, dead letters with a reason, or
//! skips with a reason, and never as nothing. A record may be one JSON object, an array of them, JSON lines or a batch of
//! OpenTelemetry spans; each item is detected on its own, so producers of several formats may share a topic.
//!
//! What all formats keep: a field that no column takes goes to `extra` unchanged, except credentials and addresses of
//! people, which are dropped ([`fields::PERSONAL`]). Where JSON repeats a key, the last one wins. A value that cannot
//! be read as what its key says (a status `"abc"`, a time in the year 9999) counts as absent and stays in `extra`.
//!
//! Reading order: [`envelope`] (what bytes are wrapped in), [`fields`] (lenient access), [`chat`] and [`responses`]
//! (requests and answers in OpenAI's shapes), [`stream`] (answers logged as chunks), [`exclusion`] (rows that must not
//! train), then one file per format.

mod apisix;
mod chat;
mod databricks;
pub mod envelope;
mod envoy;
pub mod exclusion;
mod feedback;
mod fields;
mod flywheel;
#[cfg(any(test, fuzzing))]
pub mod invariants;
mod kong;
mod litellm;
mod mapping;
mod openai;
mod otlp;
pub mod oversize;
mod responses;
mod rules;
pub mod shape;
mod stream;
mod vllm;

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod losses;
#[cfg(test)]
mod producer_tests;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use crate::json::{Map, Value, json};
use crate::record::{Kind, Query, prompt_hash};
use envelope::Budget;
use fields::Fields;
pub use mapping::Mapping;
pub use rules::{DEFAULT_TEXT_BYTES, OptOut, Rules};

/// Deepest nesting that is read. A little under the JSON parser's own 128, so that what is read here can be put into
/// a document of ours and still be read back.
pub const MAX_DEPTH: usize = 120;

/// Most items in one record; a record with more is one dead letter, so that a small record cannot become many rows.
pub const MAX_ITEMS: usize = 10_000;

/// What one item of a record is.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// A call or a feedback.
    Row(Box<Query>),
    /// Something that no format could read; it is kept byte for byte and can be replayed.
    DeadLetter { reason: Reason, message: String },
    /// Something that is understood and is nothing for the table.
    Skip { reason: Reason },
}

/// Why an item is not a row. A closed list: the names are labels of metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reason {
    /// Nothing at all: a tombstone, white space, an empty array.
    Empty,
    NotJson,
    InvalidUtf8,
    TooDeep,
    /// A JSON number that no 64-bit number holds.
    BadNumber,
    TooManyItems,
    UnknownFormat,
    /// A call without its messages.
    MissingMessages,
    /// Messages that are not a list of objects with a role.
    BadMessages,
    /// A request field that is not a JSON object, nor a string that holds one.
    BadRequest,
    /// Feedback that names no call.
    MissingRequestId,
    /// A call that is no chat (an embedding, an image), or a span that is no call.
    NotChat,
    /// A call whose logger leaves prompts and answers out.
    NoContent,
    /// Compressed bytes that cannot be unpacked.
    BadCompression,
    /// Compressed bytes that unpack to more than is allowed.
    TooLarge,
}

impl Reason {
    /// All reasons, for metrics that must exist before the first record.
    pub const ALL: [Reason; 15] = [
        Reason::Empty,
        Reason::NotJson,
        Reason::InvalidUtf8,
        Reason::TooDeep,
        Reason::BadNumber,
        Reason::TooManyItems,
        Reason::UnknownFormat,
        Reason::MissingMessages,
        Reason::BadMessages,
        Reason::BadRequest,
        Reason::MissingRequestId,
        Reason::NotChat,
        Reason::NoContent,
        Reason::BadCompression,
        Reason::TooLarge,
    ];

    /// Returns the name stored in the table and used as a label.
    pub fn as_str(self) -> &'static str {
        match self {
            Reason::Empty => "empty",
            Reason::NotJson => "not_json",
            Reason::InvalidUtf8 => "invalid_utf8",
            Reason::TooDeep => "too_deep",
            Reason::BadNumber => "bad_number",
            Reason::TooManyItems => "too_many_items",
            Reason::UnknownFormat => "unknown_format",
            Reason::MissingMessages => "missing_messages",
            Reason::BadMessages => "bad_messages",
            Reason::BadRequest => "bad_request",
            Reason::MissingRequestId => "missing_request_id",
            Reason::NotChat => "not_chat",
            Reason::NoContent => "no_content",
            Reason::BadCompression => "bad_compression",
            Reason::TooLarge => "too_large",
        }
    }
}

/// Why an item could not be read, before it becomes an [`Outcome`].
#[derive(Debug)]
struct Refusal {
    reason: Reason,
    /// `None` where the item is only skipped.
    message: Option<String>,
}

impl Refusal {
    fn dead(reason: Reason, message: impl Into<String>) -> Self {
        Refusal { reason, message: Some(message.into()) }
    }

    fn skip(reason: Reason) -> Self {
        Refusal { reason, message: None }
    }
}

impl From<Refusal> for Outcome {
    fn from(refusal: Refusal) -> Self {
        match refusal.message {
            Some(message) => Outcome::DeadLetter { reason: refusal.reason, message },
            None => Outcome::Skip { reason: refusal.reason },
        }
    }
}

/// Reads one Kafka record; an outcome's position is its `record_index`. Header names are compared without case. The
/// user's own formats come before the known ones, in their order.
pub fn read(payload: &[u8], headers: &BTreeMap<String, String>, rules: &Rules) -> Vec<Outcome> {
    let mut outcomes = decode(payload, headers, &rules.mappings);
    for outcome in &mut outcomes {
        if let Outcome::Row(query) = outcome {
            rules.apply(query, headers);
        }
    }
    outcomes
}

fn decode(payload: &[u8], headers: &BTreeMap<String, String>, mappings: &[Mapping]) -> Vec<Outcome> {
    let payload = match envelope::open(payload) {
        Ok(payload) => payload,
        Err(refusal) => return vec![refusal.into()],
    };
    if let Some(outcomes) = otlp::read_protobuf(&payload, headers) {
        return few(outcomes);
    }
    if let Some(outcomes) = vllm::read_lines(&payload, headers) {
        return few(outcomes);
    }
    let items = items(&payload);
    if items.len() > MAX_ITEMS {
        return vec![too_many(items.len())];
    }
    let budget = Budget::default();
    let read = |value| detect(value, headers, mappings, &budget);
    few(items.into_iter().flat_map(|item| item.map_or_else(|refusal| vec![refusal.into()], read)).collect())
}

/// Refuses a record with too many items whole.
fn few(outcomes: Vec<Outcome>) -> Vec<Outcome> {
    if outcomes.len() > MAX_ITEMS { vec![too_many(outcomes.len())] } else { outcomes }
}

fn too_many(items: usize) -> Outcome {
    let message = format!("the record holds {items} items, more than {MAX_ITEMS}: send fewer in one record");
    Refusal::dead(Reason::TooManyItems, message).into()
}

fn too_many_values() -> Refusal {
    let message = format!("the record holds more than {} values: send fewer in one record", shape::MAX_VALUES);
    Refusal::dead(Reason::TooManyItems, message)
}

/// Returns the line that `taod records` prints for one outcome of the input line `index`.
pub fn canonical_json(index: usize, outcome: &Outcome) -> Value {
    let mut line = Map::new();
    line.insert("index", json!(index));
    match outcome {
        Outcome::Row(query) => {
            if query.kind == Kind::Call {
                line.insert("prompt_hash", prompt_hash(&query.messages, query.tools.as_ref()).into());
            }
            if let Ok(Value::Object(record)) = serde_json::to_value(query).map(Value::from) {
                line.extend(record);
            }
        }
        Outcome::DeadLetter { reason, message } => {
            line.insert("dead_letter", reason.as_str().into());
            line.insert("message", message.as_str().into());
        }
        Outcome::Skip { reason } => {
            line.insert("skip", reason.as_str().into());
        }
    }
    Value::Object(line)
}

/// Takes the JSON values out of a payload: one document, the items of an array, or one per line.
fn items(payload: &[u8]) -> Vec<Result<Value, Refusal>> {
    let payload = payload.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(payload).trim_ascii();
    // Of the whole: many lines, or many bodies as text, are as large together as one document is.
    if shape::is_bomb(payload) {
        return vec![Err(too_many_values())];
    }
    let items = match parse(payload) {
        Ok(value) => spread(value),
        Err(refusal) => lines(payload).unwrap_or_else(|| vec![Err(refusal)]),
    };
    items.into_iter().map(|item| item.map_err(with_remedy)).collect()
}

/// Adds to what is wrong with a document what its producer can do.
fn with_remedy(refusal: Refusal) -> Refusal {
    let Refusal { reason, message: Some(message) } = refusal else { return refusal };
    let remedy = match reason {
        Reason::NotJson => "send a JSON object, an array of them or one a line",
        Reason::InvalidUtf8 => "send UTF-8",
        Reason::TooDeep => "send the inner part as text",
        Reason::BadNumber => "send such a number as text",
        _ => return Refusal::dead(reason, message),
    };
    Refusal::dead(reason, format!("the record cannot be read ({message}): {remedy}"))
}

/// Reads JSON lines. `None` where no line is an object or an array of its own: then the payload is one broken document.
fn lines(payload: &[u8]) -> Option<Vec<Result<Value, Refusal>>> {
    let lines = payload.split(|&byte| byte == b'\n').map(<[u8]>::trim_ascii).filter(|line| !line.is_empty());
    let parsed: Vec<Result<Value, Refusal>> = lines.map(parse).collect();
    let whole = |line: &Result<Value, Refusal>| line.as_ref().is_ok_and(|v| v.is_object() || v.is_array());
    let are_lines = parsed.len() > 1 && parsed.iter().any(whole);
    let flatten = |line| match line {
        Ok(value) => spread(value),
        Err(refusal) => vec![Err(refusal)],
    };
    are_lines.then(|| parsed.into_iter().flat_map(flatten).collect())
}

/// Returns the items of an array of calls. An array without a single object is one item, whatever its length.
fn spread(value: Value) -> Vec<Result<Value, Refusal>> {
    match value {
        Value::Array(items) if items.is_empty() => vec![Err(Refusal::skip(Reason::Empty))],
        Value::Array(items) if items.iter().any(Value::is_object) => items.into_iter().map(Ok).collect(),
        value => vec![Ok(value)],
    }
}

/// Parses one JSON document and says why it is none.
fn parse(bytes: &[u8]) -> Result<Value, Refusal> {
    if bytes.is_empty() {
        return Err(Refusal::skip(Reason::Empty));
    }
    let text = std::str::from_utf8(bytes).map_err(|e| Refusal::dead(Reason::InvalidUtf8, e.to_string()))?;
    if depth(bytes) > MAX_DEPTH {
        return Err(Refusal::dead(Reason::TooDeep, format!("the JSON is nested deeper than {MAX_DEPTH}")));
    }
    serde_json::from_str(text).map_err(|error| {
        let message = error.to_string();
        let is_number = message.starts_with("number out of range");
        Refusal::dead(if is_number { Reason::BadNumber } else { Reason::NotJson }, message)
    })
}

/// Returns how deep brackets nest outside strings, without parsing; an upper bound of it where that is no more than
/// [`MAX_DEPTH`], which a count of all brackets tells much faster.
fn depth(bytes: &[u8]) -> usize {
    // In runs that a byte can count: so many bytes are compared at once.
    let in_run = |run: &[u8]| usize::from(run.iter().map(|byte| u8::from(matches!(byte, b'{' | b'['))).sum::<u8>());
    let brackets = bytes.chunks(255).map(in_run).sum();
    if brackets <= MAX_DEPTH {
        return brackets;
    }
    let (mut depth, mut deepest, mut in_string, mut escaped) = (0usize, 0, false, false);
    for &byte in bytes {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            _ if in_string => {}
            b'{' | b'[' => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b'}' | b']' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

/// Finds the format of one item and reads it. The most telling signs come first.
fn detect(value: Value, headers: &BTreeMap<String, String>, mappings: &[Mapping], budget: &Budget) -> Vec<Outcome> {
    let one = |query: Result<Query, Refusal>| vec![query.map_or_else(Outcome::from, |q| Outcome::Row(Box::new(q)))];
    if let Some(mapping) = mappings.iter().find(|mapping| mapping.matches(&value)) {
        return one(mapping.read(value, headers));
    }
    let map = match value {
        Value::Object(map) => map,
        Value::Null => return vec![Refusal::skip(Reason::Empty).into()],
        other => {
            let message = format!("the record is {}, not an object: send one object a call", fields::kind_of(&other));
            return vec![Refusal::dead(Reason::UnknownFormat, message).into()];
        }
    };
    if otlp::is_batch(&map) {
        return otlp::read(map, headers);
    }
    one(call(Fields::new(map), headers, budget))
}

/// Reads an item that is one call, or feedback on one.
fn call(fields: Fields, headers: &BTreeMap<String, String>, budget: &Budget) -> Result<Query, Refusal> {
    if fields.get("standard_logging_object").is_some_and(Value::is_object) {
        litellm::read_wrapped(fields, headers)
    } else if feedback::is_feedback(&fields) {
        feedback::read(fields)
    } else if litellm::is_litellm(&fields) {
        litellm::read(fields, headers)
    } else if kong::is_kong(&fields) {
        kong::read(fields, headers)
    } else if apisix::is_apisix(&fields) {
        apisix::read(fields, headers)
    } else if databricks::is_databricks(&fields) {
        databricks::read(fields, headers)
    } else if flywheel::is_flywheel(&fields) {
        flywheel::read(fields, headers)
    } else if openai::is_pair(&fields) {
        openai::read(fields, headers, "openai")
    } else if envoy::is_envoy(&fields) {
        envoy::read(fields, headers, budget)
    } else if vllm::is_vllm(&fields) {
        vllm::read(fields, headers)
    } else {
        Err(unknown(&fields))
    }
}

fn unknown(fields: &Fields) -> Refusal {
    // A name may be as long as the record.
    let short = |name: &str| name.chars().take(64).collect::<String>();
    let names: Vec<String> = fields.names().take(8).map(short).collect();
    let message = format!(
        "no known log format has the fields {names:?}: expected `request` and `response` in OpenAI's shape, or one of \
         LiteLLM, Databricks, OpenTelemetry, Kong, APISIX, Envoy or vLLM"
    );
    Refusal::dead(Reason::UnknownFormat, message)
}
