//! Tensors of a safetensors file or of a sharded set, read one by one and widened to f32.
//!
//! Reading by offset keeps one tensor in memory beside the model, where reading the file whole would double it.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device, Tensor};
use safetensors::{Dtype, tensor::Metadata};
use serde::Deserialize;

use super::error::EngineError;

const DOWNLOAD_AGAIN: &str = "download or save the file again";

/// One safetensors file: its header is read, its tensors are read on demand.
pub(crate) struct Shard {
    path: PathBuf,
    file: File,
    header: Metadata,
    data_start: u64,
}

/// The bytes of a tensor, their type and its shape.
type RawTensor<'a> = (Vec<u8>, DType, &'a [usize]);

impl Shard {
    pub(crate) fn open(path: &Path) -> Result<Self, EngineError> {
        let broken = |problem: String| EngineError::file(path, problem, DOWNLOAD_AGAIN);
        let file = File::open(path).map_err(|e| broken(e.to_string()))?;
        let length = file.metadata().map_err(|e| broken(e.to_string()))?.len();
        let mut prefix = [0u8; 8];
        file.read_exact_at(&mut prefix, 0).map_err(|_| broken(format!("truncated at {length} bytes")))?;
        let header_length = u64::from_le_bytes(prefix);
        let data_start = header_length.saturating_add(8);
        if data_start > length {
            return Err(broken(format!("truncated: holds {length} bytes, its header ends at {data_start}")));
        }
        let mut bytes = vec![0u8; header_length as usize];
        file.read_exact_at(&mut bytes, 8).map_err(|e| broken(e.to_string()))?;
        let header: Metadata =
            serde_json::from_slice(&bytes).map_err(|e| broken(format!("is not a safetensors file: {e}")))?;
        let end = data_start + header.data_len() as u64;
        if end > length {
            return Err(broken(format!("truncated: holds {length} of {end} bytes")));
        }
        Ok(Shard { path: path.to_path_buf(), file, header, data_start })
    }

    pub(crate) fn names(&self) -> Vec<String> {
        self.header.tensors().into_keys().collect()
    }

    /// Returns the text pairs beside the tensors.
    pub(crate) fn notes(&self) -> HashMap<String, String> {
        self.header.metadata().clone().unwrap_or_default()
    }

    pub(crate) fn tensor(&self, name: &str) -> Result<Option<Tensor>, EngineError> {
        let Some((bytes, dtype, shape)) = self.read(name)? else { return Ok(None) };
        let tensor = Tensor::from_raw_buffer(&bytes, dtype, shape, &Device::Cpu)?;
        Ok(Some(tensor.to_dtype(DType::F32)?))
    }

    /// Returns a tensor as it is stored.
    pub(crate) fn stored(&self, name: &str) -> Result<Option<QTensor>, EngineError> {
        let Some((bytes, dtype, shape)) = self.read(name)? else { return Ok(None) };
        let kind = match dtype {
            DType::F16 => GgmlDType::F16,
            DType::BF16 => GgmlDType::BF16,
            _ => GgmlDType::F32,
        };
        let storage = QStorage::from_data(bytes.into(), &Device::Cpu, kind)?;
        Ok(Some(QTensor::new(storage, shape)?))
    }

    /// Returns how many bytes all tensors take.
    pub(crate) fn bytes(&self) -> u64 {
        self.header.data_len() as u64
    }

    /// Returns the bytes of a tensor, their type and its shape.
    fn read(&self, name: &str) -> Result<Option<RawTensor<'_>>, EngineError> {
        let Some(info) = self.header.info(name) else { return Ok(None) };
        let fault = |problem: String| EngineError::tensor(&self.path, name, problem, DOWNLOAD_AGAIN);
        let dtype = match info.dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            other => return Err(fault(format!("is {other:?}, not F32, F16 or BF16"))),
        };
        let (start, end) = info.data_offsets;
        let mut bytes = vec![0u8; end - start];
        self.file.read_exact_at(&mut bytes, self.data_start + start as u64).map_err(|e| fault(e.to_string()))?;
        Ok(Some((bytes, dtype, &info.shape)))
    }
}

/// The weights of a folder in Hugging Face layout: one file, or shards with an index.
pub(crate) struct Safetensors {
    shards: Vec<Shard>,
    /// Shard of each tensor.
    places: HashMap<String, usize>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Safetensors {
    /// Returns the weight files of a folder: the shards that its index names, or `model.safetensors`.
    pub(crate) fn files(folder: &Path) -> Result<Vec<PathBuf>, EngineError> {
        let index_path = folder.join("model.safetensors.index.json");
        if !index_path.exists() {
            return Ok(vec![folder.join("model.safetensors")]);
        }
        let broken = |e: String| EngineError::file(&index_path, e, DOWNLOAD_AGAIN);
        let bytes = std::fs::read(&index_path).map_err(|e| broken(e.to_string()))?;
        let index: Index = serde_json::from_slice(&bytes).map_err(|e| broken(e.to_string()))?;
        let mut names: Vec<String> = index.weight_map.into_values().collect();
        names.sort();
        names.dedup();
        match names.iter().find(|n| n.contains('/') || n.contains("..")) {
            Some(name) => Err(broken(format!("names a shard outside its folder: {name}"))),
            None => Ok(names.iter().map(|name| folder.join(name)).collect()),
        }
    }

    pub(crate) fn open(files: &[PathBuf]) -> Result<Self, EngineError> {
        let shards = files.iter().map(|file| Shard::open(file)).collect::<Result<Vec<_>, _>>()?;
        let mut places = HashMap::new();
        for (place, shard) in shards.iter().enumerate() {
            places.extend(shard.names().into_iter().map(|name| (name, place)));
        }
        Ok(Safetensors { shards, places })
    }

    pub(crate) fn tensor(&self, name: &str) -> Result<Option<Tensor>, EngineError> {
        match self.places.get(name) {
            Some(place) => self.shards[*place].tensor(name),
            None => Ok(None),
        }
    }

    /// Returns a tensor as it is stored.
    pub(crate) fn stored(&self, name: &str) -> Result<Option<QTensor>, EngineError> {
        match self.places.get(name) {
            Some(place) => self.shards[*place].stored(name),
            None => Ok(None),
        }
    }

    /// Returns how many bytes all tensors take.
    pub(crate) fn bytes(&self) -> u64 {
        self.shards.iter().map(Shard::bytes).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path) {
        let tensor = Tensor::new(&[[1f32, 2.], [3., 4.]], &Device::Cpu).unwrap();
        candle_core::safetensors::save(&HashMap::from([("a", tensor.to_dtype(DType::BF16).unwrap())]), path).unwrap();
    }

    #[test]
    fn a_tensor_is_widened_and_an_absent_one_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        write(&path);
        let shard = Shard::open(&path).unwrap();
        let tensor = shard.tensor("a").unwrap().unwrap();
        assert_eq!(tensor.to_vec2::<f32>().unwrap(), [[1., 2.], [3., 4.]]);
        assert!(shard.tensor("b").unwrap().is_none());
    }

    #[test]
    fn a_truncated_file_is_named_with_both_lengths() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        write(&path);
        let bytes = std::fs::read(&path).unwrap();
        for keep in [bytes.len() - 1, 20, 3] {
            std::fs::write(&path, &bytes[..keep]).unwrap();
            let error = Shard::open(&path).map(|_| ()).unwrap_err().to_string();
            assert!(error.contains("model.safetensors: truncated") && error.contains(&keep.to_string()), "{error}");
        }
    }
}
