//! Which samples of a group train, and the loss they make: numbers in, numbers out.
//!
//! Every method is a function of a whole group: rewards and log-probs in, the loss and its slope along each token's
//! log-prob out. The trainer's one loop multiplies the slopes into the model, so a method is told by its formula alone
//! and is checked against PyTorch without a model. Four families, one file each: [`likelihood`] of good answers,
//! [`policy`] gradients with a ratio, [`preference`] of one answer over another, [`regression`] of the log-ratio.

mod likelihood;
mod policy;
mod preference;
mod regression;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

use super::Settings;

/// How rewards become a gradient. What each computes stands with its family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Reward-ranked fine-tuning: likelihood of the best samples of each prompt (Dong et al. 2023).
    Raft,
    /// Likelihood of every sample above a threshold (Gulcehre et al. 2023).
    Rest,
    /// Likelihood of every sample, whatever its reward.
    Sft,
    /// REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024).
    Rloo,
    /// Group-relative policy optimisation (Shao et al. 2024).
    Grpo,
    /// GRPO without its biases of length and difficulty (Liu et al. 2025).
    DrGrpo,
    /// GRPO with a token-level mean and a wider upper clip (Yu et al. 2025).
    Dapo,
    /// GRPO with one ratio a sequence (Zheng et al. 2025).
    Gspo,
    /// Regression of the log-ratio to the sampler on the optimal advantage (2026, arXiv 2602.19362).
    Oapl,
    /// Regression of the log-ratio to the base on the optimal advantage (Brantley et al. 2025).
    AStarPo,
    /// Regression of the log-ratio of two answers on the difference of their rewards (Gao et al. 2024).
    Rebel,
    /// Direct preference optimisation (Rafailov et al. 2023).
    Dpo,
    /// DPO whose certainty is that of the rewards' difference.
    RcDpo,
    /// DPO and the likelihood of the better answer (iterative RPO, Pang et al. 2024).
    Rpo,
}

/// What a method is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    Likelihood,
    Policy,
    Preference,
    Regression,
}

impl Method {
    /// Every method.
    pub const ALL: [Method; 14] = [
        Method::Raft,
        Method::Rest,
        Method::Sft,
        Method::Rloo,
        Method::Grpo,
        Method::DrGrpo,
        Method::Dapo,
        Method::Gspo,
        Method::Oapl,
        Method::AStarPo,
        Method::Rebel,
        Method::Dpo,
        Method::RcDpo,
        Method::Rpo,
    ];

    fn family(self) -> Family {
        match self {
            Method::Raft | Method::Rest | Method::Sft => Family::Likelihood,
            Method::Rloo | Method::Grpo | Method::DrGrpo | Method::Dapo | Method::Gspo => Family::Policy,
            Method::Rebel | Method::Dpo | Method::RcDpo | Method::Rpo => Family::Preference,
            Method::Oapl | Method::AStarPo => Family::Regression,
        }
    }

    /// Returns true where the slopes of an answer depend on its siblings' log-probs, and not on their rewards alone.
    pub fn reads_siblings(self) -> bool {
        self.family() == Family::Preference
    }

    /// Returns true where the log-probs of the policy that training begins from enter the loss.
    pub fn needs_old(self) -> bool {
        self.family() == Family::Policy || matches!(self, Method::Oapl | Method::Rebel)
    }

    /// Returns true where the loss holds only for samples of the policy that training begins from, so that the sampler's own
    /// log-probs must be there and agree.
    pub fn is_on_policy(self) -> bool {
        self.family() == Family::Policy
    }

    /// Returns true where samples must be drawn at temperature 1 from the whole distribution: what else was drawn biases the
    /// estimate.
    pub fn needs_plain_samples(self) -> bool {
        matches!(self.family(), Family::Policy | Family::Regression)
    }

    /// Returns true where a sample is compared with its siblings.
    pub fn compares(self) -> bool {
        self != Method::Sft
    }
}

impl std::fmt::Display for Method {
    /// Writes its name in the config.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.serialize(f)
    }
}

/// A method with its constants.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Loss {
    pub method: Method,
    /// Strength of the tie to the reference.
    pub beta: f64,
    /// Temperature of the soft maximum that a prompt's value is.
    pub value_beta: f64,
    pub clip_low: f64,
    pub clip_high: f64,
    pub best: usize,
    pub min_reward: f64,
}

impl Loss {
    /// Takes the constants from the settings, and the method's own where those say 0.
    pub fn new(settings: &Settings) -> Self {
        let method = settings.method;
        let own = |set: f64, own: f64| if set > 0.0 { set } else { own };
        let beta = match method {
            Method::Rloo | Method::Oapl | Method::AStarPo => 0.05,
            Method::Dpo | Method::RcDpo | Method::Rpo | Method::Rebel => 0.1,
            _ => 0.0,
        };
        let (low, high) = match method {
            Method::Dapo => (0.2, 0.28),
            Method::Gspo => (3e-4, 4e-4),
            _ => (0.2, 0.2),
        };
        Loss {
            method,
            beta: own(settings.beta, beta),
            value_beta: own(settings.value_beta, if method == Method::AStarPo { 0.5 } else { 1.0 }),
            clip_low: own(settings.clip_low, low),
            clip_high: own(settings.clip_high, high),
            best: settings.best_per_prompt,
            min_reward: settings.min_reward,
        }
    }

    /// Chooses among the samples of one prompt by their rewards. Ties go to the earlier sample.
    pub fn choose(&self, rewards: &[f64]) -> Choice {
        let all = || Choice::Train((0..rewards.len()).collect());
        if self.method == Method::Sft {
            return all();
        }
        if rewards.iter().all(|reward| Some(reward) == rewards.first()) {
            return Choice::AllEqual;
        }
        match self.method.family() {
            Family::Likelihood => likelihood::choose(self, rewards),
            Family::Preference => preference::choose(self, rewards),
            Family::Policy | Family::Regression => all(),
        }
    }

    /// Returns the loss of a group, its share of the batch's, and its slopes. The members are those chosen, in that order.
    pub fn slopes(&self, group: &[Member], batch: &Batch) -> Slopes {
        match self.method.family() {
            Family::Likelihood => likelihood::slopes(group, batch),
            Family::Policy => policy::slopes(self, group, batch),
            Family::Preference => preference::slopes(self, group, batch),
            Family::Regression => regression::slopes(self, group, batch),
        }
    }
}

/// What a group of samples contributes.
#[derive(Debug, Clone, PartialEq)]
pub enum Choice {
    /// These samples train, by their index in the group. For preferences: better, worse, better, worse.
    Train(Vec<usize>),
    /// All samples were scored the same, so that they say nothing about what is better.
    AllEqual,
    /// None was good enough.
    NoneAbove,
}

/// A sample that trains, with the log-probs of its tokens.
#[derive(Debug, Clone, Copy)]
pub struct Member<'a> {
    pub reward: f64,
    /// Under the adapter as it is now.
    pub policy: &'a [f32],
    /// Under the policy that training began from; empty where the method does not ask.
    pub old: &'a [f32],
    /// Under the base.
    pub base: &'a [f32],
    /// As the sampler told them, where it did.
    pub sampler: Option<&'a [f32]>,
}

impl Member<'_> {
    fn tokens(&self) -> f64 {
        self.policy.len() as f64
    }

    /// Returns true where another part of the step holds this sample, so that its log-probs are not at hand.
    fn is_elsewhere(&self) -> bool {
        self.policy.is_empty()
    }

    /// Returns the log-ratio of the policy to a reference, of the whole answer.
    fn log_ratio(&self, reference: &[f32]) -> f64 {
        difference(self.policy, reference)
    }
}

/// The sum of `a - b` over tokens.
fn difference(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) - f64::from(*b)).sum()
}

/// What a loss is a mean over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batch {
    /// Samples of the step.
    pub samples: usize,
    /// Completion tokens of the step.
    pub tokens: usize,
    /// Tokens of the longest completion of the run.
    pub longest: usize,
}

/// A group's loss.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Slopes {
    /// Its share of the batch's loss.
    pub value: f64,
    /// The slope of the batch's loss along each log-prob, member by member.
    pub slopes: Vec<Vec<f32>>,
    /// Sum over all tokens of the ratio of the policy to what it was; a token's count is 1 where the method has none.
    pub ratio: f64,
    /// Tokens whose ratio was clipped.
    pub clipped: usize,
}

/// Largest weight of a token or a sequence that the sampler held less likely than the trainer does.
const LARGEST_WEIGHT: f64 = 2.0;

/// Returns the truncated weight of what was drawn by a sampler that is not quite the policy it stands for, of the log-ratio
/// of that policy to the sampler (truncated importance sampling, Yao et al. 2025).
pub fn weight(log_ratio: f64) -> f64 {
    log_ratio.exp().min(LARGEST_WEIGHT)
}

/// Returns the sum over tokens of how far the policy has moved from the base, in nats. Up to one nat it is half the square of the
/// log-ratio, which is the KL to second order whichever of the two drew the token (Schulman's k2); from there a line, as in
/// Huber's loss.
///
/// The samples are not the policy's own, so `k3`, whose mean is the KL on its own samples only, would here be the mean of
/// `base / policy`, which has no bound: one token of 158 at e^-7.8 of its former probability made it 16 nats a token. This
/// is a measure of drift, not the gate's KL.
pub fn drift(policy: &[f32], base: &[f32]) -> f64 {
    let moved = |(policy, base): (&f32, &f32)| match (f64::from(*policy) - f64::from(*base)).abs() {
        log if log <= 1.0 => 0.5 * log * log,
        log => log - 0.5,
    };
    policy.iter().zip(base).map(moved).sum()
}

/// The estimate of KL(policy || base) on the policy's own samples that is never negative: `r - ln r - 1` with `r = base / policy`.
fn k3(policy: f32, base: f32) -> f64 {
    let log = capped(policy, base);
    log.exp() - log - 1.0
}

/// The log-ratio of the base to the policy. A token that the base held 1e8 times likelier is already far past any bound.
fn capped(policy: f32, base: f32) -> f64 {
    (f64::from(base) - f64::from(policy)).min(18.0)
}
