//! Attention of rows over positions, and which positions a row sees.

use candle_core::{D, DType, Tensor};

use super::Result;
use super::model::{DeviceModel, Heads, bent};
use crate::engine::ops::attention::GroupRows;

/// Scores of one layer that are held at once, in numbers: 1 GiB.
pub(super) const SCORES: usize = 1 << 28;
/// What is added to the score of a position that a row does not see. It takes the score's place in f32, and its exponential
/// is 0; minus infinity would turn into NaN on the way back.
const UNSEEN: f64 = 1e30;

impl DeviceModel {
    /// Returns what rows of some sequences mix of the values that they see, `[sequences * rows, heads * head_dim]`.
    ///
    /// `q` is `[sequences, rows, heads, head_dim]`, keys and values are `[kv_heads, sequences, positions, head_dim]` in the device's
    /// precision, and `mask` (`[sequences, rows, positions]`) is added to the scores.
    pub(super) fn attend(&self, q: &Tensor, keys: &Tensor, values: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let c = &self.config;
        let (sequences, rows, _, dim) = q.dims4()?;
        let (kv, group, positions) = (c.kv_heads, c.heads / c.kv_heads, keys.dim(2)?);
        let batches = kv * sequences;
        let q = q.reshape((sequences, rows, kv, group, dim))?.permute((2, 0, 3, 1, 4))?.contiguous()?;
        let q = q.reshape((batches, group * rows, dim))?.to_dtype(self.dtype())?;
        let scores = q.matmul(&keys.reshape((batches, positions, dim))?.t()?)?.to_dtype(DType::F32)?;
        let scores = bent(scores, c.scores.cap)?.reshape((kv, sequences, group, rows, positions))?;
        let shares = softmax(&scores.broadcast_add(&mask.reshape((1, sequences, 1, rows, positions))?)?)?;
        let shares = shares.reshape((batches, group * rows, positions))?.to_dtype(self.dtype())?;
        let mixed = shares.matmul(&values.reshape((batches, positions, dim))?)?.to_dtype(DType::F32)?;
        let mixed = mixed.reshape((kv, sequences, group, rows, dim))?.permute((1, 3, 0, 2, 4))?.contiguous()?;
        Ok(mixed.reshape((sequences * rows, c.heads * dim))?)
    }

    /// Returns the same for packed groups: a prompt sees itself, a completion its prompt and itself.
    pub(super) fn attend_groups(&self, groups: &[Group], window: Option<usize>, heads: &Heads) -> Result<Tensor> {
        let mut pieces = Vec::new();
        for group in groups {
            let own = |t: &Tensor| t.narrow(0, group.first, group.rows);
            let cached = |t: &Tensor| -> Result<Tensor> {
                Ok(own(t)?.to_dtype(self.dtype())?.transpose(0, 1)?.contiguous()?.unsqueeze(1)?)
            };
            let (q, keys, values) = (own(&heads.q)?.unsqueeze(0)?, cached(&heads.k)?, cached(&heads.v)?);
            let height = (SCORES / (self.config.heads * group.rows)).max(1);
            for first in (0..group.rows).step_by(height) {
                let rows = height.min(group.rows - first);
                let mask = group.mask(first, rows, window)?;
                pieces.push(self.attend(&q.narrow(1, first, rows)?, &keys, &values, &mask)?);
            }
        }
        match pieces.as_slice() {
            [one] => Ok(one.clone()),
            _ => Ok(Tensor::cat(&pieces, 0)?),
        }
    }
}

/// A prompt and its completions in a packed batch.
pub(super) struct Group {
    first: usize,
    rows: usize,
    /// The position of each row, and its run: 0 for the prompt, then the completions.
    positions: Tensor,
    runs: Tensor,
}

impl Group {
    /// Describes a group whose rows stand one after the other, its prompt first. `positions` are those of the whole batch.
    pub(super) fn new(model: &DeviceModel, rows: &GroupRows, positions: &[usize]) -> Result<Self> {
        let std::ops::Range { start: first, end } = rows.all();
        let mut runs = vec![0.0f32; end - first];
        for (run, own) in rows.completions.iter().enumerate() {
            runs[own.start - first..own.end - first].fill(run as f32 + 1.0);
        }
        let positions: Vec<f32> = positions[first..end].iter().map(|position| *position as f32).collect();
        let device = &model.place().device;
        Ok(Group {
            first,
            rows: end - first,
            positions: Tensor::from_vec(positions, end - first, device)?,
            runs: Tensor::from_vec(runs, end - first, device)?,
        })
    }

    /// Returns what is added to the scores of some of its rows, `[1, rows, all rows]`.
    fn mask(&self, first: usize, rows: usize, window: Option<usize>) -> Result<Tensor> {
        let own = |t: &Tensor| t.narrow(0, first, rows)?.unsqueeze(1);
        let distance = own(&self.positions)?.broadcast_sub(&self.positions.unsqueeze(0)?)?;
        let runs = self.runs.unsqueeze(0)?;
        let (same, prompt) = (own(&self.runs)?.broadcast_eq(&runs)?, runs.eq(0.0f32)?);
        let readable = same.to_dtype(DType::F32)?.broadcast_maximum(&prompt.to_dtype(DType::F32)?)?;
        hidden((seen(&distance, window)? * readable)?)?.unsqueeze(0).map_err(Into::into)
    }
}

/// Returns what is added to scores, given how far before the row each position lies (negative: after it).
pub(super) fn mask(distance: &Tensor, window: Option<usize>) -> Result<Tensor> {
    hidden(seen(distance, window)?)
}

/// Returns 1 where a row sees a position, else 0.
fn seen(distance: &Tensor, window: Option<usize>) -> Result<Tensor> {
    let before = distance.ge(0.0f32)?.to_dtype(DType::F32)?;
    match window {
        None => Ok(before),
        Some(window) => Ok((before * distance.lt(window as f32)?.to_dtype(DType::F32)?)?),
    }
}

/// Turns 1 and 0 into what is added to scores.
fn hidden(seen: Tensor) -> Result<Tensor> {
    Ok(((seen - 1.0)? * UNSEEN)?)
}

/// candle's own takes the gradient of the largest score, which cancels out, on its way back.
fn softmax(scores: &Tensor) -> Result<Tensor> {
    let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
    Ok(weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?)
}
