//! One panel by AMX, whose instructions multiply tiles of 16 rows of 64 signed bytes.
//!
//! A tile of activations is some rows of one group, and one of weights the group's inputs of 16 outputs, four to a word, so
//! that one instruction is one group's sums of 16 x 16 products. They leave through memory, because groups are scaled
//! apart, and are added up in the registers of AVX-512. An integer of 16 bits is two digits, `128 a + b`, and its products
//! are four instructions into three tiles: exact, as the sums of the other loops are.
//!
//! The instructions have no stable intrinsics, which is why they stand here as assembly.

use std::arch::asm;
use std::arch::x86_64::*;

use pulp::bytemuck;

use super::{COLUMNS, Line, Packing, Panel, TILE_WORDS, WIDTH};
use crate::engine::amx::{self, Numbers, Shapes};

/// Rows of a tile, at most.
pub(super) const ROWS: usize = 16;
/// Groups whose weights are asked for before they are read: tiles are loaded too seldom for the processor to see it coming.
const AHEAD: usize = 6;

const _: () = assert!(COLUMNS == 16 && TILE_WORDS == 16);

/// Returns true if the processor has the instructions of [`run`] and the kernel lets this process use them.
pub(super) fn is_there() -> bool {
    super::vnni::is_there() && amx::has(Numbers::Bytes)
}

/// Writes one panel of the product of all rows. The processor must have the instructions.
#[expect(unsafe_code, reason = "only so a function for newer processors is called")]
pub(super) fn run<const BYTES: usize>(panel: Panel<BYTES>) {
    assert!(is_there(), "this processor has no AMX");
    // SAFETY: the instructions that `tiles` is compiled for, and those that it holds, are there.
    unsafe { tiles(panel) }
}

/// Sums in tiles 0 to 2 and activations in 3 and 4 have so many rows, weights in 5 and 6 all.
fn shapes(height: usize) -> Shapes {
    Shapes::new(&[height, height, height, height, height, 16, 16])
}

/// The sums of one group: `[power of 128][row][output]`.
#[repr(C, align(64))]
struct Sums([[[i32; COLUMNS]; ROWS]; 3]);

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn tiles<const BYTES: usize>(panel: Panel<BYTES>) {
    let Panel { lines, scales, rows, out } = panel;
    let mut set_up = 0;
    let sums = &mut [Sums([[[0; COLUMNS]; ROWS]; 3]), Sums([[[0; COLUMNS]; ROWS]; 3])];
    let (first, second) = lines.split_at(lines.len() / 2);
    for (half, lines) in [first, second].into_iter().enumerate() {
        let mut rest = &mut *out;
        for (at, (height, words, steps, _)) in rows.tiles().enumerate() {
            let (out, tail) = rest.split_at_mut(height);
            rest = tail;
            if set_up != height {
                shapes(height).set_up();
                set_up = height;
            }
            let work = Work { half, lines, scales, words, steps, is_first: at == 0 };
            match height {
                1 => tile::<BYTES, 1>(work, sums, out),
                2 => tile::<BYTES, 2>(work, sums, out),
                3 => tile::<BYTES, 3>(work, sums, out),
                4 => tile::<BYTES, 4>(work, sums, out),
                5 => tile::<BYTES, 5>(work, sums, out),
                6 => tile::<BYTES, 6>(work, sums, out),
                7 => tile::<BYTES, 7>(work, sums, out),
                8 => tile::<BYTES, 8>(work, sums, out),
                9 => tile::<BYTES, 9>(work, sums, out),
                10 => tile::<BYTES, 10>(work, sums, out),
                11 => tile::<BYTES, 11>(work, sums, out),
                12 => tile::<BYTES, 12>(work, sums, out),
                13 => tile::<BYTES, 13>(work, sums, out),
                14 => tile::<BYTES, 14>(work, sums, out),
                15 => tile::<BYTES, 15>(work, sums, out),
                _ => tile::<BYTES, ROWS>(work, sums, out),
            }
        }
    }
    amx::release();
}

/// Half of a panel and one tile of activations.
struct Work<'a> {
    half: usize,
    lines: &'a [Line],
    scales: &'a [[f32; WIDTH]],
    words: &'a [i32],
    steps: &'a [f32],
    /// Whether the weights were not read before.
    is_first: bool,
}

/// Writes 16 outputs of the rows of one tile. A group's sums are read while the next one's are made: to read what a tile has just
/// written is to wait for it.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn tile<const BYTES: usize, const N: usize>(work: Work, sums: &mut [Sums; 2], out: &mut [[f32; WIDTH]]) {
    let Work { half, lines, scales, words, steps, is_first } = work;
    let (width, group) = (Packing::<BYTES>::WORDS, Packing::<BYTES>::WORDS / 2);
    let mut totals = [_mm512_setzero_ps(); N];
    let [now, then] = &mut *sums;
    let (mut now, mut then) = (now, then);
    let mut before = None;
    let groups = lines.chunks_exact(group).zip(words.chunks_exact(width * N));
    for (at, ((own, words), scaling)) in groups.zip(scales.iter().zip(steps.as_chunks::<N>().0)).enumerate() {
        if is_first && let Some(next) = lines.get((at + AHEAD) * group..).and_then(|rest| rest.get(..group)) {
            ask_for(next);
        }
        match BYTES {
            1 => multiply_bytes(words, own, now),
            _ => multiply_digits(words, own, now),
        }
        if let Some((scales, steps)) = before.replace(scaling) {
            add::<BYTES, N>(then, half, scales, steps, &mut totals);
        }
        std::mem::swap(&mut now, &mut then);
    }
    if let Some((scales, steps)) = before {
        add::<BYTES, N>(then, half, scales, steps, &mut totals);
    }
    for (out, total) in out.iter_mut().zip(totals) {
        let total: [f32; COLUMNS] = bytemuck::cast(total);
        out[half * COLUMNS..][..COLUMNS].copy_from_slice(&total);
    }
}

/// Asks the memory for weights.
#[inline(always)]
#[expect(unsafe_code, reason = "the instruction takes a raw pointer")]
fn ask_for(lines: &[Line]) {
    for line in lines.iter().flat_map(|line| line.0.as_chunks::<COLUMNS>().0) {
        // SAFETY: it reads nothing into the program, and the pointer is that of a reference.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
    }
}

/// Adds the sums of one group, scaled.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn add<const BYTES: usize, const N: usize>(
    sums: &Sums,
    half: usize,
    scales: &[f32; WIDTH],
    steps: &[f32; N],
    totals: &mut [__m512; N],
) {
    let scales: [__m512; 2] = bytemuck::cast(*scales);
    for row in 0..N {
        let [low, middle, high] = [0, 1, 2].map(|power| -> __m512i { bytemuck::cast(sums.0[power][row]) });
        let sum = match BYTES {
            1 => low,
            _ => {
                let upper = _mm512_add_epi32(_mm512_slli_epi32::<7>(high), middle);
                _mm512_add_epi32(_mm512_slli_epi32::<7>(upper), low)
            }
        };
        let scale = _mm512_mul_ps(scales[half], _mm512_set1_ps(steps[row]));
        totals[row] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, totals[row]);
    }
}

/// Bytes from one row of a tile to the next.
const ROW: usize = size_of::<[i32; TILE_WORDS]>();

/// Writes the sums of one group of bytes: `[row][16 words]` times `[16 words][16 outputs]`.
#[inline(always)]
#[expect(unsafe_code, reason = "instructions without intrinsics")]
fn multiply_bytes(words: &[i32], lines: &[Line], sums: &mut Sums) {
    assert!(lines.len() == 8 && words.len() <= ROWS * TILE_WORDS);
    // SAFETY: the tiles read `height` rows of 16 words, which are all of `words`, and 16 rows of weights, which are all of
    // `lines`; they write as many rows of sums as they read, of the 16 that there are.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tileloadd tmm3, [{values} + {row}*1]",
            "tileloadd tmm5, [{weights} + {row}*1]",
            "tdpbssd tmm0, tmm3, tmm5",
            "tilestored [{low} + {row}*1], tmm0",
            values = in(reg) words.as_ptr(),
            weights = in(reg) lines.as_ptr(),
            low = in(reg) sums.0[0].as_mut_ptr(),
            row = in(reg) ROW,
            out("tmm0") _, out("tmm3") _, out("tmm5") _,
            options(nostack, preserves_flags),
        );
    }
}

/// Does the same for integers of two digits, by powers of 128: first come the upper digits of all rows, then the lower ones,
/// and of the weights likewise.
#[inline(always)]
#[expect(unsafe_code, reason = "instructions without intrinsics")]
fn multiply_digits(words: &[i32], lines: &[Line], sums: &mut Sums) {
    assert!(lines.len() == 16 && words.len() <= 2 * ROWS * TILE_WORDS);
    let [low, middle, high] = &mut sums.0;
    // SAFETY: as above, for two tiles of each: `words` holds as many rows of upper as of lower digits.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tileloadd tmm3, [{upper} + {row}*1]",
            "tileloadd tmm5, [{upper_weights} + {row}*1]",
            "tdpbssd tmm2, tmm3, tmm5",
            "tileloadd tmm4, [{lower} + {row}*1]",
            "tdpbssd tmm1, tmm4, tmm5",
            "tileloadd tmm6, [{lower_weights} + {row}*1]",
            "tilestored [{high} + {row}*1], tmm2",
            "tdpbssd tmm0, tmm4, tmm6",
            "tdpbssd tmm1, tmm3, tmm6",
            "tilestored [{low} + {row}*1], tmm0",
            "tilestored [{middle} + {row}*1], tmm1",
            upper = in(reg) words.as_ptr(),
            lower = in(reg) words.as_ptr().add(words.len() / 2),
            upper_weights = in(reg) lines.as_ptr(),
            lower_weights = in(reg) lines.as_ptr().add(8),
            low = in(reg) low.as_mut_ptr(),
            middle = in(reg) middle.as_mut_ptr(),
            high = in(reg) high.as_mut_ptr(),
            row = in(reg) ROW,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _, out("tmm6") _,
            options(nostack, preserves_flags),
        );
    }
}
