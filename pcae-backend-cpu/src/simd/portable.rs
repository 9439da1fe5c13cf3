//! Eight lanes in plain Rust, for every processor.

use super::{Bf16, Simd, filled};

/// Plain Rust.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Portable;

type V = [f32; 8];

/// Adding and subtracting it rounds to an integer: its last bit is worth 1.
const ROUND: f32 = 12_582_912.0;

#[inline(always)]
fn zip(a: V, b: V, op: impl Fn(f32, f32) -> f32) -> V {
    core::array::from_fn(|i| op(a[i], b[i]))
}

/// `2^n` for `-126 <= n <= 127`.
#[inline(always)]
fn exp2(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

/// Bits of which the upper half is `x` rounded to bf16.
#[inline(always)]
fn round_bf16(x: f32) -> u32 {
    let bits = x.to_bits();
    if x.is_nan() {
        // Quiet, as the upper half alone might be an infinity.
        bits | 0x0040_0000
    } else if x.is_subnormal() {
        bits & 0x8000_0000
    } else {
        bits.wrapping_add(0x7fff + (bits >> 16 & 1))
    }
}

impl Simd for Portable {
    type V = V;
    const LANES: usize = 8;
    const REGISTERS: usize = 8;
    const ROWS: usize = 4;
    const VECTORS: usize = 1;

    #[inline(always)]
    fn splat(self, x: f32) -> V {
        [x; 8]
    }

    #[inline(always)]
    fn load_or(self, x: &[f32], fill: V) -> V {
        if let Some(x) = x.first_chunk() {
            return *x;
        }
        let mut v = fill;
        v[..x.len()].copy_from_slice(x);
        v
    }

    #[inline(always)]
    unsafe fn load_at(self, from: *const f32) -> V {
        // SAFETY: by contract there are 8 elements; arrays are as aligned as they.
        unsafe { *from.cast() }
    }

    #[inline(always)]
    fn store(self, to: &mut [f32], v: V) {
        if let Some(to) = to.first_chunk_mut() {
            *to = v;
        } else {
            let len = to.len();
            to.copy_from_slice(&v[..len]);
        }
    }

    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a / b)
    }

    // Not `f32::mul_add`: without the instruction that is a call into libm.
    #[inline(always)]
    fn mul_add(self, a: V, b: V, c: V) -> V {
        self.add(self.mul(a, b), c)
    }

    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        zip(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        zip(a, b, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn sqrt(self, a: V) -> V {
        a.map(f32::sqrt)
    }

    #[inline(always)]
    fn round(self, a: V) -> V {
        a.map(|a| (a + ROUND) - ROUND)
    }

    // In two factors: 2^n alone may be beyond what f32 holds while the product is not.
    #[inline(always)]
    fn scale_exp2(self, a: V, n: V) -> V {
        zip(a, n, |a, n| {
            let n = n as i32;
            let half = n >> 1;
            a * exp2(half) * exp2(n - half)
        })
    }

    #[inline(always)]
    fn sum(self, a: V) -> f32 {
        let [a, b, c, d, e, f, g, h] = a;
        ((a + e) + (c + g)) + ((b + f) + (d + h))
    }

    #[inline(always)]
    fn max_lane(self, a: V) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }

    #[inline(always)]
    fn abs(self, a: V) -> V {
        a.map(f32::abs)
    }

    #[inline(always)]
    fn flip(self, a: V, sign: V) -> V {
        zip(a, sign, |a, sign| {
            f32::from_bits(a.to_bits() ^ (sign.to_bits() & (1 << 31)))
        })
    }

    #[inline(always)]
    fn upper(self, words: V) -> V {
        words.map(|word| f32::from_bits(word.to_bits() & 0xffff_0000))
    }

    #[inline(always)]
    fn lower(self, words: V) -> V {
        words.map(|word| f32::from_bits(word.to_bits() << 16))
    }

    #[inline(always)]
    fn pair_bf16(self, lower: V, upper: V) -> V {
        zip(lower, upper, |lower, upper| {
            f32::from_bits(round_bf16(lower) >> 16 | round_bf16(upper) & 0xffff_0000)
        })
    }

    #[inline(always)]
    fn load_bf16(self, x: &[Bf16]) -> V {
        match x.first_chunk() {
            Some(x) => *x,
            None => filled(x),
        }
        .map(Bf16::widened)
    }

    #[inline(always)]
    fn store_bf16(self, to: &mut [Bf16], v: V) {
        for (to, x) in to.iter_mut().zip(v) {
            *to = Bf16((round_bf16(x) >> 16) as u16);
        }
    }

    #[inline(always)]
    fn load_words(self, x: &[Bf16]) -> V {
        let x: [Bf16; 16] = match x.first_chunk() {
            Some(x) => *x,
            None => filled(x),
        };
        let word = |i: usize| u32::from(x[2 * i].0) | u32::from(x[2 * i + 1].0) << 16;
        core::array::from_fn(|i| f32::from_bits(word(i)))
    }

    #[inline(always)]
    fn unzip(self, a: V, b: V) -> (V, V) {
        let at = |i: usize| if i < 8 { a[i] } else { b[i - 8] };
        (
            core::array::from_fn(|i| at(2 * i)),
            core::array::from_fn(|i| at(2 * i + 1)),
        )
    }
}
