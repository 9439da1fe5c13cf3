//! Matrix products: large ones through `matrixmultiply`, split over threads, and small ones without packing.

use core::marker::PhantomData;

use crate::isa::{Isa, Kernel};
use crate::simd::Simd;
use crate::threads::Threads;

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

/// Tiles of `matrixmultiply` have 4, 8 or 16 rows and columns. Cuts at multiples of 16 leave every element in the same
/// place of its tile, and as the inner dimension is never cut, no bit depends on where the cuts are.
const ALIGN: usize = 16;
/// Multiply-adds that are worth handing to another thread, some 20 µs.
const GRAIN: usize = 1 << 20;

/// One piece of the output: `rows` by `cols` elements from `(row, col)`.
#[derive(Clone, Copy, Debug)]
struct Slab {
    row: usize,
    col: usize,
    rows: usize,
    cols: usize,
}

/// How the output is cut: along one dimension, into slabs of `step`.
#[derive(Clone, Copy, Debug)]
struct Cuts {
    rows: usize,
    cols: usize,
    by_rows: bool,
    step: usize,
    count: usize,
}

impl Cuts {
    /// Cuts `rows` by `cols` for `threads` threads, with `inner` multiply-adds per element.
    ///
    /// Each slab packs all of the operand that is not cut, so the longer dimension is cut: that operand is then the
    /// smaller one. Slabs that fit a level-2 cache for their epilogue would pack it more often, which costs more: a
    /// ViT-B/16 step was 4 % slower with slabs of 1 MiB.
    fn new(rows: usize, cols: usize, inner: usize, threads: usize) -> Self {
        let by_rows = rows >= cols;
        let long = if by_rows { rows } else { cols };
        let worth = (rows.saturating_mul(cols).saturating_mul(inner) / GRAIN).max(1);
        let count = threads.min(worth);
        let step = long.div_ceil(count).next_multiple_of(ALIGN).max(ALIGN);
        Self {
            rows,
            cols,
            by_rows,
            step,
            count: long.div_ceil(step),
        }
    }

    fn slab(&self, index: usize) -> Slab {
        let at = index * self.step;
        if self.by_rows {
            Slab {
                row: at,
                col: 0,
                rows: self.step.min(self.rows - at),
                cols: self.cols,
            }
        } else {
            Slab {
                row: 0,
                col: at,
                rows: self.rows,
                cols: self.step.min(self.cols - at),
            }
        }
    }
}

/// `c = a @ b`, or `c += a @ b` where `add` is set; then `epilogue(row, first column, piece of c, piece of extra)` for
/// each row of each slab, while it is in cache. `extra` has the shape of `c`, or is empty.
pub(crate) fn gemm(
    threads: &Threads,
    c: &mut [f32],
    extra: &mut [f32],
    a: Matrix<'_>,
    b: Matrix<'_>,
    add: bool,
    epilogue: impl Fn(usize, usize, &mut [f32], &mut [f32]) + Sync,
) {
    let (m, n, k) = (a.rows, b.cols, a.cols);
    assert!(
        b.rows == k && c.len() >= m * n,
        "the operands of a product fit each other"
    );
    if m == 0 || n == 0 {
        return;
    }
    let cuts = Cuts::new(m, n, k, threads.count());
    let has_extra = !extra.is_empty();
    let (c, extra) = (Shared::new(&mut c[..m * n]), Shared::new(extra));
    // A slab is worth a thread by itself.
    threads.for_each(cuts.count, usize::MAX, (), |index, ()| {
        let slab = cuts.slab(index);
        // SAFETY: `a` is m by k and `b` k by n within their slices (checked by `Matrix::strided`; transposing keeps it),
        // `c` has m * n elements, and the slab lies within m by n. Slabs do not overlap, so no other thread uses it.
        unsafe {
            matrixmultiply::sgemm(
                slab.rows,
                k,
                slab.cols,
                1.0,
                a.data.as_ptr().add(slab.row * a.row),
                a.row as isize,
                a.col as isize,
                b.data.as_ptr().add(slab.col * b.col),
                b.row as isize,
                b.col as isize,
                if add { 1.0 } else { 0.0 },
                c.start.add(slab.row * n + slab.col),
                n as isize,
                1,
            );
        }
        for row in slab.row..slab.row + slab.rows {
            let at = row * n + slab.col;
            // SAFETY: this row of this slab; slabs do not overlap, and the product above is done with it.
            let piece = unsafe { c.part(at, slab.cols) };
            let extra = if has_extra {
                // SAFETY: as for `c`.
                unsafe { extra.part(at, slab.cols) }
            } else {
                &mut []
            };
            epilogue(row, slab.col, piece, extra);
        }
    });
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

    #[test]
    fn bits_do_not_depend_on_the_number_of_threads() {
        let counts: &[usize] = if cfg!(feature = "threads") {
            &[1, 2, 3, 7]
        } else {
            &[1]
        };
        let pools: Vec<Threads> = counts.iter().map(|&n| Threads::new(n).unwrap()).collect();
        for (m, n, k) in [
            (131, 517, 300),
            (1, 4000, 700),
            (1030, 70, 513),
            (257, 33, 1),
            (700, 1200, 17),
        ] {
            let (a, b, start) = (values(m * k, 3), values(n * k, 4), values(m * n, 5));
            let (a, b) = (Matrix::new(&a, k, m).t(), Matrix::new(&b, n, k).t());
            for add in [false, true] {
                let mut first: Option<Vec<f32>> = None;
                for pool in &pools {
                    let (mut c, mut seen) = (start.clone(), vec![0.0; m * n]);
                    gemm(pool, &mut c, &mut seen, a, b, add, |row, col, c, seen| {
                        for (i, (c, seen)) in c.iter_mut().zip(seen).enumerate() {
                            *seen += 1.0;
                            *c += (row * 3 + col + i) as f32;
                        }
                    });
                    assert!(seen.iter().all(|&times| times == 1.0));
                    match &first {
                        None => first = Some(c),
                        Some(first) => assert!(
                            first
                                .iter()
                                .zip(&c)
                                .all(|(a, b)| a.to_bits() == b.to_bits())
                        ),
                    }
                }
                let mut c = start.clone();
                gemm(&pools[0], &mut c, &mut [], a, b, add, |_, _, _, _| {});
                let mut want = product(a, b);
                if add {
                    want.iter_mut()
                        .zip(&start)
                        .for_each(|(want, start)| *want += start);
                }
                assert_close(&c, &want, k);
            }
        }
    }
}
