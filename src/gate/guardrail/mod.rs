//! What must hold besides the evidence: length, drift, quality by an independent scorer, cost, conduct, no segment hurt.
//!
//! A score can rise for a bad reason, and the score itself cannot say so. Each guardrail looks at something that the
//! training reward does not compute, and answers pass, fail or not yet. All bounds are confidence sequences, because
//! guardrails are looked at after every block. A pass needs all of them, which needs no correction for their number;
//! a veto by any one segment or any one kind of conduct does (Holm).

mod conduct;
mod drift;
mod length;
mod probes;
mod quality;
mod segments;
mod thresholds;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::confidence::{Bounds, bounds};
use super::rows::{LengthBounds, Observation};

pub use probes::CANARY;
pub(super) use probes::{injection, memorisation};
pub use thresholds::Thresholds;

/// The name of a guardrail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Guardrail {
    Length,
    /// Divergence from the base, over all generations of adapters.
    Kl,
    /// Divergence from the incumbent, of this round.
    KlRound,
    Quality,
    Cost,
    Behaviour,
    #[serde(alias = "workloads")]
    Segments,
    /// The head of the traffic, by a fixed suite.
    Head,
    /// The operator's suite.
    Regression,
    /// Texts of training that no answer may hold.
    Memorisation,
    /// Whether the gate's own scorers can be argued with.
    Injection,
}

impl Guardrail {
    /// Returns the name stored in the table.
    pub fn as_str(self) -> &'static str {
        match self {
            Guardrail::Length => "length",
            Guardrail::Kl => "kl",
            Guardrail::KlRound => "kl_round",
            Guardrail::Quality => "quality",
            Guardrail::Cost => "cost",
            Guardrail::Behaviour => "behaviour",
            Guardrail::Segments => "segments",
            Guardrail::Head => "head",
            Guardrail::Regression => "regression",
            Guardrail::Memorisation => "memorisation",
            Guardrail::Injection => "injection",
        }
    }
}

/// What a guardrail answers; the worst of several is the largest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    Pass,
    /// The data do not tell yet; the trial stays open.
    NotYet,
    Fail,
}

impl Outcome {
    /// Returns the answer as people read it.
    pub fn as_str(self) -> &'static str {
        match self {
            Outcome::Pass => "passes",
            Outcome::NotYet => "cannot tell yet",
            Outcome::Fail => "fails",
        }
    }
}

/// A guardrail's answer with its reason in words and in numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Finding {
    pub guardrail: Guardrail,
    pub outcome: Outcome,
    pub reason: String,
    pub numbers: BTreeMap<String, f64>,
}

/// Returns what every guardrail says of the observations so far.
pub fn examine(
    observations: &[Observation],
    lengths: &BTreeMap<String, LengthBounds>,
    thresholds: &Thresholds,
) -> Vec<Finding> {
    vec![
        length::length(observations, lengths, thresholds),
        drift::kl(observations, thresholds),
        drift::kl_round(observations, thresholds),
        quality::quality(observations, thresholds),
        conduct::cost(observations, thresholds),
        conduct::behaviour(observations, thresholds),
        segments::segments(observations, thresholds),
    ]
}

/// Returns what a fixed suite of `names` clusters says: its mean difference may not fall below the tolerance.
pub(super) fn suite(
    guardrail: Guardrail,
    names: usize,
    measured: Option<&Vec<Observation>>,
    tolerance: f64,
    level: f64,
) -> Finding {
    let mut parts = Parts::new();
    match measured {
        _ if names == 0 => parts.add(Outcome::Pass, "there is no such suite yet".into()),
        None => parts.add(Outcome::NotYet, format!("its {names} prompts are not judged yet")),
        Some(found) if found.is_empty() => parts.add(Outcome::Pass, "all of its prompts were erased".into()),
        Some(found) => {
            let differences: Vec<f64> = found.iter().map(Observation::d).collect();
            let change = bounds(&differences, -1.0, 1.0, level);
            parts.bounds("change", &change);
            let count = |better: fn(&f64) -> bool| differences.iter().filter(|d| better(d)).count();
            let (wins, losses) = (count(|d| *d > 0.0), count(|d| *d < 0.0));
            let outcome = if change.mean < -tolerance { Outcome::Fail } else { Outcome::Pass };
            let (n, mean, low, high) = (found.len(), change.mean, change.lower, change.upper);
            let counted = format!("{wins} of {n} prompts better, {losses} worse");
            let interval = format!("{mean:+.3} on average ({low:+.3} to {high:+.3}, at least {})", -tolerance);
            parts.add(outcome, format!("{interval}; {counted}"));
        }
    }
    parts.finding(guardrail)
}

/// Collects the parts of one guardrail: the worst outcome, and the reasons that led to it.
struct Parts {
    outcome: Outcome,
    reasons: Vec<(Outcome, String)>,
    numbers: BTreeMap<String, f64>,
}

impl Parts {
    fn new() -> Self {
        Parts { outcome: Outcome::Pass, reasons: Vec::new(), numbers: BTreeMap::new() }
    }

    fn add(&mut self, outcome: Outcome, reason: String) {
        self.outcome = self.outcome.max(outcome);
        self.reasons.push((outcome, reason));
    }

    fn number(&mut self, name: impl Into<String>, value: f64) {
        self.numbers.insert(name.into(), value);
    }

    fn bounds(&mut self, name: &str, bounds: &Bounds) {
        self.number(name, bounds.mean);
        self.number(format!("{name}_lower"), bounds.lower);
        self.number(format!("{name}_upper"), bounds.upper);
    }

    fn finding(self, guardrail: Guardrail) -> Finding {
        let told: Vec<String> =
            self.reasons.into_iter().filter(|(o, _)| *o == self.outcome).map(|(_, reason)| reason).collect();
        Finding { guardrail, outcome: self.outcome, reason: told.join("; "), numbers: self.numbers }
    }
}

/// Judges a mean that must stay at or below `limit`: pass where proven, fail where the opposite is.
fn at_most(bounds: &Bounds, limit: f64) -> Outcome {
    if bounds.upper <= limit {
        Outcome::Pass
    } else if bounds.lower > limit {
        Outcome::Fail
    } else {
        Outcome::NotYet
    }
}

/// Judges a mean that must stay at or above `limit`.
fn at_least(bounds: &Bounds, limit: f64) -> Outcome {
    at_most(&Bounds { lower: -bounds.upper, upper: -bounds.lower, ..*bounds }, -limit)
}

/// Returns which of several nulls are rejected so that any false rejection has probability at most `level` (Holm).
fn holm(p: &[f64], level: f64) -> Vec<bool> {
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|&a, &b| p[a].total_cmp(&p[b]));
    let mut rejected = vec![false; p.len()];
    for (rank, &i) in order.iter().enumerate() {
        if p[i] > level / (p.len() - rank) as f64 {
            break;
        }
        rejected[i] = true;
    }
    rejected
}

fn too_few(n: usize, needed: u32) -> Option<String> {
    (n < needed as usize).then(|| format!("{n} of at least {needed} prompts"))
}

#[cfg(test)]
mod tests;
