//! The positions (`txn` actions) of a table, all of them in one pass over its log.
//!
//! delta-rs and its kernel look one up at a time, each by a replay of its own: a member that takes on ten partitions would
//! read every log entry since the last checkpoint some thirty times, which on an object store takes longer than a
//! group waits.

use std::collections::HashMap;
use std::sync::LazyLock;

use delta_kernel::actions::LOG_TXN_SCHEMA;
use delta_kernel::engine_data::{GetData, RowVisitor, TypedGetData};
use delta_kernel::expressions::ColumnName;
use delta_kernel::schema::DataType;
use delta_kernel::{DeltaResult, Snapshot};
use deltalake::logstore::LogStoreRef;

use super::TableError;

/// Reads all positions at a version, from the newest checkpoint on and without a list of the files.
pub(super) async fn read(log: &LogStoreRef, version: u64, table: &str) -> Result<HashMap<String, i64>, TableError> {
    let (root, engine) = (log.root_url().clone(), log.engine(None));
    let found = tokio::task::spawn_blocking(move || -> DeltaResult<_> {
        let snapshot = Snapshot::builder_for(root).at_version(version).build(engine.as_ref())?;
        let mut positions = Positions::default();
        for batch in snapshot.log_segment().read_actions(engine.as_ref(), LOG_TXN_SCHEMA.clone())? {
            positions.visit_rows_of(batch?.actions.as_ref())?;
        }
        Ok(positions.0)
    });
    let fail = "cannot read the positions of";
    let found = found.await.map_err(|e| TableError::store(fail, table, e))?;
    found.map_err(|e| TableError::store(fail, table, e))
}

/// Gathers positions from batches of actions, newest first.
#[derive(Default)]
struct Positions(HashMap<String, i64>);

impl RowVisitor for Positions {
    fn selected_column_names_and_types(&self) -> (&'static [ColumnName], &'static [DataType]) {
        static NAMES: LazyLock<[ColumnName; 2]> =
            LazyLock::new(|| ["appId", "version"].map(|part| ColumnName::new(["txn", part])));
        (NAMES.as_slice(), &[DataType::STRING, DataType::LONG])
    }

    fn visit<'a>(&mut self, rows: usize, getters: &[&'a dyn GetData<'a>]) -> DeltaResult<()> {
        for row in 0..rows {
            let id: Option<String> = getters[0].get_opt(row, "txn.appId")?;
            if let Some(id) = id {
                let version = getters[1].get(row, "txn.version")?;
                self.0.entry(id).or_insert(version);
            }
        }
        Ok(())
    }
}
