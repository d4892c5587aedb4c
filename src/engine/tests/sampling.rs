//! The distributions that settings draw from, against transformers' logits processors.

use std::convert::Infallible;

use serde::Deserialize;

use crate::engine::SamplingSettings;
use crate::engine::draw::{Said, Scratch, draw};

#[derive(Deserialize)]
struct Golden {
    prompt: Vec<u32>,
    answer: Vec<u32>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    temperature: f64,
    top_k: usize,
    top_p: f64,
    min_p: f64,
    repetition_penalty: f64,
    logits: Vec<f32>,
    /// Of each token; none where it cannot be drawn.
    logprobs: Vec<Option<f64>>,
}

/// A source of one number of [0, 1): the one that is drawn with.
struct Chance(f64);

impl rand::TryRng for Chance {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        Ok((self.0 * 2f64.powi(32)) as u32)
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        Ok((self.0 * 2f64.powi(64)) as u64)
    }

    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Infallible> {
        bytes.fill((self.0 * 256.0) as u8);
        Ok(())
    }
}

#[test]
fn every_setting_draws_from_the_distribution_of_transformers_processors() {
    const STEPS: usize = 20_000;
    let golden: Golden =
        serde_json::from_slice(&std::fs::read(super::tests_folder().join("golden/sampling.json")).unwrap()).unwrap();
    assert!(golden.cases.len() >= 15);
    for case in &golden.cases {
        let Case { temperature, top_k, top_p, min_p, repetition_penalty, .. } = *case;
        let sampling =
            SamplingSettings { temperature, top_k, top_p, min_p, repetition_penalty, ..SamplingSettings::default() };
        let mut said = Said::begin(&sampling, &golden.prompt);
        said.iter_mut().for_each(|said| golden.answer.iter().for_each(|token| said.add(*token)));
        let (mut scratch, mut shares) = (Scratch::default(), vec![0.0; case.logits.len()]);
        for step in 0..STEPS {
            let mut chance = Chance((step as f64 + 0.5) / STEPS as f64);
            let drawn = draw(&case.logits, &sampling, said.as_ref(), None, &mut chance, &mut scratch).unwrap();
            let token = drawn.token as usize;
            let expected = case.logprobs[token].unwrap_or(f64::NEG_INFINITY);
            assert!((f64::from(drawn.sampler_logprob) - expected).abs() < 2e-6, "{sampling:?} {token} {expected}");
            shares[token] += 1.0 / STEPS as f64;
        }
        // Over all of [0, 1) each token has its share, so none that may be drawn is left out.
        for (share, expected) in shares.iter().zip(&case.logprobs) {
            let expected = expected.map_or(0.0, f64::exp);
            assert!((share - expected).abs() < 2.0 / STEPS as f64, "{sampling:?} {share} {expected}");
        }
    }
}
