//! The record of an erasure: a plan while it runs, a receipt for ever.
//!
//! The plan names the subject and the hashes of its prompts, because a killed erasure could not be finished otherwise; it
//! is readable by its owner only, and removed once the erasure is complete. The receipt holds counts and hashes alone.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::{EraseError, hash_of, now};
use crate::durable::{self, FileError};
use crate::table::Name;

/// Whose rows go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Subject {
    /// An end user, as the log names it.
    User(String),
    /// Single requests.
    Requests(BTreeSet<String>),
    /// Rows of `queries` for which a condition in SQL holds.
    Where(String),
}

impl Subject {
    /// Returns the name of the kind.
    fn kind(&self) -> &'static str {
        match self {
            Subject::User(_) => "user",
            Subject::Requests(_) => "request_ids",
            Subject::Where(_) => "where",
        }
    }

    fn text(&self) -> String {
        match self {
            Subject::User(user) => user.clone(),
            Subject::Requests(ids) => ids.iter().cloned().collect::<Vec<_>>().join("\n"),
            Subject::Where(sql) => sql.clone(),
        }
    }

    /// Returns the byte strings by which a record that could not be read is known to be the subject's: the ids as they
    /// are, and as JSON writes them.
    pub(super) fn needles(&self) -> Vec<Vec<u8>> {
        let ids: Vec<&String> = match self {
            Subject::User(user) => vec![user],
            Subject::Requests(ids) => ids.iter().collect(),
            Subject::Where(_) => Vec::new(),
        };
        let mut needles = BTreeSet::new();
        for id in ids {
            needles.insert(id.as_bytes().to_vec());
            let quoted = serde_json::Value::String(id.clone()).to_string();
            needles.insert(quoted.as_bytes()[1..quoted.len() - 1].to_vec());
        }
        needles.into_iter().collect()
    }
}

/// What an erasure did to one table.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InTable {
    pub rows: u64,
    /// Data files that left the table.
    pub files_removed: u64,
    /// Those of them that have a successor with the rows of others.
    pub files_rewritten: u64,
    /// The first version without some of the rows, and the first without all of them.
    pub first_version: Option<u64>,
    pub last_version: Option<u64>,
    /// Files deleted that had left the table before, or never came into it.
    pub remains_deleted: u64,
}

/// What was erased: no text, no id.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receipt {
    pub id: String,
    /// False while the erasure is under way, or where it was interrupted: run it again.
    pub complete: bool,
    pub started: DateTime<Utc>,
    pub finished: Option<DateTime<Utc>>,
    pub subject: String,
    /// HMAC-SHA-256 of `erasure:` and the subject under ingest.user_key, or its SHA-256 where there is no key. It is not
    /// the hash that stands in the tables.
    pub subject_hash: String,
    pub tables: BTreeMap<String, InTable>,
    /// Entries added to the list of what is not read again.
    pub suppressed: u64,
    /// Rows of `queries` that name no user, which an erasure by user cannot judge.
    pub users_unknown: u64,
    /// Gate prompts of the subject that were used in trials; their scores stay.
    pub gate_clusters_used: u64,
    /// Rounds whose files held the rows.
    pub rounds: BTreeSet<String>,
    pub round_lines: u64,
    /// The round that was running on the rows and was stopped.
    pub stopped_round: Option<String>,
    /// Adapters trained by these rounds: they are not changed, and it is for the operator to withdraw them.
    pub adapters: BTreeSet<String>,
    pub taod_version: String,
}

impl Receipt {
    pub(super) fn begin(subject: &Subject, key: Option<&[u8]>) -> Receipt {
        Receipt {
            id: uuid::Uuid::now_v7().to_string(),
            complete: false,
            started: now(),
            finished: None,
            subject: subject.kind().to_owned(),
            subject_hash: hash_of(&subject.text(), key),
            tables: BTreeMap::new(),
            suppressed: 0,
            users_unknown: 0,
            gate_clusters_used: 0,
            rounds: BTreeSet::new(),
            round_lines: 0,
            stopped_round: None,
            adapters: BTreeSet::new(),
            taod_version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    /// Returns the counts of a table.
    pub(super) fn of(&mut self, name: Name) -> &mut InTable {
        self.tables.entry(name.spec().name.to_owned()).or_default()
    }
}

/// An erasure under way, as it stands on disk.
#[derive(Debug, Serialize, Deserialize)]
pub struct Plan {
    pub subject: Subject,
    /// Hashes of the prompts of the rows found so far.
    pub prompts: HashSet<String>,
    /// The Kafka records of the rows found so far.
    pub records: HashSet<(String, i32, i64)>,
    pub receipt: Receipt,
    #[serde(skip)]
    folder: PathBuf,
}

impl Plan {
    /// Returns the plan of an erasure of this subject that was interrupted, or a new one.
    pub(super) fn begin(folder: &Path, subject: Subject, key: Option<&[u8]>) -> Result<Plan, FileError> {
        if let Some(plan) = plans(folder)?.into_iter().find(|plan| plan.subject == subject) {
            return Ok(plan);
        }
        let receipt = Receipt::begin(&subject, key);
        let (prompts, records) = (HashSet::new(), HashSet::new());
        let plan = Plan { subject, prompts, records, receipt, folder: folder.to_path_buf() };
        plan.save()?;
        Ok(plan)
    }

    /// Returns the erasures that were interrupted: where their plan stands, and whose rows go.
    pub(super) fn left(folder: &Path) -> Result<Vec<(PathBuf, Subject)>, FileError> {
        Ok(plans(folder)?.into_iter().map(|plan| (plan.path(), plan.subject)).collect())
    }

    /// Writes plan and receipt as they stand.
    pub(super) fn save(&self) -> Result<(), FileError> {
        durable::write_json(&self.path(), self)?;
        durable::write_json(&self.receipt_path(), &self.receipt)
    }

    /// Completes the receipt and forgets the subject.
    pub(super) fn finish(mut self) -> Result<Receipt, FileError> {
        (self.receipt.complete, self.receipt.finished) = (true, Some(now()));
        durable::write_json(&self.receipt_path(), &self.receipt)?;
        let path = self.path();
        fs::remove_file(&path).map_err(|e| FileError::io("cannot remove", &path, e))?;
        durable::sync_folder(&self.folder)?;
        Ok(self.receipt)
    }

    fn path(&self) -> PathBuf {
        self.folder.join(format!("{}{PLAN}", self.receipt.id))
    }

    fn receipt_path(&self) -> PathBuf {
        self.folder.join(format!("{}.json", self.receipt.id))
    }
}

const PLAN: &str = ".plan";

/// Makes the folder, for its owner only, and takes the lock that keeps two erasures from working on one plan. The lock goes
/// with the returned file, also on a crash.
pub(super) fn lock(folder: &Path) -> Result<File, EraseError> {
    durable::create_folder(folder)?;
    let private = fs::Permissions::from_mode(0o700);
    fs::set_permissions(folder, private).map_err(|e| FileError::io("cannot close", folder, e))?;
    let path = folder.join("lock");
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let file = file.map_err(|e| FileError::io("cannot create", &path, e))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(_) => Err(EraseError::Busy { lock: path.display().to_string() }),
    }
}

fn plans(folder: &Path) -> Result<Vec<Plan>, FileError> {
    let mut plans = Vec::new();
    for entry in fs::read_dir(folder).map_err(|e| FileError::io("cannot list", folder, e))?.flatten() {
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(".tmp-") {
            // A killed write: it may hold the subject, and nobody reads it.
            fs::remove_file(&path).map_err(|e| FileError::io("cannot remove", &path, e))?;
        } else if name.ends_with(PLAN) {
            plans.push(Plan { folder: folder.to_path_buf(), ..durable::read_json(&path)? });
        }
    }
    plans.sort_by(|a, b| a.receipt.id.cmp(&b.receipt.id));
    Ok(plans)
}
