//! Pages of prompts that were read, found again by the tokens in them and before them.
//!
//! Prompts of one application begin with the same system prompt. Its pages are read once, and later prompts go on from
//! where they end. A page that nobody reads is kept for prompts to come, within bounds; those that a second prompt has used
//! are kept longest, because a third is likely to.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::Arc;

use super::cache::{BLOCK, Page};

/// What stands before a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Before {
    /// Nothing: it is the first of a prompt read with this adapter (0: none), whose keys and values no other adapter shares.
    Adapter(u64),
    Page(u64),
}

/// A page's place and content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    before: Before,
    tokens: [u32; BLOCK],
}

struct Entry {
    id: u64,
    page: Arc<Page>,
    /// Pages before it.
    depth: usize,
    /// The newest prompt that it is part of. No page is part of a newer one than the page before it.
    used: u64,
    /// Whether a second prompt went on from it.
    shared: bool,
}

/// A place in a prompt that is being read: the end of its last full page.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    before: Before,
    depth: usize,
    /// Counts the prompts.
    prompt: u64,
}

impl Place {
    /// Returns the key of the page that begins here with these tokens; none where they do not fill it.
    pub(crate) fn key(&self, tokens: &[u32]) -> Option<Key> {
        Some(Key { before: self.before, tokens: *tokens.first_chunk()? })
    }

    /// Returns the tokens before it.
    pub(crate) fn tokens(&self) -> usize {
        self.depth * BLOCK
    }
}

/// The pages that can be found.
#[derive(Default)]
pub(crate) struct Prefixes {
    entries: HashMap<Key, Entry>,
    prompts: u64,
    ids: u64,
}

impl Prefixes {
    /// Begins a prompt that is read with an adapter (0: none).
    pub(crate) fn begin(&mut self, adapter: u64) -> Place {
        self.prompts += 1;
        Place { before: Before::Adapter(adapter), depth: 0, prompt: self.prompts }
    }

    /// Returns a page that another prompt has read, and moves the place past it.
    pub(crate) fn find(&mut self, key: &Key, place: &mut Place) -> Option<Arc<Page>> {
        let entry = self.entries.get_mut(key)?;
        entry.shared = true;
        Some(entry.pass(place))
    }

    /// Takes a page that was read now and moves the place past it; returns it, or the equal one that is there already.
    pub(crate) fn insert(&mut self, key: Key, page: Page, place: &mut Place) -> Arc<Page> {
        self.ids += 1;
        let (id, depth, page) = (self.ids, place.depth, Arc::new(page));
        let entry = self.entries.entry(key).or_insert(Entry { id, page, depth, used: 0, shared: false });
        entry.pass(place)
    }

    /// Returns the number of pages that nobody reads.
    pub(crate) fn idle(&self) -> usize {
        self.entries.values().filter(|entry| Arc::strong_count(&entry.page) == 1).count()
    }

    /// Gives back pages that nobody reads until at most `keep` of them are left; returns how many it gave back.
    pub(crate) fn trim(&mut self, keep: usize) -> usize {
        let surplus = self.idle().saturating_sub(keep);
        if surplus == 0 {
            return 0;
        }
        let idle = self.entries.iter().filter(|(_, entry)| Arc::strong_count(&entry.page) == 1);
        // No page goes before those after it, which could not be found without it.
        let order = |entry: &Entry| (entry.shared, entry.used, Reverse(entry.depth), entry.id);
        let mut idle: Vec<_> = idle.map(|(key, entry)| (order(entry), *key)).collect();
        idle.sort_unstable_by_key(|(order, _)| *order);
        idle.into_iter().take(surplus).for_each(|(_, key)| drop(self.entries.remove(&key)));
        surplus
    }
}

impl Entry {
    fn pass(&mut self, place: &mut Place) -> Arc<Page> {
        self.used = self.used.max(place.prompt);
        (place.before, place.depth) = (Before::Page(self.id), place.depth + 1);
        self.page.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::cache::{Pool, Shape};

    /// Walks a prompt of pages that each repeat one number, reading what is not there; returns how many it found.
    fn read(prefixes: &mut Prefixes, pool: &Pool, adapter: u64, pages: &[u32]) -> (usize, Vec<Arc<Page>>) {
        let (mut place, mut found) = (prefixes.begin(adapter), 0);
        let walk = |number: &u32| {
            let key = place.key(&[*number; BLOCK]).unwrap();
            match prefixes.find(&key, &mut place) {
                Some(page) => {
                    found += 1;
                    page
                }
                None => prefixes.insert(key, pool.take(), &mut place),
            }
        };
        let held = pages.iter().map(walk).collect();
        (found, held)
    }

    #[test]
    fn a_page_is_found_after_the_same_pages_and_under_the_same_adapter() {
        let (mut prefixes, pool) = (Prefixes::default(), Pool::new(Shape::of(1, 1, 4)));
        let (found, _held) = read(&mut prefixes, &pool, 0, &[1, 2, 3]);
        assert_eq!(found, 0);
        assert_eq!(read(&mut prefixes, &pool, 0, &[1, 2, 4]).0, 2);
        assert_eq!(read(&mut prefixes, &pool, 0, &[2, 3]).0, 0, "the same tokens at another place");
        assert_eq!(read(&mut prefixes, &pool, 7, &[1, 2, 3]).0, 0, "another adapter");
        assert!(prefixes.begin(0).key(&[1; BLOCK - 1]).is_none());
    }

    #[test]
    fn what_nobody_reads_goes_oldest_first_ends_before_beginnings_and_shared_pages_last() {
        let (mut prefixes, pool) = (Prefixes::default(), Pool::new(Shape::of(1, 1, 4)));
        drop(read(&mut prefixes, &pool, 0, &[1, 2]));
        drop(read(&mut prefixes, &pool, 0, &[1, 3]));
        drop(read(&mut prefixes, &pool, 0, &[8, 9]));
        let held = read(&mut prefixes, &pool, 0, &[5]).1;
        assert_eq!((pool.live(), prefixes.trim(3)), (6, 2));
        // 2 and 3 are gone, the oldest that no second prompt used; 1 was used by two, 8 and 9 are newer.
        assert_eq!(read(&mut prefixes, &pool, 0, &[1, 2]).0, 1);
        assert_eq!(read(&mut prefixes, &pool, 0, &[8, 9]).0, 2);
        assert_eq!(prefixes.trim(0), 4);
        assert_eq!(pool.live(), 1, "a page that is read stays");
        drop(held);
        assert_eq!(prefixes.trim(0), 1);
    }
}
