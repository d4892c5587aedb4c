//! Rows of Databricks' inference tables: a request and response pair under other names.
//!
//! Three schemas are in use: the classic gateway's (`request_time`, `execution_duration_ms`), the older one of custom
//! models (`timestamp_ms`, `execution_time_ms`, `request_metadata`) and the newer gateway's (`event_time`,
//! `invocation_id`, `latency_ms`). Bodies are strings of JSON and may lack `model`, `id` and `usage`. A custom model's
//! rows with a data frame for input are no chat.

use std::collections::BTreeMap;

use crate::json::Value;
use crate::record::Query;

use super::fields::Fields;
use super::{Reason, Refusal, openai};

/// Names that say what a field is, and the name a pair has for it.
const NAMES: [(&str, &str); 12] = [
    ("databricks_request_id", "request_id"),
    ("invocation_id", "request_id"),
    ("client_request_id", "trace_id"),
    ("timestamp_ms", "timestamp"),
    ("request_time", "timestamp"),
    ("event_time", "timestamp"),
    ("execution_time_ms", "duration_ms"),
    ("served_entity_name", "served_version"),
    ("served_entity_id", "served_version"),
    ("destination_model", "served_version"),
    ("endpoint_name", "workload"),
    ("destination_name", "workload"),
];

/// Returns true where a record has an id that only these tables have.
pub(super) fn is_databricks(fields: &Fields) -> bool {
    fields.has("databricks_request_id") || (fields.has("invocation_id") && fields.get("request").is_some())
}

/// Reads one row.
pub(super) fn read(mut fields: Fields, headers: &BTreeMap<String, String>) -> Result<Query, Refusal> {
    let mut metadata = fields.object("request_metadata");
    if let Some(name) = metadata.text(&["endpoint_name", "model_name"]) {
        fields.put_rest("endpoint_name", name);
    }
    fields.put_rest("request_metadata", metadata.rest());
    // Several calls may share this id; the other is the call's own.
    if fields.has("invocation_id")
        && let Some(shared) = fields.take("request_id")
    {
        fields.put_rest("client_request_id", shared);
    }
    for (name, ours) in NAMES {
        if !fields.has(ours)
            && let Some(value) = fields.take(name)
        {
            fields.put_rest(ours, value);
        }
    }
    // The principal whose rights the call used: an application as often as a person, and never to be stored in clear.
    if let Some(requester) = fields.take("requester") {
        fields.put_rest("client_id", requester);
    }
    match fields.get("request") {
        Some(Value::String(body)) if is_frame(body) => return Err(Refusal::skip(Reason::NotChat)),
        None | Some(Value::Null) => {
            let message = "the row has no request: it was over the table's size limit (logging_error_codes)";
            return Err(Refusal::dead(Reason::MissingMessages, message));
        }
        Some(_) => {}
    }
    openai::read(fields, headers, "databricks")
}

/// Returns true where a body is the input of a model that is no chat model.
fn is_frame(body: &str) -> bool {
    let keys = ["dataframe_split", "dataframe_records", "instances", "inputs"];
    !body.contains("\"messages\"") && keys.iter().any(|key| body.contains(&format!("\"{key}\"")))
}
