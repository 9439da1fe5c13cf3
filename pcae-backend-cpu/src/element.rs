//! What numbers are in memory: f32, or bf16 that is widened as it is loaded and rounded as it is stored.

use crate::simd::Simd;

/// bf16: the upper half of an f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct Bf16(pub(crate) u16);

impl Bf16 {
    /// The same number.
    pub(crate) const fn widened(self) -> f32 {
        f32::from_bits((self.0 as u32) << 16)
    }
}

/// A number in memory. Vectors of it are f32.
pub(crate) trait Element: Copy + Send + Sync {
    /// `x` itself where it is f32.
    fn as_f32(x: &[Self]) -> Option<&[f32]>;

    /// The first lanes from `x`, up to its length; zeros in the rest.
    fn load<S: Simd>(s: S, x: &[Self]) -> S::V;

    /// The first lanes to `to`, up to its length; to bf16 they are rounded, to nearest and ties to even.
    fn store<S: Simd>(s: S, to: &mut [Self], v: S::V);

    /// [`Element::store`] past the caches where that can be, as [`Simd::stream`].
    fn stream<S: Simd>(s: S, to: &mut [Self], v: S::V);

    /// A vector of words, each of two neighbours in bf16, the first in the lower half; zeros beyond the end of `x`.
    fn words<S: Simd>(s: S, x: &[Self]) -> S::V;
}

impl Element for f32 {
    #[inline(always)]
    fn as_f32(x: &[Self]) -> Option<&[f32]> {
        Some(x)
    }

    #[inline(always)]
    fn load<S: Simd>(s: S, x: &[Self]) -> S::V {
        s.load(x)
    }

    #[inline(always)]
    fn store<S: Simd>(s: S, to: &mut [Self], v: S::V) {
        s.store(to, v);
    }

    #[inline(always)]
    fn stream<S: Simd>(s: S, to: &mut [Self], v: S::V) {
        s.stream(to, v);
    }

    #[inline(always)]
    fn words<S: Simd>(s: S, x: &[Self]) -> S::V {
        s.neighbours_bf16(s.load(x), s.load(&x[S::LANES.min(x.len())..]))
    }
}

impl Element for Bf16 {
    #[inline(always)]
    fn as_f32(_: &[Self]) -> Option<&[f32]> {
        None
    }

    #[inline(always)]
    fn load<S: Simd>(s: S, x: &[Self]) -> S::V {
        s.load_bf16(x)
    }

    #[inline(always)]
    fn store<S: Simd>(s: S, to: &mut [Self], v: S::V) {
        s.store_bf16(to, v);
    }

    #[inline(always)]
    fn stream<S: Simd>(s: S, to: &mut [Self], v: S::V) {
        s.stream_bf16(to, v);
    }

    #[inline(always)]
    fn words<S: Simd>(s: S, x: &[Self]) -> S::V {
        s.load_words(x)
    }
}
