//! Streamed answers: chunks, logged as server-sent events or as a list, joined into the body they stand for.

use std::collections::BTreeMap;

use super::parse;
use crate::json::{Map, Value, json};

/// Most entries of one list (tool calls, choices, texts) that chunks may build; more marks the answer as incomplete.
const MAX_ENTRIES: usize = 256;

/// Fields of a delta that are names, not pieces of text: a later one replaces the earlier.
const NAMES: [&str; 5] = ["role", "type", "id", "name", "object"];

/// A body joined from chunks.
#[derive(Debug, Default)]
pub(super) struct Joined {
    pub(super) body: Map,
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
            other => joiner.unread.push(other),
        }
    }
    joiner.end()
}

/// Joins server-sent events. `None` where the text is none: no line before the first `data:` but comments and fields, and
/// an event that can be read.
///
/// Each `data:` line is one event, as every chat server writes it; so a log that lost the blank lines is read too.
pub(super) fn events(text: &str) -> Option<Joined> {
    let first = text.lines().map(str::trim).find(|line| !line.is_empty())?;
    let is_field = |name: &str| first.starts_with(name);
    if !["data:", "event:", "id:", "retry:", ": ", ":"].into_iter().any(is_field) {
        return None;
    }
    let mut joiner = Joiner::default();
    text.split(['\n', '\r']).for_each(|line| joiner.line(line));
    (joiner.done || joiner.was_read).then(|| joiner.end())
}

#[derive(Debug, Default)]
struct Joiner {
    body: Map,
    choices: BTreeMap<i64, Map>,
    /// The newest state of an answer of the Responses API: its last event carries the whole.
    response: Option<Map>,
    /// Its output items so far, for a stream that breaks off.
    items: BTreeMap<i64, Item>,
    /// True once the end was seen.
    done: bool,
    /// True once an event was read.
    was_read: bool,
    /// What could not be read, or has no place in a body. It is kept beside it.
    unread: Vec<Value>,
}

/// An output item that comes in pieces.
#[derive(Debug, Default)]
struct Item {
    item: Map,
    /// Texts by part.
    texts: BTreeMap<i64, String>,
    arguments: String,
    /// Pieces of other kinds, by the event's name.
    others: Map,
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
            _ if data.is_empty() => {}
            _ => self.unread.push(data.into()),
        }
    }

    fn chunk(&mut self, mut chunk: Map) {
        self.was_read = true;
        let kind = chunk.get("type").and_then(Value::as_str).unwrap_or_default().to_owned();
        if kind.starts_with("response.") {
            return self.event(&kind, chunk);
        }
        if kind == "error" && !chunk.contains_key("choices") {
            self.body.insert(kind, Value::Object(chunk));
            return;
        }
        if let Some(Value::Array(choices)) = chunk.shift_remove("choices") {
            choices.into_iter().for_each(|choice| self.choice(choice));
        }
        // The first chunk names id and model; the usage comes with the last. What is said in several is joined.
        for (name, value) in chunk {
            match (self.body.get_mut(&name), value) {
                (_, Value::Null) => {}
                (Some(old @ Value::Object(_)), value @ Value::Object(_)) if name != "usage" => drop(merge(old, value)),
                (None, value) => drop(self.body.insert(name, value)),
                (_, value) if name == "usage" || name == "error" => drop(self.body.insert(name, value)),
                _ => {}
            }
        }
    }

    /// Takes an event of the Responses API.
    fn event(&mut self, kind: &str, mut event: Map) {
        if let Some(Value::Object(response)) = event.shift_remove("response") {
            self.response = Some(response);
            self.done |= matches!(kind, "response.completed" | "response.incomplete" | "response.failed");
            return;
        }
        let index = |name: &str| event.get(name).and_then(Value::as_i64).unwrap_or(0);
        let (at, part) = (index("output_index"), index("content_index"));
        if !self.items.contains_key(&at) && self.items.len() >= MAX_ENTRIES {
            self.unread.push(Value::Object(event));
            return;
        }
        let item = self.items.entry(at).or_default();
        match (kind, event.shift_remove("item"), event.shift_remove("delta")) {
            ("response.output_item.added", Some(Value::Object(begun)), _) => item.item = begun,
            ("response.output_item.done", Some(Value::Object(whole)), _) => {
                *item = Item { item: whole, ..Item::default() }
            }
            ("response.output_text.delta", _, Some(Value::String(more))) => {
                if item.texts.contains_key(&part) || item.texts.len() < MAX_ENTRIES {
                    item.texts.entry(part).or_default().push_str(&more);
                } else {
                    self.unread.push(more.into());
                }
            }
            ("response.function_call_arguments.delta", _, Some(Value::String(more))) => item.arguments.push_str(&more),
            (kind, _, Some(delta)) => match (item.others.get_mut(kind), delta) {
                (Some(Value::String(text)), Value::String(more)) => text.push_str(&more),
                (_, delta) => drop(item.others.insert(kind.to_owned(), delta)),
            },
            // What other events say comes again with the whole item.
            _ => {}
        }
    }

    fn choice(&mut self, choice: Value) {
        let Value::Object(mut choice) = choice else { return self.unread.push(choice) };
        let index = choice.get("index").and_then(Value::as_i64).unwrap_or(0);
        if !self.choices.contains_key(&index) && self.choices.len() >= MAX_ENTRIES {
            return self.unread.push(Value::Object(choice));
        }
        let joined = self.choices.entry(index).or_default();
        if let Some(Value::Object(delta)) = choice.shift_remove("delta") {
            let message = joined.entry("message").or_insert_with(|| Value::Object(Map::new()));
            self.unread.extend(merge(message, Value::Object(delta)));
        }
        let mut joined_value = Value::Object(std::mem::take(joined));
        self.unread.extend(merge(&mut joined_value, Value::Object(choice)));
        if let Value::Object(map) = joined_value {
            *joined = map;
        }
    }

    fn end(mut self) -> Joined {
        // What could not be read may have been text.
        let is_whole = self.unread.is_empty();
        let mut joined = match self.response.is_some() || !self.items.is_empty() {
            true => self.end_of_response(),
            false => self.end_of_chat(),
        };
        joined.complete &= is_whole;
        if !is_whole {
            joined.body.insert("unread", self.unread.into());
        }
        joined
    }

    fn end_of_chat(&mut self) -> Joined {
        let is_over = |choice: &Map| choice.get("finish_reason").is_some_and(Value::is_string);
        let all_over = !self.choices.is_empty() && self.choices.values().all(is_over);
        let mut body = std::mem::take(&mut self.body);
        if !self.choices.is_empty() {
            let choices = std::mem::take(&mut self.choices).into_values().map(Value::Object).collect();
            body.insert("choices", Value::Array(choices));
        }
        Joined { body, complete: self.done || all_over }
    }

    fn end_of_response(&mut self) -> Joined {
        let mut body = self.response.take().unwrap_or_default();
        if !self.done && !self.items.is_empty() {
            body.insert("output", std::mem::take(&mut self.items).into_values().map(Item::so_far).collect());
        }
        for (name, value) in std::mem::take(&mut self.body) {
            // An error comes as an event of its own.
            let is_null = body.get(&name).is_none_or(Value::is_null);
            let name = if is_null || name == "error" { name } else { format!("event.{name}").into() };
            body.insert(name, value);
        }
        Joined { body, complete: self.done }
    }
}

impl Item {
    /// Returns what is known of the item.
    fn so_far(self) -> Value {
        let mut item = self.item;
        let is_empty = |value: Option<&Value>| match value {
            Some(Value::Array(parts)) => parts.is_empty(),
            Some(Value::String(text)) => text.is_empty(),
            value => value.is_none_or(Value::is_null),
        };
        if !self.texts.is_empty() && is_empty(item.get("content")) {
            let part = |text| json!({"type": "output_text", "text": text});
            item.entry("type").or_insert_with(|| "message".into());
            item.insert("content", self.texts.into_values().map(part).collect());
        }
        if !self.arguments.is_empty() && is_empty(item.get("arguments")) {
            item.entry("type").or_insert_with(|| "function_call".into());
            item.insert("arguments", self.arguments.into());
        }
        if !self.others.is_empty() {
            item.insert("deltas", Value::Object(self.others));
        }
        Value::Object(item)
    }
}

/// Adds a delta: text is appended, lists with an `index` are joined by it, of the rest the last counts. Returns what has
/// no place.
fn merge(into: &mut Value, delta: Value) -> Vec<Value> {
    let (target, delta) = match (into, delta) {
        (Value::Object(target), Value::Object(delta)) => (target, delta),
        (_, Value::Null) => return Vec::new(),
        (_, delta) => return vec![delta],
    };
    let mut left = Vec::new();
    for (name, value) in delta {
        let is_name = NAMES.contains(&name.as_str()) || name == "finish_reason";
        match (target.get_mut(&name), value) {
            (_, Value::Null) => {}
            // Some servers repeat a name as an empty text.
            (Some(_), Value::String(more)) if is_name && more.is_empty() => {}
            (Some(Value::String(text)), Value::String(more)) if !is_name => text.push_str(&more),
            (Some(old @ Value::Object(_)), more @ Value::Object(_)) => left.extend(merge(old, more)),
            (Some(Value::Array(list)), Value::Array(more)) => left.extend(merge_list(list, more)),
            (None, Value::Array(more)) => {
                let mut list = Vec::new();
                left.extend(merge_list(&mut list, more));
                target.insert(name, Value::Array(list));
            }
            (_, value) => {
                target.insert(name, value);
            }
        }
    }
    left
}

fn merge_list(list: &mut Vec<Value>, more: Vec<Value>) -> Vec<Value> {
    let mut left = Vec::new();
    for item in more {
        let Some(index) = item.get("index").and_then(Value::as_i64) else {
            list.push(item);
            continue;
        };
        let has_index = |known: &Value| known.get("index").and_then(Value::as_i64) == Some(index);
        match list.iter().take(MAX_ENTRIES).position(has_index) {
            Some(at) => left.extend(merge(&mut list[at], item)),
            None if list.len() < MAX_ENTRIES => list.push(item),
            None => left.push(item),
        }
    }
    left
}

#[cfg(test)]
mod tests {
    use super::super::chat;
    use super::*;

    fn stream(events: &[Value]) -> Value {
        events.iter().map(|event| format!("data: {event}\n\n")).collect::<String>().into()
    }

    #[test]
    fn a_text_that_only_begins_as_a_stream_is_the_answer() {
        for text in ["data: the tide is high", "id: 7\ndata: none", "event: low tide"] {
            let answer = chat::answer(text.into());
            assert_eq!((answer.text.as_deref(), answer.truncated), (Some(text), false));
        }
        let cut = chat::answer("data: {\"cho".into());
        assert_eq!((cut.text, cut.truncated, cut.rest), (None, true, "data: {\"cho".into()));
    }

    #[test]
    fn what_of_a_stream_cannot_be_read_is_kept_beside_it() {
        let chunk = json!({"choices": [{"index": 0, "delta": {"content": "One"}, "finish_reason": "stop"}]});
        let text = format!("data: {chunk}\n\ndata: {{\"choices\": [{{\"delta\": {{\"content\": \" two");
        let answer = chat::answer(text.into());
        assert_eq!((answer.text.as_deref(), answer.truncated), (Some("One"), true));
        assert_eq!(answer.rest["unread"], json!(["{\"choices\": [{\"delta\": {\"content\": \" two"]));
        let many =
            |n: i64| json!({"choices": [{"index": n, "delta": {"content": n.to_string()}, "finish_reason": "stop"}]});
        let answer = chat::answer((0..MAX_ENTRIES as i64 + 2).map(many).collect());
        assert!(answer.truncated);
        assert_eq!(answer.rest["unread"][1]["delta"]["content"], (MAX_ENTRIES + 1).to_string());
    }

    #[test]
    fn chunks_add_to_what_others_said() {
        let delta = |delta: Value| json!({"choices": [{"index": 0, "delta": delta}], "x_groq": {"n": 1}});
        let call = |call: Value| delta(json!({"tool_calls": [call]}));
        let answer = chat::answer(stream(&[
            call(json!({"index": 0, "id": "c1", "function": {"name": "f", "arguments": "{\"a\""}})),
            call(json!({"index": 0, "id": "", "function": {"name": "", "arguments": ":1}"}})),
            json!({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}], "x_groq": {"id": "r"}}),
        ]));
        assert!(!answer.truncated);
        assert_eq!(answer.rest["x_groq"], json!({"n": 1, "id": "r"}));
        let call = &answer.rest["choices"][0]["message"]["tool_calls"][0];
        assert_eq!((&call["id"], &call["function"]["name"]), (&json!("c1"), &json!("f")));
        assert_eq!(call["function"]["arguments"], "{\"a\":1}");
    }

    #[test]
    fn a_response_that_breaks_off_keeps_its_items() {
        let event = |kind: &str, more: Value| {
            let mut event = json!({"type": kind, "output_index": 1});
            event.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            event
        };
        let begun = json!({"type": "function_call", "name": "f", "arguments": "", "status": "in_progress"});
        let events = [
            json!({"type": "response.created", "response": {"id": "r", "object": "response", "output": []}}),
            event("response.output_item.done", json!({"output_index": 0, "item": {"type": "reasoning", "id": "rs"}})),
            event("response.output_item.added", json!({"item": begun})),
            event("response.function_call_arguments.delta", json!({"delta": "{\"a\""})),
            event("response.function_call_arguments.delta", json!({"delta": ":1"})),
            event("response.refusal.delta", json!({"output_index": 2, "delta": "I can"})),
            event("response.refusal.delta", json!({"output_index": 2, "delta": "not"})),
        ];
        let answer = chat::answer(stream(&events));
        assert!(answer.truncated && answer.id.as_deref() == Some("r"));
        assert_eq!(answer.rest["output"][0]["id"], "rs");
        assert_eq!(answer.rest["output"][1]["arguments"], "{\"a\":1");
        assert_eq!(answer.rest["output"][2]["deltas"]["response.refusal.delta"], "I cannot");
        let error = json!({"type": "error", "code": "server_error", "message": "Overloaded"});
        let failed = chat::answer(stream(&[events[0].clone(), error.clone()]));
        assert_eq!((failed.error_status, &failed.rest["error"]), (Some(500), &error));
    }
}
