//! The fields of Hugging Face's `config.json`, with the defaults that transformers has for the absent ones.

use std::path::Path;

use serde_json::Value;

use super::{Activation, Architecture, CONFIG_REMEDY, LayerKind, ModelConfig, RopeConfig, RopeScaling, Scores};
use crate::engine::error::EngineError;

pub(super) fn read(path: &Path, value: &Value) -> Result<ModelConfig, EngineError> {
    let name = value["model_type"].as_str().unwrap_or("(none)");
    let architecture = Architecture::parse(name, &Architecture::ALL, path)?;
    Fields { path, value, architecture }.config()
}

struct Fields<'a> {
    path: &'a Path,
    value: &'a Value,
    architecture: Architecture,
}

impl Fields<'_> {
    fn config(&self) -> Result<ModelConfig, EngineError> {
        self.refuse_what_is_not_built()?;
        let architecture = self.architecture;
        let (heads, hidden_size) = (self.count("num_attention_heads")?, self.count("hidden_size")?);
        let head_dim = self.optional("head_dim").unwrap_or(hidden_size.checked_div(heads).unwrap_or(0));
        let positions = self.optional("max_position_embeddings").unwrap_or(2048);
        let gemma = matches!(architecture, Architecture::Gemma2 | Architecture::Gemma3);
        let cap = |key: &str, absent: f64| match self.value.get(key) {
            None => (architecture == Architecture::Gemma2).then_some(absent as f32),
            Some(value) => value.as_f64().map(|cap| cap as f32),
        };
        let scalar =
            if gemma { self.value["query_pre_attn_scalar"].as_f64().unwrap_or(256.0) } else { head_dim as f64 };
        let eps = if matches!(architecture, Architecture::Olmo2 | Architecture::Phi3) { 1e-5 } else { 1e-6 };
        let ropes = self.ropes(head_dim, positions)?;
        // The factors for longer sequences are others, which would change all keys in the middle of one.
        let longrope = matches!(ropes[0].scaling, RopeScaling::Divisors { .. });
        let original = self.original_positions(self.rope(), positions);
        ModelConfig {
            architecture,
            block: architecture.block(),
            vocab: self.count("vocab_size")?,
            hidden_size,
            intermediate_size: self.count("intermediate_size")?,
            layers: self.layers(self.count("num_hidden_layers")?)?,
            heads,
            kv_heads: self.optional("num_key_value_heads").unwrap_or(heads),
            head_dim,
            rms_eps: self.value["rms_norm_eps"].as_f64().unwrap_or(eps),
            ropes,
            scores: Scores { scale: 1.0 / (scalar as f32).sqrt(), cap: cap("attn_logit_softcapping", 50.0) },
            embedding_scale: gemma.then(|| (hidden_size as f32).sqrt()),
            logit_cap: if gemma { cap("final_logit_softcapping", 30.0) } else { None },
            max_positions: if longrope { positions.min(original) } else { positions },
            tied: self.value["tie_word_embeddings"].as_bool().unwrap_or(gemma || architecture == Architecture::SmolLm3),
        }
        .check(self.path)
    }

    /// Refuses settings that change what a model computes in a way that is not built.
    fn refuse_what_is_not_built(&self) -> Result<(), EngineError> {
        let expected = match self.architecture.block().activation {
            Activation::SwiGlu => "silu",
            Activation::GeGlu => "gelu_pytorch_tanh",
        };
        let activation = self.value["hidden_activation"].as_str().or(self.value["hidden_act"].as_str());
        let problem = if let Some(found) = activation.filter(|found| *found != expected) {
            format!("hidden_act {found} is not {expected}")
        } else if self.value["use_bidirectional_attention"].as_bool() == Some(true) {
            "use_bidirectional_attention is true, and a decoder looks back only".to_string()
        } else if self.architecture != Architecture::Gemma2 && !self.value["attn_logit_softcapping"].is_null() {
            format!("attn_logit_softcapping is set, which {} does not apply", self.architecture.as_str())
        } else {
            return Ok(());
        };
        Err(EngineError::file(self.path, problem, CONFIG_REMEDY))
    }

    fn count(&self, key: &str) -> Result<usize, EngineError> {
        self.optional(key).ok_or_else(|| EngineError::file(self.path, format!("{key} is missing"), CONFIG_REMEDY))
    }

    fn optional(&self, key: &str) -> Option<usize> {
        self.value[key].as_u64().map(|v| v as usize)
    }

    /// Returns the sliding window where the model uses one. Absent and null differ, as they do in transformers.
    fn window(&self) -> Option<usize> {
        use Architecture::{Gemma2, Gemma3, Llama, Mistral, Olmo2, Phi3, Qwen2, Qwen3, SmolLm3};
        let (on, absent) = match self.architecture {
            Llama | Olmo2 => (false, None),
            Mistral | Gemma2 | Gemma3 => (true, Some(4096)),
            Phi3 => (true, None),
            Qwen2 | Qwen3 => (self.value["use_sliding_window"].as_bool() == Some(true), Some(4096)),
            SmolLm3 => (self.value["use_sliding_window"].as_bool() == Some(true), None),
        };
        let window = if self.value.get("sliding_window").is_some() { self.optional("sliding_window") } else { absent };
        window.filter(|_| on)
    }

    fn layers(&self, count: usize) -> Result<Vec<LayerKind>, EngineError> {
        let window = self.window();
        let layer = |index: usize| {
            let rotates = self.architecture != Architecture::SmolLm3 || self.rotates(index);
            let slides = window.is_some() && self.slides(index, rotates)?;
            let rope = usize::from(slides && self.architecture == Architecture::Gemma3);
            Ok(LayerKind { rope: rotates.then_some(rope), window: window.filter(|_| slides) })
        };
        (0..count).map(layer).collect()
    }

    /// Returns whether a layer of SmolLM3 has a rotary embedding.
    fn rotates(&self, index: usize) -> bool {
        match self.value["no_rope_layers"].as_array() {
            Some(listed) => listed.get(index).and_then(Value::as_u64) != Some(0),
            None => !(index + 1).is_multiple_of(self.optional("no_rope_layer_interval").unwrap_or(4).max(1)),
        }
    }

    /// Returns whether a layer slides its window, in a model that has one.
    fn slides(&self, index: usize, rotates: bool) -> Result<bool, EngineError> {
        use Architecture::{Gemma2, Gemma3, Llama, Mistral, Olmo2, Phi3, Qwen2, Qwen3, SmolLm3};
        let listed = self.value["layer_types"].as_array().filter(|_| !matches!(self.architecture, Mistral | Phi3));
        if let Some(kinds) = listed {
            return match kinds.get(index).and_then(Value::as_str) {
                Some("sliding_attention") => Ok(true),
                Some("full_attention") => Ok(false),
                other => {
                    let problem =
                        format!("layer_types[{index}] {other:?} is not one of sliding_attention, full_attention");
                    Err(EngineError::file(self.path, problem, CONFIG_REMEDY))
                }
            };
        }
        Ok(match self.architecture {
            Llama | Olmo2 => false,
            Mistral | Phi3 => true,
            Qwen2 | Qwen3 => index >= self.optional("max_window_layers").unwrap_or(28),
            SmolLm3 => !rotates,
            Gemma2 => index.is_multiple_of(2),
            Gemma3 => !(index + 1).is_multiple_of(self.optional("sliding_window_pattern").unwrap_or(6).max(1)),
        })
    }

    /// Returns the rotary settings, which transformers 5 moved into `rope_parameters`.
    fn rope(&self) -> &Value {
        let key = if self.value["rope_parameters"].is_object() { "rope_parameters" } else { "rope_scaling" };
        let rope = &self.value[key];
        if rope["full_attention"].is_object() { &rope["full_attention"] } else { rope }
    }

    /// Returns the model's rotary embeddings; Gemma 3 has a second one for the layers that slide.
    fn ropes(&self, head_dim: usize, positions: usize) -> Result<Vec<RopeConfig>, EngineError> {
        let theta = match self.architecture {
            Architecture::SmolLm3 => 2e6,
            Architecture::Gemma3 => 1e6,
            _ => 1e4,
        };
        let mut ropes = vec![self.rope_config(self.rope(), "rope_theta", theta, head_dim, positions)?];
        if self.architecture == Architecture::Gemma3 {
            let local = &self.value["rope_parameters"]["sliding_attention"];
            ropes.push(self.rope_config(local, "rope_local_base_freq", 1e4, head_dim, positions)?);
        }
        Ok(ropes)
    }

    fn rope_config(
        &self,
        rope: &Value,
        theta_key: &str,
        theta: f64,
        head_dim: usize,
        positions: usize,
    ) -> Result<RopeConfig, EngineError> {
        let either = |key: &str, outside: &str| rope[key].as_f64().or(self.value[outside].as_f64());
        let theta = either("rope_theta", theta_key).unwrap_or(theta);
        let dim = (head_dim as f64 * either("partial_rotary_factor", "partial_rotary_factor").unwrap_or(1.0)) as usize;
        let kind = rope["rope_type"].as_str().or(rope["type"].as_str()).unwrap_or("default");
        let kind = match kind {
            // Names that Phi-3 was published with.
            "su" | "yarn" if self.architecture == Architecture::Phi3 => "longrope",
            other => other,
        };
        let number = |key: &str| {
            let missing = || EngineError::file(self.path, format!("rope {key} is missing"), CONFIG_REMEDY);
            rope[key].as_f64().ok_or_else(missing)
        };
        let scaling = match kind {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: number("factor")? },
            "llama3" => RopeScaling::Llama3 {
                factor: number("factor")?,
                low: number("low_freq_factor")?,
                high: number("high_freq_factor")?,
                original: number("original_max_position_embeddings")?,
            },
            "longrope" => self.longrope(rope, dim, positions)?,
            "yarn" => self.yarn(rope, theta, dim, positions),
            other => {
                let problem = format!("rope type {other} is not one of default, linear, llama3, longrope, yarn");
                return Err(EngineError::file(self.path, problem, CONFIG_REMEDY));
            }
        };
        Ok(RopeConfig { theta, dim, scaling })
    }

    /// Returns the positions that the model was trained on before its rotary embedding was stretched.
    fn original_positions(&self, rope: &Value, positions: usize) -> usize {
        const KEY: &str = "original_max_position_embeddings";
        self.optional(KEY).or(rope[KEY].as_u64().map(|v| v as usize)).unwrap_or(positions)
    }

    /// Returns how much longer the stretched context is than the original one.
    fn stretch(&self, rope: &Value, positions: usize) -> f64 {
        let ratio = positions as f64 / self.original_positions(rope, positions).max(1) as f64;
        rope["factor"].as_f64().unwrap_or(ratio)
    }

    /// Returns Phi-3's factors for sequences within the original context, to which the model is held.
    fn longrope(&self, rope: &Value, dim: usize, positions: usize) -> Result<RopeScaling, EngineError> {
        let factors: Option<Vec<f32>> = rope["short_factor"]
            .as_array()
            .and_then(|list| list.iter().map(|v| v.as_f64().map(|v| v as f32)).collect());
        let Some(divisors) = factors.filter(|factors| factors.len() == dim / 2) else {
            let problem = format!("rope short_factor is not a list of {} numbers", dim / 2);
            return Err(EngineError::file(self.path, problem, CONFIG_REMEDY));
        };
        let (factor, original) = (self.stretch(rope, positions), self.original_positions(rope, positions) as f64);
        let inferred = if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original.ln()).sqrt() };
        let attention = rope["attention_factor"].as_f64().unwrap_or(inferred) as f32;
        Ok(RopeScaling::Divisors { divisors, attention })
    }

    fn yarn(&self, rope: &Value, theta: f64, dim: usize, positions: usize) -> RopeScaling {
        let factor = self.stretch(rope, positions);
        let original = self.original_positions(rope, positions) as f64;
        let set = |key: &str| rope[key].as_f64().filter(|v| *v != 0.0);
        let scale = |by: f64| if factor <= 1.0 { 1.0 } else { 0.1 * by * factor.ln() + 1.0 };
        let inferred = match (set("mscale"), set("mscale_all_dim")) {
            (Some(one), Some(all)) => scale(one) / scale(all),
            _ => scale(1.0),
        };
        let attention = rope["attention_factor"].as_f64().unwrap_or(inferred) as f32;
        // The dimension that turns so often within the original context.
        let turning = |turns: f64| {
            let turns_per_radian = original / (turns * 2.0 * std::f64::consts::PI);
            dim as f64 * turns_per_radian.ln() / (2.0 * theta.ln())
        };
        let (mut low, mut high) = (turning(set("beta_fast").unwrap_or(32.0)), turning(set("beta_slow").unwrap_or(1.0)));
        if rope["truncate"].as_bool().unwrap_or(true) {
            (low, high) = (low.floor(), high.ceil());
        }
        RopeScaling::Yarn { factor, low: low.max(0.0), high: high.min(dim as f64 - 1.0), attention }
    }
}

#[cfg(test)]
mod tests;
