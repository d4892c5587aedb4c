//! What can become of a trial.

use super::guardrail::Guardrail;
use super::rows::State;

/// What follows from the evidence and the guardrails.
#[derive(Debug, Clone, PartialEq)]
pub enum Decision {
    Continue(Waiting),
    Promote,
    Refuse {
        guardrail: Guardrail,
        reason: String,
    },
    /// A person said no to what the gate had passed.
    Reject(String),
    Futile,
    Expired,
    Void(String),
}

/// What an open trial waits for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Waiting {
    /// The bar is not reached.
    Evidence,
    /// The bar is reached, but these guardrails cannot tell yet.
    Guardrails(Vec<Guardrail>),
    /// Bar and guardrails hold, but the challenger has not been judged on `gate.min_nights` nights.
    Nights,
}

impl Decision {
    /// Returns the state that the trial is in after this decision.
    pub fn state(&self) -> State {
        match self {
            Decision::Continue(_) => State::Open,
            Decision::Promote => State::Promoted,
            Decision::Refuse { .. } | Decision::Reject(_) => State::Refused,
            Decision::Futile => State::Futile,
            Decision::Expired => State::Expired,
            Decision::Void(_) => State::Void,
        }
    }
}
