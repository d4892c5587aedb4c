//! What a registered adapter is made of and where it came from.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::RegistryError;
use crate::durable;

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// Hex digits of the content hash in a version's name: enough that no two adapters of an endpoint ever share one.
const DIGITS: usize = 12;

/// The model that an adapter was trained on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    pub name: String,
    pub sha256: String,
}

/// Which records of the log an adapter may have learnt from, end exclusive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OffsetRange {
    pub topic: String,
    pub partition: i32,
    pub from: i64,
    pub to: i64,
}

impl OffsetRange {
    /// Returns true where the record at these coordinates is one of them.
    pub fn holds(&self, topic: &str, partition: i32, offset: i64) -> bool {
        self.topic == topic && self.partition == partition && (self.from..self.to).contains(&offset)
    }
}

/// Where an adapter came from: enough to make it again, or to find every adapter that saw a record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Lineage {
    pub base: Base,
    /// The round that trained it; `None` for an import.
    pub round: Option<String>,
    /// SHA-256 of the dataset's manifest.
    pub dataset_sha256: Option<String>,
    /// Version of each table that the dataset was frozen at.
    pub tables: BTreeMap<String, u64>,
    pub offsets: Vec<OffsetRange>,
    /// Anything else worth keeping: settings' hash, seed, the start of the training.
    #[serde(default)]
    pub notes: BTreeMap<String, String>,
    /// Microseconds since the epoch; told by the caller.
    pub created_us: i64,
}

/// A registered adapter: `manifest.json` in its folder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// The unique name under which it is served.
    pub version: String,
    /// SHA-256 over the names and hashes of its files: the identity that the gate tries.
    pub sha256: String,
    /// SHA-256 of each file.
    pub files: BTreeMap<String, String>,
    pub lineage: Lineage,
}

impl Manifest {
    /// Returns the manifest of the PEFT folder `folder`. Only PEFT's two files belong to an adapter.
    pub(super) fn of(folder: &Path, prefix: &str, lineage: Lineage) -> Result<Manifest, RegistryError> {
        let mut files = BTreeMap::new();
        for name in [CONFIG, WEIGHTS] {
            match durable::sha256_file(&folder.join(name)) {
                Err(error) if error.is_not_found() => {
                    return Err(RegistryError::NotPeft {
                        folder: folder.display().to_string(),
                        file: name.to_string(),
                    });
                }
                hash => files.insert(name.to_string(), hash?),
            };
        }
        let sha256 = content_hash(&files);
        Ok(Manifest { version: format!("{prefix}-{}", &sha256[..DIGITS]), sha256, files, lineage })
    }

    /// Reads the manifest in a registered version's folder.
    pub fn read(folder: &Path) -> Result<Manifest, RegistryError> {
        Ok(durable::read_json(&folder.join(super::MANIFEST))?)
    }

    /// Refuses a manifest that is not the one of the version in whose folder it lies: the name follows from the files.
    pub(super) fn check_name(&self, version: &str) -> Result<(), RegistryError> {
        let refuse = |why: String| Err(RegistryError::Manifest { version: version.to_owned(), why });
        if self.version != version {
            return refuse(format!("it says {}", self.version));
        }
        if content_hash(&self.files) != self.sha256 || !version.ends_with(&self.sha256[..DIGITS.min(self.sha256.len())])
        {
            return refuse("its hashes do not make its name".to_owned());
        }
        Ok(())
    }

    /// Refuses a folder whose files are not those of the manifest.
    pub(super) fn check_files(&self, folder: &Path) -> Result<(), RegistryError> {
        for (file, expected) in &self.files {
            let found = durable::sha256_file(&folder.join(file))?;
            if found != *expected {
                let (version, file, expected) = (self.version.clone(), file.clone(), expected.clone());
                return Err(RegistryError::Corrupt { version, file, expected, found });
            }
        }
        Ok(())
    }

    /// Returns the hash of the weights alone.
    pub fn weights_sha256(&self) -> &str {
        self.files.get(WEIGHTS).map_or("", String::as_str)
    }
}

/// Returns the hash over the names and hashes of files.
fn content_hash(files: &BTreeMap<String, String>) -> String {
    let mut hasher = Sha256::new();
    for (name, hash) in files {
        hasher.update(format!("{name} {hash}\n"));
    }
    hex::encode(hasher.finalize())
}

/// Returns true for a name that a registry could have given, whatever its prefix: never a path out of its folder.
pub fn is_version(name: &str) -> bool {
    let parts = name.rsplit_once('-');
    parts.is_some_and(|(prefix, hex)| {
        is_prefix(prefix) && hex.len() == DIGITS && hex.bytes().all(|b| b.is_ascii_hexdigit())
    })
}

/// Returns true for what versions' names may begin with: model servers and file systems take it as it is.
pub(super) fn is_prefix(prefix: &str) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    (1..=32).contains(&prefix.len())
        && prefix.starts_with(|c: char| c.is_ascii_lowercase())
        && prefix.bytes().all(plain)
}
