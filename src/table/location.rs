//! Where a table lives: a local folder, a bucket of an object store, or a store that a test hands in.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use deltalake::logstore::object_store::path::Path;
use deltalake::logstore::object_store::prefix::PrefixStore;
use deltalake::logstore::object_store::{Error, ObjectStore, ObjectStoreExt, PutMode};
use deltalake::logstore::{LogStoreRef, StorageConfig, default_logstore};
use url::Url;

use super::TableError;
use super::cloud::Cloud;
use super::disk::Disk;

/// The root of a table or of a folder of tables, with the store that reaches it.
#[derive(Clone)]
pub struct TableLocation {
    url: Url,
    store: Arc<dyn ObjectStore>,
}

/// What the text of a location means, before anything is reached.
enum Place {
    Folder(Url),
    Bucket(Cloud, Url),
}

impl TableLocation {
    /// Parses a path, a `file://` URL, or the URL of an object store. Nothing is created or asked yet.
    pub fn parse(text: &str, options: &BTreeMap<String, String>) -> Result<Self, TableError> {
        match place(text, options)? {
            Place::Folder(url) => Ok(TableLocation { url, store: Arc::new(Disk::new()) }),
            Place::Bucket(cloud, url) => {
                let refuse =
                    |e| TableError::Location { location: text.to_owned(), why: format!("cannot be used ({e})") };
                let store = cloud.open(&url, options).map_err(refuse)?;
                Ok(TableLocation { url, store })
            }
        }
    }

    /// Says what is wrong with a location and the options of its store, from their text alone.
    pub fn check(text: &str, options: &BTreeMap<String, String>) -> Result<(), TableError> {
        place(text, options).map(|_| ())
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

    /// Proves that this place can be written to: a small object is created, must not be creatable again (else commits would be
    /// lost), and is removed.
    pub async fn prove_writable(&self) -> Result<(), TableError> {
        let fail = |e| TableError::store("cannot write beside", self, e);
        let path = Path::from_url_path(self.url.path()).map_err(|e| fail(e.into()))?;
        let path = path.join(format!("_taod_doctor_{}", uuid::Uuid::new_v4()));
        let create = || self.store.put_opts(&path, "doctor".into(), PutMode::Create.into());
        create().await.map_err(fail)?;
        let again = create().await;
        self.store.delete(&path).await.map_err(fail)?;
        match again {
            Err(Error::AlreadyExists { .. } | Error::Precondition { .. }) => Ok(()),
            Ok(_) => Err(TableError::Overwrites { table: self.to_string() }),
            Err(error) => Err(fail(error)),
        }
    }

    /// Returns the local folder, where it is one.
    pub fn folder(&self) -> Option<PathBuf> {
        self.url.to_file_path().ok()
    }

    /// Returns the log store of the table here.
    pub(super) fn log_store(&self) -> Result<LogStoreRef, TableError> {
        let path = Path::from_url_path(self.url.path()).map_err(|e| TableError::store("cannot reach", &self.url, e))?;
        let inside: Arc<dyn ObjectStore> = Arc::new(PrefixStore::new(Arc::clone(&self.store), path));
        Ok(default_logstore(inside, Arc::clone(&self.store), &self.url, &StorageConfig::default()))
    }
}

fn place(text: &str, options: &BTreeMap<String, String>) -> Result<Place, TableError> {
    let refuse = |why: String| TableError::Location { location: text.to_owned(), why };
    let no_folder = || refuse("is not an absolute path".to_owned());
    let path = match Url::parse(text) {
        Ok(url) if url.scheme() == "file" => url.to_file_path().map_err(|()| no_folder())?,
        Ok(mut url) if text.contains("://") => {
            let scheme = url.scheme();
            let cloud =
                Cloud::of(scheme).ok_or_else(|| refuse(format!("has the scheme {scheme}, which is unknown")))?;
            cloud.check(&url, options).map_err(refuse)?;
            url.set_path(&format!("{}/", url.path().trim_end_matches('/')));
            return Ok(Place::Bucket(cloud, url));
        }
        _ => PathBuf::from(text),
    };
    if let Some(key) = options.keys().next() {
        return Err(refuse(format!("is a local folder, which has no option {key}")));
    }
    let path = std::path::absolute(&path).map_err(|e| refuse(e.to_string()))?;
    Ok(Place::Folder(Url::from_directory_path(&path).map_err(|()| no_folder())?))
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

    fn parse(text: &str) -> Result<TableLocation, TableError> {
        TableLocation::parse(text, &BTreeMap::new())
    }

    #[test]
    fn paths_and_file_urls_name_the_same_folder() {
        let a = parse("/tmp/a b").unwrap().join("queries");
        let b = parse("file:///tmp/a%20b/").unwrap().join("queries");
        assert_eq!(a.url(), b.url());
        assert_eq!(a.to_string(), "/tmp/a b/queries/");
        assert_eq!(parse("tables").unwrap().url().scheme(), "file");
    }

    #[test]
    fn a_bucket_may_hold_the_tables_at_its_root_or_in_a_folder() {
        assert_eq!(parse("s3://bucket").unwrap().join("queries").to_string(), "s3://bucket/queries/");
        assert_eq!(parse("s3://bucket/a/").unwrap().join("queries").to_string(), "s3://bucket/a/queries/");
    }

    #[test]
    fn a_store_that_is_unknown_is_refused_by_name() {
        let error = parse("hdfs://host/tables").err().unwrap().to_string();
        assert!(error.contains("hdfs://host/tables") && error.contains("s3://"), "{error}");
        let options = BTreeMap::from([("region".to_owned(), "eu-1".to_owned())]);
        let error = TableLocation::check("tables", &options).unwrap_err().to_string();
        assert!(error.contains("region"), "{error}");
    }
}
