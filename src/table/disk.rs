//! A local disk as an object store whose writes survive a power loss.
//!
//! object_store's `LocalFileSystem` renames or links a file into place without any fsync. Here the bytes are synced
//! before the name appears and the folder is synced before the call returns, so that a log entry never names a data file
//! that a crash could still take back.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::ops::Range;
use std::path::{Path as FsPath, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use deltalake::logstore::object_store::local::LocalFileSystem;
use deltalake::logstore::object_store::path::Path;
use deltalake::logstore::object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMode,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, RenameOptions, Result, UploadPart,
};
use futures::stream::BoxStream;

/// The local file system, rooted at `/`.
#[derive(Debug)]
pub(super) struct Disk {
    files: LocalFileSystem,
}

impl Disk {
    pub(super) fn new() -> Self {
        Disk { files: LocalFileSystem::new() }
    }
}

impl std::fmt::Display for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Disk")
    }
}

#[async_trait]
impl ObjectStore for Disk {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        let target = self.files.path_to_filesystem(location)?;
        blocking(target, move |path| put(path, &payload, &opts.mode)).await?;
        Ok(PutResult { e_tag: None, version: None })
    }

    async fn put_multipart_opts(&self, location: &Path, opts: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        let target = self.files.path_to_filesystem(location)?;
        Ok(Box::new(Upload { inner: self.files.put_multipart_opts(location, opts).await?, target }))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.files.get_opts(location, options).await
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        self.files.get_ranges(location, ranges).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.files.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.files.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.files.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.files.copy_opts(from, to, options).await?;
        let target = self.files.path_to_filesystem(to)?;
        blocking(target, sync_file).await
    }

    async fn rename_opts(&self, from: &Path, to: &Path, options: RenameOptions) -> Result<()> {
        self.files.rename_opts(from, to, options).await?;
        let target = self.files.path_to_filesystem(to)?;
        blocking(target, sync_file).await
    }
}

/// A multipart upload whose file is synced once it is complete.
#[derive(Debug)]
struct Upload {
    inner: Box<dyn MultipartUpload>,
    target: PathBuf,
}

#[async_trait]
impl MultipartUpload for Upload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        self.inner.put_part(data)
    }

    async fn complete(&mut self) -> Result<PutResult> {
        let result = self.inner.complete().await?;
        blocking(self.target.clone(), sync_file).await?;
        Ok(result)
    }

    async fn abort(&mut self) -> Result<()> {
        self.inner.abort().await
    }
}

/// Runs work on the file `target` off the async threads and gives its errors the store's type.
async fn blocking(target: PathBuf, work: impl FnOnce(&FsPath) -> io::Result<()> + Send + 'static) -> Result<()> {
    let path = target.display().to_string();
    let done = tokio::task::spawn_blocking(move || work(&target)).await;
    done.map_err(|source| Error::JoinError { source })?.map_err(|source| match source.kind() {
        ErrorKind::AlreadyExists => Error::AlreadyExists { path, source: source.into() },
        ErrorKind::NotFound => Error::NotFound { path, source: source.into() },
        kind => Error::Generic { store: "disk", source: io::Error::new(kind, format!("{path}: {source}")).into() },
    })
}

/// Writes a whole file: synced under a staging name, then named, then the folder is synced.
fn put(target: &FsPath, payload: &PutPayload, mode: &PutMode) -> io::Result<()> {
    let folder = target.parent().unwrap_or(FsPath::new("/"));
    create_folders(folder)?;
    let staging = staging_name(target);
    let mut file = OpenOptions::new().write(true).create_new(true).open(&staging)?;
    let named =
        payload.iter().try_for_each(|part| file.write_all(part)).and_then(|()| file.sync_all()).and_then(|()| {
            match mode {
                PutMode::Overwrite => fs::rename(&staging, target),
                // A link fails where the name is taken: that is the put-if-absent the commit protocol rests on.
                PutMode::Create => fs::hard_link(&staging, target),
                PutMode::Update(_) => Err(io::Error::new(ErrorKind::Unsupported, "conditional update on a local disk")),
            }
        });
    if named.is_err() || matches!(mode, PutMode::Create) {
        // The staging file may already be gone (renamed); it is invisible to listings either way.
        fs::remove_file(&staging).ok();
    }
    named?;
    File::open(folder)?.sync_all()
}

/// Returns a name of the form `target#digits`, which `LocalFileSystem` leaves out of its listings.
fn staging_name(target: &FsPath) -> PathBuf {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let count = COUNTER.fetch_add(1, Ordering::Relaxed);
    let random = uuid::Uuid::new_v4().as_u128() as u64;
    let mut name = target.as_os_str().to_owned();
    name.push(format!("#{random}{count}"));
    name.into()
}

/// Creates a folder and those above it, each one synced into its parent.
fn create_folders(folder: &FsPath) -> io::Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    if let Some(parent) = folder.parent() {
        create_folders(parent)?;
    }
    match fs::create_dir(folder) {
        Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
        other => other?,
    }
    folder.parent().map_or(Ok(()), |parent| File::open(parent)?.sync_all())
}

fn sync_file(path: &FsPath) -> io::Result<()> {
    File::open(path)?.sync_all()?;
    path.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
}

#[cfg(test)]
mod tests {
    use super::*;
    use deltalake::logstore::object_store::ObjectStoreExt;

    #[tokio::test]
    async fn a_name_is_taken_once_and_staging_files_do_not_stay() {
        let folder = tempfile::tempdir().unwrap();
        let location = Path::from_absolute_path(folder.path().join("a/b/0.json")).unwrap();
        let disk = Disk::new();
        let create = || PutOptions { mode: PutMode::Create, ..Default::default() };
        disk.put_opts(&location, "one".into(), create()).await.unwrap();
        let error = disk.put_opts(&location, "two".into(), create()).await.unwrap_err();
        assert!(matches!(error, Error::AlreadyExists { .. }), "{error}");
        assert_eq!(disk.get(&location).await.unwrap().bytes().await.unwrap(), "one");
        disk.put_opts(&location, "three".into(), PutOptions::default()).await.unwrap();
        assert_eq!(disk.get(&location).await.unwrap().bytes().await.unwrap(), "three");
        assert_eq!(fs::read_dir(folder.path().join("a/b")).unwrap().count(), 1);
    }
}
