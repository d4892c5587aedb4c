//! One decoder layer forth and back.

use candle_core::{Result, Tensor};

use super::LoraMatrices;
use crate::engine::config::ModelConfig;
use crate::engine::lora::Linear;
use crate::engine::ops::attention::Attention;
use crate::engine::ops::linear::{Frozen, PairGradient};
use crate::engine::ops::mat::Into;
use crate::engine::ops::pointwise::{RmsNorm, Rotation, swiglu, swiglu_backward};
use crate::engine::weights::LayerWeights;

/// What all layers of a pass share.
pub(super) struct Batch {
    pub(super) attention: Attention,
    pub(super) rotation: Rotation,
}

/// One decoder layer with the adapter in training, if there is one.
pub(super) struct Layer<'a> {
    pub(super) config: &'a ModelConfig,
    pub(super) weights: &'a LayerWeights,
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
    /// The input of the MLP's half.
    middle: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
}

/// What a layer's forward pass returns.
pub(super) struct Forward {
    pub(super) output: Vec<f32>,
    pub(super) saved: Saved,
}

impl Layer<'_> {
    pub(super) fn forward(&self, x: Vec<f32>, batch: &Batch) -> Result<Forward> {
        let w = self.weights;
        let normed = self.norm(&w.attn_norm)?.forward(&x);
        let mut q = self.linear(Linear::Q, &normed)?;
        let mut k = self.linear(Linear::K, &normed)?;
        let v = self.linear(Linear::V, &normed)?;
        let mut unnormed = None;
        if let (Some(q_norm), Some(k_norm)) = (&w.q_norm, &w.k_norm) {
            let before = (q, k);
            (q, k) = (self.norm(q_norm)?.forward(&before.0), self.norm(k_norm)?.forward(&before.1));
            unnormed = Some(before);
        }
        batch.rotation.forward(&mut q);
        batch.rotation.forward(&mut k);
        let mixed = batch.attention.forward(&q, &k, &v)?;
        let mut middle = self.linear(Linear::O, &mixed)?;
        add(&mut middle, &x);

        let normed = self.norm(&w.mlp_norm)?.forward(&middle);
        let (gate, up) = (self.linear(Linear::Gate, &normed)?, self.linear(Linear::Up, &normed)?);
        let mut output = self.linear(Linear::Down, &swiglu(&gate, &up))?;
        add(&mut output, &middle);
        Ok(Forward { output, saved: Saved { x, unnormed, q, k, v, mixed, middle, gate, up } })
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
        let Saved { x, unnormed, q, k, v, mixed, middle, gate, up } = saved;
        let product = swiglu(&gate, &up);
        let mut d_product = vec![0.0; product.len()];
        self.linear_backward(Linear::Down, &product, &grad, Some((&mut d_product, Into::Fresh)), gradients)?;
        let (d_gate, d_up) = swiglu_backward(&gate, &up, d_product);
        let norm = self.norm(&w.mlp_norm)?;
        let normed = norm.forward(&middle);
        let mut d_normed = vec![0.0; normed.len()];
        self.linear_backward(Linear::Gate, &normed, &d_gate, Some((&mut d_normed, Into::Fresh)), gradients)?;
        self.linear_backward(Linear::Up, &normed, &d_up, Some((&mut d_normed, Into::Sum)), gradients)?;
        norm.backward(&middle, &d_normed, &mut grad);

        let mut d_mixed = vec![0.0; mixed.len()];
        self.linear_backward(Linear::O, &mixed, &grad, Some((&mut d_mixed, Into::Fresh)), gradients)?;
        let [mut dq, mut dk, dv] = batch.attention.backward(&q, &k, &v, &d_mixed)?;
        batch.rotation.backward(&mut dq);
        batch.rotation.backward(&mut dk);
        if let (Some((q, k)), Some(q_norm), Some(k_norm)) = (unnormed, &w.q_norm, &w.k_norm) {
            (dq, dk) = (self.norm_backward(q_norm, &q, &dq)?, self.norm_backward(k_norm, &k, &dk)?);
        }
        let norm = self.norm(&w.attn_norm)?;
        let normed = norm.forward(&x);
        let wanted = self.index > 0;
        for (linear, d, into) in [(Linear::Q, dq, Into::Fresh), (Linear::K, dk, Into::Sum), (Linear::V, dv, Into::Sum)]
        {
            self.linear_backward(linear, &normed, &d, wanted.then_some((&mut d_normed, into)), gradients)?;
        }
        if !wanted {
            return Ok(Vec::new());
        }
        norm.backward(&x, &d_normed, &mut grad);
        Ok(grad)
    }

    fn norm<'n>(&self, weight: &'n Tensor) -> Result<RmsNorm<'n>> {
        RmsNorm::new(weight, self.config.rms_eps)
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
        Frozen::new(weight, bias)
    }

    fn linear(&self, linear: Linear, x: &[f32]) -> Result<Vec<f32>> {
        self.frozen(linear)?.forward(x, self.lora.and_then(|lora| lora.pair(self.index, linear)))
    }

    fn linear_backward(
        &self,
        linear: Linear,
        x: &[f32],
        grad: &[f32],
        dx: Option<(&mut Vec<f32>, Into)>,
        gradients: &mut [Vec<f32>],
    ) -> Result<()> {
        let mut pair = None;
        if let Some(lora) = self.lora
            && let (Some(at), Some(values)) = (lora.position(self.index, linear), lora.pair(self.index, linear))
            && let Some([a, b]) = gradients.get_mut(at..at + 2)
        {
            pair = Some((values, PairGradient { a, b }));
        }
        self.frozen(linear)?.backward(x, grad, pair, dx.map(|(dx, into)| (&mut dx[..], into)))
    }
}

fn add(sum: &mut [f32], values: &[f32]) {
    sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
}
