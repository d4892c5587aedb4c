//! The way in: a token, shown once, becomes a session.

use std::sync::Arc;

use axum::extract::{Form, Query, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Redirect, Response};
use minijinja::context;
use serde::Deserialize;

use super::super::access::{Doors, Who};
use super::super::session::same;

/// Where to go once in.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(in super::super) struct Target {
    to: String,
}

/// What the form of the login sends.
#[derive(Deserialize)]
pub(in super::super) struct Login {
    token: String,
    #[serde(default)]
    to: String,
}

/// What the form of the logout sends.
#[derive(Deserialize)]
pub(in super::super) struct Logout {
    csrf: String,
}

/// Shows the form.
pub(in super::super) async fn show(
    State(doors): State<Arc<Doors>>,
    caller: Who,
    Query(target): Query<Target>,
) -> Response {
    form(&doors, &caller, &target.to, false)
}

fn form(doors: &Doors, caller: &Who, to: &str, failed: bool) -> Response {
    let takes_tokens = doors.takes_tokens();
    super::render(
        "login.html",
        "/login",
        caller,
        context! { title => "Sign in", to => own_path(to), failed, takes_tokens },
    )
}

/// Begins a session for a token that holds.
pub(in super::super) async fn open(State(doors): State<Arc<Doors>>, caller: Who, Form(login): Form<Login>) -> Response {
    let Some(holder) = doors.holder(login.token.trim()) else {
        tracing::warn!("somebody showed a token that is not known");
        return (StatusCode::UNAUTHORIZED, form(&doors, &caller, &login.to, true)).into_response();
    };
    tracing::info!(name = holder.name, role = holder.role.as_str(), "signed in");
    let cookie = doors.sessions.begin(holder, doors.tls);
    with_cookie(&cookie, Redirect::to(own_path(&login.to)))
}

/// Ends the session.
pub(in super::super) async fn close(
    State(doors): State<Arc<Doors>>,
    caller: Who,
    headers: HeaderMap,
    Form(logout): Form<Logout>,
) -> Response {
    let Some(cookie) = doors.sessions.cookie(&headers, doors.tls) else {
        return Redirect::to("/login").into_response();
    };
    if !caller.csrf().is_some_and(|csrf| same(csrf, &logout.csrf)) {
        return (StatusCode::FORBIDDEN, "the form is not from this page; load it again\n").into_response();
    }
    doors.sessions.end(&cookie);
    Redirect::to("/login").into_response()
}

fn with_cookie(cookie: &str, redirect: Redirect) -> Response {
    let mut response = redirect.into_response();
    if let Ok(value) = HeaderValue::from_str(cookie) {
        response.headers_mut().insert(header::SET_COOKIE, value);
    }
    response
}

/// Returns `to` where it is a path of this page, so that nobody can be sent elsewhere by a link to the login.
fn own_path(to: &str) -> &str {
    let is_own = to.starts_with('/') && !to.starts_with("//") && !to.contains(['\\', '\r', '\n', '\t']);
    if is_own { to } else { "/" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_login_leads_only_to_this_page() {
        assert_eq!(own_path("/rounds?limit=5"), "/rounds?limit=5");
        for to in ["", "https://evil.example", "//evil.example", "/\\evil.example", "javascript:alert(1)", "/\t/evil"] {
            assert_eq!(own_path(to), "/", "{to:?}");
        }
    }
}
