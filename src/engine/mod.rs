//! The inference engine: one decoder for all families, on candle, f32 on the CPU, and on accelerators (`device`).
//!
//! [`Model`] is what is loaded once; [`Batcher`] samples from a [`Policy`] on it, [`logprobs`] and [`divergence`] score
//! with it, [`SequenceClassifier`] is a reward model of the same layers, and `train` differentiates through it with the ops of `ops`. All compute with the same frozen [`Weights`] and
//! an [`Adapter`] beside them. Only a policy of rounded weights is a copy, which tells its own log-probs.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
mod attention;
mod cache;
mod classify;
mod config;
mod decoder;
mod device;
mod draw;
mod error;
mod export;
mod gguf;
mod gguf_tokenizer;
mod grammar;
mod held;
pub mod lora;
mod low_rank;
mod math;
mod matmul;
mod model;
pub mod ops;
mod policy;
mod prefixes;
mod rope;
mod runner;
mod safetensors;
mod sampler;
mod score;
mod source;
mod stop;
mod template;
#[cfg(test)]
pub(crate) mod tests;
pub mod threads;
mod tokenizer;
pub mod train;
mod weights;

pub use classify::SequenceClassifier;
pub use config::{
    Activation, Architecture, Block, LayerKind, ModelConfig, NormWeight, Norms, Projections, QkNorm, RopeConfig,
    RopeScaling, Scores,
};
pub(crate) use device::DeviceModel;
pub use device::{DeviceName, Dtype, Settings};
pub use draw::SamplingSettings;
pub use error::EngineError;
pub use export::{ScoreHead, padding_id, save_classifier};
pub use grammar::Grammar;
pub use held::{Held, Hold};
pub use lora::{Adapter, Factor, Linear, LoraPair, LoraSpec, Module, Patterns, save_peft};
pub use matmul::{Precision, WeightForm};
pub use model::{Model, ModelIdentity};
pub use policy::Policy;
pub use rope::Rope;
pub use sampler::{BatchLimits, Batcher, Completion, Event, Group, generate, generate_each};
pub use score::{ScoreItem, divergence, logprobs};
pub use source::ModelSource;
pub use stop::{TextStream, first_stop, unsure_of};
pub use template::pin_now;
pub use threads::{available, init_threads};
pub use tokenizer::Tokenizer;
pub use weights::{LayerWeights, Weights};
