//! Operations with a backward pass for training on the CPU, over f32 rows.
//!
//! - [`linear`]: a frozen weight with or without a trainable LoRA pair; no gradient is made for the weight.
//! - [`dropout`]: which inputs of a LoRA pair a training step leaves out.
//! - [`pointwise`]: RMS norm, rotary embedding, SwiGLU and GeGLU.
//! - [`attention`]: causal attention in which the completions of a group share the run of their prompt.
//! - [`token_logprobs`]: log-probs of given tokens without ever holding `[tokens, vocabulary]` logits.
//!
//! They are plain functions on slices, put together by hand in [`super::train`], and not candle ops on its graph: a
//! graph's backward pass makes a zeroed gradient for every tensor and adds to it on a pool that spins between ops, which
//! on two cores took a fifth of all time, and keeps all activations to the end. The backward passes are checked against
//! finite differences here and against PyTorch in `tests/golden`. Each op fixes the order of its sums, so the same
//! inputs on the same number of threads give the same bits.

pub mod attention;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod bf16;
pub mod dropout;
pub mod linear;
pub mod mat;
pub mod pointwise;
pub mod token_logprobs;

use std::marker::PhantomData;
use std::ops::Deref;

use candle_core::{CpuStorage, Result, Storage, StorageRef, Tensor, bail};
use pulp::{Arch, Simd, WithSimd};
use rayon::iter::{IndexedParallelIterator, ParallelIterator};

/// The values of a contiguous f32 tensor on the CPU, borrowed for as long as this lives.
pub struct Values<'a> {
    storage: StorageRef<'a>,
    start: usize,
    end: usize,
}

impl<'a> Values<'a> {
    /// Borrows the values of `tensor`, which must be contiguous f32 on the CPU.
    pub fn of(tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        let Some((start, end)) = layout.contiguous_offsets() else {
            bail!("this operation needs contiguous rows, got {layout:?}");
        };
        match &*storage {
            Storage::Cpu(CpuStorage::F32(_)) => Ok(Values { storage, start, end }),
            _ => bail!("this operation needs f32 values on the CPU, got {:?} on {:?}", tensor.dtype(), tensor.device()),
        }
    }
}

impl Deref for Values<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(values)) => &values[self.start..self.end],
            _ => &[],
        }
    }
}

/// Returns so many zeros, made by all threads: one alone is as long over them as a product over a few of its inputs.
pub(crate) fn zeros(count: usize) -> Vec<f32> {
    let lines = rayon::iter::repeat_n([0.0; LANES], count.div_ceil(LANES)).with_min_len(1 << 12);
    let mut zeros = lines.collect::<Vec<_>>().into_flattened();
    zeros.truncate(count);
    zeros
}

/// A loop over floats that is compiled for every width of vectors.
pub(crate) trait Work<A> {
    type Output;

    /// Must be `#[inline(always)]`, with all that it calls: what is not inlined is compiled for any processor.
    fn run(on: A) -> Self::Output;
}

/// Runs a loop as it is compiled for the widest vectors that this processor has. The sums keep their order and nothing is fused, so
/// that every processor gets the same bits.
#[inline(always)]
pub(crate) fn wide<W: Work<A>, A>(_: W, on: A) -> W::Output {
    Arch::new().dispatch(Wide(PhantomData::<W>, on))
}

struct Wide<W, A>(PhantomData<W>, A);

impl<A, W: Work<A>> WithSimd for Wide<W, A> {
    type Output = W::Output;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> W::Output {
        W::run(self.1)
    }
}

/// Returns e to the power of `x` within 2 ulp for |x| <= 87, saturating outside. Unlike the library's, the compiler
/// can vectorise it, and softmax over a vocabulary calls it for each entry.
#[inline(always)]
fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding and taking it away rounds to an integer
    let x = x.clamp(-87.0, 88.0);
    let n = (x * std::f32::consts::LOG2_E + ROUND) - ROUND;
    // ln 2 in two parts, so that the remainder keeps its last bits.
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let p = 1.987_569_1e-4_f32;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let p = p * r * r + r + 1.0;
    p * f32::from_bits(((n as i32 + 127) << 23) as u32)
}

/// Returns the hyperbolic tangent within 1e-7.
#[inline(always)]
fn tanh(x: f32) -> f32 {
    let e = exp(-2.0 * x.abs());
    ((1.0 - e) / (1.0 + e)).copysign(x)
}

/// Partial sums per reduction: as many as the widest vector registers hold, in a fixed order.
const LANES: usize = 16;

/// Returns the sum of products, in lanes so that the compiler can vectorise it.
#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut lanes = [0.0; LANES];
    for (a, b) in a.iter().zip(b) {
        for i in 0..LANES {
            lanes[i] += a[i] * b[i];
        }
    }
    lanes.iter().sum::<f32>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f32>()
}

/// Returns the largest value, or minus infinity of none.
#[inline(always)]
fn largest(values: &[f32]) -> f32 {
    let (chunks, rest) = values.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] = if chunk[i] > lanes[i] { chunk[i] } else { lanes[i] };
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |max, v| max.max(*v))
}

#[cfg(test)]
pub(crate) mod check;

#[cfg(test)]
mod tests {
    #[test]
    fn exp_agrees_with_the_library() {
        for i in -86_000..88_000 {
            let x = i as f32 / 1000.0;
            let expected = (x as f64).exp();
            let error = (super::exp(x) as f64 - expected).abs() / expected;
            assert!(error < 3e-7, "exp({x}): relative error {error}");
        }
        assert!(super::exp(-1e30) < 1e-37 && super::exp(0.0) == 1.0);
    }
}
