//! Adapters on a device, and which rows of a batch have which.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};

use super::Result;
use crate::engine::config::ModelConfig;
use crate::engine::lora::{Adapter, Linear};

/// The change of one linear layer: `y += scale * B (A x)`, in f32.
#[derive(Clone)]
pub(super) struct Pair {
    /// `[rank, in]`.
    pub(super) a: Tensor,
    /// `[out, rank]`.
    pub(super) b: Tensor,
    pub(super) scale: f64,
    /// What dropout multiplies the inputs with, `[rows, in]`, in a step of training that has it.
    pub(super) keep: Option<Tensor>,
}

impl Pair {
    fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let x = match &self.keep {
            Some(keep) => (x * keep)?,
            None => x.clone(),
        };
        Ok((x.matmul(&self.a.t()?)?.matmul(&self.b.t()?)? * self.scale)?)
    }
}

/// The pairs of one decoder layer, in the order of [`Linear::ALL`].
pub(super) type Pairs = [Option<Pair>; 7];

/// An adapter on a device, for sampling and scoring. It carries no gradient.
pub(crate) struct Lora(Vec<Pairs>);

impl Lora {
    /// Copies an adapter to a device.
    pub(crate) fn new(config: &ModelConfig, adapter: &Adapter, device: &Device) -> Result<Self> {
        let layer = |index: usize| -> Result<Pairs> {
            let mut pairs = [const { None }; 7];
            for linear in Linear::ALL {
                let Some(pair) = adapter.get(index, linear) else { continue };
                let moved = |t: &Tensor| t.contiguous()?.to_device(device);
                pairs[linear as usize] =
                    Some(Pair { a: moved(&pair.a)?, b: moved(&pair.b)?, scale: pair.scale, keep: None });
            }
            Ok(pairs)
        };
        Ok(Lora((0..config.layers.len()).map(layer).collect::<Result<_>>()?))
    }

    pub(super) fn layer(&self, index: usize) -> &Pairs {
        &self.0[index]
    }
}

/// Some rows of a batch, and what changes them in one layer.
pub(super) struct Part<'a> {
    pub(super) rows: Range<usize>,
    pub(super) pairs: &'a Pairs,
}

/// Adds what adapters make of the rows of `x` to a product of them. Parts stand in the order of their rows.
pub(super) fn add(parts: &[Part], linear: Linear, x: &Tensor, product: Tensor) -> Result<Tensor> {
    let pairs = parts.iter().filter_map(|part| Some((&part.rows, part.pairs[linear as usize].as_ref()?)));
    let pairs: Vec<(&Range<usize>, &Pair)> = pairs.collect();
    let (rows, outs) = product.dims2()?;
    match pairs.as_slice() {
        [] => return Ok(product),
        [(all, pair)] if all.len() == rows => return Ok((product + pair.apply(x)?)?),
        _ => {}
    }
    let mut pieces = Vec::new();
    let mut end = 0;
    let gap = |rows: usize| Tensor::zeros((rows, outs), DType::F32, product.device());
    for (own, pair) in pairs {
        if own.start > end {
            pieces.push(gap(own.start - end)?);
        }
        pieces.push(pair.apply(&x.narrow(0, own.start, own.len())?)?);
        end = own.end;
    }
    if rows > end {
        pieces.push(gap(rows - end)?);
    }
    Ok((&product + Tensor::cat(&pieces, 0)?)?)
}
