//! Maintenance: what keeps a table that only grows quick to read, beside the writers and beside itself.
//!
//! Six tasks, in this order, because each leaves the next one less to do: rows past their retention go; small files are
//! compacted; what a compaction
//! replaced is vacuumed, before its tombstones leave the log with the next checkpoint; files of uploads that never became
//! a commit are swept; a checkpoint is written; log entries past retention go. A task that loses a race, or that the table
//! does not allow, says so and leaves the rest to the others. Nothing here is on the path of an append, and nothing is
//! lost when the process is killed anywhere: a rewritten file that was not committed is one more upload to sweep.
//!
//! Vacuum is Lite alone: a full vacuum deletes whatever no version names, and with it deletion vectors and uploads of
//! others that are not committed yet.

mod checkpoint;
mod compact;
mod orphans;
mod vacuum;

use std::time::Instant;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use self::checkpoint::Upkeep;
use super::log_files::LogFiles;
use super::retain::{Retained, Retention, retain};
use super::{Name, Table, TableError, Tables};

/// When and how tables are maintained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Minutes from one maintenance to the next. Below a day, so that replaced files are removed while the log still
    /// names them. Range 1 to 720.
    pub interval_minutes: u64,
    /// Size up to which small files are joined, in MiB. Range 1 to 1024.
    pub target_file_mib: u64,
    /// Number of files below the target size from which on they are joined. Range 2 to 10000.
    pub compact_from_files: usize,
    /// Age in hours from which on a replaced file is removed; readers of older versions end then. Range 1 to 36: the log
    /// forgets replaced files after 48 hours.
    pub vacuum_after_hours: u64,
    /// Memory that the process of maintenance may take, in MiB; past it that process ends, and nothing else. Range 256
    /// to 65536.
    pub memory_mib: u64,
    /// How long rows are kept.
    pub retention: Retention,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            interval_minutes: 60,
            target_file_mib: 128,
            compact_from_files: 16,
            vacuum_after_hours: 24,
            memory_mib: 1024,
            retention: Retention::default(),
        }
    }
}

impl Settings {
    /// Checks ranges.
    pub fn validate(&self) -> Result<(), String> {
        let ranges = [
            ("interval_minutes", self.interval_minutes, 1, 720),
            ("target_file_mib", self.target_file_mib, 1, 1024),
            ("compact_from_files", self.compact_from_files as u64, 2, 10_000),
            ("vacuum_after_hours", self.vacuum_after_hours, 1, 36),
            ("memory_mib", self.memory_mib, 256, 65_536),
        ];
        if self.target_file_mib * 2 > self.memory_mib {
            let (target, memory) = (self.target_file_mib, self.memory_mib);
            return Err(format!("target_file_mib is {target}: choose at most half of memory_mib, which is {memory}"));
        }
        match ranges.into_iter().find(|(_, value, low, high)| !(low..=high).contains(&value)) {
            Some((key, value, low, high)) => Err(format!("{key} is {value}: choose {low} to {high}")),
            None => self.retention.validate().map_err(|e| format!("retention.{e}")),
        }
    }

    fn target_bytes(&self) -> u64 {
        self.target_file_mib << 20
    }
}

/// What is done to a table, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Task {
    /// Removes rows past their retention.
    Retain,
    /// Joins small files.
    Compact,
    /// Removes files that were replaced long enough ago.
    Vacuum,
    /// Removes files of uploads that never became a commit.
    Sweep,
    /// Writes a checkpoint.
    Checkpoint,
    /// Removes log entries past retention.
    Clean,
}

impl Task {
    const ALL: [Task; 6] = [Task::Retain, Task::Compact, Task::Vacuum, Task::Sweep, Task::Checkpoint, Task::Clean];

    /// Returns the name that reports and metrics carry.
    pub fn as_str(self) -> &'static str {
        match self {
            Task::Retain => "retain",
            Task::Compact => "compact",
            Task::Vacuum => "vacuum",
            Task::Sweep => "sweep",
            Task::Checkpoint => "checkpoint",
            Task::Clean => "clean",
        }
    }
}

/// How a task ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "outcome", content = "why")]
pub enum Outcome {
    Done,
    /// There was nothing to do.
    Idle,
    /// The table does not allow it; says why.
    Refused(String),
    /// Another writer changed the same files first; the next maintenance does it.
    Conflict,
    Failed(String),
}

impl Outcome {
    /// Returns the name that reports and metrics carry.
    pub fn as_str(&self) -> &'static str {
        match self {
            Outcome::Done => "done",
            Outcome::Idle => "idle",
            Outcome::Refused(_) => "refused",
            Outcome::Conflict => "conflict",
            Outcome::Failed(_) => "failed",
        }
    }
}

/// What a task changed.
#[derive(Debug, Default, Clone, Copy)]
struct Change {
    /// Files (for [`Task::Clean`]: log entries) taken out, replaced or removed.
    files: u64,
    /// Bytes written anew by a compaction, or removed by a vacuum or a sweep.
    bytes: u64,
}

/// One task on one table.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Done {
    pub task: Task,
    #[serde(flatten)]
    pub outcome: Outcome,
    pub seconds: f64,
    pub files: u64,
    pub bytes: u64,
}

/// The maintenance of one table.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    pub table: String,
    /// Data files of the newest version afterwards.
    pub files: u64,
    /// Log entries since the newest checkpoint afterwards.
    pub log_entries: u64,
    pub tasks: Vec<Done>,
}

impl Report {
    /// Returns true where a task failed.
    pub fn failed(&self) -> bool {
        self.tasks.iter().any(|done| matches!(done.outcome, Outcome::Failed(_)))
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{}: {} files, {} log entries since the checkpoint", self.table, self.files, self.log_entries)?;
        for done in self.tasks.iter().filter(|done| done.outcome != Outcome::Idle) {
            write!(f, "  {}: {}", done.task.as_str(), done.outcome.as_str())?;
            match &done.outcome {
                Outcome::Refused(why) | Outcome::Failed(why) => writeln!(f, ", {why}")?,
                _ => writeln!(f, ", {} files, {} bytes, {:.1} s", done.files, done.bytes, done.seconds)?,
            }
        }
        Ok(())
    }
}

/// Maintains every table that exists and is ours to keep. An error in one is in its report and leaves the others their turn.
pub async fn all(tables: &Tables, settings: &Settings) -> Vec<Report> {
    let mut reports = Vec::new();
    for name in Name::ALL.into_iter().filter(|name| tables.keeps(*name)) {
        match tables.open_existing(name).await {
            Ok(Some(table)) => reports.push(one(table, settings).await),
            Ok(None) => {}
            Err(error) => {
                let outcome = Outcome::Failed(error.to_string());
                let done = Done { task: Task::Compact, outcome, seconds: 0.0, files: 0, bytes: 0 };
                reports.push(Report { table: name.spec().name.into(), files: 0, log_entries: 0, tasks: vec![done] });
            }
        }
    }
    reports
}

/// Maintains one table.
pub async fn one(mut table: Table, settings: &Settings) -> Report {
    let mut tasks = Vec::new();
    for task in Task::ALL {
        let begun = Instant::now();
        let result = match table.refresh().await {
            Ok(()) => perform(&mut table, task, settings).await,
            Err(error) => Err(error),
        };
        let (outcome, change) = match result {
            Ok(Some(change)) => (Outcome::Done, change),
            Ok(None) => (Outcome::Idle, Change::default()),
            Err(TableError::Conflict { .. }) => (Outcome::Conflict, Change::default()),
            Err(TableError::Refused { why, .. }) => (Outcome::Refused(why), Change::default()),
            Err(error) => (Outcome::Failed(error.to_string()), Change::default()),
        };
        let Change { files, bytes } = change;
        tasks.push(Done { task, outcome, seconds: begun.elapsed().as_secs_f64(), files, bytes });
    }
    let files = table.files().await.map_or(0, |files| files.len() as u64);
    let log_entries = LogFiles::list(&table.log).await.map_or(0, |log| log.since_checkpoint());
    Report { table: table.spec.name.into(), files, log_entries, tasks }
}

async fn perform(table: &mut Table, task: Task, settings: &Settings) -> Result<Option<Change>, TableError> {
    match task {
        Task::Retain if settings.retention == Retention::default() => Ok(None),
        Task::Retain => {
            // A clock that runs ahead must not take rows early.
            let now_us = table.store_now().await?.timestamp_micros();
            let retained = retain(table, &settings.retention, now_us).await?;
            Ok(retained.map(|Retained { files, .. }| Change { files, bytes: 0 }))
        }
        Task::Compact => compact::run(table, settings).await,
        Task::Vacuum => vacuum::run(table, settings.vacuum_after_hours).await,
        Task::Sweep => orphans::sweep(table, table.store_now().await?).await,
        Task::Checkpoint => {
            let since = LogFiles::list(&table.log).await?.since_checkpoint();
            if since < 2 {
                return Ok(None);
            }
            table.upkeep_now().run().await?;
            Ok(Some(Change::default()))
        }
        Task::Clean => match table.clean(table.store_now().await?).await? {
            0 => Ok(None),
            entries => Ok(Some(Change { files: entries as u64, bytes: 0 })),
        },
    }
}

#[cfg(test)]
mod tests;
