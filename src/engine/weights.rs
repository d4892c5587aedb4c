//! The frozen weights of a model as f32 tensors, the same for sampling, scoring and training.

use candle_core::Tensor;
use rayon::prelude::*;

use super::config::ModelConfig;
use super::error::EngineError;
use super::source::Files;

/// All weights of a decoder. Linear weights are `[out, in]` in Hugging Face's order (rotary halves not interleaved).
#[derive(Debug, Clone)]
pub struct Weights {
    /// `[vocab, hidden]`.
    pub embed: Tensor,
    pub layers: Vec<LayerWeights>,
    /// `[hidden]`.
    pub norm: Tensor,
    /// `[vocab, hidden]`; the embedding itself where the model ties them.
    pub lm_head: Tensor,
}

/// The weights of one layer.
#[derive(Debug, Clone)]
pub struct LayerWeights {
    pub attn_norm: Tensor,
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub o: Tensor,
    pub mlp_norm: Tensor,
    pub gate: Tensor,
    pub up: Tensor,
    pub down: Tensor,
    /// Qwen2 has biases on these three.
    pub q_bias: Option<Tensor>,
    pub k_bias: Option<Tensor>,
    pub v_bias: Option<Tensor>,
    /// Qwen3 norms each head's query and key: `[head_dim]`.
    pub q_norm: Option<Tensor>,
    pub k_norm: Option<Tensor>,
}

impl Weights {
    /// Reads all weights of a model, its layers in parallel.
    pub(crate) fn load(files: &Files, config: &ModelConfig) -> Result<Self, EngineError> {
        let loader = Loader { files, config };
        let embed = loader.required("model.embed_tokens.weight", &[config.vocab, config.hidden_size])?;
        let lm_head = match config.tied {
            true => embed.clone(),
            false => loader.required("lm_head.weight", &[config.vocab, config.hidden_size])?,
        };
        let norm = loader.required("model.norm.weight", &[config.hidden_size])?;
        let layers = (0..config.layers).into_par_iter().map(|i| loader.layer(i)).collect::<Result<_, _>>()?;
        Ok(Weights { embed, layers, norm, lm_head })
    }
}

struct Loader<'a> {
    files: &'a Files,
    config: &'a ModelConfig,
}

impl Loader<'_> {
    fn layer(&self, layer: usize) -> Result<LayerWeights, EngineError> {
        let c = self.config;
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let required = |part: &str, shape: &[usize]| self.required(&name(part), shape);
        let optional = |part: &str, shape: &[usize]| self.optional(&name(part), shape);
        let (hidden, query, kv, wide) = (c.hidden_size, c.query_size(), c.kv_size(), c.intermediate_size);
        for unknown in ["self_attn.o_proj.bias", "mlp.gate_proj.bias", "mlp.up_proj.bias", "mlp.down_proj.bias"] {
            if self.files.tensor(&name(unknown), c)?.is_some() {
                return Err(self.fault(&name(unknown), "is a bias that the Llama family does not have".into()));
            }
        }
        Ok(LayerWeights {
            attn_norm: required("input_layernorm.weight", &[hidden])?,
            q: required("self_attn.q_proj.weight", &[query, hidden])?,
            k: required("self_attn.k_proj.weight", &[kv, hidden])?,
            v: required("self_attn.v_proj.weight", &[kv, hidden])?,
            o: required("self_attn.o_proj.weight", &[hidden, query])?,
            mlp_norm: required("post_attention_layernorm.weight", &[hidden])?,
            gate: required("mlp.gate_proj.weight", &[wide, hidden])?,
            up: required("mlp.up_proj.weight", &[wide, hidden])?,
            down: required("mlp.down_proj.weight", &[hidden, wide])?,
            q_bias: optional("self_attn.q_proj.bias", &[query])?,
            k_bias: optional("self_attn.k_proj.bias", &[kv])?,
            v_bias: optional("self_attn.v_proj.bias", &[kv])?,
            q_norm: optional("self_attn.q_norm.weight", &[c.head_dim])?,
            k_norm: optional("self_attn.k_norm.weight", &[c.head_dim])?,
        })
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
        EngineError::tensor(self.files.home(), name, problem, "use a complete model of the Llama family")
    }
}
