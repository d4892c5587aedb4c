//! What the simulator knows and the gate does not: how good each challenger truly is, and how its answers fall out.
//!
//! A scenario is a law of challengers. Every law states its mean exactly, also after values are cut to [-1, 1]: a null that
//! missed its mean by a little would not test the gate at its edge.

use std::f64::consts::TAU;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::Rng;
use serde::{Deserialize, Serialize};

use crate::gate::behaviour::Behaviour;
use crate::gate::rows::{Kl, Observation, Side};

/// Standard deviation of a continuous difference, as in the figures of the method.
const SD: f64 = 0.35;
/// What a skewed difference is most of the time.
const SKEW_SMALL: f64 = 0.05;
/// And what it rarely is.
const SKEW_LARGE: f64 = -0.95;
/// The gain whose power is told.
const LARGE: f64 = 0.03 - 1e-9;
/// The share of answers that refuse, on both sides.
const REFUSALS: f64 = 0.01;
const NO_DRIFT: Kl = Kl { mean: 0.01, over: 0.0, tokens: 40, forward: None };
/// The share of traffic that the second workload has.
pub(super) const SECOND_SHARE: f64 = 0.3;

/// How the differences of one challenger are distributed around their mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Shape {
    /// Normal with standard deviation 0.35, cut symmetrically.
    Continuous,
    /// Pass or fail on both sides: -1, 0 or 1, with the same standard deviation.
    ThreeValued,
    /// Small gains nearly always and rare large losses: the shape that flatters a challenger longest.
    Skewed,
}

impl Shape {
    /// Every shape, in the order of reports.
    pub const ALL: [Shape; 3] = [Shape::Continuous, Shape::ThreeValued, Shape::Skewed];

    /// Returns the name in commands and reports.
    pub fn as_str(self) -> &'static str {
        match self {
            Shape::Continuous => "continuous",
            Shape::ThreeValued => "three_valued",
            Shape::Skewed => "skewed",
        }
    }

    /// Draws a difference in [-1, 1] whose mean is `gain`, itself between -0.9 and 0.9.
    pub(super) fn draw(self, gain: f64, rng: &mut ChaCha8Rng) -> f64 {
        match self {
            Shape::Continuous => {
                let room = 1.0 - gain.abs();
                gain + (SD * normal(rng)).clamp(-room, room)
            }
            Shape::ThreeValued => {
                let moved = (SD * SD + gain * gain).max(gain.abs());
                let u = uniform(rng);
                if u < (moved + gain) / 2.0 {
                    1.0
                } else if u < moved {
                    -1.0
                } else {
                    0.0
                }
            }
            Shape::Skewed => {
                let usual = SKEW_SMALL + gain.max(0.0);
                let rare = (usual - gain) / (usual - SKEW_LARGE);
                if uniform(rng) < rare { SKEW_LARGE } else { usual }
            }
        }
    }
}

/// A law of challengers and traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scenario {
    /// A/A: no challenger differs from the incumbent.
    Null,
    /// Every challenger gains exactly the margin, which is not enough.
    Boundary,
    /// Every challenger truly gains 0.03.
    SmallGain,
    /// Every challenger truly loses 0.03.
    Regression,
    /// The score rises by 0.08 and true quality falls: the answers game the reward.
    Hacked,
    /// A gain of 0.02 on the first night of a trial that falls by 0.01 a night.
    Drift,
    /// The larger workload gains 0.08, the smaller one loses 0.10; the mean gain is 0.026.
    Segment,
    /// No gain over a week, but 0.02 on working days and -0.10 at weekends, which bring half as many prompts.
    Seasonal,
    /// One in five truly gains 0.03, the others are N(-0.003, 0.006).
    Mixed,
    /// All are N(-0.003, 0.006): the law under which the method compares naive rules.
    Mediocre,
}

impl Scenario {
    /// Every scenario, in the order of reports.
    pub const ALL: [Scenario; 10] = [
        Scenario::Null,
        Scenario::Boundary,
        Scenario::SmallGain,
        Scenario::Regression,
        Scenario::Hacked,
        Scenario::Drift,
        Scenario::Segment,
        Scenario::Seasonal,
        Scenario::Mixed,
        Scenario::Mediocre,
    ];

    /// Returns the name in commands and reports.
    pub fn as_str(self) -> &'static str {
        match self {
            Scenario::Null => "null",
            Scenario::Boundary => "boundary",
            Scenario::SmallGain => "small_gain",
            Scenario::Regression => "regression",
            Scenario::Hacked => "hacked",
            Scenario::Drift => "drift",
            Scenario::Segment => "segment",
            Scenario::Seasonal => "seasonal",
            Scenario::Mixed => "mixed",
            Scenario::Mediocre => "mediocre",
        }
    }

    /// Draws a challenger's truth.
    pub(super) fn challenger(self, margin: f64, rng: &mut ChaCha8Rng) -> Truth {
        let plain = |gain| Truth { gain, second: gain, quality: 0.0, nightly: 0.0, weekend: 0.0 };
        match self {
            Scenario::Null => plain(0.0),
            Scenario::Boundary => plain(margin),
            Scenario::SmallGain => plain(0.03),
            Scenario::Regression => plain(-0.03),
            Scenario::Hacked => Truth { quality: -0.15, ..plain(0.08) },
            Scenario::Drift => Truth { nightly: -0.01, ..plain(0.02) },
            Scenario::Segment => Truth { gain: 0.08, second: -0.10, ..plain(0.0) },
            Scenario::Seasonal => Truth { weekend: -0.12, ..plain(0.02) },
            Scenario::Mixed if uniform(rng) < 0.2 => plain(0.03),
            Scenario::Mixed | Scenario::Mediocre => plain(-0.003 + 0.006 * normal(rng)),
        }
    }

    /// Returns how many fresh gate prompts a night of the year brings, where an ordinary one brings `usual`.
    pub(super) fn prompts(self, usual: usize, night: u32) -> usize {
        if self == Scenario::Seasonal && is_weekend(night) { usual / 2 } else { usual }
    }
}

fn is_weekend(night: u32) -> bool {
    night % 7 >= 5
}

/// How good a challenger truly is against the incumbent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Truth {
    /// Mean difference of the gate's score, on the first workload.
    pub gain: f64,
    /// The same on the second.
    pub second: f64,
    /// Mean change of what the independent scorer sees, nats a token.
    pub quality: f64,
    /// What each further night of the trial adds to the gain.
    pub nightly: f64,
    /// What a night of a weekend adds to it.
    pub weekend: f64,
}

impl Truth {
    /// Returns the mean difference on a workload, in a night of the trial (from 1) and of the year (from 0).
    pub(super) fn gain_on(&self, second: bool, night: u32, of_year: u32) -> f64 {
        let weekend = if is_weekend(of_year) { self.weekend } else { 0.0 };
        let workload = if second { self.second } else { self.gain };
        workload + self.nightly * f64::from(night.saturating_sub(1)) + weekend
    }

    /// Returns the mean difference over both workloads on a trial's first working night.
    pub(super) fn mean_gain(&self) -> f64 {
        self.gain + SECOND_SHARE * (self.second - self.gain)
    }

    /// Returns true where users are worse off whatever the score says: a gamed reward, or a workload that is damaged.
    pub(super) fn harms(&self) -> bool {
        self.quality < 0.0 || self.second < -0.05
    }

    /// Returns true where the gain comes and goes with the days, so that no week as a whole gains more than nothing.
    pub(super) fn passes_with_time(&self) -> bool {
        self.nightly < 0.0 || self.weekend < 0.0
    }

    /// Returns true where the gain is so large that a gate should find it.
    pub(super) fn is_large(&self, margin: f64) -> bool {
        self.deserves(margin) && self.mean_gain() >= LARGE
    }

    /// Returns true where a promotion is right.
    pub(super) fn deserves(&self, margin: f64) -> bool {
        !self.harms() && !self.passes_with_time() && self.mean_gain() > margin
    }
}

/// Draws what is measured on one cluster, and returns it with its expected difference.
pub(super) fn observe(
    cluster: &str,
    (truth, shape): (&Truth, Shape),
    (night, of_year): (u32, u32),
    noise: Noise,
    rng: &mut ChaCha8Rng,
) -> (Observation, f64) {
    let second = uniform(rng) < SECOND_SHARE;
    let gain = truth.gain_on(second, night, of_year);
    let d = shape.draw(gain, rng);
    let mut observation = Observation {
        cluster: cluster.to_string(),
        prompt_hash: String::new(),
        workload: Some(if second { "second" } else { "first" }.to_string()),
        traffic: 1,
        tenant: None,
        language: None,
        question_chars: None,
        new: side((1.0 + d) / 2.0),
        incumbent: side((1.0 - d) / 2.0),
        kl: Some(NO_DRIFT),
        kl_round: Some(NO_DRIFT),
    };
    if noise == Noise::Full {
        let quality = truth.quality + 0.3 * normal(rng);
        observation.new.quality = Some(-1.5 + quality);
        observation.new.words = (40.0 * (0.4 * normal(rng)).exp()).round();
        observation.new.tokens = Some(1.3 * observation.new.words);
        observation.kl = Some(Kl { mean: 0.02 * uniform(rng), over: 0.02 * uniform(rng), ..NO_DRIFT });
        observation.kl_round = observation.kl;
        for side in [&mut observation.new, &mut observation.incumbent] {
            let mut rates = [0.0; 5];
            rates[0] = f64::from(u8::from(uniform(rng) < REFUSALS));
            side.behaviour = Some(Behaviour::from_rates(rates));
        }
    }
    (observation, gain)
}

/// What besides the score is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Noise {
    /// Only the score: for runs without guardrails.
    Score,
    /// Quality, length and divergence too.
    Full,
}

fn side(score: f64) -> Side {
    Side {
        score,
        words: 40.0,
        chars: 200.0,
        quality: Some(-1.5),
        similarity: None,
        tokens: Some(52.0),
        behaviour: Some(Behaviour::default()),
    }
}

/// Returns a number in [0, 1).
pub(super) fn uniform(rng: &mut ChaCha8Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// Returns a standard normal number (Box and Muller).
pub(super) fn normal(rng: &mut ChaCha8Rng) -> f64 {
    let (u, angle) = (1.0 - uniform(rng), TAU * uniform(rng));
    (-2.0 * u.ln()).sqrt() * angle.cos()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand_chacha::rand_core::SeedableRng;

    #[test]
    fn every_shape_has_the_mean_that_it_states() {
        for shape in Shape::ALL {
            for gain in [0.0, 0.005, 0.03, -0.03] {
                let mut rng = ChaCha8Rng::seed_from_u64(7);
                let n = 200_000;
                let draws: Vec<f64> = (0..n).map(|_| shape.draw(gain, &mut rng)).collect();
                let mean = draws.iter().sum::<f64>() / f64::from(n);
                let variance = draws.iter().map(|d| (d - mean).powi(2)).sum::<f64>() / f64::from(n);
                let error = (variance / f64::from(n)).sqrt();
                assert!((mean - gain).abs() < 4.0 * error, "{shape:?} {gain}: {mean} +- {error}");
                assert!(draws.iter().all(|d| (-1.0..=1.0).contains(d)));
                assert!((0.15..0.36).contains(&variance.sqrt()), "{shape:?} {gain}: sd {}", variance.sqrt());
            }
        }
    }

    #[test]
    fn the_scenarios_mean_what_they_say() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut truth = |scenario: Scenario| scenario.challenger(0.005, &mut rng);
        assert!((truth(Scenario::Segment).mean_gain() - 0.026).abs() < 1e-12);
        let edge = truth(Scenario::Boundary);
        assert_eq!((edge.gain, edge.second), (0.005, 0.005));
        assert!(!edge.deserves(0.005), "the margin itself is not above the margin");
        let season = truth(Scenario::Seasonal);
        let week = (0..7).map(|night| {
            let prompts = Scenario::Seasonal.prompts(500, night) as f64;
            prompts * season.gain_on(false, 1, night)
        });
        assert!(week.sum::<f64>().abs() < 1e-9);
        assert!(truth(Scenario::Hacked).harms() && truth(Scenario::Segment).harms());
        assert!(!truth(Scenario::SmallGain).harms());
    }
}
