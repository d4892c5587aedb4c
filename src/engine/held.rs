//! A frozen matrix as a model holds it: widened to f32 once, or as its file stores it and widened a few rows at a time.
//!
//! A stored matrix takes what its file takes, a quarter to an eighth of f32, and costs time at every product. Both give the
//! same numbers, so that nothing else depends on how a model is held.

use std::ops::Range;
use std::sync::Arc;

use candle_core::quantized::QTensor;
use candle_core::{Device, Tensor};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::error::EngineError;
use super::ops::Values;

/// How a model's large matrices are held in memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Hold {
    /// Widened to f32 when the model is loaded: fastest.
    #[default]
    F32,
    /// As the file stores them (blocks of a GGUF, bf16), widened again for every product: the least memory.
    Stored,
}

/// A frozen `[out, in]` matrix. Cloning shares it.
#[derive(Debug, Clone)]
pub enum Held {
    /// f32, row-major, on the CPU.
    Wide(Tensor),
    Stored(Stored),
}

/// Some rows of a matrix as its file stores them.
#[derive(Debug, Clone)]
pub struct Stored {
    blocks: Arc<QTensor>,
    first: usize,
    rows: usize,
    columns: usize,
    /// Heads whose halves the file interleaves (llama.cpp's order of rotated rows).
    interleaved: Option<usize>,
}

impl From<Tensor> for Held {
    fn from(tensor: Tensor) -> Self {
        Held::Wide(tensor)
    }
}

impl Held {
    /// Holds a matrix as it is stored. `interleaved` says for how many heads the file interleaves halves.
    pub(crate) fn stored(blocks: QTensor, interleaved: Option<usize>) -> Result<Self, EngineError> {
        let (rows, columns) = blocks.shape().dims2()?;
        Ok(Held::Stored(Stored { blocks: Arc::new(blocks), first: 0, rows, columns, interleaved }))
    }

    /// Returns outputs and inputs.
    pub fn dims2(&self) -> Result<(usize, usize), EngineError> {
        match self {
            Held::Wide(tensor) => Ok(tensor.dims2()?),
            Held::Stored(stored) => Ok((stored.rows, stored.columns)),
        }
    }

    /// Returns the whole matrix in f32: shared where it is held so, made anew where not.
    pub fn tensor(&self) -> Result<Tensor, EngineError> {
        match self {
            Held::Wide(tensor) => Ok(tensor.clone()),
            Held::Stored(stored) => {
                let values = stored.widened(0..stored.rows)?;
                Ok(Tensor::from_vec(values, (stored.rows, stored.columns), &Device::Cpu)?)
            }
        }
    }

    /// Returns a run of its rows as a matrix of its own. Nothing is copied.
    pub(crate) fn narrow(&self, first: usize, rows: usize) -> Result<Self, EngineError> {
        Ok(match self {
            Held::Wide(tensor) => Held::Wide(tensor.narrow(0, first, rows)?),
            Held::Stored(stored) => Held::Stored(Stored { first: stored.first + first, rows, ..stored.clone() }),
        })
    }

    /// Returns the named rows in f32, one after the other: an embedding's.
    pub(crate) fn gather(&self, rows: impl Iterator<Item = usize>) -> Result<Vec<f32>, EngineError> {
        match self {
            Held::Wide(tensor) => {
                let (values, width) = (Values::of(tensor)?, tensor.dim(1)?);
                Ok(rows.flat_map(|row| &values[row * width..][..width]).copied().collect())
            }
            Held::Stored(stored) => stored.read(rows),
        }
    }

    /// Returns how much memory it takes, in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        match self {
            Held::Wide(tensor) => 4 * tensor.elem_count() as u64,
            Held::Stored(stored) => stored.bytes(),
        }
    }
}

/// Values that are widened at once: 16 MiB.
const TILE: usize = 1 << 22;

impl Stored {
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn columns(&self) -> usize {
        self.columns
    }

    fn bytes(&self) -> u64 {
        let kind = self.blocks.dtype();
        (self.rows * self.columns / kind.block_size() * kind.type_size()) as u64
    }

    /// Returns the runs of rows that are widened one after the other.
    pub(crate) fn tiles(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (rows, height) = (self.rows, (TILE / self.columns.max(1)).max(1));
        (0..rows).step_by(height).map(move |first| first..rows.min(first + height))
    }

    /// Returns a run of rows in f32, widened by all threads.
    pub(crate) fn widened(&self, rows: Range<usize>) -> Result<Vec<f32>, EngineError> {
        let mut values = vec![0.0; rows.len() * self.columns];
        let share = rows.len().div_ceil(4 * rayon::current_num_threads()).max(1);
        let parts = values.par_chunks_mut(share * self.columns).enumerate();
        parts.try_for_each(|(part, values)| -> Result<(), EngineError> {
            let first = rows.start + part * share;
            let read = self.read(first..first + values.len() / self.columns)?;
            values.copy_from_slice(&read);
            Ok(())
        })?;
        Ok(values)
    }

    /// Returns the named rows in f32, widened by this thread.
    pub(crate) fn read(&self, rows: impl Iterator<Item = usize>) -> Result<Vec<f32>, EngineError> {
        let places: Vec<u32> = rows.map(|row| self.place(self.first + row) as u32).collect();
        let rows = self.blocks.embedding(&Tensor::from_vec(places.clone(), places.len(), &Device::Cpu)?)?;
        let values = Values::of(&rows)?;
        Ok(values.to_vec())
    }

    /// Returns where the file has a row.
    fn place(&self, row: usize) -> usize {
        let Some(heads) = self.interleaved else { return row };
        let (all, _) = self.blocks.shape().dims2().unwrap_or((self.rows, self.columns));
        let height = all / heads.max(1);
        let (head, inside) = (row / height.max(1), row % height.max(1));
        let half = height / 2;
        head * height + 2 * (inside % half.max(1)) + inside / half.max(1)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::GgmlDType;

    use super::*;
    use crate::engine::gguf::permute;

    fn matrix(rows: usize, columns: usize) -> Tensor {
        let values = (0..rows * columns).map(|i| ((i * 7919 % 1013) as f32 / 1013.0 - 0.5) * 3.0).collect();
        Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap()
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn stored_rows_are_those_that_widening_all_gives() {
        let wide = matrix(24, 256);
        for kind in [GgmlDType::F32, GgmlDType::BF16, GgmlDType::F16, GgmlDType::Q8_0, GgmlDType::Q4_0, GgmlDType::Q4K]
        {
            let blocks = || QTensor::quantize(&wide, kind).unwrap();
            let expected = values(&blocks().dequantize(&Device::Cpu).unwrap());
            let held = Held::stored(blocks(), None).unwrap();
            assert_eq!(values(&held.tensor().unwrap()), expected, "{kind:?}");
            assert_eq!(held.gather([3, 0, 23].into_iter()).unwrap()[512..], expected[23 * 256..], "{kind:?}");
            let part = held.narrow(5, 9).unwrap();
            assert_eq!(values(&part.tensor().unwrap()), expected[5 * 256..14 * 256], "{kind:?}");
            assert_eq!(part.bytes(), (9 * 256 / kind.block_size() * kind.type_size()) as u64);
            let Held::Stored(stored) = &held else { panic!("{held:?}") };
            let tiles: Vec<usize> = stored.tiles().flatten().collect();
            assert_eq!(tiles, (0..24).collect::<Vec<_>>());
        }
    }

    #[test]
    fn rows_that_the_file_interleaves_come_in_halves() {
        let wide = matrix(24, 32);
        let file = permute(&wide, 3).unwrap();
        let blocks = QTensor::quantize(&file, GgmlDType::F32).unwrap();
        let held = Held::stored(blocks, Some(3)).unwrap();
        assert_eq!(values(&held.tensor().unwrap()), values(&wide));
    }
}
