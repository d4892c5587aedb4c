//! The page for monitors and tools, on its own thread with its own runtime, so that it answers also when the main
//! runtime is busy or stuck: that is when it is needed most.
//!
//! | path | answer |
//! |---|---|
//! | `GET /metrics` | all metrics in Prometheus' text format |
//! | `GET /healthz` | 200 while the loops turn, else 503 and the names of those that do not (restart me) |
//! | `GET /readyz` | 200 when nothing stands in the way, else 503 and what does (look at me) |
//! | `GET /api/v1/status` | what the daemon does now, as JSON |
//! | `GET /api/v1/current` | the adapter version that is promoted, and its served name, as JSON |
//!
//! There is no password yet, so it listens on loopback addresses only and refuses requests that name another host
//! (a web page could otherwise point its own name at 127.0.0.1 and read along).

use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use axum::Json;
use axum::Router;
use axum::extract::{Request, State as Shared};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::health::Health;
use crate::metrics::Metrics;

#[cfg(test)]
mod tests;

/// Where the page listens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Loopback address and port; port 0 takes any free one.
    pub listen: String,
}

impl Default for Settings {
    fn default() -> Self {
        Settings { listen: "127.0.0.1:9464".into() }
    }
}

impl Settings {
    /// Checks that the address is one and that it is a loopback address.
    pub fn validate(&self) -> Result<(), String> {
        self.address().map(drop)
    }

    fn address(&self) -> Result<SocketAddr, String> {
        let listen = &self.listen;
        let address: SocketAddr = listen.parse().map_err(|_| {
            format!("listen {listen:?} is not an address with a port; write one such as \"127.0.0.1:9464\"")
        })?;
        match address.ip().is_loopback() {
            true => Ok(address),
            false => Err(format!(
                "listen {listen:?} can be reached from other machines, and the page has no password; \
                 write 127.0.0.1:{} and put a proxy that asks for one in front",
                address.port()
            )),
        }
    }
}

/// Makes a JSON document when someone asks for it.
pub type View = Arc<dyn Fn() -> Value + Send + Sync>;

/// What the page shows.
#[derive(Clone)]
pub struct State {
    pub metrics: Arc<Metrics>,
    pub health: Arc<Health>,
    /// What the daemon does now.
    pub status: View,
    /// What is promoted; null while nothing is.
    pub current: View,
}

/// Binds the address of the settings; an error names it and the remedy.
pub fn bind(settings: &Settings) -> Result<std::net::TcpListener, String> {
    let address = settings.address().map_err(|problem| format!("admin.{problem}"))?;
    let listener = std::net::TcpListener::bind(address)
        .map_err(|e| format!("admin.listen {address}: cannot listen ({e}); set another port, or 0 for any free one"))?;
    listener.set_nonblocking(true).map_err(|e| format!("admin.listen {address}: {e}"))?;
    Ok(listener)
}

/// Serves the page on a thread of its own until `shutdown` resolves.
pub fn spawn(
    listener: std::net::TcpListener,
    state: State,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<JoinHandle<io::Result<()>>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new().name("admin".into()).spawn(move || {
        runtime.block_on(async { serve(tokio::net::TcpListener::from_std(listener)?, state, shutdown).await })
    })
}

/// Serves the page until `shutdown` resolves.
pub async fn serve(
    listener: tokio::net::TcpListener,
    state: State,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    axum::serve(listener, routes(state)).with_graceful_shutdown(shutdown).await
}

fn routes(state: State) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/api/v1/status", get(async |Shared(state): Shared<State>| Json((state.status)())))
        .route("/api/v1/current", get(current))
        .layer(middleware::from_fn(only_loopback_names))
        .with_state(state)
}

async fn metrics(Shared(state): Shared<State>) -> Response {
    let ready = state.health.obstacles().is_empty();
    state.metrics.daemon.ready.set(i64::from(ready));
    match state.metrics.render() {
        Ok(text) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

async fn healthz(Shared(state): Shared<State>) -> Response {
    match state.health.stuck(Instant::now()) {
        stuck if stuck.is_empty() => "ok\n".into_response(),
        stuck => (StatusCode::SERVICE_UNAVAILABLE, format!("stuck: {}\n", stuck.join(", "))).into_response(),
    }
}

async fn readyz(Shared(state): Shared<State>) -> Response {
    let obstacles = state.health.obstacles();
    let lines: String = obstacles.iter().map(|(part, why)| format!("{part}: {why}\n")).collect();
    match lines.is_empty() {
        true => "ok\n".into_response(),
        false => (StatusCode::SERVICE_UNAVAILABLE, lines).into_response(),
    }
}

async fn current(Shared(state): Shared<State>) -> Response {
    match (state.current)() {
        Value::Null => (StatusCode::NOT_FOUND, Json(json!({ "error": "no adapter is promoted yet" }))).into_response(),
        current => Json(current).into_response(),
    }
}

async fn only_loopback_names(request: Request, next: Next) -> Response {
    let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    match is_loopback_name(host) {
        true => next.run(request).await,
        false => {
            let message = format!("the host {host:?} is not this machine; a proxy must send Host: 127.0.0.1\n");
            (StatusCode::FORBIDDEN, message).into_response()
        }
    }
}

fn is_loopback_name(host: &str) -> bool {
    let name = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((v6, _)) => v6,
        None => host.split(':').next().unwrap_or_default(),
    };
    name == "localhost" || name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}
