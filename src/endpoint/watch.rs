//! Whether a promoted version earns in production what the one before it earned: a test that may be looked at at any time.
//!
//! The gate judged fresh prompts; clients ask whatever they ask. So the answers that they get are scored as the gate scores,
//! and the mean after the promotion is held against the mean before it. Both means have bounds that hold at all times at
//! once ([`confidence`](crate::gate::confidence)), each at half the level: a version that is as good as the former one is
//! rolled back with probability `alpha` at most, however often it is looked at. That is a promise about the same traffic. A change
//! of the traffic itself looks like a change of the version, which is what `margin` is for.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::gate::confidence::{Bounds, bounds};

/// What an operator sets of the watch over a promoted version.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// What a fall of the reward does: "rollback", "warn", or "off" (it is not looked at).
    pub action: Action,
    /// Probability that a version which is as good as the former one is rolled back, in (0, 0.5].
    pub alpha: f64,
    /// Fall of the mean reward that is none yet, in [0, 1).
    pub margin: f64,
    /// Answers before and after the promotion that are needed, 10 or more.
    pub min_answers: usize,
    /// Answers on each side that are scored, the latest before and the first after, from min_answers to 100000.
    pub max_answers: usize,
    /// How often it is looked at, in minutes, 1 or more.
    pub every_minutes: u64,
    /// Prompts that clients asked lately and that a version answers before they see it, beside the version before it; 0:
    /// none. A promotion stops where the answers are worse by more than the margin, at the level `alpha`.
    pub shadow_prompts: usize,
    /// Time after the promotion whose answers count on neither side, in seconds: requests under way, and clocks that
    /// differ.
    pub settle_seconds: u64,
}

/// What a fall of the reward does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    Rollback,
    Warn,
    Off,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            action: Action::Rollback,
            alpha: 0.001,
            margin: 0.02,
            min_answers: 100,
            max_answers: 2000,
            every_minutes: 10,
            shadow_prompts: 32,
            settle_seconds: 60,
        }
    }
}

impl Settings {
    /// Checks the values; the message names the key and the remedy.
    pub fn validate(&self) -> Result<(), String> {
        if !(self.alpha > 0.0 && self.alpha <= 0.5) {
            return Err(format!("alpha = {}: set it above 0 and to at most 0.5", self.alpha));
        }
        if !(0.0..1.0).contains(&self.margin) {
            return Err(format!("margin = {}: set it to 0 or more and below 1", self.margin));
        }
        if self.min_answers < 10 {
            return Err(format!("min_answers = {}: set it to 10 or more", self.min_answers));
        }
        if self.max_answers < self.min_answers || self.max_answers > 100_000 {
            return Err(format!("max_answers = {}: set it from min_answers to 100000", self.max_answers));
        }
        if self.shadow_prompts > 1000 {
            return Err(format!("shadow_prompts = {}: set it to at most 1000", self.shadow_prompts));
        }
        match self.every_minutes {
            0 => Err("every_minutes = 0: set it to 1 or more".into()),
            _ => Ok(()),
        }
    }
}

/// What was seen of a promoted version.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Seen {
    /// Too few answers on one side.
    Waiting { before: usize, after: usize },
    /// The reward may be what it was.
    Holds { before: Bounds, after: Bounds },
    /// It fell by more than the margin.
    Fell { before: Bounds, after: Bounds },
}

impl Seen {
    /// Returns the reason for a rollback in words; `None` where there is none.
    pub fn fall(&self) -> Option<String> {
        let Seen::Fell { before, after } = self else { return None };
        Some(format!(
            "the live reward fell from {:.4} (at least {:.4}, {} answers) to {:.4} (at most {:.4}, {} answers)",
            before.mean, before.lower, before.n, after.mean, after.upper, after.n
        ))
    }
}

/// Judges rewards in [0, 1] of the answers before a promotion and after it.
pub fn judge(before: &[f64], after: &[f64], settings: &Settings) -> Seen {
    if before.len() < settings.min_answers || after.len() < settings.min_answers {
        return Seen::Waiting { before: before.len(), after: after.len() };
    }
    let side = |rewards: &[f64]| bounds(rewards, 0.0, 1.0, settings.alpha / 2.0);
    let (before, after) = (side(before), side(after));
    match after.upper < before.lower - settings.margin {
        true => Seen::Fell { before, after },
        false => Seen::Holds { before, after },
    }
}

/// Tells in words by how much a version is worse than the one before it, from the differences of their rewards on the same
/// prompts, in [-1, 1]; `None` where it may be as good.
pub fn worse(differences: &[f64], settings: &Settings) -> Option<String> {
    let seen = bounds(differences, -1.0, 1.0, settings.alpha);
    let told = || format!("its answers to {} prompts of clients were worse by {:.4}", seen.n, -seen.mean);
    (seen.upper < -settings.margin).then(told)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::{Rng, SeedableRng};

    /// Returns rewards that are 1 with probability `p`, else 0.
    fn rewards(rng: &mut ChaCha8Rng, p: f64, n: usize) -> Vec<f64> {
        let unit = |rng: &mut ChaCha8Rng| (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        (0..n).map(|_| f64::from(u8::from(unit(rng) < p))).collect()
    }

    /// Looks after every 100 answers and returns how many there were at the alarm.
    fn alarm(seed: u64, p: f64, settings: &Settings) -> Option<usize> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let (before, after) = (rewards(&mut rng, 0.6, 1000), rewards(&mut rng, p, 1000));
        let looks = (1..=10).map(|look| 100 * look);
        looks.into_iter().find(|&n| judge(&before, &after[..n], settings).fall().is_some())
    }

    #[test]
    fn a_version_that_is_as_good_is_left_alone_and_one_that_is_worse_is_found() {
        let settings = Settings { alpha: 0.1, margin: 0.0, ..Settings::default() };
        let false_alarms = (0..200).filter(|&seed| alarm(seed, 0.6, &settings).is_some()).count();
        // 20 expected at most; the upper 99.9 % limit of a binomial of 200 at 0.1 is 34.
        assert!(false_alarms <= 34, "{false_alarms}");
        let found: Vec<Option<usize>> = (0..50).map(|seed| alarm(seed, 0.3, &Settings::default())).collect();
        let soon = found.iter().flatten().filter(|n| **n <= 500).count();
        assert!(soon >= 45 && found.iter().all(Option::is_some), "{soon} of 50 within 500 answers: {found:?}");
    }

    #[test]
    fn few_prompts_find_what_is_broken_and_only_that() {
        let settings = Settings::default();
        assert!(worse(&[-1.0; 32], &settings).is_some());
        assert!(worse(&[0.0; 32], &settings).is_none() && worse(&[], &settings).is_none());
        assert!(worse(&[-1.0, 1.0].repeat(16), &settings).is_none());
        assert!(worse(&[1.0; 32], &settings).is_none());
    }

    #[test]
    fn a_fall_within_the_margin_and_few_answers_are_no_fall() {
        let (good, bad) = (vec![1.0; 500], vec![0.0; 500]);
        let settings = Settings::default();
        assert_eq!(judge(&good, &bad[..99], &settings), Seen::Waiting { before: 500, after: 99 });
        assert!(judge(&good, &bad, &Settings { margin: 0.999, ..settings.clone() }).fall().is_none());
        let reason = judge(&good, &bad, &settings).fall().unwrap();
        assert!(reason.starts_with("the live reward fell from 1.0000 (at least 0.9"), "{reason}");
        assert!(judge(&bad, &good, &settings).fall().is_none(), "a rise is none");
    }
}
