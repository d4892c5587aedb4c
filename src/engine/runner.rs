//! What computes the forward passes of a batch: the loops of this processor, or a device.
//!
//! This is all that a batch knows of the difference. Its pages, its order and its draws are the same.

use std::sync::Arc;

use candle_core::Tensor;

use super::cache::{Pool, Shape};
use super::decoder::{Decoder, Run};
use super::device::DeviceModel;
use super::error::EngineError;
use super::matmul::Product;

/// A model laid out for inference. Cloning shares it.
#[derive(Clone)]
pub(crate) enum Runner {
    Here(Arc<Decoder>),
    OnDevice(Arc<DeviceModel>),
}

/// The normed rows of a forward pass, where they were computed.
pub(crate) enum Hidden {
    /// `[rows, width]`.
    Here {
        values: Vec<f32>,
        width: usize,
    },
    OnDevice(Tensor),
}

/// Logits of some rows, in this process's memory.
pub(crate) enum Logits {
    Panels(Product),
    Rows { values: Vec<f32>, columns: usize },
}

impl Runner {
    /// Returns true where both multiply by the same weights.
    pub(crate) fn is(&self, other: &Runner) -> bool {
        match (self, other) {
            (Runner::Here(one), Runner::Here(other)) => Arc::ptr_eq(one, other),
            (Runner::OnDevice(one), Runner::OnDevice(other)) => Arc::ptr_eq(one, other),
            _ => false,
        }
    }

    /// Returns the layout of its cache pages.
    pub(crate) fn shape(&self) -> Shape {
        match self {
            Runner::Here(decoder) => decoder.shape(),
            Runner::OnDevice(model) => Shape::on_device(model),
        }
    }

    /// Returns a pool of at most so many pages.
    pub(crate) fn pool(&self, pages: usize) -> Pool {
        match self {
            Runner::Here(decoder) => Pool::new(decoder.shape()),
            Runner::OnDevice(model) => Pool::on_device(model, pages),
        }
    }

    /// Reads the runs' tokens into their caches and returns the last layer's rows.
    pub(crate) fn forward(&self, runs: &mut [Run], pool: &Pool) -> Result<Hidden, EngineError> {
        Ok(match self {
            Runner::Here(decoder) => Hidden::Here { values: decoder.forward(runs, pool), width: decoder.hidden_size() },
            Runner::OnDevice(model) => Hidden::OnDevice(model.read(runs, pool)?),
        })
    }

    /// Returns the logits of some of the rows, in the room of earlier ones.
    pub(crate) fn logits(&self, hidden: &Hidden, rows: &[usize], room: Vec<f32>) -> Result<Logits, EngineError> {
        match (self, hidden) {
            (Runner::Here(decoder), Hidden::Here { values, width }) => {
                let chosen: Vec<&[f32]> = rows.iter().map(|row| &values[row * width..][..*width]).collect();
                Ok(Logits::Panels(decoder.logits(&chosen.concat(), room)))
            }
            (Runner::OnDevice(model), Hidden::OnDevice(hidden)) => {
                let logits = model.logits_of(hidden, rows)?;
                Ok(Logits::Rows { columns: logits.dim(1)?, values: logits.flatten_all()?.to_vec1()? })
            }
            _ => Err(EngineError::request("rows that one model made were given to another")),
        }
    }
}

impl Logits {
    pub(crate) fn columns(&self) -> usize {
        match self {
            Logits::Panels(product) => product.columns(),
            Logits::Rows { columns, .. } => *columns,
        }
    }

    pub(crate) fn copy_row(&self, row: usize, out: &mut [f32]) {
        match self {
            Logits::Panels(product) => product.copy_row(row, out),
            Logits::Rows { values, columns } => out.copy_from_slice(&values[row * columns..][..*columns]),
        }
    }

    /// Returns its memory for the next ones.
    pub(crate) fn into_room(self) -> Vec<f32> {
        match self {
            Logits::Panels(product) => product.into_room(),
            Logits::Rows { .. } => Vec::new(),
        }
    }
}
