//! Keys and values of the tokens read so far, in pages that sequences share and hand back.
//!
//! The samples of one prompt read the same prefix and write their own pages. Pages return to a pool when a sample ends,
//! so that memory stays flat however long sampling goes on.

use std::sync::Arc;

use super::config::ModelConfig;

/// Positions of one page; also the width of a vector of scores.
pub(crate) const BLOCK: usize = 16;

/// The layout of a page: for each layer and key-value head, keys as `[dimension][position]`, then values as
/// `[dimension / BLOCK][position][BLOCK]`. Either way attention reads whole vectors in a straight line.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    layers: usize,
    heads: usize,
    head_dim: usize,
}

impl Shape {
    pub(crate) fn new(config: &ModelConfig) -> Self {
        Shape { layers: config.layers.len(), heads: config.kv_heads, head_dim: config.head_dim }
    }

    /// Returns the floats of the keys, and of the values, of one layer and head in one page.
    fn half(self) -> usize {
        self.head_dim.next_multiple_of(BLOCK) * BLOCK
    }

    fn page(self) -> usize {
        self.layers * self.heads * 2 * self.half()
    }
}

/// Pages not in use.
pub(crate) struct Pool {
    shape: Shape,
    free: Vec<Box<[f32]>>,
}

impl Pool {
    pub(crate) fn new(shape: Shape) -> Self {
        Pool { shape, free: Vec::new() }
    }

    fn take(&mut self) -> Box<[f32]> {
        // Old content needs no clearing: scores past the length are masked and their weights are 0.
        self.free.pop().unwrap_or_else(|| vec![0.0; self.shape.page()].into_boxed_slice())
    }

    /// Takes the pages of a cache back; those of the prefix when no other sequence reads it.
    pub(crate) fn reclaim(&mut self, cache: Cache) {
        self.free.extend(cache.own.pages);
        if let Some(prefix) = cache.prefix.and_then(Arc::into_inner) {
            self.free.extend(prefix.pages);
        }
    }
}

/// Consecutive positions, written at the end.
pub(crate) struct Segment {
    shape: Shape,
    pages: Vec<Box<[f32]>>,
    len: usize,
}

impl Segment {
    fn new(shape: Shape) -> Self {
        Segment { shape, pages: Vec::new(), len: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Returns the keys and the values of one layer and head in one page.
    pub(crate) fn block(&self, page: usize, layer: usize, head: usize) -> (&[f32], &[f32]) {
        let half = self.shape.half();
        let start = (layer * self.shape.heads + head) * 2 * half;
        self.pages[page][start..start + 2 * half].split_at(half)
    }

    /// Writes the key and the value of all heads at a position past the end. Room must be made before.
    pub(crate) fn write(&mut self, layer: usize, position: usize, keys: &[f32], values: &[f32]) {
        let (half, dim) = (self.shape.half(), self.shape.head_dim);
        let (page, lane) = (position / BLOCK, position % BLOCK);
        let start = layer * self.shape.heads * 2 * half;
        let blocks = self.pages[page][start..].chunks_exact_mut(2 * half);
        for ((block, key), value) in blocks.zip(keys.chunks_exact(dim)).zip(values.chunks_exact(dim)) {
            let (block_keys, block_values) = block.split_at_mut(half);
            for (column, key) in block_keys.chunks_exact_mut(BLOCK).zip(key) {
                column[lane] = *key;
            }
            for (chunk, value) in block_values.chunks_exact_mut(BLOCK * BLOCK).zip(value.chunks(BLOCK)) {
                chunk[lane * BLOCK..][..value.len()].copy_from_slice(value);
            }
        }
    }
}

/// What one sequence has read: a prefix shared with others, then its own positions.
pub(crate) struct Cache {
    prefix: Option<Arc<Segment>>,
    own: Segment,
}

impl Cache {
    pub(crate) fn new(shape: Shape) -> Self {
        Cache { prefix: None, own: Segment::new(shape) }
    }

    /// Returns an empty sequence after a shared prefix.
    pub(crate) fn after(prefix: &Arc<Segment>) -> Self {
        Cache { prefix: Some(prefix.clone()), own: Segment::new(prefix.shape) }
    }

    /// Returns its own positions for others to share. It must not have a prefix itself.
    pub(crate) fn into_prefix(self) -> Arc<Segment> {
        debug_assert!(self.prefix.is_none());
        Arc::new(self.own)
    }

    pub(crate) fn prefix(&self) -> Option<&Segment> {
        self.prefix.as_deref()
    }

    pub(crate) fn prefix_len(&self) -> usize {
        self.prefix.as_ref().map_or(0, |p| p.len)
    }

    pub(crate) fn own(&self) -> &Segment {
        &self.own
    }

    pub(crate) fn own_mut(&mut self) -> &mut Segment {
        &mut self.own
    }

    /// Returns the number of positions read.
    pub(crate) fn len(&self) -> usize {
        self.prefix_len() + self.own.len
    }

    /// Makes room for more positions.
    pub(crate) fn reserve(&mut self, more: usize, pool: &mut Pool) {
        let pages = (self.own.len + more).div_ceil(BLOCK);
        while self.own.pages.len() < pages {
            self.own.pages.push(pool.take());
        }
    }

    /// Counts positions that were written in every layer.
    pub(crate) fn advance(&mut self, more: usize) {
        self.own.len += more;
    }
}
