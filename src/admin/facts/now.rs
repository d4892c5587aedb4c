//! What goes on now: the flow with live numbers, the running round, what stands in the way.

use std::collections::BTreeMap;
use std::time::Instant;

use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::Serialize;

use super::adapters::Current;
use super::rounds::Round;
use super::trials::Trial;
use super::{COUNT_FRESH, FactError, Facts};
use crate::metrics::{Label, Reason};
use crate::round::live::{self, Live};
use crate::table::Name;

/// What the daemon does now.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub(in super::super) struct Status {
    /// The version of taod.
    pub(in super::super) taod: String,
    /// True when nothing stands in the way of the work.
    pub(in super::super) ready: bool,
    /// What stands in the way, by part.
    pub(in super::super) obstacles: BTreeMap<String, String>,
    /// True while this process owns rounds and promotion.
    pub(in super::super) owner: bool,
    pub(in super::super) ingest: Ingest,
    pub(in super::super) current: Current,
    /// The round that runs, or was interrupted and will be resumed.
    pub(in super::super) running_round: Option<Round>,
    /// How far the running step of that round is; null where no step reports.
    pub(in super::super) step: Option<Live>,
    /// The newest round that is over.
    pub(in super::super) last_round: Option<Round>,
    /// When the next round is due.
    pub(in super::super) next_round: Option<DateTime<Utc>>,
    pub(in super::super) open_trial: Option<Trial>,
}

/// What the ingestion did.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub(in super::super) struct Ingest {
    /// Rows in the table `queries`, counted a moment ago; null where there is no table yet.
    pub(in super::super) stored_rows: Option<u64>,
    /// Rows stored since this process started.
    pub(in super::super) rows: u64,
    /// Records that could not be read since this process started, by reason; those without any are left out.
    pub(in super::super) dead_letters: BTreeMap<String, u64>,
    /// Records in the log that are not stored yet.
    pub(in super::super) lag_offsets: i64,
    /// Age of the oldest of them, roughly, in seconds.
    pub(in super::super) lag_seconds: f64,
    /// Age of the newest stored record, in seconds.
    pub(in super::super) data_age_seconds: f64,
    /// Partitions that this process reads.
    pub(in super::super) partitions: i64,
}

impl Facts {
    /// Returns what goes on now.
    pub(in super::super) async fn status(&self) -> Result<Status, FactError> {
        let obstacles: BTreeMap<String, String> =
            self.health.obstacles().into_iter().map(|(part, why)| (part.to_string(), why)).collect();
        let rounds = self.rounds(2)?;
        let running_round = rounds.iter().find(|round| round.outcome == "running").cloned();
        let next = self.metrics.rounds.next_start.get();
        Ok(Status {
            taod: env!("CARGO_PKG_VERSION").to_string(),
            ready: obstacles.is_empty(),
            obstacles,
            owner: self.metrics.daemon.lease.get() == 1,
            ingest: self.ingest().await?,
            current: self.current()?,
            step: running_round.is_some().then(|| live::read(&self.paths)).flatten(),
            running_round,
            last_round: rounds.into_iter().find(|round| round.outcome != "running"),
            next_round: (next > 0.0).then(|| DateTime::from_timestamp(next as i64, 0)).flatten(),
            open_trial: self.open_trial().await?,
        })
    }

    async fn ingest(&self) -> Result<Ingest, FactError> {
        let ingest = &self.metrics.ingest;
        let dead = |reason: Reason| (reason.as_str().to_string(), ingest.dead_letters.get(reason).get());
        Ok(Ingest {
            stored_rows: self.stored_rows().await?,
            rows: ingest.rows.get(),
            dead_letters: Reason::ALL.iter().copied().map(dead).filter(|(_, count)| *count > 0).collect(),
            lag_offsets: ingest.lag_offsets.get(),
            lag_seconds: ingest.lag_seconds.get(),
            data_age_seconds: ingest.data_age_seconds.get(),
            partitions: ingest.partitions.get(),
        })
    }

    async fn stored_rows(&self) -> Result<Option<u64>, FactError> {
        let mut known = self.rows.lock().await;
        if let Some((_, rows)) = known.filter(|(at, _)| at.elapsed() < COUNT_FRESH) {
            return Ok(Some(rows));
        }
        let _reading = self.reading().await?;
        let Some(table) = self.tables.open_existing(Name::Queries).await.map_err(FactError::failed)? else {
            return Ok(None);
        };
        let rows = table.count().await.map_err(FactError::failed)?;
        *known = Some((Instant::now(), rows));
        Ok(Some(rows))
    }
}
