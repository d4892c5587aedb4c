//! The inner loop: one panel of columns times panels of rows, in assembly.
//!
//! Four tiles hold the sums of a block, two take a piece of its rows and two one of its columns. A piece of the columns is read again
//! for each piece of the rows that it meets, so it should come from the first cache: the loop takes a slice of the
//! inputs, short enough for it, through all rows before the next.

use std::arch::asm;

use super::layout::Piece;
use super::{BLOCK, DEPTH};
use crate::engine::amx::{self, Shapes};
use crate::engine::ops::mat::Digits;

/// Steps of [`DEPTH`] inputs in a slice.
const SLICE: usize = 4;

const _: () = assert!(BLOCK == 32 && DEPTH == 32 && size_of::<Piece>() == 2048);

/// Sums of a block.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Sums(pub(super) [[f32; BLOCK]; BLOCK]);

impl Sums {
    pub(super) const ZERO: Self = Sums([[0.0; BLOCK]; BLOCK]);
}

/// Writes the sums of all blocks of rows by one of columns. The processor must have the instructions.
pub(super) fn run(rows: &[Piece], columns: &[Piece], digits: Digits, sums: &mut [Sums]) {
    assert!(super::is_there(), "this processor has no AMX");
    assert!(rows.len() == columns.len() * sums.len(), "panels of other inputs");
    let slice = SLICE * digits.pieces();
    Shapes::new(&[16; 8]).set_up();
    for (at, slice_of_columns) in columns.chunks(slice).enumerate() {
        for (panel, sums) in rows.chunks_exact(columns.len()).zip(&mut *sums) {
            let panel = &panel[at * slice..][..slice_of_columns.len()];
            let begins = at == 0;
            match digits {
                Digits::All => add_all(panel, slice_of_columns, begins, sums),
                Digits::Sixteen => add_sixteen(panel, slice_of_columns, begins, sums),
            }
        }
    }
    amx::release();
}

/// Reads a piece of the rows.
macro_rules! rows {
    ($at:literal) => {
        concat!(
            "tileloadd tmm4, [{rows} + {line}*1 + ",
            $at,
            "]\ntileloadd tmm5, [{rows} + {line}*1 + ",
            $at,
            " + 1024]"
        )
    };
}

/// Reads a piece of the columns.
macro_rules! columns {
    ($at:literal) => {
        concat!(
            "tileloadd tmm6, [{columns} + {line}*1 + ",
            $at,
            "]\n",
            "tileloadd tmm7, [{columns} + {line}*1 + ",
            $at,
            " + 1024]"
        )
    };
}

/// Adds the products of what was read.
macro_rules! add {
    () => {
        "tdpbf16ps tmm0, tmm4, tmm6\ntdpbf16ps tmm1, tmm4, tmm7\ntdpbf16ps tmm2, tmm5, tmm6\ntdpbf16ps tmm3, tmm5, tmm7"
    };
}

/// A loop over steps of so many bytes, around what it does in each.
macro_rules! over_steps {
    ($rows:expr, $columns:expr, $begins:expr, $sums:expr, $bytes:literal, $steps:expr, $($line:expr),+) => {
        // SAFETY: the tiles are set up for 16 rows of 64 bytes; each step reads its `$bytes` of rows and of columns, of which there are
        // `$steps`, and the sums are two by two tiles whose rows lie 128 bytes apart.
        unsafe {
            asm!(
                "test {begins}, {begins}",
                "jnz 3f",
                "tileloadd tmm0, [{sums} + {wide}*1]",
                "tileloadd tmm1, [{sums} + {wide}*1 + 64]",
                "tileloadd tmm2, [{sums} + {wide}*1 + 2048]",
                "tileloadd tmm3, [{sums} + {wide}*1 + 2112]",
                "jmp 2f",
                "3:",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                $($line,)+
                concat!("add {rows}, ", $bytes),
                concat!("add {columns}, ", $bytes),
                "dec {steps}",
                "jnz 2b",
                "tilestored [{sums} + {wide}*1], tmm0",
                "tilestored [{sums} + {wide}*1 + 64], tmm1",
                "tilestored [{sums} + {wide}*1 + 2048], tmm2",
                "tilestored [{sums} + {wide}*1 + 2112], tmm3",
                begins = in(reg) usize::from($begins),
                rows = inout(reg) $rows.as_ptr() => _,
                columns = inout(reg) $columns.as_ptr() => _,
                steps = inout(reg) $steps => _,
                sums = in(reg) $sums.0.as_mut_ptr(),
                line = in(reg) 64_usize,
                wide = in(reg) 128_usize,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            )
        }
    };
}

/// Six products of three pieces; what is smallest is added first.
#[expect(unsafe_code, reason = "instructions without intrinsics")]
fn add_all(rows: &[Piece], columns: &[Piece], begins: bool, sums: &mut Sums) {
    let steps = columns.len() / 3;
    assert!(steps > 0 && columns.len() == 3 * steps && rows.len() == columns.len());
    over_steps!(
        rows,
        columns,
        begins,
        sums,
        "6144",
        steps,
        rows!("0"),
        columns!("4096"),
        add!(),
        columns!("2048"),
        add!(),
        columns!("0"),
        add!(),
        rows!("2048"),
        add!(),
        columns!("2048"),
        add!(),
        rows!("4096"),
        columns!("0"),
        add!()
    );
}

/// Three products of two pieces.
#[expect(unsafe_code, reason = "instructions without intrinsics")]
fn add_sixteen(rows: &[Piece], columns: &[Piece], begins: bool, sums: &mut Sums) {
    let steps = columns.len() / 2;
    assert!(steps > 0 && columns.len() == 2 * steps && rows.len() == columns.len());
    over_steps!(
        rows,
        columns,
        begins,
        sums,
        "4096",
        steps,
        rows!("0"),
        columns!("2048"),
        add!(),
        columns!("0"),
        add!(),
        rows!("2048"),
        add!()
    );
}
