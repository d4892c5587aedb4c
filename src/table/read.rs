//! Reading one version: SQL over the whole table, and small tables as plain structs.

use arrow::array::RecordBatch;
use deltalake::DeltaTable;
use deltalake::delta_datafusion::create_session;
use serde::de::DeserializeOwned;

use super::{Table, TableError, rows};

impl Table {
    /// Runs SQL over this version of the table, which the query calls `t`.
    pub async fn query(&self, sql: &str) -> Result<Vec<RecordBatch>, TableError> {
        let fail = |e| TableError::store("cannot query", self.name(), e);
        let provider = DeltaTable::new(self.log.clone()).table_provider().with_table_version(self.version);
        let context = create_session().into_inner();
        context.register_table("t", provider.await.map_err(fail)?).map_err(fail)?;
        context.sql(sql).await.map_err(fail)?.collect().await.map_err(fail)
    }

    /// Returns what a query over this version yields, as plain structs.
    pub async fn select<T: DeserializeOwned>(&self, sql: &str) -> Result<Vec<T>, TableError> {
        rows::from_batches(self.name(), self.spec, &self.query(sql).await?)
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
}
