//! AVX2 with FMA: 8 lanes. AVX-512: 16 lanes.

use core::arch::asm;
use core::arch::x86_64::*;

use super::{Bf16, Simd, filled};

/// Proof of AVX2 and FMA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Avx2 {
    _private: (),
}

/// Proof of AVX-512F, AVX2 and FMA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Avx512 {
    /// Whether there is AVX512-BF16, which rounds to bf16 in one instruction, with the same result.
    rounds: bool,
}

impl Avx2 {
    /// `None` where the processor lacks it.
    pub(crate) fn new() -> Option<Self> {
        (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"))
            .then_some(Self { _private: () })
    }
}

impl Avx512 {
    /// `None` where the processor lacks it.
    pub(crate) fn new() -> Option<Self> {
        let rounds = is_x86_feature_detected!("avx512bf16");
        (is_x86_feature_detected!("avx512f") && Avx2::new().is_some()).then_some(Self { rounds })
    }
}

#[cfg(test)]
impl Avx512 {
    /// As on a processor without AVX512-BF16.
    pub(crate) fn without_bf16() -> Option<Self> {
        Self::new().map(|_| Self { rounds: false })
    }
}

/// Forwards methods to intrinsics.
macro_rules! forward {
    ($V:ty: $($name:ident($($arg:ident),*) = $value:expr;)*) => {$(
        #[inline(always)]
        fn $name(self, $($arg: $V),*) -> $V {
            // SAFETY: `self` proves that the processor has the instruction.
            unsafe { $value }
        }
    )*};
}

/// `MASKS[8 - n..]` has its first `n` lanes set.
static MASKS: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];

/// Mask of the first `len` lanes, `len <= 8`.
#[inline(always)]
fn mask(_: Avx2, len: usize) -> __m256i {
    let lanes = &MASKS[8 - len..][..8];
    // SAFETY: the slice has the 8 elements that are read; the token proves AVX2.
    unsafe { _mm256_loadu_si256(lanes.as_ptr().cast()) }
}

/// Bits of which the upper half is `x` rounded to bf16.
#[inline]
#[target_feature(enable = "avx2")]
fn round_avx2(x: __m256) -> __m256i {
    let bits = _mm256_castps_si256(x);
    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
    let half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    let rounded = _mm256_castsi256_ps(_mm256_add_epi32(bits, half));
    // A NaN is made quiet: its upper half alone might be an infinity.
    let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
    let nan = _mm256_cmp_ps::<_CMP_UNORD_Q>(x, x);
    let rounded = _mm256_blendv_ps(rounded, _mm256_castsi256_ps(quiet), nan);
    // The sign alone of what is less than the least normal number, which NaN is not.
    let (sign, least) = (_mm256_set1_ps(-0.0), _mm256_set1_ps(f32::MIN_POSITIVE));
    let small = _mm256_cmp_ps::<_CMP_LT_OQ>(_mm256_andnot_ps(sign, x), least);
    let kept = _mm256_blendv_ps(rounded, _mm256_and_ps(sign, x), small);
    _mm256_castps_si256(kept)
}

/// `x` in bf16.
#[inline]
#[target_feature(enable = "avx2")]
fn halves_avx2(x: __m256) -> __m128i {
    let words = _mm256_srli_epi32::<16>(round_avx2(x));
    let upper = _mm256_extracti128_si256::<1>(words);
    _mm_packus_epi32(_mm256_castsi256_si128(words), upper)
}

/// [`round_avx2`]
#[inline]
#[target_feature(enable = "avx512f")]
fn round_avx512(x: __m512) -> __m512i {
    let bits = _mm512_castps_si512(x);
    let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
    let half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    // A NaN is made quiet: its upper half alone might be an infinity.
    let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
    let rounded = _mm512_add_epi32(bits, half);
    let rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x0040_0000));
    // The sign alone of what is less than the least normal number, which NaN is not.
    let least = _mm512_set1_ps(f32::MIN_POSITIVE);
    let small = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(_mm512_abs_ps(x), least);
    _mm512_mask_and_epi32(rounded, small, bits, _mm512_set1_epi32(i32::MIN))
}

/// [`halves_avx2`]
#[inline]
#[target_feature(enable = "avx512f")]
fn halves_avx512(isa: Avx512, x: __m512) -> __m256i {
    if isa.rounds {
        let halves;
        // SAFETY: `isa` has found AVX512-BF16.
        unsafe {
            asm!("vcvtneps2bf16 {:y}, {}", out(zmm_reg) halves, in(zmm_reg) x,
                options(pure, nomem, nostack, preserves_flags));
        }
        return _mm512_castsi512_si256(halves);
    }
    _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(round_avx512(x)))
}

/// `a` and then `b` in bf16, where AVX512-BF16 has been found.
///
/// # Safety
/// The processor has AVX512-BF16.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn neighbours_avx512(a: __m512, b: __m512) -> __m512 {
    let words;
    // SAFETY: by contract.
    unsafe {
        asm!("vcvtne2ps2bf16 {}, {}, {}", out(zmm_reg) words, in(zmm_reg) b, in(zmm_reg) a,
            options(pure, nomem, nostack, preserves_flags));
    }
    words
}

impl Simd for Avx2 {
    type V = __m256;
    const LANES: usize = 8;
    const REGISTERS: usize = 16;
    const ROWS: usize = 4;
    const VECTORS: usize = 3;

    forward! { __m256:
        add(a, b) = _mm256_add_ps(a, b);
        sub(a, b) = _mm256_sub_ps(a, b);
        mul(a, b) = _mm256_mul_ps(a, b);
        div(a, b) = _mm256_div_ps(a, b);
        mul_add(a, b, c) = _mm256_fmadd_ps(a, b, c);
        neg_mul_add(a, b, c) = _mm256_fnmadd_ps(a, b, c);
        max(a, b) = _mm256_max_ps(a, b);
        min(a, b) = _mm256_min_ps(a, b);
        sqrt(a) = _mm256_sqrt_ps(a);
        round(a) = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a);
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        // SAFETY: `self` proves that the processor has the instruction.
        unsafe { _mm256_set1_ps(x) }
    }

    #[inline(always)]
    fn load_or(self, x: &[f32], fill: __m256) -> __m256 {
        if x.len() >= 8 {
            // SAFETY: `x` has the 8 elements that are read; `self` proves AVX2.
            return unsafe { _mm256_loadu_ps(x.as_ptr()) };
        }
        let mask = mask(self, x.len());
        // SAFETY: only the lanes of the mask are read, and `x` has as many elements; `self` proves AVX2.
        unsafe {
            let v = _mm256_maskload_ps(x.as_ptr(), mask);
            _mm256_blendv_ps(fill, v, _mm256_castsi256_ps(mask))
        }
    }

    #[inline(always)]
    fn stream(self, to: &mut [f32], v: __m256) {
        if to.len() < 8 || !to.as_ptr().cast::<__m256>().is_aligned() {
            return self.store(to, v);
        }
        // SAFETY: `to` has the 8 elements that are written, on such a boundary; `self` proves the instruction.
        unsafe { _mm256_stream_ps(to.as_mut_ptr(), v) }
    }

    #[inline(always)]
    fn flush(self) {
        // SAFETY: every x86-64 processor has it.
        unsafe { _mm_sfence() }
    }

    #[inline(always)]
    fn prefetch(self, at: *const f32) {
        // SAFETY: a prefetch reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }

    #[inline(always)]
    fn prefetch_near(self, at: *const f32) {
        // SAFETY: a prefetch reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }

    #[inline(always)]
    unsafe fn load_at(self, from: *const f32) -> __m256 {
        // SAFETY: by contract there are 8 elements; `self` proves AVX2.
        unsafe { _mm256_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn transpose(
        self,
        to: *mut f32,
        to_stride: usize,
        from: *const f32,
        from_stride: usize,
    ) {
        // SAFETY: by contract the rows can be read and written; `self` proves AVX2.
        unsafe {
            let row = |i: usize| _mm256_loadu_ps(from.add(i * from_stride));
            // Pairs of rows, then pairs of pairs within halves of a vector, then the halves.
            let mut quads = [_mm256_setzero_ps(); 8];
            for (i, quads) in quads.chunks_exact_mut(4).enumerate() {
                let (a, b, c, d) = (row(4 * i), row(4 * i + 1), row(4 * i + 2), row(4 * i + 3));
                let (ab, ab_high) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
                let (cd, cd_high) = (_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
                quads[0] = _mm256_shuffle_ps::<0x44>(ab, cd);
                quads[1] = _mm256_shuffle_ps::<0xee>(ab, cd);
                quads[2] = _mm256_shuffle_ps::<0x44>(ab_high, cd_high);
                quads[3] = _mm256_shuffle_ps::<0xee>(ab_high, cd_high);
            }
            for i in 0..4 {
                let low = _mm256_permute2f128_ps::<0x20>(quads[i], quads[4 + i]);
                let high = _mm256_permute2f128_ps::<0x31>(quads[i], quads[4 + i]);
                _mm256_storeu_ps(to.add(i * to_stride), low);
                _mm256_storeu_ps(to.add((4 + i) * to_stride), high);
            }
        }
    }

    #[inline(always)]
    unsafe fn transpose_rows(self, to: *mut f32, from: *const f32, stride: usize) {
        // SAFETY: by contract the rows can be read and the columns written; `self` proves AVX2.
        unsafe {
            let [a, b, c, d] = [0, 1, 2, 3].map(|i| _mm256_loadu_ps(from.add(i * stride)));
            let (ab, ab_high) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
            let (cd, cd_high) = (_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
            // Columns 0 and 4, 1 and 5, 2 and 6, 3 and 7.
            let columns = [
                _mm256_shuffle_ps::<0x44>(ab, cd),
                _mm256_shuffle_ps::<0xee>(ab, cd),
                _mm256_shuffle_ps::<0x44>(ab_high, cd_high),
                _mm256_shuffle_ps::<0xee>(ab_high, cd_high),
            ];
            for i in 0..2 {
                let (even, odd) = (columns[2 * i], columns[2 * i + 1]);
                let low = _mm256_permute2f128_ps::<0x20>(even, odd);
                let high = _mm256_permute2f128_ps::<0x31>(even, odd);
                _mm256_storeu_ps(to.add(2 * i * Self::ROWS), low);
                _mm256_storeu_ps(to.add((4 + 2 * i) * Self::ROWS), high);
            }
        }
    }

    #[inline(always)]
    fn store(self, to: &mut [f32], v: __m256) {
        if to.len() >= 8 {
            // SAFETY: `to` has the 8 elements that are written; `self` proves AVX2.
            return unsafe { _mm256_storeu_ps(to.as_mut_ptr(), v) };
        }
        let mask = mask(self, to.len());
        // SAFETY: only the lanes of the mask are written, and `to` has as many elements; `self` proves AVX2.
        unsafe { _mm256_maskstore_ps(to.as_mut_ptr(), mask, v) }
    }

    // In two factors: 2^n alone may be beyond what f32 holds while the product is not.
    #[inline(always)]
    fn scale_exp2(self, a: __m256, n: __m256) -> __m256 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe {
            let n = _mm256_cvtps_epi32(n);
            let half = _mm256_srai_epi32::<1>(n);
            let bias = _mm256_set1_epi32(127);
            let first = _mm256_slli_epi32::<23>(_mm256_add_epi32(half, bias));
            let second = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_sub_epi32(n, half), bias));
            let a = _mm256_mul_ps(a, _mm256_castsi256_ps(first));
            _mm256_mul_ps(a, _mm256_castsi256_ps(second))
        }
    }

    #[inline(always)]
    fn sum(self, a: __m256) -> f32 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe {
            let a = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_add_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)))
        }
    }

    #[inline(always)]
    fn max_lane(self, a: __m256) -> f32 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe {
            let a = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_max_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_max_ss(a, _mm_movehdup_ps(a)))
        }
    }

    #[inline(always)]
    fn abs(self, a: __m256) -> __m256 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe { _mm256_andnot_ps(_mm256_set1_ps(-0.0), a) }
    }

    #[inline(always)]
    fn flip(self, a: __m256, sign: __m256) -> __m256 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe { _mm256_xor_ps(a, _mm256_and_ps(_mm256_set1_ps(-0.0), sign)) }
    }

    #[inline(always)]
    fn upper(self, words: __m256) -> __m256 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe {
            let mask = _mm256_set1_epi32(0xffff_0000_u32 as i32);
            _mm256_and_ps(words, _mm256_castsi256_ps(mask))
        }
    }

    #[inline(always)]
    fn lower(self, words: __m256) -> __m256 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_castps_si256(words))) }
    }

    #[inline(always)]
    fn pair_bf16(self, lower: __m256, upper: __m256) -> __m256 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe {
            let lower = _mm256_srli_epi32::<16>(round_avx2(lower));
            // The upper halves of `upper`.
            _mm256_castsi256_ps(_mm256_blend_epi16::<0xaa>(lower, round_avx2(upper)))
        }
    }

    #[inline(always)]
    fn load_bf16(self, x: &[Bf16]) -> __m256 {
        let all: [Bf16; 8];
        let from = match x.len() >= 8 {
            true => x.as_ptr(),
            false => {
                all = filled(x);
                all.as_ptr()
            }
        };
        // SAFETY: there are the 8 elements that are read; `self` proves AVX2.
        unsafe {
            let words = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words))
        }
    }

    #[inline(always)]
    fn store_bf16(self, to: &mut [Bf16], v: __m256) {
        if to.len() >= 8 {
            // SAFETY: `to` has the 8 elements that are written; `self` proves AVX2.
            return unsafe { _mm_storeu_si128(to.as_mut_ptr().cast(), halves_avx2(v)) };
        }
        let (mut all, len) = ([Bf16(0); 8], to.len());
        // SAFETY: as above, of `all`.
        unsafe { _mm_storeu_si128(all.as_mut_ptr().cast(), halves_avx2(v)) };
        to.copy_from_slice(&all[..len]);
    }

    #[inline(always)]
    fn stream_bf16(self, to: &mut [Bf16], v: __m256) {
        if to.len() < 8 || !to.as_ptr().cast::<__m128i>().is_aligned() {
            return self.store_bf16(to, v);
        }
        // SAFETY: `to` has the 8 elements that are written, on such a boundary; `self` proves the instructions.
        unsafe { _mm_stream_si128(to.as_mut_ptr().cast(), halves_avx2(v)) }
    }

    #[inline(always)]
    fn load_words(self, x: &[Bf16]) -> __m256 {
        let all: [Bf16; 16];
        let from = match x.len() >= 16 {
            true => x.as_ptr(),
            false => {
                all = filled(x);
                all.as_ptr()
            }
        };
        // SAFETY: there are the 16 elements that are read; `self` proves AVX2.
        unsafe { _mm256_loadu_ps(from.cast()) }
    }

    #[inline(always)]
    fn unzip(self, a: __m256, b: __m256) -> (__m256, __m256) {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe {
            // Within halves of a vector, then the quarters in order.
            let order = |x| _mm256_castpd_ps(_mm256_permute4x64_pd::<0xd8>(_mm256_castps_pd(x)));
            let even = _mm256_shuffle_ps::<0x88>(a, b);
            let odd = _mm256_shuffle_ps::<0xdd>(a, b);
            (order(even), order(odd))
        }
    }
}

/// Column `4 * q + j` of four rows of 16 elements, `stride` apart, in quarter `q` of the `j`-th vector.
///
/// # Safety
/// The rows can be read.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn quads(from: *const f32, stride: usize) -> [__m512; 4] {
    // SAFETY: by contract.
    let [a, b, c, d] = unsafe { [0, 1, 2, 3].map(|i| _mm512_loadu_ps(from.add(i * stride))) };
    // Pairs of rows, then pairs of pairs within quarters.
    let (ab, ab_high) = (_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    let (cd, cd_high) = (_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    [
        _mm512_shuffle_ps::<0x44>(ab, cd),
        _mm512_shuffle_ps::<0xee>(ab, cd),
        _mm512_shuffle_ps::<0x44>(ab_high, cd_high),
        _mm512_shuffle_ps::<0xee>(ab_high, cd_high),
    ]
}

/// The quarters of four vectors transposed: the `q`-th vector has quarter `q` of `a`, `b`, `c` and `d`.
#[inline]
#[target_feature(enable = "avx512f")]
fn quarters(a: __m512, b: __m512, c: __m512, d: __m512) -> [__m512; 4] {
    // Quarters 0 and 2, 1 and 3 of two vectors each.
    let (ab_even, ab_odd) = (
        _mm512_shuffle_f32x4::<0x88>(a, b),
        _mm512_shuffle_f32x4::<0xdd>(a, b),
    );
    let (cd_even, cd_odd) = (
        _mm512_shuffle_f32x4::<0x88>(c, d),
        _mm512_shuffle_f32x4::<0xdd>(c, d),
    );
    [
        _mm512_shuffle_f32x4::<0x88>(ab_even, cd_even),
        _mm512_shuffle_f32x4::<0x88>(ab_odd, cd_odd),
        _mm512_shuffle_f32x4::<0xdd>(ab_even, cd_even),
        _mm512_shuffle_f32x4::<0xdd>(ab_odd, cd_odd),
    ]
}

impl Simd for Avx512 {
    type V = __m512;
    const LANES: usize = 16;
    const REGISTERS: usize = 32;
    const ROWS: usize = 8;
    const VECTORS: usize = 3;

    forward! { __m512:
        add(a, b) = _mm512_add_ps(a, b);
        sub(a, b) = _mm512_sub_ps(a, b);
        mul(a, b) = _mm512_mul_ps(a, b);
        div(a, b) = _mm512_div_ps(a, b);
        mul_add(a, b, c) = _mm512_fmadd_ps(a, b, c);
        neg_mul_add(a, b, c) = _mm512_fnmadd_ps(a, b, c);
        max(a, b) = _mm512_max_ps(a, b);
        min(a, b) = _mm512_min_ps(a, b);
        sqrt(a) = _mm512_sqrt_ps(a);
        round(a) = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a);
        scale_exp2(a, n) = _mm512_scalef_ps(a, n);
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        // SAFETY: `self` proves that the processor has the instruction.
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    fn load_or(self, x: &[f32], fill: __m512) -> __m512 {
        if x.len() >= 16 {
            // SAFETY: `x` has the 16 elements that are read; `self` proves AVX-512.
            return unsafe { _mm512_loadu_ps(x.as_ptr()) };
        }
        let mask = (1u16 << x.len()) - 1;
        // SAFETY: only the lanes of the mask are read, and `x` has as many elements; `self` proves AVX-512.
        unsafe { _mm512_mask_loadu_ps(fill, mask, x.as_ptr()) }
    }

    #[inline(always)]
    fn stream(self, to: &mut [f32], v: __m512) {
        if to.len() < 16 || !to.as_ptr().cast::<__m512>().is_aligned() {
            return self.store(to, v);
        }
        // SAFETY: `to` has the 16 elements that are written, on such a boundary; `self` proves the instruction.
        unsafe { _mm512_stream_ps(to.as_mut_ptr(), v) }
    }

    #[inline(always)]
    fn flush(self) {
        // SAFETY: every x86-64 processor has it.
        unsafe { _mm_sfence() }
    }

    #[inline(always)]
    fn prefetch(self, at: *const f32) {
        // SAFETY: a prefetch reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }

    #[inline(always)]
    fn prefetch_near(self, at: *const f32) {
        // SAFETY: a prefetch reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }

    #[inline(always)]
    unsafe fn load_at(self, from: *const f32) -> __m512 {
        // SAFETY: by contract there are 16 elements; `self` proves AVX-512.
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn transpose(
        self,
        to: *mut f32,
        to_stride: usize,
        from: *const f32,
        from_stride: usize,
    ) {
        // SAFETY: by contract the rows can be read and written; `self` proves AVX-512.
        unsafe {
            let rows = |i: usize| quads(from.add(4 * i * from_stride), from_stride);
            let quads = [rows(0), rows(1), rows(2), rows(3)];
            for j in 0..4 {
                let [a, b, c, d] = quads.map(|quads| quads[j]);
                for (q, column) in quarters(a, b, c, d).into_iter().enumerate() {
                    _mm512_storeu_ps(to.add((4 * q + j) * to_stride), column);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn transpose_rows(self, to: *mut f32, from: *const f32, stride: usize) {
        // SAFETY: by contract the rows can be read and the columns written; `self` proves AVX-512.
        unsafe {
            let quads = [quads(from, stride), quads(from.add(4 * stride), stride)];
            for pair in 0..2 {
                // Quarter `q` of these has rows 0 to 3 and 4 to 7 of column `4 * q + 2 * pair`, then of the next column.
                let [a, b] = [0, 1].map(|half| quads[half][2 * pair]);
                let [c, d] = [0, 1].map(|half| quads[half][2 * pair + 1]);
                for (q, column) in quarters(a, b, c, d).into_iter().enumerate() {
                    _mm512_storeu_ps(to.add((4 * q + 2 * pair) * Self::ROWS), column);
                }
            }
        }
    }

    #[inline(always)]
    fn store(self, to: &mut [f32], v: __m512) {
        if to.len() >= 16 {
            // SAFETY: `to` has the 16 elements that are written; `self` proves AVX-512.
            return unsafe { _mm512_storeu_ps(to.as_mut_ptr(), v) };
        }
        let mask = (1u16 << to.len()) - 1;
        // SAFETY: only the lanes of the mask are written, and `to` has as many elements; `self` proves AVX-512.
        unsafe { _mm512_mask_storeu_ps(to.as_mut_ptr(), mask, v) }
    }

    #[inline(always)]
    fn sum(self, a: __m512) -> f32 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe { _mm512_reduce_add_ps(a) }
    }

    #[inline(always)]
    fn max_lane(self, a: __m512) -> f32 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe { _mm512_reduce_max_ps(a) }
    }

    #[inline(always)]
    fn abs(self, a: __m512) -> __m512 {
        // SAFETY: `self` proves that the processor has the instruction.
        unsafe { _mm512_abs_ps(a) }
    }

    // In integers: AVX-512F has no bitwise operations on f32.
    #[inline(always)]
    fn flip(self, a: __m512, sign: __m512) -> __m512 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe {
            let sign = _mm512_and_si512(_mm512_castps_si512(sign), _mm512_set1_epi32(i32::MIN));
            _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(a), sign))
        }
    }

    #[inline(always)]
    fn upper(self, words: __m512) -> __m512 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe {
            let mask = _mm512_set1_epi32(0xffff_0000_u32 as i32);
            _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(words), mask))
        }
    }

    #[inline(always)]
    fn lower(self, words: __m512) -> __m512 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_castps_si512(words))) }
    }

    #[inline(always)]
    fn pair_bf16(self, lower: __m512, upper: __m512) -> __m512 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe {
            if self.rounds {
                let lower = _mm512_cvtepu16_epi32(halves_avx512(self, lower));
                let upper = _mm512_cvtepu16_epi32(halves_avx512(self, upper));
                let words = _mm512_or_si512(lower, _mm512_slli_epi32::<16>(upper));
                return _mm512_castsi512_ps(words);
            }
            let lower = _mm512_srli_epi32::<16>(round_avx512(lower));
            let mask = _mm512_set1_epi32(0xffff_0000_u32 as i32);
            // `lower | upper & mask`
            let words = _mm512_ternarylogic_epi32::<0xf8>(lower, round_avx512(upper), mask);
            _mm512_castsi512_ps(words)
        }
    }

    #[inline(always)]
    fn neighbours_bf16(self, a: __m512, b: __m512) -> __m512 {
        if self.rounds {
            // SAFETY: `self` has found AVX512-BF16 and proves AVX-512.
            return unsafe { neighbours_avx512(a, b) };
        }
        let (even, odd) = self.unzip(a, b);
        self.pair_bf16(even, odd)
    }

    #[inline(always)]
    fn load_bf16(self, x: &[Bf16]) -> __m512 {
        let all: [Bf16; 16];
        let from = match x.len() >= 16 {
            true => x.as_ptr(),
            false => {
                all = filled(x);
                all.as_ptr()
            }
        };
        // SAFETY: there are the 16 elements that are read; `self` proves AVX-512.
        unsafe {
            let words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words))
        }
    }

    #[inline(always)]
    fn store_bf16(self, to: &mut [Bf16], v: __m512) {
        if to.len() >= 16 {
            // SAFETY: `to` has the 16 elements that are written; `self` proves AVX-512.
            return unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), halves_avx512(self, v)) };
        }
        let (mut all, len) = ([Bf16(0); 16], to.len());
        // SAFETY: as above, of `all`.
        unsafe { _mm256_storeu_si256(all.as_mut_ptr().cast(), halves_avx512(self, v)) };
        to.copy_from_slice(&all[..len]);
    }

    #[inline(always)]
    fn stream_bf16(self, to: &mut [Bf16], v: __m512) {
        if to.len() < 16 || !to.as_ptr().cast::<__m256i>().is_aligned() {
            return self.store_bf16(to, v);
        }
        // SAFETY: `to` has the 16 elements that are written, on such a boundary; `self` proves the instructions.
        unsafe { _mm256_stream_si256(to.as_mut_ptr().cast(), halves_avx512(self, v)) }
    }

    #[inline(always)]
    fn load_words(self, x: &[Bf16]) -> __m512 {
        let all: [Bf16; 32];
        let from = match x.len() >= 32 {
            true => x.as_ptr(),
            false => {
                all = filled(x);
                all.as_ptr()
            }
        };
        // SAFETY: there are the 32 elements that are read; `self` proves AVX-512.
        unsafe { _mm512_loadu_ps(from.cast()) }
    }

    #[inline(always)]
    fn unzip(self, a: __m512, b: __m512) -> (__m512, __m512) {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe {
            let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
            let odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
            (
                _mm512_permutex2var_ps(a, even, b),
                _mm512_permutex2var_ps(a, odd, b),
            )
        }
    }
}
