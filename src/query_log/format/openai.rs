//! Raw request/response pairs: what a proxy or a server logs around OpenAI's interface.
//!
//! `{timestamp?, request, response?, status?, duration_ms?, workload_id?, client_id?, served_version?, …}`, where the
//! bodies are objects or strings of JSON, and the response may be a stream of server-sent events. The request is one of
//! chat completions, of the Responses API or a legacy completion with one text as its prompt; any other is no chat.
//! Gateways that log the same bodies in other places bring their records into this shape first.

use std::collections::BTreeMap;

use crate::json::Value;
use crate::record::{Kind, Message, Query};

use super::chat::{self, Answer};
use super::exclusion::{self, Exclusion, INTERNAL_USER};
use super::fields::{Fields, Headers, kind_of};
use super::{Reason, Refusal, feedback, responses};

/// Returns true where the record holds a request.
pub(super) fn is_pair(fields: &Fields) -> bool {
    fields.has("request")
}

/// Reads a pair; `format` is the name that its row carries.
pub(super) fn read(
    mut fields: Fields,
    kafka_headers: &BTreeMap<String, String>,
    format: &'static str,
) -> Result<Query, Refusal> {
    let logged_headers = fields.take("headers").or_else(|| fields.take("request_headers"));
    let headers = Headers::new(kafka_headers, logged_headers.as_ref());
    let mut request = request_of(&mut fields)?;
    let mut query = feedback::blank(Kind::Call, format);
    let mut found = Vec::new();

    read_prompt(&mut query, &mut request, fields.get("response"), &mut found)?;
    query.model = request.text(&["model"]).or_else(|| fields.text(&["model"]));
    query.user = request.text(&["user"]);
    let mut metadata = request.object("metadata");
    read_metadata(&mut query, &mut metadata, &mut found);
    request.put_rest("metadata", metadata.rest());

    let answer = fields.take("response").map(chat::answer).unwrap_or_default();
    read_surroundings(&mut query, &mut fields, &answer, &headers, &mut found);
    take_answer(&mut query, answer);

    if let Some(logged) = logged_headers.clone() {
        fields.put_rest("headers", logged);
    }
    fields.put_rest("request", request.rest());
    let rest_of_answer = query.extra.shift_remove("response").unwrap_or_default();
    fields.put_rest("response", rest_of_answer);
    query.extra = fields.rest();
    exclusion::mark(&mut query, &headers, found);
    Ok(query)
}

fn request_of(fields: &mut Fields) -> Result<Fields, Refusal> {
    match fields.embedded("request") {
        Some(Ok(Value::Object(map))) => Ok(Fields::new(map)),
        Some(Ok(other)) => Err(Refusal::dead(
            Reason::BadRequest,
            format!("request holds {}, not an object: log the body as it was sent", kind_of(&other)),
        )),
        Some(Err(refusal)) => {
            let why = refusal.message.unwrap_or_else(|| "it is empty".to_owned());
            let is_limit = matches!(refusal.reason, Reason::TooDeep | Reason::TooManyItems);
            let reason = if is_limit { refusal.reason } else { Reason::BadRequest };
            Err(Refusal::dead(reason, format!("request is a string that holds no JSON ({why}): log the whole body")))
        }
        None => Err(Refusal::dead(Reason::BadRequest, "the record has no request: log the whole body")),
    }
}

/// Takes messages, tools and decoding parameters of any of the three interfaces.
fn read_prompt(
    query: &mut Query,
    request: &mut Fields,
    response: Option<&Value>,
    found: &mut Vec<Exclusion>,
) -> Result<(), Refusal> {
    if responses::is_request(request, response) {
        return responses::read_prompt(query, request, found);
    }
    query.messages = match request.take("messages") {
        Some(messages) => chat::messages(messages)?,
        None => {
            found.push(Exclusion::RawPrompt);
            vec![Message::text("user", raw_prompt(request, response)?)]
        }
    };
    query.tools = request.take("tools");
    query.params = chat::params(request);
    Ok(())
}

/// Takes the prompt of a legacy completion. Images and embeddings have fields of the same names, but no such answer.
fn raw_prompt(request: &mut Fields, response: Option<&Value>) -> Result<String, Refusal> {
    let Some(name) = ["prompt", "input"].into_iter().find(|name| request.has(name)) else {
        return Err(Refusal::dead(Reason::MissingMessages, "the request has no messages: log the whole body"));
    };
    let is_completion = match response {
        Some(Value::String(text)) => text.contains("\"choices\""),
        Some(body) => body.get("choices").is_some() || body.is_array(),
        None => request.has("max_tokens"),
    };
    if name == "input" || !is_completion {
        let message = format!("the request has `{name}` and no messages: it is no chat");
        return Err(Refusal::dead(Reason::NotChat, message));
    }
    let refuse = |what: &str| Err(Refusal::dead(Reason::BadRequest, format!("the prompt is {what}")));
    match request.take("prompt") {
        Some(Value::String(text)) => Ok(text),
        Some(Value::Array(prompts)) => match prompts.as_slice() {
            [Value::String(text)] => Ok(text.clone()),
            [Value::String(_), ..] => refuse("a list of several texts: log one prompt a record"),
            _ => refuse("a list of token ids: log its text"),
        },
        _ => refuse("neither a text nor a list with one"),
    }
}

/// Takes what callers put into `metadata`.
fn read_metadata(query: &mut Query, metadata: &mut Fields, found: &mut Vec<Exclusion>) {
    query.workload = metadata.text(&["workload", "workload_id"]);
    query.tenant = metadata.text(&["tenant", "tenant_id"]);
    query.trace_id = metadata.text(&["trace_id"]);
    let conversation = || metadata.text(&["conversation_id", "session_id"]);
    query.conversation_id = query.conversation_id.take().or_else(conversation);
    let user = metadata.text(&["user", "user_id", "end_user"]);
    if user.as_deref() == Some(INTERNAL_USER) {
        found.push(Exclusion::Own);
    }
    query.user = query.user.take().or(user);
    if exclusion::takes_opt_out(metadata) {
        found.push(Exclusion::OptOut);
    }
}

/// Takes what the logger wrote beside the bodies.
fn read_surroundings(
    query: &mut Query,
    fields: &mut Fields,
    answer: &Answer,
    headers: &Headers<'_>,
    found: &mut Vec<Exclusion>,
) {
    let header = |name: &str| headers.get(name).map(str::to_owned);
    query.event_time_us = fields.time(&["timestamp", "event_time", "request_time", "time", "created_at"]);
    query.duration_ms = fields.number(&["duration_ms", "latency_ms", "execution_duration_ms"]).filter(|ms| *ms >= 0.0);
    query.request_id = fields.text(&["request_id"]);
    query.trace_id = query.trace_id.take().or_else(|| fields.text(&["trace_id"]));
    query.conversation_id = query.conversation_id.take().or_else(|| fields.text(&["conversation_id", "session_id"]));
    let workload = query.workload.take().or_else(|| fields.text(&["workload_id", "workload"]));
    query.workload = workload.or_else(|| header("x-workload"));
    query.tenant = query.tenant.take().or_else(|| fields.text(&["tenant", "tenant_id"])).or_else(|| header("x-tenant"));
    let client = fields.text(&["client_id", "end_user", "user", "user_id"]);
    if client.as_deref() == Some(INTERNAL_USER) {
        found.push(Exclusion::Own);
    }
    query.user = query.user.take().or(client);
    query.served_version = fields.text(&["served_version"]);
    query.feedback = fields.take("feedback");
    query.sample_weight = sample_weight(fields);
    if fields.truth(&["cache_hit", "cached"]) == Some(true) {
        found.push(Exclusion::Cached);
    }
    if exclusion::takes_opt_out(fields) {
        found.push(Exclusion::OptOut);
    }
    query.truncated = fields.truth(&["truncated"]) == Some(true) || answer.truncated || says_cut(fields);
    query.status = status_of(fields, answer);
}

/// Returns true where the logger reports that a body was over its limit.
fn says_cut(fields: &Fields) -> bool {
    let codes = fields.get("logging_error_codes").and_then(Value::as_array);
    codes.is_some_and(|codes| codes.iter().any(|code| code.as_str().is_some_and(|c| c.contains("SIZE_EXCEEDED"))))
}

fn sample_weight(fields: &mut Fields) -> f64 {
    let usable = |weight: &f64| weight.is_finite() && *weight > 0.0;
    if let Some(weight) = fields.number(&["sample_weight"]).filter(usable) {
        return weight;
    }
    fields.number(&["sampling_fraction"]).filter(|f| *f <= 1.0).map(f64::recip).filter(usable).unwrap_or(1.0)
}

/// Returns the call's status: the logged one, that of an error body, or 200.
fn status_of(fields: &mut Fields, answer: &Answer) -> i32 {
    for name in ["status", "status_code"] {
        let said = fields.get(name).and_then(|value| match value.as_str() {
            Some("success" | "ok" | "OK") => Some(200),
            Some("failure" | "error" | "failed") => Some(answer.error_status.unwrap_or(500)),
            _ => chat::http_status(value),
        });
        if let Some(status) = said {
            fields.take(name);
            return status;
        }
    }
    let beside = fields.get("error").filter(|error| !error.is_null()).map(chat::error_status);
    answer.error_status.or(beside).unwrap_or(200)
}

/// Moves an answer into its columns; what no column takes goes to `extra.response`, also an id or a model where the
/// logger names another.
pub(super) fn take_answer(query: &mut Query, answer: Answer) {
    query.request_id = query.request_id.take().or_else(|| answer.id.clone());
    query.served_version = query.served_version.take().or_else(|| answer.model.clone());
    query.model = query.model.take().or_else(|| answer.model.clone());
    let mut rest = answer.rest;
    if let Value::Object(rest) = &mut rest {
        let id = answer.id.filter(|id| query.request_id.as_ref() != Some(id));
        rest.extend(id.map(|id| ("id".to_owned(), id.into())));
        let is_new = |model: &String| [&query.served_version, &query.model].iter().all(|m| m.as_ref() != Some(model));
        rest.extend(answer.model.filter(is_new).map(|model| ("model".to_owned(), model.into())));
    }
    query.response = answer.text;
    query.finish_reason = answer.finish_reason;
    query.prompt_tokens = query.prompt_tokens.or(answer.prompt_tokens);
    query.completion_tokens = query.completion_tokens.or(answer.completion_tokens);
    query.extra.insert("response", rest);
}
