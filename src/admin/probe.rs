//! Whether the process is alive and ready, for whoever restarts it or routes to it.

use std::time::Instant;

use axum::Router;
use axum::extract::State as Shared;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use super::State;

/// The probes' own port: names of what is wrong, and no reason, since anyone may ask there.
pub(super) fn routes(state: State) -> Router {
    let short = async |Shared(state): Shared<State>| readiness(&state, |part, _| format!("{part}\n"));
    let guard = async |request, next: axum::middleware::Next| -> Response {
        let mut response = next.run(request).await;
        let plain = header::HeaderValue::from_static("nosniff");
        response.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, plain);
        response
    };
    Router::new()
        .route("/healthz", get(healthz))
        .route("/readyz", get(short))
        .layer(axum::middleware::from_fn(guard))
        .with_state(state)
}

/// Answers 200 while the loops turn, else 503 and the names of those that do not (restart me).
pub(super) async fn healthz(Shared(state): Shared<State>) -> Response {
    match state.facts.health.stuck(Instant::now()) {
        stuck if stuck.is_empty() => "ok\n".into_response(),
        stuck => (StatusCode::SERVICE_UNAVAILABLE, format!("stuck: {}\n", stuck.join(", "))).into_response(),
    }
}

/// Answers 200 when nothing stands in the way, else 503 and what does (look at me).
pub(super) async fn readyz(Shared(state): Shared<State>) -> Response {
    readiness(&state, |part, why| format!("{part}: {why}\n"))
}

fn readiness(state: &State, line: impl Fn(&str, &str) -> String) -> Response {
    let obstacles = state.facts.health.obstacles();
    let lines: String = obstacles.iter().map(|(part, why)| line(part, why)).collect();
    match lines.is_empty() {
        true => "ok\n".into_response(),
        false => (StatusCode::SERVICE_UNAVAILABLE, lines).into_response(),
    }
}
