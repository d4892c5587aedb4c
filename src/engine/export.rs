//! A trained reward model as a folder that transformers loads: the merged weights and the scalar head of a
//! `...ForSequenceClassification`, its config, tokenizer and chat template.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{Device, Tensor};
use serde_json::{Value, json};

use super::config::{Architecture, ModelConfig, NormWeight, Projections, RopeConfig, RopeScaling};
use super::error::EngineError;
use super::gguf_tokenizer;
use super::lora::{Adapter, Linear, merged, serialise};
use super::model::Model;
use super::source::{Files, ModelSource};
use super::weights::{LayerWeights, norm_names};
use crate::durable;

const ROOM: &str = "check that the folder can be written and the disk has room";
const FOLDER: &str = "give the model as a folder in Hugging Face layout";

/// A scalar head and where it is read.
#[derive(Debug, Clone)]
pub struct ScoreHead {
    /// As wide as the hidden rows.
    pub weight: Vec<f32>,
    /// The id that pads: the head reads the last token that is none.
    pub padding: u32,
}

/// Returns the padding id of a model: its own, or else the one that ends its texts.
pub fn padding_id(model: &str) -> Result<u32, EngineError> {
    let files = ModelSource::parse(model)?.resolve()?;
    let id = match files.gguf() {
        Some(gguf) => gguf.padding_id().or(gguf.end_ids().first().copied()),
        None => {
            let config = files.json("config.json")?;
            let ends = &config["eos_token_id"];
            let id = config["pad_token_id"].as_u64().or(ends.as_u64()).or(ends[0].as_u64());
            id.map(|id| id as u32)
        }
    };
    Ok(id.unwrap_or(0))
}

/// Writes `base` with `adapter` merged into it and the head into the folder, in f32. The config comes last, so that a folder
/// that has one is whole. `source` is what `base` was loaded from.
pub fn save_classifier(
    source: &str,
    base: &Model,
    adapter: &Adapter,
    head: &ScoreHead,
    folder: &Path,
) -> Result<(), EngineError> {
    let files = ModelSource::parse(source)?.resolve()?;
    let fault = |e: durable::FileError| EngineError::file(folder, e, ROOM);
    let config = classifier_config(&files, base, head.padding)?;
    durable::create_folder(folder).map_err(fault)?;
    let tensors = tensors(base, adapter, head)?;
    let note = ("base_model_sha256", base.identity().sha256.as_str());
    durable::write(&folder.join("model.safetensors"), &serialise(&tensors, note)?).map_err(fault)?;
    match files.gguf() {
        Some(gguf) => {
            let described = json!({
                "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": gguf.special("bos"),
                "eos_token": gguf.special("eos"), "chat_template": gguf.text("tokenizer.chat_template"),
            });
            durable::write_json(&folder.join("tokenizer.json"), &gguf_tokenizer::to_json(gguf)?).map_err(fault)?;
            durable::write_json(&folder.join("tokenizer_config.json"), &described).map_err(fault)?;
        }
        None => copy_tokenizer(&files, folder)?,
    }
    durable::write_json(&folder.join("config.json"), &config).map_err(fault)
}

fn copy_tokenizer(files: &Files, folder: &Path) -> Result<(), EngineError> {
    for name in ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"] {
        let from = files.home().join(name);
        if from.is_file() {
            let bytes = std::fs::read(&from).map_err(|e| EngineError::file(&from, e, "check its permissions"))?;
            durable::write(&folder.join(name), &bytes).map_err(|e| EngineError::file(folder, e, ROOM))?;
        }
    }
    Ok(())
}

/// Returns all weights by Hugging Face's names.
fn tensors(base: &Model, adapter: &Adapter, head: &ScoreHead) -> Result<BTreeMap<String, Tensor>, EngineError> {
    let (config, weights) = (base.config(), base.weights());
    let norm = |tensor: &Tensor| match config.block.norm_weight {
        NormWeight::Whole => Ok(tensor.clone()),
        NormWeight::AboveOne => tensor - 1.0,
    };
    let mut all = BTreeMap::from([
        ("model.embed_tokens.weight".to_owned(), weights.embed.tensor()?),
        ("model.norm.weight".to_owned(), norm(&weights.norm)?),
        ("score.weight".to_owned(), Tensor::from_slice(&head.weight, (1, head.weight.len()), &Device::Cpu)?),
    ]);
    for (index, layer) in weights.layers.iter().enumerate() {
        for (name, tensor) in layer_tensors(config, layer, |linear| adapter.get(index, linear))? {
            all.insert(format!("model.layers.{index}.{name}"), tensor);
        }
        let [attn, attn_post, mlp, mlp_post] = norm_names(config.block.norms);
        let norms = [
            (attn, &layer.attn_norm),
            (attn_post, &layer.attn_post_norm),
            (mlp, &layer.mlp_norm),
            (mlp_post, &layer.mlp_post_norm),
            (Some("self_attn.q_norm"), &layer.q_norm),
            (Some("self_attn.k_norm"), &layer.k_norm),
        ];
        for (name, tensor) in norms {
            if let (Some(name), Some(tensor)) = (name, tensor) {
                all.insert(format!("model.layers.{index}.{name}.weight"), norm(tensor)?);
            }
        }
    }
    Ok(all)
}

fn layer_tensors<'a>(
    config: &ModelConfig,
    w: &LayerWeights,
    pair: impl Fn(Linear) -> Option<&'a super::lora::LoraPair>,
) -> Result<Vec<(String, Tensor)>, EngineError> {
    let linears = [
        (Linear::Q, &w.q),
        (Linear::K, &w.k),
        (Linear::V, &w.v),
        (Linear::O, &w.o),
        (Linear::Gate, &w.gate),
        (Linear::Up, &w.up),
        (Linear::Down, &w.down),
    ];
    let mut all = Vec::new();
    for (linear, tensor) in linears {
        all.push((format!("{}.weight", linear.peft_name()), merged(tensor, pair(linear))?.tensor()?));
    }
    for (linear, bias) in [(Linear::Q, &w.q_bias), (Linear::K, &w.k_bias), (Linear::V, &w.v_bias)] {
        all.extend(bias.iter().map(|bias| (format!("{}.bias", linear.peft_name()), bias.clone())));
    }
    if config.block.projections == Projections::Fused {
        let [q, k, v, o, gate, up, down] = [0, 1, 2, 3, 4, 5, 6].map(|at| all[at].1.clone());
        let named = |name: &str, tensor: Tensor| (format!("{name}.weight"), tensor);
        all = vec![
            named("self_attn.qkv_proj", Tensor::cat(&[q, k, v], 0)?),
            named("self_attn.o_proj", o),
            named("mlp.gate_up_proj", Tensor::cat(&[gate, up], 0)?),
            named("mlp.down_proj", down),
        ];
    }
    Ok(all)
}

/// Returns the config of the classifier: the base's own where there is one.
fn classifier_config(files: &Files, base: &Model, padding: u32) -> Result<Value, EngineError> {
    let shape = base.config();
    let class = class(shape.architecture).ok_or_else(|| {
        let problem = format!("transformers has no sequence classification for {}", shape.architecture.as_str());
        EngineError::file(files.home(), problem, "train on a model of another family")
    })?;
    let mut config = match files.gguf() {
        Some(_) => gguf_config(files, shape)?,
        None => files.json("config.json")?,
    };
    for key in ["quantization_config", "num_labels", "torch_dtype", "auto_map"] {
        if let Some(fields) = config.as_object_mut() {
            fields.remove(key);
        }
    }
    config["architectures"] = json!([class]);
    config["id2label"] = json!({ "0": "LABEL_0" });
    config["label2id"] = json!({ "LABEL_0": 0 });
    config["pad_token_id"] = json!(padding);
    config["dtype"] = json!("float32");
    Ok(config)
}

fn class(architecture: Architecture) -> Option<&'static str> {
    Some(match architecture {
        Architecture::Llama => "LlamaForSequenceClassification",
        Architecture::Mistral => "MistralForSequenceClassification",
        Architecture::Qwen2 => "Qwen2ForSequenceClassification",
        Architecture::Qwen3 => "Qwen3ForSequenceClassification",
        Architecture::SmolLm3 => "SmolLM3ForSequenceClassification",
        Architecture::Phi3 => "Phi3ForSequenceClassification",
        Architecture::Gemma2 => "Gemma2ForSequenceClassification",
        Architecture::Gemma3 => "Gemma3TextForSequenceClassification",
        Architecture::Olmo2 => return None,
    })
}

/// Writes the config that a GGUF file has no copy of, for the families whose keys are plain.
fn gguf_config(files: &Files, c: &ModelConfig) -> Result<Value, EngineError> {
    let plain = matches!(
        c.architecture,
        Architecture::Llama | Architecture::Mistral | Architecture::Qwen2 | Architecture::Qwen3
    );
    let rope = match c.ropes.as_slice() {
        [RopeConfig { theta, scaling: RopeScaling::None, dim }] if plain && *dim == c.head_dim => theta,
        _ => return Err(EngineError::file(files.home(), "its config cannot be written back from GGUF", FOLDER)),
    };
    let windows = c.layers.iter().any(|layer| layer.window.is_some());
    if windows {
        return Err(EngineError::file(files.home(), "its windows cannot be written back from GGUF", FOLDER));
    }
    Ok(json!({
        "model_type": c.architecture.as_str(), "vocab_size": c.vocab, "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size, "num_hidden_layers": c.layers.len(), "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads, "head_dim": c.head_dim, "rms_norm_eps": c.rms_eps, "hidden_act": "silu",
        "max_position_embeddings": c.max_positions, "tie_word_embeddings": c.tied, "sliding_window": null,
        "rope_theta": rope, "rope_parameters": { "rope_type": "default", "rope_theta": rope },
    }))
}
