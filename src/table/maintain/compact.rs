//! Small files become large ones; no row changes.
//!
//! Neighbours in time are joined, row group by row group, with the writer's settings and statistics of an append, so that
//! a column without bounds in the log gets none by being rewritten. The commit is ours as well: deltalake's takes a
//! `Remove` without data change for harmless, and two compactions at once then both land and double every row. Here a
//! file that another commit took out first (a compaction, an erasure) makes this one a conflict that changes nothing.

use std::sync::Arc;

use arrow::array::{RecordBatch, new_null_array};
use arrow::compute::cast;
use arrow::error::ArrowError;
use futures::StreamExt;
use parquet::arrow::ArrowWriter;

use super::{Change, Settings};
use crate::table::log::Remove;
use crate::table::read::DataFile;
use crate::table::schema::TableSpec;
use crate::table::stored_file::StoredFile;
use crate::table::{Table, TableError, write};

/// Rows a batch holds in the rewrite: rows of the log may be large, and a batch is what it keeps in memory.
const BATCH_ROWS: usize = 256;

/// Joins files below the target size, where enough of them are neighbours.
pub(super) async fn run(table: &mut Table, settings: &Settings) -> Result<Option<Change>, TableError> {
    let mut files = table.files().await?;
    files.reverse();
    let bins = bins(files, settings.target_bytes(), settings.compact_from_files);
    if bins.is_empty() {
        return Ok(None);
    }
    refuse_foreign(table).await?;
    let mut change = Change::default();
    for bin in bins {
        let add = rewrite(table, &bin).await?;
        change.files += bin.len() as u64;
        change.bytes += add.size;
        let removes: Vec<Remove> = bin.into_iter().map(|DataFile { path, size, .. }| Remove { path, size }).collect();
        let adds = [add];
        if let Err(error) = table.commit_compaction(&removes, &adds).await {
            if matches!(error, TableError::Conflict { .. }) {
                write::remove_files(&table.log, &adds).await;
            }
            return Err(error);
        }
    }
    Ok(Some(change))
}

/// Returns runs of at least `least` neighbouring small files, each of about `target` bytes.
fn bins(files: Vec<DataFile>, target: u64, least: usize) -> Vec<Vec<DataFile>> {
    let mut bins: Vec<Vec<DataFile>> = vec![Vec::new()];
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
async fn rewrite(table: &Table, files: &[DataFile]) -> Result<crate::table::log::Add, TableError> {
    let fail = |e: ArrowError| TableError::store("cannot compact", table.name(), e);
    let lose = |e: parquet::errors::ParquetError| TableError::store("cannot compact", table.name(), e);
    let spec = table.spec;
    let properties = write::properties(spec).map_err(lose)?;
    let mut writer = ArrowWriter::try_new(Vec::new(), spec.arrow_schema(), Some(properties)).map_err(lose)?;
    let bounded: Vec<usize> = (0..spec.columns.len()).filter(|i| spec.columns[*i].stats).collect();
    let mut kept = Vec::new();
    for file in files {
        let reader = StoredFile::open(&table.log, &file.path, file.size).await.map_err(lose)?;
        let mut batches = reader.with_batch_size(BATCH_ROWS).build().map_err(lose)?;
        while let Some(batch) = batches.next().await {
            let batch = fitted(spec, &batch.map_err(lose)?).map_err(fail)?;
            kept.push(batch.project(&bounded).map_err(fail)?);
            writer.write(&batch).map_err(lose)?;
        }
    }
    let bytes = writer.into_inner().map_err(lose)?;
    let mut add = write::upload(table.name(), &table.log, bytes, write::stats(spec, &kept)).await?;
    add.data_change = false;
    Ok(add)
}

/// Returns a batch in the table's columns and types; a column that its file lacks is null.
fn fitted(spec: &TableSpec, batch: &RecordBatch) -> Result<RecordBatch, ArrowError> {
    let schema = spec.arrow_schema();
    let columns = schema.fields().iter().map(|field| match batch.column_by_name(field.name()) {
        Some(column) => cast(column, field.data_type()),
        None => Ok(new_null_array(field.data_type(), batch.num_rows())),
    });
    RecordBatch::try_new(Arc::clone(&schema), columns.collect::<Result<_, _>>()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_joined_up_to_the_target_and_large_files_stay() {
        let file = |size: u64| DataFile { path: size.to_string(), size, stats: None };
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
