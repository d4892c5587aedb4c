//! One server in vLLM's dialect: adapters in and out, chats with log-probs, and the alias of `taod serve`.
//!
//! Whatever changes the server is read back, and is safe to repeat: a connection may break after the server has acted.
//! A load that fails inside the engine (vLLM says 500 for a bad adapter) is final, so only connection errors and busy
//! answers are tried again. Paths are sent absolute, because vLLM takes a relative one for a hub id.

use std::path::Path;
use std::time::Duration;

use reqwest::{Client, Method, RequestBuilder, Response};
use serde_json::{Value, json};

use crate::record::Message;
use crate::secret::{self, Secret};

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
pub struct Vllm {
    url: String,
    client: Client,
    key: Option<Secret>,
    retries: u32,
    request_timeout: Duration,
    load_timeout: Duration,
}

/// One line of `/v1/models`.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelCard {
    pub id: String,
    /// The path it came from.
    pub root: Option<String>,
    /// The base model, for an adapter.
    pub parent: Option<String>,
}

/// How an adapter takes its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Load {
    /// The name must be new.
    Fresh,
    /// The name may be taken; the new folder replaces the old one.
    InPlace,
}

/// A greedy question whose answer comes with log-probs.
#[derive(Debug, Clone)]
pub struct Question<'a> {
    pub model: &'a str,
    pub messages: &'a [Message],
    pub max_tokens: usize,
}

/// The answer to a [`Question`].
#[derive(Debug, Clone, PartialEq)]
pub struct Reply {
    pub text: String,
    /// `None` where the server does not return ids (older vLLM, other servers).
    pub token_ids: Option<Vec<u32>>,
    /// The tokens as text.
    pub pieces: Vec<String>,
    pub logprobs: Vec<f64>,
    pub finish_reason: Option<String>,
}

/// An answer as it came: a status and a text.
struct Raw {
    status: u16,
    text: String,
}

impl Vllm {
    /// Returns a client for each of the endpoint's replicas.
    pub fn replicas(settings: &Settings) -> Result<Vec<Vllm>, EndpointError> {
        let client = Client::builder()
            .connect_timeout(Duration::from_secs(settings.connect_timeout_seconds))
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .map_err(|e| EndpointError::Client(e.to_string()))?;
        let key = secret::read("endpoint.api_key", Some(&settings.api_key_file))?;
        let replica = |url: &String| Vllm {
            url: url.trim_end_matches('/').to_owned(),
            client: client.clone(),
            key: key.clone(),
            retries: settings.retries,
            request_timeout: Duration::from_secs(settings.request_timeout_seconds),
            load_timeout: Duration::from_secs(settings.load_timeout_seconds),
        };
        Ok(settings.urls.iter().map(replica).collect())
    }

    /// Returns the server's address.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Returns what the server lists: its base model and the loaded adapters.
    pub async fn models(&self) -> Result<Vec<ModelCard>, EndpointError> {
        let what = "GET /v1/models";
        let list = self.json(Method::GET, "/v1/models", None, what).await?;
        let cards = list["data"].as_array().ok_or_else(|| self.unexpected(what, "data"))?;
        let text = |card: &Value, key: &str| card[key].as_str().map(str::to_owned);
        let card = |card: &Value| {
            let id = text(card, "id").ok_or_else(|| self.unexpected(what, "data[].id"))?;
            Ok(ModelCard { id, root: text(card, "root"), parent: text(card, "parent") })
        };
        cards.iter().map(card).collect()
    }

    /// Loads the adapter in `folder` under `name`, and reads back that it is there. Safe to repeat.
    pub async fn load(&self, name: &str, folder: &Path, how: Load) -> Result<(), EndpointError> {
        let (path, what) = (folder.display().to_string(), format!("the load of '{name}'"));
        let body = json!({"lora_name": name, "lora_path": path, "load_inplace": how == Load::InPlace});
        let raw = self.send(Method::POST, "/v1/load_lora_adapter", Some(&body), &what, self.load_timeout).await?;
        let message = message(&raw.text);
        let known = raw.status == 400 && message.contains("has already been loaded");
        match raw.status {
            200..=299 => {}
            _ if known => {}
            404 if message == "Not Found" => return Err(EndpointError::NoRoute { url: self.url.clone(), what }),
            _ => return Err(self.refused(&raw, &what)),
        }
        self.read_back(name, path).await
    }

    async fn read_back(&self, name: &str, path: String) -> Result<(), EndpointError> {
        let cards = self.models().await?;
        let card = cards.into_iter().find(|card| card.id == name);
        if card.as_ref().and_then(|card| card.root.as_ref()) == Some(&path) {
            return Ok(());
        }
        let found = match card {
            Some(card) => format!("it with root {}", card.root.as_deref().unwrap_or("unknown")),
            None => "nothing of that name".to_owned(),
        };
        Err(EndpointError::ReadBack { url: self.url.clone(), name: name.to_owned(), path, found })
    }

    /// Unloads an adapter; one that is not loaded is no error.
    pub async fn unload(&self, name: &str) -> Result<(), EndpointError> {
        let what = format!("the unload of '{name}'");
        let body = json!({"lora_name": name});
        let raw = self.send(Method::POST, "/v1/unload_lora_adapter", Some(&body), &what, self.load_timeout).await?;
        match raw.status {
            200..=299 => Ok(()),
            404 if message(&raw.text) == "Not Found" => Err(EndpointError::NoRoute { url: self.url.clone(), what }),
            404 => Ok(()),
            _ => Err(self.refused(&raw, &what)),
        }
    }

    /// Asks a question greedily; the answer carries its tokens and their log-probs.
    pub async fn ask(&self, question: &Question<'_>) -> Result<Reply, EndpointError> {
        let what = format!("a question to '{}'", question.model);
        let body = json!({
            "model": question.model,
            "messages": question.messages,
            "max_tokens": question.max_tokens,
            "temperature": 0.0,
            "logprobs": true,
            "return_token_ids": true,
            "user": INTERNAL_USER,
        });
        let answer = self.json(Method::POST, "/v1/chat/completions", Some(&body), &what).await?;
        reply(&answer["choices"][0]).ok_or_else(|| self.unexpected(&what, "choices[0].logprobs.content"))
    }

    /// Returns what an alias points at, if it exists.
    pub async fn alias(&self, name: &str) -> Result<Option<String>, EndpointError> {
        let what = "GET /v1/aliases";
        let list = self.json(Method::GET, "/v1/aliases", None, what).await?;
        let entries = list["data"].as_array().ok_or_else(|| self.unexpected(what, "data"))?;
        let entry = entries.iter().find(|entry| entry["name"] == name);
        Ok(entry.and_then(|entry| entry["target"].as_str()).map(str::to_owned))
    }

    /// Points an alias at `target`, if it points at `expected` (`None`: if it does not exist). Safe to repeat.
    pub async fn move_alias(&self, name: &str, expected: Option<&str>, target: &str) -> Result<(), EndpointError> {
        let what = format!("the move of alias '{name}' to '{target}'");
        let body = json!({"target": target, "expected": expected});
        let path = format!("/v1/aliases/{name}");
        let raw = self.send(Method::PUT, &path, Some(&body), &what, self.request_timeout).await?;
        match raw.status {
            200..=299 => Ok(()),
            409 => match self.alias(name).await? {
                Some(current) if current == target => Ok(()),
                current => Err(EndpointError::AliasMoved {
                    url: self.url.clone(),
                    name: name.to_owned(),
                    current: current.unwrap_or_else(|| "nothing".into()),
                    expected: expected.unwrap_or("nothing").to_owned(),
                }),
            },
            _ => Err(self.refused(&raw, &what)),
        }
    }

    /// Sends a request and reads a JSON answer.
    async fn json(&self, method: Method, path: &str, body: Option<&Value>, what: &str) -> Result<Value, EndpointError> {
        let raw = self.send(method, path, body, what, self.request_timeout).await?;
        if !(200..300).contains(&raw.status) {
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
            false => Ok(Raw { status, text }),
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

    fn refused(&self, raw: &Raw, what: &str) -> EndpointError {
        let (url, what, message) = (self.url.clone(), what.to_owned(), message(&raw.text));
        EndpointError::Status { url, what, status: raw.status, message }
    }

    fn unexpected(&self, what: &str, field: &'static str) -> EndpointError {
        EndpointError::Unexpected { url: self.url.clone(), what: what.to_owned(), field }
    }
}

/// Reads the first choice of an answer, if all of it is there and its parts are of one length.
fn reply(choice: &Value) -> Option<Reply> {
    let content = choice["logprobs"]["content"].as_array()?;
    let pieces: Vec<String> = content.iter().map(|t| t["token"].as_str().map(str::to_owned)).collect::<Option<_>>()?;
    let logprobs: Vec<f64> = content.iter().map(|t| t["logprob"].as_f64()).collect::<Option<_>>()?;
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    let token_ids: Option<Vec<u32>> = choice["token_ids"].as_array().and_then(|ids| ids.iter().map(id).collect());
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
    let words: Vec<&str> = inner.unwrap_or(text).split_whitespace().collect();
    let line = words.join(" ");
    match line.is_empty() {
        true => "an empty body".to_owned(),
        false => line.chars().take(MAX_MESSAGE).collect(),
    }
}

#[cfg(test)]
#[path = "vllm_tests.rs"]
mod tests;
