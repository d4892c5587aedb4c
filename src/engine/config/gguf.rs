//! The metadata of a GGUF file, whose keys start with the architecture's name.

use std::path::Path;

use candle_core::quantized::gguf_file::{Content, Value as GgufValue};

use super::{Architecture, Block, CONFIG_REMEDY, LayerKind, ModelConfig, NormWeight, RopeConfig, RopeScaling, Scores};
use crate::engine::error::EngineError;

/// llama.cpp's names of the families, as they stand in `general.architecture`.
const KNOWN: [(&str, Architecture); 9] = [
    ("llama", Architecture::Llama),
    ("mistral", Architecture::Mistral),
    ("qwen2", Architecture::Qwen2),
    ("qwen3", Architecture::Qwen3),
    ("smollm3", Architecture::SmolLm3),
    ("olmo2", Architecture::Olmo2),
    ("phi3", Architecture::Phi3),
    ("gemma2", Architecture::Gemma2),
    ("gemma3", Architecture::Gemma3),
];
/// Every so many-th layer of SmolLM3 has no rotary embedding; llama.cpp has the number in its code.
const SMOLLM3_STEP: usize = 4;
/// Every so many-th layer of Gemma looks at all positions, the others slide; in llama.cpp's code too.
const GEMMA2_STEP: usize = 2;
const GEMMA3_STEP: usize = 6;
/// Layers of the two 27B models, whose scores are scaled by another width than the heads'; llama.cpp tells them so as well.
const GEMMA_27B_LAYERS: [usize; 2] = [46, 62];
/// Base of the rotary embedding in Gemma 3's layers that slide.
const GEMMA3_LOCAL_THETA: f64 = 10_000.0;

pub(super) fn read(content: &Content, divisors: Option<Vec<f32>>, path: &Path) -> Result<ModelConfig, EngineError> {
    let name = content.metadata.get("general.architecture").and_then(|v| v.to_string().ok()).cloned();
    let name = name.ok_or_else(|| EngineError::file(path, "general.architecture is missing", CONFIG_REMEDY))?;
    let known = KNOWN.iter().find(|(known, _)| *known == name).ok_or_else(|| EngineError::Architecture {
        file: path.display().to_string(),
        found: name.clone(),
        supported: KNOWN.map(|(name, _)| name).join(", "),
    });
    let architecture = known?.1;
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
        let step = match architecture {
            Architecture::Gemma2 => Some(GEMMA2_STEP),
            Architecture::Gemma3 => Some(GEMMA3_STEP),
            _ => None,
        };
        match (phi3, &divisors) {
            _ if step.is_some() => (),
            (true, None) => (),
            // The file's other factors, for longer sequences, are not built.
            (true, Some(_)) => positions = positions.min(self.count("rope.scaling.original_context_length")?),
            // Which layers slide is not said; within the window all do the same.
            (false, _) => positions = window.map_or(positions, |w| w.min(positions)),
        }
        let layer = |index: usize| {
            let slides = window.is_some() && step.map_or(phi3, |step| !(index + 1).is_multiple_of(step));
            let rotates = architecture != Architecture::SmolLm3 || !(index + 1).is_multiple_of(SMOLLM3_STEP);
            let rope = usize::from(slides && architecture == Architecture::Gemma3);
            LayerKind { rope: rotates.then_some(rope), window: window.filter(|_| slides) }
        };
        let theta = self.number("rope.freq_base").unwrap_or(10_000.0);
        let mut ropes = vec![RopeConfig { theta, dim, scaling: self.scaling(divisors)? }];
        if architecture == Architecture::Gemma3 {
            ropes.push(RopeConfig { theta: GEMMA3_LOCAL_THETA, dim, scaling: RopeScaling::None });
        }
        let layers = self.count("block_count")?;
        let scaled_by = match step.is_some() && GEMMA_27B_LAYERS.contains(&layers) {
            true => hidden_size / heads.max(1),
            false => head_dim,
        };
        let gemma2 = architecture == Architecture::Gemma2;
        let cap = |key: &str, usual: f64| gemma2.then(|| self.number(key).unwrap_or(usual) as f32);
        // Its converter adds the 1 that Gemma's norms leave out.
        let block = Block { norm_weight: NormWeight::Whole, ..architecture.block() };
        ModelConfig {
            architecture,
            block,
            vocab: tokens.or(self.optional("vocab_size")).unwrap_or(0),
            hidden_size,
            intermediate_size: self.count("feed_forward_length")?,
            layers: (0..layers).map(layer).collect(),
            heads,
            kv_heads: self.optional("attention.head_count_kv").unwrap_or(heads),
            head_dim,
            rms_eps: self.number("attention.layer_norm_rms_epsilon").unwrap_or(1e-6),
            ropes,
            scores: Scores { scale: 1.0 / (scaled_by as f32).sqrt(), cap: cap("attn_logit_softcapping", 50.0) },
            embedding_scale: step.map(|_| (hidden_size as f32).sqrt()),
            logit_cap: cap("final_logit_softcapping", 30.0),
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
