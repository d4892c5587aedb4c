//! What lies in a table's log folder: commits and checkpoints by version. A listing, so never on the path of an append.

use std::sync::LazyLock;

use deltalake::logstore::LogStoreRef;
use futures::TryStreamExt;
use regex::Regex;

use super::TableError;

static COMMIT: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"/(\d{20})\.json$").ok());
static CHECKPOINT: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r"/(\d{20})\.checkpoint(\..*)?\.(parquet|json)$").ok());

/// The versions that have a commit entry and those that have a checkpoint, each in order.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct LogFiles {
    pub(super) commits: Vec<u64>,
    pub(super) checkpoints: Vec<u64>,
}

impl LogFiles {
    /// Lists the log folder.
    pub(super) async fn list(log: &LogStoreRef) -> Result<Self, TableError> {
        let mut files = LogFiles::default();
        let mut entries = log.object_store(None).list(Some(log.log_path()));
        let fail = |e| TableError::store("cannot list the log of", log.root_url(), e);
        while let Some(entry) = entries.try_next().await.map_err(fail)? {
            let path = format!("/{}", entry.location);
            files.commits.extend(version(&COMMIT, &path));
            files.checkpoints.extend(version(&CHECKPOINT, &path));
        }
        files.commits.sort_unstable();
        files.checkpoints.sort_unstable();
        files.checkpoints.dedup();
        Ok(files)
    }

    /// Returns how many commits an opening has to read beyond the newest checkpoint.
    pub(super) fn since_checkpoint(&self) -> u64 {
        let checkpoint = self.checkpoints.last();
        self.commits.iter().filter(|version| checkpoint.is_none_or(|at| *version > at)).count() as u64
    }
}

fn version(pattern: &LazyLock<Option<Regex>>, path: &str) -> Option<u64> {
    pattern.as_ref()?.captures(path)?.get(1)?.as_str().parse().ok()
}
