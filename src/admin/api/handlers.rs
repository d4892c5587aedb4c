//! What each route of the API does: read its parameters, ask [`Facts`] or [`Actions`], answer.
//!
//! [`Facts`]: crate::admin::facts::Facts
//! [`Actions`]: crate::admin::actions::Actions

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{Path, State as Shared};
use axum::http::{HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use schemars::JsonSchema;
use serde::Deserialize;
use tokio::io::AsyncReadExt;

use super::{Asked, List, Nothing, Told, refuse};
use crate::admin::State;
use crate::admin::access::Who;
use crate::admin::actions::{Action, ActionError, Record};
use crate::admin::facts::{FactError, Many, adapters, config, dead_letters, decisions, now, prompts, rounds, trials};

type Answer<T> = Result<Json<T>, FactError>;

fn list<T>(items: Vec<T>) -> Json<List<T>> {
    Json(List { items })
}

pub(super) async fn status(Shared(state): Shared<State>, _: Asked<Nothing>) -> Answer<now::Status> {
    state.facts.status().await.map(Json)
}

pub(super) async fn current(Shared(state): Shared<State>, _: Asked<Nothing>) -> Answer<adapters::Current> {
    state.facts.current().map(Json)
}

pub(super) async fn rounds(Shared(state): Shared<State>, Asked(many): Asked<Many>) -> Answer<List<rounds::Round>> {
    state.facts.rounds(many.limit()).map(list)
}

pub(super) async fn round(
    Shared(state): Shared<State>,
    Path(round): Path<String>,
    _: Asked<Nothing>,
) -> Answer<rounds::Round> {
    state.facts.round(&round).map(Json)
}

pub(super) async fn rewards(
    Shared(state): Shared<State>,
    Path(round): Path<String>,
    _: Asked<Nothing>,
) -> Answer<rounds::Distribution> {
    state.facts.distribution(&round).await.map(Json)
}

pub(super) async fn trials(Shared(state): Shared<State>, Asked(many): Asked<Many>) -> Answer<List<trials::Trial>> {
    state.facts.trials(many.limit()).await.map(list)
}

pub(super) async fn trial(
    Shared(state): Shared<State>,
    Path(trial): Path<String>,
    _: Asked<Nothing>,
) -> Answer<trials::TrialDetail> {
    state.facts.trial(&trial).await.map(Json)
}

pub(super) async fn adapters(Shared(state): Shared<State>, _: Asked<Nothing>) -> Answer<List<adapters::Adapter>> {
    state.facts.adapters().map(list)
}

pub(super) async fn adapter(
    Shared(state): Shared<State>,
    Path(version): Path<String>,
    _: Asked<Nothing>,
) -> Answer<adapters::Adapter> {
    state.facts.adapter(&version).map(Json)
}

/// How much of a file is read at a time.
const PIECE: usize = 64 << 10;

pub(super) async fn adapter_file(
    Shared(state): Shared<State>,
    Path((version, name)): Path<(String, String)>,
    _: Asked<Nothing>,
) -> Result<Response, FactError> {
    let adapters::Content { file, bytes, sha256, digest } = state.facts.adapter_file(&version, &name).await?;
    let headers = [
        (header::CONTENT_TYPE, "application/octet-stream".to_owned()),
        (header::CONTENT_LENGTH, bytes.to_string()),
        (header::ETAG, format!("\"{sha256}\"")),
        (HeaderName::from_static("repr-digest"), format!("sha-256=:{digest}:")),
    ];
    let pieces = futures::stream::try_unfold(tokio::fs::File::from_std(file), async |mut file| {
        let mut piece = vec![0; PIECE];
        let read = file.read(&mut piece).await?;
        piece.truncate(read);
        std::io::Result::Ok((read > 0).then_some((Bytes::from(piece), file)))
    });
    Ok((headers, Body::from_stream(pieces)).into_response())
}

pub(super) async fn prompts(
    Shared(state): Shared<State>,
    Asked(which): Asked<prompts::Which>,
) -> Answer<List<prompts::Prompt>> {
    state.facts.prompts(&which).await.map(list)
}

pub(super) async fn prompt(
    Shared(state): Shared<State>,
    Path(hash): Path<String>,
    Asked(which): Asked<prompts::Which>,
) -> Answer<prompts::PromptDetail> {
    state.facts.prompt(&which, &hash).await.map(Json)
}

pub(super) async fn decisions(
    Shared(state): Shared<State>,
    Asked(many): Asked<Many>,
) -> Answer<List<decisions::Decision>> {
    state.facts.decisions(many.limit()).await.map(list)
}

pub(super) async fn dead_letters(
    Shared(state): Shared<State>,
    _: Asked<Nothing>,
) -> Answer<List<dead_letters::DeadLetters>> {
    state.facts.dead_letters().await.map(list)
}

pub(super) async fn config(Shared(state): Shared<State>, _: Asked<Nothing>) -> Json<config::InForce> {
    Json(state.facts.config())
}

pub(super) async fn actions(Shared(state): Shared<State>, Asked(many): Asked<Many>) -> Answer<List<Record>> {
    state.actions.list(many.limit()).map(list).map_err(|e| FactError::Failed(e.to_string()))
}

/// Why an action is asked for.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(in super::super) struct Why {
    /// What is recorded as the reason.
    #[schemars(length(min = 1, max = 500), regex(pattern = r"\S"))]
    pub(in super::super) reason: String,
}

/// Which version is to be served, and why.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(in super::super) struct Promote {
    /// A registered version.
    #[schemars(length(min = 1, max = 100))]
    pub(in super::super) version: String,
    /// What is recorded as the reason.
    #[schemars(length(min = 1, max = 500), regex(pattern = r"\S"))]
    pub(in super::super) reason: String,
}

pub(super) async fn promote(Shared(state): Shared<State>, who: Who, Told(told): Told<Promote>) -> Response {
    if let Err(error) = state.facts.adapter(&told.version) {
        return error.into_response();
    }
    ask(&state, &who, Action::Promote { version: told.version }, &told.reason)
}

pub(super) async fn rollback(Shared(state): Shared<State>, who: Who, Told(why): Told<Why>) -> Response {
    match state.facts.served_version() {
        Ok(from) => ask(&state, &who, Action::Rollback { from: Some(from) }, &why.reason),
        Err(error) => error.into_response(),
    }
}

pub(super) async fn freeze(Shared(state): Shared<State>, who: Who, Told(why): Told<Why>) -> Response {
    ask(&state, &who, Action::Freeze, &why.reason)
}

pub(super) async fn thaw(Shared(state): Shared<State>, who: Who, Told(why): Told<Why>) -> Response {
    ask(&state, &who, Action::Thaw, &why.reason)
}

pub(super) async fn run(Shared(state): Shared<State>, who: Who, Told(why): Told<Why>) -> Response {
    ask(&state, &who, Action::Run, &why.reason)
}

/// Hands an action on. A body of JSON is something that no form of a foreign page can send.
fn ask(state: &State, who: &Who, action: Action, reason: &str) -> Response {
    let reason = reason.trim();
    if !(1..=500).contains(&reason.chars().count()) {
        return refuse(StatusCode::UNPROCESSABLE_ENTITY, "give a reason of 1 to 500 characters: it is recorded".into());
    }
    match state.actions.ask(action, &who.name, reason) {
        Ok(record) => (StatusCode::ACCEPTED, Json(record)).into_response(),
        Err(error @ ActionError::Busy) => refuse(StatusCode::CONFLICT, error.to_string()),
        Err(error @ ActionError::NotHere) => refuse(StatusCode::CONFLICT, error.to_string()),
        Err(error) => FactError::Failed(error.to_string()).into_response(),
    }
}
