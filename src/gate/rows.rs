//! The rows that a trial leaves: tables `trials`, `gate_steps` and `gate_usage`, one flat struct each.
//!
//! Rows hold ids, hashes and numbers, never text of a prompt or an answer: they outlive an erasure.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::GateError;
use super::behaviour::Behaviour;
use super::level::{Mode, Spent, Terms};
use super::settings::Settings;

/// Where a trial stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    Open,
    /// The bar was crossed and every guardrail passed.
    Promoted,
    /// The bar was crossed and a guardrail failed.
    Refused,
    /// The evidence fell so low that going on is a waste of prompts.
    Futile,
    /// All nights went by without a decision.
    Expired,
    /// Incumbent, scorer, decoding or settings changed: the evidence means nothing any more.
    Void,
}

impl State {
    /// Returns the name stored in the table.
    pub fn as_str(self) -> &'static str {
        match self {
            State::Open => "open",
            State::Promoted => "promoted",
            State::Refused => "refused",
            State::Futile => "futile",
            State::Expired => "expired",
            State::Void => "void",
        }
    }
}

/// What is fixed when a trial is opened, before its first score.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Facts {
    /// The id: year, number and challenger.
    pub trial: String,
    /// t: which challenger of the budget year this is, counted from 1.
    pub number: u32,
    pub budget_year: i32,
    /// The version that wants to be served, and the SHA-256 of its weights.
    pub challenger: String,
    pub challenger_sha256: String,
    /// The version being served (or `base`), and the SHA-256 of its weights.
    pub incumbent: String,
    pub incumbent_sha256: String,
    pub mode: Mode,
    /// The whole year's error budget.
    pub budget_alpha: f64,
    /// T: the most challengers in the year.
    pub challengers: u32,
    /// R: promotions made this year before this trial.
    pub promotions: u32,
    /// The level of this trial; the bar is wealth 1/alpha.
    pub alpha: f64,
    pub margin: f64,
    /// Identity of the scorers (`Rewards::identity`).
    pub scorer_epoch: String,
    /// Identity of everything that shapes an answer besides the adapter: engine, template, sampling settings.
    pub decoding: String,
    /// Seed of the order, 16 hex digits (a 64-bit unsigned number fits no Delta type).
    pub order_seed: String,
}

impl Facts {
    /// Returns the terms of the budget that the trial was opened under.
    pub fn terms(&self) -> Terms {
        Terms { mode: self.mode, alpha: self.budget_alpha, challengers: self.challengers }
    }
}

/// One change of a trial: opened, a night begun (still open), closed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrialRow {
    #[serde(flatten)]
    pub facts: Facts,
    pub state: State,
    /// When the row was made, microseconds since the epoch; told by the caller.
    pub time_us: i64,
    /// Nights begun so far; 0 in the opening row.
    pub night: u32,
    /// Clusters judged so far.
    pub steps: u64,
    pub ln_wealth: f64,
    /// The guardrail that refused, where one did.
    pub guardrail: Option<String>,
    pub reason: String,
    /// [`Detail`] as JSON.
    pub record: String,
}

/// What of a trial row fits no flat column.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Detail {
    pub settings: Settings,
    /// Absolute bounds of the workloads whose rules bound length or ending.
    pub lengths: BTreeMap<String, LengthBounds>,
    /// The night's clusters in the order in which they are judged; empty except in the row that begins a night.
    pub order: Vec<String>,
    /// Logged calls that all gate prompts of the night stand for; 0 where they were not counted.
    #[serde(default)]
    pub traffic: u64,
    /// The clusters of each suite, in the row that opens the trial.
    #[serde(default)]
    pub suites: super::suite::Named,
    /// What the guardrails said, in the row that closes the trial.
    pub findings: Vec<super::Finding>,
}

/// Bounds on the length of an answer that a workload's rules state. All absent: only the ending is bound.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct LengthBounds {
    pub min_words: Option<f64>,
    pub max_words: Option<f64>,
    pub min_chars: Option<f64>,
    pub max_chars: Option<f64>,
}

/// What one side did on one cluster, averaged over its answers.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Side {
    /// The gate's score in [0, 1].
    pub score: f64,
    pub words: f64,
    pub chars: f64,
    /// The independent scorer: length-normalised log-prob of the answer under the base, without the house rules.
    pub quality: Option<f64>,
    /// Similarity of answer and question; for the report only.
    pub similarity: Option<f64>,
    /// Tokens of the answer.
    pub tokens: Option<f64>,
    /// Ways of not answering.
    pub behaviour: Option<Behaviour>,
}

/// Full-vocabulary divergence between the challenger and the base on one prompt, in nats.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Kl {
    /// Mean KL(new || base) per token over fresh temperature-1 samples of the challenger.
    pub mean: f64,
    /// The share of those tokens above the limit of the 95th percentile (`guardrails.kl_token_limit`).
    pub over: f64,
    pub tokens: u32,
    /// Mean forward KL(base || new) per token over samples of the base, where measured; logged only.
    pub forward: Option<f64>,
}

impl Kl {
    /// Returns the summary of per-token divergences, or `None` where there is no token.
    pub fn of(per_token: &[f32], token_limit: f64) -> Option<Kl> {
        if per_token.is_empty() {
            return None;
        }
        let n = per_token.len() as f64;
        let mean = per_token.iter().map(|&kl| f64::from(kl)).sum::<f64>() / n;
        let over = per_token.iter().filter(|&&kl| f64::from(kl) > token_limit).count() as f64 / n;
        Some(Kl { mean, over, tokens: u32::try_from(per_token.len()).unwrap_or(u32::MAX), forward: None })
    }
}

/// Everything measured on one gate cluster.
#[derive(Debug, Clone, PartialEq)]
pub struct Observation {
    pub cluster: String,
    pub prompt_hash: String,
    pub workload: Option<String>,
    /// Logged calls that the cluster stands for.
    pub traffic: u64,
    pub tenant: Option<String>,
    /// ISO 639-3, where it could be told.
    pub language: Option<String>,
    /// Characters of the question (the last user turn).
    pub question_chars: Option<f64>,
    pub new: Side,
    pub incumbent: Side,
    /// Divergence from the base.
    pub kl: Option<Kl>,
    /// Divergence from the incumbent.
    pub kl_round: Option<Kl>,
}

impl Observation {
    /// Returns the difference that the evidence is made of.
    pub fn d(&self) -> f64 {
        self.new.score - self.incumbent.score
    }

    /// Refuses measurements that would poison a sum.
    pub(super) fn check(&self) -> Result<(), GateError> {
        let bad =
            |field, value, expected| GateError::Measurement { field, cluster: self.cluster.clone(), value, expected };
        for (side, name) in [(&self.new, "the new score"), (&self.incumbent, "the incumbent's score")] {
            if !(0.0..=1.0).contains(&side.score) {
                return Err(bad(name, side.score, "in [0, 1]"));
            }
            let lengths = [Some(side.words), Some(side.chars), side.tokens, self.question_chars];
            if let Some(value) = lengths.into_iter().flatten().find(|x| !(x.is_finite() && *x >= 0.0)) {
                return Err(bad("a length", value, "a number of 0 or more"));
            }
            if let Some(value) = [side.quality, side.similarity].into_iter().flatten().find(|x| !x.is_finite()) {
                return Err(bad("quality or similarity", value, "finite"));
            }
            let rates = side.behaviour.iter().flat_map(Behaviour::rates);
            if let Some(value) = rates.into_iter().find(|x| !(0.0..=1.0).contains(x)) {
                return Err(bad("a rate of behaviour", value, "in [0, 1]"));
            }
        }
        for kl in [self.kl, self.kl_round].into_iter().flatten() {
            if !kl.mean.is_finite() {
                return Err(bad("the divergence", kl.mean, "finite"));
            }
            if !(0.0..=1.0).contains(&kl.over) {
                return Err(bad("the share of tokens over the limit", kl.over, "in [0, 1]"));
            }
        }
        Ok(())
    }

    /// Returns the name under which reports list the workload.
    pub fn workload_name(&self) -> &str {
        self.workload.as_deref().unwrap_or("unassigned")
    }
}

/// One difference: the row of table `gate_steps`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepRow {
    pub trial: String,
    /// Counted from 1 over the whole trial.
    pub step: u64,
    pub night: u32,
    pub cluster: String,
    pub prompt_hash: String,
    pub workload: Option<String>,
    pub traffic: u64,
    pub d: f64,
    pub lambda: f64,
    pub ln_wealth: f64,
    pub new_score: f64,
    pub incumbent_score: f64,
    pub new_words: f64,
    pub incumbent_words: f64,
    pub new_chars: f64,
    pub incumbent_chars: f64,
    pub new_quality: Option<f64>,
    pub incumbent_quality: Option<f64>,
    pub new_similarity: Option<f64>,
    pub incumbent_similarity: Option<f64>,
    pub kl_mean: Option<f64>,
    pub kl_over: Option<f64>,
    pub kl_tokens: Option<u32>,
    pub kl_forward: Option<f64>,
    // What rows of earlier versions lack.
    /// The suite that the row belongs to; `None` where it is evidence.
    #[serde(default)]
    pub suite: Option<String>,
    #[serde(default)]
    pub tenant: Option<String>,
    #[serde(default)]
    pub language: Option<String>,
    #[serde(default)]
    pub question_chars: Option<f64>,
    #[serde(default)]
    pub new_tokens: Option<f64>,
    #[serde(default)]
    pub incumbent_tokens: Option<f64>,
    /// As a text of rates, in the order of [`Behaviour`] with a space between: a row is flat.
    #[serde(default, with = "rates")]
    pub new_behaviour: Option<Behaviour>,
    #[serde(default, with = "rates")]
    pub incumbent_behaviour: Option<Behaviour>,
    #[serde(default)]
    pub kl_round_mean: Option<f64>,
    #[serde(default)]
    pub kl_round_over: Option<f64>,
}

/// A behaviour as one flat value. A number is written so that it reads back the same.
mod rates {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::Behaviour;

    pub(super) fn serialize<S: Serializer>(behaviour: &Option<Behaviour>, to: S) -> Result<S::Ok, S::Error> {
        let text = |b: &Behaviour| b.rates().map(|rate| rate.to_string()).join(" ");
        behaviour.as_ref().map(text).serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Behaviour>, D::Error> {
        let parse = |text: &str| {
            let rates: Vec<f64> = text.split(' ').map(|rate| rate.parse().ok()).collect::<Option<_>>()?;
            Some(Behaviour::from_rates(rates.try_into().ok()?))
        };
        Ok(Option::<String>::deserialize(from)?.as_deref().and_then(parse))
    }
}

impl StepRow {
    /// Returns the row of one observation; its place and what the evidence made of it are left for the trial to fill.
    pub(super) fn of(trial: &str, o: &Observation) -> StepRow {
        StepRow {
            trial: trial.to_string(),
            step: 0,
            night: 0,
            cluster: o.cluster.clone(),
            prompt_hash: o.prompt_hash.clone(),
            workload: o.workload.clone(),
            traffic: o.traffic,
            d: o.d(),
            lambda: 0.0,
            ln_wealth: 0.0,
            new_score: o.new.score,
            incumbent_score: o.incumbent.score,
            new_words: o.new.words,
            incumbent_words: o.incumbent.words,
            new_chars: o.new.chars,
            incumbent_chars: o.incumbent.chars,
            new_quality: o.new.quality,
            incumbent_quality: o.incumbent.quality,
            new_similarity: o.new.similarity,
            incumbent_similarity: o.incumbent.similarity,
            kl_mean: o.kl.map(|kl| kl.mean),
            kl_over: o.kl.map(|kl| kl.over),
            kl_tokens: o.kl.map(|kl| kl.tokens),
            kl_forward: o.kl.and_then(|kl| kl.forward),
            suite: None,
            tenant: o.tenant.clone(),
            language: o.language.clone(),
            question_chars: o.question_chars,
            new_tokens: o.new.tokens,
            incumbent_tokens: o.incumbent.tokens,
            new_behaviour: o.new.behaviour,
            incumbent_behaviour: o.incumbent.behaviour,
            kl_round_mean: o.kl_round.map(|kl| kl.mean),
            kl_round_over: o.kl_round.map(|kl| kl.over),
        }
    }

    /// Returns the measurements that the row was made of.
    pub fn observation(&self) -> Observation {
        let kl = |mean| Kl {
            mean,
            over: self.kl_over.unwrap_or(1.0),
            tokens: self.kl_tokens.unwrap_or(0),
            forward: self.kl_forward,
        };
        Observation {
            cluster: self.cluster.clone(),
            prompt_hash: self.prompt_hash.clone(),
            workload: self.workload.clone(),
            traffic: self.traffic,
            tenant: self.tenant.clone(),
            language: self.language.clone(),
            question_chars: self.question_chars,
            new: Side {
                score: self.new_score,
                words: self.new_words,
                chars: self.new_chars,
                quality: self.new_quality,
                similarity: self.new_similarity,
                tokens: self.new_tokens,
                behaviour: self.new_behaviour,
            },
            incumbent: Side {
                score: self.incumbent_score,
                words: self.incumbent_words,
                chars: self.incumbent_chars,
                quality: self.incumbent_quality,
                similarity: self.incumbent_similarity,
                tokens: self.incumbent_tokens,
                behaviour: self.incumbent_behaviour,
            },
            kl: self.kl_mean.map(kl),
            kl_round: self.kl_round_mean.map(|mean| Kl {
                mean,
                over: self.kl_round_over.unwrap_or(1.0),
                tokens: self.kl_tokens.unwrap_or(0),
                forward: None,
            }),
        }
    }
}

/// One gate cluster spent: the row of table `gate_usage`, written before the cluster is scored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UsageRow {
    pub cluster: String,
    pub trial: String,
    pub night: u32,
    pub step: u64,
}

/// Returns what the trials of `year` with a number below `before` spent of its budget.
pub fn spent(trials: &[TrialRow], year: i32, before: u32) -> Spent {
    let of_year = |row: &&TrialRow| row.facts.budget_year == year && row.facts.number < before;
    let mut opened: BTreeMap<u32, &TrialRow> = BTreeMap::new();
    let mut promoted = std::collections::BTreeSet::new();
    for row in trials.iter().filter(of_year) {
        opened.entry(row.facts.number).or_insert(row);
        if row.state == State::Promoted {
            promoted.insert(row.facts.number);
        }
    }
    Spent {
        trials: opened.keys().next_back().copied().unwrap_or(0),
        promotions: u32::try_from(promoted.len()).unwrap_or(u32::MAX),
        share: opened.values().map(|row| row.facts.terms().share()).sum(),
    }
}
