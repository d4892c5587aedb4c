//! Files that are either whole or absent, also after a power loss.
//!
//! A reader may take the existence of a file written here as proof that it is complete: bytes go to a temporary file in
//! the same folder, are fsynced, renamed over the target, and the folder is fsynced. A stage writes its manifest last,
//! so a stage without a manifest never happened.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;

use serde::{Serialize, de::DeserializeOwned};
use sha2::{Digest, Sha256};

/// A file that could not be written, read or understood. The message names the path.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    #[error("{action} {path}: {source}{}", remedy(source))]
    Io { action: &'static str, path: String, source: io::Error },
    #[error("{path} is not the JSON expected here: {source}")]
    Json { path: String, source: serde_json::Error },
}

/// Returns what to do about a failure that has nothing to do with the file itself; begins with a separator.
pub fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "; free space there and run it again: nothing half-written was left"
        }
        io::ErrorKind::PermissionDenied => "; run taod as the owner of the folder",
        io::ErrorKind::ReadOnlyFilesystem => "; choose a folder that can be written to",
        _ => "",
    }
}

impl FileError {
    /// Wraps an I/O error with what was being done to which path.
    pub fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        FileError::Io { action, path: path.display().to_string(), source }
    }

    /// Returns true where the file was simply not there.
    pub fn is_not_found(&self) -> bool {
        matches!(self, FileError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

/// Writes `bytes` to `path` so that the file is whole or absent, and durable once this returns.
pub fn write(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let write = || -> io::Result<()> {
        let mut file = tempfile::Builder::new().prefix(".tmp-").tempfile_in(folder)?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        file.persist(path).map_err(|e| e.error)?;
        Ok(())
    };
    write().map_err(|e| FileError::io("cannot write", path, e))?;
    sync_folder(folder)
}

/// Writes `value` as indented JSON, whole or absent.
pub fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), FileError> {
    write(path, &json_bytes(path, value)?)
}

/// Returns the bytes that [`write_json`] writes to `path`.
pub fn json_bytes<T: Serialize>(path: &Path, value: &T) -> Result<Vec<u8>, FileError> {
    let mut bytes = serde_json::to_vec_pretty(value)
        .map_err(|source| FileError::Json { path: path.display().to_string(), source })?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// Reads a whole JSON file.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, FileError> {
    let bytes = fs::read(path).map_err(|e| FileError::io("cannot read", path, e))?;
    serde_json::from_slice(&bytes).map_err(|source| FileError::Json { path: path.display().to_string(), source })
}

/// Writes rows as JSON lines, whole or absent.
pub fn write_json_lines<T: Serialize>(path: &Path, rows: &[T]) -> Result<(), FileError> {
    let mut bytes = Vec::new();
    for row in rows {
        serde_json::to_writer(&mut bytes, row)
            .map_err(|source| FileError::Json { path: path.display().to_string(), source })?;
        bytes.push(b'\n');
    }
    write(path, &bytes)
}

/// Reads a whole file of JSON lines.
pub fn read_json_lines<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>, FileError> {
    let text = fs::read_to_string(path).map_err(|e| FileError::io("cannot read", path, e))?;
    let parse = |line| serde_json::from_str(line);
    let rows: Result<Vec<T>, _> = text.lines().filter(|line| !line.trim().is_empty()).map(parse).collect();
    rows.map_err(|source| FileError::Json { path: path.display().to_string(), source })
}

/// Makes a folder's entries durable.
pub fn sync_folder(folder: &Path) -> Result<(), FileError> {
    File::open(folder).and_then(|f| f.sync_all()).map_err(|e| FileError::io("cannot sync", folder, e))
}

/// Creates a folder and all above it.
pub fn create_folder(folder: &Path) -> Result<(), FileError> {
    fs::create_dir_all(folder).map_err(|e| FileError::io("cannot create folder", folder, e))
}

/// Lets the group of a file or folder do what `bits` say (octal, such as `0o050`) besides what it may already. For what the
/// model server has to read: all else is made for its owner alone. Who is not the owner cannot, and need not.
pub fn admit_group(path: &Path, bits: u32) -> Result<(), FileError> {
    use std::os::unix::fs::PermissionsExt;
    let fail = |e| FileError::io("cannot let the group read", path, e);
    let mut permissions = fs::metadata(path).map_err(fail)?.permissions();
    if permissions.mode() & bits == bits {
        return Ok(());
    }
    permissions.set_mode(permissions.mode() | bits);
    match fs::set_permissions(path, permissions) {
        Err(error) if error.kind() != io::ErrorKind::PermissionDenied => Err(fail(error)),
        _ => Ok(()),
    }
}

/// Returns the SHA-256 of a file's bytes in lower-case hex, reading it in pieces.
pub fn sha256_file(path: &Path) -> Result<String, FileError> {
    let read = || -> io::Result<String> {
        let mut file = File::open(path)?;
        let mut hasher = Sha256::new();
        let mut buffer = vec![0u8; 1 << 20];
        loop {
            let n = file.read(&mut buffer)?;
            if n == 0 {
                return Ok(hex::encode(hasher.finalize()));
            }
            hasher.update(&buffer[..n]);
        }
    };
    read().map_err(|e| FileError::io("cannot read", path, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_the_old_file_and_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        write_json(&path, &1).unwrap();
        let error = write(&folder.path().join("missing/b"), b"x").unwrap_err();
        assert!(error.to_string().contains("missing/b"), "{error}");
        assert_eq!(read_json::<i32>(&path).unwrap(), 1);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn the_hash_is_sha256() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        write(&path, b"abc").unwrap();
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256_file(&path).unwrap(), expected);
    }
}
