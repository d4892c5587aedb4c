//! Keys and values of the tokens read so far, in pages that sequences share and hand back.
//!
//! The samples of one prompt read the same prefix and write their own pages; prompts that begin with the same tokens share
//! the full pages of that beginning, at the same borders as if each had read them itself, so that sharing changes no bit of
//! what comes out. Pages return to a pool when nobody holds them, so that memory stays flat however long sampling goes on.

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::config::ModelConfig;
use super::device::{DeviceModel, Store};

/// Positions of one page; also the width of a vector of scores.
pub(crate) const BLOCK: usize = 16;

/// The layout of a page: for each layer and key-value head, keys as `[dimension][position]`, then values as
/// `[dimension / BLOCK][position][BLOCK]`. Either way attention reads whole vectors in a straight line.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    layers: usize,
    heads: usize,
    head_dim: usize,
    /// Bytes of a number on a device, where pages name cells there and hold nothing themselves.
    on_device: Option<usize>,
}

impl Shape {
    pub(crate) fn new(config: &ModelConfig) -> Self {
        Shape::of(config.layers.len(), config.kv_heads, config.head_dim)
    }

    pub(crate) fn of(layers: usize, heads: usize, head_dim: usize) -> Self {
        Shape { layers, heads, head_dim, on_device: None }
    }

    /// Returns the floats of the keys, and of the values, of one layer and head in one page.
    fn half(self) -> usize {
        self.head_dim.next_multiple_of(BLOCK) * BLOCK
    }

    /// Returns the layout of pages that name cells on a device.
    pub(crate) fn on_device(model: &DeviceModel) -> Self {
        Shape { on_device: Some(model.place().dtype.size_in_bytes()), ..Shape::new(model.config()) }
    }

    /// Returns the floats that one page holds.
    fn page(self) -> usize {
        match self.on_device {
            None => self.layers * self.heads * 2 * self.half(),
            Some(_) => 0,
        }
    }

    /// Returns the bytes of one page, wherever they are.
    pub(crate) fn page_bytes(self) -> u64 {
        let bytes = match self.on_device {
            None => self.page() * size_of::<f32>(),
            Some(bytes) => self.layers * self.heads * 2 * self.head_dim * BLOCK * bytes,
        };
        bytes as u64
    }
}

/// Where pages come from and return to.
#[derive(Default)]
struct Home {
    free: Mutex<Vec<Free>>,
    /// Pages that are held somewhere.
    live: AtomicUsize,
    /// Pages that were ever made.
    made: AtomicU32,
}

/// A page that nobody holds.
struct Free {
    floats: Box<[f32]>,
    number: u32,
}

impl Home {
    /// Returns the free pages. No code panics while it holds them, so a poisoned lock is still whole.
    fn free(&self) -> MutexGuard<'_, Vec<Free>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Room for the keys and values of [`BLOCK`] positions; it returns to its pool when it is dropped.
pub(crate) struct Page {
    floats: Box<[f32]>,
    /// Which of its pool's pages it is; on a device, which cells it has.
    number: u32,
    home: Arc<Home>,
}

impl Drop for Page {
    fn drop(&mut self) {
        self.home.live.fetch_sub(1, Ordering::Relaxed);
        self.home.free().push(Free { floats: std::mem::take(&mut self.floats), number: self.number });
    }
}

/// Makes pages, and makes no more than are held at the same time.
pub(crate) struct Pool {
    shape: Shape,
    home: Arc<Home>,
    /// The cells that its pages name, where they are on a device.
    store: Option<Mutex<Store>>,
}

impl Pool {
    pub(crate) fn new(shape: Shape) -> Self {
        Pool { shape, home: Arc::default(), store: None }
    }

    /// Returns a pool of at most so many pages on a device.
    pub(crate) fn on_device(model: &DeviceModel, pages: usize) -> Self {
        let store = Store::new(model.config(), model.place(), pages.saturating_mul(BLOCK));
        Pool { store: Some(Mutex::new(store)), ..Pool::new(Shape::on_device(model)) }
    }

    /// Returns the cells on the device, if that is where its pages are.
    pub(crate) fn store(&self) -> Option<MutexGuard<'_, Store>> {
        Some(self.store.as_ref()?.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Returns the number of pages that are held.
    pub(crate) fn live(&self) -> usize {
        self.home.live.load(Ordering::Relaxed)
    }

    fn make(&self) -> Free {
        let number = self.home.made.fetch_add(1, Ordering::Relaxed);
        Free { floats: vec![0.0; self.shape.page()].into_boxed_slice(), number }
    }

    pub(crate) fn take(&self) -> Page {
        self.home.live.fetch_add(1, Ordering::Relaxed);
        // Old content needs no clearing: scores past the length are masked and their weights are 0.
        let free = self.home.free().pop();
        let Free { floats, number } = free.unwrap_or_else(|| self.make());
        Page { floats, number, home: self.home.clone() }
    }
}

/// Consecutive positions, written at the end.
pub(crate) struct Segment {
    shape: Shape,
    /// The first pages, which are full and which other prompts may have as well.
    shared: Vec<Arc<Page>>,
    pages: Vec<Page>,
    len: usize,
}

impl Segment {
    fn new(shape: Shape) -> Self {
        Segment { shape, shared: Vec::new(), pages: Vec::new(), len: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Returns the number of its pages.
    pub(crate) fn pages(&self) -> usize {
        self.shared.len() + self.pages.len()
    }

    /// Returns the keys and the values of one layer and head in one page.
    pub(crate) fn block(&self, page: usize, layer: usize, head: usize) -> (&[f32], &[f32]) {
        let page = self.shared.get(page).map_or_else(|| &self.pages[page - self.shared.len()], |page| &**page);
        let half = self.shape.half();
        let start = (layer * self.shape.heads + head) * 2 * half;
        page.floats[start..start + 2 * half].split_at(half)
    }

    /// Returns the cell of a position.
    fn cell(&self, position: usize) -> u32 {
        let page = position / BLOCK;
        let page = self.shared.get(page).map_or_else(|| &self.pages[page - self.shared.len()], |page| &**page);
        page.number * BLOCK as u32 + (position % BLOCK) as u32
    }

    /// Writes the key and the value of all heads at a position past the end. Room must be made before.
    pub(crate) fn write(&mut self, layer: usize, position: usize, keys: &[f32], values: &[f32]) {
        let (half, dim) = (self.shape.half(), self.shape.head_dim);
        let (page, lane) = (position / BLOCK - self.shared.len(), position % BLOCK);
        let start = layer * self.shape.heads * 2 * half;
        let blocks = self.pages[page].floats[start..].chunks_exact_mut(2 * half);
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

    /// Returns true where the next position begins a page and all before it are shared: where a shared page may follow.
    pub(crate) fn at_border(&self) -> bool {
        self.pages.is_empty() && self.len == self.shared.len() * BLOCK
    }

    /// Goes on with a full page that another prompt has read at these positions. It must be at a border.
    pub(crate) fn attach(&mut self, page: Arc<Page>) {
        debug_assert!(self.at_border());
        self.shared.push(page);
        self.len += BLOCK;
    }

    /// Takes out the first page of its own, once that is full; it is to be put back, or an equal one.
    pub(crate) fn detach_full(&mut self) -> Option<Page> {
        let full = (self.shared.len() + 1) * BLOCK <= self.len;
        full.then(|| self.pages.remove(0))
    }

    /// Puts a page in the place of the one that was detached.
    pub(crate) fn put_back(&mut self, page: Arc<Page>) {
        self.shared.push(page);
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

    /// Gives its own positions to others to share and keeps none. It must not have a prefix itself.
    pub(crate) fn take_prefix(&mut self) -> Arc<Segment> {
        debug_assert!(self.prefix.is_none());
        let empty = Segment::new(self.own.shape);
        Arc::new(std::mem::replace(&mut self.own, empty))
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
    pub(crate) fn reserve(&mut self, more: usize, pool: &Pool) {
        let pages = (self.own.len + more).div_ceil(BLOCK) - self.own.shared.len();
        while self.own.pages.len() < pages {
            self.own.pages.push(pool.take());
        }
    }

    /// Returns the cells on the device in which positions are, or will be, for which room was made.
    pub(crate) fn cells(&self, positions: std::ops::Range<usize>) -> impl Iterator<Item = u32> {
        let shared = self.prefix().map(|prefix| (prefix, prefix.len()));
        positions.map(move |position| match shared {
            Some((prefix, len)) if position < len => prefix.cell(position),
            Some((_, len)) => self.own.cell(position - len),
            None => self.own.cell(position),
        })
    }

    /// Counts positions that were written in every layer.
    pub(crate) fn advance(&mut self, more: usize) {
        self.own.len += more;
    }
}
