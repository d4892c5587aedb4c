//! One panel by AVX-512's instructions that sum four products of bytes, or two of 16 bits, into a lane.

use std::arch::x86_64::*;
use std::sync::LazyLock;

use pulp::bytemuck;

use super::{Line, Packing, Panel, TILE, WIDTH};

const _: () = assert!(WIDTH == 32);

/// Returns true if the processor has the instructions of [`run`].
pub(super) fn is_there() -> bool {
    static THERE: LazyLock<bool> = LazyLock::new(|| {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vnni")
    });
    *THERE
}

/// Writes one panel of the product of all rows. The processor must have the instructions.
#[expect(unsafe_code, reason = "only so a function for newer processors is called")]
pub(super) fn run<const BYTES: usize>(panel: Panel<BYTES>) {
    assert!(is_there(), "this processor has no AVX-512 VNNI");
    // SAFETY: the instructions that `tiles` is compiled for are there, which is all that it asks for.
    unsafe { tiles(panel) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn tiles<const BYTES: usize>(panel: Panel<BYTES>) {
    let Panel { lines, scales, rows, out } = panel;
    let mut rest = out;
    for (height, words, steps, starts) in rows.tiles() {
        let (out, tail) = rest.split_at_mut(height);
        rest = tail;
        match height {
            1 => tile::<BYTES, 1>(lines, scales, words, steps, starts, out),
            2 => tile::<BYTES, 2>(lines, scales, words, steps, starts, out),
            3 => tile::<BYTES, 3>(lines, scales, words, steps, starts, out),
            4 => tile::<BYTES, 4>(lines, scales, words, steps, starts, out),
            5 => tile::<BYTES, 5>(lines, scales, words, steps, starts, out),
            _ => tile::<BYTES, TILE>(lines, scales, words, steps, starts, out),
        }
    }
}

/// Writes the rows of one tile; their sums stay in registers.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn tile<const BYTES: usize, const N: usize>(
    lines: &[Line],
    scales: &[[f32; WIDTH]],
    words: &[i32],
    steps: &[f32],
    starts: &[i32],
    out: &mut [[f32; WIDTH]],
) {
    let width = Packing::<BYTES>::WORDS;
    let (words, steps, starts) = (words.as_chunks::<N>().0, steps.as_chunks::<N>().0, starts.as_chunks::<N>().0);
    let groups = lines.chunks_exact(width).zip(words.chunks_exact(width));
    let mut totals = [[_mm512_setzero_ps(); 2]; N];
    for ((lines, words), ((scales, steps), starts)) in groups.zip(scales.iter().zip(steps).zip(starts)) {
        let mut sums = [[_mm512_setzero_si512(); 2]; N];
        for (sums, start) in sums.iter_mut().zip(starts) {
            *sums = [_mm512_set1_epi32(*start); 2];
        }
        for (line, words) in lines.iter().zip(words) {
            let weights: [__m512i; 2] = bytemuck::cast(line.0);
            for (sums, word) in sums.iter_mut().zip(words) {
                let values = _mm512_set1_epi32(*word);
                for (sum, weights) in sums.iter_mut().zip(weights) {
                    *sum = match BYTES {
                        1 => _mm512_dpbusd_epi32(*sum, weights, values),
                        _ => _mm512_dpwssd_epi32(*sum, weights, values),
                    };
                }
            }
        }
        let scales: [__m512; 2] = bytemuck::cast(*scales);
        for ((totals, sums), step) in totals.iter_mut().zip(sums).zip(steps) {
            let step = _mm512_set1_ps(*step);
            for ((total, sum), scale) in totals.iter_mut().zip(sums).zip(scales) {
                *total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(scale, step), *total);
            }
        }
    }
    for (out, totals) in out.iter_mut().zip(totals) {
        *out = bytemuck::cast(totals);
    }
}
