//! Checkpoints, so that opening stays quick, and the end of log entries past retention.
//!
//! A checkpoint is written through the kernel, which streams the log: no list of the files is made. Ingestion writes one
//! beside its appends every [`CHECKPOINT_EVERY`] commits, because `taod ingest` alone must stay quick to open as well;
//! removing old entries lists the whole log and is left to maintenance.

use chrono::{DateTime, Utc};
use delta_kernel::Snapshot;
use deltalake::DeltaTable;
use deltalake::checkpoints::cleanup_expired_logs_for;
use deltalake::logstore::LogStoreRef;
use deltalake::table::config::TablePropertiesExt as _;

use crate::crash::{self, Point};
use crate::table::{Table, TableError};

/// Commits after which a checkpoint is worth its cost.
const CHECKPOINT_EVERY: u64 = 100;

/// The upkeep of one table, detached from it so that it can run beside appends.
pub struct Upkeep {
    log: LogStoreRef,
    name: String,
    version: u64,
}

impl Table {
    /// Returns the upkeep that became due since this was last asked, if any. Whoever made the commit with the round
    /// number: it may be another writer's, or one that only moved positions.
    pub fn upkeep(&mut self) -> Option<Upkeep> {
        let due = self.version / CHECKPOINT_EVERY > self.upkept / CHECKPOINT_EVERY;
        self.upkept = self.version;
        due.then(|| self.upkeep_now())
    }

    /// Writes a checkpoint at this version and removes log entries past the table's retention.
    pub async fn maintain(&self) -> Result<(), TableError> {
        self.upkeep_now().run().await?;
        self.clean(self.store_now().await?).await.map(|_| ())
    }

    /// Removes log entries past the table's retention that no checkpoint within it needs; returns how many. `now` is by
    /// the store's clock, as the stamps of the entries are.
    pub(super) async fn clean(&self, now: DateTime<Utc>) -> Result<usize, TableError> {
        let fail = |e| TableError::store("cannot clean the log of", self.name(), e);
        let mut table = DeltaTable::new(self.log.clone());
        table.load_version(self.version).await.map_err(fail)?;
        let kept = table.snapshot().map_err(fail)?.table_config().log_retention_duration();
        let before = now.timestamp_millis() - i64::try_from(kept.as_millis()).unwrap_or(i64::MAX);
        cleanup_expired_logs_for(self.version, self.log.as_ref(), before, None).await.map_err(fail)
    }

    pub(super) fn upkeep_now(&self) -> Upkeep {
        Upkeep { log: self.log.clone(), name: self.name().to_owned(), version: self.version }
    }
}

impl Upkeep {
    /// Does it. A failure harms nothing: the next one starts over.
    pub async fn run(self) -> Result<(), TableError> {
        let Upkeep { log, name, version } = self;
        let (root, engine) = (log.root_url().clone(), log.engine(None));
        let written = tokio::task::spawn_blocking(move || {
            let snapshot = Snapshot::builder_for(root).at_version(version).build(engine.as_ref())?;
            snapshot.checkpoint(engine.as_ref(), None).map(|_| ())
        });
        let written = crash::during(Point::DuringCheckpoint, written).await;
        let written = written.map_err(|e| TableError::store("cannot checkpoint", &name, e))?;
        written.map_err(|e| TableError::store("cannot checkpoint", &name, e))?;
        tracing::debug!(table = name, version, "checkpoint written");
        Ok(())
    }
}
