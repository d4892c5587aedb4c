//! What the rows of table `trials` say of the trials before: which is open, how each ended.

use std::collections::BTreeMap;

use super::rows::{State, TrialRow};

/// Returns the last row of each trial, in the order in which they were opened.
pub fn last_rows(history: &[TrialRow]) -> Vec<&TrialRow> {
    let mut last: BTreeMap<(i32, u32, &str), &TrialRow> = BTreeMap::new();
    for row in history {
        let key = (row.facts.budget_year, row.facts.number, row.facts.trial.as_str());
        let kept = last.entry(key).or_insert(row);
        // Closed beats open, a later night an earlier one: rows may be read in any order.
        if (row.state != State::Open, row.night) >= (kept.state != State::Open, kept.night) {
            *kept = row;
        }
    }
    last.into_values().collect()
}

/// Returns the trial that is open, if one is.
pub fn open_trial(history: &[TrialRow]) -> Option<&TrialRow> {
    last_rows(history).into_iter().find(|row| row.state == State::Open)
}
