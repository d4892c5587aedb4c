//! LiteLLM's `StandardLoggingPayload`, as its callbacks and webhooks send it.
//!
//! Its traps: times are epoch seconds as floats; `response_time` is the time to the first token, so the duration is
//! `endTime - startTime`; `messages` and `response` may each be a list, an object or a string, masked or not; a failed
//! call may hold the whole prompt; a cached answer is no new sample of the model.

use std::collections::BTreeMap;

use crate::json::{Map, Value};
use crate::record::{Kind, Message, Query};

use super::chat::{self, Answer};
use super::exclusion::{self, Exclusion, INTERNAL_USER};
use super::fields::{Fields, Headers};
use super::{Reason, Refusal, feedback, openai, responses};

/// Call types of the Responses API, whose input items the payload calls messages.
const RESPONSES: [&str; 2] = ["responses", "aresponses"];

/// The call type of a legacy completion, whose prompt is raw text.
const COMPLETIONS: [&str; 2] = ["text_completion", "atext_completion"];

/// Call types without a chat in them; an `a` in front is the asynchronous form.
const NOT_CHAT: [&str; 18] = [
    "embedding",
    "image_generation",
    "image_edit",
    "image_variation",
    "moderation",
    "transcription",
    "speech",
    "rerank",
    "search",
    "ocr",
    "create_batch",
    "create_file",
    "create_fine_tuning_job",
    "create_video",
    "video_generation",
    "vector_store_create",
    "vector_store_search",
    "list_batches",
];

/// Returns true where the record has the fields that every such payload has and no other format.
pub(super) fn is_litellm(fields: &Fields) -> bool {
    let has_call = fields.has("call_type") && (fields.has("startTime") || fields.has("id"));
    has_call || fields.has("model_map_information")
}

/// Reads a payload inside the callback's keyword arguments, which some loggers send whole.
pub(super) fn read_wrapped(mut fields: Fields, headers: &BTreeMap<String, String>) -> Result<Query, Refusal> {
    let payload = fields.object("standard_logging_object");
    fields.put_rest("standard_logging_object", Value::Null);
    let mut query = read(payload, headers)?;
    // The arguments have fields of the payload's names.
    for (name, value) in fields.rest() {
        let name = if query.extra.contains_key(&name) { format!("kwargs.{name}").into() } else { name };
        query.extra.insert(name, value);
    }
    Ok(query)
}

/// Reads one payload.
pub(super) fn read(mut fields: Fields, kafka_headers: &BTreeMap<String, String>) -> Result<Query, Refusal> {
    if fields.get("call_type").and_then(Value::as_str).is_some_and(is_other_call) {
        return Err(Refusal::skip(Reason::NotChat));
    }
    let logged_headers = fields.take("headers");
    // Of the caller's headers the proxy passes those on that begin with `x-`.
    let passed = fields.get("metadata").and_then(|metadata| metadata.get("requester_custom_headers")).cloned();
    let mut headers = Headers::new(kafka_headers, logged_headers.as_ref());
    passed.iter().for_each(|passed| headers.add(passed));
    let mut query = feedback::blank(Kind::Call, "litellm");
    let mut found = Vec::new();

    read_prompt(&mut query, &mut fields, &mut found)?;
    read_times(&mut query, &mut fields);
    read_identity(&mut query, &mut fields, &mut found);
    query.workload = workload(&mut query, &mut fields, &headers, &mut found);
    let answer = fields.take("response").map(chat::answer).unwrap_or_default();
    query.status = status(&mut fields, &answer);
    query.truncated = answer.truncated;
    if fields.truth(&["cache_hit"]) == Some(true) {
        found.push(Exclusion::Cached);
    }
    query.prompt_tokens = fields.integer(&["prompt_tokens"]);
    query.completion_tokens = fields.integer(&["completion_tokens"]);
    query.request_id = fields.text(&["id"]);
    query.model =
        fields.text(&["model_group"]).or_else(|| fields.get("model").and_then(Value::as_str).map(str::to_owned));
    openai::take_answer(&mut query, answer);
    query.served_version = query.served_version.take().or_else(|| fields.text(&["model"]));
    let is_told = fields
        .get("model")
        .and_then(Value::as_str)
        .is_some_and(|model| [&query.model, &query.served_version].iter().any(|told| told.as_deref() == Some(model)));
    if is_told {
        fields.take("model");
    }

    if let Some(logged) = logged_headers.clone() {
        fields.put_rest("headers", logged);
    }
    let rest_of_answer = query.extra.shift_remove("response").unwrap_or_default();
    fields.put_rest("response", rest_of_answer);
    query.extra = fields.rest();
    exclusion::mark(&mut query, &headers, found);
    Ok(query)
}

/// Takes messages, tools and decoding parameters of either interface.
fn read_prompt(query: &mut Query, fields: &mut Fields, found: &mut Vec<Exclusion>) -> Result<(), Refusal> {
    let call_type = fields.get("call_type").and_then(Value::as_str).unwrap_or_default().to_owned();
    let is_responses = RESPONSES.contains(&call_type.as_str());
    let input = fields.take("messages").ok_or_else(missing)?;
    let mut parameters = fields.object("model_parameters");
    if is_responses {
        parameters.put_rest("input", items(input)?);
        responses::read_prompt(query, &mut parameters, found)?;
        fields.put_rest("messages", parameters.take("input").unwrap_or_default());
    } else {
        query.messages = messages(input)?;
        if COMPLETIONS.contains(&call_type.as_str()) {
            found.push(Exclusion::RawPrompt);
        }
        // Anthropic's interface has the system prompt beside the messages.
        if let Some(system) = parameters.take("system") {
            query.messages.insert(0, Message { role: "system".into(), content: system, rest: Map::new() });
        }
        query.tools = parameters.take("tools");
        query.params = chat::params(&mut parameters);
    }
    query.user = parameters.text(&["user"]);
    fields.put_rest("model_parameters", parameters.rest());
    Ok(())
}

/// Returns the input of a call of the Responses API: a text, or a list of items, which may have been written as text.
fn items(input: Value) -> Result<Value, Refusal> {
    match input {
        Value::String(text) if text.trim().is_empty() => Err(missing()),
        Value::String(text) => match super::parse(text.trim().as_bytes()) {
            Ok(list @ Value::Array(_)) => Ok(list),
            _ => Ok(Value::String(text)),
        },
        item @ Value::Object(_) => Ok(Value::Array(vec![item])),
        other => Ok(other),
    }
}

fn missing() -> Refusal {
    Refusal::dead(Reason::MissingMessages, "the payload has no messages: is message logging off?")
}

fn is_other_call(call_type: &str) -> bool {
    NOT_CHAT.iter().any(|other| call_type == *other || call_type.strip_prefix('a') == Some(other))
}

/// Reads messages of any of their shapes. A plain string, masked or not, is one user turn.
fn messages(value: Value) -> Result<Vec<Message>, Refusal> {
    match value {
        Value::String(text) => match super::parse(text.trim().as_bytes()) {
            Ok(inner @ (Value::Array(_) | Value::Object(_))) => listed(inner),
            _ if text.trim().is_empty() => Err(missing()),
            _ => Ok(vec![Message::text("user", text)]),
        },
        other => listed(other),
    }
}

/// Reads messages that are a list, one message, or an object with a list in it.
fn listed(value: Value) -> Result<Vec<Message>, Refusal> {
    match value {
        Value::Object(mut map) if !map.contains_key("role") => match map.shift_remove("messages") {
            Some(inner @ Value::Array(_)) => chat::messages(inner),
            _ => Err(Refusal::dead(
                Reason::BadMessages,
                "messages is an object with neither a role nor messages: log them as they were sent",
            )),
        },
        message @ Value::Object(_) => chat::messages(Value::Array(vec![message])),
        list => chat::messages(list),
    }
}

/// Takes start and end; the end is the start plus the duration, so no column of its own is needed.
fn read_times(query: &mut Query, fields: &mut Fields) {
    query.event_time_us = fields.time(&["startTime"]);
    if let (Some(start), Some(end)) = (query.event_time_us, fields.get("endTime").and_then(super::fields::time))
        && end >= start
    {
        query.duration_ms = Some((end - start) as f64 / 1e3);
        fields.take("endTime");
    }
}

/// Takes who asked and what the call belongs to. The end user of the request comes before the owner of the key.
fn read_identity(query: &mut Query, fields: &mut Fields, found: &mut Vec<Exclusion>) {
    let end_user = fields.text(&["end_user"]);
    query.trace_id = fields.text(&["trace_id"]);
    let session = || fields.text(&["litellm_session_id", "session_id"]);
    query.conversation_id = query.conversation_id.take().or_else(session);
    let mut metadata = fields.object("metadata");
    let session = metadata.text(&["litellm_session_id", "session_id", "conversation_id"]);
    query.conversation_id = query.conversation_id.take().or(session);
    query.tenant = metadata.text(&["tenant", "user_api_key_team_id", "user_api_key_team_alias", "user_api_key_org_id"]);
    let owner = metadata.text(&["user_api_key_end_user_id", "user_id", "user_api_key_user_id"]);
    query.workload = metadata.text(&["workload", "workload_id"]);
    // Each is looked at: both are taken.
    if [exclusion::takes_opt_out(fields), exclusion::takes_opt_out(&mut metadata)].contains(&true) {
        found.push(Exclusion::OptOut);
    }
    let users = [end_user, query.user.take(), owner];
    if users.iter().flatten().any(|user| user == INTERNAL_USER) {
        found.push(Exclusion::Own);
    }
    query.user = users.into_iter().flatten().next();
    for name in ["requester_metadata", "spend_logs_metadata"] {
        let mut inner = metadata.object(name);
        read_requester(query, &mut inner, found);
        metadata.put_rest(name, inner.rest());
    }
    fields.put_rest("metadata", metadata.rest());
}

/// Takes what the caller put into the request's own metadata.
fn read_requester(query: &mut Query, metadata: &mut Fields, found: &mut Vec<Exclusion>) {
    query.workload = query.workload.take().or_else(|| metadata.text(&["workload", "workload_id"]));
    query.tenant = query.tenant.take().or_else(|| metadata.text(&["tenant", "tenant_id"]));
    query.conversation_id = query.conversation_id.take().or_else(|| metadata.text(&["conversation_id", "session_id"]));
    let user = metadata.text(&["user", "user_id"]);
    if user.as_deref() == Some(INTERNAL_USER) {
        found.push(Exclusion::Own);
    }
    query.user = query.user.take().or(user);
    if exclusion::takes_opt_out(metadata) {
        found.push(Exclusion::OptOut);
    }
}

/// Returns the workload: what the caller named, a tag `workload:NAME`, the only tag there is, or the model group. The
/// tags stay in `extra`.
fn workload(
    query: &mut Query,
    fields: &mut Fields,
    headers: &Headers<'_>,
    found: &mut Vec<Exclusion>,
) -> Option<String> {
    let tags = fields.get("request_tags").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    // LiteLLM adds the user agent as a tag of its own.
    let tags: Vec<&str> = tags.iter().filter_map(Value::as_str).filter(|tag| !tag.starts_with("User-Agent:")).collect();
    let is_opt_out = |tag: &&str| matches!(*tag, "do_not_train" | "do-not-train");
    if tags.iter().any(is_opt_out) {
        found.push(Exclusion::OptOut);
    }
    let tags: Vec<&str> = tags.into_iter().filter(|tag| !is_opt_out(tag)).collect();
    let named = tags.iter().find_map(|tag| tag.strip_prefix("workload:").or_else(|| tag.strip_prefix("workload=")));
    let only = if let [tag] = tags.as_slice() { Some(*tag) } else { None };
    let group = fields.get("model_group").and_then(Value::as_str);
    let told = || headers.get("x-workload").or(named).or(only).or(group).map(|name| name.trim().to_owned());
    query.workload.take().or_else(told).filter(|name| !name.is_empty())
}

/// Returns the call's status; a failure without a code counts as 500.
fn status(fields: &mut Fields, answer: &Answer) -> i32 {
    let error = fields.get("error_information");
    let code = error.and_then(|error| chat::http_status(error.get("error_code")?)).filter(|code| *code >= 400);
    let said = fields.get("status").and_then(Value::as_str).map(str::to_owned);
    let status = match said.as_deref() {
        Some("success") => answer.error_status.unwrap_or(200),
        Some("failure") => code.or(answer.error_status).unwrap_or(500),
        _ => code.or(answer.error_status).unwrap_or(if fields.has("error_str") { 500 } else { 200 }),
    };
    if matches!(said.as_deref(), Some("success" | "failure")) {
        fields.take("status");
    }
    status
}
