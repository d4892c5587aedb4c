//! A data file of a table as Parquet's reader sees it.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use deltalake::Path;
use deltalake::logstore::LogStoreRef;
use deltalake::logstore::object_store::{ObjectStore, ObjectStoreExt};
use futures::FutureExt;
use futures::future::BoxFuture;
use parquet::arrow::arrow_reader::ArrowReaderOptions;
use parquet::arrow::async_reader::{AsyncFileReader, ParquetRecordBatchStreamBuilder};
use parquet::errors::{ParquetError, Result as ParquetResult};
use parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader};

/// A Parquet file in a store.
pub(super) struct StoredFile {
    store: Arc<dyn ObjectStore>,
    path: Path,
    size: u64,
}

impl StoredFile {
    /// Opens a file beside the log. Columns have the types of Parquet, not those that their writer had in memory.
    pub(super) async fn open(
        log: &LogStoreRef,
        path: &str,
        size: u64,
    ) -> ParquetResult<ParquetRecordBatchStreamBuilder<StoredFile>> {
        let file = StoredFile { store: log.object_store(None), path: Path::from(path), size };
        let options = ArrowReaderOptions::new().with_skip_arrow_metadata(true);
        ParquetRecordBatchStreamBuilder::new_with_options(file, options).await
    }
}

impl AsyncFileReader for StoredFile {
    fn get_bytes(&mut self, range: Range<u64>) -> BoxFuture<'_, ParquetResult<Bytes>> {
        let external = |e| ParquetError::External(Box::new(e));
        async move { self.store.get_range(&self.path, range).await.map_err(external) }.boxed()
    }

    fn get_metadata<'a>(
        &'a mut self,
        _: Option<&'a ArrowReaderOptions>,
    ) -> BoxFuture<'a, ParquetResult<Arc<ParquetMetaData>>> {
        let size = self.size;
        async move { ParquetMetaDataReader::new().load_and_finish(self, size).await.map(Arc::new) }.boxed()
    }
}
