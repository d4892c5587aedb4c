//! The inference engine: one decoder for the Llama family, on candle, f32 on the CPU.
//!
//! [`Model`] is what is loaded once; [`Batcher`] samples from it, [`logprobs`] and [`divergence`] score with it, and
//! `train` differentiates through it with the ops of `ops`. All four compute with the same frozen [`Weights`] and an
//! [`Adapter`] beside them; nothing ever merges an adapter into the weights.

mod config;
mod error;
mod gguf;
pub mod lora;
mod model;
mod rope;
mod safetensors;
mod source;
mod template;
mod tokenizer;
mod weights;

pub use config::{Architecture, ModelConfig, RopeScaling};
pub use error::EngineError;
pub use lora::{Adapter, Factor, Linear, LoraPair, LoraSpec, save_peft};
pub use model::{Model, ModelIdentity};
pub use rope::Rope;
pub use source::ModelSource;
pub use tokenizer::Tokenizer;
pub use weights::{LayerWeights, Weights};
