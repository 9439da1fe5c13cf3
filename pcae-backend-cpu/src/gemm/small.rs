//! Products of bf16 that one thread does alone, in its caches: what attention needs of a head.

use core::ops::Range;

use crate::element::Element;
use crate::isa::{Isa, Kernel};
use crate::simd::Simd;

use super::bf16::{Bf16Unit, PackLeft, PackRight, Turned};
use super::tile::{Fetch, Shape, Strip, Strips};
use super::{Left, Precision, Tiles};

/// `[rows, inner] @ [inner, width]` for any `rows` and `width`.
pub(crate) struct SmallProduct {
    isa: Isa,
    unit: Bf16Unit,
    shape: Shape,
    inner: usize,
}

/// The units' registers, ready on this thread for its products.
pub(crate) struct Ready(Tiles);

impl Ready {
    pub(crate) fn new(isa: Isa, unit: Bf16Unit) -> Self {
        Self(Tiles::new(isa, Precision::Bf16(unit)))
    }
}

impl SmallProduct {
    pub(crate) fn new(isa: Isa, unit: Bf16Unit, inner: usize) -> Self {
        Self {
            isa,
            unit,
            shape: Shape::of(isa, Precision::Bf16(unit), inner),
            inner,
        }
    }

    /// Rows of a tile.
    pub(crate) fn tile_rows(&self) -> usize {
        self.shape.rows
    }

    /// Elements of a tile's sums.
    pub(crate) fn tile_len(&self) -> usize {
        self.shape.rows * self.shape.width
    }

    /// Elements of the packed left operand.
    pub(crate) fn left_len(&self, rows: usize) -> usize {
        rows.next_multiple_of(self.shape.least_rows) * self.shape.words
    }

    /// Elements of the packed right operand.
    pub(crate) fn right_len(&self, width: usize) -> usize {
        width.div_ceil(self.shape.width) * self.shape.panel()
    }

    /// Packs the left operand, rows that are `stride` apart.
    pub(crate) fn pack_left<T: Element>(
        &self,
        to: &mut [f32],
        data: &[T],
        stride: usize,
        rows: usize,
    ) {
        let strips = Strips::new(rows, &self.shape);
        self.isa.run(PackLeft {
            to,
            sums: None,
            words: self.shape.words,
            squares: self.unit.wants_squares(),
            left: Left::Rows(data),
            stride,
            first: 0,
            strips,
            tiles: 0..strips.count,
            inner: self.inner,
        });
    }

    /// Packs the right operand, rows that are `stride` apart.
    pub(crate) fn pack_rows<T: Element>(
        &self,
        to: &mut [f32],
        data: &[T],
        stride: usize,
        width: usize,
    ) {
        self.pack_right(to, width, stride, |columns| {
            Turned::Rows(&data[columns.start..])
        });
    }

    /// Packs the right operand, which comes transposed: columns that are `stride` apart.
    pub(crate) fn pack_columns<T: Element>(
        &self,
        to: &mut [f32],
        data: &[T],
        stride: usize,
        width: usize,
    ) {
        self.pack_right(to, width, stride, |columns| {
            Turned::Columns(&data[columns.start * stride..])
        });
    }

    fn pack_right<'a, T: Element + 'a>(
        &self,
        to: &mut [f32],
        width: usize,
        stride: usize,
        data: impl Fn(&Range<usize>) -> Turned<'a, T>,
    ) {
        for (i, to) in to.chunks_exact_mut(self.shape.panel().max(1)).enumerate() {
            let columns = self.columns(i, width);
            if columns.is_empty() {
                break;
            }
            self.isa.run(PackRight {
                to,
                step: self.shape.width,
                words: self.shape.words,
                data: data(&columns),
                stride,
                width: columns.len(),
                inner: self.inner,
                streamed: false,
            });
        }
    }

    /// The columns of a panel.
    fn columns(&self, panel: usize, width: usize) -> Range<usize> {
        let step = self.shape.width;
        (panel * step).min(width)..((panel + 1) * step).min(width)
    }

    /// The product of packed operands, to rows of `out` that are `step` apart. `sums` is the place of one tile.
    pub(crate) fn run(
        &self,
        ready: &Ready,
        left: &[f32],
        right: &[f32],
        rows: usize,
        width: usize,
        sums: &mut [f32],
        out: &mut [f32],
        step: usize,
    ) {
        let shape = &self.shape;
        let (strips, mut nothing) = (Strips::new(rows, shape), Fetch::NONE);
        for (i, panel) in right.chunks_exact(shape.panel().max(1)).enumerate() {
            let columns = self.columns(i, width);
            if columns.is_empty() {
                break;
            }
            for strip in 0..strips.count {
                let (row, end) = (strips.start(strip), strips.start(strip + 1));
                let height = (end - row).next_multiple_of(shape.least_rows);
                ready.0.sum(
                    shape,
                    Strip {
                        data: &left[row * shape.words..][..height * shape.words],
                        row: 1,
                        word: height,
                    },
                    panel,
                    &(0..shape.words),
                    height,
                    columns.len(),
                    &mut nothing,
                    0,
                    sums,
                );
                self.isa.run(CopyTile {
                    to: &mut out[row * step + columns.start..],
                    step,
                    rows: end - row,
                    len: columns.len(),
                    sums,
                    width: shape.width,
                });
            }
        }
    }
}

/// The first `len` columns of a tile's rows, `width` apart, to rows that are `step` apart.
struct CopyTile<'a> {
    to: &'a mut [f32],
    step: usize,
    rows: usize,
    len: usize,
    sums: &'a [f32],
    width: usize,
}

impl Kernel for CopyTile<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let rows = self.sums.chunks_exact(self.width).take(self.rows);
        for (row, sums) in rows.enumerate() {
            let to = &mut self.to[row * self.step..][..self.len];
            for (to, sums) in to.chunks_mut(S::LANES).zip(sums.chunks_exact(S::LANES)) {
                s.store(to, s.load(sums));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::bf16::rounded;
    use super::*;

    #[test]
    fn products_match_the_exact_ones_of_rounded_operands() {
        let value = |i: usize| (i as u64 * 2_654_435_761 % 1009) as f32 / 504.5 - 1.0;
        for isa in Isa::available() {
            for unit in Bf16Unit::available(isa) {
                for (rows, width, inner) in [(1, 1, 1), (20, 33, 31), (50, 64, 64), (7, 130, 257)] {
                    let product = SmallProduct::new(isa, unit, inner);
                    // Rows lie farther apart than they are long, as those of one head do.
                    let (left_step, right_step) = (inner + 5, width.max(inner) + 3);
                    let left: Vec<f32> = (0..rows * left_step).map(value).collect();
                    let right: Vec<f32> = (0..right_step * right_step).map(value).collect();
                    let mut packed_left = vec![f32::NAN; product.left_len(rows)];
                    let mut packed_right = vec![f32::NAN; product.right_len(width)];
                    let mut sums = vec![f32::NAN; product.tile_len()];
                    product.pack_left(&mut packed_left, &left, left_step, rows);
                    for turned in [false, true] {
                        match turned {
                            false => {
                                product.pack_rows(&mut packed_right, &right, right_step, width)
                            }
                            true => {
                                product.pack_columns(&mut packed_right, &right, right_step, width)
                            }
                        }
                        let step = width + 2;
                        let mut out = vec![7.0; rows * step];
                        product.run(
                            &Ready::new(isa, unit),
                            &packed_left,
                            &packed_right,
                            rows,
                            width,
                            &mut sums,
                            &mut out,
                            step,
                        );
                        for (at, got) in out.iter().enumerate() {
                            let (i, j) = (at / step, at % step);
                            if j >= width {
                                assert_eq!(*got, 7.0, "{isa} {unit}: beyond the product");
                                continue;
                            }
                            let want: f64 = (0..inner)
                                .map(|l| {
                                    let place = match turned {
                                        false => l * right_step + j,
                                        true => j * right_step + l,
                                    };
                                    f64::from(rounded(left[i * left_step + l]))
                                        * f64::from(rounded(right[place]))
                                })
                                .sum();
                            // Exact products of numbers below 1, whose sum is rounded at each.
                            let bound = (inner + 3) as f64 * f64::from(f32::EPSILON) * 2.0;
                            assert!(
                                (f64::from(*got) - want).abs() <= bound,
                                "{isa} {unit} {i} {j}: {got} {want}"
                            );
                        }
                    }
                }
            }
        }
    }
}
