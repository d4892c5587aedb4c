//! OpenAI's Responses API, brought into the shape of a chat.
//!
//! A request holds `instructions` and `input` items instead of messages, an answer `output` items instead of choices.
//! Messages, calls and their results become chat messages, as a chat template wants them; what has no place there
//! (reasoning, searches, the ids of items) stays in `extra`, with the item's position.

use crate::json::{Map, Value, json};
use crate::record::{Message, Query};

use super::chat::{Answer, error_status};
use super::exclusion::Exclusion;
use super::fields::{Fields, kind_of};
use super::{Reason, Refusal};

/// Request fields that steer decoding.
const PARAMS: [&str; 13] = [
    "temperature",
    "top_p",
    "max_output_tokens",
    "max_tool_calls",
    "tool_choice",
    "parallel_tool_calls",
    "reasoning",
    "text",
    "truncation",
    "stream",
    "stream_options",
    "include",
    "top_logprobs",
];

/// Request fields that this interface has and an embedding, which has `input` too, has not.
const TELLING: [&str; 10] = [
    "instructions",
    "max_output_tokens",
    "previous_response_id",
    "conversation",
    "reasoning",
    "text",
    "store",
    "truncation",
    "include",
    "tools",
];

/// The prompt of one request.
#[derive(Debug, Default)]
struct Prompt {
    messages: Vec<Message>,
    /// What is left of the input items.
    left: Vec<Value>,
    /// True where an item is known to the server only, or is no turn that a chat template knows.
    is_incomplete: bool,
}

/// Returns true where a request without messages is one of this interface.
pub(super) fn is_request(request: &Fields, response: Option<&Value>) -> bool {
    let is_turn = |item: &Value| {
        let kind = item.get("type").and_then(Value::as_str).unwrap_or_default();
        item.get("role").is_some() || kind.starts_with("function_call") || kind.starts_with("custom_tool_call")
    };
    let has_turns = |input: &Value| input.as_array().is_some_and(|items| items.iter().any(is_turn));
    let is_answer = |body: &Value| match body {
        Value::String(text) => text.contains("\"response.") || text.contains("\"output\""),
        body => is_body(body),
    };
    let tells = TELLING.iter().any(|name| request.has(name)) || response.is_some_and(is_answer);
    let has_prompt = request.has("input") || request.has("previous_response_id");
    !request.has("messages") && (has_prompt && tells || request.get("input").is_some_and(has_turns))
}

/// Returns true where an object is an answer of this interface.
fn is_body(body: &Value) -> bool {
    body.get("object").is_some_and(|object| object == "response") || body.get("output").is_some_and(Value::is_array)
}

/// Takes the prompt out of a request and fills the columns that it is.
pub(super) fn read_prompt(query: &mut Query, request: &mut Fields, found: &mut Vec<Exclusion>) -> Result<(), Refusal> {
    let elsewhere = ["previous_response_id", "conversation", "prompt"];
    if elsewhere.iter().any(|name| request.has(name)) {
        found.push(Exclusion::Incomplete);
    }
    query.conversation_id = match request.get("conversation") {
        Some(Value::String(id)) => Some(id.clone()),
        Some(conversation) => conversation.get("id").and_then(Value::as_str).map(str::to_owned),
        None => None,
    };
    let mut prompt = Prompt::default();
    if let Some(text) = request.text(&["instructions"]) {
        prompt.messages.push(Message::text("system", text));
    }
    match request.take("input") {
        Some(Value::String(text)) => prompt.messages.push(Message::text("user", text)),
        Some(Value::Array(items)) => {
            for (index, item) in items.into_iter().enumerate() {
                prompt.item(index, item)?;
            }
            if prompt.is_incomplete {
                found.push(Exclusion::Incomplete);
            }
        }
        Some(other) => {
            let message =
                format!("input is {}, not a text or a list of items: log the request as it was sent", kind_of(&other));
            return Err(Refusal::dead(Reason::BadMessages, message));
        }
        None => {}
    }
    if prompt.messages.is_empty() {
        return Err(Refusal::dead(
            Reason::MissingMessages,
            "the request has no input that could be a message: log the request as it was sent",
        ));
    }
    query.messages = prompt.messages;
    query.tools = request.take("tools").map(tools);
    query.params = request.subset(&PARAMS);
    request.put_rest("input", prompt.left);
    Ok(())
}

impl Prompt {
    fn item(&mut self, index: usize, item: Value) -> Result<(), Refusal> {
        let bad = |what: &str| {
            Refusal::dead(Reason::BadMessages, format!("input[{index}] {what}: log the request as it was sent"))
        };
        let Value::Object(map) = item else { return Err(bad("is not an object")) };
        let mut item = Fields::new(map);
        match item.get("type").and_then(Value::as_str).unwrap_or("message").to_owned().as_str() {
            "message" => {
                let role = item.text(&["role"]).ok_or_else(|| bad("has no role"))?;
                let content = parts(item.take("content").unwrap_or_default());
                self.messages.push(Message { role, content, rest: Map::new() });
                item.take("type");
            }
            "function_call" | "custom_tool_call" => {
                let call = call(&mut item);
                let calls = self.assistant().rest.entry("tool_calls").or_insert_with(|| json!([]));
                if let Value::Array(calls) = calls {
                    calls.push(call);
                }
            }
            "function_call_output" | "custom_tool_call_output" => {
                let content = parts(item.take("output").unwrap_or_default());
                let id = item.take("call_id").unwrap_or_default();
                let rest = Map::from_iter([("tool_call_id".to_owned(), id)]);
                self.messages.push(Message { role: "tool".into(), content, rest });
                item.take("type");
            }
            // Chat templates leave out what was thought in earlier turns.
            "reasoning" => {}
            // Searches, references and the like: the model saw them, and a chat would not show them.
            _ => self.is_incomplete = true,
        }
        let rest = item.rest();
        if !rest.is_empty() {
            self.left.push(json!({"index": index, "item": rest}));
        }
        Ok(())
    }

    /// Returns the assistant's turn that a call belongs to.
    fn assistant(&mut self) -> &mut Message {
        if self.messages.last().is_none_or(|last| last.role != "assistant") {
            self.messages.push(Message { role: "assistant".into(), content: Value::Null, rest: Map::new() });
        }
        let last = self.messages.len() - 1;
        &mut self.messages[last]
    }
}

/// Takes a call out of an item, in the shape of a chat's.
fn call(item: &mut Fields) -> Value {
    item.take("type");
    let (id, name) = (item.take("call_id").unwrap_or_default(), item.take("name").unwrap_or_default());
    let arguments = item.take("arguments").or_else(|| item.take("input")).unwrap_or_default();
    json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}})
}

/// Brings content into the shape of a chat's: text parts by their chat name, a single text as a string.
fn parts(content: Value) -> Value {
    let Value::Array(mut parts) = content else { return content };
    for part in &mut parts {
        let is_text = part.get("type").is_some_and(|kind| kind == "input_text" || kind == "output_text");
        if let (true, Some(map)) = (is_text, part.as_object_mut()) {
            map.insert("type", "text".into());
            let is_idle = |name: &str, value: &Value| {
                matches!(name, "annotations" | "logprobs") && value.as_array().is_some_and(Vec::is_empty)
            };
            map.retain(|name, value| !is_idle(name, value));
        }
    }
    match parts.as_slice() {
        [Value::Object(only)] if only.len() == 2 && only.get("type").is_some_and(|kind| kind == "text") => {
            only.get("text").cloned().unwrap_or_default()
        }
        _ => Value::Array(parts),
    }
}

/// Brings flat function tools into the nested shape of a chat's; other tools stay as they are.
pub(super) fn tools(tools: Value) -> Value {
    let nest = |tool: Value| match tool {
        Value::Object(mut map) if map.get("type").is_none_or(|kind| kind == "function") && map.contains_key("name") => {
            map.shift_remove("type");
            json!({"type": "function", "function": map})
        }
        tool => tool,
    };
    match tools {
        Value::Array(tools) => Value::Array(tools.into_iter().map(nest).collect()),
        other => other,
    }
}

/// Reads an answer. Its text is that of all its messages, one after the other.
pub(super) fn answer(mut body: Fields) -> Answer {
    let mut answer = Answer {
        id: body.text(&["id"]),
        model: body.text(&["model"]),
        error_status: body.get("error").filter(|error| !error.is_null()).map(error_status),
        ..Answer::default()
    };
    let mut usage = body.object("usage");
    answer.prompt_tokens = usage.integer(&["input_tokens"]);
    answer.completion_tokens = usage.integer(&["output_tokens"]);
    body.put_rest("usage", usage.rest());
    let has_calls = take_output(&mut body, &mut answer);
    finish(&mut body, &mut answer, has_calls);
    if body.get("object").is_some_and(|object| object == "response") {
        body.take("object");
    }
    answer.rest = Value::Object(body.rest());
    answer
}

/// Takes the text out of the output items and leaves the others; true where one is a call.
fn take_output(body: &mut Fields, answer: &mut Answer) -> bool {
    if !body.get("output").is_some_and(Value::is_array) {
        return false;
    }
    let Some(Value::Array(items)) = body.take("output") else { return false };
    let (mut texts, mut left, mut has_calls) = (Vec::new(), Vec::new(), false);
    for mut item in items {
        let is = |kind: &str| item.get("type").is_some_and(|found| found == kind);
        has_calls |= is("function_call") || is("custom_tool_call");
        let content = if is("message") { item.get("content").cloned().map(parts) } else { None };
        match content {
            Some(Value::String(text)) => {
                texts.push(text);
                left.extend(rest_of_message(&mut item));
            }
            content => {
                let parts = content.as_ref().and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
                texts.extend(parts.iter().filter_map(|part| part.get("text")?.as_str().map(str::to_owned)));
                left.push(item);
            }
        }
    }
    answer.text = (!texts.is_empty()).then(|| texts.concat());
    body.put_rest("output", left);
    has_calls
}

/// Returns what a message whose text was taken says beside it; nothing where every message says so.
fn rest_of_message(item: &mut Value) -> Option<Value> {
    let map = item.as_object_mut()?;
    let is_idle = |name: &str, value: &Value| match name {
        "content" => true,
        "role" => value == "assistant",
        "status" => value == "completed",
        _ => value.is_null(),
    };
    map.retain(|name, value| !is_idle(name, value));
    (map.len() > 1).then(|| item.take())
}

/// Reads why the answer ended, by the names of a chat's finish reasons.
fn finish(body: &mut Fields, answer: &mut Answer, has_calls: bool) {
    let status = body.get("status").and_then(Value::as_str).unwrap_or_default().to_owned();
    match status.as_str() {
        "completed" => {
            answer.finish_reason = Some(if has_calls { "tool_calls" } else { "stop" }.to_owned());
            body.take("status");
        }
        "incomplete" => {
            let details = body.get("incomplete_details").and_then(|details| details.get("reason")?.as_str());
            let reason = details.map(|reason| if reason == "max_output_tokens" { "length" } else { reason });
            answer.finish_reason = reason.map(str::to_owned);
        }
        "failed" => answer.error_status = answer.error_status.or(Some(500)),
        // Logged before its end.
        "in_progress" | "queued" | "cancelled" => answer.truncated = true,
        _ => {}
    }
}
