//! What must hold besides the evidence: length, drift from the base, quality by an independent scorer, no workload hurt.
//!
//! A score can rise for a bad reason, and the score itself cannot say so. Each guardrail looks at something that the
//! training reward does not compute, and answers pass, fail or not yet. All bounds are confidence sequences, because
//! guardrails are looked at after every block. A pass needs all of them, which needs no correction for their number;
//! a veto by any one workload does (Holm).

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::confidence::{Bounds, bounds, p_at_least};
use super::rows::{LengthBounds, Observation};

/// Ratios of lengths are cut at this factor: one absurd answer must not decide.
const RATIO_CUT: f64 = 8.0;
/// Divergences are cut at this multiple of the limit of their mean.
const KL_CUT: f64 = 10.0;

/// The name of a guardrail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Guardrail {
    Length,
    Kl,
    Quality,
    Workloads,
}

impl Guardrail {
    /// Returns the name stored in the table.
    pub fn as_str(self) -> &'static str {
        match self {
            Guardrail::Length => "length",
            Guardrail::Kl => "kl",
            Guardrail::Quality => "quality",
            Guardrail::Workloads => "workloads",
        }
    }
}

/// What a guardrail answers; the worst of several is the largest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    Pass,
    /// The data do not tell yet; the trial stays open.
    NotYet,
    Fail,
}

impl Outcome {
    /// Returns the answer as people read it.
    pub fn as_str(self) -> &'static str {
        match self {
            Outcome::Pass => "passes",
            Outcome::NotYet => "cannot tell yet",
            Outcome::Fail => "fails",
        }
    }
}

/// A guardrail's answer with its reason in words and in numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Finding {
    pub guardrail: Guardrail,
    pub outcome: Outcome,
    pub reason: String,
    pub numbers: BTreeMap<String, f64>,
}

/// Thresholds of the guardrails. The defaults are for large models; a small one moves more.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Thresholds {
    /// The error of each bound, a probability above 0 and below 0.5: 0.05 gives 95 % bounds that hold at all looks.
    pub level: f64,
    /// Prompts below which a guardrail answers "not yet", 1 or more.
    pub min_prompts: u32,
    /// The smallest ratio of answer lengths (new to incumbent, geometric mean over prompts), above 0 and below 1.
    pub length_ratio_min: f64,
    /// The largest such ratio, above 1 and below 8.
    pub length_ratio_max: f64,
    /// The largest mean divergence KL(new || base), nats a token, above 0.
    pub kl_mean_max: f64,
    /// The largest 95th percentile of the divergence per token, nats, above 0: at most 5 % of tokens may exceed it.
    pub kl_token_limit: f64,
    /// How much the independent quality score may fall, in its own unit (nats a token), above 0.
    pub quality_tolerance: f64,
    /// Differences in quality beyond this are cut to it, same unit, at least the tolerance.
    pub quality_range: f64,
    /// How much the mean score of any one workload may fall, above 0 and below 1.
    pub workload_tolerance: f64,
    /// Prompts of a workload below which it is not judged yet, 1 or more.
    pub workload_min_prompts: u32,
    /// The share of traffic below which a workload is listed as untested instead of judged, from 0 to 1.
    pub workload_min_share: f64,
}

impl Default for Thresholds {
    fn default() -> Self {
        Thresholds {
            level: 0.05,
            min_prompts: 50,
            length_ratio_min: 0.8,
            length_ratio_max: 1.25,
            kl_mean_max: 0.05,
            kl_token_limit: 0.2,
            quality_tolerance: 0.05,
            quality_range: 1.0,
            workload_tolerance: 0.03,
            workload_min_prompts: 200,
            workload_min_share: 0.05,
        }
    }
}

/// The share of tokens that may exceed the 95th percentile's limit, by what a 95th percentile is.
const KL_SHARE_OVER: f64 = 0.05;

impl Thresholds {
    /// Checks every value; the message names the key, the value and the remedy.
    pub fn validate(&self) -> Result<(), String> {
        let within = [
            ("level", self.level, 0.0, 0.5),
            ("length_ratio_min", self.length_ratio_min, 1.0 / RATIO_CUT, 1.0),
            ("length_ratio_max", self.length_ratio_max, 1.0, RATIO_CUT),
            ("kl_mean_max", self.kl_mean_max, 0.0, 1000.0),
            ("kl_token_limit", self.kl_token_limit, 0.0, 1000.0),
            ("quality_tolerance", self.quality_tolerance, 0.0, 1000.0),
            ("quality_range", self.quality_range, self.quality_tolerance, 1e6),
            ("workload_tolerance", self.workload_tolerance, 0.0, 1.0),
        ];
        for (key, value, low, high) in within {
            if !(value > low && value < high) {
                return Err(format!("guardrails.{key} {value} is not between {low} and {high}: set it in between"));
            }
        }
        if !(0.0..=1.0).contains(&self.workload_min_share) {
            let share = self.workload_min_share;
            return Err(format!("guardrails.workload_min_share {share} is not in [0, 1]: use a share such as 0.05"));
        }
        match (self.min_prompts, self.workload_min_prompts) {
            (0, _) => Err("guardrails.min_prompts 0 is too small: set it to 1 or more".into()),
            (_, 0) => Err("guardrails.workload_min_prompts 0 is too small: set it to 1 or more".into()),
            _ => Ok(()),
        }
    }
}

/// Returns what every guardrail says of the observations so far.
pub fn examine(
    observations: &[Observation],
    lengths: &BTreeMap<String, LengthBounds>,
    thresholds: &Thresholds,
) -> Vec<Finding> {
    vec![
        length(observations, lengths, thresholds),
        kl(observations, thresholds),
        quality(observations, thresholds),
        workloads(observations, thresholds),
    ]
}

/// Collects the parts of one guardrail: the worst outcome, and the reasons that led to it.
struct Parts {
    outcome: Outcome,
    reasons: Vec<(Outcome, String)>,
    numbers: BTreeMap<String, f64>,
}

impl Parts {
    fn new() -> Self {
        Parts { outcome: Outcome::Pass, reasons: Vec::new(), numbers: BTreeMap::new() }
    }

    fn add(&mut self, outcome: Outcome, reason: String) {
        self.outcome = self.outcome.max(outcome);
        self.reasons.push((outcome, reason));
    }

    fn number(&mut self, name: impl Into<String>, value: f64) {
        self.numbers.insert(name.into(), value);
    }

    fn bounds(&mut self, name: &str, bounds: &Bounds) {
        self.number(name, bounds.mean);
        self.number(format!("{name}_lower"), bounds.lower);
        self.number(format!("{name}_upper"), bounds.upper);
    }

    fn finding(self, guardrail: Guardrail) -> Finding {
        let told: Vec<String> =
            self.reasons.into_iter().filter(|(o, _)| *o == self.outcome).map(|(_, reason)| reason).collect();
        Finding { guardrail, outcome: self.outcome, reason: told.join("; "), numbers: self.numbers }
    }
}

/// Judges a mean that must stay at or below `limit`: pass where proven, fail where the opposite is.
fn at_most(bounds: &Bounds, limit: f64) -> Outcome {
    if bounds.upper <= limit {
        Outcome::Pass
    } else if bounds.lower > limit {
        Outcome::Fail
    } else {
        Outcome::NotYet
    }
}

/// Judges a mean that must stay at or above `limit`.
fn at_least(bounds: &Bounds, limit: f64) -> Outcome {
    at_most(&Bounds { lower: -bounds.upper, upper: -bounds.lower, ..*bounds }, -limit)
}

fn too_few(n: usize, needed: u32) -> Option<String> {
    (n < needed as usize).then(|| format!("{n} of at least {needed} prompts"))
}

/// Length: the ratio new to incumbent, that length alone does not explain the gain, and the bounds of the rules.
fn length(observations: &[Observation], lengths: &BTreeMap<String, LengthBounds>, limits: &Thresholds) -> Finding {
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

/// Drift: how far the challenger's next-token distributions lie from the base's.
fn kl(observations: &[Observation], limits: &Thresholds) -> Finding {
    let mut parts = Parts::new();
    let measured: Vec<_> = observations.iter().filter_map(|o| o.kl).collect();
    if let Some(reason) = too_few(measured.len(), limits.min_prompts) {
        parts.add(Outcome::NotYet, format!("{reason} with a measured divergence"));
        return parts.finding(Guardrail::Kl);
    }
    let limit = limits.kl_mean_max;
    let means: Vec<f64> = measured.iter().map(|kl| kl.mean).collect();
    let mean = bounds(&means, 0.0, KL_CUT * limit, limits.level);
    parts.bounds("mean", &mean);
    let shown = format!("{:.3} nats a token ({:.3} to {:.3}, at most {limit})", mean.mean, mean.lower, mean.upper);
    parts.add(at_most(&mean, limit), shown);
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
    parts.finding(Guardrail::Kl)
}

/// Quality: the independent scorer must not fall by more than its tolerance.
fn quality(observations: &[Observation], limits: &Thresholds) -> Finding {
    let mut parts = Parts::new();
    let range = limits.quality_range;
    let difference = |o: &Observation| match (o.new.quality, o.incumbent.quality) {
        (Some(new), Some(old)) => Some(new - old),
        // An answer that cannot be scored where the incumbent's can is the worst answer; the reverse is no merit.
        (None, Some(_)) => Some(-range),
        (Some(_), None) => Some(0.0),
        (None, None) => None,
    };
    let differences: Vec<f64> = observations.iter().filter_map(difference).collect();
    if let Some(reason) = too_few(differences.len(), limits.min_prompts) {
        parts.add(Outcome::NotYet, format!("{reason} with a quality score"));
        return parts.finding(Guardrail::Quality);
    }
    let change = bounds(&differences, -range, range, limits.level);
    parts.bounds("change", &change);
    let floor = -limits.quality_tolerance;
    let shown =
        format!("{:+.3} on average ({:+.3} to {:+.3}, at least {floor})", change.mean, change.lower, change.upper);
    parts.add(at_least(&change, floor), shown);
    parts.finding(Guardrail::Quality)
}

/// Workloads: none that carries a real share of the traffic may lose more than the tolerance.
fn workloads(observations: &[Observation], limits: &Thresholds) -> Finding {
    let mut parts = Parts::new();
    let floor = -limits.workload_tolerance;
    let mut by_name: BTreeMap<&str, (u64, Vec<f64>)> = BTreeMap::new();
    for o in observations {
        let entry = by_name.entry(o.workload_name()).or_default();
        entry.0 += o.traffic;
        entry.1.push(o.d());
    }
    let all: u64 = by_name.values().map(|(traffic, _)| traffic).sum();
    let mut judged = Vec::new();
    for (name, (traffic, differences)) in &by_name {
        let share = *traffic as f64 / all.max(1) as f64;
        parts.number(format!("share:{name}"), share);
        if share < limits.workload_min_share {
            parts.reasons.push((Outcome::Pass, format!("{name} untested ({:.1} % of traffic)", 100.0 * share)));
        } else if let Some(reason) = too_few(differences.len(), limits.workload_min_prompts) {
            parts.add(Outcome::NotYet, format!("{name}: {reason}"));
        } else {
            judged.push((*name, differences, p_at_least(differences, floor, -1.0, 1.0, limits.level)));
        }
    }
    let vetoes = holm(&judged.iter().map(|(_, _, p)| *p).collect::<Vec<_>>(), limits.level);
    for ((name, differences, _), veto) in judged.iter().zip(vetoes) {
        let gain = bounds(differences, -1.0, 1.0, limits.level);
        parts.bounds(&format!("gain:{name}"), &gain);
        let outcome = match veto {
            true => Outcome::Fail,
            false if gain.lower > floor => Outcome::Pass,
            false => Outcome::NotYet,
        };
        let interval = format!("({:+.3} to {:+.3}, at least {floor})", gain.lower, gain.upper);
        parts.add(outcome, format!("{name}: {:+.3} {interval}", gain.mean));
    }
    if observations.is_empty() {
        parts.add(Outcome::NotYet, "no prompts yet".into());
    }
    parts.finding(Guardrail::Workloads)
}

/// Returns which of several nulls are rejected so that any false rejection has probability at most `level` (Holm).
fn holm(p: &[f64], level: f64) -> Vec<bool> {
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|&a, &b| p[a].total_cmp(&p[b]));
    let mut rejected = vec![false; p.len()];
    for (rank, &i) in order.iter().enumerate() {
        if p[i] > level / (p.len() - rank) as f64 {
            break;
        }
        rejected[i] = true;
    }
    rejected
}

#[cfg(test)]
#[path = "guardrail_tests.rs"]
mod tests;
