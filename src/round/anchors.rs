//! The watch over the scorers: each night the anchors are scored anew, and what moved is told.
//!
//! An alarm stops nothing by itself (unless `registry.freeze_on` names it): the identity of a scorer is its operator's word, and so is a new one. Until there is one, trials go
//! on under scores that are no longer those of before.

use super::{Night, Paths, RoundError};
use crate::durable;
use crate::rewards::anchors::{self, Standing};

/// Name of the file in a round's folder.
const FILE: &str = "anchors.json";

/// Scores the anchors, compares, and stores what came out. A resumed round keeps what it found first.
pub(super) fn watch(night: &Night<'_>) -> Result<Vec<Standing>, RoundError> {
    let paths = Paths::new(&night.config.state.dir);
    if let Some(found) = read(&paths, &night.plan.round)? {
        return Ok(found);
    }
    let found = anchors::watch(night.rewards, &night.config.rewards.anchors, &paths.anchors())?;
    for Standing { score, stamp, shift, mean_change, .. } in found.iter().filter(|standing| standing.alarm) {
        tracing::warn!(round = %night.plan.round, score, stamp, shift, mean_change,
            "a scorer scores its anchors otherwise than before (docs/runbooks/TaodScorerMoved.md)");
    }
    durable::write_json(&night.folder.join(FILE), &found)?;
    Ok(found)
}

/// Reads how the scores stood in a round; nothing where they were not looked at.
pub fn read(paths: &Paths, round: &str) -> Result<Option<Vec<Standing>>, RoundError> {
    match durable::read_json(&paths.round(round).join(FILE)) {
        Err(error) if error.is_not_found() => Ok(None),
        read => Ok(Some(read?)),
    }
}
