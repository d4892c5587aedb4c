//! Log-probs of given tokens, entropies and divergences on a device.
//!
//! Prompts and their completions are packed as in training: a prompt runs once for all its completions. Logits over the
//! whole vocabulary exist for a few rows at a time.

use candle_core::{D, DType, Tensor};

use super::Result;
use super::attention::Group;
use super::lora::Lora;
use super::model::DeviceModel;
use crate::engine::score::ScoreItem;
use crate::engine::train::{GroupTokens, Packed};

/// Logits that are held at once, in numbers: 256 MiB for each step of their computation.
const LOGITS: usize = 1 << 26;

/// What rows say of their targets.
pub(super) struct Told {
    /// One per row.
    pub(super) logprobs: Vec<f32>,
    pub(super) entropies: Vec<f32>,
    /// The gradient of each log-prob with respect to its row, `[rows, hidden]`, where it was asked for.
    pub(super) slopes: Option<Tensor>,
}

impl DeviceModel {
    /// Returns the log-probs of each item's tokens, item after item.
    pub(crate) fn logprobs(&self, lora: Option<&Lora>, items: &[ScoreItem]) -> Result<Vec<f32>> {
        let packed = Packed::new(&groups(items))?;
        Ok(self.told(&self.predicting(lora, &packed)?, &packed.targets, false)?.logprobs)
    }

    /// Returns KL(p || q) over the whole vocabulary at each of the items' tokens, item after item.
    pub(crate) fn divergences(&self, p: Option<&Lora>, q: Option<&Lora>, items: &[ScoreItem]) -> Result<Vec<f32>> {
        let packed = Packed::new(&groups(items))?;
        let (p, q) = (self.predicting(p, &packed)?, self.predicting(q, &packed)?);
        let mut found = Vec::with_capacity(packed.targets.len());
        let height = self.height();
        for first in (0..packed.targets.len()).step_by(height) {
            let rows = height.min(packed.targets.len() - first);
            let logs = |hidden: &Tensor| -> Result<Tensor> {
                let logits = self.logits(&hidden.narrow(0, first, rows)?)?;
                Ok(logits.broadcast_sub(&log_sum(&logits)?)?)
            };
            let (p, q) = (logs(&p)?, logs(&q)?);
            let divergences = (p.exp()? * (p - q)?)?.sum(D::Minus1)?;
            // Rounding can bring two equal distributions just below 0.
            found.extend(divergences.to_vec1::<f32>()?.into_iter().map(|divergence| divergence.max(0.0)));
        }
        Ok(found)
    }

    /// Returns log-probs and entropies of a packed batch under the base.
    pub(in crate::engine) fn told_of(&self, packed: &Packed) -> Result<(Vec<f32>, Vec<f32>)> {
        let told = self.told(&self.predicting(None, packed)?, &packed.targets, false)?;
        Ok((told.logprobs, told.entropies))
    }

    /// Returns the normed rows that predict a packed batch's targets.
    fn predicting(&self, lora: Option<&Lora>, packed: &Packed) -> Result<Tensor> {
        let groups = self.groups(packed)?;
        let angles = self.angles(&packed.positions)?;
        let mut x = self.embedded(&packed.ids)?;
        let all = 0..packed.ids.len();
        for (index, kind) in self.config.layers.iter().enumerate() {
            let part = lora.map(|lora| super::lora::Part { rows: all.clone(), pairs: lora.layer(index) });
            x = self.layer(index, &x, &angles, part.as_slice(), &mut |heads| {
                self.attend_groups(&groups, kind.window, &heads)
            })?;
        }
        self.normed(&x.index_select(&self.places(packed)?, 0)?, &self.norm)
    }

    /// Returns the groups of a packed batch, as attention sees them.
    pub(super) fn groups(&self, packed: &Packed) -> Result<Vec<Group>> {
        packed.groups.iter().map(|rows| Group::new(self, rows, &packed.positions)).collect()
    }

    /// Returns the places of the rows that predict targets.
    pub(super) fn places(&self, packed: &Packed) -> Result<Tensor> {
        self.indexes(packed.predicting.iter().map(|row| *row as u32).collect())
    }

    /// Returns the rows whose logits are held at once.
    fn height(&self) -> usize {
        (LOGITS / self.config.vocab).max(1)
    }

    /// Returns what normed rows say of their targets, with the gradients for a way back where they are asked for.
    pub(super) fn told(&self, hidden: &Tensor, targets: &[u32], slopes: bool) -> Result<Told> {
        let mut told = Told { logprobs: Vec::new(), entropies: Vec::new(), slopes: None };
        let mut pieces = Vec::new();
        for (chunk, targets) in targets.chunks(self.height()).enumerate() {
            let hidden = hidden.narrow(0, chunk * self.height(), targets.len())?;
            let targets = self.indexes(targets.to_vec())?.unsqueeze(1)?;
            let logits = self.logits(&hidden)?;
            let logs = logits.broadcast_sub(&log_sum(&logits)?)?;
            let shares = logs.exp()?;
            told.logprobs.extend(logs.gather(&targets, 1)?.squeeze(1)?.to_vec1::<f32>()?);
            told.entropies.extend((&shares * &logs)?.sum(D::Minus1)?.neg()?.to_vec1::<f32>()?);
            if slopes {
                pieces.push(self.slopes(&shares, &logits, &targets)?);
            }
        }
        if slopes {
            told.slopes = Some(Tensor::cat(&pieces, 0)?);
        }
        Ok(told)
    }

    /// Returns the gradient of each target's log-prob with respect to its row: `(onehot - p) W`, less where logits are bent.
    fn slopes(&self, shares: &Tensor, logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
        let ones = Tensor::ones(targets.dims(), DType::F32, targets.device())?;
        let mut slopes = shares.neg()?.scatter_add(targets, &ones, 1)?;
        if let Some(cap) = self.config.logit_cap {
            let bend = (1.0 - (logits / f64::from(cap))?.sqr()?)?;
            slopes = (slopes * bend)?;
        }
        Ok(slopes.to_dtype(self.dtype())?.matmul(&self.head)?.to_dtype(DType::F32)?)
    }
}

/// Returns the logarithm of each row's sum of exponentials, as a column.
fn log_sum(logits: &Tensor) -> Result<Tensor> {
    let largest = logits.max_keepdim(D::Minus1)?;
    Ok((logits.broadcast_sub(&largest)?.exp()?.sum_keepdim(D::Minus1)?.log()? + largest)?)
}

/// Puts items of one prompt side by side into a group.
fn groups<'a>(items: &[ScoreItem<'a>]) -> Vec<GroupTokens<'a>> {
    let mut groups: Vec<GroupTokens> = Vec::new();
    for item in items {
        match groups.last_mut() {
            Some(last) if last.prompt == item.prompt => last.completions.push(item.completion),
            _ => groups.push(GroupTokens { prompt: item.prompt, completions: vec![item.completion] }),
        }
    }
    groups
}
