//! Drawing one token from a row of logits.

use rand::{Rng, RngExt};
use serde::{Deserialize, Serialize};

use super::error::EngineError;
use super::math;

/// How tokens are drawn.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SamplingSettings {
    /// 0 takes the most likely token; 1 draws from the model's own distribution.
    pub temperature: f64,
    /// Keeps the smallest set of tokens whose probability reaches this; 1 keeps all.
    pub top_p: f64,
    /// Most new tokens.
    pub max_tokens: usize,
    /// Keeps this many tokens before `top_p` applies; 0 keeps all.
    pub top_k: usize,
}

impl SamplingSettings {
    pub(crate) fn check(&self) -> Result<(), EngineError> {
        let problem = if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            format!("temperature {} is not a number from 0 up", self.temperature)
        } else if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            format!("top_p {} is not above 0 and at most 1", self.top_p)
        } else if self.max_tokens == 0 {
            "max_tokens is 0; ask for at least 1".to_string()
        } else {
            return Ok(());
        };
        Err(EngineError::request(problem))
    }

    fn filters(&self) -> bool {
        self.top_k > 0 || self.top_p < 1.0
    }
}

/// One drawn token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Drawn {
    pub(crate) token: u32,
    /// Log-softmax of the raw logits, at temperature 1.
    pub(crate) logprob: f32,
    /// Log-probability under the distribution it was drawn from.
    pub(crate) sampler_logprob: f32,
}

/// Draws a token. One random number is used per token, whatever the settings, also where nothing is random.
pub(crate) fn draw(logits: &[f32], sampling: &SamplingSettings, rng: &mut impl Rng, weights: &mut Vec<f32>) -> Drawn {
    let chance: f64 = rng.random();
    weights.clear();
    weights.extend_from_slice(logits);
    let largest = math::wide_max(logits);
    let raw_total = math::wide_exp_sum(weights, largest);
    let logprob = |token: usize| logits[token] - largest - raw_total.ln();
    if sampling.temperature == 0.0 {
        let token = logits.iter().position(|l| *l == largest).unwrap_or_default();
        return Drawn { token: token as u32, logprob: logprob(token), sampler_logprob: 0.0 };
    }
    let mut total = f64::from(raw_total);
    if sampling.temperature != 1.0 {
        let inverse = (1.0 / sampling.temperature) as f32;
        weights.iter_mut().zip(logits).for_each(|(w, l)| *w = (l - largest) * inverse);
        total = f64::from(math::wide_exp_sum(weights, 0.0));
    }
    let (token, total) = match sampling.filters() {
        false => (walk(weights, chance * total), total),
        true => {
            let kept = kept(weights, total, sampling);
            let total = kept.iter().map(|id| f64::from(weights[*id])).sum();
            (walk_kept(weights, &kept, chance * total), total)
        }
    };
    let sampler_logprob = (f64::from(weights[token]) / total).ln() as f32;
    Drawn { token: token as u32, logprob: logprob(token), sampler_logprob }
}

/// Returns the first index at which the running sum passes `target`.
fn walk(weights: &[f32], target: f64) -> usize {
    const CHUNK: usize = 64;
    let mut sum = 0.0f64;
    for (at, chunk) in weights.chunks(CHUNK).enumerate() {
        let here = chunk.iter().map(|w| f64::from(*w)).sum::<f64>();
        if sum + here > target {
            for (i, weight) in chunk.iter().enumerate() {
                sum += f64::from(*weight);
                if sum > target {
                    return at * CHUNK + i;
                }
            }
        } else {
            sum += here;
        }
    }
    // Rounding can leave the sum just below the target: then the last possible token.
    weights.iter().rposition(|w| *w > 0.0).unwrap_or_default()
}

fn walk_kept(weights: &[f32], kept: &[usize], target: f64) -> usize {
    let mut sum = 0.0f64;
    for id in kept {
        sum += f64::from(weights[*id]);
        if sum > target {
            return *id;
        }
    }
    kept.last().copied().unwrap_or_default()
}

/// Returns the tokens that top-k and then top-p keep, most likely first. The largest weight is 1.
fn kept(weights: &[f32], total: f64, sampling: &SamplingSettings) -> Vec<usize> {
    let mut ids: Vec<usize> = Vec::new();
    // Sorting the vocabulary costs more than a layer: sort only what can be kept.
    for cutoff in [1e-3, 1e-6, 0.0] {
        ids = (0..weights.len()).filter(|i| weights[*i] >= cutoff).collect();
        let sum: f64 = ids.iter().map(|i| f64::from(weights[*i])).sum();
        let enough = if sampling.top_k > 0 { ids.len() >= sampling.top_k } else { sum >= sampling.top_p * total };
        if enough {
            break;
        }
    }
    ids.sort_by(|a, b| weights[*b].total_cmp(&weights[*a]).then(a.cmp(b)));
    let mut base = total;
    if sampling.top_k > 0 {
        ids.truncate(sampling.top_k);
        base = ids.iter().map(|i| f64::from(weights[*i])).sum();
    }
    let mut sum = 0.0;
    let needed = ids.iter().position(|i| {
        sum += f64::from(weights[*i]);
        sum >= sampling.top_p * base
    });
    if let (Some(last), true) = (needed, sampling.top_p < 1.0) {
        ids.truncate(last + 1);
    }
    ids
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;

    const LOGITS: [f32; 5] = [1.0, 3.0, 2.0, -1.0, 0.0];

    fn settings(temperature: f64, top_p: f64, top_k: usize) -> SamplingSettings {
        SamplingSettings { temperature, top_p, max_tokens: 1, top_k }
    }

    fn log_softmax(temperature: f64, keep: &[usize]) -> Vec<f64> {
        let scaled = |i: usize| f64::from(LOGITS[i]) / temperature;
        let total: f64 = keep.iter().map(|i| scaled(*i).exp()).sum();
        (0..5).map(|i| if keep.contains(&i) { scaled(i) - total.ln() } else { f64::NEG_INFINITY }).collect()
    }

    fn frequencies(sampling: &SamplingSettings, expected: &[f64]) {
        let (mut rng, mut scratch) = (ChaCha8Rng::seed_from_u64(1), Vec::new());
        let raw = log_softmax(1.0, &[0, 1, 2, 3, 4]);
        let mut counts = [0.0; 5];
        for _ in 0..20_000 {
            let drawn = draw(&LOGITS, sampling, &mut rng, &mut scratch);
            let token = drawn.token as usize;
            counts[token] += 1.0 / 20_000.0;
            assert!((f64::from(drawn.logprob) - raw[token]).abs() < 1e-5);
            assert!((f64::from(drawn.sampler_logprob) - expected[token]).abs() < 1e-5, "{sampling:?} {token}");
        }
        for (count, expected) in counts.iter().zip(expected) {
            assert!((count - expected.exp()).abs() < 0.015, "{sampling:?} {counts:?}");
        }
    }

    #[test]
    fn draws_follow_the_distribution_they_report() {
        frequencies(&settings(1.0, 1.0, 0), &log_softmax(1.0, &[0, 1, 2, 3, 4]));
        frequencies(&settings(0.5, 1.0, 0), &log_softmax(0.5, &[0, 1, 2, 3, 4]));
        frequencies(&settings(2.0, 1.0, 2), &log_softmax(2.0, &[1, 2]));
        // 0.636 + 0.234 reach 0.8 and 0.636 does not.
        frequencies(&settings(1.0, 0.8, 0), &log_softmax(1.0, &[1, 2]));
        frequencies(&settings(1.0, 0.5, 0), &log_softmax(1.0, &[1]));
    }

    #[test]
    fn temperature_zero_takes_the_most_likely() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let drawn = draw(&LOGITS, &settings(0.0, 1.0, 0), &mut rng, &mut Vec::new());
        assert_eq!((drawn.token, drawn.sampler_logprob), (1, 0.0));
    }

    #[test]
    fn settings_out_of_range_are_refused_with_their_value() {
        for (bad, word) in
            [(settings(-1.0, 1.0, 0), "-1"), (settings(f64::NAN, 1.0, 0), "NaN"), (settings(1.0, 0.0, 0), "top_p 0")]
        {
            assert!(bad.check().unwrap_err().to_string().contains(word));
        }
    }
}
