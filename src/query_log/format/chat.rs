//! Chat requests and answers in OpenAI's shape, which several log formats carry.

use crate::json::{Map, Value};
use crate::record::Message;

use super::fields::{Fields, integer, kind_of};
use super::{Reason, Refusal, responses, stream};

/// Request fields that steer decoding; they go to the column `params`.
const PARAMS: [&str; 31] = [
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "max_tokens",
    "max_completion_tokens",
    "min_tokens",
    "n",
    "stop",
    "seed",
    "stream",
    "stream_options",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "logprobs",
    "top_logprobs",
    "response_format",
    "tool_choice",
    "parallel_tool_calls",
    "functions",
    "function_call",
    "reasoning_effort",
    "verbosity",
    "modalities",
    "chat_template_kwargs",
    "guided_json",
    "best_of",
    "echo",
    "suffix",
];

/// What a response body says. Any part may be missing: loggers leave out `id`, `model` and `usage`.
#[derive(Debug, Default)]
pub(super) struct Answer {
    pub(super) id: Option<String>,
    pub(super) model: Option<String>,
    /// The text of the first choice, exactly as logged.
    pub(super) text: Option<String>,
    pub(super) finish_reason: Option<String>,
    pub(super) prompt_tokens: Option<i64>,
    pub(super) completion_tokens: Option<i64>,
    /// Status of an error body: its own code where it is an HTTP status, else 500.
    pub(super) error_status: Option<i32>,
    /// True where the body or the stream breaks off.
    pub(super) truncated: bool,
    /// What no column takes: tool calls, further choices, log-probs, ...
    pub(super) rest: Value,
}

/// What helps where a request was changed on its way.
const AS_SENT: &str = "log the request as it was sent";

/// Reads messages: a list of objects with a role.
pub(super) fn messages(value: Value) -> Result<Vec<Message>, Refusal> {
    let items = match value {
        Value::Array(items) if items.is_empty() => {
            return Err(Refusal::dead(
                Reason::MissingMessages,
                "the call has no messages, its list is empty: log the request as it was sent",
            ));
        }
        Value::Array(items) => items,
        other => {
            return Err(Refusal::dead(
                Reason::BadMessages,
                format!("messages is {}, not a list: {AS_SENT}", kind_of(&other)),
            ));
        }
    };
    items.into_iter().enumerate().map(|(i, item)| message(i, item)).collect()
}

fn message(index: usize, value: Value) -> Result<Message, Refusal> {
    let bad = |what: &str| Refusal::dead(Reason::BadMessages, format!("messages[{index}] {what}: {AS_SENT}"));
    let Value::Object(mut map) = value else {
        return Err(bad("is not an object"));
    };
    let Some(Value::String(role)) = map.shift_remove("role") else {
        return Err(bad("has no role"));
    };
    let content = map.shift_remove("content").unwrap_or(Value::Null);
    Ok(Message { role, content, rest: map })
}

/// Takes the decoding parameters out of a request.
pub(super) fn params(request: &mut Fields) -> Map {
    request.subset(&PARAMS)
}

/// Reads a response body: an object, a string of JSON, a stream of server-sent events as text, or a list of chunks.
pub(super) fn answer(body: Value) -> Answer {
    match body {
        Value::Object(map) => body_of(Fields::new(map)),
        Value::Array(chunks) if stream::are_chunks(&chunks) => streamed(stream::join(chunks)),
        Value::String(text) => written(text),
        Value::Null => Answer::default(),
        other => Answer { rest: other, ..Answer::default() },
    }
}

/// Reads a body that was logged as text. A text that is neither JSON nor events is the answer itself.
fn written(text: String) -> Answer {
    if let Some(chunks) = stream::events(&text) {
        return streamed(chunks);
    }
    let is_body = |text: &str| matches!(text.trim_start().as_bytes().first(), Some(b'{' | b'['));
    let looks_like_body = is_body(&text) && ["\"choices\"", "\"output\""].iter().any(|name| text.contains(name));
    // A stream that breaks off in its first event.
    let looks_like_event = text.trim_start().strip_prefix("data:").is_some_and(is_body);
    match super::parse(text.trim().as_bytes()) {
        Ok(Value::Object(map)) if ["choices", "error", "output"].iter().any(|name| map.contains_key(name)) => {
            body_of(Fields::new(map))
        }
        Ok(Value::Array(chunks)) if stream::are_chunks(&chunks) => streamed(stream::join(chunks)),
        Err(_) if looks_like_body || looks_like_event => {
            Answer { truncated: true, rest: text.into(), ..Answer::default() }
        }
        _ => Answer { text: Some(text), ..Answer::default() },
    }
}

fn streamed(joined: stream::Joined) -> Answer {
    let answer = body_of(Fields::new(joined.body));
    Answer { truncated: !joined.complete && answer.error_status.is_none(), ..answer }
}

fn body_of(mut body: Fields) -> Answer {
    if !body.has("choices") && (body.get("output").is_some_and(Value::is_array) || says(&body, "response")) {
        return responses::answer(body);
    }
    let mut answer = Answer {
        id: body.text(&["id"]),
        model: body.text(&["model"]),
        error_status: body.get("error").filter(|e| !e.is_null()).map(error_status),
        ..Answer::default()
    };
    let mut usage = body.object("usage");
    answer.prompt_tokens = usage.integer(&["prompt_tokens", "input_tokens"]);
    answer.completion_tokens = usage.integer(&["completion_tokens", "output_tokens"]);
    body.put_rest("usage", usage.rest());
    first_choice(&mut body, &mut answer);
    drop_implied(&mut body);
    answer.rest = Value::Object(body.rest());
    answer
}

/// Takes text and finish reason out of the first choice; everything else of the choices stays.
fn first_choice(body: &mut Fields, answer: &mut Answer) {
    let mut choices = match body.take("choices") {
        Some(Value::Array(choices)) => choices,
        Some(other) => return body.put_rest("choices", other),
        None => return,
    };
    if let Some(Value::Object(map)) = choices.first_mut() {
        let mut choice = Fields::new(std::mem::take(map));
        answer.finish_reason = choice.text(&["finish_reason"]);
        let mut message = choice.object("message");
        // A legacy completion has its text beside the finish reason.
        answer.text = take_content(&mut message).or_else(|| take_text(&mut choice));
        if message.get("role").is_some_and(|role| role == "assistant") {
            message.take("role");
        }
        choice.put_rest("message", message.rest());
        if choice.get("index").is_some_and(|index| *index == 0) {
            choice.take("index");
        }
        *map = choice.rest();
    }
    let is_spent = choices.len() == 1 && choices[0].as_object().is_some_and(Map::is_empty);
    if !is_spent {
        body.put_rest("choices", choices);
    }
}

/// Takes a plain text; of content in parts, copies the text and leaves the parts.
fn take_content(message: &mut Fields) -> Option<String> {
    match message.get("content")? {
        Value::String(_) => match message.take("content") {
            Some(Value::String(text)) => Some(text),
            _ => None,
        },
        parts @ Value::Array(_) => {
            let message = Message { role: String::new(), content: parts.clone(), rest: Map::new() };
            Some(message.plain_text()).filter(|text| !text.is_empty())
        }
        _ => None,
    }
}

fn take_text(choice: &mut Fields) -> Option<String> {
    match choice.get("text")? {
        Value::String(_) => choice.take("text").and_then(|text| text.as_str().map(str::to_owned)),
        _ => None,
    }
}

/// Drops what every body says.
fn drop_implied(body: &mut Fields) {
    if ["chat.completion", "chat.completion.chunk", "text_completion"].iter().any(|kind| says(body, kind)) {
        body.take("object");
    }
}

/// Returns true where a body names itself so.
fn says(body: &Fields, object: &str) -> bool {
    body.get("object").is_some_and(|kind| kind == object)
}

/// Returns the HTTP status that an error value means.
pub(super) fn error_status(error: &Value) -> i32 {
    let code = ["code", "status", "error_code"].iter().find_map(|key| http_status(error.get(key)?));
    code.filter(|&status| status >= 400).unwrap_or(500)
}

/// Reads an HTTP status from a number or from digits.
pub(super) fn http_status(value: &Value) -> Option<i32> {
    integer(value).filter(|status| (100..=599).contains(status)).map(|status| status as i32)
}
