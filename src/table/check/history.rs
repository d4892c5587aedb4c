//! The log as files: every entry there, every one a commit, and no position going backwards.

use std::collections::HashMap;

use deltalake::logstore::LogStoreRef;

use super::{Fault, Findings};
use crate::table::log_files::LogFiles;
use crate::table::{TableError, log};

/// Checks every commit that is still in the log.
pub(super) async fn check(store: &LogStoreRef, findings: &mut Findings) -> Result<(), TableError> {
    let files = LogFiles::list(store).await?;
    let Some(first) = files.commits.first().copied() else { return Ok(()) };
    if first > 0 && !files.checkpoints.iter().any(|at| *at + 1 >= first) {
        findings.add(Fault::LogGap, format!("the log begins at entry {first}, and no checkpoint stands before it"));
    }
    for pair in files.commits.windows(2).filter(|pair| pair[1] != pair[0] + 1) {
        findings.add(Fault::LogGap, format!("entries {} to {} are missing", pair[0] + 1, pair[1] - 1));
    }
    let mut positions: HashMap<String, (i64, u64)> = HashMap::new();
    for version in files.commits {
        let fail = |e| TableError::store("cannot read the log of", store.root_url(), e);
        let Some(bytes) = store.read_commit_entry(version).await.map_err(fail)? else { continue };
        let lines = match log::parse(findings.table, version, &bytes) {
            Ok(lines) => lines,
            Err(error) => {
                findings.add(Fault::LogEntry, error.to_string());
                continue;
            }
        };
        for txn in lines.into_iter().filter_map(|line| line.txn) {
            if let Some((before, at)) = positions.get(&txn.app_id).filter(|(before, _)| *before > txn.version) {
                let (id, to) = (&txn.app_id, txn.version);
                findings.add(
                    Fault::PositionBackwards,
                    format!("{id} went from {before} in version {at} to {to} in version {version}"),
                );
            }
            positions.insert(txn.app_id, (txn.version, version));
        }
    }
    Ok(())
}
