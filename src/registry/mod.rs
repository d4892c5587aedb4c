//! The registry: which adapters exist, where each came from, which one is served, and what was ever served before.
//!
//! Plain files under one folder, so that an operator can read them with `cat` and a backup is a copy:
//!
//! ```text
//! adapters/<version>/   the PEFT files, manifest.sig where versions are signed, and manifest.json written last:
//!                       without it the version does not exist
//! current.json          what is served, changed by one rename; absent means the base
//! intent.json           a promotion under way, removed when it is complete or aborted
//! frozen.json           why nothing is promoted, while somebody's freeze holds
//! canary.json           a version that some clients get beside the served one
//! base.json             the base model since it was changed; absent: the one of the first adapter
//! quarantine/<sha>.json weights that may never be served again, under whatever name
//! history.jsonl         every event, appended and fsynced
//! ```
//!
//! `current.json` and `intent.json` are the truth; the history is a record of it. A kill between any two writes leaves a
//! registry that reads, with the intent still there to be completed or aborted.

mod canary;
mod disk;
mod freeze;
mod history;
mod intent;
mod manifest;
mod settings;
mod signing;

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::durable::{self, FileError};
pub use canary::Canary;
pub use freeze::Freeze;
pub use history::{Event, Happened};
pub use intent::{Approval, Intent, Kind};
pub use manifest::{Base, Lineage, Manifest, OffsetRange, is_version};
pub use settings::{Alarm, Promotion, Settings};
pub use signing::check_folder;

use crate::signature::SignatureError;

/// The version name of the model without any adapter.
pub const BASE: &str = "base";

/// What a version is made of and where it came from, in its folder.
const MANIFEST: &str = "manifest.json";

/// Why the registry refuses something.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error(
        "adapter folder {folder} lacks {file}: give a PEFT folder with adapter_config.json and adapter_model.safetensors"
    )]
    NotPeft { folder: String, file: String },
    #[error("version {0} is not registered: `taod adapters list` shows what is")]
    Unknown(String),
    #[error(
        "file {file} of version {version} has SHA-256 {found}, not {expected}: restore it or import the adapter again"
    )]
    Corrupt { version: String, file: String, expected: String, found: String },
    #[error("the manifest of version {version} is that of another one ({why}): restore it or import the adapter again")]
    Manifest { version: String, why: String },
    #[error(transparent)]
    Signature(#[from] SignatureError),
    #[error("version {version} is quarantined ({reason}): train a new adapter")]
    Quarantined { version: String, reason: String },
    #[error("version {version} is what is served: roll back instead, which quarantines it")]
    Served { version: String },
    #[error("version {version} is served already")]
    AlreadyServed { version: String },
    #[error("trial {trial} was against {incumbent}, but {current} is served: its evidence does not apply")]
    OtherIncumbent { trial: String, incumbent: String, current: String },
    #[error("trial {trial} tried weights {tried} but version {version} has {registered}: the adapter was exchanged")]
    OtherWeights { trial: String, version: String, tried: String, registered: String },
    #[error("promotions are frozen by {by} ({reason}): end it with `taod gate thaw` when the reason is gone")]
    Frozen { by: String, reason: String },
    #[error(
        "version {version} was trained on {trained}, but the base model is {base} now: adapters of the former one are \
         refused; train anew"
    )]
    OtherBase { version: String, trained: String, base: String },
    #[error("{0} is the base model already: set model.path to the new one first")]
    SameBase(String),
    #[error("{current} is served and taod made it so: import the adapter with --register-only, then promote it")]
    InCharge { current: String },
    #[error("{0} % is no canary: give 1 to 50")]
    Percent(u8),
    #[error("version {0} is the canary already: stop it first")]
    OtherCanary(String),
    #[error("a promotion to {0} is under way: `taod adapters settle` completes or undoes it")]
    Underway(String),
    #[error("the promotion to {0} is not the one under way")]
    NotUnderway(String),
    #[error("nothing was served before {0}: there is nothing to roll back to")]
    NothingBefore(String),
    #[error("version {version} is taken by other weights ({registered}, not {new}): remove one of them")]
    Clash { version: String, registered: String, new: String },
}

/// What is served, as `current.json` holds it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Current {
    /// A version, or `base`.
    pub version: String,
    /// SHA-256 of the version's content; `None` for the base.
    pub sha256: Option<String>,
    /// The promotion that made it so.
    pub promotion: Option<String>,
    /// Since when, microseconds since the epoch.
    pub since_us: i64,
}

/// Weights that may never be served again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quarantine {
    pub version: String,
    pub sha256: String,
    pub weights_sha256: String,
    /// What it learnt from and the versions before it had not: no round trains on these records again.
    #[serde(default)]
    pub window: Vec<OffsetRange>,
    pub reason: String,
    pub time_us: i64,
}

/// One line of `taod adapters list`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Listed {
    pub version: String,
    pub served: bool,
    /// Why it is quarantined, where it is.
    pub quarantined: Option<String>,
    pub manifest: Manifest,
}

/// What a restart finds.
#[derive(Debug, Clone, PartialEq)]
pub enum Recovery {
    /// Nothing was under way.
    Clean,
    /// A promotion was interrupted before `current` moved: complete it where the alias moved, abort it otherwise.
    Underway(Intent),
    /// `current` had moved already: only the record is missing, so complete it.
    Moved(Intent),
}

/// A registry in a folder. Cheap to open; every call reads the disk, so that several processes agree.
#[derive(Debug, Clone, PartialEq)]
pub struct Registry {
    root: PathBuf,
    settings: Settings,
}

impl Registry {
    /// Opens the registry in `root` and makes its folders where they are missing.
    pub fn open(root: &Path, settings: &Settings) -> Result<Registry, RegistryError> {
        durable::create_folder(&root.join("adapters"))?;
        durable::create_folder(&root.join("quarantine"))?;
        // The group may pass through to the adapters, and list those.
        durable::admit_group(root, 0o010)?;
        durable::admit_group(&root.join("adapters"), 0o050)?;
        durable::sync_folder(root)?;
        Ok(Registry { root: root.to_path_buf(), settings: settings.clone() })
    }

    /// Opens the registry in `root` for who reads what is recorded there and loads nothing: no key is asked for.
    pub fn records(root: &Path) -> Result<Registry, RegistryError> {
        Registry::open(root, &Settings::default())
    }

    /// Returns the PEFT folder of a version.
    pub fn path(&self, version: &str) -> PathBuf {
        self.root.join("adapters").join(version)
    }

    /// Returns what is served.
    pub fn current(&self) -> Result<Current, RegistryError> {
        let base = Current { version: BASE.to_string(), sha256: None, promotion: None, since_us: 0 };
        Ok(absent_as(durable::read_json(&self.root.join("current.json")), base)?)
    }

    /// Returns the base model that adapters have to be trained on; `None` before the first of them.
    pub fn base(&self) -> Result<Option<Base>, RegistryError> {
        match absent_as(durable::read_json(&self.base_path()).map(Some), None)? {
            Some(base) => Ok(Some(base)),
            None => Ok(self.list()?.into_iter().next().map(|first| first.manifest.lineage.base)),
        }
    }

    /// Refuses a version of a former base model.
    fn fits_base(&self, manifest: &Manifest) -> Result<(), RegistryError> {
        match self.base()? {
            Some(base) if base.sha256 != manifest.lineage.base.sha256 => Err(RegistryError::OtherBase {
                version: manifest.version.clone(),
                trained: manifest.lineage.base.name.clone(),
                base: base.name,
            }),
            _ => Ok(()),
        }
    }

    /// Copies an adapter into the registry and returns its manifest. The same content is the same version: a repetition
    /// returns what is there, with its first lineage.
    pub fn register(&self, folder: &Path, lineage: Lineage) -> Result<Manifest, RegistryError> {
        let _lock = self.lock()?;
        let new = Manifest::of(folder, &self.settings.name_prefix, lineage)?;
        match self.manifest(&new.version) {
            Ok(there) if there.sha256 == new.sha256 => {
                there.check_files(&self.path(&there.version))?;
                self.record_registered(&there)?;
                return Ok(there);
            }
            Ok(there) => {
                return Err(RegistryError::Clash { version: new.version, registered: there.sha256, new: new.sha256 });
            }
            Err(RegistryError::Unknown(_)) => {}
            Err(other) => return Err(other),
        }
        let target = self.path(&new.version);
        durable::create_folder(&target)?;
        durable::admit_group(&target, 0o050)?;
        for name in new.files.keys() {
            disk::copy(&folder.join(name), &target.join(name))?;
            durable::admit_group(&target.join(name), 0o040)?;
        }
        durable::sync_folder(&self.root.join("adapters"))?;
        // Read back what was written: the manifest states what is in the registry, not what was in the folder.
        new.check_files(&target)?;
        self.write_signature(&new)?;
        disk::write_json(&target.join(MANIFEST), &new)?;
        durable::admit_group(&target.join(MANIFEST), 0o040)?;
        self.record_registered(&new)?;
        Ok(new)
    }

    fn record_registered(&self, manifest: &Manifest) -> Result<(), RegistryError> {
        let what = Happened::Registered { version: manifest.version.clone(), sha256: manifest.sha256.clone() };
        Ok(history::record(&self.history_path(), &Event { time_us: manifest.lineage.created_us, what })?)
    }

    /// Returns a registered version's manifest.
    pub fn manifest(&self, version: &str) -> Result<Manifest, RegistryError> {
        let unknown = || RegistryError::Unknown(version.to_string());
        if !manifest::is_version(version) {
            return Err(unknown());
        }
        match Manifest::read(&self.path(version)) {
            Err(RegistryError::File(error)) if error.is_not_found() => Err(unknown()),
            read => read,
        }
    }

    /// Returns true for a version that was registered here.
    pub fn knows(&self, version: &str) -> Result<bool, RegistryError> {
        match self.manifest(version) {
            Err(RegistryError::Unknown(_)) => Ok(false),
            read => read.map(|_| true),
        }
    }

    /// Hashes a version's files again and returns its manifest if they are what was registered and, where keys are
    /// trusted, one of these signed it. Whatever loads a version asks this first.
    pub fn verify(&self, version: &str) -> Result<Manifest, RegistryError> {
        let manifest = self.manifest(version)?;
        manifest.check_name(version)?;
        self.check_signature(&manifest)?;
        manifest.check_files(&self.path(version))?;
        Ok(manifest)
    }

    /// Returns all registered versions, oldest first.
    pub fn list(&self) -> Result<Vec<Listed>, RegistryError> {
        let folder = self.root.join("adapters");
        let entries = fs::read_dir(&folder).map_err(|e| FileError::io("cannot list", &folder, e))?;
        let current = self.current()?.version;
        let mut out = Vec::new();
        for entry in entries {
            let name = entry.map_err(|e| FileError::io("cannot list", &folder, e))?.file_name();
            let version = name.to_string_lossy().into_owned();
            let manifest = match self.manifest(&version) {
                // A folder without a manifest is a registration that never happened.
                Err(RegistryError::Unknown(_)) => continue,
                result => result?,
            };
            let quarantined = self.quarantine_of(&manifest)?.map(|q| q.reason);
            out.push(Listed { served: version == current, version, quarantined, manifest });
        }
        out.sort_by(|a, b| {
            (a.manifest.lineage.created_us, &a.version).cmp(&(b.manifest.lineage.created_us, &b.version))
        });
        Ok(out)
    }

    /// Returns every recorded event, oldest first.
    pub fn history(&self) -> Result<Vec<Event>, RegistryError> {
        Ok(history::read(&self.history_path())?)
    }

    /// Bars a version and everything with the same weights from being served.
    pub fn quarantine(&self, version: &str, reason: &str, time_us: i64) -> Result<(), RegistryError> {
        let _lock = self.lock()?;
        if self.current()?.version == version {
            return Err(RegistryError::Served { version: version.to_string() });
        }
        if self.intent()?.is_some_and(|open| open.to() == version) {
            return Err(RegistryError::Underway(version.to_string()));
        }
        if self.canary()?.is_some_and(|canary| canary.version == version) {
            return Err(RegistryError::OtherCanary(version.to_string()));
        }
        self.write_quarantine(version, reason, time_us)
    }

    fn write_quarantine(&self, version: &str, reason: &str, time_us: i64) -> Result<(), RegistryError> {
        let manifest = self.manifest(version)?;
        let entry = match self.quarantine_of(&manifest)? {
            Some(there) => there,
            None => {
                let weights_sha256 = manifest.weights_sha256().to_string();
                let window = self.window(&manifest)?;
                let (version, reason, sha256) = (version.to_string(), reason.to_string(), manifest.sha256);
                let path = self.root.join("quarantine").join(format!("{sha256}.json"));
                let entry = Quarantine { version, sha256, weights_sha256, window, reason, time_us };
                disk::write_json(&path, &entry)?;
                entry
            }
        };
        let what = Happened::Quarantined { version: entry.version, reason: entry.reason };
        Ok(history::record(&self.history_path(), &Event { time_us: entry.time_us, what })?)
    }

    /// Returns what a version learnt from and the one before it, of those that are not barred, had not.
    fn window(&self, manifest: &Manifest) -> Result<Vec<OffsetRange>, RegistryError> {
        let own = &manifest.lineage;
        let mut before = self.list()?.into_iter().filter(|listed| listed.quarantined.is_none());
        let before = before.rfind(|listed| listed.manifest.lineage.created_us < own.created_us);
        let seen = before.map(|listed| listed.manifest.lineage.offsets).unwrap_or_default();
        let fresh = |range: &OffsetRange| {
            let same = |old: &&OffsetRange| old.topic == range.topic && old.partition == range.partition;
            let from = seen.iter().find(same).map_or(range.from, |old| old.to.max(range.from));
            (from < range.to).then(|| OffsetRange { from, ..range.clone() })
        };
        Ok(own.offsets.iter().filter_map(fresh).collect())
    }

    /// Returns the records that no round may train on, because what learnt from them is barred.
    pub fn barred_records(&self) -> Result<Vec<OffsetRange>, RegistryError> {
        Ok(self.quarantines()?.into_iter().flat_map(|barred| barred.window).collect())
    }

    /// Returns the quarantine that bars these weights, if one does.
    fn quarantine_of(&self, manifest: &Manifest) -> Result<Option<Quarantine>, RegistryError> {
        let is_barred = |barred: &Quarantine| {
            barred.sha256 == manifest.sha256 || barred.weights_sha256 == manifest.weights_sha256()
        };
        Ok(self.quarantines()?.into_iter().find(is_barred))
    }

    fn quarantines(&self) -> Result<Vec<Quarantine>, RegistryError> {
        let folder = self.root.join("quarantine");
        let mut all = Vec::new();
        for entry in fs::read_dir(&folder).map_err(|e| FileError::io("cannot list", &folder, e))? {
            let path = entry.map_err(|e| FileError::io("cannot list", &folder, e))?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            all.push(durable::read_json(&path)?);
        }
        Ok(all)
    }

    fn base_path(&self) -> PathBuf {
        self.root.join("base.json")
    }

    fn history_path(&self) -> PathBuf {
        self.root.join("history.jsonl")
    }

    /// Takes the one turn to change what is served, until the returned file is dropped; `None` where someone has it.
    /// Whoever opens, carries out or settles an intent holds it, so that a change under way is not taken for one that
    /// was interrupted. The system gives it back when its process dies.
    pub fn turn(&self) -> Result<Option<File>, RegistryError> {
        let path = self.root.join("turn");
        let broken = |e| FileError::io("cannot lock", &path, e);
        let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(broken)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(broken(error).into()),
        }
    }

    /// Returns the registered versions that clients were led away from before `before_us` and that are not served now.
    pub fn retired(&self, before_us: i64) -> Result<Vec<String>, RegistryError> {
        let (current, history) = (self.current()?.version, self.history()?);
        let canary = self.canary()?.map(|canary| canary.version);
        let kept = |version: &str| {
            version == current
                || canary.as_deref() == Some(version)
                || history.iter().any(|event| event.time_us >= before_us && event.what.concerns(version))
        };
        Ok(self.list()?.into_iter().map(|listed| listed.version).filter(|version| !kept(version)).collect())
    }

    /// Keeps other processes from changing the registry until the returned file is dropped.
    fn lock(&self) -> Result<File, RegistryError> {
        let path = self.root.join("lock");
        let lock = || -> std::io::Result<File> {
            let file = File::options().create(true).truncate(false).write(true).open(&path)?;
            file.lock()?;
            Ok(file)
        };
        Ok(lock().map_err(|e| FileError::io("cannot lock", &path, e))?)
    }
}

/// Returns `default` where the file was not there.
fn absent_as<T>(result: Result<T, FileError>, default: T) -> Result<T, FileError> {
    match result {
        Err(error) if error.is_not_found() => Ok(default),
        result => result,
    }
}

#[cfg(test)]
mod tests;
