//! Products of f32 matrices by AMX, whose instructions multiply tiles of numbers of 16 bits (bf16) and sum in f32.
//!
//! An f32 has a mantissa of 24 bits and a bf16 one of 8, so three pieces hold it exactly. Of the nine products of two numbers'
//! pieces six are made; the others lie 2^-21 below the whole at most, and a sum in f32 is as far off after a few terms. Six
//! cost less than half of one product by AVX-512. Henry, Tang and Heinecke, "Leveraging the bfloat16 Artificial
//! Intelligence Datatype For Higher-Precision Computations" (2019), has the method and its error. With two pieces and three
//! products numbers are cut to 16 bits, each by itself and not in groups as `Rounded` does.
//!
//! The right side is cut up and laid out once, by all threads; then each thread takes rows of the left side. Every output is
//! one sum over the inputs in order, whatever is beside it.

mod kernel;
mod layout;
#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::ops::Range;
use std::thread::LocalKey;

use rayon::prelude::*;

use self::kernel::Sums;
pub(super) use self::layout::Side;
use self::layout::{Piece, Way};
use super::mat::Digits;
use super::{Work, wide};
use crate::engine::amx::{self, Numbers};

/// Rows and columns of a block of outputs: two tiles each way.
const BLOCK: usize = 32;
/// Inputs that one instruction takes.
const DEPTH: usize = 32;
/// Inputs that are summed up before outputs are written, at most: few enough for a thread to hold so many rows that the right
/// side is seldom read.
const INPUTS: usize = 640;
/// Bytes of the right side that are laid out at once.
const RIGHT: usize = 8 << 20;
/// Bytes of rows that one thread lays out at once: half of a usual second cache.
const LEFT: usize = 1 << 20;

/// Returns true if the processor has the instructions and the kernel lets this process use them.
pub(super) fn is_there() -> bool {
    is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") && amx::has(Numbers::Bf16)
}

/// Where a product goes: rows that lie `stride` apart, of which the first starts `data`.
pub(super) struct Target<'a> {
    pub(super) data: &'a mut [f32],
    pub(super) stride: usize,
    /// Whether the product is added to what is there.
    pub(super) adds: bool,
    pub(super) factor: f32,
}

/// Computes `target (+)= factor * left * right`, two sides of so many inputs. The processor must have the instructions.
pub(super) fn multiply(target: Target, left: Side, right: Side, inputs: usize, digits: Digits) {
    assert!(is_there(), "this processor has no AMX");
    let Some(before) = left.count.checked_sub(1) else { return };
    let end = before * target.stride + right.count;
    let mut target = Target { data: &mut target.data[..end], ..target };
    let chunk = inputs.div_ceil(inputs.div_ceil(INPUTS).max(1)).next_multiple_of(DEPTH);
    for first in (0..inputs).step_by(chunk.max(1)) {
        let inputs = first..inputs.min(first + chunk);
        let panel = panel(&inputs, digits);
        let most = BLOCK * (RIGHT / (panel * size_of::<Piece>())).max(1);
        for column in (0..right.count).step_by(most) {
            let columns = column..right.count.min(column + most);
            with_room(&ROOM_RIGHT, columns.len().div_ceil(BLOCK) * panel, |room| {
                room.par_chunks_exact_mut(panel).enumerate().for_each(|(at, panel)| {
                    right.lay_out(block(at, &columns), inputs.clone(), Way::Columns, digits, panel);
                });
                target.take(left, columns, inputs.clone(), room, digits);
            });
        }
        target.adds = true;
    }
}

/// Returns the pieces of one block of rows or columns.
fn panel(inputs: &Range<usize>, digits: Digits) -> usize {
    inputs.len().div_ceil(DEPTH) * digits.pieces()
}

/// Returns one block of a range.
fn block(at: usize, of: &Range<usize>) -> Range<usize> {
    let first = (of.start + at * BLOCK).min(of.end);
    first..of.end.min(first + BLOCK)
}

impl Target<'_> {
    /// Takes the products of all rows with some columns, which are laid out.
    fn take(&mut self, left: Side, columns: Range<usize>, inputs: Range<usize>, right: &[Piece], digits: Digits) {
        let panel = panel(&inputs, digits);
        let panels = left.count.div_ceil(BLOCK);
        let most = (LEFT / (panel * size_of::<Piece>())).max(1);
        let tasks = panels.div_ceil(most).next_multiple_of(rayon::current_num_threads());
        let rows = panels.div_ceil(tasks).max(1) * BLOCK;
        let (stride, adds, factor) = (self.stride, self.adds, self.factor);
        self.data.par_chunks_mut(rows * stride).enumerate().for_each(|(at, out)| {
            let own = (at * rows).min(left.count)..left.count.min((at + 1) * rows);
            let panels = own.len().div_ceil(BLOCK);
            with_room(&ROOM_LEFT, panels * panel, |room| {
                for (at, panel) in room.chunks_exact_mut(panel).enumerate() {
                    left.lay_out(block(at, &own), inputs.clone(), Way::Rows, digits, panel);
                }
                let mut sums = vec![Sums::ZERO; panels];
                for (at, right) in right.chunks_exact(panel).enumerate() {
                    kernel::run(room, right, digits, &mut sums);
                    let columns = block(at, &columns);
                    for (out, sums) in out.chunks_mut(BLOCK * stride).zip(&sums) {
                        wide(Write, Block { out, stride, columns: columns.clone(), sums, factor, adds });
                    }
                }
            });
        });
    }
}

/// Some columns of the rows of a block, and what becomes of them.
struct Block<'a> {
    out: &'a mut [f32],
    stride: usize,
    columns: Range<usize>,
    sums: &'a Sums,
    factor: f32,
    adds: bool,
}

/// Writes or adds the sums of a block.
struct Write;

impl Work<Block<'_>> for Write {
    type Output = ();

    #[inline(always)]
    fn run(Block { out, stride, columns, sums, factor, adds }: Block) {
        for (out, sums) in out.chunks_mut(stride).zip(&sums.0) {
            let values = out[columns.clone()].iter_mut().zip(sums);
            match adds {
                true => values.for_each(|(out, sum)| *out += factor * sum),
                false => values.for_each(|(out, sum)| *out = factor * sum),
            }
        }
    }
}

thread_local! {
    // Kept for the next product: the kernel clears new memory, which costs a tenth of one.
    static ROOM_LEFT: Cell<Vec<Piece>> = const { Cell::new(Vec::new()) };
    static ROOM_RIGHT: Cell<Vec<Piece>> = const { Cell::new(Vec::new()) };
}

/// Lends a buffer of this thread, with whatever is in it, or a new one where it is lent: a thread that waits for others may
/// take up another product's work.
fn with_room(room: &'static LocalKey<Cell<Vec<Piece>>>, pieces: usize, work: impl FnOnce(&mut [Piece])) {
    let mut pieces_room = room.take();
    if pieces_room.len() < pieces {
        pieces_room.resize(pieces, Piece::ZERO);
    }
    work(&mut pieces_room[..pieces]);
    room.set(pieces_room);
}
