//! A round as it can be seen from outside: what its files say, and nothing that it would take a model to find out.

use super::state::{ERASED, OUTCOME, read_plan, read_stages};
use super::{Paths, Plan, RoundError, StageReport, Verdict};
use crate::dataset;
use crate::durable;

/// What the files of one round say.
#[derive(Debug, Clone)]
pub struct Seen {
    pub plan: Plan,
    /// What the finished stages did, in their order.
    pub stages: Vec<StageReport>,
    /// How it came out; nothing while it is not over.
    pub verdict: Option<Verdict>,
    /// What was frozen, once it is.
    pub dataset: Option<dataset::Manifest>,
    /// The adapter that came out of it, once it is registered.
    pub version: Option<String>,
    /// True where an erasure took rows from it.
    pub erased: bool,
}

/// Returns the newest rounds, the newest first, at most `limit`.
pub fn rounds(paths: &Paths, limit: usize) -> Result<Vec<Seen>, RoundError> {
    paths.round_ids()?.iter().rev().take(limit).map(|id| look(paths, id)).collect()
}

/// Returns one round; nothing where there is none of this name.
pub fn round(paths: &Paths, id: &str) -> Result<Option<Seen>, RoundError> {
    match paths.round_ids()?.iter().any(|known| known == id) {
        true => look(paths, id).map(Some),
        false => Ok(None),
    }
}

fn look(paths: &Paths, id: &str) -> Result<Seen, RoundError> {
    let folder = paths.round(id);
    Ok(Seen {
        plan: read_plan(&folder)?,
        stages: read_stages(&folder)?,
        verdict: present(durable::read_json(&folder.join(OUTCOME)))?,
        dataset: dataset::peek(&folder.join("dataset"))?,
        version: present(durable::read_json(&folder.join("registered.json")))?,
        erased: folder.join(ERASED).exists(),
    })
}

fn present<T>(read: Result<T, durable::FileError>) -> Result<Option<T>, RoundError> {
    match read {
        Err(error) if error.is_not_found() => Ok(None),
        read => Ok(Some(read?)),
    }
}
