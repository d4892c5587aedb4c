//! Servers that read a folder (NIM, vLLM's filesystem resolver), a file of desired adapters (GIE's sidecar, KServe), or
//! only what an operator's webhook tells them. taod publishes, and looks until the server answers to the name.
//!
//! What is published under a name never changes, and stays when the version is retired unless `publish.remove` says
//! otherwise: vLLM reads a folder again when its adapter was evicted, and its engine dies where the folder is gone.

use std::path::Path;

use async_trait::async_trait;
use serde_json::json;

use super::hook::Hook;
use super::http::Http;
use super::paths::PathMap;
use super::publish::Publisher;
use super::server::{Answers, Load, Question, Reply, Server};
use super::vllm::adapters;
use super::{EndpointError, Kind, Settings};
use crate::record::Message;

/// A client of one server.
pub(super) struct Directory {
    http: Http,
    hook: Hook,
    paths: PathMap,
    /// None where the webhook does it all.
    publisher: Option<Publisher>,
}

impl Directory {
    /// Returns a client for each of the endpoint's replicas.
    pub(super) fn replicas(settings: &Settings) -> Result<Vec<Directory>, EndpointError> {
        let hook = Hook::new(settings)?;
        let publisher = (settings.kind == Kind::Directory).then(|| Publisher::new(settings));
        let paths = PathMap::new(&settings.path_map);
        let clients = Http::of(settings, &settings.urls)?;
        let one = |http| Directory { http, hook: hook.clone(), paths: paths.clone(), publisher: publisher.clone() };
        Ok(clients.into_iter().map(one).collect())
    }

    /// Returns true where the server answers to a name, whether or not it lists it yet: some load at the first question.
    async fn answers(&self, name: &str) -> Result<bool, EndpointError> {
        if adapters(&self.http).await?.iter().any(|listed| listed == name) {
            return Ok(true);
        }
        let messages = [Message::text("user", "Hello.")];
        match self.ask(&Question { model: name, messages: &messages, max_tokens: 1 }).await {
            Ok(_) => Ok(true),
            Err(EndpointError::Status { status: 400..=499, .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

#[async_trait]
impl Answers for Directory {
    fn url(&self) -> &str {
        self.http.url()
    }

    async fn ask(&self, question: &Question<'_>) -> Result<Reply, EndpointError> {
        self.http.chat(question, json!({})).await
    }
}

#[async_trait]
impl Server for Directory {
    async fn load(&self, name: &str, folder: &Path, _how: Load) -> Result<(), EndpointError> {
        let path = match &self.publisher {
            Some(publisher) => self.paths.seen(&publisher.add(name, folder)?),
            None => self.paths.seen(folder),
        };
        self.hook.load_and_wait(&self.http, self, name, folder, &path).await
    }

    async fn unload(&self, name: &str) -> Result<(), EndpointError> {
        if let Some(publisher) = &self.publisher {
            publisher.remove(name)?;
        }
        self.hook.unload(&self.http, name).await
    }

    async fn names(&self) -> Result<Vec<String>, EndpointError> {
        match &self.publisher {
            // What is published is what taod can take back.
            Some(publisher) => adapters(&self.http).await.and_then(|_| publisher.names()),
            None => adapters(&self.http).await,
        }
    }

    async fn holds(&self, name: &str, folder: &Path) -> Result<bool, EndpointError> {
        let published = self.publisher.as_ref().is_none_or(|publisher| publisher.has(name, folder));
        Ok(published && self.answers(name).await?)
    }
}
