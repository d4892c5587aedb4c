//! Rounds: when, how long each stage took, what came out.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::Serialize;

use super::{FactError, Facts, time};
use crate::round::answers::{self, BINS};
use crate::round::{StageReport, view};

/// One round.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub(in super::super) struct Round {
    pub(in super::super) round: String,
    pub(in super::super) begun: DateTime<Utc>,
    /// `running`, or how it came out: `promote`, `refused`, `open`, `skipped`, `failed`, `erased`.
    pub(in super::super) outcome: String,
    /// Why it came out so; empty while it runs.
    pub(in super::super) reason: String,
    /// The trial that it was about, where it came to one.
    pub(in super::super) trial: Option<String>,
    /// The adapter that it registered.
    pub(in super::super) version: Option<String>,
    /// Time that its finished stages took together.
    pub(in super::super) seconds: f64,
    pub(in super::super) stages: Vec<Stage>,
    /// What was frozen to train on and to judge by; null before.
    pub(in super::super) dataset: Option<Dataset>,
    /// A deliberate fault, of a demo.
    pub(in super::super) control: Option<String>,
}

/// A finished stage of a round.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub(in super::super) struct Stage {
    /// `dataset`, or a stage and its pass, such as `candidates 1`.
    pub(in super::super) stage: String,
    pub(in super::super) rows: u64,
    pub(in super::super) tokens: u64,
    pub(in super::super) seconds: f64,
}

/// What a round froze.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub(in super::super) struct Dataset {
    /// SHA-256 of its manifest.
    pub(in super::super) hash: String,
    pub(in super::super) train_prompts: u64,
    pub(in super::super) gate_prompts: u64,
    pub(in super::super) audit_prompts: u64,
    /// Rows of the log that were read.
    pub(in super::super) rows: u64,
    /// Rows left out, by reason.
    pub(in super::super) excluded: BTreeMap<String, u64>,
    /// Version of each table that was read.
    pub(in super::super) tables: BTreeMap<String, u64>,
    pub(in super::super) offsets: Vec<Offsets>,
}

/// A range of the log, both ends included.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub(in super::super) struct Offsets {
    /// `topic/partition`.
    pub(in super::super) partition: String,
    pub(in super::super) first: i64,
    pub(in super::super) last: i64,
}

/// How the rewards of a round's answers are distributed, by pass: the first pass samples from the base, the later ones from
/// what the pass before trained.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub(in super::super) struct Distribution {
    pub(in super::super) passes: Vec<Pass>,
}

/// One pass of a round.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub(in super::super) struct Pass {
    pub(in super::super) pass: i32,
    pub(in super::super) answers: u64,
    /// Answers whose reward lies in each twentieth of [0, 1], the lowest first.
    pub(in super::super) bins: Vec<u64>,
}

impl Facts {
    /// Returns the newest rounds, the newest first.
    pub(in super::super) fn rounds(&self, limit: usize) -> Result<Vec<Round>, FactError> {
        let seen = view::rounds(&self.paths, limit).map_err(FactError::failed)?;
        Ok(seen.into_iter().map(document).collect())
    }

    /// Returns one round.
    pub(in super::super) fn round(&self, id: &str) -> Result<Round, FactError> {
        let seen = view::round(&self.paths, id).map_err(FactError::failed)?;
        seen.map(document).ok_or_else(|| FactError::Missing(format!("there is no round {id:?}")))
    }

    /// Returns how the rewards of one round are distributed.
    pub(in super::super) async fn distribution(&self, id: &str) -> Result<Distribution, FactError> {
        self.round(id)?;
        let _reading = self.reading().await?;
        let found = answers::distribution(&self.tables, id).await.map_err(FactError::failed)?;
        let mut passes: BTreeMap<i32, Vec<u64>> = BTreeMap::new();
        for bin in found {
            let bins = passes.entry(bin.iteration).or_insert_with(|| vec![0; BINS]);
            if let Some(count) = usize::try_from(bin.bin).ok().and_then(|index| bins.get_mut(index)) {
                *count += bin.answers;
            }
        }
        let pass = |(pass, bins): (i32, Vec<u64>)| Pass { pass, answers: bins.iter().sum(), bins };
        Ok(Distribution { passes: passes.into_iter().map(pass).collect() })
    }
}

fn document(seen: view::Seen) -> Round {
    let outcome = match (&seen.verdict, seen.erased) {
        (Some(verdict), _) => verdict.outcome.name(),
        (None, true) => "erased",
        (None, false) => "running",
    };
    let stage = |StageReport { stage, rows, tokens, seconds, .. }| Stage { stage, rows, tokens, seconds };
    Round {
        begun: time(seen.plan.created_us),
        outcome: outcome.to_string(),
        reason: seen.verdict.as_ref().map_or(String::new(), |verdict| verdict.outcome.reason().to_string()),
        trial: seen.verdict.as_ref().and_then(|verdict| verdict.outcome.trial()).map(|(trial, _)| trial.to_string()),
        version: seen.version,
        seconds: seen.stages.iter().map(|stage| stage.seconds).sum(),
        stages: seen.stages.into_iter().map(stage).collect(),
        dataset: seen.dataset.map(dataset),
        control: seen.plan.control.map(|control| format!("{control:?}")),
        round: seen.plan.round,
    }
}

fn dataset(manifest: crate::dataset::Manifest) -> Dataset {
    let offsets = |(partition, range): (String, crate::dataset::OffsetRange)| Offsets {
        partition,
        first: range.first,
        last: range.last,
    };
    Dataset {
        hash: manifest.hash,
        train_prompts: manifest.train.prompts,
        gate_prompts: manifest.gate.prompts,
        audit_prompts: manifest.audit.prompts,
        rows: manifest.rows,
        excluded: manifest.excluded,
        tables: manifest.inputs.tables,
        offsets: manifest.inputs.offsets.into_iter().map(offsets).collect(),
    }
}
