//! What an alarm of a night does where `registry.freeze_on` names it: promotions are frozen, as by an operator.
//!
//! A freeze is once for a round. Somebody who lifts it has seen the alarm, and the round goes on where it is resumed.

use super::population::Population;
use super::{Night, RoundError};
use crate::registry::{Alarm, Happened};
use crate::rewards::anchors::Standing;

/// Who is recorded to have frozen promotions.
const BY: &str = "alarm";

/// Freezes promotions where one of the alarms that are heeded rang in this night.
pub(super) fn heed(night: &Night<'_>, population: &Population, anchors: &[Standing]) -> Result<(), RoundError> {
    let heeded = &night.config.registry.freeze_on;
    let Some(reason) = reason(&night.plan.round, heeded, population, anchors) else { return Ok(()) };
    let is_ours =
        |what: &Happened| matches!(what, Happened::Frozen { reason: told, by } if by == BY && *told == reason);
    if night.registry.history()?.iter().any(|event| is_ours(&event.what)) {
        return Ok(());
    }
    tracing::error!(round = %night.plan.round, reason, "promotions are frozen until `taod gate thaw`");
    Ok(night.registry.freeze(&reason, BY, super::trial::now_us())?)
}

/// Returns what rang, in words without any text of the log.
fn reason(round: &str, heeded: &[Alarm], population: &Population, anchors: &[Standing]) -> Option<String> {
    let shifted = || population.alarms().map(|shift| format!("{} {:.2}", shift.feature.as_str(), shift.index));
    let moved = || anchors.iter().filter(|s| s.alarm).map(|s| format!("{} {:.2}", s.score, s.shift));
    let said = heeded.iter().filter_map(|alarm| {
        let (what, named): (_, Vec<String>) = match alarm {
            Alarm::Population => ("prompts are of another population", shifted().collect()),
            Alarm::Anchors => ("scorers score otherwise than before", moved().collect()),
        };
        (!named.is_empty()).then(|| format!("{what} ({})", named.join(", ")))
    });
    let said: Vec<String> = said.collect();
    (!said.is_empty()).then(|| format!("{round}: {}", said.join("; ")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::population::{Feature, Profile, Shift};

    fn population(alarm: bool) -> Population {
        let shift = Shift { feature: Feature::Words, index: 0.4, chance: 0.1, bins: 9, alarm };
        let (after_us, against) = (None, Vec::new());
        Population {
            after_us,
            until_us: 1,
            against,
            reference_prompts: 99,
            profile: Profile::default(),
            shifts: vec![shift],
        }
    }

    #[test]
    fn only_an_alarm_that_is_heeded_and_rang_is_a_reason() {
        let both = [Alarm::Population, Alarm::Anchors];
        assert_eq!(
            reason("round-00007", &both, &population(true), &[]).as_deref(),
            Some("round-00007: prompts are of another population (words 0.40)")
        );
        for (heeded, rang) in [(&both[..], false), (&both[1..], true), (&[], true)] {
            assert_eq!(reason("round-00007", heeded, &population(rang), &[]), None);
        }
    }
}
