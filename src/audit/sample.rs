//! Drawing a sample: audit prompts nobody labelled yet, answered by what is served and by the base.

use std::collections::BTreeSet;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::Rng;

use super::{Answer, AuditError, Pair, SAMPLE, audited, pairs};
use crate::candidates::{self, Candidate, Draw, Stream};
use crate::config::Config;
use crate::dataset::{self, Prompt};
use crate::durable;
use crate::engine::{Adapter, Model, Policy, WeightForm};
use crate::progress::Progress;
use crate::record::derive_seed;
use crate::registry::{BASE, Registry};
use crate::rewards::{Item, Rewards, Scored};
use crate::round::{Paths, formats};

/// A sample that was drawn.
#[derive(Debug)]
pub struct Sampled {
    pub round: String,
    pub pairs: Vec<Pair>,
}

/// Draws up to `count` audit prompts of the newest round that holds any without a sample, answers each by the served version and
/// by the base (by the base twice where nothing was promoted), scores both, and stores the pairs in an order that does not tell
/// who answered.
pub fn sample(config: &Config, count: usize, progress: &Progress) -> Result<Sampled, AuditError> {
    let paths = Paths::new(&config.state.dir);
    let model = Model::load_on(&config.model.path, config.model.hold, &config.engine)?;
    let rewards = Rewards::keeping(&config.rewards, &config.workload, &model, &config.state.dir.join("scores"))?;
    let (round, prompts) = fresh(config, &paths, &model, &rewards, count)?;
    let registry = Registry::open(&paths.registry(), &config.registry)?;
    let served = registry.current()?.version;
    let adapter = match served.as_str() {
        BASE => None,
        version => {
            registry.verify(version)?;
            Some(Adapter::load(&registry.path(version), &model)?)
        }
    };
    let sides = [(served, "served", adapter.as_ref()), (BASE.to_owned(), "base", None)];
    let mut drawn = Vec::new();
    for (version, side, adapter) in &sides {
        let candidates = draw(config, &model, (&round, side, version), *adapter, &prompts, progress)?;
        drawn.push((version.as_str(), candidates));
    }
    let scored = score(&rewards, &prompts, &drawn)?;
    let scorers = rewards.gate_identity();
    let mut rng = ChaCha8Rng::seed_from_u64(derive_seed(config.round.seed, &["audit", &round, "order"]));
    let pairs: Vec<Pair> = prompts
        .iter()
        .enumerate()
        .map(|(at, prompt)| {
            let answer = |side: usize| {
                let (version, candidates) = &drawn[side];
                let Scored { total, parts, .. } = scored[side][at].clone();
                Answer { version: (*version).to_owned(), text: candidates[at].text.clone(), total, parts }
            };
            let (a, b) = if rng.next_u64() % 2 == 0 { (0, 1) } else { (1, 0) };
            Pair {
                id: format!("{round}/{at}"),
                prompt_hash: prompt.prompt_hash.clone(),
                workload: prompt.workload.clone(),
                messages: prompt.messages.clone(),
                a: answer(a),
                b: answer(b),
                scorers: scorers.clone(),
            }
        })
        .collect();
    durable::create_folder(&paths.round(&round).join("audit"))?;
    durable::write_json_lines(&paths.round(&round).join(SAMPLE), &pairs)?;
    Ok(Sampled { round, pairs })
}

/// Returns the newest round without a sample whose audit split has prompts that were in none, and those prompts by lot: one of a
/// cluster, of workloads with rules, and short enough.
fn fresh(
    config: &Config,
    paths: &Paths,
    model: &Model,
    rewards: &Rewards,
    count: usize,
) -> Result<(String, Vec<Prompt>), AuditError> {
    let before = audited(paths)?;
    let mut used: BTreeSet<String> = BTreeSet::new();
    for round in &before {
        used.extend(pairs(paths, round)?.into_iter().map(|pair| pair.prompt_hash));
    }
    let (new, limits) = (config.decoding.max_tokens, config.candidates.limits());
    let room = model.config().max_positions.saturating_sub(new);
    for round in paths.round_ids()?.into_iter().rev().filter(|round| !before.contains(round)) {
        let folder = paths.round(&round).join("dataset");
        if dataset::peek(&folder)?.is_none() {
            continue;
        }
        let mut clusters = BTreeSet::new();
        let mut prompts = Vec::new();
        for prompt in dataset::load(&folder)?.audit.prompts() {
            let tokens = model.prompt_ids(&prompt.messages, prompt.tools.as_ref())?.len();
            let fits = tokens <= room && limits.check(model, tokens, new).is_ok();
            let covered = rewards.covers(prompt.workload.as_deref());
            if fits && covered && !used.contains(&prompt.prompt_hash) && clusters.insert(prompt.cluster.clone()) {
                prompts.push(prompt.clone());
            }
        }
        if !prompts.is_empty() {
            prompts.shuffle(&mut ChaCha8Rng::seed_from_u64(derive_seed(config.round.seed, &["audit", &round])));
            prompts.truncate(count);
            return Ok((round, prompts));
        }
    }
    Err(AuditError::NoPrompts)
}

/// Draws one answer to each prompt in production's decoding.
fn draw(
    config: &Config,
    model: &Model,
    (round, side, sampler): (&str, &str, &str),
    adapter: Option<&Adapter>,
    prompts: &[Prompt],
    progress: &Progress,
) -> Result<Vec<Candidate>, AuditError> {
    let name = format!("audit/{round}/{side}");
    let stream = Stream { seed: derive_seed(config.round.seed, &["audit"]), name: &name, sampler };
    let sampling = config.decoding.sampling();
    let how = Draw {
        samples: 1,
        sampling,
        limits: config.candidates.limits(),
        strategies: Vec::new(),
        formats: formats(&config.workload, model, config.decoding.follow_json_rules)?,
    };
    let policy = Policy::new(model, adapter, WeightForm::F32)?;
    let prompts: Vec<&Prompt> = prompts.iter().collect();
    let mut step = progress.step(format!("audit answers of {sampler}"), prompts.len() as u64, "prompts");
    let drawn = candidates::draw(&policy, &prompts, &how, stream, &mut step)?;
    Ok(drawn.into_iter().flatten().collect())
}

/// Scores both sides as the gate does.
fn score(
    rewards: &Rewards,
    prompts: &[Prompt],
    drawn: &[(&str, Vec<Candidate>)],
) -> Result<Vec<Vec<Scored>>, AuditError> {
    let item = |(prompt, candidate): (&Prompt, &Candidate)| Item {
        workload: prompt.workload.clone(),
        messages: prompt.messages.clone(),
        response: candidate.text.clone(),
        finish_reason: candidate.finish_reason,
        prompt_ids: Some(candidate.prompt_ids.clone()),
        token_ids: Some(candidate.token_ids.clone()),
        ratings: Vec::new(),
    };
    let of = |(_, candidates): &(&str, Vec<Candidate>)| {
        let items: Vec<Item> = prompts.iter().zip(candidates).map(item).collect();
        Ok(rewards.gate(&items)?)
    };
    drawn.iter().map(of).collect()
}
