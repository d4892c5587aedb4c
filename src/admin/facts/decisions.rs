//! Decisions in plain words: what was promoted, refused, rolled back, frozen, and why, the refusals included.

use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::Serialize;

use super::{FactError, Facts, time};
use crate::gate::standing::trials;
use crate::gate::{State, TrialRow};
use crate::registry::{Event, Happened};

/// One decision.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub(in super::super) struct Decision {
    pub(in super::super) time: DateTime<Utc>,
    /// `registered`, `promoted`, `overridden`, `rolled_back`, `aborted`, `quarantined`, `frozen`, `thawed`, or how a trial ended: `refused`,
    /// `futile`, `expired`, `void`.
    pub(in super::super) kind: String,
    /// What happened, in one sentence.
    pub(in super::super) words: String,
    /// The adapter that it is about, where it is about one.
    pub(in super::super) version: Option<String>,
    pub(in super::super) trial: Option<String>,
}

impl Facts {
    /// Returns the newest decisions, the newest first.
    pub(in super::super) async fn decisions(&self, limit: usize) -> Result<Vec<Decision>, FactError> {
        let events = self.registry()?.history().map_err(FactError::failed)?;
        let rows = self.trial_rows().await?;
        let all = in_order(events.into_iter().map(of_event).collect(), trials(&rows).into_iter().filter_map(of_trial));
        Ok(all.into_iter().rev().take(limit).collect())
    }
}

/// Returns events, which are in their order, and the ends of trials among them, the oldest first. A clock that was set back
/// changes no order: an event is never before the one that was written before it, nor a trial's end before its adapter was there.
fn in_order(events: Vec<Decision>, ends: impl Iterator<Item = Decision>) -> Vec<Decision> {
    let mut latest = DateTime::UNIX_EPOCH;
    let mut placed: Vec<((DateTime<Utc>, usize), Decision)> = Vec::new();
    for (at, event) in events.into_iter().enumerate() {
        latest = latest.max(event.time);
        placed.push(((latest, at), event));
    }
    let of_end = |end: Decision| {
        let known = |(_, event): &&((DateTime<Utc>, usize), Decision)| {
            event.kind == "registered" && event.version == end.version
        };
        let (from, at) = placed.iter().find(known).map_or((DateTime::UNIX_EPOCH, 0), |(place, _)| *place);
        ((from.max(end.time), at), end)
    };
    let ends: Vec<((DateTime<Utc>, usize), Decision)> = ends.map(of_end).collect();
    placed.extend(ends);
    // Stable: an end comes after the event that it goes by.
    placed.sort_by_key(|(place, _)| *place);
    placed.into_iter().map(|(_, decision)| decision).collect()
}

fn of_event(event: Event) -> Decision {
    let (kind, version, trial, words) = match event.what {
        Happened::Registered { version, .. } => {
            let words = format!("{version} was trained and put into the registry.");
            ("registered", Some(version), None, words)
        }
        Happened::Promoted { from, to, trial, .. } => {
            let words = format!(
                "{to} took the place of {from}: it passed trial {trial}, and the endpoint was shown to answer as it."
            );
            ("promoted", Some(to), Some(trial), words)
        }
        Happened::Overridden { from, to, operator, reason, .. } => {
            let words = format!("{operator} put {to} in the place of {from} without a verdict of the gate: {reason}.");
            ("overridden", Some(to), None, words)
        }
        Happened::RolledBack { from, to, reason, .. } => {
            let words = format!("{from} was taken back, {to} is served again: {reason}. {from} is out for good.");
            ("rolled_back", Some(from), None, words)
        }
        Happened::Aborted { to, reason, .. } => {
            let words = format!("The change to {to} was given up before clients saw it: {reason}.");
            ("aborted", Some(to), None, words)
        }
        Happened::Quarantined { version, reason } => {
            let words = format!("{version} may never be served again: {reason}.");
            ("quarantined", Some(version), None, words)
        }
        Happened::Imported { to, operator, reason, .. } => {
            let words = format!("{operator} told that {to} is what the endpoint serves already: {reason}.");
            ("imported", Some(to), None, words)
        }
        Happened::Rebased { base, operator, reason, .. } => {
            let words =
                format!("{operator} made {base} the base model; adapters of the former one are refused: {reason}.");
            ("new_base", None, None, words)
        }
        Happened::CanaryBegan { version, percent, operator, reason } => {
            let words = format!("{operator} gave {version} to {percent} % of the requests: {reason}.");
            ("canary_began", Some(version), None, words)
        }
        Happened::CanaryEnded { version, reason } => {
            let words = format!("{version} is no canary any more: {reason}.");
            ("canary_ended", Some(version), None, words)
        }
        Happened::Frozen { reason, by } => ("frozen", None, None, format!("{by} froze promotions: {reason}.")),
        Happened::Thawed { reason, by } => ("thawed", None, None, format!("{by} lifted the freeze: {reason}.")),
    };
    Decision { time: time(event.time_us), kind: kind.to_string(), words, version, trial }
}

/// Returns how a trial ended that led to no promotion; the others stand in the registry's history.
fn of_trial(row: &TrialRow) -> Option<Decision> {
    let said = match row.state {
        State::Open | State::Promoted => return None,
        State::Refused => "was refused by a guardrail",
        State::Futile => "was dropped, since the evidence spoke against it",
        State::Expired => "was dropped, since its nights were over",
        State::Void => "lost its trial, which became void",
    };
    let facts = &row.facts;
    Some(Decision {
        time: time(row.time_us),
        kind: row.state.as_str().to_string(),
        words: format!("{} {said}: {}. {} stays.", facts.challenger, row.reason, facts.incumbent),
        version: Some(facts.challenger.clone()),
        trial: Some(facts.trial.clone()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decision(day: u32, kind: &str, version: &str) -> Decision {
        let time = chrono::NaiveDate::from_ymd_opt(2026, 1, day).unwrap().and_hms_opt(2, 0, 0).unwrap().and_utc();
        Decision { time, kind: kind.into(), words: String::new(), version: Some(version.into()), trial: None }
    }

    #[test]
    fn a_clock_that_was_set_back_changes_no_order_of_decisions() {
        let event = decision;
        let order = |events: Vec<Decision>, ends: Vec<Decision>| -> Vec<String> {
            let all = in_order(events, ends.into_iter()).into_iter();
            all.map(|decision| format!("{} {}", decision.kind, decision.version.unwrap_or_default())).collect()
        };
        let told = order(
            // Set back by three days after the promotion of b.
            vec![
                event(10, "registered", "a"),
                event(12, "registered", "b"),
                event(12, "promoted", "b"),
                event(9, "registered", "c"),
                event(10, "frozen", "c"),
                event(13, "registered", "d"),
            ],
            vec![event(9, "refused", "c"), event(11, "futile", "a"), event(14, "refused", "d")],
        );
        let expected = [
            "registered a",
            "futile a",
            "registered b",
            "promoted b",
            "registered c",
            "refused c",
            "frozen c",
            "registered d",
            "refused d",
        ];
        assert_eq!(told, expected);
    }
}
