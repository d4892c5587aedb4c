//! Numbers cut into pieces and laid out as tiles take them: the left side's tile is 16 rows of 16 pairs of inputs, the right
//! side's 16 pairs of inputs of 16 columns.
//!
//! Both come of the same two ways to read 16 x 32 numbers, by which of the strides is 1, and are transposed where the tile lies
//! the other way.

use std::arch::x86_64::*;
use std::ops::Range;

use pulp::bytemuck;

use super::{BLOCK, DEPTH};
use crate::engine::ops::mat::Digits;

/// Rows of a tile, and words of a row.
const TILE: usize = 16;

/// One piece of [`DEPTH`] inputs of a block: two tiles of words of two numbers each.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(in crate::engine::ops) struct Piece([[[i32; TILE]; TILE]; BLOCK / TILE]);

impl Piece {
    pub(super) const ZERO: Self = Piece([[[0; TILE]; TILE]; BLOCK / TILE]);
}

/// One side of a product: rows of the left one or columns of the right one.
#[derive(Clone, Copy)]
pub(in crate::engine::ops) struct Side<'a> {
    pub(in crate::engine::ops) data: &'a [f32],
    /// Rows or columns.
    pub(in crate::engine::ops) count: usize,
    /// From one row or column to the next. This or the other stride is 1.
    pub(in crate::engine::ops) stride: usize,
    /// From one input to the next.
    pub(in crate::engine::ops) inputs_stride: usize,
}

/// What a row of a tile is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// A row of the left side.
    Rows,
    /// A pair of inputs.
    Columns,
}

/// The numbers of a tile: 16 rows or pairs of inputs, for each piece, the largest first.
type Registers = [[__m512i; TILE]; 3];

impl Side<'_> {
    /// Fills a panel, `[step of DEPTH inputs][piece, the largest first]`; what the side does not have is 0. The processor
    /// must have AVX-512.
    #[expect(unsafe_code, reason = "only so a function for newer processors is called")]
    pub(super) fn lay_out(
        &self,
        block: Range<usize>,
        inputs: Range<usize>,
        way: Way,
        digits: Digits,
        panel: &mut [Piece],
    ) {
        assert!(super::is_there(), "this processor has no AMX");
        // SAFETY: the instructions that `cut` is compiled for are there.
        unsafe { self.cut(block, inputs, way, digits, panel) }
    }

    #[target_feature(enable = "avx512f,avx512bw")]
    fn cut(&self, block: Range<usize>, inputs: Range<usize>, way: Way, digits: Digits, panel: &mut [Piece]) {
        for (pieces, from) in panel.chunks_exact_mut(digits.pieces()).zip(inputs.clone().step_by(DEPTH)) {
            let depth = DEPTH.min(inputs.end - from);
            for half in 0..BLOCK / TILE {
                let first = block.start + half * TILE;
                let count = block.end.saturating_sub(first).min(TILE);
                let (read, lies) = match self.inputs_stride {
                    1 => (self.along(first, count, from, depth), Way::Rows),
                    _ => (self.across(first, count, from, depth), Way::Columns),
                };
                for (piece, mut read) in pieces.iter_mut().zip(read) {
                    if lies != way {
                        read = transposed(read);
                    }
                    piece.0[half] = bytemuck::cast(read);
                }
            }
        }
    }

    /// Reads rows or columns whose inputs lie one after the other: `[piece][row or column]`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn along(&self, first: usize, count: usize, from: usize, depth: usize) -> Registers {
        let mut all = [[_mm512_setzero_si512(); TILE]; 3];
        for row in 0..count {
            let values = &self.data[(first + row) * self.stride + from..][..depth];
            let (low, high) = values.split_at(depth.min(TILE));
            let (low, high) = (pieces(load(low)), pieces(load(high)));
            for (all, (low, high)) in all.iter_mut().zip(low.into_iter().zip(high)) {
                all[row] = upper_halves(low, high);
            }
        }
        all
    }

    /// Reads rows or columns that lie one after the other: `[piece][pair of inputs]`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn across(&self, first: usize, count: usize, from: usize, depth: usize) -> Registers {
        let mut all = [[_mm512_setzero_si512(); TILE]; 3];
        for pair in 0..depth.div_ceil(2) {
            let line = |input: usize| match count {
                0 => _mm512_setzero_ps(),
                _ if input >= depth => _mm512_setzero_ps(),
                _ => load(&self.data[(from + input) * self.inputs_stride + first..][..count]),
            };
            let (even, odd) = (pieces(line(2 * pair)), pieces(line(2 * pair + 1)));
            for (all, (even, odd)) in all.iter_mut().zip(even.into_iter().zip(odd)) {
                all[pair] = _mm512_or_si512(_mm512_srli_epi32::<16>(even), odd);
            }
        }
        all
    }
}

/// Loads 16 numbers, or fewer and zeros.
#[inline]
#[target_feature(enable = "avx512f")]
fn load(values: &[f32]) -> __m512 {
    if let Some(values) = values.first_chunk::<TILE>() {
        return bytemuck::cast(*values);
    }
    let mut padded = [0.0; TILE];
    padded[..values.len()].copy_from_slice(values);
    bytemuck::cast(padded)
}

/// Cuts numbers in three, which add up to them exactly. The upper half of a word is the piece as bf16, the lower one is 0.
#[inline]
#[target_feature(enable = "avx512f")]
fn pieces(x: __m512) -> [__m512i; 3] {
    let upper = _mm512_set1_epi32(i32::MIN >> 15);
    let cut = |x: __m512| _mm512_and_si512(_mm512_castps_si512(x), upper);
    let high = cut(x);
    let rest = _mm512_sub_ps(x, _mm512_castsi512_ps(high));
    let middle = cut(rest);
    let low = cut(_mm512_sub_ps(rest, _mm512_castsi512_ps(middle)));
    [high, middle, low]
}

/// Returns the upper halves of the words of two registers.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn upper_halves(low: __m512i, high: __m512i) -> __m512i {
    const PLACES: [i16; 2 * TILE] = {
        let mut places = [0; 2 * TILE];
        let mut at = 0;
        while at < places.len() {
            places[at] = 2 * at as i16 + 1;
            at += 1;
        }
        places
    };
    _mm512_permutex2var_epi16(low, bytemuck::cast(PLACES), high)
}

/// Transposes 16 rows of 16 words: pairs of rows, pairs of pairs, then quarters of registers, twice.
#[inline]
#[target_feature(enable = "avx512f")]
fn transposed(rows: [__m512i; TILE]) -> [__m512i; TILE] {
    let (mut a, mut b) = (rows, rows);
    for i in (0..TILE).step_by(2) {
        a[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for i in (0..TILE).step_by(4) {
        for half in 0..2 {
            b[i + 2 * half] = _mm512_unpacklo_epi64(a[i + half], a[i + half + 2]);
            b[i + 2 * half + 1] = _mm512_unpackhi_epi64(a[i + half], a[i + half + 2]);
        }
    }
    for (i, j) in [(0, 0), (1, 1), (2, 2), (3, 3), (8, 8), (9, 9), (10, 10), (11, 11)] {
        a[i] = _mm512_shuffle_i32x4::<0x88>(b[j], b[j + 4]);
        a[i + 4] = _mm512_shuffle_i32x4::<0xdd>(b[j], b[j + 4]);
    }
    for i in 0..8 {
        b[i] = _mm512_shuffle_i32x4::<0x88>(a[i], a[i + 8]);
        b[i + 8] = _mm512_shuffle_i32x4::<0xdd>(a[i], a[i + 8]);
    }
    b
}
