//! Near duplicates: MinHash with banded locality-sensitive hashing, every hit verified by the exact similarity.
//!
//! So there are no false pairs; the share of true ones found depends on bands and rows ([`super::Settings`]) and is
//! tested against brute force. The hash functions are constants: the relation between two texts never changes.

use std::collections::HashMap;

use crate::record::derive_seed;

use super::Settings;

/// Characters in one shingle.
const SHINGLE: usize = 5;

/// Most entries of one bucket that are looked at. A bucket fills only with texts that are alike without being near
/// duplicates; without a limit such a log would cost quadratic time.
const MAX_BUCKET: usize = 2000;

/// The set of a text's character 5-grams, hashed, sorted. A shorter text is one shingle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Shingles(Vec<u32>);

impl Shingles {
    pub(super) fn of(text: &str) -> Self {
        let starts: Vec<usize> = text.char_indices().map(|(at, _)| at).chain([text.len()]).collect();
        let mut set: Vec<u32> = starts.windows(SHINGLE + 1).map(|w| fnv(&text[w[0]..w[SHINGLE]])).collect();
        if set.is_empty() {
            set.push(fnv(text));
        }
        set.sort_unstable();
        set.dedup();
        Shingles(set)
    }

    /// Returns the size of the intersection over that of the union.
    pub(super) fn jaccard(&self, other: &Shingles) -> f64 {
        let (mut i, mut j, mut both) = (0, 0, 0usize);
        while i < self.0.len() && j < other.0.len() {
            match self.0[i].cmp(&other.0[j]) {
                std::cmp::Ordering::Less => i += 1,
                std::cmp::Ordering::Greater => j += 1,
                std::cmp::Ordering::Equal => {
                    both += 1;
                    i += 1;
                    j += 1;
                }
            }
        }
        both as f64 / (self.0.len() + other.0.len() - both) as f64
    }
}

/// FNV-1a, folded to 32 bits.
fn fnv(text: &str) -> u32 {
    let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    (hash ^ (hash >> 32)) as u32
}

/// Texts seen so far, searchable by similarity.
pub(super) struct NearIndex {
    threshold: f64,
    rows: usize,
    /// Multipliers and offsets of the hash functions (multiply-shift).
    functions: Vec<(u64, u64)>,
    buckets: Vec<HashMap<u64, Vec<usize>>>,
    texts: Vec<(u64, Shingles)>,
    exact: HashMap<(u64, u64), usize>,
}

impl NearIndex {
    pub(super) fn new(settings: &Settings) -> Self {
        let (bands, rows) = (settings.minhash_bands, settings.minhash_rows);
        let draw = |what: &str, i: usize| derive_seed(0, &["minhash", what, &i.to_string()]);
        NearIndex {
            threshold: settings.near_duplicate,
            rows,
            functions: (0..bands * rows).map(|i| (draw("multiplier", i) | 1, draw("offset", i))).collect(),
            buckets: vec![HashMap::new(); bands],
            texts: Vec::new(),
            exact: HashMap::new(),
        }
    }

    /// Adds a text of a context; returns its number and those of the earlier texts near it, in order. The same text is
    /// added once: its number comes back, among those near it.
    pub(super) fn add(&mut self, context: u64, text: &str) -> (usize, Vec<usize>) {
        let shingles = Shingles::of(text);
        let keys = self.keys(context, &shingles);
        let mut near = self.find(context, &shingles, &keys);
        let exact = (context, super::text::hash(text));
        if let Some(&known) = self.exact.get(&exact) {
            if !near.contains(&known) {
                near.push(known);
                near.sort_unstable();
            }
            return (known, near);
        }
        let number = self.texts.len();
        self.exact.insert(exact, number);
        self.texts.push((context, shingles));
        for (bucket, key) in self.buckets.iter_mut().zip(keys) {
            bucket.entry(key).or_default().push(number);
        }
        (number, near)
    }

    fn find(&self, context: u64, shingles: &Shingles, keys: &[u64]) -> Vec<usize> {
        let hits = self.buckets.iter().zip(keys).filter_map(|(bucket, key)| bucket.get(key));
        let mut found: Vec<usize> = hits.flat_map(|bucket| bucket.iter().take(MAX_BUCKET).copied()).collect();
        found.sort_unstable();
        found.dedup();
        found.retain(|&i| self.texts[i].0 == context && self.texts[i].1.jaccard(shingles) >= self.threshold);
        found
    }

    /// Returns the key of each band: a hash of its least values and of the context.
    fn keys(&self, context: u64, shingles: &Shingles) -> Vec<u64> {
        let least = |&(a, b): &(u64, u64)| {
            shingles.0.iter().map(|&x| a.wrapping_mul(u64::from(x)).wrapping_add(b) >> 32).min().unwrap_or(0)
        };
        let mix = |h: u64, v: u64| (h ^ v).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(29);
        self.functions.chunks(self.rows).map(|band| band.iter().map(least).fold(mix(1, context), mix)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORDS: [&str; 24] = [
        "river", "paint", "seven", "quiet", "market", "orbit", "lemon", "glass", "winter", "copper", "garden",
        "signal", "thread", "basil", "engine", "paper", "silver", "tunnel", "ocean", "violin", "meadow", "stone",
        "candle", "rocket",
    ];

    /// Families of texts in which some words are replaced.
    fn texts(n: usize) -> Vec<String> {
        let pick = |i: usize, j: usize, what: &str| {
            let seed = derive_seed(3, &[what, &i.to_string(), &j.to_string()]);
            (seed % 1_000_003) as usize
        };
        let text = |i: usize| {
            let family = i / 4;
            let word = |j: usize| {
                let changed = !i.is_multiple_of(4) && pick(i, j, "change") % 100 < 6 * (i % 4);
                WORDS[if changed { pick(i, j, "new") } else { pick(family, j, "word") } % WORDS.len()]
            };
            (0..12 + pick(family, 0, "length") % 30).map(word).collect::<Vec<_>>().join(" ")
        };
        (0..n).map(text).collect()
    }

    #[test]
    fn the_search_finds_what_brute_force_finds() {
        let mut texts = texts(1200);
        texts.sort_unstable();
        texts.dedup();
        let sets: Vec<Shingles> = texts.iter().map(|text| Shingles::of(text)).collect();
        let settings = Settings::default();
        let mut index = NearIndex::new(&settings);
        let (mut truth, mut found) = (0, 0);
        for (i, text) in texts.iter().enumerate() {
            let (number, near) = index.add(0, text);
            assert_eq!(number, i, "the texts differ");
            let expected: Vec<usize> =
                (0..i).filter(|&j| sets[i].jaccard(&sets[j]) >= settings.near_duplicate).collect();
            assert!(near.iter().all(|j| expected.contains(j)), "a false pair");
            truth += expected.len();
            found += near.len();
        }
        assert!(truth > 300, "too few pairs to test with: {truth}");
        assert!(found as f64 >= 0.99 * truth as f64, "recall {found}/{truth}");
    }

    #[test]
    fn contexts_keep_texts_apart_and_equal_texts_are_one() {
        let mut index = NearIndex::new(&Settings::default());
        assert_eq!(index.add(1, "go on"), (0, vec![]));
        assert_eq!(index.add(2, "go on"), (1, vec![]));
        assert_eq!(index.add(1, "go on"), (0, vec![0]));
    }

    #[test]
    fn similarity_counts_shingles() {
        assert_eq!(Shingles::of("abcdef").jaccard(&Shingles::of("abcdefg")), 2.0 / 3.0);
        assert_eq!(Shingles::of("").jaccard(&Shingles::of("")), 1.0);
        assert_eq!(Shingles::of("äöüßéx").0.len(), 2);
    }
}
