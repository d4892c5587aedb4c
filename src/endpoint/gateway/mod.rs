//! A gateway before the replicas: the stable name is its alias, moved once for all of them.
//!
//! Three gateways read a file that taod writes whole ([`formats`]); any other one is moved by a webhook. Where the
//! name leads is read back from the same place, so that a crash between the move and the record can be settled. The
//! proof through the stable name asks the gateway as clients do, and waits until the gateway has followed.

mod formats;

use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use reqwest::Method;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{durable, secret};

use super::http::Http;
use super::server::{Answers, Question, Reply};
use super::{EndpointError, Kind as Server, Settings as Endpoint};
pub use formats::Canary;
use formats::Route;

/// What an operator sets of the gateway; used only where `endpoint.alias` is "gateway".
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// How it is told: "litellm", "tensorzero" or "llm_d" (a file that taod writes and the gateway reads), or "webhook"
    /// (docs/endpoints.md has the calls).
    pub kind: Kind,
    /// Address at which clients ask the gateway, such as "http://gateway:4000"; the proof asks there.
    pub url: String,
    /// File with the gateway's API key, as a client has one; empty: none.
    pub api_key_file: PathBuf,
    /// The file to write; the gateway includes it, or something applies it.
    pub file: PathBuf,
    /// Address that is posted to after the file changed, and the webhook's own address; empty: nothing is told.
    pub hook: String,
    /// Time within which the gateway has to follow, in seconds, 1 or more.
    pub settle_seconds: u64,
    /// Name of the InferencePool (llm_d).
    pub pool: String,
}

/// How a gateway is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    Litellm,
    Tensorzero,
    LlmD,
    Webhook,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            kind: Kind::Litellm,
            url: String::new(),
            api_key_file: PathBuf::new(),
            file: PathBuf::new(),
            hook: String::new(),
            settle_seconds: 60,
            pool: String::new(),
        }
    }
}

impl Settings {
    /// Checks the values; the message names the key and the remedy.
    pub fn validate(&self) -> Result<(), String> {
        let address = |key: &str, url: &str| match url::Url::parse(url) {
            Ok(parsed) if matches!(parsed.scheme(), "http" | "https") => Ok(()),
            _ => Err(format!("{key} = {url:?}: set it to an address that begins with http:// or https://")),
        };
        address("url", &self.url)?;
        if !self.hook.is_empty() || self.kind == Kind::Webhook {
            address("hook", &self.hook)?;
        }
        if self.kind != Kind::Webhook && !self.file.is_absolute() {
            return Err(format!("file = {:?}: set it to the absolute path of the file to write", self.file.display()));
        }
        if self.kind == Kind::LlmD && self.pool.is_empty() {
            return Err("pool is empty: name the InferencePool".into());
        }
        match self.settle_seconds {
            0 => Err("settle_seconds = 0: set it to 1 or more".into()),
            _ => Ok(()),
        }
    }
}

/// The gateway of one endpoint.
pub struct Gateway {
    kind: Kind,
    file: PathBuf,
    hook: Option<Http>,
    front: Front,
    route: Route,
    settle: Duration,
    /// What the servers want before an adapter's name: SGLang answers a bare one as the base.
    prefix: String,
    base_model: String,
}

/// The gateway as its clients ask it: nothing but what OpenAI's interface has.
struct Front(Http);

impl Gateway {
    pub(super) fn new(settings: &Endpoint) -> Result<Gateway, EndpointError> {
        let gateway = &settings.gateway;
        let key = secret::read("endpoint.gateway.api_key", Some(&gateway.api_key_file))?;
        let one = |url: &String| -> Result<Http, EndpointError> {
            Ok(Http::with_key(settings, std::slice::from_ref(url), key.clone())?.remove(0))
        };
        let hook = match gateway.hook.is_empty() {
            true => None,
            false => Some(one(&gateway.hook)?),
        };
        let route = Route {
            stable_name: settings.stable_name.clone(),
            urls: settings.urls.clone(),
            pool: gateway.pool.clone(),
        };
        let (kind, file, settle) = (gateway.kind, gateway.file.clone(), Duration::from_secs(gateway.settle_seconds));
        let prefix = match settings.kind {
            Server::Sglang => format!("{}:", settings.base_model),
            _ => String::new(),
        };
        let (front, base_model) = (Front(one(&gateway.url)?), settings.base_model.clone());
        Ok(Gateway { kind, file, hook, front, route, settle, prefix, base_model })
    }

    /// Returns the name by which the servers behind the gateway are asked for a version.
    fn asked(&self, name: &str) -> String {
        if name == self.base_model { name.to_owned() } else { format!("{}{name}", self.prefix) }
    }

    /// Returns our name of what the servers are asked for; one without their prefix was told before there was one.
    fn ours(&self, asked: &str) -> String {
        asked.strip_prefix(&self.prefix).unwrap_or(asked).to_owned()
    }

    /// Returns the gateway as clients ask it.
    pub(super) fn front(&self) -> &dyn Answers {
        &self.front
    }

    /// Returns the time within which it has to follow.
    pub(super) fn settle(&self) -> Duration {
        self.settle
    }

    /// Returns the unique name that the stable name leads to; `None` where nothing was told to the gateway yet.
    pub(super) async fn target(&self) -> Result<Option<String>, EndpointError> {
        if let (Kind::Webhook, Some(hook)) = (self.kind, &self.hook) {
            let what = "the webhook's GET";
            let answer = hook.json(Method::GET, "", None, what).await?;
            return match answer.get("target") {
                Some(target) if target.is_null() => Ok(None),
                Some(target) if target.is_string() => Ok(target.as_str().map(|told| self.ours(told))),
                _ => Err(hook.unexpected(what, "target")),
            };
        }
        match std::fs::read_to_string(&self.file) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.broken(error.to_string())),
            Ok(text) => match formats::read(self.kind, &text) {
                Some(target) => Ok(Some(self.ours(&target))),
                None => Err(self.broken("taod did not write it: move it away, or give taod a file of its own".into())),
            },
        }
    }

    /// Points the stable name at `target` if it points at `expected` (`None`: if it points nowhere). Safe to repeat.
    pub(super) async fn point(&self, expected: Option<&str>, target: &str) -> Result<(), EndpointError> {
        let current = self.target().await?;
        if current.as_deref() != Some(target) && current.as_deref() != expected {
            return Err(EndpointError::AliasMoved {
                url: self.front.0.url().to_owned(),
                name: self.route.stable_name.clone(),
                current: current.unwrap_or_else(|| "nothing".into()),
                expected: expected.unwrap_or("nothing").to_owned(),
            });
        }
        // Told again also where the file is right already: a kill may have come between the two.
        self.write(target, None)?;
        self.tell(expected, target, None).await
    }

    /// Returns true where this gateway can give a version a part of the requests.
    pub fn has_weights(&self) -> bool {
        self.kind != Kind::Tensorzero
    }

    /// Returns true where a file of taod's tells it, which can be read again.
    pub fn has_file(&self) -> bool {
        self.kind != Kind::Webhook
    }

    /// Makes the file say that the stable name leads to `target` but for a canary's part; returns false where it does.
    pub(super) async fn share(&self, target: &str, canary: Option<&Canary>) -> Result<bool, EndpointError> {
        if self.kind != Kind::Webhook && !self.write(target, canary)? {
            return Ok(false);
        }
        self.tell(Some(target), target, canary).await.map(|()| true)
    }

    /// Writes the file where it says something else; returns whether it did.
    fn write(&self, target: &str, canary: Option<&Canary>) -> Result<bool, EndpointError> {
        if self.kind == Kind::Webhook {
            return Ok(false);
        }
        let canary = canary.map(|canary| Canary { name: self.asked(&canary.name), percent: canary.percent });
        let text = formats::write(self.kind, &self.route, &self.asked(target), canary.as_ref());
        if std::fs::read_to_string(&self.file).is_ok_and(|there| there == text) {
            return Ok(false);
        }
        durable::write(&self.file, text.as_bytes()).map_err(|e| self.broken(e.to_string()))?;
        Ok(true)
    }

    async fn tell(&self, expected: Option<&str>, target: &str, canary: Option<&Canary>) -> Result<(), EndpointError> {
        let Some(hook) = &self.hook else { return Ok(()) };
        let what = format!("the webhook's move of '{}' to '{target}'", self.route.stable_name);
        // As the servers are asked for them, like in a file.
        let part = canary.map(|canary| json!({"target": self.asked(&canary.name), "percent": canary.percent}));
        let (expected, target) = (expected.map(|name| self.asked(name)), self.asked(target));
        let body = json!({
            "event": "alias", "name": self.route.stable_name, "expected": expected, "target": target, "canary": part,
        });
        let raw = hook.call(Method::POST, "", Some(&body), &what).await?;
        if raw.is_success() { Ok(()) } else { Err(hook.refused(&raw, &what)) }
    }

    fn broken(&self, reason: String) -> EndpointError {
        EndpointError::Gateway { file: self.file.display().to_string(), reason }
    }
}

#[async_trait]
impl Answers for Front {
    fn url(&self) -> &str {
        self.0.url()
    }

    async fn ask(&self, question: &Question<'_>) -> Result<Reply, EndpointError> {
        self.0.chat(question, json!({})).await
    }
}
