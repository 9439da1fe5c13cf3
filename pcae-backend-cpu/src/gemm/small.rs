//! Small matrix products on one thread, without packing.

use core::marker::PhantomData;

use crate::isa::{Isa, Kernel};
use crate::simd::Simd;

/// A matrix that is only read, element `(i, j)` at `data[i * row + j * col]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row: usize,
    col: usize,
}

impl<'a> Matrix<'a> {
    /// Rows of `data`, one after the other.
    pub(crate) fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// Rows that start `stride` elements apart.
    pub(crate) fn strided(data: &'a [f32], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(
            rows == 0 || cols == 0 || (rows - 1) * stride + cols <= data.len(),
            "a matrix lies within its data"
        );
        Self {
            data,
            rows,
            cols,
            row: stride,
            col: 1,
        }
    }

    /// The transpose.
    pub(crate) fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row: self.col,
            col: self.row,
            ..self
        }
    }
}

/// A slice of which several threads write different parts.
#[derive(Clone, Copy)]
pub(crate) struct Shared<'a> {
    start: *mut f32,
    len: usize,
    life: PhantomData<&'a mut [f32]>,
}

// SAFETY: it is a `&mut [f32]` whose parts are borrowed by `Shared::part`, whose caller keeps them apart.
unsafe impl Send for Shared<'_> {}
// SAFETY: as above.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    pub(crate) fn new(data: &'a mut [f32]) -> Self {
        Self {
            start: data.as_mut_ptr(),
            len: data.len(),
            life: PhantomData,
        }
    }

    pub(crate) fn len(self) -> usize {
        self.len
    }

    /// `len` elements from `at`.
    ///
    /// # Safety
    /// No other part that is in use overlaps it.
    pub(crate) unsafe fn part(self, at: usize, len: usize) -> &'a mut [f32] {
        assert!(
            at <= self.len && len <= self.len - at,
            "a part lies within its slice"
        );
        // SAFETY: the range is within the slice that `new` borrowed, and by contract nobody else uses it.
        unsafe { core::slice::from_raw_parts_mut(self.start.add(at), len) }
    }
}

/// `c = a @ b` on this thread, without packing: `a` in any order, `b` in rows. For operands that fit in cache.
///
/// Each element adds its products in ascending order of the inner index.
pub(crate) fn small_gemm(isa: Isa, c: &mut [f32], a: Matrix<'_>, b: Matrix<'_>) {
    assert!(
        a.cols == b.rows && b.col == 1 && c.len() >= a.rows * b.cols,
        "the operands of a product fit each other"
    );
    isa.run(SmallGemm { c, a, b });
}

struct SmallGemm<'a> {
    c: &'a mut [f32],
    a: Matrix<'a>,
    b: Matrix<'a>,
}

impl Kernel for SmallGemm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        // 6 rows of 4 vectors need 24 accumulators, 4 vectors of b and one of a: 29 of 32 registers. With 16 registers
        // 6 rows of 2 vectors need 15.
        let wide = if S::REGISTERS >= 32 { 4 } else { 2 };
        let n = self.b.cols;
        let mut col = 0;
        while col < n {
            let vectors = (n - col).div_ceil(S::LANES).min(wide);
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

impl SmallGemm<'_> {
    /// All rows of the `V` vectors of columns from `col`.
    #[inline(always)]
    fn columns<S: Simd, const V: usize>(&mut self, s: S, col: usize) {
        let m = self.a.rows;
        let mut row = 0;
        while row + 6 <= m {
            self.tile::<S, 6, V>(s, row, col);
            row += 6;
        }
        while row + 2 <= m {
            self.tile::<S, 2, V>(s, row, col);
            row += 2;
        }
        if row < m {
            self.tile::<S, 1, V>(s, row, col);
        }
    }

    /// `R` rows of `V` vectors, the last of which may be cut short.
    #[inline(always)]
    fn tile<S: Simd, const R: usize, const V: usize>(&mut self, s: S, row: usize, col: usize) {
        let (a, b, n) = (self.a, self.b, self.b.cols);
        let width = (n - col).min(V * S::LANES);
        // All vectors but the last are full.
        let last = (V - 1) * S::LANES;
        let mut sums = [[s.splat(0.0); V]; R];
        for inner in 0..a.cols {
            let mut b_vectors = [s.splat(0.0); V];
            // SAFETY: row `inner < b.rows` and columns `col..col + width` with `col + width <= b.cols` lie within `b`
            // (checked by `Matrix::strided`), and `last < width` as there are `V` vectors with at least one column.
            let (b_full, b_last) = unsafe {
                let start = b.data.as_ptr().add(inner * b.row + col);
                (
                    core::slice::from_raw_parts(start, last),
                    core::slice::from_raw_parts(start.add(last), width - last),
                )
            };
            for (vector, lanes) in b_vectors.iter_mut().zip(b_full.chunks_exact(S::LANES)) {
                *vector = s.load(lanes);
            }
            b_vectors[V - 1] = s.load(b_last);
            for (r, sums) in sums.iter_mut().enumerate() {
                // SAFETY: `row + r < a.rows` and `inner < a.cols`: an element of `a`, as above.
                let x = unsafe { *a.data.as_ptr().add((row + r) * a.row + inner * a.col) };
                let x = s.splat(x);
                for (sum, b) in sums.iter_mut().zip(b_vectors) {
                    *sum = s.mul_add(x, b, *sum);
                }
            }
        }
        for (r, sums) in sums.into_iter().enumerate() {
            let c_row = &mut self.c[(row + r) * n + col..][..width];
            for (lanes, sum) in c_row.chunks_mut(S::LANES).zip(sums) {
                s.store(lanes, sum);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn values(len: usize, seed: u64) -> Vec<f32> {
        (0..len as u64)
            .map(|i| ((i * 7 + seed) * 2_654_435_761 % 1009) as f32 / 504.5 - 1.0)
            .collect()
    }

    fn product(a: Matrix<'_>, b: Matrix<'_>) -> Vec<f32> {
        let mut c = vec![];
        for i in 0..a.rows {
            for j in 0..b.cols {
                let at = |inner| {
                    f64::from(a.data[i * a.row + inner * a.col])
                        * f64::from(b.data[inner * b.row + j * b.col])
                };
                c.push((0..a.cols).map(at).sum::<f64>() as f32);
            }
        }
        c
    }

    /// Sums of k products of numbers below 1 in f32.
    fn assert_close(got: &[f32], want: &[f32], k: usize) {
        assert_eq!(got.len(), want.len());
        for (got, want) in got.iter().zip(want) {
            assert!(
                (got - want).abs() <= (k + 1) as f32 * f32::EPSILON,
                "{got} {want}"
            );
        }
    }

    proptest! {
        #[test]
        fn small_gemm_matches_f64(m in 0usize..20, n in 0usize..70, k in 0usize..40, transposed: bool) {
            let (a, b) = (values(m * k, 1), values(k * (n + 3), 2));
            let a = if transposed { Matrix::new(&a, k, m).t() } else { Matrix::new(&a, m, k) };
            let b = Matrix::strided(&b, k, n, n + 3);
            for isa in Isa::available() {
                let mut c = vec![f32::NAN; m * n];
                small_gemm(isa, &mut c, a, b);
                assert_close(&c, &product(a, b), k);
            }
        }
    }
}
