//! The decoder in candle's ops: one layer after the other over rows, with attention left to the caller.
//!
//! Decoding, scoring and training differ in what a row attends to and in nothing else, so a layer asks for that alone. Rows
//! are f32; they take the weights' precision where a frozen weight multiplies them, and come back as f32.

use candle_core::{D, DType, Tensor};

use super::lora::{self, Part};
use super::settings::Place;
use super::{Result, frozen};
use crate::engine::config::{Activation, ModelConfig, QkNorm};
use crate::engine::error::EngineError;
use crate::engine::held::Held;
use crate::engine::lora::Linear;
use crate::engine::rope::Rope;
use crate::engine::weights::{LayerWeights, Weights};

/// A model's weights on a device.
pub(crate) struct DeviceModel {
    pub(super) config: ModelConfig,
    place: Place,
    /// `[vocab, hidden]`.
    embed: Tensor,
    layers: Vec<Layer>,
    pub(super) norm: Tensor,
    /// `[vocab, hidden]`.
    pub(super) head: Tensor,
    ropes: Vec<Angles>,
}

/// Cosines and sines, `[positions, dim / 2]`; of the rows of a batch `[rows, 1, dim / 2]`.
pub(super) struct Angles {
    cos: Tensor,
    sin: Tensor,
}

struct Layer {
    attn_norm: Option<Tensor>,
    attn_post_norm: Option<Tensor>,
    /// In the order of [`Linear::ALL`].
    linears: [Tensor; 7],
    /// Those of queries, keys and values.
    biases: [Option<Tensor>; 3],
    q_norm: Option<Tensor>,
    k_norm: Option<Tensor>,
    mlp_norm: Option<Tensor>,
    mlp_post_norm: Option<Tensor>,
}

/// Rows on their way into products: in f32, which adapters read, and in the precision of the weights.
struct Input {
    wide: Tensor,
    narrow: Tensor,
}

/// What goes into a layer's attention, in f32: normed, rotated, queries scaled.
pub(super) struct Heads {
    /// `[rows, heads, head_dim]`.
    pub(super) q: Tensor,
    /// `[rows, kv_heads, head_dim]`, and so `v`.
    pub(super) k: Tensor,
    pub(super) v: Tensor,
}

impl DeviceModel {
    /// Copies a model's weights to a device.
    pub(crate) fn new(config: &ModelConfig, weights: &Weights, ropes: &[Rope], place: Place) -> Result<Self> {
        let matrix =
            |held: &Held| -> Result<Tensor> { Ok(held.tensor()?.to_dtype(place.dtype)?.to_device(&place.device)?) };
        let vector = |t: &Tensor| t.contiguous()?.to_dtype(DType::F32)?.to_device(&place.device);
        let optional = |t: &Option<Tensor>| t.as_ref().map(vector).transpose();
        let layer = |w: &LayerWeights| -> Result<Layer> {
            let [q, k, v, o, gate, up, down] = [&w.q, &w.k, &w.v, &w.o, &w.gate, &w.up, &w.down].map(matrix);
            Ok(Layer {
                attn_norm: optional(&w.attn_norm)?,
                attn_post_norm: optional(&w.attn_post_norm)?,
                linears: [q?, k?, v?, o?, gate?, up?, down?],
                biases: [optional(&w.q_bias)?, optional(&w.k_bias)?, optional(&w.v_bias)?],
                q_norm: optional(&w.q_norm)?,
                k_norm: optional(&w.k_norm)?,
                mlp_norm: optional(&w.mlp_norm)?,
                mlp_post_norm: optional(&w.mlp_post_norm)?,
            })
        };
        let angles =
            |rope: &Rope| -> Result<Angles> { Ok(Angles { cos: vector(&rope.cos)?, sin: vector(&rope.sin)? }) };
        let embed = matrix(&weights.embed)?;
        let head = if config.tied { embed.clone() } else { matrix(&weights.lm_head)? };
        Ok(DeviceModel {
            config: config.clone(),
            embed,
            layers: weights.layers.iter().map(layer).collect::<Result<_>>()?,
            norm: vector(&weights.norm)?,
            head,
            ropes: ropes.iter().map(angles).collect::<Result<_>>()?,
            place,
        })
    }

    /// Returns the shape of the model.
    pub(crate) fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Returns the device.
    pub(crate) fn place(&self) -> &Place {
        &self.place
    }

    pub(super) fn dtype(&self) -> DType {
        self.place.dtype
    }

    /// Copies ids or places to the device.
    pub(super) fn indexes(&self, values: Vec<u32>) -> Result<Tensor> {
        let count = values.len();
        Ok(Tensor::from_vec(values, count, &self.place.device)?)
    }

    /// Returns the embeddings of tokens, `[rows, hidden]`.
    pub(super) fn embedded(&self, ids: &[u32]) -> Result<Tensor> {
        let vocab = self.config.vocab;
        if let Some(id) = ids.iter().find(|id| **id as usize >= vocab) {
            return Err(EngineError::request(format!("token id {id} is outside the vocabulary of {vocab}")));
        }
        let x = self.embed.index_select(&self.indexes(ids.to_vec())?, 0)?.to_dtype(DType::F32)?;
        match self.config.embedding_scale {
            Some(scale) => Ok((x * f64::from(scale))?),
            None => Ok(x),
        }
    }

    /// Returns the angles of rows at these positions, for each rotary embedding of the model.
    pub(super) fn angles(&self, positions: &[usize]) -> Result<Vec<Angles>> {
        let context = self.config.max_positions;
        if let Some(position) = positions.iter().find(|position| **position >= context) {
            let problem = format!("position {position} is outside the context of {context} tokens; shorten the sample");
            return Err(EngineError::request(problem));
        }
        let places = self.indexes(positions.iter().map(|position| *position as u32).collect())?;
        let pick = |table: &Tensor| table.index_select(&places, 0)?.unsqueeze(1);
        self.ropes.iter().map(|rope| Ok(Angles { cos: pick(&rope.cos)?, sin: pick(&rope.sin)? })).collect()
    }

    /// Returns what a layer makes of rows `[rows, hidden]`. `attend` turns its heads into `[rows, heads * head_dim]`.
    pub(super) fn layer(
        &self,
        index: usize,
        x: &Tensor,
        angles: &[Angles],
        parts: &[Part],
        attend: &mut dyn FnMut(Heads) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let layer = &self.layers[index];
        let angles = self.config.layers[index].rope.map(|rope| &angles[rope]);
        let input = self.input(self.entering(x, layer.attn_norm.as_ref())?)?;
        let mixed = attend(self.heads(layer, angles, parts, &input)?)?;
        let out = self.linear(layer, Linear::O, parts, &self.input(mixed)?)?;
        let x = (x + self.entering(&out, layer.attn_post_norm.as_ref())?)?;

        let input = self.input(self.entering(&x, layer.mlp_norm.as_ref())?)?;
        let gate = self.linear(layer, Linear::Gate, parts, &input)?;
        let active = match self.config.block.activation {
            Activation::SwiGlu => gate.silu()?,
            // candle's is the tanh form.
            Activation::GeGlu => gate.gelu()?,
        };
        let product = (active * self.linear(layer, Linear::Up, parts, &input)?)?;
        let out = self.linear(layer, Linear::Down, parts, &self.input(product)?)?;
        Ok((&x + self.entering(&out, layer.mlp_post_norm.as_ref())?)?)
    }

    fn heads(&self, layer: &Layer, angles: Option<&Angles>, parts: &[Part], input: &Input) -> Result<Heads> {
        let c = &self.config;
        let rows = input.wide.dim(0)?;
        let project = |linear: Linear, norm: Option<&Tensor>, count: usize| -> Result<Tensor> {
            let mut out = self.linear(layer, linear, parts, input)?;
            if let Some(bias) = layer.biases.get(linear as usize).and_then(Option::as_ref) {
                out = out.broadcast_add(bias)?;
            }
            let whole = norm.filter(|_| c.block.qk_norm == QkNorm::Full);
            let each = norm.filter(|_| c.block.qk_norm == QkNorm::PerHead);
            let out = self.entering(&out, whole)?.reshape((rows, count, c.head_dim))?;
            self.entering(&out, each)
        };
        let rotated = |x: Tensor| angles.map_or(Ok(x.clone()), |angles| angles.rotate(&x));
        let q = rotated(project(Linear::Q, layer.q_norm.as_ref(), c.heads)?)?;
        let k = rotated(project(Linear::K, layer.k_norm.as_ref(), c.kv_heads)?)?;
        let v = project(Linear::V, None, c.kv_heads)?;
        Ok(Heads { q: (q * f64::from(c.scores.scale))?, k, v })
    }

    fn input(&self, wide: Tensor) -> Result<Input> {
        Ok(Input { narrow: wide.to_dtype(self.place.dtype)?, wide })
    }

    /// Multiplies rows by a frozen weight, and adds what adapters make of them.
    fn linear(&self, layer: &Layer, linear: Linear, parts: &[Part], input: &Input) -> Result<Tensor> {
        let product = frozen::product(&input.narrow, &layer.linears[linear as usize])?.to_dtype(DType::F32)?;
        lora::add(parts, linear, &input.wide, product)
    }

    /// Returns rows normed where there is a norm.
    fn entering(&self, x: &Tensor, norm: Option<&Tensor>) -> Result<Tensor> {
        norm.map_or_else(|| Ok(x.clone()), |norm| self.normed(x, norm))
    }

    /// Returns rows at unit mean square, times a weight.
    pub(super) fn normed(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
        Ok(x.broadcast_div(&(mean + self.config.rms_eps)?.sqrt()?)?.broadcast_mul(weight)?)
    }

    /// Returns the logits of some of the normed rows, `[rows, vocab]`.
    pub(crate) fn logits_of(&self, hidden: &Tensor, rows: &[usize]) -> Result<Tensor> {
        let rows = self.indexes(rows.iter().map(|row| *row as u32).collect())?;
        self.logits(&hidden.index_select(&rows, 0)?)
    }

    /// Returns the logits of normed rows, `[rows, vocab]`.
    pub(super) fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let logits = frozen::product(&hidden.to_dtype(self.place.dtype)?, &self.head)?.to_dtype(DType::F32)?;
        bent(logits, self.config.logit_cap)
    }
}

impl Angles {
    /// Rotates `[rows, heads, head_dim]`: the first dimensions of a head, in halves.
    fn rotate(&self, x: &Tensor) -> Result<Tensor> {
        let (half, width) = (self.cos.dim(D::Minus1)?, x.dim(D::Minus1)?);
        let (first, second) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
        let turned = [
            (first.broadcast_mul(&self.cos)? - second.broadcast_mul(&self.sin)?)?,
            (second.broadcast_mul(&self.cos)? + first.broadcast_mul(&self.sin)?)?,
        ];
        let [first, second] = &turned;
        Ok(match width - 2 * half {
            0 => Tensor::cat(&[first, second], 2)?,
            rest => Tensor::cat(&[first, second, &x.narrow(2, 2 * half, rest)?], 2)?,
        })
    }
}

/// Bends values into +- a cap.
pub(super) fn bent(x: Tensor, cap: Option<f32>) -> Result<Tensor> {
    match cap {
        None => Ok(x),
        Some(cap) => Ok(((x / f64::from(cap))?.tanh()? * f64::from(cap))?),
    }
}
