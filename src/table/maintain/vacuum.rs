//! Files that were replaced are removed once no reader is on a version that names them.
//!
//! Lite: only files with a tombstone in the log, which a checkpoint drops after the table's own retention (48 h). So the
//! age used here is smaller, and maintenance runs several times within the difference.

use chrono::{DateTime, Utc};
use deltalake::DeltaTable;
use deltalake::operations::vacuum::VacuumMode;

use super::Change;
use crate::table::{Table, TableError};

/// Removes files whose tombstones are older than `hours`.
pub(super) async fn run(table: &Table, hours: u64) -> Result<Option<Change>, TableError> {
    let fail = |e| TableError::store("cannot vacuum", table.name(), e);
    let age = chrono::Duration::hours(i64::try_from(hours).unwrap_or(i64::MAX));
    let vacuum = |table: DeltaTable| {
        table.vacuum().with_mode(VacuumMode::Lite).with_retention_period(age).with_enforce_retention_duration(false)
    };
    let mut source = DeltaTable::new(table.log.clone());
    source.load_version(table.version()).await.map_err(fail)?;
    // A dry run first: a vacuum of nothing still writes two log entries.
    let (source, plan) = vacuum(source).with_dry_run(true).await.map_err(fail)?;
    if plan.files_deleted.is_empty() {
        return Ok(None);
    }
    refuse_clock_ahead(table, Utc::now()).await?;
    let (_, removed) = vacuum(source).await.map_err(fail)?;
    Ok(Some(Change { files: removed.files_deleted.len() as u64, bytes: 0 }))
}

/// Refuses to vacuum by a clock that runs ahead: the ages of tombstones and the removal of log entries that follows are
/// deltalake's, and it knows no time but ours.
pub(super) async fn refuse_clock_ahead(table: &Table, ours: DateTime<Utc>) -> Result<(), TableError> {
    let ahead = ours - table.store_now().await?;
    match ahead > chrono::Duration::hours(1) {
        true => {
            let why = format!("the clock is {} h ahead of the store's; set it right", ahead.num_hours());
            Err(TableError::Refused { table: table.name().to_owned(), why })
        }
        false => Ok(()),
    }
}
