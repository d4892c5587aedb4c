//! The time by which files of a table are old.
//!
//! Files carry the stamps of their store. Against these a clock of ours that runs days ahead would take everything for
//! old: log entries that another writer still needs, to know which version is free, and uploads that are about to be
//! committed. So the store is asked for its time, by a tiny file, and the smaller of the two counts.

use chrono::{DateTime, Utc};
use deltalake::Path;
use deltalake::logstore::object_store::ObjectStoreExt;
use uuid::Uuid;

use super::{Table, TableError};

impl Table {
    /// Returns the time, as our clock or the store has it: the earlier one.
    pub(super) async fn store_now(&self) -> Result<DateTime<Utc>, TableError> {
        let fail = |e| TableError::store("cannot read the clock of the store of", self.name(), e);
        let store = self.log.object_store(None);
        // Readers pass over names with an underscore.
        let path = Path::from(format!("_taod_clock_{}", Uuid::new_v4()));
        store.put(&path, "".into()).await.map_err(fail)?;
        let stamp = store.head(&path).await.map(|meta| meta.last_modified);
        store.delete(&path).await.map_err(fail)?;
        Ok(stamp.map_err(fail)?.min(Utc::now()))
    }
}
