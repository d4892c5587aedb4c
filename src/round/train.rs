//! The training half of a round: candidates, rewards and an adapter, in `tuning.iterations` passes.
//!
//! The first pass samples from the base; each further one samples from the adapter of the one before and continues it
//! with its optimizer. Only the last is registered. Every stage is skipped where its manifest already stands.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::formats::formats;
use super::rows::{Place, TuningRow, candidate_row};
use super::{Control, Night, RoundError, StageReport, synthetic};
use crate::adapter::{self, Sample, TuneError};
use crate::candidates::{self, Candidate, Stream};
use crate::crash;
use crate::dataset::{Dataset, Feedback, Prompt};
use crate::durable;
use crate::engine::Adapter;
use crate::progress::Ask;
use crate::record::derive_seed;
use crate::registry::OffsetRange;
use crate::rewards::{Item, Rated, Scored};
use crate::table::Name;

/// What training came to.
#[derive(Debug)]
pub(super) enum Trained {
    /// A PEFT folder to be registered.
    Adapter(PathBuf),
    /// Nothing to train on; the round ends without an adapter.
    Nothing { reason: String },
    /// Training diverged or collapsed; the round ends without an adapter.
    GivenUp { reason: String },
}

/// The rewards of one candidate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Score {
    pub prompt_hash: String,
    pub sample: usize,
    pub total: f64,
    pub passed: bool,
    pub parts: BTreeMap<String, f64>,
}

/// What stands in the folder of a complete reward stage.
#[derive(Debug, Serialize, Deserialize)]
struct ScoreManifest {
    rewards: String,
    /// Version and identity of each scorer, by the name under which its scores stand.
    #[serde(default)]
    scorers: BTreeMap<String, String>,
    candidates: usize,
    passed: usize,
    mean: f64,
    sha256: String,
}

/// Runs all passes of training on the dataset's train split.
pub(super) fn train(night: &mut Night<'_>, dataset: &Dataset) -> Result<Trained, RoundError> {
    if let Some(reason) = synthetic::shortfall(night, dataset) {
        return Ok(Trained::Nothing { reason });
    }
    let barred = barred(night)?;
    let rewards = night.rewards;
    let usable = |p: &Prompt| {
        let first = &p.first_seen;
        let in_window = barred.iter().any(|range| range.holds(&first.topic, first.partition, first.offset));
        !in_window && rewards.covers(p.workload.as_deref())
    };
    let split = synthetic::extend(night, dataset, &usable)?;
    let made = split.iter().filter(|prompt| prompt.is_synthetic()).count() as u64;
    if let Some(reason) = dataset.manifest.shortfall(made) {
        return Ok(Trained::Nothing { reason });
    }
    let prompts: Vec<&Prompt> = split.iter().filter(|prompt| usable(prompt)).collect();
    if prompts.is_empty() {
        return Ok(Trained::Nothing {
            reason: "no training prompt belongs to a workload with rules and to no barred record".to_string(),
        });
    }
    let mut previous: Option<PathBuf> = None;
    for pass in 1..=night.config.tuning.iterations {
        if pass > 1 && over(night, pass)? {
            tracing::warn!(pass, "the round's budget is spent: what the passes before have learnt is judged");
            break;
        }
        let folder = night.folder.join(format!("pass-{pass}"));
        let drawn = draw(night, &prompts, previous.as_deref(), pass, &folder)?;
        if drawn.is_empty() {
            let n = prompts.len();
            let reason = format!("none of {n} training prompts fits the model's context together with its answer");
            return Ok(Trained::Nothing { reason });
        }
        let scores = score(night, &prompts, &drawn, pass, &folder)?;
        record(night, pass, &prompts, &drawn, &scores)?;
        let samples = training_samples(&drawn, &scores, previous.is_none());
        let tuned = folder.join("adapter");
        let started = std::time::Instant::now();
        let outcome = match tune(night, &samples, previous.as_deref(), pass, &tuned) {
            Ok(outcome) => outcome,
            Err(error) if error.is_nothing_to_learn() => return Ok(Trained::Nothing { reason: error.to_string() }),
            Err(error) if error.is_given_up() => return Ok(Trained::GivenUp { reason: error.to_string() }),
            Err(error) => return Err(error.into()),
        };
        record_steps(night, pass, &outcome)?;
        night.report(StageReport::new(
            format!("adapter {pass}"),
            outcome.samples_used as u64,
            outcome.tokens as u64,
            started,
        ))?;
        crash::at(&format!("adapter-{pass}"));
        previous = Some(tuned);
    }
    match previous {
        Some(tuned) => Ok(Trained::Adapter(tuned.join("adapter"))),
        None => Ok(Trained::Nothing { reason: "tuning.iterations is 0".to_string() }),
    }
}

/// Returns true where the budget leaves no room for a further pass. A pass that was begun is gone on with: its folder stands.
fn over(night: &Night<'_>, pass: usize) -> Result<bool, RoundError> {
    match night.progress.asks() {
        Ask::GoOn => Ok(false),
        Ask::Pause => Err(RoundError::Paused { round: night.plan.round.clone() }),
        Ask::Enough => Ok(!night.folder.join(format!("pass-{pass}/candidates/manifest.json")).exists()),
    }
}

/// Returns the records that barred versions learnt from, as they were when this round first asked: a resumed round must draw
/// for the same prompts.
fn barred(night: &Night<'_>) -> Result<Vec<OffsetRange>, RoundError> {
    let path = night.folder.join("barred.json");
    match durable::read_json(&path) {
        Err(error) if error.is_not_found() => {
            let barred = night.registry.barred_records()?;
            durable::write_json(&path, &barred)?;
            Ok(barred)
        }
        stored => Ok(stored?),
    }
}

fn draw(
    night: &mut Night<'_>,
    prompts: &[&Prompt],
    previous: Option<&Path>,
    pass: usize,
    folder: &Path,
) -> Result<Vec<Candidate>, RoundError> {
    let started = std::time::Instant::now();
    let adapter = previous.map(|dir| Adapter::load(&dir.join("adapter"), night.model)).transpose()?;
    let sampler = adapter.as_ref().map_or("base".to_string(), |_| format!("{}/pass-{}", night.plan.round, pass - 1));
    let name = format!("train/{pass}");
    let stream = Stream { seed: night.plan.seed, name: &name, sampler: &sampler };
    let out = folder.join("candidates");
    let settings = &night.config.candidates;
    let formats = formats(&night.config.workload, night.model, settings.follow_json_rules)?;
    let manifest =
        candidates::sample(night.model, adapter.as_ref(), prompts, (settings, &formats), stream, &out, night.progress)?;
    night.report(StageReport::new(
        format!("candidates {pass}"),
        manifest.candidates as u64,
        manifest.tokens,
        started,
    ))?;
    crash::at(&format!("candidates-{pass}"));
    Ok(candidates::load(&out)?)
}

fn score(
    night: &mut Night<'_>,
    prompts: &[&Prompt],
    drawn: &[Candidate],
    pass: usize,
    folder: &Path,
) -> Result<Vec<Score>, RoundError> {
    let out = folder.join("rewards");
    let path = out.join("scores.jsonl");
    if out.join("manifest.json").exists() {
        return Ok(durable::read_json_lines(&path)?);
    }
    let started = std::time::Instant::now();
    durable::create_folder(&out)?;
    let by_hash: BTreeMap<&str, &Prompt> = prompts.iter().map(|p| (p.prompt_hash.as_str(), *p)).collect();
    let items: Vec<Item> = drawn.iter().filter_map(|c| Some(item(by_hash.get(c.prompt_hash.as_str())?, c))).collect();
    let scored = night.rewards.train(&items)?;
    let mut scores: Vec<Score> = drawn.iter().zip(scored).map(|(c, s)| to_score(c, s)).collect();
    if night.plan.control == Some(Control::ShuffledRewards) {
        shuffle_within_groups(&mut scores, derive_seed(night.plan.seed, &["shuffle", &pass.to_string()]));
    }
    durable::write_json_lines(&path, &scores)?;
    let manifest = ScoreManifest {
        rewards: night.rewards.identity(),
        scorers: night.rewards.stamps(),
        candidates: scores.len(),
        passed: scores.iter().filter(|s| s.passed).count(),
        mean: scores.iter().map(|s| s.total).sum::<f64>() / scores.len().max(1) as f64,
        sha256: durable::sha256_file(&path)?,
    };
    durable::write_json(&out.join("manifest.json"), &manifest)?;
    night.report(StageReport::new(format!("rewards {pass}"), scores.len() as u64, 0, started))?;
    crash::at(&format!("rewards-{pass}"));
    Ok(scores)
}

/// Returns what the scorers see of one candidate.
pub(super) fn item(prompt: &Prompt, candidate: &Candidate) -> Item {
    Item {
        workload: prompt.workload.clone(),
        messages: prompt.messages.clone(),
        response: candidate.text.clone(),
        finish_reason: candidate.finish_reason,
        prompt_ids: Some(candidate.prompt_ids.clone()),
        token_ids: Some(candidate.token_ids.clone()),
        // Gate prompts carry no rated answer: those come with prompts that train.
        ratings: prompt.feedback.iter().filter_map(rated).collect(),
    }
}

fn rated(said: &Feedback) -> Option<Rated> {
    Some(Rated { response: said.response.clone()?, score: said.rating()? })
}

fn to_score(candidate: &Candidate, scored: Scored) -> Score {
    Score {
        prompt_hash: candidate.prompt_hash.clone(),
        sample: candidate.sample,
        total: scored.total,
        passed: scored.passed,
        parts: scored.parts,
    }
}

/// Permutes the rewards among the answers of each prompt: the control whose training must not help.
fn shuffle_within_groups(scores: &mut [Score], seed: u64) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    for group in scores.chunk_by_mut(|a, b| a.prompt_hash == b.prompt_hash) {
        let mut totals: Vec<(f64, bool)> = group.iter().map(|s| (s.total, s.passed)).collect();
        totals.shuffle(&mut rng);
        for (score, (total, passed)) in group.iter_mut().zip(totals) {
            (score.total, score.passed) = (total, passed);
        }
    }
}

/// Trains one pass. Under a drift that the operator accepted, a pass that was begun under other conditions begins anew:
/// its checkpoint would refuse them.
fn tune(
    night: &Night<'_>,
    samples: &[Sample],
    start: Option<&Path>,
    pass: usize,
    out: &Path,
) -> Result<adapter::Outcome, TuneError> {
    let seed = derive_seed(night.plan.seed, &["tune", &pass.to_string()]);
    let tune = || adapter::tune(night.model, samples, start, &night.config.tuning, seed, out, night.progress);
    match tune() {
        Err(error) if night.allow_drift && error.is_other_run() => {
            tracing::warn!(pass, %error, "training this pass anew under the drift that was accepted");
            std::fs::remove_dir_all(out).map_err(|e| durable::FileError::io("cannot remove", out, e))?;
            tune()
        }
        result => result,
    }
}

fn training_samples(drawn: &[Candidate], scores: &[Score], from_base: bool) -> Vec<Sample> {
    let sample = |(c, s): (&Candidate, &Score)| Sample {
        group: c.prompt_hash.clone(),
        prompt: c.prompt_ids.clone(),
        completion: c.token_ids.clone(),
        reward: s.total,
        old_logprobs: (c.logprobs.len() == c.token_ids.len()).then(|| c.logprobs.clone()),
        // Another engine's are no base to measure drift from.
        base_logprobs: (from_base && !c.approximate && c.logprobs.len() == c.token_ids.len())
            .then(|| c.logprobs.clone()),
    };
    drawn.iter().zip(scores).filter(|(c, _)| !c.token_ids.is_empty()).map(sample).collect()
}

fn record(
    night: &Night<'_>,
    pass: usize,
    prompts: &[&Prompt],
    drawn: &[Candidate],
    scores: &[Score],
) -> Result<(), RoundError> {
    let app_id = format!("taod/candidates/{}/{pass}", night.plan.round);
    let made: BTreeSet<&str> =
        prompts.iter().filter(|prompt| prompt.is_synthetic()).map(|prompt| prompt.prompt_hash.as_str()).collect();
    let stamps = night.rewards.stamps();
    let row = |(c, s): (&Candidate, &Score)| {
        let is_synthetic = made.contains(c.prompt_hash.as_str());
        let place = Place::Training { round: &night.plan.round, pass, is_synthetic };
        candidate_row(place, c, (s.total, s.passed, &s.parts), &stamps)
    };
    let rows: Vec<_> = drawn.iter().zip(scores).map(row).collect();
    night.append_once(Name::Candidates, &app_id, &rows)
}

fn record_steps(night: &Night<'_>, pass: usize, outcome: &adapter::Outcome) -> Result<(), RoundError> {
    let (round, time) = (&night.plan.round, chrono::Utc::now());
    let row = |step| TuningRow { round, iteration: pass, time, step };
    let rows: Vec<_> = outcome.steps.iter().map(row).collect();
    night.append_once(Name::TuningSteps, &format!("taod/tuning_steps/{round}/{pass}"), &rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::FinishReason;

    #[test]
    fn an_answer_without_logprobs_says_nothing_of_the_base() {
        let of = |logprobs: Vec<f32>, approximate| {
            let drawn = Candidate {
                prompt_hash: "a".into(),
                cluster: "a".into(),
                workload: None,
                sample: 0,
                seed: 1,
                sampler: "base".into(),
                strategy: "rewritten".into(),
                text: "hi".into(),
                prompt_ids: vec![1],
                token_ids: vec![2, 3],
                sampler_logprobs: logprobs.clone(),
                logprobs,
                finish_reason: FinishReason::Stop,
                approximate,
            };
            let score = Score { prompt_hash: "a".into(), sample: 0, total: 1.0, passed: true, parts: BTreeMap::new() };
            let sample = training_samples(&[drawn], &[score], true).remove(0);
            (sample.old_logprobs, sample.base_logprobs)
        };
        assert_eq!(of(vec![], false), (None, None));
        let told = vec![-0.5, -0.25];
        assert_eq!(of(told.clone(), false), (Some(told.clone()), Some(told.clone())));
        assert_eq!(of(told.clone(), true), (Some(told), None));
    }

    #[test]
    fn shuffling_keeps_each_groups_rewards_and_moves_them() {
        let score = |group: &str, sample: usize| Score {
            prompt_hash: group.into(),
            sample,
            total: sample as f64 / 8.0,
            passed: sample > 4,
            parts: BTreeMap::new(),
        };
        let before: Vec<Score> = ["a", "b"].iter().flat_map(|g| (0..8).map(|k| score(g, k))).collect();
        let mut after = before.clone();
        shuffle_within_groups(&mut after, 3);
        assert_ne!(after, before);
        for half in [0..8, 8..16] {
            let mut totals: Vec<f64> = after[half.clone()].iter().map(|s| s.total).collect();
            totals.sort_by(f64::total_cmp);
            assert_eq!(totals, before[half].iter().map(|s| s.total).collect::<Vec<_>>());
        }
    }
}
