//! The Delta tables: appends that land exactly once, and reads of one version.
//!
//! Appends, compaction and erasure run on a commit path of our own, whose cost does not grow with the number of files (one
//! conditional write of a log entry); scans and joins are deltalake's DataFusion. Kafka offsets and other
//! positions live in the log as `txn` actions beside the rows they stand for, so a position and its rows land together.
//!
//! Reading order: [`schema`] (what the tables hold), [`commit`] (how rows get in, once), [`mod@write`] (their bytes),
//! [`read`] (how they come out), [`Tables`] (all of them under one root).

pub mod check;
mod clock;
mod cloud;
mod columns;
mod commit;
mod disk;
mod evolve;
pub mod lease;
mod location;
mod log;
mod log_files;
pub mod maintain;
mod positions;
mod read;
mod retain;
mod rewrite;
mod rows;
pub mod schema;
mod selection;
mod staged;
mod stored;
mod suppressions;
mod tables;
mod write;

#[cfg(test)]
mod rewrite_tests;
#[cfg(test)]
mod tests;

pub use columns::{Columns, batch_of};
pub use commit::{Appended, Table, TxnStep};
pub use location::TableLocation;
pub use maintain::Upkeep;
pub use read::Scan;
pub use retain::{Retained, Retention, retain};
pub use rewrite::{Found, Hunt, Taken};
pub use schema::TableSpec;
pub use selection::Selection;
pub use suppressions::{ERASURES, Key, Suppressions};
pub use tables::{Look, Name, Tables};
pub use write::{DataFile, EncodedFile, batch_of_any};

/// Why a table could not be opened, read or written. Every message names the table.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    #[error(
        "table location {location} {why}; a location is a folder, or a URL that begins with file://, s3://, az://, abfss:// or gs://"
    )]
    Location { location: String, why: String },
    #[error("{action} table {table}: {}{}", one_line(source.as_ref()), remedy(source.as_ref()))]
    Store { action: &'static str, table: String, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("log entry {version} of table {table} is not a Delta commit: {source}")]
    Log { table: String, version: u64, source: serde_json::Error },
    #[error("table {table} now asks for {feature}, which taod does not write: drop the feature or use another table")]
    Feature { table: String, feature: String },
    #[error("table {table} does not fit taod's schema: {why}; give taod a place of its own (state.tables)")]
    Schema { table: String, why: String },
    #[error("rows do not fit table {table}: {why}")]
    Rows { table: String, why: String },
    #[error(
        "another writer moved {app_id} in table {table} to {found:?} while {expected:?} was expected: nothing was written"
    )]
    Fenced { table: String, app_id: String, expected: Option<i64>, found: Option<i64> },
    #[error("another writer changed the same files of table {table} first: nothing was changed")]
    Conflict { table: String },
    #[error(
        "the store of table {table} overwrites a log entry that exists, so that commits would be lost: use one that honours \
             conditional creates (If-None-Match)"
    )]
    Overwrites { table: String },
    #[error("table {table}: {why}")]
    Refused { table: String, why: String },
    #[error("the condition {condition:?} cannot be used on table {table}: {why}")]
    Condition { table: &'static str, condition: String, why: String },
    #[error("the files for table {table} were uploaded {hours} h ago: they may be swept, so they are not committed")]
    Overdue { table: String, hours: i64 },
    #[error(transparent)]
    Layout(#[from] crate::layout::LayoutError),
    #[error("commit {version} of table {table} got no answer ({why}): it may or may not have landed")]
    Unsettled { table: String, version: u64, why: String },
}

/// Returns an error as one line: stores answer with whole documents.
fn one_line(error: &(dyn std::error::Error + 'static)) -> String {
    error.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Returns what to do about an error of a store, where it is told; begins with a separator.
fn remedy(error: &(dyn std::error::Error + 'static)) -> &'static str {
    use deltalake::logstore::object_store::Error;

    let mut next = Some(error);
    while let Some(error) = next {
        let refused = matches!(
            error.downcast_ref::<Error>(),
            Some(Error::PermissionDenied { .. } | Error::Unauthenticated { .. })
        );
        if let Some(error) = error.downcast_ref::<std::io::Error>() {
            return crate::durable::remedy(error);
        }
        // A refused listing has no kind of its own, only the server's answer as text.
        if refused || error.source().is_none() && error.to_string().contains("status code: 403") {
            return ": the store refuses; check the rights on the place, and for a bucket the credentials in the \
                    environment and state.store_options";
        }
        next = error.source();
    }
    ""
}

impl TableError {
    /// Wraps what a store or delta-rs said about the table at `url`.
    pub(crate) fn store(
        action: &'static str,
        table: impl std::fmt::Display,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        TableError::Store { action, table: table.to_string(), source: source.into() }
    }

    /// Returns true where reading the positions again and starting from them is the cure.
    pub fn is_restart(&self) -> bool {
        matches!(self, TableError::Fenced { .. } | TableError::Unsettled { .. } | TableError::Overdue { .. })
    }

    /// Returns true where no retry helps: the table is not one that taod may write.
    pub fn is_foreign(&self) -> bool {
        matches!(
            self,
            TableError::Feature { .. }
                | TableError::Schema { .. }
                | TableError::Location { .. }
                | TableError::Overwrites { .. }
                | TableError::Layout(_)
        )
    }
}
