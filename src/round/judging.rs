//! What a block of a trial is judged on: both sides' answers, their scores, and how far the challenger has moved.

use std::collections::BTreeMap;

use super::formats::formats;
use super::rows::{Place, candidate_row};
use super::train::item;
use super::{Night, RoundError};
use crate::candidates::{self, Candidate, Draw, Formats, Stream};
use crate::dataset::Prompt;
use crate::engine::{Adapter, Policy, SamplingSettings, ScoreItem, WeightForm, divergence};
use crate::gate::{Behaviour, Block, Kl, Observation, Side, Trial};
use crate::progress::{Progress, Step};
use crate::record::{derive_seed, last_user_text};
use crate::rewards::{Item, Scored};
use crate::table::Name;

/// The two sides of a trial, loaded.
pub(super) struct Sides {
    pub challenger: (String, Option<Adapter>),
    pub incumbent: (String, Option<Adapter>),
}

/// Some prompts that are judged and stored together.
pub(super) struct Batch<'a> {
    /// Under which their answers are stored; a name of its own in the trial.
    pub name: String,
    pub prompts: Vec<&'a Prompt>,
    /// Of how many of them, from the first, the divergences are measured.
    pub divergences: usize,
}

impl<'a> Batch<'a> {
    /// Returns the batch of a block. Divergences are measured on as many first prompts of a trial as the gate asks.
    pub(super) fn of_block(block: &Block, prompts: &'a BTreeMap<String, Prompt>, kl_prompts: u32) -> Batch<'a> {
        let prompts: Vec<&Prompt> = block.clusters.iter().filter_map(|cluster| prompts.get(cluster)).collect();
        let divergences = u64::from(kl_prompts).saturating_sub(block.first_step - 1).min(prompts.len() as u64) as usize;
        Batch { name: block.first_step.to_string(), prompts, divergences }
    }
}

/// Draws and scores both sides' answers; returns what was measured and how many tokens were drawn.
pub(super) fn play(
    night: &Night<'_>,
    trial: &Trial,
    batch: &Batch<'_>,
    sides: &Sides,
) -> Result<(Vec<Observation>, u64), RoundError> {
    let prompts = &batch.prompts;
    let drawn = draw(night, trial, sides, prompts)?;
    let [new, old] = judge(night, prompts, drawn)?;
    let kl = divergences(night, trial, batch, sides)?;
    let tokens = new.iter().chain(&old).flat_map(|a| &a.drawn).map(|c| c.token_ids.len() as u64).sum();
    store_answers(night, trial, &batch.name, &[("new", &new), ("incumbent", &old)])?;
    let observations = prompts.iter().enumerate().map(|(i, prompt)| Observation {
        cluster: prompt.cluster.clone(),
        prompt_hash: prompt.prompt_hash.clone(),
        workload: prompt.workload.clone(),
        traffic: prompt.count,
        tenant: prompt.tenant.clone(),
        language: language(prompt),
        question_chars: Some(last_user_text(&prompt.messages).chars().count() as f64),
        new: new[i].side(prompt),
        incumbent: old[i].side(prompt),
        kl: kl[i].base,
        kl_round: kl[i].incumbent,
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
    fn side(&self, prompt: &Prompt) -> Side {
        let tools = tool_names(prompt);
        let n = self.drawn.len().max(1) as f64;
        let mean = |values: &mut dyn Iterator<Item = f64>| values.sum::<f64>() / n;
        Side {
            score: mean(&mut self.scored.iter().map(|s| s.total)),
            words: mean(&mut self.drawn.iter().map(|c| c.text.split_whitespace().count() as f64)),
            chars: mean(&mut self.drawn.iter().map(|c| c.text.chars().count() as f64)),
            quality: Some(mean(&mut self.quality.iter().copied())),
            similarity: None,
            tokens: Some(mean(&mut self.drawn.iter().map(|c| c.token_ids.len() as f64))),
            behaviour: Behaviour::mean(self.drawn.iter().map(|c| Behaviour::of(&c.text, &tools))),
        }
    }
}

/// Returns the language of a prompt's question, or `None` where its text is too short to tell.
fn language(prompt: &Prompt) -> Option<String> {
    let found = whatlang::detect(&last_user_text(&prompt.messages))?;
    found.is_reliable().then(|| found.lang().code().to_string())
}

/// Returns the names of the functions that a prompt offers.
fn tool_names(prompt: &Prompt) -> Vec<String> {
    let tools = prompt.tools.as_ref().and_then(|tools| tools.as_array()).into_iter().flatten();
    let name = |tool: &crate::json::Value| Some(tool.get("function")?.get("name")?.as_str()?.to_string());
    tools.filter_map(name).collect()
}

/// Draws both sides' answers in production's decoding, each from a stream of its own, in one batch.
pub(super) fn draw(
    night: &Night<'_>,
    trial: &Trial,
    sides: &Sides,
    prompts: &[&Prompt],
) -> Result<[Vec<Vec<Candidate>>; 2], RoundError> {
    let seed = derive_seed(night.config.round.seed, &["gate"]);
    let names = ["new", "incumbent"].map(|side| format!("gate/{}/{side}", trial.id()));
    let how = Draw {
        samples: night.config.gate.samples as usize,
        sampling: night.config.decoding.sampling(),
        limits: night.config.candidates.limits(),
        strategies: Vec::new(),
        formats: formats(&night.config.workload, night.model, night.config.decoding.follow_json_rules)?,
    };
    let policy = |adapter: &Option<Adapter>| Policy::new(night.model, adapter.as_ref(), WeightForm::F32);
    let (new, old) = (&sides.challenger, &sides.incumbent);
    let policies = [policy(&new.1)?, policy(&old.1)?];
    let stream = |name, sampler| Stream { seed, name, sampler };
    let both = [(&policies[0], stream(&names[0], &new.0)), (&policies[1], stream(&names[1], &old.0))];
    let mut drawn = candidates::draw_sides(&both, prompts, &how, &mut silent())?.into_iter();
    Ok([drawn.next().unwrap_or_default(), drawn.next().unwrap_or_default()])
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

/// How far the challenger lies from the base and from the incumbent on one prompt.
#[derive(Debug, Clone, Copy, Default)]
struct Drift {
    base: Option<Kl>,
    incumbent: Option<Kl>,
}

/// Measures KL(new || base) and KL(new || incumbent) on the same fresh temperature-1 samples of the challenger, for as many
/// prompts as the gate asks.
fn divergences(night: &Night<'_>, trial: &Trial, batch: &Batch<'_>, sides: &Sides) -> Result<Vec<Drift>, RoundError> {
    let wanted = &batch.prompts[..batch.divergences];
    if wanted.is_empty() {
        return Ok(vec![Drift::default(); batch.prompts.len()]);
    }
    let (sampler, adapter) = &sides.challenger;
    let name = format!("gate/{}/kl", trial.id());
    let stream = Stream { seed: derive_seed(night.config.round.seed, &["gate"]), name: &name, sampler };
    let production = night.config.decoding.sampling();
    let own = SamplingSettings::default();
    let sampling = SamplingSettings { max_tokens: production.max_tokens, stop: production.stop, ..own };
    let how = Draw {
        samples: 1,
        sampling,
        limits: night.config.candidates.limits(),
        strategies: Vec::new(),
        formats: Formats::new(),
    };
    let policy = Policy::new(night.model, adapter.as_ref(), WeightForm::F32)?;
    let drawn = candidates::draw(&policy, wanted, &how, stream, &mut silent())?;
    let answers: Vec<&Candidate> = drawn.iter().flatten().collect();
    let items: Vec<ScoreItem<'_>> =
        answers.iter().map(|c| ScoreItem { prompt: &c.prompt_ids, completion: &c.token_ids }).collect();
    let token_limit = night.config.gate.guardrails.kl_token_limit;
    let against = |other: Option<&Adapter>| -> Result<Vec<Option<Kl>>, RoundError> {
        let mut per_answer = divergence(night.model, adapter.as_ref(), other, &items)?.into_iter();
        let of = |group: &Vec<Candidate>| {
            group.first().and_then(|_| per_answer.next()).and_then(|kl| Kl::of(&kl, token_limit))
        };
        Ok(drawn.iter().map(of).collect())
    };
    let base = against(None)?;
    let incumbent = match &sides.incumbent.1 {
        None => base.clone(),
        Some(adapter) => against(Some(adapter))?,
    };
    let both = base.into_iter().zip(incumbent).map(|(base, incumbent)| Drift { base, incumbent });
    let mut drift: Vec<Drift> = both.collect();
    drift.resize(batch.prompts.len(), Drift::default());
    Ok(drift)
}

fn store_answers(
    night: &Night<'_>,
    trial: &Trial,
    batch: &str,
    sides: &[(&str, &[Answers])],
) -> Result<(), RoundError> {
    let stamps = night.rewards.stamps();
    let mut rows = Vec::new();
    for (side, answers) in sides {
        let place = Place::Trial { trial: trial.id(), side };
        for a in answers.iter() {
            let row = |(c, s): (&Candidate, &Scored)| candidate_row(place, c, (s.total, s.passed, &s.parts), &stamps);
            rows.extend(a.drawn.iter().zip(&a.scored).map(row));
        }
    }
    night.append_once(Name::Candidates, &format!("taod/candidates/{}/{batch}", trial.id()), &rows)
}
