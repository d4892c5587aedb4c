//! Near duplicates: MinHash sketches, compared by banded locality-sensitive hashing and then whole.
//!
//! A sketch is 256 bytes, whatever the text: one byte of the least value of each of 256 hash functions over the text's
//! character 5-grams. The share of equal bytes estimates the Jaccard similarity of two texts with a standard error of at
//! most 0.032 (0.025 at 0.8), so a pair of similarity 0.8 or more is taken for less than 0.7 in one of 25,000 cases. Bands
//! are slices of the sketch, so that everything a search needs can be rebuilt from the sketches alone. The hash functions
//! are constants: the relation between two texts never changes (Broder 1997; bytes instead of whole values: Li and
//! König 2010).

use std::sync::LazyLock;

use crate::record::derive_seed;

use super::Settings;

/// Characters in one shingle.
const SHINGLE: usize = 5;

/// Hash functions, and bytes of a sketch.
pub(super) const WIDTH: usize = 256;

/// Multipliers and offsets of the hash functions (multiply-shift).
static FUNCTIONS: LazyLock<([u32; WIDTH], [u32; WIDTH])> = LazyLock::new(|| {
    let draw = |what: &str, i: usize| derive_seed(0, &["minhash", what, &i.to_string()]) as u32;
    (std::array::from_fn(|i| draw("multiplier", i) | 1), std::array::from_fn(|i| draw("offset", i)))
});

/// What is kept of a text to compare it by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sketch(pub(super) [u8; WIDTH]);

impl Sketch {
    /// Returns the sketch of a text. One shorter than a shingle is one shingle.
    pub(super) fn of(text: &str) -> Self {
        let mut least = [u32::MAX; WIDTH];
        let (multipliers, offsets) = &*FUNCTIONS;
        for shingle in shingles(text) {
            for ((least, a), b) in least.iter_mut().zip(multipliers).zip(offsets) {
                let value = ((u64::from(*a) * u64::from(shingle) + (u64::from(*b) << 16)) >> 16) as u32;
                *least = (*least).min(value);
            }
        }
        // The low bits of a least value say which shingle it was; mixed, since multiply-shift leaves them uneven.
        Sketch(least.map(|value| (value.wrapping_mul(0x9E37_79B1) >> 24) as u8))
    }

    /// Returns the Jaccard similarity of two texts as their sketches estimate it, at most 1; below 0 by chance.
    pub(super) fn similarity(&self, other: &Sketch) -> f64 {
        let equal = self.0.iter().zip(&other.0).filter(|(a, b)| a == b).count();
        // Two values that differ share a byte in one of 256 cases.
        let chance = 1.0 / 256.0;
        (equal as f64 / WIDTH as f64 - chance) / (1.0 - chance)
    }

    /// Yields the key of each band: a hash of its bytes, its number and the context.
    pub(super) fn keys(&self, context: u64, settings: &Settings) -> impl Iterator<Item = u64> {
        let bands = self.0.chunks_exact(settings.minhash_rows).take(settings.minhash_bands).enumerate();
        bands.map(move |(number, band)| band.iter().fold(mix(context, number as u64 + 1), |h, b| mix(h, u64::from(*b))))
    }
}

/// Returns one step of a hash of numbers (the finaliser of SplitMix64 over the sum).
pub(super) fn mix(hash: u64, value: u64) -> u64 {
    let mut x = hash.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(value).wrapping_add(0x9E37_79B9_7F4A_7C15);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// Returns the distinct hashed character 5-grams of a text, sorted.
pub(super) fn shingles(text: &str) -> Vec<u32> {
    let starts: Vec<usize> = text.char_indices().map(|(at, _)| at).chain([text.len()]).collect();
    let mut set: Vec<u32> = starts.windows(SHINGLE + 1).map(|w| fnv(&text[w[0]..w[SHINGLE]])).collect();
    if set.is_empty() {
        set.push(fnv(text));
    }
    set.sort_unstable();
    set.dedup();
    set
}

/// FNV-1a, folded to 32 bits.
fn fnv(text: &str) -> u32 {
    let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    (hash ^ (hash >> 32)) as u32
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// The similarity that sketches estimate, from the whole sets.
    pub(in crate::dataset) fn jaccard(a: &[u32], b: &[u32]) -> f64 {
        let both = a.iter().filter(|x| b.binary_search(x).is_ok()).count();
        both as f64 / (a.len() + b.len() - both) as f64
    }

    #[test]
    fn the_estimate_is_as_good_as_it_says() {
        let word = |i: u64| format!("{:07x}", derive_seed(5, &[&i.to_string()]) >> 36);
        let text = |from: u64| (from..from + 60).map(word).collect::<Vec<_>>().join(" ");
        let first = (shingles(&text(0)), Sketch::of(&text(0)));
        for shift in (0..60).step_by(3) {
            let other = (shingles(&text(shift)), Sketch::of(&text(shift)));
            let (truth, estimate) = (jaccard(&first.0, &other.0), first.1.similarity(&other.1));
            assert!((truth - estimate).abs() < 4.0 * 0.032, "{shift}: {truth} against {estimate}");
        }
        let errors: Vec<f64> = (1000..1400)
            .map(|i| {
                let (a, b) = (text(i * 100), text(i * 100 + 7));
                Sketch::of(&a).similarity(&Sketch::of(&b)) - jaccard(&shingles(&a), &shingles(&b))
            })
            .collect();
        let mean = errors.iter().sum::<f64>() / 400.0;
        let deviation = (errors.iter().map(|e| (e - mean).powi(2)).sum::<f64>() / 400.0).sqrt();
        assert!(mean.abs() < 4.0 * 0.032 / 20.0, "no bias: {mean}");
        assert!(deviation < 0.035, "{deviation}");
    }

    #[test]
    fn shingles_are_characters_and_distinct() {
        assert_eq!(jaccard(&shingles("abcdef"), &shingles("abcdefg")), 2.0 / 3.0);
        assert_eq!(Sketch::of("").similarity(&Sketch::of("")), 1.0);
        assert_eq!(shingles("äöüßéx").len(), 2);
        assert!(Sketch::of("one thing").similarity(&Sketch::of("quite another")) < 0.1);
    }

    #[test]
    fn bands_are_slices_and_contexts_keep_texts_apart() {
        let settings = Settings::default();
        let keys = |context| Sketch::of("go on").keys(context, &settings).collect::<Vec<_>>();
        assert_eq!(keys(1).len(), settings.minhash_bands);
        assert_eq!(keys(1), keys(1));
        assert!(keys(1).iter().all(|key| !keys(2).contains(key)));
    }
}
