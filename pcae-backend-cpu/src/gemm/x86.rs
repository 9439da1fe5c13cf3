//! The units of x86-64 that multiply bf16.

use core::arch::asm;
use core::arch::x86_64::*;
use std::sync::OnceLock;

use crate::isa::{Isa, cpuid};

/// Proof of AVX512-BF16 and AVX-512F.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Avx512Bf16 {
    _private: (),
}

/// Proof of AMX-BF16, and that the system lets this process use it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Amx {
    _private: (),
}

impl Avx512Bf16 {
    /// `None` where the processor lacks it, or `isa` is not AVX-512.
    pub(super) fn new(isa: Isa) -> Option<Self> {
        let found = isa.is_avx512() && is_x86_feature_detected!("avx512bf16");
        found.then_some(Self { _private: () })
    }

    /// `sums = left @ right`, or `+=` where `add` is set, for a tile of `rows <= 8` rows and 48 columns:
    /// `left: [words, rows]`, `right: [words, 48]`, pairs of bf16; `sums: [rows, 48]`.
    pub(super) fn tile(
        self,
        words: usize,
        left: &[f32],
        right: &[f32],
        rows: usize,
        add: bool,
        sums: &mut [f32],
    ) {
        assert!(
            left.len() >= words * rows && right.len() >= words * 48 && sums.len() >= rows * 48,
            "the operands of a tile are as long as it says"
        );
        let (left, right, sums) = (left.as_ptr(), right.as_ptr(), sums.as_mut_ptr());
        // SAFETY: `self` proves AVX512-BF16; the lengths are checked above.
        unsafe {
            match rows {
                8 => dot_tile::<8>(words, left, right, add, sums),
                7 => dot_tile::<7>(words, left, right, add, sums),
                6 => dot_tile::<6>(words, left, right, add, sums),
                5 => dot_tile::<5>(words, left, right, add, sums),
                4 => dot_tile::<4>(words, left, right, add, sums),
                3 => dot_tile::<3>(words, left, right, add, sums),
                2 => dot_tile::<2>(words, left, right, add, sums),
                _ => dot_tile::<1>(words, left, right, add, sums),
            }
        }
    }

    /// `rounds` dot products on each of 12 vectors of sums, and the operations that are in them.
    pub(super) fn spin(self, rounds: usize) -> usize {
        // SAFETY: `self` proves AVX512-BF16.
        unsafe { dot_spin(rounds) };
        rounds * 12 * 16 * 4
    }
}

#[target_feature(enable = "avx512f,avx512bf16")]
fn dot_spin(rounds: usize) {
    // 2^-126 squared is nothing: the sums stay what they are.
    let x = core::hint::black_box(_mm512_set1_epi32(0x0080_0080));
    // SAFETY: vectors of the same size, any bits of which are valid.
    let x: __m512bh = unsafe { core::mem::transmute(x) };
    let mut sums = [_mm512_set1_ps(1.0); 12];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_dpbf16_ps(*sum, x, x);
        }
    }
    core::hint::black_box(sums);
}

/// # Safety
/// `words * R` elements can be read at `left`, `words * 48` at `right`, and `R * 48` be read and written at `sums`.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn dot_tile<const R: usize>(
    words: usize,
    left: *const f32,
    right: *const f32,
    add: bool,
    sums: *mut f32,
) {
    let mut all = [[_mm512_setzero_ps(); 3]; R];
    if add {
        for (r, row) in all.iter_mut().enumerate() {
            for (v, sum) in row.iter_mut().enumerate() {
                // SAFETY: by contract.
                *sum = unsafe { _mm512_loadu_ps(sums.add(r * 48 + 16 * v)) };
            }
        }
    }
    for word in 0..words {
        // SAFETY: by contract; vectors of the same size, any bits of which are valid.
        unsafe {
            let right = right.add(word * 48);
            let vectors: [__m512bh; 3] =
                core::array::from_fn(|v| core::mem::transmute(_mm512_loadu_ps(right.add(16 * v))));
            for (r, sums) in all.iter_mut().enumerate() {
                let x: __m512bh = core::mem::transmute(_mm512_set1_ps(*left.add(word * R + r)));
                for (sum, vector) in sums.iter_mut().zip(vectors) {
                    *sum = _mm512_dpbf16_ps(*sum, x, vector);
                }
            }
        }
    }
    for (r, row) in all.into_iter().enumerate() {
        for (v, sum) in row.into_iter().enumerate() {
            // SAFETY: by contract.
            unsafe { _mm512_storeu_ps(sums.add(r * 48 + 16 * v), sum) };
        }
    }
}

/// What `ldtilecfg` reads: eight registers of 16 rows of 64 bytes.
#[repr(C, align(64))]
struct TileConfig([u8; 64]);

static CONFIG: TileConfig = {
    let mut bytes = [0; 64];
    bytes[0] = 1;
    let mut i = 0;
    while i < 8 {
        bytes[16 + 2 * i] = 64;
        bytes[48 + i] = 16;
        i += 1;
    }
    TileConfig(bytes)
};

/// Rows of a register, and words of each.
pub(super) const TILE: usize = 16;

impl Amx {
    /// `None` where the processor lacks it, the system does not grant it, or `isa` is not AVX-512.
    pub(super) fn new(isa: Isa) -> Option<Self> {
        static GRANTED: OnceLock<bool> = OnceLock::new();
        let found = isa.is_avx512() && *GRANTED.get_or_init(|| has_amx_bf16() && request());
        found.then_some(Self { _private: () })
    }

    /// Prepares this thread's registers; until the result is dropped.
    pub(super) fn configure(self) -> AmxTiles {
        // SAFETY: `self` proves AMX; the configuration is a valid one.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const CONFIG, options(nostack, readonly, preserves_flags));
        }
        AmxTiles { _amx: self }
    }

    /// `rounds` products on each of 4 registers of sums, and the operations that are in them.
    pub(super) fn spin(self, rounds: usize) -> usize {
        let _tiles = self.configure();
        if rounds == 0 {
            return 0;
        }
        // SAFETY: `self` proves AMX-BF16 and the registers are configured. All are zeroed first.
        unsafe {
            asm!(
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                "tilezero tmm4", "tilezero tmm5", "tilezero tmm6", "tilezero tmm7",
                "2:",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "dec {n}",
                "jnz 2b",
                n = inout(reg) rounds => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, nomem),
            );
        }
        rounds * 4 * TILE * TILE * TILE * 4
    }
}

/// AMX-TILE and AMX-BF16, as CPUID says.
fn has_amx_bf16() -> bool {
    if cpuid(0, 0).eax < 7 {
        return false;
    }
    let edx = cpuid(7, 0).edx;
    edx >> 22 & 1 == 1 && edx >> 24 & 1 == 1
}

/// Asks the system for the state of the tile registers, which is large and therefore granted on request.
#[cfg(target_os = "linux")]
fn request() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
    const XTILEDATA: u64 = 18;
    let result: i64;
    // SAFETY: this call only sets a permission of the process.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XTILEDATA,
            out("rcx") _,
            out("r11") _,
            options(nostack),
        );
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn request() -> bool {
    false
}

/// Tile registers that are configured on this thread.
pub(super) struct AmxTiles {
    _amx: Amx,
}

impl Drop for AmxTiles {
    fn drop(&mut self) {
        // SAFETY: AMX is there. Released registers make switching threads cheap again.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
    }
}

impl AmxTiles {
    /// `sums = left @ right`, or `+=` where `add` is set, for a tile of 32 columns and 16 or 32 rows: `left` in squares of
    /// 16 rows and words, those of the same rows one after the other and the second rows `left_step` behind the first,
    /// `right: [words, 32]`, pairs of bf16, `words` a multiple of 16; `sums: [rows, 32]`. Meanwhile it asks for `lines` cache
    /// lines at `next`, which need not be readable.
    pub(super) fn tile(
        &self,
        words: usize,
        left: &[f32],
        left_step: usize,
        right: &[f32],
        rows: usize,
        add: bool,
        next: *const f32,
        lines: usize,
        sums: &mut [f32],
    ) {
        assert!(
            matches!(rows, 16 | 32)
                && words.is_multiple_of(TILE)
                && left.len() >= (rows / TILE - 1) * left_step + TILE * words
                && right.len() >= words * 32
                && sums.len() >= rows * 32,
            "the operands of a tile are as long as it says"
        );
        if words == 0 {
            if !add {
                sums[..rows * 32].fill(0.0);
            }
            return;
        }
        let blocks = words / TILE;
        let each = lines.div_ceil(blocks);
        // Bytes from row to row.
        let (left_stride, right_stride) = (TILE * 4, 32_usize * 4);
        if rows == 16 {
            // SAFETY: AMX-BF16 is there and configured. Each round reads one square of `left` and 16 rows of
            // `right`, `blocks` rounds read all; 16 rows of 32 sums are read and written. The lengths are checked above.
            unsafe {
                asm!(
                    "test {add}, {add}",
                    "jz 3f",
                    "tileloadd tmm0, [{s} + {rs}*1]",
                    "tileloadd tmm1, [{s} + {rs}*1 + 64]",
                    "jmp 2f",
                    "3:",
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "2:",
                    "mov {k}, {each}",
                    "test {k}, {k}",
                    "jz 5f",
                    "4:",
                    "prefetcht1 [{p}]",
                    "add {p}, 64",
                    "dec {k}",
                    "jnz 4b",
                    "5:",
                    "tileloadd tmm4, [{l} + {ls}*1]",
                    "tileloadd tmm6, [{r} + {rs}*1]",
                    "tileloadd tmm7, [{r} + {rs}*1 + 64]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "add {l}, 1024",
                    "add {r}, 2048",
                    "dec {n}",
                    "jnz 2b",
                    "tilestored [{s} + {rs}*1], tmm0",
                    "tilestored [{s} + {rs}*1 + 64], tmm1",
                    l = inout(reg) left.as_ptr() => _,
                    r = inout(reg) right.as_ptr() => _,
                    n = inout(reg) blocks => _,
                    add = in(reg) usize::from(add),
                    k = out(reg) _,
                    each = in(reg) each,
                    p = inout(reg) next => _,
                    s = in(reg) sums.as_mut_ptr(),
                    ls = in(reg) left_stride,
                    rs = in(reg) right_stride,
                    out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
            return;
        }
        // SAFETY: as above, with two rows of squares of `left` and 32 rows of sums.
        unsafe {
            asm!(
                "test {add}, {add}",
                "jz 3f",
                "tileloadd tmm0, [{s} + {rs}*1]",
                "tileloadd tmm1, [{s} + {rs}*1 + 64]",
                "tileloadd tmm2, [{s2} + {rs}*1]",
                "tileloadd tmm3, [{s2} + {rs}*1 + 64]",
                "jmp 2f",
                "3:",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                "mov {k}, {each}",
                "test {k}, {k}",
                "jz 5f",
                "4:",
                "prefetcht1 [{p}]",
                "add {p}, 64",
                "dec {k}",
                "jnz 4b",
                "5:",
                "tileloadd tmm6, [{r} + {rs}*1]",
                "tileloadd tmm4, [{l} + {ls}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{r} + {rs}*1 + 64]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{l2} + {ls}*1]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {l}, 1024",
                "add {l2}, 1024",
                "add {r}, 2048",
                "dec {n}",
                "jnz 2b",
                "tilestored [{s} + {rs}*1], tmm0",
                "tilestored [{s} + {rs}*1 + 64], tmm1",
                "tilestored [{s2} + {rs}*1], tmm2",
                "tilestored [{s2} + {rs}*1 + 64], tmm3",
                l = inout(reg) left.as_ptr() => _,
                l2 = inout(reg) left.as_ptr().add(left_step) => _,
                r = inout(reg) right.as_ptr() => _,
                n = inout(reg) blocks => _,
                add = in(reg) usize::from(add),
                    k = out(reg) _,
                    each = in(reg) each,
                    p = inout(reg) next => _,
                    s = in(reg) sums.as_mut_ptr(),
                s2 = in(reg) sums.as_mut_ptr().add(16 * 32),
                ls = in(reg) left_stride,
                rs = in(reg) right_stride,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}
