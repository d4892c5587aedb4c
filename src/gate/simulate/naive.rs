//! The rules that peers promote by, on the same laws: a higher mean, p < 0.05, each on fresh prompts and on a holdout that
//! is used every night.
//!
//! With hundreds of prompts the mean difference of a night is normal to any accuracy that matters here, so it is drawn as
//! one number. On a reused holdout each adapter has a score of its own that is the same every night it is looked at:
//! its truth plus the luck of the draw, and the luckiest one stays.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rayon::prelude::*;
use serde::Serialize;

use super::world::{Scenario, normal};
use crate::record::derive_seed;

/// Standard deviation of one difference.
const SD: f64 = 0.35;
/// One-sided 5 % of the normal distribution.
const Z: f64 = 1.644_853_6;

/// A rule, and what a year under it comes to on average.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct NaiveRow {
    pub scenario: &'static str,
    pub rule: &'static str,
    pub promotions: f64,
    pub false_promotions: f64,
    pub harmful: f64,
    /// The sum of the true gains of what was promoted.
    pub true_gain: f64,
    /// The sum of the gains that the rule saw.
    pub apparent_gain: f64,
}

#[derive(Clone, Copy)]
struct Rule {
    name: &'static str,
    /// Standard errors that the mean must exceed.
    z: f64,
    reused: bool,
}

const RULES: [Rule; 4] = [
    Rule { name: "mean higher, fresh prompts", z: 0.0, reused: false },
    Rule { name: "p < 0.05, fresh prompts", z: Z, reused: false },
    Rule { name: "mean higher, reused holdout", z: 0.0, reused: true },
    Rule { name: "p < 0.05, reused holdout", z: Z, reused: true },
];

/// Runs every rule over `years` years of `nights` nights with one challenger and `prompts` prompts each.
pub fn naive(scenario: Scenario, margin: f64, (years, nights, prompts): (u64, u32, usize), seed: u64) -> Vec<NaiveRow> {
    RULES.iter().map(|rule| one(*rule, scenario, margin, (years, nights, prompts), seed)).collect()
}

fn one(
    rule: Rule,
    scenario: Scenario,
    margin: f64,
    (years, nights, prompts): (u64, u32, usize),
    seed: u64,
) -> NaiveRow {
    let error = SD / (prompts as f64).sqrt();
    let year = |at: u64| {
        let name = ["naive", scenario.as_str(), rule.name, &at.to_string()];
        let mut rng = ChaCha8Rng::seed_from_u64(derive_seed(seed, &name));
        let mut sums = [0.0; 5];
        // On a reused holdout: the luck of the one that is served.
        let mut luck = 0.0;
        for night in 0..nights {
            let truth = scenario.challenger(margin, &mut rng);
            let second = super::world::SECOND_SHARE;
            let gain = (1.0 - second) * truth.gain_on(false, 1, night) + second * truth.gain_on(true, 1, night);
            let (seen, its_luck) = match rule.reused {
                true => {
                    let its_luck = error / 2f64.sqrt() * normal(&mut rng);
                    (gain + its_luck - luck, its_luck)
                }
                false => (gain + error * normal(&mut rng), 0.0),
            };
            if seen > rule.z * error {
                let (wrong, harmful) = (!truth.deserves(margin), truth.harms() || gain < 0.0);
                let said = [1.0, f64::from(u8::from(wrong)), f64::from(u8::from(harmful)), gain, seen];
                sums.iter_mut().zip(said).for_each(|(sum, x)| *sum += x);
                luck = its_luck;
            }
        }
        sums
    };
    let all: Vec<[f64; 5]> = (0..years).into_par_iter().map(year).collect();
    let mean = |i: usize| all.iter().map(|sums| sums[i]).sum::<f64>() / years.max(1) as f64;
    NaiveRow {
        scenario: scenario.as_str(),
        rule: rule.name,
        promotions: mean(0),
        false_promotions: mean(1),
        harmful: mean(2),
        true_gain: mean(3),
        apparent_gain: mean(4),
    }
}
