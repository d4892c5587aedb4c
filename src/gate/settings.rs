//! What an operator sets for the gate.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::guardrail::Thresholds;
use super::level::{Mode, Terms};

/// How challengers are judged. A change while a trial is open makes that trial void.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// What the yearly error budget bounds: `fdr` (the expected share of false promotions among all promotions) or
    /// `strict` (the probability of any false promotion; needs alpha of at most 0.05).
    pub mode: Mode,
    /// The yearly error budget, a probability above 0 and at most 0.5.
    pub alpha: f64,
    /// The most challengers in a calendar year, 1 or more: each spends alpha / challengers. After the last one nothing is
    /// promoted until the new year.
    pub challengers: u32,
    /// The smallest gain in mean score worth a release, from 0 to below 1; a challenger must be shown to gain more.
    pub margin: f64,
    /// Gate prompts that are answered and scored together before the evidence is looked at, 1 or more.
    pub block_size: u32,
    /// Nights that a challenger may stay in trial, 1 or more.
    pub max_nights: u32,
    /// Nights that a challenger must be in trial before it is promoted, from 1 to max_nights. With 7 it has met every day of the
    /// week: a gain of working days alone is not mistaken for one of all days.
    pub min_nights: u32,
    /// The logarithm of the wealth below which, at the end of a night, a challenger is dropped as hopeless, below 0.
    pub futility: f64,
    /// The level at which, at the end of a night, a challenger is dropped because it is shown not to gain the margin, above 0
    /// and at most 0.5: the probability that one which gains it is dropped for that on any night.
    pub futility_alpha: f64,
    /// Answers that each side gives to each gate prompt, 1 or more; their scores are averaged.
    pub samples: u32,
    /// Gate prompts of a trial, from its first, on which the divergence from the base is measured too; it takes an answer
    /// of its own at temperature 1. At least guardrails.min_prompts.
    pub kl_prompts: u32,
    /// Gate prompts of the most traffic, of those that earlier trials used up, on which a challenger must not be worse
    /// (guardrails.head_tolerance); 0 asks none. They are a guardrail and never evidence.
    pub head_prompts: u32,
    /// File of prompts on which a challenger must never be worse (guardrails.regression_tolerance): JSON lines {"messages",
    /// "workload", "tools"}, each scored by the rules of its workload; empty = none. Trip wires and canaries are prompts
    /// whose workload forbids the words. Another content voids an open trial.
    pub suite: String,
    /// What must hold besides the evidence.
    pub guardrails: Thresholds,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            mode: Mode::Fdr,
            alpha: 0.10,
            challengers: 120,
            margin: 0.005,
            block_size: 32,
            max_nights: 7,
            min_nights: 1,
            futility: -2.0,
            futility_alpha: 0.02,
            samples: 1,
            kl_prompts: 100,
            head_prompts: 50,
            suite: String::new(),
            guardrails: Thresholds::default(),
        }
    }
}

impl Settings {
    /// Checks every value; the message names the key, the value and the remedy.
    pub fn validate(&self) -> Result<(), String> {
        let most = if self.mode == Mode::Strict { 0.05 } else { 0.5 };
        if !(self.alpha > 0.0 && self.alpha <= most) {
            return Err(format!("alpha {} is not above 0 and at most {most} in this mode: lower it", self.alpha));
        }
        if !(0.0..1.0).contains(&self.margin) {
            return Err(format!("margin {} is not in [0, 1): use a value such as 0.005", self.margin));
        }
        if self.futility.is_nan() || self.futility >= 0.0 {
            return Err(format!("futility {} is not below 0: use a value such as -2", self.futility));
        }
        if !(self.futility_alpha > 0.0 && self.futility_alpha <= 0.5) {
            let alpha = self.futility_alpha;
            return Err(format!("futility_alpha {alpha} is not above 0 and at most 0.5: use a value such as 0.02"));
        }
        if self.kl_prompts < self.guardrails.min_prompts {
            let least = self.guardrails.min_prompts;
            return Err(format!("kl_prompts {} is below guardrails.min_prompts {least}: raise it", self.kl_prompts));
        }
        if self.min_nights > self.max_nights {
            let (min, max) = (self.min_nights, self.max_nights);
            return Err(format!("min_nights {min} is above max_nights {max}: nothing could be promoted; lower it"));
        }
        let counts = [
            ("challengers", self.challengers),
            ("block_size", self.block_size),
            ("max_nights", self.max_nights),
            ("min_nights", self.min_nights),
            ("samples", self.samples),
        ];
        match counts.iter().find(|(_, value)| *value == 0) {
            Some((key, _)) => Err(format!("{key} 0 is too small: set it to 1 or more")),
            None => self.guardrails.validate(),
        }
    }

    /// Returns the terms of the yearly budget.
    pub fn terms(&self) -> Terms {
        Terms { mode: self.mode, alpha: self.alpha, challengers: self.challengers }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_hold_and_bad_values_are_named() {
        Settings::default().validate().unwrap();
        let default = Settings::default;
        let cases = [
            ("alpha", Settings { alpha: 0.0, ..default() }),
            ("alpha", Settings { mode: Mode::Strict, ..default() }),
            ("margin", Settings { margin: f64::NAN, ..default() }),
            ("futility", Settings { futility: 0.0, ..default() }),
            ("min_nights", Settings { min_nights: 0, ..default() }),
            ("min_nights", Settings { min_nights: 8, ..default() }),
            ("futility_alpha", Settings { futility_alpha: 0.0, ..default() }),
            ("futility_alpha", Settings { futility_alpha: 0.6, ..default() }),
            ("block_size", Settings { block_size: 0, ..default() }),
            (
                "guardrails.quality_range",
                Settings { guardrails: Thresholds { quality_range: 0.0, ..Default::default() }, ..default() },
            ),
        ];
        for (key, settings) in cases {
            let message = settings.validate().unwrap_err();
            assert!(message.starts_with(key), "{key}: {message}");
        }
        assert!(Settings { mode: Mode::Strict, alpha: 0.05, ..default() }.validate().is_ok());
    }
}
