//! Length: that answers do not grow or shrink beyond what is allowed, and that length alone does not explain the gain.

use std::collections::BTreeMap;

use super::thresholds::RATIO_CUT;
use super::{Finding, Guardrail, Outcome, Parts, Thresholds, at_least, at_most, too_few};
use crate::gate::confidence::bounds;
use crate::gate::rows::{LengthBounds, Observation};

/// Length: the ratio new to incumbent, that length alone does not explain the gain, and the bounds of the rules.
pub(super) fn length(
    observations: &[Observation],
    lengths: &BTreeMap<String, LengthBounds>,
    limits: &Thresholds,
) -> Finding {
    let mut parts = Parts::new();
    let bound_by_rules = |o: &&Observation| lengths.contains_key(o.workload_name());
    let free: Vec<f64> = observations.iter().filter(|o| !bound_by_rules(o)).map(log_ratio).collect();
    let total = observations.len();
    if let Some(reason) = too_few(total, limits.min_prompts) {
        parts.add(Outcome::NotYet, reason);
        return parts.finding(Guardrail::Length);
    }
    if !free.is_empty() {
        let cut = RATIO_CUT.ln();
        let ratio = bounds(&free, -cut, cut, limits.level);
        let (low, high) = (limits.length_ratio_min, limits.length_ratio_max);
        for (name, value) in [("ratio", ratio.mean), ("ratio_lower", ratio.lower), ("ratio_upper", ratio.upper)] {
            parts.number(name, value.exp());
        }
        let outcome = at_least(&ratio, low.ln()).max(at_most(&ratio, high.ln()));
        let (mean, from, to) = (ratio.mean.exp(), ratio.lower.exp(), ratio.upper.exp());
        parts.add(
            outcome,
            format!("answers are {mean:.2} times as long ({from:.2} to {to:.2}, allowed {low} to {high})"),
        );
    }
    let intercept = intercept(observations, &bound_by_rules);
    parts.number("intercept", intercept);
    let gain = observations.iter().map(Observation::d).sum::<f64>() / total as f64;
    if gain > 0.0 {
        let explained = if intercept > 0.0 { Outcome::Pass } else { Outcome::Fail };
        parts.add(explained, format!("the gain at equal length is {intercept:+.3} (must be above 0)"));
    } else {
        // Nothing that length could explain: to refuse it is up to the evidence.
        parts.add(Outcome::NotYet, format!("there is no gain ({gain:+.3}) that length could explain"));
    }
    for (workload, bounds) in lengths {
        let answers = observations.iter().filter(|o| o.workload_name() == workload);
        absolute(workload, bounds, &answers.collect::<Vec<_>>(), limits.level, &mut parts);
    }
    parts.finding(Guardrail::Length)
}

/// Returns the logarithm of new to incumbent length in words, where an empty answer counts as one word short of one.
fn log_ratio(o: &Observation) -> f64 {
    ((o.new.words + 1.0) / (o.incumbent.words + 1.0)).ln()
}

/// Returns the intercept of the regression of d on the change in log length: the gain that length does not explain.
///
/// Where the rules bound the length, a change of it is the specification and explains nothing, so it enters as 0.
fn intercept(observations: &[Observation], bound_by_rules: &impl Fn(&&Observation) -> bool) -> f64 {
    let points: Vec<(f64, f64)> =
        observations.iter().map(|o| (if bound_by_rules(&o) { 0.0 } else { log_ratio(o) }, o.d())).collect();
    let n = points.len().max(1) as f64;
    let (mean_x, mean_y) = (points.iter().map(|p| p.0).sum::<f64>() / n, points.iter().map(|p| p.1).sum::<f64>() / n);
    let spread: f64 = points.iter().map(|p| (p.0 - mean_x).powi(2)).sum();
    let product: f64 = points.iter().map(|p| (p.0 - mean_x) * (p.1 - mean_y)).sum();
    if spread > 0.0 { mean_y - product / spread * mean_x } else { mean_y }
}

/// Judges the mean length of a workload's new answers against the bounds that its own rules state.
///
/// Inside by its mean is a pass (a workload that asks for 40 words is answered with about 40); outside is a fail once proven.
fn absolute(workload: &str, limits: &LengthBounds, answers: &[&Observation], level: f64, parts: &mut Parts) {
    let cases = [
        ("words", limits.min_words, limits.max_words, answers.iter().map(|o| o.new.words).collect::<Vec<f64>>()),
        ("chars", limits.min_chars, limits.max_chars, answers.iter().map(|o| o.new.chars).collect()),
    ];
    for (unit, min, max, values) in cases {
        if values.is_empty() || (min.is_none() && max.is_none()) {
            continue;
        }
        let (min, max) = (min.unwrap_or(0.0), max.unwrap_or(f64::INFINITY));
        let cut = 4.0 * if max.is_finite() { max } else { min }.max(1.0);
        let length = bounds(&values, 0.0, cut, level);
        parts.number(format!("{unit}:{workload}"), length.mean);
        let outcome = match (min..=max).contains(&length.mean) {
            true => Outcome::Pass,
            false if length.upper < min || length.lower > max => Outcome::Fail,
            false => Outcome::NotYet,
        };
        let allowed = match (min > 0.0, max.is_finite()) {
            (true, true) => format!("{min} to {max}"),
            (false, _) => format!("at most {max}"),
            (true, false) => format!("at least {min}"),
        };
        let mean = length.mean;
        parts.add(outcome, format!("{workload}: {mean:.1} {unit} on average (its rules allow {allowed})"));
    }
}
