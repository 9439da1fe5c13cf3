//! The inner loop of a product: one tile, its sums in registers.

use crate::isa::{Isa, Kernel};
use crate::simd::Simd;

/// Elements of the largest tile of any instruction set.
pub(super) const MAX_ELEMENTS: usize = 8 * 48;

/// Size of the tiles of an instruction set.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// Rows of a full tile.
    pub(super) rows: usize,
    /// Columns of a full tile, and the width of a panel.
    pub(crate) width: usize,
    /// Columns of one vector.
    pub(super) lanes: usize,
}

impl Shape {
    pub(crate) fn of(isa: Isa) -> Self {
        isa.run(Ask)
    }
}

struct Ask;

impl Kernel for Ask {
    type Output = Shape;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> Shape {
        Shape {
            rows: S::ROWS,
            width: S::VECTORS * S::LANES,
            lanes: S::LANES,
        }
    }
}

/// `sums = left @ right` for one tile.
pub(super) struct Tile<'a> {
    pub(super) inner: usize,
    /// `[inner, rows]`
    pub(super) left: &'a [f32],
    /// A panel: `[inner, width of a full tile]`.
    pub(super) right: &'a [f32],
    /// At most [`Simd::ROWS`].
    pub(super) rows: usize,
    /// Vectors that have columns, at most [`Simd::VECTORS`].
    pub(super) vectors: usize,
    /// `[rows, width of a full tile]`, of which `vectors` vectors of each row are written.
    pub(super) sums: &'a mut [f32; MAX_ELEMENTS],
}

impl Kernel for Tile<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        assert!(
            self.left.len() >= self.rows * self.inner
                && self.right.len() >= self.inner * S::VECTORS * S::LANES
                && self.rows * S::VECTORS * S::LANES <= MAX_ELEMENTS,
            "the operands of a tile are as long as it says"
        );
        match self.vectors {
            3 => self.with_vectors::<S, 3>(s),
            2 => self.with_vectors::<S, 2>(s),
            _ => self.with_vectors::<S, 1>(s),
        }
    }
}

impl Tile<'_> {
    #[inline(always)]
    fn with_vectors<S: Simd, const V: usize>(self, s: S) {
        match self.rows {
            8 => self.with_rows::<S, 8, V>(s),
            7 => self.with_rows::<S, 7, V>(s),
            6 => self.with_rows::<S, 6, V>(s),
            5 => self.with_rows::<S, 5, V>(s),
            4 => self.with_rows::<S, 4, V>(s),
            3 => self.with_rows::<S, 3, V>(s),
            2 => self.with_rows::<S, 2, V>(s),
            _ => self.with_rows::<S, 1, V>(s),
        }
    }

    #[inline(always)]
    fn with_rows<S: Simd, const R: usize, const V: usize>(self, s: S) {
        if R > S::ROWS || V > S::VECTORS {
            // No tile of this instruction set is as large; the code need not exist.
            return;
        }
        let width = S::VECTORS * S::LANES;
        let mut sums = [[s.splat(0.0); V]; R];
        let (mut left, mut right) = (self.left.as_ptr(), self.right.as_ptr());
        for _ in 0..self.inner {
            // SAFETY: row `i` of the panel has `width >= V * LANES` elements and `R` is `rows`; `run` has checked the
            // length of both operands.
            unsafe {
                let vectors: [S::V; V] =
                    core::array::from_fn(|v| s.load_at(right.add(v * S::LANES)));
                for (r, sums) in sums.iter_mut().enumerate() {
                    let x = s.splat(*left.add(r));
                    for (sum, vector) in sums.iter_mut().zip(vectors) {
                        *sum = s.mul_add(x, vector, *sum);
                    }
                }
                left = left.add(R);
                right = right.add(width);
            }
        }
        for (row, sums) in self.sums.chunks_exact_mut(width).zip(sums) {
            for (lanes, sum) in row.chunks_exact_mut(S::LANES).zip(sums) {
                s.store(lanes, sum);
            }
        }
    }
}
