//! A log format of the user's own: where in a JSON object the parts of a call are.
//!
//! A mapping moves what its pointers (RFC 6901) name into the shape of a raw request and response pair, which is then
//! read like any other. What no pointer names stays in the object: fields with the usual names (`status`, `user`, …) are
//! still recognised, the others end in `extra`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::json::{Map, Value, json};
use crate::record::{Message, Query};

use super::fields::Fields;
use super::{Refusal, openai};

/// Parts of a call that a pointer may name, and the field of a pair that each becomes.
const PARTS: [(&str, &str); 20] = [
    ("request", "request"),
    ("response", "response"),
    ("messages", "messages"),
    ("system", "system"),
    ("tools", "tools"),
    ("params", "params"),
    ("model", "model"),
    ("time", "timestamp"),
    ("duration_ms", "duration_ms"),
    ("status", "status"),
    ("request_id", "request_id"),
    ("trace_id", "trace_id"),
    ("conversation_id", "conversation_id"),
    ("workload", "workload"),
    ("tenant", "tenant"),
    ("user", "client_id"),
    ("served_version", "served_version"),
    ("feedback", "feedback"),
    ("do_not_train", "do_not_train"),
    ("truncated", "truncated"),
];

/// Parts of a request that is put together.
const BODY: [&str; 3] = ["system", "tools", "params"];

/// One log format of your own, tried before the known ones.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Mapping {
    /// A name for it; rows carry it in `extra.mapping`.
    pub name: String,
    /// JSON pointer of a field that tells this format, such as `/event/kind`.
    pub when: String,
    /// What that field holds, as text; empty: anything.
    pub equals: String,
    /// JSON pointers of the parts of a call. Parts: request (a whole body) or messages (a list, or the text of one user
    /// turn) with system, tools, params; model, response (a body or a text), time, duration_ms, status, request_id, trace_id,
    /// conversation_id, workload, tenant, user, served_version, feedback, do_not_train, truncated.
    pub parts: BTreeMap<String, String>,
}

impl Mapping {
    /// Checks names and pointers.
    pub fn validate(&self) -> Result<(), String> {
        if self.name.trim().is_empty() {
            return Err("name is empty: give the format a name".to_owned());
        }
        let pointers = self.parts.iter().map(|(part, pointer)| (format!("parts.{part}"), pointer));
        for (key, pointer) in std::iter::once(("when".to_owned(), &self.when)).chain(pointers) {
            if !pointer.starts_with('/') {
                return Err(format!("{key} is {pointer:?}: write a JSON pointer, such as /a/b"));
            }
        }
        if let Some(part) = self.parts.keys().find(|part| !PARTS.iter().any(|(known, _)| known == part)) {
            let known: Vec<&str> = PARTS.iter().map(|(part, _)| *part).collect();
            return Err(format!("parts.{part} is no part of a call: choose from {}", known.join(", ")));
        }
        let has = |part: &&&str| self.parts.contains_key(**part);
        if let Some(part) = BODY.iter().filter(|_| has(&&"request")).find(has) {
            return Err(format!("parts.{part} goes with messages: a whole request holds its own"));
        }
        match ["request", "messages"].map(|part| self.parts.contains_key(part)) {
            [true, false] | [false, true] => Ok(()),
            [true, true] => Err("parts has both request and messages: keep one".to_owned()),
            [false, false] => Err("parts has neither request nor messages: a row needs a prompt".to_owned()),
        }
    }

    /// Returns true where an object is of this format.
    pub(super) fn matches(&self, record: &Value) -> bool {
        let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let found = record.pointer(&self.when).filter(|value| !value.is_null());
        found.is_some_and(|value| self.equals.is_empty() || text(value) == self.equals)
    }

    /// Reads a record of this format.
    pub(super) fn read(&self, mut record: Value, headers: &BTreeMap<String, String>) -> Result<Query, Refusal> {
        let mut parts: BTreeMap<&str, Value> = BTreeMap::new();
        for (part, pointer) in &self.parts {
            let Some((_, field)) = PARTS.iter().find(|(known, _)| known == part) else { continue };
            if let Some(value) = take(&mut record, pointer).filter(|value| !value.is_null()) {
                parts.insert(field, value);
            }
        }
        let mut pair = match record {
            Value::Object(rest) => Fields::new(rest),
            rest => Fields::new(Map::from_iter([("rest".to_owned(), rest)])),
        };
        if !parts.contains_key("request") {
            let body = request(&mut parts);
            parts.insert("request", body);
        }
        for (field, value) in parts {
            // A field of the record that has the name of a part, but is none, must not be taken for it.
            if let Some(other) = pair.take(field) {
                pair.put_rest(&format!("record.{field}"), other);
            }
            pair.put_rest(field, value);
        }
        let mut query = openai::read(pair, headers, "mapping")?;
        query.extra.insert("mapping", self.name.clone().into());
        Ok(query)
    }
}

/// Makes a request body of its parts.
fn request(parts: &mut BTreeMap<&str, Value>) -> Value {
    let mut body = match parts.remove("params") {
        Some(Value::Object(params)) => params,
        Some(other) => Map::from_iter([("params".to_owned(), other)]),
        None => Map::new(),
    };
    let mut messages = match parts.remove("messages") {
        Some(Value::String(text)) => json!([Message::text("user", text)]),
        Some(messages) => messages,
        None => json!([]),
    };
    if let (Some(content), Value::Array(list)) = (parts.remove("system"), &mut messages) {
        list.insert(0, json!({"role": "system", "content": content}));
    }
    body.insert("messages", messages);
    for field in ["tools", "model"] {
        if let Some(value) = parts.remove(field) {
            body.insert(field.to_owned(), value);
        }
    }
    Value::Object(body)
}

/// Takes a value out of a document.
fn take(document: &mut Value, pointer: &str) -> Option<Value> {
    let (parent, name) = pointer.rsplit_once('/')?;
    let name = name.replace("~1", "/").replace("~0", "~");
    match document.pointer_mut(parent)? {
        Value::Object(map) => map.shift_remove(&name),
        Value::Array(items) => items.get_mut(name.parse::<usize>().ok()?).map(Value::take),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::query_log::format::{Outcome, Rules, read};

    fn mapping() -> Mapping {
        let parts = [
            ("messages", "/q/text"),
            ("system", "/q/rules"),
            ("params", "/q/how"),
            ("response", "/a/0"),
            ("time", "/at"),
            ("user", "/who"),
            ("do_not_train", "/private"),
        ];
        let parts = parts.map(|(part, pointer)| (part.to_owned(), pointer.to_owned())).into();
        Mapping { name: "ours".into(), when: "/kind".into(), equals: "ask".into(), parts }
    }

    fn rules() -> Rules {
        Rules { mappings: vec![mapping()], ..Rules::default() }
    }

    fn row(record: Value) -> Query {
        match read(record.to_string().as_bytes(), &BTreeMap::new(), &rules()).as_slice() {
            [Outcome::Row(query)] => query.as_ref().clone(),
            other => panic!("expected one row: {other:?}"),
        }
    }

    #[test]
    fn a_record_of_the_users_own_format_is_a_row_and_loses_nothing() {
        let query = row(json!({
            "kind": "ask", "at": "2026-03-01T12:00:00Z", "who": "u-1", "status": "warm", "request": 7,
            "q": {"text": "Why?", "rules": "Be brief.", "how": {"temperature": 0.5}, "n": 1}, "a": ["Because."],
        }));
        assert_eq!(query.messages, [Message::text("system", "Be brief."), Message::text("user", "Why?")]);
        assert_eq!(query.response.as_deref(), Some("Because."));
        assert_eq!((query.format, query.user.as_deref(), query.status), ("mapping", Some("u-1"), 200));
        assert_eq!(query.event_time_us, Some(1_772_366_400_000_000));
        assert_eq!(query.params["temperature"], 0.5);
        assert_eq!(query.extra["mapping"], "ours");
        assert_eq!(query.extra["record.request"], 7);
        assert_eq!((&query.extra["q"], &query.extra["status"]), (&json!({"n": 1}), &json!("warm")));
        assert!(query.train_ok);
        let odd = row(
            json!({"kind": "ask", "q": {"text": "Why?", "rules": [{"type": "text", "text": "Be brief."}], "how": "hot"}}),
        );
        assert_eq!(odd.messages[0].content[0]["text"], "Be brief.");
        assert_eq!(odd.extra["request"], json!({"params": "hot"}));
        let query = row(json!({"kind": "ask", "q": {"text": "Why?"}, "private": true}));
        assert_eq!(query.reason.as_deref(), Some("opt_out"));
    }

    #[test]
    fn other_records_are_read_as_ever() {
        let other = json!({"kind": "tell", "q": {"text": "Why?"}});
        assert!(matches!(
            read(other.to_string().as_bytes(), &BTreeMap::new(), &rules()).as_slice(),
            [Outcome::DeadLetter { .. }]
        ));
    }

    #[test]
    fn a_mapping_that_cannot_work_is_refused() {
        let mut bad = mapping();
        bad.parts.insert("answer".into(), "/a".into());
        assert!(bad.validate().unwrap_err().starts_with("parts.answer is no part of a call: choose from request, "));
        bad.parts.remove("answer");
        assert_eq!(bad.validate(), Ok(()));
        bad.parts.insert("request".into(), "/r".into());
        assert_eq!(bad.validate().unwrap_err(), "parts.system goes with messages: a whole request holds its own");
        BODY.iter().for_each(|part| drop(bad.parts.remove(*part)));
        assert_eq!(bad.validate().unwrap_err(), "parts has both request and messages: keep one");
        bad.when = "kind".into();
        assert_eq!(bad.validate().unwrap_err(), "when is \"kind\": write a JSON pointer, such as /a/b");
    }
}
