//! Envoy, and the AI gateway built on it: tapped calls with their bodies, and access logs, which have none.
//!
//! The gateway's access log knows models and tokens; its spans, which are OpenTelemetry's, hold the content. An operator
//! who adds the bodies to the access log calls them as its other fields are called: `request_body`, `response_body`. Envoy's
//! tap filter writes both bodies of a call (`http_buffered_trace`), as base64 or as text, and says where it cut them.

use std::collections::BTreeMap;

use crate::json::{Map, Value, json};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;

use crate::record::Query;

use super::envelope::Budget;
use super::fields::Fields;
use super::{Reason, Refusal, openai};

/// The fields of the access log that hold bodies where an operator adds them.
const BODIES: [&str; 2] = ["request_body", "response_body"];

/// Fields of the access log with a client's address.
const ADDRESSES: [&str; 2] = ["downstream_remote_address", "downstream_direct_remote_address"];

/// The field that holds a tapped call.
const TRACE: &str = "http_buffered_trace";

/// Returns true where a record is a tapped call or an entry of the gateway's access log.
pub(super) fn is_envoy(fields: &Fields) -> bool {
    fields.get(TRACE).is_some_and(Value::is_object) || fields.has("gen_ai.request.model")
}

/// Reads one record.
pub(super) fn read(
    mut fields: Fields,
    kafka_headers: &BTreeMap<String, String>,
    budget: &Budget,
) -> Result<Query, Refusal> {
    if !fields.has(TRACE) {
        return read_access(fields, kafka_headers);
    }
    let mut trace = fields.object(TRACE);
    let mut request = Side::take(&mut trace, "request", budget);
    let mut response = Side::take(&mut trace, "response", budget);
    if request.body.is_null() {
        let message = "the tapped call has no request body that can be read: set max_buffered_rx_bytes of the tap to the \
                       largest request";
        return Err(Refusal::dead(Reason::MissingMessages, message));
    }
    let mut pair = Fields::default();
    pair.put_rest("request", request.body);
    pair.put_rest("response", response.body);
    pair.put_rest("truncated", if request.cut || response.cut { Value::Bool(true) } else { Value::Null });
    pair.put_rest("status", response.headers.shift_remove(":status").unwrap_or_default());
    pair.put_rest("request_id", request.headers.shift_remove("x-request-id").unwrap_or_default());
    pair.put_rest("timestamp", request.rest.take("headers_received_time").unwrap_or_default());
    pair.put_rest("headers", request.headers);
    response.rest.put_rest("headers", response.headers);
    trace.put_rest("request", request.rest.rest());
    trace.put_rest("response", response.rest.rest());
    fields.put_rest(TRACE, trace.rest());
    pair.put_rest("envoy", fields.rest());
    openai::read(pair, kafka_headers, "envoy")
}

/// Reads an entry of the access log. Most hold no bodies.
fn read_access(mut fields: Fields, kafka_headers: &BTreeMap<String, String>) -> Result<Query, Refusal> {
    let mut pair = Fields::default();
    let Some(request) = fields.take(BODIES[0]) else { return Err(Refusal::skip(Reason::NoContent)) };
    pair.put_rest("request", request);
    for (name, ours) in [
        (BODIES[1], "response"),
        ("response_code", "status"),
        ("start_time", "timestamp"),
        ("duration", "duration_ms"),
        ("x-request-id", "request_id"),
        ("route_name", "workload"),
        ("gen_ai.response.model", "served_version"),
    ] {
        pair.put_rest(ours, fields.take(name).unwrap_or_default());
    }
    let model = fields.text(&["gen_ai.request.model"]);
    let prompt_tokens = fields.integer(&["gen_ai.usage.input_tokens"]);
    let completion_tokens = fields.integer(&["gen_ai.usage.output_tokens"]);
    for name in ADDRESSES {
        fields.take(name);
    }
    pair.put_rest("envoy", fields.rest());
    let mut query = openai::read(pair, kafka_headers, "envoy")?;
    query.model = query.model.take().or(model);
    query.prompt_tokens = query.prompt_tokens.or(prompt_tokens);
    query.completion_tokens = query.completion_tokens.or(completion_tokens);
    Ok(query)
}

/// One direction of a tapped call.
struct Side {
    headers: Map,
    /// The body as text; null where there is none.
    body: Value,
    /// True where the tap cut the body.
    cut: bool,
    rest: Fields,
}

impl Side {
    fn take(trace: &mut Fields, name: &str, budget: &Budget) -> Self {
        let mut rest = trace.object(name);
        let mut body = rest.object("body");
        let cut = body.truth(&["truncated"]) == Some(true);
        let text = body.take("as_string").or_else(|| {
            let text = body.get("as_bytes").and_then(Value::as_str).and_then(|text| text_of(text, budget))?;
            body.take("as_bytes");
            Some(text.into())
        });
        rest.put_rest("body", body.rest());
        Side { headers: headers(&mut rest), body: text.unwrap_or_default(), cut, rest }
    }
}

/// Returns the text of a body in base64, which the model's server may have compressed.
fn text_of(base64: &str, budget: &Budget) -> Option<String> {
    let bytes = BASE64_STANDARD.decode(base64).ok()?;
    let plain = budget.open(&bytes).ok()?;
    String::from_utf8(plain.into_owned()).ok()
}

/// Takes a list of headers as an object: so credentials among them are known by their names. What is no header stays.
fn headers(side: &mut Fields) -> Map {
    let Some(Value::Array(mut list)) = side.take("headers") else { return Map::new() };
    let mut headers = Map::new();
    list.retain(|header| {
        let value = ["value", "raw_value"].iter().find_map(|name| header.get(name));
        let Some((name, value)) = header.get("key").and_then(Value::as_str).zip(value) else { return true };
        let name = name.to_ascii_lowercase();
        match headers.get_mut(&name) {
            None => drop(headers.insert(name, value.clone())),
            Some(Value::Array(values)) => values.push(value.clone()),
            Some(first) => *first = json!([first.take(), value]),
        }
        false
    });
    side.put_rest("other_headers", list);
    headers
}
