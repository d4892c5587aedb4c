//! The judging half of a night: drives one trial of the gate, and stores everything before it counts.
//!
//! The gate itself is pure; this file draws both sides' answers, scores them, and writes rows in an order that lets no
//! crash give a second chance: the trial's row before the night's order, the order and the block's reservation before
//! the first score, the steps before the decision. A resumed night recomputes the trial from its rows and goes on.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use chrono::{Datelike, Utc};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{Control, Night, Outcome, RoundError, StageReport, book, judging, suites, synthetic};
use crate::crash;
use crate::dataset::{Dataset, Prompt};
use crate::durable;
use crate::engine::Adapter;
use crate::gate::history::open_trial;
use crate::gate::{
    self, Block, Conditions, Decision, GateError, Guardrail, LengthBounds, Opening, StepRow, Trial, TrialRow, UsageRow,
    Waiting,
};
use crate::progress::{Ask, Step};
use crate::rewards::Workload;
use crate::rewards::rules::{Kind, Unit};
use crate::table::Name;

/// Which night of which trial a round is: written before the night begins, so that a resumed round begins no second one.
#[derive(Debug, Serialize, Deserialize)]
struct Tonight {
    trial: String,
    nights_before: u32,
    /// Gate prompts that this night does not judge.
    left_out: LeftOut,
}

/// Counts by reason.
type LeftOut = BTreeMap<String, u64>;

/// Returns the trial that is open, if one is.
pub(super) fn open_one(night: &mut Night<'_>) -> Result<Option<Trial>, RoundError> {
    let rows = trial_rows(night)?;
    let steps: Vec<StepRow> = read(night, Name::GateSteps)?;
    Ok(open_trial(&rows).map(|row| Trial::resume(&row.facts.trial, &rows, &steps)).transpose()?)
}

/// Returns why no challenger can be tried any more this year, or `None` where one can.
pub(super) fn budget_spent(night: &Night<'_>) -> Result<Option<String>, RoundError> {
    let spent = gate::rows::spent(&trial_rows(night)?, Utc::now().year(), u32::MAX);
    Ok(night.config.gate.terms().next_level(&spent).err().map(|error| error.to_string()))
}

/// Returns why there are too few gate prompts for a trial, or `None` where there are enough: then nothing is trained.
pub(super) fn too_few_prompts(night: &mut Night<'_>, dataset: &Dataset) -> Result<Option<String>, RoundError> {
    if synthetic::shortfall(night, dataset).is_some() {
        // There is nothing to train on either, which training says.
        return Ok(None);
    }
    let (fresh, left_out) = fresh_prompts(night, None, dataset)?;
    let seen: Vec<i64> = dataset.gate.prompts().iter().map(|prompt| prompt.event_time_us).collect();
    Ok(gate::forecast::shortage(fresh.len(), gate::forecast::nightly(&seen), &left_out, &night.config.gate))
}

/// Opens the trial of a newly registered adapter against the one being served, or returns the one this round opened.
pub(super) fn open(night: &mut Night<'_>, challenger: &str, dataset: &Dataset) -> Result<Trial, RoundError> {
    let rows = trial_rows(night)?;
    if let Some(mine) = rows.iter().find(|row| row.facts.challenger == challenger) {
        let steps: Vec<StepRow> = read(night, Name::GateSteps)?;
        return Ok(Trial::resume(&mine.facts.trial, &rows, &steps)?);
    }
    let incumbent = match night.plan.control {
        Some(Control::SameAdapter) => challenger.to_string(),
        _ => night.registry.current()?.version,
    };
    let used: Vec<UsageRow> = read(night, Name::GateUsage)?;
    let opening = Opening {
        budget_year: Utc::now().year(),
        challenger_sha256: weights_hash(night, challenger)?,
        incumbent_sha256: weights_hash(night, &incumbent)?,
        challenger: challenger.to_string(),
        incumbent,
        scorer_epoch: night.rewards.gate_identity(),
        decoding: decoding(night)?,
        suites: suites::named(night, dataset, &used)?,
        lengths: night.config.workload.iter().filter_map(|w| Some((w.name.clone(), length_bounds(w)?))).collect(),
        seed: night.plan.seed,
    };
    let trial = night.runtime.block_on(book::open_trial(&night.tables, &opening, &night.config.gate))?;
    crash::at("gate-opened");
    Ok(trial)
}

/// Extends a trial with the night's fresh gate clusters until it is decided or they are used up.
pub(super) fn extend(night: &mut Night<'_>, mut trial: Trial, dataset: &Dataset) -> Result<Outcome, RoundError> {
    let started = Instant::now();
    if let Some(ended) = ended(night, &trial)? {
        return Ok(ended);
    }
    if let Some(void) = void_reason(night, &trial)? {
        return close(night, &mut trial, Decision::Void(void));
    }
    match trial.decide() {
        Decision::Continue(_) => {}
        // Decided on an earlier night and not carried out, because the endpoint was down then: no fresh prompt is needed.
        decision => return close(night, &mut trial, decision),
    }
    let (prompts, left_out) = fresh_prompts(night, Some(trial.id()), dataset)?;
    if trial.nights() == 0 && prompts.is_empty() {
        // The trial before it ended tonight and has used up the night: its own first night comes with its first prompts.
        return close(night, &mut trial, Decision::Continue(Waiting::Evidence));
    }
    let all_traffic = dataset.gate.prompts().iter().map(|prompt| prompt.count).sum();
    if !begin_night(night, &mut trial, &prompts, (left_out, all_traffic))? {
        let decision = trial.end_night();
        return close(night, &mut trial, decision);
    }
    crash::at("gate-night");
    let sides = judging::Sides {
        challenger: load_side(night, &trial.facts().challenger)?,
        incumbent: load_side(night, &trial.facts().incumbent)?,
    };
    let mut tokens = suites::judge(night, &mut trial, dataset, &sides)?;
    crash::at("gate-suites");
    let left = trial.next_block().map_or(0, |_| prompts.len() as u64);
    let progress = night.progress.clone();
    let mut step = progress.step(format!("gate {}", trial.id()), left, "prompts");
    let mut judged = 0;
    while let Some(block) = trial.next_block() {
        // The budget is training's; a trial ends with its prompts, and is only ever put off.
        if night.progress.asks() == Ask::Pause {
            return Err(RoundError::Paused { round: night.plan.round.clone() });
        }
        if let Some(void) = reserve(night, &trial, &block)? {
            return finish(night, &mut trial, Decision::Void(void), step, (judged, tokens, started));
        }
        crash::at("gate-reserved");
        // On more than gate.kl_prompts only while they are what is waited for: too few may never suffice.
        let kl_prompts = match trial.decide() {
            Decision::Continue(Waiting::Guardrails(unsure))
                if unsure.iter().any(|of| matches!(of, Guardrail::Kl | Guardrail::KlRound)) =>
            {
                u32::MAX
            }
            _ => night.config.gate.kl_prompts,
        };
        let batch = judging::Batch::of_block(&block, &prompts, kl_prompts);
        let (observations, drawn) = judging::play(night, &trial, &batch, &sides)?;
        crash::at("gate-answered");
        let rows = trial.absorb(observations)?;
        tokens += drawn;
        judged += rows.len() as u64;
        store_steps(night, trial.id(), rows)?;
        crash::at("gate-block");
        step.advance(block.clusters.len() as u64, format!("ln W {:.2} of {:.2}", trial.ln_wealth(), trial.bar()));
        match trial.decide() {
            Decision::Continue(_) => {}
            decision => return finish(night, &mut trial, decision, step, (judged, tokens, started)),
        }
    }
    let decision = trial.end_night();
    finish(night, &mut trial, decision, step, (judged, tokens, started))
}

fn finish(
    night: &mut Night<'_>,
    trial: &mut Trial,
    decision: Decision,
    step: Step,
    (judged, tokens, started): (u64, u64, Instant),
) -> Result<Outcome, RoundError> {
    drop(step);
    night.report(StageReport::new(format!("gate {}", trial.facts().number), judged, tokens, started))?;
    close(night, trial, decision)
}

/// Stores what follows from a decision and returns the night's outcome. A promotion stays open in the table: the daemon
/// closes it when the endpoint serves the adapter.
fn close(night: &mut Night<'_>, trial: &mut Trial, decision: Decision) -> Result<Outcome, RoundError> {
    let verdict = gate::Verdict::new(trial, &decision);
    durable::write_json(&night.folder.join("gate-verdict.json"), &verdict)?;
    let (id, challenger, reason) = (verdict.trial.clone(), verdict.challenger.clone(), verdict.reason.clone());
    match decision {
        Decision::Promote => Ok(Outcome::Promote { trial: id, challenger, reason }),
        Decision::Continue(Waiting::Evidence | Waiting::Guardrails(_) | Waiting::Nights) => {
            Ok(Outcome::Open { trial: id, challenger, reason })
        }
        Decision::Refuse { .. } | Decision::Reject(_) | Decision::Futile | Decision::Expired | Decision::Void(_) => {
            if let Some(row) = trial.close(&decision, now_us()) {
                store_trial(night, &row)?;
            }
            Ok(Outcome::Refused { trial: id, challenger, reason })
        }
    }
}

/// Returns the outcome of a trial that was closed before the round was killed, or `None` where it is open.
fn ended(night: &Night<'_>, trial: &Trial) -> Result<Option<Outcome>, RoundError> {
    if trial.state() == gate::State::Open {
        return Ok(None);
    }
    let of_trial = |row: &&TrialRow| row.facts.trial == trial.id() && row.state == trial.state();
    let reason = trial_rows(night)?.iter().find(of_trial).map(|row| row.reason.clone()).unwrap_or_default();
    let (trial_id, challenger) = (trial.id().to_string(), trial.facts().challenger.clone());
    Ok(Some(match trial.state() {
        gate::State::Promoted => Outcome::Promote { trial: trial_id, challenger, reason },
        _ => Outcome::Refused { trial: trial_id, challenger, reason },
    }))
}

/// Returns true where a prompt of so many tokens fits the model and its cache with an answer.
pub(super) fn fits(night: &Night<'_>, tokens: usize) -> bool {
    let (new, limits) = (night.config.decoding.max_tokens, night.config.candidates.limits());
    tokens + new <= night.model.config().max_positions && limits.check(night.model, tokens, new).is_ok()
}

/// Returns the gate prompts no other trial has used, one for each cluster, that can be judged: covered by rules and short
/// enough. Counts the others by reason.
fn fresh_prompts(
    night: &mut Night<'_>,
    trial: Option<&str>,
    dataset: &Dataset,
) -> Result<(BTreeMap<String, Prompt>, LeftOut), RoundError> {
    let usage: Vec<UsageRow> = read(night, Name::GateUsage)?;
    let others = |row: &&UsageRow| Some(row.trial.as_str()) != trial;
    let spent: BTreeSet<String> = usage.iter().filter(others).map(|row| row.cluster.clone()).collect();
    let (mut fresh, mut left_out) = (BTreeMap::new(), LeftOut::new());
    for prompt in dataset.gate.prompts() {
        let reason = if spent.contains(&prompt.cluster) {
            Some("used")
        } else if !night.rewards.covers(prompt.workload.as_deref()) {
            Some("no_rules")
        } else {
            match night.model.readable_ids(&prompt.messages, prompt.tools.as_ref())? {
                None => Some("unreadable"),
                Some(ids) if !fits(night, ids.len()) => Some("too_long"),
                Some(_) => None,
            }
        };
        match reason {
            Some(reason) => *left_out.entry(reason.to_string()).or_default() += 1,
            None => drop(fresh.entry(prompt.cluster.clone()).or_insert_with(|| prompt.clone())),
        }
    }
    Ok((fresh, left_out))
}

/// Begins the trial's next night, unless this round did already; returns false where no night is left.
fn begin_night(
    night: &mut Night<'_>,
    trial: &mut Trial,
    prompts: &BTreeMap<String, Prompt>,
    (left_out, all_traffic): (LeftOut, u64),
) -> Result<bool, RoundError> {
    let path = night.folder.join(format!("tonight-{}.json", trial.id()));
    let tonight = match durable::read_json::<Tonight>(&path) {
        Ok(tonight) => tonight,
        Err(error) if error.is_not_found() => {
            let tonight = Tonight { trial: trial.id().to_string(), nights_before: trial.nights(), left_out };
            durable::write_json(&path, &tonight)?;
            tonight
        }
        Err(error) => return Err(error.into()),
    };
    if trial.nights() > tonight.nights_before {
        return Ok(true);
    }
    // A night that was stopped for good may have been the last.
    if trial.nights() >= trial.settings().max_nights {
        return Ok(false);
    }
    // What is reserved is used up, judged or not: a night that was stopped for good may have left a block between the two.
    let usage: Vec<UsageRow> = read(night, Name::GateUsage)?;
    let used: BTreeSet<&str> = usage.iter().map(|row| row.cluster.as_str()).collect();
    let fresh = prompts.keys().filter(|cluster| !used.contains(cluster.as_str())).cloned().collect();
    let row = trial.begin_night(fresh, all_traffic, now_us())?;
    store_trial(night, &row)?;
    Ok(true)
}

/// Reserves a block's clusters; returns why the trial is void where one of them has been judged in another trial.
fn reserve(night: &Night<'_>, trial: &Trial, block: &Block) -> Result<Option<String>, RoundError> {
    match night.runtime.block_on(book::reserve(&night.tables, &block.usage(trial.id()))) {
        Err(RoundError::Gate(error @ GateError::Reused { .. })) => {
            Ok(Some(format!("{error}; another daemon judges on the same tables, stop one of the two")))
        }
        reserved => reserved.map(|()| None),
    }
}

fn store_steps(night: &Night<'_>, trial: &str, rows: Vec<StepRow>) -> Result<(), RoundError> {
    night.runtime.block_on(book::store_steps(&night.tables, trial, rows))
}

/// Stores the rows of a suite.
pub(super) fn store_suite(
    night: &Night<'_>,
    trial: &str,
    suite: gate::Suite,
    rows: Vec<StepRow>,
) -> Result<(), RoundError> {
    let rows: Vec<_> = rows.into_iter().map(book::stored).collect();
    night.append_once(Name::GateSteps, &format!("taod/gate_steps/{trial}/{}", suite.as_str()), &rows)
}

fn store_trial(night: &Night<'_>, row: &TrialRow) -> Result<(), RoundError> {
    night.runtime.block_on(book::store_trial(&night.tables, row))
}

fn trial_rows(night: &Night<'_>) -> Result<Vec<TrialRow>, RoundError> {
    read(night, Name::Trials)
}

fn read<T: serde::de::DeserializeOwned>(night: &Night<'_>, name: Name) -> Result<Vec<T>, RoundError> {
    Ok(night.runtime.block_on(book::read(&night.tables, name))?)
}

fn void_reason(night: &Night<'_>, trial: &Trial) -> Result<Option<String>, RoundError> {
    // The control that tries an adapter against itself never makes it the served one.
    let served = match night.plan.control {
        Some(Control::SameAdapter) => trial.facts().challenger.clone(),
        _ => night.registry.current()?.version,
    };
    let incumbent_sha256 = weights_hash(night, &served)?;
    let (scorer_epoch, decoding) = (night.rewards.gate_identity(), decoding(night)?);
    let today = Conditions {
        incumbent_sha256: &incumbent_sha256,
        scorer_epoch: &scorer_epoch,
        decoding: &decoding,
        settings: &night.config.gate,
    };
    Ok(trial.void_reason(&today))
}

/// Returns the bounds that a workload's own rules set on the length or the ending of an answer; they stand in for the
/// general ratio, which would refuse an adapter for doing what the rules ask.
fn length_bounds(workload: &Workload) -> Option<LengthBounds> {
    let mut bounds = LengthBounds::default();
    let mut bound = false;
    for rule in workload.rules.iter().filter(|rule| rule.hard) {
        match &rule.kind {
            Kind::Length { unit: Unit::Words, min, max } => {
                bounds.min_words = min.map(|n| n as f64).or(bounds.min_words);
                bounds.max_words = max.map(|n| n as f64).or(bounds.max_words);
                bound |= max.is_some();
            }
            Kind::Length { unit: Unit::Characters, min, max } => {
                bounds.min_chars = min.map(|n| n as f64).or(bounds.min_chars);
                bounds.max_chars = max.map(|n| n as f64).or(bounds.max_chars);
                bound |= max.is_some();
            }
            Kind::Length { unit: Unit::Sentences | Unit::Lines, max, .. } => bound |= max.is_some(),
            Kind::Ended { .. } | Kind::EndsWith { .. } | Kind::Bullets { .. } => bound = true,
            _ => {}
        }
    }
    bound.then_some(bounds)
}

/// Returns the identity of all that shapes an answer besides the adapter, and of the questions that are always asked.
fn decoding(night: &Night<'_>) -> Result<String, RoundError> {
    let base = night.model.identity();
    let version = env!("CARGO_PKG_VERSION");
    let mut identity = json!({ "engine": version, "base": base, "decoding": night.config.decoding });
    for (name, hash) in suites::hashes(night)? {
        identity[name] = json!(hash);
    }
    Ok(identity.to_string())
}

fn weights_hash(night: &Night<'_>, version: &str) -> Result<String, RoundError> {
    match version {
        "base" => Ok(night.model.identity().sha256.clone()),
        version => Ok(night.registry.manifest(version)?.sha256),
    }
}

fn load_side(night: &Night<'_>, version: &str) -> Result<(String, Option<Adapter>), RoundError> {
    let adapter = match version {
        "base" => None,
        version => {
            night.registry.verify(version)?;
            Some(Adapter::load(&night.registry.path(version), night.model)?)
        }
    };
    Ok((version.to_string(), adapter))
}

pub(super) fn now_us() -> i64 {
    Utc::now().timestamp_micros()
}
