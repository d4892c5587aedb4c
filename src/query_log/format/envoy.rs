//! Envoy, and the AI gateway built on it: tapped calls with their bodies, and access logs, which have none.
//!
//! The gateway's access log knows models and tokens only; its spans, which are OpenTelemetry's, hold the content. Envoy's
//! tap filter writes both bodies of a call (`http_buffered_trace`), as base64 or as text, and says where it cut them.

use std::collections::BTreeMap;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Map, Value};

use crate::record::Query;

use super::fields::Fields;
use super::{Reason, Refusal, envelope, openai};

/// The field that holds a tapped call.
const TRACE: &str = "http_buffered_trace";

/// Returns true where a record is a tapped call or an entry of the gateway's access log.
pub(super) fn is_envoy(fields: &Fields) -> bool {
    fields.get(TRACE).is_some_and(Value::is_object) || fields.has("gen_ai.request.model")
}

/// Reads one record.
pub(super) fn read(mut fields: Fields, kafka_headers: &BTreeMap<String, String>) -> Result<Query, Refusal> {
    if !fields.has(TRACE) {
        return Err(Refusal::skip(Reason::NoContent));
    }
    let mut trace = fields.object(TRACE);
    let (mut request, mut response) = (Side::take(&mut trace, "request"), Side::take(&mut trace, "response"));
    if request.body.is_null() {
        let message =
            "the tapped call has no request body: set max_buffered_rx_bytes of the tap to the largest request";
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

/// One direction of a tapped call.
struct Side {
    headers: Map<String, Value>,
    /// The body as text; null where there is none.
    body: Value,
    /// True where the tap cut the body.
    cut: bool,
    rest: Fields,
}

impl Side {
    fn take(trace: &mut Fields, name: &str) -> Self {
        let mut rest = trace.object(name);
        let mut body = rest.object("body");
        let cut = body.truth(&["truncated"]) == Some(true);
        let text = body.take("as_string").or_else(|| {
            let text = body.get("as_bytes").and_then(Value::as_str).and_then(text_of)?;
            body.take("as_bytes");
            Some(text.into())
        });
        rest.put_rest("body", body.rest());
        Side { headers: headers(&mut rest), body: text.unwrap_or_default(), cut, rest }
    }
}

/// Returns the text of a body in base64, which the model's server may have compressed.
fn text_of(base64: &str) -> Option<String> {
    let bytes = BASE64_STANDARD.decode(base64).ok()?;
    let plain = envelope::open(&bytes).ok()?;
    String::from_utf8(plain.into_owned()).ok()
}

/// Takes a list of headers as an object: so credentials among them are known by their names.
fn headers(side: &mut Fields) -> Map<String, Value> {
    let Some(Value::Array(list)) = side.take("headers") else { return Map::new() };
    let pair = |header: Value| {
        let name = header.get("key")?.as_str()?.to_ascii_lowercase();
        Some((name, header.get("value").cloned().unwrap_or_default()))
    };
    list.into_iter().filter_map(pair).collect()
}
