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

use super::book::{self, stored};
use super::rows::{Place, candidate_row};
use super::train::item;
use super::{Control, Night, Outcome, RoundError, StageReport};
use crate::candidates::{self, Candidate, Draw, Stream};
use crate::crash;
use crate::dataset::{Dataset, Prompt};
use crate::durable;
use crate::engine::{Adapter, Policy, SamplingSettings, ScoreItem, WeightForm, divergence};
use crate::gate::trial::{Block, open_trial};
use crate::gate::{
    self, Conditions, Decision, Kl, LengthBounds, Observation, Opening, Side, StepRow, Trial, TrialRow, UsageRow,
    Waiting,
};
use crate::progress::{Progress, Step};
use crate::record::derive_seed;
use crate::rewards::rules::{Kind, Unit};
use crate::rewards::{Item, Scored, Workload};
use crate::table::{Name, TxnStep};

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

/// The two sides of a trial, loaded.
struct Sides {
    challenger: (String, Option<Adapter>),
    incumbent: (String, Option<Adapter>),
}

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

/// Opens the trial of a newly registered adapter against the one being served, or returns the one this round opened.
pub(super) fn open(night: &mut Night<'_>, challenger: &str) -> Result<Trial, RoundError> {
    let rows = trial_rows(night)?;
    if let Some(mine) = rows.iter().find(|row| row.facts.challenger == challenger) {
        let steps: Vec<StepRow> = read(night, Name::GateSteps)?;
        return Ok(Trial::resume(&mine.facts.trial, &rows, &steps)?);
    }
    let incumbent = match night.plan.control {
        Some(Control::SameAdapter) => challenger.to_string(),
        _ => night.registry.current()?.version,
    };
    let opening = Opening {
        budget_year: Utc::now().year(),
        challenger_sha256: weights_hash(night, challenger)?,
        incumbent_sha256: weights_hash(night, &incumbent)?,
        challenger: challenger.to_string(),
        incumbent,
        scorer_epoch: night.rewards.gate_identity(),
        decoding: decoding(night),
        lengths: night.config.workload.iter().filter_map(|w| Some((w.name.clone(), length_bounds(w)?))).collect(),
        seed: night.plan.seed,
    };
    let trial = Trial::open(opening, &rows, &night.config.gate)?;
    store_trial(night, &trial.row(gate::State::Open, "opened", now_us()))?;
    crash::at("gate-opened");
    Ok(trial)
}

/// Extends a trial with the night's fresh gate clusters until it is decided or they are used up.
pub(super) fn extend(night: &mut Night<'_>, mut trial: Trial, dataset: &Dataset) -> Result<Outcome, RoundError> {
    let started = Instant::now();
    if let Some(void) = void_reason(night, &trial)? {
        return close(night, &mut trial, Decision::Void(void));
    }
    match trial.decide() {
        Decision::Continue(_) => {}
        // Decided on an earlier night and not carried out, because the endpoint was down then: no fresh prompt is needed.
        decision => return close(night, &mut trial, decision),
    }
    let (prompts, left_out) = fresh_prompts(night, &trial, dataset)?;
    begin_night(night, &mut trial, &prompts, left_out)?;
    crash::at("gate-night");
    let sides = Sides {
        challenger: load_side(night, &trial.facts().challenger)?,
        incumbent: load_side(night, &trial.facts().incumbent)?,
    };
    let left = trial.next_block().map_or(0, |_| prompts.len() as u64);
    let progress = night.progress.clone();
    let mut step = progress.step(format!("gate {}", trial.id()), left, "prompts");
    let (mut judged, mut tokens) = (0, 0);
    while let Some(block) = trial.next_block() {
        reserve(night, &trial, &block)?;
        crash::at("gate-reserved");
        let (observations, drawn) = play(night, &trial, &block, &prompts, &sides)?;
        crash::at("gate-answered");
        let rows = trial.absorb(&observations)?;
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
        Decision::Continue(Waiting::Evidence | Waiting::Guardrails(_)) => {
            Ok(Outcome::Open { trial: id, challenger, reason })
        }
        Decision::Refuse { .. } | Decision::Futile | Decision::Expired | Decision::Void(_) => {
            if let Some(row) = trial.close(&decision, now_us()) {
                store_trial(night, &row)?;
            }
            Ok(Outcome::Refused { trial: id, challenger, reason })
        }
    }
}

/// Returns the gate prompts no other trial has used, one for each cluster, that can be judged: covered by rules and short
/// enough. Counts the others by reason.
fn fresh_prompts(
    night: &mut Night<'_>,
    trial: &Trial,
    dataset: &Dataset,
) -> Result<(BTreeMap<String, Prompt>, LeftOut), RoundError> {
    let usage: Vec<UsageRow> = read(night, Name::GateUsage)?;
    let others = |row: &&UsageRow| row.trial != trial.id();
    let spent: BTreeSet<String> = usage.iter().filter(others).map(|row| row.cluster.clone()).collect();
    let (new, limits) = (night.config.decoding.max_tokens, night.config.candidates.limits());
    let room = night.model.config().max_positions.saturating_sub(new);
    let fits = |tokens: usize| tokens <= room && limits.check(night.model, tokens, new).is_ok();
    let (mut fresh, mut left_out) = (BTreeMap::new(), LeftOut::new());
    for prompt in dataset.gate.prompts() {
        let reason = if spent.contains(&prompt.cluster) {
            Some("used")
        } else if !night.rewards.covers(prompt.workload.as_deref()) {
            Some("no_rules")
        } else if !fits(night.model.prompt_ids(&prompt.messages, prompt.tools.as_ref())?.len()) {
            Some("too_long")
        } else {
            None
        };
        match reason {
            Some(reason) => *left_out.entry(reason.to_string()).or_default() += 1,
            None => drop(fresh.entry(prompt.cluster.clone()).or_insert_with(|| prompt.clone())),
        }
    }
    Ok((fresh, left_out))
}

fn begin_night(
    night: &mut Night<'_>,
    trial: &mut Trial,
    prompts: &BTreeMap<String, Prompt>,
    left_out: LeftOut,
) -> Result<(), RoundError> {
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
        return Ok(());
    }
    let used: BTreeSet<&str> = trial.observations().iter().map(|o| o.cluster.as_str()).collect();
    let fresh = prompts.keys().filter(|cluster| !used.contains(cluster.as_str())).cloned().collect();
    let row = trial.begin_night(fresh, now_us())?;
    store_trial(night, &row)
}

/// Draws and scores both sides' answers to a block; returns what was measured and how many tokens were drawn.
fn play(
    night: &Night<'_>,
    trial: &Trial,
    block: &Block,
    prompts: &BTreeMap<String, Prompt>,
    sides: &Sides,
) -> Result<(Vec<Observation>, u64), RoundError> {
    let block_prompts: Vec<&Prompt> = block.clusters.iter().filter_map(|cluster| prompts.get(cluster)).collect();
    let new = draw(night, trial, "new", &sides.challenger, &block_prompts)?;
    let old = draw(night, trial, "incumbent", &sides.incumbent, &block_prompts)?;
    let [new, old] = judge(night, &block_prompts, [new, old])?;
    let kl = divergences(night, trial, block, &block_prompts, &sides.challenger)?;
    let tokens = new.iter().chain(&old).flat_map(|a| &a.drawn).map(|c| c.token_ids.len() as u64).sum();
    store_answers(night, trial, block, &[("new", &new), ("incumbent", &old)])?;
    let observations = block_prompts.iter().enumerate().map(|(i, prompt)| Observation {
        cluster: prompt.cluster.clone(),
        prompt_hash: prompt.prompt_hash.clone(),
        workload: prompt.workload.clone(),
        traffic: prompt.count,
        new: new[i].side(),
        incumbent: old[i].side(),
        kl: kl[i],
    });
    Ok((observations.collect(), tokens))
}

/// One side's answers to one prompt, and what was measured on them.
struct Answers {
    drawn: Vec<Candidate>,
    scored: Vec<Scored>,
    quality: Vec<f64>,
}

impl Answers {
    fn side(&self) -> Side {
        let n = self.drawn.len().max(1) as f64;
        let mean = |values: &mut dyn Iterator<Item = f64>| values.sum::<f64>() / n;
        Side {
            score: mean(&mut self.scored.iter().map(|s| s.total)),
            words: mean(&mut self.drawn.iter().map(|c| c.text.split_whitespace().count() as f64)),
            chars: mean(&mut self.drawn.iter().map(|c| c.text.chars().count() as f64)),
            quality: Some(mean(&mut self.quality.iter().copied())),
            similarity: None,
        }
    }
}

/// Draws one side's answers in production's decoding, from a stream of its own.
fn draw(
    night: &Night<'_>,
    trial: &Trial,
    side: &str,
    (sampler, adapter): &(String, Option<Adapter>),
    prompts: &[&Prompt],
) -> Result<Vec<Vec<Candidate>>, RoundError> {
    let name = format!("gate/{}/{side}", trial.id());
    let stream = Stream { seed: derive_seed(night.config.round.seed, &["gate"]), name: &name, sampler };
    let sampling = night.config.decoding.sampling();
    let how = Draw {
        samples: night.config.gate.samples as usize,
        sampling,
        limits: night.config.candidates.limits(),
        strategies: Vec::new(),
    };
    let policy = Policy::new(night.model, adapter.as_ref(), WeightForm::F32)?;
    Ok(candidates::draw(&policy, prompts, &how, stream, &mut silent())?)
}

/// Scores both sides together, so that the quality measure reads each question once for both.
fn judge(
    night: &Night<'_>,
    prompts: &[&Prompt],
    sides: [Vec<Vec<Candidate>>; 2],
) -> Result<[Vec<Answers>; 2], RoundError> {
    let pairs = sides.iter().flat_map(|side| prompts.iter().zip(side));
    let items: Vec<Item> = pairs.flat_map(|(prompt, group)| group.iter().map(|c| item(prompt, c))).collect();
    let mut scored = night.rewards.gate(&items)?.into_iter();
    let mut quality = night.rewards.quality(&items)?.into_iter();
    let mut answers = |drawn: Vec<Candidate>| {
        let n = drawn.len();
        Answers { drawn, scored: scored.by_ref().take(n).collect(), quality: quality.by_ref().take(n).collect() }
    };
    Ok(sides.map(|side| side.into_iter().map(&mut answers).collect()))
}

/// Returns a step that nobody watches: the gate reports prompts, not tokens.
fn silent() -> Step {
    Progress::silent().step("gate answers", 0, "tokens")
}

/// Measures KL(new || base) on fresh temperature-1 samples of the challenger, for as many prompts as the gate asks.
fn divergences(
    night: &Night<'_>,
    trial: &Trial,
    block: &Block,
    prompts: &[&Prompt],
    (sampler, adapter): &(String, Option<Adapter>),
) -> Result<Vec<Option<Kl>>, RoundError> {
    let limit = u64::from(night.config.gate.kl_prompts);
    let wanted = limit.saturating_sub(block.first_step - 1).min(prompts.len() as u64) as usize;
    let name = format!("gate/{}/kl", trial.id());
    let stream = Stream { seed: derive_seed(night.config.round.seed, &["gate"]), name: &name, sampler };
    let sampling = SamplingSettings { temperature: 1.0, top_p: 1.0, top_k: 0, ..night.config.decoding.sampling() };
    let how = Draw { samples: 1, sampling, limits: night.config.candidates.limits(), strategies: Vec::new() };
    let policy = Policy::new(night.model, adapter.as_ref(), WeightForm::F32)?;
    let drawn = candidates::draw(&policy, &prompts[..wanted], &how, stream, &mut silent())?;
    let answers: Vec<&Candidate> = drawn.iter().flatten().collect();
    let items: Vec<ScoreItem<'_>> =
        answers.iter().map(|c| ScoreItem { prompt: &c.prompt_ids, completion: &c.token_ids }).collect();
    let mut per_answer = divergence(night.model, adapter.as_ref(), None, &items)?.into_iter();
    let token_limit = night.config.gate.guardrails.kl_token_limit;
    let mut kl: Vec<Option<Kl>> = drawn
        .iter()
        .map(|group| group.first().and(per_answer.next()).and_then(|per_token| Kl::of(&per_token, token_limit)))
        .collect();
    kl.resize(prompts.len(), None);
    Ok(kl)
}

fn reserve(night: &mut Night<'_>, trial: &Trial, block: &Block) -> Result<(), RoundError> {
    let known: Vec<UsageRow> = read(night, Name::GateUsage)?;
    let rows: Vec<UsageRow> = block.usage(trial.id()).into_iter().filter(|row| !known.contains(row)).collect();
    if rows.is_empty() {
        return Ok(());
    }
    const APP_ID: &str = "taod/gate_usage";
    night.runtime.block_on(async {
        let mut table = night.tables.open_one(Name::GateUsage).await?;
        let last = table.txn(APP_ID).await?;
        let step = TxnStep { app_id: APP_ID.to_string(), expect: last, set: last.unwrap_or(0) + 1 };
        let rows: Vec<_> = rows.into_iter().map(stored).collect();
        table.append_rows(&rows, &[step]).await
    })?;
    Ok(())
}

fn store_answers(
    night: &Night<'_>,
    trial: &Trial,
    block: &Block,
    sides: &[(&str, &[Answers])],
) -> Result<(), RoundError> {
    let mut rows = Vec::new();
    for (side, answers) in sides {
        let place = Place::Trial { trial: trial.id(), side };
        for a in answers.iter() {
            let row = |(c, s): (&Candidate, &Scored)| candidate_row(place, c, s.total, s.passed, &s.parts);
            rows.extend(a.drawn.iter().zip(&a.scored).map(row));
        }
    }
    night.append_once(Name::Candidates, &format!("taod/candidates/{}/{}", trial.id(), block.first_step), &rows)
}

fn store_steps(night: &Night<'_>, trial: &str, rows: Vec<StepRow>) -> Result<(), RoundError> {
    let first = rows.first().map_or(0, |row| row.step);
    let rows: Vec<_> = rows.into_iter().map(stored).collect();
    night.append_once(Name::GateSteps, &format!("taod/gate_steps/{trial}/{first}"), &rows)
}

fn store_trial(night: &Night<'_>, row: &TrialRow) -> Result<(), RoundError> {
    Ok(night.runtime.block_on(book::store_trial(&night.tables, row))?)
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
    let (scorer_epoch, decoding) = (night.rewards.gate_identity(), decoding(night));
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

/// Returns the identity of all that shapes an answer besides the adapter.
fn decoding(night: &Night<'_>) -> String {
    let base = night.model.identity();
    let version = env!("CARGO_PKG_VERSION");
    json!({ "engine": version, "base": base, "decoding": night.config.decoding }).to_string()
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
        version => Some(Adapter::load(&night.registry.path(version), night.model)?),
    };
    Ok((version.to_string(), adapter))
}

fn now_us() -> i64 {
    Utc::now().timestamp_micros()
}
