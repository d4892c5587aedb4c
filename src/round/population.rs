//! The watch over the prompts' population: tonight's held-out prompts against those of the rounds before.
//!
//! What was counted stays in the round's folder as numbers without text, so that a later night compares with it whatever has
//! been erased since. An alarm is told (the log, a metric, a row of `rounds`): a changed traffic is a reason to look at rules,
//! calibration and anchors, and the gate's evidence is about the prompts that are drawn anyway. It stops something only where
//! `registry.freeze_on` says so ([`super::alarm`]).

use serde::{Deserialize, Serialize};

use super::{Night, Paths, RoundError};
use crate::dataset::population::{Profile, Shift, compare};
use crate::dataset::{Dataset, Prompt};
use crate::durable;

/// Name of the file in a round's folder.
const FILE: &str = "population.json";

/// What was counted in a round and how it compares.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Population {
    /// Time of the newest prompt that an earlier round counted, in microseconds since the epoch; nothing in the first round.
    pub after_us: Option<i64>,
    /// Time of the newest prompt counted.
    pub until_us: i64,
    /// The rounds it was compared with.
    pub against: Vec<String>,
    /// Clusters of those rounds.
    pub reference_prompts: u64,
    pub profile: Profile,
    /// Empty where there were too few prompts to tell.
    pub shifts: Vec<Shift>,
}

impl Population {
    /// Yields the features whose population has shifted.
    pub fn alarms(&self) -> impl Iterator<Item = &Shift> {
        self.shifts.iter().filter(|shift| shift.alarm)
    }
}

/// Counts the night's held-out prompts, compares them and stores what came out. A resumed round keeps what it found first.
pub(super) fn watch(night: &Night<'_>, dataset: &Dataset) -> Result<Population, RoundError> {
    let paths = Paths::new(&night.config.state.dir);
    if let Some(found) = read(&paths, &night.plan.round)? {
        return Ok(found);
    }
    let settings = &night.config.dataset.population;
    let mut earlier = Vec::new();
    for id in paths.round_ids()?.into_iter().rev().filter(|id| *id < night.plan.round) {
        if earlier.len() == settings.rounds {
            break;
        }
        earlier.extend(read(&paths, &id)?.filter(|seen| seen.profile.prompts > 0).map(|seen| (id, seen)));
    }
    let held: Vec<&Prompt> = dataset.gate.prompts().iter().chain(dataset.audit.prompts()).collect();
    let found = look(&held, &earlier, settings);
    for Shift { feature, index, chance, .. } in found.alarms() {
        let (feature, prompts) = (feature.as_str(), found.profile.prompts);
        tracing::warn!(round = %night.plan.round, feature, index, chance, prompts,
            "tonight's prompts are of another population than those of the rounds before (docs/runbooks/TaodPromptsShifted.md)");
    }
    durable::write_json(&night.folder.join(FILE), &found)?;
    Ok(found)
}

fn look(
    held: &[&Prompt],
    earlier: &[(String, Population)],
    settings: &crate::dataset::population::Settings,
) -> Population {
    let after_us = earlier.iter().map(|(_, seen)| seen.until_us).max();
    let profile = Profile::of(held.iter().copied(), after_us.unwrap_or(i64::MIN));
    let mut reference = Profile::default();
    earlier.iter().for_each(|(_, seen)| reference.add(&seen.profile));
    let newest = held.iter().map(|prompt| prompt.event_time_us).max();
    Population {
        after_us,
        until_us: newest.max(after_us).unwrap_or(i64::MIN),
        against: earlier.iter().map(|(id, _)| id.clone()).collect(),
        reference_prompts: reference.prompts,
        shifts: compare(&reference, &profile, settings),
        profile,
    }
}

/// Reads what a round counted; nothing where it counted nothing.
pub fn read(paths: &Paths, round: &str) -> Result<Option<Population>, RoundError> {
    match durable::read_json(&paths.round(round).join(FILE)) {
        Err(error) if error.is_not_found() => Ok(None),
        read => Ok(Some(read?)),
    }
}
