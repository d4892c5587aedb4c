//! The differentiable forward pass: log-probs of completion tokens as a function of LoRA matrices.
//!
//! A packed batch holds groups; each group's prompt is run once for all its completions. Nothing but the LoRA matrices
//! is a variable, and no op makes a gradient for a frozen weight.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{Device, Tensor, Var};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha20Rng;

use super::config::ModelConfig;
use super::error::EngineError;
use super::lora::{Factor, Linear, LoraSpec};
use super::ops::attention::{GroupRows, Heads, attention};
use super::ops::linear::Frozen;
use super::ops::pointwise::{Rotation, rms_norm, rope, swiglu};
use super::ops::token_logprobs::{TokenLogprobs, token_logprobs};
use super::rope::Rope;
use super::weights::{LayerWeights, Weights};

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

    /// Returns how many completion tokens the group has.
    pub fn targets(&self) -> usize {
        self.completions.iter().map(|c| c.len()).sum()
    }
}

/// The trainable pair of one linear layer.
pub struct VarPair {
    /// `[rank, in]`.
    pub a: Var,
    /// `[out, rank]`.
    pub b: Var,
}

/// A LoRA adapter in training.
pub struct LoraVars {
    pub spec: LoraSpec,
    layers: Vec<[Option<VarPair>; 7]>,
}

impl LoraVars {
    /// Returns an adapter that changes nothing yet: A uniform in +-1/sqrt(in), as PEFT's Kaiming draw with a = sqrt 5
    /// comes out, and B zero. Equal seeds give equal bytes.
    pub fn fresh(config: &ModelConfig, spec: &LoraSpec, seed: u64) -> Result<Self, EngineError> {
        let mut rng = ChaCha20Rng::seed_from_u64(seed);
        Self::build(config, spec, |_, factor, shape| {
            let values = match factor {
                Factor::A => {
                    let bound = 1.0 / (shape.1 as f32).sqrt();
                    (0..shape.0 * shape.1).map(|_| rng.random_range(-bound..bound)).collect()
                }
                Factor::B => vec![0.0; shape.0 * shape.1],
            };
            Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
        })
    }

    /// Returns an adapter that goes on from `tensors`, keyed as PEFT keys them.
    pub fn restored(
        config: &ModelConfig,
        spec: &LoraSpec,
        tensors: &BTreeMap<String, Tensor>,
    ) -> Result<Self, EngineError> {
        Self::build(config, spec, |key, _, shape| match tensors.get(key) {
            Some(tensor) if tensor.dims() == [shape.0, shape.1] => Ok(tensor.clone()),
            Some(tensor) => {
                Err(EngineError::request(format!("{key} has shape {:?}, {shape:?} is expected", tensor.dims())))
            }
            None => Err(EngineError::request(format!("{key} is missing"))),
        })
    }

    fn build(
        config: &ModelConfig,
        spec: &LoraSpec,
        mut make: impl FnMut(&str, Factor, (usize, usize)) -> Result<Tensor, EngineError>,
    ) -> Result<Self, EngineError> {
        let mut layers = Vec::with_capacity(config.layers);
        for layer in 0..config.layers {
            let mut pairs = [const { None }; 7];
            for linear in Linear::ALL.into_iter().filter(|linear| spec.targets.contains(linear)) {
                let (ins, outs) = linear.shape(config);
                let a = make(&linear.peft_key(layer, Factor::A), Factor::A, (spec.rank, ins))?;
                let b = make(&linear.peft_key(layer, Factor::B), Factor::B, (outs, spec.rank))?;
                pairs[linear as usize] = Some(VarPair { a: Var::from_tensor(&a)?, b: Var::from_tensor(&b)? });
            }
            layers.push(pairs);
        }
        Ok(LoraVars { spec: spec.clone(), layers })
    }

    /// Returns every variable with its PEFT key, in a fixed order.
    pub fn vars(&self) -> Vec<(String, &Var)> {
        let mut vars = Vec::new();
        for (layer, pairs) in self.layers.iter().enumerate() {
            for (linear, pair) in Linear::ALL.into_iter().zip(pairs) {
                let Some(pair) = pair else { continue };
                vars.push((linear.peft_key(layer, Factor::A), &pair.a));
                vars.push((linear.peft_key(layer, Factor::B), &pair.b));
            }
        }
        vars
    }

    /// Returns copies of all matrices without history, by PEFT key.
    pub fn tensors(&self) -> Result<BTreeMap<String, Tensor>, EngineError> {
        let copy = |(key, var): (String, &Var)| Ok((key, var.as_tensor().detach().copy()?));
        self.vars().into_iter().map(copy).collect()
    }

    fn get(&self, layer: usize, linear: Linear) -> Option<&VarPair> {
        self.layers.get(layer)?[linear as usize].as_ref()
    }
}

/// The frozen part of the model, as the forward pass needs it.
pub struct Base<'a> {
    pub config: &'a ModelConfig,
    pub weights: &'a Weights,
    rope: Rope,
}

impl<'a> Base<'a> {
    /// Prepares the frozen model for training.
    pub fn new(config: &'a ModelConfig, weights: &'a Weights) -> Result<Self, EngineError> {
        Ok(Base { config, weights, rope: Rope::new(config)? })
    }

    /// Returns the log-probs and the entropies of all completion tokens: group by group, completion by completion.
    /// With `lora` the log-probs are differentiable in its variables; without it this is the base.
    pub fn forward(&self, lora: Option<&LoraVars>, groups: &[GroupTokens]) -> Result<TokenLogprobs, EngineError> {
        let batch = Packed::new(groups, &self.rope)?;
        let pass = Pass { config: self.config, lora, batch: &batch };
        let mut x = self.weights.embed.index_select(&batch.ids, 0)?;
        for (index, weights) in self.weights.layers.iter().enumerate() {
            x = Layer { pass: &pass, index, weights }.forward(&x)?;
        }
        let predicting = x.index_select(&batch.predicting, 0)?;
        let hidden = rms_norm(&predicting, &self.weights.norm, self.config.rms_eps)?;
        Ok(token_logprobs(&hidden, &self.weights.lm_head, &batch.targets)?)
    }
}

/// The rows of one batch.
struct Packed {
    /// Token of each row.
    ids: Tensor,
    rotation: Rotation,
    groups: Arc<[GroupRows]>,
    /// For each target, the row that predicts it: the prompt's last for the first token of a completion.
    predicting: Tensor,
    targets: Vec<u32>,
}

impl Packed {
    fn new(groups: &[GroupTokens], rope: &Rope) -> Result<Self, EngineError> {
        let (mut ids, mut positions): (Vec<u32>, Vec<u32>) = (Vec::new(), Vec::new());
        let (mut predicting, mut targets): (Vec<u32>, Vec<u32>) = (Vec::new(), Vec::new());
        let mut rows = Vec::with_capacity(groups.len());
        for group in groups {
            if group.prompt.is_empty() || group.completions.iter().any(|c| c.is_empty()) {
                return Err(EngineError::request("a prompt or a completion has no tokens; leave it out"));
            }
            let mut run = |tokens: &[u32], position: usize| {
                let start = ids.len();
                ids.extend_from_slice(tokens);
                positions.extend((position..position + tokens.len()).map(|p| p as u32));
                start..ids.len()
            };
            let prompt = run(group.prompt, 0);
            let last = prompt.end as u32 - 1;
            let mut completions = Vec::with_capacity(group.completions.len());
            for completion in &group.completions {
                let own = run(&completion[..completion.len() - 1], group.prompt.len());
                predicting.push(last);
                predicting.extend(own.clone().map(|row| row as u32));
                targets.extend_from_slice(completion);
                completions.push(own);
            }
            rows.push(GroupRows { prompt, completions });
        }
        let device = Device::Cpu;
        Ok(Packed {
            ids: Tensor::new(ids, &device)?,
            rotation: rotation(rope, positions)?,
            groups: rows.into(),
            predicting: Tensor::new(predicting, &device)?,
            targets,
        })
    }
}

fn rotation(rope: &Rope, positions: Vec<u32>) -> Result<Rotation, EngineError> {
    let (context, half) = rope.cos.dims2()?;
    if let Some(position) = positions.iter().find(|p| **p as usize >= context) {
        let problem = format!("position {position} is outside the context of {context} tokens; shorten the sample");
        return Err(EngineError::request(problem));
    }
    let positions = Tensor::new(positions, &Device::Cpu)?;
    let pick = |table: &Tensor| -> candle_core::Result<Arc<[f32]>> {
        Ok(table.index_select(&positions, 0)?.flatten_all()?.to_vec1()?.into())
    };
    Ok(Rotation { cos: pick(&rope.cos)?, sin: pick(&rope.sin)?, head_dim: half * 2 })
}

struct Pass<'a> {
    config: &'a ModelConfig,
    lora: Option<&'a LoraVars>,
    batch: &'a Packed,
}

struct Layer<'a> {
    pass: &'a Pass<'a>,
    index: usize,
    weights: &'a LayerWeights,
}

impl Layer<'_> {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let (w, eps) = (self.weights, self.pass.config.rms_eps);
        let x = (x + self.attention(&rms_norm(x, &w.attn_norm, eps)?)?)?;
        let hidden = rms_norm(&x, &w.mlp_norm, eps)?;
        let gate = self.linear(Linear::Gate, &hidden, &w.gate, None)?;
        let up = self.linear(Linear::Up, &hidden, &w.up, None)?;
        &x + self.linear(Linear::Down, &swiglu(&gate, &up)?, &w.down, None)?
    }

    fn attention(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let (w, config, batch) = (self.weights, self.pass.config, self.pass.batch);
        let q = self.linear(Linear::Q, x, &w.q, w.q_bias.as_ref())?;
        let k = self.linear(Linear::K, x, &w.k, w.k_bias.as_ref())?;
        let v = self.linear(Linear::V, x, &w.v, w.v_bias.as_ref())?;
        let rotate = |x: Tensor, norm: Option<&Tensor>| {
            let x = norm.map_or(Ok(x.clone()), |norm| rms_norm(&x, norm, config.rms_eps))?;
            rope(&x, &batch.rotation)
        };
        let (q, k) = (rotate(q, w.q_norm.as_ref())?, rotate(k, w.k_norm.as_ref())?);
        let heads = Heads { query: config.heads, key_value: config.kv_heads, dim: config.head_dim };
        let y = attention(&q, &k, &v, &batch.groups, heads)?;
        self.linear(Linear::O, &y, &w.o, None)
    }

    fn linear(
        &self,
        linear: Linear,
        x: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
    ) -> candle_core::Result<Tensor> {
        let frozen = Frozen { weight: weight.clone(), bias: bias.cloned() };
        match self.pass.lora.and_then(|lora| Some((lora.get(self.index, linear)?, lora.spec.scaling()))) {
            Some((pair, scale)) => frozen.forward_lora(x, &pair.a, &pair.b, scale),
            None => frozen.forward(x),
        }
    }
}

#[cfg(test)]
pub(crate) mod fixture;
#[cfg(test)]
mod tests;
