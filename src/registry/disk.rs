//! The registry's writes, each whole or absent, each a point at which a test may pull the plug.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use serde::Serialize;

use crate::durable::{self, FileError};

/// Writes a JSON file.
pub(super) fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), FileError> {
    plug::pulled(path)?;
    durable::write_json(path, value)
}

/// Copies a file.
pub(super) fn copy(from: &Path, to: &Path) -> Result<(), FileError> {
    plug::pulled(to)?;
    let bytes = fs::read(from).map_err(|e| FileError::io("cannot read", from, e))?;
    durable::write(to, &bytes)
}

/// Removes a file, for good once this returns. A file that is not there is no error.
pub(super) fn remove(path: &Path) -> Result<(), FileError> {
    plug::pulled(path)?;
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(FileError::io("cannot remove", path, error));
        }
        _ => {}
    }
    durable::sync_folder(path.parent().unwrap_or(Path::new(".")))
}

/// Appends one line. A line that an earlier kill left torn is cut off first.
pub(super) fn append_line(path: &Path, line: &str) -> Result<(), FileError> {
    plug::pulled(path)?;
    let is_new = !path.exists();
    let append = || -> std::io::Result<()> {
        let mut file = File::options().create(true).truncate(false).read(true).write(true).open(path)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        let whole = bytes.iter().rposition(|b| *b == b'\n').map_or(0, |i| i + 1);
        file.set_len(whole as u64)?;
        file.seek(SeekFrom::End(0))?;
        file.write_all(format!("{line}\n").as_bytes())?;
        file.sync_all()
    };
    append().map_err(|e| FileError::io("cannot append to", path, e))?;
    if is_new { durable::sync_folder(path.parent().unwrap_or(Path::new("."))) } else { Ok(()) }
}

#[cfg(not(test))]
mod plug {
    /// Never, outside tests.
    pub(super) fn pulled(_path: &std::path::Path) -> Result<(), crate::durable::FileError> {
        Ok(())
    }
}

#[cfg(test)]
pub(super) mod plug {
    use std::cell::Cell;

    use crate::durable::FileError;

    thread_local! {
        static WRITES_LEFT: Cell<Option<u32>> = const { Cell::new(None) };
    }

    /// Lets this thread make so many more writes; `None` for all.
    pub(in crate::registry) fn after(writes: Option<u32>) {
        WRITES_LEFT.set(writes);
    }

    /// Fails where no more write is allowed, as if the process had been killed before it.
    pub(super) fn pulled(path: &std::path::Path) -> Result<(), FileError> {
        match WRITES_LEFT.get() {
            None => Ok(()),
            Some(0) => Err(FileError::io("killed before", path, std::io::Error::other("the plug was pulled"))),
            Some(left) => {
                WRITES_LEFT.set(Some(left - 1));
                Ok(())
            }
        }
    }
}
