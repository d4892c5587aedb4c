//! Small files become large ones; no row changes.
//!
//! Neighbours in time are joined, row group by row group, with the writer's settings and statistics of an append, so that
//! a column without bounds in the log gets none by being rewritten. The commit is ours as well: deltalake's takes a
//! `Remove` without data change for harmless, and two compactions at once then both land and double every row. Here a
//! file that another commit took out first (a compaction, an erasure) makes this one a conflict that changes nothing.

use futures::StreamExt;
use parquet::errors::ParquetError;

use super::{Change, Settings};
use crate::crash::{self, Point};
use crate::table::log::{Add, Remove, Rewrite};
use crate::table::read::ListedFile;
use crate::table::stored::{StoredFile, fitted};
use crate::table::write::{self, DataFile};
use crate::table::{Table, TableError};

/// Joins files below the target size, where enough of them are neighbours.
pub(super) async fn run(table: &mut Table, settings: &Settings) -> Result<Option<Change>, TableError> {
    let bins = due(table, settings).await?;
    if bins.is_empty() {
        return Ok(None);
    }
    refuse_foreign(table).await?;
    let mut change = Change::default();
    for bin in bins {
        change.files += bin.len() as u64;
        change.bytes += replace(table, bin).await?;
    }
    Ok(Some(change))
}

/// Returns what is to be joined at this version.
pub(super) async fn due(table: &Table, settings: &Settings) -> Result<Vec<Vec<ListedFile>>, TableError> {
    let mut files = table.files().await?;
    files.reverse();
    Ok(bins(files, settings.target_bytes(), settings.compact_from_files))
}

/// Joins one bin and commits; returns the bytes written. The commit of the bin before may have read past commits of others,
/// and only the files of that bin were looked for in them: so these are looked for in the version that this one builds on.
pub(super) async fn replace(table: &mut Table, bin: Vec<ListedFile>) -> Result<u64, TableError> {
    require(table, &bin).await?;
    table.refuse_odd_names(bin.iter().map(|file| file.path.as_str()))?;
    let add = match join(table, &bin).await {
        Ok(add) => add,
        Err(error) => {
            // A file that another writer replaced meanwhile may be gone from the store.
            table.refresh().await?;
            require(table, &bin).await?;
            return Err(error);
        }
    };
    let bytes = add.size;
    let removes: Vec<Remove> = bin.into_iter().map(|ListedFile { path, size, .. }| Remove { path, size }).collect();
    let adds = [add];
    crash::point(Point::DuringCompaction);
    let committed = table.commit_rewrite(Rewrite::Compaction, &removes, &adds).await;
    crash::point(Point::DuringCompaction);
    match committed {
        Ok(_) => Ok(bytes),
        Err(error) => {
            if matches!(error, TableError::Conflict { .. }) {
                write::remove_files(&table.log, &adds).await;
            }
            Err(error)
        }
    }
}

/// Ends as a conflict unless the version at hand names every file of a bin, without a new deletion vector.
async fn require(table: &Table, bin: &[ListedFile]) -> Result<(), TableError> {
    let files = table.data_files().await?;
    let stands = |file: &ListedFile| files.get(&file.path).is_some_and(|now| now.vector == file.vector);
    match bin.iter().all(stands) {
        true => Ok(()),
        false => Err(TableError::Conflict { table: table.name().to_owned() }),
    }
}

/// Returns runs of at least `least` neighbouring small files, each of about `target` bytes.
fn bins(files: Vec<ListedFile>, target: u64, least: usize) -> Vec<Vec<ListedFile>> {
    let mut bins: Vec<Vec<ListedFile>> = vec![Vec::new()];
    let mut size = 0;
    for file in files {
        if file.size >= target || size + file.size > target {
            bins.push(Vec::new());
            size = 0;
        }
        if file.size < target {
            size += file.size;
            if let Some(bin) = bins.last_mut() {
                bin.push(file);
            }
        }
    }
    bins.retain(|bin| bin.len() >= least);
    bins
}

/// Refuses a table whose files hold what a rewrite by this taod would lose.
async fn refuse_foreign(table: &Table) -> Result<(), TableError> {
    let refuse = |why: String| Err(TableError::Refused { table: table.name().to_owned(), why });
    if table.has_feature("deletionVectors").await? {
        return refuse("deletion vectors are on; compact with the engine that switched them on".to_owned());
    }
    match table.unknown_columns().await?.as_slice() {
        [] => Ok(()),
        names => {
            refuse(format!("it has columns that this taod does not know ({}); compact elsewhere", names.join(", ")))
        }
    }
}

/// Writes the rows of some files into one.
async fn join(table: &Table, files: &[ListedFile]) -> Result<Add, TableError> {
    let schema = table.spec.arrow_schema();
    let lose = |e: ParquetError| TableError::store("cannot compact", table.name(), e);
    let mut joined = DataFile::new(table.spec)?;
    for file in files {
        let reader = StoredFile::open(&table.log, &file.path, file.size).await.map_err(lose)?;
        let mut batches = reader.build().map_err(lose)?;
        while let Some(batch) = batches.next().await {
            let batch = fitted(&batch.map_err(lose)?, &schema);
            joined.write(&batch.map_err(|e| TableError::store("cannot compact", table.name(), e))?)?;
        }
    }
    let add = write::encoded(joined).await?.store(table.name(), &table.log).await?;
    Ok(Add { data_change: false, ..add })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_joined_up_to_the_target_and_large_files_stay() {
        let file = |size: u64| ListedFile { path: size.to_string(), size, stats: None, vector: false };
        let found = |sizes: &[u64], least| {
            let bins = bins(sizes.iter().map(|size| file(*size)).collect(), 10, least);
            bins.into_iter().map(|bin| bin.iter().map(|file| file.size).collect::<Vec<_>>()).collect::<Vec<_>>()
        };
        assert_eq!(found(&[1, 2, 3], 2), [vec![1, 2, 3]]);
        assert_eq!(found(&[6, 3, 6, 3], 2), [vec![6, 3], vec![6, 3]]);
        assert_eq!(found(&[1, 2, 12, 3, 4, 5], 3), Vec::<Vec<u64>>::new());
        assert_eq!(found(&[1, 2, 10, 3, 4], 2), [vec![1, 2], vec![3, 4]]);
    }
}
