//! Small files become large ones; no row changes.
//!
//! The rewrite is deltalake's, with our own writer's settings, so that a column without bounds in the log gets none by
//! being rewritten. It commits `Remove` and `Add` with `dataChange: false`, which neither appends nor readers of changes
//! take for news; against an erasure that removed one of the same files it loses, and starts over the next time.

use std::num::NonZeroU64;
use std::sync::Arc;

use deltalake::DeltaTable;
use deltalake::datafusion::execution::session_state::SessionStateBuilder;
use deltalake::delta_datafusion::create_session_state_with_spill_config;
use deltalake::errors::DeltaTableError;
use deltalake::kernel::transaction::TransactionError;
use deltalake::operations::optimize::OptimizeType;

use super::{Change, Settings};
use crate::table::{Table, TableError, write};

/// Rows a batch holds in the rewrite: rows of the log may be large, and a batch is what it keeps in memory.
const BATCH_ROWS: usize = 256;

/// Joins files below the target size, where there are enough of them.
pub(super) async fn run(table: &Table, settings: &Settings) -> Result<Option<Change>, TableError> {
    let target = settings.target_bytes();
    let small = table.files().await?.iter().filter(|file| file.size < target).count();
    if small < settings.compact_from_files {
        return Ok(None);
    }
    if table.has_feature("deletionVectors").await? {
        let why = "deletion vectors are on; compact with the engine that switched them on".to_owned();
        return Err(TableError::Refused { table: table.name().to_owned(), why });
    }
    let fail = |e| TableError::store("cannot compact", table.name(), e);
    let session = create_session_state_with_spill_config(Some((settings.memory_mib as usize) << 19), None);
    let config = session.config().clone().with_target_partitions(1).with_batch_size(BATCH_ROWS);
    let session = SessionStateBuilder::new_from_existing(session).with_config(config).build();
    let mut source = DeltaTable::new(table.log.clone());
    source.load_version(table.version()).await.map_err(fail)?;
    let rewrite = source
        .optimize()
        .with_type(OptimizeType::Compact)
        .with_target_size(NonZeroU64::new(target).unwrap_or(NonZeroU64::MIN))
        .with_writer_properties(write::properties(table.spec).map_err(|e| fail(e.into()))?)
        .with_session_state(Arc::new(session))
        .with_max_concurrent_tasks(1);
    match rewrite.await {
        Ok((_, metrics)) if metrics.num_files_removed == 0 => Ok(None),
        Ok((_, metrics)) => {
            let bytes = u64::try_from(metrics.files_added.total_size).unwrap_or_default();
            Ok(Some(Change { files: metrics.num_files_removed, bytes }))
        }
        Err(DeltaTableError::Transaction { source: TransactionError::CommitConflict(_) }) => {
            Err(TableError::Conflict { table: table.name().to_owned() })
        }
        Err(error) => Err(fail(error)),
    }
}
