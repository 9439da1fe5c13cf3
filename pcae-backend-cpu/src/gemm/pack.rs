//! Copies of operands in the order in which tiles read them.

use pcae_kernel::error::product;

use crate::isa::{Isa, Kernel};
use crate::simd::Simd;

use super::bf16::{Bf16Unit, PackRight};
use super::tile::Shape;
use super::{Left, Precision};

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
            width,
            inner,
        });
    }
}

/// Elements that [`pack_weight_bf16`] writes.
pub(crate) fn packed_len_bf16(isa: Isa, unit: Bf16Unit, n: usize, inner: usize) -> usize {
    let shape = Shape::of(isa, Precision::Bf16(unit), inner);
    product(&[n.div_ceil(shape.width), shape.panel()])
}

/// A weight, `[n, inner]`, in panels of pairs: whole ones, filled up with zeros.
pub(crate) fn pack_weight_bf16(
    isa: Isa,
    unit: Bf16Unit,
    to: &mut [f32],
    weight: &[f32],
    n: usize,
    inner: usize,
) {
    let shape = Shape::of(isa, Precision::Bf16(unit), inner);
    for (i, to) in to.chunks_exact_mut(shape.panel().max(1)).enumerate() {
        let col = i * shape.width;
        isa.run(PackRight {
            to,
            step: shape.width,
            words: shape.words,
            data: &weight[col * inner..],
            stride: 0,
            width: shape.width.min(n - col),
            inner,
        });
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

/// `to[i * step + j] = data[j * inner + i]` for `j < width`, zeros from there to `step`.
pub(super) struct PackColumns<'a> {
    pub(super) to: &'a mut [f32],
    pub(super) step: usize,
    pub(super) data: &'a [f32],
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
            width,
            inner,
        } = self;
        assert!(
            to.len() >= inner * step && data.len() >= width * inner && width <= step,
            "what is packed is as long as it says"
        );
        let (square_cols, square_rows) = (width - width % S::LANES, inner - inner % S::LANES);
        for j in (0..square_cols).step_by(S::LANES) {
            for i in (0..square_rows).step_by(S::LANES) {
                // SAFETY: a square of `LANES` by `LANES` within `to`, `[inner, step]`, and within `data`,
                // `[width, inner]`, whose lengths are checked above.
                unsafe {
                    let to = to.as_mut_ptr().add(i * step + j);
                    s.transpose(to, step, data.as_ptr().add(j * inner + i), inner);
                }
            }
        }
        for (j, column) in data.chunks_exact(inner.max(1)).take(width).enumerate() {
            let first = if j < square_cols { square_rows } else { 0 };
            for (i, x) in column.iter().enumerate().skip(first) {
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

/// `rows` rows of the left operand from row `first`, as tiles of `[inner, height]`, one after the other: the height is
/// [`Simd::ROWS`] but for the last.
pub(super) struct PackLeft<'a> {
    pub(super) to: &'a mut [f32],
    pub(super) left: Left<'a>,
    /// Rows of the whole operand.
    pub(super) m: usize,
    pub(super) first: usize,
    pub(super) rows: usize,
    pub(super) inner: usize,
}

impl Kernel for PackLeft<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.left {
            Left::Rows(data) => self.rows(s, data),
            Left::Columns(data) => self.columns::<S>(data),
        }
    }
}

impl PackLeft<'_> {
    #[inline(always)]
    fn rows<S: Simd>(self, s: S, data: &[f32]) {
        let Self {
            to,
            first,
            rows,
            inner,
            ..
        } = self;
        let data = &data[first * inner..][..rows * inner];
        let to = &mut to[..rows * inner];
        // Squares whose rows belong to full tiles.
        let square_rows = rows - rows % S::LANES.max(S::ROWS);
        let square_cols = inner - inner % S::LANES;
        let mut square = [0.0; 16 * 16];
        // Rows of a square that belong to the same tile.
        let piece = if S::ROWS < S::LANES {
            S::ROWS
        } else {
            S::LANES
        };
        for row in (0..square_rows).step_by(S::LANES) {
            for col in (0..square_cols).step_by(S::LANES) {
                // SAFETY: a square of `LANES` rows and columns within `data`; `square` holds the largest.
                unsafe {
                    let from = data.as_ptr().add(row * inner + col);
                    s.transpose(square.as_mut_ptr(), S::LANES, from, inner);
                }
                for (i, lanes) in square.chunks_exact(S::LANES).take(S::LANES).enumerate() {
                    for (p, from) in lanes.chunks_exact(piece).enumerate() {
                        let row = row + p * piece;
                        let (tile, at) = (row / S::ROWS, row % S::ROWS);
                        let start = tile * S::ROWS * inner + (col + i) * S::ROWS + at;
                        to[start..][..piece].copy_from_slice(from);
                    }
                }
            }
        }
        for (row, data) in data.chunks_exact(inner.max(1)).enumerate() {
            let (tile, at) = (row / S::ROWS, row % S::ROWS);
            let height = S::ROWS.min(rows - tile * S::ROWS);
            let tile = &mut to[tile * S::ROWS * inner..][..height * inner];
            let done = if row < square_rows { square_cols } else { 0 };
            for (to, x) in tile.chunks_exact_mut(height).zip(data).skip(done) {
                to[at] = *x;
            }
        }
    }

    #[inline(always)]
    fn columns<S: Simd>(self, data: &[f32]) {
        let Self {
            to,
            m,
            first,
            rows,
            inner,
            ..
        } = self;
        for i in 0..inner {
            let row = &data[i * m + first..][..rows];
            for (tile, from) in row.chunks(S::ROWS).enumerate() {
                let to = &mut to[tile * S::ROWS * inner + i * from.len()..];
                if from.len() == S::ROWS {
                    // A length that the compiler knows: no call.
                    to[..S::ROWS].copy_from_slice(&from[..S::ROWS]);
                } else {
                    to[..from.len()].copy_from_slice(from);
                }
            }
        }
    }
}
