//! What is done to the sums of a tile before they are stored.

use crate::buf::View;
use crate::cpu::LINE;
use crate::element::{Bf16, Element};
use crate::isa::Kernel;
use crate::math::{gelu, gelu_grad};
use crate::memory;
use crate::simd::Simd;
use crate::threads::Shared;

/// Where the sums of a product go, `y = sum + bias` element by element.
pub(crate) struct Finish<'a> {
    /// `[m, n]`.
    out: Out<'a>,
    n: usize,
    /// `[n]`, or empty for zeros.
    bias: &'a [f32],
    mode: Mode<'a>,
    /// `[m]`, to which the sum of each row of the left operand is added: one that comes transposed, in f32.
    pub(super) row_sums: Option<Shared<'a>>,
    /// Whether results are written past the caches, which would not hold them until they are read.
    pub(super) streamed: bool,
}

/// Where results go, in the format that is written there: what is added to is f32.
#[derive(Clone, Copy)]
pub(crate) enum Out<'a> {
    F32(Shared<'a>),
    Bf16(Shared<'a, Bf16>),
}

impl<'a> From<&'a mut [f32]> for Out<'a> {
    fn from(out: &'a mut [f32]) -> Self {
        Self::F32(Shared::new(out))
    }
}

impl<'a> From<&'a mut [Bf16]> for Out<'a> {
    fn from(out: &'a mut [Bf16]) -> Self {
        Self::Bf16(Shared::new(out))
    }
}

impl Out<'_> {
    fn len(&self) -> usize {
        match self {
            Self::F32(out) => out.len(),
            Self::Bf16(out) => out.len(),
        }
    }

    /// Stores a vector at `at..at + len`.
    ///
    /// # Safety
    /// Nobody else uses these elements.
    #[inline(always)]
    unsafe fn put<S: Simd>(self, s: S, streamed: bool, at: usize, len: usize, v: S::V) {
        // SAFETY: by contract.
        unsafe {
            match self {
                Self::F32(out) => put(s, streamed, out.part(at, len), v),
                Self::Bf16(out) => put(s, streamed, out.part(at, len), v),
            }
        }
    }
}

/// What becomes of `y`. All matrices are `[m, n]`.
pub(crate) enum Mode<'a> {
    /// `out = y`
    Store,
    /// `out += y`
    Add,
    /// `out = gelu(y)`
    Gelu,
    /// `pre_gelu = y`, `out = gelu(y)`
    GeluSaving {
        /// Written.
        pre_gelu: Out<'a>,
    },
    /// `out = residual + scale[row / rows_per_scale] * y`, the scale 1 where there is none.
    Residual {
        /// What is added to.
        residual: &'a [f32],
        /// With `rows_per_scale`, which is not 0.
        scale: Option<(&'a [f32], usize)>,
    },
    /// `out = y * gelu'(pre_gelu)`
    GeluGrad {
        /// What went into the GELU.
        pre_gelu: View<'a>,
    },
}

impl<'a> Finish<'a> {
    /// `out: [m, n]`.
    pub(crate) fn new(out: &'a mut [f32], n: usize, bias: &'a [f32], mode: Mode<'a>) -> Self {
        Self::to(out.into(), n, bias, mode)
    }

    /// `out: [m, n]`, in its format.
    pub(crate) fn to(out: Out<'a>, n: usize, bias: &'a [f32], mode: Mode<'a>) -> Self {
        let bytes = match out {
            Out::F32(out) => out.len() * size_of::<f32>(),
            Out::Bf16(out) => out.len() * size_of::<Bf16>(),
        };
        Self {
            out,
            n,
            bias,
            mode,
            row_sums: None,
            streamed: memory::is_streamed(bytes),
        }
    }

    /// Adds the sums of the left operand's rows to `sums: [m]`, as it is packed: a bias gradient.
    pub(crate) fn with_row_sums(self, sums: &'a mut [f32]) -> Self {
        Self {
            row_sums: Some(Shared::new(sums)),
            ..self
        }
    }

    pub(super) fn check(&self, m: usize, n: usize) {
        let len = match &self.mode {
            Mode::Store | Mode::Add | Mode::Gelu => usize::MAX,
            Mode::GeluSaving { pre_gelu } => pre_gelu.len(),
            Mode::Residual { residual, .. } => residual.len(),
            Mode::GeluGrad { pre_gelu } => pre_gelu.len(),
        };
        assert!(
            self.n == n
                && self.out.len().min(len) >= m * n
                && (self.bias.is_empty() || self.bias.len() >= n)
                && self.row_sums.is_none_or(|sums| sums.len() >= m),
            "what a product writes to is as long as it says"
        );
    }
}

/// Asks for the cache lines that [`FinishTile`] will read and write: they come while the tile is computed.
pub(super) struct FetchTile<'a, 'b> {
    pub(super) finish: &'a Finish<'b>,
    pub(super) row: usize,
    pub(super) rows: usize,
    pub(super) col: usize,
    pub(super) width: usize,
}

impl Kernel for FetchTile<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let f = self.finish;
        if !f.streamed || matches!(f.mode, Mode::Add) {
            self.fetch_out(s, f.out);
        }
        match &f.mode {
            Mode::Store | Mode::Add | Mode::Gelu => {}
            Mode::GeluSaving { .. } if f.streamed => {}
            Mode::GeluSaving { pre_gelu } => self.fetch_out(s, *pre_gelu),
            Mode::Residual { residual: x, .. } => self.fetch(s, x.as_ptr()),
            Mode::GeluGrad { pre_gelu } => match pre_gelu {
                View::F32(x) => self.fetch(s, x.as_ptr()),
                View::Bf16(x) => self.fetch(s, x.as_ptr()),
            },
        }
    }
}

impl FetchTile<'_, '_> {
    #[inline(always)]
    fn fetch_out<S: Simd>(&self, s: S, out: Out<'_>) {
        match out {
            Out::F32(out) => self.fetch(s, out.as_ptr()),
            Out::Bf16(out) => self.fetch(s, out.as_ptr()),
        }
    }

    /// The tile's lines of a matrix.
    #[inline(always)]
    fn fetch<S: Simd, T>(&self, s: S, matrix: *const T) {
        for row in self.row..self.row + self.rows {
            let at = row * self.finish.n + self.col;
            for line in (at..at + self.width).step_by(LINE * size_of::<f32>() / size_of::<T>()) {
                s.prefetch(matrix.wrapping_add(line).cast());
            }
        }
    }
}

/// Stores one tile.
pub(super) struct FinishTile<'a, 'b> {
    pub(super) finish: &'a Finish<'b>,
    pub(super) row: usize,
    pub(super) rows: usize,
    pub(super) col: usize,
    pub(super) width: usize,
    /// Elements of a row of `sums`.
    pub(super) step: usize,
    pub(super) sums: &'a [f32],
}

impl Kernel for FinishTile<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.finish.out {
            Out::F32(out) => self.store(s, out),
            Out::Bf16(out) => self.store(s, out),
        }
    }
}

impl FinishTile<'_, '_> {
    #[inline(always)]
    fn store<S: Simd, T: Element>(self, s: S, out: Shared<'_, T>) {
        let Self {
            finish: f,
            row,
            rows,
            col,
            width,
            step,
            sums,
        } = self;
        let zero = s.splat(0.0);
        // A tile has at most 3 vectors.
        let mut bias = [zero; 3];
        if !f.bias.is_empty() {
            let columns = f.bias[col..][..width].chunks(S::LANES);
            for (bias, columns) in bias.iter_mut().zip(columns) {
                *bias = s.load(columns);
            }
        }
        for (row, sums) in (row..row + rows).zip(sums.chunks_exact(step)) {
            let at = row * f.n + col;
            // SAFETY: this row of this tile; tiles do not overlap, and `Finish::check` has seen the length.
            let out = unsafe { out.part(at, width) }.chunks_mut(S::LANES);
            // Loops and not closures, which would lose the instruction set where they are not inlined; and `bias` borrowed, of
            // which an iterator of its own would be a copy for each row.
            let vectors = sums.chunks_exact(S::LANES).zip(&bias);
            let each = out.zip(vectors);
            match &f.mode {
                Mode::Store => {
                    for (out, (sum, bias)) in each {
                        put(s, f.streamed, out, s.add(s.load(sum), *bias));
                    }
                }
                Mode::Add => {
                    for (out, (sum, bias)) in each {
                        let y = s.add(s.load(sum), *bias);
                        T::store(s, out, s.add(T::load(s, out), y));
                    }
                }
                Mode::Gelu => {
                    for (out, (sum, bias)) in each {
                        put(s, f.streamed, out, gelu(s, s.add(s.load(sum), *bias)));
                    }
                }
                Mode::GeluSaving { pre_gelu } => {
                    for (i, (out, (sum, bias))) in each.enumerate() {
                        let y = s.add(s.load(sum), *bias);
                        // SAFETY: as for `out`.
                        unsafe { pre_gelu.put(s, f.streamed, at + i * S::LANES, out.len(), y) };
                        put(s, f.streamed, out, gelu(s, y));
                    }
                }
                Mode::Residual { residual, scale } => {
                    let residual = residual[at..][..width].chunks(S::LANES);
                    let scale = s.splat(scale.map_or(1.0, |(scale, per)| scale[row / per]));
                    for ((out, (sum, bias)), residual) in each.zip(residual) {
                        let y = s.add(s.load(sum), *bias);
                        put(s, f.streamed, out, s.mul_add(scale, y, s.load(residual)));
                    }
                }
                Mode::GeluGrad { pre_gelu } => {
                    for (i, (out, (sum, bias))) in each.enumerate() {
                        let y = s.add(s.load(sum), *bias);
                        let x = pre_gelu.load(s, at + i * S::LANES, out.len());
                        put(s, f.streamed, out, s.mul(y, gelu_grad(s, x)));
                    }
                }
            }
        }
    }
}

/// Stores a vector, past the caches if so asked.
#[inline(always)]
pub(super) fn put<S: Simd, T: Element>(s: S, streamed: bool, to: &mut [T], v: S::V) {
    match streamed {
        true => T::stream(s, to, v),
        false => T::store(s, to, v),
    }
}

/// Waits for streamed results: done at the end of what a thread does to them.
pub(super) struct Flush;

impl Kernel for Flush {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        s.flush();
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Dims, Left, Precision, Right, gemm, narrowed};
    use super::*;
    use crate::buf::View;
    use crate::cpu::Scratch;
    use crate::isa::Isa;
    use crate::threads::Threads;

    #[test]
    fn results_in_bf16_are_those_in_f32_rounded() {
        let value = |i: usize| (i as u64 * 2_654_435_761 % 1009) as f32 / 504.5 - 1.0;
        let x: Vec<f32> = (0..2000).map(value).collect();
        // Rows of whole cache lines, and tiles with tails.
        for (isa, (m, n)) in Isa::variants().flat_map(|isa| [(isa, (21, 75)), (isa, (9, 64))]) {
            let inner = 20;
            let modes = || {
                [
                    Mode::Store,
                    Mode::Gelu,
                    Mode::Residual {
                        residual: &x,
                        scale: None,
                    },
                    Mode::GeluGrad {
                        pre_gelu: View::F32(&x),
                    },
                ]
            };
            let run = |finish: &Finish<'_>| {
                let scratch = &mut Scratch::default();
                let (left, right) = (Left::Rows(View::F32(&x)), Right::Rows(&x));
                let dims = Dims { m, n, inner };
                let (precision, threads) = (Precision::F32, Threads::one());
                gemm(isa, precision, &threads, scratch, dims, left, right, finish).unwrap();
            };
            for (which, (wide, narrow)) in modes().into_iter().zip(modes()).enumerate() {
                let mut want = vec![f32::NAN; m * n];
                run(&Finish::new(&mut want, n, &x, wide));
                let mut got = vec![Bf16(7); m * n];
                let mut finish = Finish::to(got.as_mut_slice().into(), n, &x, narrow);
                finish.streamed = which % 2 == 0;
                run(&finish);
                assert_eq!(got, narrowed(&want), "{isa} {which} {n}");
            }
        }
    }
}
