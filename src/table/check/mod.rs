//! Whether a table is what its readers rely on: a look that changes nothing and trusts nothing.
//!
//! What is remembered elsewhere is computed anew: bounds, null counts and row counts from the files, positions from every
//! commit that is still in the log, coordinates by a group-by that spills to disk. Each finding says how to repair it.

mod files;
mod history;
mod rows;

use deltalake::logstore::LogStoreRef;
use serde::Serialize;

use super::schema::TableSpec;
use super::{Name, Table, TableError, Tables};

/// What is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// A log entry between others is missing, or the log begins without a checkpoint.
    LogGap,
    /// A log entry is not a commit.
    LogEntry,
    /// A position went backwards from one commit to the next.
    PositionBackwards,
    /// The table asks for something that taod does not do, or its columns are not those of taod.
    Foreign,
    /// The newest version cannot be put together from the log.
    Unreadable,
    FileMissing,
    FileSize,
    FileUnreadable,
    /// Row count, bounds or null counts in the log are not those of the file.
    Statistics,
    /// The log holds bounds of a column that it must not: text of the query log.
    TextInLog,
    /// A row at or past the position that should stand behind it.
    RowPastPosition,
    /// Two rows have the same coordinates.
    DuplicateRows,
}

impl Fault {
    /// Returns what to do about it.
    pub fn repair(self) -> &'static str {
        match self {
            Fault::LogGap => {
                "bring the missing log entries back from a backup of _delta_log; without one, copy the rows that can be \
                 read into a new table and raise ingest.kafka.generation"
            }
            Fault::LogEntry => "bring the entry back from a backup of _delta_log; nothing can be read past it",
            Fault::PositionBackwards => {
                "something else writes taod's positions: stop it, then look for duplicate rows and set the position by \
                 `taod table offsets set`"
            }
            Fault::Foreign => {
                "undo the foreign change; columns that only this taod knows are added by `taod table maintain`"
            }
            Fault::Unreadable => "see the other findings of this table; bring the log back from a backup",
            Fault::FileMissing => {
                "bring the file back from a backup, or take it out of the table with python deltalake's \
                 `DeltaTable(...).repair()` and read its records again by `taod table offsets new-generation`"
            }
            Fault::FileSize | Fault::FileUnreadable => {
                "bring the file back from a backup; its bytes are not those that were committed"
            }
            Fault::Statistics => {
                "readers skip this file wrongly: rewrite it, for instance with `OPTIMIZE` in Spark, or report the writer"
            }
            Fault::TextInLog => {
                "set delta.dataSkippingStatsColumns as taod does, rewrite the file, and let `taod table maintain` \
                 remove the log entries past retention"
            }
            Fault::RowPastPosition => {
                "the position was moved back or the row was written by something else: stop the ingestion, and set the \
                 position past the row by `taod table offsets set`"
            }
            Fault::DuplicateRows => {
                "remove all but one, for instance with a `DELETE` in Spark; a raised ingest.kafka.generation stores rows \
                 anew on purpose"
            }
        }
    }
}

/// One thing that is wrong with a table.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Finding {
    pub table: &'static str,
    pub fault: Fault,
    pub detail: String,
    pub repair: &'static str,
}

/// Returns the app ids whose positions stand behind the rows of a topic and a partition.
pub type Positions<'a> = dyn Fn(&str, i32) -> Vec<String> + Sync + 'a;

/// Collects findings of one table.
struct Findings {
    table: &'static str,
    list: Vec<Finding>,
}

impl Findings {
    fn add(&mut self, fault: Fault, detail: impl Into<String>) {
        self.list.push(Finding { table: self.table, fault, detail: detail.into(), repair: fault.repair() });
    }
}

/// Checks the tables `names` that exist. An error means that the check itself could not be made.
pub async fn all(tables: &Tables, names: &[Name], positions: &Positions<'_>) -> Result<Vec<Finding>, TableError> {
    let mut findings = Vec::new();
    for name in names {
        if let Some(log) = tables.log_of(*name).await? {
            findings.extend(one(&log, name.spec(), positions).await?);
        }
    }
    Ok(findings)
}

/// Checks one table.
pub(super) async fn one(
    log: &LogStoreRef,
    spec: &'static TableSpec,
    positions: &Positions<'_>,
) -> Result<Vec<Finding>, TableError> {
    let mut findings = Findings { table: spec.name, list: Vec::new() };
    history::check(log, &mut findings).await?;
    let mut table = match Table::attach(log.clone(), spec).await {
        Ok(table) => table,
        Err(error) => {
            findings.add(if error.is_foreign() { Fault::Foreign } else { Fault::Unreadable }, error.to_string());
            return Ok(findings.list);
        }
    };
    let whole = files::check(&mut table, &mut findings).await?;
    let has_coordinates = ["topic", "partition", "offset", "record_index"].iter().all(|c| spec.column(c).is_some());
    // Rows are read from the files: where one is broken, that is what is to be said.
    if whole && has_coordinates {
        rows::check(&mut table, positions, &mut findings).await?;
    }
    Ok(findings.list)
}

#[cfg(test)]
mod tests;
