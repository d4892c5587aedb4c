//! The modules that an adapter changes, as PEFT names them.
//!
//! A family that fuses projections has fewer modules than linear layers. Such a module has one A, which all its parts
//! share, and one B, whose rows are those of its parts one after the other. Everything that computes asks for a linear
//! layer and gets its rows; everything that reads and writes adapters goes by module.

use std::ops::Range;

use super::{Factor, Linear, LoraPair};
use crate::engine::config::{ModelConfig, Projections};
use crate::engine::error::EngineError;

/// A linear module of PEFT: one of our linear layers, or several that the model fuses into one matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Module {
    /// The path inside its layer.
    pub name: &'static str,
    pub parts: &'static [Linear],
}

const SPLIT: [Module; 7] = [
    Module { name: Linear::Q.peft_name(), parts: &[Linear::Q] },
    Module { name: Linear::K.peft_name(), parts: &[Linear::K] },
    Module { name: Linear::V.peft_name(), parts: &[Linear::V] },
    Module { name: Linear::O.peft_name(), parts: &[Linear::O] },
    Module { name: Linear::Gate.peft_name(), parts: &[Linear::Gate] },
    Module { name: Linear::Up.peft_name(), parts: &[Linear::Up] },
    Module { name: Linear::Down.peft_name(), parts: &[Linear::Down] },
];

const FUSED: [Module; 4] = [
    Module { name: "self_attn.qkv_proj", parts: &[Linear::Q, Linear::K, Linear::V] },
    Module { name: Linear::O.peft_name(), parts: &[Linear::O] },
    Module { name: "mlp.gate_up_proj", parts: &[Linear::Gate, Linear::Up] },
    Module { name: Linear::Down.peft_name(), parts: &[Linear::Down] },
];

impl Module {
    /// Returns the modules of a model's layers, in the order of the forward pass.
    pub fn all(config: &ModelConfig) -> &'static [Module] {
        match config.block.projections {
            Projections::Split => &SPLIT,
            Projections::Fused => &FUSED,
        }
    }

    /// Returns the modules that hold any of the targets, in the order of the forward pass.
    pub fn targeted(config: &ModelConfig, targets: &[Linear]) -> Vec<Module> {
        let holds = |module: &&Module| module.parts.iter().any(|part| targets.contains(part));
        Self::all(config).iter().filter(holds).copied().collect()
    }

    /// Refuses targets that are a part only of what the model keeps in one matrix.
    pub fn check_targets(config: &ModelConfig, targets: &[Linear]) -> Result<(), EngineError> {
        for module in Self::targeted(config, targets) {
            if let Some(absent) = module.parts.iter().find(|part| !targets.contains(part)) {
                let parts: Vec<&str> = module.parts.iter().map(|part| part.target_name()).collect();
                return Err(EngineError::request(format!(
                    "{} is no target, but {} keeps {} in one matrix, {}; target all of them or none",
                    absent.target_name(),
                    config.architecture.as_str(),
                    parts.join(", "),
                    module.name,
                )));
            }
        }
        Ok(())
    }

    /// Returns the names that PEFT's `target_modules` lists for tensors of these keys.
    pub(super) fn target_names<'a>(keys: impl Iterator<Item = &'a String> + Clone) -> Vec<&'static str> {
        let mut names = Vec::new();
        for name in SPLIT.iter().chain(&FUSED).map(|module| module.name) {
            let own = name.rsplit('.').next().unwrap_or_default();
            if !names.contains(&own) && keys.clone().any(|key| key.contains(&format!(".{name}."))) {
                names.push(own);
            }
        }
        names
    }

    /// Returns its path in the model, which PEFT's patterns are matched with.
    pub fn path(self, layer: usize) -> String {
        format!("model.layers.{layer}.{}", self.name)
    }

    /// Returns PEFT's key of one of its matrices, such as `base_model.model.model.layers.0.mlp.up_proj.lora_A.weight`.
    pub fn peft_key(self, layer: usize, factor: Factor) -> String {
        format!("base_model.model.{}.{}.weight", self.path(layer), factor.as_str())
    }

    /// Returns the shape of one of its matrices.
    pub fn shape(self, config: &ModelConfig, factor: Factor, rank: usize) -> [usize; 2] {
        match factor {
            Factor::A => [rank, self.parts.first().map_or(0, |part| part.shape(config).0)],
            Factor::B => [self.parts.iter().map(|part| part.shape(config).1).sum(), rank],
        }
    }

    /// Returns its parts, each with its rows of B.
    pub fn rows(self, config: &ModelConfig) -> Vec<(Linear, Range<usize>)> {
        let mut end = 0;
        let part = |part: &Linear| {
            let start = end;
            end += part.shape(config).1;
            (*part, start..end)
        };
        self.parts.iter().map(part).collect()
    }

    /// Returns the pair of each part. A is shared and B cut; nothing is copied.
    pub(super) fn split(self, config: &ModelConfig, pair: &LoraPair) -> Result<Vec<(Linear, LoraPair)>, EngineError> {
        let part = |(linear, rows): (Linear, Range<usize>)| {
            let b = pair.b.narrow(0, rows.start, rows.len())?;
            Ok((linear, LoraPair { a: pair.a.clone(), b, ..*pair }))
        };
        self.rows(config).into_iter().map(part).collect()
    }
}
