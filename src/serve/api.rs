//! OpenAI's chat-completion wire format, as far as this server speaks it: what may be asked, what is answered.
//!
//! Errors use OpenAI's envelope with vLLM's statuses and type names, so that a client cannot tell the difference.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::record::{FinishReason, Message};

use super::Settings;
use super::job::{Format, Penalties, Refusal, Sampling};

/// An answer that is not a success, in OpenAI's envelope.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    pub(crate) kind: &'static str,
    pub(crate) message: String,
    pub(crate) param: Option<&'static str>,
}

impl ApiError {
    /// Refuses a request that cannot be answered as it stands (400).
    pub(crate) fn bad(message: impl Into<String>, param: Option<&'static str>) -> Self {
        ApiError { status: StatusCode::BAD_REQUEST, kind: "BadRequestError", message: message.into(), param }
    }

    /// Refuses with vLLM's type for mistakes about adapters (400).
    pub(crate) fn user_input(message: impl Into<String>) -> Self {
        ApiError { status: StatusCode::BAD_REQUEST, kind: "InvalidUserInput", message: message.into(), param: None }
    }

    /// Says that a model, an adapter, an alias or a route is not there (404).
    pub(crate) fn not_found(message: impl Into<String>) -> Self {
        ApiError { status: StatusCode::NOT_FOUND, kind: "NotFoundError", message: message.into(), param: None }
    }

    /// Says that the state is not the one that the caller expected (409).
    pub(crate) fn conflict(message: impl Into<String>) -> Self {
        ApiError { status: StatusCode::CONFLICT, kind: "ConflictError", message: message.into(), param: None }
    }

    /// Says that as many requests wait as may (429).
    pub(crate) fn busy(limit: usize) -> Self {
        let message = format!("{limit} requests are being answered or wait, the most that may; try again later");
        ApiError { status: StatusCode::TOO_MANY_REQUESTS, kind: "RateLimitError", message, param: None }
    }

    /// Reports a failure that is not the caller's fault (500).
    pub(crate) fn internal(message: impl Into<String>) -> Self {
        ApiError {
            status: StatusCode::INTERNAL_SERVER_ERROR,
            kind: "InternalServerError",
            message: message.into(),
            param: None,
        }
    }

    /// Returns the envelope.
    pub(crate) fn body(&self) -> Value {
        let code = self.status.as_u16();
        json!({"error": {"message": self.message, "type": self.kind, "param": self.param, "code": code}})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if self.status == StatusCode::TOO_MANY_REQUESTS {
            response.headers_mut().insert("retry-after", axum::http::HeaderValue::from_static("1"));
        }
        response
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::TooLong { prompt, new, context } => ApiError::bad(
                format!(
                    "This model's maximum context length is {context} tokens. However, you requested {new} output \
                     tokens and your prompt contains at least {prompt} input tokens. Please reduce the length of the \
                     input prompt or the number of requested output tokens."
                ),
                Some("input_tokens"),
            ),
            Refusal::Prompt(message) => ApiError::bad(message, Some("messages")),
            Refusal::Format(message) => ApiError::bad(message, Some("response_format")),
            Refusal::Engine(message) => ApiError::internal(message),
        }
    }
}

/// The fields of a chat request that this server reads; others are accepted and ignored, as vLLM does, except
/// those of [`UNSUPPORTED`], which would change the answer.
#[derive(Debug, Deserialize)]
pub(crate) struct ChatRequest {
    pub(crate) model: Option<String>,
    pub(crate) messages: Vec<Message>,
    pub(crate) tools: Option<crate::json::Value>,
    pub(crate) stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    n: Option<usize>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    top_k: Option<i64>,
    min_p: Option<f64>,
    repetition_penalty: Option<f64>,
    presence_penalty: Option<f64>,
    frequency_penalty: Option<f64>,
    max_tokens: Option<usize>,
    max_completion_tokens: Option<usize>,
    pub(crate) seed: Option<i64>,
    stop: Option<Stop>,
    response_format: Option<Value>,
    logprobs: Option<bool>,
    top_logprobs: Option<usize>,
    return_token_ids: Option<bool>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

/// Tells whether a value leaves the answer as it is.
type IsOff = fn(&Value) -> bool;

/// Parameters that would change the answer and that the sampler does not have, with the value that means "off".
const UNSUPPORTED: [(&str, IsOff); 1] = [("logit_bias", |v| v.as_object().is_some_and(Map::is_empty))];

/// More stop strings than OpenAI allows are refused; each costs a search per token.
const MAX_STOP_STRINGS: usize = 4;

#[derive(Debug, Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Stop {
    One(String),
    Many(Vec<String>),
}

/// What the answer shall carry besides its text.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Wanted {
    pub(crate) logprobs: bool,
    pub(crate) token_ids: bool,
    pub(crate) usage_chunk: bool,
}

impl ChatRequest {
    /// Reads the body of a request; the message is of vLLM's shape for a field that is wrong or missing.
    pub(crate) fn parse(body: &Value) -> Result<Self, ApiError> {
        let request: ChatRequest = ChatRequest::deserialize(body).map_err(|e| invalid(&e))?;
        if request.messages.is_empty() {
            return Err(ApiError::bad("'messages' is empty; send at least one message", Some("messages")));
        }
        for (name, is_off) in UNSUPPORTED {
            if request.rest.get(name).is_some_and(|v| !v.is_null() && !is_off(v)) {
                return Err(ApiError::bad(format!("this server does not apply '{name}'; leave it out"), Some(name)));
            }
        }
        Ok(request)
    }

    /// Checks the decoding parameters against the server's bounds.
    pub(crate) fn sampling(&self, settings: &Settings) -> Result<Sampling, ApiError> {
        let temperature = within("temperature", self.temperature.unwrap_or(1.0), 0.0, 2.0)?;
        let top_p = within("top_p", self.top_p.unwrap_or(1.0), f64::MIN_POSITIVE, 1.0)?;
        let top_k = usize::try_from(self.top_k.unwrap_or(0)).unwrap_or(0); // vLLM: -1 and 0 both mean "off"
        let min_p = within("min_p", self.min_p.unwrap_or(0.0), 0.0, 1.0)?;
        let asked = self.max_completion_tokens.or(self.max_tokens);
        if let Some(n) = asked.filter(|&n| n == 0 || n > settings.max_tokens) {
            let message = format!("max_tokens={n} is not between 1 and {}", settings.max_tokens);
            return Err(ApiError::bad(message, Some("max_tokens")));
        }
        let samples = self.n.unwrap_or(1);
        if samples == 0 || samples > settings.max_samples {
            let message = format!("n={samples} is not between 1 and {}", settings.max_samples);
            return Err(ApiError::bad(message, Some("n")));
        }
        let (penalties, stop, format) = (self.penalties()?, self.stop_strings()?, self.format()?);
        Ok(Sampling { temperature, top_p, top_k, min_p, penalties, max_tokens: asked, samples, stop, format })
    }

    fn penalties(&self) -> Result<Penalties, ApiError> {
        Ok(Penalties {
            // vLLM's bounds, and OpenAI's.
            repetition: within("repetition_penalty", self.repetition_penalty.unwrap_or(1.0), f64::MIN_POSITIVE, 2.0)?,
            presence: within("presence_penalty", self.presence_penalty.unwrap_or(0.0), -2.0, 2.0)?,
            frequency: within("frequency_penalty", self.frequency_penalty.unwrap_or(0.0), -2.0, 2.0)?,
        })
    }

    fn format(&self) -> Result<Format, ApiError> {
        let bad = |message: &str| ApiError::bad(message, Some("response_format"));
        let Some(format) = &self.response_format else { return Ok(Format::Text) };
        match (format["type"].as_str(), &format["json_schema"]["schema"]) {
            (Some("text"), _) => Ok(Format::Text),
            (Some("json_object"), _) => Ok(Format::JsonObject),
            (Some("json_schema"), schema @ Value::Object(_)) => Ok(Format::JsonSchema(schema.clone())),
            (Some("json_schema"), _) => Err(bad("'response_format.json_schema.schema' must be a JSON Schema object")),
            _ => Err(bad("'response_format.type' must be text, json_object or json_schema")),
        }
    }

    /// Returns what the answer shall carry.
    pub(crate) fn wanted(&self) -> Result<Wanted, ApiError> {
        let logprobs = self.logprobs.unwrap_or(false);
        match self.top_logprobs.unwrap_or(0) {
            0 => {}
            n => {
                let message = format!(
                    "top_logprobs={n}: this server returns the log-prob of the sampled token only; set it to 0"
                );
                return Err(ApiError::bad(message, Some("top_logprobs")));
            }
        }
        let usage_chunk = self.stream_options.as_ref().and_then(|o| o.include_usage).unwrap_or(false);
        Ok(Wanted { logprobs, token_ids: self.return_token_ids.unwrap_or(false), usage_chunk })
    }

    fn stop_strings(&self) -> Result<Vec<String>, ApiError> {
        let strings = match &self.stop {
            None => Vec::new(),
            Some(Stop::One(text)) => vec![text.clone()],
            Some(Stop::Many(texts)) => texts.clone(),
        };
        if strings.len() > MAX_STOP_STRINGS || strings.iter().any(String::is_empty) {
            let message = format!("'stop' must be at most {MAX_STOP_STRINGS} strings, none of them empty");
            return Err(ApiError::bad(message, Some("stop")));
        }
        Ok(strings)
    }
}

/// Words a JSON mistake as vLLM does: a 400 of type "Bad Request" that says what is wrong where.
pub(crate) fn invalid(error: &serde_json::Error) -> ApiError {
    let text = error.to_string();
    let message = match text.strip_prefix("missing field `").and_then(|rest| rest.split('`').next()) {
        Some(field) => {
            format!("1 validation error: {{'type': 'missing', 'loc': 'body.{field}', 'msg': 'Field required'}}")
        }
        None => format!("1 validation error: {{'type': 'invalid', 'loc': 'body', 'msg': '{text}'}}"),
    };
    ApiError { status: StatusCode::BAD_REQUEST, kind: "Bad Request", message, param: None }
}

fn within(name: &'static str, value: f64, low: f64, high: f64) -> Result<f64, ApiError> {
    match value >= low && value <= high {
        true => Ok(value),
        false => Err(ApiError::bad(format!("{name}={value} is not between {low} and {high}"), Some(name))),
    }
}

/// One sampled token.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Sampled {
    pub(crate) id: u32,
    /// The token alone as text; special tokens by their name.
    pub(crate) piece: String,
    pub(crate) logprob: f32,
}

/// One sample of an answer, as far as it has come.
#[derive(Debug, Clone, Default)]
pub(crate) struct Choice {
    pub(crate) text: String,
    pub(crate) tokens: Vec<Sampled>,
    pub(crate) finish_reason: Option<FinishReason>,
    /// The stop string that ended it.
    pub(crate) stop_string: Option<String>,
}

/// An answer, as far as it has come, and what stands at the head of its JSON.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub(crate) id: String,
    pub(crate) created: i64,
    /// The name that was asked for, as OpenAI and vLLM echo it.
    pub(crate) model: String,
    /// The name of the base or of the adapter that answered, with aliases resolved.
    pub(crate) served_version: String,
    pub(crate) prompt_ids: Vec<u32>,
    pub(crate) choices: Vec<Choice>,
    pub(crate) wanted: Wanted,
}

impl Answer {
    /// Returns the whole answer as a `chat.completion`.
    pub(crate) fn completion(&self) -> Value {
        let choices: Vec<Value> = (0..self.choices.len()).map(|index| self.choice(index)).collect();
        let mut body = self.head("chat.completion", choices);
        body["usage"] = self.usage();
        if self.wanted.token_ids {
            body["prompt_token_ids"] = json!(self.prompt_ids);
        }
        body
    }

    /// Returns one `chat.completion.chunk` of one sample: new text, the tokens behind it, or why it ended.
    pub(crate) fn chunk(&self, index: usize, delta: Value, tokens: &[Sampled], end: Option<FinishReason>) -> Value {
        let mut choice = json!({
            "index": index,
            "delta": delta,
            "logprobs": (self.wanted.logprobs && !tokens.is_empty()).then(|| logprobs(tokens)),
            "finish_reason": end.map(FinishReason::as_str),
            "stop_reason": end.and(self.choices[index].stop_string.as_ref()),
        });
        if self.wanted.token_ids {
            choice["token_ids"] = ids(tokens);
        }
        self.head("chat.completion.chunk", vec![choice])
    }

    /// Returns the chunk that opens a sample.
    pub(crate) fn opening(&self, index: usize) -> Value {
        let mut body = self.chunk(index, json!({"role": "assistant", "content": ""}), &[], None);
        if self.wanted.token_ids {
            body["prompt_token_ids"] = json!(self.prompt_ids);
        }
        body
    }

    /// Returns the chunk without choices that carries the usage, sent last where it was asked for.
    pub(crate) fn usage_chunk(&self) -> Value {
        let mut body = self.head("chat.completion.chunk", Vec::new());
        body["usage"] = self.usage();
        body
    }

    fn head(&self, object: &str, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "served_version": self.served_version,
            "choices": choices,
        })
    }

    fn choice(&self, index: usize) -> Value {
        let choice = &self.choices[index];
        let mut body = json!({
            "index": index,
            "message": {"role": "assistant", "content": choice.text},
            "logprobs": self.wanted.logprobs.then(|| logprobs(&choice.tokens)),
            "finish_reason": choice.finish_reason.map(FinishReason::as_str),
            "stop_reason": choice.stop_string,
        });
        if self.wanted.token_ids {
            body["token_ids"] = ids(&choice.tokens);
        }
        body
    }

    fn usage(&self) -> Value {
        let (prompt, new) = (self.prompt_ids.len(), self.choices.iter().map(|c| c.tokens.len()).sum::<usize>());
        json!({"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new})
    }
}

fn ids(tokens: &[Sampled]) -> Value {
    tokens.iter().map(|token| json!(token.id)).collect()
}

fn logprobs(tokens: &[Sampled]) -> Value {
    let entry = |token: &Sampled| {
        json!({
            "token": token.piece,
            "logprob": token.logprob,
            "bytes": token.piece.as_bytes(),
            "top_logprobs": [],
        })
    };
    json!({"content": tokens.iter().map(entry).collect::<Vec<_>>()})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(extra: Value) -> Result<Sampling, ApiError> {
        let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let request = ChatRequest::parse(&body)?;
        request.wanted()?;
        request.sampling(&Settings { max_tokens: 100, max_samples: 4, ..Settings::default() })
    }

    #[test]
    fn parameters_out_of_bounds_are_named() {
        let cases = [
            (json!({"max_tokens": 101}), "max_tokens=101"),
            (json!({"max_completion_tokens": 0}), "max_tokens=0"),
            (json!({"n": 5}), "n=5"),
            (json!({"temperature": -0.1}), "temperature=-0.1"),
            (json!({"top_p": 0.0}), "top_p=0"),
            (json!({"top_logprobs": 5}), "top_logprobs=5"),
            (json!({"stop": ["a", ""]}), "'stop'"),
            (json!({"frequency_penalty": 2.5}), "frequency_penalty=2.5"),
            (json!({"min_p": 1.5}), "min_p=1.5"),
            (json!({"repetition_penalty": 0.0}), "repetition_penalty=0"),
            (json!({"response_format": {"type": "xml"}}), "'response_format.type'"),
            (json!({"response_format": {"type": "json_schema", "json_schema": {}}}), "json_schema.schema'"),
            (json!({"messages": []}), "'messages'"),
        ];
        for (extra, expected) in cases {
            let error = parse(extra.clone()).unwrap_err();
            assert!(error.status == StatusCode::BAD_REQUEST && error.message.contains(expected), "{extra}: {error:?}");
        }
    }

    #[test]
    fn nulls_and_values_that_mean_off_are_accepted() {
        let sampling = parse(json!({"temperature": null, "frequency_penalty": 0, "response_format": {"type": "text"},
            "logit_bias": {}, "stop": "x", "top_k": -1, "max_tokens": 7, "max_completion_tokens": 8}))
        .unwrap();
        let expected = Sampling {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            penalties: Penalties { repetition: 1.0, presence: 0.0, frequency: 0.0 },
            max_tokens: Some(8),
            samples: 1,
            stop: vec!["x".into()],
            format: Format::Text,
        };
        assert_eq!(sampling, expected);
    }

    #[test]
    fn a_missing_field_reads_as_vllm_words_it() {
        let error = ChatRequest::parse(&json!({"model": "m"})).unwrap_err();
        assert_eq!(error.kind, "Bad Request");
        assert!(error.message.contains("'type': 'missing', 'loc': 'body.messages'"), "{error:?}");
    }
}
