//! One decoder layer forth and back.

use std::borrow::Cow;

use candle_core::Tensor;
use rayon::prelude::*;

use super::LoraMatrices;
use crate::engine::config::{Activation, LayerKind, ModelConfig};
use crate::engine::error::EngineError;
use crate::engine::lora::Linear;
use crate::engine::ops::attention::{Attention, Scoring};
use crate::engine::ops::dropout::RowSeeds;
use crate::engine::ops::linear::{Frozen, Pair, PairGradient, Products};
use crate::engine::ops::mat::Into;
use crate::engine::ops::pointwise::{RmsNorm, Rotation, VALUES, geglu, geglu_backward, swiglu, swiglu_backward};
use crate::engine::ops::zeros;
use crate::engine::weights::LayerWeights;

type Result<T> = std::result::Result<T, EngineError>;

/// What all layers of a pass share.
pub(super) struct Batch {
    pub(super) attention: Attention,
    /// One per rotary embedding of the model.
    pub(super) rotations: Vec<Rotation>,
    /// What the adapter does not see, in a step of training.
    pub(super) dropout: Option<RowSeeds>,
}

/// One decoder layer with the adapter in training, if there is one.
pub(super) struct Layer<'a> {
    pub(super) config: &'a ModelConfig,
    pub(super) weights: &'a LayerWeights,
    /// How those of the linear layers are multiplied.
    pub(super) products: [Products<'a>; 7],
    pub(super) index: usize,
    pub(super) lora: Option<&'a LoraMatrices>,
}

/// The activations that the backward pass reads. Norms and the MLP's product are cheap and made again.
pub(super) struct Saved {
    /// The layer's input.
    x: Vec<f32>,
    /// Queries and keys before their norm, where the model has one.
    unnormed: Option<(Vec<f32>, Vec<f32>)>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    /// The attention's output.
    mixed: Vec<f32>,
    /// What attention's half came to before its norm, where the model has one.
    attended: Option<Vec<f32>>,
    /// The input of the MLP's half.
    middle: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    /// What the MLP's half came to before its norm, where the model has one.
    transformed: Option<Vec<f32>>,
}

impl Saved {
    /// Returns the layer's input, from which all of it can be made again.
    pub(super) fn into_input(self) -> Vec<f32> {
        self.x
    }
}

/// What a layer's forward pass returns.
pub(super) struct Forward {
    pub(super) output: Vec<f32>,
    pub(super) saved: Saved,
}

impl Layer<'_> {
    pub(super) fn forward(&self, x: Vec<f32>, batch: &Batch) -> Result<Forward> {
        let mut saved = self.until_down(x, batch)?;
        let output = self.down(&mut saved, batch)?;
        Ok(Forward { output, saved })
    }

    /// Makes the activations again from the layer's input; what comes after them only where the backward pass reads it.
    pub(super) fn again(&self, x: Vec<f32>, batch: &Batch) -> Result<Saved> {
        let mut saved = self.until_down(x, batch)?;
        if self.weights.mlp_post_norm.is_some() {
            self.down(&mut saved, batch)?;
        }
        Ok(saved)
    }

    fn until_down(&self, x: Vec<f32>, batch: &Batch) -> Result<Saved> {
        let w = self.weights;
        let normed = self.normed(w.attn_norm.as_ref(), &x)?;
        let mut q = self.linear(Linear::Q, &normed, batch)?;
        let mut k = self.linear(Linear::K, &normed, batch)?;
        let v = self.linear(Linear::V, &normed, batch)?;
        let mut unnormed = None;
        if let (Some(q_norm), Some(k_norm)) = (&w.q_norm, &w.k_norm) {
            let before = (q, k);
            (q, k) = (self.norm(q_norm)?.forward(&before.0), self.norm(k_norm)?.forward(&before.1));
            unnormed = Some(before);
        }
        if let Some(rotation) = self.rotation(batch) {
            rotation.forward(&mut q);
            rotation.forward(&mut k);
        }
        let mixed = batch.attention.forward(&q, &k, &v, self.scoring())?;
        let (mut middle, attended) =
            self.post_normed(w.attn_post_norm.as_ref(), self.linear(Linear::O, &mixed, batch)?)?;
        add(&mut middle, &x);

        let normed = self.normed(w.mlp_norm.as_ref(), &middle)?;
        let (gate, up) = (self.linear(Linear::Gate, &normed, batch)?, self.linear(Linear::Up, &normed, batch)?);
        Ok(Saved { x, unnormed, q, k, v, mixed, attended, middle, gate, up, transformed: None })
    }

    /// Returns the layer's output.
    fn down(&self, saved: &mut Saved, batch: &Batch) -> Result<Vec<f32>> {
        let down = self.linear(Linear::Down, &self.product(&saved.gate, &saved.up), batch)?;
        let (mut output, transformed) = self.post_normed(self.weights.mlp_post_norm.as_ref(), down)?;
        add(&mut output, &saved.middle);
        saved.transformed = transformed;
        Ok(output)
    }

    /// Turns the gradient of the layer's output into that of its input, and adds up the gradients of its matrices. The
    /// first layer's input is an embedding that nothing trains, so there nothing is returned.
    pub(super) fn backward(
        &self,
        saved: Saved,
        mut grad: Vec<f32>,
        batch: &Batch,
        gradients: &mut [Vec<f32>],
    ) -> Result<Vec<f32>> {
        let w = self.weights;
        let Saved { x, unnormed, q, k, v, mixed, attended, middle, gate, up, transformed } = saved;
        let product = self.product(&gate, &up);
        let mut d_product = zeros(product.len());
        let d_down = self.post_norm_backward(w.mlp_post_norm.as_ref(), transformed, &grad)?;
        self.linear_backward(Linear::Down, &product, &d_down, batch, Some((&mut d_product, Into::Fresh)), gradients)?;
        let (d_gate, d_up) = match self.config.block.activation {
            Activation::SwiGlu => swiglu_backward(&gate, &up, d_product),
            Activation::GeGlu => geglu_backward(&gate, &up, d_product),
        };
        let normed = self.normed(w.mlp_norm.as_ref(), &middle)?;
        let mut d_normed = zeros(normed.len());
        self.linear_backward(Linear::Gate, &normed, &d_gate, batch, Some((&mut d_normed, Into::Fresh)), gradients)?;
        self.linear_backward(Linear::Up, &normed, &d_up, batch, Some((&mut d_normed, Into::Sum)), gradients)?;
        self.add_norm_backward(w.mlp_norm.as_ref(), &middle, &d_normed, &mut grad)?;

        let mut d_mixed = zeros(mixed.len());
        let d_out = self.post_norm_backward(w.attn_post_norm.as_ref(), attended, &grad)?;
        self.linear_backward(Linear::O, &mixed, &d_out, batch, Some((&mut d_mixed, Into::Fresh)), gradients)?;
        let [mut dq, mut dk, dv] = batch.attention.backward(&q, &k, &v, &d_mixed, self.scoring())?;
        if let Some(rotation) = self.rotation(batch) {
            rotation.backward(&mut dq);
            rotation.backward(&mut dk);
        }
        if let (Some((q, k)), Some(q_norm), Some(k_norm)) = (unnormed, &w.q_norm, &w.k_norm) {
            (dq, dk) = (self.norm_backward(q_norm, &q, &dq)?, self.norm_backward(k_norm, &k, &dk)?);
        }
        let normed = self.normed(w.attn_norm.as_ref(), &x)?;
        let wanted = self.index > 0;
        for (linear, d, into) in [(Linear::Q, dq, Into::Fresh), (Linear::K, dk, Into::Sum), (Linear::V, dv, Into::Sum)]
        {
            self.linear_backward(linear, &normed, &d, batch, wanted.then_some((&mut d_normed, into)), gradients)?;
        }
        if !wanted {
            return Ok(Vec::new());
        }
        self.add_norm_backward(w.attn_norm.as_ref(), &x, &d_normed, &mut grad)?;
        Ok(grad)
    }

    fn kind(&self) -> LayerKind {
        self.config.layers[self.index]
    }

    fn rotation<'b>(&self, batch: &'b Batch) -> Option<&'b Rotation> {
        self.kind().rope.and_then(|rope| batch.rotations.get(rope))
    }

    fn scoring(&self) -> Scoring {
        let scores = self.config.scores;
        Scoring { scale: scores.scale, cap: scores.cap, window: self.kind().window }
    }

    /// Returns the MLP's gate times its up.
    fn product(&self, gate: &[f32], up: &[f32]) -> Vec<f32> {
        match self.config.block.activation {
            Activation::SwiGlu => swiglu(gate, up),
            Activation::GeGlu => geglu(gate, up),
        }
    }

    /// Returns what goes into a half of the layer: `x` normed, or itself where the model norms what comes out only.
    fn normed<'x>(&self, weight: Option<&Tensor>, x: &'x [f32]) -> Result<Cow<'x, [f32]>> {
        Ok(match weight {
            Some(weight) => Cow::Owned(self.norm(weight)?.forward(x)),
            None => Cow::Borrowed(x),
        })
    }

    /// Adds the gradient of [`Layer::normed`]'s `x` to `dx`.
    fn add_norm_backward(&self, weight: Option<&Tensor>, x: &[f32], grad: &[f32], dx: &mut [f32]) -> Result<()> {
        match weight {
            Some(weight) => self.norm(weight)?.backward(x, grad, dx),
            None => add(dx, grad),
        }
        Ok(())
    }

    /// Returns what a half of the layer adds to the residual, and what it was before its norm where the model has one.
    fn post_normed(&self, weight: Option<&Tensor>, y: Vec<f32>) -> Result<(Vec<f32>, Option<Vec<f32>>)> {
        Ok(match weight {
            Some(weight) => (self.norm(weight)?.forward(&y), Some(y)),
            None => (y, None),
        })
    }

    /// Returns the gradient of [`Layer::post_normed`]'s `y`.
    fn post_norm_backward<'g>(
        &self,
        weight: Option<&Tensor>,
        y: Option<Vec<f32>>,
        grad: &'g [f32],
    ) -> Result<Cow<'g, [f32]>> {
        Ok(match (weight, y) {
            (Some(weight), Some(y)) => Cow::Owned(self.norm_backward(weight, &y, grad)?),
            _ => Cow::Borrowed(grad),
        })
    }

    fn norm<'n>(&self, weight: &'n Tensor) -> Result<RmsNorm<'n>> {
        Ok(RmsNorm::new(weight, self.config.rms_eps)?)
    }

    fn norm_backward(&self, weight: &Tensor, x: &[f32], grad: &[f32]) -> Result<Vec<f32>> {
        let mut dx = vec![0.0; x.len()];
        self.norm(weight)?.backward(x, grad, &mut dx);
        Ok(dx)
    }

    fn frozen(&self, linear: Linear) -> Result<Frozen<'_>> {
        let w = self.weights;
        let (weight, bias) = match linear {
            Linear::Q => (&w.q, w.q_bias.as_ref()),
            Linear::K => (&w.k, w.k_bias.as_ref()),
            Linear::V => (&w.v, w.v_bias.as_ref()),
            Linear::O => (&w.o, None),
            Linear::Gate => (&w.gate, None),
            Linear::Up => (&w.up, None),
            Linear::Down => (&w.down, None),
        };
        Frozen::by(weight, bias, self.products[linear as usize])
    }

    /// Returns the adapter's pair of a linear layer. The parts of a fused module see the same inputs.
    fn pair<'b>(&'b self, linear: Linear, batch: &'b Batch) -> Option<Pair<'b>> {
        let lora = self.lora?;
        let (module, _) = lora.position(self.index, linear)?;
        let dropout = batch.dropout.as_ref().map(|seeds| seeds.of(module));
        Some(Pair { dropout, ..lora.pair(self.index, linear)? })
    }

    fn linear(&self, linear: Linear, x: &[f32], batch: &Batch) -> Result<Vec<f32>> {
        self.frozen(linear)?.forward(x, self.pair(linear, batch))
    }

    fn linear_backward(
        &self,
        linear: Linear,
        x: &[f32],
        grad: &[f32],
        batch: &Batch,
        dx: Option<(&mut Vec<f32>, Into)>,
        gradients: &mut [Vec<f32>],
    ) -> Result<()> {
        let mut pair = None;
        if let Some(lora) = self.lora
            && let (Some((at, own)), Some(values)) = (lora.position(self.index, linear), self.pair(linear, batch))
            && let Some([a, b]) = gradients.get_mut(at..at + 2)
            && let Some(b) = b.get_mut(own)
        {
            pair = Some((values, PairGradient { a, b }));
        }
        self.frozen(linear)?.backward(x, grad, pair, dx.map(|(dx, into)| (&mut dx[..], into)))
    }
}

fn add(sum: &mut [f32], values: &[f32]) {
    let parts = sum.par_chunks_mut(VALUES).zip(values.par_chunks(VALUES));
    parts.for_each(|(sum, values)| sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value));
}
