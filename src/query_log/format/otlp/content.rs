//! What a span says of prompt and answer, in the dialects that instrumentations write.
//!
//! - OpenTelemetry's semantic conventions for generative AI: `gen_ai.input.messages` and its siblings, a list of
//!   messages with parts, as JSON text on spans and as a value on events.
//! - Their older form: span events `gen_ai.content.prompt` and `gen_ai.content.completion` with JSON text, which some put
//!   on the span itself.
//! - OpenLLMetry before 0.55: `gen_ai.prompt.0.role`, one attribute a field.
//! - OpenInference: `llm.input_messages.0.message.role`, one attribute a field.

use crate::json::{Map, Name, Value, json};
use crate::query_log::format::{fields::Fields, parse, responses};
use crate::record::Message;

use super::wire::Entry;

/// Deepest path of an attribute's name that is read as nested fields.
const MAX_PATH: usize = 16;

/// Prompt and answer of one call.
#[derive(Debug, Default)]
pub(super) struct Content {
    pub(super) messages: Vec<Message>,
    /// The first answer, as a chat message.
    pub(super) answer: Option<Message>,
    pub(super) finish_reason: Option<String>,
    pub(super) tools: Option<Value>,
    /// Further answers.
    pub(super) others: Vec<Value>,
    /// True where the text breaks off.
    pub(super) is_cut: bool,
}

/// Takes prompt and answer out of an entry, by the first dialect that it speaks.
pub(super) fn take(entry: &mut Entry, attributes: &mut Fields) -> Content {
    let dialects = [conventions, span_events, openllmetry, openinference];
    let says_something = |content: &Content| !content.messages.is_empty() || content.answer.is_some();
    let mut content = dialects.iter().map(|read| read(entry, attributes)).find(says_something).unwrap_or_default();
    if content.tools.is_none() {
        let tools = list(attributes, "gen_ai.tool.definitions");
        content.tools = (!tools.is_empty()).then(|| responses::tools(Value::Array(tools)));
    }
    content
}

/// Returns true where a list was cut: an SDK's limit on the length of attributes leaves JSON that breaks off, unmarked.
pub(super) fn is_cut(entry: &Entry, attributes: &Fields) -> bool {
    let lists = ["gen_ai.system_instructions", "gen_ai.input.messages", "gen_ai.output.messages"];
    let of_events =
        entry.events.iter().flat_map(|event| ["gen_ai.prompt", "gen_ai.completion"].map(|n| event.attributes.get(n)));
    let breaks_off = |value: &Value| {
        let text = value.as_str().unwrap_or_default().trim();
        text.starts_with(['[', '{']) && parse(text.as_bytes()).is_err()
    };
    lists.iter().map(|name| attributes.get(name)).chain(of_events).flatten().any(breaks_off)
}

fn conventions(_: &mut Entry, attributes: &mut Fields) -> Content {
    let mut content = Content::default();
    let system = list(attributes, "gen_ai.system_instructions");
    if !system.is_empty() {
        let parts = json!({"role": "system", "parts": system});
        content.messages.extend(with_parts(parts).0);
    }
    let input = list(attributes, "gen_ai.input.messages");
    content.messages.extend(input.into_iter().flat_map(|message| with_parts(message).0));
    let output = list(attributes, "gen_ai.output.messages");
    content.answers(output.into_iter().map(with_parts).map(|(mut messages, reason)| (messages.pop(), reason)));
    content
}

fn span_events(entry: &mut Entry, attributes: &mut Fields) -> Content {
    let mut content = Content::default();
    let mut take = |event: &str, attribute: &str| -> Vec<Value> {
        let found = entry.events.iter_mut().filter(|found| found.name == event);
        found.flat_map(|found| embedded(found.attributes.shift_remove(attribute))).collect()
    };
    let mut prompt = take("gen_ai.content.prompt", "gen_ai.prompt");
    prompt.extend(list(attributes, "gen_ai.prompt"));
    content.messages = prompt.into_iter().map(flat).map(|(message, _)| message).collect();
    let mut completion = take("gen_ai.content.completion", "gen_ai.completion");
    completion.extend(list(attributes, "gen_ai.completion"));
    content.answers(completion.into_iter().map(flat).map(|(message, reason)| (Some(message), reason)));
    content
}

fn openllmetry(_: &mut Entry, attributes: &mut Fields) -> Content {
    let mut content = Content::default();
    let prompt = unflatten(attributes, "gen_ai.prompt.");
    content.messages = prompt.into_iter().map(flat).map(|(message, _)| message).collect();
    let completion = unflatten(attributes, "gen_ai.completion.");
    content.answers(completion.into_iter().map(flat).map(|(message, reason)| (Some(message), reason)));
    let mut tools = unflatten(attributes, "llm.request.functions.");
    for tool in &mut tools {
        if let Some(parameters) = tool.get_mut("parameters")
            && let Value::String(schema) = parameters
        {
            *parameters = parse(schema.as_bytes()).unwrap_or_else(|_| std::mem::take(schema).into());
        }
    }
    content.tools = (!tools.is_empty()).then(|| responses::tools(Value::Array(tools)));
    content
}

fn openinference(_: &mut Entry, attributes: &mut Fields) -> Content {
    let unwrap = |mut item: Value| flat(item.get_mut("message").map(Value::take).unwrap_or(item));
    let mut content = Content::default();
    let input = unflatten(attributes, "llm.input_messages.");
    content.messages = input.into_iter().map(unwrap).map(|(message, _)| message).collect();
    let output = unflatten(attributes, "llm.output_messages.");
    content.answers(output.into_iter().map(unwrap).map(|(message, reason)| (Some(message), reason)));
    let schema = |tool: Value| match tool.pointer("/tool/json_schema") {
        Some(Value::String(text)) => parse(text.as_bytes()).unwrap_or_else(|_| text.as_str().into()),
        Some(schema) => schema.clone(),
        None => tool,
    };
    let tools: Vec<Value> = unflatten(attributes, "llm.tools.").into_iter().map(schema).collect();
    content.tools = (!tools.is_empty()).then(|| responses::tools(Value::Array(tools)));
    content
}

impl Content {
    fn answers(&mut self, mut answers: impl Iterator<Item = (Option<Message>, Option<String>)>) {
        let Some((first, reason)) = answers.next() else { return };
        (self.answer, self.finish_reason) = (first, reason);
        let further = answers.map(|(message, reason)| json!({"message": message, "finish_reason": reason}));
        self.others = further.collect();
    }
}

/// Takes an attribute that is a list, or JSON text of one.
fn list(attributes: &mut Fields, name: &str) -> Vec<Value> {
    embedded(attributes.take(name))
}

/// Reads a list, JSON text of one, or one object. A text that is no JSON is one user turn.
fn embedded(value: Option<Value>) -> Vec<Value> {
    let value = match value {
        Some(Value::String(text)) => parse(text.trim().as_bytes()).unwrap_or(Value::String(text)),
        Some(value) => value,
        None => return Vec::new(),
    };
    match value {
        Value::Array(items) => items,
        Value::Null => Vec::new(),
        Value::String(text) => vec![json!({"role": "user", "content": text})],
        other => vec![other],
    }
}

/// Reads a message of parts. The results of tools in it are messages of their own, as a chat has them.
fn with_parts(message: Value) -> (Vec<Message>, Option<String>) {
    let Value::Object(map) = message else { return (vec![bare(message)], None) };
    let mut fields = Fields::new(map);
    let reason = fields.text(&["finish_reason"]);
    let role = fields.text(&["role"]).unwrap_or_else(|| "user".to_owned());
    let parts = match fields.take("parts") {
        Some(Value::Array(parts)) => parts,
        // Some emitters write a chat's own shape.
        _ => {
            let content = fields.take("content").unwrap_or_default();
            return (vec![Message { role, content, rest: fields.rest() }], reason);
        }
    };
    let (mut content, mut calls, mut results) = (Vec::new(), Vec::new(), Vec::new());
    let mut rest = fields.rest();
    for part in parts {
        match part.get("type").and_then(Value::as_str).unwrap_or_default() {
            "text" => content.push(text(part)),
            "reasoning" => reasoning(part, &mut rest),
            "tool_call" => calls.push(call(part)),
            "tool_call_response" => results.push(result(part)),
            _ => content.push(part),
        }
    }
    if !calls.is_empty() {
        rest.insert("tool_calls", Value::Array(calls));
    }
    let content = match content.as_slice() {
        [] => Value::Null,
        [Value::Object(only)] if only.len() == 2 && only.contains_key("text") => {
            only.get("text").cloned().unwrap_or_default()
        }
        _ => Value::Array(content),
    };
    let says_something = !content.is_null() || rest.contains_key("tool_calls") || results.is_empty();
    if !says_something && let Some(first) = results.first_mut() {
        rest.into_iter().for_each(|(name, value)| _ = first.rest.entry(name).or_insert(value));
        return (results, reason);
    }
    let own = Message { role, content, rest };
    (std::iter::once(own).chain(results).collect(), reason)
}

/// Returns the turn that something is which is no message: a text is what the user said.
fn bare(content: Value) -> Message {
    Message { role: "user".to_owned(), content, rest: Map::new() }
}

/// Brings a text into the shape of a chat's.
fn text(mut part: Value) -> Value {
    if let Value::Object(map) = &mut part {
        let text = map.shift_remove("content").unwrap_or_default();
        map.insert("text", text);
    }
    part
}

/// Adds what a model thought to its message, where chat templates look for it.
fn reasoning(part: Value, rest: &mut Map) {
    let Value::Object(mut map) = part else { return };
    let more = map.shift_remove("content").unwrap_or_default();
    let old = rest.get("reasoning_content").and_then(Value::as_str).unwrap_or_default();
    let whole = format!("{old}{}", more.as_str().unwrap_or_default());
    rest.insert("reasoning_content", whole.into());
    map.shift_remove("type");
    if !more.is_string() && !more.is_null() {
        map.insert("content", more);
    }
    if !map.is_empty()
        && let Value::Array(details) = rest.entry("reasoning_details").or_insert_with(|| json!([]))
    {
        details.push(Value::Object(map));
    }
}

fn result(part: Value) -> Message {
    let Value::Object(mut map) = part else { return bare(part) };
    // The schema says `response`, the conventions' own example `result`.
    let content = match map.shift_remove("response").or_else(|| map.shift_remove("result")) {
        Some(Value::Null) | None => Value::Null,
        Some(text @ Value::String(_)) => text,
        Some(other) => other.to_string().into(),
    };
    map.shift_remove("type");
    let id = map.shift_remove("id").unwrap_or_default();
    map.insert("tool_call_id", id);
    Message { role: "tool".into(), content, rest: map }
}

/// Brings a call, flat or nested, into a chat's shape; arguments are JSON text there. What has no place in that stays
/// beside it.
fn call(call: Value) -> Value {
    let Value::Object(mut call) = call else { return call };
    let mut function = match call.shift_remove("function") {
        Some(Value::Object(function)) => function,
        Some(other) => Map::from_iter([("name".to_owned(), other)]),
        None => ["name", "arguments"].into_iter().filter_map(|n| Some((n.to_owned(), call.shift_remove(n)?))).collect(),
    };
    let arguments = match function.shift_remove("arguments") {
        Some(text @ Value::String(_)) => text,
        Some(Value::Null) | None => "{}".into(),
        Some(other) => other.to_string().into(),
    };
    call.shift_remove("type");
    let id = call.shift_remove("id").unwrap_or_default();
    let name = function.shift_remove("name").unwrap_or_default();
    let mut shaped = json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}});
    if let Some(Value::Object(inner)) = shaped.get_mut("function") {
        inner.extend(function);
    }
    if let Value::Object(outer) = &mut shaped {
        outer.extend(call);
    }
    shaped
}

/// Reads a message whose fields are its own, with calls in any shape and content as text, parts or JSON text of parts.
fn flat(message: Value) -> (Message, Option<String>) {
    let Value::Object(map) = message else { return (bare(message), None) };
    let mut fields = Fields::new(map);
    let reason = fields.text(&["finish_reason"]);
    let role = fields.text(&["role"]).unwrap_or_else(|| "user".to_owned());
    let content = match fields.take("content") {
        Some(Value::String(text)) => parts_of(text),
        Some(content) => content,
        None => match fields.take("contents") {
            Some(Value::Array(parts)) => parts.into_iter().map(|part| unwrapped(part, "message_content")).collect(),
            contents => contents.unwrap_or_default(),
        },
    };
    if fields.get("tool_calls").is_some_and(Value::is_array)
        && let Some(Value::Array(calls)) = fields.take("tool_calls")
    {
        let inner = |item| call(unwrapped(item, "tool_call"));
        fields.put_rest("tool_calls", calls.into_iter().map(inner).collect::<Value>());
    }
    (Message { role, content, rest: fields.rest() }, reason)
}

/// Takes an object out of the one that has it; what stood beside it goes with it.
fn unwrapped(item: Value, name: &str) -> Value {
    let Value::Object(mut map) = item else { return item };
    match map.shift_remove(name) {
        Some(Value::Object(mut inner)) => {
            for (name, value) in map {
                inner.entry(name).or_insert(value);
            }
            Value::Object(inner)
        }
        Some(inner) if map.is_empty() => inner,
        Some(inner) => {
            map.insert(name.to_owned(), inner);
            Value::Object(map)
        }
        None => Value::Object(map),
    }
}

/// Reads content parts that were written as JSON text; any other text is the content itself.
fn parts_of(text: String) -> Value {
    let is_parts = |parts: &Value| {
        let parts = parts.as_array().map(Vec::as_slice).unwrap_or_default();
        !parts.is_empty() && parts.iter().all(|part| part.get("type").is_some_and(Value::is_string))
    };
    let looks_like_parts = text.starts_with("[{");
    let parsed = looks_like_parts.then(|| parse(text.as_bytes()).ok()).flatten();
    parsed.filter(is_parts).unwrap_or(Value::String(text))
}

/// Takes the attributes below a prefix that goes on with a number, as the list they stand for: `p.0.role` and
/// `p.0.content` are one object with two fields. Missing numbers leave no gap.
fn unflatten(attributes: &mut Fields, prefix: &str) -> Vec<Value> {
    let is_ours = |name: &str| {
        let index = name.strip_prefix(prefix).and_then(|rest| rest.split('.').next());
        index.is_some_and(|index| index.parse::<u32>().is_ok()) && name.split('.').count() <= MAX_PATH
    };
    let names: Vec<String> = attributes.names().filter(|name| is_ours(name)).map(str::to_owned).collect();
    let mut tree = Map::new();
    for name in names {
        let path: Vec<&str> = name[prefix.len()..].split('.').collect();
        let value = attributes.take(&name).unwrap_or_default();
        insert(&mut tree, &path, value);
    }
    match listed(Value::Object(tree)) {
        Value::Array(items) => items,
        _ => Vec::new(),
    }
}

fn insert(tree: &mut Map, path: &[&str], value: Value) {
    match path {
        [] => {}
        [name] => {
            tree.insert((*name).to_owned(), value);
        }
        [name, rest @ ..] => {
            let child = tree.entry(*name).or_insert(Value::Null);
            if !child.is_object() {
                *child = Value::Object(Map::new());
            }
            if let Value::Object(inner) = child {
                insert(inner, rest, value);
            }
        }
    }
}

/// Makes lists of the objects whose names are all numbers.
fn listed(value: Value) -> Value {
    let Value::Object(map) = value else { return value };
    let number = |(name, value): (&Name, &Value)| Some((name.parse::<u32>().ok()?, value.clone()));
    let mut numbered: Vec<(u32, Value)> = map.iter().filter_map(number).collect();
    if map.is_empty() || numbered.len() < map.len() {
        return Value::Object(map.into_iter().map(|(name, value)| (name, listed(value))).collect());
    }
    numbered.sort_by_key(|(number, _)| *number);
    numbered.into_iter().map(|(_, value)| listed(value)).collect()
}
