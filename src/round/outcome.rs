//! How a night came out, and what its stages did: what the child hands back, the tables keep and the page shows.

use std::time::Instant;

use serde::{Deserialize, Serialize};

/// How a night came out; written as `outcome.json`, the last file of a round.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "result", rename_all = "snake_case")]
pub enum Outcome {
    /// The trial's evidence crossed its bar and every guardrail passed: to be verified and promoted by the daemon.
    Promote { trial: String, challenger: String, reason: String },
    /// The trial ended without a promotion.
    Refused { trial: String, challenger: String, reason: String },
    /// The trial goes on the next night, with fresh prompts.
    Open { trial: String, challenger: String, reason: String },
    /// There was nothing to do, for an ordinary reason.
    Skipped { reason: String },
    /// Training was given up: it diverged or collapsed, and would again on the same samples. The next night begins anew.
    Failed { reason: String },
}

impl Outcome {
    /// Returns why, in one sentence.
    pub fn reason(&self) -> &str {
        match self {
            Outcome::Promote { reason, .. }
            | Outcome::Refused { reason, .. }
            | Outcome::Open { reason, .. }
            | Outcome::Skipped { reason }
            | Outcome::Failed { reason } => reason,
        }
    }

    /// Returns the trial's id and the challenger, where there was a trial.
    pub fn trial(&self) -> Option<(&str, &str)> {
        match self {
            Outcome::Promote { trial, challenger, .. }
            | Outcome::Refused { trial, challenger, .. }
            | Outcome::Open { trial, challenger, .. } => Some((trial, challenger)),
            Outcome::Skipped { .. } | Outcome::Failed { .. } => None,
        }
    }

    /// Returns the name stored in the `rounds` table and used as a metric label.
    pub fn name(&self) -> &'static str {
        match self {
            Outcome::Promote { .. } => "promote",
            Outcome::Refused { .. } => "refused",
            Outcome::Open { .. } => "open",
            Outcome::Skipped { .. } => "skipped",
            Outcome::Failed { .. } => "failed",
        }
    }
}

/// What one stage did, for the tables, the page and the demo's report.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StageReport {
    pub stage: String,
    pub rows: u64,
    pub tokens: u64,
    pub seconds: f64,
    /// When it ended, microseconds since the epoch; 0 in records of older versions.
    #[serde(default)]
    pub ended_us: i64,
}

impl StageReport {
    pub(super) fn new(stage: String, rows: u64, tokens: u64, started: Instant) -> Self {
        let ended_us = chrono::Utc::now().timestamp_micros();
        StageReport { stage, rows, tokens, seconds: started.elapsed().as_secs_f64(), ended_us }
    }
}

/// The whole record of a night.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    pub round: String,
    pub outcome: Outcome,
    pub stages: Vec<StageReport>,
}
