//! Whether this process may multiply by tiles (AMX), and how tiles are set up.
//!
//! The instructions have no stable intrinsics, which is why those who use them hold assembly. The kernel gives a process the
//! registers of the tiles on demand only (Linux 5.16; `Documentation/arch/x86/xstate.rst`).

use std::arch::asm;
use std::arch::x86_64::{__cpuid_count, _xgetbv};
use std::sync::LazyLock;

/// What is multiplied.
#[derive(Clone, Copy)]
pub(crate) enum Numbers {
    Bytes,
    Bf16,
}

/// Returns true if the processor multiplies tiles of such numbers and the kernel lets this process do it.
pub(crate) fn has(numbers: Numbers) -> bool {
    // Asked once: in a virtual machine every question is one to its host.
    static HAS: LazyLock<(bool, bool)> = LazyLock::new(|| {
        let says = __cpuid_count(7, 0).edx;
        let tiles = says & 1 << 24 != 0 && kept() && permitted();
        (tiles && says & 1 << 25 != 0, tiles && says & 1 << 22 != 0)
    });
    match numbers {
        Numbers::Bytes => HAS.0,
        Numbers::Bf16 => HAS.1,
    }
}

/// Asks whether the kernel keeps the registers of tiles.
#[expect(unsafe_code, reason = "reading the register that tells what the kernel keeps")]
fn kept() -> bool {
    const KEPT: u64 = 1 << 17 | 1 << 18;

    #[target_feature(enable = "xsave")]
    fn register() -> u64 {
        // SAFETY: register 0 is there wherever `xgetbv` is.
        unsafe { _xgetbv(0) }
    }

    // SAFETY: only where the kernel has switched `xgetbv` on, as the condition before it says.
    is_x86_feature_detected!("xsave") && unsafe { register() } & KEPT == KEPT
}

/// Asks the kernel for the registers of the tiles, for all threads.
#[expect(unsafe_code, reason = "a system call without a safe name")]
fn permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the call takes two numbers and changes nothing but what this process may use.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

/// The shapes of the tiles, as `ldtilecfg` reads them.
#[repr(C, align(64))]
pub(crate) struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Shapes {
    /// Gives tiles, from the first on, so many rows of 64 bytes: 8 tiles of 16 rows at most.
    pub(crate) fn new(heights: &[usize]) -> Self {
        assert!(heights.len() <= 8 && heights.iter().all(|height| *height <= 16), "no tiles of {heights:?} rows");
        let mut shapes = Shapes { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        for (at, height) in heights.iter().enumerate() {
            (shapes.row_bytes[at], shapes.rows[at]) = (64, *height as u8);
        }
        shapes
    }

    /// Sets this thread's tiles up. The processor must have them.
    #[expect(unsafe_code, reason = "an instruction without an intrinsic")]
    pub(crate) fn set_up(&self) {
        assert!(has(Numbers::Bytes) || has(Numbers::Bf16), "this processor has no AMX");
        // SAFETY: the shapes are those of a palette that every processor with AMX has, and lie in memory of their size.
        unsafe { asm!("ldtilecfg [{}]", in(reg) std::ptr::from_ref(self), options(nostack, preserves_flags)) }
    }
}

/// Lets this thread's tiles go. They must be set up.
#[expect(unsafe_code, reason = "an instruction without an intrinsic")]
pub(crate) fn release() {
    assert!(has(Numbers::Bytes) || has(Numbers::Bf16), "this processor has no AMX");
    // SAFETY: it frees the tiles, which nothing reads any more.
    unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) }
}
