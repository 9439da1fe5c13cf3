//! What is done to the sums of a tile before they are stored.

use crate::cpu::LINE;
use crate::isa::Kernel;
use crate::math::{gelu, gelu_grad};
use crate::memory;
use crate::simd::Simd;
use crate::threads::Shared;

/// Where the sums of a product go, `y = sum + bias` element by element.
pub(crate) struct Finish<'a> {
    /// `[m, n]`.
    out: Shared<'a>,
    n: usize,
    /// `[n]`, or empty for zeros.
    bias: &'a [f32],
    mode: Mode<'a>,
    /// `[m]`, to which the sum of each row of the left operand is added: one that comes transposed, in f32.
    pub(super) row_sums: Option<Shared<'a>>,
    /// Whether results are written past the caches, which would not hold them until they are read.
    pub(super) streamed: bool,
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

/// Results of as many level-2 caches are streamed. Smaller ones are better read back from the level-3 cache, whose share of
/// one core nobody tells.
const STREAMED: usize = 4;

impl<'a> Finish<'a> {
    /// `out: [m, n]`.
    pub(crate) fn new(out: &'a mut [f32], n: usize, bias: &'a [f32], mode: Mode<'a>) -> Self {
        let streamed = size_of_val(out) > STREAMED * memory::level2_cache();
        Self {
            out: Shared::new(out),
            n,
            bias,
            mode,
            row_sums: None,
            streamed,
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
        let written = |x: *const f32| (!f.streamed).then_some(x);
        let out = f.out.as_ptr();
        let wanted = match &f.mode {
            Mode::Add => [Some(out), None],
            Mode::Store | Mode::Gelu => [written(out), None],
            Mode::GeluSaving { pre_gelu } => [written(out), written(pre_gelu.as_ptr())],
            Mode::Residual { residual: x, .. } | Mode::GeluGrad { pre_gelu: x } => {
                [written(out), Some(x.as_ptr())]
            }
        };
        for wanted in wanted.into_iter().flatten() {
            for row in self.row..self.row + self.rows {
                let at = row * f.n + self.col;
                for line in (at..at + self.width).step_by(LINE) {
                    s.prefetch(wanted.wrapping_add(line));
                }
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
        let put = |to: &mut [f32], v| match f.streamed {
            true => s.stream(to, v),
            false => s.store(to, v),
        };
        for (row, sums) in (row..row + rows).zip(sums.chunks_exact(step)) {
            let at = row * f.n + col;
            // SAFETY: this row of this tile; tiles do not overlap, and `Finish::check` has seen the length.
            let out = unsafe { f.out.part(at, width) }.chunks_mut(S::LANES);
            let vectors = sums.chunks_exact(S::LANES).zip(bias);
            let each = out.zip(vectors.map(|(sum, bias)| s.add(s.load(sum), bias)));
            match &f.mode {
                Mode::Store => each.for_each(|(out, y)| put(out, y)),
                Mode::Add => each.for_each(|(out, y)| s.store(out, s.add(s.load(out), y))),
                Mode::Gelu => each.for_each(|(out, y)| put(out, gelu(s, y))),
                Mode::GeluSaving { pre_gelu } => {
                    // SAFETY: as for `out`.
                    let pre_gelu = unsafe { pre_gelu.part(at, width) };
                    let pre_gelu = pre_gelu.chunks_mut(S::LANES);
                    each.zip(pre_gelu).for_each(|((out, y), pre_gelu)| {
                        put(pre_gelu, y);
                        put(out, gelu(s, y));
                    });
                }
                Mode::Residual { residual, scale } => {
                    let residual = residual[at..][..width].chunks(S::LANES);
                    let scale = s.splat(scale.map_or(1.0, |(scale, per)| scale[row / per]));
                    each.zip(residual).for_each(|((out, y), residual)| {
                        put(out, s.mul_add(scale, y, s.load(residual)));
                    });
                }
                Mode::GeluGrad { pre_gelu } => {
                    let pre_gelu = pre_gelu[at..][..width].chunks(S::LANES);
                    each.zip(pre_gelu).for_each(|((out, y), pre_gelu)| {
                        put(out, s.mul(y, gelu_grad(s, s.load(pre_gelu))));
                    });
                }
            }
        }
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
