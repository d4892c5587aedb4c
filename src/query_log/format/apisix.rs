//! Apache APISIX: entries of its loggers, with the bodies or with what `ai-proxy` logs of a call.
//!
//! The bodies lie in `request.body` and `response.body` where `include_req_body` and `include_resp_body` are on, cut at
//! 524,288 bytes unless told otherwise, with nothing to mark the cut: a request that was cut is no JSON and a dead letter.
//! `ai-proxy` with `logging.payloads` writes `llm_request`, the messages alone, and `llm_response_text`.

use std::collections::BTreeMap;

use crate::json::{Value, json};
use crate::record::Query;

use super::fields::Fields;
use super::{Reason, Refusal, openai};

/// Returns true where a record is an entry of a logger's.
pub(super) fn is_apisix(fields: &Fields) -> bool {
    let http = fields.get("request").and_then(Value::as_object);
    let is_http = http.is_some_and(|http| http.contains_key("uri") && !http.contains_key("messages"));
    let is_ours = ["llm_summary", "apisix_latency", "route_id"].iter().any(|name| fields.get(name).is_some());
    is_http && is_ours || fields.has("llm_request")
}

/// Reads one entry.
pub(super) fn read(mut fields: Fields, headers: &BTreeMap<String, String>) -> Result<Query, Refusal> {
    let mut pair = Fields::default();
    let (mut http, mut answer) = (fields.object("request"), fields.object("response"));
    let body = http.take("body").or_else(|| fields.take("llm_request"));
    let response = answer.take("body").or_else(|| {
        let mut text = fields.object("llm_response_text");
        let content = text.take("content");
        fields.put_rest("llm_response_text", text.rest());
        content.map(|content| json!({"choices": [{"message": {"content": content}}]}))
    });

    let logged_headers = http.take("headers").unwrap_or_default();
    let names_workload = logged_headers.get("x-workload").is_some();
    pair.put_rest("request_id", logged_headers.get("x-request-id").cloned().unwrap_or_default());
    pair.put_rest("headers", logged_headers);
    pair.put_rest("status", answer.take("status").unwrap_or_default());
    pair.put_rest("timestamp", fields.take("start_time").unwrap_or_default());
    pair.put_rest("duration_ms", fields.take("latency").unwrap_or_default());
    let consumer = fields.take("consumer").unwrap_or_default();
    pair.put_rest("client_id", consumer.get("username").cloned().unwrap_or_default());
    let route = ["route_name", "route_id"].iter().find_map(|name| fields.get(name).filter(|id| !id.is_null()));
    let route = route.filter(|_| !names_workload).cloned();
    pair.put_rest("workload", route.unwrap_or_default());
    let summary = read_summary(&mut fields, &mut pair);
    fields.put_rest("request", http.rest());
    fields.put_rest("response", answer.rest());
    pair.put_rest("apisix", fields.rest());
    let Some(body) = body else {
        let message = "the entry has no body: turn include_req_body on, or logging.payloads of ai-proxy";
        return Err(Refusal::dead(Reason::MissingMessages, message));
    };
    pair.put_rest("request", body);
    pair.put_rest("response", response.unwrap_or_default());
    let mut query = openai::read(pair, headers, "apisix")?;
    query.model = query.model.take().or(summary.model);
    query.prompt_tokens = query.prompt_tokens.or(summary.prompt_tokens);
    query.completion_tokens = query.completion_tokens.or(summary.completion_tokens);
    Ok(query)
}

/// What `ai-proxy` counted.
struct Summary {
    model: Option<String>,
    prompt_tokens: Option<i64>,
    completion_tokens: Option<i64>,
}

fn read_summary(fields: &mut Fields, pair: &mut Fields) -> Summary {
    let mut summary = fields.object("llm_summary");
    if let Some(model) = summary.text(&["model"]) {
        pair.put_rest("served_version", model);
    }
    if let Some(user) = summary.text(&["end_user_id"]) {
        pair.put_rest("client_id", user);
    }
    let model = summary.text(&["request_model"]);
    let prompt_tokens = summary.integer(&["prompt_tokens"]);
    let completion_tokens = summary.integer(&["completion_tokens"]);
    fields.put_rest("llm_summary", summary.rest());
    Summary { model, prompt_tokens, completion_tokens }
}
