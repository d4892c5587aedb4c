//! Segments: no workload, tenant, language or length of question that carries a real share of the traffic may be hurt.

use std::collections::BTreeMap;

use super::{Finding, Guardrail, Outcome, Parts, Thresholds, holm, too_few};
use crate::gate::confidence::{bounds, p_at_least};
use crate::gate::rows::Observation;

/// Characters of the question up to which it is of the length named.
const LENGTHS: [(f64, &str); 3] = [(1_000.0, "short"), (8_000.0, "middle"), (f64::INFINITY, "long")];

/// Traffic and differences of each segment by its name.
type Segments = BTreeMap<String, (u64, Vec<f64>)>;

/// Judges every segment: none may lose more than the tolerance.
///
/// A segment is untested below a share of traffic, and waits below a number of prompts. Each kind of segment that has one
/// value only says what the evidence says already, and is left out; what is unknown of a prompt makes no segment.
pub(super) fn segments(observations: &[Observation], limits: &Thresholds) -> Finding {
    let mut parts = Parts::new();
    let floor = -limits.workload_tolerance;
    let all: u64 = observations.iter().map(|o| o.traffic).sum();
    let mut judged = Vec::new();
    let segments = gather(observations);
    for (name, (traffic, differences)) in &segments {
        let share = *traffic as f64 / all.max(1) as f64;
        parts.number(format!("share:{name}"), share);
        if share < limits.workload_min_share {
            parts.reasons.push((Outcome::Pass, format!("{name} untested ({:.1} % of traffic)", 100.0 * share)));
        } else if let Some(reason) = too_few(differences.len(), limits.workload_min_prompts) {
            parts.add(Outcome::NotYet, format!("{name}: {reason}"));
        } else {
            judged.push((name, differences, p_at_least(differences, floor, -1.0, 1.0, limits.level)));
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
    parts.finding(Guardrail::Segments)
}

fn gather(observations: &[Observation]) -> Segments {
    let mut all = Segments::new();
    let mut add = |of: &dyn Fn(&Observation) -> Option<String>, always: bool| {
        let mut some = Segments::new();
        let mut known = 0;
        for o in observations {
            let Some(name) = of(o) else { continue };
            let entry = some.entry(name).or_default();
            entry.0 += o.traffic;
            entry.1.push(o.d());
            known += 1;
        }
        if always || some.len() > 1 || (known > 0 && known < observations.len()) {
            all.append(&mut some);
        }
    };
    add(&|o| Some(o.workload_name().to_string()), true);
    add(&|o| o.tenant.as_ref().map(|tenant| format!("tenant {tenant}")), false);
    add(&|o| o.language.as_ref().map(|language| format!("language {language}")), false);
    add(&|o| o.question_chars.map(|chars| format!("{} questions", length_name(chars))), false);
    all
}

fn length_name(chars: f64) -> &'static str {
    LENGTHS.iter().find(|(most, _)| chars <= *most).map_or("long", |(_, name)| name)
}
