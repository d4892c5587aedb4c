//! Weights as integers of 8 or 16 bits, for sampling: less memory to read, and four or two products a lane.
//!
//! Sixty-four inputs of one output share a scale, as do sixty-four inputs of one row of activations, which are rounded
//! to as many bits, too, each time. Products are summed exactly as integers within such a group, and the groups in f32,
//! in order. What a row gives is therefore the same beside any other rows, with any number of threads, and with
//! either inner loop: the one of AVX-512's VNNI, or the portable one.
//!
//! VNNI multiplies unsigned by signed bytes: weights of 8 bits are stored 128 higher than they are, and -128 times the
//! sum of the group's activations is where each sum starts from.

use std::ops::Range;

use candle_core::Tensor;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::{Product, WIDTH, read_values};
use crate::engine::error::EngineError;

/// Inputs that share a scale.
const GROUP: usize = 64;

/// Added to a small float it leaves the nearest integer, of two as near the even one, in the lowest bits.
const MAGIC: f32 = 12_582_912.0;

/// How integers of so many bytes stand in words of 32 bits.
struct Packing<const BYTES: usize>;

impl<const BYTES: usize> Packing<BYTES> {
    /// Integers of a word.
    const PARTS: usize = 4 / BYTES;
    /// Words of a group.
    const WORDS: usize = GROUP / Self::PARTS;
    /// What the largest value of a group becomes. For 16 bits the most of which 64 products fit 31 bits.
    const MOST: f32 = if BYTES == 1 { 127.0 } else { 5792.0 };
    /// How much higher weights are stored than they are.
    const RAISED: i32 = if BYTES == 1 { 128 } else { 0 };

    /// Rounds a group of values; returns the step, the integers, each `raised`, as words, and their sum before that.
    #[inline(always)]
    fn round(values: &[f32], raised: i32, words: &mut [i32]) -> (f32, i32) {
        let mut whole = [0.0; GROUP];
        whole[..values.len()].copy_from_slice(values);
        let (step, inverse) = Self::steps(&whole);
        let integers =
            whole.map(|value| ((value * inverse + MAGIC).to_bits() as i32).wrapping_sub(MAGIC.to_bits() as i32));
        let mask = u32::MAX >> (32 - 8 * BYTES);
        for (word, parts) in words.iter_mut().zip(integers.chunks_exact(Self::PARTS)) {
            let part = |(i, value): (usize, &i32)| (value.wrapping_add(raised) as u32 & mask) << (8 * BYTES * i);
            *word = parts.iter().enumerate().map(part).fold(0, |word, part| word | part) as i32;
        }
        (step, integers.iter().fold(0, |sum: i32, value| sum.wrapping_add(*value)))
    }

    /// Returns the step that takes the largest value to [`Self::MOST`], and its inverse. What is no number makes the step
    /// none, so that it is seen in the product.
    #[inline(always)]
    fn steps(values: &[f32; GROUP]) -> (f32, f32) {
        let (mut largest, mut faults) = (0.0f32, 0.0f32);
        for value in values {
            largest = if value.abs() > largest { value.abs() } else { largest };
            faults += value * 0.0;
        }
        let step = largest / Self::MOST + faults;
        (step, if step > 0.0 { Self::MOST / largest } else { 0.0 })
    }

    /// Returns the sum of the products of the parts of a word of weights and one of activations.
    #[inline(always)]
    fn multiply(weights: i32, values: i32) -> i32 {
        let signed = |word: i32, i: usize| (word << (32 - 8 * BYTES * (i + 1))) >> (32 - 8 * BYTES);
        let weight = |i: usize| if BYTES == 1 { weights >> (8 * i) & 0xff } else { signed(weights, i) };
        (0..Self::PARTS).map(|i| weight(i) * signed(values, i)).sum()
    }
}

/// A word of every output of a panel: two AVX-512 registers.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([i32; WIDTH]);

/// One or several stacked `[out, in]` matrices in panels of `[in][WIDTH]` integers. Missing outputs and inputs are 0.
pub(crate) struct Rounded<const BYTES: usize> {
    lines: Vec<Line>,
    /// `[panel][group]`.
    scales: Vec<[f32; WIDTH]>,
    groups: usize,
    outputs: usize,
}

impl<const BYTES: usize> Rounded<BYTES> {
    /// Rounds matrices with the same inputs, their outputs one after the other.
    pub(crate) fn new(weights: &[&Tensor]) -> Result<Self, EngineError> {
        let stacked = Tensor::cat(weights, 0)?;
        let (outputs, inputs) = stacked.dims2()?;
        let (panels, groups) = (outputs.div_ceil(WIDTH), inputs.div_ceil(GROUP));
        let words = groups * Packing::<BYTES>::WORDS;
        let mut lines = vec![Line([0; WIDTH]); panels * words];
        let mut scales = vec![[0.0; WIDTH]; panels * groups];
        read_values(&stacked, |values| {
            let rows: Vec<&[f32]> = values.chunks_exact(inputs).collect();
            let panels = lines.par_chunks_exact_mut(words).zip(scales.par_chunks_exact_mut(groups));
            panels.zip(rows.par_chunks(WIDTH)).for_each(|((lines, scales), rows)| {
                for (lane, row) in rows.iter().enumerate() {
                    Self::fill(lane, row, lines, scales);
                }
            });
        })?;
        Ok(Rounded { lines, scales, groups, outputs })
    }

    /// Writes one output's weights into a lane of its panel.
    fn fill(lane: usize, row: &[f32], lines: &mut [Line], scales: &mut [[f32; WIDTH]]) {
        let mut words = vec![0; Packing::<BYTES>::WORDS];
        let groups = row.chunks(GROUP).zip(scales).zip(lines.chunks_exact_mut(Packing::<BYTES>::WORDS));
        for ((values, scale), lines) in groups {
            scale[lane] = Packing::<BYTES>::round(values, Packing::<BYTES>::RAISED, &mut words).0;
            for (line, word) in lines.iter_mut().zip(&words) {
                line.0[lane] = *word;
            }
        }
    }

    pub(crate) fn panels(&self) -> usize {
        self.outputs.div_ceil(WIDTH)
    }

    /// Returns the columns of some panels of `x * W^T`.
    pub(crate) fn apply_panels(&self, x: &[f32], rows: usize, panels: Range<usize>, room: Vec<f32>) -> Product {
        self.product(x, rows, panels, room, Loop::best())
    }

    fn product(&self, x: &[f32], rows: usize, panels: Range<usize>, room: Vec<f32>, inner: Loop) -> Product {
        let mut product = Product::zeros(self.outputs, rows, &panels, room);
        if rows == 0 {
            return product;
        }
        let rows = Rows::<BYTES>::new(x, rows, self.groups);
        product.data.par_chunks_exact_mut(rows.count * WIDTH).zip(panels).for_each(|(out, at)| {
            let words = self.groups * Packing::<BYTES>::WORDS;
            let (lines, scales) = (&self.lines[at * words..][..words], &self.scales[at * self.groups..][..self.groups]);
            inner.run(Panel { lines, scales, rows: &rows, out: out.as_chunks_mut().0 });
        });
        product
    }
}

/// Rows of activations, rounded, in tiles whose rows lie side by side: `[tile][group][word][row of the tile]`.
struct Rows<const BYTES: usize> {
    count: usize,
    groups: usize,
    words: Vec<i32>,
    /// `[tile][group][row of the tile]`.
    scales: Vec<f32>,
    /// Where a group's sum starts, likewise.
    starts: Vec<i32>,
}

/// Rows of one tile: twelve sums of integers and twelve of floats fit the 32 registers beside what they are made of.
const TILE: usize = 6;

/// Returns the height of the next tile where so many rows are left. Tiles are of nearly equal height: a last one of one
/// row would wait for the memory alone.
fn height(left: usize) -> usize {
    left.div_ceil(left.div_ceil(TILE).max(1))
}

impl<const BYTES: usize> Rows<BYTES> {
    fn new(x: &[f32], count: usize, groups: usize) -> Self {
        let width = groups * Packing::<BYTES>::WORDS;
        let (words, scales, starts) = (vec![0; count * width], vec![0.0; count * groups], vec![0; count * groups]);
        let mut rows = Rows { count, groups, words, scales, starts };
        let (arch, inputs) = (Arch::new(), x.len() / count);
        let mut tiles = Vec::new();
        let (mut words, mut scales, mut starts, mut x) =
            (&mut rows.words[..], &mut rows.scales[..], &mut rows.starts[..], x);
        while !x.is_empty() {
            let height = height(x.len() / inputs);
            let tile = Round::<BYTES> {
                rows: x.split_off(..height * inputs).unwrap_or_default(),
                inputs,
                words: words.split_off_mut(..height * width).unwrap_or_default(),
                scales: scales.split_off_mut(..height * groups).unwrap_or_default(),
                starts: starts.split_off_mut(..height * groups).unwrap_or_default(),
            };
            tiles.push(tile);
        }
        tiles.into_par_iter().for_each(|tile| arch.dispatch(tile));
        rows
    }

    /// Returns the height of each tile with its words, scales and starts.
    fn tiles(&self) -> impl Iterator<Item = (usize, &[i32], &[f32], &[i32])> {
        let (mut words, mut scales, mut starts) = (&self.words[..], &self.scales[..], &self.starts[..]);
        let mut left = self.count;
        std::iter::from_fn(move || {
            let height = (left > 0).then(|| height(left))?;
            left -= height;
            let groups = height * self.groups;
            Some((
                height,
                words.split_off(..groups * Packing::<BYTES>::WORDS)?,
                scales.split_off(..groups)?,
                starts.split_off(..groups)?,
            ))
        })
    }
}

/// The rows of one tile, to be rounded.
struct Round<'a, const BYTES: usize> {
    rows: &'a [f32],
    inputs: usize,
    words: &'a mut [i32],
    scales: &'a mut [f32],
    starts: &'a mut [i32],
}

impl<const BYTES: usize> WithSimd for Round<'_, BYTES> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let height = self.rows.len() / self.inputs;
        let width = Packing::<BYTES>::WORDS;
        let mut words = [0; GROUP];
        for (row, values) in self.rows.chunks_exact(self.inputs).enumerate() {
            for (group, values) in values.chunks(GROUP).enumerate() {
                let (step, sum) = Packing::<BYTES>::round(values, 0, &mut words[..width]);
                self.scales[group * height + row] = step;
                self.starts[group * height + row] = sum.wrapping_mul(-Packing::<BYTES>::RAISED);
                let places = self.words[group * width * height + row..].iter_mut().step_by(height);
                places.zip(&words[..width]).for_each(|(place, word)| *place = *word);
            }
        }
    }
}

/// One panel times all rows.
struct Panel<'a, const BYTES: usize> {
    lines: &'a [Line],
    scales: &'a [[f32; WIDTH]],
    rows: &'a Rows<BYTES>,
    out: &'a mut [[f32; WIDTH]],
}

/// The inner loop.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Loop {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Vnni,
}

impl Loop {
    /// Returns the fastest one that this processor has.
    fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        if vnni::is_there() {
            return Loop::Vnni;
        }
        Loop::Portable
    }

    fn run<const BYTES: usize>(self, panel: Panel<BYTES>) {
        match self {
            Loop::Portable => Arch::new().dispatch(panel),
            #[cfg(target_arch = "x86_64")]
            Loop::Vnni => vnni::run(panel),
        }
    }
}

/// Returns true where rounded weights are faster than f32: on processors that sum several products in one instruction.
pub(crate) fn is_fast() -> bool {
    Loop::best() != Loop::Portable
}

/// By what every processor has.
impl<const BYTES: usize> WithSimd for Panel<'_, BYTES> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let width = Packing::<BYTES>::WORDS;
        let mut rest = self.out;
        for (height, words, steps, starts) in self.rows.tiles() {
            let (tile, tail) = rest.split_at_mut(height);
            rest = tail;
            for (row, out) in tile.iter_mut().enumerate() {
                let steps = steps.iter().skip(row).step_by(height).zip(starts.iter().skip(row).step_by(height));
                let groups = self.lines.chunks_exact(width).zip(words.chunks_exact(width * height)).zip(self.scales);
                for (((lines, words), scales), (step, start)) in groups.zip(steps) {
                    let mut sums = [*start; WIDTH];
                    for (line, word) in lines.iter().zip(words.iter().skip(row).step_by(height)) {
                        for (sum, weights) in sums.iter_mut().zip(line.0) {
                            *sum += Packing::<BYTES>::multiply(weights, *word);
                        }
                    }
                    for ((out, sum), scale) in out.iter_mut().zip(sums).zip(scales) {
                        *out = (sum as f32).mul_add(scale * step, *out);
                    }
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod vnni {
    use std::arch::x86_64::*;
    use std::sync::LazyLock;

    use pulp::bytemuck;

    use super::{Line, Packing, Panel, TILE, WIDTH};

    const _: () = assert!(WIDTH == 32);

    /// Returns true if the processor has the instructions of [`run`].
    pub(super) fn is_there() -> bool {
        static THERE: LazyLock<bool> = LazyLock::new(|| {
            is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vnni")
        });
        *THERE
    }

    /// Writes one panel of the product of all rows. The processor must have the instructions.
    #[expect(unsafe_code, reason = "only so a function for newer processors is called")]
    pub(super) fn run<const BYTES: usize>(panel: Panel<BYTES>) {
        assert!(is_there(), "this processor has no AVX-512 VNNI");
        // SAFETY: the instructions that `tiles` is compiled for are there, which is all that it asks for.
        unsafe { tiles(panel) }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn tiles<const BYTES: usize>(panel: Panel<BYTES>) {
        let Panel { lines, scales, rows, out } = panel;
        let mut rest = out;
        for (height, words, steps, starts) in rows.tiles() {
            let (out, tail) = rest.split_at_mut(height);
            rest = tail;
            match height {
                1 => tile::<BYTES, 1>(lines, scales, words, steps, starts, out),
                2 => tile::<BYTES, 2>(lines, scales, words, steps, starts, out),
                3 => tile::<BYTES, 3>(lines, scales, words, steps, starts, out),
                4 => tile::<BYTES, 4>(lines, scales, words, steps, starts, out),
                5 => tile::<BYTES, 5>(lines, scales, words, steps, starts, out),
                _ => tile::<BYTES, TILE>(lines, scales, words, steps, starts, out),
            }
        }
    }

    /// Writes the rows of one tile; their sums stay in registers.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn tile<const BYTES: usize, const N: usize>(
        lines: &[Line],
        scales: &[[f32; WIDTH]],
        words: &[i32],
        steps: &[f32],
        starts: &[i32],
        out: &mut [[f32; WIDTH]],
    ) {
        let width = Packing::<BYTES>::WORDS;
        let (words, steps, starts) = (words.as_chunks::<N>().0, steps.as_chunks::<N>().0, starts.as_chunks::<N>().0);
        let groups = lines.chunks_exact(width).zip(words.chunks_exact(width));
        let mut totals = [[_mm512_setzero_ps(); 2]; N];
        for ((lines, words), ((scales, steps), starts)) in groups.zip(scales.iter().zip(steps).zip(starts)) {
            let mut sums = [[_mm512_setzero_si512(); 2]; N];
            for (sums, start) in sums.iter_mut().zip(starts) {
                *sums = [_mm512_set1_epi32(*start); 2];
            }
            for (line, words) in lines.iter().zip(words) {
                let weights: [__m512i; 2] = bytemuck::cast(line.0);
                for (sums, word) in sums.iter_mut().zip(words) {
                    let values = _mm512_set1_epi32(*word);
                    for (sum, weights) in sums.iter_mut().zip(weights) {
                        *sum = match BYTES {
                            1 => _mm512_dpbusd_epi32(*sum, weights, values),
                            _ => _mm512_dpwssd_epi32(*sum, weights, values),
                        };
                    }
                }
            }
            let scales: [__m512; 2] = bytemuck::cast(*scales);
            for ((totals, sums), step) in totals.iter_mut().zip(sums).zip(steps) {
                let step = _mm512_set1_ps(*step);
                for ((total, sum), scale) in totals.iter_mut().zip(sums).zip(scales) {
                    *total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(scale, step), *total);
                }
            }
        }
        for (out, totals) in out.iter_mut().zip(totals) {
            *out = bytemuck::cast(totals);
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::super::Packed;
    use super::super::tests::numbers;
    use super::*;

    fn weight(outputs: usize, inputs: usize, seed: u32) -> Tensor {
        Tensor::from_vec(numbers(outputs * inputs, seed), (outputs, inputs), &Device::Cpu).unwrap()
    }

    /// Inputs that do not fill the last group, outputs that do not fill the last panel.
    fn the_product_is_that_of_f32<const BYTES: usize>() {
        for (inputs, outputs) in [(64, 32), (200, 73), (576, 96)] {
            let (first, second) = (weight(outputs, inputs, 1), weight(7, inputs, 2));
            let exact = Packed::new(&[&first, &second]).unwrap();
            let rounded = Rounded::<BYTES>::new(&[&first, &second]).unwrap();
            for rows in 1..15 {
                let x = numbers(rows * inputs, 3);
                let (exact, rounded) = (
                    exact.apply(&x, rows).to_rows(),
                    rounded.apply_panels(&x, rows, 0..rounded.panels(), Vec::new()).to_rows(),
                );
                assert_eq!(exact.len(), rounded.len());
                // Both factors lie below 1 and are off by half a step; the errors of many products go both ways.
                let bound = 3.0 * (inputs as f32).sqrt() / (2.0 * Packing::<BYTES>::MOST);
                let worst = exact.iter().zip(&rounded).map(|(e, r)| (e - r).abs()).fold(0.0, f32::max);
                assert!(
                    worst < bound && worst > bound / 100.0,
                    "{inputs} x {outputs}, {rows} rows: {worst} of {bound}"
                );
            }
        }
    }

    #[test]
    fn the_product_is_that_of_f32_but_for_the_rounding() {
        the_product_is_that_of_f32::<1>();
        the_product_is_that_of_f32::<2>();
    }

    /// Integers up to the largest one are kept as they are, also where all of a group are that large.
    fn integers_stay<const BYTES: usize>() {
        let most = Packing::<BYTES>::MOST;
        let integers = |n: usize, seed: u32| -> Vec<f32> {
            let scaled = numbers(n, seed).into_iter().map(|v| (v * most).round());
            scaled.enumerate().map(|(i, v)| if i < GROUP || i % GROUP == 5 { -most } else { v }).collect()
        };
        let (inputs, outputs, rows) = (128, 40, 9);
        let (w, x) = (integers(outputs * inputs, 4), integers(rows * inputs, 5));
        let weight = Tensor::from_slice(&w, (outputs, inputs), &Device::Cpu).unwrap();
        let rounded = Rounded::<BYTES>::new(&[&weight]).unwrap();
        let got = rounded.apply_panels(&x, rows, 0..rounded.panels(), Vec::new()).to_rows();
        for (at, got) in got.iter().enumerate() {
            let (x, w) = (&x[at / outputs * inputs..][..inputs], &w[at % outputs * inputs..][..inputs]);
            let exact: f64 = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
            // Two groups are rounded to f32 and added.
            assert!((f64::from(*got) - exact).abs() <= 256.0, "{got} for {exact}");
            assert!(BYTES == 2 || f64::from(*got) == exact, "{got} for {exact}");
        }
    }

    #[test]
    fn integers_stay_what_they_are() {
        integers_stay::<1>();
        integers_stay::<2>();
    }

    fn loops_agree<const BYTES: usize>() {
        let rounded = Rounded::<BYTES>::new(&[&weight(75, 200, 6)]).unwrap();
        let x = numbers(17 * 200, 7);
        let all = rounded.product(&x, 17, 0..3, Vec::new(), Loop::best()).to_rows();
        assert_eq!(rounded.product(&x, 17, 0..3, Vec::new(), Loop::Portable).to_rows(), all);
        for row in 0..17 {
            let alone = rounded.product(&x[row * 200..][..200], 1, 0..3, Vec::new(), Loop::best()).to_rows();
            assert_eq!(alone, all[row * 75..][..75]);
        }
        let part = rounded.product(&x, 17, 1..2, Vec::new(), Loop::best()).to_rows();
        assert_eq!(part[32..64], all[75 + 32..75 + 64]);
    }

    #[test]
    fn both_loops_give_the_same_bits_in_any_batch() {
        loops_agree::<1>();
        loops_agree::<2>();
    }

    fn faults_are_seen<const BYTES: usize>() {
        let rounded = Rounded::<BYTES>::new(&[&weight(3, 70, 8)]).unwrap();
        for fault in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = numbers(70, 9);
            x[66] = fault;
            let out = rounded.apply_panels(&x, 1, 0..1, Vec::new()).to_rows();
            assert!(out.iter().all(|v| !v.is_finite()), "{fault}: {out:?}");
        }
        assert_eq!(rounded.apply_panels(&[0.0; 70], 1, 0..1, Vec::new()).to_rows(), [0.0; 3]);
    }

    #[test]
    fn what_is_no_number_is_not_hidden() {
        faults_are_seen::<1>();
        faults_are_seen::<2>();
    }
}
