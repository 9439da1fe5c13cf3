//! What attention does with the rows of one head: copies, transposition, small products, softmax.

use crate::cpu::LINE;
use crate::element::Element;
use crate::isa::Kernel;
use crate::rows;
use crate::simd::Simd;
use crate::threads::Shared;

/// Rows of a tile of [`Multiply`].
pub(super) const TILE: usize = 6;

/// Lanes of a vector.
pub(super) struct Lanes;

impl Kernel for Lanes {
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> usize {
        S::LANES
    }
}

/// `rows` rows of `len` elements, `stride` apart.
#[derive(Clone, Copy)]
pub(super) struct Columns<'a, T> {
    pub(super) data: &'a [T],
    pub(super) stride: usize,
    pub(super) rows: usize,
    pub(super) len: usize,
}

impl<T> Columns<'_, T> {
    #[inline(always)]
    fn row(&self, row: usize) -> &[T] {
        &self.data[row * self.stride..][..self.len]
    }
}

/// Asks for the cache lines of `rows` rows of `len` elements, `stride` apart.
pub(super) struct FetchRows<T> {
    pub(super) start: *const T,
    pub(super) stride: usize,
    pub(super) rows: usize,
    pub(super) len: usize,
}

impl<T> Kernel for FetchRows<T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for row in 0..self.rows {
            for line in (0..self.len).step_by(LINE * size_of::<f32>() / size_of::<T>()) {
                s.prefetch(self.start.wrapping_add(row * self.stride + line).cast());
            }
        }
    }
}

/// `to: [rows, width]`, zeros beyond the elements of a row.
pub(super) struct Copy<'a, T> {
    pub(super) to: &'a mut [f32],
    pub(super) width: usize,
    pub(super) from: Columns<'a, T>,
}

impl<T: Element> Kernel for Copy<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (row, to) in self.to.chunks_exact_mut(self.width).enumerate() {
            let from = self.from.row(row).chunks(S::LANES);
            for (to, from) in to.chunks_exact_mut(S::LANES).zip(from) {
                s.store(to, T::load(s, from));
            }
        }
    }
}

/// Copies the first `len` elements of each row of `from`, `[rows, width]`, to `to`, the rows `stride` apart there, each
/// divided by its divisor. Who makes one promises that nobody else uses these elements.
pub(super) struct Put<'a, T> {
    pub(super) to: Shared<'a, T>,
    pub(super) start: usize,
    pub(super) stride: usize,
    pub(super) len: usize,
    pub(super) from: &'a [f32],
    pub(super) width: usize,
    pub(super) divisors: Option<&'a [f32]>,
}

impl<T: Element> Kernel for Put<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (row, from) in self.from.chunks_exact(self.width).enumerate() {
            // SAFETY: promised by who made this.
            let to = unsafe { self.to.part(self.start + row * self.stride, self.len) };
            let factor = s.splat(self.divisors.map_or(1.0, |divisors| 1.0 / divisors[row]));
            for (to, from) in to.chunks_mut(S::LANES).zip(from.chunks_exact(S::LANES)) {
                T::store(s, to, s.mul(factor, s.load(from)));
            }
        }
    }
}

/// `to: [len, width]`, zeros beyond the rows.
pub(super) struct Transpose<'a, T> {
    pub(super) to: &'a mut [f32],
    pub(super) width: usize,
    pub(super) from: Columns<'a, T>,
}

impl<T: Element> Kernel for Transpose<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { to, width, from } = self;
        let Columns { rows, len, .. } = from;
        let (mut square, mut turned) = ([0.0; 16 * 16], [0.0; 16 * 16]);
        for row in (0..width).step_by(S::LANES) {
            for col in (0..len).step_by(S::LANES) {
                if row + S::LANES <= rows
                    && col + S::LANES <= len
                    && let Some(data) = T::as_f32(from.data)
                {
                    let _ = from.row(row + S::LANES - 1);
                    assert!(to.len() >= (col + S::LANES - 1) * width + row + S::LANES);
                    // SAFETY: a square within the rows, the last of which is there, and within `to`.
                    unsafe {
                        let from_at = data.as_ptr().add(row * from.stride + col);
                        s.transpose(
                            to.as_mut_ptr().add(col * width + row),
                            width,
                            from_at,
                            from.stride,
                        );
                    }
                    continue;
                }
                // Widened, or with zeros in rows and columns that are not there.
                for (i, line) in square.chunks_exact_mut(S::LANES).take(S::LANES).enumerate() {
                    let lanes = if row + i < rows {
                        let from = &from.row(row + i)[col..];
                        T::load(s, from)
                    } else {
                        s.splat(0.0)
                    };
                    s.store(line, lanes);
                }
                // SAFETY: both hold the squares of the longest vectors, of 16 lanes.
                unsafe { s.transpose(turned.as_mut_ptr(), S::LANES, square.as_ptr(), S::LANES) };
                let lines = turned.chunks_exact(S::LANES);
                for (to, line) in to[col * width..]
                    .chunks_exact_mut(width)
                    .take(len - col)
                    .zip(lines.take(S::LANES))
                {
                    s.store(&mut to[row..][..S::LANES], s.load(line));
                }
            }
        }
    }
}

/// The left operand of [`Multiply`]: element `(row, i)` at `data[row * row_step + i * step]`.
#[derive(Clone, Copy)]
pub(super) struct Left<'a> {
    pub(super) data: &'a [f32],
    pub(super) row_step: usize,
    pub(super) step: usize,
}

impl<'a> Left<'a> {
    /// Rows, `stride` apart.
    pub(super) fn rows(data: &'a [f32], stride: usize) -> Self {
        Self {
            data,
            row_step: stride,
            step: 1,
        }
    }

    /// Columns of rows that are `stride` apart.
    pub(super) fn columns(data: &'a [f32], stride: usize) -> Self {
        Self {
            data,
            row_step: 1,
            step: stride,
        }
    }
}

/// `out = left @ right`, or `out += left @ right` where `add` is set: `[rows, inner] @ [inner, width]`, `width` a
/// multiple of the lanes. Each element adds its products in ascending order of the inner index.
pub(super) struct Multiply<'a> {
    pub(super) out: &'a mut [f32],
    pub(super) rows: usize,
    pub(super) width: usize,
    pub(super) inner: usize,
    pub(super) left: Left<'a>,
    /// `[inner, width]`, the rows `right_step` apart.
    pub(super) right: &'a [f32],
    pub(super) right_step: usize,
    pub(super) add: bool,
}

impl Kernel for Multiply<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let Self {
            rows,
            width,
            inner,
            left,
            ..
        } = self;
        let last = rows.saturating_sub(1) * left.row_step + inner.saturating_sub(1) * left.step;
        assert!(
            width.is_multiple_of(S::LANES)
                && self.out.len() >= rows * width
                && self.right.len() >= inner.saturating_sub(1) * self.right_step + width
                && left.data.len() > last,
            "the operands of a product are as long as it says"
        );
        // 6 rows of 4 vectors need 24 accumulators, 4 vectors of the right operand and one element of the left: 29 of
        // 32 registers. With 16 registers 6 rows of 2 vectors need 15.
        let wide = if S::REGISTERS >= 32 { 4 } else { 2 };
        let mut col = 0;
        while col < width {
            let vectors = ((width - col) / S::LANES).min(wide);
            match vectors {
                4 => self.columns::<S, 4>(s, col),
                3 => self.columns::<S, 3>(s, col),
                2 => self.columns::<S, 2>(s, col),
                _ => self.columns::<S, 1>(s, col),
            }
            col += vectors * S::LANES;
        }
    }
}

impl Multiply<'_> {
    /// All rows of `V` vectors from column `col`.
    #[inline(always)]
    fn columns<S: Simd, const V: usize>(&mut self, s: S, col: usize) {
        let mut row = 0;
        while row + 6 <= self.rows {
            self.tile::<S, 6, V>(s, row, col);
            row += 6;
        }
        match self.rows - row {
            5 => self.tile::<S, 5, V>(s, row, col),
            4 => self.tile::<S, 4, V>(s, row, col),
            3 => self.tile::<S, 3, V>(s, row, col),
            2 => self.tile::<S, 2, V>(s, row, col),
            1 => self.tile::<S, 1, V>(s, row, col),
            _ => {}
        }
    }

    #[inline(always)]
    fn tile<S: Simd, const R: usize, const V: usize>(&mut self, s: S, row: usize, col: usize) {
        let mut sums = [[s.splat(0.0); V]; R];
        // SAFETY: `row + R <= rows`, `col + V * LANES <= width`, and `run` has checked the lengths of both operands for
        // all rows, columns and inner indices.
        unsafe {
            let left = self.left.data.as_ptr().add(row * self.left.row_step);
            let mut right = self.right.as_ptr().add(col);
            let lefts: [*const f32; R] =
                core::array::from_fn(|r| left.wrapping_add(r * self.left.row_step));
            for i in 0..self.inner {
                let vectors: [S::V; V] =
                    core::array::from_fn(|v| s.load_at(right.add(v * S::LANES)));
                for (left, sums) in lefts.iter().zip(&mut sums) {
                    let x = s.splat(*left.add(i * self.left.step));
                    for (sum, vector) in sums.iter_mut().zip(vectors) {
                        *sum = s.mul_add(x, vector, *sum);
                    }
                }
                right = right.wrapping_add(self.right_step);
            }
        }
        for (r, sums) in sums.into_iter().enumerate() {
            let out = &mut self.out[(row + r) * self.width + col..][..V * S::LANES];
            for (out, sum) in out.chunks_exact_mut(S::LANES).zip(sums) {
                let sum = if self.add {
                    s.add(s.load(out), sum)
                } else {
                    sum
                };
                s.store(out, sum);
            }
        }
    }
}

/// The softmax of `rows` rows of `tokens` scores, `width` apart, in place but for the divisors, which go to `totals`; `lse`
/// gets the logarithm of each row's sum of `exp(scale * score)`.
pub(super) struct Softmax<'a> {
    pub(super) p: &'a mut [f32],
    pub(super) rows: usize,
    pub(super) width: usize,
    pub(super) tokens: usize,
    pub(super) scale: f32,
    pub(super) totals: &'a mut [f32],
    pub(super) lse: Option<&'a mut [f32]>,
}

impl Kernel for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let each = self.p.chunks_exact_mut(self.width).zip(&mut *self.totals);
        for (row, (p, to)) in each.take(self.rows).enumerate() {
            let (max, total) = rows::exp_row(s, p, self.tokens, self.scale);
            *to = total;
            if let Some(lse) = &mut self.lse {
                lse[row] = max + total.ln();
            }
        }
    }
}

/// The backward of [`Softmax`]: `p` becomes the probabilities, `d_p` the gradient of the scores. Both have as many rows as
/// `lse`, `width` apart, and are meaningless beyond the last token.
pub(super) struct SoftmaxBackward<'a> {
    pub(super) p: &'a mut [f32],
    pub(super) d_p: &'a mut [f32],
    pub(super) width: usize,
    pub(super) scale: f32,
    pub(super) lse: &'a [f32],
    /// Rows of `len` elements, `stride` apart, as those of `out`.
    pub(super) d_out: &'a [f32],
    pub(super) out: &'a [f32],
    pub(super) stride: usize,
    pub(super) len: usize,
}

impl Kernel for SoftmaxBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let each = self
            .p
            .chunks_exact_mut(self.width)
            .zip(self.d_p.chunks_exact_mut(self.width));
        for (row, ((p, d_p), lse)) in each.zip(self.lse).enumerate() {
            let at = row * self.stride;
            // sum over j of p[j] * d_p[j], since out is p @ v.
            let delta = rows::dot_row(
                s,
                &self.d_out[at..][..self.len],
                &self.out[at..][..self.len],
            );
            rows::softmax_backward_row(s, p, d_p, self.scale, *lse, delta);
        }
    }
}
