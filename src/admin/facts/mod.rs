//! What the page and the API tell: documents made of what the stages left on disk, in the tables and in the metrics.
//!
//! Each file here is one subject: its document, which is what the API answers and what a template shows, and how it is read.
//! Reading is done by the modules that own the files and tables; nothing is parsed here. Documents carry no text of the log but
//! those of [`prompts`], which a route hands out only to a role.

pub(super) mod adapters;
pub(super) mod config;
pub(super) mod dead_letters;
pub(super) mod decisions;
pub(super) mod now;
pub(super) mod prompts;
pub(super) mod rounds;
pub(super) mod trials;

use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use tokio::sync::{Mutex, Semaphore, SemaphorePermit};

use crate::config::Config;
use crate::gate::StepRow;
use crate::health::Health;
use crate::metrics::Metrics;
use crate::registry::Registry;
use crate::round::Paths;
use crate::table::Tables;

/// Table reads at a time; further ones wait. Each may hold some hundred MiB.
const READS: usize = 2;

/// Everything that the documents are made of.
pub struct Facts {
    config: RwLock<Arc<Config>>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) health: Arc<Health>,
    paths: Paths,
    tables: Tables,
    reads: Semaphore,
    /// Rows of `queries` and when they were counted: a page that refreshes need not count them each time.
    rows: Mutex<Option<(Instant, u64)>>,
    /// The newest version of `gate_steps` that was read, with its rows.
    gate_steps: Mutex<Option<(u64, Arc<Vec<StepRow>>)>>,
}

/// For how long a count of rows is good enough.
const COUNT_FRESH: Duration = Duration::from_secs(20);

impl Facts {
    /// Looks where `config` says that things are.
    pub fn new(
        config: Arc<Config>,
        metrics: Arc<Metrics>,
        health: Arc<Health>,
    ) -> Result<Self, crate::table::TableError> {
        let paths = Paths::new(&config.state.dir);
        let tables = config.state.open_tables()?;
        let reads = Semaphore::new(READS);
        Ok(Facts {
            config: RwLock::new(config),
            metrics,
            health,
            paths,
            tables,
            reads,
            rows: Mutex::default(),
            gate_steps: Mutex::default(),
        })
    }

    /// Tells of another config from now on. What is built on it, the tables' place and the folders, does not change.
    pub fn reconfigure(&self, config: Arc<Config>) {
        *self.config.write().unwrap_or_else(PoisonError::into_inner) = config;
    }

    fn config_now(&self) -> Arc<Config> {
        self.config.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn registry(&self) -> Result<Registry, FactError> {
        Registry::open(&self.paths.registry(), &self.config_now().registry).map_err(FactError::failed)
    }

    /// Waits for the right to read tables.
    async fn reading(&self) -> Result<SemaphorePermit<'_>, FactError> {
        self.reads.acquire().await.map_err(FactError::failed)
    }
}

/// Why there is no document.
#[derive(Debug, thiserror::Error)]
pub(super) enum FactError {
    #[error("{0}")]
    Missing(String),
    #[error("{0}")]
    Failed(String),
}

impl FactError {
    fn failed(error: impl std::fmt::Display) -> Self {
        FactError::Failed(error.to_string())
    }

    pub(super) fn status(&self) -> StatusCode {
        match self {
            FactError::Missing(_) => StatusCode::NOT_FOUND,
            FactError::Failed(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

/// What every error of the API looks like.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct Problem {
    /// What went wrong and what to do, in words.
    pub(super) error: String,
}

impl IntoResponse for FactError {
    fn into_response(self) -> Response {
        if let FactError::Failed(error) = &self {
            tracing::warn!(error, "the page could not read something");
        }
        (self.status(), Json(Problem { error: self.to_string() })).into_response()
    }
}

/// How much of a list is wanted.
#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Many {
    /// The most items, 1 to 500.
    #[serde(default = "fifty", deserialize_with = "items")]
    #[schemars(range(min = 1, max = 500))]
    pub(super) limit: u16,
}

fn fifty() -> u16 {
    50
}

/// Reads a number of items; one that is out of range is refused, as the document says.
fn items<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u16, D::Error> {
    let limit = u16::deserialize(deserializer)?;
    match (1..=500).contains(&limit) {
        true => Ok(limit),
        false => Err(D::Error::custom(format!("limit is {limit}: give 1 to 500"))),
    }
}

impl Many {
    pub(super) fn limit(self) -> usize {
        usize::from(self.limit)
    }
}

/// Returns a time of the files, microseconds since the epoch.
fn time(us: i64) -> DateTime<Utc> {
    DateTime::from_timestamp_micros(us).unwrap_or_default()
}
