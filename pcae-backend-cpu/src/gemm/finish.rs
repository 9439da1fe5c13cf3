//! What is done to the sums of a tile before they are stored.

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
    /// Whether results are written past the caches, which would not hold them until they are read.
    pub(super) streamed: bool,
}

/// Where results go, in the format that is written there: what is added to is f32.
#[derive(Clone, Copy)]
enum Out<'a> {
    F32(Shared<'a>),
    Bf16(Shared<'a, Bf16>),
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
        pre_gelu: Shared<'a>,
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
        pre_gelu: &'a [f32],
    },
}

/// Results larger than so many level-2 caches are streamed. Smaller ones are better read back from the level-3 cache, whose share of
/// one core nobody tells.
const STREAMED: usize = 3;

fn is_streamed<T>(out: &[T]) -> bool {
    size_of_val(out) > STREAMED * memory::level2_cache()
}

impl<'a> Finish<'a> {
    /// `out: [m, n]`.
    pub(crate) fn new(out: &'a mut [f32], n: usize, bias: &'a [f32], mode: Mode<'a>) -> Self {
        let streamed = is_streamed(out);
        Self {
            out: Out::F32(Shared::new(out)),
            n,
            bias,
            mode,
            streamed,
        }
    }

    /// `out: [m, n]`, rounded to bf16 as it is stored.
    pub(crate) fn in_bf16(out: &'a mut [Bf16], n: usize, bias: &'a [f32], mode: Mode<'a>) -> Self {
        let streamed = is_streamed(out);
        Self {
            out: Out::Bf16(Shared::new(out)),
            n,
            bias,
            mode,
            streamed,
        }
    }

    pub(super) fn check(&self, m: usize, n: usize) {
        let len = match &self.mode {
            Mode::Store | Mode::Add | Mode::Gelu => usize::MAX,
            Mode::GeluSaving { pre_gelu } => pre_gelu.len(),
            Mode::Residual { residual, .. } => residual.len(),
            Mode::GeluGrad { pre_gelu } => pre_gelu.len(),
        };
        let out_len = match self.out {
            Out::F32(out) => out.len(),
            Out::Bf16(out) => out.len(),
        };
        assert!(
            self.n == n
                && out_len.min(len) >= m * n
                && (self.bias.is_empty() || self.bias.len() >= n),
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
            match f.out {
                Out::F32(out) => self.fetch(s, out.as_ptr()),
                Out::Bf16(out) => self.fetch(s, out.as_ptr()),
            }
        }
        match &f.mode {
            Mode::Store | Mode::Add | Mode::Gelu => {}
            Mode::GeluSaving { .. } if f.streamed => {}
            Mode::GeluSaving { pre_gelu } => self.fetch(s, pre_gelu.as_ptr()),
            Mode::Residual { residual: x, .. } | Mode::GeluGrad { pre_gelu: x } => {
                self.fetch(s, x.as_ptr());
            }
        }
    }
}

impl FetchTile<'_, '_> {
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
                    // SAFETY: as for `out`.
                    let pre_gelu = unsafe { pre_gelu.part(at, width) };
                    let pre_gelu = pre_gelu.chunks_mut(S::LANES);
                    for ((out, (sum, bias)), pre_gelu) in each.zip(pre_gelu) {
                        let y = s.add(s.load(sum), *bias);
                        put(s, f.streamed, pre_gelu, y);
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
                    let pre_gelu = pre_gelu[at..][..width].chunks(S::LANES);
                    for ((out, (sum, bias)), pre_gelu) in each.zip(pre_gelu) {
                        let y = s.add(s.load(sum), *bias);
                        put(s, f.streamed, out, s.mul(y, gelu_grad(s, s.load(pre_gelu))));
                    }
                }
            }
        }
    }
}

/// Stores a vector, past the caches if so asked.
#[inline(always)]
fn put<S: Simd, T: Element>(s: S, streamed: bool, to: &mut [T], v: S::V) {
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
                    Mode::GeluGrad { pre_gelu: &x },
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
                let mut finish = Finish::in_bf16(&mut got, n, &x, narrow);
                finish.streamed = which % 2 == 0;
                run(&finish);
                assert_eq!(got, narrowed(&want), "{isa} {which} {n}");
            }
        }
    }
}
