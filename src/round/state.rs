//! Where a round's files stand, and the plan that pins what the round is.
//!
//! A round is a folder. Its plan is written first and its outcome last; between them each stage leaves a folder of its
//! own whose manifest proves that it is complete. Whoever comes after a kill reads the same files and goes on.

use std::fs::{File, TryLockError};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{RoundError, StageReport};
use crate::durable;
use crate::engine::ModelIdentity;

/// How often the lock is tried: whoever only looks whether a round runs holds it for less than the time between two tries.
const TRIES: u32 = 4;
const PROBED: Duration = Duration::from_millis(50);

/// The state folder of one daemon.
#[derive(Debug, Clone)]
pub struct Paths {
    root: PathBuf,
}

impl Paths {
    /// Returns the paths below `root`; nothing is created.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Paths { root: root.into() }
    }

    /// Folder of the index of prompts; all of it can be made anew from the table `splits`.
    pub fn prompts(&self) -> PathBuf {
        self.root.join("prompts")
    }

    /// Folder of the first scores of the anchors, by scorer and identity.
    pub fn anchors(&self) -> PathBuf {
        self.root.join("anchors")
    }

    /// Root of the adapter registry.
    pub fn registry(&self) -> PathBuf {
        self.root.join("registry")
    }

    /// Folder of one round.
    pub fn round(&self, id: &str) -> PathBuf {
        self.root.join("rounds").join(id)
    }

    pub(super) fn rounds(&self) -> PathBuf {
        self.root.join("rounds")
    }

    /// Takes the lock that keeps two rounds from running at a time; it goes with the returned file, also on a crash.
    pub fn lock(&self) -> Result<File, RoundError> {
        durable::create_folder(&self.root)?;
        let path = self.lock_file();
        let fail = |e| durable::FileError::io("cannot create", &path, e);
        let mut file = File::options().create(true).truncate(false).write(true).open(&path).map_err(fail)?;
        let mut tries = 0;
        while let Err(error) = file.try_lock() {
            tries += 1;
            if tries == TRIES || matches!(error, TryLockError::Error(_)) {
                return Err(RoundError::Busy { lock: path.display().to_string() });
            }
            std::thread::sleep(PROBED);
        }
        // Who holds it, for whoever has to stop this round.
        file.set_len(0).and_then(|()| write!(file, "{}", std::process::id())).map_err(fail)?;
        Ok(file)
    }

    /// Tells whether a round runs, by taking its lock for a moment.
    pub fn probe(&self) -> Result<(), TryLockError> {
        match File::open(self.lock_file()) {
            Ok(file) => file.try_lock(),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Err(error) => Err(TryLockError::Error(error)),
        }
    }

    /// The file by which the daemon asks for a round that runs in a unit of its own; the round takes it away when it has its
    /// lock.
    pub fn due(&self) -> PathBuf {
        self.root.join("round.due")
    }

    /// The file that is locked while a round runs; it holds the number of the round's process.
    pub(super) fn lock_file(&self) -> PathBuf {
        self.root.join("round.lock")
    }

    /// The file that says how far the running step is.
    pub(super) fn live(&self) -> PathBuf {
        self.root.join("round.live.json")
    }

    /// Folder of the receipts of erasures, and of what is still to be erased.
    pub fn erasures(&self) -> PathBuf {
        self.root.join("erasures")
    }

    /// Returns the ids of all rounds, oldest first.
    pub fn round_ids(&self) -> Result<Vec<String>, RoundError> {
        let folder = self.rounds();
        if !folder.exists() {
            return Ok(Vec::new());
        }
        let entries = std::fs::read_dir(&folder).map_err(|e| durable::FileError::io("cannot list", &folder, e))?;
        let mut ids: Vec<String> = entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|id| folder.join(id).join(PLAN).exists())
            .collect();
        ids.sort();
        Ok(ids)
    }

    /// Returns the newest round that has a plan but no outcome. One that an erasure took rows from is over.
    pub fn unfinished(&self) -> Result<Option<String>, RoundError> {
        let ids = self.round_ids()?;
        let is_open = |id: &String| [OUTCOME, ERASED].iter().all(|file| !self.round(id).join(file).exists());
        Ok(ids.into_iter().rev().find(is_open))
    }

    /// Returns the id the next round takes.
    pub fn next_round(&self) -> Result<String, RoundError> {
        let last = self.round_ids()?.last().and_then(|id| id.strip_prefix("round-")?.parse::<u32>().ok()).unwrap_or(0);
        Ok(format!("round-{:05}", last + 1))
    }
}

/// Name of the file that begins a round.
pub(super) const PLAN: &str = "plan.json";
/// Name of the file that ends a round.
pub(super) const OUTCOME: &str = "outcome.json";

/// Name of the file that marks a round whose files lost rows to an erasure; it names the receipts.
pub(super) const ERASED: &str = "erased.json";

/// Name of the file with what each finished stage did.
pub(super) const STAGES: &str = "stages.json";

/// A deliberate fault of the demo: each must end in a refusal, or the gate proves nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Control {
    /// Rewards are permuted within each group, so that training follows noise.
    ShuffledRewards,
    /// The new adapter is tried against itself.
    SameAdapter,
    /// Training and gate both reward shortness.
    LengthReward,
}

/// What a round is: fixed when it begins, compared when it is resumed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    pub round: String,
    /// Root of every seed of the round.
    pub seed: u64,
    pub base: ModelIdentity,
    /// SHA-256 of the settings that decide the round's bytes.
    pub settings_sha256: String,
    /// Hash of all that decides a score: weights, rules, calibration, not only their paths.
    #[serde(default)]
    pub rewards: String,
    /// Threads the kernels ran with: sums in another order give other bytes.
    pub threads: usize,
    pub control: Option<Control>,
    pub created_us: i64,
    pub taod_version: String,
    /// What the operator let differ when the round was resumed, in words. Its bytes cannot be had again then.
    #[serde(default)]
    pub accepted_drift: Vec<String>,
}

impl Plan {
    /// Returns what differs from the conditions the round began under; refused where the operator does not allow it,
    /// since the round would give other bytes.
    pub fn drift(&self, now: &Plan, allowed: bool) -> Result<Vec<String>, RoundError> {
        let differs = [
            ("base model", self.base != now.base),
            ("settings", self.settings_sha256 != now.settings_sha256),
            ("rewards", self.rewards != now.rewards),
            ("seed", self.seed != now.seed),
            ("number of threads", self.threads != now.threads),
            ("control", self.control != now.control),
            ("version of taod", self.taod_version != now.taod_version),
        ];
        let what: Vec<String> =
            differs.iter().filter(|(_, differs)| *differs).map(|(what, _)| what.to_string()).collect();
        match what.is_empty() || allowed {
            true => Ok(what),
            false => Err(RoundError::Drift { round: self.round.clone(), what: what.join(", ") }),
        }
    }
}

/// Reads the plan of a round that was begun.
pub(super) fn read_plan(folder: &Path) -> Result<Plan, RoundError> {
    Ok(durable::read_json(&folder.join(PLAN))?)
}

/// Reads what the finished stages of a round did; nothing for a new round.
pub(super) fn read_stages(folder: &Path) -> Result<Vec<StageReport>, RoundError> {
    match durable::read_json(&folder.join(STAGES)) {
        Err(error) if error.is_not_found() => Ok(Vec::new()),
        read => Ok(read?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_round_runs_at_a_time() {
        let root = tempfile::tempdir().unwrap();
        let paths = Paths::new(root.path());
        let held = paths.lock().unwrap();
        assert!(matches!(paths.lock(), Err(RoundError::Busy { .. })));
        drop(held);
        assert!(paths.lock().is_ok());
    }

    #[test]
    fn rounds_are_numbered_and_an_unfinished_one_is_found() {
        let root = tempfile::tempdir().unwrap();
        let paths = Paths::new(root.path());
        assert_eq!(paths.next_round().unwrap(), "round-00001");
        for id in ["round-00001", "round-00002"] {
            durable::create_folder(&paths.round(id)).unwrap();
            durable::write_json(&paths.round(id).join(PLAN), &0).unwrap();
        }
        durable::write_json(&paths.round("round-00002").join(OUTCOME), &0).unwrap();
        assert_eq!(paths.unfinished().unwrap().as_deref(), Some("round-00001"));
        assert_eq!(paths.next_round().unwrap(), "round-00003");
    }
}
