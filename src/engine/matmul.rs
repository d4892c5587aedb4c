//! Multiplication of a few activation rows by a frozen weight matrix that was laid out for it once, in f32 or as integers.
//!
//! Decoding multiplies 16 to 128 rows by the same weights at every token. A general matrix product first rearranges
//! the weights for its inner loop, at each call, which costs as much as a third of the product at these sizes. Here the
//! weights are rearranged once, into panels of [`WIDTH`] outputs, and the inner loop reads them in a straight line.
//!
//! Every output is one sum over the inputs in order, whatever rows stand beside it: a sequence gets the same numbers in
//! any batch and with any number of threads.

use candle_core::{Storage, Tensor};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub(crate) mod rounded;
mod stack;

use self::rounded::Rounded;
use self::stack::Stack;
use super::error::EngineError;
use super::held::{Held, Hold};

/// Outputs of one panel: two AVX-512 registers, four of AVX2.
pub(crate) const WIDTH: usize = 32;

/// Floats of one cache line, at which panels start.
const LINE: usize = 16;

/// The form in which the decoder's weights are multiplied.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum WeightForm {
    /// As they are.
    #[default]
    F32,
    /// Rounded to 16 bits in groups of 64, activations too: within 0.01 nats a token of f32.
    Int16,
    /// Rounded to 8 bits likewise: within 0.1 nats a token or so.
    Int8,
}

impl WeightForm {
    /// Returns the fastest form on this processor that is as good as f32.
    pub fn fastest() -> Self {
        if rounded::is_fast() { WeightForm::Int16 } else { WeightForm::F32 }
    }
}

/// The precision that an operator asks for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// `int16` where the processor has instructions for it (AVX-512 VNNI), else `f32`.
    #[default]
    Auto,
    /// The weights as they are.
    F32,
    /// Weights and activations rounded to 16 bits in groups of 64.
    Int16,
    /// The same with 8 bits: faster still, and off by more than policy gradients allow.
    Int8,
}

impl Precision {
    /// Returns the form of the weights on this machine.
    pub fn form(self) -> WeightForm {
        match self {
            Precision::Auto => WeightForm::fastest(),
            Precision::F32 => WeightForm::F32,
            Precision::Int16 => WeightForm::Int16,
            Precision::Int8 => WeightForm::Int8,
        }
    }

    /// Returns the form of training over a model that is held so: rounded copies would undo what holding it as it is stored saves.
    pub fn form_of_training(self, hold: Hold) -> WeightForm {
        match (self, hold) {
            (Precision::Auto, Hold::Stored) => WeightForm::F32,
            _ => self.form(),
        }
    }
}

/// One or several stacked `[out, in]` matrices in one of the forms.
pub(crate) enum Matrix {
    F32(Packed),
    /// f32 too, widened at each product.
    Stored(Stack),
    Int16(Rounded<2>),
    Int8(Rounded<1>),
}

impl Matrix {
    pub(crate) fn new(form: WeightForm, weights: &[Held]) -> Result<Self, EngineError> {
        let stored = |held: &Held| match held {
            Held::Stored(stored) => Some(stored.clone()),
            Held::Wide(_) => None,
        };
        if let (WeightForm::F32, Some(stored)) = (form, weights.iter().map(stored).collect()) {
            return Ok(Matrix::Stored(Stack::new(stored)?));
        }
        let wide: Vec<Tensor> = weights.iter().map(Held::tensor).collect::<Result<_, _>>()?;
        let wide: Vec<&Tensor> = wide.iter().collect();
        Ok(match form {
            WeightForm::F32 => Matrix::F32(Packed::new(&wide)?),
            WeightForm::Int16 => Matrix::Int16(Rounded::new(&wide)?),
            WeightForm::Int8 => Matrix::Int8(Rounded::new(&wide)?),
        })
    }

    /// Returns the number of panels.
    pub(crate) fn panels(&self) -> usize {
        match self {
            Matrix::F32(matrix) => matrix.panels(),
            Matrix::Stored(matrix) => matrix.panels(),
            Matrix::Int16(matrix) => matrix.panels(),
            Matrix::Int8(matrix) => matrix.panels(),
        }
    }

    /// Returns `x * W^T` for row-major rows.
    pub(crate) fn apply(&self, x: &[f32], rows: usize) -> Product {
        self.apply_panels(x, rows, 0..self.panels(), Vec::new())
    }

    /// Returns the columns of some panels of `x * W^T`. They take the `room` of an earlier product, if it is given one:
    /// logits are so large that new memory costs more than a layer.
    pub(crate) fn apply_panels(
        &self,
        x: &[f32],
        rows: usize,
        panels: std::ops::Range<usize>,
        room: Vec<f32>,
    ) -> Product {
        match self {
            Matrix::F32(matrix) => matrix.apply_panels(x, rows, panels, room),
            Matrix::Stored(matrix) => matrix.apply_panels(x, rows, panels, room),
            Matrix::Int16(matrix) => matrix.apply_panels(x, rows, panels, room),
            Matrix::Int8(matrix) => matrix.apply_panels(x, rows, panels, room),
        }
    }
}

/// One or several stacked `[out, in]` matrices, as panels of `[in][WIDTH]`; missing outputs of the last are 0.
pub(crate) struct Packed {
    data: Vec<f32>,
    /// Where the first cache line starts in `data`.
    start: usize,
    inputs: usize,
    outputs: usize,
}

impl Packed {
    /// Lays out matrices with the same inputs, their outputs one after the other.
    pub(crate) fn new(weights: &[&Tensor]) -> Result<Self, EngineError> {
        let inputs = weights.first().map_or(Ok(0), |w| w.dim(1))?;
        let outputs = weights.iter().map(|w| w.dim(0)).sum::<Result<usize, _>>()?;
        let mut packed = Packed::zeros(inputs, outputs);
        let mut first = 0;
        for weight in weights {
            let rows = weight.dim(0)?;
            read_values(weight, |values| packed.fill(first, 0, values, inputs, 1.0))?;
            first += rows;
        }
        Ok(packed)
    }

    pub(crate) fn zeros(inputs: usize, outputs: usize) -> Self {
        let data = vec![0.0; outputs.div_ceil(WIDTH) * WIDTH * inputs + LINE];
        let start = data.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE);
        Packed { data, start, inputs, outputs }
    }

    /// Writes a row-major `[rows, columns]` matrix, scaled, at an output and an input.
    pub(crate) fn fill(&mut self, output: usize, input: usize, values: &[f32], columns: usize, scale: f32) {
        let (start, inputs) = (self.start, self.inputs);
        for (row, values) in values.chunks_exact(columns).enumerate() {
            let (panel, lane) = ((output + row) / WIDTH, (output + row) % WIDTH);
            let panel = &mut self.data[start + (panel * inputs + input) * WIDTH..][..columns * WIDTH];
            for (slot, value) in panel.iter_mut().skip(lane).step_by(WIDTH).zip(values) {
                *slot = value * scale;
            }
        }
    }

    pub(crate) fn outputs(&self) -> usize {
        self.outputs
    }

    /// Returns the number of panels.
    pub(crate) fn panels(&self) -> usize {
        self.outputs.div_ceil(WIDTH)
    }

    /// Returns `x * W^T` for row-major rows.
    pub(crate) fn apply(&self, x: &[f32], rows: usize) -> Product {
        self.apply_panels(x, rows, 0..self.panels(), Vec::new())
    }

    /// Returns the columns of some panels of `x * W^T`.
    pub(crate) fn apply_panels(
        &self,
        x: &[f32],
        rows: usize,
        panels: std::ops::Range<usize>,
        room: Vec<f32>,
    ) -> Product {
        let mut product = Product::zeros(self.outputs, rows, &panels, room);
        self.accumulate(x, panels.start, &mut product);
        product
    }

    /// Adds the `x * W^T` of several matrices with the product's outputs, each to the rows that its own `x` has there.
    pub(crate) fn add_to_rows(parts: &[(&Packed, &[f32], std::ops::Range<usize>)], product: &mut Product) {
        let (arch, rows) = (Arch::new(), product.rows);
        if rows == 0 {
            return;
        }
        product.data.par_chunks_exact_mut(rows * WIDTH).enumerate().for_each(|(at, out)| {
            for (matrix, x, rows) in parts {
                matrix.add_panel(arch, at, x, &mut out[rows.start * WIDTH..rows.end * WIDTH]);
            }
        });
    }

    fn accumulate(&self, x: &[f32], first: usize, product: &mut Product) {
        let (arch, rows) = (Arch::new(), product.rows);
        if rows == 0 {
            return;
        }
        let panels = product.data.par_chunks_exact_mut(rows * WIDTH).enumerate();
        panels.for_each(|(at, out)| self.add_panel(arch, first + at, x, out));
    }

    /// Adds one panel's columns of `x * W^T`.
    fn add_panel(&self, arch: Arch, at: usize, x: &[f32], out: &mut [f32]) {
        let inputs = self.inputs;
        if inputs > 0 {
            let panel = &self.data[self.start + at * inputs * WIDTH..][..inputs * WIDTH];
            arch.dispatch(Panel { x, inputs, panel, out });
        }
    }
}

/// Hands over the values of a tensor, row-major, without copying them where they lie so already.
fn read_values(tensor: &Tensor, take: impl FnOnce(&[f32])) -> Result<(), EngineError> {
    let (storage, layout) = tensor.storage_and_layout();
    if let (Storage::Cpu(storage), Some((start, end))) = (&*storage, layout.contiguous_offsets()) {
        take(&storage.as_slice::<f32>()?[start..end]);
    } else {
        take(&tensor.flatten_all()?.to_vec1::<f32>()?);
    }
    Ok(())
}

/// A product, panel after panel, each `[rows][WIDTH]`.
pub(crate) struct Product {
    data: Vec<f32>,
    rows: usize,
    columns: usize,
}

impl Product {
    /// Returns some panels of a product with so many outputs, all 0.
    fn zeros(outputs: usize, rows: usize, panels: &std::ops::Range<usize>, mut room: Vec<f32>) -> Self {
        room.clear();
        room.resize(panels.len() * rows * WIDTH, 0.0);
        let columns = outputs.min(panels.end * WIDTH).saturating_sub(panels.start * WIDTH);
        Product { data: room, rows, columns }
    }

    /// Gives its memory back for another product.
    pub(crate) fn into_room(self) -> Vec<f32> {
        self.data
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn columns(&self) -> usize {
        self.columns
    }

    /// Returns the pieces of one row in order, each with the column it starts at.
    pub(crate) fn row(&self, row: usize) -> impl Iterator<Item = (usize, &[f32])> {
        let panels = self.data.chunks_exact(self.rows * WIDTH).enumerate();
        panels.map(move |(at, panel)| {
            let width = WIDTH.min(self.columns - at * WIDTH);
            (at * WIDTH, &panel[row * WIDTH..][..width])
        })
    }

    /// Changes all values, piece by piece in parallel.
    pub(crate) fn change(&mut self, by: impl Fn(&mut [f32]) + Sync + Send) {
        self.data.par_chunks_mut(1 << 13).for_each(by);
    }

    /// Copies one row.
    pub(crate) fn copy_row(&self, row: usize, out: &mut [f32]) {
        for (at, piece) in self.row(row) {
            out[at..at + piece.len()].copy_from_slice(piece);
        }
    }

    /// Copies one row into a buffer, which takes the row's length.
    pub(crate) fn read_row(&self, row: usize, out: &mut Vec<f32>) {
        out.resize(self.columns, 0.0);
        self.copy_row(row, out);
    }

    /// Returns all rows, row-major.
    pub(crate) fn to_rows(&self) -> Vec<f32> {
        let mut rows = vec![0.0; self.rows * self.columns];
        if self.columns > 0 {
            rows.par_chunks_exact_mut(self.columns).enumerate().for_each(|(i, out)| self.copy_row(i, out));
        }
        rows
    }
}

/// One panel times all rows, added to `out`.
struct Panel<'a> {
    x: &'a [f32],
    inputs: usize,
    panel: &'a [f32],
    out: &'a mut [f32],
}

impl WithSimd for Panel<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // Sums fill the registers: 24 of 32 with AVX-512 and NEON, 12 of 16 with AVX2.
        match S::F32_LANES {
            16 => self.tiles::<S, 2, 2>(simd, 12),
            8 => self.tiles::<S, 4, 2>(simd, 6),
            4 => self.tiles::<S, 8, 2>(simd, 12),
            _ => self.tiles::<S, 32, 2>(simd, 2),
        }
    }
}

impl Panel<'_> {
    /// Cuts the rows into tiles of at most `most` rows. A panel line has `LINE` vectors, a tile takes `VECTORS` of it.
    #[inline(always)]
    fn tiles<S: Simd, const LINE: usize, const VECTORS: usize>(self, simd: S, most: usize) {
        let panel = S::as_simd_f32s(self.panel).0;
        let mut x = self.x;
        let mut out = S::as_mut_simd_f32s(self.out).0;
        while !out.is_empty() {
            // Tiles of nearly equal height: a last one of one row would wait for the memory alone.
            let left = out.len() / LINE;
            let rows = left.div_ceil(left.div_ceil(most));
            let (head, tail) = out.split_at_mut(rows * LINE);
            for first in (0..LINE).step_by(VECTORS) {
                let mut tile = Tile::<S, LINE, VECTORS> { simd, x, inputs: self.inputs, panel, first, out: head };
                match rows {
                    1 => tile.add::<1>(),
                    2 => tile.add::<2>(),
                    3 => tile.add::<3>(),
                    4 => tile.add::<4>(),
                    5 => tile.add::<5>(),
                    6 => tile.add::<6>(),
                    7 => tile.add::<7>(),
                    8 => tile.add::<8>(),
                    9 => tile.add::<9>(),
                    10 => tile.add::<10>(),
                    11 => tile.add::<11>(),
                    _ => tile.add::<12>(),
                }
            }
            x = &x[rows * self.inputs..];
            out = tail;
        }
    }
}

/// A few rows and the vectors from `first` of each panel line.
struct Tile<'a, S: Simd, const LINE: usize, const VECTORS: usize> {
    simd: S,
    x: &'a [f32],
    inputs: usize,
    panel: &'a [S::f32s],
    first: usize,
    out: &'a mut [S::f32s],
}

impl<S: Simd, const LINE: usize, const VECTORS: usize> Tile<'_, S, LINE, VECTORS> {
    /// Adds the product; the sums stay in registers.
    #[inline(always)]
    fn add<const ROWS: usize>(&mut self) {
        let rows: [&[f32]; ROWS] = std::array::from_fn(|i| &self.x[i * self.inputs..][..self.inputs]);
        let mut sums = [[self.simd.splat_f32s(0.0); VECTORS]; ROWS];
        for (k, line) in self.panel.chunks_exact(LINE).enumerate() {
            let weights = &line[self.first..self.first + VECTORS];
            for (sums, row) in sums.iter_mut().zip(rows) {
                let value = self.simd.splat_f32s(row[k]);
                for (sum, weight) in sums.iter_mut().zip(weights) {
                    *sum = self.simd.mul_add_e_f32s(value, *weight, *sum);
                }
            }
        }
        for (line, sums) in self.out.chunks_exact_mut(LINE).zip(sums) {
            for (out, sum) in line[self.first..].iter_mut().zip(sums) {
                *out = self.simd.add_f32s(*out, sum);
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use candle_core::Device;

    use super::*;

    pub(crate) fn numbers(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1664525).wrapping_add(1013904223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next()).collect()
    }

    #[test]
    fn the_product_is_that_of_candle_for_every_number_of_rows() {
        let (inputs, first, second) = (37, 50, 23);
        let device = Device::Cpu;
        let a = Tensor::from_vec(numbers(first * inputs, 1), (first, inputs), &device).unwrap();
        let b = Tensor::from_vec(numbers(second * inputs, 2), (second, inputs), &device).unwrap();
        let packed = Packed::new(&[&a, &b]).unwrap();
        let stacked = Tensor::cat(&[&a, &b], 0).unwrap();
        for rows in 1..30 {
            let x = numbers(rows * inputs, 3);
            let expected = Tensor::from_slice(&x, (rows, inputs), &device).unwrap().matmul(&stacked.t().unwrap());
            let expected: Vec<f32> = expected.unwrap().flatten_all().unwrap().to_vec1().unwrap();
            let got = packed.apply(&x, rows).to_rows();
            let worst = got.iter().zip(&expected).map(|(g, e)| (g - e).abs()).fold(0.0, f32::max);
            assert!(got.len() == expected.len() && worst < 1e-5, "{rows} rows: {worst}");
        }
    }

    #[test]
    fn a_row_is_the_same_in_any_batch() {
        let weight = Tensor::from_vec(numbers(64 * 40, 1), (64, 40), &Device::Cpu).unwrap();
        let packed = Packed::new(&[&weight]).unwrap();
        let x = numbers(17 * 40, 2);
        let all = packed.apply(&x, 17).to_rows();
        for row in 0..17 {
            assert_eq!(packed.apply(&x[row * 40..][..40], 1).to_rows(), all[row * 64..][..64]);
        }
    }
}
