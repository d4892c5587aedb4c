//! Drawing one token from a row of logits.

use std::collections::{HashMap, HashSet};

use rand::{Rng, RngExt};
use serde::{Deserialize, Serialize};

use super::error::EngineError;
use super::grammar::{GivenUp, Grammar, Walk};
use super::{math, stop};

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
    /// Keeps tokens at least this likely beside the most likely one, before all else; 0 keeps all (Nguyen et al. 2024).
    pub min_p: f64,
    /// Makes tokens of the prompt and of the answer less likely: their logits are divided by it, or multiplied where
    /// they are negative (Keskar et al. 2019). 1 is none.
    pub repetition_penalty: f64,
    /// Comes off the logits of tokens that the answer holds already, as in OpenAI's API. 0 is none.
    pub presence_penalty: f64,
    /// The same for each time that it holds them. 0 is none.
    pub frequency_penalty: f64,
    /// Strings that end an answer; its text stops before them.
    pub stop: Vec<String>,
    /// What an answer must be: tokens that do not go on with it are never drawn. `max_tokens` may still cut it short.
    #[serde(skip)]
    pub grammar: Option<Grammar>,
}

impl Default for SamplingSettings {
    /// The model's own distribution.
    fn default() -> Self {
        SamplingSettings {
            temperature: 1.0,
            top_p: 1.0,
            max_tokens: 512,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            stop: Vec::new(),
            grammar: None,
        }
    }
}

impl SamplingSettings {
    pub(crate) fn check(&self) -> Result<(), EngineError> {
        let problem = if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            format!("temperature {} is not a number from 0 up", self.temperature)
        } else if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            format!("top_p {} is not above 0 and at most 1", self.top_p)
        } else if self.max_tokens == 0 {
            "max_tokens is 0; ask for at least 1".to_string()
        } else if !(0.0..=1.0).contains(&self.min_p) {
            format!("min_p {} is not between 0 and 1", self.min_p)
        } else if !(self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite()) {
            format!("repetition_penalty {} is not above 0", self.repetition_penalty)
        } else if !(self.presence_penalty.is_finite() && self.frequency_penalty.is_finite()) {
            let (presence, frequency) = (self.presence_penalty, self.frequency_penalty);
            format!("presence_penalty {presence} and frequency_penalty {frequency} are not both numbers")
        } else {
            return stop::check(&self.stop);
        };
        Err(EngineError::request(problem))
    }

    /// Returns true where it draws from the model's own distribution.
    pub fn is_plain(&self) -> bool {
        self.temperature == 1.0 && !self.filters() && !self.penalises() && self.grammar.is_none()
    }

    fn filters(&self) -> bool {
        self.top_k > 0 || self.top_p < 1.0 || self.min_p > 0.0
    }

    fn penalises(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }
}

/// The tokens of a sequence, as far as penalties ask for them.
#[derive(Debug)]
pub(crate) struct Said {
    prompt: HashSet<u32>,
    /// How often the answer holds each token.
    answer: HashMap<u32, u32>,
}

impl Said {
    /// Begins a sequence; nothing where no penalty asks.
    pub(crate) fn begin(sampling: &SamplingSettings, prompt: &[u32]) -> Option<Self> {
        sampling.penalises().then(|| Said { prompt: prompt.iter().copied().collect(), answer: HashMap::new() })
    }

    pub(crate) fn add(&mut self, token: u32) {
        *self.answer.entry(token).or_default() += 1;
    }

    /// Applies the penalties to a row of logits.
    fn penalise(&self, sampling: &SamplingSettings, logits: &mut [f32]) {
        let repetition = sampling.repetition_penalty as f32;
        for token in self.prompt.iter().chain(self.answer.keys().filter(|token| !self.prompt.contains(*token))) {
            let logit = &mut logits[*token as usize];
            *logit = if *logit > 0.0 { *logit / repetition } else { *logit * repetition };
        }
        for (token, count) in &self.answer {
            let penalty = sampling.presence_penalty + sampling.frequency_penalty * f64::from(*count);
            logits[*token as usize] -= penalty as f32;
        }
    }
}

/// Room that one thread draws in.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    weights: Vec<f32>,
    penalised: Vec<f32>,
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

/// Draws a token. One random number is used per token, whatever the settings, also where nothing is random. It fails only
/// where a grammar does.
pub(crate) fn draw(
    logits: &[f32],
    sampling: &SamplingSettings,
    said: Option<&Said>,
    walk: Option<&mut Walk>,
    rng: &mut impl Rng,
    scratch: &mut Scratch,
) -> Result<Drawn, GivenUp> {
    let chance: f64 = rng.random();
    let Scratch { weights, penalised } = scratch;
    weights.clear();
    weights.extend_from_slice(logits);
    let most = math::wide_max(logits);
    let raw_total = math::wide_exp_sum(weights, most);
    let logprob = |token: usize| logits[token] - most - raw_total.ln();
    // What is drawn from: the same row, or one with penalties and without what the grammar forbids.
    let changed = said.is_some() || walk.is_some();
    let (from, largest) = match changed {
        false => (logits, most),
        true => {
            penalised.clear();
            penalised.extend_from_slice(logits);
            said.into_iter().for_each(|said| said.penalise(sampling, penalised));
            walk.map_or(Ok(()), |walk| walk.restrict(penalised))?;
            (&penalised[..], math::wide_max(penalised))
        }
    };
    if sampling.temperature == 0.0 {
        let token = from.iter().position(|l| *l == largest).unwrap_or_default();
        return Ok(Drawn { token: token as u32, logprob: logprob(token), sampler_logprob: 0.0 });
    }
    let mut total = f64::from(raw_total);
    if sampling.temperature != 1.0 || changed {
        let inverse = (1.0 / sampling.temperature).min(f64::from(f32::MAX)) as f32;
        weights.iter_mut().zip(from).for_each(|(w, l)| *w = (l - largest) * inverse);
        total = f64::from(math::wide_exp_sum(weights, 0.0));
    }
    let (token, total) = match sampling.filters() {
        false => (walk_all(weights, chance * total), total),
        true => {
            let kept = kept(weights, total, sampling);
            let total = kept.iter().map(|id| f64::from(weights[*id])).sum();
            (walk_kept(weights, &kept, chance * total), total)
        }
    };
    let sampler_logprob = (f64::from(weights[token]) / total).ln() as f32;
    Ok(Drawn { token: token as u32, logprob: logprob(token), sampler_logprob })
}

/// Returns the first index at which the running sum passes `target`.
fn walk_all(weights: &[f32], target: f64) -> usize {
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

/// Returns the tokens that min-p, then top-k and then top-p keep, most likely first. The largest weight is 1.
fn kept(weights: &[f32], total: f64, sampling: &SamplingSettings) -> Vec<usize> {
    let least = sampling.min_p as f32;
    let mut ids: Vec<usize> = Vec::new();
    // Sorting the vocabulary costs more than a layer: sort only what can be kept.
    for cutoff in [1e-3, 1e-6, 0.0] {
        ids = (0..weights.len()).filter(|i| weights[*i] > 0.0 && weights[*i] >= least.max(cutoff)).collect();
        let sum: f64 = ids.iter().map(|i| f64::from(weights[*i])).sum();
        let enough = if sampling.top_k > 0 { ids.len() >= sampling.top_k } else { sum >= sampling.top_p * total };
        if enough || least >= cutoff {
            break;
        }
    }
    ids.sort_by(|a, b| weights[*b].total_cmp(&weights[*a]).then(a.cmp(b)));
    if sampling.top_k > 0 {
        ids.truncate(sampling.top_k);
    }
    let base = match (sampling.top_k > 0, least > 0.0) {
        (true, _) => ids.iter().map(|i| f64::from(weights[*i])).sum(),
        // The nucleus is of all that min-p keeps, of which only the likeliest were sorted.
        (false, true) => weights.iter().filter(|weight| **weight >= least).map(|weight| f64::from(*weight)).sum(),
        (false, false) => total,
    };
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
        SamplingSettings { temperature, top_p, max_tokens: 1, top_k, ..SamplingSettings::default() }
    }

    fn log_softmax(temperature: f64, keep: &[usize]) -> Vec<f64> {
        let scaled = |i: usize| f64::from(LOGITS[i]) / temperature;
        let total: f64 = keep.iter().map(|i| scaled(*i).exp()).sum();
        (0..5).map(|i| if keep.contains(&i) { scaled(i) - total.ln() } else { f64::NEG_INFINITY }).collect()
    }

    fn frequencies(sampling: &SamplingSettings, expected: &[f64]) {
        let (mut rng, mut scratch) = (ChaCha8Rng::seed_from_u64(1), Scratch::default());
        let raw = log_softmax(1.0, &[0, 1, 2, 3, 4]);
        let mut counts = [0.0; 5];
        for _ in 0..20_000 {
            let drawn = draw(&LOGITS, sampling, None, None, &mut rng, &mut scratch).unwrap();
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
        // 0.368 and 0.135 of the most likely one.
        let min_p = |min_p| SamplingSettings { min_p, ..settings(1.0, 1.0, 0) };
        frequencies(&min_p(0.2), &log_softmax(1.0, &[1, 2]));
        frequencies(&min_p(0.1), &log_softmax(1.0, &[0, 1, 2]));
        frequencies(&min_p(1e-9), &log_softmax(1.0, &[0, 1, 2, 3, 4]));
        // The temperature comes first: at 0.5 they are 0.135 and 0.018.
        frequencies(&SamplingSettings { temperature: 0.5, ..min_p(0.2) }, &log_softmax(0.5, &[1]));
        // Of what min-p keeps, top-p takes its share: 0.731 of the two, 0.665 of the three.
        frequencies(&SamplingSettings { top_p: 0.7, ..min_p(0.2) }, &log_softmax(1.0, &[1]));
        frequencies(&SamplingSettings { top_p: 0.7, ..min_p(0.1) }, &log_softmax(1.0, &[1, 2]));
    }

    #[test]
    fn penalties_are_those_of_their_papers_and_leave_the_policy_s_log_probs_alone() {
        let sampling = SamplingSettings {
            repetition_penalty: 2.0,
            presence_penalty: 0.5,
            frequency_penalty: 0.25,
            ..settings(1.0, 1.0, 0)
        };
        let mut said = Said::begin(&sampling, &[0, 3]).unwrap();
        [1, 1, 4].into_iter().for_each(|token| said.add(token));
        // Halved where positive, doubled where negative; then 0.5 and 0.25 each time for what the answer holds.
        let expected = [0.5, 1.5 - 1.0, 2.0, -2.0, 0.0 - 0.75];
        let mut logits = LOGITS;
        said.penalise(&sampling, &mut logits);
        assert_eq!(logits, expected);
        let total: f64 = expected.iter().map(|l| f64::from(*l).exp()).sum();
        let raw = log_softmax(1.0, &[0, 1, 2, 3, 4]);
        let (mut rng, mut scratch) = (ChaCha8Rng::seed_from_u64(1), Scratch::default());
        let mut counts = [0.0; 5];
        for _ in 0..20_000 {
            let drawn = draw(&LOGITS, &sampling, Some(&said), None, &mut rng, &mut scratch).unwrap();
            let token = drawn.token as usize;
            counts[token] += 1.0 / 20_000.0;
            assert!((f64::from(drawn.logprob) - raw[token]).abs() < 1e-5);
            assert!((f64::from(drawn.sampler_logprob) - (f64::from(expected[token]) - total.ln())).abs() < 1e-5);
        }
        for (count, logit) in counts.iter().zip(expected) {
            assert!((count - f64::from(logit).exp() / total).abs() < 0.015, "{counts:?}");
        }
        let greedy = SamplingSettings { temperature: 0.0, ..sampling };
        assert_eq!(draw(&LOGITS, &greedy, Some(&said), None, &mut rng, &mut scratch).unwrap().token, 2);
        assert!(Said::begin(&settings(1.0, 1.0, 0), &[1]).is_none());
    }

    #[test]
    fn temperature_zero_takes_the_most_likely() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let drawn = draw(&LOGITS, &settings(0.0, 1.0, 0), None, None, &mut rng, &mut Scratch::default()).unwrap();
        assert_eq!((drawn.token, drawn.sampler_logprob), (1, 0.0));
    }

    #[test]
    fn settings_out_of_range_are_refused_with_their_value() {
        for (bad, word) in [
            (settings(-1.0, 1.0, 0), "-1"),
            (settings(f64::NAN, 1.0, 0), "NaN"),
            (settings(1.0, 0.0, 0), "top_p 0"),
            (SamplingSettings { min_p: 1.5, ..settings(1.0, 1.0, 0) }, "min_p 1.5"),
            (SamplingSettings { repetition_penalty: 0.0, ..settings(1.0, 1.0, 0) }, "repetition_penalty 0"),
            (SamplingSettings { presence_penalty: f64::NAN, ..settings(1.0, 1.0, 0) }, "presence_penalty NaN"),
        ] {
            assert!(bad.check().unwrap_err().to_string().contains(word));
        }
    }
}
