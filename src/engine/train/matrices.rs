//! The matrices of an adapter in training.

use std::collections::BTreeMap;
use std::ops::Range;

use candle_core::{Device, Tensor};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha20Rng;

use crate::engine::config::ModelConfig;
use crate::engine::error::EngineError;
use crate::engine::lora::{Factor, Linear, LoraSpec, Module};
use crate::engine::ops::linear::Pair;

/// One matrix of an adapter in training.
#[derive(Debug, Clone, PartialEq)]
pub struct Matrix {
    /// As PEFT names it.
    pub key: String,
    pub shape: [usize; 2],
}

/// A LoRA adapter in training: a flat list of matrices, A and B of each targeted module of each layer in turn.
#[derive(Debug, Clone)]
pub struct LoraMatrices {
    pub spec: LoraSpec,
    pub matrices: Vec<Matrix>,
    /// The values of each matrix, which an optimizer moves.
    pub values: Vec<Vec<f32>>,
    /// The factor on each module's product, layer after layer.
    scales: Vec<f32>,
    /// Modules of one layer.
    modules: usize,
    /// For each linear layer that changes: its module, and its rows of the module's B.
    places: Vec<(Linear, usize, Range<usize>)>,
}

impl LoraMatrices {
    /// Returns an adapter that changes nothing yet: A uniform in +-1/sqrt(in), as PEFT's Kaiming draw with a = sqrt 5
    /// comes out, and B zero. Equal seeds give equal bytes.
    pub fn fresh(config: &ModelConfig, spec: &LoraSpec, seed: u64) -> Self {
        let mut rng = ChaCha20Rng::seed_from_u64(seed);
        let mut lora = Self::zero(config, spec);
        for (matrix, values) in lora.matrices.iter().zip(&mut lora.values).step_by(2) {
            let bound = 1.0 / (matrix.shape[1] as f32).sqrt();
            values.iter_mut().for_each(|value| *value = rng.random_range(-bound..bound));
        }
        lora
    }

    /// Returns an adapter that goes on from `tensors`, keyed as PEFT keys them.
    pub fn restored(
        config: &ModelConfig,
        spec: &LoraSpec,
        tensors: &BTreeMap<String, Tensor>,
    ) -> Result<Self, EngineError> {
        let mut lora = Self::zero(config, spec);
        for (Matrix { key, shape }, values) in lora.matrices.iter().zip(&mut lora.values) {
            let tensor = tensors.get(key).ok_or_else(|| EngineError::request(format!("{key} is missing")))?;
            if tensor.dims() != shape {
                let problem = format!("{key} has shape {:?}, {shape:?} is expected", tensor.dims());
                return Err(EngineError::request(problem));
            }
            *values = tensor.flatten_all()?.to_vec1()?;
        }
        Ok(lora)
    }

    fn zero(config: &ModelConfig, spec: &LoraSpec) -> Self {
        let (mut matrices, mut scales) = (Vec::new(), Vec::new());
        let modules = Module::targeted(config, &spec.targets);
        for layer in 0..config.layers.len() {
            for module in &modules {
                let path = module.path(layer);
                let rank = spec.rank_of(&path);
                scales.push(spec.scaling_of(&path) as f32);
                for factor in [Factor::A, Factor::B] {
                    let shape = module.shape(config, factor, rank);
                    matrices.push(Matrix { key: module.peft_key(layer, factor), shape });
                }
            }
        }
        let values = matrices.iter().map(|m| vec![0.0; m.shape[0] * m.shape[1]]).collect();
        let rows = |(at, module): (usize, &Module)| {
            module.rows(config).into_iter().map(move |(linear, rows)| (linear, at, rows))
        };
        let places = modules.iter().enumerate().flat_map(rows).collect();
        LoraMatrices { spec: spec.clone(), matrices, values, scales, modules: modules.len(), places }
    }

    /// Returns all matrices as tensors, by PEFT key.
    pub fn tensors(&self) -> Result<BTreeMap<String, Tensor>, EngineError> {
        let tensor = |(matrix, values): (&Matrix, &Vec<f32>)| {
            Ok((matrix.key.clone(), Tensor::from_slice(values, &matrix.shape, &Device::Cpu)?))
        };
        self.matrices.iter().zip(&self.values).map(tensor).collect()
    }

    /// Returns zeros of the shape of `values`, to add gradients to.
    pub fn zero_gradients(&self) -> Vec<Vec<f32>> {
        self.values.iter().map(|values| vec![0.0; values.len()]).collect()
    }

    /// Returns where in the list the A of a linear layer stands, with its B after it, and which of B's values are its
    /// own, if the adapter changes it. Parts of one module have the same place.
    pub(in crate::engine) fn position(&self, layer: usize, linear: Linear) -> Option<(usize, Range<usize>)> {
        let (_, module, rows) = self.places.iter().find(|(placed, ..)| *placed == linear)?;
        let at = 2 * (layer * self.modules + module);
        let rank = self.matrices.get(at)?.shape[0];
        Some((at, rows.start * rank..rows.end * rank))
    }

    pub(in crate::engine) fn pair(&self, layer: usize, linear: Linear) -> Option<Pair<'_>> {
        let (at, own) = self.position(layer, linear)?;
        let (a, b) = (self.values.get(at)?, self.values.get(at + 1)?.get(own)?);
        Some(Pair { a, b, rank: self.matrices.get(at)?.shape[0], scale: *self.scales.get(at / 2)?, dropout: None })
    }
}
