//! Late feedback on a call: thumbs, ratings, corrections. It joins its call when a dataset is frozen.

use crate::json::{Map, Value};
use crate::record::{Kind, Query};

use super::fields::Fields;
use super::{Reason, Refusal};

/// Returns a row with nothing in it but its kind and format, to be filled.
pub(super) fn blank(kind: Kind, format: &'static str) -> Query {
    Query {
        kind,
        event_time_us: None,
        request_id: None,
        trace_id: None,
        conversation_id: None,
        workload: None,
        tenant: None,
        model: None,
        served_version: None,
        user: None,
        status: 200,
        duration_ms: None,
        messages: Vec::new(),
        params: Map::new(),
        tools: None,
        response: None,
        finish_reason: None,
        prompt_tokens: None,
        completion_tokens: None,
        feedback: None,
        format,
        redacted: false,
        train_ok: true,
        reason: None,
        sample_weight: 1.0,
        truncated: false,
        extra: Map::new(),
    }
}

/// Returns true where a record is feedback: it says so, or it holds feedback and no call.
pub(super) fn is_feedback(fields: &Fields) -> bool {
    let says_so = fields.get("kind").and_then(Value::as_str) == Some("feedback");
    says_so || (fields.has("feedback") && !fields.has("request") && !fields.has("messages"))
}

/// Reads `{"feedback": …, "request_id": …}`. A record of kind feedback without that field is all feedback.
pub(super) fn read(mut fields: Fields) -> Result<Query, Refusal> {
    let mut query = blank(Kind::Feedback, "feedback");
    fields.take("kind");
    query.request_id = fields.text(&["request_id", "response_id", "completion_id", "inference_id"]);
    query.trace_id = fields.text(&["trace_id"]);
    query.conversation_id = fields.text(&["conversation_id", "session_id"]);
    if query.request_id.is_none() && query.trace_id.is_none() && query.conversation_id.is_none() {
        let message = "the feedback names no call: give request_id, trace_id or conversation_id";
        return Err(Refusal::dead(Reason::MissingRequestId, message));
    }
    query.event_time_us = fields.time(&["timestamp", "event_time", "time", "created_at"]);
    query.workload = fields.text(&["workload", "workload_id"]);
    query.tenant = fields.text(&["tenant", "tenant_id"]);
    query.user = fields.text(&["user", "user_id", "client_id"]);
    query.feedback = fields.take("feedback");
    match query.feedback {
        Some(_) => query.extra = fields.rest(),
        None => query.feedback = Some(Value::Object(fields.rest())),
    }
    query.train_ok = false;
    query.reason = Some("feedback".to_owned());
    Ok(query)
}
