//! Quality: an independent scorer, which the training reward cannot contain, must not fall.

use super::{Finding, Guardrail, Outcome, Parts, Thresholds, at_least, too_few};
use crate::gate::confidence::bounds;
use crate::gate::rows::Observation;

/// Quality: the independent scorer must not fall by more than its tolerance.
pub(super) fn quality(observations: &[Observation], limits: &Thresholds) -> Finding {
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
