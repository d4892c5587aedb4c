//! The forward and backward pass of training: log-probs of completion tokens as a function of LoRA matrices.
//!
//! A packed batch holds groups; each group's prompt is run once for all its completions. [`Base::forward`] keeps what
//! the backward pass needs; [`Pass::backward`] takes the slope of a loss with respect to each log-prob, which is all
//! that any of our losses has to know, and adds up the gradients of the LoRA matrices. No gradient is ever made for a
//! frozen weight.

mod layer;
mod matrices;
mod pooled;

use std::sync::Arc;

use rayon::prelude::*;

use self::layer::{Batch, Layer, Saved};
pub use self::matrices::{LoraMatrices, Matrix};
use super::config::ModelConfig;
use super::device::{self, DeviceModel};
use super::error::EngineError;
use super::matmul::WeightForm;
use super::model::Model;
use super::ops::Values;
use super::ops::attention::{Attention, GroupRows, Heads};
use super::ops::dropout::{RowSeeds, row_seed};
use super::ops::linear::{BothWays, Products};
use super::ops::mat::{self, Digits};
use super::ops::pointwise::{RmsNorm, Rotation};
use super::ops::token_logprobs::{Output, Slopes, TokenLogprobs, token_logprobs};
use super::rope::Rope;
use super::weights::{LayerWeights, Weights};

pub use self::pooled::{PooledPass, TextGroup};

/// A prompt and the completions whose tokens are wanted.
#[derive(Debug, Clone)]
pub struct GroupTokens<'a> {
    pub prompt: &'a [u32],
    pub completions: Vec<&'a [u32]>,
}

impl GroupTokens<'_> {
    /// Returns how many rows the group takes in a packed batch: the last token of a completion is only a target.
    pub fn rows(&self) -> usize {
        self.prompt.len() + self.completions.iter().map(|c| c.len().saturating_sub(1)).sum::<usize>()
    }
}

/// What a step of training leaves out of the adapter's inputs: a share, and a seed for the prompt of each group and for each of
/// its completions. Equal seeds leave the same out, in whatever batch.
#[derive(Debug, Clone, PartialEq)]
pub struct DropoutSeeds {
    /// In [0, 1).
    pub rate: f32,
    pub groups: Vec<(u64, Vec<u64>)>,
}

/// What a forward pass keeps for its backward pass.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Activations {
    /// All that is read.
    #[default]
    Kept,
    /// The input of each layer, from which the rest is made again, to the same bits: a tenth of the memory for a third more
    /// time (activation checkpointing, Chen et al. 2016).
    Again,
}

/// The frozen part of the model, as training needs it.
pub struct Base<'a> {
    pub config: &'a ModelConfig,
    pub weights: &'a Weights,
    pub activations: Activations,
    products: Multiplied,
    ropes: Vec<Rope>,
    /// The weights on the device that computes, where that is not the processor.
    device: Option<Arc<DeviceModel>>,
}

/// How frozen weights are multiplied.
enum Multiplied {
    /// As they are held, by so much of each number.
    Held(Digits),
    Rounded(RoundedWeights),
}

impl Multiplied {
    /// Returns how those of a layer are, in the order of `Linear::ALL`.
    fn layer(&self, index: usize) -> [Products<'_>; 7] {
        match self {
            Multiplied::Held(digits) => [Products::Of(*digits); 7],
            Multiplied::Rounded(rounded) => rounded.layers[index].each_ref().map(Products::Rounded),
        }
    }

    fn head(&self) -> Products<'_> {
        match self {
            Multiplied::Held(digits) => Products::Of(*digits),
            Multiplied::Rounded(rounded) => Products::Rounded(&rounded.head),
        }
    }
}

/// The weights of all products, rounded: those of each layer in the order of `Linear::ALL`, and the output layer.
struct RoundedWeights {
    layers: Vec<[BothWays; 7]>,
    head: BothWays,
}

impl RoundedWeights {
    fn new(weights: &Weights) -> Result<Self, EngineError> {
        let layer = |w: &LayerWeights| -> Result<[BothWays; 7], EngineError> {
            let [q, k, v, o] = [&w.q, &w.k, &w.v, &w.o].map(BothWays::new);
            let [gate, up, down] = [&w.gate, &w.up, &w.down].map(BothWays::new);
            Ok([q?, k?, v?, o?, gate?, up?, down?])
        };
        let layers = weights.layers.par_iter().map(layer).collect::<Result<_, _>>()?;
        Ok(RoundedWeights { layers, head: BothWays::new(&weights.lm_head)? })
    }
}

impl<'a> Base<'a> {
    /// Prepares the frozen model for training. In 16 bits gradients are off by some 1e-4 of the largest of their matrix. Processors
    /// that multiply tiles cut numbers as they come; on others this holds two more copies of the weights, half as large each.
    pub fn new(config: &'a ModelConfig, weights: &'a Weights, form: WeightForm) -> Result<Self, EngineError> {
        let products = match form {
            WeightForm::F32 => Multiplied::Held(Digits::All),
            WeightForm::Int16 if mat::cuts() => Multiplied::Held(Digits::Sixteen),
            WeightForm::Int16 => Multiplied::Rounded(RoundedWeights::new(weights)?),
            WeightForm::Int8 => return Err(EngineError::request("8 bits are too coarse for gradients; use 16 or f32")),
        };
        Self::multiplied(config, weights, products)
    }

    /// Does the same in 16 bits as processors without tiles do.
    #[cfg(test)]
    pub(crate) fn with_copies(config: &'a ModelConfig, weights: &'a Weights) -> Result<Self, EngineError> {
        Self::multiplied(config, weights, Multiplied::Rounded(RoundedWeights::new(weights)?))
    }

    fn multiplied(config: &'a ModelConfig, weights: &'a Weights, products: Multiplied) -> Result<Self, EngineError> {
        let (activations, ropes) = (Activations::Kept, Rope::all(config)?);
        Ok(Base { config, weights, activations, products, ropes, device: None })
    }

    /// Prepares a model for training where it computes: on its device in the device's precision, else as [`Base::new`] does.
    pub fn of(model: &'a Model, form: WeightForm) -> Result<Self, EngineError> {
        Base::placed(model.config(), model.weights(), model.device(), form)
    }

    pub(crate) fn placed(
        config: &'a ModelConfig,
        weights: &'a Weights,
        device: Option<&Arc<DeviceModel>>,
        form: WeightForm,
    ) -> Result<Self, EngineError> {
        let form = if device.is_some() { WeightForm::F32 } else { form };
        Ok(Base { device: device.cloned(), ..Base::new(config, weights, form)? })
    }

    /// Returns the log-probs and the entropies of all completion tokens under the base: group by group, completion by
    /// completion.
    pub fn score(&self, groups: &[GroupTokens]) -> Result<TokenLogprobs, EngineError> {
        let packed = Packed::new(groups)?;
        if let Some(device) = &self.device {
            let (logprobs, entropies) = device.told_of(&packed)?;
            return Ok(TokenLogprobs { logprobs, entropies, slopes: Vec::new() });
        }
        let batch = self.batch(&packed, None)?;
        let mut x = self.embed(&packed)?;
        for index in 0..self.config.layers.len() {
            x = self.layer(index, None).forward(x, &batch)?.output;
        }
        Ok(self.logprobs(&packed, &x, Slopes::Skip)?.0)
    }

    /// Runs the model with `lora` and keeps what [`Pass::backward`] needs.
    pub fn forward<'p>(&'p self, lora: &'p LoraMatrices, groups: &[GroupTokens]) -> Result<Pass<'p>, EngineError> {
        self.forward_dropping(lora, groups, None)
    }

    /// Does the same, with dropout before the adapter where seeds are given.
    pub fn forward_dropping<'p>(
        &'p self,
        lora: &'p LoraMatrices,
        groups: &[GroupTokens],
        dropout: Option<&DropoutSeeds>,
    ) -> Result<Pass<'p>, EngineError> {
        let packed = Packed::new(groups)?;
        if let Some(device) = &self.device {
            let dropout = dropout.map(|seeds| packed.row_seeds(seeds)).transpose()?;
            let pass = device::Pass::forward(device, lora, packed, dropout, self.activations)?;
            return Ok(Pass(Way::OnDevice(Box::new(pass))));
        }
        let (x, batch, saved) = self.run(&packed, lora, dropout)?;
        let (tokens, predicting) = self.logprobs(&packed, &x, Slopes::Make)?;
        Ok(Pass(Way::Here(Box::new(PassHere { base: self, lora, batch, packed, saved, predicting, tokens }))))
    }

    /// Runs all layers and returns the rows before the last norm, with what the backward pass reads.
    fn run(
        &self,
        packed: &Packed,
        lora: &LoraMatrices,
        dropout: Option<&DropoutSeeds>,
    ) -> Result<(Vec<f32>, Batch, Vec<Kept>), EngineError> {
        let batch = self.batch(packed, dropout)?;
        let mut saved = Vec::with_capacity(self.config.layers.len());
        let mut x = self.embed(packed)?;
        for index in 0..self.config.layers.len() {
            let step = self.layer(index, Some(lora)).forward(x, &batch)?;
            x = step.output;
            saved.push(match self.activations {
                Activations::Kept => Kept::All(Box::new(step.saved)),
                Activations::Again => Kept::Input(step.saved.into_input()),
            });
        }
        Ok((x, batch, saved))
    }

    /// Adds the gradients of the adapter, given that of the normed rows that `predicting` are before their norm.
    /// Activations are dropped as soon as their layer is done.
    fn run_backward(
        &self,
        lora: &LoraMatrices,
        (packed, batch, mut saved): (&Packed, &Batch, Vec<Kept>),
        predicting: &[f32],
        grad: &[f32],
        gradients: &mut [Vec<f32>],
    ) -> Result<(), EngineError> {
        let width = self.config.hidden_size;
        let mut at_targets = vec![0.0; grad.len()];
        RmsNorm::new(&self.weights.norm, self.config.rms_eps)?.backward(predicting, grad, &mut at_targets);
        let mut grad = vec![0.0; packed.ids.len() * width];
        for (row, values) in packed.predicting.iter().zip(at_targets.chunks_exact(width)) {
            grad[row * width..][..width].iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
        }
        while let Some(kept) = saved.pop() {
            let layer = self.layer(saved.len(), Some(lora));
            let activations = match kept {
                Kept::All(activations) => *activations,
                Kept::Input(x) => layer.again(x, batch)?,
            };
            grad = layer.backward(activations, grad, batch, gradients)?;
        }
        Ok(())
    }

    fn layer<'l>(&'l self, index: usize, lora: Option<&'l LoraMatrices>) -> Layer<'l> {
        let products = self.products.layer(index);
        Layer { config: self.config, weights: &self.weights.layers[index], products, index, lora }
    }

    fn embed(&self, packed: &Packed) -> Result<Vec<f32>, EngineError> {
        let (vocab, _) = self.weights.embed.dims2()?;
        if let Some(id) = packed.ids.iter().find(|id| **id as usize >= vocab) {
            return Err(EngineError::request(format!("token id {id} is outside the vocabulary of {vocab}")));
        }
        let mut x = self.weights.embed.gather(packed.ids.iter().map(|id| *id as usize))?;
        if let Some(scale) = self.config.embedding_scale {
            x.iter_mut().for_each(|x| *x *= scale);
        }
        Ok(x)
    }

    /// Returns the results of all targets, and the hidden rows that predict them, before the last norm.
    fn logprobs(&self, packed: &Packed, x: &[f32], slopes: Slopes) -> Result<(TokenLogprobs, Vec<f32>), EngineError> {
        let predicting = gather(x, packed.predicting.iter().copied(), self.config.hidden_size);
        let hidden = RmsNorm::new(&self.weights.norm, self.config.rms_eps)?.forward(&predicting);
        let output =
            Output { weight: &self.weights.lm_head, products: self.products.head(), cap: self.config.logit_cap };
        let tokens = token_logprobs(&hidden, output, &packed.targets, slopes)?;
        Ok((tokens, predicting))
    }

    fn batch(&self, packed: &Packed, dropout: Option<&DropoutSeeds>) -> Result<Batch, EngineError> {
        let ModelConfig { heads, kv_heads, head_dim, .. } = *self.config;
        let heads = Heads { query: heads, key_value: kv_heads, dim: head_dim };
        let attention = Attention::new(packed.groups.clone(), heads)?;
        let dropout = dropout.map(|seeds| packed.row_seeds(seeds)).transpose()?;
        Ok(Batch { attention, rotations: self.rotations(&packed.positions)?, dropout })
    }

    /// Returns the angles of these positions under each rotary embedding of the model.
    fn rotations(&self, positions: &[usize]) -> Result<Vec<Rotation>, EngineError> {
        let context = self.config.max_positions;
        if let Some(position) = positions.iter().find(|position| **position >= context) {
            let problem = format!("position {position} is outside the context of {context} tokens; shorten the sample");
            return Err(EngineError::request(problem));
        }
        let rotation = |rope: &Rope| -> Result<Rotation, EngineError> {
            let half = rope.cos.dims2()?.1;
            let (cos, sin) = (Values::of(&rope.cos)?, Values::of(&rope.sin)?);
            let pick = |table: &[f32]| gather(table, positions.iter().copied(), half);
            Ok(Rotation { cos: pick(&cos), sin: pick(&sin), head_dim: self.config.head_dim, dim: half * 2 })
        };
        self.ropes.iter().map(rotation).collect()
    }
}

/// Returns the named rows of a table whose rows are `width` wide.
fn gather(table: &[f32], rows: impl Iterator<Item = usize>, width: usize) -> Vec<f32> {
    rows.flat_map(|row| &table[row * width..][..width]).copied().collect()
}

/// What is kept of a layer.
enum Kept {
    All(Box<Saved>),
    Input(Vec<f32>),
}

/// A forward pass with an adapter, kept for its backward pass.
pub struct Pass<'a>(Way<'a>);

enum Way<'a> {
    Here(Box<PassHere<'a>>),
    OnDevice(Box<device::Pass<'a>>),
}

struct PassHere<'a> {
    base: &'a Base<'a>,
    lora: &'a LoraMatrices,
    batch: Batch,
    packed: Packed,
    saved: Vec<Kept>,
    predicting: Vec<f32>,
    tokens: TokenLogprobs,
}

impl Pass<'_> {
    /// Returns the log-prob of each completion token: group by group, completion by completion.
    pub fn logprobs(&self) -> &[f32] {
        match &self.0 {
            Way::Here(pass) => &pass.tokens.logprobs,
            Way::OnDevice(pass) => pass.logprobs(),
        }
    }

    /// Returns the entropy of the distribution that each completion token was drawn from, in nats.
    pub fn entropies(&self) -> &[f32] {
        match &self.0 {
            Way::Here(pass) => &pass.tokens.entropies,
            Way::OnDevice(pass) => pass.entropies(),
        }
    }

    /// Adds to `gradients` those of a loss whose slope with respect to each log-prob is `slopes`.
    pub fn backward(self, slopes: &[f32], gradients: &mut [Vec<f32>]) -> Result<(), EngineError> {
        match self.0 {
            Way::Here(pass) => pass.backward(slopes, gradients),
            Way::OnDevice(pass) => pass.backward(slopes, gradients),
        }
    }
}

impl PassHere<'_> {
    fn backward(self, slopes: &[f32], gradients: &mut [Vec<f32>]) -> Result<(), EngineError> {
        let PassHere { base, lora, batch, packed, saved, predicting, tokens } = self;
        if slopes.len() != tokens.logprobs.len() || gradients.len() != lora.values.len() {
            let (found, expected) = (slopes.len(), tokens.logprobs.len());
            return Err(EngineError::request(format!("{found} slopes for {expected} log-probs")));
        }
        let mut hidden = tokens.slopes;
        let rows = hidden.chunks_exact_mut(base.config.hidden_size).zip(slopes);
        rows.for_each(|(row, slope)| row.iter_mut().for_each(|value| *value *= slope));
        base.run_backward(lora, (&packed, &batch, saved), &predicting, &hidden, gradients)
    }
}

/// The rows of one batch.
pub(super) struct Packed {
    /// Token and position of each row.
    pub(super) ids: Vec<u32>,
    pub(super) positions: Vec<usize>,
    pub(super) groups: Vec<GroupRows>,
    /// For each target, the row that predicts it: the prompt's last for the first token of a completion. Of whole texts,
    /// each one's last row.
    pub(super) predicting: Vec<usize>,
    pub(super) targets: Vec<u32>,
}

impl Packed {
    pub(super) fn new(groups: &[GroupTokens]) -> Result<Self, EngineError> {
        let mut packed = Packed { ids: vec![], positions: vec![], groups: vec![], predicting: vec![], targets: vec![] };
        for group in groups {
            if group.prompt.is_empty() || group.completions.iter().any(|c| c.is_empty()) {
                return Err(EngineError::request("a prompt or a completion has no tokens; leave it out"));
            }
            let prompt = packed.run(group.prompt, 0);
            let mut completions = Vec::with_capacity(group.completions.len());
            for completion in &group.completions {
                let own = packed.run(&completion[..completion.len() - 1], group.prompt.len());
                packed.predicting.push(prompt.end - 1);
                packed.predicting.extend(own.clone());
                packed.targets.extend_from_slice(completion);
                completions.push(own);
            }
            packed.groups.push(GroupRows { prompt, completions });
        }
        Ok(packed)
    }

    /// Returns the seed of each row.
    fn row_seeds(&self, seeds: &DropoutSeeds) -> Result<RowSeeds, EngineError> {
        let fits = |(group, (_, own)): (&GroupRows, &(u64, Vec<u64>))| group.completions.len() == own.len();
        if self.groups.len() != seeds.groups.len() || !self.groups.iter().zip(&seeds.groups).all(fits) {
            return Err(EngineError::request("dropout needs a seed for each prompt and each completion"));
        }
        let mut rows = Vec::with_capacity(self.ids.len());
        for (group, (prompt, completions)) in self.groups.iter().zip(&seeds.groups) {
            rows.extend((0..group.prompt.len()).map(|place| row_seed(*prompt, place)));
            for (own, seed) in group.completions.iter().zip(completions) {
                rows.extend((0..own.len()).map(|place| row_seed(*seed, place)));
            }
        }
        Ok(RowSeeds { rate: seeds.rate, rows })
    }

    /// Packs texts of which every token is a row and the last ones are wanted.
    fn whole(groups: &[TextGroup]) -> Result<Self, EngineError> {
        let mut packed = Packed { ids: vec![], positions: vec![], groups: vec![], predicting: vec![], targets: vec![] };
        for group in groups {
            if group.prefix.is_empty() || group.endings.iter().any(|ending| ending.is_empty()) {
                return Err(EngineError::request(
                    "a text is one token or none, or shares all with another; leave it out",
                ));
            }
            let prompt = packed.run(group.prefix, 0);
            let mut completions = Vec::with_capacity(group.endings.len());
            for ending in &group.endings {
                let own = packed.run(ending, group.prefix.len());
                packed.predicting.push(own.end - 1);
                completions.push(own);
            }
            packed.groups.push(GroupRows { prompt, completions });
        }
        Ok(packed)
    }

    /// Appends a run of tokens whose first has this position.
    fn run(&mut self, tokens: &[u32], position: usize) -> std::ops::Range<usize> {
        let start = self.ids.len();
        self.ids.extend_from_slice(tokens);
        self.positions.extend(position..position + tokens.len());
        start..self.ids.len()
    }
}

#[cfg(test)]
pub(crate) mod fixture;
#[cfg(test)]
mod tests;
