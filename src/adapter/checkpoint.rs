//! The state of a run on disk: matrices, moments and place, from which it goes on as if it had never stopped.
//!
//! The state file is written under a new name, then the manifest that names it and its hash, then older state files are
//! removed; so the manifest always points at a whole state.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use candle_core::{Device, Tensor};
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::optimizer::AdamW;
use super::{Frozen, Sample, Settings, StepLog, TuneError};
use crate::durable::{self, FileError};
use crate::engine::train::{LoraMatrices, Matrix};
use crate::engine::{Adapter, Hold, LoraSpec, WeightForm};

const MANIFEST: &str = "manifest.json";
const PEFT_CONFIG: &str = "adapter_config.json";
const FRESH: &str = "give another output folder, or delete this one";

/// Everything that a run's bytes depend on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Origin {
    /// SHA-256 of the base's weights.
    pub base: String,
    pub lora: LoraSpec,
    /// SHA-256 of the settings.
    pub settings: String,
    pub seed: u64,
    /// SHA-256 of the samples.
    pub samples: String,
    /// SHA-256 of the state that the run started from.
    pub start: Option<String>,
    /// Sums are split over threads, so their last bits depend on the count.
    pub threads: usize,
    /// The form of the frozen weights, which `auto` chooses by the processor.
    #[serde(default)]
    pub form: WeightForm,
    /// Matrices that are widened part by part are summed in another order.
    #[serde(default)]
    pub hold: Hold,
    /// The device that computed and its precision, where that is not the processor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
}

impl Origin {
    /// Describes a run before it starts, and refuses a start that is of another base or shape.
    pub fn new(
        frozen: Frozen,
        settings: &Settings,
        seed: u64,
        samples: &[Sample],
        start: Option<&Checkpoint>,
    ) -> Result<Self, TuneError> {
        let hold = frozen.weights.hold();
        let origin = Origin {
            base: frozen.identity.sha256.clone(),
            lora: settings.lora(),
            settings: hash(settings)?,
            seed,
            samples: hash(samples)?,
            start: start.map(|start| start.sha256.clone()),
            threads: rayon::current_num_threads(),
            form: frozen.form(settings),
            hold,
            device: frozen.place(),
        };
        if let Some(start) = start {
            let remedy = "start from a run or an adapter of the same base and LoRA settings, or from none";
            let path = format!("the start {}", start.sha256);
            differs(&path, "the base", &start.origin.base, &origin.base, remedy)?;
            if !start.origin.lora.computes_as(&origin.lora) {
                differs(&path, "the LoRA shape", &start.origin.lora, &origin.lora, remedy)?;
            }
        }
        Ok(origin)
    }

    /// Refuses to go on with `self` where the run at hand is `other`.
    pub fn expect(&self, other: &Origin, folder: &Path) -> Result<(), TuneError> {
        let path = folder.display().to_string();
        differs(&path, "the base", &self.base, &other.base, FRESH)?;
        differs(&path, "the LoRA shape", &self.lora, &other.lora, FRESH)?;
        differs(&path, "the hash of the settings", &self.settings, &other.settings, FRESH)?;
        differs(&path, "the seed", &self.seed, &other.seed, FRESH)?;
        differs(&path, "the hash of the samples", &self.samples, &other.samples, FRESH)?;
        differs(&path, "the start", &self.start, &other.start, FRESH)?;
        differs(&path, "the thread count", &self.threads, &other.threads, "set the same limit of threads")?;
        differs(&path, "the precision", &self.form, &other.form, "set tuning.precision as it was")?;
        differs(&path, "the hold of the model", &self.hold, &other.hold, "set model.hold as it was")?;
        differs(&path, "the device", &self.device, &other.device, "set engine.device and engine.dtype as they were")
    }
}

fn differs<T: PartialEq + std::fmt::Debug>(
    path: &str,
    what: &'static str,
    found: &T,
    expected: &T,
    remedy: &'static str,
) -> Result<(), TuneError> {
    if found == expected {
        return Ok(());
    }
    let (found, expected) = (format!("{found:?}"), format!("{expected:?}"));
    Err(TuneError::OtherRun { path: path.to_string(), what, found, expected, remedy })
}

fn hash<T: Serialize + ?Sized>(value: &T) -> Result<String, TuneError> {
    let json = |source| FileError::Json { path: "the description of the run".to_string(), source };
    Ok(hex::encode(Sha256::digest(serde_json::to_vec(value).map_err(json)?)))
}

#[derive(Serialize, Deserialize)]
struct Manifest {
    origin: Origin,
    /// File of the state, in the same folder.
    state: String,
    sha256: String,
    /// Updates of the optimizer over all iterations.
    updates: u64,
    /// The steps of this run so far; their count is the place to go on from.
    steps: Vec<StepLog>,
    known: Known,
}

/// Log-probs of each chosen sample that are computed once.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Known {
    /// Under the base.
    pub base: Vec<Vec<f32>>,
    /// Under the policy that training began from; nothing where the method does not ask.
    pub old: Vec<Vec<f32>>,
}

/// A state read back.
pub struct Checkpoint {
    pub origin: Origin,
    pub sha256: String,
    pub steps: Vec<StepLog>,
    pub known: Known,
    updates: u64,
    tensors: HashMap<String, Tensor>,
}

impl Checkpoint {
    /// Reads the checkpoint in `folder`.
    pub fn load(folder: &Path) -> Result<Self, TuneError> {
        let manifest: Manifest = durable::read_json(&folder.join(MANIFEST))?;
        let path = folder.join(&manifest.state);
        let fault = |problem: String| TuneError::Checkpoint { path: path.display().to_string(), problem };
        let bytes = fs::read(&path).map_err(|e| fault(format!("cannot read it: {e}")))?;
        let found = hex::encode(Sha256::digest(&bytes));
        if found != manifest.sha256 {
            return Err(fault(format!("its SHA-256 is {found}, the manifest says {}", manifest.sha256)));
        }
        let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).map_err(|e| fault(e.to_string()))?;
        let Manifest { origin, sha256, updates, steps, known, .. } = manifest;
        Ok(Checkpoint { origin, sha256, steps, known, updates, tensors })
    }

    /// Reads the checkpoint in `folder`, if one was ever written.
    pub fn load_if_there(folder: &Path) -> Result<Option<Self>, TuneError> {
        match Self::load(folder) {
            Err(TuneError::File(error)) if error.is_not_found() => Ok(None),
            read => read.map(Some),
        }
    }

    /// Reads what a run starts from: the folder of an earlier run, whose moments go on too, or a PEFT adapter of whatever making,
    /// whose moments begin anew.
    pub fn load_start(folder: &Path, frozen: Frozen) -> Result<Self, TuneError> {
        let own = folder.join(super::CHECKPOINT);
        if own.join(MANIFEST).exists() || !folder.join(PEFT_CONFIG).exists() {
            return Self::load(&own);
        }
        let adapter = Adapter::read(folder, frozen.config, frozen.identity)?;
        let tensors = adapter.tensors(frozen.config)?;
        let origin = Origin {
            base: frozen.identity.sha256.clone(),
            lora: adapter.spec.clone(),
            settings: String::new(),
            seed: 0,
            samples: String::new(),
            start: None,
            threads: 0,
            form: WeightForm::default(),
            hold: Hold::default(),
            device: None,
        };
        let tensors = tensors.into_iter().map(|(key, tensor)| (format!("value.{key}"), tensor)).collect();
        let (sha256, known) = (adapter.sha256, Known::default());
        Ok(Checkpoint { origin, sha256, steps: Vec::new(), known, updates: 0, tensors })
    }

    /// Returns the matrices by PEFT key.
    pub fn matrices(&self) -> BTreeMap<String, Tensor> {
        let matrix =
            |(key, tensor): (&String, &Tensor)| Some((key.strip_prefix("value.")?.to_string(), tensor.clone()));
        self.tensors.iter().filter_map(matrix).collect()
    }

    /// Returns the optimizer's state for these matrices; an adapter's is that of none.
    pub fn optimizer(&self, lora: &LoraMatrices) -> Result<AdamW, TuneError> {
        if self.updates == 0 && !self.tensors.keys().any(|key| key.starts_with("first.")) {
            return Ok(AdamW::new(&lora.values));
        }
        let read = |kind: &str| -> Result<Vec<Vec<f32>>, TuneError> {
            let values = |matrix: &Matrix| {
                let name = format!("{kind}.{}", matrix.key);
                let missing = || TuneError::Checkpoint { path: self.sha256.clone(), problem: format!("no {name}") };
                Ok(self.tensors.get(&name).ok_or_else(missing)?.flatten_all()?.to_vec1()?)
            };
            lora.matrices.iter().map(values).collect()
        };
        Ok(AdamW { updates: self.updates, first: read("first")?, second: read("second")? })
    }
}

/// Writes the state of a run to `folder` and removes the one before.
pub fn save(
    folder: &Path,
    origin: &Origin,
    lora: &LoraMatrices,
    adam: &AdamW,
    steps: &[StepLog],
    known: &Known,
) -> Result<(), TuneError> {
    let state = format!("state-{:06}.safetensors", steps.len());
    let path = folder.join(&state);
    let bytes = serialise(lora, adam, &path)?;
    durable::write(&path, &bytes)?;
    let manifest = Manifest {
        origin: origin.clone(),
        state: state.clone(),
        sha256: hex::encode(Sha256::digest(&bytes)),
        updates: adam.updates,
        steps: steps.to_vec(),
        known: known.clone(),
    };
    durable::write_json(&folder.join(MANIFEST), &manifest)?;
    remove_others(folder, &state)
}

fn serialise(lora: &LoraMatrices, adam: &AdamW, path: &Path) -> Result<Vec<u8>, TuneError> {
    let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let mut entries = Vec::new();
    for (i, Matrix { key, shape }) in lora.matrices.iter().enumerate() {
        let shape = shape.to_vec();
        entries.push((format!("value.{key}"), shape.clone(), bytes(&lora.values[i])));
        entries.push((format!("first.{key}"), shape.clone(), bytes(&adam.first[i])));
        entries.push((format!("second.{key}"), shape, bytes(&adam.second[i])));
    }
    let fault = |e: safetensors::SafeTensorError| TuneError::Checkpoint {
        path: path.display().to_string(),
        problem: e.to_string(),
    };
    let mut views = Vec::with_capacity(entries.len());
    for (name, shape, data) in &entries {
        views.push((name.as_str(), TensorView::new(Dtype::F32, shape.clone(), data).map_err(fault)?));
    }
    safetensors::serialize(views, None).map_err(fault)
}

fn remove_others(folder: &Path, keep: &str) -> Result<(), TuneError> {
    let entries = fs::read_dir(folder).map_err(|e| FileError::io("cannot list", folder, e))?;
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("state-") && name != keep {
            fs::remove_file(entry.path()).map_err(|e| FileError::io("cannot remove", &entry.path(), e))?;
        }
    }
    Ok(())
}
