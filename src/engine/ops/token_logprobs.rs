//! Log-probs of given tokens from hidden states, through a frozen output layer.
//!
//! Logits over the whole vocabulary exist for a few rows at a time only. The gradient of a log-prob with respect to its
//! hidden row, `W[target] - p W`, needs just what the chunk holds at that moment, and a backward pass only multiplies
//! it by one number per row. So it is made in the forward pass and kept (`[tokens, hidden]`), which saves computing the
//! logits a second time.

use rayon::prelude::*;

use super::linear::{Products, Weight};
use super::mat::Into;
use super::{LANES, Work, exp, largest, tanh, wide};
use crate::engine::error::EngineError;
use crate::engine::held::Held;

/// Rows whose logits are held at once: 100 MB for a vocabulary of 49,152.
const ROWS: usize = 512;

/// Whether the slopes for a backward pass are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Slopes {
    Make,
    Skip,
}

/// What [`token_logprobs`] returns, one entry per row.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// Log-softmax of the raw logits at the target.
    pub logprobs: Vec<f32>,
    /// Entropy of the whole distribution, in nats.
    pub entropies: Vec<f32>,
    /// Gradient of each row's log-prob with respect to its hidden state, `[rows, width]`; empty where not made.
    pub slopes: Vec<f32>,
}

/// An output layer `[vocab, width]`, and into +- what its logits are bent (Gemma 2).
#[derive(Clone, Copy)]
pub struct Output<'a> {
    pub weight: &'a Held,
    pub(crate) products: Products<'a>,
    pub cap: Option<f32>,
}

/// Returns the log-prob of `targets[i]` after the i-th row of `hidden`.
pub fn token_logprobs(
    hidden: &[f32],
    output: Output,
    targets: &[u32],
    slopes: Slopes,
) -> Result<TokenLogprobs, EngineError> {
    let head = Head { weight: Weight::new(output.weight, output.products)?, cap: output.cap };
    let (vocab, width) = (head.weight.outs, head.weight.ins);
    let rows = targets.len();
    if rows * width != hidden.len() {
        let problem = format!("{rows} targets for {} hidden values of width {width}", hidden.len());
        return Err(EngineError::request(problem));
    }
    if let Some(id) = targets.iter().find(|id| **id as usize >= vocab) {
        return Err(EngineError::request(format!("token id {id} is outside the vocabulary of {vocab}")));
    }
    let mut found = TokenLogprobs {
        logprobs: Vec::with_capacity(rows),
        entropies: Vec::with_capacity(rows),
        slopes: vec![0.0; if slopes == Slopes::Make { rows * width } else { 0 }],
    };
    let mut logits = vec![0.0; rows.min(ROWS) * vocab];
    for (chunk, targets) in targets.chunks(ROWS).enumerate() {
        let at = chunk * ROWS * width..(chunk * ROWS + targets.len()) * width;
        let logits = &mut logits[..targets.len() * vocab];
        for (logprob, entropy) in head.logprobs(&hidden[at.clone()], targets, logits)? {
            found.logprobs.push(logprob);
            found.entropies.push(entropy);
        }
        if let Some(slopes) = found.slopes.get_mut(at) {
            head.slopes(logits, slopes)?;
        }
    }
    Ok(found)
}

struct Head<'a> {
    weight: Weight<'a>,
    cap: Option<f32>,
}

impl Head<'_> {
    /// Fills `logits` with the slope of the target's log-prob with respect to the products of hidden row and weight,
    /// which is `onehot(target) - p` where nothing bends them, and returns the log-prob and the entropy of each row.
    fn logprobs(&self, hidden: &[f32], targets: &[u32], logits: &mut [f32]) -> Result<Vec<(f32, f32)>, EngineError> {
        self.weight.forth(hidden, logits, Into::Fresh)?;
        let rows = logits.par_chunks_mut(self.weight.outs).zip(targets);
        Ok(match self.cap {
            None => rows.map(|(row, id)| wide(LogSoftmax, (row, *id as usize))).collect(),
            Some(cap) => rows.map(|(row, id)| wide(BentLogSoftmax, (row, *id as usize, cap))).collect(),
        })
    }

    fn slopes(&self, differences: &[f32], slopes: &mut [f32]) -> Result<(), EngineError> {
        self.weight.back(differences, slopes, Into::Fresh)
    }
}

/// Returns the log-prob of `target` and the entropy, and turns the logits into `onehot(target) - p`.
struct LogSoftmax;

impl Work<(&mut [f32], usize)> for LogSoftmax {
    type Output = (f32, f32);

    #[inline(always)]
    fn run((logits, target): (&mut [f32], usize)) -> (f32, f32) {
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
}

/// Does the same for logits that are bent into +- `cap` first.
struct BentLogSoftmax;

impl Work<(&mut [f32], usize, f32)> for BentLogSoftmax {
    type Output = (f32, f32);

    #[inline(always)]
    fn run((products, target, cap): (&mut [f32], usize, f32)) -> (f32, f32) {
        products.iter_mut().for_each(|x| *x = cap * tanh(*x / cap));
        let logits = products;
        let max = largest(logits);
        let chosen = logits[target] - max;
        let (mut sum, mut weighted) = (0.0_f64, 0.0_f64);
        for logit in logits.iter() {
            let e = exp(logit - max);
            sum += f64::from(e);
            weighted += f64::from(e * (logit - max));
        }
        let inverse = (1.0 / sum) as f32;
        for (i, logit) in logits.iter_mut().enumerate() {
            let hit = f32::from(u8::from(i == target));
            let t = *logit / cap;
            *logit = (hit - exp(*logit - max) * inverse) * (1.0 - t * t);
        }
        (chosen - sum.ln() as f32, (sum.ln() - weighted / sum) as f32)
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{gradients, random, random_tensor, tensor};
    use super::super::mat::Digits;
    use super::*;

    #[test]
    fn logprobs_and_entropies_agree_with_candle_over_several_chunks() {
        let (rows, vocab) = (ROWS + 3, 37);
        let hidden: Vec<f32> = random(1, rows * 6).iter().map(|v| v * 4.0).collect();
        let head = random_tensor(2, &[vocab, 6]);
        let held = Held::from(head.clone());
        let targets: Vec<u32> = (0..rows as u32).map(|i| i * 7 % vocab as u32).collect();
        let products = tensor(&hidden, &[rows, 6]).matmul(&head.t().unwrap()).unwrap();
        let bent = ((&products / 1.5).unwrap().tanh().unwrap() * 1.5).unwrap();
        for (cap, logits) in [(None, products), (Some(1.5), bent)] {
            let found = token_logprobs(
                &hidden,
                Output { weight: &held, products: Products::Of(Digits::All), cap },
                &targets,
                Slopes::Skip,
            )
            .unwrap();
            let expected = candle_nn::ops::log_softmax(&logits, 1).unwrap().to_vec2::<f32>().unwrap();
            for (i, logprob) in found.logprobs.iter().enumerate() {
                assert!((logprob - expected[i][targets[i] as usize]).abs() < 1e-5, "row {i}");
                let entropy: f32 = expected[i].iter().map(|l| -l * l.exp()).sum();
                assert!((found.entropies[i] - entropy).abs() < 1e-4, "row {i}: {} {entropy}", found.entropies[i]);
            }
            assert!(found.slopes.is_empty());
        }
    }

    #[test]
    fn slopes_agree_with_differences() {
        let held = Held::from(random_tensor(2, &[9, 6]));
        let targets = [0, 8, 3, 3, 1];
        for cap in [None, Some(1.5)] {
            let output = Output { weight: &held, products: Products::Of(Digits::All), cap };
            let run = |t: &[Vec<f32>]| token_logprobs(&t[0], output, &targets, Slopes::Make).unwrap();
            let backward = |t: &[Vec<f32>], grad: &[f32]| {
                vec![run(t).slopes.chunks(6).zip(grad).flat_map(|(s, g)| s.iter().map(move |s| s * g)).collect()]
            };
            gradients(&[random(1, 30)], |t| run(t).logprobs, backward);
        }
    }

    #[test]
    fn a_token_outside_the_vocabulary_is_refused() {
        let held = Held::from(random_tensor(2, &[9, 6]));
        let output = Output { weight: &held, products: Products::Of(Digits::All), cap: None };
        let error = token_logprobs(&random(1, 6), output, &[9], Slopes::Skip).unwrap_err();
        assert!(error.to_string().contains("token id 9"), "{error}");
    }
}
