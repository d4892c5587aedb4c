//! mistral.rs: a name is replaced by compare-and-set, and requests end on the generation that they began with.
//!
//! So its load in place has none of vLLM's hazards: the files are read once, and a name that somebody else moved
//! meanwhile is not overruled.

use std::path::Path;

use async_trait::async_trait;
use reqwest::Method;
use serde_json::{Value, json};

use super::http::Http;
use super::paths::PathMap;
use super::server::{Answers, Load, Question, Reply, Server};
use super::{EndpointError, Settings};

/// A client of one server.
pub(super) struct MistralRs {
    http: Http,
    paths: PathMap,
}

/// One line of `/v1/lora_adapters`.
struct Loaded {
    name: String,
    /// Where it came from, links resolved; told only where runtime updates are allowed.
    source: Option<String>,
    generation: String,
}

impl MistralRs {
    /// Returns a client for each of the endpoint's replicas.
    pub(super) fn replicas(settings: &Settings) -> Result<Vec<MistralRs>, EndpointError> {
        let paths = PathMap::new(&settings.path_map);
        let clients = Http::of(settings, &settings.urls)?;
        Ok(clients.into_iter().map(|http| MistralRs { http, paths: paths.clone() }).collect())
    }

    async fn loaded(&self) -> Result<Vec<Loaded>, EndpointError> {
        let what = "GET /v1/lora_adapters";
        let list = self.http.json(Method::GET, "/v1/lora_adapters", None, what).await?;
        let entries = list["data"].as_array().ok_or_else(|| self.http.unexpected(what, "data"))?;
        let text = |entry: &Value, key: &str| entry[key].as_str().map(str::to_owned);
        let one = |entry: &Value| {
            let name = text(entry, "id").ok_or_else(|| self.http.unexpected(what, "data[].id"))?;
            let generation = text(entry, "generation");
            let generation = generation.ok_or_else(|| self.http.unexpected(what, "data[].generation"))?;
            Ok(Loaded { name, source: text(entry, "source"), generation })
        };
        entries.iter().map(one).collect()
    }

    async fn find(&self, name: &str) -> Result<Option<Loaded>, EndpointError> {
        Ok(self.loaded().await?.into_iter().find(|loaded| loaded.name == name))
    }
}

#[async_trait]
impl Answers for MistralRs {
    fn url(&self) -> &str {
        self.http.url()
    }

    async fn ask(&self, question: &Question<'_>) -> Result<Reply, EndpointError> {
        self.http.chat(question, json!({})).await
    }
}

#[async_trait]
impl Server for MistralRs {
    async fn load(&self, name: &str, folder: &Path, how: Load) -> Result<(), EndpointError> {
        let (path, what) = (self.paths.seen(folder), format!("the load of '{name}'"));
        let there = self.find(name).await?;
        if there.as_ref().is_some_and(|loaded| loaded.source.as_deref() == Some(&path)) {
            return Ok(());
        }
        let mut body = json!({"lora_name": name, "lora_path": path});
        if let (Load::InPlace, Some(there)) = (how, &there) {
            body["load_inplace"] = true.into();
            body["expected_generation"] = there.generation.as_str().into();
        }
        let raw = self.http.change("/v1/load_lora_adapter", &body, &what).await?;
        match raw.status {
            200..=299 => {}
            // An unknown route has no body of theirs.
            404 if !raw.text.contains("error") => {
                return Err(EndpointError::NoRoute { url: self.http.url().to_owned(), what });
            }
            _ => return Err(self.http.refused(&raw, &what)),
        }
        let found = match self.find(name).await? {
            Some(loaded) if loaded.source.as_deref() == Some(&path) => return Ok(()),
            Some(loaded) => format!("it from {}", loaded.source.as_deref().unwrap_or("a source that it does not tell")),
            None => "nothing of that name".to_owned(),
        };
        Err(EndpointError::ReadBack { url: self.http.url().to_owned(), name: name.to_owned(), path, found })
    }

    async fn unload(&self, name: &str) -> Result<(), EndpointError> {
        let Some(there) = self.find(name).await? else { return Ok(()) };
        let what = format!("the unload of '{name}'");
        let body = json!({"lora_name": name, "expected_generation": there.generation});
        let raw = self.http.change("/v1/unload_lora_adapter", &body, &what).await?;
        if raw.is_success() { Ok(()) } else { Err(self.http.refused(&raw, &what)) }
    }

    async fn names(&self) -> Result<Vec<String>, EndpointError> {
        Ok(self.loaded().await?.into_iter().map(|loaded| loaded.name).collect())
    }

    async fn holds(&self, name: &str, folder: &Path) -> Result<bool, EndpointError> {
        Ok(self.source(name).await? == Some(self.paths.seen(folder)))
    }

    async fn source(&self, name: &str) -> Result<Option<String>, EndpointError> {
        Ok(self.find(name).await?.and_then(|loaded| loaded.source))
    }
}
