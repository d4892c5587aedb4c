//! What an operator sets: the stages' own settings, each under its section, and where each value came from.
//!
//! Three layers, the later one wins: the defaults of the types, one TOML file, and environment variables
//! `TAOD__SECTION__KEY`. The types are the only definition. From their JSON Schema come the check of a file (unknown keys
//! with a suggestion, wrong types with their path), `config/default.toml` with the doc of every key, and `taod config
//! explain`; so the three cannot disagree. No stage ever sees the whole: each takes its own `Settings` by argument.
//!
//! Left out on purpose: includes, profiles, and a search for files in several places. One file is what one can read.

mod keys;
mod layers;
mod render;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::engine::{Hold, Precision};
use crate::table::{TableError, TableLocation, Tables};

pub use keys::Key;
pub use layers::{Layers, Origin};

/// Declares [`Config`]: one field for each section. This is the only list of sections.
macro_rules! sections {
    (
        $($(#[doc = $doc:literal])+ $section:ident: $settings:ty,)*
        // Lists of tables (`[[name]]`), which the section that reads them checks.
        lists { $($(#[doc = $list_doc:literal])+ $list:ident: $item:ty,)* }
    ) => {
        /// Everything an operator can set. A section is the `Settings` of the stage that reads it.
        #[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
        #[serde(deny_unknown_fields, default)]
        pub struct Config {
            $($(#[doc = $doc])+ pub $section: $settings,)*
            $($(#[doc = $list_doc])+ pub $list: Vec<$item>,)*
        }

        impl Config {
            /// Lets every section check its own values; returns what is wrong, with the full key.
            fn problems(&self) -> Vec<String> {
                let mut problems = Vec::new();
                $(if let Err(problem) = self.$section.validate() {
                    problems.push(format!("{}.{problem}", stringify!($section)));
                })*
                problems.extend(self.across());
                // Matchers and rules: what they hold is known when they are made ready.
                problems.extend(crate::rewards::Workloads::compile(&self.workload).err().map(|error| error.to_string()));
                problems.extend(crate::notify::problems(&self.notifications));
                problems
            }
        }
    };
}

impl Config {
    /// Returns what no section can see by itself.
    fn across(&self) -> Vec<String> {
        self.samples_for_method()
            .into_iter()
            .chain(self.independence())
            .chain(self.name_beside_another())
            .chain(self.one_precision())
            .collect()
    }

    /// Versions of two daemons must not share a name at the servers: one would unload what the other serves.
    fn name_beside_another(&self) -> Option<String> {
        let same =
            !self.state.stores_log() && self.registry.name_prefix == crate::registry::Settings::default().name_prefix;
        same.then(|| {
            "registry.name_prefix is the default, but state.log says that another daemon is beside this one: give versions a \
             beginning of their own, such as the workload's name"
                .into()
        })
    }

    /// Rounded weights are the processor's.
    fn one_precision(&self) -> Option<String> {
        let rounded = |precision| matches!(precision, Precision::Int16 | Precision::Int8);
        let asked = [("candidates", self.candidates.precision), ("tuning", self.tuning.precision)];
        let (section, _) = asked.into_iter().find(|(_, precision)| !self.engine.is_cpu() && rounded(*precision))?;
        Some(format!(
            "{section}.precision rounds weights for the processor, but engine.device is {}, whose precision is engine.dtype: set \
             {section}.precision to auto",
            self.engine.device
        ))
    }

    /// The gate's score must hold something that training did not optimise.
    fn independence(&self) -> Option<String> {
        self.rewards.dependent(&|name| self.rewards.made_from(name)).map(|problem| format!("rewards.{problem}"))
    }

    fn samples_for_method(&self) -> Option<String> {
        let method = self.tuning.method;
        let other = self.candidates.off_policy().filter(|_| method.needs_plain_samples())?;
        Some(format!(
            "tuning.method is {method}, which needs samples of the policy as it is, but {other}: set temperature, top_p and \
             repetition_penalty to 1, top_k and min_p to 0, leave strategies, follow_json_rules and int8 alone, or set the method \
             to raft, rest or dpo"
        ))
    }
}

sections! {
    /// Where taod keeps what it makes.
    state: StateSettings,
    /// The base model that is sampled, tuned and served.
    model: ModelSettings,
    /// Where rounds compute.
    engine: crate::engine::Settings,
    /// What decides the random draws of a round, and what it may cost.
    round: RoundSettings,
    /// The query log and how it is stored.
    ingest: crate::ingest::Settings,
    /// Compaction, vacuum and checkpoints of the tables.
    maintenance: crate::table::maintain::Settings,
    /// How logged prompts become training, gate and audit prompts.
    dataset: crate::dataset::Settings,
    /// How candidates for training are drawn.
    candidates: crate::candidates::Settings,
    /// How the endpoint answers its clients; both sides of the gate answer the same way.
    decoding: crate::candidates::Decoding,
    /// How answers are scored.
    rewards: crate::rewards::Settings,
    /// How an adapter is trained.
    tuning: crate::adapter::Settings,
    /// How challengers are judged.
    gate: crate::gate::Settings,
    /// What people's labels must show.
    audit: crate::audit::Settings,
    /// What may become served.
    registry: crate::registry::Settings,
    /// The production endpoint.
    endpoint: crate::endpoint::Settings,
    /// The embedded endpoint (`taod serve`).
    serve: crate::serve::Settings,
    /// When rounds run.
    schedule: crate::schedule::Settings,
    /// The page for people and monitors: metrics, health, status.
    admin: crate::admin::Settings,
    /// Traces of rounds and scores of calls, for a collector of OpenTelemetry.
    telemetry: crate::telemetry::Settings,
    lists {
        /// A kind of traffic: its house rules and what a good answer looks like.
        workload: crate::rewards::Workload,
        /// Who is told what the daemon did: a webhook, or a program of your own.
        notifications: crate::notify::Destination,
    }
}

/// Where taod keeps its own files.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct StateSettings {
    /// Folder of the tables, the rounds, the registry and the intents. A relative path starts at the working directory.
    pub dir: PathBuf,
    /// Where the tables are: a folder, or the URL of an object store such as `s3://bucket/folder`, `az://container/folder`,
    /// `abfss://container@account.dfs.core.windows.net/folder` or `gs://bucket/folder`. Empty: the folder `tables` in
    /// `dir`. Credentials come from the environment variables of the cloud.
    pub tables: String,
    /// Where another daemon keeps the log (its `state.tables`, or the folder `tables` in its `state.dir`), for a daemon of one
    /// workload or tenant beside it: that log is read, and ingestion, maintenance and erasure of it are left to the other.
    /// Empty: this daemon stores the log itself, in `tables`.
    pub log: String,
    /// Options of the object store by their names in object_store, such as `region`, `endpoint` or `allow_http`; no secrets.
    pub store_options: BTreeMap<String, String>,
}

impl Default for StateSettings {
    fn default() -> Self {
        StateSettings {
            dir: PathBuf::from("var"),
            tables: String::new(),
            log: String::new(),
            store_options: BTreeMap::new(),
        }
    }
}

impl StateSettings {
    /// Checks that there is a folder at all, and what can be told of the tables' place without asking there.
    pub fn validate(&self) -> Result<(), String> {
        if self.dir.as_os_str().is_empty() {
            return Err("dir is empty; name the folder for taod's files, such as \"/var/lib/taod\"".into());
        }
        TableLocation::check(&self.place(), &self.store_options).map_err(|e| format!("tables: {e}"))?;
        if self.stores_log() {
            return Ok(());
        }
        if self.log.trim_end_matches('/') == self.place().trim_end_matches('/') {
            return Err(format!(
                "log = {:?} is this daemon's own tables: leave it empty, or name the other's",
                self.log
            ));
        }
        TableLocation::check(&self.log, &self.store_options).map_err(|e| format!("log: {e}"))
    }

    /// Returns true where this daemon stores the log itself.
    pub fn stores_log(&self) -> bool {
        self.log.is_empty()
    }

    /// Returns the tables. This is the one place where a config becomes their location; a state folder of a newer taod is
    /// refused here.
    pub fn open_tables(&self) -> Result<Tables, TableError> {
        crate::layout::check(&self.dir)?;
        let tables = Tables::at(TableLocation::parse(&self.place(), &self.store_options)?);
        match self.stores_log() {
            true => Ok(tables),
            false => Ok(tables.with_log_of_another(TableLocation::parse(&self.log, &self.store_options)?)),
        }
    }

    fn place(&self) -> String {
        match self.tables.is_empty() {
            true => self.dir.join("tables").to_string_lossy().into_owned(),
            false => self.tables.clone(),
        }
    }
}

/// The base model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ModelSettings {
    /// A folder in Hugging Face layout, a .gguf file, or a hub id with an optional revision ("org/name@revision").
    pub path: String,
    /// How its large matrices are held in memory. The numbers are the same.
    pub hold: Hold,
}

impl Default for ModelSettings {
    fn default() -> Self {
        ModelSettings { path: "HuggingFaceTB/SmolLM2-135M-Instruct".into(), hold: Hold::F32 }
    }
}

impl ModelSettings {
    /// Checks that a model is named.
    pub fn validate(&self) -> Result<(), String> {
        match self.path.is_empty() {
            true => Err("path is empty; name a model folder, a .gguf file or a hub id".into()),
            false => Ok(()),
        }
    }
}

/// What decides the random draws of a round, and what it may cost.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RoundSettings {
    /// Root of every seed: sampling, training order, the gate's order. Another seed gives other draws, not another method.
    pub seed: u64,
    /// Hours that sampling and training may take together in one round, counted over its interruptions; 0: any. Sampling gets
    /// half of what is left when it begins. What is done by then is judged like any other adapter; the trial is not counted.
    pub max_hours: f64,
    /// Tokens that may be sampled and trained on together in one round, likewise; 0: any.
    pub max_tokens: u64,
    /// Seconds without a finished piece of work after which a round's process is taken to hang and is ended; the next start
    /// resumes the round. It must be longer than the longest piece, and scoring by a slow judge is one. 0: never.
    pub stall_seconds: u64,
}

impl Default for RoundSettings {
    fn default() -> Self {
        RoundSettings { seed: 0, max_hours: 0.0, max_tokens: 0, stall_seconds: 21_600 }
    }
}

impl RoundSettings {
    /// Checks the limits; the message names the key and the remedy.
    pub fn validate(&self) -> Result<(), String> {
        if !(self.max_hours >= 0.0 && self.max_hours.is_finite()) {
            return Err(format!("max_hours = {}: give 0 for any time, or a number above it", self.max_hours));
        }
        Ok(())
    }
}

/// A config that cannot be used. Every problem stands on a line of its own and names the key, the value and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read the config {path}: {source}")]
    Read { path: String, source: std::io::Error },
    #[error("{file}, line {line}: {message}")]
    Syntax { file: String, line: usize, message: String },
    #[error("{}", .0.join("\n"))]
    Problems(Vec<String>),
}

/// A value of type `T` that is made of layers, and which layer each key came from.
#[derive(Debug, Clone)]
pub struct Loaded<T = Config> {
    /// What will be used.
    pub config: T,
    layers: Layers,
}

impl Loaded<Config> {
    /// Reads the config: defaults, then `file` where one is given, then the environment of this process.
    pub fn read(file: Option<&Path>) -> Result<Self, ConfigError> {
        let text = match file {
            Some(path) => {
                let shown = path.display().to_string();
                let text = std::fs::read_to_string(path)
                    .map_err(|source| ConfigError::Read { path: shown.clone(), source })?;
                Some((shown, text))
            }
            None => None,
        };
        let environment = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.to_string_lossy().into_owned())));
        Self::from_layers(text, environment.collect())
    }

    /// Makes a config of the text of a file with its name and of environment variables. Pure.
    pub fn from_layers(
        file: Option<(String, String)>,
        environment: Vec<(String, String)>,
    ) -> Result<Self, ConfigError> {
        let loaded = Loaded::<Config>::merge(file, environment)?;
        match loaded.config.problems() {
            problems if problems.is_empty() => Ok(loaded),
            problems => Err(ConfigError::Problems(problems.into_iter().map(|p| loaded.layers.blame(p)).collect())),
        }
    }
}

impl<T: Serialize + for<'de> Deserialize<'de> + JsonSchema + Default> Loaded<T> {
    /// Lays the layers over each other and checks the shape of the result, but not the sections' own rules.
    fn merge(file: Option<(String, String)>, environment: Vec<(String, String)>) -> Result<Self, ConfigError> {
        let schema = keys::schema::<T>();
        let layers = Layers::merge::<T>(&schema, file, environment)?;
        // The check of the shape has said all it can with a key; what is left is said by the type itself.
        let config = serde_json::from_value(layers.value.clone())
            .map_err(|e| ConfigError::Problems(vec![format!("the config does not fit its types: {e}")]))?;
        Ok(Loaded { config, layers })
    }

    /// Returns the whole config as TOML, with a comment on each value that is not a default.
    pub fn show(&self) -> String {
        render::effective(&keys::schema::<T>(), &self.layers)
    }

    /// Returns the config as JSON. There is no secret in it: a config holds only the names of secrets' files.
    pub fn to_json(&self) -> &serde_json::Value {
        &self.layers.value
    }

    /// Returns what there is to know about one key (`schedule.cron`) or all keys of a section (`schedule`).
    pub fn explain(&self, key: &str) -> Result<Vec<Key>, ConfigError> {
        let schema = keys::schema::<T>();
        let found = keys::explain(&schema, key);
        match found.is_empty() {
            true => Err(ConfigError::Problems(vec![keys::unknown(&schema, key)])),
            false => Ok(found.into_iter().map(|key| self.layers.complete(key)).collect()),
        }
    }
}

impl Config {
    /// Returns the text of `config/default.toml`: every key at its default, with its doc.
    pub fn default_toml() -> String {
        render::defaults::<Config>()
    }

    /// Returns the SHA-256 of the config's canonical JSON, in lower-case hex: what a row or a manifest records of it.
    pub fn hash(&self) -> String {
        // A config has string keys and finite numbers only, so neither step can fail; no text is a hash of nothing.
        let json = serde_json::to_value(self).unwrap_or_default();
        let canonical = serde_json_canonicalizer::to_vec(&json).unwrap_or_default();
        hex::encode(Sha256::digest(canonical))
    }
}
