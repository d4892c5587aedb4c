//! The forward and backward pass of a reward model in training: the last hidden row of whole texts.
//!
//! Texts that begin alike (two answers to one prompt) run what they share once, as completions do. What is done with the
//! rows, a scalar head and a loss over pairs, is the caller's.

use super::layer::Batch;
use super::{Base, Kept, LoraMatrices, Packed, gather};
use crate::engine::error::EngineError;
use crate::engine::ops::pointwise::RmsNorm;

/// Texts with a common beginning of at least one token, each with at least one of its own.
#[derive(Debug, Clone)]
pub struct TextGroup<'a> {
    pub prefix: &'a [u32],
    pub endings: Vec<&'a [u32]>,
}

impl TextGroup<'_> {
    /// Returns how many rows the group takes in a packed batch.
    pub fn rows(&self) -> usize {
        self.prefix.len() + self.endings.iter().map(|ending| ending.len()).sum::<usize>()
    }
}

/// A forward pass whose last rows are wanted, kept for its backward pass.
pub struct PooledPass<'a> {
    base: &'a Base<'a>,
    lora: &'a LoraMatrices,
    batch: Batch,
    packed: Packed,
    saved: Vec<Kept>,
    /// The rows before the last norm.
    pooled: Vec<f32>,
    hidden: Vec<f32>,
}

impl<'a> Base<'a> {
    /// Runs the model with `lora` over texts and keeps what [`PooledPass::backward`] needs.
    pub fn pool<'p>(&'p self, lora: &'p LoraMatrices, groups: &[TextGroup]) -> Result<PooledPass<'p>, EngineError> {
        let packed = Packed::whole(groups)?;
        let (x, batch, saved) = self.run(&packed, lora, None)?;
        let pooled = gather(&x, packed.predicting.iter().copied(), self.config.hidden_size);
        let hidden = RmsNorm::new(&self.weights.norm, self.config.rms_eps)?.forward(&pooled);
        Ok(PooledPass { base: self, lora, batch, packed, saved, pooled, hidden })
    }
}

impl PooledPass<'_> {
    /// Returns the normed hidden row of the last token of each text, `[texts, hidden]`: group by group, ending by ending.
    pub fn hidden(&self) -> &[f32] {
        &self.hidden
    }

    /// Adds to `gradients` those of a loss whose gradient with respect to [`PooledPass::hidden`] is `grad`.
    pub fn backward(self, grad: &[f32], gradients: &mut [Vec<f32>]) -> Result<(), EngineError> {
        let PooledPass { base, lora, batch, packed, saved, pooled, hidden } = self;
        if grad.len() != hidden.len() || gradients.len() != lora.values.len() {
            let (found, expected) = (grad.len(), hidden.len());
            return Err(EngineError::request(format!("{found} slopes for {expected} hidden values")));
        }
        base.run_backward(lora, (&packed, &batch, saved), &pooled, grad, gradients)
    }
}
