//! Log-probs that are computed once, before the first step: of every sample under the base, and, where the loss asks,
//! under the policy that training begins from.
//!
//! Both come from the trainer's own forward pass (the base's from the sampler's where it sampled from the base). What the
//! sampler told is compared with the latter: where the two differ by more than a little, ratios of policies are noise.

use super::batches::{Chosen, Group, Part, Selection, parts};
use super::checkpoint::Known;
use super::losses::weight;
use super::{Mismatch, Settings, TuneError};
use crate::engine::EngineError;
use crate::engine::train::{Base, LoraMatrices};
use crate::progress::Progress;

/// Computes what is to be known of a selection; `lora` is what training begins from.
pub(super) fn compute(
    base: &Base,
    lora: &LoraMatrices,
    selection: &Selection,
    settings: &Settings,
    progress: &Progress,
) -> Result<Known, TuneError> {
    let mut known = Known { base: vec![Vec::new(); selection.samples], old: Vec::new() };
    let unknown = |group: &&Group| group.samples.iter().any(|sample| sample.base_logprobs.is_none());
    let (left, told): (Vec<&Group>, Vec<&Group>) = selection.groups.iter().partition(unknown);
    for sample in told.iter().flat_map(|group| &group.samples) {
        known.base[sample.index] = sample.base_logprobs.unwrap_or_default().to_vec();
    }
    fill("base log-probs", &left, settings, progress, &mut known.base, |part| Ok(base.score(&part.groups)?.logprobs))?;
    if settings.method.needs_old() {
        known.old = vec![Vec::new(); selection.samples];
        let all: Vec<&Group> = selection.groups.iter().collect();
        let score = |part: &Part| Ok(base.forward(lora, &part.groups)?.logprobs().to_vec());
        fill("old log-probs", &all, settings, progress, &mut known.old, score)?;
    }
    Ok(known)
}

fn fill(
    name: &str,
    groups: &[&Group],
    settings: &Settings,
    progress: &Progress,
    scores: &mut [Vec<f32>],
    score: impl Fn(&Part) -> Result<Vec<f32>, EngineError>,
) -> Result<(), TuneError> {
    let samples: usize = groups.iter().map(|group| group.samples.len()).sum();
    if samples == 0 {
        return Ok(());
    }
    let mut report = progress.step(name, samples as u64, "samples");
    for part in parts(groups.iter().copied(), settings.batch_tokens) {
        let found = score(&part)?;
        for (sample, own) in part.split(&found) {
            scores[sample.index] = own.to_vec();
        }
        report.advance(part.samples.len() as u64, "");
    }
    Ok(())
}

/// Compares what the sampler told with the policy that it stands for. Nothing where the loss does not depend on it.
pub(super) fn compare(
    selection: &Selection,
    known: &Known,
    settings: &Settings,
) -> Result<Option<Mismatch>, TuneError> {
    if !settings.method.is_on_policy() {
        return Ok(None);
    }
    let (mut gap, mut tokens, mut sum, mut squares) = (0.0, 0usize, 0.0, 0.0);
    let samples: Vec<&Chosen> = selection.groups.iter().flat_map(|group| &group.samples).collect();
    for sample in &samples {
        let old = known.old[sample.index].iter();
        let log_ratios = old.zip(sample.sampler_logprobs.unwrap_or_default());
        let log_ratios: Vec<f64> = log_ratios.map(|(old, told)| f64::from(*old) - f64::from(*told)).collect();
        gap += log_ratios.iter().map(|log| log.abs()).sum::<f64>();
        tokens += log_ratios.len();
        let weight = weight(log_ratios.iter().sum());
        sum += weight;
        squares += weight * weight;
    }
    let gap = gap / tokens.max(1) as f64;
    let bound = settings.max_sampler_gap;
    if gap.is_nan() || gap > bound {
        return Err(TuneError::OffPolicy { method: settings.method, gap, bound });
    }
    Ok(Some(Mismatch { gap: gap as f32, effective: (sum * sum / squares / samples.len() as f64) as f32 }))
}
