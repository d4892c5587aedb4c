//! Kong's AI gateway: one log entry a request, with `ai` beside what every Kong entry holds.
//!
//! The bodies lie in `ai.proxy.payload` where `log_payloads` and `log_statistics` are on; before 3.9 the object was
//! called by the plugin's name, in 3.6 its parts lay in `ai` itself. Bodies are texts; a stream is logged as the body it
//! stands for, or, before 3.9, as its plain text. `request` and `response` are the HTTP side without bodies.

use std::collections::BTreeMap;

use crate::json::Value;
use crate::record::Query;

use super::fields::Fields;
use super::{Reason, Refusal, openai};

/// Where the plugin's part of an entry may be, the newest first.
const PROXIES: [&str; 3] = ["proxy", "ai-proxy", "ai-proxy-advanced"];

/// Returns true where a record is an entry of the gateway's.
pub(super) fn is_kong(fields: &Fields) -> bool {
    let Some(ai) = fields.get("ai").and_then(Value::as_object) else { return false };
    let is_flat = ai.contains_key("meta") && ai.contains_key("usage");
    is_flat || PROXIES.iter().any(|name| ai.get(name).is_some_and(Value::is_object))
}

/// Reads one entry.
pub(super) fn read(mut fields: Fields, headers: &BTreeMap<String, String>) -> Result<Query, Refusal> {
    let mut ai = fields.object("ai");
    let Some(request) = take_body(&mut ai, "request") else {
        let message = "the entry has no ai.proxy.payload.request: turn log_payloads and log_statistics on, and raise \
                       client_body_buffer_size where large requests lack it";
        return Err(Refusal::dead(Reason::MissingMessages, message));
    };
    let mut pair = Fields::default();
    pair.put_rest("response", take_body(&mut ai, "response").unwrap_or_default());
    pair.put_rest("request", request);
    let tokens = read_plugin(&mut ai, &mut pair);
    read_http(&mut fields, &mut pair);
    fields.put_rest("ai", ai.rest());
    pair.put_rest("kong", fields.rest());
    let mut query = openai::read(pair, headers, "kong")?;
    query.prompt_tokens = query.prompt_tokens.or(tokens.0);
    query.completion_tokens = query.completion_tokens.or(tokens.1);
    Ok(query)
}

/// Takes one of the bodies from wherever this version put it.
fn take_body(ai: &mut Fields, side: &str) -> Option<Value> {
    let take = |place: &mut Fields| {
        let mut payload = place.object("payload");
        let body = payload.take(side);
        place.put_rest("payload", payload.rest());
        body
    };
    let nested = PROXIES.iter().find_map(|name| {
        let mut proxy = ai.object(name);
        let body = take(&mut proxy);
        ai.put_rest(name, proxy.rest());
        body
    });
    nested.or_else(|| take(ai))
}

/// Takes what the plugin says of the model and the cache, and returns the tokens it counted.
fn read_plugin(ai: &mut Fields, pair: &mut Fields) -> (Option<i64>, Option<i64>) {
    let name = PROXIES.into_iter().find(|name| ai.has(name));
    let mut proxy = match name {
        Some(name) => ai.object(name),
        None => std::mem::take(ai),
    };
    let mut meta = proxy.object("meta");
    if let Some(model) = meta.text(&["response_model", "request_model"]) {
        pair.put_rest("served_version", model);
    }
    proxy.put_rest("meta", meta.rest());
    let cache = proxy.get("cache").and_then(|cache| cache.get("cache_status")?.as_str());
    if cache.is_some_and(|status| status.eq_ignore_ascii_case("hit")) {
        pair.put_rest("cached", true);
    }
    let mut usage = proxy.object("usage");
    // 3.7 counted one token only.
    let prompt = usage.integer(&["prompt_tokens", "prompt_token"]);
    let completion = usage.integer(&["completion_tokens", "completion_token"]);
    proxy.put_rest("usage", usage.rest());
    match name {
        Some(name) => ai.put_rest(name, proxy.rest()),
        None => *ai = proxy,
    }
    (prompt, completion)
}

/// Takes what the gateway says of the call: time, status, headers, route and consumer.
fn read_http(fields: &mut Fields, pair: &mut Fields) {
    let mut http = fields.object("request");
    pair.put_rest("request_id", http.take("id").unwrap_or_default());
    let headers = http.take("headers").unwrap_or_default();
    let names_workload = headers.get("x-workload").is_some();
    pair.put_rest("headers", headers);
    fields.put_rest("request", http.rest());
    let mut answer = fields.object("response");
    pair.put_rest("status", answer.take("status").unwrap_or_default());
    fields.put_rest("response", answer.rest());
    pair.put_rest("timestamp", fields.take("started_at").unwrap_or_default());
    let mut latencies = fields.object("latencies");
    pair.put_rest("duration_ms", latencies.take("request").unwrap_or_default());
    fields.put_rest("latencies", latencies.rest());
    let consumer = fields.take("consumer").unwrap_or_default();
    fields.take("authenticated_entity");
    let who = ["custom_id", "username", "id"].iter().find_map(|name| consumer.get(name).filter(|id| !id.is_null()));
    pair.put_rest("client_id", who.cloned().unwrap_or_default());
    let named = |name: &str| fields.get(name)?.get("name").cloned();
    let place = named("route").or_else(|| named("service")).filter(|_| !names_workload);
    pair.put_rest("workload", place.unwrap_or_default());
}
