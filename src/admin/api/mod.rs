//! The JSON API under `/api/v1`, and the OpenAPI document of it.
//!
//! A route, what it needs, its parameters and the schema of its answer are one entry of [`routes`]: the document cannot know a
//! route that is not there, and there is none that it does not know. Schemas come from the types that are answered.

mod document;
mod handlers;

use std::sync::Arc;

use axum::Router;
use axum::extract::{FromRequest, FromRequestParts, Json as Body, Query, Request};
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get};
use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::access::Need;
use super::facts::Problem;
use super::{State, guarded};
use document::{Content, Document, Operation};

/// Collects routes together with what the document says of them.
struct Api {
    router: Router<State>,
    document: Document,
}

impl Api {
    fn get<Q: JsonSchema, A: JsonSchema>(
        mut self,
        path: &'static str,
        need: Need,
        summary: &'static str,
        handler: MethodRouter<State>,
    ) -> Self {
        let answer = Content::Json(self.document.generator().subschema_for::<A>());
        self.ask::<Q>(path, need, summary, answer, handler)
    }

    /// A route that answers with a file.
    fn file(self, path: &'static str, need: Need, summary: &'static str, handler: MethodRouter<State>) -> Self {
        self.ask::<Nothing>(path, need, summary, Content::File, handler)
    }

    fn ask<Q: JsonSchema>(
        mut self,
        path: &'static str,
        need: Need,
        summary: &'static str,
        answer: Content,
        handler: MethodRouter<State>,
    ) -> Self {
        // What a query may leave out has a default; what is answered is always whole.
        let query = SchemaSettings::draft2020_12().into_generator().into_root_schema_for::<Q>();
        self.document.add(Operation {
            method: "get",
            path,
            need,
            summary,
            query: Some(query),
            body: None,
            answer,
            status: 200,
        });
        Api { router: self.router.route(path, guarded(need, handler)), ..self }
    }

    fn post<B: JsonSchema, A: JsonSchema>(
        mut self,
        path: &'static str,
        summary: &'static str,
        handler: MethodRouter<State>,
    ) -> Self {
        let need = Need::Operate;
        let generator = self.document.generator();
        let (body, answer) = (generator.subschema_for::<B>(), Content::Json(generator.subschema_for::<A>()));
        self.document.add(Operation {
            method: "post",
            path,
            need,
            summary,
            query: None,
            body: Some(body),
            answer,
            status: 202,
        });
        Api { router: self.router.route(path, guarded(need, handler)), ..self }
    }
}

/// A route without parameters in its query.
#[derive(Debug, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Nothing {}

/// A list.
#[derive(Debug, Serialize, JsonSchema)]
struct List<T> {
    items: Vec<T>,
}

/// Returns the API and its document.
pub(super) fn routes() -> Router<State> {
    use super::actions::Record;
    use super::facts::{self, Many, adapters, config, dead_letters, decisions, now, prompts, rounds, trials};
    use handlers as h;

    let figures = Need::Figures;
    let api = Api { router: Router::new(), document: Document::new() }
        .get::<Nothing, now::Status>("/api/v1/status", figures, "What the daemon does now", get(h::status))
        .get::<Nothing, adapters::Current>("/api/v1/current", figures, "What is served", get(h::current))
        .get::<Many, List<rounds::Round>>("/api/v1/rounds", figures, "Rounds, the newest first", get(h::rounds))
        .get::<Nothing, rounds::Round>("/api/v1/rounds/{round}", figures, "One round", get(h::round))
        .get::<Nothing, rounds::Distribution>(
            "/api/v1/rounds/{round}/rewards",
            figures,
            "How the rewards of a round's answers are distributed, by pass",
            get(h::rewards),
        )
        .get::<Many, List<trials::Trial>>(
            "/api/v1/trials",
            figures,
            "Trials of the gate, the newest first",
            get(h::trials),
        )
        .get::<Nothing, trials::TrialDetail>(
            "/api/v1/trials/{trial}",
            figures,
            "One trial with the evidence after every prompt",
            get(h::trial),
        )
        .get::<Nothing, List<adapters::Adapter>>(
            "/api/v1/adapters",
            figures,
            "Adapters with their lineage, the newest first",
            get(h::adapters),
        )
        .get::<Nothing, adapters::Adapter>("/api/v1/adapters/{version}", figures, "One adapter", get(h::adapter))
        .file(
            "/api/v1/adapters/{version}/files/{name}",
            Need::Prompts,
            "A file of an adapter, hashed again before it is sent",
            get(h::adapter_file),
        )
        .get::<prompts::Which, List<prompts::Prompt>>(
            "/api/v1/prompts",
            figures,
            "Prompts of a round or a trial, in numbers",
            get(h::prompts),
        )
        .get::<prompts::Which, prompts::PromptDetail>(
            "/api/v1/prompts/{hash}",
            Need::Prompts,
            "One prompt with its text, its answers and their scores",
            get(h::prompt),
        )
        .get::<Many, List<decisions::Decision>>(
            "/api/v1/decisions",
            figures,
            "Decisions in plain words, the newest first",
            get(h::decisions),
        )
        .get::<Nothing, List<dead_letters::DeadLetters>>(
            "/api/v1/dead-letters",
            figures,
            "Records that could not be read, by reason",
            get(h::dead_letters),
        )
        .get::<Nothing, config::InForce>(
            "/api/v1/config",
            figures,
            "The config in force, secrets hidden",
            get(h::config),
        )
        .get::<Many, List<Record>>(
            "/api/v1/actions",
            figures,
            "Actions of operators, the newest first",
            get(h::actions),
        )
        .post::<h::Promote, Record>("/api/v1/actions/promote", "Serve a version", axum::routing::post(h::promote))
        .post::<h::Why, Record>(
            "/api/v1/actions/rollback",
            "Serve what was served before, and quarantine what is served",
            axum::routing::post(h::rollback),
        )
        .post::<h::Why, Record>(
            "/api/v1/actions/freeze",
            "Let nothing be trained, judged or promoted",
            axum::routing::post(h::freeze),
        )
        .post::<h::Why, Record>("/api/v1/actions/thaw", "Lift the freeze", axum::routing::post(h::thaw))
        .post::<h::Why, Record>("/api/v1/actions/run", "Begin a round now", axum::routing::post(h::run));
    let mut document = api.document;
    let problem = document.generator().subschema_for::<facts::Problem>();
    let text = Arc::new(document.finish(&problem));
    api.router.route("/api/v1/openapi.json", guarded(figures, get(async move || axum::Json((*text).clone()))))
}

/// The parameters of a query; one that is unknown or does not fit is refused in words.
struct Asked<T>(T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Asked<T> {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Response> {
        match Query::<T>::from_request_parts(parts, state).await {
            Ok(Query(asked)) => Ok(Asked(asked)),
            Err(rejection) => Err(refuse(StatusCode::BAD_REQUEST, rejection.body_text())),
        }
    }
}

/// The JSON body of an action.
struct Told<T>(T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Told<T> {
    type Rejection = Response;

    async fn from_request(request: Request, state: &S) -> Result<Self, Response> {
        match Body::<T>::from_request(request, state).await {
            Ok(Body(told)) => Ok(Told(told)),
            Err(rejection) => Err(refuse(rejection.status(), rejection.body_text())),
        }
    }
}

fn refuse(status: StatusCode, error: String) -> Response {
    (status, axum::Json(Problem { error })).into_response()
}

#[cfg(test)]
mod tests;
