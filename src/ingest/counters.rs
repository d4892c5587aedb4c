//! What ingestion counts, for metrics and for the summary at its end.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::Serialize;

use super::IngestError;
use super::ledger::Sealed;
use crate::table::TableError;

/// Live numbers, written by ingestion and read by whoever exports them.
#[derive(Debug, Default)]
pub struct Counters {
    /// Kafka records whose fate is stored.
    pub records: AtomicU64,
    /// Rows stored in `queries`.
    pub rows: AtomicU64,
    /// Payload bytes of those records.
    pub bytes: AtomicU64,
    /// Bytes of the data files written.
    pub file_bytes: AtomicU64,
    /// Commits to `queries`.
    pub commits: AtomicU64,
    /// Sessions that ended in an error and were started again.
    pub restarts: AtomicU64,
    /// Records in Kafka that are not stored yet, over the partitions assigned here.
    pub lag: AtomicI64,
    /// Time stamp, in milliseconds since the epoch, of the newest stored record of the partition that is furthest behind
    /// in time; 0 where none is behind.
    pub behind_since_ms: AtomicI64,
    /// Time stamp of the newest record that is stored, likewise; 0 before the first.
    pub newest_ms: AtomicI64,
    /// Records read that are not stored yet.
    pub buffered: AtomicU64,
    /// Partitions assigned here.
    pub assigned: AtomicI64,
    /// Version of `queries` after the last commit.
    pub version: AtomicU64,
    /// When the last commit landed, in milliseconds since the epoch; 0 before the first.
    pub last_commit_ms: AtomicI64,
    /// True while the log can be read and stored.
    pub ready: AtomicBool,
    /// Dead letters by reason.
    pub dead_letters: Reasons,
    /// Records passed over by reason.
    pub skipped: Reasons,
    /// Commits that failed: `fenced` where another member had moved the position, else `failed`.
    pub failed_commits: Reasons,
    /// How long each commit took that nobody has taken from here yet.
    seals: Mutex<Vec<Duration>>,
}

/// Commit times that are kept for whoever exports them; where nobody does, the oldest stay.
const SEALS_KEPT: usize = 10_000;

/// A count per reason code. Reasons come from code, never from the log, so there are few.
#[derive(Debug, Default)]
pub struct Reasons(Mutex<BTreeMap<&'static str, u64>>);

impl Reasons {
    /// Adds counts.
    pub fn add(&self, counts: &BTreeMap<&'static str, u64>) {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (reason, count) in counts {
            *held.entry(reason).or_default() += count;
        }
    }

    /// Returns the counts so far.
    pub fn get(&self) -> BTreeMap<&'static str, u64> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What one run of ingestion stored.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Summary {
    pub records: u64,
    pub rows: u64,
    pub bytes: u64,
    pub commits: u64,
    pub restarts: u64,
    /// Version of `queries` at the end.
    pub version: u64,
    pub dead_letters: BTreeMap<&'static str, u64>,
    pub skipped: BTreeMap<&'static str, u64>,
}

impl Counters {
    /// Takes what commits took since this was last asked.
    pub fn take_seals(&self) -> Vec<Duration> {
        std::mem::take(&mut self.seals.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Takes in that this member has left the group: what it held is no longer its own to be behind with.
    pub(super) fn left(&self) {
        for number in [&self.assigned, &self.lag, &self.behind_since_ms] {
            number.store(0, Ordering::Relaxed);
        }
        self.buffered.store(0, Ordering::Relaxed);
    }

    /// Counts a commit that failed.
    pub(super) fn failed(&self, error: &IngestError) {
        let fenced = matches!(error, IngestError::Table(TableError::Fenced { .. }));
        self.failed_commits.add(&BTreeMap::from([(if fenced { "fenced" } else { "failed" }, 1)]));
    }

    /// Counts a commit and how long it took.
    pub(super) fn stored(&self, sealed: &Sealed, took: Duration) {
        let mut seals = self.seals.lock().unwrap_or_else(PoisonError::into_inner);
        if seals.len() < SEALS_KEPT {
            seals.push(took);
        }
        drop(seals);
        self.records.fetch_add(sealed.records, Ordering::Relaxed);
        self.rows.fetch_add(sealed.rows, Ordering::Relaxed);
        self.bytes.fetch_add(sealed.bytes, Ordering::Relaxed);
        self.file_bytes.fetch_add(sealed.file_bytes, Ordering::Relaxed);
        self.commits.fetch_add(1, Ordering::Relaxed);
        self.version.store(sealed.version, Ordering::Relaxed);
        self.last_commit_ms.store(chrono::Utc::now().timestamp_millis(), Ordering::Relaxed);
        self.dead_letters.add(&sealed.letters);
        self.skipped.add(&sealed.skipped);
    }

    /// Returns what was counted so far.
    pub fn summary(&self) -> Summary {
        Summary {
            records: self.records.load(Ordering::Relaxed),
            rows: self.rows.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            commits: self.commits.load(Ordering::Relaxed),
            restarts: self.restarts.load(Ordering::Relaxed),
            version: self.version.load(Ordering::Relaxed),
            dead_letters: self.dead_letters.get(),
            skipped: self.skipped.get(),
        }
    }
}
