//! Keys and values on a device, in cells that pages of the cache name.
//!
//! The batch shares, counts and hands back pages as on the processor (`cache`); here a page is no memory of its own but a run of
//! cells in one tensor per layer. Reading gathers a sequence's cells, in whatever order they lie.

use candle_core::Tensor;

use super::Result;
use super::settings::Place;
use crate::engine::config::ModelConfig;

/// The cells of all layers.
pub(crate) struct Store {
    place: Place,
    /// Key-value heads and their width.
    heads: usize,
    width: usize,
    depth: usize,
    /// Keys and values of each layer, `[kv_heads, cells, head_dim]`; none before the first are asked for.
    layers: Vec<(Tensor, Tensor)>,
    cells: usize,
    /// The most that is ever made.
    most: usize,
}

impl Store {
    /// Returns room for at most so many positions; memory is taken as it is needed.
    pub(crate) fn new(config: &ModelConfig, place: &Place, most: usize) -> Self {
        let (heads, width, depth) = (config.kv_heads, config.head_dim, config.layers.len());
        Store { place: place.clone(), heads, width, depth, layers: Vec::new(), cells: 0, most }
    }

    /// Makes room for cells up to this one, and for as many again that it is not asked for every page.
    pub(super) fn reach(&mut self, last: usize) -> Result<()> {
        if last < self.cells {
            return Ok(());
        }
        let cells = (last + 1).max((2 * self.cells).min(self.most)).next_multiple_of(256);
        let fresh = Tensor::zeros((self.heads, cells - self.cells, self.width), self.place.dtype, &self.place.device)?;
        let longer = |cells: &Tensor| Tensor::cat(&[cells, &fresh], 1)?.contiguous();
        for (keys, values) in &mut self.layers {
            (*keys, *values) = (longer(keys)?, longer(values)?);
        }
        while self.layers.len() < self.depth {
            self.layers.push((fresh.copy()?, fresh.copy()?));
        }
        self.cells = cells;
        Ok(())
    }

    /// Returns where the rows of a pass are written, as [`Store::write`] takes it.
    pub(super) fn places(&self, cells: Vec<u32>) -> Result<Tensor> {
        let rows = cells.len();
        let cells = Tensor::from_vec(cells, (1, rows, 1), &self.place.device)?;
        Ok(cells.broadcast_as((self.heads, rows, self.width))?.contiguous()?)
    }

    /// Writes one layer's keys and values, `[rows, kv_heads, head_dim]` in f32.
    pub(super) fn write(&self, layer: usize, places: &Tensor, keys: &Tensor, values: &Tensor) -> Result<()> {
        let (own_keys, own_values) = &self.layers[layer];
        for (cells, rows) in [(own_keys, keys), (own_values, values)] {
            let rows = rows.to_dtype(self.place.dtype)?.transpose(0, 1)?.contiguous()?;
            cells.scatter_set(places, &rows, 1)?;
        }
        Ok(())
    }

    /// Returns one layer's keys and values in the named cells, `[kv_heads, sequences, positions, head_dim]`.
    pub(super) fn read(&self, layer: usize, cells: &Tensor, sequences: usize) -> Result<(Tensor, Tensor)> {
        let positions = cells.elem_count() / sequences;
        let read = |from: &Tensor| from.index_select(cells, 1)?.reshape((self.heads, sequences, positions, self.width));
        let (keys, values) = &self.layers[layer];
        Ok((read(keys)?, read(values)?))
    }
}
