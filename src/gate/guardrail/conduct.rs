//! Conduct: what an answer costs, and the ways of not answering that a score may not see.

use super::thresholds::RATIO_CUT;
use super::{Finding, Guardrail, Outcome, Parts, Thresholds, at_most, holm, too_few};
use crate::gate::behaviour::Behaviour;
use crate::gate::confidence::{bounds, p_at_least};
use crate::gate::rows::Observation;

/// Cost: tokens of an answer, new to incumbent.
///
/// Both sides run in one engine with adapters of one shape, so the time and the price of an answer go with its tokens;
/// seconds would differ from run to run, and a resumed night must come to the same decision.
pub(super) fn cost(observations: &[Observation], limits: &Thresholds) -> Finding {
    let mut parts = Parts::new();
    let ratio = |o: &Observation| Some(((o.new.tokens? + 1.0) / (o.incumbent.tokens? + 1.0)).ln());
    let ratios: Vec<f64> = observations.iter().filter_map(ratio).collect();
    if let Some(reason) = too_few(ratios.len(), limits.min_prompts) {
        parts.add(Outcome::NotYet, format!("{reason} with counted tokens"));
        return parts.finding(Guardrail::Cost);
    }
    let cut = RATIO_CUT.ln();
    let ratio = bounds(&ratios, -cut, cut, limits.level);
    let (mean, from, to) = (ratio.mean.exp(), ratio.lower.exp(), ratio.upper.exp());
    for (name, value) in [("ratio", mean), ("ratio_lower", from), ("ratio_upper", to)] {
        parts.number(name, value);
    }
    let most = limits.cost_ratio_max;
    let shown = format!("an answer takes {mean:.2} times the tokens ({from:.2} to {to:.2}, at most {most})");
    parts.add(at_most(&ratio, most.ln()), shown);
    parts.finding(Guardrail::Cost)
}

/// Behaviour: refusals, questions back, empty and repeating answers, broken tool calls; none may become more frequent.
pub(super) fn behaviour(observations: &[Observation], limits: &Thresholds) -> Finding {
    let mut parts = Parts::new();
    let both = |o: &Observation| Some((o.new.behaviour?, o.incumbent.behaviour?));
    let pairs: Vec<(Behaviour, Behaviour)> = observations.iter().filter_map(both).collect();
    if let Some(reason) = too_few(pairs.len(), limits.min_prompts) {
        parts.add(Outcome::NotYet, format!("{reason} with classified answers"));
        return parts.finding(Guardrail::Behaviour);
    }
    let most = limits.behaviour_tolerance;
    let rises: Vec<Vec<f64>> = (0..Behaviour::NAMES.len())
        .map(|kind| pairs.iter().map(|(new, old)| new.rates()[kind] - old.rates()[kind]).collect())
        .collect();
    let more_than_allowed = |rise: &Vec<f64>| {
        let falls: Vec<f64> = rise.iter().map(|x| -x).collect();
        p_at_least(&falls, -most, -1.0, 1.0, limits.level)
    };
    let vetoes = holm(&rises.iter().map(more_than_allowed).collect::<Vec<_>>(), limits.level);
    for ((name, rise), veto) in Behaviour::NAMES.iter().zip(&rises).zip(vetoes) {
        let rise = bounds(rise, -1.0, 1.0, limits.level);
        parts.bounds(name, &rise);
        let outcome = match veto {
            true => Outcome::Fail,
            false if rise.upper <= most => Outcome::Pass,
            false => Outcome::NotYet,
        };
        let shown = format!("{:+.3} ({:+.3} to {:+.3}, at most {most})", rise.mean, rise.lower, rise.upper);
        parts.add(outcome, format!("{name} {shown}"));
    }
    parts.finding(Guardrail::Behaviour)
}
