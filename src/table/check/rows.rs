//! The rows of the query log: each coordinate once, and below the position that stands for it.

use serde::Deserialize;

use super::{Fault, Findings, Positions};
use crate::table::{Table, TableError};

/// Findings of one kind that are listed; more say nothing new.
const LISTED: usize = 20;

#[derive(Deserialize)]
struct Twice {
    topic: String,
    partition: i32,
    offset: i64,
    record_index: i32,
    n: i64,
}

#[derive(Deserialize)]
struct Last {
    topic: String,
    partition: i32,
    offset: i64,
}

/// Checks the coordinates of all rows.
pub(super) async fn check(
    table: &mut Table,
    positions: &Positions<'_>,
    findings: &mut Findings,
) -> Result<(), TableError> {
    let twice: Vec<Twice> = table
        .select(&format!(
            "select topic, \"partition\", \"offset\", record_index, count(*) as n from t \
                 group by topic, \"partition\", \"offset\", record_index having count(*) > 1 \
                 order by topic, \"partition\", \"offset\", record_index limit {LISTED}"
        ))
        .await?;
    for Twice { topic, partition, offset, record_index, n } in twice {
        let detail = format!("{n} rows of topic {topic}, partition {partition}, offset {offset}, index {record_index}");
        findings.add(Fault::DuplicateRows, detail);
    }
    let sql = "select topic, \"partition\", max(\"offset\") as \"offset\" from t group by topic, \"partition\"";
    let last: Vec<Last> = table.select(sql).await?;
    for Last { topic, partition, offset } in last {
        let stored = table.txns(&positions(&topic, partition)).await?.into_iter().flatten().max();
        if let Some(stored) = stored.filter(|stored| offset >= *stored) {
            let detail =
                format!("topic {topic}, partition {partition} has a row at offset {offset}; stored is {stored}");
            findings.add(Fault::RowPastPosition, detail);
        }
    }
    Ok(())
}
