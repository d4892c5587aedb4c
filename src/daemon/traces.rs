//! Each ended round as a trace: the round and its stages, read from its record, whoever ran it. Nothing waits for this.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use sha2::{Digest, Sha256};
use tokio::sync::watch as channel;

use super::Daemon;
use crate::durable;
use crate::metrics::Part;
use crate::round::{Outcome, Paths, Plan, Verdict, book};
use crate::telemetry::{self, Attribute, Span};

/// How often it is looked whether a round ended.
const EVERY: Duration = Duration::from_secs(15);

/// Sends the trace of each round that ends from now on, until `stop` turns true.
pub(super) async fn keep(daemon: Arc<Daemon>, mut stop: channel::Receiver<bool>) {
    let paths = Paths::new(&daemon.config().state.dir);
    let mut sent = None;
    loop {
        tokio::select! {
            result = send_new(&daemon, &paths, &mut sent) => if let Err(error) = result {
                daemon.metrics.daemon.errors.get(Part::Telemetry).inc();
                tracing::warn!(error = format!("{error:#}"), "a round's trace was not sent, and is given up");
            },
            _ = stop.wait_for(|stop| *stop) => return,
        }
        tokio::select! {
            () = tokio::time::sleep(EVERY) => {}
            _ = stop.wait_for(|stop| *stop) => return,
        }
    }
}

/// Sends what ended after the round `sent`; at the start nothing.
async fn send_new(daemon: &Daemon, paths: &Paths, sent: &mut Option<Option<String>>) -> Result<()> {
    let settings = daemon.config().telemetry.clone();
    if !settings.is_on() {
        // Where it is switched on by a reload, it begins with what ends then.
        *sent = None;
        return Ok(());
    }
    let Some(last) = sent.clone() else {
        *sent = Some(book::newest_verdict(paths)?.map(|verdict| verdict.round));
        return Ok(());
    };
    for round in paths.round_ids()?.into_iter().filter(|id| Some(id) > last.as_ref()) {
        let Some(verdict) = book::verdict_of(paths, &round)? else { continue };
        *sent = Some(Some(round.clone()));
        let plan: Plan = durable::read_json(&paths.round(&round).join("plan.json"))?;
        telemetry::send_spans(&settings, &spans(&plan, &verdict)).await?;
    }
    Ok(())
}

/// Returns the spans of a round. Their ids follow from the round, so that they are the same however often they are made.
fn spans(plan: &Plan, verdict: &Verdict) -> Vec<Span> {
    let id = |what: &str| Sha256::digest(format!("taod/{}/{}/{what}", plan.round, plan.seed));
    let trace_id = first(id("trace").as_slice());
    let root: [u8; 8] = first(id("round").as_slice());
    let stages = verdict.stages.iter().filter(|stage| stage.ended_us > 0).map(|stage| Span {
        trace_id,
        span_id: first(id(&format!("stage/{}", stage.stage)).as_slice()),
        parent: Some(root),
        name: format!("taod.stage {}", stage.stage),
        start_us: stage.ended_us - (stage.seconds * 1e6) as i64,
        end_us: stage.ended_us,
        attributes: vec![("taod.stage.rows", whole(stage.rows)), ("taod.stage.tokens", whole(stage.tokens))],
        error: None,
    });
    let mut spans: Vec<Span> = stages.collect();
    let mut attributes = vec![
        ("taod.round", Attribute::Text(plan.round.clone())),
        ("taod.round.outcome", Attribute::Text(verdict.outcome.name().into())),
        ("taod.round.reason", Attribute::Text(verdict.outcome.reason().into())),
    ];
    if let Some((trial, challenger)) = verdict.outcome.trial() {
        attributes.push(("taod.trial", Attribute::Text(trial.into())));
        attributes.push(("taod.challenger", Attribute::Text(challenger.into())));
    }
    spans.insert(
        0,
        Span {
            trace_id,
            span_id: root,
            parent: None,
            name: "taod.round".into(),
            start_us: plan.created_us,
            // Where the clock was set back since, a span that ends before it begins would be none.
            end_us: spans.iter().map(|span| span.end_us).fold(plan.created_us, i64::max),
            attributes,
            error: matches!(verdict.outcome, Outcome::Failed { .. }).then(|| verdict.outcome.reason().into()),
        },
    );
    spans
}

fn whole(number: u64) -> Attribute {
    Attribute::Whole(i64::try_from(number).unwrap_or(i64::MAX))
}

/// Returns the first bytes of a hash; an id that is all zero would be none, and a hash's first bytes are not.
fn first<const N: usize>(hash: &[u8]) -> [u8; N] {
    std::array::from_fn(|at| hash.get(at).copied().unwrap_or_default())
}

#[cfg(test)]
#[path = "traces_tests.rs"]
mod tests;
