//! Reading tokens into the cache: one row of each sequence in decoding, many of a prompt in prefill.
//!
//! All rows of a pass go through the weights together. For attention, the sequences that read one token are padded to the
//! longest and computed at once; pieces of prompts follow one by one.

use candle_core::Tensor;

use super::Result;
use super::attention::{SCORES, mask};
use super::lora::Part;
use super::model::DeviceModel;
use super::store::Store;
use crate::engine::cache::Pool;
use crate::engine::decoder::Run;
use crate::engine::error::EngineError;

/// Numbers of the keys of one layer that are gathered at once: 512 MiB in bf16.
const GATHERED: usize = 1 << 28;

/// Rows that attend together: as many of each of some sequences.
struct Piece {
    /// Where they stand in the pass, here and on the device.
    rows: Vec<u32>,
    places: Tensor,
    sequences: usize,
    /// The cells of each sequence's positions, padded to the longest.
    cells: Tensor,
    /// How far before each row each position lies, `[sequences, rows, positions]`.
    distance: Tensor,
}

impl DeviceModel {
    /// Reads the runs' tokens into their caches and returns the last layer's rows, `[rows, hidden]`, normed.
    pub(crate) fn read(&self, runs: &mut [Run], pool: &Pool) -> Result<Tensor> {
        runs.iter_mut().for_each(|run| run.cache.reserve(run.tokens.len(), pool));
        let Some(mut store) = pool.store() else {
            return Err(EngineError::request("the cache of a batch is not on the device of its model"));
        };
        let span = |run: &Run| run.cache.len()..run.cache.len() + run.tokens.len();
        let ids: Vec<u32> = runs.iter().flat_map(|run| run.tokens).copied().collect();
        let positions: Vec<usize> = runs.iter().flat_map(span).collect();
        let written: Vec<u32> = runs.iter().flat_map(|run| run.cache.cells(span(run))).collect();
        store.reach(written.iter().copied().max().unwrap_or(0) as usize)?;
        let places = store.places(written)?;
        let pieces = self.pieces(runs)?;
        let order = self.order(&pieces)?;
        let angles = self.angles(&positions)?;
        let mut x = self.embedded(&ids)?;
        for (index, kind) in self.config.layers.iter().enumerate() {
            x = self.layer(index, &x, &angles, &parts(runs, index), &mut |heads| {
                store.write(index, &places, &heads.k, &heads.v)?;
                let mix = |piece: &Piece| self.mix(piece, &store, index, kind.window, &heads.q);
                let mixed = Tensor::cat(&pieces.iter().map(mix).collect::<Result<Vec<_>>>()?, 0)?;
                order.as_ref().map_or(Ok(mixed.clone()), |order| Ok(mixed.index_select(order, 0)?))
            })?;
        }
        runs.iter_mut().for_each(|run| run.cache.advance(run.tokens.len()));
        self.normed(&x, &self.norm)
    }

    /// Returns what the rows of a piece mix of the values that they see.
    fn mix(&self, piece: &Piece, store: &Store, layer: usize, window: Option<usize>, q: &Tensor) -> Result<Tensor> {
        let (_, heads, width) = q.dims3()?;
        let shape = (piece.sequences, piece.rows.len() / piece.sequences, heads, width);
        let q = q.index_select(&piece.places, 0)?.reshape(shape)?;
        let (keys, values) = store.read(layer, &piece.cells, piece.sequences)?;
        self.attend(&q, &keys, &values, &mask(&piece.distance, window)?)
    }

    /// Cuts a pass into pieces that fit into memory.
    fn pieces(&self, runs: &[Run]) -> Result<Vec<Piece>> {
        let mut firsts = Vec::with_capacity(runs.len());
        let mut rows = 0;
        for run in runs {
            firsts.push(rows);
            rows += run.tokens.len();
        }
        let (single, long): (Vec<usize>, Vec<usize>) = (0..runs.len()).partition(|run| runs[*run].tokens.len() == 1);
        let mut pieces = Vec::new();
        let longest = single.iter().map(|run| runs[*run].cache.len() + 1).max().unwrap_or(1);
        for some in single.chunks((GATHERED / (longest * self.config.kv_size())).max(1)) {
            let spans: Vec<(usize, usize, usize)> = some.iter().map(|run| (*run, firsts[*run], 0)).collect();
            pieces.push(self.piece(runs, &spans, 1)?);
        }
        for run in long {
            let (tokens, all) = (runs[run].tokens.len(), runs[run].cache.len() + runs[run].tokens.len());
            let height = (SCORES / (self.config.heads * all)).max(1);
            for offset in (0..tokens).step_by(height) {
                pieces.push(self.piece(runs, &[(run, firsts[run] + offset, offset)], height.min(tokens - offset))?);
            }
        }
        Ok(pieces)
    }

    /// Makes a piece of as many rows of some runs, given each one's run, first row in the pass and offset in the run.
    fn piece(&self, runs: &[Run], spans: &[(usize, usize, usize)], rows: usize) -> Result<Piece> {
        let device = &self.place().device;
        let first_position = |(run, _, offset): &(usize, usize, usize)| runs[*run].cache.len() + offset;
        let longest = spans.iter().map(|span| first_position(span) + rows).max().unwrap_or(0);
        let mut cells = Vec::with_capacity(spans.len() * longest);
        let mut positions = Vec::with_capacity(spans.len() * rows);
        for span in spans {
            let first = first_position(span);
            positions.extend((first..first + rows).map(|position| position as f32));
            cells.extend(runs[span.0].cache.cells(0..first + rows));
            // No row sees them.
            cells.resize(cells.len() + longest - first - rows, 0);
        }
        let positions = Tensor::from_vec(positions, (spans.len(), rows, 1), device)?;
        let all: Vec<f32> = (0..longest).map(|position| position as f32).collect();
        let distance = positions.broadcast_sub(&Tensor::from_vec(all, (1, 1, longest), device)?)?;
        let rows = spans.iter().flat_map(|(_, first, _)| (*first..first + rows).map(|row| row as u32));
        let rows: Vec<u32> = rows.collect();
        Ok(Piece {
            places: self.indexes(rows.clone())?,
            rows,
            sequences: spans.len(),
            cells: self.indexes(cells)?,
            distance,
        })
    }

    /// Returns where each row of the pass stands among the pieces' rows; nothing where they stand in its order.
    fn order(&self, pieces: &[Piece]) -> Result<Option<Tensor>> {
        let rows: Vec<u32> = pieces.iter().flat_map(|piece| piece.rows.iter().copied()).collect();
        if rows.is_sorted() {
            return Ok(None);
        }
        let mut order = vec![0; rows.len()];
        rows.iter().enumerate().for_each(|(at, row)| order[*row as usize] = at as u32);
        Ok(Some(self.indexes(order)?))
    }
}

/// Returns which rows of a pass have which adapter in one layer.
fn parts<'a>(runs: &[Run<'a>], layer: usize) -> Vec<Part<'a>> {
    let mut parts: Vec<(u64, Part<'a>)> = Vec::new();
    let mut first = 0;
    for run in runs {
        let end = first + run.tokens.len();
        let own = run.adapter.and_then(|adapter| Some((adapter.id(), adapter.on_device()?)));
        match (parts.last_mut(), own) {
            (Some((last, part)), Some((id, _))) if *last == id && part.rows.end == first => part.rows.end = end,
            (_, Some((id, lora))) => parts.push((id, Part { rows: first..end, pairs: lora.layer(layer) })),
            (_, None) => {}
        }
        first = end;
    }
    parts.into_iter().map(|(_, part)| part).collect()
}
