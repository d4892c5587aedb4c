//! Reading one version: SQL over the whole table, and small tables as plain structs.

use arrow::array::RecordBatch;
use deltalake::DeltaTable;
use deltalake::datafusion::execution::SendableRecordBatchStream;
use deltalake::datafusion::prelude::SessionContext;
use deltalake::delta_datafusion::{create_session, create_session_state_with_spill_config};
use deltalake::kernel::Snapshot;
use futures::TryStreamExt;
use serde::de::DeserializeOwned;

use super::{Table, TableError, log, rows};

/// Memory of a query's sorts and groups, past which they spill to disk.
const SPILL_BYTES: usize = 256 << 20;

/// A data file of one version, as the log describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ListedFile {
    pub(super) path: String,
    pub(super) size: u64,
    /// The statistics as text of JSON.
    pub(super) stats: Option<String>,
    /// True where some of its rows are deleted by a vector beside it.
    pub(super) vector: bool,
}

/// The batches of a query, as they are read.
pub struct Scan {
    stream: SendableRecordBatchStream,
    table: String,
}

impl Scan {
    /// Returns the next batch, or nothing after the last.
    pub async fn next(&mut self) -> Result<Option<RecordBatch>, TableError> {
        self.stream.try_next().await.map_err(|e| TableError::store("cannot query", &self.table, e))
    }
}

impl Table {
    /// Runs SQL over this version of the table, which the query calls `t`.
    pub async fn query(&self, sql: &str) -> Result<Vec<RecordBatch>, TableError> {
        let fail = |e| TableError::store("cannot query", self.name(), e);
        let provider = DeltaTable::new(self.log.clone()).table_provider().with_table_version(self.version);
        let context = create_session().into_inner();
        context.register_table("t", provider.await.map_err(fail)?).map_err(fail)?;
        context.sql(sql).await.map_err(fail)?.collect().await.map_err(fail)
    }

    /// Runs SQL over this version, which the query calls `t`, and returns its rows. Large sorts and groups go to disk.
    pub async fn select<T: DeserializeOwned>(&self, sql: &str) -> Result<Vec<T>, TableError> {
        let fail = |e| TableError::store("cannot query", self.name(), e);
        let provider = DeltaTable::new(self.log.clone()).table_provider().with_table_version(self.version);
        let context = SessionContext::new_with_state(create_session_state_with_spill_config(Some(SPILL_BYTES), None));
        context.register_table("t", provider.await.map_err(fail)?).map_err(fail)?;
        let batches = context.sql(sql).await.map_err(fail)?.collect().await.map_err(fail)?;
        rows::from_batches(self.name(), self.spec, &batches)
    }

    /// Runs SQL over this version, which the query calls `t`, and returns its batches one after the other, however many
    /// they are. Large sorts and groups go to disk.
    pub async fn scan(&self, sql: &str) -> Result<Scan, TableError> {
        let fail = |e| TableError::store("cannot query", self.name(), e);
        let provider = DeltaTable::new(self.log.clone()).table_provider().with_table_version(self.version);
        let context = SessionContext::new_with_state(create_session_state_with_spill_config(Some(SPILL_BYTES), None));
        context.register_table("t", provider.await.map_err(fail)?).map_err(fail)?;
        let stream = context.sql(sql).await.map_err(fail)?.execute_stream().await.map_err(fail)?;
        Ok(Scan { stream, table: self.name().to_owned() })
    }

    /// Returns the rows of this version, or those for which `sql_where` holds, in no particular order.
    pub async fn rows<T: DeserializeOwned>(&self, sql_where: Option<&str>) -> Result<Vec<T>, TableError> {
        let filter = sql_where.map(|condition| format!(" where {condition}")).unwrap_or_default();
        let batches = self.query(&format!("select * from t{filter}")).await?;
        rows::from_batches(self.name(), self.spec, &batches)
    }

    /// Returns the number of rows of this version.
    pub async fn count(&self) -> Result<u64, TableError> {
        #[derive(serde::Deserialize)]
        struct Count {
            n: u64,
        }
        let batches = self.query("select count(*) as n from t").await?;
        let counts: Vec<Count> = rows::from_batches(self.name(), self.spec, &batches)?;
        Ok(counts.first().map_or(0, |count| count.n))
    }

    /// Returns the data files of this version, newest first.
    pub(super) async fn files(&self) -> Result<Vec<ListedFile>, TableError> {
        let fail = |e| TableError::store("cannot list the files of", self.name(), e);
        let snapshot = Snapshot::try_new(self.log.as_ref(), Some(self.version)).await.map_err(fail)?;
        let file = |view: deltalake::kernel::LogicalFileView| ListedFile {
            path: view.object_store_path().to_string(),
            size: u64::try_from(view.size()).unwrap_or_default(),
            stats: view.stats(),
            vector: view.deletion_vector_descriptor().is_some(),
        };
        snapshot.file_views(self.log.as_ref(), None).map_ok(file).try_collect().await.map_err(fail)
    }

    /// Returns true where this version asks for a table feature.
    pub(super) async fn has_feature(&self, feature: &str) -> Result<bool, TableError> {
        let fail = |e| TableError::store("cannot open", self.name(), e);
        let snapshot = Snapshot::try_new(self.log.as_ref(), Some(self.version)).await.map_err(fail)?;
        let retell = |source| TableError::Log { table: self.name().to_owned(), version: self.version, source };
        let protocol = serde_json::to_value(snapshot.protocol()).map_err(retell)?;
        Ok(serde_json::from_value::<log::Protocol>(protocol).map_err(retell)?.has(feature))
    }

    /// Refuses a table from which no row may go (`delta.appendOnly`).
    pub async fn refuse_append_only(&self) -> Result<(), TableError> {
        let fail = |e| TableError::store("cannot open", self.name(), e);
        let snapshot = Snapshot::try_new(self.log.as_ref(), Some(self.version)).await.map_err(fail)?;
        let retell = |source| TableError::Log { table: self.name().to_owned(), version: self.version, source };
        let metadata = serde_json::to_value(snapshot.metadata()).map_err(retell)?;
        match serde_json::from_value::<log::Metadata>(metadata).map_err(retell)?.is_append_only() {
            false => Ok(()),
            true => {
                let why = "the property delta.appendOnly is true, so no row may leave it; unset the property";
                Err(TableError::Refused { table: self.name().to_owned(), why: why.to_owned() })
            }
        }
    }

    /// Returns the columns of this version that are not taod's.
    pub(super) async fn unknown_columns(&self) -> Result<Vec<String>, TableError> {
        let fail = |e| TableError::store("cannot open", self.name(), e);
        let snapshot = Snapshot::try_new(self.log.as_ref(), Some(self.version)).await.map_err(fail)?;
        let names = snapshot.schema().fields().map(|field| field.name().to_owned()).collect::<Vec<String>>();
        Ok(names.into_iter().filter(|name| self.spec.column(name).is_none()).collect())
    }
}
