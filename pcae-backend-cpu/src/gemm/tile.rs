//! The inner loop of a product: one tile, its sums in registers.

use super::Precision;
#[cfg(target_arch = "x86_64")]
use super::bf16::{Bf16Unit, Unit};
use crate::cpu::LINE;
use crate::isa::{Isa, Kernel};
use crate::simd::Simd;

/// Elements of the largest tile: of AMX.
pub(super) const MAX_ELEMENTS: usize = 32 * 32;

/// Sizes of the tiles and packed operands of a product.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    /// Rows of a full tile.
    pub(super) rows: usize,
    /// Rows of a tile are a multiple of it.
    pub(super) least_rows: usize,
    /// Columns of a full tile, and the width of a panel.
    pub(super) width: usize,
    /// Columns of one vector.
    pub(super) lanes: usize,
    /// The inner dimension in words of 32 bits, as packed.
    pub(super) words: usize,
}

impl Shape {
    pub(super) fn of(isa: Isa, precision: Precision, inner: usize) -> Self {
        let shape = isa.run(Ask);
        match precision {
            Precision::F32 => Self {
                words: inner,
                ..shape
            },
            #[cfg(target_arch = "x86_64")]
            Precision::Bf16(Bf16Unit(Unit::Amx(_))) => Self {
                rows: 32,
                least_rows: 16,
                width: 32,
                words: inner.div_ceil(2).next_multiple_of(16),
                ..shape
            },
            Precision::Bf16(_) => Self {
                words: inner.div_ceil(2),
                ..shape
            },
        }
    }

    /// Elements of a panel.
    pub(super) fn panel(&self) -> usize {
        self.words * self.width
    }
}

struct Ask;

impl Kernel for Ask {
    type Output = Shape;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> Shape {
        Shape {
            rows: S::ROWS,
            least_rows: 1,
            width: S::VECTORS * S::LANES,
            lanes: S::LANES,
            words: 0,
        }
    }
}

/// Cache lines of what is used next, one after the other: rows of `row_lines` lines, `stride` elements apart.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fetch {
    row: *const f32,
    line: usize,
    row_lines: usize,
    stride: usize,
}

impl Fetch {
    /// Rows of `len` elements from the front of `data`.
    pub(super) fn new(data: &[f32], len: usize, stride: usize) -> Self {
        Self {
            row: data.as_ptr(),
            line: 0,
            row_lines: len.div_ceil(LINE).max(1),
            stride,
        }
    }

    /// The next line. It may lie beyond the data; nothing is read there.
    #[inline(always)]
    pub(super) fn next(&mut self) -> *const f32 {
        let at = self.row.wrapping_add(self.line * LINE);
        self.line += 1;
        if self.line == self.row_lines {
            (self.row, self.line) = (self.row.wrapping_add(self.stride), 0);
        }
        at
    }
}

/// Asks for some lines at once.
pub(super) struct FetchLines<'a> {
    pub(super) fetch: &'a mut Fetch,
    pub(super) lines: usize,
}

impl Kernel for FetchLines<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for _ in 0..self.lines {
            s.prefetch(self.fetch.next());
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
    /// What is used next, and how many of its lines to ask for meanwhile.
    pub(super) fetch: &'a mut Fetch,
    pub(super) lines: usize,
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
        // A line every few rounds: many at once would hold up the loads of the product.
        let step = self
            .inner
            .checked_div(self.lines)
            .unwrap_or(self.inner)
            .max(1);
        let mut at = 0;
        while at < self.inner {
            if self.lines > 0 {
                s.prefetch(self.fetch.next());
            }
            let end = self.inner.min(at + step);
            for _ in at..end {
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
            at = end;
        }
        for (row, sums) in self.sums.chunks_exact_mut(width).zip(sums) {
            for (lanes, sum) in row.chunks_exact_mut(S::LANES).zip(sums) {
                s.store(lanes, sum);
            }
        }
    }
}
