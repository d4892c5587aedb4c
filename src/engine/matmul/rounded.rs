//! Weights as integers of 8 or 16 bits, for sampling: less memory to read, and four or two products a lane.
//!
//! Sixty-four inputs of one output share a scale, as do sixty-four inputs of one row of activations, which are rounded
//! to as many bits, too, each time. Products are summed exactly as integers within such a group, and the groups in f32,
//! in order. What a row gives is therefore the same beside any other rows, with any number of threads, and with
//! any inner loop: the one of AMX, the one of AVX-512's VNNI, or the portable one.
//!
//! VNNI multiplies unsigned by signed bytes: weights of 8 bits are stored 128 higher than they are, and -128 times the
//! sum of the group's activations is where each sum starts from. AMX multiplies signed bytes, so that integers of 16 bits
//! are two digits to the base 128 there, which is as exact.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
mod packing;
#[cfg(target_arch = "x86_64")]
mod vnni;

use std::ops::Range;

use candle_core::Tensor;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use self::packing::{GROUP, Layout, Packing};
use super::{Product, WIDTH, read_values};
use crate::engine::error::EngineError;
use crate::engine::ops::mat::Into;
use crate::engine::ops::{Work, wide};

/// Rows that go through all weights together, at most: their words stay in the second cache.
const BLOCK: usize = 48;

/// A word of every output of a panel: two AVX-512 registers.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([i32; WIDTH]);

/// One or several stacked `[out, in]` matrices in panels of `[in][WIDTH]` integers, or where they stand as bytes in two halves
/// of `[in][COLUMNS]`. Missing outputs and inputs are 0.
pub(crate) struct Rounded<const BYTES: usize> {
    lines: Vec<Line>,
    /// `[panel][group]`.
    scales: Vec<[f32; WIDTH]>,
    groups: usize,
    inputs: usize,
    outputs: usize,
    /// What the words are laid out for.
    inner: Loop,
}

impl<const BYTES: usize> Rounded<BYTES> {
    /// Rounds matrices with the same inputs, their outputs one after the other.
    pub(crate) fn new(weights: &[&Tensor]) -> Result<Self, EngineError> {
        Self::laid_out(weights, Loop::best())
    }

    fn laid_out(weights: &[&Tensor], inner: Loop) -> Result<Self, EngineError> {
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
                    Self::fill(lane, row, inner.layout(), lines, scales);
                }
            });
        })?;
        Ok(Rounded { lines, scales, groups, inputs, outputs, inner })
    }

    /// Writes one output's weights into a lane of its panel.
    fn fill(lane: usize, row: &[f32], layout: Layout, lines: &mut [Line], scales: &mut [[f32; WIDTH]]) {
        let width = Packing::<BYTES>::WORDS;
        let mut words = vec![0; width];
        let half = lines.len() / 2 * WIDTH;
        for (group, (values, scale)) in row.chunks(GROUP).zip(scales).enumerate() {
            scale[lane] = Packing::<BYTES>::round(values, layout, true, &mut words).0;
            for (at, word) in (group * width..).zip(&words) {
                let place = match layout {
                    Layout::Whole => at * WIDTH + lane,
                    Layout::Bytes => lane / COLUMNS * half + at * COLUMNS + lane % COLUMNS,
                };
                lines[place / WIDTH].0[place % WIDTH] = *word;
            }
        }
    }

    pub(crate) fn panels(&self) -> usize {
        self.outputs.div_ceil(WIDTH)
    }

    /// Returns the columns of some panels of `x * W^T`.
    pub(crate) fn apply_panels(&self, x: &[f32], rows: usize, panels: Range<usize>, room: Vec<f32>) -> Product {
        let mut product = Product::zeros(self.outputs, rows, &panels, room);
        if rows == 0 {
            return product;
        }
        let rows = Rows::<BYTES>::new(x, rows, self.groups, self.inner);
        product.data.par_chunks_exact_mut(rows.count * WIDTH).zip(panels).for_each(|(out, at)| {
            self.inner.run(self.panel(at, &rows, out.as_chunks_mut().0));
        });
        product
    }

    fn panel<'a>(&'a self, at: usize, rows: &'a Rows<BYTES>, out: &'a mut [[f32; WIDTH]]) -> Panel<'a, BYTES> {
        let words = self.groups * Packing::<BYTES>::WORDS;
        let (lines, scales) = (&self.lines[at * words..][..words], &self.scales[at * self.groups..][..self.groups]);
        Panel { lines, scales, rows, out }
    }

    /// Writes `x * W^T` to row-major rows, or adds it: for many rows, each block of which goes through all weights.
    pub(crate) fn multiply(&self, x: &[f32], y: &mut [f32], into: Into) {
        if x.is_empty() || self.outputs == 0 {
            return;
        }
        let rows = x.len() / self.inputs;
        let block = rows.div_ceil(rayon::current_num_threads()).clamp(1, BLOCK);
        let work = y.par_chunks_mut(block * self.outputs).zip(x.par_chunks(block * self.inputs));
        work.for_each_init(Vec::new, |room: &mut Vec<[f32; WIDTH]>, (y, x)| {
            let rows = Rows::<BYTES>::new(x, x.len() / self.inputs, self.groups, self.inner);
            for at in 0..self.panels() {
                room.clear();
                room.resize(rows.count, [0.0; WIDTH]);
                self.inner.run(self.panel(at, &rows, room));
                wide(Place, (y, self.outputs, at * WIDTH, room, into));
            }
        });
    }
}

/// Writes or adds a panel's rows to the columns of all rows.
struct Place;

impl Work<(&mut [f32], usize, usize, &[[f32; WIDTH]], Into)> for Place {
    type Output = ();

    #[inline(always)]
    fn run((y, outputs, column, panel, into): (&mut [f32], usize, usize, &[[f32; WIDTH]], Into)) {
        for (y, out) in y.chunks_exact_mut(outputs).zip(panel) {
            let y = y[column..].iter_mut().zip(out);
            match into {
                Into::Fresh => y.for_each(|(y, out)| *y = *out),
                Into::Sum => y.for_each(|(y, out)| *y += out),
            }
        }
    }
}

/// Rows of activations, rounded, in tiles: `[tile][group]`, and in these `[word][row of the tile]` where they stand whole and
/// `[byte of the integers][row of the tile][word]` where they stand as bytes.
struct Rows<const BYTES: usize> {
    count: usize,
    groups: usize,
    words: Vec<i32>,
    /// `[tile][group][row of the tile]`.
    scales: Vec<f32>,
    /// Where a group's sum starts, likewise.
    starts: Vec<i32>,
    inner: Loop,
}

/// Words of a row of AMX's tiles, of activations.
const TILE_WORDS: usize = 16;
/// Outputs of a tile of weights.
const COLUMNS: usize = WIDTH / 2;

impl<const BYTES: usize> Rows<BYTES> {
    fn new(x: &[f32], count: usize, groups: usize, inner: Loop) -> Self {
        let width = groups * Packing::<BYTES>::WORDS;
        let (words, scales, starts) = (vec![0; count * width], vec![0.0; count * groups], vec![0; count * groups]);
        let mut rows = Rows { count, groups, words, scales, starts, inner };
        let (arch, inputs) = (Arch::new(), x.len() / count);
        let mut tiles = Vec::new();
        let (mut words, mut scales, mut starts, mut x) =
            (&mut rows.words[..], &mut rows.scales[..], &mut rows.starts[..], x);
        while !x.is_empty() {
            let height = inner.height(x.len() / inputs);
            let tile = Round::<BYTES> {
                rows: x.split_off(..height * inputs).unwrap_or_default(),
                inputs,
                layout: inner.layout(),
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
            let height = (left > 0).then(|| self.inner.height(left))?;
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
    layout: Layout,
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
                let (step, sum) = Packing::<BYTES>::round(values, self.layout, false, &mut words[..width]);
                self.scales[group * height + row] = step;
                let places = &mut self.words[group * width * height..][..width * height];
                match self.layout {
                    Layout::Whole => {
                        self.starts[group * height + row] = sum.wrapping_mul(-Packing::<BYTES>::RAISED);
                        let places = places[row..].iter_mut().step_by(height);
                        places.zip(&words[..width]).for_each(|(place, word)| *place = *word);
                    }
                    Layout::Bytes => {
                        let planes = places.chunks_exact_mut(height * TILE_WORDS).zip(words.chunks_exact(TILE_WORDS));
                        planes
                            .for_each(|(plane, words)| plane[row * TILE_WORDS..][..TILE_WORDS].copy_from_slice(words));
                    }
                }
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
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    Amx,
}

impl Loop {
    /// Returns the fastest one that this processor has.
    fn best() -> Self {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if amx::is_there() {
            return Loop::Amx;
        }
        #[cfg(target_arch = "x86_64")]
        if vnni::is_there() {
            return Loop::Vnni;
        }
        Loop::Portable
    }

    fn layout(self) -> Layout {
        match self {
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Loop::Amx => Layout::Bytes,
            _ => Layout::Whole,
        }
    }

    /// Returns the height of the next tile where so many rows are left. Tiles are of nearly equal height: a last one of one
    /// row would wait for the memory alone.
    fn height(self, left: usize) -> usize {
        let most = match self {
            // A tile's own rows.
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Loop::Amx => amx::ROWS,
            // Twelve sums of integers and twelve of floats fit the 32 registers beside what they are made of.
            _ => TILE,
        };
        left.div_ceil(left.div_ceil(most).max(1))
    }

    fn run<const BYTES: usize>(self, panel: Panel<BYTES>) {
        match self {
            Loop::Portable => Arch::new().dispatch(panel),
            #[cfg(target_arch = "x86_64")]
            Loop::Vnni => vnni::run(panel),
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Loop::Amx => amx::run(panel),
        }
    }
}

/// Rows of one tile of the loops that hold sums in registers.
const TILE: usize = 6;

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

#[cfg(test)]
mod tests;
