//! LoRA adapters in PEFT's format: read, checked against the base, made empty, written.
//!
//! An adapter here is detached: plain f32 tensors without a gradient, so that sampling and scoring keep no history.

mod gguf;
mod module;
mod pattern;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

pub use self::module::Module;
pub use self::pattern::Patterns;
use super::config::ModelConfig;
use super::error::EngineError;
use super::held::Held;
use super::model::{Model, ModelIdentity};
use super::safetensors::Shard;
use crate::durable;

const CONFIG_FILE: &str = "adapter_config.json";
const TENSOR_FILE: &str = "adapter_model.safetensors";
const BASE_NOTE: &str = "base_model_sha256";
const NOT_A_PEFT_FOLDER: &str =
    "give a folder with adapter_config.json and adapter_model.safetensors as PEFT writes it";
const OTHER_BASE: &str = "give the model that the adapter was trained on";

/// The seven linear layers of a decoder layer that an adapter can change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Linear {
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
}

impl Linear {
    /// Every linear layer, in the order of the forward pass.
    pub const ALL: [Linear; 7] = [Linear::Q, Linear::K, Linear::V, Linear::O, Linear::Gate, Linear::Up, Linear::Down];

    /// Returns the module's path inside its layer, as PEFT writes it.
    pub const fn peft_name(self) -> &'static str {
        match self {
            Linear::Q => "self_attn.q_proj",
            Linear::K => "self_attn.k_proj",
            Linear::V => "self_attn.v_proj",
            Linear::O => "self_attn.o_proj",
            Linear::Gate => "mlp.gate_proj",
            Linear::Up => "mlp.up_proj",
            Linear::Down => "mlp.down_proj",
        }
    }

    /// Returns its own name, as PEFT's `target_modules` lists it.
    pub fn target_name(self) -> &'static str {
        self.peft_name().rsplit('.').next().unwrap_or_default()
    }

    /// Returns the widths of its input and its output.
    pub fn shape(self, config: &ModelConfig) -> (usize, usize) {
        let (hidden, wide) = (config.hidden_size, config.intermediate_size);
        match self {
            Linear::Q => (hidden, config.query_size()),
            Linear::K | Linear::V => (hidden, config.kv_size()),
            Linear::O => (config.query_size(), hidden),
            Linear::Gate | Linear::Up => (hidden, wide),
            Linear::Down => (wide, hidden),
        }
    }
}

/// Which of the two matrices of a LoRA pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Factor {
    /// `[rank, in]`.
    A,
    /// `[out, rank]`.
    B,
}

impl Factor {
    fn as_str(self) -> &'static str {
        match self {
            Factor::A => "lora_A",
            Factor::B => "lora_B",
        }
    }
}

/// What an adapter changes and how strongly.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoraSpec {
    pub rank: usize,
    pub alpha: f64,
    pub targets: Vec<Linear>,
    pub use_rslora: bool,
    /// Ranks of modules that have another one, as PEFT matches them.
    #[serde(default)]
    pub rank_pattern: Patterns<usize>,
    /// Alphas likewise.
    #[serde(default)]
    pub alpha_pattern: Patterns<f64>,
    /// Share of the low-rank path's inputs that a training step leaves out; nothing else sees it.
    #[serde(default)]
    pub dropout: f64,
}

impl Default for LoraSpec {
    /// Rank 16 and alpha 32 on every linear layer.
    fn default() -> Self {
        LoraSpec {
            rank: 16,
            alpha: 32.0,
            targets: Linear::ALL.to_vec(),
            use_rslora: false,
            rank_pattern: Patterns::default(),
            alpha_pattern: Patterns::default(),
            dropout: 0.0,
        }
    }
}

impl LoraSpec {
    /// Returns the rank of the module at a path such as `model.layers.0.mlp.up_proj`.
    pub fn rank_of(&self, path: &str) -> usize {
        self.rank_pattern.of(path).unwrap_or(self.rank)
    }

    /// Returns the factor on a module's `B A x`: alpha / rank, or alpha / sqrt(rank) with rank-stabilised LoRA.
    pub fn scaling_of(&self, path: &str) -> f64 {
        let (rank, alpha) = (self.rank_of(path) as f64, self.alpha_pattern.of(path).unwrap_or(self.alpha));
        if self.use_rslora { alpha / rank.sqrt() } else { alpha / rank }
    }

    /// Returns true where two adapters compute the same from the same matrices: dropout is of training alone.
    pub fn computes_as(&self, other: &LoraSpec) -> bool {
        LoraSpec { dropout: other.dropout, ..self.clone() } == *other
    }

    /// Returns the path of every module of a model that these settings change.
    pub fn paths(&self, config: &ModelConfig) -> Vec<String> {
        let modules = Module::targeted(config, &self.targets);
        (0..config.layers.len()).flat_map(|layer| modules.iter().map(move |module| module.path(layer))).collect()
    }
}

/// The change of one linear layer: `y += scale * B (A x)`.
#[derive(Debug, Clone)]
pub struct LoraPair {
    /// `[rank, in]`, detached f32.
    pub a: Tensor,
    /// `[out, rank]`, detached f32.
    pub b: Tensor,
    pub scale: f64,
    pub rank: usize,
}

/// Returns `W + scale * B A`.
pub(super) fn merged(weight: &Held, pair: Option<&LoraPair>) -> Result<Held, EngineError> {
    match pair {
        None => Ok(weight.clone()),
        Some(LoraPair { a, b, scale, .. }) => Ok(Held::from((weight.tensor()? + (b.matmul(a)? * *scale)?)?)),
    }
}

/// A LoRA adapter, ready for sampling and scoring.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// The folder's name.
    pub name: String,
    pub spec: LoraSpec,
    /// SHA-256 of `adapter_model.safetensors`; of nothing for an adapter that was never on disk.
    pub sha256: String,
    layers: Vec<Pairs>,
}

/// The pair of each linear layer of one decoder layer, where there is one.
type Pairs = [Option<LoraPair>; 7];

impl Adapter {
    /// Reads a PEFT folder and checks it against the model it will change.
    pub fn load(dir: &Path, model: &Model) -> Result<Self, EngineError> {
        Self::read(dir, model.config(), model.identity())
    }

    /// Does the same where there is no more of the model than its shape and its name.
    pub fn read(dir: &Path, shape: &ModelConfig, base: &ModelIdentity) -> Result<Self, EngineError> {
        let fault = |problem: String| EngineError::adapter(dir, problem, NOT_A_PEFT_FOLDER);
        let file: PeftFile = durable::read_json(&dir.join(CONFIG_FILE)).map_err(|e| fault(e.to_string()))?;
        file.check(dir)?;
        let spec = file.spec();
        let path = dir.join(TENSOR_FILE);
        let sha256 = durable::sha256_file(&path).map_err(|e| fault(e.to_string()))?;
        let shard = Shard::open(&path)?;
        check_base(dir, &shard, base)?;
        let mut layers = vec![[const { None }; 7]; shape.layers.len()];
        let mut taken = 0;
        for (layer, pairs) in layers.iter_mut().enumerate() {
            for module in Module::all(shape) {
                let Some(pair) = read_pair(dir, &shard, &spec, layer, *module, shape)? else { continue };
                set(pairs, shape, *module, &pair)?;
                taken += 2;
            }
        }
        check_complete(dir, &shard, shape, taken)?;
        let has = |l: &Linear| layers.iter().any(|pairs: &Pairs| pairs[*l as usize].is_some());
        let targets = Linear::ALL.into_iter().filter(has).collect();
        let spec = LoraSpec { targets, ..spec };
        let name = dir.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        Ok(Adapter { name, spec, sha256, layers })
    }

    /// Returns an adapter that changes nothing: A and B are 0.
    pub fn zero(model: &Model, spec: &LoraSpec) -> Result<Self, EngineError> {
        let zeros = |_: String, shape: [usize; 2]| Ok(Tensor::zeros(&shape, DType::F32, &Device::Cpu)?);
        Self::made("zero", model, spec, zeros)
    }

    /// Returns an adapter over tensors in memory, keyed as PEFT keys them. The tensors are detached.
    pub fn from_tensors(
        name: &str,
        model: &Model,
        spec: &LoraSpec,
        tensors: &BTreeMap<String, Tensor>,
    ) -> Result<Self, EngineError> {
        Self::made(name, model, spec, |key, shape| {
            let tensor = tensors.get(&key).filter(|t| t.dims() == shape);
            let problem = || EngineError::adapter(Path::new(name), format!("{key} is missing"), OTHER_BASE);
            Ok(tensor.ok_or_else(problem)?.detach())
        })
    }

    /// Returns an adapter whose matrices are made by PEFT key and shape.
    fn made(
        name: &str,
        model: &Model,
        spec: &LoraSpec,
        matrix: impl Fn(String, [usize; 2]) -> Result<Tensor, EngineError>,
    ) -> Result<Self, EngineError> {
        let config = model.config();
        let mut layers = vec![[const { None }; 7]; config.layers.len()];
        for (layer, pairs) in layers.iter_mut().enumerate() {
            for module in Module::targeted(config, &spec.targets) {
                let path = module.path(layer);
                let rank = spec.rank_of(&path);
                let made = |f: Factor| matrix(module.peft_key(layer, f), module.shape(config, f, rank));
                let (a, b) = (made(Factor::A)?, made(Factor::B)?);
                set(pairs, config, module, &LoraPair { a, b, scale: spec.scaling_of(&path), rank })?;
            }
        }
        let sha256 = hex::encode(Sha256::digest(b""));
        Ok(Adapter { name: name.to_string(), spec: spec.clone(), sha256, layers })
    }

    /// Returns the largest rank of its pairs, which is what a server reserves.
    pub fn largest_rank(&self) -> usize {
        self.layers.iter().flatten().flatten().map(|pair| pair.rank).max().unwrap_or_default()
    }

    /// Returns its matrices by PEFT key, as a training run takes them.
    pub fn tensors(&self, config: &ModelConfig) -> Result<BTreeMap<String, Tensor>, EngineError> {
        let mut tensors = BTreeMap::new();
        for layer in 0..config.layers.len() {
            for module in Module::targeted(config, &self.spec.targets) {
                let parts: Vec<&LoraPair> = module.parts.iter().filter_map(|part| self.get(layer, *part)).collect();
                let Some(first) = parts.first() else { continue };
                let b: Vec<&Tensor> = parts.iter().map(|pair| &pair.b).collect();
                tensors.insert(module.peft_key(layer, Factor::A), first.a.clone());
                tensors.insert(module.peft_key(layer, Factor::B), Tensor::cat(&b, 0)?);
            }
        }
        Ok(tensors)
    }

    /// Returns the change of one linear layer, if the adapter changes it.
    pub fn get(&self, layer: usize, linear: Linear) -> Option<&LoraPair> {
        self.layers.get(layer)?[linear as usize].as_ref()
    }
}

/// Hands each part of a module its own pair.
fn set(pairs: &mut Pairs, config: &ModelConfig, module: Module, pair: &LoraPair) -> Result<(), EngineError> {
    for (linear, pair) in module.split(config, pair)? {
        pairs[linear as usize] = Some(pair);
    }
    Ok(())
}

/// The fields of `adapter_config.json` that change what an adapter computes.
#[derive(Debug, Deserialize)]
struct PeftFile {
    #[serde(default)]
    peft_type: String,
    r: usize,
    lora_alpha: f64,
    #[serde(default)]
    lora_dropout: f64,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    rank_pattern: Option<Patterns<usize>>,
    #[serde(default)]
    alpha_pattern: Option<Patterns<f64>>,
    /// Everything else; what changes the computation in a way that is not built is refused.
    #[serde(flatten)]
    rest: HashMap<String, Value>,
}

impl PeftFile {
    fn check(&self, dir: &Path) -> Result<(), EngineError> {
        if self.peft_type != "LORA" {
            let problem = format!("peft_type is {:?}, not LORA", self.peft_type);
            return Err(EngineError::adapter(dir, problem, "train a LoRA adapter"));
        }
        let ranks = self.rank_pattern.iter().flat_map(Patterns::values).chain([self.r]);
        if ranks.min() == Some(0) {
            return Err(EngineError::adapter(dir, "a rank is 0", "train a LoRA adapter of rank 1 or more"));
        }
        let broken = |pattern: &str, problem: String| {
            let problem = format!("{pattern:?} in rank_pattern or alpha_pattern cannot be read: {problem}");
            Err(EngineError::adapter(
                dir,
                problem,
                "name modules by paths or by regular expressions without look-around",
            ))
        };
        if let Some((pattern, problem)) = self.rank_pattern.as_ref().and_then(Patterns::broken) {
            return broken(pattern, problem);
        }
        if let Some((pattern, problem)) = self.alpha_pattern.as_ref().and_then(Patterns::broken) {
            return broken(pattern, problem);
        }
        for key in ["use_dora", "use_qalora", "use_bdlora", "fan_in_fan_out", "lora_bias", "modules_to_save"] {
            let on = match self.rest.get(key) {
                None | Some(Value::Null | Value::Bool(false)) => false,
                Some(Value::Array(items)) => !items.is_empty(),
                Some(_) => true,
            };
            if on {
                return Err(EngineError::adapter(dir, format!("uses {key}"), "train plain LoRA on the linear layers"));
            }
        }
        match self.rest.get("bias").and_then(Value::as_str) {
            None | Some("none") => Ok(()),
            Some(bias) => Err(EngineError::adapter(dir, format!("trains bias {bias}"), "train with bias none")),
        }
    }

    /// Returns what it says, of which the targets are left to the tensors.
    fn spec(&self) -> LoraSpec {
        LoraSpec {
            rank: self.r,
            alpha: self.lora_alpha,
            targets: Vec::new(),
            use_rslora: self.use_rslora,
            rank_pattern: self.rank_pattern.clone().unwrap_or_default(),
            alpha_pattern: self.alpha_pattern.clone().unwrap_or_default(),
            dropout: self.lora_dropout,
        }
    }
}

/// Reads the two matrices of a module, where the file has them.
fn read_pair(
    dir: &Path,
    shard: &Shard,
    spec: &LoraSpec,
    layer: usize,
    module: Module,
    config: &ModelConfig,
) -> Result<Option<LoraPair>, EngineError> {
    let path = module.path(layer);
    let rank = spec.rank_of(&path);
    let read = |factor: Factor| -> Result<Option<Tensor>, EngineError> {
        let (key, shape) = (module.peft_key(layer, factor), module.shape(config, factor, rank));
        match shard.tensor(&key)? {
            Some(tensor) if tensor.dims() != shape => {
                let problem = format!("{key} has shape {:?} where {shape:?} is expected", tensor.dims());
                Err(EngineError::adapter(dir, problem, OTHER_BASE))
            }
            found => Ok(found),
        }
    };
    match (read(Factor::A)?, read(Factor::B)?) {
        (Some(a), Some(b)) => Ok(Some(LoraPair { a, b, scale: spec.scaling_of(&path), rank })),
        (None, None) => Ok(None),
        _ => Err(EngineError::adapter(dir, format!("{path} has one of two matrices"), NOT_A_PEFT_FOLDER)),
    }
}

/// Refuses an adapter that records the hash of another base.
fn check_base(dir: &Path, shard: &Shard, base: &ModelIdentity) -> Result<(), EngineError> {
    match shard.notes().get(BASE_NOTE) {
        Some(hash) if *hash != base.sha256 => {
            let problem = format!("was trained on weights {hash}, but {} is {}", base.name, base.sha256);
            Err(EngineError::adapter(dir, problem, OTHER_BASE))
        }
        _ => Ok(()),
    }
}

/// Refuses tensors that no linear layer of the model takes, and an adapter that changes nothing of it.
fn check_complete(dir: &Path, shard: &Shard, config: &ModelConfig, taken: usize) -> Result<(), EngineError> {
    let names = shard.names();
    if taken == names.len() && taken > 0 {
        return Ok(());
    }
    let known = |name: &String| {
        let is = |i: usize, module: &Module, factor: Factor| *name == module.peft_key(i, factor);
        (0..config.layers.len()).any(|i| Module::all(config).iter().any(|m| is(i, m, Factor::A) || is(i, m, Factor::B)))
    };
    let stranger = names.iter().find(|name| !known(name)).map_or("(none)", String::as_str);
    let problem = format!("{} of {} tensors fit the model; {stranger} does not", taken, names.len());
    Err(EngineError::adapter(dir, problem, OTHER_BASE))
}

/// Writes an adapter as PEFT does: `adapter_model.safetensors`, then `adapter_config.json`, each whole or absent.
///
/// `tensors` are keyed as [`Module::peft_key`] does. The base's hash is noted beside the tensors, where PEFT and vLLM
/// ignore it and [`Adapter::load`] checks it.
pub fn save_peft(
    dir: &Path,
    base: &ModelIdentity,
    spec: &LoraSpec,
    tensors: &BTreeMap<String, Tensor>,
) -> Result<(), EngineError> {
    let fault = |e: String| EngineError::adapter(dir, e, "check that the folder can be written and the disk has room");
    durable::create_folder(dir).map_err(|e| fault(e.to_string()))?;
    // A map of one metadata pair after PEFT's own keeps the bytes a function of the inputs.
    let bytes = serialise(tensors, (BASE_NOTE, &base.sha256))?;
    durable::write(&dir.join(TENSOR_FILE), &bytes).map_err(|e| fault(e.to_string()))?;
    durable::write_json(&dir.join(CONFIG_FILE), &peft_config(&base.name, spec, tensors))
        .map_err(|e| fault(e.to_string()))
}

/// Returns the safetensors bytes of f32 tensors: names sorted, so that equal tensors give equal bytes.
///
/// Written by hand because the crate takes its metadata as a `HashMap`, whose order changes from run to run.
pub(super) fn serialise(tensors: &BTreeMap<String, Tensor>, note: (&str, &str)) -> Result<Vec<u8>, EngineError> {
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".to_string(), json!({ "format": "pt", note.0: note.1 }));
    let mut data = Vec::new();
    for (name, tensor) in tensors {
        let start = data.len();
        let values = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        data.extend(values.iter().flat_map(|v| v.to_le_bytes()));
        let entry = json!({ "dtype": "F32", "shape": tensor.dims(), "data_offsets": [start, data.len()] });
        header.insert(name.clone(), entry);
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header);
    bytes.extend(data);
    Ok(bytes)
}

/// Returns the keys that PEFT, vLLM and mistral.rs accept, sorted as PEFT sorts them.
fn peft_config(base_name: &str, spec: &LoraSpec, tensors: &BTreeMap<String, Tensor>) -> Value {
    let alpha = if spec.alpha.fract() == 0.0 { json!(spec.alpha as i64) } else { json!(spec.alpha) };
    json!({
        "alpha_pattern": spec.alpha_pattern,
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "lora_alpha": alpha,
        "lora_dropout": spec.dropout,
        "modules_to_save": null,
        "peft_type": "LORA",
        "r": spec.rank,
        "rank_pattern": spec.rank_pattern,
        "revision": null,
        "target_modules": Module::target_names(tensors.keys()),
        "task_type": "CAUSAL_LM",
        "use_dora": false,
        "use_rslora": spec.use_rslora,
    })
}
