//! Attention of one query row over a shared prefix and the sequence's own positions.
//!
//! Query heads that share a key-value head are computed together, so that each key and value is read once for them.
//! Work per call is small; callers spread rows and heads over threads.

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};

use super::cache::{BLOCK, Segment};
use super::math;

/// Query heads computed together at most; more are done in turns.
const TOGETHER: usize = 4;

/// One layer and key-value head, and what of the cache the row may see.
pub(crate) struct View<'a> {
    pub(crate) layer: usize,
    pub(crate) head: usize,
    /// Prefix and own positions, each with those of them that are visible.
    pub(crate) parts: [Option<(&'a Segment, Range<usize>)>; 2],
    pub(crate) head_dim: usize,
    /// Scores are bent into +- this.
    pub(crate) cap: Option<f32>,
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

    /// Returns keys, values and the visible lanes of each block in order.
    #[inline(always)]
    fn blocks(&self) -> impl Iterator<Item = (&[f32], &[f32], Range<usize>)> {
        self.parts.iter().flatten().flat_map(move |(segment, visible)| {
            (visible.start / BLOCK..visible.end.div_ceil(BLOCK)).map(move |page| {
                let (keys, values) = segment.block(page, self.layer, self.head);
                let start = visible.start.saturating_sub(page * BLOCK);
                (keys, values, start..(visible.end - page * BLOCK).min(BLOCK))
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
    fn with_simd<S: Simd>(self, simd: S) {
        // The vectors that hold one block of positions.
        match S::F32_LANES {
            16 => self.run::<S, 1>(simd),
            8 => self.run::<S, 2>(simd),
            4 => self.run::<S, 4>(simd),
            _ => self.run::<S, BLOCK>(simd),
        }
    }
}

impl<const HEADS: usize> Heads<'_, HEADS> {
    #[inline(always)]
    fn run<S: Simd, const VECTORS: usize>(self, simd: S) {
        let (view, dim, scratch) = (self.view, self.view.head_dim, self.scratch);
        let q: [&[f32]; HEADS] = std::array::from_fn(|h| &self.q[h * dim..][..dim]);
        let row = view.blocks().count() * BLOCK;
        scratch.clear();
        scratch.resize(HEADS * row, 0.0);
        for (at, (keys, _, visible)) in view.blocks().enumerate() {
            for (h, scores) in scores::<S, VECTORS, HEADS>(simd, q, keys).iter().enumerate() {
                let out = &mut scratch[h * row + at * BLOCK..][..BLOCK];
                S::as_mut_simd_f32s(out).0.copy_from_slice(scores);
                if let Some(cap) = view.cap {
                    math::cap(out, cap);
                }
                out[..visible.start].fill(f32::NEG_INFINITY);
                out[visible.end..].fill(f32::NEG_INFINITY);
            }
        }
        let mut inverse = [0.0; HEADS];
        for (weights, inverse) in scratch.chunks_exact_mut(row).zip(&mut inverse) {
            *inverse = 1.0 / math::exp_sum(weights, math::max(weights));
        }
        for chunk in 0..dim.div_ceil(BLOCK) {
            let mut sums = [[simd.splat_f32s(0.0); VECTORS]; HEADS];
            for (at, (_, values, _)) in view.blocks().enumerate() {
                let weights: [&[f32]; HEADS] = std::array::from_fn(|h| &scratch[h * row + at * BLOCK..][..BLOCK]);
                add_values(simd, &mut sums, weights, &values[chunk * BLOCK * BLOCK..][..BLOCK * BLOCK]);
            }
            for (h, sums) in sums.iter().enumerate() {
                let mut whole = [0.0f32; BLOCK];
                S::as_mut_simd_f32s(&mut whole).0.copy_from_slice(sums);
                let end = dim.min((chunk + 1) * BLOCK);
                let out = &mut self.out[h * dim + chunk * BLOCK..h * dim + end];
                for (out, sum) in out.iter_mut().zip(whole) {
                    *out = sum * inverse[h];
                }
            }
        }
    }
}

/// Returns the products of each query with the keys of one block. The sums stay in registers; left to the compiler they
/// did not, which made attention take a quarter of the time of decoding.
#[inline(always)]
fn scores<S: Simd, const VECTORS: usize, const HEADS: usize>(
    simd: S,
    q: [&[f32]; HEADS],
    keys: &[f32],
) -> [[S::f32s; VECTORS]; HEADS] {
    let mut sums = [[simd.splat_f32s(0.0); VECTORS]; HEADS];
    for (d, keys) in S::as_simd_f32s(keys).0.chunks_exact(VECTORS).take(q[0].len()).enumerate() {
        for (sums, q) in sums.iter_mut().zip(q) {
            let q = simd.splat_f32s(q[d]);
            for (sum, key) in sums.iter_mut().zip(keys) {
                *sum = simd.mul_add_e_f32s(q, *key, *sum);
            }
        }
    }
    sums
}

/// Adds the weighted values of one block.
#[inline(always)]
fn add_values<S: Simd, const VECTORS: usize, const HEADS: usize>(
    simd: S,
    sums: &mut [[S::f32s; VECTORS]; HEADS],
    weights: [&[f32]; HEADS],
    values: &[f32],
) {
    for (position, values) in S::as_simd_f32s(values).0.chunks_exact(VECTORS).enumerate() {
        for (sums, weights) in sums.iter_mut().zip(weights) {
            let weight = simd.splat_f32s(weights[position]);
            for (sum, value) in sums.iter_mut().zip(values) {
                *sum = simd.mul_add_e_f32s(weight, *value, *sum);
            }
        }
    }
}
