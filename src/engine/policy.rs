//! What answers are drawn from: a model, an adapter on it, and the form of the weights.
//!
//! In f32 the adapter stays beside the weights, which all policies of a model share. Where weights are rounded it is added
//! to them before: beside them it would be multiplied in f32 and cost up to a quarter of the time.

use std::sync::Arc;

use super::decoder::Decoder;
use super::error::EngineError;
use super::lora::Adapter;
use super::low_rank::LoraPack;
use super::matmul::WeightForm;
use super::model::Model;
use super::runner::Runner;

/// A distribution of answers. Cloning shares it.
#[derive(Clone)]
pub struct Policy {
    model: Model,
    runner: Runner,
    adapter: Option<Arc<LoraPack>>,
    form: WeightForm,
}

impl Policy {
    /// Lays a model and an adapter out for sampling. Any form but f32 copies all weights. On a device the form is the device's.
    pub fn new(model: &Model, adapter: Option<&Adapter>, form: WeightForm) -> Result<Self, EngineError> {
        if let Some(device) = model.device() {
            let adapter = adapter.map(|adapter| LoraPack::copied(device, adapter)).transpose()?.map(Arc::new);
            let runner = Runner::OnDevice(device.clone());
            return Ok(Policy { model: model.clone(), runner, adapter, form: WeightForm::F32 });
        }
        let (decoder, adapter) = match form {
            WeightForm::F32 => {
                let adapter = adapter.map(|a| LoraPack::new(model.config(), a)).transpose()?;
                (model.decoder()?.clone(), adapter.map(Arc::new))
            }
            WeightForm::Int16 | WeightForm::Int8 => {
                let decoder = Decoder::new(model.config(), model.weights(), model.ropes(), form, adapter)?;
                (Arc::new(decoder), None)
            }
        };
        Ok(Policy { model: model.clone(), runner: Runner::Here(decoder), adapter, form })
    }

    /// Returns the model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Returns the form of the weights.
    pub fn form(&self) -> WeightForm {
        self.form
    }

    /// Returns true where its log-probs are those that scoring and training compute, up to rounding in f32.
    pub fn is_exact(&self) -> bool {
        self.form == WeightForm::F32 && self.model.device().is_none_or(|device| device.place().is_exact())
    }

    pub(crate) fn runner(&self) -> &Runner {
        &self.runner
    }

    pub(crate) fn adapter(&self) -> Option<&Arc<LoraPack>> {
        self.adapter.as_ref()
    }

    /// Returns true where sequences of both can stand in one batch: they are multiplied by the same weights.
    pub fn shares_weights(&self, other: &Policy) -> bool {
        self.runner.is(&other.runner)
    }
}
