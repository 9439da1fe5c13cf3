//! NEON: 4 lanes.

use core::arch::aarch64::*;

use super::{Bf16, Simd, filled};

/// Proof of NEON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Neon {
    _private: (),
}

impl Neon {
    /// `None` where the processor lacks it.
    pub(crate) fn new() -> Option<Self> {
        std::arch::is_aarch64_feature_detected!("neon").then_some(Self { _private: () })
    }
}

/// Forwards methods to intrinsics.
macro_rules! forward {
    ($($name:ident($($arg:ident),*) = $value:expr;)*) => {$(
        #[inline(always)]
        fn $name(self, $($arg: float32x4_t),*) -> float32x4_t {
            // SAFETY: `self` proves that the processor has the instruction.
            unsafe { $value }
        }
    )*};
}

/// Bits of which the upper half is `x` rounded to bf16.
#[inline]
#[target_feature(enable = "neon")]
fn round_bf16(x: float32x4_t) -> uint32x4_t {
    let bits = vreinterpretq_u32_f32(x);
    let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
    let rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    // A NaN is made quiet: its upper half alone might be an infinity.
    let quiet = vorrq_u32(bits, vdupq_n_u32(0x0040_0000));
    let rounded = vbslq_u32(vceqq_f32(x, x), rounded, quiet);
    let sign = vandq_u32(bits, vdupq_n_u32(1 << 31));
    let normal = vcageq_f32(x, vdupq_n_f32(f32::MIN_POSITIVE));
    // Of NaN too, which is not less.
    vbslq_u32(vorrq_u32(normal, vmvnq_u32(vceqq_f32(x, x))), rounded, sign)
}

impl Simd for Neon {
    type V = float32x4_t;
    const LANES: usize = 4;
    const REGISTERS: usize = 32;
    const ROWS: usize = 8;
    const VECTORS: usize = 3;

    forward! {
        add(a, b) = vaddq_f32(a, b);
        sub(a, b) = vsubq_f32(a, b);
        mul(a, b) = vmulq_f32(a, b);
        div(a, b) = vdivq_f32(a, b);
        mul_add(a, b, c) = vfmaq_f32(c, a, b);
        neg_mul_add(a, b, c) = vfmsq_f32(c, a, b);
        max(a, b) = vbslq_f32(vcgtq_f32(a, b), a, b);
        min(a, b) = vbslq_f32(vcltq_f32(a, b), a, b);
        sqrt(a) = vsqrtq_f32(a);
        round(a) = vrndnq_f32(a);
        abs(a) = vabsq_f32(a);
    }

    #[inline(always)]
    fn splat(self, x: f32) -> float32x4_t {
        // SAFETY: `self` proves that the processor has the instruction.
        unsafe { vdupq_n_f32(x) }
    }

    #[inline(always)]
    fn load_or(self, x: &[f32], fill: float32x4_t) -> float32x4_t {
        if x.len() >= 4 {
            // SAFETY: `x` has the 4 elements that are read; `self` proves NEON.
            return unsafe { vld1q_f32(x.as_ptr()) };
        }
        let mut lanes = [0.0; 4];
        // SAFETY: `lanes` has the 4 elements that are written; `self` proves NEON.
        unsafe { vst1q_f32(lanes.as_mut_ptr(), fill) };
        lanes[..x.len()].copy_from_slice(x);
        // SAFETY: `lanes` has the 4 elements that are read; `self` proves NEON.
        unsafe { vld1q_f32(lanes.as_ptr()) }
    }

    #[inline(always)]
    unsafe fn load_at(self, from: *const f32) -> float32x4_t {
        // SAFETY: by contract there are 4 elements; `self` proves NEON.
        unsafe { vld1q_f32(from) }
    }

    #[inline(always)]
    fn store(self, to: &mut [f32], v: float32x4_t) {
        if to.len() >= 4 {
            // SAFETY: `to` has the 4 elements that are written; `self` proves NEON.
            return unsafe { vst1q_f32(to.as_mut_ptr(), v) };
        }
        let mut lanes = [0.0; 4];
        // SAFETY: `lanes` has the 4 elements that are written; `self` proves NEON.
        unsafe { vst1q_f32(lanes.as_mut_ptr(), v) };
        let len = to.len();
        to.copy_from_slice(&lanes[..len]);
    }

    // In two factors: 2^n alone may be beyond what f32 holds while the product is not.
    #[inline(always)]
    fn scale_exp2(self, a: float32x4_t, n: float32x4_t) -> float32x4_t {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe {
            let n = vcvtnq_s32_f32(n);
            let half = vshrq_n_s32::<1>(n);
            let bias = vdupq_n_s32(127);
            let first = vshlq_n_s32::<23>(vaddq_s32(half, bias));
            let second = vshlq_n_s32::<23>(vaddq_s32(vsubq_s32(n, half), bias));
            let a = vmulq_f32(a, vreinterpretq_f32_s32(first));
            vmulq_f32(a, vreinterpretq_f32_s32(second))
        }
    }

    #[inline(always)]
    fn sum(self, a: float32x4_t) -> f32 {
        // SAFETY: `self` proves that the processor has the instruction.
        unsafe { vaddvq_f32(a) }
    }

    #[inline(always)]
    fn max_lane(self, a: float32x4_t) -> f32 {
        // SAFETY: `self` proves that the processor has the instruction.
        unsafe { vmaxvq_f32(a) }
    }

    #[inline(always)]
    fn flip(self, a: float32x4_t, sign: float32x4_t) -> float32x4_t {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe {
            let sign = vandq_u32(vreinterpretq_u32_f32(sign), vdupq_n_u32(1 << 31));
            vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(a), sign))
        }
    }

    #[inline(always)]
    fn upper(self, words: float32x4_t) -> float32x4_t {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe {
            let mask = vdupq_n_u32(0xffff_0000);
            vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(words), mask))
        }
    }

    #[inline(always)]
    fn lower(self, words: float32x4_t) -> float32x4_t {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe { vreinterpretq_f32_u32(vshlq_n_u32::<16>(vreinterpretq_u32_f32(words))) }
    }

    #[inline(always)]
    fn pair_bf16(self, lower: float32x4_t, upper: float32x4_t) -> float32x4_t {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe {
            let upper = vandq_u32(round_bf16(upper), vdupq_n_u32(0xffff_0000));
            let lower = vshrq_n_u32::<16>(round_bf16(lower));
            vreinterpretq_f32_u32(vorrq_u32(lower, upper))
        }
    }

    #[inline(always)]
    fn load_bf16(self, x: &[Bf16]) -> float32x4_t {
        let all: [Bf16; 4];
        let from = match x.len() >= 4 {
            true => x.as_ptr(),
            false => {
                all = filled(x);
                all.as_ptr()
            }
        };
        // SAFETY: there are the 4 elements that are read; `self` proves NEON.
        unsafe {
            let words = vmovl_u16(vld1_u16(from.cast()));
            vreinterpretq_f32_u32(vshlq_n_u32::<16>(words))
        }
    }

    #[inline(always)]
    fn store_bf16(self, to: &mut [Bf16], v: float32x4_t) {
        if to.len() >= 4 {
            // SAFETY: `to` has the 4 elements that are written; `self` proves NEON.
            return unsafe { vst1_u16(to.as_mut_ptr().cast(), vshrn_n_u32::<16>(round_bf16(v))) };
        }
        let (mut all, len) = ([Bf16(0); 4], to.len());
        // SAFETY: as above, of `all`.
        unsafe { vst1_u16(all.as_mut_ptr().cast(), vshrn_n_u32::<16>(round_bf16(v))) };
        to.copy_from_slice(&all[..len]);
    }

    #[inline(always)]
    fn load_words(self, x: &[Bf16]) -> float32x4_t {
        let all: [Bf16; 8];
        let from = match x.len() >= 8 {
            true => x.as_ptr(),
            false => {
                all = filled(x);
                all.as_ptr()
            }
        };
        // SAFETY: there are the 8 elements that are read; `self` proves NEON.
        unsafe { vreinterpretq_f32_u16(vld1q_u16(from.cast())) }
    }

    #[inline(always)]
    fn unzip(self, a: float32x4_t, b: float32x4_t) -> (float32x4_t, float32x4_t) {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe { (vuzp1q_f32(a, b), vuzp2q_f32(a, b)) }
    }
}
