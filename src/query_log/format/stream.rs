//! Streamed answers: chunks, logged as server-sent events or as a list, joined into the body they stand for.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::parse;

/// Most entries of one list (tool calls, choices, texts) that chunks may build; more marks the answer as incomplete.
const MAX_ENTRIES: usize = 256;

/// Fields of a delta that are names, not pieces of text: a later one replaces the earlier.
const NAMES: [&str; 5] = ["role", "type", "id", "name", "object"];

/// A body joined from chunks.
#[derive(Debug, Default)]
pub(super) struct Joined {
    pub(super) body: Map<String, Value>,
    /// True where the stream came to its end: a finish reason or `[DONE]` was seen and every chunk was understood.
    pub(super) complete: bool,
}

/// Returns true where a list is one of chunks: completion chunks, or event lines.
pub(super) fn are_chunks(items: &[Value]) -> bool {
    let is_chunk = |item: &Value| {
        item.get("object").is_some_and(|object| object == "chat.completion.chunk" || object == "text_completion")
            || item.pointer("/choices/0/delta").is_some()
            || item.get("type").and_then(Value::as_str).is_some_and(|kind| kind.starts_with("response."))
            || item.as_str().is_some_and(|line| line.trim_start().starts_with("data:"))
    };
    items.first().is_some_and(is_chunk)
}

/// Joins a list of chunks.
pub(super) fn join(chunks: Vec<Value>) -> Joined {
    let mut joiner = Joiner::default();
    for chunk in chunks {
        match chunk {
            Value::String(lines) => lines.lines().for_each(|line| joiner.line(line)),
            Value::Object(chunk) => joiner.chunk(chunk),
            _ => joiner.broken = true,
        }
    }
    joiner.end()
}

/// Joins server-sent events. `None` where the text is none: no line before the first `data:` but comments and fields.
///
/// Each `data:` line is one event, as every chat server writes it; so a log that lost the blank lines is read too.
pub(super) fn events(text: &str) -> Option<Joined> {
    let first = text.lines().map(str::trim).find(|line| !line.is_empty())?;
    let is_field = |name: &str| first.starts_with(name);
    if !["data:", "event:", "id:", "retry:", ": ", ":"].into_iter().any(is_field) {
        return None;
    }
    if !text.lines().any(|line| line.trim_start().starts_with("data:")) {
        return None;
    }
    let mut joiner = Joiner::default();
    text.split(['\n', '\r']).for_each(|line| joiner.line(line));
    Some(joiner.end())
}

#[derive(Debug, Default)]
struct Joiner {
    body: Map<String, Value>,
    choices: BTreeMap<i64, Map<String, Value>>,
    /// The newest state of an answer of the Responses API: its last event carries the whole.
    response: Option<Map<String, Value>>,
    /// Its texts so far, by item and part, for a stream that breaks off.
    texts: BTreeMap<(i64, i64), String>,
    done: bool,
    broken: bool,
}

impl Joiner {
    fn line(&mut self, line: &str) {
        let Some(data) = line.trim().strip_prefix("data:").map(str::trim) else { return };
        if data == "[DONE]" {
            self.done = true;
            return;
        }
        match parse(data.as_bytes()) {
            Ok(Value::Object(chunk)) => self.chunk(chunk),
            _ => self.broken |= !data.is_empty(),
        }
    }

    fn chunk(&mut self, mut chunk: Map<String, Value>) {
        if let Some(kind) = chunk.get("type").and_then(Value::as_str).filter(|kind| kind.starts_with("response.")) {
            let kind = kind.to_owned();
            return self.event(&kind, chunk);
        }
        if let Some(Value::Array(choices)) = chunk.shift_remove("choices") {
            choices.into_iter().for_each(|choice| self.choice(choice));
        }
        // The first chunk names id and model; the usage comes with the last.
        for (name, value) in chunk {
            let is_new = !value.is_null() && (name == "usage" || name == "error" || !self.body.contains_key(&name));
            if is_new {
                self.body.insert(name, value);
            }
        }
    }

    /// Takes an event of the Responses API.
    fn event(&mut self, kind: &str, mut event: Map<String, Value>) {
        if let Some(Value::Object(response)) = event.shift_remove("response") {
            self.response = Some(response);
            self.done |= matches!(kind, "response.completed" | "response.incomplete" | "response.failed");
        } else if let ("response.output_text.delta", Some(Value::String(more))) = (kind, event.get("delta")) {
            let index = |name: &str| event.get(name).and_then(Value::as_i64).unwrap_or(0);
            let at = (index("output_index"), index("content_index"));
            if self.texts.contains_key(&at) || self.texts.len() < MAX_ENTRIES {
                self.texts.entry(at).or_default().push_str(more);
            } else {
                self.broken = true;
            }
        }
    }

    fn choice(&mut self, choice: Value) {
        let Value::Object(mut choice) = choice else {
            self.broken = true;
            return;
        };
        let index = choice.get("index").and_then(Value::as_i64).unwrap_or(0);
        if !self.choices.contains_key(&index) && self.choices.len() >= MAX_ENTRIES {
            self.broken = true;
            return;
        }
        let joined = self.choices.entry(index).or_default();
        if let Some(Value::Object(delta)) = choice.shift_remove("delta") {
            let message = joined.entry("message").or_insert_with(|| Value::Object(Map::new()));
            self.broken |= !merge(message, Value::Object(delta));
        }
        let mut joined_value = Value::Object(std::mem::take(joined));
        self.broken |= !merge(&mut joined_value, Value::Object(choice));
        if let Value::Object(map) = joined_value {
            *joined = map;
        }
    }

    fn end(mut self) -> Joined {
        if self.response.is_some() || !self.texts.is_empty() {
            return self.end_of_response();
        }
        let is_over = |choice: &Map<String, Value>| choice.get("finish_reason").is_some_and(Value::is_string);
        let all_over = !self.choices.is_empty() && self.choices.values().all(is_over);
        if !self.choices.is_empty() {
            let choices = self.choices.into_values().map(Value::Object).collect();
            self.body.insert("choices".into(), Value::Array(choices));
        }
        Joined { body: self.body, complete: (self.done || all_over) && !self.broken }
    }

    fn end_of_response(self) -> Joined {
        let complete = self.done && !self.broken;
        let mut body = self.response.unwrap_or_default();
        body.extend(self.body.into_iter().filter(|(name, _)| name == "error"));
        if !self.done {
            let message = |text| json!({"type": "message", "content": [{"type": "output_text", "text": text}]});
            body.insert("output".into(), self.texts.into_values().map(message).collect());
        }
        Joined { body, complete }
    }
}

/// Adds a delta: text is appended, lists with an `index` are joined by it, the rest replaces. False where a limit was
/// reached and something was left out.
fn merge(into: &mut Value, delta: Value) -> bool {
    let (Value::Object(target), Value::Object(delta)) = (into, delta) else { return false };
    let mut whole = true;
    for (name, value) in delta {
        let is_name = NAMES.contains(&name.as_str()) || name == "finish_reason";
        match (target.get_mut(&name), value) {
            (_, Value::Null) => {}
            (Some(Value::String(text)), Value::String(more)) if !is_name => text.push_str(&more),
            (Some(old @ Value::Object(_)), more @ Value::Object(_)) => whole &= merge(old, more),
            (Some(Value::Array(list)), Value::Array(more)) => whole &= merge_list(list, more),
            (None, Value::Array(more)) => {
                let mut list = Vec::new();
                whole &= merge_list(&mut list, more);
                target.insert(name, Value::Array(list));
            }
            (_, value) => {
                target.insert(name, value);
            }
        }
    }
    whole
}

fn merge_list(list: &mut Vec<Value>, more: Vec<Value>) -> bool {
    let mut whole = true;
    for item in more {
        let Some(index) = item.get("index").and_then(Value::as_i64) else {
            list.push(item);
            continue;
        };
        let has_index = |known: &Value| known.get("index").and_then(Value::as_i64) == Some(index);
        match list.iter().take(MAX_ENTRIES).position(has_index) {
            Some(at) => whole &= merge(&mut list[at], item),
            None if list.len() < MAX_ENTRIES => list.push(item),
            None => whole = false,
        }
    }
    whole
}
