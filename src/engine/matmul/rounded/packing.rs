//! How floats become integers of 8 or 16 bits, and how these stand in words.

/// Inputs that share a scale.
pub(super) const GROUP: usize = 64;

/// Added to a small float it leaves the nearest integer, of two as near the even one, in the lowest bits.
const MAGIC: f32 = 12_582_912.0;

/// How the integers of a group stand in words of 32 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// One after the other. Weights of 8 bits stand 128 higher than they are.
    Whole,
    /// As signed bytes: those of 16 bits as how often 128 goes into each, and then what is left of each.
    Bytes,
}

/// How floats become integers of so many bytes.
pub(super) struct Packing<const BYTES: usize>;

impl<const BYTES: usize> Packing<BYTES> {
    /// Integers of a word.
    const PARTS: usize = 4 / BYTES;
    /// Words of a group.
    pub(super) const WORDS: usize = GROUP / Self::PARTS;
    /// What the largest value of a group becomes. For 16 bits the most of which 64 products fit 31 bits.
    pub(super) const MOST: f32 = if BYTES == 1 { 127.0 } else { 5792.0 };
    /// How much higher weights are stored than they are, where they stand whole.
    pub(super) const RAISED: i32 = if BYTES == 1 { 128 } else { 0 };

    /// Rounds a group of values; returns the step, and the sum of the integers. Those of weights are raised where they
    /// stand whole.
    #[inline(always)]
    pub(super) fn round(values: &[f32], layout: Layout, are_weights: bool, words: &mut [i32]) -> (f32, i32) {
        let mut whole = [0.0; GROUP];
        whole[..values.len()].copy_from_slice(values);
        let (step, inverse) = Self::steps(&whole);
        let integers =
            whole.map(|value| ((value * inverse + MAGIC).to_bits() as i32).wrapping_sub(MAGIC.to_bits() as i32));
        match layout {
            Layout::Whole => pack::<BYTES>(&integers, if are_weights { Self::RAISED } else { 0 }, words),
            Layout::Bytes if BYTES == 1 => pack::<1>(&integers, 0, words),
            Layout::Bytes => {
                let (upper, lower) = words.split_at_mut(GROUP / 4);
                // The nearest multiple of 128, so that what is left lies in [-64, 64).
                let times = integers.map(|value| value.wrapping_add(64) >> 7);
                pack::<1>(&times, 0, upper);
                let mut left = integers;
                left.iter_mut().zip(times).for_each(|(value, times)| *value = value.wrapping_sub(times << 7));
                pack::<1>(&left, 0, lower);
            }
        }
        (step, integers.iter().fold(0, |sum: i32, value| sum.wrapping_add(*value)))
    }

    /// Returns the step that takes the largest value to [`Self::MOST`], and its inverse. What is no number makes the step
    /// none, so that it is seen in the product.
    #[inline(always)]
    fn steps(values: &[f32; GROUP]) -> (f32, f32) {
        let (mut largest, mut faults) = (0.0f32, 0.0f32);
        for value in values {
            largest = if value.abs() > largest { value.abs() } else { largest };
            faults += value * 0.0;
        }
        let step = largest / Self::MOST + faults;
        (step, if step > 0.0 { Self::MOST / largest } else { 0.0 })
    }

    /// Returns the sum of the products of the parts of a word of weights and one of activations.
    #[inline(always)]
    pub(super) fn multiply(weights: i32, values: i32) -> i32 {
        let signed = |word: i32, i: usize| (word << (32 - 8 * BYTES * (i + 1))) >> (32 - 8 * BYTES);
        let weight = |i: usize| if BYTES == 1 { weights >> (8 * i) & 0xff } else { signed(weights, i) };
        (0..Self::PARTS).map(|i| weight(i) * signed(values, i)).sum()
    }
}

/// Writes integers of so many bytes into words, each `raised`.
#[inline(always)]
fn pack<const BYTES: usize>(integers: &[i32; GROUP], raised: i32, words: &mut [i32]) {
    if BYTES == 1 {
        let bytes = integers.map(|value| value.wrapping_add(raised) as u8);
        words.iter_mut().zip(bytes.as_chunks().0).for_each(|(word, bytes)| *word = i32::from_le_bytes(*bytes));
    } else {
        let halves = integers.map(|value| value.wrapping_add(raised) as u16);
        let both = |[low, high]: [u16; 2]| (u32::from(high) << 16 | u32::from(low)) as i32;
        words.iter_mut().zip(halves.as_chunks().0).for_each(|(word, halves)| *word = both(*halves));
    }
}
