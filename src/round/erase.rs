//! What an erasure does to rounds: the running one that reads the rows is stopped, and the files of all lose them.
//!
//! A round whose files lost rows is marked before they do, so that it is never resumed from what is left, and gets a row
//! `erased` in `rounds`. Its hashes and scores stay; its manifests no longer fit its files, which is the point.

use std::collections::{BTreeSet, HashSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::state::ERASED;
use super::{Paths, RoundError, book, rows};
use crate::dataset::synthetic;
use crate::durable::{self, FileError};
use crate::table::{Name, Tables};

/// How long a round's process may take to end after it was told to, before it is killed.
const PATIENCE: Duration = Duration::from_secs(10);

/// What an erasure found in, or took from, the rounds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rounds {
    /// The rounds whose files hold, or held, the rows.
    pub rounds: BTreeSet<String>,
    /// Lines taken out of their files.
    pub lines: u64,
    /// The round that was running on them and was stopped.
    pub stopped: Option<String>,
    /// Prompts that were made from them, and questions that showed them: as much the subject's.
    #[serde(skip)]
    pub made: HashSet<String>,
}

/// Returns the rounds whose files name one of the prompts; changes nothing.
pub fn find(paths: &Paths, prompts: &HashSet<String>) -> Result<BTreeSet<String>, RoundError> {
    let mut found = BTreeSet::new();
    for id in folders(paths)? {
        let mut hit = false;
        for file in files(&paths.round(&id))?.iter().filter(|file| is_lines(file)) {
            hit = hit || read(file)?.lines().any(|line| is_of(line, prompts));
        }
        if hit {
            found.insert(id);
        }
    }
    Ok(found)
}

/// Takes the prompts out of all rounds, stopping a running one that reads them or may be about to.
pub async fn erase(
    paths: &Paths,
    tables: &Tables,
    prompts: &HashSet<String>,
    receipt: &str,
) -> Result<Rounds, RoundError> {
    let mut done = Rounds::default();
    if prompts.is_empty() {
        // No file of a round can be concerned, and none is stopped for nothing.
        return Ok(done);
    }
    let lock = match paths.lock() {
        Ok(lock) => Some(lock),
        Err(RoundError::Busy { .. }) => {
            let running = paths.unfinished()?;
            let reads = match &running {
                // Between its start and the end of freezing nobody can say what it has read.
                Some(id) => {
                    !paths.round(id).join("dataset/manifest.json").exists() || find(paths, prompts)?.contains(id)
                }
                None => true,
            };
            if reads { Some(stop(paths, &mut done, running)?) } else { None }
        }
        Err(other) => return Err(other),
    };
    if lock.is_some() {
        remove_left_over(paths)?;
    }
    // Not before: until it was stopped, a round may have made more.
    done.made = made(paths, tables, prompts).await?;
    let prompts: &HashSet<String> = &prompts.union(&done.made).cloned().collect();
    let mut affected = find(paths, prompts)?;
    affected.extend(folders(paths)?.into_iter().filter(|id| receipts(paths, id).iter().any(|named| named == receipt)));
    for id in affected {
        done.lines += scrub(paths, &id, prompts, receipt)?;
        let app_id = format!("taod/rounds/{id}/erased/{receipt}");
        let row = rows::RoundRow::new(&id, "erased", 0, json!({ "receipt": receipt }));
        book::append_once(tables, Name::Rounds, &app_id, &[row]).await?;
        done.rounds.insert(id);
    }
    drop(lock);
    Ok(done)
}

/// Returns the prompts that were made from some, and the questions by which they were asked for.
pub async fn made(paths: &Paths, tables: &Tables, prompts: &HashSet<String>) -> Result<HashSet<String>, RoundError> {
    let mut made = synthetic::children(tables, prompts).await?;
    for id in folders(paths)? {
        let folder = paths.round(&id).join(super::SYNTHETIC);
        if !folder.exists() {
            continue;
        }
        for file in files(&folder)?.iter().filter(|file| is_lines(file)) {
            for line in read(file)?.lines() {
                let about: Option<synthetic::AskLine> = serde_json::from_str(line).ok();
                let about = about.filter(|about| about.sources.iter().any(|source| prompts.contains(source)));
                made.extend(about.map(|about| about.prompt_hash));
            }
        }
    }
    Ok(made)
}

/// Ends the process that runs a round and returns the lock it held.
fn stop(paths: &Paths, done: &mut Rounds, running: Option<String>) -> Result<File, RoundError> {
    for signal in ["-TERM", "-KILL"] {
        let path = paths.lock_file();
        if let Some(process) = holder(&path) {
            tracing::warn!(process, signal, "stopping the round: rows that it reads are being erased");
            let status = Command::new("kill").args([signal, &process.to_string()]).status();
            status.map_err(RoundError::Spawn)?;
        }
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until {
            match paths.lock() {
                Ok(lock) => {
                    done.stopped = running;
                    return Ok(lock);
                }
                Err(RoundError::Busy { .. }) => std::thread::sleep(Duration::from_millis(50)),
                Err(other) => return Err(other),
            }
        }
    }
    Err(RoundError::Busy { lock: paths.lock_file().display().to_string() })
}

/// Returns the process that holds the lock. Where the system can tell, its word is taken against that of the file, which
/// for an instant names the holder before.
fn holder(lock: &Path) -> Option<u32> {
    let process: u32 = fs::read_to_string(lock).ok()?.trim().parse().ok()?;
    let open = match fs::read_dir(format!("/proc/{process}/fd")) {
        Ok(open) => open,
        Err(_) if Path::new("/proc/self/fd").exists() => return None,
        Err(_) => return Some(process),
    };
    let lock = fs::canonicalize(lock).ok()?;
    let holds = open.flatten().any(|entry| fs::read_link(entry.path()).is_ok_and(|target| target == lock));
    holds.then_some(process)
}

/// Marks a round and takes the prompts out of its files; returns how many lines went.
fn scrub(paths: &Paths, id: &str, prompts: &HashSet<String>, receipt: &str) -> Result<u64, RoundError> {
    let folder = paths.round(id);
    let mut named = receipts(paths, id);
    if !named.iter().any(|name| name == receipt) {
        named.push(receipt.to_owned());
        durable::write_json(&folder.join(ERASED), &json!({ "receipts": named }))?;
    }
    let mut gone = 0;
    for file in files(&folder)? {
        if is_left_over(&file) {
            fs::remove_file(&file).map_err(|e| FileError::io("cannot remove", &file, e))?;
        } else if is_lines(&file) {
            let text = read(&file)?;
            let kept: Vec<&str> = text.lines().filter(|line| !is_of(line, prompts)).collect();
            let lost = text.lines().count() - kept.len();
            if lost > 0 {
                let kept: String = kept.into_iter().flat_map(|line| [line, "\n"]).collect();
                durable::write(&file, kept.as_bytes())?;
                gone += lost as u64;
            }
        }
    }
    Ok(gone)
}

/// Removes what killed writes left behind in any round, while none runs.
fn remove_left_over(paths: &Paths) -> Result<(), RoundError> {
    if !paths.rounds().exists() {
        return Ok(());
    }
    for file in files(&paths.rounds())?.iter().filter(|file| is_left_over(file)) {
        fs::remove_file(file).map_err(|e| FileError::io("cannot remove", file, e))?;
    }
    Ok(())
}

/// Returns true for what a killed write left behind: nobody reads it, and it may hold anything.
fn is_left_over(file: &Path) -> bool {
    file.file_name().is_some_and(|name| name.to_string_lossy().starts_with(".tmp-"))
}

/// Returns the erasures that took rows from a round before.
fn receipts(paths: &Paths, id: &str) -> Vec<String> {
    let mark: Value = durable::read_json(&paths.round(id).join(ERASED)).unwrap_or_default();
    let named = mark["receipts"].as_array().into_iter().flatten();
    named.filter_map(|name| Some(name.as_str()?.to_owned())).collect()
}

/// Returns true for a line about one of the prompts.
fn is_of(line: &str, prompts: &HashSet<String>) -> bool {
    #[derive(Deserialize)]
    struct About {
        prompt_hash: String,
    }
    serde_json::from_str::<About>(line).is_ok_and(|about| prompts.contains(&about.prompt_hash))
}

fn is_lines(file: &Path) -> bool {
    file.extension().is_some_and(|extension| extension == "jsonl")
}

fn read(file: &Path) -> Result<String, FileError> {
    match fs::read_to_string(file) {
        // A running round renames its files into place.
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
        read => read.map_err(|e| FileError::io("cannot read", file, e)),
    }
}

/// Returns the names of all folders of rounds, also of those that were never planned to the end.
fn folders(paths: &Paths) -> Result<Vec<String>, RoundError> {
    let folder = paths.rounds();
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let entries = fs::read_dir(&folder).map_err(|e| FileError::io("cannot list", &folder, e))?;
    Ok(entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect())
}

/// Returns all files below a folder.
fn files(folder: &Path) -> Result<Vec<PathBuf>, RoundError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(|e| FileError::io("cannot list", folder, e))?.flatten() {
        let path = entry.path();
        match path.is_dir() {
            true => found.extend(files(&path)?),
            false => found.push(path),
        }
    }
    Ok(found)
}
