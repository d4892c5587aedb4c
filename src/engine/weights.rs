//! The frozen weights of a model, the same for sampling, scoring and training: vectors in f32, matrices as they are held.

use candle_core::Tensor;
use rayon::prelude::*;

use super::config::{ModelConfig, NormWeight, Norms, Projections};
use super::error::EngineError;
use super::held::{Held, Hold};
use super::source::Files;

/// All weights of a decoder. Linear weights are `[out, in]` in Hugging Face's order (rotary halves not interleaved).
#[derive(Debug, Clone)]
pub struct Weights {
    /// `[vocab, hidden]`.
    pub embed: Held,
    pub layers: Vec<LayerWeights>,
    /// `[hidden]`.
    pub norm: Tensor,
    /// The output layer: `[vocab, hidden]`, the embedding itself where the model ties them; `[1, hidden]` in a model that
    /// ends in a score.
    pub lm_head: Held,
}

/// What a model's output layer makes of a hidden row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Output {
    /// The logits of the next token.
    Vocabulary,
    /// One number: the head `score` of Hugging Face's `...ForSequenceClassification`.
    Score,
}

/// The weights of one layer. Norms hold the factor itself, whatever the model stores.
#[derive(Debug, Clone)]
pub struct LayerWeights {
    /// The norm of what goes into attention and the norm of what comes out; a family has one or both.
    pub attn_norm: Option<Tensor>,
    pub attn_post_norm: Option<Tensor>,
    pub q: Held,
    pub k: Held,
    pub v: Held,
    pub o: Held,
    /// The same for the MLP.
    pub mlp_norm: Option<Tensor>,
    pub mlp_post_norm: Option<Tensor>,
    pub gate: Held,
    pub up: Held,
    pub down: Held,
    /// Qwen2 has biases on these three.
    pub q_bias: Option<Tensor>,
    pub k_bias: Option<Tensor>,
    pub v_bias: Option<Tensor>,
    /// The norms of queries and keys, as wide as [`ModelConfig::qk_norm_sizes`] says.
    pub q_norm: Option<Tensor>,
    pub k_norm: Option<Tensor>,
}

impl Weights {
    /// Reads all weights of a model, its layers in parallel.
    pub(crate) fn load(files: &Files, config: &ModelConfig, output: Output, hold: Hold) -> Result<Self, EngineError> {
        let loader = Loader { files, config, hold };
        let embed = loader.matrix("model.embed_tokens.weight", &[config.vocab, config.hidden_size])?;
        let lm_head = match output {
            Output::Score => loader.score_head()?.into(),
            Output::Vocabulary if config.tied => embed.clone(),
            Output::Vocabulary => loader.matrix("lm_head.weight", &[config.vocab, config.hidden_size])?,
        };
        let norm = loader.norm("model.norm.weight", config.hidden_size)?;
        let layers = (0..config.layers.len()).into_par_iter().map(|i| loader.layer(i)).collect::<Result<_, _>>()?;
        Ok(Weights { embed, layers, norm, lm_head })
    }

    /// Returns how the matrices are held.
    pub fn hold(&self) -> Hold {
        match self.embed {
            Held::Wide(_) => Hold::F32,
            Held::Stored(_) => Hold::Stored,
        }
    }

    /// Returns how much memory the matrices take, in bytes. A tied output layer takes none.
    pub fn bytes(&self, config: &ModelConfig) -> u64 {
        let layer = |w: &LayerWeights| {
            [&w.q, &w.k, &w.v, &w.o, &w.gate, &w.up, &w.down].into_iter().map(Held::bytes).sum::<u64>()
        };
        let head = if config.tied { 0 } else { self.lm_head.bytes() };
        self.embed.bytes() + head + self.layers.iter().map(layer).sum::<u64>()
    }
}

struct Loader<'a> {
    files: &'a Files,
    config: &'a ModelConfig,
    hold: Hold,
}

impl Loader<'_> {
    fn score_head(&self) -> Result<Tensor, EngineError> {
        const NAME: &str = "score.weight";
        let found = self.files.tensor(NAME, self.config)?;
        let head =
            found.ok_or_else(|| self.fault(NAME, "is missing: this is no model for sequence classification".into()))?;
        match head.dims() {
            [1, width] if *width == self.config.hidden_size => Ok(head),
            [labels, _] if *labels > 1 => {
                Err(self.fault(NAME, format!("gives {labels} numbers; a reward model gives one (num_labels = 1)")))
            }
            other => {
                Err(self.fault(NAME, format!("has shape {other:?} where [1, {}] is expected", self.config.hidden_size)))
            }
        }
    }

    fn layer(&self, layer: usize) -> Result<LayerWeights, EngineError> {
        let c = self.config;
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let required = |part: &str, shape: &[usize; 2]| self.matrix(&name(part), shape);
        let optional = |part: &str, shape: &[usize]| self.optional(&name(part), shape);
        let (hidden, query, kv, wide) = (c.hidden_size, c.query_size(), c.kv_size(), c.intermediate_size);
        let norm = |part: Option<&str>, width: usize| {
            part.map(|part| self.norm(&name(&format!("{part}.weight")), width)).transpose()
        };
        for unknown in ["self_attn.o_proj.bias", "mlp.gate_proj.bias", "mlp.up_proj.bias", "mlp.down_proj.bias"] {
            if self.files.tensor(&name(unknown), c)?.is_some() {
                return Err(self.fault(&name(unknown), "is a bias that no supported family has".into()));
            }
        }
        let [q, k, v] = match c.block.projections {
            Projections::Split => [
                required("self_attn.q_proj.weight", &[query, hidden])?,
                required("self_attn.k_proj.weight", &[kv, hidden])?,
                required("self_attn.v_proj.weight", &[kv, hidden])?,
            ],
            Projections::Fused => {
                let fused = required("self_attn.qkv_proj.weight", &[query + 2 * kv, hidden])?;
                [fused.narrow(0, query)?, fused.narrow(query, kv)?, fused.narrow(query + kv, kv)?]
            }
        };
        let [gate, up] = match c.block.projections {
            Projections::Split => {
                [required("mlp.gate_proj.weight", &[wide, hidden])?, required("mlp.up_proj.weight", &[wide, hidden])?]
            }
            Projections::Fused => {
                let fused = required("mlp.gate_up_proj.weight", &[2 * wide, hidden])?;
                [fused.narrow(0, wide)?, fused.narrow(wide, wide)?]
            }
        };
        let [attn_norm, attn_post_norm, mlp_norm, mlp_post_norm] = norm_names(c.block.norms);
        let qk_norm = c.qk_norm_sizes();
        Ok(LayerWeights {
            attn_norm: norm(attn_norm, hidden)?,
            attn_post_norm: norm(attn_post_norm, hidden)?,
            q,
            k,
            v,
            o: required("self_attn.o_proj.weight", &[hidden, query])?,
            mlp_norm: norm(mlp_norm, hidden)?,
            mlp_post_norm: norm(mlp_post_norm, hidden)?,
            gate,
            up,
            down: required("mlp.down_proj.weight", &[hidden, wide])?,
            q_bias: optional("self_attn.q_proj.bias", &[query])?,
            k_bias: optional("self_attn.k_proj.bias", &[kv])?,
            v_bias: optional("self_attn.v_proj.bias", &[kv])?,
            q_norm: qk_norm.map(|(q, _)| self.norm(&name("self_attn.q_norm.weight"), q)).transpose()?,
            k_norm: qk_norm.map(|(_, k)| self.norm(&name("self_attn.k_norm.weight"), k)).transpose()?,
        })
    }

    fn norm(&self, name: &str, width: usize) -> Result<Tensor, EngineError> {
        let weight = self.required(name, &[width])?;
        Ok(match self.config.block.norm_weight {
            NormWeight::Whole => weight,
            NormWeight::AboveOne => (weight + 1.0)?,
        })
    }

    fn matrix(&self, name: &str, shape: &[usize; 2]) -> Result<Held, EngineError> {
        let found =
            self.files.held(name, self.config, self.hold)?.ok_or_else(|| self.fault(name, "is missing".into()))?;
        let (rows, columns) = found.dims2()?;
        if [rows, columns] != *shape {
            return Err(self.fault(name, format!("has shape {:?} where {shape:?} is expected", [rows, columns])));
        }
        Ok(found)
    }

    fn required(&self, name: &str, shape: &[usize]) -> Result<Tensor, EngineError> {
        self.optional(name, shape)?.ok_or_else(|| self.fault(name, "is missing".into()))
    }

    fn optional(&self, name: &str, shape: &[usize]) -> Result<Option<Tensor>, EngineError> {
        let Some(tensor) = self.files.tensor(name, self.config)? else { return Ok(None) };
        if tensor.dims() != shape {
            return Err(self.fault(name, format!("has shape {:?} where {shape:?} is expected", tensor.dims())));
        }
        Ok(Some(tensor))
    }

    fn fault(&self, name: &str, problem: String) -> EngineError {
        EngineError::tensor(self.files.home(), name, problem, "use a complete model of a supported family")
    }
}

/// Returns Hugging Face's names of the norms before and after attention and before and after the MLP. One name means
/// two things: where nothing is normed after attention, it is the norm before the MLP.
pub(super) fn norm_names(norms: Norms) -> [Option<&'static str>; 4] {
    match norms {
        Norms::Pre => [Some("input_layernorm"), None, Some("post_attention_layernorm"), None],
        Norms::Post => [None, Some("post_attention_layernorm"), None, Some("post_feedforward_layernorm")],
        Norms::Both => [
            Some("input_layernorm"),
            Some("post_attention_layernorm"),
            Some("pre_feedforward_layernorm"),
            Some("post_feedforward_layernorm"),
        ],
    }
}
