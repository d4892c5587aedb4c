//! The rows a round writes into the tables. They hold numbers, hashes and times; the only text is that of candidates,
//! where erasure reaches it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::candidates::Candidate;

/// One change of a round's state: a row of `rounds`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RoundRow {
    pub round: String,
    pub state: String,
    pub at_us: i64,
    /// JSON of what the state means in numbers (manifest, stage reports, outcome).
    pub detail: String,
}

impl RoundRow {
    /// Returns a row stamped now.
    pub fn new(round: &str, state: &str, detail: serde_json::Value) -> Self {
        let at_us = chrono::Utc::now().timestamp_micros();
        RoundRow { round: round.to_string(), state: state.to_string(), at_us, detail: detail.to_string() }
    }
}

/// One scored answer: a row of `candidates`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CandidateRow {
    pub purpose: String,
    /// The round, or the trial for answers of the gate.
    pub round: String,
    pub prompt_hash: String,
    pub cluster: String,
    pub workload: Option<String>,
    pub sample: i32,
    /// Hexadecimal: Delta has no unsigned 64-bit integers.
    pub seed: String,
    pub sampler: String,
    pub strategy: String,
    pub text: String,
    pub token_ids: Vec<i32>,
    pub logprobs: Vec<f32>,
    pub sampler_logprobs: Vec<f32>,
    pub finish_reason: String,
    /// JSON object of each reward by name.
    pub rewards: String,
    pub total: f64,
    pub at_us: i64,
}

/// Returns the row of one answer and its rewards.
pub fn candidate_row(
    round: &str,
    purpose: &str,
    candidate: &Candidate,
    total: f64,
    parts: &BTreeMap<String, f64>,
) -> CandidateRow {
    CandidateRow {
        purpose: purpose.to_string(),
        round: round.to_string(),
        prompt_hash: candidate.prompt_hash.clone(),
        cluster: candidate.cluster.clone(),
        workload: candidate.workload.clone(),
        sample: candidate.sample as i32,
        seed: format!("{:016x}", candidate.seed),
        sampler: candidate.sampler.clone(),
        strategy: candidate.strategy.clone(),
        text: candidate.text.clone(),
        token_ids: candidate.token_ids.iter().map(|id| *id as i32).collect(),
        logprobs: candidate.logprobs.clone(),
        sampler_logprobs: candidate.sampler_logprobs.clone(),
        finish_reason: candidate.finish_reason.as_str().to_string(),
        rewards: serde_json::to_string(parts).unwrap_or_default(),
        total,
        at_us: chrono::Utc::now().timestamp_micros(),
    }
}
