//! Prompts that a round makes where a workload has too few: asked for in waves, each kept whole before the next.
//!
//! What draws them is what draws candidates, from the base. What was drawn stands in the round's folder before anything is
//! decided of it, with the hashes of the prompts that were shown, so that an erasure of one finds all that came of it.

use std::collections::BTreeMap;
use std::time::Instant;

use serde_json::json;

use super::{Night, Paths, RoundError, StageReport};
use crate::candidates::{self, Candidate, Formats, Stream};
use crate::crash;
use crate::dataset::synthetic::{self, Ask, Drafts, Need};
use crate::dataset::{Dataset, Freezing, Prompt, TrainSplit, WorkloadView};
use crate::durable;
use crate::record::FinishReason;
use crate::rewards::Workload;

/// The folder of this stage in that of a round.
pub const FOLDER: &str = "synthetic";

/// Returns why there is too little to train on, however many prompts could be made.
pub(super) fn shortfall(night: &Night<'_>, dataset: &Dataset) -> Option<String> {
    let needs = synthetic::needs(&dataset.train, &night.config.dataset.synthetic, |_| true);
    dataset.manifest.shortfall(needs.iter().map(|need| need.wanted as u64).sum())
}

/// Returns the training split with the prompts that were made for it, which are made now where they were not.
pub(super) fn extend(
    night: &mut Night<'_>,
    dataset: &Dataset,
    usable: &dyn Fn(&Prompt) -> bool,
) -> Result<TrainSplit, RoundError> {
    let settings = &night.config.dataset.synthetic;
    let needs = synthetic::needs(&dataset.train, settings, usable);
    if needs.is_empty() {
        return Ok(dataset.train.clone());
    }
    let started = Instant::now();
    let out = night.folder.join(FOLDER);
    let views: Vec<WorkloadView> = night.config.workload.iter().map(Workload::view).collect();
    let index = Paths::new(&night.config.state.dir).prompts();
    let (round, seed) = (night.plan.round.clone(), night.plan.seed);
    let freezing = Freezing { round: &round, settings: &night.config.dataset, workloads: &views, seed, index: &index };
    let manifest = match night.runtime.block_on(synthetic::resume(&night.tables, &round, &out))? {
        Some(manifest) => manifest,
        None => {
            let written = waves(night, dataset, usable, &needs, freezing)?;
            let made = (&written, needs.as_slice(), dataset.manifest.hash.as_str());
            night.runtime.block_on(synthetic::store(&night.tables, freezing, made, &out))?
        }
    };
    let split = synthetic::extended(&out, &dataset.train)?;
    night.report(StageReport::new(FOLDER.to_string(), manifest.prompts, manifest.tokens, started))?;
    crash::at("synthetic");
    night.state(FOLDER, json!({ "manifest": manifest }))?;
    Ok(split)
}

/// Draws waves until all that is wanted is there, or no wave is left.
fn waves(
    night: &Night<'_>,
    dataset: &Dataset,
    usable: &dyn Fn(&Prompt) -> bool,
    needs: &[Need],
    freezing: Freezing<'_>,
) -> Result<Drafts, RoundError> {
    let settings = &night.config.dataset.synthetic;
    let (mut written, mut missing) = (Drafts::default(), needs.to_vec());
    for wave in 1..=settings.waves {
        let seeds = (night.plan.seed, wave);
        let (asks, samples) = synthetic::asks(&dataset.train, usable, &missing, (settings, freezing.workloads), seeds);
        if asks.is_empty() {
            tracing::warn!(round = freezing.round, "no training prompt of the workloads with too few can be shown");
            break;
        }
        let drawn = draw(night, &asks, samples, wave)?;
        written.tokens += drawn.iter().map(|candidate| candidate.token_ids.len() as u64).sum::<u64>();
        let by_hash: BTreeMap<&str, &Ask> = asks.iter().map(|ask| (ask.prompt.prompt_hash.as_str(), ask)).collect();
        let draft = |candidate: &Candidate| {
            let ask = by_hash.get(candidate.prompt_hash.as_str())?;
            Some(ask.draft(&candidate.text, candidate.finish_reason == FinishReason::Stop))
        };
        written.drafts.extend(drawn.iter().filter_map(draft));
        let admission = synthetic::admit(&night.tables, freezing, &written.drafts, needs);
        missing = night.runtime.block_on(admission)?.missing();
        if missing.is_empty() {
            break;
        }
    }
    Ok(written)
}

/// Draws the answers of one wave.
fn draw(night: &Night<'_>, asks: &[Ask], samples: usize, wave: usize) -> Result<Vec<Candidate>, RoundError> {
    let folder = night.folder.join(format!("{FOLDER}/wave-{wave}"));
    durable::create_folder(&folder)?;
    // Before anything is drawn: by it an erasure finds the answers.
    let lines: Vec<_> = asks.iter().map(Ask::line).collect();
    durable::write_json_lines(&folder.join("asks.jsonl"), &lines)?;
    let own = &night.config.dataset.synthetic;
    let settings = candidates::Settings {
        samples_per_prompt: samples,
        temperature: own.temperature,
        max_tokens: own.max_tokens,
        precision: night.config.candidates.precision,
        chunk_prompts: night.config.candidates.chunk_prompts,
        max_sequences: night.config.candidates.max_sequences,
        cache_mib: night.config.candidates.cache_mib,
        remote: night.config.candidates.remote.clone(),
        ..candidates::Settings::default()
    };
    let prompts: Vec<&Prompt> = asks.iter().map(|ask| &ask.prompt).collect();
    let name = format!("{FOLDER}/{wave}");
    let stream = Stream { seed: night.plan.seed, name: &name, sampler: "base" };
    let how = (&settings, &Formats::new());
    candidates::sample(night.model, None, &prompts, how, stream, &folder, night.progress)?;
    crash::at("synthetic-wave");
    Ok(candidates::load(&folder)?)
}
