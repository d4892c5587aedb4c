//! Late feedback joins its call: thumbs, ratings and corrections that came after the answer, as records of their own.
//!
//! Ingestion keeps no state, so feedback is a row of its own until a dataset is frozen. Here it finds its call: by the
//! call's id, else by its trace, else by its conversation, where it means the last call before it. A dataset is frozen
//! again every night, so feedback that is a week late still reaches its prompt.

use std::collections::{HashMap, HashSet};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::record::{Coordinates, Kind};

use super::QueryRow;

/// Most feedback that a prompt carries; the newest counts.
const MAX_PER_PROMPT: usize = 32;

/// What someone said of an answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Feedback {
    pub event_time_us: i64,
    /// As it was logged.
    pub value: Value,
}

/// Feedback and the calls that it is on.
#[derive(Debug, Default)]
pub(super) struct Joined {
    by_call: HashMap<Coordinates, Vec<Feedback>>,
    matched: HashSet<Coordinates>,
}

impl Joined {
    /// Joins rows in the order of the log.
    pub(super) fn of(rows: &[QueryRow]) -> Self {
        let mut joined = Joined::default();
        // Most logs have no feedback of its own: then nothing need be looked up.
        let has_late = rows.iter().any(|row| row.kind == Kind::Feedback);
        let calls = Calls::of(if has_late { rows } else { &[] });
        for row in rows {
            let Some(feedback) = read(row) else { continue };
            let call = if row.kind == Kind::Call { Some(row) } else { calls.of_feedback(row) };
            if let Some(call) = call {
                joined.by_call.entry(call.coordinates.clone()).or_default().push(feedback);
                joined.matched.insert(row.coordinates.clone());
            }
        }
        joined
    }

    /// Returns true where this row of feedback has found its call.
    pub(super) fn is_matched(&self, row: &QueryRow) -> bool {
        self.matched.contains(&row.coordinates)
    }

    /// Takes the feedback on a call.
    pub(super) fn take(&mut self, call: &QueryRow) -> Vec<Feedback> {
        self.by_call.remove(&call.coordinates).unwrap_or_default()
    }
}

/// Returns the newest feedback on a prompt, the oldest of it first.
pub(super) fn newest(mut feedback: Vec<Feedback>) -> Vec<Feedback> {
    feedback.sort_by_key(|feedback| feedback.event_time_us);
    feedback.split_off(feedback.len().saturating_sub(MAX_PER_PROMPT))
}

fn read(row: &QueryRow) -> Option<Feedback> {
    let text = row.feedback.as_deref()?;
    let value = serde_json::from_str(text).unwrap_or_else(|_| text.into());
    Some(Feedback { event_time_us: row.event_time_us, value })
}

/// Calls by what feedback may name.
struct Calls<'a> {
    by_request: HashMap<&'a str, Vec<&'a QueryRow>>,
    by_trace: HashMap<&'a str, Vec<&'a QueryRow>>,
    by_conversation: HashMap<&'a str, Vec<&'a QueryRow>>,
}

impl<'a> Calls<'a> {
    fn of(rows: &'a [QueryRow]) -> Self {
        let by = |key: fn(&QueryRow) -> Option<&str>| {
            let mut found: HashMap<&str, Vec<&QueryRow>> = HashMap::new();
            for row in rows.iter().filter(|row| row.kind == Kind::Call) {
                if let Some(key) = key(row) {
                    found.entry(key).or_default().push(row);
                }
            }
            found
        };
        Calls {
            by_request: by(|row| row.request_id.as_deref()),
            by_trace: by(|row| row.trace_id.as_deref()),
            by_conversation: by(|row| row.conversation_id.as_deref()),
        }
    }

    /// Returns the call that feedback means. Ids of two tenants never meet.
    fn of_feedback(&self, feedback: &QueryRow) -> Option<&'a QueryRow> {
        let named = [
            (&self.by_request, feedback.request_id.as_deref()),
            (&self.by_trace, feedback.trace_id.as_deref()),
            (&self.by_conversation, feedback.conversation_id.as_deref()),
        ];
        let same_tenant = |call: &QueryRow| match (&call.tenant, &feedback.tenant) {
            (Some(ours), Some(theirs)) => ours == theirs,
            _ => true,
        };
        // Clocks differ: where no call is older than its feedback, any may be meant.
        let order = |call: &QueryRow| (call.event_time_us <= feedback.event_time_us, call.event_time_us);
        named.into_iter().find_map(|(calls, id)| {
            let calls = calls.get(id?)?.iter().copied().filter(|call| same_tenant(call));
            calls.max_by_key(|call| order(call))
        })
    }
}
