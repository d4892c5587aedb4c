//! The metadata of a GGUF file, whose keys start with the architecture's name.

use std::path::Path;

use candle_core::quantized::gguf_file::{Content, Value as GgufValue};

use super::{Architecture, CONFIG_REMEDY, LayerKind, ModelConfig, RopeConfig, RopeScaling, Scores};
use crate::engine::error::EngineError;

/// The families whose metadata say all that the decoder must know.
const KNOWN: [Architecture; 7] = [
    Architecture::Llama,
    Architecture::Mistral,
    Architecture::Qwen2,
    Architecture::Qwen3,
    Architecture::SmolLm3,
    Architecture::Olmo2,
    Architecture::Phi3,
];
/// llama.cpp's names of families that work as a folder only: their files lack the scale of the scores, which layers
/// slide, or the second rotary base, all of which llama.cpp has in its code.
const FOLDER_ONLY: [&str; 2] = ["gemma2", "gemma3"];
/// Every so many-th layer of SmolLM3 has no rotary embedding; llama.cpp has the number in its code too.
const SMOLLM3_STEP: usize = 4;

pub(super) fn read(content: &Content, divisors: Option<Vec<f32>>, path: &Path) -> Result<ModelConfig, EngineError> {
    let name = content.metadata.get("general.architecture").and_then(|v| v.to_string().ok()).cloned();
    let name = name.ok_or_else(|| EngineError::file(path, "general.architecture is missing", CONFIG_REMEDY))?;
    if FOLDER_ONLY.contains(&name.as_str()) {
        let problem = format!("a GGUF of architecture {name} does not hold all that the model's config.json does");
        return Err(EngineError::file(path, problem, "use the model's folder in Hugging Face layout"));
    }
    let architecture = Architecture::parse(&name, &KNOWN, path)?;
    Gguf { path, content, name }.config(architecture, divisors)
}

struct Gguf<'a> {
    path: &'a Path,
    content: &'a Content,
    name: String,
}

impl Gguf<'_> {
    fn config(&self, architecture: Architecture, divisors: Option<Vec<f32>>) -> Result<ModelConfig, EngineError> {
        let (heads, hidden_size) = (self.count("attention.head_count")?, self.count("embedding_length")?);
        let (rotated, phi3) = (self.optional("rope.dimension_count"), architecture == Architecture::Phi3);
        let head_dim = self
            .optional("attention.key_length")
            .or(rotated.filter(|_| !phi3))
            .unwrap_or(hidden_size.checked_div(heads).unwrap_or(0));
        let dim = rotated.unwrap_or(head_dim);
        if dim != head_dim && !phi3 {
            let problem = format!("rotates {dim} of {head_dim} dimensions of a head, which is not supported");
            return Err(EngineError::file(self.path, problem, CONFIG_REMEDY));
        }
        let tokens = self.content.metadata.get("tokenizer.ggml.tokens").and_then(|v| v.to_vec().ok()).map(Vec::len);
        let window = match phi3 {
            // 0 where there is none; older files do not say, and some of those models slide.
            true => Some(self.count("attention.sliding_window")?).filter(|w| *w > 0),
            false => self.optional("attention.sliding_window"),
        };
        let mut positions = self.count("context_length")?;
        match (phi3, &divisors) {
            (true, None) => (),
            // The file's other factors, for longer sequences, are not built.
            (true, Some(_)) => positions = positions.min(self.count("rope.scaling.original_context_length")?),
            // Which layers slide is not said; within the window all do the same.
            (false, _) => positions = window.map_or(positions, |w| w.min(positions)),
        }
        let layer = |index: usize| LayerKind {
            rope: (architecture != Architecture::SmolLm3 || !(index + 1).is_multiple_of(SMOLLM3_STEP)).then_some(0),
            window: window.filter(|_| phi3),
        };
        let theta = self.number("rope.freq_base").unwrap_or(10_000.0);
        ModelConfig {
            architecture,
            block: architecture.block(),
            vocab: tokens.or(self.optional("vocab_size")).unwrap_or(0),
            hidden_size,
            intermediate_size: self.count("feed_forward_length")?,
            layers: (0..self.count("block_count")?).map(layer).collect(),
            heads,
            kv_heads: self.optional("attention.head_count_kv").unwrap_or(heads),
            head_dim,
            rms_eps: self.number("attention.layer_norm_rms_epsilon").unwrap_or(1e-6),
            ropes: vec![RopeConfig { theta, dim, scaling: self.scaling(divisors)? }],
            scores: Scores { scale: 1.0 / (head_dim as f32).sqrt(), cap: None },
            embedding_scale: None,
            logit_cap: None,
            max_positions: positions,
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

    fn scaling(&self, divisors: Option<Vec<f32>>) -> Result<RopeScaling, EngineError> {
        if let Some(divisors) = divisors {
            let attention = self.number("rope.scaling.attn_factor").unwrap_or(1.0) as f32;
            return Ok(RopeScaling::Divisors { divisors, attention });
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
