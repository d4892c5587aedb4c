//! Whether an adapter can be served at all, judged from its files before any server is called.
//!
//! Servers answer late and oddly to what they cannot take: vLLM with a 500 from inside the engine, SGLang and llama.cpp
//! not at all, because they ignore a field and serve something else. The rules are those of the servers' own sources,
//! as docs/endpoints.md lists them.

use std::path::Path;

use serde_json::{Map, Value};

use crate::durable::{self, FileError};
use crate::engine::ModelIdentity;
use crate::registry::Manifest;

use super::{Kind, Settings};

/// What the servers take.
#[derive(Debug, Clone, Copy)]
pub struct Bound {
    kind: Kind,
    max_rank: u64,
}

impl Bound {
    /// Returns what the configured servers take.
    pub fn of(settings: &Settings) -> Self {
        Bound { kind: settings.kind, max_rank: settings.max_lora_rank }
    }
}

/// Why an adapter cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum Misfit {
    #[error(transparent)]
    File(#[from] FileError),
    #[error(
        "version {version} was trained on {part} {trained} of {base}, but {part} {here} is served: train anew, or serve the model that it was trained on"
    )]
    Base { version: String, part: &'static str, base: String, trained: String, here: String },
    #[error(
        "version {version} has rank {rank}, but the servers take at most {max}: raise their limit and endpoint.max_lora_rank, or train with a lower tuning.rank"
    )]
    Rank { version: String, rank: u64, max: u64 },
    #[error(
        "version {version} has {field} = {value} in its adapter_config.json, which {server} {what}: train plain LoRA on the linear layers"
    )]
    Field { version: String, field: &'static str, value: String, server: &'static str, what: &'static str },
}

/// Checks the base, tokenizer and chat template that an adapter was trained on, its rank and its fields.
pub fn check(folder: &Path, manifest: &Manifest, base: &ModelIdentity, bound: &Bound) -> Result<(), Misfit> {
    let lineage = &manifest.lineage;
    let note = |key: &str| lineage.notes.get(key);
    let trained_on = [
        ("the weights", Some(&lineage.base.sha256), &base.sha256),
        ("the tokenizer", note("tokenizer_sha256"), &base.tokenizer_sha256),
        ("the chat template", note("template_sha256"), &base.template_sha256),
    ];
    for (part, trained, here) in trained_on {
        if let Some(trained) = trained
            && trained != here
        {
            let (version, base) = (manifest.version.clone(), lineage.base.name.clone());
            return Err(Misfit::Base { version, part, base, trained: short(trained), here: short(here) });
        }
    }
    let config: Map<String, Value> = durable::read_json(&folder.join("adapter_config.json"))?;
    fields(&manifest.version, &config, bound.kind)?;
    let rank = highest_rank(&config);
    match bound.max_rank {
        max if max > 0 && rank > max => Err(Misfit::Rank { version: manifest.version.clone(), rank, max }),
        _ => Ok(()),
    }
}

/// Checks what a server refuses or, worse, ignores.
fn fields(version: &str, config: &Map<String, Value>, kind: Kind) -> Result<(), Misfit> {
    let always = ["use_dora", "lora_bias", "use_qalora", "use_bdlora", "modules_to_save", "layer_replication"];
    let refused = always.into_iter().map(|field| (field, "refuses"));
    let ignored = kind.ignored_fields().iter().map(|field| (*field, "ignores"));
    for (field, what) in refused.chain(ignored) {
        if let Some(value) = config.get(field).filter(|value| is_on(value)) {
            let (version, value) = (version.to_owned(), value.to_string());
            return Err(Misfit::Field { version, field, value, server: kind.as_str(), what });
        }
    }
    match config.get("bias").and_then(Value::as_str) {
        None | Some("none") => Ok(()),
        Some(bias) => {
            let (version, value) = (version.to_owned(), bias.to_owned());
            Err(Misfit::Field { version, field: "bias", value, server: kind.as_str(), what: "refuses" })
        }
    }
}

fn is_on(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(items) => !items.is_empty(),
        Value::Object(map) => !map.is_empty(),
        _ => true,
    }
}

/// Returns the highest rank of any module.
fn highest_rank(config: &Map<String, Value>) -> u64 {
    let own = config.get("r").and_then(Value::as_u64).unwrap_or(0);
    let pattern = config.get("rank_pattern").and_then(Value::as_object);
    pattern.into_iter().flatten().filter_map(|(_, rank)| rank.as_u64()).fold(own, u64::max)
}

fn short(hash: &str) -> String {
    hash.chars().take(12).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::{Base, Lineage};
    use serde_json::json;

    fn case(config: Value, kind: Kind, notes: &[(&str, &str)]) -> Result<(), Misfit> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("adapter_config.json"), config.to_string()).unwrap();
        let base = Base { name: "tiny".into(), sha256: "weights".into() };
        let notes = notes.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
        let (tables, offsets) = Default::default();
        let lineage = Lineage { base, round: None, dataset_sha256: None, tables, offsets, notes, created_us: 1 };
        let (version, sha256, files) = ("taod-0".into(), "s".into(), Default::default());
        let manifest = Manifest { version, sha256, files, lineage };
        let base = ModelIdentity {
            name: "tiny".into(),
            architecture: "llama".into(),
            sha256: "weights".into(),
            tokenizer_sha256: "tokens".into(),
            template_sha256: "template".into(),
        };
        check(folder.path(), &manifest, &base, &Bound { kind, max_rank: 16 })
    }

    #[test]
    fn what_fits_is_taken_and_what_does_not_is_named() {
        let plain = json!({"r": 8, "lora_alpha": 16, "bias": "none", "use_dora": false, "rank_pattern": {}});
        let fits = [("tokenizer_sha256", "tokens"), ("template_sha256", "template")];
        case(plain.clone(), Kind::Vllm, &fits).unwrap();
        let refused = [
            (json!({"r": 32}), &fits[..], "rank 32"),
            (json!({"r": 8, "rank_pattern": {"q_proj": 64}}), &fits[..], "rank 64"),
            (json!({"r": 8, "use_dora": true}), &fits[..], "use_dora = true"),
            (json!({"r": 8, "bias": "all"}), &fits[..], "bias = all"),
            (json!({"r": 8, "modules_to_save": ["lm_head"]}), &fits[..], "lm_head"),
            (plain.clone(), &[("tokenizer_sha256", "other")][..], "the tokenizer other"),
            (plain.clone(), &[("template_sha256", "other")][..], "the chat template other"),
        ];
        for (config, notes, expected) in refused {
            let error = case(config, Kind::Vllm, notes).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
