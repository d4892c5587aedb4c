//! What ever happened in the registry, one JSON line each.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{BASE, disk};
use crate::durable::FileError;

/// One line of `history.jsonl`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    pub time_us: i64,
    #[serde(flatten)]
    pub what: Happened,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Happened {
    Registered { version: String, sha256: String },
    Promoted { promotion: String, from: String, to: String, trial: String },
    Overridden { promotion: String, from: String, to: String, operator: String, reason: String },
    RolledBack { promotion: String, from: String, to: String, reason: String },
    Imported { promotion: String, to: String, operator: String, reason: String },
    Rebased { promotion: String, from: String, base: String, sha256: String, operator: String, reason: String },
    Aborted { promotion: String, to: String, reason: String },
    Quarantined { version: String, reason: String },
    Frozen { reason: String, by: String },
    Thawed { reason: String, by: String },
    CanaryBegan { version: String, percent: u8, operator: String, reason: String },
    CanaryEnded { version: String, reason: String },
}

impl Happened {
    /// Returns true where the event led clients to this version or away from it.
    pub(super) fn concerns(&self, version: &str) -> bool {
        match self {
            Happened::Promoted { from, to, .. }
            | Happened::Overridden { from, to, .. }
            | Happened::RolledBack { from, to, .. } => version == from || version == to,
            Happened::Aborted { to, .. } | Happened::Imported { to, .. } => version == to,
            Happened::Rebased { from, .. } => version == from,
            Happened::CanaryBegan { version: told, .. } | Happened::CanaryEnded { version: told, .. } => {
                told == version
            }
            Happened::Registered { .. }
            | Happened::Quarantined { .. }
            | Happened::Frozen { .. }
            | Happened::Thawed { .. } => false,
        }
    }

    /// Returns the promotion that the event ended, if it did.
    pub(super) fn promotion(&self) -> Option<&str> {
        match self {
            Happened::Promoted { promotion, .. }
            | Happened::Overridden { promotion, .. }
            | Happened::RolledBack { promotion, .. }
            | Happened::Imported { promotion, .. }
            | Happened::Rebased { promotion, .. }
            | Happened::Aborted { promotion, .. } => Some(promotion),
            Happened::Registered { .. }
            | Happened::Quarantined { .. }
            | Happened::Frozen { .. }
            | Happened::Thawed { .. }
            | Happened::CanaryBegan { .. }
            | Happened::CanaryEnded { .. } => None,
        }
    }
}

/// Appends one event, durable once this returns.
pub(super) fn append(path: &Path, event: &Event) -> Result<(), FileError> {
    let line =
        serde_json::to_string(event).map_err(|source| FileError::Json { path: path.display().to_string(), source })?;
    disk::append_line(path, &line)
}

/// Appends an event unless the same one is there already: what a repetition after a kill calls.
pub(super) fn record(path: &Path, event: &Event) -> Result<(), FileError> {
    match read(path)?.iter().any(|there| there.what == event.what) {
        true => Ok(()),
        false => append(path, event),
    }
}

/// Reads all events. A last line without its end was torn by a kill and never happened.
pub(super) fn read(path: &Path) -> Result<Vec<Event>, FileError> {
    let text = match fs::read_to_string(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        result => result.map_err(|e| FileError::io("cannot read", path, e))?,
    };
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let parse = |line: &str| {
        serde_json::from_str(line).map_err(|source| FileError::Json { path: path.display().to_string(), source })
    };
    whole.lines().map(parse).collect()
}

/// Returns the versions that lie under the one being served, the latest last: what a rollback may return to.
pub(super) fn served_before(events: &[Event]) -> Vec<String> {
    let mut stack = vec![BASE.to_string()];
    for event in events {
        match &event.what {
            Happened::Promoted { to, .. } | Happened::Overridden { to, .. } | Happened::Imported { to, .. } => {
                stack.push(to.clone());
            }
            // What came before was of another model.
            Happened::Rebased { .. } => stack = vec![BASE.to_string()],
            Happened::RolledBack { to, .. } => match stack.iter().rposition(|version| version == to) {
                Some(place) => stack.truncate(place + 1),
                None => stack.push(to.clone()),
            },
            Happened::Registered { .. }
            | Happened::Aborted { .. }
            | Happened::Quarantined { .. }
            | Happened::Frozen { .. }
            | Happened::Thawed { .. }
            | Happened::CanaryBegan { .. }
            | Happened::CanaryEnded { .. } => {}
        }
    }
    stack.pop();
    stack
}
