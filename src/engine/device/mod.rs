//! The engine on accelerators, and wherever else candle computes.
//!
//! On the processor taod multiplies with loops of its own, which know the layout of every matrix. An accelerator has none of
//! them, so here the same decoder is put together from candle's ops, for any `candle_core::Device`. Everything above a forward
//! pass is shared: the batch and its pages, the draws, the losses, the optimizer, checkpoints. So the two agree up to
//! rounding, and in f32 with equal seeds on equal tokens.
//!
//! Frozen weights and the cache have the device's precision, f32 or bf16. The residual, norms, scores, log-probs and the adapter
//! are f32 everywhere. Nothing here is differentiated across layers: a training pass keeps each layer's input and walks
//! one layer's graph at a time, so that no walk is deep and no gradient of a frozen weight is ever made.

mod attention;
mod decode;
mod frozen;
mod lora;
mod model;
mod score;
mod settings;
mod store;
mod train;

use super::error::EngineError;

pub(crate) use lora::Lora;
pub(crate) use model::DeviceModel;
pub(crate) use settings::Place;
pub use settings::{DeviceName, Dtype, Settings};
pub(crate) use store::Store;
pub(crate) use train::Pass;

type Result<T> = std::result::Result<T, EngineError>;
