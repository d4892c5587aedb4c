//! HTTP as every driver speaks it: marked as our own, with bounded answers, bounded tries, and errors in one line.
//!
//! A load that fails inside an engine (vLLM says 500 for a bad adapter) is final, so only connection errors and busy
//! answers are tried again.

use std::time::Duration;

use chrono::{DateTime, Utc};
use reqwest::{Client, Method, RequestBuilder, Response};
use serde_json::{Value, json};

use crate::secret::{self, Secret};

use super::server::{Question, Reply};
use super::{EndpointError, Settings};

/// Marks every request that taod itself makes, so that ingestion never trains on it.
pub const INTERNAL_HEADER: &str = "x-taod-internal";
/// The end user of every request that taod itself makes.
pub const INTERNAL_USER: &str = "taod-internal";

/// The largest answer that is read, in bytes.
const MAX_ANSWER: usize = 16 << 20;
/// The longest piece of a server's message that is repeated in ours, in characters.
const MAX_MESSAGE: usize = 300;

/// A client of one server.
#[derive(Clone)]
pub(super) struct Http {
    url: String,
    client: Client,
    key: Option<Secret>,
    retries: u32,
    request_timeout: Duration,
    load_timeout: Duration,
}

/// An answer as it came: a status and a text.
pub(super) struct Raw {
    pub(super) status: u16,
    pub(super) text: String,
    /// The server's clock, in whole seconds, where it tells.
    pub(super) date: Option<DateTime<Utc>>,
}

impl Raw {
    /// Returns the message of an error's body in one line: OpenAI's envelope, FastAPI's `detail`, or the text itself.
    pub(super) fn message(&self) -> String {
        message(&self.text)
    }

    pub(super) fn is_success(&self) -> bool {
        (200..300).contains(&self.status)
    }
}

impl Http {
    /// Returns a client for each of the endpoint's servers at `urls`, which share their connections and the key.
    pub(super) fn of(settings: &Settings, urls: &[String]) -> Result<Vec<Http>, EndpointError> {
        let key = secret::read("endpoint.api_key", Some(&settings.api_key_file))?;
        Http::with_key(settings, urls, key)
    }

    /// Returns a client for each of `urls` with another key than the servers' own, or none.
    pub(super) fn with_key(
        settings: &Settings,
        urls: &[String],
        key: Option<Secret>,
    ) -> Result<Vec<Http>, EndpointError> {
        let client = Client::builder()
            .connect_timeout(Duration::from_secs(settings.connect_timeout_seconds))
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .map_err(|e| EndpointError::Client(e.to_string()))?;
        let replica = |url: &String| Http {
            url: url.trim_end_matches('/').to_owned(),
            client: client.clone(),
            key: key.clone(),
            retries: settings.retries,
            request_timeout: Duration::from_secs(settings.request_timeout_seconds),
            load_timeout: Duration::from_secs(settings.load_timeout_seconds),
        };
        Ok(urls.iter().map(replica).collect())
    }

    /// Returns the server's address.
    pub(super) fn url(&self) -> &str {
        &self.url
    }

    /// Returns the time that the load of an adapter may take.
    pub(super) fn load_timeout(&self) -> Duration {
        self.load_timeout
    }

    /// Posts a change of the adapters, which may take as long as a load.
    pub(super) async fn change(&self, path: &str, body: &Value, what: &str) -> Result<Raw, EndpointError> {
        self.send(Method::POST, path, Some(body), what, self.load_timeout).await
    }

    /// Sends a request that takes as long as an answer.
    pub(super) async fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        what: &str,
    ) -> Result<Raw, EndpointError> {
        self.send(method, path, body, what, self.request_timeout).await
    }

    /// Asks a chat completion greedily, with `more` beside what every server understands.
    pub(super) async fn chat(&self, question: &Question<'_>, more: Value) -> Result<Reply, EndpointError> {
        let what = format!("a question to '{}'", question.model);
        let mut body = json!({
            "model": question.model,
            "messages": question.messages,
            "max_tokens": question.max_tokens,
            "temperature": 0.0,
            "logprobs": true,
            "user": INTERNAL_USER,
        });
        if let (Some(body), Value::Object(more)) = (body.as_object_mut(), more) {
            body.extend(more);
        }
        let answer = self.json(Method::POST, "/v1/chat/completions", Some(&body), &what).await?;
        reply(&answer["choices"][0]).ok_or_else(|| self.unexpected(&what, "choices[0].logprobs.content"))
    }

    /// Sends a request and reads a JSON answer.
    pub(super) async fn json(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        what: &str,
    ) -> Result<Value, EndpointError> {
        let raw = self.call(method, path, body, what).await?;
        if !raw.is_success() {
            return Err(self.refused(&raw, what));
        }
        serde_json::from_str(&raw.text).map_err(|_| self.unexpected(what, "JSON"))
    }

    /// Sends a request; connection errors and busy answers are tried again, at most `retries` times.
    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        what: &str,
        timeout: Duration,
    ) -> Result<Raw, EndpointError> {
        let mut tries = 0;
        loop {
            let request = self.request(method.clone(), path, body).timeout(timeout);
            let outcome = match request.send().await {
                Ok(response) => self.receive(response, what).await,
                Err(error) => Err(self.broken(&error, what)),
            };
            let again = match &outcome {
                Ok(raw) => matches!(raw.status, 429 | 503),
                Err(error) => matches!(error, EndpointError::Unreachable { .. }),
            };
            if !again || tries >= self.retries {
                return outcome;
            }
            tokio::time::sleep(Duration::from_millis(100 << tries)).await;
            tries += 1;
        }
    }

    fn request(&self, method: Method, path: &str, body: Option<&Value>) -> RequestBuilder {
        let mut request = self.client.request(method, format!("{}{path}", self.url)).header(INTERNAL_HEADER, "1");
        if let Some(key) = &self.key {
            request = request.bearer_auth(key.expose());
        }
        match body {
            Some(body) => request.json(body),
            None => request,
        }
    }

    /// Reads an answer, at most [`MAX_ANSWER`] bytes of it.
    async fn receive(&self, mut response: Response, what: &str) -> Result<Raw, EndpointError> {
        let status = response.status().as_u16();
        let kind = response.headers().get("content-type").and_then(|v| v.to_str().ok()).unwrap_or_default();
        let mut is_page = kind.starts_with("text/html");
        let date = response.headers().get("date").and_then(|v| v.to_str().ok());
        let date = date.and_then(|text| DateTime::parse_from_rfc2822(text).ok()).map(|date| date.to_utc());
        let mut bytes = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|e| self.broken(&e, what))? {
            bytes.extend_from_slice(&chunk);
            if bytes.len() > MAX_ANSWER {
                return Err(self.unexpected(what, "an end within 16 MiB"));
            }
        }
        let text = String::from_utf8_lossy(&bytes).into_owned();
        is_page |= text.trim_start().starts_with('<');
        match is_page {
            true => Err(EndpointError::WebPage { url: self.url.clone(), what: what.to_owned(), status }),
            false => Ok(Raw { status, text, date }),
        }
    }

    fn broken(&self, error: &reqwest::Error, what: &str) -> EndpointError {
        if error.is_timeout() && !error.is_connect() {
            return EndpointError::Silent { url: self.url.clone(), what: what.to_owned() };
        }
        // The innermost cause is the one that helps ("connection refused"); the outer ones repeat the address.
        let mut cause: &dyn std::error::Error = error;
        while let Some(inner) = cause.source() {
            cause = inner;
        }
        EndpointError::Unreachable { url: self.url.clone(), reason: cause.to_string().to_lowercase() }
    }

    pub(super) fn refused(&self, raw: &Raw, what: &str) -> EndpointError {
        let (url, what, message) = (self.url.clone(), what.to_owned(), message(&raw.text));
        EndpointError::Status { url, what, status: raw.status, message }
    }

    pub(super) fn unexpected(&self, what: &str, field: &'static str) -> EndpointError {
        EndpointError::Unexpected { url: self.url.clone(), what: what.to_owned(), field }
    }
}

/// Reads the first choice of an answer, if all of it is there and its parts are of one length.
fn reply(choice: &Value) -> Option<Reply> {
    let content = choice["logprobs"]["content"].as_array()?;
    let pieces: Vec<String> = content.iter().map(|t| t["token"].as_str().map(str::to_owned)).collect::<Option<_>>()?;
    let logprobs: Vec<f64> = content.iter().map(|t| t["logprob"].as_f64()).collect::<Option<_>>()?;
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    let token_ids: Option<Vec<u32>> = match choice["token_ids"].as_array() {
        Some(ids) => ids.iter().map(id).collect(),
        // llama.cpp has each token's beside its log-prob.
        None => content.iter().map(|token| id(&token["id"])).collect(),
    };
    Some(Reply {
        text: choice["message"]["content"].as_str().unwrap_or_default().to_owned(),
        token_ids: token_ids.filter(|ids| ids.len() == logprobs.len()),
        pieces,
        logprobs,
        finish_reason: choice["finish_reason"].as_str().map(str::to_owned),
    })
}

/// Returns the message of an error's body in one line: OpenAI's envelope, FastAPI's `detail`, or the text itself.
fn message(text: &str) -> String {
    let body: Value = serde_json::from_str(text).unwrap_or(Value::Null);
    let inner = body["error"]["message"].as_str().or(body["message"].as_str()).or(body["detail"].as_str());
    one_line(inner.unwrap_or(text))
}

/// Returns a server's words in one bounded line.
pub(super) fn one_line(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    let line = words.join(" ");
    match line.is_empty() {
        true => "an empty body".to_owned(),
        false => line.chars().take(MAX_MESSAGE).collect(),
    }
}
