//! The gate: whether a challenger may replace the adapter being served.
//!
//! Everything here is pure: no I/O, no clock, no hidden randomness. The driver draws answers, scores them and stores
//! rows; the gate says in which order, what each difference does to the evidence, and what follows. Reading order:
//! [`evidence`] (the bet), [`level`] (how high the bar is this time of the year), [`order`] (why the bet is fair),
//! [`confidence`] and [`guardrail`] (what must hold besides), [`trial`] (one challenger's whole test, its [`decision`]s, stored in
//! [`rows`]), [`verdict`] (the recomputation that alone makes a [`Passed`]).

pub mod behaviour;
pub mod comparison;
pub mod confidence;
pub mod decision;
pub mod evidence;
pub mod forecast;
pub mod guardrail;
pub mod history;
pub mod interval;
pub mod level;
pub mod order;
pub mod picture;
pub mod rows;
pub mod settings;
pub mod simulate;
pub mod standing;
pub mod suite;
pub mod trial;
pub mod verdict;

#[cfg(test)]
mod simulations;

pub use behaviour::Behaviour;
pub use decision::{Decision, Waiting};
pub use evidence::{Evidence, EvidenceStep, evidence_line, evidence_lines};
pub use guardrail::{CANARY, Finding, Guardrail, Outcome, Thresholds};
pub use level::Mode;
pub use order::Block;
pub use rows::{Facts, Kl, LengthBounds, Observation, Side, State, StepRow, TrialRow, UsageRow};
pub use settings::Settings;
pub use suite::Suite;
pub use trial::{Conditions, Opening, Trial};
pub use verdict::{Passed, Verdict, explain, verify};

/// Why the gate refuses to go on. None of these is a verdict: a refused challenger is a [`Decision`].
#[derive(Debug, thiserror::Error)]
pub enum GateError {
    #[error("margin {0} is not in [0, 1): set gate.margin to the smallest gain worth a release, such as 0.005")]
    Margin(f64),
    #[error("difference {0} is not in [-1, 1]: scores must be in [0, 1]")]
    Difference(f64),
    #[error("{field} of cluster {cluster} is {value}, which is not {expected}: correct the scorer")]
    Measurement { field: &'static str, cluster: String, value: f64, expected: &'static str },
    #[error("line {} is not of the form {{\"d\": number}}: {source}", index + 1)]
    Line { index: u64, source: serde_json::Error },
    #[error("cannot read or write the lines: {0}")]
    Io(#[from] std::io::Error),
    #[error(
        "{trials} of {challengers} challengers of the year's error budget are spent: no promotion until the new year"
    )]
    Exhausted { trials: u32, challengers: u32 },
    #[error("trial {0} is still open: decide it before another challenger is tried")]
    StillOpen(String),
    #[error("challenger {challenger} was already tried in trial {trial} ({state}): train a new adapter")]
    AlreadyTried { challenger: String, trial: String, state: &'static str },
    #[error("trial {trial} has had all of its {nights} nights: close it as expired")]
    NightsOver { trial: String, nights: u32 },
    #[error("cluster {cluster} was already used in trial {trial}: gate clusters are used once")]
    Reused { cluster: String, trial: String },
    #[error("trial {trial} has ended ({state}): only an open one can be rejected")]
    Ended { trial: String, state: &'static str },
    #[error("trial {trial} is being driven by another process too: stop one of the two; what was stored first stands")]
    Contended { trial: String },
    #[error("trial {trial} expects cluster {expected} at step {step} but got {found}: answer the next block in order")]
    Order { trial: String, step: u64, expected: String, found: String },
    #[error("no rows of trial {0} are stored")]
    NoTrial(String),
    #[error("record of trial {trial} does not hold: {what}; nothing is promoted from it")]
    Record { trial: String, what: String },
    #[error("trial {trial} does not promote: {why}")]
    NotPassed { trial: String, why: String },
}

impl GateError {
    /// Returns the error of a stored record that contradicts its own recomputation.
    fn record(trial: &str, what: impl Into<String>) -> GateError {
        GateError::Record { trial: trial.to_string(), what: what.into() }
    }
}
