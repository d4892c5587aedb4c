//! The shape of a decoder, read from Hugging Face's `config.json` or from GGUF metadata.
//!
//! One decoder serves all families; everything in which they differ stands here as data, so that a forward pass asks
//! what a layer is like and never whose it is. What the decoder cannot compute (other activations, other stretches of
//! the rotary embedding) is refused by name when it is read, so that no model runs slightly wrong.

mod gguf;
mod json;

use std::path::Path;

use candle_core::quantized::gguf_file::Content;
use serde::{Deserialize, Serialize};

use super::error::EngineError;

const CONFIG_REMEDY: &str = "use a model of a supported family as published, or convert it again";

/// The families that the decoder knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Architecture {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    SmolLm3,
    Olmo2,
    Phi3,
    Gemma2,
    #[serde(rename = "gemma3_text")]
    Gemma3,
}

impl Architecture {
    /// Every architecture, in the order of the error message.
    pub const ALL: [Architecture; 9] = [
        Architecture::Llama,
        Architecture::Mistral,
        Architecture::Qwen2,
        Architecture::Qwen3,
        Architecture::SmolLm3,
        Architecture::Olmo2,
        Architecture::Phi3,
        Architecture::Gemma2,
        Architecture::Gemma3,
    ];

    /// Returns the name used by `model_type` in `config.json`.
    pub fn as_str(self) -> &'static str {
        match self {
            Architecture::Llama => "llama",
            Architecture::Mistral => "mistral",
            Architecture::Qwen2 => "qwen2",
            Architecture::Qwen3 => "qwen3",
            Architecture::SmolLm3 => "smollm3",
            Architecture::Olmo2 => "olmo2",
            Architecture::Phi3 => "phi3",
            Architecture::Gemma2 => "gemma2",
            Architecture::Gemma3 => "gemma3_text",
        }
    }

    /// Returns how its layers are built.
    pub fn block(self) -> Block {
        let plain = Block {
            norms: Norms::Pre,
            norm_weight: NormWeight::Whole,
            qk_norm: QkNorm::None,
            activation: Activation::SwiGlu,
            projections: Projections::Split,
        };
        let gemma =
            Block { norms: Norms::Both, norm_weight: NormWeight::AboveOne, activation: Activation::GeGlu, ..plain };
        match self {
            Architecture::Llama | Architecture::Mistral | Architecture::Qwen2 | Architecture::SmolLm3 => plain,
            Architecture::Qwen3 => Block { qk_norm: QkNorm::PerHead, ..plain },
            Architecture::Olmo2 => Block { norms: Norms::Post, qk_norm: QkNorm::Full, ..plain },
            Architecture::Phi3 => Block { projections: Projections::Fused, ..plain },
            Architecture::Gemma2 => gemma,
            Architecture::Gemma3 => Block { qk_norm: QkNorm::PerHead, ..gemma },
        }
    }

    fn parse(name: &str, known: &[Architecture], path: &Path) -> Result<Self, EngineError> {
        known.iter().copied().find(|a| a.as_str() == name).ok_or_else(|| EngineError::Architecture {
            file: path.display().to_string(),
            found: name.to_string(),
            supported: known.iter().map(|a| a.as_str()).collect::<Vec<_>>().join(", "),
        })
    }
}

/// How a layer is built, the same for all layers of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Block {
    pub norms: Norms,
    pub norm_weight: NormWeight,
    pub qk_norm: QkNorm,
    pub activation: Activation,
    pub projections: Projections,
}

/// Where the two halves of a layer, attention and MLP, are normed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Norms {
    /// What goes in.
    Pre,
    /// What comes out, before it is added to the residual.
    Post,
    Both,
}

/// What the weight of a norm is stored as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormWeight {
    Whole,
    /// Gemma: the factor is 1 more than what is stored. [`super::Weights`] hold the factor.
    AboveOne,
}

/// How queries and keys are normed before they are rotated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QkNorm {
    None,
    PerHead,
    /// Over the whole width of the projection.
    Full,
}

/// What the MLP does to its gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    SwiGlu,
    /// GELU in its tanh form.
    GeGlu,
}

/// How a model names, stores and adapts its projections; computed they are the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Projections {
    Split,
    /// Phi-3: queries, keys and values in one matrix, gate and up in another.
    Fused,
}

/// In what the layers of a model differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerKind {
    /// Which of the model's rotary embeddings; none in SmolLM3's layers without one.
    pub rope: Option<usize>,
    /// How many positions a row sees, its own included; all where there is none.
    pub window: Option<usize>,
}

/// A rotary position embedding.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RopeConfig {
    pub theta: f64,
    /// How many dimensions of a head are rotated: the first.
    pub dim: usize,
    pub scaling: RopeScaling,
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
    /// One divisor per frequency, as a GGUF of Llama 3 carries it in a tensor and Phi-3 in its short factors, and one
    /// factor on all cosines and sines.
    Divisors {
        divisors: Vec<f32>,
        attention: f32,
    },
    /// YaRN: as Llama 3.1 with the ramp over dimensions, and one factor on all cosines and sines.
    Yarn {
        factor: f64,
        /// Dimensions between which the ramp runs.
        low: f64,
        high: f64,
        attention: f32,
    },
}

/// How a product of query and key becomes a score.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    pub scale: f32,
    /// Gemma 2: scores are bent into +- this.
    pub cap: Option<f32>,
}

/// The shape and the constants of a decoder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    pub architecture: Architecture,
    pub block: Block,
    pub vocab: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub layers: Vec<LayerKind>,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub rms_eps: f64,
    pub ropes: Vec<RopeConfig>,
    pub scores: Scores,
    /// Gemma multiplies the embeddings that go in.
    pub embedding_scale: Option<f32>,
    /// Gemma 2: logits are bent into +- this.
    pub logit_cap: Option<f32>,
    /// Longest sequence.
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

    /// Returns the widths of the norms of queries and keys, where the model has them.
    pub fn qk_norm_sizes(&self) -> Option<(usize, usize)> {
        match self.block.qk_norm {
            QkNorm::None => None,
            QkNorm::PerHead => Some((self.head_dim, self.head_dim)),
            QkNorm::Full => Some((self.query_size(), self.kv_size())),
        }
    }

    /// Reads Hugging Face's `config.json`.
    pub fn from_json(path: &Path) -> Result<Self, EngineError> {
        let bytes =
            std::fs::read(path).map_err(|e| EngineError::file(path, e, "copy the model's config.json there"))?;
        let value = serde_json::from_slice(&bytes).map_err(|e| EngineError::file(path, e, CONFIG_REMEDY))?;
        json::read(path, &value)
    }

    /// Reads the header of a GGUF file. `divisors` are those of its rotary frequencies, if it holds a tensor of them.
    pub fn from_gguf(content: &Content, divisors: Option<Vec<f32>>, path: &Path) -> Result<Self, EngineError> {
        gguf::read(content, divisors, path)
    }

    fn check(mut self, path: &Path) -> Result<Self, EngineError> {
        let problem = if [self.vocab, self.hidden_size, self.intermediate_size, self.layers.len()].contains(&0) {
            "vocabulary, hidden size, intermediate size and layers must all be above 0".to_string()
        } else if self.kv_heads == 0 || !self.heads.is_multiple_of(self.kv_heads) {
            format!("{} heads are not a multiple of {} key-value heads", self.heads, self.kv_heads)
        } else if self.head_dim == 0 || !self.head_dim.is_multiple_of(2) {
            format!("head dimension {} is not an even number above 0", self.head_dim)
        } else if let Some(rope) = self.ropes.iter().find(|r| r.dim == 0 || r.dim % 2 == 1 || r.dim > self.head_dim) {
            format!("{} rotated dimensions are not an even number up to {}", rope.dim, self.head_dim)
        } else if self.layers.iter().any(|layer| layer.window == Some(0)) {
            "a sliding window of 0 positions sees nothing".to_string()
        } else {
            // A window that no sequence outgrows is none.
            self.layers.iter_mut().for_each(|layer| layer.window = layer.window.filter(|w| *w < self.max_positions));
            return Ok(self);
        };
        Err(EngineError::file(path, problem, CONFIG_REMEDY))
    }
}
