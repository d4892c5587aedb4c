//! The embedded endpoint: an OpenAI-compatible server on our own engine.
//!
//! It answers chats with the base model or a LoRA adapter, takes adapters at run time in vLLM's dialect, gives clients
//! a stable name through aliases, and logs each call to Kafka. The demo runs against it, and so can a small deployment
//! that has no other server.
//!
//! ```text
//! connection -> chat (checks, names) -> worker (one thread: model, adapters, batches) -> emit -> connection, log
//! ```

mod adapters;
mod api;
mod chat;
mod emit;
mod job;
mod key;
pub mod log;
mod worker;

use std::future::Future;
use std::path::PathBuf;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::net::TcpListener;
use tokio::sync::{Notify, Semaphore, oneshot};

use crate::engine::{BatchLimits, Model};
use crate::secret::Secret;
use crate::signature::PublicKey;

use adapters::{AliasRequest, LoadRequest, Names, UnloadRequest};
use api::ApiError;
use job::Command;
use log::CallLog;

/// What an operator sets of the embedded endpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Address and port to listen on. One that other machines can reach needs a key, and a gateway in front for TLS.
    pub address: String,
    /// File that holds the key which clients must show (`Authorization: Bearer`); empty: none, on loopback only.
    pub api_key_file: PathBuf,
    /// Name under which the base model is served; empty: the model's own name.
    pub base_model: String,
    /// Folder below which adapters may be loaded at run time; empty: the load and unload routes do not exist.
    pub adapter_root: PathBuf,
    /// Public keys (base64 of 32 bytes) of which one must have signed an adapter's manifest before it is loaded. Empty: those
    /// of `registry.trusted_keys`; where that is empty too, signatures are not asked for.
    pub trusted_keys: Vec<String>,
    /// Adapters that may be loaded at the same time, 1 or more.
    pub max_adapters: usize,
    /// Highest rank of an adapter, 1 or more.
    pub max_lora_rank: usize,
    /// Requests that may wait or be under way before further ones are refused with 429, 1 or more.
    pub max_requests: usize,
    /// Sequences decoded in one batch, 1 or more.
    pub max_sequences: usize,
    /// Memory of keys and values, in MiB: sequences wait until all that they may become fits.
    pub cache_mib: usize,
    /// Samples (`n`) that one request may ask for, from 1 to max_sequences.
    pub max_samples: usize,
    /// New tokens that one sample may have, 1 or more; also the default where a request names none.
    pub max_tokens: usize,
    /// Size of the largest request body, in bytes.
    pub max_body_bytes: usize,
    /// Time that requests under way get to finish when the server stops, in seconds.
    pub drain_seconds: u64,
    /// Kafka brokers that each call is logged to (host:port, comma separated); empty: calls are not logged.
    pub log_brokers: String,
    /// Kafka topic of the query log.
    pub log_topic: String,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            address: "127.0.0.1:8000".into(),
            api_key_file: PathBuf::new(),
            base_model: String::new(),
            adapter_root: PathBuf::new(),
            trusted_keys: Vec::new(),
            max_adapters: 8,
            max_lora_rank: 64,
            max_requests: 256,
            max_sequences: 32,
            cache_mib: BatchLimits::CACHE_MIB,
            max_samples: 16,
            max_tokens: 1024,
            max_body_bytes: 1 << 20,
            drain_seconds: 30,
            log_brokers: String::new(),
            log_topic: "llm-calls".into(),
        }
    }
}

impl Settings {
    /// Checks the values; the message names the key and the remedy.
    pub fn validate(&self) -> Result<(), String> {
        let positive = [
            ("max_adapters", self.max_adapters),
            ("max_lora_rank", self.max_lora_rank),
            ("max_requests", self.max_requests),
            ("max_sequences", self.max_sequences),
            ("cache_mib", self.cache_mib),
            ("max_samples", self.max_samples),
            ("max_tokens", self.max_tokens),
            ("max_body_bytes", self.max_body_bytes),
        ];
        if let Some((key, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(format!("{key} = 0: set it to 1 or more"));
        }
        if self.max_samples > self.max_sequences {
            let (samples, sequences) = (self.max_samples, self.max_sequences);
            return Err(format!("max_samples = {samples}: set it to at most max_sequences, which is {sequences}"));
        }
        if !self.log_brokers.is_empty() && self.log_topic.is_empty() {
            return Err("log_topic is empty: name the topic, or leave log_brokers empty as well".into());
        }
        PublicKey::parse_all(&self.trusted_keys).map(drop).map_err(|error| format!("trusted_keys: {error}"))
    }
}

/// The server could not run.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("cannot serve on {address}: {source}; choose another serve.address")]
    Listen { address: String, source: std::io::Error },
    #[error("{0}")]
    Key(String),
    #[error(
        "serve.address {0} can be reached from other machines, and the server has no key: write one into a file and name it in \
         serve.api_key_file, or listen on 127.0.0.1"
    )]
    Open(std::net::SocketAddr),
    #[error("the engine's thread could not start or ended too early: {0}")]
    Engine(String),
}

/// What the model behind the server is called and how long its context is.
#[derive(Debug, Clone)]
pub(crate) struct Base {
    pub(crate) name: String,
    pub(crate) root: String,
    pub(crate) context: usize,
}

/// Everything that the connections share.
pub(crate) struct Server {
    settings: Settings,
    names: Mutex<Names>,
    /// Held while an adapter is loaded or unloaded, so that names and engine change together.
    changing: tokio::sync::Mutex<()>,
    engine: Sender<Command>,
    places: Arc<Semaphore>,
    log: Arc<CallLog>,
    /// Its other half resolves when the last connection or stream has let go of the server.
    _alive: oneshot::Sender<()>,
}

impl Server {
    fn new(
        base: &Base,
        settings: &Settings,
        engine: Sender<Command>,
        log: Arc<CallLog>,
    ) -> (Self, oneshot::Receiver<()>) {
        let created = chrono::Utc::now().timestamp();
        let (alive, over) = oneshot::channel();
        let server = Server {
            settings: settings.clone(),
            names: Mutex::new(Names::new(&base.name, &base.root, base.context, created)),
            changing: tokio::sync::Mutex::new(()),
            engine,
            places: Arc::new(Semaphore::new(settings.max_requests)),
            log,
            _alive: alive,
        };
        (server, over)
    }

    /// Returns the names. No code panics while it holds them, so a poisoned lock is still whole.
    fn names(&self) -> MutexGuard<'_, Names> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, command: Command) -> Result<(), ApiError> {
        self.engine.send(command).map_err(|_| ApiError::internal("the engine has stopped; restart the server"))
    }
}

/// Serves `model` at `listener` until `shutdown` completes; then requests under way are finished and the log flushed.
pub async fn serve(
    listener: TcpListener,
    model: Model,
    settings: &Settings,
    log: CallLog,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), ServeError> {
    let name = model.identity().name.clone();
    let served = if settings.base_model.is_empty() { name.clone() } else { settings.base_model.clone() };
    let base = Base { name: served, root: name, context: model.config().max_positions };
    let engine = worker::start(model, settings).map_err(|e| ServeError::Engine(e.to_string()))?;
    run(listener, &base, settings, log, engine, shutdown).await
}

/// Serves with whatever takes the commands of `engine`.
async fn run(
    listener: TcpListener,
    base: &Base,
    settings: &Settings,
    log: CallLog,
    engine: Sender<Command>,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), ServeError> {
    let address = listener.local_addr().map_err(|e| ServeError::Key(format!("serve.address: {e}")))?;
    let key = key::read(settings, address)?;
    let log = Arc::new(log);
    let (server, over) = Server::new(base, settings, engine, log.clone());
    let result = answer(listener, Arc::new(server), key, shutdown).await;
    // A stream is logged a moment after its connection has ended.
    if tokio::time::timeout(LAST_WORDS, over).await.is_err() {
        tracing::warn!("streams were still under way when the server stopped; they are not logged");
    }
    let flushed = tokio::task::spawn_blocking(move || log.flush(LAST_WORDS)).await;
    flushed.map_err(|e| ServeError::Engine(e.to_string()))?;
    result
}

/// Time that the log gets to take its last records.
const LAST_WORDS: Duration = Duration::from_secs(10);

/// Answers connections until `shutdown` completes, then gives the requests under way the time to drain.
async fn answer(
    listener: TcpListener,
    server: Arc<Server>,
    key: Option<Secret>,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), ServeError> {
    let drain = Duration::from_secs(server.settings.drain_seconds);
    let address = listener.local_addr().map(|a| a.to_string()).unwrap_or_default();
    let stopping = Arc::new(Notify::new());
    let stop = stopping.clone();
    let signal = async move {
        shutdown.await;
        stop.notify_one();
    };
    let deadline = async {
        stopping.notified().await;
        tokio::time::sleep(drain).await;
    };
    let serving = axum::serve(listener, router(server, key)).with_graceful_shutdown(signal).into_future();
    tokio::select! {
        result = serving => result.map_err(|source| ServeError::Listen { address, source }),
        () = deadline => {
            tracing::warn!(seconds = drain.as_secs(), "requests were still under way when the time to drain was over");
            Ok(())
        }
    }
}

fn router(server: Arc<Server>, key: Option<Secret>) -> Router {
    let mut router = Router::new()
        .route("/health", get(health))
        .route("/v1/models", get(models))
        .route("/v1/chat/completions", post(chat::handle))
        .route("/v1/aliases", get(aliases))
        .route("/v1/aliases/{name}", put(set_alias));
    if !server.settings.adapter_root.as_os_str().is_empty() {
        router = router.route("/v1/load_lora_adapter", post(load)).route("/v1/unload_lora_adapter", post(unload));
    }
    router
        .fallback(async || ApiError::not_found("Not Found"))
        .method_not_allowed_fallback(async || ApiError {
            status: StatusCode::METHOD_NOT_ALLOWED,
            ..ApiError::bad("Method Not Allowed", None)
        })
        .layer(DefaultBodyLimit::max(server.settings.max_body_bytes))
        .layer(axum::middleware::from_fn_with_state(Arc::new(key), key::check))
        .with_state(server)
}

/// Answers 200 while the engine's thread lives.
async fn health(State(server): State<Arc<Server>>) -> StatusCode {
    let (reply, answer) = oneshot::channel();
    match server.engine.send(Command::Ping { reply }) {
        Ok(()) => answer.await.map_or(StatusCode::SERVICE_UNAVAILABLE, |()| StatusCode::OK),
        Err(_) => StatusCode::SERVICE_UNAVAILABLE,
    }
}

async fn models(State(server): State<Arc<Server>>) -> Response {
    axum::Json(server.names().model_list()).into_response()
}

async fn aliases(State(server): State<Arc<Server>>) -> Response {
    axum::Json(server.names().alias_list()).into_response()
}

async fn set_alias(
    State(server): State<Arc<Server>>,
    Path(name): Path<String>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let request: AliasRequest = read(body)?;
    let changed = server.names().set_alias(&name, &request)?;
    Ok(axum::Json(changed).into_response())
}

async fn load(State(server): State<Arc<Server>>, body: Result<Bytes, BytesRejection>) -> Result<String, ApiError> {
    let request: LoadRequest = read(body)?;
    let _changing = server.changing.lock().await;
    server.names().check_load(&request, server.settings.max_adapters)?;
    let root = std::path::absolute(&server.settings.adapter_root)
        .map_err(|e| ApiError::internal(format!("serve.adapter_root is not a usable path: {e}")))?;
    let folder = adapters::folder_below(&root, &request.lora_name, &request.lora_path)?;
    let (keys, asked) = (server.settings.trusted_keys.clone(), (request.lora_name.clone(), request.lora_path.clone()));
    let checked = tokio::task::spawn_blocking({
        let folder = folder.clone();
        move || adapters::check_signed(&keys, &folder, &asked.0, &asked.1)
    });
    checked.await.map_err(|e| ApiError::internal(format!("the signature could not be checked: {e}")))??;
    let (reply, answer) = oneshot::channel();
    server.send(Command::Load { name: request.lora_name.clone(), folder, reply })?;
    let loaded = answer.await.map_err(|_| ApiError::internal("the engine has stopped; restart the server"))?;
    loaded.map_err(|reason| adapters::worker_failed(&reason))?;
    server.names().loaded(&request);
    Ok(format!("Success: LoRA adapter '{}' added successfully.", request.lora_name))
}

async fn unload(State(server): State<Arc<Server>>, body: Result<Bytes, BytesRejection>) -> Result<String, ApiError> {
    let request: UnloadRequest = read(body)?;
    let _changing = server.changing.lock().await;
    server.names().unload(&request.lora_name)?;
    server.send(Command::Unload { name: request.lora_name.clone() })?;
    Ok(format!("Success: LoRA adapter '{}' removed successfully.", request.lora_name))
}

/// Returns the bytes of a body, or why there are none.
fn bytes(body: Result<Bytes, BytesRejection>) -> Result<Bytes, ApiError> {
    body.map_err(|rejection| ApiError { status: rejection.status(), ..ApiError::bad(rejection.body_text(), None) })
}

fn read<T: DeserializeOwned>(body: Result<Bytes, BytesRejection>) -> Result<T, ApiError> {
    serde_json::from_slice(&bytes(body)?).map_err(|e| api::invalid(&e))
}

#[cfg(test)]
mod hangup_tests;
#[cfg(test)]
mod key_tests;
#[cfg(test)]
pub(crate) mod tests;
