//! The shape of a decoder, read from Hugging Face's `config.json` or from GGUF metadata.
//!
//! One decoder serves the whole Llama family; everything in which its members differ stands here. What it cannot
//! compute (other activations, scaled rotary embeddings beyond the two below) is refused by name when it is read, so
//! that no model runs slightly wrong.

use std::path::Path;

use candle_core::quantized::gguf_file::{Content, Value as GgufValue};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::error::EngineError;

const CONFIG_REMEDY: &str = "use a model of the Llama family as published, or convert it again";

/// The members of the Llama family that the decoder knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Architecture {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
}

impl Architecture {
    /// Every architecture, in the order of the error message.
    pub const ALL: [Architecture; 4] =
        [Architecture::Llama, Architecture::Mistral, Architecture::Qwen2, Architecture::Qwen3];

    /// Returns the name used by `model_type` in `config.json` and by `general.architecture` in a GGUF.
    pub fn as_str(self) -> &'static str {
        match self {
            Architecture::Llama => "llama",
            Architecture::Mistral => "mistral",
            Architecture::Qwen2 => "qwen2",
            Architecture::Qwen3 => "qwen3",
        }
    }

    fn parse(name: &str, path: &Path) -> Result<Self, EngineError> {
        Self::ALL.into_iter().find(|a| a.as_str() == name).ok_or_else(|| EngineError::Architecture {
            file: path.display().to_string(),
            found: name.to_string(),
            supported: Self::ALL.map(Architecture::as_str).join(", "),
        })
    }
}

/// How rotary frequencies are stretched for long contexts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum RopeScaling {
    None,
    /// All frequencies divided by `factor`.
    Linear {
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        factor: f64,
        low: f64,
        high: f64,
        original: f64,
    },
    /// One divisor per frequency, as a GGUF carries it in `rope_freqs.weight`.
    Divisors {
        divisors: Vec<f32>,
    },
}

/// The shape and the constants of a decoder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    pub architecture: Architecture,
    pub vocab: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub rms_eps: f64,
    pub rope_theta: f64,
    pub rope_scaling: RopeScaling,
    /// Longest sequence; where the model slides its window, the window, within which both are the same.
    pub max_positions: usize,
    /// True where the output layer is the embedding.
    pub tied: bool,
}

impl ModelConfig {
    /// Returns the width of the query projection's output.
    pub fn query_size(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Returns the width of the key and of the value projection's output.
    pub fn kv_size(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Reads Hugging Face's `config.json`.
    pub fn from_json(path: &Path) -> Result<Self, EngineError> {
        let bytes =
            std::fs::read(path).map_err(|e| EngineError::file(path, e, "copy the model's config.json there"))?;
        let value = serde_json::from_slice(&bytes).map_err(|e| EngineError::file(path, e, CONFIG_REMEDY))?;
        Fields { path, value: &value }.config()
    }

    /// Reads the header of a GGUF file. `rope_freqs` is the tensor of that name, if it has one.
    pub fn from_gguf(content: &Content, rope_freqs: Option<Vec<f32>>, path: &Path) -> Result<Self, EngineError> {
        let name = content.metadata.get("general.architecture").and_then(|v| v.to_string().ok()).cloned();
        let name = name.ok_or_else(|| EngineError::file(path, "general.architecture is missing", CONFIG_REMEDY))?;
        let architecture = Architecture::parse(&name, path)?;
        Gguf { path, content, name }.config(architecture, rope_freqs)
    }

    fn check(self, path: &Path) -> Result<Self, EngineError> {
        let problem = if [self.vocab, self.hidden_size, self.intermediate_size, self.layers].contains(&0) {
            "vocabulary, hidden size, intermediate size and layers must all be above 0".to_string()
        } else if self.kv_heads == 0 || self.heads % self.kv_heads != 0 {
            format!("{} heads are not a multiple of {} key-value heads", self.heads, self.kv_heads)
        } else if self.head_dim == 0 || self.head_dim % 2 != 0 {
            format!("head dimension {} is not an even number above 0", self.head_dim)
        } else {
            return Ok(self);
        };
        Err(EngineError::file(path, problem, CONFIG_REMEDY))
    }
}

/// Reads the fields of one `config.json`.
struct Fields<'a> {
    path: &'a Path,
    value: &'a Value,
}

impl Fields<'_> {
    fn config(&self) -> Result<ModelConfig, EngineError> {
        let architecture = Architecture::parse(self.value["model_type"].as_str().unwrap_or("(none)"), self.path)?;
        let activation = self.value["hidden_act"].as_str().unwrap_or("silu");
        if activation != "silu" {
            return Err(EngineError::file(self.path, format!("hidden_act {activation} is not silu"), CONFIG_REMEDY));
        }
        let (heads, hidden_size) = (self.count("num_attention_heads")?, self.count("hidden_size")?);
        let head_dim = self.optional("head_dim").unwrap_or(if heads == 0 { 0 } else { hidden_size / heads });
        let positions = self.optional("max_position_embeddings").unwrap_or(2048);
        // transformers 5 moved both rotary settings into `rope_parameters`.
        let rope = if self.value["rope_parameters"].is_object() { "rope_parameters" } else { "rope_scaling" };
        let theta = self.value[rope]["rope_theta"].as_f64().or(self.value["rope_theta"].as_f64());
        ModelConfig {
            architecture,
            vocab: self.count("vocab_size")?,
            hidden_size,
            intermediate_size: self.count("intermediate_size")?,
            layers: self.count("num_hidden_layers")?,
            heads,
            kv_heads: self.optional("num_key_value_heads").unwrap_or(heads),
            head_dim,
            rms_eps: self.value["rms_norm_eps"].as_f64().unwrap_or(1e-6),
            rope_theta: theta.unwrap_or(10_000.0),
            rope_scaling: self.scaling(&self.value[rope])?,
            max_positions: self.window(architecture).map_or(positions, |w| w.min(positions)),
            tied: self.value["tie_word_embeddings"].as_bool().unwrap_or(false),
        }
        .check(self.path)
    }

    fn count(&self, key: &str) -> Result<usize, EngineError> {
        self.optional(key).ok_or_else(|| EngineError::file(self.path, format!("{key} is missing"), CONFIG_REMEDY))
    }

    fn optional(&self, key: &str) -> Option<usize> {
        self.value[key].as_u64().map(|v| v as usize)
    }

    /// Returns the sliding window where the model uses one: Mistral where it is set, Qwen only where it is switched on.
    fn window(&self, architecture: Architecture) -> Option<usize> {
        let on = architecture == Architecture::Mistral || self.value["use_sliding_window"].as_bool() == Some(true);
        self.optional("sliding_window").filter(|_| on)
    }

    fn scaling(&self, rope: &Value) -> Result<RopeScaling, EngineError> {
        let kind = rope["rope_type"].as_str().or(rope["type"].as_str()).unwrap_or("default");
        let number = |key: &str| {
            rope[key]
                .as_f64()
                .ok_or_else(|| EngineError::file(self.path, format!("rope {key} is missing"), CONFIG_REMEDY))
        };
        match kind {
            "default" => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear { factor: number("factor")? }),
            "llama3" => Ok(RopeScaling::Llama3 {
                factor: number("factor")?,
                low: number("low_freq_factor")?,
                high: number("high_freq_factor")?,
                original: number("original_max_position_embeddings")?,
            }),
            other => Err(EngineError::file(
                self.path,
                format!("rope type {other} is not one of default, linear, llama3"),
                CONFIG_REMEDY,
            )),
        }
    }
}

/// Reads the metadata of one GGUF file, whose keys start with the architecture's name.
struct Gguf<'a> {
    path: &'a Path,
    content: &'a Content,
    name: String,
}

impl Gguf<'_> {
    fn config(&self, architecture: Architecture, rope_freqs: Option<Vec<f32>>) -> Result<ModelConfig, EngineError> {
        let (heads, hidden_size) = (self.count("attention.head_count")?, self.count("embedding_length")?);
        let head_dim = self
            .optional("attention.key_length")
            .or(self.optional("rope.dimension_count"))
            .unwrap_or(if heads == 0 { 0 } else { hidden_size / heads });
        if let Some(rotated) = self.optional("rope.dimension_count").filter(|d| *d != head_dim) {
            let problem = format!("rotates {rotated} of {head_dim} dimensions of a head, which is not supported");
            return Err(EngineError::file(self.path, problem, CONFIG_REMEDY));
        }
        let tokens = self.content.metadata.get("tokenizer.ggml.tokens").and_then(|v| v.to_vec().ok()).map(Vec::len);
        let positions = self.count("context_length")?;
        ModelConfig {
            architecture,
            vocab: tokens.or(self.optional("vocab_size")).unwrap_or(0),
            hidden_size,
            intermediate_size: self.count("feed_forward_length")?,
            layers: self.count("block_count")?,
            heads,
            kv_heads: self.optional("attention.head_count_kv").unwrap_or(heads),
            head_dim,
            rms_eps: self.number("attention.layer_norm_rms_epsilon").unwrap_or(1e-6),
            rope_theta: self.number("rope.freq_base").unwrap_or(10_000.0),
            rope_scaling: self.scaling(rope_freqs)?,
            max_positions: self.optional("attention.sliding_window").map_or(positions, |w| w.min(positions)),
            tied: !self.content.tensor_infos.contains_key("output.weight"),
        }
        .check(self.path)
    }

    fn get(&self, key: &str) -> Option<&GgufValue> {
        self.content.metadata.get(&format!("{}.{key}", self.name))
    }

    fn optional(&self, key: &str) -> Option<usize> {
        self.get(key).and_then(|v| v.to_u64().ok()).map(|v| v as usize)
    }

    fn count(&self, key: &str) -> Result<usize, EngineError> {
        let missing = || EngineError::file(self.path, format!("{}.{key} is missing", self.name), CONFIG_REMEDY);
        self.optional(key).ok_or_else(missing)
    }

    fn number(&self, key: &str) -> Option<f64> {
        self.get(key).and_then(|v| v.to_f32().ok()).map(f64::from)
    }

    fn scaling(&self, rope_freqs: Option<Vec<f32>>) -> Result<RopeScaling, EngineError> {
        if let Some(divisors) = rope_freqs {
            return Ok(RopeScaling::Divisors { divisors });
        }
        let kind = self.get("rope.scaling.type").and_then(|v| v.to_string().ok()).map(String::as_str);
        match kind.unwrap_or("none") {
            "none" => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear { factor: self.number("rope.scaling.factor").unwrap_or(1.0) }),
            other => Err(EngineError::file(
                self.path,
                format!("rope scaling {other} is not one of none, linear"),
                CONFIG_REMEDY,
            )),
        }
    }
}
