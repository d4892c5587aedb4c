//! Which samples of a group train, with which weight, and the loss they make: numbers in, numbers out.
//!
//! Every method here is a weighted likelihood, `-(1/B) sum_i w_i (1/|y_i|) sum_t log p(y_it)`; methods differ in the
//! weights only.

use serde::{Deserialize, Serialize};

/// How rewards become weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Reward-ranked fine-tuning: weight 1 for the best samples of each prompt, 0 for the others.
    Raft,
}

/// What a group of samples contributes.
#[derive(Debug, Clone, PartialEq)]
pub enum Choice {
    /// These samples train: index in the group and weight, best first.
    Train(Vec<(usize, f64)>),
    /// All samples were scored the same, so that they say nothing about what is better.
    AllEqual,
    /// None was good enough.
    NoneAbove,
}

/// Chooses among the samples of one prompt by their rewards. Ties go to the earlier sample.
pub fn choose(method: Method, rewards: &[f64], best: usize, min_reward: f64) -> Choice {
    if rewards.iter().all(|reward| Some(reward) == rewards.first()) {
        return Choice::AllEqual;
    }
    let Method::Raft = method;
    let mut order: Vec<usize> = (0..rewards.len()).filter(|i| rewards[*i] > min_reward).collect();
    order.sort_by(|a, b| rewards[*b].total_cmp(&rewards[*a]).then(a.cmp(b)));
    order.truncate(best);
    match order.is_empty() {
        true => Choice::NoneAbove,
        false => Choice::Train(order.into_iter().map(|i| (i, 1.0)).collect()),
    }
}

/// Returns the factor of each token's log-prob in the loss, for samples of `(tokens, weight)` in a batch of `batch`.
pub fn factors(samples: &[(usize, f64)], batch: usize) -> Vec<f32> {
    let factor = |(tokens, weight): &(usize, f64)| (-weight / (*tokens as f64 * batch as f64)) as f32;
    samples.iter().flat_map(|sample| std::iter::repeat_n(factor(sample), sample.0)).collect()
}

/// Returns the sum over tokens of an estimate of KL(policy || base) that is never negative: `r - ln r - 1` with
/// `r = base / policy`. The samples are not the policy's own, so this is a measure of drift, not the gate's KL.
pub fn drift(policy: &[f32], base: &[f32]) -> f64 {
    // A token that the base held 1e8 times likelier is already far past any bound.
    let log_ratio = |(policy, base): (&f32, &f32)| (*base as f64 - *policy as f64).min(18.0);
    policy.iter().zip(base).map(log_ratio).map(|l| l.exp() - l - 1.0).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raft_takes_the_best_above_the_minimum_and_ties_go_to_the_earlier() {
        let choose = |rewards: &[f64], min| choose(Method::Raft, rewards, 2, min);
        assert_eq!(choose(&[0.1, 0.9, 0.5, 0.9], 0.0), Choice::Train(vec![(1, 1.0), (3, 1.0)]));
        assert_eq!(choose(&[0.5, 0.9, 0.5, 0.0], 0.0), Choice::Train(vec![(1, 1.0), (0, 1.0)]));
        assert_eq!(choose(&[0.1, 0.9, 0.5], 0.6), Choice::Train(vec![(1, 1.0)]));
        assert_eq!(choose(&[0.1, 0.2], 0.2), Choice::NoneAbove);
        assert_eq!(choose(&[0.7, 0.7, 0.7], 0.0), Choice::AllEqual);
        assert_eq!(choose(&[0.7], 0.0), Choice::AllEqual);
    }

    #[test]
    fn each_sample_counts_by_its_weight_whatever_its_length() {
        let factors = factors(&[(1, 1.0), (4, 1.0), (2, -0.5)], 2);
        assert_eq!(factors, [-0.5, -0.125, -0.125, -0.125, -0.125, 0.125, 0.125]);
    }

    #[test]
    fn drift_is_zero_on_equal_log_probs_and_positive_both_ways() {
        assert_eq!(drift(&[-1.0, -2.0], &[-1.0, -2.0]), 0.0);
        let up = drift(&[-1.0], &[-1.5]);
        assert!((up - ((-0.5f64).exp() + 0.5 - 1.0)).abs() < 1e-12);
        assert!(drift(&[-1.5], &[-1.0]) > 0.0);
        assert!(drift(&[-1e30], &[0.0]).is_finite());
    }
}
