//! The version of what lies in the state folder, so that an upgrade changes it in order and a downgrade is refused in words.
//!
//! `layout.json` in the state folder says the layout of all files below it: rounds, registry, prompts, erasures. One number for
//! all of them, because they refer to each other and are backed up and restored together. The tables are not among them: a Delta
//! table carries its own schema, and columns are added when a newer taod opens it. A state folder without the file was written
//! before there was one, which is layout 0.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::durable::{self, FileError};

/// The layout that this taod reads and writes.
pub const LAYOUT: u32 = 1;

/// Name of the file.
const FILE: &str = "layout.json";

/// What each upgrade does, from its index to the next layout. Each is safe to repeat: a kill in the midst of one is followed by
/// the same one.
const UPGRADES: [Upgrade; LAYOUT as usize] = [sweep];

type Upgrade = fn(&Path) -> Result<(), LayoutError>;

/// What `layout.json` says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    layout: u32,
    /// The taod that wrote it.
    taod: String,
}

/// Why a state folder cannot be used by this taod.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    #[error(
        "state.dir {dir} was written by a newer taod ({taod}, layout {found}; this one is {own} and knows up to {LAYOUT}): \
         install that version again, or restore a backup made before it (docs/runbooks/restore.md)"
    )]
    Newer { dir: String, taod: String, found: u32, own: &'static str },
    #[error(transparent)]
    File(#[from] FileError),
}

/// Refuses a folder of a newer layout; one of an older layout, or none, passes. Changes nothing.
pub fn check(dir: &Path) -> Result<(), LayoutError> {
    stamp(dir).map(drop)
}

/// Brings a state folder to this taod's layout, creating it where there is none. Called by whoever is about to write: `taod run`
/// and each round.
pub fn claim(dir: &Path) -> Result<(), LayoutError> {
    let found = stamp(dir)?;
    durable::create_folder(dir)?;
    for (layout, upgrade) in UPGRADES.iter().enumerate().skip(found as usize) {
        upgrade(dir)?;
        let next = layout as u32 + 1;
        durable::write_json(&file(dir), &Stamp { layout: next, taod: env!("CARGO_PKG_VERSION").into() })?;
        tracing::info!(dir = %dir.display(), layout = next, "the state folder has the layout of this version");
    }
    Ok(())
}

fn file(dir: &Path) -> PathBuf {
    dir.join(FILE)
}

/// Returns the layout of a folder.
fn stamp(dir: &Path) -> Result<u32, LayoutError> {
    match durable::read_json::<Stamp>(&file(dir)) {
        Ok(Stamp { layout, .. }) if layout <= LAYOUT => Ok(layout),
        Ok(Stamp { layout, taod }) => {
            let (dir, own) = (dir.display().to_string(), env!("CARGO_PKG_VERSION"));
            Err(LayoutError::Newer { dir, taod, found: layout, own })
        }
        Err(error) if error.is_not_found() => Ok(0),
        Err(error) => Err(error.into()),
    }
}

/// Layout 0 to 1: removes the half-written temporary files that taods before layout 1 could leave beside the rounds when they
/// were killed; nothing reads them, and backups need not carry them.
fn sweep(dir: &Path) -> Result<(), LayoutError> {
    let fail = |action, path: &Path, e| LayoutError::File(FileError::io(action, path, e));
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(fail("cannot list", dir, error)),
    };
    for entry in entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with(".tmp-")) {
        fs::remove_file(entry.path()).map_err(|e| fail("cannot remove", &entry.path(), e))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(dir: &Path, layout: u32) {
        durable::write_json(&file(dir), &Stamp { layout, taod: "9.9.9".into() }).unwrap();
    }

    #[test]
    fn a_new_folder_gets_this_layout_and_a_claim_is_safe_to_repeat() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("state");
        check(&dir).unwrap();
        assert!(!dir.exists(), "a check makes nothing");
        claim(&dir).unwrap();
        claim(&dir).unwrap();
        assert_eq!(stamp(&dir).unwrap(), LAYOUT);
    }

    #[test]
    fn the_layout_before_is_upgraded_and_loses_only_what_nobody_reads() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path();
        for name in ["round.lock", ".tmp-abc"] {
            fs::write(dir.join(name), "x").unwrap();
        }
        fs::create_dir_all(dir.join("rounds/round-00001")).unwrap();
        fs::write(dir.join("rounds/round-00001/plan.json"), "{}").unwrap();
        claim(dir).unwrap();
        let left = |path: &str| dir.join(path).exists();
        assert!(left("round.lock") && left("rounds/round-00001/plan.json") && left(FILE) && !left(".tmp-abc"));
    }

    #[test]
    fn a_newer_layout_is_refused_in_words_and_left_alone() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), LAYOUT + 1);
        for refused in [check(root.path()), claim(root.path())] {
            let error = refused.unwrap_err().to_string();
            assert!(error.contains("was written by a newer taod (9.9.9, layout 2"), "{error}");
            assert!(error.contains("docs/runbooks/restore.md"), "{error}");
        }
        assert_eq!(durable::read_json::<Stamp>(&file(root.path())).unwrap().layout, LAYOUT + 1);
        fs::write(file(root.path()), "not json").unwrap();
        assert!(check(root.path()).unwrap_err().to_string().contains("layout.json is not the JSON expected"));
    }
}
