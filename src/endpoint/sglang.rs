//! SGLang: adapters come and go at runtime, each load under an id of its own, so that no cache outlives a name.
//!
//! It has no load in place. An adapter is asked for as `BASE:ADAPTER`. Rank-stabilised scaling and rank patterns are
//! ignored by it, which [`compat`](super::compat) refuses before a call is made.

use std::path::Path;

use async_trait::async_trait;
use serde_json::{Value, json};

use super::http::{Http, Raw};
use super::paths::PathMap;
use super::server::{Answers, Load, Question, Reply, Server};
use super::vllm::{adapters, listed_from, read_back, source};
use super::{EndpointError, Settings};

/// A client of one server.
pub(super) struct Sglang {
    http: Http,
    paths: PathMap,
    base_model: String,
}

impl Sglang {
    /// Returns a client for each of the endpoint's replicas.
    pub(super) fn replicas(settings: &Settings) -> Result<Vec<Sglang>, EndpointError> {
        let (paths, base_model) = (PathMap::new(&settings.path_map), &settings.base_model);
        let clients = Http::of(settings, &settings.urls)?;
        Ok(clients
            .into_iter()
            .map(|http| Sglang { http, paths: paths.clone(), base_model: base_model.clone() })
            .collect())
    }

    /// Reads an answer whose body, not whose status, says how it went.
    fn told(&self, raw: &Raw, what: &str) -> Result<(), EndpointError> {
        let body: Value = serde_json::from_str(&raw.text).unwrap_or(Value::Null);
        let message = body["error_message"].as_str().unwrap_or_default();
        if raw.is_success() && body["success"] == true {
            return Ok(());
        }
        let (url, what, status) = (self.http.url().to_owned(), what.to_owned(), raw.status);
        match (raw.status, message) {
            (404, _) => Err(EndpointError::NoRoute { url, what }),
            (_, "") => Err(self.http.refused(raw, &what)),
            (_, message) => Err(EndpointError::Status { url, what, status, message: super::http::one_line(message) }),
        }
    }
}

#[async_trait]
impl Answers for Sglang {
    fn url(&self) -> &str {
        self.http.url()
    }

    async fn ask(&self, question: &Question<'_>) -> Result<Reply, EndpointError> {
        let model = match question.model == self.base_model {
            true => self.base_model.clone(),
            false => format!("{}:{}", self.base_model, question.model),
        };
        self.http.chat(&Question { model: &model, ..question.clone() }, json!({})).await
    }
}

#[async_trait]
impl Server for Sglang {
    async fn load(&self, name: &str, folder: &Path, _how: Load) -> Result<(), EndpointError> {
        let (path, what) = (self.paths.seen(folder), format!("the load of '{name}'"));
        // Asked first, because a second load of the same is an error that says no more than that.
        if listed_from(&self.http, name, &path).await? {
            return Ok(());
        }
        let body = json!({"lora_name": name, "lora_path": path, "pinned": false});
        let raw = self.http.change("/load_lora_adapter", &body, &what).await?;
        self.told(&raw, &what)?;
        read_back(&self.http, name, path).await
    }

    async fn unload(&self, name: &str) -> Result<(), EndpointError> {
        if !self.names().await?.iter().any(|listed| listed == name) {
            return Ok(());
        }
        let what = format!("the unload of '{name}'");
        let raw = self.http.change("/unload_lora_adapter", &json!({"lora_name": name}), &what).await?;
        self.told(&raw, &what)
    }

    async fn names(&self) -> Result<Vec<String>, EndpointError> {
        adapters(&self.http).await
    }

    async fn holds(&self, name: &str, folder: &Path) -> Result<bool, EndpointError> {
        listed_from(&self.http, name, &self.paths.seen(folder)).await
    }

    async fn source(&self, name: &str) -> Result<Option<String>, EndpointError> {
        source(&self.http, name).await
    }
}
