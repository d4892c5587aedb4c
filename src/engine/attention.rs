//! Attention of one query row over a shared prefix and the sequence's own positions.
//!
//! Query heads that share a key-value head are computed together, so that each key and value is read once for them.
//! Work per call is small; callers spread rows and heads over threads.

use pulp::{Arch, Simd, WithSimd};

use super::cache::{BLOCK, Segment};
use super::math;

/// Query heads computed together at most; more are done in turns.
const TOGETHER: usize = 4;

/// One layer and key-value head, and what of the cache the row may see.
pub(crate) struct View<'a> {
    pub(crate) layer: usize,
    pub(crate) head: usize,
    /// Prefix and own positions, each with how many of them are visible.
    pub(crate) parts: [Option<(&'a Segment, usize)>; 2],
    pub(crate) head_dim: usize,
}

impl View<'_> {
    /// Writes the attended values of the query heads in `q` (already scaled). `scratch` is kept between calls.
    pub(crate) fn attend(&self, q: &[f32], out: &mut [f32], scratch: &mut Vec<f32>) {
        let (arch, width) = (Arch::new(), TOGETHER * self.head_dim);
        for (q, out) in q.chunks(width).zip(out.chunks_mut(width)) {
            match q.len() / self.head_dim {
                1 => arch.dispatch(Heads::<1> { view: self, q, out, scratch }),
                2 => arch.dispatch(Heads::<2> { view: self, q, out, scratch }),
                3 => arch.dispatch(Heads::<3> { view: self, q, out, scratch }),
                _ => arch.dispatch(Heads::<TOGETHER> { view: self, q, out, scratch }),
            }
        }
    }

    /// Returns keys, values and the number of visible positions of each block in order.
    #[inline(always)]
    fn blocks(&self) -> impl Iterator<Item = (&[f32], &[f32], usize)> {
        self.parts.iter().flatten().flat_map(move |(segment, visible)| {
            (0..visible.div_ceil(BLOCK)).map(move |page| {
                let (keys, values) = segment.block(page, self.layer, self.head);
                (keys, values, (visible - page * BLOCK).min(BLOCK))
            })
        })
    }
}

/// A few query heads over the keys and values they share.
struct Heads<'a, const HEADS: usize> {
    view: &'a View<'a>,
    q: &'a [f32],
    out: &'a mut [f32],
    scratch: &'a mut Vec<f32>,
}

impl<const HEADS: usize> WithSimd for Heads<'_, HEADS> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let (view, dim, scratch) = (self.view, self.view.head_dim, self.scratch);
        let q: [&[f32]; HEADS] = std::array::from_fn(|h| &self.q[h * dim..][..dim]);
        let row = view.blocks().count() * BLOCK;
        scratch.clear();
        scratch.resize(HEADS * row, 0.0);
        for (at, (keys, _, visible)) in view.blocks().enumerate() {
            let scores = scores(q, keys, visible);
            for (h, scores) in scores.iter().enumerate() {
                scratch[h * row + at * BLOCK..][..BLOCK].copy_from_slice(scores);
            }
        }
        let mut inverse = [0.0; HEADS];
        for (weights, inverse) in scratch.chunks_exact_mut(row).zip(&mut inverse) {
            *inverse = 1.0 / math::exp_sum(weights, math::max(weights));
        }
        for chunk in 0..dim.div_ceil(BLOCK) {
            let mut sums = [[0.0f32; BLOCK]; HEADS];
            for (at, (_, values, _)) in view.blocks().enumerate() {
                let weights: [&[f32]; HEADS] = std::array::from_fn(|h| &scratch[h * row + at * BLOCK..][..BLOCK]);
                add_values(&mut sums, weights, &values[chunk * BLOCK * BLOCK..][..BLOCK * BLOCK]);
            }
            for (h, sums) in sums.iter().enumerate() {
                let end = dim.min((chunk + 1) * BLOCK);
                let out = &mut self.out[h * dim + chunk * BLOCK..h * dim + end];
                for (out, sum) in out.iter_mut().zip(sums) {
                    *out = sum * inverse[h];
                }
            }
        }
    }
}

/// Returns the products of each query with the keys of one block; minus infinity where the row must not look.
#[inline(always)]
fn scores<const HEADS: usize>(q: [&[f32]; HEADS], keys: &[f32], visible: usize) -> [[f32; BLOCK]; HEADS] {
    let mut sums = [[0.0f32; BLOCK]; HEADS];
    for (d, keys) in keys.as_chunks::<BLOCK>().0[..q[0].len()].iter().enumerate() {
        for (sums, q) in sums.iter_mut().zip(q) {
            let q = q[d];
            for (sum, key) in sums.iter_mut().zip(keys) {
                *sum = q.mul_add(*key, *sum);
            }
        }
    }
    for sums in &mut sums {
        sums[visible..].fill(f32::NEG_INFINITY);
    }
    sums
}

/// Adds the weighted values of one block.
#[inline(always)]
fn add_values<const HEADS: usize>(sums: &mut [[f32; BLOCK]; HEADS], weights: [&[f32]; HEADS], values: &[f32]) {
    for (position, values) in values.as_chunks::<BLOCK>().0.iter().enumerate() {
        for (sums, weights) in sums.iter_mut().zip(weights) {
            let weight = weights[position];
            for (sum, value) in sums.iter_mut().zip(values) {
                *sum = weight.mul_add(*value, *sum);
            }
        }
    }
}
