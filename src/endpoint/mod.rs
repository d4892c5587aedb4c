//! The production endpoint: how adapters get into it, how it is proven which one answers, and how clients follow.
//!
//! [`server`] is what every server can do, with a driver for each kind in a file of its own; [`fleet`] is all replicas of
//! one endpoint and the name that clients use; [`proof`] tells by likelihood which model answered; [`promote`] puts them
//! in the one order that a crash cannot break.

pub mod compat;
mod directory;
pub mod fleet;
pub mod gateway;
mod hook;
mod http;
pub mod inspect;
mod llamacpp;
mod mistralrs;
mod paths;
pub mod promote;
pub mod proof;
pub mod publish;
pub mod server;
mod sglang;
pub mod vllm;
pub mod watch;

use std::collections::BTreeMap;

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::durable::FileError;
use crate::registry::RegistryError;
use crate::secret::SecretError;
use paths::PathMap;

/// What an operator sets of the production endpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// What runs there: "serve" (taod's own), "vllm", "sglang", "mistralrs", "llamacpp", "directory" (a server that reads a
    /// folder: NIM, vLLM's resolver, KServe, GIE's sidecar) or "webhook" (something of yours loads what it is told).
    pub kind: Kind,
    /// Addresses of the servers themselves, one for each replica (never a load balancer's), such as
    /// "http://10.0.0.5:8000".
    pub urls: Vec<String>,
    /// Name under which the servers serve the base model.
    pub base_model: String,
    /// Name that clients ask for and that follows each promotion.
    pub stable_name: String,
    /// Highest rank of an adapter that the servers take (vLLM's --max-lora-rank); 0: not known, so not checked.
    pub max_lora_rank: u64,
    /// How clients come to the promoted version: "native" (taod serve: a compare-and-set alias), "gateway" (taod moves
    /// the alias of a gateway before the servers), "inplace" (the stable name is loaded again from the new folder;
    /// vLLM then reads that folder at every request, so it must never be deleted), "reload" (the stable name is
    /// unloaded and loaded: for a moment it is not there), or "clients" (they read the name from /api/v1/current;
    /// until they do, they ask the old version). docs/endpoints.md has what each costs.
    pub alias: Alias,
    /// Where the servers see another path than taod: the beginning of ours = the beginning of theirs.
    pub path_map: BTreeMap<String, String>,
    /// Time that a version stays loaded after clients were led away from it, in seconds. A rollback within it is
    /// faster, and with "clients" they need it.
    pub retire_after_seconds: u64,
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
    /// Address that is posted to when an adapter is to be loaded or unloaded (webhook; llamacpp: something that restarts
    /// the server; directory: if anything has to be told); empty: nothing is told.
    pub hook: String,
    /// Address of this daemon's page as the hook reaches it, such as `https://taod.example.com:9464`, where servers on another host
    /// share no folder with taod (webhook, directory): the hook is told where to fetch each file of an adapter, and its hash. It
    /// needs a token of the role "read". Empty: the hook is told the path alone.
    pub pull_url: String,
    /// How it is proven which model answers.
    pub proof: proof::Settings,
    /// The gateway, where `alias` is "gateway".
    pub gateway: gateway::Settings,
    /// What taod puts where servers look, where `kind` is "directory" or "llamacpp".
    pub publish: publish::Settings,
    /// The watch over what clients get from a promoted version.
    pub watch: watch::Settings,
}

/// What runs at the endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    Serve,
    Vllm,
    Sglang,
    Mistralrs,
    Llamacpp,
    Directory,
    Webhook,
}

impl Kind {
    /// Returns the server's name for people.
    fn as_str(self) -> &'static str {
        match self {
            Kind::Serve => "taod serve",
            Kind::Vllm => "vLLM",
            Kind::Sglang => "SGLang",
            Kind::Mistralrs => "mistral.rs",
            Kind::Llamacpp => "llama.cpp",
            Kind::Directory | Kind::Webhook => "the server",
        }
    }

    /// Returns the fields of adapter_config.json that the server ignores, so that it would serve something else.
    fn ignored_fields(self) -> &'static [&'static str] {
        match self {
            Kind::Sglang => &["use_rslora", "rank_pattern", "alpha_pattern"],
            // What llama.cpp ignores is written into the matrices of its file.
            Kind::Serve | Kind::Vllm | Kind::Mistralrs | Kind::Llamacpp | Kind::Directory | Kind::Webhook => &[],
        }
    }

    /// Returns how far its log-probs may be from ours, in nats a token on average.
    fn tolerance(self) -> f64 {
        match self {
            Kind::Serve | Kind::Mistralrs => 0.01,
            Kind::Vllm | Kind::Sglang | Kind::Directory | Kind::Webhook => 0.03,
            // It rounds activations to 8 bits where its weights are quantised.
            Kind::Llamacpp => 0.1,
        }
    }

    /// Returns the ways by which the stable name can follow on such servers, or before them.
    fn aliases(self) -> &'static [Alias] {
        match self {
            Kind::Serve => &[Alias::Native, Alias::Gateway, Alias::Inplace, Alias::Reload, Alias::Clients],
            Kind::Vllm | Kind::Mistralrs => &[Alias::Gateway, Alias::Inplace, Alias::Reload, Alias::Clients],
            Kind::Sglang => &[Alias::Gateway, Alias::Reload, Alias::Clients],
            Kind::Llamacpp => &[Alias::Native],
            Kind::Directory | Kind::Webhook => &[Alias::Gateway, Alias::Clients],
        }
    }
}

/// How the stable name follows a promotion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Alias {
    Native,
    Gateway,
    Inplace,
    Reload,
    Clients,
}

impl Alias {
    /// Returns the config's word for it.
    fn as_str(self) -> &'static str {
        match self {
            Alias::Native => "native",
            Alias::Gateway => "gateway",
            Alias::Inplace => "inplace",
            Alias::Reload => "reload",
            Alias::Clients => "clients",
        }
    }

    /// Returns true where the stable name is an adapter's own, loaded from its folder.
    fn is_loaded(self) -> bool {
        matches!(self, Alias::Inplace | Alias::Reload)
    }
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            kind: Kind::Serve,
            urls: vec!["http://127.0.0.1:8000".into()],
            base_model: "base".into(),
            stable_name: "production".into(),
            max_lora_rank: 0,
            alias: Alias::Native,
            path_map: BTreeMap::new(),
            retire_after_seconds: 600,
            api_key_file: PathBuf::new(),
            connect_timeout_seconds: 5,
            request_timeout_seconds: 120,
            load_timeout_seconds: 300,
            retries: 3,
            hook: String::new(),
            pull_url: String::new(),
            proof: proof::Settings::default(),
            gateway: gateway::Settings::default(),
            publish: publish::Settings::default(),
            watch: watch::Settings::default(),
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
        if !self.kind.aliases().contains(&self.alias) {
            let ways: Vec<String> = self.kind.aliases().iter().map(|way| format!("{:?}", way.as_str())).collect();
            let (server, alias) = (self.kind.as_str(), self.alias.as_str());
            return Err(format!("alias = {alias:?} is nothing that {server} has; choose {}", ways.join(" or ")));
        }
        if matches!(self.kind, Kind::Directory | Kind::Llamacpp) {
            self.publish.validate().map_err(|message| format!("publish.{message}"))?;
        }
        if self.kind == Kind::Webhook && self.hook.is_empty() {
            return Err("hook is empty: name the address that loads what it is told".into());
        }
        self.validate_pull()?;
        if self.alias == Alias::Gateway {
            self.gateway.validate().map_err(|message| format!("gateway.{message}"))?;
        }
        PathMap::validate(&self.path_map)?;
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
        self.watch.validate().map_err(|message| format!("watch.{message}"))?;
        self.proof.validate().map_err(|message| format!("proof.{message}"))
    }

    /// Checks that somebody is told where files can be fetched, and can make use of it.
    fn validate_pull(&self) -> Result<(), String> {
        let url = &self.pull_url;
        if url.is_empty() {
            return Ok(());
        }
        if !matches!(url::Url::parse(url), Ok(parsed) if matches!(parsed.scheme(), "http" | "https")) {
            return Err(format!("pull_url = {url:?}: give an address that begins with http:// or https://"));
        }
        if !matches!(self.kind, Kind::Webhook | Kind::Directory) {
            let server = self.kind.as_str();
            return Err(format!(
                "pull_url = {url:?}: {server} fetches nothing; set kind = \"webhook\", or leave pull_url empty"
            ));
        }
        match self.hook.is_empty() {
            true => {
                Err(format!("pull_url = {url:?} is told to the hook, and hook is empty: name the address that fetches"))
            }
            false => Ok(()),
        }
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
    #[error(
        "the name '{name}' at endpoint {url} leads to {found}, which this registry never made: another daemon has the same \
         endpoint.stable_name; give one of them another name, or take this one over by `taod adapters settle --take-over`"
    )]
    Stranger { url: String, name: String, found: String },
    #[error(
        "endpoint {url} has no aliases of its own; set endpoint.alias to \"gateway\", \"inplace\", \"reload\" or \"clients\""
    )]
    NoAliases { url: String },
    #[error(
        "endpoint {url} does not have '{name}' {seconds} s after {path} was there for it; look at its log, restart it, or raise \
         endpoint.load_timeout_seconds"
    )]
    NotFollowed { url: String, name: String, path: String, seconds: u64 },
    #[error(
        "a canary needs endpoint.alias = \"gateway\" and a gateway with weights (litellm, llm_d, webhook), so that a part of \
         the requests can go to it"
    )]
    NoWeights,
    #[error("an adapter cannot be published: {0}")]
    Publish(FileError),
    #[error("the gateway's file {file} cannot be used: {reason}")]
    Gateway { file: String, reason: String },
    #[error(transparent)]
    Version(#[from] Box<RegistryError>),
    #[error(transparent)]
    Key(#[from] SecretError),
    #[error("no HTTP client can be made: {0}")]
    Client(String),
    #[error("the log-probs that the proof needs cannot be computed here: {0}")]
    Likelihood(String),
}

#[cfg(test)]
mod driver_tests;

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
            (Settings { kind: Kind::Vllm, ..base.clone() }, "nothing that vLLM has"),
            (Settings { kind: Kind::Sglang, alias: Alias::Inplace, ..base.clone() }, "nothing that SGLang has"),
            (Settings { kind: Kind::Llamacpp, ..base.clone() }, "publish.folder"),
            (Settings { kind: Kind::Webhook, alias: Alias::Clients, ..base.clone() }, "hook is empty"),
            (Settings { pull_url: "http://a".into(), ..base.clone() }, "fetches nothing"),
            (Settings { pull_url: "taod:9464".into(), ..base.clone() }, "begins with http://"),
            (Settings { alias: Alias::Gateway, ..base.clone() }, "gateway.url"),
            (Settings { path_map: [("a".into(), "/b".into())].into(), ..base.clone() }, "path_map"),
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
