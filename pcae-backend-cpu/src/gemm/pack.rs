//! Copies of operands in the order in which tiles read them.

use core::ops::Range;

use pcae_kernel::error::product;
use pcae_kernel::sizing::Role;

use crate::cpu::LINE;
use crate::element::Element;
use crate::isa::{Isa, Kernel};
use crate::simd::Simd;
use crate::threads::Shared;

use super::bf16::{Bf16Unit, PackRight, Turned};
use super::finish::Flush;
use super::tile::{Shape, Strips};
use super::{Left, PACKED_ROWS, Precision};

/// Puts a weight, `[n, inner]`, in panels in place: panel after panel of `width` columns, each `[inner, width]`, the last
/// one as narrow as what is left. `copy` is as long as the weight.
pub(crate) fn pack_weight(isa: Isa, weight: &mut [f32], copy: &mut [f32], n: usize, inner: usize) {
    copy.copy_from_slice(weight);
    let step = Shape::of(isa, Precision::F32, inner).width;
    for col in (0..n).step_by(step) {
        let width = step.min(n - col);
        let range = col * inner..(col + width) * inner;
        isa.run(PackColumns {
            to: &mut weight[range.clone()],
            step: width,
            data: &copy[range],
            stride: inner,
            width,
            inner,
        });
    }
}

/// Elements of a weight's pairs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PairsLen {
    /// Of the forward's panels, `x @ weight^T`.
    pub(crate) forward: usize,
    /// Of the backward's, `d_y @ weight`: none but of what is trained.
    pub(crate) backward: usize,
}

impl PairsLen {
    pub(crate) fn total(self) -> usize {
        self.forward.saturating_add(self.backward)
    }
}

/// Elements that [`WeightPairs`] writes of a weight, `[n, inner]`.
pub(crate) fn pairs_len(isa: Isa, unit: Bf16Unit, n: usize, inner: usize, role: Role) -> PairsLen {
    let len = |n: usize, inner| {
        let shape = Shape::of(isa, Precision::Bf16(unit), inner);
        product(&[n.div_ceil(shape.width), shape.panel()])
    };
    PairsLen {
        forward: len(n, inner),
        backward: match role {
            Role::Trained => len(inner, n),
            Role::Teacher | Role::Frozen => 0,
        },
    }
}

/// The place of a weight, `[n, inner]`, in pairs: whole panels, filled up with zeros, of the product of its forward, and behind
/// them, if there is room, of the one of its backward. Written some rows at a time.
pub(crate) struct WeightPairs<'a> {
    isa: Isa,
    n: usize,
    inner: usize,
    forward: Shape,
    backward: Shape,
    len: PairsLen,
    streamed: bool,
    to: Shared<'a>,
}

impl<'a> WeightPairs<'a> {
    /// In the front of `to`; past the caches if `streamed`.
    pub(crate) fn new(
        isa: Isa,
        unit: Bf16Unit,
        [n, inner]: [usize; 2],
        role: Role,
        streamed: bool,
        to: &'a mut [f32],
    ) -> Self {
        let precision = Precision::Bf16(unit);
        Self {
            isa,
            n,
            inner,
            forward: Shape::of(isa, precision, inner),
            backward: Shape::of(isa, precision, n),
            len: pairs_len(isa, unit, n, inner, role),
            streamed,
            to: Shared::new(to),
        }
    }

    /// What the first of some rows is a multiple of.
    pub(crate) fn step(&self) -> usize {
        self.forward.width
    }

    /// Packs the rows `rows` from row `first` on.
    ///
    /// # Safety
    /// `first` is a multiple of [`step`](Self::step), and so is their number unless they are the last; no other thread packs one of
    /// them meanwhile.
    pub(crate) unsafe fn pack(&self, first: usize, rows: &[f32]) {
        let step = self.step();
        debug_assert!(
            first.is_multiple_of(step) && step.is_multiple_of(2),
            "rows are whole panels, and words are of one of them"
        );
        let Self { isa, inner, .. } = *self;
        let shape = &self.forward;
        let count = rows.len() / inner.max(1);
        for row in (0..count).step_by(shape.width) {
            // SAFETY: the panel of these rows, by contract.
            let to = unsafe {
                let at = (first + row) / shape.width * shape.panel();
                self.to.part(at, shape.panel())
            };
            isa.run(PackRight {
                to,
                step: shape.width,
                words: shape.words,
                data: Turned::Columns(&rows[row * inner..]),
                stride: inner,
                width: shape.width.min(count - row),
                inner,
                streamed: self.streamed,
            });
        }
        if self.len.backward == 0 {
            isa.run(Flush);
            return;
        }
        let shape = &self.backward;
        // The width of a panel is even in every instruction set, so that no word belongs to two units of rows.
        let start = first / 2;
        let words = match first + count == self.n {
            true => shape.words - start,
            false => count / 2,
        };
        for (panel, col) in (0..inner).step_by(shape.width).enumerate() {
            // SAFETY: these rows' words of a panel, by contract.
            let to = unsafe {
                let at = self.len.forward + panel * shape.panel() + start * shape.width;
                self.to.part(at, words * shape.width)
            };
            isa.run(PackRight {
                to,
                step: shape.width,
                words,
                data: Turned::Rows(&rows[col..]),
                stride: inner,
                width: shape.width.min(inner - col),
                inner: count,
                streamed: self.streamed,
            });
        }
        isa.run(Flush);
    }
}

/// `to[i * step + j] = data[i * stride + j]` for `j < width`, zeros from there to `step`.
pub(super) struct PackRows<'a> {
    pub(super) to: &'a mut [f32],
    pub(super) step: usize,
    pub(super) data: &'a [f32],
    pub(super) stride: usize,
    pub(super) width: usize,
    pub(super) inner: usize,
}

impl Kernel for PackRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let rows = self.to.chunks_exact_mut(self.step).take(self.inner);
        if self.width == S::VECTORS * S::LANES && self.step == self.width {
            // The length is known to the compiler: whole vectors, no call.
            for (i, to) in rows.enumerate() {
                to.copy_from_slice(&self.data[i * self.stride..][..S::VECTORS * S::LANES]);
            }
        } else {
            for (i, to) in rows.enumerate() {
                let (columns, rest) = to.split_at_mut(self.width);
                columns.copy_from_slice(&self.data[i * self.stride..][..self.width]);
                rest.fill(0.0);
            }
        }
    }
}

/// `to[i * step + j] = data[j * stride + i]` for `i < inner` and `j < width`, zeros from there to `step`.
pub(super) struct PackColumns<'a> {
    pub(super) to: &'a mut [f32],
    pub(super) step: usize,
    pub(super) data: &'a [f32],
    pub(super) stride: usize,
    pub(super) width: usize,
    pub(super) inner: usize,
}

impl Kernel for PackColumns<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self {
            to,
            step,
            data,
            stride,
            width,
            inner,
        } = self;
        let end = width.saturating_sub(1) * stride + inner;
        assert!(
            to.len() >= inner * step && data.len() >= end && inner <= stride && width <= step,
            "what is packed is as long as it says"
        );
        let (square_cols, square_rows) = (width - width % S::LANES, inner - inner % S::LANES);
        for j in (0..square_cols).step_by(S::LANES) {
            for i in (0..square_rows).step_by(S::LANES) {
                // SAFETY: a square of `LANES` by `LANES` within `to`, `[inner, step]`, and within the columns of
                // `data`, whose lengths are checked above.
                unsafe {
                    let to = to.as_mut_ptr().add(i * step + j);
                    s.transpose(to, step, data.as_ptr().add(j * stride + i), stride);
                }
            }
        }
        for (j, column) in data.chunks(stride.max(1)).take(width).enumerate() {
            let first = if j < square_cols { square_rows } else { 0 };
            for (i, x) in column[..inner].iter().enumerate().skip(first) {
                to[i * step + j] = *x;
            }
        }
        if width < step {
            for to in to.chunks_exact_mut(step).take(inner) {
                to[width..].fill(0.0);
            }
        }
    }
}

/// Tiles of the left operand, each `[inner, height]`, one after the other.
pub(super) struct PackLeft<'a> {
    /// The place of these tiles.
    pub(super) to: &'a mut [f32],
    /// Of these tiles' rows, at most [`PACKED_ROWS`]: what their sums are added to, where the operand comes transposed.
    pub(super) sums: Option<&'a mut [f32]>,
    pub(super) left: Left<&'a [f32]>,
    /// Rows of the whole operand.
    pub(super) m: usize,
    /// Row of the operand that is row 0 of `strips`.
    pub(super) first: usize,
    pub(super) strips: Strips,
    pub(super) tiles: Range<usize>,
    pub(super) inner: usize,
}

impl Kernel for PackLeft<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let start = self.strips.start(self.tiles.start);
        let end = self.strips.start(self.tiles.end);
        let len = self.m * self.inner;
        let (Left::Rows(data) | Left::Columns(data)) = self.left;
        assert!(
            data.len() >= len
                && self.first + end <= self.m
                && self.to.len() >= (end - start) * self.inner,
            "what is packed is as long as it says"
        );
        match self.left {
            Left::Rows(data) => self.rows(s, &data[..len], start),
            Left::Columns(data) => self.columns(s, &data[..len], start),
        }
    }
}

/// Rows of a transposed operand that are on their way from memory while one is packed.
const AHEAD: usize = 16;

impl PackLeft<'_> {
    #[inline(always)]
    fn rows<S: Simd>(self, s: S, data: &[f32], start: usize) {
        for tile in self.tiles {
            let (row, end) = (self.strips.start(tile), self.strips.start(tile + 1));
            let height = end - row;
            let to = &mut self.to[(row - start) * self.inner..][..height * self.inner];
            let data = &data[(self.first + row) * self.inner..];
            let by_squares = self.inner - self.inner % S::LANES;
            for col in (0..by_squares).step_by(S::LANES) {
                let to = &mut to[col * height..][..S::LANES * height];
                if height == S::ROWS {
                    // SAFETY: `LANES` columns within `inner` of `ROWS` rows, and as many elements of `to`.
                    unsafe {
                        s.transpose_rows(to.as_mut_ptr(), data.as_ptr().add(col), self.inner)
                    };
                    continue;
                }
                for (i, row) in data.chunks_exact(self.inner).take(height).enumerate() {
                    let line = &row[col..][..S::LANES];
                    for (to, x) in to.chunks_exact_mut(height).zip(line) {
                        to[i] = *x;
                    }
                }
            }
            for (i, data) in data
                .chunks_exact(self.inner.max(1))
                .take(height)
                .enumerate()
            {
                for (to, x) in to.chunks_exact_mut(height).zip(data).skip(by_squares) {
                    to[i] = *x;
                }
            }
        }
    }

    #[inline(always)]
    fn columns<S: Simd>(self, s: S, data: &[f32], start: usize) {
        let (first, last) = (self.tiles.start, self.tiles.end);
        let columns = self.first + start..self.first + self.strips.start(last);
        let full = columns.len() == (last - first) * S::ROWS;
        let mut sums = RowSums::default();
        for i in 0..self.inner {
            // The next lines lie a row of the operand away each, out of sight of the processor's own fetching.
            let ahead = (i + AHEAD) * self.m;
            for line in columns.clone().step_by(LINE) {
                s.prefetch_near(data.as_ptr().wrapping_add(ahead + line));
            }
            if self.sums.is_some() {
                sums.add(s, i, &data[i * self.m + columns.start..][..columns.len()]);
            }
            if full {
                let from = &data[i * self.m + columns.start..][..columns.len()];
                for (tile, from) in from.chunks_exact(S::ROWS).enumerate() {
                    // SAFETY: row `i` of this tile, as `run` has checked the length of all; a row has `ROWS` elements.
                    unsafe {
                        let to = self.to.as_mut_ptr().add((tile * self.inner + i) * S::ROWS);
                        core::ptr::copy_nonoverlapping(from.as_ptr(), to, S::ROWS);
                    }
                }
                continue;
            }
            for tile in first..last {
                let (row, end) = (self.strips.start(tile), self.strips.start(tile + 1));
                let to = &mut self.to[(row - start) * self.inner + i * (end - row)..][..end - row];
                let from = &data[i * self.m + self.first + row..][..end - row];
                for (to, from) in to.chunks_mut(S::LANES).zip(from.chunks(S::LANES)) {
                    s.store(to, s.load(from));
                }
            }
        }
        if let Some(to) = self.sums {
            sums.finish(s, to);
        }
    }
}

/// Elements of a group.
const GROUP: usize = 32;

/// Sums of at most [`PACKED_ROWS`] columns, by groups: one long sum of f32 would lose more.
pub(super) struct RowSums {
    group: [f32; PACKED_ROWS],
    all: [f32; PACKED_ROWS],
}

impl Default for RowSums {
    fn default() -> Self {
        Self {
            group: [0.0; PACKED_ROWS],
            all: [0.0; PACKED_ROWS],
        }
    }
}

impl RowSums {
    /// Element `i` of each.
    #[inline(always)]
    pub(super) fn add<S: Simd, T: Element>(&mut self, s: S, i: usize, line: &[T]) {
        if i.is_multiple_of(GROUP) {
            self.end_group(s);
        }
        let lanes = self.group.chunks_exact_mut(S::LANES);
        for (sum, x) in lanes.zip(line.chunks(S::LANES)) {
            s.store(sum, s.add(s.load(sum), T::load(s, x)));
        }
    }

    #[inline(always)]
    fn end_group<S: Simd>(&mut self, s: S) {
        let all = self.all.chunks_exact_mut(S::LANES);
        for (all, group) in all.zip(self.group.chunks_exact_mut(S::LANES)) {
            s.store(all, s.add(s.load(all), s.load(group)));
            s.store(group, s.splat(0.0));
        }
    }

    #[inline(always)]
    pub(super) fn finish<S: Simd>(mut self, s: S, to: &mut [f32]) {
        self.end_group(s);
        for (to, sum) in to.chunks_mut(S::LANES).zip(self.all.chunks_exact(S::LANES)) {
            s.store(to, s.add(s.load(to), s.load(sum)));
        }
    }
}
