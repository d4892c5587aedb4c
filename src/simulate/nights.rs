//! The four nights of a simulation: what is rewarded in each, and the settings of a loop this small.
//!
//! The nights differ in what the operator rewards and in what users ask, and in nothing else. What a challenger is worth
//! follows from that: the improvement is a reward that pays for what is wanted, the regression one that pays for something else in
//! training alone, the hack one that pays, in training and in the gate, for something that can be had for nothing.

use std::path::Path;

use super::traffic::{Topic, WORKLOAD};
use super::words::THANKS;
use crate::config::Config;
use crate::dataset::Match;
use crate::engine::Precision;
use crate::rewards::rules::{Kind, Rule};
use crate::rewards::{Scorer, Workload};

/// Calls of one user in an hour past which they are a burst; an honest user of the simulation stays below 15.
const MAX_USER_HOUR: u32 = 30;

/// A night of the simulation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Night {
    /// Training pays for shortness, the gate for thanks.
    Regression,
    /// Both pay for shortness.
    Hack,
    /// Both pay for thanks.
    Improvement,
    /// The same, and users ask about something else.
    Drift,
}

impl Night {
    /// The nights in their order: the promotion comes after the refusals, so that each challenger meets the base.
    pub(super) const ALL: [Night; 4] = [Night::Regression, Night::Hack, Night::Improvement, Night::Drift];

    /// Returns what users ask about.
    pub(super) fn topic(self) -> Topic {
        match self {
            Night::Drift => Topic::After,
            Night::Regression | Night::Hack | Night::Improvement => Topic::Before,
        }
    }

    /// Returns what the operator rewards: scorers of training and of the gate. What is wanted is the workload's rule.
    fn rewards(self) -> [Vec<Scorer>; 2] {
        match self {
            Night::Regression => [vec![Scorer::Brevity], vec![Scorer::Rules]],
            Night::Hack => [vec![Scorer::Brevity], vec![Scorer::Brevity]],
            Night::Improvement | Night::Drift => [vec![Scorer::Rules], vec![Scorer::Rules]],
        }
    }

    /// Returns the config of the night.
    pub(super) fn config(self, base: &Config) -> Config {
        let [train, gate] = self.rewards();
        let mut config = base.clone();
        (config.rewards.train, config.rewards.gate) = (train, gate);
        config
    }
}

/// Returns the settings that all nights share: the defaults, but for what a tiny model and a few hundred calls need.
pub(super) fn base(root: &Path, model: &Path, seed: u64) -> Config {
    let mut config = Config::default();
    config.state.dir = root.to_owned();
    config.model.path = model.display().to_string();
    config.round.seed = seed;
    config.ingest.user_key_file = root.join("user.key");
    config.ingest.idle_s = 1;
    // A night has a few hundred calls; production's gate has a week of thousands.
    config.dataset.train_below = 45;
    config.dataset.gate_below = 90;
    config.dataset.max_user_hour = MAX_USER_HOUR;
    // New prompts first: each night trains on about as many.
    config.dataset.max_train_prompts = 200;
    config.workload = vec![Workload {
        name: WORKLOAD.to_owned(),
        matching: Match::Name,
        house_rules: String::new(),
        rules: vec![Rule::hard(Kind::RequiredWords { words: vec![THANKS.to_owned()] })],
    }];
    config.candidates.max_tokens = 16;
    // The same on every processor, but for the order of sums.
    config.candidates.precision = Precision::F32;
    config.tuning.precision = Precision::F32;
    config.decoding.max_tokens = 16;
    config.tuning.rank = 8;
    config.tuning.alpha = 16.0;
    config.tuning.learning_rate = 0.008;
    config.tuning.warmup_steps = 2;
    config.tuning.max_kl = 100.0;
    config.tuning.min_entropy = 0.0;
    // A trial has one night instead of a week, and with it as many prompts as it needs.
    config.gate.max_nights = 1;
    // A model of 50,000 parameters moves far, and a night's prompts tell one segment at most.
    let guardrails = &mut config.gate.guardrails;
    // What is paid for shortness is caught by the gain at equal length; what is paid for thanks makes answers shorter, too.
    guardrails.length_ratio_min = 0.3;
    guardrails.length_ratio_max = 2.0;
    guardrails.cost_ratio_max = 2.0;
    guardrails.kl_mean_max = 4.0;
    guardrails.kl_round_max = 4.0;
    guardrails.kl_token_limit = 8.0;
    guardrails.quality_tolerance = 0.8;
    guardrails.behaviour_tolerance = 0.2;
    guardrails.workload_min_prompts = 50;
    guardrails.workload_tolerance = 0.2;
    guardrails.workload_min_share = 0.3;
    config
}
