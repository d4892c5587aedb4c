//! What a process that was killed in the middle of an upload leaves on a local disk.
//!
//! A file is written under the name `part-….parquet#digits` before it gets its own (see [`super::disk`]); listings of the
//! store leave such names out, so these are looked for in the folder itself. In a bucket an upload that does not end is
//! never seen.

use std::fs;
use std::io::ErrorKind;
use std::sync::LazyLock;

use chrono::{DateTime, Utc};
use regex::Regex;

use super::{Table, TableError};

static STAGED: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"^part-[0-9a-zA-Z.-]+\.parquet#\d+$").ok());

/// What was removed.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Removed {
    pub(super) files: u64,
    pub(super) bytes: u64,
}

/// Removes the beginnings of uploads that were last written to before a time. An upload that is only slow fails by it, and
/// is made again.
pub(super) async fn remove(table: &Table, before: DateTime<Utc>) -> Result<Removed, TableError> {
    let Ok(folder) = table.log.root_url().to_file_path() else { return Ok(Removed::default()) };
    let work = move || -> std::io::Result<Removed> {
        let mut removed = Removed::default();
        let entries = match fs::read_dir(&folder) {
            // A store that only looks like a folder.
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(removed),
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name();
            if !STAGED.as_ref().is_some_and(|staged| staged.is_match(&name.to_string_lossy())) {
                continue;
            }
            let gone = entry.metadata().and_then(|metadata| {
                let old = DateTime::<Utc>::from(metadata.modified()?) < before;
                if old {
                    fs::remove_file(entry.path())?;
                }
                Ok(old.then_some(metadata.len()))
            });
            match gone {
                Ok(Some(bytes)) => (removed.files, removed.bytes) = (removed.files + 1, removed.bytes + bytes),
                Ok(None) => {}
                // It has its name by now.
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                Err(e) => return Err(e),
            }
        }
        Ok(removed)
    };
    let done =
        tokio::task::spawn_blocking(work).await.map_err(|e| TableError::store("cannot sweep", table.name(), e))?;
    done.map_err(|e| TableError::store("cannot sweep", table.name(), e))
}
