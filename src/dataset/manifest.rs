//! The files of a frozen dataset: three lists of prompts, and the manifest that makes them one.
//!
//! The manifest is written last and holds the hashes of the others and its own. What is read back is checked against
//! it: a list that was edited or swapped is refused, and so is a cluster in two splits.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::durable;

use super::{Assembled, Burst, Dataset, DatasetError, Prompt, Settings, SplitOf};

const MANIFEST: &str = "manifest.json";

/// Where a dataset comes from.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Inputs {
    /// Version of each table that was read.
    pub tables: BTreeMap<String, u64>,
    /// The rows that were read, as ranges of Kafka offsets by `topic/partition`.
    pub offsets: BTreeMap<String, OffsetRange>,
}

/// First and last offset, both included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct OffsetRange {
    pub first: i64,
    pub last: i64,
}

/// One list of prompts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    pub prompts: u64,
    pub clusters: u64,
    /// Rows of the log that the prompts stand for.
    pub rows: u64,
    pub sha256: String,
}

/// What a dataset is and how it was made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    pub round: String,
    pub seed: u64,
    pub settings: Settings,
    pub inputs: Inputs,
    /// Rows of the log that were read: those of the prompts and those excluded.
    pub rows: u64,
    /// Rows left out, by reason.
    pub excluded: BTreeMap<String, u64>,
    /// Rows left out for secrets and personal data, by kind; a row with two kinds counts under both.
    #[serde(default)]
    pub masked: BTreeMap<String, u64>,
    /// Training prompts, by why they were drawn.
    #[serde(default)]
    pub drawn: BTreeMap<String, u64>,
    /// Users and hours whose calls were left out as `burst`, the largest first.
    #[serde(default)]
    pub quarantine: Vec<Burst>,
    pub train: Part,
    pub gate: Part,
    pub audit: Part,
    /// SHA-256 of this manifest with an empty hash.
    pub hash: String,
}

impl Manifest {
    /// Returns why there is too little to train on together with so many made prompts, or `None` where there is enough.
    pub fn shortfall(&self, made: u64) -> Option<String> {
        let (logged, needed) = (self.train.prompts, self.settings.min_train_prompts as u64);
        let made_too = if made > 0 { format!(" and {made} made ones") } else { String::new() };
        let why = || format!("{logged} training prompts{made_too}, fewer than min_train_prompts ({needed})");
        (logged + made < needed).then(why)
    }

    fn own_hash(&self) -> Result<String, durable::FileError> {
        let bare = Manifest { hash: String::new(), ..self.clone() };
        let json = serde_json::to_vec(&bare)
            .map_err(|source| durable::FileError::Json { path: MANIFEST.to_owned(), source })?;
        Ok(hex::encode(Sha256::digest(&json)))
    }
}

/// Returns the SHA-256 of a manifest, as JSON, with an empty hash.
fn hash_of(manifest: &serde_json::Value) -> Result<String, durable::FileError> {
    let mut bare = manifest.clone();
    bare["hash"] = serde_json::Value::String(String::new());
    let json =
        serde_json::to_vec(&bare).map_err(|source| durable::FileError::Json { path: MANIFEST.to_owned(), source })?;
    Ok(hex::encode(Sha256::digest(&json)))
}

/// Returns true where `out` holds a complete dataset.
pub(super) fn exists(out: &Path) -> bool {
    out.join(MANIFEST).exists()
}

/// Returns what a complete dataset is, without reading its prompts; nothing where `out` holds none.
pub fn peek(out: &Path) -> Result<Option<Manifest>, DatasetError> {
    match durable::read_json(&out.join(MANIFEST)) {
        Err(error) if error.is_not_found() => Ok(None),
        read => Ok(Some(read?)),
    }
}

/// Returns the manifest of a dataset whose files are not written yet: without any hash.
pub(super) fn draft(round: &str, inputs: Inputs, assembled: &Assembled, settings: &Settings, seed: u64) -> Manifest {
    Manifest {
        round: round.to_owned(),
        seed,
        settings: settings.clone(),
        inputs,
        rows: assembled.rows,
        excluded: assembled.excluded.clone(),
        masked: assembled.masked.clone(),
        drawn: assembled.drawn.clone(),
        quarantine: assembled.quarantine.clone(),
        train: part(&assembled.train),
        gate: part(&assembled.gate),
        audit: part(&assembled.audit),
        hash: String::new(),
    }
}

/// Counts the prompts of one split.
fn part<P>(split: &SplitOf<P>) -> Part {
    Part {
        prompts: split.len() as u64,
        clusters: split.clusters().len() as u64,
        rows: split.iter().map(|prompt| prompt.count).sum(),
        sha256: String::new(),
    }
}

/// Writes a dataset's files into `out`, the manifest last. The same input gives the same bytes.
pub fn store(
    out: &Path,
    round: &str,
    inputs: Inputs,
    assembled: Assembled,
    settings: &Settings,
    seed: u64,
) -> Result<Dataset, DatasetError> {
    durable::create_folder(out)?;
    let mut manifest = draft(round, inputs, &assembled, settings, seed);
    manifest.train = write_part(out, "train", &assembled.train)?;
    manifest.gate = write_part(out, "gate", &assembled.gate)?;
    manifest.audit = write_part(out, "audit", &assembled.audit)?;
    manifest.hash = manifest.own_hash()?;
    let dataset = checked(out, manifest, assembled.train, assembled.gate, assembled.audit)?;
    durable::write_json(&out.join(MANIFEST), &dataset.manifest)?;
    Ok(dataset)
}

/// Reads a dataset's files and checks them against its manifest.
pub fn load(out: &Path) -> Result<Dataset, DatasetError> {
    let path = out.join(MANIFEST);
    let json: serde_json::Value = durable::read_json(&path)?;
    // Of the file and not of what is read of it: an older taod's manifest lacks fields, and is whole all the same.
    let found = hash_of(&json)?;
    let manifest: Manifest = serde_json::from_value(json)
        .map_err(|source| durable::FileError::Json { path: path.display().to_string(), source })?;
    if found != manifest.hash {
        return Err(DatasetError::Changed { path, expected: manifest.hash, found });
    }
    let train = SplitOf::new(read_part(out, "train", &manifest.train)?);
    let gate = SplitOf::new(read_part(out, "gate", &manifest.gate)?);
    let audit = SplitOf::new(read_part(out, "audit", &manifest.audit)?);
    checked(out, manifest, train, gate, audit)
}

fn write_part<P>(out: &Path, name: &str, split: &SplitOf<P>) -> Result<Part, DatasetError> {
    let path = out.join(format!("{name}.jsonl"));
    let prompts: Vec<&Prompt> = split.iter().collect();
    durable::write_json_lines(&path, &prompts)?;
    Ok(Part { sha256: durable::sha256_file(&path)?, ..part(split) })
}

fn read_part(out: &Path, name: &str, part: &Part) -> Result<Vec<Prompt>, DatasetError> {
    let path = out.join(format!("{name}.jsonl"));
    let found = durable::sha256_file(&path)?;
    if found != part.sha256 {
        return Err(DatasetError::Changed { path, expected: part.sha256.clone(), found });
    }
    Ok(durable::read_json_lines(&path)?)
}

/// Puts a dataset together where no cluster is in two splits.
fn checked(
    out: &Path,
    manifest: Manifest,
    train: super::TrainSplit,
    gate: super::GateSplit,
    audit: super::AuditSplit,
) -> Result<Dataset, DatasetError> {
    let clusters = [("train", train.clusters()), ("gate", gate.clusters()), ("audit", audit.clusters())];
    for (i, (first, ours)) in clusters.iter().enumerate() {
        for (second, theirs) in &clusters[i + 1..] {
            if let Some(cluster) = ours.intersection(theirs).next() {
                let cluster = (*cluster).to_owned();
                return Err(DatasetError::Leak { path: out.to_owned(), cluster, first, second });
            }
        }
    }
    Ok(Dataset { manifest, train, gate, audit })
}
