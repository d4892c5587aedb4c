//! Drift: how far the challenger's next-token distributions lie from the base's, over all its generations, and from the
//! incumbent's, in this round.

use super::{Finding, Guardrail, Outcome, Parts, Thresholds, at_most, too_few};
use crate::gate::confidence::bounds;
use crate::gate::rows::{Kl, Observation};

/// Divergences are cut at this multiple of the limit of their mean.
const KL_CUT: f64 = 10.0;
/// The share of tokens that may exceed the 95th percentile's limit, by what a 95th percentile is.
const KL_SHARE_OVER: f64 = 0.05;

/// Divergence from the base: its mean a token, and the share of tokens that it moved far.
pub(super) fn kl(observations: &[Observation], limits: &Thresholds) -> Finding {
    let measured: Vec<Kl> = observations.iter().filter_map(|o| o.kl).collect();
    let mut parts = Parts::new();
    if mean(&measured, limits.kl_mean_max, limits, &mut parts) {
        let shares: Vec<f64> = measured.iter().map(|kl| kl.over).collect();
        let over = bounds(&shares, 0.0, 1.0, limits.level);
        parts.bounds("share_over", &over);
        let shown = format!(
            "{:.1} % of tokens above {} nats ({:.1} to {:.1} %, at most {} %)",
            100.0 * over.mean,
            limits.kl_token_limit,
            100.0 * over.lower,
            100.0 * over.upper,
            100.0 * KL_SHARE_OVER
        );
        parts.add(at_most(&over, KL_SHARE_OVER), shown);
    }
    parts.finding(Guardrail::Kl)
}

/// Divergence from the incumbent: its mean a token.
pub(super) fn kl_round(observations: &[Observation], limits: &Thresholds) -> Finding {
    let measured: Vec<Kl> = observations.iter().filter_map(|o| o.kl_round).collect();
    let mut parts = Parts::new();
    mean(&measured, limits.kl_round_max, limits, &mut parts);
    parts.finding(Guardrail::KlRound)
}

/// Judges the mean of some divergences; returns false where there are too few.
fn mean(measured: &[Kl], limit: f64, limits: &Thresholds, parts: &mut Parts) -> bool {
    if let Some(reason) = too_few(measured.len(), limits.min_prompts) {
        parts.add(Outcome::NotYet, format!("{reason} with a measured divergence"));
        return false;
    }
    let means: Vec<f64> = measured.iter().map(|kl| kl.mean).collect();
    let mean = bounds(&means, 0.0, KL_CUT * limit, limits.level);
    parts.bounds("mean", &mean);
    let shown = format!("{:.3} nats a token ({:.3} to {:.3}, at most {limit})", mean.mean, mean.lower, mean.upper);
    parts.add(at_most(&mean, limit), shown);
    true
}
