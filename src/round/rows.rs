//! The rows a round writes into the tables. They hold numbers, hashes and times; the only text is that of candidates,
//! where erasure reaches it. Fields without a column of their own go into the table's `detail`.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::adapter::StepLog;
use crate::candidates::Candidate;
use crate::record::Purpose;

/// One change of a round's state: a row of `rounds`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct RoundRow {
    pub round: String,
    pub state: String,
    pub time: DateTime<Utc>,
    pub seed: String,
    /// What the state means in numbers (manifest, stage reports, outcome).
    #[serde(default)]
    pub detail: Value,
}

impl RoundRow {
    /// Returns a row stamped now.
    pub(super) fn new(round: &str, state: &str, seed: u64, detail: Value) -> Self {
        RoundRow {
            round: round.to_string(),
            state: state.to_string(),
            time: Utc::now(),
            seed: seed.to_string(),
            detail,
        }
    }
}

/// One optimizer step: a row of `tuning_steps`.
#[derive(Debug, Clone, Serialize)]
pub(super) struct TuningRow<'a> {
    pub round: &'a str,
    /// The training pass, from 1.
    pub iteration: usize,
    pub time: DateTime<Utc>,
    #[serde(flatten)]
    pub step: &'a StepLog,
}

/// One scored answer: a row of `candidates`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct CandidateRow {
    pub purpose: Purpose,
    pub round: Option<String>,
    pub trial: Option<String>,
    /// The training pass, from 1.
    pub iteration: Option<i32>,
    /// `new` or `incumbent`, for answers of the gate.
    pub side: Option<String>,
    pub cluster: String,
    pub prompt_hash: String,
    pub workload: Option<String>,
    pub sample: i32,
    /// Decimal: Delta has no unsigned 64-bit integers.
    pub seed: String,
    pub sampler: String,
    pub strategy: String,
    pub text: String,
    pub token_ids: Vec<u32>,
    pub logprobs: Vec<f32>,
    pub sampler_logprobs: Vec<f32>,
    pub finish_reason: String,
    pub rewards: BTreeMap<String, f64>,
    /// Version and identity of the scorers behind `rewards`, by the beginning of their names there.
    #[serde(default)]
    pub scorers: BTreeMap<String, String>,
    pub total: f64,
    pub passed: bool,
    /// True where the prompt was made of logged ones.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub synthetic: bool,
    pub time: DateTime<Utc>,
}

/// Where a candidate belongs, besides to its prompt.
#[derive(Debug, Clone, Copy)]
pub(super) enum Place<'a> {
    Training { round: &'a str, pass: usize, is_synthetic: bool },
    Trial { trial: &'a str, side: &'a str },
}

/// Returns the row of one answer and its rewards.
pub(super) fn candidate_row(
    place: Place<'_>,
    c: &Candidate,
    (total, passed, parts): (f64, bool, &BTreeMap<String, f64>),
    stamps: &BTreeMap<String, String>,
) -> CandidateRow {
    let scored =
        |(scorer, _): &(&String, &String)| parts.keys().any(|part| part.split('/').next() == Some(scorer.as_str()));
    let (purpose, round, trial, iteration, side) = match place {
        Place::Training { round, pass, .. } => (Purpose::Train, Some(round.to_string()), None, Some(pass as i32), None),
        Place::Trial { trial, side } => (Purpose::Gate, None, Some(trial.to_string()), None, Some(side.to_string())),
    };
    CandidateRow {
        purpose,
        round,
        trial,
        iteration,
        side,
        cluster: c.cluster.clone(),
        prompt_hash: c.prompt_hash.clone(),
        workload: c.workload.clone(),
        sample: c.sample as i32,
        seed: c.seed.to_string(),
        sampler: c.sampler.clone(),
        strategy: c.strategy.clone(),
        text: c.text.clone(),
        token_ids: c.token_ids.clone(),
        logprobs: c.logprobs.clone(),
        sampler_logprobs: c.sampler_logprobs.clone(),
        finish_reason: c.finish_reason.as_str().to_string(),
        rewards: parts.clone(),
        scorers: stamps.iter().filter(scored).map(|(scorer, stamp)| (scorer.clone(), stamp.clone())).collect(),
        total,
        passed,
        synthetic: matches!(place, Place::Training { is_synthetic: true, .. }),
        time: Utc::now(),
    }
}
