//! The training of a Bradley-Terry reward model: a LoRA adapter and a scalar head under `-ln sigma(r+ - r-)`.
//!
//! The two answers of a pair share their prompt's forward pass. Pairs of one prompt are either all trained on or all held
//! out. A small pull of both scores towards 0 (Eisenstein et al. 2023) keeps the scale where the logistic function reads it.

use std::collections::BTreeSet;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha20Rng;
use serde::Serialize;

use super::RewardModelError;
use super::accuracy::Report;
use super::pairs::Pair;
use crate::adapter::optimizer::{AdamW, clip, learning_rate};
use crate::adapter::{Keep, Settings};
use crate::engine::train::{Activations, Base, LoraMatrices, TextGroup};
use crate::engine::{Adapter, Model, ScoreHead, WeightForm};
use crate::progress::Progress;
use crate::record::{Message, derive_seed};

/// Weight of the pull towards 0.
const CENTRE: f64 = 0.01;
/// Pairs held out below which an accuracy says nothing.
pub const MIN_HELD_OUT: usize = 10;

/// A pair as ids: what both begin with, and how each goes on.
struct Tokens {
    shared: usize,
    texts: [Vec<u32>; 2],
}

impl Tokens {
    fn group(&self) -> TextGroup<'_> {
        let endings = self.texts.iter().map(|text| &text[self.shared..]).collect();
        TextGroup { prefix: &self.texts[0][..self.shared], endings }
    }
}

/// What training came to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Trained {
    pub pairs: usize,
    /// Pairs left out: two answers that the model reads as one text, or longer than its context.
    pub unusable: usize,
    pub steps: usize,
    /// Mean loss of the first and of the last step; ln 2 = 0.693 is that of a coin.
    pub first_loss: f64,
    pub last_loss: f64,
    /// On pairs that were not trained on.
    pub held_out: Report,
}

/// A model in training.
pub(super) struct Run<'a> {
    model: &'a Model,
    settings: &'a Settings,
    base: Base<'a>,
    lora: LoraMatrices,
    adam: AdamW,
    head: ScoreHead,
    head_adam: AdamW,
}

impl<'a> Run<'a> {
    /// Prepares a fresh adapter and a head of zeros: before the first step every answer scores 0.
    pub(super) fn new(
        model: &'a Model,
        settings: &'a Settings,
        padding: u32,
        seed: u64,
    ) -> Result<Self, RewardModelError> {
        let mut base = Base::new(model.config(), model.weights(), WeightForm::F32)?;
        if settings.activations == Keep::Recompute {
            base.activations = Activations::Again;
        }
        let lora = LoraMatrices::fresh(model.config(), &settings.lora(), derive_seed(seed, &["reward-lora"]));
        let head = ScoreHead { weight: vec![0.0; model.config().hidden_size], padding };
        let (adam, head_adam) = (AdamW::new(&lora.values), AdamW::new(std::slice::from_ref(&head.weight)));
        Ok(Run { model, settings, base, lora, adam, head, head_adam })
    }

    /// Trains on the pairs that `held_out` does not name and reports on those that it does.
    pub(super) fn train(
        &mut self,
        pairs: &[Pair],
        held_out: &BTreeSet<usize>,
        seed: u64,
        progress: &Progress,
    ) -> Result<Trained, RewardModelError> {
        let tokens: Vec<Option<Tokens>> = pairs.iter().map(|pair| self.tokens(pair)).collect::<Result<_, _>>()?;
        let usable = |index: &usize| tokens[*index].is_some();
        let (out, training): (Vec<usize>, Vec<usize>) =
            (0..pairs.len()).filter(usable).partition(|index| held_out.contains(index));
        if training.is_empty() {
            return Err(RewardModelError::Few { what: "pairs to train on", found: 0, least: 1 });
        }
        let steps = self.plan(&training, seed);
        let mut report = progress.step("reward model", (steps.iter().map(Vec::len).sum::<usize>()) as u64, "pairs");
        let mut losses = Vec::with_capacity(steps.len());
        for (index, step) in steps.iter().enumerate() {
            let batch: Vec<&Tokens> = step.iter().filter_map(|pair| tokens[*pair].as_ref()).collect();
            losses.push(self.step(&batch, index, steps.len())?);
            report.advance(step.len() as u64, "");
        }
        let margins = out.iter().filter_map(|index| tokens[*index].as_ref()).map(|tokens| self.margin(tokens));
        let margins: Vec<f64> = margins.collect::<Result<_, _>>()?;
        let out: Vec<Pair> = out.into_iter().map(|index| pairs[index].clone()).collect();
        Ok(Trained {
            pairs: training.len(),
            unusable: tokens.iter().filter(|tokens| tokens.is_none()).count(),
            steps: steps.len(),
            first_loss: losses.first().copied().unwrap_or_default(),
            last_loss: losses.last().copied().unwrap_or_default(),
            held_out: Report::new(&out, &margins),
        })
    }

    /// Returns the adapter and the head as they are.
    pub(super) fn parts(&self) -> Result<(Adapter, &ScoreHead), RewardModelError> {
        let adapter = Adapter::from_tensors("reward", self.model, &self.settings.lora(), &self.lora.tensors()?)?;
        Ok((adapter, &self.head))
    }

    /// Returns the ids of a pair up to the token that the head reads; nothing where they make no pair.
    fn tokens(&self, pair: &Pair) -> Result<Option<Tokens>, RewardModelError> {
        let ids = |answer: &str| -> Result<Vec<u32>, RewardModelError> {
            let answer = Message::text("assistant", answer);
            let mut ids = self.model.conversation_ids(&[pair.messages.as_slice(), &[answer]].concat())?;
            while ids.len() > 1 && ids.last() == Some(&self.head.padding) {
                ids.pop();
            }
            Ok(ids)
        };
        let texts = [ids(&pair.chosen)?, ids(&pair.rejected)?];
        let most = texts[0].len().min(texts[1].len()).saturating_sub(1);
        let shared = texts[0].iter().zip(&texts[1]).take(most).take_while(|(a, b)| a == b).count();
        let longest = texts[0].len().max(texts[1].len());
        let usable = texts[0] != texts[1] && shared > 0 && longest <= self.model.config().max_positions;
        Ok(usable.then_some(Tokens { shared, texts }))
    }

    /// Returns the pairs of each step: every epoch all of them in another order.
    fn plan(&self, training: &[usize], seed: u64) -> Vec<Vec<usize>> {
        let epoch = |epoch: usize| {
            let mut order = training.to_vec();
            let seed = derive_seed(seed, &["reward-order", &epoch.to_string()]);
            order.shuffle(&mut ChaCha20Rng::seed_from_u64(seed));
            order.chunks(self.settings.batch_samples).map(<[usize]>::to_vec).collect::<Vec<_>>()
        };
        (0..self.settings.epochs).flat_map(epoch).collect()
    }

    /// Makes one optimizer step and returns the mean loss before it.
    fn step(&mut self, batch: &[&Tokens], index: usize, steps: usize) -> Result<f64, RewardModelError> {
        let mut gradients = self.lora.zero_gradients();
        let mut head_gradient = vec![0.0f32; self.head.weight.len()];
        let mut loss = 0.0;
        for part in self.parts_of(batch) {
            let groups: Vec<TextGroup> = part.iter().map(|tokens| tokens.group()).collect();
            let pass = self.base.pool(&self.lora, &groups)?;
            let hidden = pass.hidden().to_vec();
            let scores: Vec<f64> =
                hidden.chunks_exact(self.head.weight.len()).map(|row| dot(row, &self.head.weight)).collect();
            let (part_loss, slopes) = bradley_terry(&scores, batch.len());
            loss += part_loss;
            let mut at_hidden = Vec::with_capacity(hidden.len());
            for (row, slope) in hidden.chunks_exact(self.head.weight.len()).zip(slopes) {
                let slope = slope as f32;
                head_gradient.iter_mut().zip(row).for_each(|(sum, value)| *sum += slope * value);
                at_hidden.extend(self.head.weight.iter().map(|weight| slope * weight));
            }
            pass.backward(&at_hidden, &mut gradients)?;
        }
        gradients.push(head_gradient);
        clip(&mut gradients, self.settings.max_grad_norm);
        let head_gradient = gradients.split_off(gradients.len() - 1);
        let rate = learning_rate(self.settings.learning_rate, self.settings.warmup_steps, index, steps);
        self.adam.update(&mut self.lora.values, &gradients, rate, self.settings.weight_decay);
        let head = std::slice::from_mut(&mut self.head.weight);
        self.head_adam.update(head, &head_gradient, rate, self.settings.weight_decay);
        match loss.is_finite() {
            true => Ok(loss),
            false => Err(RewardModelError::Diverged { step: index + 1 }),
        }
    }

    /// Cuts a step into parts of about `batch_tokens` rows, with the same result.
    fn parts_of<'t>(&self, batch: &[&'t Tokens]) -> Vec<Vec<&'t Tokens>> {
        let mut parts: Vec<Vec<&Tokens>> = Vec::new();
        let mut rows = usize::MAX;
        for &tokens in batch {
            let more = tokens.group().rows();
            if rows.saturating_add(more) > self.settings.batch_tokens {
                parts.push(Vec::new());
                rows = 0;
            }
            rows += more;
            parts.last_mut().into_iter().for_each(|part| part.push(tokens));
        }
        parts
    }

    /// Returns the better answer's score minus the other's.
    fn margin(&self, tokens: &Tokens) -> Result<f64, RewardModelError> {
        let pass = self.base.pool(&self.lora, &[tokens.group()])?;
        let scores: Vec<f64> =
            pass.hidden().chunks_exact(self.head.weight.len()).map(|row| dot(row, &self.head.weight)).collect();
        Ok(scores[0] - scores[1])
    }
}

fn dot(row: &[f32], weight: &[f32]) -> f64 {
    row.iter().zip(weight).map(|(x, w)| f64::from(x * w)).sum()
}

/// Returns the share of a step's mean loss that these pairs make, and its slope with respect to each score. Scores stand
/// in twos, the better answer's first; `pairs` counts the whole step.
fn bradley_terry(scores: &[f64], pairs: usize) -> (f64, Vec<f64>) {
    let n = pairs as f64;
    let (mut loss, mut slopes) = (0.0, Vec::with_capacity(scores.len()));
    for both in scores.chunks_exact(2) {
        let (margin, sum) = (both[0] - both[1], both[0] + both[1]);
        // ln(1 + e^-m), without overflow.
        let nll = (-margin).max(0.0) + (-margin.abs()).exp().ln_1p();
        loss += (nll + CENTRE * sum * sum) / n;
        let towards = -1.0 / (1.0 + margin.exp());
        let pull = 2.0 * CENTRE * sum;
        slopes.extend([(towards + pull) / n, (-towards + pull) / n]);
    }
    (loss, slopes)
}

/// Returns the places of the pairs to hold out: about this share of the prompts, by their hash.
pub fn held_out(pairs: &[Pair], share: f64, seed: u64) -> BTreeSet<usize> {
    let is_out = |pair: &Pair| {
        let prompt = serde_json::to_string(&pair.messages).unwrap_or_default();
        let drawn = derive_seed(seed, &["reward-held-out", &prompt]) as f64 / u64::MAX as f64;
        drawn < share
    };
    (0..pairs.len()).filter(|index| is_out(&pairs[*index])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slopes_are_those_of_the_loss() {
        let scores = [0.3, -0.8, -40.0, 35.0];
        let (loss, slopes) = bradley_terry(&scores, 5);
        let expected = ((1.0f64 + (-1.1f64).exp()).ln() + 0.01 * 0.25 + 75.0 + 0.01 * 25.0) / 5.0;
        assert!((loss - expected).abs() < 1e-9, "{loss} {expected}");
        for at in 0..4 {
            let moved = |by: f64| {
                let mut scores = scores;
                scores[at] += by;
                bradley_terry(&scores, 5).0
            };
            let numeric = (moved(1e-5) - moved(-1e-5)) / 2e-5;
            assert!((numeric - slopes[at]).abs() < 1e-7, "{at}: {numeric} {}", slopes[at]);
        }
    }

    #[test]
    fn the_pairs_of_a_prompt_are_held_out_together() {
        let pair = |prompt: usize, answer: usize| Pair {
            messages: vec![Message::text("user", prompt.to_string())],
            chosen: answer.to_string(),
            rejected: "x".into(),
            subset: None,
        };
        let pairs: Vec<Pair> = (0..200).flat_map(|p| (0..3).map(move |a| pair(p, a))).collect();
        let out = held_out(&pairs, 0.2, 1);
        assert!((60..180).contains(&out.len()), "{}", out.len());
        assert!(out.iter().all(|index| (0..3).all(|a| out.contains(&(index / 3 * 3 + a)))));
        assert_ne!(out, held_out(&pairs, 0.2, 2));
    }
}
