//! Log-probs of given tokens from hidden states, through a frozen output layer.
//!
//! Logits over the whole vocabulary exist for a few rows at a time only. The gradient of a log-prob with respect to its
//! hidden row, `W[target] - p W`, needs just what the chunk holds at that moment, and it enters the backward pass
//! multiplied by one number per row. So it is made in the forward pass and kept (`[tokens, hidden]`), which saves
//! computing the logits a second time.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::mat::{Into, Mat, MatMut, Threads, multiply};
use super::{LANES, Values, exp, largest, output, tensor};

/// Rows whose logits are held at once: 25 MB for a vocabulary of 49,152.
const ROWS: usize = 128;

/// What [`token_logprobs`] returns, one value per row.
pub struct TokenLogprobs {
    /// Log-softmax of the raw logits at the target; differentiable with respect to the hidden states.
    pub logprobs: Tensor,
    /// Entropy of the whole distribution in nats, without history.
    pub entropies: Vec<f32>,
}

/// Returns the log-prob of `targets[i]` after `hidden[i]`, for `hidden` `[rows, width]` and `lm_head` `[vocab, width]`.
pub fn token_logprobs(hidden: &Tensor, lm_head: &Tensor, targets: &[u32]) -> Result<TokenLogprobs> {
    let (rows, width) = hidden.dims2()?;
    let vocab = lm_head.dim(0)?;
    if targets.len() != rows {
        bail!("{} targets for {rows} hidden states", targets.len());
    }
    if let Some(id) = targets.iter().find(|id| **id as usize >= vocab) {
        bail!("token id {id} is outside the vocabulary of {vocab}");
    }
    let head = Head { weight: &Values::of(lm_head)?, vocab, width };
    let values = Values::of(hidden)?;
    let mut logprobs = Vec::with_capacity(rows);
    let mut entropies = Vec::with_capacity(rows);
    let mut slopes = vec![0.0; if hidden.track_op() { rows * width } else { 0 }];
    let mut logits = vec![0.0; rows.min(ROWS) * vocab];
    for (chunk, targets) in targets.chunks(ROWS).enumerate() {
        let at = chunk * ROWS * width..(chunk * ROWS + targets.len()) * width;
        let logits = &mut logits[..targets.len() * vocab];
        let found = head.logprobs(&values[at.clone()], targets, logits)?;
        logprobs.extend(found.iter().map(|(logprob, _)| logprob));
        entropies.extend(found.iter().map(|(_, entropy)| entropy));
        if let Some(slopes) = slopes.get_mut(at) {
            head.slopes(logits, targets.len(), slopes)?;
        }
    }
    let logprobs = hidden.apply_op1(Known { logprobs, slopes })?;
    Ok(TokenLogprobs { logprobs, entropies })
}

struct Head<'a> {
    weight: &'a [f32],
    vocab: usize,
    width: usize,
}

impl Head<'_> {
    /// Fills `logits` with `onehot(target) - p` and returns the log-prob and the entropy of each row.
    fn logprobs(&self, hidden: &[f32], targets: &[u32], logits: &mut [f32]) -> Result<Vec<(f32, f32)>> {
        let rows = targets.len();
        let (hidden, weight) = (Mat::new(hidden, rows, self.width)?, Mat::new(self.weight, self.vocab, self.width)?);
        multiply(MatMut::new(logits, rows, self.vocab)?, Into::Fresh, 1.0, hidden, weight.t(), Threads::All)?;
        Ok(logits.par_chunks_mut(self.vocab).zip(targets).map(|(row, id)| log_softmax(row, *id as usize)).collect())
    }

    fn slopes(&self, differences: &[f32], rows: usize, slopes: &mut [f32]) -> Result<()> {
        let (d, weight) = (Mat::new(differences, rows, self.vocab)?, Mat::new(self.weight, self.vocab, self.width)?);
        multiply(MatMut::new(slopes, rows, self.width)?, Into::Fresh, 1.0, d, weight, Threads::All)
    }
}

/// Returns the log-prob of `target` and the entropy, and turns the logits into `onehot(target) - p`.
fn log_softmax(logits: &mut [f32], target: usize) -> (f32, f32) {
    let max = largest(logits);
    let chosen = logits[target] - max;
    let (chunks, rest) = logits.as_chunks_mut::<LANES>();
    let (mut sums, mut weighted) = ([0.0_f32; LANES], [0.0_f32; LANES]);
    for chunk in chunks {
        for i in 0..LANES {
            let shifted = chunk[i] - max;
            chunk[i] = exp(shifted);
            sums[i] += chunk[i];
            weighted[i] += chunk[i] * shifted;
        }
    }
    for (i, value) in rest.iter_mut().enumerate() {
        let shifted = *value - max;
        *value = exp(shifted);
        sums[i] += *value;
        weighted[i] += *value * shifted;
    }
    let sum: f32 = sums.iter().sum();
    let scale = -1.0 / sum;
    logits.iter_mut().for_each(|e| *e *= scale);
    logits[target] += 1.0;
    let log_sum = sum.ln();
    (chosen - log_sum, log_sum - weighted.iter().sum::<f32>() / sum)
}

/// The op that ties values computed already to the hidden states they came from.
struct Known {
    logprobs: Vec<f32>,
    slopes: Vec<f32>,
}

impl CustomOp1 for Known {
    fn name(&self) -> &'static str {
        "token-logprobs"
    }

    fn cpu_fwd(&self, _hidden: &CpuStorage, _layout: &Layout) -> Result<(CpuStorage, Shape)> {
        output(self.logprobs.clone(), self.logprobs.len())
    }

    fn bwd(&self, hidden: &Tensor, _logprobs: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let width = hidden.dim(1)?;
        let rows = self.slopes.chunks_exact(width).zip(Values::of(&grad)?.to_vec());
        let dx: Vec<f32> = rows.flat_map(|(slope, g)| slope.iter().map(move |s| s * g)).collect();
        Ok(Some(tensor(dx, hidden.dims())?))
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{gradients, random};
    use super::*;

    #[test]
    fn logprobs_and_entropies_agree_with_candle_over_several_chunks() {
        let (rows, vocab) = (ROWS + 3, 37);
        let hidden = (random(1, &[rows, 6]) * 4.0).unwrap();
        let head = random(2, &[vocab, 6]);
        let targets: Vec<u32> = (0..rows as u32).map(|i| i * 7 % vocab as u32).collect();
        let found = token_logprobs(&hidden, &head, &targets).unwrap();
        let logits = hidden.matmul(&head.t().unwrap()).unwrap();
        let expected = candle_nn::ops::log_softmax(&logits, 1).unwrap().to_vec2::<f32>().unwrap();
        for (i, logprob) in found.logprobs.to_vec1::<f32>().unwrap().iter().enumerate() {
            assert!((logprob - expected[i][targets[i] as usize]).abs() < 1e-5, "row {i}");
            let entropy: f32 = expected[i].iter().map(|l| -l * l.exp()).sum();
            assert!((found.entropies[i] - entropy).abs() < 1e-4, "row {i}: {} {entropy}", found.entropies[i]);
        }
    }

    #[test]
    fn backward_agrees_with_differences() {
        let head = random(2, &[9, 6]);
        gradients(&[random(1, &[5, 6])], |t| Ok(token_logprobs(&t[0], &head, &[0, 8, 3, 3, 1])?.logprobs));
    }

    #[test]
    fn a_token_outside_the_vocabulary_is_refused() {
        let error = token_logprobs(&random(1, &[1, 6]), &random(2, &[9, 6]), &[9]).err().unwrap();
        assert!(error.to_string().contains("token id 9"), "{error}");
    }
}
