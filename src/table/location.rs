//! Where a table lives: a local folder, or an object store that a test hands in.

use std::path::PathBuf;
use std::sync::Arc;

use deltalake::logstore::object_store::ObjectStore;
use deltalake::logstore::{LogStoreRef, StorageConfig, logstore_with};
use url::Url;

use super::TableError;
use super::disk::Disk;

/// The root of a table or of a folder of tables, with the store that reaches it.
#[derive(Clone)]
pub struct TableLocation {
    url: Url,
    store: Arc<dyn ObjectStore>,
}

impl TableLocation {
    /// Parses a path or a `file://` URL. Nothing is created yet.
    pub fn parse(text: &str) -> Result<Self, TableError> {
        let refuse = |why: &str| TableError::Location { location: text.to_owned(), why: why.to_owned() };
        let path = match Url::parse(text) {
            Ok(url) if url.scheme() == "file" => url.to_file_path().map_err(|()| refuse("is not an absolute path"))?,
            Ok(url) if text.contains("://") => {
                return Err(refuse(&format!("has the scheme {}, which this build does not carry", url.scheme())));
            }
            _ => PathBuf::from(text),
        };
        let path = std::path::absolute(&path).map_err(|e| refuse(&e.to_string()))?;
        let url = Url::from_directory_path(&path).map_err(|()| refuse("is not an absolute path"))?;
        Ok(TableLocation { url, store: Arc::new(Disk::new()) })
    }

    /// Reaches `url` through a store of the caller's, whose `/` is the root of `url`'s host.
    pub fn with_store(url: Url, store: Arc<dyn ObjectStore>) -> Self {
        TableLocation { url, store }
    }

    /// Returns the location of the table `name` in this folder.
    pub fn join(&self, name: &str) -> Self {
        let mut url = self.url.clone();
        let base = url.path().trim_end_matches('/').to_owned();
        url.set_path(&format!("{base}/{name}/"));
        TableLocation { url, store: Arc::clone(&self.store) }
    }

    /// Returns the URL of the root, which ends with a slash.
    pub fn url(&self) -> &Url {
        &self.url
    }

    /// Returns the log store of the table here.
    pub(super) fn log_store(&self) -> Result<LogStoreRef, TableError> {
        logstore_with(Arc::clone(&self.store), &self.url, StorageConfig::default())
            .map_err(|e| TableError::store("cannot reach", &self.url, e))
    }
}

impl std::fmt::Display for TableLocation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&display(&self.url))
    }
}

/// Returns a location for people: the path where it is one.
pub(super) fn display(url: &Url) -> String {
    url.to_file_path().map_or_else(|()| url.to_string(), |path| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_file_urls_name_the_same_folder() {
        let a = TableLocation::parse("/tmp/a b").unwrap().join("queries");
        let b = TableLocation::parse("file:///tmp/a%20b/").unwrap().join("queries");
        assert_eq!(a.url(), b.url());
        assert_eq!(a.to_string(), "/tmp/a b/queries/");
        assert_eq!(TableLocation::parse("tables").unwrap().url().scheme(), "file");
    }

    #[test]
    fn a_store_that_is_not_built_in_is_refused_by_name() {
        let error = TableLocation::parse("s3://bucket/tables").err().unwrap().to_string();
        assert!(error.contains("s3://bucket/tables") && error.contains("scheme s3"), "{error}");
    }
}
