//! Multiplication by matrices that are held as they are stored: each panel is widened, multiplied, and given up.
//!
//! The inner loop and its order are those of matrices that were laid out once, so the product has the same bits.

use std::ops::Range;

use pulp::Arch;
use rayon::prelude::*;

use super::{Packed, Panel, Product, WIDTH};
use crate::engine::error::EngineError;
use crate::engine::held::Stored;

/// One or several stored `[out, in]` matrices, their outputs one after the other.
pub(crate) struct Stack {
    parts: Vec<Stored>,
    inputs: usize,
    outputs: usize,
}

impl Stack {
    /// Stacks matrices with the same inputs. Nothing is copied.
    pub(crate) fn new(parts: Vec<Stored>) -> Result<Self, EngineError> {
        let inputs = parts.first().map_or(0, Stored::columns);
        if parts.iter().any(|part| part.columns() != inputs) {
            return Err(EngineError::request("stacked matrices have other inputs"));
        }
        let outputs = parts.iter().map(Stored::rows).sum();
        Ok(Stack { parts, inputs, outputs })
    }

    pub(crate) fn panels(&self) -> usize {
        self.outputs.div_ceil(WIDTH)
    }

    /// Returns the columns of some panels of `x * W^T`.
    pub(crate) fn apply_panels(&self, x: &[f32], rows: usize, panels: Range<usize>, room: Vec<f32>) -> Product {
        let mut product = Product::zeros(self.outputs, rows, &panels, room);
        if rows == 0 || self.inputs == 0 {
            return product;
        }
        let (arch, inputs) = (Arch::new(), self.inputs);
        let work = product.data.par_chunks_exact_mut(rows * WIDTH).zip(panels);
        work.for_each_init(
            || Packed::zeros(inputs, WIDTH),
            |packed, (out, at)| {
                self.widen(at, packed);
                let panel = &packed.data[packed.start..][..inputs * WIDTH];
                arch.dispatch(Panel { x, inputs, panel, out });
            },
        );
        product
    }

    /// Lays out the outputs of one panel. Rows that cannot be widened, which are none of those that a matrix has, become what is
    /// no number.
    fn widen(&self, panel: usize, packed: &mut Packed) {
        let wanted = panel * WIDTH..((panel + 1) * WIDTH).min(self.outputs);
        let mut first = 0;
        for part in &self.parts {
            let own = wanted.start.max(first)..wanted.end.min(first + part.rows());
            if !own.is_empty() {
                let unreadable = || vec![f32::NAN; own.len() * self.inputs];
                let values = part.read(own.start - first..own.end - first).unwrap_or_else(|_| unreadable());
                packed.fill(own.start - wanted.start, 0, &values, self.inputs, 1.0);
            }
            first += part.rows();
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::{GgmlDType, QTensor};
    use candle_core::{Device, Tensor};

    use super::super::tests::numbers;
    use super::*;
    use crate::engine::held::Held;

    #[test]
    fn the_product_has_the_bits_of_widened_matrices() {
        let inputs = 64;
        let held = |outputs: usize, seed: u32| {
            let wide = Tensor::from_vec(numbers(outputs * inputs, seed), (outputs, inputs), &Device::Cpu).unwrap();
            Held::stored(QTensor::quantize(&wide, GgmlDType::Q8_0).unwrap(), None).unwrap()
        };
        let parts = [held(50, 1), held(7, 2), held(40, 3)];
        let wide: Vec<Tensor> = parts.iter().map(|part| part.tensor().unwrap()).collect();
        let packed = Packed::new(&wide.iter().collect::<Vec<_>>()).unwrap();
        let stored = parts.map(|part| match part {
            Held::Stored(stored) => stored,
            Held::Wide(_) => panic!("held as it is stored"),
        });
        let stack = Stack::new(stored.to_vec()).unwrap();
        for rows in [1, 5, 17] {
            let x = numbers(rows * inputs, 4);
            let apply = |panels: Range<usize>| stack.apply_panels(&x, rows, panels, Vec::new()).to_rows();
            assert_eq!(apply(0..stack.panels()), packed.apply(&x, rows).to_rows());
            assert_eq!(apply(1..2), packed.apply_panels(&x, rows, 1..2, Vec::new()).to_rows());
        }
    }
}
