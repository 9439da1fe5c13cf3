//! One vector of f32 lanes per instruction set: only the operations that the kernels need.
//!
//! The methods are safe because `self` proves that the processor has the instructions; they are fast only inside a
//! function that enables them, which [`crate::isa::Isa::run`] provides.

#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

use crate::element::Bf16;

#[cfg(target_arch = "aarch64")]
pub(crate) use neon::Neon;
pub(crate) use portable::Portable;
#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

/// `N` elements: those of `x`, then zeros.
#[inline(always)]
fn filled<const N: usize>(x: &[Bf16]) -> [Bf16; N] {
    let mut all = [Bf16(0); N];
    let len = x.len().min(N);
    all[..len].copy_from_slice(&x[..len]);
    all
}

/// Vector operations of one instruction set.
pub(crate) trait Simd: Copy + Send + Sync {
    /// One vector.
    type V: Copy;
    /// Its lanes.
    const LANES: usize;
    /// Vectors that fit in the registers.
    const REGISTERS: usize;

    /// Rows of the tile of a matrix product: with [`Simd::VECTORS`], as many sums as leave registers for a row of the
    /// right operand and an element of the left one.
    const ROWS: usize;
    /// Vectors in a row of that tile.
    const VECTORS: usize;

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::V;
    /// The first lanes from `x`, up to its length; `fill` in the rest.
    fn load_or(self, x: &[f32], fill: Self::V) -> Self::V;
    /// The first lanes to `to`, up to its length.
    fn store(self, to: &mut [f32], v: Self::V);
    /// `a + b`
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a - b`
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b`
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a / b`, correctly rounded.
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once where the instruction set can, else twice.
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger one; `b` where either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// The smaller one; `b` where either is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// Square root, correctly rounded.
    fn sqrt(self, a: Self::V) -> Self::V;
    /// To the nearest integer, ties to even, for `|a| < 2^22`.
    fn round(self, a: Self::V) -> Self::V;
    /// `a * 2^n` for integers `-252 <= n <= 254`, rounded once.
    fn scale_exp2(self, a: Self::V, n: Self::V) -> Self::V;
    /// Sum of the lanes, always in the same order.
    fn sum(self, a: Self::V) -> f32;
    /// The largest lane, if none is NaN.
    fn max_lane(self, a: Self::V) -> f32;

    /// All lanes from `from`.
    ///
    /// # Safety
    /// [`Simd::LANES`] elements can be read there.
    unsafe fn load_at(self, from: *const f32) -> Self::V;

    /// [`Simd::store`] past the caches, where `to` is a whole vector on a boundary of its size and the processor can. Others
    /// see it after [`Simd::flush`].
    #[inline(always)]
    fn stream(self, to: &mut [f32], v: Self::V) {
        self.store(to, v);
    }

    /// Waits for what was stored by [`Simd::stream`].
    #[inline(always)]
    fn flush(self) {}

    /// Asks for the cache line at `at`, which need not be readable, in the level-2 cache.
    #[inline(always)]
    fn prefetch(self, at: *const f32) {
        let _ = at;
    }

    /// Asks for the cache line at `at`, which need not be readable, in the level-1 cache.
    #[inline(always)]
    fn prefetch_near(self, at: *const f32) {
        let _ = at;
    }

    /// Transposes a square of [`Simd::LANES`] rows: `to[i * to_stride + j] = from[j * from_stride + i]`.
    ///
    /// # Safety
    /// `LANES` elements can be read and written at each of the `LANES` rows of `from` and `to`, which do not overlap.
    #[inline(always)]
    unsafe fn transpose(
        self,
        to: *mut f32,
        to_stride: usize,
        from: *const f32,
        from_stride: usize,
    ) {
        for j in 0..Self::LANES {
            for i in 0..Self::LANES {
                // SAFETY: by contract.
                unsafe { *to.add(i * to_stride + j) = *from.add(j * from_stride + i) };
            }
        }
    }

    /// Transposes [`Simd::ROWS`] rows of [`Simd::LANES`] elements to columns without gaps: `to[i * ROWS + j] =
    /// from[j * stride + i]`, the rows of a tile in the order in which it reads them.
    ///
    /// # Safety
    /// `LANES` elements can be read at each of the `ROWS` rows of `from`, and `LANES * ROWS` be written at `to`, which does
    /// not overlap them.
    #[inline(always)]
    unsafe fn transpose_rows(self, to: *mut f32, from: *const f32, stride: usize) {
        for j in 0..Self::ROWS {
            for i in 0..Self::LANES {
                // SAFETY: by contract.
                unsafe { *to.add(i * Self::ROWS + j) = *from.add(j * stride + i) };
            }
        }
    }

    /// Each word's upper half, a bf16, as f32.
    fn upper(self, words: Self::V) -> Self::V;
    /// Each word's lower half, a bf16, as f32.
    fn lower(self, words: Self::V) -> Self::V;

    /// Words of two bf16 each: `lower` and `upper` rounded, to nearest and ties to even. NaN stays NaN, and subnormal numbers
    /// become zeros of their sign, which is what the units that multiply bf16 take them for.
    fn pair_bf16(self, lower: Self::V, upper: Self::V) -> Self::V;
    /// The elements of `a` and then `b`: those of even index, and those of odd index.
    fn unzip(self, a: Self::V, b: Self::V) -> (Self::V, Self::V);

    /// Words of neighbours, of the elements of `a` and then `b`, rounded as by [`Simd::pair_bf16`].
    #[inline(always)]
    fn neighbours_bf16(self, a: Self::V, b: Self::V) -> Self::V {
        let (even, odd) = self.unzip(a, b);
        self.pair_bf16(even, odd)
    }

    /// The first lanes from `x`, up to its length; zeros in the rest.
    fn load_bf16(self, x: &[Bf16]) -> Self::V;
    /// The first lanes to `to`, up to its length, rounded as by [`Simd::pair_bf16`].
    fn store_bf16(self, to: &mut [Bf16], v: Self::V);
    /// Words of two neighbours each from `x`, the first in the lower half; zeros beyond its end.
    fn load_words(self, x: &[Bf16]) -> Self::V;

    /// [`Simd::store_bf16`] past the caches, as [`Simd::stream`].
    #[inline(always)]
    fn stream_bf16(self, to: &mut [Bf16], v: Self::V) {
        self.store_bf16(to, v);
    }

    /// [`Simd::load_or`] with zeros.
    #[inline(always)]
    fn load(self, x: &[f32]) -> Self::V {
        self.load_or(x, self.splat(0.0))
    }

    /// `c - a * b`
    #[inline(always)]
    fn neg_mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        self.mul_add(self.sub(self.splat(0.0), a), b, c)
    }

    /// `|a|`, also of NaN and zero: the sign bit is cleared.
    fn abs(self, a: Self::V) -> Self::V;
    /// `a`, its sign changed where `sign` has its sign bit set.
    fn flip(self, a: Self::V, sign: Self::V) -> Self::V;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::{Isa, kernel};

    kernel! {
        /// Each operation on `x` and `y`, one row of `out` per operation.
        fn all<'a, S>(s; out: &'a mut [Vec<f32>], x: &'a [f32], y: &'a [f32]) -> (f32, f32, usize) {
            let (a, b) = (s.load(x), s.load_or(y, s.splat(1.0)));
            let results = [
                s.add(a, b), s.sub(a, b), s.mul(a, b), s.div(a, b), s.mul_add(a, b, a), s.max(a, b), s.min(a, b),
                s.sqrt(b), s.round(a), s.scale_exp2(a, s.round(b)), s.neg_mul_add(a, b, a),
                s.abs(a), s.flip(b, a),
            ];
            for (row, v) in out.iter_mut().zip(results) {
                s.store(row, v);
            }
            (s.sum(a), s.max_lane(s.load_or(x, s.splat(f32::NEG_INFINITY))), S::LANES)
        }
    }

    kernel! {
        /// Words of pairs of `x` and `y`, the elements of both of even and odd index, and words of neighbours of both.
        fn rearrange<'a, S>(s; out: &'a mut [Vec<f32>], x: &'a [f32], y: &'a [f32]) -> usize {
            let (a, b) = (s.load(x), s.load(y));
            let (even, odd) = s.unzip(a, b);
            for (row, v) in out.iter_mut().zip([s.pair_bf16(a, b), even, odd, s.neighbours_bf16(a, b)]) {
                s.store(row, v);
            }
            S::LANES
        }

        /// `x` to `to` as bf16, past the caches or not, and `to` as vectors and words of it.
        fn narrow<'a, S>(s; to: &'a mut [Bf16], out: &'a mut [Vec<f32>; 2], x: &'a [f32], streamed: bool) -> () {
            match streamed {
                true => s.stream_bf16(to, s.load(x)),
                false => s.store_bf16(to, s.load(x)),
            }
            s.flush();
            let [vector, words] = out;
            s.store(vector, s.load_bf16(to));
            s.store(words, s.load_words(to));
        }
    }

    /// Ties, a carry into the exponent, the largest, infinity, NaN whose upper half looks infinite, zero, subnormal numbers
    /// and the largest of them, a tie beside the least that is none; and what bf16 makes of them.
    const ROUNDED: [(u32, u16); 16] = [
        (0x3f80_8000, 0x3f80),
        (0x3f81_8000, 0x3f82),
        (0x3f80_8001, 0x3f81),
        (0x3fff_8000, 0x4000),
        (0x7f7f_ffff, 0x7f80),
        (0x7f80_0000, 0x7f80),
        (0x7f80_0001, 0x7fc0),
        (0xbf80_8000, 0xbf80),
        (0x8000_0000, 0x8000),
        (0x0000_8000, 0x0000),
        (0x8001_8000, 0x8000),
        (0x807f_ffff, 0x8000),
        (0x0080_8000, 0x0080),
        (0xffc0_1234, 0xffc0),
        (0xff80_0000, 0xff80),
        (0x4049_0fdb, 0x4049),
    ];

    fn bits(x: &[f32]) -> Vec<u32> {
        x.iter().map(|x| x.to_bits()).collect()
    }

    #[test]
    fn pairs_are_rounded_to_nearest_even_and_neighbours_part() {
        for isa in Isa::variants() {
            let lanes = rearrange(isa, &mut [], &[], &[]);
            for start in (0..16).step_by(lanes) {
                let from = &ROUNDED[start..][..lanes];
                let x: Vec<f32> = from.iter().map(|(x, _)| f32::from_bits(*x)).collect();
                let y: Vec<f32> = x.iter().rev().copied().collect();
                let want: Vec<u32> = from.iter().map(|(_, x)| u32::from(*x)).collect();
                let turned: Vec<u32> = want.iter().rev().copied().collect();
                let mut out = vec![vec![0.0; lanes]; 4];
                rearrange(isa, &mut out, &x, &y);
                let pairs: Vec<u32> = want
                    .iter()
                    .zip(&turned)
                    .map(|(lower, upper)| lower | upper << 16)
                    .collect();
                assert_eq!(bits(&out[0]), pairs, "{isa} {start}");
                let both: Vec<u32> = x.iter().chain(&y).map(|x| x.to_bits()).collect();
                for (odd, row) in out[1..3].iter().enumerate() {
                    let want: Vec<u32> = both.iter().skip(odd).step_by(2).copied().collect();
                    assert_eq!(bits(row), want, "{isa}");
                }
                let neighbours: Vec<u32> = [want, turned]
                    .concat()
                    .chunks(2)
                    .map(|pair| pair[0] | pair[1] << 16)
                    .collect();
                assert_eq!(bits(&out[3]), neighbours, "{isa} {start}");
            }
        }
    }

    #[test]
    fn bf16_is_stored_and_loaded_at_every_length() {
        let x = ROUNDED.map(|(x, _)| f32::from_bits(x));
        for isa in Isa::variants() {
            let lanes = rearrange(isa, &mut [], &[], &[]);
            for (start, streamed) in (0..16)
                .step_by(lanes)
                .flat_map(|start| [(start, false), (start, true)])
            {
                for len in 0..=2 * lanes {
                    // Aligned to a vector, so that it can be streamed, and not.
                    #[repr(align(64))]
                    struct Line([Bf16; 64]);
                    for at in [0, 1] {
                        let mut line = Line([Bf16(7); 64]);
                        let to = &mut line.0[at..][..len];
                        let mut out = [vec![0.0; lanes], vec![0.0; lanes]];
                        narrow(isa, to, &mut out, &x[start..][..lanes], streamed);
                        // What lies behind a vector is left.
                        let want = |i: usize| match i {
                            _ if i >= len => 0,
                            _ if i >= lanes => 7,
                            _ => ROUNDED[start + i].1,
                        };
                        let stored: Vec<u16> = to.iter().map(|x| x.0).collect();
                        assert_eq!(
                            stored,
                            (0..len).map(want).collect::<Vec<_>>(),
                            "{isa} {len}"
                        );
                        assert_eq!(line.0[at + len], Bf16(7), "{isa} {len}");
                        let widened = (0..lanes).map(|i| u32::from(want(i)) << 16);
                        assert_eq!(bits(&out[0]), widened.collect::<Vec<_>>(), "{isa} {len}");
                        let words = (0..lanes)
                            .map(|i| u32::from(want(2 * i)) | u32::from(want(2 * i + 1)) << 16);
                        assert_eq!(bits(&out[1]), words.collect::<Vec<_>>(), "{isa} {len}");
                    }
                }
            }
        }
    }

    #[test]
    fn operations_match_scalars_at_every_length() {
        for isa in Isa::available() {
            let lanes = all(isa, &mut [], &[], &[]).2;
            for len in 0..=lanes {
                let x: Vec<f32> = (0..len).map(|i| 1.5 - i as f32 * 0.37).collect();
                let y: Vec<f32> = (0..len).map(|i| 0.25 + i as f32 * 0.61).collect();
                let mut out = vec![vec![0.0; len]; 13];
                let (sum, max, _) = all(isa, &mut out, &x, &y);
                let expected = x.iter().sum::<f32>();
                assert!(
                    (sum - expected).abs() <= 1e-5,
                    "{isa} {len}: {sum} {expected}"
                );
                assert_eq!(max, x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
                for i in 0..len {
                    let (a, b) = (x[i], y[i]);
                    let want = [
                        a + b,
                        a - b,
                        a * b,
                        a / b,
                        a * b + a,
                        a.max(b),
                        a.min(b),
                        b.sqrt(),
                        a.round_ties_even(),
                        a * b.round_ties_even().exp2(),
                        a - a * b,
                        a.abs(),
                        if a.is_sign_negative() { -b } else { b },
                    ];
                    for (op, want) in want.into_iter().enumerate() {
                        // Fused or not, the operations with a product differ by its rounding.
                        let got = out[op][i];
                        assert!(
                            (got - want).abs() <= 1e-6 * want.abs().max(1.0),
                            "{isa} {len} {op}: {got} {want}"
                        );
                    }
                }
            }
            // NaN comes through from the second operand, and the extremes of the exponent are reached.
            let mut out = vec![vec![0.0; 3]; 13];
            all(
                isa,
                &mut out,
                &[1.0, f32::NAN, 1.5],
                &[f32::NAN, 2.0, -149.0],
            );
            assert!(out[5][0].is_nan() && out[6][0].is_nan(), "{isa}");
            assert_eq!((out[5][1], out[6][1]), (2.0, 2.0), "{isa}");
            assert_eq!(out[9][2], 2.0 * f32::from_bits(1), "{isa}");
            // Signs are bits, also of zero, NaN and infinity.
            let x = [-0.0, 0.0, -f32::NAN, f32::NEG_INFINITY];
            let mut out = vec![vec![0.0; 4]; 13];
            all(isa, &mut out, &x, &[1.0, -1.0, 0.0, f32::INFINITY]);
            assert_eq!(bits(&out[11]), bits(&x.map(f32::abs)), "{isa}");
            let want = [-1.0, -1.0, -0.0, f32::NEG_INFINITY];
            assert_eq!(bits(&out[12]), bits(&want), "{isa}");
        }
    }
}
