//! `taod score`: rewards of answers given as JSON lines.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Item, RewardError, Rewards, Selection};
use crate::record::{FinishReason, Message};

/// One input line. Fields not named here are ignored, so that the output of other commands can be fed in.
#[derive(Debug, Clone, Deserialize)]
pub struct Line {
    pub workload: Option<String>,
    pub messages: Vec<Message>,
    pub response: String,
    /// An answer of unknown end counts as ended by itself.
    #[serde(default = "stop")]
    pub finish_reason: FinishReason,
}

fn stop() -> FinishReason {
    FinishReason::Stop
}

/// One output line, in the order of the input.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ScoredLine {
    pub index: usize,
    pub total: f64,
    pub parts: BTreeMap<String, f64>,
}

/// Scores the lines with every scorer of the selection, also where a failed hard rule has settled the total already.
/// An error names the index of the line.
pub fn score(rewards: &Rewards, selection: Selection, lines: Vec<Line>) -> Result<Vec<ScoredLine>, RewardError> {
    let items: Vec<Item> = lines.into_iter().map(Item::from).collect();
    let scored = rewards.score_fully(selection, &items)?;
    let line = |(index, scored): (usize, super::Scored)| ScoredLine { index, total: scored.total, parts: scored.parts };
    Ok(scored.into_iter().enumerate().map(line).collect())
}

impl From<Line> for Item {
    fn from(line: Line) -> Self {
        Item {
            workload: line.workload,
            messages: line.messages,
            response: line.response,
            finish_reason: line.finish_reason,
            prompt_ids: None,
            token_ids: None,
            ratings: Vec::new(),
        }
    }
}
