//! The page in a browser: templates rendered here, with everything in them escaped, and two small files of our own.
//! Nothing is fetched from anywhere else.

mod charts;
mod filters;
pub(super) mod login;
mod views;

use std::sync::LazyLock;

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{MethodRouter, get, post};
use minijinja::{AutoEscape, Environment, UndefinedBehavior, Value, context};

use super::access::{Caller, Need, Proof};
use super::{State, guarded};

/// All templates by name; their names end in `.html`, so that what is put into them is escaped.
const TEMPLATES: &[(&str, &str)] = &[
    ("adapter.html", include_str!("templates/adapter.html")),
    ("adapters.html", include_str!("templates/adapters.html")),
    ("base.html", include_str!("templates/base.html")),
    ("config.html", include_str!("templates/config.html")),
    ("dead_letters.html", include_str!("templates/dead_letters.html")),
    ("decisions.html", include_str!("templates/decisions.html")),
    ("login.html", include_str!("templates/login.html")),
    ("now.html", include_str!("templates/now.html")),
    ("now_live.html", include_str!("templates/now_live.html")),
    ("parts.html", include_str!("templates/parts.html")),
    ("problem.html", include_str!("templates/problem.html")),
    ("prompt.html", include_str!("templates/prompt.html")),
    ("prompts.html", include_str!("templates/prompts.html")),
    ("round.html", include_str!("templates/round.html")),
    ("rounds.html", include_str!("templates/rounds.html")),
    ("trial.html", include_str!("templates/trial.html")),
    ("trials.html", include_str!("templates/trials.html")),
];

static ENVIRONMENT: LazyLock<Result<Environment<'static>, minijinja::Error>> = LazyLock::new(|| {
    let mut environment = Environment::new();
    environment.set_auto_escape_callback(|_| AutoEscape::Html);
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    environment.set_syntax(minijinja::syntax::SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    filters::add(&mut environment);
    for (name, source) in TEMPLATES {
        environment.add_template(name, source)?;
    }
    Ok(environment)
});

/// Renders a template inside the frame that all pages share: what it is called, where it is, and who looks.
/// A fault in a template is our own, so it is logged and shown as such.
fn render(name: &str, here: &str, caller: &Caller, own: Value) -> Response {
    let session = matches!(caller.proof, Proof::Ambient { .. }) && !caller.name.starts_with("certificate ");
    let shown = context! {
        name => caller.name.as_str(), role => caller.role.map(|role| role.as_str()), csrf => caller.csrf(), session,
        operates => caller.may(super::token::Role::Operate),
    };
    let all = context! { here, caller => shown, taod => env!("CARGO_PKG_VERSION"), ..own };
    let rendered = match &*ENVIRONMENT {
        Ok(environment) => environment.get_template(name).and_then(|template| template.render(all)),
        Err(error) => Err(minijinja::Error::new(error.kind(), error.to_string())),
    };
    match rendered {
        Ok(text) => Html(text).into_response(),
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), template = name, "a page cannot be shown");
            (StatusCode::INTERNAL_SERVER_ERROR, "this page cannot be shown; the log says why\n").into_response()
        }
    }
}

/// All pages. Their texts of prompts need a role, their forms the role to operate.
pub(super) fn routes() -> Router<State> {
    let figures = |handler: MethodRouter<State>| guarded(Need::Figures, handler);
    Router::new()
        .route("/", figures(get(views::now)))
        .route("/live/now", figures(get(views::now_live)))
        .route("/rounds", figures(get(views::rounds)))
        .route("/rounds/{round}", figures(get(views::round)))
        .route("/trials", figures(get(views::trials)))
        .route("/trials/{trial}", figures(get(views::trial)))
        .route("/adapters", figures(get(views::adapters)))
        .route("/adapters/{version}", figures(get(views::adapter)))
        .route("/prompts", figures(get(views::prompts)))
        .route("/prompts/{hash}", guarded(Need::Prompts, get(views::prompt)))
        .route("/decisions", figures(get(views::decisions)))
        .route("/dead-letters", figures(get(views::dead_letters)))
        .route("/config", figures(get(views::config)))
        .route("/actions/{what}", guarded(Need::Operate, post(views::act)))
}

/// The files that the pages load.
pub(super) fn assets() -> Router {
    let file = |kind: &'static str, text: &'static str| {
        guarded(Need::Nothing, get(async move || ([(header::CONTENT_TYPE, kind)], text)))
    };
    Router::new()
        .route("/static/style.css", file("text/css; charset=utf-8", include_str!("templates/style.css")))
        .route("/static/live.js", file("text/javascript; charset=utf-8", include_str!("templates/live.js")))
        .route("/favicon.svg", file("image/svg+xml", include_str!("templates/favicon.svg")))
}

/// Returns text as a part of a query string.
pub(super) fn encode(text: &str) -> String {
    url::form_urlencoded::byte_serialize(text.as_bytes()).collect()
}

#[cfg(test)]
mod tests;
