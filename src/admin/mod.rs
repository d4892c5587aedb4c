//! The page for people, monitors and tools, on its own thread with its own runtime, so that it answers also when the main
//! runtime is busy or stuck: that is when it is needed most.
//!
//! | path | answer | needs |
//! |---|---|---|
//! | `GET /` and what it links to | the page in a browser | figures; texts of prompts a role |
//! | `GET /metrics` | all metrics in Prometheus' text format | figures |
//! | `GET /healthz` | 200 while the loops turn, else 503 and the names of those that do not (restart me) | nothing |
//! | `GET /readyz` | 200 when nothing stands in the way, else 503 and what does (look at me) | figures |
//! | `/api/v1/...` | the same as JSON, and actions; `openapi.json` describes it | figures, or a role |
//! | `/login`, `/logout` | a token becomes a session of a browser | nothing |
//!
//! Who may ask what stands in [`access`], how much in [`connection`]; `docs/security.md` argues both. Reading order:
//! [`settings`], [`token`], [`session`], [`access`], [`tls`], [`connection`], then what is shown: [`facts`] are the documents,
//! [`api`] answers them as JSON and [`page`] as HTML; [`actions`] are what operators ask for.

mod access;
pub mod actions;
mod api;
mod connection;
pub mod facts;
mod page;
mod probe;
mod session;
mod settings;
mod tls;
pub mod token;

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use axum::Json;
use axum::Router;
use axum::extract::{DefaultBodyLimit, Request, State as Shared};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post};
use serde_json::json;
use tokio_rustls::TlsAcceptor;

use access::{Doors, Need};
use actions::Actions;
use connection::Limits;
use facts::Facts;

pub use settings::Settings;

#[cfg(test)]
mod fuzz_tests;
#[cfg(test)]
mod tests;

/// What the page shows, and where it leaves what operators ask for.
#[derive(Clone)]
pub struct State {
    pub facts: Arc<Facts>,
    pub actions: Arc<Actions>,
}

/// The page with its sockets bound and its keys read: what is left is to answer.
pub struct Bound {
    settings: Settings,
    listener: std::net::TcpListener,
    probes: Option<std::net::TcpListener>,
    tls: Option<TlsAcceptor>,
}

impl Bound {
    /// Returns the address of the page.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// Binds the addresses of the settings and reads their keys; an error names the key and the remedy.
pub fn bind(settings: &Settings) -> Result<Bound, String> {
    let full = |problem| format!("admin.{problem}");
    settings.validate().map_err(full)?;
    let tls = tls::acceptor(settings).map_err(full)?;
    let listener = listen("listen", settings.address().map_err(full)?)?;
    let probes = settings.probe_address().map_err(full)?.map(|address| listen("probe_listen", address)).transpose()?;
    Ok(Bound { settings: settings.clone(), listener, probes, tls })
}

fn listen(key: &str, address: SocketAddr) -> Result<std::net::TcpListener, String> {
    let listener = std::net::TcpListener::bind(address)
        .map_err(|e| format!("admin.{key} {address}: cannot listen ({e}); set another port, or 0 for any free one"))?;
    listener.set_nonblocking(true).map_err(|e| format!("admin.{key} {address}: {e}"))?;
    Ok(listener)
}

/// Serves the page on a thread of its own until `shutdown` resolves.
pub fn spawn(
    bound: Bound,
    state: State,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<JoinHandle<io::Result<()>>> {
    // More than one worker: reading a large table must not keep a probe waiting.
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).thread_name("page").enable_all().build()?;
    std::thread::Builder::new().name("admin".into()).spawn(move || runtime.block_on(serve(bound, state, shutdown)))
}

/// Serves the page, and the probes on their own port, until `shutdown` resolves.
async fn serve(bound: Bound, state: State, shutdown: impl Future<Output = ()>) -> io::Result<()> {
    let Bound { settings, listener, probes, tls } = bound;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let doors = Arc::new(Doors::new(&settings, listener.local_addr()?));
    let limits = Limits { connections: settings.max_connections, head: HEAD, life: LIFE };
    let (stop, mut stopped) = tokio::sync::watch::channel(false);
    let probing = match probes {
        None => None,
        Some(probes) => {
            let (probes, router) = (tokio::net::TcpListener::from_std(probes)?, probe::routes(state.clone()));
            let stopped = async move { drop(stopped.wait_for(|stop| *stop).await) };
            Some(tokio::spawn(connection::serve(probes, None, router, limits, stopped)))
        }
    };
    let result = connection::serve(listener, tls, routes(state, doors, &settings), limits, shutdown).await;
    // Without probes there is nobody to tell.
    let _told = stop.send(true);
    if let Some(probing) = probing {
        probing.await.map_err(io::Error::other)??;
    }
    result
}

/// Time for the head of a request.
const HEAD: Duration = Duration::from_secs(10);
/// The longest that one connection lives; a browser opens the next one by itself.
const LIFE: Duration = Duration::from_secs(600);

/// Returns all routes, each behind its need, and all behind the doors and the limits.
fn routes(state: State, doors: Arc<Doors>, settings: &Settings) -> Router {
    let time = Duration::from_secs(settings.request_timeout_s);
    Router::new()
        .route("/metrics", guarded(Need::Figures, get(metrics)))
        .route("/healthz", guarded(Need::Nothing, get(probe::healthz)))
        .route("/readyz", guarded(Need::Figures, get(probe::readyz)))
        .merge(api::routes())
        .merge(page::routes())
        .with_state(state)
        .route(
            "/login",
            guarded(Need::Nothing, get(page::login::show).post(page::login::open)).with_state(doors.clone()),
        )
        .route("/logout", guarded(Need::Nothing, post(page::login::close)).with_state(doors.clone()))
        .merge(page::assets())
        .fallback(async || (StatusCode::NOT_FOUND, Json(json!({ "error": "there is no such page" }))))
        .layer(DefaultBodyLimit::max(settings.max_body_bytes))
        .layer(middleware::from_fn(move |request, next| in_time(time, request, next)))
        .layer(middleware::from_fn_with_state(doors, access::enter))
}

/// Returns a route that only callers with `need` reach.
fn guarded<S: Clone + Send + Sync + 'static>(need: Need, route: MethodRouter<S>) -> MethodRouter<S> {
    route.layer(middleware::from_fn_with_state(need, access::check))
}

async fn in_time(time: Duration, request: Request, next: Next) -> Response {
    match tokio::time::timeout(time, next.run(request)).await {
        Ok(response) => response,
        Err(_) => {
            let message = format!("no answer within {} s (admin.request_timeout_s); ask for less", time.as_secs());
            (StatusCode::SERVICE_UNAVAILABLE, Json(json!({ "error": message }))).into_response()
        }
    }
}

async fn metrics(Shared(state): Shared<State>) -> Response {
    let facts = &state.facts;
    let ready = facts.health.obstacles().is_empty();
    facts.metrics.daemon.ready.set(i64::from(ready));
    match facts.metrics.render() {
        Ok(text) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}
