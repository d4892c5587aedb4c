//! How the trials stand, from their stored rows: what a report, the page and the command line all tell.

use super::history::last_rows;
use super::trial::Trial;
use super::{GateError, State, StepRow, TrialRow, Verdict};

/// Returns every trial as its last row left it, the newest first.
pub fn trials(rows: &[TrialRow]) -> Vec<&TrialRow> {
    let mut last = last_rows(rows);
    last.reverse();
    last
}

/// Recomputes a trial from its stored rows and returns its verdict: the stored one where it ended, else how it stands.
pub fn standing(trial: &str, rows: &[TrialRow], steps: &[StepRow]) -> Result<Verdict, GateError> {
    let last = last_rows(rows).into_iter().find(|row| row.facts.trial == trial);
    let last = last.ok_or_else(|| GateError::NoTrial(trial.to_string()))?;
    let resumed = Trial::resume(trial, rows, steps)?;
    let verdict = Verdict::new(&resumed, &resumed.decide());
    Ok(match last.state {
        State::Open => verdict,
        state => Verdict { state, reason: last.reason.clone(), guardrail: last.guardrail.clone(), ..verdict },
    })
}
