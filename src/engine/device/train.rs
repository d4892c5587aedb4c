//! A training pass on a device.
//!
//! candle differentiates one layer at a time. Forth, a layer's input becomes a variable of its own, beside those of the
//! adapter; back, the layer's output times the gradient that came to it is a number whose gradients are the input's and the
//! adapter's. The graph of a layer is kept, or made again from the input when its turn comes. The adapter's values, their
//! gradients and the optimizer stay with the processor, in f32.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use candle_core::{Tensor, Var};

use super::Result;
use super::attention::Group;
use super::lora::{Pair, Pairs, Part};
use super::model::{Angles, DeviceModel};
use super::score::Told;
use crate::engine::error::EngineError;
use crate::engine::lora::Linear;
use crate::engine::ops::dropout::RowSeeds;
use crate::engine::train::{Activations, LoraMatrices, Packed};

/// What all layers of a pass share.
struct Batch<'a> {
    model: Arc<DeviceModel>,
    lora: &'a LoraMatrices,
    packed: Packed,
    groups: Vec<Group>,
    angles: Vec<Angles>,
    dropout: Option<RowSeeds>,
}

/// What is kept of a layer.
enum Kept {
    Graph(Graph),
    Input(Tensor),
}

/// A layer's input, output, and the matrices between them.
struct Graph {
    input: Var,
    output: Tensor,
    matrices: Matrices,
}

/// The matrices of one layer of an adapter: A and B of a module by their place in the adapter's list.
struct Matrices(BTreeMap<usize, (Var, Var)>);

/// A forward pass with an adapter, kept for its backward pass.
pub(crate) struct Pass<'a> {
    batch: Batch<'a>,
    kept: Vec<Kept>,
    /// The rows before the last norm.
    last: Tensor,
    told: Told,
}

impl<'a> Pass<'a> {
    /// Runs a packed batch with an adapter in training.
    pub(in crate::engine) fn forward(
        model: &Arc<DeviceModel>,
        lora: &'a LoraMatrices,
        packed: Packed,
        dropout: Option<RowSeeds>,
        activations: Activations,
    ) -> Result<Self> {
        let (groups, angles) = (model.groups(&packed)?, model.angles(&packed.positions)?);
        let batch = Batch { model: model.clone(), lora, packed, groups, angles, dropout };
        let mut kept = Vec::new();
        let mut x = model.embedded(&batch.packed.ids)?;
        for index in 0..model.config.layers.len() {
            let graph = batch.graph(index, &x)?;
            let output = graph.output.detach();
            kept.push(match activations {
                Activations::Kept => Kept::Graph(graph),
                Activations::Again => Kept::Input(x),
            });
            x = output;
        }
        let hidden = model.normed(&x.index_select(&model.places(&batch.packed)?, 0)?, &model.norm)?;
        let told = model.told(&hidden, &batch.packed.targets, true)?;
        Ok(Pass { batch, kept, last: x, told })
    }

    /// Returns the log-prob of each completion token.
    pub(crate) fn logprobs(&self) -> &[f32] {
        &self.told.logprobs
    }

    /// Returns the entropy of the distribution that each completion token was drawn from, in nats.
    pub(crate) fn entropies(&self) -> &[f32] {
        &self.told.entropies
    }

    /// Adds to `gradients` those of a loss whose slope with respect to each log-prob is `slopes`.
    pub(crate) fn backward(self, slopes: &[f32], gradients: &mut [Vec<f32>]) -> Result<()> {
        let Pass { batch, mut kept, last, told } = self;
        let model = &batch.model;
        let (Some(rows), true) = (told.slopes, slopes.len() == told.logprobs.len()) else {
            let (found, expected) = (slopes.len(), told.logprobs.len());
            return Err(EngineError::request(format!("{found} slopes for {expected} log-probs")));
        };
        let slopes = Tensor::from_slice(slopes, (slopes.len(), 1), &model.place().device)?;
        let last = Var::from_tensor(&last)?;
        let hidden = model.normed(&last.index_select(&model.places(&batch.packed)?, 0)?, &model.norm)?;
        let mut grads = (hidden * rows.broadcast_mul(&slopes)?)?.sum_all()?.backward()?;
        let mut grad = grads.remove(&last);
        while let Some(now) = kept.pop() {
            let Some(after) = grad else { break };
            let Graph { input, output, matrices } = match now {
                Kept::Graph(graph) => graph,
                Kept::Input(x) => batch.graph(kept.len(), &x)?,
            };
            grads = (output * after)?.sum_all()?.backward()?;
            grad = grads.remove(&input);
            for (at, (a, b)) in &matrices.0 {
                for (sum, matrix) in gradients.iter_mut().skip(*at).zip([a, b]) {
                    let Some(own) = grads.remove(matrix) else { continue };
                    let own = own.flatten_all()?.to_vec1::<f32>()?;
                    sum.iter_mut().zip(own).for_each(|(sum, own)| *sum += own);
                }
            }
        }
        Ok(())
    }
}

impl Batch<'_> {
    /// Runs one layer over its input and keeps its graph.
    fn graph(&self, index: usize, x: &Tensor) -> Result<Graph> {
        let input = Var::from_tensor(x)?;
        let matrices = self.matrices(index)?;
        let pairs = self.pairs(index, &matrices)?;
        let parts = [Part { rows: 0..self.packed.ids.len(), pairs: &pairs }];
        let window = self.model.config.layers[index].window;
        let attend = &mut |heads| self.model.attend_groups(&self.groups, window, &heads);
        let output = self.model.layer(index, &input, &self.angles, &parts, attend)?;
        Ok(Graph { input, output, matrices })
    }

    /// Copies the matrices of one layer to the device.
    fn matrices(&self, layer: usize) -> Result<Matrices> {
        let mut matrices = BTreeMap::new();
        for (at, _) in Linear::ALL.into_iter().filter_map(|linear| self.lora.position(layer, linear)) {
            let copy = |at: usize| -> Result<Var> {
                let (shape, values) = (&self.lora.matrices[at].shape, &self.lora.values[at]);
                Ok(Var::from_slice(values, shape, &self.model.place().device)?)
            };
            if let Entry::Vacant(module) = matrices.entry(at) {
                module.insert((copy(at)?, copy(at + 1)?));
            }
        }
        Ok(Matrices(matrices))
    }

    /// Returns the pair of each linear layer: those of a fused module share its A and have some rows of its B.
    fn pairs(&self, layer: usize, matrices: &Matrices) -> Result<Pairs> {
        let mut pairs = [const { None }; 7];
        let mut kept: BTreeMap<usize, Tensor> = BTreeMap::new();
        for linear in Linear::ALL {
            let (Some((at, own)), Some(pair)) = (self.lora.position(layer, linear), self.lora.pair(layer, linear))
            else {
                continue;
            };
            let Some((a, b)) = matrices.0.get(&at) else { continue };
            if let (Some(dropout), Entry::Vacant(module)) = (&self.dropout, kept.entry(at)) {
                module.insert(self.keep(dropout, at, a.dim(1)?)?);
            }
            pairs[linear as usize] = Some(Pair {
                a: a.as_tensor().clone(),
                b: b.narrow(0, own.start / pair.rank, own.len() / pair.rank)?,
                scale: f64::from(pair.scale),
                keep: kept.get(&at).cloned(),
            });
        }
        Ok(pairs)
    }

    /// Returns what dropout multiplies a module's inputs with: the same choice that the processor makes.
    fn keep(&self, dropout: &RowSeeds, module: usize, width: usize) -> Result<Tensor> {
        let rows = dropout.rows.len();
        let mut keep = vec![1.0; rows * width];
        dropout.of(module).apply(&mut keep);
        Ok(Tensor::from_vec(keep, (rows, width), &self.model.place().device)?)
    }
}
