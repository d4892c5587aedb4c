//! `POST /v1/chat/completions`: from a request's bytes to an answer, whole or streamed, and its line in the log.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Instant;

use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::{HeaderMap, HeaderValue};
use axum::response::sse::{Event as Sse, KeepAlive, Sse as EventStream};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use tokio::sync::mpsc::{self, UnboundedReceiver};
use tokio::sync::oneshot;
use tokio_stream::wrappers::ReceiverStream;

use crate::record::derive_seed;

use super::api::{Answer, ApiError, ChatRequest, Choice};
use super::job::{Command, Event, Job};
use super::log::{COPIED_HEADERS, Call};
use super::{Server, bytes};

/// Names the version that answered, also where the stable name was asked for.
const SERVED_VERSION: &str = "x-served-version";

/// Events of a stream that may wait for a slow reader before the stream waits too.
const STREAM_BUFFER: usize = 64;

/// One request from its arrival to its line in the log.
struct Visit {
    server: Arc<Server>,
    id: String,
    arrived: chrono::DateTime<chrono::Utc>,
    started: Instant,
    headers: BTreeMap<String, String>,
    request: Value,
}

/// An accepted request: what has come of its answer, and where the rest comes from.
struct Pending {
    answer: Answer,
    events: UnboundedReceiver<Event>,
}

/// Answers a chat request.
pub(crate) async fn handle(
    State(server): State<Arc<Server>>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Response {
    let (sender, receiver) = oneshot::channel();
    // A task of its own: where the client hangs up this handler is dropped, and the call is to be logged all the same.
    tokio::spawn(Visit::new(server, &headers).answer(body, sender));
    receiver.await.unwrap_or_else(|_| stopped().into_response())
}

impl Visit {
    fn new(server: Arc<Server>, headers: &HeaderMap) -> Self {
        let copied = COPIED_HEADERS.iter().filter_map(|name| {
            let value = headers.get(*name)?.to_str().ok()?;
            Some((name.to_string(), value.to_owned()))
        });
        Visit {
            server,
            id: format!("chatcmpl-{}", uuid::Uuid::now_v7().simple()),
            arrived: chrono::Utc::now(),
            started: Instant::now(),
            headers: copied.collect(),
            request: Value::Null,
        }
    }

    /// Answers to `client`, or logs how far it came where that one is gone.
    async fn answer(mut self, body: Result<Bytes, BytesRejection>, mut client: oneshot::Sender<Response>) {
        let opened = tokio::select! {
            opened = self.open(body) => Some(opened),
            () = client.closed() => None,
        };
        let response = match opened {
            Some(Ok((pending, true))) => Some(self.stream(pending)),
            Some(Ok((pending, false))) => self.whole(pending, &mut client).await,
            Some(Err(error)) => Some(self.refuse(&error, None)),
            None => {
                self.record(CLIENT_CLOSED, &Value::Null, None);
                None
            }
        };
        // One that went away just now got nothing, and what it would have got is in the log.
        if let Some(response) = response {
            drop(client.send(response));
        }
    }

    /// Checks the request, hands it to the engine, and waits until its prompt is accepted.
    async fn open(&mut self, body: Result<Bytes, BytesRejection>) -> Result<(Pending, bool), ApiError> {
        let body = bytes(body)?;
        self.request = serde_json::from_slice(&body).map_err(|e| {
            self.request = Value::String(String::from_utf8_lossy(&body).into_owned());
            super::api::invalid(&e)
        })?;
        let request = ChatRequest::parse(&self.request)?;
        let (sampling, wanted) = (request.sampling(&self.server.settings)?, request.wanted()?);
        let resolved = self.server.names().resolve(request.model.as_deref())?;
        let place = self.server.places.clone().try_acquire_owned();
        let place = place.map_err(|_| ApiError::busy(self.server.settings.max_requests))?;

        let samples = sampling.samples;
        let (sender, mut events) = mpsc::unbounded_channel();
        let (seeds, streamed) = (seeds(request.seed, samples), request.stream.unwrap_or(false));
        let model = request.model.unwrap_or_else(|| resolved.served.clone());
        let (messages, tools) = (request.messages, request.tools);
        let job = Job { adapter: resolved.adapter, messages, tools, sampling, seeds, events: sender, _place: place };
        self.server.send(Command::Answer(Box::new(job)))?;
        let prompt_ids = match events.recv().await {
            Some(Event::Started { prompt_ids }) => prompt_ids,
            Some(Event::Refused(refusal)) => return Err(refusal.into()),
            _ => return Err(stopped()),
        };
        let answer = Answer {
            id: self.id.clone(),
            created: self.arrived.timestamp(),
            model,
            served_version: resolved.served,
            prompt_ids,
            choices: vec![Choice::default(); samples],
            wanted,
        };
        Ok((Pending { answer, events }, streamed))
    }

    /// Answers with one document; nothing where the client went away, which ends the answer.
    async fn whole(self, mut pending: Pending, client: &mut oneshot::Sender<Response>) -> Option<Response> {
        while pending.answer.is_open() {
            let next = tokio::select! {
                next = pending.next() => next,
                () = client.closed() => {
                    self.record(CLIENT_CLOSED, &pending.answer.completion(), Some(&pending.answer.served_version));
                    return None;
                }
            };
            if let Err(error) = next {
                return Some(self.refuse(&error, Some(&pending.answer.served_version)));
            }
        }
        let body = pending.answer.completion();
        self.record(200, &body, Some(&pending.answer.served_version));
        Some(versioned(axum::Json(body).into_response(), &pending.answer.served_version))
    }

    /// Answers with server-sent events; a task feeds them, so that the log sees the call's end.
    fn stream(self, mut pending: Pending) -> Response {
        let (sender, receiver) = mpsc::channel::<Result<Sse, Infallible>>(STREAM_BUFFER);
        let version = pending.answer.served_version.clone();
        tokio::spawn(async move {
            let result = pending.feed(&sender).await;
            let (status, body) = match &result {
                Ok(()) => (200, pending.answer.completion()),
                Err(Broken::Failed(error)) => (error.status.as_u16(), error.body()),
                Err(Broken::ClientGone) => (CLIENT_CLOSED, pending.answer.completion()),
            };
            self.record(status, &body, Some(&pending.answer.served_version));
        });
        let events = EventStream::new(ReceiverStream::new(receiver)).keep_alive(KeepAlive::default());
        versioned(events.into_response(), &version)
    }

    fn refuse(&self, error: &ApiError, version: Option<&str>) -> Response {
        self.record(error.status.as_u16(), &error.body(), version);
        error.clone().into_response()
    }

    /// Writes the call to the log.
    fn record(&self, status: u16, response: &Value, served_version: Option<&str>) {
        let text = |value: Option<&'_ Value>| value.and_then(Value::as_str).map(str::to_owned);
        let metadata = self.request.get("metadata");
        let workload = self.headers.get("x-workload").cloned().or_else(|| text(metadata?.get("workload")));
        let client = text(self.request.get("user"));
        self.server.log.write(
            &self.id,
            &self.headers,
            &Call {
                timestamp: self.arrived.to_rfc3339_opts(chrono::SecondsFormat::Micros, true),
                request: &self.request,
                response,
                status,
                duration_ms: self.started.elapsed().as_secs_f64() * 1e3,
                served_version,
                workload_id: workload.as_deref(),
                client_id: client.as_deref(),
            },
        );
    }
}

/// Status in the log of a call whose client went away, as gateways write it.
const CLIENT_CLOSED: u16 = 499;

/// Why a stream ended early.
enum Broken {
    Failed(ApiError),
    ClientGone,
}

impl Pending {
    /// Takes the next event into the answer and returns it.
    async fn next(&mut self) -> Result<Event, ApiError> {
        let event = self.events.recv().await.ok_or_else(stopped)?;
        self.answer.take(&event)?;
        Ok(event)
    }

    /// Sends the answer as it comes; an error on the way is sent as an event, since the status is out already.
    async fn feed(&mut self, sender: &mpsc::Sender<Result<Sse, Infallible>>) -> Result<(), Broken> {
        for index in 0..self.answer.choices.len() {
            send(sender, self.answer.opening(index).to_string()).await?;
        }
        while self.answer.is_open() {
            match self.next().await {
                Ok(event) => self.send_event(sender, event).await?,
                Err(error) => {
                    send(sender, error.body().to_string()).await?;
                    send(sender, "[DONE]".into()).await?;
                    return Err(Broken::Failed(error));
                }
            }
        }
        if self.answer.wanted.usage_chunk {
            send(sender, self.answer.usage_chunk().to_string()).await?;
        }
        send(sender, "[DONE]".into()).await
    }

    async fn send_event(&self, sender: &mpsc::Sender<Result<Sse, Infallible>>, event: Event) -> Result<(), Broken> {
        let wanted = self.answer.wanted;
        let chunk = match event {
            Event::Token { text, .. } if text.is_empty() && !wanted.logprobs && !wanted.token_ids => return Ok(()),
            Event::Token { sample, token, text } => self.answer.chunk(sample, json!({"content": text}), &[token], None),
            Event::Done { sample, text, reason, .. } => {
                let delta = if text.is_empty() { json!({}) } else { json!({"content": text}) };
                self.answer.chunk(sample, delta, &[], Some(reason))
            }
            Event::Started { .. } | Event::Refused(_) => return Ok(()),
        };
        send(sender, chunk.to_string()).await
    }
}

impl Answer {
    fn is_open(&self) -> bool {
        self.choices.iter().any(|choice| choice.finish_reason.is_none())
    }

    /// Adds what an event brings.
    fn take(&mut self, event: &Event) -> Result<(), ApiError> {
        match event {
            Event::Token { sample, token, text } => {
                self.choices[*sample].tokens.push(token.clone());
                self.choices[*sample].text.push_str(text);
            }
            Event::Done { sample, text, reason, stop_string } => {
                self.choices[*sample].text.push_str(text);
                self.choices[*sample].finish_reason = Some(*reason);
                self.choices[*sample].stop_string.clone_from(stop_string);
            }
            Event::Refused(refusal) => return Err(refusal.clone().into()),
            Event::Started { .. } => {}
        }
        Ok(())
    }
}

async fn send(sender: &mpsc::Sender<Result<Sse, Infallible>>, data: String) -> Result<(), Broken> {
    sender.send(Ok(Sse::default().data(data))).await.map_err(|_| Broken::ClientGone)
}

fn stopped() -> ApiError {
    ApiError::internal("the engine stopped before the answer was complete; send the request again")
}

/// Names in a header which version answered.
fn versioned(mut response: Response, version: &str) -> Response {
    if let Ok(value) = HeaderValue::from_str(version) {
        response.headers_mut().insert(SERVED_VERSION, value);
    }
    response
}

/// Returns one seed for each sample: derived from the request's seed, or fresh ones.
fn seeds(seed: Option<i64>, samples: usize) -> Vec<u64> {
    let root = seed.map_or_else(|| uuid::Uuid::new_v4().as_u64_pair().0, |s| s as u64);
    (0..samples).map(|sample| derive_seed(root, &["serve", &sample.to_string()])).collect()
}
