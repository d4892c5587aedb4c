//! The server's own key: who may ask it at all.
//!
//! On loopback a key is a choice; on any other address the server does not start without one, since whoever reaches it
//! could otherwise use the model and move the name that clients ask for.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use subtle::ConstantTimeEq;

use super::api::ApiError;
use super::{ServeError, Settings};
use crate::secret::{self, Secret};

/// Reads the key of a server that listens at `address`; refused where there must be one and is none.
pub(super) fn read(settings: &Settings, address: SocketAddr) -> Result<Option<Secret>, ServeError> {
    let key =
        secret::read("serve.api_key", Some(&settings.api_key_file)).map_err(|e| ServeError::Key(e.to_string()))?;
    match key.is_none() && !address.ip().is_loopback() {
        true => Err(ServeError::Open(address)),
        false => Ok(key),
    }
}

/// Answers 401 to whoever does not show the key. Health is anyone's question.
pub(super) async fn check(State(key): State<Arc<Option<Secret>>>, request: Request, next: Next) -> Response {
    let Some(key) = key.as_ref() else { return next.run(request).await };
    let shown = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()?.split_once(' '));
    let fits = shown.is_some_and(|(scheme, token)| {
        scheme.eq_ignore_ascii_case("bearer") && bool::from(token.as_bytes().ct_eq(key.expose().as_bytes()))
    });
    if fits || request.uri().path() == "/health" {
        return next.run(request).await;
    }
    let message = "this server wants its key: send it as `Authorization: Bearer KEY` (serve.api_key_file)";
    ApiError { status: StatusCode::UNAUTHORIZED, kind: "AuthenticationError", ..ApiError::bad(message, None) }
        .into_response()
}
