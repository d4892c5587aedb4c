//! What a collector of OpenTelemetry is sent, by OTLP over HTTP in protobuf: spans and events that are whole when they are made.
//!
//! There is no ambient tracer. A round is another process that may be resumed on another night, so that its spans are made of
//! its record when it has ended, under ids that follow from the round: a second export is the same spans. Off without an
//! endpoint. The messages are our own few (`proto`): the SDK would bring its own batching, threads and HTTP client for two
//! requests a night.

mod proto;

use std::path::PathBuf;
use std::time::Duration;

use prost::Message;
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use reqwest::{Client, StatusCode};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::secret::{self, SecretError};
use proto::{AnyValue, KeyValue, LogRecord, LogsRequest, Resource, ResourceLogs, ResourceSpans, Scope, ScopeLogs};
use proto::{ScopeSpans, Status, TraceRequest, Value};

/// Tries of one request.
const TRIES: u32 = 4;
/// The pause after the first failed try; it doubles with each.
const PAUSE: Duration = Duration::from_secs(1);
/// Bytes of an answer that are read.
const MAX_ANSWER: usize = 64 << 10;
/// Spans or events in one request; collectors refuse bodies of some MiB.
const BATCH: usize = 512;

/// Where spans and events go.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Base address of an OpenTelemetry collector's OTLP over HTTP, such as `http://127.0.0.1:4318`; `/v1/traces` and `/v1/logs`
    /// are added. Empty: nothing is sent.
    pub otlp_endpoint: String,
    /// File with headers that the collector asks for, one `name: value` a line, such as `authorization: Bearer ...`; empty:
    /// none.
    pub headers_file: PathBuf,
    /// How taod calls itself (`service.name`).
    pub service_name: String,
    /// How long one try may take, in seconds; there are up to 4. Range 1 to 60.
    pub timeout_s: u64,
    /// Send an event `gen_ai.evaluation.result` for each call of clients that the live watch scores (`endpoint.watch`); it holds
    /// ids and scores, no text.
    pub evaluations: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            otlp_endpoint: String::new(),
            headers_file: PathBuf::new(),
            service_name: "taod".into(),
            timeout_s: 10,
            evaluations: true,
        }
    }
}

impl Settings {
    /// Checks the values; the message names the key, the value and the remedy.
    pub fn validate(&self) -> Result<(), String> {
        let url = &self.otlp_endpoint;
        let is_http = || url::Url::parse(url).is_ok_and(|u| matches!(u.scheme(), "http" | "https") && u.has_host());
        if !url.is_empty() && !is_http() {
            return Err(format!("otlp_endpoint = {url:?}: begin it with http:// or https:// and name a host"));
        }
        match self.timeout_s {
            1..=60 => Ok(()),
            other => Err(format!("timeout_s = {other}: choose 1 to 60")),
        }
    }

    /// Returns true where there is somebody to send to.
    pub fn is_on(&self) -> bool {
        !self.otlp_endpoint.is_empty()
    }
}

/// Why a collector did not take what it was sent.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    #[error(transparent)]
    Secret(#[from] SecretError),
    #[error("{file}, line {line} is no header: write `name: value`")]
    Header { file: String, line: usize },
    #[error("{url} cannot be reached: {reason}")]
    Down { url: String, reason: String },
    #[error("{url} answers {status}: is it a collector's OTLP over HTTP?")]
    Refused { url: String, status: StatusCode },
    #[error("{url} did not take {rejected} of what it was sent: {message}")]
    Partly { url: String, rejected: i64, message: String },
}

/// What an attribute may be.
#[derive(Debug, Clone, PartialEq)]
pub enum Attribute {
    Text(String),
    Whole(i64),
    Number(f64),
}

/// Attributes by name.
pub type Attributes = Vec<(&'static str, Attribute)>;

/// A piece of work that is over.
#[derive(Debug, Clone, PartialEq)]
pub struct Span {
    pub trace_id: [u8; 16],
    pub span_id: [u8; 8],
    pub parent: Option<[u8; 8]>,
    pub name: String,
    /// Microseconds since the epoch, like the next one.
    pub start_us: i64,
    pub end_us: i64,
    pub attributes: Attributes,
    /// Why it failed, where it did.
    pub error: Option<String>,
}

/// Something that happened at a point in time.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    pub time_us: i64,
    pub name: &'static str,
    /// The trace that it belongs to, where that is known.
    pub trace_id: Option<[u8; 16]>,
    pub attributes: Attributes,
}

/// Sends spans to the collector of the settings.
pub async fn send_spans(settings: &Settings, spans: &[Span]) -> Result<(), TelemetryError> {
    let exporter = Exporter::new(settings)?;
    for batch in spans.chunks(BATCH) {
        let spans = ScopeSpans { scope: Some(scope()), spans: batch.iter().map(span).collect() };
        let all = ResourceSpans { resource: Some(resource(settings)), scope_spans: vec![spans] };
        exporter.post("/v1/traces", &TraceRequest { resource_spans: vec![all] }).await?;
    }
    Ok(())
}

/// Sends events to the collector of the settings. `now_us` is when they were made.
pub async fn send_events(settings: &Settings, events: &[Event], now_us: i64) -> Result<(), TelemetryError> {
    let exporter = Exporter::new(settings)?;
    for batch in events.chunks(BATCH) {
        let records = batch.iter().map(|event| record(event, now_us)).collect();
        let logs = ScopeLogs { scope: Some(scope()), log_records: records };
        let all = ResourceLogs { resource: Some(resource(settings)), scope_logs: vec![logs] };
        exporter.post("/v1/logs", &LogsRequest { resource_logs: vec![all] }).await?;
    }
    Ok(())
}

struct Exporter<'a> {
    settings: &'a Settings,
    client: Client,
    first_pause: Duration,
}

impl<'a> Exporter<'a> {
    fn new(settings: &'a Settings) -> Result<Self, TelemetryError> {
        let timeout = Duration::from_secs(settings.timeout_s);
        let client = Client::builder().timeout(timeout).default_headers(headers(settings)?).build();
        let broken =
            |e: reqwest::Error| TelemetryError::Down { url: settings.otlp_endpoint.clone(), reason: e.to_string() };
        Ok(Exporter { settings, client: client.map_err(broken)?, first_pause: PAUSE })
    }

    /// Posts a message, again after what OTLP says may pass.
    async fn post(&self, path: &str, message: &impl Message) -> Result<(), TelemetryError> {
        let url = format!("{}{path}", self.settings.otlp_endpoint.trim_end_matches('/'));
        let body = message.encode_to_vec();
        let mut pause = self.first_pause;
        for left in (0..TRIES).rev() {
            let error = match self.try_once(&url, body.clone()).await {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            let may_pass = match &error {
                TelemetryError::Down { .. } => true,
                TelemetryError::Refused { status, .. } => matches!(status.as_u16(), 429 | 502..=504),
                _ => false,
            };
            if !may_pass || left == 0 {
                return Err(error);
            }
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
        Ok(())
    }

    async fn try_once(&self, url: &str, body: Vec<u8>) -> Result<(), TelemetryError> {
        let down = |e: reqwest::Error| TelemetryError::Down { url: url.into(), reason: e.without_url().to_string() };
        let request = self.client.post(url).header(CONTENT_TYPE, "application/x-protobuf").body(body);
        let mut response = request.send().await.map_err(down)?;
        let status = response.status();
        if !status.is_success() {
            return Err(TelemetryError::Refused { url: url.into(), status });
        }
        let mut answer = Vec::new();
        while let Some(piece) = response.chunk().await.map_err(down)? {
            answer.extend_from_slice(&piece[..piece.len().min(MAX_ANSWER - answer.len())]);
        }
        // An answer that is none of protobuf says nothing of a loss.
        match proto::Response::decode(answer.as_slice()).ok().and_then(|response| response.partial_success) {
            Some(part) if part.rejected > 0 => {
                let message = part.error_message.chars().filter(|c| !c.is_control()).take(200).collect();
                Err(TelemetryError::Partly { url: url.into(), rejected: part.rejected, message })
            }
            _ => Ok(()),
        }
    }
}

fn headers(settings: &Settings) -> Result<HeaderMap, TelemetryError> {
    let mut headers = HeaderMap::new();
    let Some(text) = secret::read("telemetry.headers", Some(&settings.headers_file))? else { return Ok(headers) };
    for (index, line) in text.expose().lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let parse = || -> Option<(HeaderName, HeaderValue)> {
            let (name, value) = line.split_once(':')?;
            let mut value = HeaderValue::from_str(value.trim()).ok()?;
            value.set_sensitive(true);
            Some((name.trim().parse().ok()?, value))
        };
        let wrong = || TelemetryError::Header { file: settings.headers_file.display().to_string(), line: index + 1 };
        let (name, value) = parse().ok_or_else(wrong)?;
        headers.insert(name, value);
    }
    Ok(headers)
}

fn resource(settings: &Settings) -> Resource {
    let told = [("service.name", settings.service_name.as_str()), ("service.version", env!("CARGO_PKG_VERSION"))];
    Resource { attributes: told.map(|(key, value)| pair(&(key, Attribute::Text(value.into())))).into() }
}

fn scope() -> Scope {
    Scope { name: "taod".into(), version: env!("CARGO_PKG_VERSION").into() }
}

fn span(span: &Span) -> proto::Span {
    proto::Span {
        trace_id: span.trace_id.into(),
        span_id: span.span_id.into(),
        parent_span_id: span.parent.map(Vec::from).unwrap_or_default(),
        name: span.name.clone(),
        kind: 1,
        start_time_unix_nano: nanos(span.start_us),
        end_time_unix_nano: nanos(span.end_us),
        attributes: span.attributes.iter().map(pair).collect(),
        status: span.error.as_ref().map(|why| Status { message: why.clone(), code: 2 }),
    }
}

fn record(event: &Event, now_us: i64) -> LogRecord {
    LogRecord {
        time_unix_nano: nanos(event.time_us),
        severity_number: 9,
        attributes: event.attributes.iter().map(pair).collect(),
        trace_id: event.trace_id.map(Vec::from).unwrap_or_default(),
        observed_time_unix_nano: nanos(now_us),
        event_name: event.name.into(),
    }
}

fn pair((key, value): &(&'static str, Attribute)) -> KeyValue {
    let value = match value {
        Attribute::Text(text) => Value::Text(text.clone()),
        Attribute::Whole(number) => Value::Whole(*number),
        Attribute::Number(number) => Value::Number(*number),
    };
    KeyValue { key: (*key).into(), value: Some(AnyValue { value: Some(value) }) }
}

fn nanos(us: i64) -> u64 {
    u64::try_from(us).unwrap_or_default().saturating_mul(1000)
}

#[cfg(test)]
mod tests;
