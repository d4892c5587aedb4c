//! The scores of the live watch as OpenTelemetry's events `gen_ai.evaluation.result`: one for each call of clients that was
//! scored, once. Ids and scores only.

use std::path::Path;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::promotion::now_us;
use crate::config::Config;
use crate::durable;
use crate::telemetry::{self, Attribute, Event};

/// A call as it was scored.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Evaluation {
    /// When the call was made.
    pub(super) time_us: i64,
    pub(super) response_id: Option<String>,
    /// 32 hex digits, where the log had one.
    pub(super) trace_id: Option<String>,
    pub(super) score: f64,
    /// Whether every hard rule held.
    pub(super) passed: bool,
}

/// Up to which call they were sent.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Sent {
    evaluated_us: i64,
}

/// Sends the evaluations that are newer than those sent before.
pub(super) async fn send(config: &Config, evaluations: &[Evaluation]) -> Result<()> {
    let settings = &config.telemetry;
    if !(settings.is_on() && settings.evaluations) {
        return Ok(());
    }
    let file = config.state.dir.join("evaluations.json");
    let sent = read(&file)?;
    let new: Vec<&Evaluation> = evaluations.iter().filter(|e| e.time_us > sent.evaluated_us).collect();
    let Some(newest) = new.iter().map(|e| e.time_us).max() else { return Ok(()) };
    let events: Vec<Event> = new.into_iter().map(event).collect();
    telemetry::send_events(settings, &events, now_us()).await?;
    Ok(durable::write_json(&file, &Sent { evaluated_us: newest })?)
}

fn read(file: &Path) -> Result<Sent> {
    match durable::read_json(file) {
        Err(error) if error.is_not_found() => Ok(Sent::default()),
        result => Ok(result?),
    }
}

/// Names follow OpenTelemetry's conventions for generative AI.
fn event(evaluation: &Evaluation) -> Event {
    let label = if evaluation.passed { "pass" } else { "fail" };
    let mut attributes = vec![
        ("gen_ai.evaluation.name", Attribute::Text("taod.reward".into())),
        ("gen_ai.evaluation.score.value", Attribute::Number(evaluation.score)),
        ("gen_ai.evaluation.score.label", Attribute::Text(label.into())),
    ];
    if let Some(id) = &evaluation.response_id {
        attributes.push(("gen_ai.response.id", Attribute::Text(id.clone())));
    }
    let trace_id = evaluation.trace_id.as_ref().and_then(|id| hex::decode(id).ok()?.try_into().ok());
    Event { time_us: evaluation.time_us, name: "gen_ai.evaluation.result", trace_id, attributes }
}

#[cfg(test)]
#[path = "evaluations_tests.rs"]
mod tests;
