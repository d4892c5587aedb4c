//! An adapter as llama.cpp reads it: a GGUF file of type `adapter`.
//!
//! llama.cpp scales by its alpha and the tensors' own rank alone, so that whatever else a PEFT adapter scales by
//! (rank-stabilised, or patterns) goes into B. Its converter interleaves the halves of rotated queries and keys of
//! Llama's architecture; the rows of those B's must be, too, or the answers are fluent and wrong.

use std::io::Cursor;
use std::path::Path;

use candle_core::Tensor;
use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};

use super::{Adapter, Linear, LoraPair, Module};
use crate::durable;
use crate::engine::config::{Architecture, ModelConfig};
use crate::engine::error::EngineError;
use crate::engine::gguf::{own_name, permute};

impl Adapter {
    /// Writes the adapter for llama.cpp, over a GGUF of the same base; the file is whole or absent.
    pub fn save_gguf(&self, path: &Path, config: &ModelConfig) -> Result<(), EngineError> {
        let modules: Vec<(usize, Module)> = (0..config.layers.len())
            .flat_map(|layer| Module::all(config).iter().map(move |module| (layer, *module)))
            .filter(|(layer, module)| self.get(*layer, module.parts[0]).is_some())
            .collect();
        let first = modules.first().and_then(|(layer, module)| self.get(*layer, module.parts[0]));
        let alpha = first.map_or(1.0, |pair| pair.scale * pair.rank as f64);
        let mut tensors = Vec::new();
        for (layer, module) in modules {
            let (a, b) = self.factors(layer, module, config, alpha)?;
            let name = own_name(&format!("model.layers.{layer}.{}.weight", module.name), config.block.norms);
            tensors.push((format!("{name}.lora_a"), QTensor::quantize(&a, GgmlDType::F32)?));
            tensors.push((format!("{name}.lora_b"), QTensor::quantize(&b, GgmlDType::F32)?));
        }
        let text = |text: &str| Value::String(text.to_string());
        let metadata = [
            ("general.type", text("adapter")),
            ("general.architecture", text(architecture(config.architecture))),
            ("general.name", text(&self.name)),
            ("adapter.type", text("lora")),
            ("adapter.lora.alpha", Value::F32(alpha as f32)),
        ];
        let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(key, value)| (*key, value)).collect();
        let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        let mut bytes = Cursor::new(Vec::new());
        gguf_file::write(&mut bytes, &metadata, &tensors)?;
        let remedy = "check that the folder can be written and the disk has room";
        durable::write(path, bytes.get_ref()).map_err(|e| EngineError::adapter(path, e.to_string(), remedy))
    }

    /// Returns A and B of a module as llama.cpp multiplies them.
    fn factors(
        &self,
        layer: usize,
        module: Module,
        config: &ModelConfig,
        alpha: f64,
    ) -> Result<(Tensor, Tensor), EngineError> {
        let pairs: Vec<(Linear, &LoraPair)> =
            module.parts.iter().filter_map(|part| Some((*part, self.get(layer, *part)?))).collect();
        let part = |(linear, pair): &(Linear, &LoraPair)| {
            let b = (&pair.b * (pair.scale * pair.rank as f64 / alpha))?;
            match (linear, interleaves(config.architecture)) {
                (Linear::Q, true) => permute(&b, config.heads),
                (Linear::K, true) => permute(&b, config.kv_heads),
                _ => Ok(b),
            }
        };
        let parts: Vec<Tensor> = pairs.iter().map(part).collect::<Result<_, _>>()?;
        let a = pairs.first().map(|(_, pair)| pair.a.clone());
        let a = a.ok_or_else(|| EngineError::request(format!("{} has no adapter", module.name)))?;
        Ok((a, Tensor::cat(&parts, 0)?))
    }
}

/// Returns llama.cpp's name of a family.
fn architecture(architecture: Architecture) -> &'static str {
    match architecture {
        // Its converter makes Llama's architecture of Mistral.
        Architecture::Mistral => Architecture::Llama.as_str(),
        Architecture::Gemma3 => "gemma3",
        other => other.as_str(),
    }
}

/// Returns true where llama.cpp's converter interleaves rotated rows.
fn interleaves(architecture: Architecture) -> bool {
    matches!(architecture, Architecture::Llama | Architecture::Mistral | Architecture::SmolLm3)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::engine::Model;
    use crate::engine::gguf::Gguf;

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models").join(name)
    }

    /// Whatever stands in the file must multiply to what the adapter does, in the order that the base has there.
    #[test]
    fn the_product_is_the_adapters_in_every_family() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["tiny-llama", "tiny-mistral", "tiny-qwen2", "tiny-smollm3", "tiny-phi3", "tiny-gemma2"] {
            let model = Model::load(&fixture(name).display().to_string()).unwrap();
            let adapter = Adapter::load(&fixture(&format!("{name}-lora")), &model).unwrap();
            let path = folder.path().join(format!("{name}.gguf"));
            adapter.save_gguf(&path, model.config()).unwrap();
            let file = Gguf::open(&path).unwrap();
            assert_eq!(file.text("general.type").as_deref(), Some("adapter"));
            assert_eq!(file.text("adapter.type").as_deref(), Some("lora"));
            let own = file.text("general.architecture").unwrap();
            let alpha = f64::from(file.content.metadata["adapter.lora.alpha"].to_f32().unwrap());
            let fused = name == "tiny-phi3";
            for (linear, stored, heads) in [
                (Linear::Q, "blk.1.attn_q.weight", model.config().heads),
                (Linear::K, "blk.1.attn_k.weight", model.config().kv_heads),
                (Linear::Down, "blk.1.ffn_down.weight", 0),
            ] {
                if fused && heads > 0 {
                    continue;
                }
                let read = |factor: &str| file.read(&format!("{stored}.{factor}")).unwrap().unwrap();
                let (a, b) = (read("lora_a"), read("lora_b"));
                let scale = alpha / b.dim(1).unwrap() as f64;
                let product = (b.matmul(&a).unwrap() * scale).unwrap();
                let pair = adapter.get(1, linear).unwrap();
                let mut expected = (pair.b.matmul(&pair.a).unwrap() * pair.scale).unwrap();
                if heads > 0 && ["llama", "smollm3"].contains(&own.as_str()) {
                    expected = permute(&expected, heads).unwrap();
                }
                let off = (product - expected).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
                assert!(off < 1e-6, "{name} {linear:?}: {off}");
            }
            if fused {
                let b = file.read("blk.1.attn_qkv.weight.lora_b").unwrap().unwrap();
                let rows: usize = [Linear::Q, Linear::K, Linear::V].iter().map(|l| l.shape(model.config()).1).sum();
                assert_eq!(b.dim(0).unwrap(), rows);
            }
        }
    }
}
