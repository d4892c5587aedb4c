//! Uploads that never became a commit: a crash between the two leaves a file that nothing names.
//!
//! A file is swept when its name is one that taod gives, when it is older than any upload that may still be committed
//! (the commit path refuses files half as old, see [`crate::table::commit`]), and when no version that can still be read
//! names it. The files are listed before the log is read, so a commit that lands meanwhile is seen.

use std::collections::HashSet;
use std::sync::LazyLock;

use chrono::{DateTime, Duration, Utc};
use deltalake::Path;
use deltalake::kernel::Snapshot;
use deltalake::logstore::object_store::{ObjectMeta, ObjectStoreExt};
use futures::TryStreamExt;
use regex::Regex;

use super::Change;
use crate::table::log_files::LogFiles;
use crate::table::{Table, TableError, log, staged};

/// Age from which on an upload without a commit is an orphan.
const AGE_HOURS: i64 = 24;

/// The names of our uploads and of our compaction's.
static OURS: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r"^part-\d{5}-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}-c\d{3}\.zstd\.parquet$").ok());

/// Removes orphans; `now` is by the store's clock.
pub(super) async fn sweep(table: &Table, now: DateTime<Utc>) -> Result<Option<Change>, TableError> {
    let fail = |e| TableError::store("cannot sweep", table.name(), e);
    let before = now - Duration::hours(AGE_HOURS);
    let staged = staged::remove(table, before).await?;
    let mut change = Change { files: staged.files, bytes: staged.bytes };
    let old: Vec<ObjectMeta> = old_uploads(table, before).await.map_err(fail)?;
    if old.is_empty() {
        return Ok((change.files > 0).then_some(change));
    }
    let named = named(table).await?;
    for file in old.iter().filter(|file| !named.contains(file.location.as_ref())) {
        table.log.object_store(None).delete(&file.location).await.map_err(fail)?;
        tracing::info!(table = table.name(), file = %file.location, "an upload without a commit was removed");
        change.files += 1;
        change.bytes += file.size;
    }
    Ok((change.files > 0).then_some(change))
}

async fn old_uploads(
    table: &Table,
    before: DateTime<Utc>,
) -> deltalake::logstore::object_store::Result<Vec<ObjectMeta>> {
    let store = table.log.object_store(None);
    let listed = store.list_with_delimiter(None).await?;
    let is_ours = |path: &Path| OURS.as_ref().is_some_and(|ours| ours.is_match(path.as_ref()));
    Ok(listed.objects.into_iter().filter(|o| o.last_modified < before && is_ours(&o.location)).collect())
}

/// Returns every file that a version names which can still be read.
async fn named(table: &Table) -> Result<HashSet<String>, TableError> {
    let fail = |e| TableError::store("cannot read the log of", table.name(), e);
    let mut named: HashSet<String> = HashSet::new();
    let entries = LogFiles::list(&table.log).await?;
    // What stood before the oldest entry is in the oldest checkpoint; the newest version again, should there be neither.
    for version in [entries.checkpoints.first().copied(), Some(table.version())].into_iter().flatten() {
        let snapshot = Snapshot::try_new(table.log.as_ref(), Some(version)).await.map_err(fail)?;
        let files: Vec<String> = snapshot
            .file_views(table.log.as_ref(), None)
            .map_ok(|file| file.object_store_path().to_string())
            .try_collect()
            .await
            .map_err(fail)?;
        named.extend(files);
    }
    for version in entries.commits {
        if let Some(bytes) = table.log.read_commit_entry(version).await.map_err(fail)? {
            let lines = log::parse(table.name(), version, &bytes)?;
            named.extend(lines.into_iter().filter_map(|line| line.add).map(|add| add.path));
        }
    }
    Ok(named)
}
