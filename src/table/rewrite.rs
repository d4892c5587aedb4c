//! Taking rows out of a table beside its writers, for good.
//!
//! deltalake's DELETE loses against every append that lands meanwhile. A [`Hunt`] does not: it lists the files of one
//! version, reads of each only the columns that judge a row, rewrites those that hold a selected row, and commits their
//! `Remove` with the `Add` of what is left. An append in between is no conflict; its files are looked at next, by following
//! the log entry by entry, until nothing new stands at the newest version. Where a compaction took one of the files first,
//! its rows are found again in the file that it wrote.
//!
//! One file is in memory at a time, and of that one row group and the compressed bytes of its successor.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

use arrow::array::{BooleanArray, RecordBatch};
use arrow::compute::{filter_record_batch, not};
use arrow::datatypes::{Field, Schema, SchemaRef};
use arrow::error::ArrowError;
use chrono::{DateTime, Utc};
use deltalake::Path;
use deltalake::logstore::object_store::ObjectStoreExt;
use futures::{StreamExt, TryStreamExt};
use parquet::arrow::ProjectionMask;
use parquet::arrow::async_reader::ParquetRecordBatchStream;
use parquet::errors::ParquetError;

use super::log::{self, Add, Remove, Rewrite};
use super::log_files::LogFiles;
use super::read::ListedFile;
use super::selection::{ByBounds, Selection};
use super::stored::{StoredFile, fitted};
use super::write::{self, DataFile};
use super::{Table, TableError, staged};
use crate::crash::{self, Point};

/// Files that one commit replaces at most, which is what a conflict can cost.
const FILES_PER_COMMIT: usize = 32;

/// Files that hold selected rows, and those rows.
#[derive(Debug)]
pub struct Found {
    paths: Vec<String>,
    /// The columns that the hunt was asked to tell of each selected row.
    pub rows: Vec<RecordBatch>,
    /// How many rows are selected.
    pub count: u64,
}

/// What a commit took out.
#[derive(Debug, Default)]
pub struct Taken {
    pub rows: u64,
    /// The version that no longer holds them; `None` where another writer was first and the hunt goes on.
    pub version: Option<u64>,
    /// Files that the table no longer names. Their bytes are still there.
    pub gone: Vec<String>,
    /// How many of them have a successor with the rows that stay.
    pub rewritten: u64,
}

/// A search for rows to take out of one table.
pub struct Hunt<'a> {
    table: &'a mut Table,
    selection: &'a Selection,
    told: Vec<&'static str>,
    pub(super) files: BTreeMap<String, ListedFile>,
    /// Files not looked at yet.
    open: BTreeSet<String>,
    followed: u64,
}

impl<'a> Hunt<'a> {
    /// Lists the files of the newest version. Of each selected row the columns `told` will be handed out.
    pub async fn begin(
        table: &'a mut Table,
        selection: &'a Selection,
        told: &[&'static str],
    ) -> Result<Hunt<'a>, TableError> {
        table.refresh().await?;
        table.refuse_append_only().await?;
        let files = table.data_files().await?;
        let (open, followed) = (files.keys().cloned().collect(), table.version);
        Ok(Hunt { table, selection, told: told.to_vec(), files, open, followed })
    }

    /// Returns the next files that hold selected rows, or nothing where the newest version holds none that was not
    /// returned before.
    pub async fn next(&mut self) -> Result<Option<Found>, TableError> {
        let mut found = Found { paths: Vec::new(), rows: Vec::new(), count: 0 };
        loop {
            while let Some(path) = self.open.pop_first() {
                match self.look_at(&path, &mut found).await {
                    Ok(()) => {}
                    Err(error) => {
                        // A file that a compaction replaced may be gone from the store meanwhile.
                        self.follow().await?;
                        if self.files.contains_key(&path) {
                            return Err(error);
                        }
                    }
                }
                if found.paths.len() == FILES_PER_COMMIT {
                    return Ok(Some(found));
                }
            }
            if !found.paths.is_empty() {
                return Ok(Some(found));
            }
            self.follow().await?;
            if self.open.is_empty() {
                return Ok(None);
            }
        }
    }

    /// Takes the rows out: rewrites their files and commits. The rows come back by [`Hunt::next`] where another writer
    /// replaced one of the files first.
    pub async fn take(&mut self, found: Found) -> Result<Taken, TableError> {
        let (mut removes, mut adds) = (Vec::new(), Vec::new());
        self.table.refuse_odd_names(found.paths.iter().map(String::as_str))?;
        for path in &found.paths {
            // One that meanwhile has a deletion vector stands among the open ones again: there it is refused by name.
            let Some(file) = self.files.get(path).filter(|file| !file.vector).cloned() else { continue };
            removes.push(Remove { path: path.clone(), size: file.size });
            match self.rewritten(&file).await {
                Ok(add) => adds.extend(add),
                Err(error) => {
                    write::remove_files(&self.table.log, &adds).await;
                    return Err(error);
                }
            }
        }
        if removes.is_empty() {
            return Ok(Taken::default());
        }
        crash::point(Point::DuringErasure);
        match self.table.commit_rewrite(Rewrite::Erasure, &removes, &adds).await {
            Ok(version) => {
                crash::point(Point::DuringErasure);
                self.follow().await?;
                // What was just written is known to be clean.
                self.open.retain(|path| adds.iter().all(|add| add.path != *path));
                let gone = removes.into_iter().map(|remove| remove.path).collect();
                Ok(Taken { rows: found.count, version: Some(version), gone, rewritten: adds.len() as u64 })
            }
            Err(TableError::Conflict { .. }) => {
                write::remove_files(&self.table.log, &adds).await;
                self.follow().await?;
                self.open.extend(found.paths.into_iter().filter(|path| self.files.contains_key(path)));
                Ok(Taken::default())
            }
            Err(error) => Err(error),
        }
    }

    /// Adds a file to what was found if it holds selected rows.
    async fn look_at(&self, path: &str, found: &mut Found) -> Result<(), TableError> {
        let Some(file) = self.files.get(path) else { return Ok(()) };
        match self.selection.by_bounds(self.table.spec, file.stats.as_deref()) {
            ByBounds::None => return Ok(()),
            ByBounds::All if self.told.is_empty() && !file.vector => {
                found.count += rows_of(file);
                found.paths.push(path.to_owned());
                return Ok(());
            }
            _ => {}
        }
        let (count, rows) = self.table.selected(path, file.size, self.selection, &self.told).await?;
        if count == 0 {
            return Ok(());
        }
        if file.vector {
            let name = self.table.name().to_owned();
            let why = format!(
                "file {path} has a deletion vector, which a rewrite would undo; run `REORG TABLE ... APPLY (PURGE)` with \
                 the engine that wrote it, then this again"
            );
            return Err(TableError::Refused { table: name, why });
        }
        found.count += count;
        found.rows.extend(rows);
        found.paths.push(path.to_owned());
        Ok(())
    }

    /// Writes what stays of a file; nothing where nothing does.
    async fn rewritten(&self, file: &ListedFile) -> Result<Option<Add>, TableError> {
        let table = &*self.table;
        if self.selection.by_bounds(table.spec, file.stats.as_deref()) == ByBounds::All {
            return Ok(None);
        }
        let mut stream = table.stream(&file.path, file.size, None).await?;
        let fail = |e: ArrowError| TableError::store("cannot rewrite a file of", table.name(), e);
        let schema = table.schema_of(stream.schema());
        let mut left = DataFile::of(table.spec, Arc::clone(&schema))?;
        while let Some(batch) = stream.next().await {
            let batch = batch.map_err(|e| TableError::store("cannot rewrite a file of", table.name(), e))?;
            let batch = fitted(&batch, &schema).map_err(fail)?;
            let stays = not(&self.selected_of(&batch).map_err(fail)?).map_err(fail)?;
            left.write(&filter_record_batch(&batch, &stays).map_err(fail)?)?;
        }
        match left.rows() {
            0 => Ok(None),
            _ => write::encoded(left).await?.store(table.name(), &table.log).await.map(Some),
        }
    }

    fn selected_of(&self, batch: &RecordBatch) -> Result<BooleanArray, ArrowError> {
        let schema = self.table.schema_named(&self.selection.columns());
        self.selection.judge(&fitted(batch, &schema)?)
    }

    /// Takes in the commits that landed since.
    async fn follow(&mut self) -> Result<(), TableError> {
        self.table.refresh().await?;
        while self.followed < self.table.version {
            let version = self.followed + 1;
            let Some(bytes) = self.table.read_entry(version).await? else {
                // The entry was cleaned up meanwhile: list the files anew and keep what is known of them.
                let files = self.table.data_files().await?;
                self.open.extend(files.keys().filter(|path| !self.files.contains_key(*path)).cloned());
                self.open.retain(|path| files.contains_key(path));
                (self.files, self.followed) = (files, self.table.version);
                return Ok(());
            };
            let (mut added, mut removed) = (Vec::new(), Vec::new());
            for line in log::parse(self.table.name(), version, &bytes)? {
                added.extend(line.add);
                removed.extend(line.remove);
            }
            for gone in removed {
                self.files.remove(&gone.path);
                self.open.remove(&gone.path);
            }
            for add in added {
                let vector = add.deletion_vector.is_some();
                self.open.insert(add.path.clone());
                let file = ListedFile { path: add.path, size: add.size, stats: add.stats, vector };
                self.files.insert(file.path.clone(), file);
            }
            self.followed = version;
        }
        Ok(())
    }
}

impl Table {
    /// Deletes data files from the store. One that is not there is no error.
    pub async fn delete_files(&self, paths: &[String]) -> Result<(), TableError> {
        self.refuse_read_only()?;
        for path in paths {
            match self.log.object_store(None).delete(&Path::from(path.as_str())).await {
                Ok(()) | Err(deltalake::logstore::object_store::Error::NotFound { .. }) => {}
                Err(e) => return Err(TableError::store("cannot delete a file of", self.name(), e)),
            }
        }
        Ok(())
    }

    /// Deletes every data file that no longer belongs to the table and holds selected rows; returns how many.
    ///
    /// These are files that a compaction or an earlier, killed erasure replaced, and uploads from `before` the erasure that
    /// never became a commit. Such an upload can no longer be committed once the hunt is over and [`super::ERASURES`] has
    /// moved: ingestion is fenced, and a rewrite lost one of its sources. A younger upload may be about to be committed, by
    /// a writer that knows of the erasure: unless the log says that it was replaced it stays, and where no commit comes the
    /// sweep takes it.
    pub async fn delete_remains(&mut self, selection: &Selection, before: DateTime<Utc>) -> Result<u64, TableError> {
        self.refuse_read_only()?;
        let fail = |e| TableError::store("cannot list the files of", self.name(), e);
        // The files' stamps are the store's: where our clock is ahead of it, so is `before`.
        let before = before - (Utc::now() - self.store_now().await?);
        let listed: Vec<_> = self.log.object_store(None).list(None).try_collect().await.map_err(fail)?;
        // Listed first: what is committed in between is a file of the table.
        self.refresh().await?;
        let files = self.data_files().await?;
        let mut deleted = staged::remove(self, before).await?.files;
        let mut replaced: Option<HashSet<String>> = None;
        for (path, meta) in listed.into_iter().map(|meta| (meta.location.to_string(), meta)) {
            let is_data = path.ends_with(".parquet") && !path.starts_with("_");
            if !is_data || files.contains_key(&path) {
                continue;
            }
            match self.selected(&path, meta.size, selection, &[]).await {
                Ok((0, _)) => continue,
                Ok(_) => {}
                // Swept by someone else meanwhile, or never complete.
                Err(error) if is_gone_or_not_parquet(&error) => continue,
                Err(error) => return Err(error),
            }
            if meta.last_modified >= before {
                if replaced.is_none() {
                    replaced = Some(self.replaced().await?);
                }
                if !replaced.as_ref().is_some_and(|replaced| replaced.contains(&path)) {
                    continue;
                }
            }
            self.delete_files(&[path]).await?;
            deleted += 1;
        }
        Ok(deleted)
    }

    /// Returns the files that a commit which is still in the log took out.
    async fn replaced(&self) -> Result<HashSet<String>, TableError> {
        let mut replaced = HashSet::new();
        for version in LogFiles::list(&self.log).await?.commits {
            let Some(bytes) = self.read_entry(version).await? else { continue };
            let lines = log::parse(self.name(), version, &bytes)?;
            replaced.extend(lines.into_iter().filter_map(|line| line.remove).map(|remove| remove.path));
        }
        Ok(replaced)
    }

    /// Returns the data files of this version by their paths.
    pub(super) async fn data_files(&self) -> Result<BTreeMap<String, ListedFile>, TableError> {
        Ok(self.files().await?.into_iter().map(|file| (file.path.clone(), file)).collect())
    }

    /// Counts the selected rows of a file and returns some of their columns.
    async fn selected(
        &self,
        path: &str,
        size: u64,
        selection: &Selection,
        told: &[&'static str],
    ) -> Result<(u64, Vec<RecordBatch>), TableError> {
        let fail = |e: ArrowError| TableError::store("cannot search a file of", self.name(), e);
        let mut columns = selection.columns();
        columns.extend(told);
        let schema = self.schema_named(&columns);
        let told: Vec<usize> = told.iter().filter_map(|name| schema.index_of(name).ok()).collect();
        let mut stream = self.stream(path, size, Some(&columns)).await?;
        let (mut count, mut rows) = (0, Vec::new());
        while let Some(batch) = stream.next().await {
            let batch = batch.map_err(|e| TableError::store("cannot search a file of", self.name(), e))?;
            let batch = fitted(&batch, &schema).map_err(fail)?;
            let selected = selection.judge(&batch).map_err(fail)?;
            if selected.true_count() > 0 {
                count += selected.true_count() as u64;
                let batch = batch.project(&told).map_err(fail)?;
                rows.push(filter_record_batch(&batch, &selected).map_err(fail)?);
            }
        }
        Ok((count, rows))
    }

    /// Opens the rows of a data file: all columns, or those named that it has.
    async fn stream(
        &self,
        path: &str,
        size: u64,
        columns: Option<&[&'static str]>,
    ) -> Result<ParquetRecordBatchStream<StoredFile>, TableError> {
        let fail = |e| TableError::store("cannot read a file of", self.name(), e);
        let builder = StoredFile::open(&self.log, path, size).await.map_err(fail)?;
        let mask = match columns {
            None => ProjectionMask::all(),
            Some(columns) => {
                let fields = builder.schema().fields().iter().enumerate();
                let wanted = fields.filter(|(_, f)| columns.contains(&f.name().as_str())).map(|(i, _)| i);
                ProjectionMask::roots(builder.parquet_schema(), wanted)
            }
        };
        builder.with_projection(mask).build().map_err(fail)
    }

    /// Returns the schema of the table's columns with these names, in the table's order.
    fn schema_named(&self, names: &[&'static str]) -> SchemaRef {
        let whole = self.spec.arrow_schema();
        let named = whole.fields().iter().filter(|f| names.contains(&f.name().as_str()));
        // A column that a file does not have reads as null.
        Arc::new(Schema::new(named.map(|f| f.as_ref().clone().with_nullable(true)).collect::<Vec<Field>>()))
    }

    /// Returns the schema in which a file is written again: our columns in our types, those of others as they are.
    fn schema_of(&self, file: &Schema) -> SchemaRef {
        let whole = self.spec.arrow_schema();
        let field = |f: &Arc<Field>| whole.field_with_name(f.name()).map_or_else(|_| f.as_ref().clone(), Field::clone);
        Arc::new(Schema::new(file.fields().iter().map(field).collect::<Vec<Field>>()))
    }
}

/// Returns true where a file is not there, or is not a whole Parquet file. A store that only fails now is neither.
pub(super) fn is_gone_or_not_parquet(error: &TableError) -> bool {
    use deltalake::logstore::object_store::Error as StoreError;

    let mut next = std::error::Error::source(error);
    while let Some(cause) = next {
        if let Some(store) = cause.downcast_ref::<StoreError>() {
            return matches!(store, StoreError::NotFound { .. });
        }
        if cause.downcast_ref::<ParquetError>().is_some_and(|e| !matches!(e, ParquetError::External(_))) {
            return true;
        }
        next = cause.source();
    }
    false
}

/// Returns the rows of a file from the log's word for it.
fn rows_of(file: &ListedFile) -> u64 {
    let stats: Option<serde_json::Value> = file.stats.as_deref().and_then(|text| serde_json::from_str(text).ok());
    stats.and_then(|stats| stats["numRecords"].as_u64()).unwrap_or_default()
}
