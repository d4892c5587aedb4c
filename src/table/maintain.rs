//! Upkeep off the hot path: a checkpoint so that opening stays quick, and the end of log entries past retention.

use deltalake::DeltaTable;
use deltalake::checkpoints::{cleanup_metadata, create_checkpoint};
use deltalake::logstore::LogStoreRef;

use super::{Table, TableError};
use crate::crash::{self, Point};

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
        self.upkeep_now().run().await
    }

    fn upkeep_now(&self) -> Upkeep {
        Upkeep { log: self.log.clone(), name: self.name().to_owned(), version: self.version }
    }
}

impl Upkeep {
    /// Does it. A failure harms nothing: the next one starts over.
    pub async fn run(self) -> Result<(), TableError> {
        let fail = |e| TableError::store("cannot checkpoint", &self.name, e);
        let mut table = DeltaTable::new(self.log.clone());
        table.load_version(self.version).await.map_err(fail)?;
        crash::during(Point::DuringCheckpoint, create_checkpoint(&table, None)).await.map_err(fail)?;
        let removed = cleanup_metadata(&table, None).await.map_err(fail)?;
        tracing::debug!(table = self.name, version = self.version, removed, "checkpoint written");
        Ok(())
    }
}
