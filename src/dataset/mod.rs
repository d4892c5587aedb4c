//! Datasets: which prompts a round trains on, which ones the gate may spend, and which ones are kept for the audit.
//!
//! A dataset is a pure function of the table versions it reads, its settings and its seed. Rows that must not train are
//! counted out with a reason; exact and near duplicates fall together; every prompt belongs to a cluster, and the
//! cluster's hash decides its split once and for all (table `splits`). [`mod@freeze`] reads the tables batch by batch and
//! writes the result into the round's folder, the manifest last; from then on nothing reads the log again.
//!
//! A night reads the light columns of all rows, and the text of new prompts and of chosen ones only. What new prompts are
//! compared with is an index in files, a fold over `splits`, so that placing costs what is new.
//!
//! Training code takes a [`TrainSplit`], which cannot hold a gate or audit prompt: only this module makes one, from the
//! decisions above or from files whose hashes stand in the manifest.
//!
//! ```compile_fail
//! // There is no way to a split but through a dataset.
//! let forged = taod::dataset::TrainSplit::new(Vec::new());
//! ```
//!
//! Reading order: [`Settings`], `text` (what of a prompt is compared), `sketch` (how), `index` (with what), `place` (who
//! belongs to whom), `census` (what becomes of rows), `burst` and `secrets` (what must not train), `workload` (which kind of traffic),
//! `catalogue` (what stands in memory), `select`, `draw` and `history` (which prompts a round gets), `feedback` (what was
//! said of an answer), `population` (whether traffic changed), `manifest` (files), `explain` (in words), `read` and `freeze`
//! (tables), [`synthetic`] (prompts that are made where there are too few).

mod burst;
mod catalogue;
mod census;
mod columns;
mod draw;
mod explain;
mod feedback;
mod freeze;
mod history;
mod index;
mod manifest;
mod place;
pub mod population;
mod read;
mod secrets;
mod select;
mod settings;
mod sketch;
mod split;
pub mod synthetic;
mod text;
mod workload;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::durable::FileError;
use crate::json::Value;
use crate::record::{Coordinates, Message};
use crate::table::TableError;

pub use burst::Burst;
pub use explain::Explained;
pub use feedback::Feedback;
pub use freeze::{Freezing, freeze, preview};
pub use manifest::{Inputs, Manifest, OffsetRange, Part, load, peek, store};
pub use settings::Settings;
use split::SplitRow;
pub use split::{Audit, AuditSplit, Gate, GateSplit, Split, SplitOf, Train, TrainSplit};
pub use workload::{MOST as MOST_WORKLOADS, Match, WorkloadView};

/// One prompt of a dataset: the first row of all that it stands for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Prompt {
    pub prompt_hash: String,
    /// The prompt hash of the first member of its cluster.
    pub cluster: String,
    pub workload: Option<String>,
    pub tenant: Option<String>,
    pub messages: Vec<Message>,
    pub tools: Option<Value>,
    pub first_seen: Coordinates,
    pub event_time_us: i64,
    /// ISO 639-3 code of the last user turn's language, where it can be told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub language: Option<String>,
    /// True where it is newer than everything that trains tonight (`dataset.forward_hours`).
    #[serde(default)]
    pub is_forward: bool,
    /// Rows of the log that it stands for: its own, its exact duplicates and the near duplicates left out for it.
    pub count: u64,
    /// What was said of the answers to it, the oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub feedback: Vec<Feedback>,
    /// The logged prompts that it was made from, where it is synthetic; empty for a logged one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<String>,
}

impl Prompt {
    /// Returns a prompt of which no more is known than what is asked: of no workload, with no answers, standing for itself alone.
    pub fn bare(prompt_hash: String, cluster: String, messages: Vec<Message>, first_seen: Coordinates) -> Prompt {
        Prompt {
            prompt_hash,
            cluster,
            workload: None,
            tenant: None,
            messages,
            tools: None,
            first_seen,
            event_time_us: 0,
            language: None,
            is_forward: false,
            count: 1,
            feedback: Vec::new(),
            sources: Vec::new(),
        }
    }

    /// Returns true where a model made it of logged ones.
    pub fn is_synthetic(&self) -> bool {
        !self.sources.is_empty()
    }
}

/// What became of the rows.
#[derive(Debug, Clone, PartialEq)]
pub struct Assembled {
    pub train: TrainSplit,
    pub gate: GateSplit,
    pub audit: AuditSplit,
    /// Rows left out, by reason.
    pub excluded: BTreeMap<String, u64>,
    pub rows: u64,
    /// Rows left out for secrets and personal data, by kind.
    pub masked: BTreeMap<String, u64>,
    /// Training prompts, by why they were drawn.
    pub drawn: BTreeMap<String, u64>,
    pub quarantine: Vec<Burst>,
}

/// Rows by reason.
#[derive(Debug, Default)]
struct Counts(BTreeMap<String, u64>);

impl Counts {
    fn add(&mut self, reason: &str, rows: u64) {
        if rows > 0 {
            *self.0.entry(reason.to_owned()).or_default() += rows;
        }
    }
}

/// A frozen dataset.
#[derive(Debug)]
pub struct Dataset {
    pub manifest: Manifest,
    pub train: TrainSplit,
    pub gate: GateSplit,
    pub audit: AuditSplit,
}

/// Why a dataset could not be frozen or loaded.
#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
    #[error(transparent)]
    Table(#[from] TableError),
    #[error(transparent)]
    File(#[from] FileError),
    #[error("column {column} of table {table} {why}: is the table one of taod's?")]
    Column { table: &'static str, column: String, why: String },
    #[error("{path} has SHA-256 {found}, but its manifest says {expected}: remove the folder and freeze again")]
    Changed { path: PathBuf, expected: String, found: String },
    #[error("cluster {cluster} stands in both {first} and {second} of {path}: remove the folder and freeze again")]
    Leak { path: PathBuf, cluster: String, first: &'static str, second: &'static str },
    #[error(
        "{path} holds the made prompt {prompt}, which comes from no prompt of the training split: remove the folder and make \
         them again"
    )]
    Orphan { path: PathBuf, prompt: String },
    #[error("table splits was changed by another writer {attempts} times in a row: stop the other daemon and retry")]
    Contended { attempts: usize },
}
