//! The inner loop of a product: one tile, its sums in registers.

use super::Precision;
#[cfg(target_arch = "x86_64")]
use super::bf16::{Bf16Unit, Unit};
use crate::cpu::LINE;
use crate::isa::{Isa, Kernel};
use crate::simd::Simd;

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

/// Rows cut into tiles, as even as can be: the last is not a remainder, on which a tile of few rows would waste time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Strips {
    rows: usize,
    /// Tiles.
    pub(super) count: usize,
    /// Heights are multiples of it, but for the last.
    least: usize,
    /// Height of a tile in these, and how many tiles are one higher.
    each: usize,
    higher: usize,
}

impl Strips {
    pub(super) fn new(rows: usize, shape: &Shape) -> Self {
        let (count, units) = (rows.div_ceil(shape.rows), rows.div_ceil(shape.least_rows));
        Self {
            rows,
            count,
            least: shape.least_rows,
            each: units.checked_div(count).unwrap_or(0),
            higher: units.checked_rem(count).unwrap_or(0),
        }
    }

    /// First row of a tile; the end of the last for `tile == count`.
    #[inline(always)]
    pub(super) fn start(&self, tile: usize) -> usize {
        let start = tile * self.each + tile.min(self.higher);
        (start * self.least).min(self.rows)
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

/// Cache lines of `len` elements that begin on one.
pub(super) fn lines_of<T>(len: usize) -> usize {
    (len * size_of::<T>()).div_ceil(LINE * size_of::<f32>())
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
    pub(super) const NONE: Self = Self {
        row: core::ptr::null(),
        line: 0,
        row_lines: 1,
        stride: 0,
    };

    /// Rows of `len` elements from the front of `data`, `stride` apart.
    pub(super) fn new<T>(data: &[T], len: usize, stride: usize) -> Self {
        Self {
            row: data.as_ptr().cast(),
            line: 0,
            row_lines: lines_of::<T>(len).max(1),
            stride: stride * size_of::<T>() / size_of::<f32>(),
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

    /// The next lines as far as they lie one behind the other, at most `lines` of them, and their number.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub(super) fn run(&mut self, lines: usize) -> (*const f32, usize) {
        let at = self.row.wrapping_add(self.line * LINE);
        let count = lines.min(self.row_lines - self.line);
        self.line += count;
        if self.line == self.row_lines {
            (self.row, self.line) = (self.row.wrapping_add(self.stride), 0);
        }
        (at, count)
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

/// Rounds between two requests for what is used next.
const ROUNDS: usize = 8;
/// Rows of a panel that are on their way from the level-2 to the level-1 cache.
const AHEAD: usize = 16;

/// Rows of the left operand: element `i` of row `r` is `data[r * row + i * word]`. Packed ones have `row` 1.
#[derive(Clone, Copy)]
pub(super) struct Strip<'a> {
    pub(super) data: &'a [f32],
    pub(super) row: usize,
    pub(super) word: usize,
}

/// `sums = left @ right`, or `sums += left @ right`, for one tile.
pub(super) struct Tile<'a> {
    pub(super) inner: usize,
    pub(super) left: Strip<'a>,
    /// A panel: `[inner, width of a full tile]`.
    pub(super) right: &'a [f32],
    /// At most [`Simd::ROWS`].
    pub(super) rows: usize,
    /// Vectors that have columns, at most [`Simd::VECTORS`].
    pub(super) vectors: usize,
    /// Whether to add to what `sums` hold.
    pub(super) add: bool,
    /// What is used next, and how many of its lines to ask for meanwhile.
    pub(super) fetch: &'a mut Fetch,
    pub(super) lines: usize,
    /// `[rows, width of a full tile]`, of which `vectors` vectors of each row are written.
    pub(super) sums: &'a mut [f32],
}

impl Kernel for Tile<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Strip { data, row, word } = self.left;
        let last = self.rows.saturating_sub(1) * row + self.inner.saturating_sub(1) * word;
        assert!(
            self.rows > 0
                && (self.inner == 0 || data.len() > last)
                && match row {
                    1 => word == self.rows || self.inner <= 1,
                    _ => word == 1,
                }
                && self.right.len() >= self.inner * S::VECTORS * S::LANES
                && self.sums.len() >= self.rows * S::VECTORS * S::LANES,
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
            8 => self.packed_or_not::<S, 8, V>(s),
            7 => self.packed_or_not::<S, 7, V>(s),
            6 => self.packed_or_not::<S, 6, V>(s),
            5 => self.packed_or_not::<S, 5, V>(s),
            4 => self.packed_or_not::<S, 4, V>(s),
            3 => self.packed_or_not::<S, 3, V>(s),
            2 => self.packed_or_not::<S, 2, V>(s),
            _ => self.packed_or_not::<S, 1, V>(s),
        }
    }

    #[inline(always)]
    fn packed_or_not<S: Simd, const R: usize, const V: usize>(self, s: S) {
        match self.left.row {
            1 => self.with_rows::<S, R, V, true>(s),
            _ => self.with_rows::<S, R, V, false>(s),
        }
    }

    #[inline(always)]
    fn with_rows<S: Simd, const R: usize, const V: usize, const PACKED: bool>(self, s: S) {
        if R > S::ROWS || V > S::VECTORS {
            // No tile of this instruction set is as large; the code need not exist.
            return;
        }
        let width = S::VECTORS * S::LANES;
        let mut sums = [[s.splat(0.0); V]; R];
        if self.add {
            // Counted by constants: an iterator over the slice would keep the sums out of registers.
            for (r, sums) in sums.iter_mut().enumerate() {
                for (v, sum) in sums.iter_mut().enumerate() {
                    *sum = s.load(&self.sums[r * width + v * S::LANES..][..S::LANES]);
                }
            }
        }
        let left = self.left.data.as_ptr();
        let rows: [*const f32; R] =
            core::array::from_fn(|r| left.wrapping_add(if PACKED { r } else { r * self.left.row }));
        let (mut at, mut right) = (0, self.right.as_ptr());
        // Lines now and then: many at once would hold up the loads of the product.
        let parts = self.inner / ROUNDS;
        let each = self.lines.div_ceil(parts.max(1));
        let mut lines = self.lines;
        for _ in 0..parts {
            for _ in 0..each.min(lines) {
                s.prefetch(self.fetch.next());
            }
            lines = lines.saturating_sub(each);
            for _ in 0..ROUNDS {
                // SAFETY: `run` has checked the length of both operands for `inner` rounds, and there are no more.
                unsafe { round::<S, R, V, PACKED>(s, &mut sums, &rows, &mut at, &mut right) };
            }
        }
        for _ in parts * ROUNDS..self.inner {
            // SAFETY: as above.
            unsafe { round::<S, R, V, PACKED>(s, &mut sums, &rows, &mut at, &mut right) };
        }
        for (row, sums) in self.sums.chunks_exact_mut(width).zip(sums) {
            for (lanes, sum) in row.chunks_exact_mut(S::LANES).zip(sums) {
                s.store(lanes, sum);
            }
        }
    }
}

/// Adds one element of each of `R` rows times one row of a panel, and moves on to the next: element `at` of each row, the `R`th
/// behind the last one where they are packed.
///
/// # Safety
/// There are these rows.
#[inline(always)]
unsafe fn round<S: Simd, const R: usize, const V: usize, const PACKED: bool>(
    s: S,
    sums: &mut [[S::V; V]; R],
    rows: &[*const f32; R],
    at: &mut usize,
    right: &mut *const f32,
) {
    let width = S::VECTORS * S::LANES;
    for line in (0..V * S::LANES).step_by(LINE) {
        s.prefetch_near(right.wrapping_add(AHEAD * width + line));
    }
    // SAFETY: by contract; `V` vectors are at most the panel's width.
    unsafe {
        let vectors: [S::V; V] = core::array::from_fn(|v| s.load_at(right.add(v * S::LANES)));
        for (row, sums) in rows.iter().zip(sums) {
            let x = s.splat(*row.add(*at));
            for (sum, vector) in sums.iter_mut().zip(vectors) {
                *sum = s.mul_add(x, vector, *sum);
            }
        }
        *at += if PACKED { R } else { 1 };
        *right = right.add(width);
    }
}
