//! Requests to scoring servers: several at a time, tried again within a budget, each bounded in time and size.
//!
//! A server's answer is never trusted: what is not JSON, is too large or comes too late is an error that names the server.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use futures::StreamExt;
use reqwest::{Client, StatusCode};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::query_log::format::exclusion::INTERNAL_HEADER;
use crate::secret::{self, Secret};

/// A pause before a request is sent again, doubled with each.
const PAUSE: Duration = Duration::from_millis(200);
/// The longest pause.
const MAX_PAUSE: Duration = Duration::from_secs(10);
/// Size of the largest answer, in bytes.
const MAX_ANSWER: usize = 16 << 20;
/// The longest piece of a server's message that is repeated in ours, in characters.
const MAX_MESSAGE: usize = 200;

/// How a server is asked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Asking {
    /// File with the server's API key; empty: none.
    pub api_key_file: PathBuf,
    /// Requests under way at the same time. Range 1 to 256.
    pub concurrency: usize,
    /// How often one request is sent again after a broken connection, a time-out or a busy answer. Range 0 to 20.
    pub retries: u32,
    /// How many such repetitions all requests of one scoring may need together; a server that is down ends it early. Range 0
    /// to 10000.
    pub retry_budget: u32,
    /// How long one request may take, in seconds. Range 1 to 3600.
    pub timeout_s: u64,
}

impl Default for Asking {
    fn default() -> Self {
        Asking { api_key_file: PathBuf::new(), concurrency: 8, retries: 3, retry_budget: 20, timeout_s: 60 }
    }
}

impl Asking {
    /// Checks every key; the message names key, value and remedy.
    pub fn validate(&self) -> Result<(), String> {
        let ranges = [
            ("concurrency", self.concurrency as u64, 1, 256),
            ("retries", u64::from(self.retries), 0, 20),
            ("retry_budget", u64::from(self.retry_budget), 0, 10_000),
            ("timeout_s", self.timeout_s, 1, 3600),
        ];
        match ranges.into_iter().find(|(_, value, low, high)| !(low..=high).contains(&value)) {
            Some((key, value, low, high)) => Err(format!("{key} = {value}: choose {low} to {high}")),
            None => Ok(()),
        }
    }
}

/// Checks the address of a server.
pub(super) fn check_url(url: &str) -> Result<(), String> {
    match url::Url::parse(url) {
        Ok(parsed) if matches!(parsed.scheme(), "http" | "https") && parsed.has_host() => Ok(()),
        _ => Err(format!("url = {url:?}: begin it with http:// or https:// and name a host")),
    }
}

/// A server that gave no usable answer.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    #[error("{url} cannot be reached (asked {tries} times): {reason}; check that the server runs at this address")]
    Down { url: String, tries: u32, reason: String },
    #[error("{url} gave no answer within {seconds} s (asked {tries} times); raise timeout_s or ask for less at once")]
    Slow { url: String, seconds: u64, tries: u32 },
    #[error("{url} answers {status} (asked {tries} times): {said}")]
    Status { url: String, status: StatusCode, tries: u32, said: String },
    #[error("{url} answers with {what}, not with JSON: is it the address of a scoring server?")]
    NotJson { url: String, what: &'static str },
    #[error("{url} answers with a number that is none (NaN or Infinity): its model is damaged or overflows")]
    NotANumber { url: String },
    #[error("{url} answers with more than {MAX_ANSWER} bytes; ask for less at once")]
    TooLarge { url: String },
    #[error("{0}")]
    Client(String),
}

/// A client of one server.
pub(super) struct Caller {
    asking: Asking,
    key: Option<Secret>,
}

impl Caller {
    /// Reads the key; `name` is the scorer's, which an environment variable may carry the key for.
    pub(super) fn open(name: &str, asking: &Asking) -> Result<Self, HttpError> {
        let key = secret::read(&format!("rewards.{}.api_key", name.replace('-', "_")), Some(&asking.api_key_file));
        Ok(Caller { asking: asking.clone(), key: key.map_err(|e| HttpError::Client(e.to_string()))? })
    }

    /// Posts each body to the address and returns the answers in the order of the bodies. The first failure ends all.
    pub(super) fn post_all(&self, url: &str, bodies: &[Value]) -> Result<Vec<Value>, HttpError> {
        // A thread of its own: a caller may already be inside a runtime, where a second one cannot block.
        std::thread::scope(|scope| {
            let work = scope.spawn(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
                let runtime = runtime.map_err(|e| HttpError::Client(e.to_string()))?;
                runtime.block_on(self.post_each(url, bodies))
            });
            work.join().unwrap_or_else(|_| Err(HttpError::Client("the client stopped".into())))
        })
    }

    async fn post_each(&self, url: &str, bodies: &[Value]) -> Result<Vec<Value>, HttpError> {
        let timeout = Duration::from_secs(self.asking.timeout_s);
        let client = Client::builder().timeout(timeout).build().map_err(|e| HttpError::Client(e.to_string()))?;
        let budget = AtomicU32::new(self.asking.retry_budget);
        let answers = futures::stream::iter(bodies).map(|body| self.post(&client, url, body, &budget));
        let mut answers = std::pin::pin!(answers.buffered(self.asking.concurrency));
        let mut found = Vec::with_capacity(bodies.len());
        while let Some(answer) = answers.next().await {
            found.push(answer?);
        }
        Ok(found)
    }

    /// Posts one body, again after what may pass.
    async fn post(&self, client: &Client, url: &str, body: &Value, budget: &AtomicU32) -> Result<Value, HttpError> {
        let mut tries = 0;
        loop {
            tries += 1;
            let (error, pause) = match self.send(client, url, body, tries).await {
                Ok(value) => return Ok(value),
                Err(Failure { error, may_pass: false, .. }) => return Err(error),
                Err(Failure { error, pause, .. }) => (error, pause),
            };
            let spend = |left: u32| left.checked_sub(1);
            if tries > self.asking.retries || budget.fetch_update(Ordering::Relaxed, Ordering::Relaxed, spend).is_err()
            {
                return Err(error);
            }
            tokio::time::sleep(pause.unwrap_or(PAUSE * (1 << (tries - 1).min(16))).min(MAX_PAUSE)).await;
        }
    }

    async fn send(&self, client: &Client, url: &str, body: &Value, tries: u32) -> Result<Value, Failure> {
        let mut request = client.post(url).header(INTERNAL_HEADER, "1").json(body);
        if let Some(key) = &self.key {
            request = request.bearer_auth(key.expose());
        }
        let mut response = request.send().await.map_err(|e| self.broken(url, &e, tries))?;
        let mut bytes = Vec::new();
        while let Some(piece) = response.chunk().await.map_err(|e| self.broken(url, &e, tries))? {
            if bytes.len() + piece.len() > MAX_ANSWER {
                return Err(Failure::final_(HttpError::TooLarge { url: url.into() }));
            }
            bytes.extend_from_slice(&piece);
        }
        let (status, text) = (response.status(), String::from_utf8_lossy(&bytes));
        if status.is_success() {
            return serde_json::from_slice(&bytes).map_err(|_| Failure::final_(unreadable(url, &text)));
        }
        let wait = response.headers().get("retry-after").and_then(|value| value.to_str().ok()?.parse().ok());
        let said: String = text.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(MAX_MESSAGE).collect();
        let error = HttpError::Status { url: url.into(), status, tries, said };
        let may_pass = status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error();
        Err(Failure { error, may_pass, pause: wait.map(Duration::from_secs) })
    }

    fn broken(&self, url: &str, error: &reqwest::Error, tries: u32) -> Failure {
        let url = url.to_owned();
        let error = match error.is_timeout() {
            true => HttpError::Slow { url, seconds: self.asking.timeout_s, tries },
            false => HttpError::Down { url, tries, reason: innermost(error) },
        };
        Failure { error, may_pass: true, pause: None }
    }
}

/// A failed request.
struct Failure {
    error: HttpError,
    may_pass: bool,
    /// How long the server asks to wait.
    pause: Option<Duration>,
}

impl Failure {
    fn final_(error: HttpError) -> Self {
        Failure { error, may_pass: false, pause: None }
    }
}

/// Returns what a body is that does not parse. Python writes NaN into JSON, which then is none.
fn unreadable(url: &str, text: &str) -> HttpError {
    let url = url.to_owned();
    let start = text.trim_start();
    if start.starts_with('<') {
        HttpError::NotJson { url, what: "HTML" }
    } else if start.starts_with(['{', '[']) && (text.contains("NaN") || text.contains("Infinity")) {
        HttpError::NotANumber { url }
    } else if start.is_empty() {
        HttpError::NotJson { url, what: "nothing" }
    } else {
        HttpError::NotJson { url, what: "text" }
    }
}

/// Returns the cause at the bottom of a chain of errors; reqwest's own words repeat the address.
fn innermost(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |error| error.source())
        .last()
        .map_or_else(String::new, |error| error.to_string())
}
