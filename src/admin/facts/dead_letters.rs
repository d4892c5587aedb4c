//! Records that no format could read, counted by reason. Their bytes stay in the table.

use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{FactError, Facts};
use crate::table::Name;

/// Dead letters of one reason in one topic.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub(in super::super) struct DeadLetters {
    pub(in super::super) topic: String,
    /// The reason's code, as in `docs/tables.md`.
    pub(in super::super) reason: String,
    pub(in super::super) records: u64,
    /// The first and the last offset at which one stands.
    pub(in super::super) first_offset: i64,
    pub(in super::super) last_offset: i64,
    /// When the newest of them was logged, by its time stamp in Kafka.
    pub(in super::super) newest: Option<DateTime<Utc>>,
}

impl Facts {
    /// Returns the dead letters by topic and reason, the most frequent first.
    pub(in super::super) async fn dead_letters(&self) -> Result<Vec<DeadLetters>, FactError> {
        let _reading = self.reading().await?;
        let Some(table) = self.tables.open_existing(Name::DeadLetters).await.map_err(FactError::failed)? else {
            return Ok(Vec::new());
        };
        let sql = "select topic, reason, count(*) as records, min(\"offset\") as first_offset, \
                   max(\"offset\") as last_offset, max(kafka_time) as newest from t group by topic, reason \
                   order by records desc, topic, reason limit 500";
        table.select(sql).await.map_err(FactError::failed)
    }
}
