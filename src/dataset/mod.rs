//! Datasets: which prompts a round trains on, which ones the gate may spend, and which ones are kept for the audit.
//!
//! A dataset is a pure function of the table versions it reads, its settings and its seed ([`mod@assemble`]). Rows that must
//! not train are counted out with a reason; exact and near duplicates fall together; every prompt belongs to a cluster,
//! and the cluster's hash decides its split once and for all (table `splits`). [`mod@freeze`] reads the tables and writes the
//! result into the round's folder, the manifest last; from then on nothing reads the log again.
//!
//! Training code takes a [`TrainSplit`], which cannot hold a gate or audit prompt: only this module makes one, from the
//! decisions above or from files whose hashes stand in the manifest.
//!
//! ```compile_fail
//! // There is no way to a split but through a dataset.
//! let forged = taod::dataset::TrainSplit::new(Vec::new());
//! ```
//!
//! Reading order: [`Settings`], `text` (what of a prompt is compared), `near` (near duplicates), `cluster` (who belongs
//! to whom), `feedback` (what was said of an answer, beside its prompt), `assemble` (all filters in order), `manifest` (files), `freeze` (tables).

mod assemble;
mod cluster;
mod feedback;
mod freeze;
mod manifest;
mod near;
mod settings;
mod split;
mod text;

#[cfg(test)]
mod tests;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::durable::FileError;
use crate::json::Value;
use crate::record::{Coordinates, Message};
use crate::table::TableError;

pub use assemble::{Assembled, QueryRow, WorkloadView, assemble};
pub use feedback::Feedback;
pub use freeze::freeze;
pub use manifest::{Inputs, Manifest, OffsetRange, Part, load, store};
pub use settings::Settings;
pub use split::{Audit, AuditSplit, Gate, GateSplit, Split, SplitOf, SplitRow, Train, TrainSplit};

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
    /// Rows of the log that it stands for: its own, its exact duplicates and the near duplicates left out for it.
    pub count: u64,
    /// What was said of the answers to it, the oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub feedback: Vec<Feedback>,
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
    #[error("column {column} of table queries {why}: is the table one of taod's?")]
    Column { column: &'static str, why: String },
    #[error("{path} has SHA-256 {found}, but its manifest says {expected}: remove the folder and freeze again")]
    Changed { path: PathBuf, expected: String, found: String },
    #[error("cluster {cluster} stands in both {first} and {second} of {path}: remove the folder and freeze again")]
    Leak { path: PathBuf, cluster: String, first: &'static str, second: &'static str },
    #[error("table splits was changed by another writer {attempts} times in a row: stop the other daemon and retry")]
    Contended { attempts: usize },
}
