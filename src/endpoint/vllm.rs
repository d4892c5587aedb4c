//! One server in vLLM's dialect, which `taod serve` speaks, too, and adds aliases to.
//!
//! Paths are sent absolute, because vLLM takes a relative one for a hub id.

use std::path::Path;

use async_trait::async_trait;
use reqwest::Method;
use serde_json::{Value, json};

use super::http::Http;
pub use super::http::{INTERNAL_HEADER, INTERNAL_USER};
use super::paths::PathMap;
pub use super::server::{Answers, Load, Question, Reply, Server};
use super::{EndpointError, Settings};

/// A client of one server.
#[derive(Clone)]
pub struct Vllm {
    http: Http,
    paths: PathMap,
}

/// One line of `/v1/models`.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelCard {
    pub id: String,
    /// The path it came from.
    pub root: Option<String>,
    /// The base model, for an adapter.
    pub parent: Option<String>,
}

impl Vllm {
    /// Returns a client for each of the endpoint's replicas.
    pub fn replicas(settings: &Settings) -> Result<Vec<Vllm>, EndpointError> {
        let paths = PathMap::new(&settings.path_map);
        let clients = Http::of(settings, &settings.urls)?;
        Ok(clients.into_iter().map(|http| Vllm { http, paths: paths.clone() }).collect())
    }

    /// Returns the server's address.
    pub fn url(&self) -> &str {
        self.http.url()
    }

    /// Returns what the server lists: its base model and the loaded adapters.
    pub async fn models(&self) -> Result<Vec<ModelCard>, EndpointError> {
        models(&self.http).await
    }

    /// Loads the adapter in `folder` under `name`, and reads back that it is there. Safe to repeat.
    pub async fn load(&self, name: &str, folder: &Path, how: Load) -> Result<(), EndpointError> {
        let (path, what) = (self.paths.seen(folder), format!("the load of '{name}'"));
        let body = json!({"lora_name": name, "lora_path": path, "load_inplace": how == Load::InPlace});
        let raw = self.http.change("/v1/load_lora_adapter", &body, &what).await?;
        let message = raw.message();
        let known = raw.status == 400 && message.contains("has already been loaded");
        match raw.status {
            200..=299 => {}
            _ if known => {}
            404 if message == "Not Found" => return Err(EndpointError::NoRoute { url: self.url().to_owned(), what }),
            _ => return Err(self.http.refused(&raw, &what)),
        }
        read_back(&self.http, name, path).await
    }

    /// Unloads an adapter; one that is not loaded is no error.
    pub async fn unload(&self, name: &str) -> Result<(), EndpointError> {
        let what = format!("the unload of '{name}'");
        let raw = self.http.change("/v1/unload_lora_adapter", &json!({"lora_name": name}), &what).await?;
        match raw.status {
            200..=299 => Ok(()),
            404 if raw.message() == "Not Found" => Err(EndpointError::NoRoute { url: self.url().to_owned(), what }),
            404 => Ok(()),
            _ => Err(self.http.refused(&raw, &what)),
        }
    }

    /// Asks a question greedily; the answer carries its tokens and their log-probs.
    pub async fn ask(&self, question: &Question<'_>) -> Result<Reply, EndpointError> {
        self.http.chat(question, json!({"return_token_ids": true})).await
    }

    /// Returns what an alias points at, if it exists.
    pub async fn alias(&self, name: &str) -> Result<Option<String>, EndpointError> {
        let what = "GET /v1/aliases";
        let list = self.http.json(Method::GET, "/v1/aliases", None, what).await?;
        let entries = list["data"].as_array().ok_or_else(|| self.http.unexpected(what, "data"))?;
        let entry = entries.iter().find(|entry| entry["name"] == name);
        Ok(entry.and_then(|entry| entry["target"].as_str()).map(str::to_owned))
    }

    /// Points an alias at `target`, if it points at `expected` (`None`: if it does not exist). Safe to repeat.
    pub async fn move_alias(&self, name: &str, expected: Option<&str>, target: &str) -> Result<(), EndpointError> {
        let what = format!("the move of alias '{name}' to '{target}'");
        let body = json!({"target": target, "expected": expected});
        let raw = self.http.call(Method::PUT, &format!("/v1/aliases/{name}"), Some(&body), &what).await?;
        match raw.status {
            200..=299 => Ok(()),
            409 => match self.alias(name).await? {
                Some(current) if current == target => Ok(()),
                current => Err(EndpointError::AliasMoved {
                    url: self.url().to_owned(),
                    name: name.to_owned(),
                    current: current.unwrap_or_else(|| "nothing".into()),
                    expected: expected.unwrap_or("nothing").to_owned(),
                }),
            },
            _ => Err(self.http.refused(&raw, &what)),
        }
    }
}

#[async_trait]
impl Answers for Vllm {
    fn url(&self) -> &str {
        self.http.url()
    }

    async fn ask(&self, question: &Question<'_>) -> Result<Reply, EndpointError> {
        Vllm::ask(self, question).await
    }
}

#[async_trait]
impl Server for Vllm {
    async fn load(&self, name: &str, folder: &Path, how: Load) -> Result<(), EndpointError> {
        Vllm::load(self, name, folder, how).await
    }

    async fn unload(&self, name: &str) -> Result<(), EndpointError> {
        Vllm::unload(self, name).await
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

    async fn alias(&self, name: &str) -> Result<Option<String>, EndpointError> {
        Vllm::alias(self, name).await
    }

    async fn move_alias(&self, name: &str, expected: Option<&str>, target: &str) -> Result<(), EndpointError> {
        Vllm::move_alias(self, name, expected, target).await
    }
}

/// Returns what a server lists at `/v1/models`.
pub(super) async fn models(http: &Http) -> Result<Vec<ModelCard>, EndpointError> {
    let what = "GET /v1/models";
    let list = http.json(Method::GET, "/v1/models", None, what).await?;
    let cards = list["data"].as_array().ok_or_else(|| http.unexpected(what, "data"))?;
    let text = |card: &Value, key: &str| card[key].as_str().map(str::to_owned);
    let card = |card: &Value| {
        let id = text(card, "id").ok_or_else(|| http.unexpected(what, "data[].id"))?;
        Ok(ModelCard { id, root: text(card, "root"), parent: text(card, "parent") })
    };
    cards.iter().map(card).collect()
}

/// Returns the names of the adapters at `/v1/models`: what has a parent.
pub(super) async fn adapters(http: &Http) -> Result<Vec<String>, EndpointError> {
    Ok(models(http).await?.into_iter().filter(|card| card.parent.is_some()).map(|card| card.id).collect())
}

/// Returns true where `/v1/models` lists `name` with this path.
pub(super) async fn listed_from(http: &Http, name: &str, path: &str) -> Result<bool, EndpointError> {
    Ok(source(http, name).await?.as_deref() == Some(path))
}

/// Returns the path with which `/v1/models` lists `name`.
pub(super) async fn source(http: &Http, name: &str) -> Result<Option<String>, EndpointError> {
    Ok(models(http).await?.into_iter().find(|card| card.id == name).and_then(|card| card.root))
}

/// Checks that `/v1/models` lists what was loaded.
pub(super) async fn read_back(http: &Http, name: &str, path: String) -> Result<(), EndpointError> {
    let card = models(http).await?.into_iter().find(|card| card.id == name);
    if card.as_ref().and_then(|card| card.root.as_ref()) == Some(&path) {
        return Ok(());
    }
    let found = match card {
        Some(card) => format!("it with root {}", card.root.as_deref().unwrap_or("unknown")),
        None => "nothing of that name".to_owned(),
    };
    Err(EndpointError::ReadBack { url: http.url().to_owned(), name: name.to_owned(), path, found })
}

#[cfg(test)]
#[path = "vllm_tests.rs"]
mod tests;
