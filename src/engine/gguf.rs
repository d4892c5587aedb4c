//! Tensors of a `.gguf` file, dequantised to f32 and in Hugging Face's order.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use candle_core::quantized::QTensor;
use candle_core::quantized::gguf_file::{Content, TensorInfo, Value as GgufValue};
use candle_core::{Device, Tensor};

use super::config::{ModelConfig, Norms};
use super::error::EngineError;
use super::held::Held;

const DOWNLOAD_AGAIN: &str = "download or convert the file again";

/// An open GGUF file: its header is read, its tensors are read on demand.
pub(crate) struct Gguf {
    path: PathBuf,
    pub(crate) content: Content,
}

impl Gguf {
    pub(crate) fn open(path: &Path) -> Result<Self, EngineError> {
        let mut reader = open(path)?;
        let content = Content::read(&mut reader).map_err(|e| EngineError::file(path, e, DOWNLOAD_AGAIN))?;
        Ok(Gguf { path: path.to_path_buf(), content })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn config(&self) -> Result<ModelConfig, EngineError> {
        // The first is that of Llama 3, the second that of Phi-3.
        let tensor = match self.read("rope_freqs.weight")? {
            Some(tensor) => Some(tensor),
            None => self.read("rope_factors_short.weight")?,
        };
        let divisors = tensor.map(|tensor| tensor.to_vec1()).transpose()?;
        ModelConfig::from_gguf(&self.content, divisors, &self.path)
    }

    /// Returns a tensor by its Hugging Face name, or `None` where the file does not hold it.
    pub(crate) fn tensor(&self, name: &str, config: &ModelConfig) -> Result<Option<Tensor>, EngineError> {
        let own = own_name(name, config.block.norms);
        let Some(tensor) = self.read(&own)? else { return Ok(None) };
        Ok(Some(match self.interleaved(&own, config) {
            Some(heads) => unpermute(&tensor, heads)?,
            None => tensor,
        }))
    }

    /// Returns a matrix as it is stored, by its Hugging Face name.
    pub(crate) fn held(&self, name: &str, config: &ModelConfig) -> Result<Option<Held>, EngineError> {
        let own = own_name(name, config.block.norms);
        let Some(blocks) = self.stored(&own)? else { return Ok(None) };
        Held::stored(blocks, self.interleaved(&own, config)).map(Some)
    }

    /// Returns how many bytes all tensors take.
    pub(crate) fn bytes(&self) -> u64 {
        let bytes = |info: &TensorInfo| {
            (info.shape.elem_count() / info.ggml_dtype.block_size() * info.ggml_dtype.type_size()) as u64
        };
        self.content.tensor_infos.values().map(bytes).sum()
    }

    /// Returns for how many heads the rows of a tensor interleave the halves that rotary embedding rotates.
    fn interleaved(&self, own: &str, config: &ModelConfig) -> Option<usize> {
        // llama.cpp's converter interleaves the two halves that rotary embedding rotates, for these architectures only.
        // SmolLM3's converter is Llama's, which does so for layers without a rotary embedding too.
        let architecture = self.content.metadata.get("general.architecture").and_then(|v| v.to_string().ok());
        if !matches!(architecture.map(String::as_str), Some("llama" | "smollm3")) {
            return None;
        }
        match own.rsplit('.').nth(1) {
            Some("attn_q") => Some(config.heads),
            Some("attn_k") => Some(config.kv_heads),
            _ => None,
        }
    }

    /// Returns a text of the metadata.
    pub(crate) fn text(&self, key: &str) -> Option<String> {
        self.content.metadata.get(key).and_then(|v| v.to_string().ok()).cloned()
    }

    pub(crate) fn flag(&self, key: &str) -> Option<bool> {
        self.content.metadata.get(key).and_then(|v| v.to_bool().ok())
    }

    pub(crate) fn texts(&self, key: &str) -> Option<Vec<String>> {
        self.list(key, |v| v.to_string().ok().cloned())
    }

    pub(crate) fn numbers(&self, key: &str) -> Option<Vec<f32>> {
        self.list(key, |v| v.to_f32().ok())
    }

    pub(crate) fn counts(&self, key: &str) -> Option<Vec<u64>> {
        // By variant: candle's conversions take a backtrace for each one that does not fit.
        self.list(key, |v| match v {
            GgufValue::I32(value) => u64::try_from(*value).ok(),
            GgufValue::U32(value) => Some(u64::from(*value)),
            other => other.to_u64().ok(),
        })
    }

    /// Returns the text of a special token: `bos` or `eos`.
    pub(crate) fn special(&self, name: &str) -> Option<String> {
        let id = self.count(&format!("tokenizer.ggml.{name}_token_id"))?;
        self.texts("tokenizer.ggml.tokens")?.get(id as usize).cloned()
    }

    /// Returns the declared ids that end an answer.
    pub(crate) fn end_ids(&self) -> Vec<u32> {
        let id = |name: &str| self.count(&format!("tokenizer.ggml.{name}_token_id")).map(|id| id as u32);
        ["eos", "eot", "eom"].iter().filter_map(|name| id(name)).collect()
    }

    /// Returns the declared id that pads.
    pub(crate) fn padding_id(&self) -> Option<u32> {
        self.count("tokenizer.ggml.padding_token_id").map(|id| id as u32)
    }

    fn count(&self, key: &str) -> Option<u64> {
        self.content.metadata.get(key).and_then(|v| v.to_u64().ok())
    }

    fn list<T>(&self, key: &str, item: impl Fn(&GgufValue) -> Option<T>) -> Option<Vec<T>> {
        self.content.metadata.get(key).and_then(|v| v.to_vec().ok())?.iter().map(item).collect()
    }

    pub(crate) fn read(&self, own: &str) -> Result<Option<Tensor>, EngineError> {
        Ok(self.stored(own)?.map(|stored| stored.dequantize(&Device::Cpu)).transpose()?)
    }

    fn stored(&self, own: &str) -> Result<Option<QTensor>, EngineError> {
        let Some(info) = self.content.tensor_infos.get(own) else { return Ok(None) };
        let mut reader = open(&self.path)?;
        let stored = info
            .read(&mut reader, self.content.tensor_data_offset, &Device::Cpu)
            .map_err(|e| EngineError::tensor(&self.path, own, format!("cannot be read: {e}"), DOWNLOAD_AGAIN))?;
        Ok(Some(stored))
    }
}

fn open(path: &Path) -> Result<BufReader<File>, EngineError> {
    let file = File::open(path).map_err(|e| EngineError::file(path, e, "give a .gguf file that can be read"))?;
    Ok(BufReader::with_capacity(1 << 20, file))
}

/// Returns llama.cpp's name of a tensor of Hugging Face, in a model that norms here.
pub(crate) fn own_name(name: &str, norms: Norms) -> String {
    const TOP: [(&str, &str); 3] =
        [("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")];
    const IN_LAYER: [(&str, &str); 14] = [
        ("input_layernorm", "attn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("pre_feedforward_layernorm", "ffn_norm"),
        ("post_feedforward_layernorm", "post_ffw_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("self_attn.qkv_proj", "attn_qkv"),
        ("mlp.gate_up_proj", "ffn_up"),
    ];
    let (stem, kind) = name.rsplit_once('.').unwrap_or((name, "weight"));
    if let Some((layer, part)) = stem.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')) {
        let own = match (part, norms) {
            ("post_attention_layernorm", Norms::Pre) => "ffn_norm",
            ("post_attention_layernorm", Norms::Post | Norms::Both) => "post_attention_norm",
            _ => IN_LAYER.iter().find(|(hf, _)| *hf == part).map_or(part, |(_, own)| own),
        };
        return format!("blk.{layer}.{own}.{kind}");
    }
    let own = TOP.iter().find(|(hf, _)| *hf == stem).map_or(stem, |(_, own)| own);
    format!("{own}.{kind}")
}

/// Does what llama.cpp's converter does to the rows of rotated queries and keys: each head's halves interleave.
pub(crate) fn permute(tensor: &Tensor, heads: usize) -> Result<Tensor, EngineError> {
    let dims = tensor.dims().to_vec();
    let half = dims[0] / heads / 2;
    let split = tensor.reshape((heads, 2, half, dims.get(1).copied().unwrap_or(1)))?;
    Ok(split.transpose(1, 2)?.contiguous()?.reshape(dims)?)
}

/// Undoes the converter's `reshape(heads, 2, dim/2, ..).swapaxes(1, 2)` on the rows.
fn unpermute(tensor: &Tensor, heads: usize) -> Result<Tensor, EngineError> {
    let dims = tensor.dims().to_vec();
    let half = dims[0] / heads / 2;
    let columns = dims.get(1).copied().unwrap_or(1);
    let split = tensor.reshape((heads, half, 2, columns))?;
    Ok(split.transpose(1, 2)?.contiguous()?.reshape(dims)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_translated() {
        let translated = |name: &str| own_name(name, Norms::Pre);
        assert_eq!(translated("model.layers.12.self_attn.q_proj.bias"), "blk.12.attn_q.bias");
        assert_eq!(translated("model.embed_tokens.weight"), "token_embd.weight");
        assert_eq!(translated("lm_head.weight"), "output.weight");
        // The same name stands for two norms.
        let after_attention = "model.layers.1.post_attention_layernorm.weight";
        assert_eq!(translated(after_attention), "blk.1.ffn_norm.weight");
        assert_eq!(own_name(after_attention, Norms::Post), "blk.1.post_attention_norm.weight");
        let after_mlp = "model.layers.1.post_feedforward_layernorm.weight";
        assert_eq!(own_name(after_mlp, Norms::Post), "blk.1.post_ffw_norm.weight");
    }

    #[test]
    fn interleaved_rows_come_back_in_halves() {
        // Two heads of dimension 4: the converter stores rows 0,2,1,3 of each head.
        let stored = Tensor::new(&[[0f32], [2.], [1.], [3.], [4.], [6.], [5.], [7.]], &Device::Cpu).unwrap();
        let rows: Vec<f32> = unpermute(&stored, 2).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        assert_eq!(rows, [0., 1., 2., 3., 4., 5., 6., 7.]);
        let again = permute(&unpermute(&stored, 2).unwrap(), 2).unwrap();
        assert_eq!(again.to_vec2::<f32>().unwrap(), stored.to_vec2::<f32>().unwrap());
    }

    /// Random blocks of every type, against the values that the `gguf` package reads (tools/reference/gguf_types_golden.py).
    #[test]
    fn every_type_is_dequantised_as_the_gguf_package_does() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
        let values: std::collections::BTreeMap<String, Vec<f32>> =
            serde_json::from_slice(&std::fs::read(golden.join("gguf_types.json")).unwrap()).unwrap();
        let file = Gguf::open(&golden.join("gguf_types.gguf")).unwrap();
        assert_eq!(values.len(), 13);
        for (name, expected) in values {
            let tensor = file.read(&name).unwrap().unwrap();
            assert_eq!(tensor.dims(), [2, 256], "{name}");
            let found: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
            let off = found.iter().zip(&expected).map(|(a, b)| (a - b).abs() / b.abs().max(0.1)).fold(0.0, f32::max);
            assert!(off < 1e-6, "{name}: off by {off}");
        }
    }
}
