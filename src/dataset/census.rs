//! The census: one pass over the light columns of all rows, in any order, that reads no text.
//!
//! Each row is counted under one reason, or it is a row of a prompt. What is kept of a prompt does not depend on the order
//! of the rows: of several the first in the log speaks for it.

use std::collections::BTreeMap;

use crate::record::Kind;

use super::burst::Bursts;
use super::catalogue::{Catalogue, Rows, bytes_of};
use super::feedback::{Call, Joined};
use super::sketch::mix;
use super::text::hash;
use super::workload::Workloads;
use super::{Counts, OffsetRange, Settings};

/// What is read of every row of `queries`.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Row<'a> {
    pub(super) topic: &'a str,
    pub(super) partition: i32,
    pub(super) offset: i64,
    pub(super) record_index: i32,
    pub(super) kind: Kind,
    /// Day of ingestion, counted from the epoch.
    pub(super) ingest_day: i32,
    pub(super) event_time_us: i64,
    pub(super) request_id: Option<&'a str>,
    pub(super) trace_id: Option<&'a str>,
    pub(super) conversation_id: Option<&'a str>,
    pub(super) workload: Option<&'a str>,
    pub(super) tenant: Option<&'a str>,
    pub(super) model: Option<&'a str>,
    pub(super) served_version: Option<&'a str>,
    pub(super) format: &'a str,
    pub(super) user_hash: Option<&'a str>,
    /// Read only where a workload is told by them.
    pub(super) headers: Option<&'a str>,
    pub(super) extra: Option<&'a str>,
    /// False where the operator's own filter leaves it out.
    pub(super) is_wanted: bool,
    pub(super) prompt_hash: &'a str,
    pub(super) train_ok: bool,
    pub(super) reason: Option<&'a str>,
    pub(super) redacted: bool,
    pub(super) truncated: bool,
}

/// Where a row stands in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Place {
    /// Number of the topic's name.
    pub(super) topic: u32,
    pub(super) partition: i32,
    pub(super) offset: i64,
    pub(super) record_index: i32,
}

impl Place {
    /// Returns what places are ordered by.
    pub(super) fn order<'a>(&self, catalogue: &'a Catalogue) -> (&'a str, i32, i64, i32) {
        (catalogue.words.name(self.topic).unwrap_or_default(), self.partition, self.offset, self.record_index)
    }
}

/// What a row is judged by.
pub(super) struct About<'a> {
    /// The day of the newest row.
    pub(super) newest_day: i32,
    pub(super) settings: &'a Settings,
    pub(super) workloads: &'a Workloads,
    pub(super) bursts: &'a Bursts,
}

/// What the rows came to, beside what stands in the catalogue.
#[derive(Debug, Default)]
pub(super) struct Census {
    /// Rows left out, by reason.
    pub(super) excluded: Counts,
    pub(super) rows: u64,
    /// The rows that were read, as ranges of Kafka offsets by `topic/partition`.
    pub(super) offsets: BTreeMap<String, OffsetRange>,
}

impl Census {
    /// Counts a row.
    pub(super) fn add(&mut self, row: &Row<'_>, about: &About<'_>, catalogue: &mut Catalogue, joined: &mut Joined) {
        self.rows += 1;
        self.cover(row);
        if row.kind == Kind::Feedback {
            return;
        }
        let mut reason = reason_of(row, about);
        let hash = bytes_of(row.prompt_hash);
        if hash.is_none() {
            reason = reason.or(Some("bad_hash"));
        }
        if let Some(reason) = reason {
            self.excluded.add(reason, 1);
        }
        let Some(hash) = hash else { return };
        let is_usable = reason.is_none();
        let entry = match is_usable {
            true => Some(catalogue.entry(hash)),
            // What was placed once keeps others out of other splits; what never was is not placed for such a row.
            false => catalogue.find(&super::catalogue::id_of(&hash)),
        };
        if joined.asks_for(row) {
            joined.add(Call::of(row, entry.filter(|_| is_usable)));
        }
        if let Some(entry) = entry {
            keep(row, is_usable, entry, about, catalogue);
        }
    }

    fn cover(&mut self, row: &Row<'_>) {
        let range = OffsetRange { first: row.offset, last: row.offset };
        // Rows come by the thousand from one partition: most names are there already.
        let name = format!("{}/{}", row.topic, row.partition);
        let seen = self.offsets.entry(name).or_insert(range);
        *seen = OffsetRange { first: seen.first.min(row.offset), last: seen.last.max(row.offset) };
    }
}

/// Keeps a row for its prompt, if it comes before what is kept.
fn keep(row: &Row<'_>, is_usable: bool, entry: u32, about: &About<'_>, catalogue: &mut Catalogue) {
    let words = &mut catalogue.words;
    let (topic, tenant) = (words.number(row.topic), words.optional(row.tenant));
    let place = Place { topic, partition: row.partition, offset: row.offset, record_index: row.record_index };
    let conversation = row.conversation_id.map_or(0, |id| mix(row.tenant.map_or(0, hash), hash(id)) | 1);
    let new = Rows {
        place,
        event_time_us: row.event_time_us,
        usable: u32::from(is_usable),
        workloads: about.workloads.by_row(row),
        user: row.user_hash.map_or(0, |user| hash(user) | 1),
        tenant,
        conversation,
    };
    let comes_first = catalogue.entries[entry as usize].rows.as_ref().is_none_or(|old| {
        let (was_usable, order) = (old.usable > 0, old.place.order(catalogue));
        (!is_usable, new.place.order(catalogue)) < (!was_usable, order)
    });
    match &mut catalogue.entries[entry as usize].rows {
        Some(old) if comes_first => *old = Rows { usable: old.usable + new.usable, ..new },
        Some(old) => old.usable += new.usable,
        none => *none = Some(new),
    }
}

/// Returns why a call may not be used, whatever its text.
fn reason_of<'a>(row: &Row<'a>, about: &About<'_>) -> Option<&'a str> {
    let (lookback, age) = (about.settings.lookback_days, i64::from(about.newest_day) - i64::from(row.ingest_day));
    if !row.train_ok {
        Some(row.reason.unwrap_or("not_train_ok"))
    } else if row.redacted {
        Some("redacted")
    } else if row.truncated {
        Some("truncated")
    } else if lookback > 0 && age >= i64::from(lookback) {
        Some("old")
    } else if !row.is_wanted {
        Some("filter")
    } else if about.bursts.holds(row) {
        Some("burst")
    } else {
        None
    }
}
