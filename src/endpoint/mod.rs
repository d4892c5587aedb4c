//! The production endpoint: how adapters get into it, how it is proven which one answers, and how clients follow.
//!
//! [`vllm`] speaks to one server (vLLM, or our own [`serve`](crate::serve), which has the same routes); [`proof`] tells
//! by likelihood which model answered; [`promote`] puts both in the one order that a crash cannot break.

pub mod promote;
pub mod proof;
pub mod vllm;

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::secret::SecretError;

/// What an operator sets of the production endpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// What runs there: "serve" (taod's own) or "vllm".
    pub kind: Kind,
    /// Addresses of the servers themselves, one for each replica (never a load balancer's), such as
    /// "http://10.0.0.5:8000".
    pub urls: Vec<String>,
    /// Name under which the servers serve the base model.
    pub base_model: String,
    /// Name that clients ask for and that follows each promotion.
    pub stable_name: String,
    /// How clients come to the promoted version: "native" (taod serve: a compare-and-set alias), "inplace" (vLLM: the
    /// stable name is loaded again from the new folder; vLLM then reads that folder at every request, so it must never
    /// be deleted), or "clients" (they read the name from /api/v1/current; until they do, they ask the old version).
    pub alias: Alias,
    /// File that holds the servers' API key; empty: none.
    pub api_key_file: PathBuf,
    /// Time to reach a server, in seconds, 1 or more.
    pub connect_timeout_seconds: u64,
    /// Time for one answer, in seconds, 1 or more.
    pub request_timeout_seconds: u64,
    /// Time to load one adapter, in seconds, 1 or more.
    pub load_timeout_seconds: u64,
    /// Further tries after a connection error or a busy answer (429, 503), 0 to 10. Other failures are final.
    pub retries: u32,
    /// How it is proven which model answers.
    pub proof: proof::Settings,
}

/// What runs at the endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    Serve,
    Vllm,
}

/// How the stable name follows a promotion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Alias {
    Native,
    Inplace,
    Clients,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            kind: Kind::Serve,
            urls: vec!["http://127.0.0.1:8000".into()],
            base_model: "base".into(),
            stable_name: "production".into(),
            alias: Alias::Native,
            api_key_file: PathBuf::new(),
            connect_timeout_seconds: 5,
            request_timeout_seconds: 120,
            load_timeout_seconds: 300,
            retries: 3,
            proof: proof::Settings::default(),
        }
    }
}

impl Settings {
    /// Checks the values; the message names the key and the remedy.
    pub fn validate(&self) -> Result<(), String> {
        if self.urls.is_empty() {
            return Err("urls is empty: name the address of at least one server".into());
        }
        for url in &self.urls {
            let parsed = url::Url::parse(url).map_err(|e| format!("urls holds {url:?}, which is no address: {e}"))?;
            if !matches!(parsed.scheme(), "http" | "https") {
                return Err(format!("urls holds {url:?}: begin it with http:// or https://"));
            }
        }
        if self.base_model.is_empty() || self.stable_name.is_empty() {
            return Err("base_model and stable_name must not be empty: name the served base and the stable name".into());
        }
        if self.base_model == self.stable_name {
            return Err(format!("stable_name = {:?} is the base model's name: choose another one", self.stable_name));
        }
        if self.kind == Kind::Vllm && self.alias == Alias::Native {
            return Err("alias = \"native\": vllm has no aliases; choose \"inplace\" or \"clients\"".into());
        }
        let seconds = [
            ("connect_timeout_seconds", self.connect_timeout_seconds),
            ("request_timeout_seconds", self.request_timeout_seconds),
            ("load_timeout_seconds", self.load_timeout_seconds),
        ];
        if let Some((key, _)) = seconds.iter().find(|(_, value)| *value == 0) {
            return Err(format!("{key} = 0: set it to 1 or more"));
        }
        if self.retries > 10 {
            return Err(format!("retries = {}: set it to at most 10", self.retries));
        }
        self.proof.validate().map_err(|message| format!("proof.{message}"))
    }
}

/// An endpoint that could not be reached, understood or believed. Every message is one line.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    #[error("endpoint {url} cannot be reached: {reason}; start the server or correct endpoint.urls")]
    Unreachable { url: String, reason: String },
    #[error("endpoint {url} did not answer {what} in time; look at its load or raise endpoint.*_timeout_seconds")]
    Silent { url: String, what: String },
    #[error("endpoint {url} answered {status} to {what}: {message}; the server's own log says more")]
    Status { url: String, what: String, status: u16, message: String },
    #[error(
        "endpoint {url} answered {what} with a web page (status {status}), not with JSON; \
         set endpoint.urls to the model server itself"
    )]
    WebPage { url: String, what: String, status: u16 },
    #[error("endpoint {url} answered {what} without {field}; is it an OpenAI-compatible server?")]
    Unexpected { url: String, what: String, field: &'static str },
    #[error(
        "endpoint {url} has no route for {what}; start vllm with --enable-lora and \
         VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 (taod serve: set serve.adapter_root)"
    )]
    NoRoute { url: String, what: String },
    #[error("endpoint {url} was told to load '{name}' from {path} but lists {found}; it cannot be promoted there")]
    ReadBack { url: String, name: String, path: String, found: String },
    #[error("the alias '{name}' at endpoint {url} points at {current}, not at {expected}: something else moved it")]
    AliasMoved { url: String, name: String, current: String, expected: String },
    #[error(transparent)]
    Key(#[from] SecretError),
    #[error("no HTTP client can be made: {0}")]
    Client(String),
    #[error("the log-probs that the proof needs cannot be computed here: {0}")]
    Likelihood(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_cannot_work_are_refused_by_key() {
        let base = Settings::default();
        assert_eq!(base.validate(), Ok(()));
        let cases = [
            (Settings { urls: vec![], ..base.clone() }, "urls is empty"),
            (Settings { urls: vec!["localhost:8000".into()], ..base.clone() }, "http://"),
            (Settings { kind: Kind::Vllm, ..base.clone() }, "vllm has no aliases"),
            (Settings { stable_name: "base".into(), ..base.clone() }, "stable_name"),
            (Settings { load_timeout_seconds: 0, ..base.clone() }, "load_timeout_seconds = 0"),
            (Settings { retries: 11, ..base.clone() }, "retries = 11"),
        ];
        for (settings, expected) in cases {
            let message = settings.validate().unwrap_err();
            assert!(message.contains(expected), "{message}");
        }
    }
}
