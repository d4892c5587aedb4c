//! The audit: people say which of two answers to a locked prompt is better, and the scorers are held to it.
//!
//! No statistic on a score helps where the score is wrong. So a part of the prompts is never trained on and never judged; of
//! these some are drawn, the served version and the base answer each, and people who do not see which is which choose. Two
//! numbers come of it, each with an exact interval: how often the gate's score prefers what people prefer, and how often people
//! prefer what is served. Where either is shown to be bad, promotions freeze until somebody takes it back.
//!
//! A sample lies in the folder of the round whose audit split it is of, one prompt a line with its hash, so that an erasure finds
//! it there. Labels hold no text.

mod report;
mod sample;

use std::collections::BTreeMap;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use report::{Agreement, Report, report};
pub use sample::{Sampled, sample};

use crate::dataset::DatasetError;
use crate::durable::{self, FileError};
use crate::record::Message;
use crate::registry::RegistryError;
use crate::round::{Paths, RoundError};

const SAMPLE: &str = "audit/sample.jsonl";
const LABELS: &str = "audit/labels.jsonl";

/// What an audit must show, `[audit]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// The share of people's choices that the gate's score must agree with, above 0 and below 1; half is what a coin has. Where
    /// the upper end of the 95 % interval lies below it, `taod audit report` freezes promotions.
    pub min_agreement: f64,
}

impl Default for Settings {
    fn default() -> Self {
        Settings { min_agreement: 0.6 }
    }
}

impl Settings {
    /// Checks ranges; the message names the key, the value and what to write instead.
    pub fn validate(&self) -> Result<(), String> {
        match self.min_agreement > 0.0 && self.min_agreement < 1.0 {
            true => Ok(()),
            false => Err(format!("min_agreement is {}: give a share between 0 and 1, such as 0.6", self.min_agreement)),
        }
    }
}

/// Why an audit could not be made.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    #[error(
        "no audit prompt is left to label: no round has frozen one, or all were sampled before; wait for more traffic"
    )]
    NoPrompts,
    #[error("no audit was sampled yet; begin with `taod audit sample`")]
    NoSample,
    #[error("{round} holds no audit; those that do: {known}")]
    NoRound { round: String, known: String },
    #[error("line {line}: id {id:?} is of no sampled pair; take ids from `taod audit sample`")]
    UnknownId { line: usize, id: String },
    #[error("line {line}: {reason}")]
    Line { line: usize, reason: String },
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Dataset(#[from] DatasetError),
    #[error(transparent)]
    Round(Box<RoundError>),
    #[error(transparent)]
    Registry(#[from] RegistryError),
    #[error(transparent)]
    Engine(#[from] crate::engine::EngineError),
    #[error(transparent)]
    Candidates(#[from] crate::candidates::CandidateError),
    #[error(transparent)]
    Rewards(#[from] crate::rewards::RewardError),
}

impl From<RoundError> for AuditError {
    fn from(error: RoundError) -> Self {
        AuditError::Round(Box::new(error))
    }
}

/// One prompt with two answers, as it is stored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Pair {
    pub id: String,
    pub prompt_hash: String,
    pub workload: Option<String>,
    pub messages: Vec<Message>,
    pub a: Answer,
    pub b: Answer,
    /// The identity of the gate's scorers.
    pub scorers: String,
}

/// One of the two answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// The version that gave it.
    pub version: String,
    pub text: String,
    /// The gate's score.
    pub total: f64,
    pub parts: BTreeMap<String, f64>,
}

/// What people see of a pair: not who answered, not how it was scored.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Task<'a> {
    pub id: &'a str,
    pub messages: &'a [Message],
    pub a: &'a str,
    pub b: &'a str,
}

impl Pair {
    /// Returns what people see of it.
    pub fn task(&self) -> Task<'_> {
        Task { id: &self.id, messages: &self.messages, a: &self.a.text, b: &self.b.text }
    }
}

/// Which answer a person finds better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Choice {
    A,
    B,
    /// Neither is better.
    Tie,
}

/// One person's word on one pair.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Label {
    pub id: String,
    pub choice: Choice,
    /// Who says so.
    #[serde(default)]
    pub by: String,
}

/// Returns the rounds that hold an audit, the oldest first.
fn audited(paths: &Paths) -> Result<Vec<String>, AuditError> {
    let mut rounds = paths.round_ids()?;
    rounds.retain(|id| paths.round(id).join(SAMPLE).exists());
    Ok(rounds)
}

/// Returns the round that is named, where it holds an audit, or the newest that does.
fn round_of(paths: &Paths, wanted: Option<&str>) -> Result<String, AuditError> {
    let rounds = audited(paths)?;
    match wanted {
        Some(round) if rounds.iter().any(|known| known == round) => Ok(round.to_owned()),
        Some(round) => Err(AuditError::NoRound { round: round.to_owned(), known: rounds.join(", ") }),
        None => rounds.into_iter().next_back().ok_or(AuditError::NoSample),
    }
}

/// Reads the pairs of a round's audit.
fn pairs(paths: &Paths, round: &str) -> Result<Vec<Pair>, AuditError> {
    Ok(durable::read_json_lines(&paths.round(round).join(SAMPLE))?)
}

/// Reads the labels of a round's audit, the oldest first.
fn labels(paths: &Paths, round: &str) -> Result<Vec<Label>, AuditError> {
    match durable::read_json_lines(&paths.round(round).join(LABELS)) {
        Err(error) if error.is_not_found() => Ok(Vec::new()),
        read => Ok(read?),
    }
}

/// Returns the pairs of an audit that a person has not labelled, in their order.
pub fn unlabelled(paths: &Paths, round: Option<&str>, by: &str) -> Result<Vec<Pair>, AuditError> {
    let round = round_of(paths, round)?;
    let done = labels(paths, &round)?;
    let mut pairs = pairs(paths, &round)?;
    pairs.retain(|pair| !done.iter().any(|label| label.id == pair.id && label.by == by));
    Ok(pairs)
}

/// Adds labels to the audit of their pairs; all of them or, where one is wrong, none. Returns how many there are now.
pub fn label(paths: &Paths, new: &[Label]) -> Result<usize, AuditError> {
    let mut by_round: BTreeMap<String, Vec<Label>> = BTreeMap::new();
    for (line, label) in new.iter().enumerate() {
        let unknown = || AuditError::UnknownId { line, id: label.id.clone() };
        let round = label.id.rsplit_once('/').map(|(round, _)| round.to_owned()).ok_or_else(unknown)?;
        by_round.entry(round).or_default().push(label.clone());
    }
    let mut all = BTreeMap::new();
    for (round, more) in &by_round {
        let unknown = |label: &Label| {
            let line = new.iter().position(|other| other == label).unwrap_or_default();
            AuditError::UnknownId { line, id: label.id.clone() }
        };
        let known = match audited(paths)?.contains(round) {
            true => pairs(paths, round)?,
            false => Vec::new(),
        };
        if let Some(label) = more.iter().find(|label| known.iter().all(|pair| pair.id != label.id)) {
            return Err(unknown(label));
        }
        let mut labels = labels(paths, round)?;
        // A person's later word replaces the earlier one.
        labels.retain(|old| !more.iter().any(|label| label.id == old.id && label.by == old.by));
        labels.extend(more.iter().cloned());
        all.insert(round, labels);
    }
    let mut count = 0;
    for (round, labels) in all {
        let path: PathBuf = paths.round(round).join(LABELS);
        durable::write_json_lines(&path, &labels)?;
        count += labels.len();
    }
    Ok(count)
}
