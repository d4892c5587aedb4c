//! The bytes of a data file and the statistics that stand beside it in the log.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::compute;
use arrow::datatypes::{Date32Type, Int32Type, Int64Type, SchemaRef, TimestampMicrosecondType};
use arrow::json::ReaderBuilder;
use deltalake::Path;
use deltalake::logstore::LogStoreRef;
use deltalake::logstore::object_store::ObjectStoreExt;
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::schema::types::ColumnPath;
use serde::Serialize;
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::TableError;
use super::commit::now_ms;
use super::log::Add;
use super::schema::{Column, Kind, TableSpec};
use crate::crash::{self, Point};

/// Uncompressed bytes after which a row group ends: bounds the memory of a reader.
const ROW_GROUP_BYTES: usize = 64 << 20;

/// Returns a batch of rows whose fields are columns of the table in any order, JSON columns already as text. A field that
/// is no column is refused, never dropped.
pub fn batch_of_any<T: Serialize>(spec: &TableSpec, rows: &[T]) -> Result<RecordBatch, TableError> {
    let schema = spec.arrow_schema();
    let decode = || {
        let mut decoder = ReaderBuilder::new(Arc::clone(&schema))
            .with_batch_size(rows.len().max(1))
            .with_strict_mode(true)
            .build_decoder()?;
        decoder.serialize(rows)?;
        decoder.flush()
    };
    let batch = decode().map_err(|e| TableError::Rows { table: spec.name.to_owned(), why: e.to_string() })?;
    Ok(batch.unwrap_or_else(|| RecordBatch::new_empty(schema)))
}

/// A data file that is being made. Batches are encoded as they come, so that an open file takes the memory of its
/// compressed pages and not of its rows.
pub struct DataFile {
    spec: &'static TableSpec,
    writer: ArrowWriter<Vec<u8>>,
    /// Where the columns with bounds in the log stand.
    bounded: Vec<usize>,
    /// Those columns of all batches; they are few and narrow.
    bounds: Vec<RecordBatch>,
}

impl DataFile {
    /// Bytes of rows that are encoded and not yet compressed or written out, at most.
    pub const MOST_BUFFERED: usize = ROW_GROUP_BYTES;

    /// Returns a file without a row.
    pub fn new(spec: &'static TableSpec) -> Result<Self, TableError> {
        DataFile::of(spec, spec.arrow_schema())
    }

    /// Returns a file without a row that holds the columns of `schema`: the table's, or those and another writer's.
    pub(super) fn of(spec: &'static TableSpec, schema: SchemaRef) -> Result<Self, TableError> {
        let with_bounds = spec.columns.iter().filter(|column| column.stats);
        let bounded = with_bounds.filter_map(|column| schema.index_of(column.name).ok()).collect();
        let writer = properties(spec).and_then(|p| ArrowWriter::try_new(Vec::new(), schema, Some(p)));
        Ok(DataFile { spec, writer: writer.map_err(|e| misfit(spec, e))?, bounded, bounds: Vec::new() })
    }

    /// Encodes rows: heavy, not for an async thread.
    pub fn write(&mut self, batch: &RecordBatch) -> Result<(), TableError> {
        self.writer.write(batch).map_err(|e| misfit(self.spec, e))?;
        self.bounds.push(batch.project(&self.bounded).map_err(|e| misfit(self.spec, e))?);
        Ok(())
    }

    /// Returns how many rows it holds.
    pub fn rows(&self) -> u64 {
        self.bounds.iter().map(|batch| batch.num_rows() as u64).sum()
    }

    /// Ends the file: heavy as well.
    pub fn encode(self) -> Result<EncodedFile, TableError> {
        let (rows, stats) = (self.rows(), stats(self.spec, &self.bounds));
        let bytes = self.writer.into_inner().map_err(|e| misfit(self.spec, e))?;
        Ok(EncodedFile { rows, stats, bytes })
    }
}

/// A data file whose bytes are made and not stored yet.
pub struct EncodedFile {
    rows: u64,
    stats: String,
    bytes: Vec<u8>,
}

impl EncodedFile {
    /// Returns how many rows it holds.
    pub(super) fn rows(&self) -> u64 {
        self.rows
    }

    /// Writes the file next to the log and returns the action that will add it.
    pub(super) async fn store(self, table: &str, log: &LogStoreRef) -> Result<Add, TableError> {
        let EncodedFile { stats, bytes, .. } = self;
        let path = format!("part-00000-{}-c000.zstd.parquet", Uuid::new_v4());
        let size = bytes.len() as u64;
        let store = log.object_store(None);
        let put = crash::during(Point::DuringUpload, store.put(&Path::from(path.as_str()), bytes.into())).await;
        put.map_err(|e| TableError::store("cannot write a data file of", table, e))?;
        crash::point(Point::AfterUpload);
        Ok(Add { path, partition_values: BTreeMap::new(), size, modification_time: now_ms(), data_change: true, stats })
    }
}

/// Returns the file of some batches. Encoding is heavy and leaves the async threads.
pub(super) async fn data_file(spec: &'static TableSpec, batches: &[RecordBatch]) -> Result<EncodedFile, TableError> {
    // Batches are reference-counted: the clone copies no row.
    let owned = batches.to_vec();
    let encoded = tokio::task::spawn_blocking(move || {
        let mut file = DataFile::new(spec)?;
        owned.iter().try_for_each(|batch| file.write(batch))?;
        file.encode()
    });
    encoded.await.map_err(|e| misfit(spec, e))?
}

/// Ends a file off the async threads.
pub(super) async fn encoded(file: DataFile) -> Result<EncodedFile, TableError> {
    let spec = file.spec;
    tokio::task::spawn_blocking(move || file.encode()).await.map_err(|e| misfit(spec, e))?
}

fn misfit(spec: &TableSpec, why: impl std::fmt::Display) -> TableError {
    TableError::Rows { table: spec.name.to_owned(), why: why.to_string() }
}

/// Removes files that no commit names. A failure leaves them to the vacuum.
pub(super) async fn remove_files(log: &LogStoreRef, adds: &[Add]) {
    for add in adds {
        if let Err(error) = log.object_store(None).delete(&Path::from(add.path.as_str())).await {
            tracing::debug!(path = add.path, %error, "an orphaned data file stays until the next vacuum");
        }
    }
}

/// Returns the writer's settings. Only columns that may have bounds in the log have statistics in the file.
fn properties(spec: &TableSpec) -> parquet::errors::Result<WriterProperties> {
    let mut builder = WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::try_new(1)?))
        .set_max_row_group_bytes(Some(ROW_GROUP_BYTES))
        .set_statistics_enabled(EnabledStatistics::None)
        .set_dictionary_enabled(false)
        .set_created_by(format!("taod {}", env!("CARGO_PKG_VERSION")));
    for column in spec.columns {
        let path = ColumnPath::from(column.name);
        if column.stats {
            builder = builder.set_column_statistics_enabled(path.clone(), EnabledStatistics::Chunk);
        }
        if column.kind == Kind::Word {
            builder = builder.set_column_dictionary_enabled(path, true);
        }
    }
    Ok(builder.build())
}

/// Returns the statistics of a file as the log stores them: row count, bounds and null counts of the chosen columns.
pub(super) fn stats(spec: &TableSpec, batches: &[RecordBatch]) -> String {
    let rows: usize = batches.iter().map(RecordBatch::num_rows).sum();
    let (mut min, mut max, mut nulls) = (Map::new(), Map::new(), Map::new());
    for column in spec.columns.iter().filter(|c| c.stats) {
        let arrays: Vec<&dyn Array> =
            batches.iter().filter_map(|b| b.column_by_name(column.name)).map(AsRef::as_ref).collect();
        // Where the file lacks the column all its rows read as null.
        let present: usize = arrays.iter().map(|a| a.len() - a.null_count()).sum();
        nulls.insert(column.name.into(), json!(rows - present));
        if let Some((low, high)) = bounds(column, &arrays) {
            min.insert(column.name.into(), low);
            max.insert(column.name.into(), high);
        }
    }
    json!({ "numRecords": rows, "minValues": min, "maxValues": max, "nullCount": nulls }).to_string()
}

/// Returns the smallest and the largest value of a column, or nothing where all are null.
fn bounds(column: &Column, arrays: &[&dyn Array]) -> Option<(Value, Value)> {
    macro_rules! range {
        ($type:ty) => {{
            let low = arrays.iter().filter_map(|a| compute::min(a.as_primitive::<$type>())).min()?;
            let high = arrays.iter().filter_map(|a| compute::max(a.as_primitive::<$type>())).max()?;
            (low, high)
        }};
    }
    Some(match column.kind {
        Kind::Int => {
            let (low, high) = range!(Int32Type);
            (json!(low), json!(high))
        }
        Kind::Long => {
            let (low, high) = range!(Int64Type);
            (json!(low), json!(high))
        }
        Kind::Time => {
            // The log keeps milliseconds: down for the smallest, up for the largest, so that both stay bounds.
            let (low, high) = range!(TimestampMicrosecondType);
            (time(low.div_euclid(1000))?, time(high.div_euclid(1000) + i64::from(high.rem_euclid(1000) > 0))?)
        }
        Kind::Date => {
            let (low, high) = range!(Date32Type);
            (date(low)?, date(high)?)
        }
        Kind::Word => {
            let texts = || arrays.iter().flat_map(|a| a.as_string::<i32>().iter().flatten());
            (json!(texts().min()?), json!(texts().max()?))
        }
        _ => return None,
    })
}

fn time(millis: i64) -> Option<Value> {
    let time = chrono::DateTime::from_timestamp_millis(millis)?;
    Some(json!(time.to_rfc3339_opts(chrono::SecondsFormat::Millis, true)))
}

fn date(days: i32) -> Option<Value> {
    let day = chrono::DateTime::from_timestamp(i64::from(days) * 86_400, 0)?;
    Some(json!(day.format("%Y-%m-%d").to_string()))
}
