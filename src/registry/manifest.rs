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
const PREFIX: &str = "taod-";

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
    pub(super) fn of(folder: &Path, lineage: Lineage) -> Result<Manifest, RegistryError> {
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
        let mut hasher = Sha256::new();
        for (name, hash) in &files {
            hasher.update(format!("{name} {hash}\n"));
        }
        let sha256 = hex::encode(hasher.finalize());
        Ok(Manifest { version: format!("{PREFIX}{}", &sha256[..DIGITS]), sha256, files, lineage })
    }

    /// Returns the hash of the weights alone.
    pub fn weights_sha256(&self) -> &str {
        self.files.get(WEIGHTS).map_or("", String::as_str)
    }
}

/// Returns true for a name that the registry itself could have given: never a path out of its folder.
pub(super) fn is_version(name: &str) -> bool {
    name.strip_prefix(PREFIX).is_some_and(|hex| hex.len() == DIGITS && hex.bytes().all(|b| b.is_ascii_hexdigit()))
}
