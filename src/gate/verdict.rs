//! The recomputation that alone opens the way to a promotion, and the verdict in words.
//!
//! Training and scoring run in a child process; what it hands back is only a claim. [`verify`] makes the whole trial again
//! from the stored rows and returns the one value, [`Passed`], that `registry::promote` takes.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::GateError;
use super::decision::{Decision, Waiting};
use super::forecast::outlook;
use super::guardrail::{Finding, Guardrail, Outcome};
use super::history::last_rows;
use super::rows::{State, StepRow, TrialRow, UsageRow, spent};
use super::settings::Settings;
use super::trial::{TOLERANCE, Trial};

/// Proof that a challenger passed its trial. Its fields are private: only [`verify`] makes one.
#[derive(Debug, Clone, PartialEq)]
pub struct Passed {
    trial: String,
    challenger: String,
    challenger_sha256: String,
    incumbent: String,
    ln_wealth: f64,
    bar: f64,
    steps: u64,
}

impl Passed {
    /// Returns the trial's id.
    pub fn trial(&self) -> &str {
        &self.trial
    }

    /// Returns the version that may be promoted.
    pub fn challenger(&self) -> &str {
        &self.challenger
    }

    /// Returns the SHA-256 of the weights that were tried.
    pub fn challenger_sha256(&self) -> &str {
        &self.challenger_sha256
    }

    /// Returns the version that it was tried against; it may replace no other.
    pub fn incumbent(&self) -> &str {
        &self.incumbent
    }

    /// Returns the evidence, the bar it crossed, and the number of prompts it took.
    pub fn evidence(&self) -> (f64, f64, u64) {
        (self.ln_wealth, self.bar, self.steps)
    }
}

/// Recomputes a trial from its stored rows and returns the key to its promotion.
///
/// `trials` and `usage` are all rows of their tables: the level depends on the year's other trials, and a cluster may
/// have been used by one of them. `settings` are those configured now; a record made under a looser bar does not pass.
pub fn verify(
    trial: &str,
    trials: &[TrialRow],
    steps: &[StepRow],
    usage: &[UsageRow],
    settings: &Settings,
) -> Result<Passed, GateError> {
    let rebuilt = Trial::resume(trial, trials, steps)?;
    check_settings(&rebuilt, settings)?;
    check_budget(&rebuilt, trials)?;
    check_usage(&rebuilt, usage)?;
    let not_passed = |why: String| Err(GateError::NotPassed { trial: trial.to_string(), why });
    match (rebuilt.state(), rebuilt.decide()) {
        (State::Open | State::Promoted, Decision::Promote) => Ok(Passed {
            trial: trial.to_string(),
            challenger: rebuilt.facts().challenger.clone(),
            challenger_sha256: rebuilt.facts().challenger_sha256.clone(),
            incumbent: rebuilt.facts().incumbent.clone(),
            ln_wealth: rebuilt.ln_wealth(),
            bar: rebuilt.bar(),
            steps: rebuilt.steps(),
        }),
        (State::Open | State::Promoted, decision) => not_passed(reason(&rebuilt, &decision)),
        (state, _) => not_passed(format!("it was closed as {}", state.as_str())),
    }
}

fn check_settings(trial: &Trial, settings: &Settings) -> Result<(), GateError> {
    let facts = trial.facts();
    if trial.settings() != settings || facts.terms() != settings.terms() || facts.margin != settings.margin {
        let what = "it was opened under other gate settings than those configured now";
        return Err(GateError::record(trial.id(), what));
    }
    Ok(())
}

/// Checks the number, the level and that no earlier trial tried the same pair.
fn check_budget(trial: &Trial, trials: &[TrialRow]) -> Result<(), GateError> {
    let facts = trial.facts();
    let before = spent(trials, facts.budget_year, facts.number);
    let level = facts.terms().next_level(&before)?;
    if before.trials + 1 != facts.number || before.promotions != facts.promotions {
        let what = format!(
            "it is numbered {} after {} promotions, but {} trials and {} promotions of {} stand before it",
            facts.number, facts.promotions, before.trials, before.promotions, facts.budget_year
        );
        return Err(GateError::record(trial.id(), what));
    }
    if (facts.alpha - level).abs() > TOLERANCE * level {
        return Err(GateError::record(trial.id(), format!("its level {} is not the budget's {level}", facts.alpha)));
    }
    let place = (facts.budget_year, facts.number);
    let same_pair = |other: &&&TrialRow| {
        (other.facts.budget_year, other.facts.number) <= place
            && other.facts.trial != facts.trial
            && other.facts.challenger_sha256 == facts.challenger_sha256
            && (other.facts.incumbent_sha256 == facts.incumbent_sha256 || other.state != State::Void)
    };
    match last_rows(trials).iter().find(same_pair) {
        None => Ok(()),
        Some(other) => Err(GateError::AlreadyTried {
            challenger: facts.challenger.clone(),
            trial: other.facts.trial.clone(),
            state: other.state.as_str(),
        }),
    }
}

/// Checks that every cluster was reserved for this trial and this step, and for no other.
fn check_usage(trial: &Trial, usage: &[UsageRow]) -> Result<(), GateError> {
    let mut by_cluster: BTreeMap<&str, Vec<&UsageRow>> = BTreeMap::new();
    for row in usage {
        by_cluster.entry(&row.cluster).or_default().push(row);
    }
    for (step, observation) in (1..).zip(trial.observations()) {
        let rows = by_cluster.get(observation.cluster.as_str()).map(Vec::as_slice).unwrap_or_default();
        if let Some(other) = rows.iter().find(|row| row.trial != trial.id()) {
            return Err(GateError::Reused { cluster: observation.cluster.clone(), trial: other.trial.clone() });
        }
        if rows.len() != 1 || rows[0].step != step {
            let what = format!("cluster {} of step {step} was not reserved for that step once", observation.cluster);
            return Err(GateError::record(trial.id(), what));
        }
    }
    Ok(())
}

/// Returns the reason of a decision in words, with its numbers.
pub fn reason(trial: &Trial, decision: &Decision) -> String {
    let wealth = format!("ln wealth {:.2} of {:.2} after {} prompts", trial.ln_wealth(), trial.bar(), trial.steps());
    match decision {
        Decision::Promote => format!("{wealth}; every guardrail passes"),
        Decision::Refuse { guardrail, reason } => format!("guardrail {} fails: {reason}", guardrail.as_str()),
        Decision::Futile if trial.has_melted() => format!("{wealth}, below {}: hopeless", trial.settings().futility),
        Decision::Futile => {
            format!("{wealth}; it is shown not to gain the margin of {}: {}", trial.facts().margin, against(trial))
        }
        Decision::Expired => {
            let untold = match trial.decide() {
                Decision::Continue(Waiting::Guardrails(unsure)) => format!("; not told by {}", names(&unsure)),
                _ => String::new(),
            };
            format!("{wealth} when the last of {} nights ended{untold}", trial.settings().max_nights)
        }
        Decision::Void(why) | Decision::Reject(why) => why.clone(),
        Decision::Continue(Waiting::Evidence) => format!("{wealth}; more prompts are needed: {}", outlook(trial)),
        Decision::Continue(Waiting::Guardrails(unsure)) => format!("{wealth}; not yet told by {}", names(unsure)),
        Decision::Continue(Waiting::Nights) => {
            let nights = trial.settings().min_nights;
            format!("{wealth}; every guardrail passes; it is to be judged on {nights} nights (gate.min_nights)")
        }
    }
}

fn names(guardrails: &[Guardrail]) -> String {
    guardrails.iter().map(|guardrail| guardrail.as_str()).collect::<Vec<_>>().join(", ")
}

/// Says how much the bet against the challenger has made.
fn against(trial: &Trial) -> String {
    format!("the bet against it made {:.3e} of {:.0}", trial.ln_against().exp(), trial.bar_against().exp())
}

/// A trial's outcome as the round's child hands it to the daemon, in a JSON file. It is a claim, not a key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    pub trial: String,
    pub number: u32,
    pub challenger: String,
    pub challenger_sha256: String,
    pub incumbent: String,
    pub state: State,
    pub guardrail: Option<String>,
    pub reason: String,
    pub nights: u32,
    pub steps: u64,
    pub mean_gain: f64,
    pub ln_wealth: f64,
    pub bar: f64,
    pub alpha: f64,
    /// The logarithm of what the bet against the challenger made, and of what drops it.
    #[serde(default)]
    pub ln_against: f64,
    #[serde(default)]
    pub bar_against: f64,
    /// The share of the gate's traffic that the judged prompts stand for.
    #[serde(default)]
    pub traffic_share: Option<f64>,
    pub findings: Vec<Finding>,
}

impl Verdict {
    /// Returns the verdict that a decision makes of a trial.
    pub fn new(trial: &Trial, decision: &Decision) -> Verdict {
        let facts = trial.facts();
        let guardrail = match decision {
            Decision::Refuse { guardrail, .. } => Some(guardrail.as_str().to_string()),
            _ => None,
        };
        Verdict {
            trial: facts.trial.clone(),
            number: facts.number,
            challenger: facts.challenger.clone(),
            challenger_sha256: facts.challenger_sha256.clone(),
            incumbent: facts.incumbent.clone(),
            state: decision.state(),
            guardrail,
            reason: reason(trial, decision),
            nights: trial.nights(),
            steps: trial.steps(),
            mean_gain: trial.mean_gain(),
            ln_wealth: trial.ln_wealth(),
            bar: trial.bar(),
            alpha: facts.alpha,
            ln_against: trial.ln_against(),
            bar_against: trial.bar_against(),
            traffic_share: trial.traffic_share(),
            findings: trial.findings(),
        }
    }

    /// Returns the process's exit code: 0 promoted, 2 refused, 3 still open.
    pub fn exit_code(&self) -> u8 {
        match self.state {
            State::Promoted => 0,
            State::Open => 3,
            State::Refused | State::Futile | State::Expired | State::Void => 2,
        }
    }
}

/// Returns a verdict in plain words, several lines.
pub fn explain(verdict: &Verdict) -> String {
    let outcome = match verdict.state {
        State::Promoted => "is promoted",
        State::Open => "stays in trial",
        State::Refused if verdict.guardrail.is_none() => "is refused by a person",
        State::Refused => "is refused by a guardrail",
        State::Futile => "is dropped: the evidence speaks against it",
        State::Expired => "is dropped: its nights are over",
        State::Void => "is out: the trial became void",
    };
    let mut lines = vec![
        format!("{} against {} {outcome}.", verdict.challenger, verdict.incumbent),
        format!("  reason: {}", verdict.reason),
        format!(
            "  evidence: mean gain {:+.3} on {} fresh prompts in {} night(s); wealth {:.3e}, needed {:.0} \
             (trial {} of the year, level {:.2e})",
            verdict.mean_gain,
            verdict.steps,
            verdict.nights,
            verdict.ln_wealth.exp(),
            verdict.bar.exp(),
            verdict.number,
            verdict.alpha
        ),
    ];
    let (made, enough) = (verdict.ln_against.exp(), verdict.bar_against.exp());
    lines.push(format!("  against it: the bet that it does not gain the margin made {made:.3e}; {enough:.0} drops it"));
    if let Some(share) = verdict.traffic_share {
        lines.push(format!("  traffic: the prompts stand for {:.1} % of the gate's logged calls", 100.0 * share));
    }
    for finding in &verdict.findings {
        let outcome = match finding.outcome {
            Outcome::Pass => "pass",
            Outcome::NotYet => "not yet",
            Outcome::Fail => "FAIL",
        };
        lines.push(format!("  guardrail {}: {outcome} ({})", finding.guardrail.as_str(), finding.reason));
    }
    lines.join("\n")
}

#[cfg(test)]
#[path = "verdict_tests.rs"]
pub(crate) mod tests;
