//! Adapters laid out for inference, and how the rows of one batch each get their own.
//!
//! A batch is multiplied by the frozen weights as a whole, whatever adapters its sequences have; what an adapter adds
//! is computed for its rows alone. Rows of one adapter stand side by side, so that a batch of one adapter costs what it
//! would without the others, and every row gets the same numbers as in a batch of its own.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;

use super::config::ModelConfig;
use super::device::{DeviceModel, Lora};
use super::error::EngineError;
use super::lora::{Adapter, Linear};
use super::matmul::{Packed, Product};

/// A product of a layer that an adapter can change.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Site {
    Qkv,
    O,
    GateUp,
    Down,
}

impl Site {
    const ALL: [Site; 4] = [Site::Qkv, Site::O, Site::GateUp, Site::Down];

    /// Returns the linear layers whose outputs stand one after the other in the product.
    fn linears(self) -> &'static [Linear] {
        match self {
            Site::Qkv => &[Linear::Q, Linear::K, Linear::V],
            Site::O => &[Linear::O],
            Site::GateUp => &[Linear::Gate, Linear::Up],
            Site::Down => &[Linear::Down],
        }
    }
}

/// An adapter laid out for inference.
pub(crate) struct LoraPack {
    id: u64,
    laid_out: LaidOut,
}

enum LaidOut {
    /// For each product of a layer, the stacked A's and a block matrix of the B's, already scaled.
    Here(Vec<[Option<LowRank>; 4]>),
    OnDevice(Lora),
}

struct LowRank {
    a: Packed,
    b: Packed,
}

impl LoraPack {
    pub(crate) fn new(config: &ModelConfig, adapter: &Adapter) -> Result<Self, EngineError> {
        let layer = |i: usize| -> Result<[Option<LowRank>; 4], EngineError> {
            let [qkv, o, gate_up, down] = Site::ALL.map(|site| LowRank::new(config, adapter, i, site.linears()));
            Ok([qkv?, o?, gate_up?, down?])
        };
        let layers = (0..config.layers.len()).map(layer).collect::<Result<_, _>>()?;
        Ok(LoraPack::numbered(LaidOut::Here(layers)))
    }

    /// Copies an adapter to the device of its model.
    pub(crate) fn copied(model: &DeviceModel, adapter: &Adapter) -> Result<Self, EngineError> {
        let lora = Lora::new(model.config(), adapter, &model.place().device)?;
        Ok(LoraPack::numbered(LaidOut::OnDevice(lora)))
    }

    fn numbered(laid_out: LaidOut) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        LoraPack { id: NEXT.fetch_add(1, Ordering::Relaxed), laid_out }
    }

    fn change(&self, layer: usize, site: Site) -> Option<&LowRank> {
        match &self.laid_out {
            LaidOut::Here(layers) => layers[layer][site as usize].as_ref(),
            LaidOut::OnDevice(_) => None,
        }
    }

    /// Returns it as it is on a device.
    pub(crate) fn on_device(&self) -> Option<&Lora> {
        match &self.laid_out {
            LaidOut::Here(_) => None,
            LaidOut::OnDevice(lora) => Some(lora),
        }
    }

    /// Returns a number above 0 that no other adapter of this process has.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }
}

impl LowRank {
    fn new(
        config: &ModelConfig,
        adapter: &Adapter,
        layer: usize,
        linears: &[Linear],
    ) -> Result<Option<Self>, EngineError> {
        let pairs: Vec<_> = linears.iter().map(|l| adapter.get(layer, *l)).collect();
        let stacked: Vec<_> = pairs.iter().flatten().map(|p| &p.a).collect();
        if stacked.is_empty() {
            return Ok(None);
        }
        let a = Packed::new(&stacked)?;
        let outputs = linears.iter().map(|l| l.shape(config).1).sum();
        let mut b = Packed::zeros(a.outputs(), outputs);
        let (mut output, mut input) = (0, 0);
        for (linear, pair) in linears.iter().zip(pairs) {
            if let Some(pair) = pair {
                let values = pair.b.flatten_all()?.to_vec1::<f32>()?;
                b.fill(output, input, &values, pair.rank, pair.scale as f32);
                input += pair.rank;
            }
            output += linear.shape(config).1;
        }
        Ok(Some(LowRank { a, b }))
    }
}

/// Rows of a batch, and the adapter that they have.
pub(crate) struct Part<'a> {
    rows: Range<usize>,
    adapter: &'a LoraPack,
}

/// Returns which rows have which adapter, given the adapter and the rows of each run in order.
pub(crate) fn parts<'a>(runs: impl Iterator<Item = (Option<&'a LoraPack>, usize)>) -> Vec<Part<'a>> {
    let mut parts: Vec<Part<'a>> = Vec::new();
    let mut first = 0;
    for (adapter, rows) in runs {
        let end = first + rows;
        match (parts.last_mut(), adapter) {
            (Some(last), Some(own)) if last.rows.end == first && last.adapter.id == own.id => last.rows.end = end,
            (_, Some(adapter)) => parts.push(Part { rows: first..end, adapter }),
            (_, None) => {}
        }
        first = end;
    }
    parts
}

/// Adds what the adapters make of the rows of `x` to one product of a layer.
pub(crate) fn add_low_rank(parts: &[Part], layer: usize, site: Site, x: &[f32], product: &mut Product) {
    let changes = parts.iter().filter_map(|part| Some((part.rows.clone(), part.adapter.change(layer, site)?)));
    let changes: Vec<(Range<usize>, &LowRank)> = changes.collect();
    if changes.is_empty() {
        return;
    }
    let width = x.len() / product.rows();
    let inner = |(rows, change): &(Range<usize>, &LowRank)| {
        change.a.apply(&x[rows.start * width..rows.end * width], rows.len()).to_rows()
    };
    let inner: Vec<Vec<f32>> = changes.par_iter().map(inner).collect();
    let outer = changes.iter().zip(&inner).map(|((rows, change), inner)| (&change.b, &inner[..], rows.clone()));
    Packed::add_to_rows(&outer.collect::<Vec<_>>(), product);
}
