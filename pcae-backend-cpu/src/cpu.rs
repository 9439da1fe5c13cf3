//! The backend: its construction and what inference needs.

use core::cmp::Ordering;

use pcae_kernel::backend::{
    AttentionDims, Backend, EmbedParams, Epilogue, Linear, LinearDims, NORM_EPS, Norm, PatchDims,
    PixelDims, Pixels, RowDims, SCORE_EPS, TokenDims,
};
use pcae_kernel::error::{Error as KernelError, expect_len, product};

use crate::attention::Attention;
use crate::buf::{Buf, Floats, View, line_start};
use crate::checks::{check_numbers, check_prefix, checked_ids, front, front_mut, operand};
use crate::element::Element;
use crate::error::Error;
use crate::gemm::{Dims, Finish, Left, Mode, Precision, Right, gemm};
use crate::isa::Isa;
use crate::memory;
use crate::params::Params;
use crate::pixels;
use crate::rows;
use crate::threads::{Pieces, Threads};

/// The CPU backend: f32, or bf16 for products and what they alone read ([`Cpu::precision`]); vector instructions chosen at run time, an own pool of threads.
///
/// Results depend on the instruction set, not on the number of threads. Working memory grows to what the largest
/// operation needs and is kept, so that nothing allocates after the first step.
#[derive(Debug)]
pub struct Cpu {
    pub(crate) isa: Isa,
    pub(crate) threads: Threads,
    pub(crate) scratch: Scratch,
    pub(crate) precision: Precision,
    pub(crate) teacher_precision: Precision,
}

/// Elements of a cache line, and of the longest vector.
pub(crate) const LINE: usize = 16;

/// Working memory, kept from operation to operation.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    floats: Vec<f32>,
    doubles: Vec<f64>,
    indices: Vec<u32>,
}

impl Cpu {
    /// The widest instruction set and all threads that this machine has; one thread where a pool cannot be started.
    pub fn new() -> Self {
        let isa = Isa::detect();
        let count = if cfg!(feature = "threads") {
            std::thread::available_parallelism().map_or(1, usize::from)
        } else {
            1
        };
        let threads = Threads::new(count).unwrap_or_else(|_| Threads::one());
        Self::build(isa, threads)
    }

    /// The given instruction set and number of threads.
    ///
    /// # Errors
    /// [`Error::Threads`] for 0 threads, for more than 1 without the feature `threads`, and if they cannot be started.
    pub fn with(isa: Isa, threads: usize) -> Result<Self, Error> {
        Ok(Self::build(isa, Threads::new(threads)?))
    }

    fn build(isa: Isa, threads: Threads) -> Self {
        Self {
            isa,
            threads,
            scratch: Scratch::default(),
            precision: Precision::F32,
            teacher_precision: Precision::F32,
        }
    }

    /// The same backend with linear layers of parameters that it makes from now on, their gradients, and attention without
    /// a backward in `precision`: operands are rounded to it, what goes into products alone as it is stored, else as it is
    /// packed. Sums and everything else stay f32. A new backend has [`Precision::F32`].
    pub fn precision(mut self, precision: Precision) -> Self {
        (self.precision, self.teacher_precision) = (precision, precision);
        self
    }

    /// The same backend with [`TrainBackend::teacher_params`](pcae_kernel::backend::TrainBackend::teacher_params), and
    /// attention without a backward, in a precision of their own, after [`Cpu::precision`]: a teacher has no gradient, and
    /// its output is standardised.
    pub fn teacher_precision(mut self, precision: Precision) -> Self {
        self.teacher_precision = precision;
        self
    }

    /// The precisions of trained parameters and of a teacher's.
    pub fn precisions(&self) -> (Precision, Precision) {
        (self.precision, self.teacher_precision)
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// The number of threads in use.
    pub fn threads(&self) -> usize {
        self.threads.count()
    }
}

impl Default for Cpu {
    fn default() -> Self {
        Self::new()
    }
}

impl Scratch {
    /// Aligned to a cache line, which vectors then do not straddle.
    pub(crate) fn floats(&mut self, len: usize) -> Result<&mut [f32], Error> {
        let floats = grown(&mut self.floats, len.saturating_add(LINE))?;
        let at = line_start(floats);
        Ok(&mut floats[at..][..len])
    }

    pub(crate) fn doubles(&mut self, len: usize) -> Result<&mut [f64], Error> {
        grown(&mut self.doubles, len)
    }

    pub(crate) fn indices(&mut self, len: usize) -> Result<&mut [u32], Error> {
        grown(&mut self.indices, len)
    }
}

/// The front of `owned`, which is made anew where it is shorter: nothing is kept, so that old and new are never in memory
/// together.
pub(crate) fn grown<T: Clone + Default>(owned: &mut Vec<T>, len: usize) -> Result<&mut [T], Error> {
    if owned.len() < len {
        *owned = Vec::new();
        owned
            .try_reserve_exact(len)
            .map_err(|_| Error::OutOfMemory { elements: len })?;
        memory::prefer_huge_pages(owned.spare_capacity_mut());
        owned.resize(len, T::default());
    }
    Ok(&mut owned[..len])
}

/// `len` zeros.
pub(crate) fn zeroed<T: Clone + Default>(len: usize) -> Result<Vec<T>, Error> {
    let mut owned = Vec::new();
    grown(&mut owned, len)?;
    Ok(owned)
}

/// Calls `place(channel, row of the patch, pixels, piece of out)` for every row of pixels of every wanted patch.
pub(crate) fn copy_patches(
    op: &'static str,
    threads: &Threads,
    dims: PatchDims,
    out: &mut Buf,
    images: &Buf,
    ids: Option<&[u32]>,
    place: impl Fn(usize, usize, &[f32], &mut [f32]) + Sync,
) -> Result<(), Error> {
    dims.check(op, ids.is_some())?;
    out.check(op, "out", dims.patches_len())?;
    let images = images.floats(op, "images", dims.images_len())?;
    let count = product(&[dims.batch, dims.taken]);
    let ids = match ids {
        Some(ids) => Some(checked_ids(op, "ids", ids, count, dims.num_patches())?),
        None => None,
    };
    let out = out.overwrite(dims.patches_len());
    if out.is_empty() {
        return Ok(());
    }
    let (p, len) = (dims.patch_size, dims.patch_len());
    threads.for_each(count, 2 * len, Pieces::new(out, len), |patch, out| {
        let at = ids.map_or(patch % dims.taken, |ids| ids[patch] as usize);
        let (top, left) = (at / (dims.width / p) * p, at % (dims.width / p) * p);
        for channel in 0..dims.channels {
            let plane = patch / dims.taken * dims.channels + channel;
            for row in 0..p {
                let start = (plane * dims.height + top + row) * dims.width + left;
                place(channel, row, &images[start..][..p], out);
            }
        }
    });
    Ok(())
}

/// Input, weight and bias of a linear layer, of the lengths that `dims` ask.
pub(crate) fn linear_inputs<'a>(
    op: &'static str,
    dims: LinearDims,
    x: &'a Buf,
    isa: Isa,
    params: &'a Params,
    layer: Linear,
) -> Result<(Left<View<'a>>, Right<'a>, &'a [f32]), Error> {
    let x = operand(op, "x", x, dims.in_len(), params.precision)?;
    let weight = params.weight(op, isa, layer.weight, dims)?;
    let bias = params.part(op, "bias", layer.bias, dims.out_features)?;
    Ok((Left::Rows(x), weight, bias))
}

/// Of the product `x @ weight^T`.
pub(crate) fn forward_dims(dims: LinearDims) -> Dims {
    Dims {
        m: dims.rows,
        n: dims.out_features,
        inner: dims.in_features,
    }
}

impl Cpu {
    pub(crate) fn product(
        &mut self,
        precision: Precision,
        dims: Dims,
        left: Left<View<'_>>,
        right: Right<'_>,
        finish: &Finish<'_>,
    ) -> Result<(), Error> {
        let Self {
            isa,
            threads,
            scratch,
            ..
        } = self;
        gemm(*isa, precision, threads, scratch, dims, left, right, finish)
    }

    /// Layer norm, saving mean and reciprocal standard deviation of each row where `stats` is given.
    pub(crate) fn layer_norm_rows(
        &self,
        op: &'static str,
        dims: RowDims,
        out: &mut Buf,
        stats: Option<&mut [f32]>,
        x: &Buf,
        params: &Params,
        norm: Norm,
    ) -> Result<(), Error> {
        out.check(op, "out", dims.len())?;
        let x = x.floats(op, "x", dims.len())?;
        let weight = params.part(op, "weight", norm.weight, dims.dim)?;
        let bias = params.part(op, "bias", norm.bias, dims.dim)?;
        let stats = match stats {
            Some(stats) => Some(front_mut(op, "stats", stats, product(&[dims.rows, 2]))?),
            None => None,
        };
        let out = out.overwrite(dims.len());
        if dims.is_empty() {
            return Ok(());
        }
        let parts = (
            Pieces::new(out, dims.dim),
            stats.map(|stats| Pieces::new(stats, 2)),
        );
        self.threads
            .for_each(dims.rows, 2 * dims.dim, parts, |row, (out, stats)| {
                let x = &x[row * dims.dim..][..dims.dim];
                let (mean, rstd) = rows::layer_norm(self.isa, out, x, weight, bias, NORM_EPS);
                if let Some(stats) = stats {
                    stats.copy_from_slice(&[mean, rstd]);
                }
            });
        Ok(())
    }

    /// Attention, saving the log-sum-exp where `lse` is given.
    pub(crate) fn attention_forward(
        &mut self,
        op: &'static str,
        precision: Precision,
        dims: AttentionDims,
        out: &mut Buf,
        lse: Option<&mut [f32]>,
        qkv: &Buf,
    ) -> Result<(), Error> {
        let qkv = qkv.view(op, "qkv", dims.qkv_len())?;
        let len = dims.out_len();
        out.check(op, "out", len)?;
        let lse = match lse {
            Some(lse) => Some(front_mut(op, "lse", lse, dims.lse_len())?),
            None => None,
        };
        if len == 0 {
            return Ok(());
        }
        precision.check(self.isa)?;
        match (qkv, precision) {
            (View::F32(qkv), _) => self.attend(precision, dims, out.overwrite(len), lse, qkv),
            // Saved for a backward, in f32.
            (View::Bf16(qkv), Precision::F32) => {
                self.attend(precision, dims, out.overwrite(len), lse, qkv)
            }
            // The layers around it are of one precision: what comes in bf16 leaves in bf16.
            (View::Bf16(qkv), Precision::Bf16(_)) => {
                self.attend(precision, dims, out.overwrite_narrow(len), lse, qkv)
            }
        }
    }

    fn attend<T: Element, O: Element>(
        &mut self,
        precision: Precision,
        dims: AttentionDims,
        out: &mut [O],
        lse: Option<&mut [f32]>,
        qkv: &[T],
    ) -> Result<(), Error> {
        let attention = Attention::new(self.isa, &self.threads, precision, dims, qkv);
        let scratch = self.scratch.floats(attention.forward_scratch())?;
        attention.forward(out, lse, scratch);
        Ok(())
    }
}

impl Backend for Cpu {
    type Error = Error;
    type Buf = Buf;
    type Ids = Vec<u32>;
    type Scores = Floats;
    type Params = Params;

    fn buf(&mut self, len: usize) -> Result<Buf, Error> {
        Buf::zeros(len)
    }

    fn ids(&mut self, len: usize) -> Result<Vec<u32>, Error> {
        zeroed(len)
    }

    fn scores(&mut self, len: usize) -> Result<Floats, Error> {
        Floats::zeros(len)
    }

    fn write(&mut self, to: &mut Buf, from: &[f32]) -> Result<(), Error> {
        to.check("write", "to", from.len())?;
        to.overwrite(from.len()).copy_from_slice(from);
        Ok(())
    }

    fn write_pixels(
        &mut self,
        dims: PixelDims,
        to: &mut Buf,
        from: Pixels<'_>,
    ) -> Result<(), Error> {
        const OP: &str = "write_pixels";
        to.check(OP, "to", dims.len())?;
        from.check(OP, dims)?;
        let to = to.overwrite(dims.len());
        if to.is_empty() {
            return Ok(());
        }
        let (channels, width) = (dims.channels, dims.width);
        let plane = dims.height * width;
        self.threads.for_each(
            dims.batch * channels,
            2 * plane,
            Pieces::new(to, plane),
            |i, to| {
                let (b, channel) = (i / channels, i % channels);
                if from.crops.is_some() {
                    pixels::resize(to, dims, from, b, channel);
                } else {
                    let values = &from.values[b * channels * plane..][..channels * plane];
                    let (mean, std) = (from.mean[channel], from.std[channel]);
                    pixels::normalise(to, &values[channel..], channels, mean, std);
                }
                if from.is_flipped(b) {
                    to.chunks_exact_mut(width).for_each(<[f32]>::reverse);
                }
            },
        );
        Ok(())
    }

    fn read(&mut self, to: &mut [f32], from: &Buf) -> Result<(), Error> {
        from.check("read", "from", to.len())?;
        from.read(to);
        Ok(())
    }

    fn write_ids(&mut self, to: &mut Vec<u32>, from: &[u32]) -> Result<(), Error> {
        front_mut("write_ids", "to", to, from.len())?.copy_from_slice(from);
        Ok(())
    }

    fn read_ids(&mut self, to: &mut [u32], from: &Vec<u32>) -> Result<(), Error> {
        to.copy_from_slice(front("read_ids", "from", from, to.len())?);
        Ok(())
    }

    fn write_scores(&mut self, to: &mut Floats, from: &[f32]) -> Result<(), Error> {
        front_mut("write_scores", "to", to, from.len())?.copy_from_slice(from);
        Ok(())
    }

    fn read_scores(&mut self, to: &mut [f32], from: &Floats) -> Result<(), Error> {
        to.copy_from_slice(front("read_scores", "from", from, to.len())?);
        Ok(())
    }

    fn gather_patches(
        &mut self,
        dims: PatchDims,
        out: &mut Buf,
        images: &Buf,
        ids: Option<&Vec<u32>>,
    ) -> Result<(), Error> {
        let ids = ids.map(Vec::as_slice);
        let p = dims.patch_size;
        copy_patches(
            "gather_patches",
            &self.threads,
            dims,
            out,
            images,
            ids,
            |channel, row, pixels, out| {
                out[(channel * p + row) * p..][..p].copy_from_slice(pixels);
            },
        )
    }

    fn embed_tokens(
        &mut self,
        dims: TokenDims,
        out: &mut Buf,
        x: &Buf,
        ids: Option<&Vec<u32>>,
        params: &Params,
        embed: EmbedParams,
    ) -> Result<(), Error> {
        const OP: &str = "embed_tokens";
        check_prefix(OP, dims, embed)?;
        out.check(OP, "out", dims.len())?;
        let x = x.floats(OP, "x", TokenDims { prefix: 0, ..dims }.len())?;
        let (table, positions) = params.positions(OP, embed.pos_embed, dims.dim)?;
        let cls_token = match embed.cls_token {
            Some(span) => {
                expect_len(OP, "pos_embed", table.len(), dims.dim)?;
                Some(params.part(OP, "cls_token", span, dims.dim)?)
            }
            None => None,
        };
        let ids = match ids {
            Some(ids) => {
                let count = product(&[dims.batch, dims.tokens]);
                Some(checked_ids(OP, "ids", ids, count, positions)?)
            }
            None => {
                expect_len(OP, "pos_embed", positions, dims.tokens)?;
                None
            }
        };
        let out = out.overwrite(dims.len());
        if out.is_empty() {
            return Ok(());
        }
        let (d, tokens) = (dims.dim, dims.tokens);
        let len = (dims.prefix + tokens) * d;
        self.threads
            .for_each(dims.batch, 2 * len, Pieces::new(out, len), |b, out| {
                let (prefix, patches) = out.split_at_mut(dims.prefix * d);
                if let Some(cls_token) = cls_token {
                    rows::add_to(self.isa, prefix, cls_token, &table[..d]);
                }
                for (j, out) in patches.chunks_exact_mut(d).enumerate() {
                    let patch = b * tokens + j;
                    let position = 1 + ids.map_or(j, |ids| ids[patch] as usize);
                    let position = &table[position * d..][..d];
                    rows::add_to(self.isa, out, &x[patch * d..][..d], position);
                }
            });
        Ok(())
    }

    fn linear(
        &mut self,
        dims: LinearDims,
        out: &mut Buf,
        x: &Buf,
        params: &Params,
        layer: Linear,
        epilogue: Epilogue,
    ) -> Result<(), Error> {
        const OP: &str = "linear";
        let (n, len) = (dims.out_features, dims.out_len());
        out.check(OP, "out", len)?;
        let (x, weight, bias) = linear_inputs(OP, dims, x, self.isa, params, layer)?;
        params.precision.check(self.isa)?;
        let (out, mode) = match epilogue {
            Epilogue::Bias => (out.overwrite(len).into(), Mode::Store),
            Epilogue::BiasQkv => (out.overwrite_as(params.precision, len), Mode::Store),
            Epilogue::BiasGelu => (out.overwrite_as(params.precision, len), Mode::Gelu),
            Epilogue::BiasResidual => (out.add_to(len).into(), Mode::Add),
        };
        let finish = Finish::to(out, n, bias, mode);
        self.product(params.precision, forward_dims(dims), x, weight, &finish)
    }

    fn layer_norm(
        &mut self,
        dims: RowDims,
        out: &mut Buf,
        x: &Buf,
        params: &Params,
        norm: Norm,
    ) -> Result<(), Error> {
        self.layer_norm_rows("layer_norm", dims, out, None, x, params, norm)
    }

    fn attention(&mut self, dims: AttentionDims, out: &mut Buf, qkv: &Buf) -> Result<(), Error> {
        // What needs no backward is a teacher or a trained network.
        let precision = self.teacher_precision;
        self.attention_forward("attention", precision, dims, out, None, qkv)
    }

    fn mean_similarity(
        &mut self,
        dims: TokenDims,
        scores: &mut Floats,
        x: &Buf,
    ) -> Result<(), Error> {
        const OP: &str = "mean_similarity";
        let (d, tokens) = (dims.dim, dims.tokens);
        let scores = front_mut(OP, "scores", scores, product(&[dims.batch, tokens]))?;
        let x = x.floats(OP, "x", dims.len())?;
        if scores.is_empty() || d == 0 {
            scores.fill(0.0);
            return Ok(());
        }
        let scratch = self.scratch.doubles(product(&[dims.batch, d + tokens]))?;
        let parts = (
            Pieces::new(scores, tokens),
            Pieces::new(scratch, d + tokens),
        );
        self.threads
            .for_each(dims.batch, 4 * tokens * d, parts, |b, (scores, scratch)| {
                let (mean, inverse) = scratch.split_at_mut(d);
                let x = patch_tokens(dims, x, b);
                rows::mean_similarity(self.isa, scores, x, mean, inverse, SCORE_EPS);
            });
        Ok(())
    }

    fn select(
        &mut self,
        batch: usize,
        tokens: usize,
        keep: usize,
        picked: &mut Vec<u32>,
        scores: &Floats,
    ) -> Result<(), Error> {
        const OP: &str = "select";
        if keep > tokens {
            return Err(Error::Kernel(KernelError::Dimensions {
                op: OP,
                expected: "at most as many tokens kept as there are",
                found: keep,
            }));
        }
        let scores = front(OP, "scores", scores, product(&[batch, tokens]))?;
        let picked = front_mut(OP, "picked", picked, product(&[batch, keep]))?;
        check_numbers(OP, "scores", scores)?;
        if picked.is_empty() {
            return Ok(());
        }
        let order = self.scratch.indices(batch * tokens)?;
        let parts = (Pieces::new(picked, keep), Pieces::new(order, tokens));
        // Sorting n elements compares some n log2 n times, each dearer than reading an element.
        self.threads
            .for_each(batch, 16 * tokens, parts, |b, (picked, order)| {
                let scores = &scores[b * tokens..][..tokens];
                for (i, token) in order.iter_mut().enumerate() {
                    *token = i as u32;
                }
                order.sort_unstable_by(|&i, &j| {
                    let (a, b) = (scores[i as usize], scores[j as usize]);
                    a.partial_cmp(&b).unwrap_or(Ordering::Equal).then(i.cmp(&j))
                });
                picked.copy_from_slice(&order[..keep]);
            });
        Ok(())
    }

    fn gather_tokens(
        &mut self,
        dims: TokenDims,
        keep: usize,
        out: &mut Buf,
        x: &Buf,
        picked: &Vec<u32>,
    ) -> Result<(), Error> {
        const OP: &str = "gather_tokens";
        let out_len = dims.with_tokens(keep).len();
        out.check(OP, "out", out_len)?;
        let x = x.floats(OP, "x", dims.len())?;
        let count = product(&[dims.batch, keep]);
        let picked = checked_ids(OP, "picked", picked, count, dims.tokens)?;
        let out = out.overwrite(out_len);
        if out.is_empty() {
            return Ok(());
        }
        let d = dims.dim;
        let (len, kept) = ((dims.prefix + dims.tokens) * d, (dims.prefix + keep) * d);
        self.threads
            .for_each(dims.batch, 2 * kept, Pieces::new(out, kept), |b, out| {
                let (x_prefix, x) = x[b * len..][..len].split_at(dims.prefix * d);
                let (prefix, patches) = out.split_at_mut(dims.prefix * d);
                prefix.copy_from_slice(x_prefix);
                let picked = &picked[b * keep..][..keep];
                for (out, &token) in patches.chunks_exact_mut(d).zip(picked) {
                    out.copy_from_slice(&x[token as usize * d..][..d]);
                }
            });
        Ok(())
    }

    fn gather_ids(
        &mut self,
        batch: usize,
        tokens: usize,
        keep: usize,
        out: &mut Vec<u32>,
        ids: Option<&Vec<u32>>,
        picked: &Vec<u32>,
    ) -> Result<(), Error> {
        const OP: &str = "gather_ids";
        let count = product(&[batch, keep]);
        let out = front_mut(OP, "out", out, count)?;
        let picked = checked_ids(OP, "picked", picked, count, tokens)?;
        match ids {
            None => out.copy_from_slice(picked),
            Some(ids) => {
                let ids = front(OP, "ids", ids, product(&[batch, tokens]))?;
                for (i, (out, &token)) in out.iter_mut().zip(picked).enumerate() {
                    *out = ids[i / keep * tokens + token as usize];
                }
            }
        }
        Ok(())
    }

    fn mean_pool(&mut self, dims: TokenDims, out: &mut Buf, x: &Buf) -> Result<(), Error> {
        const OP: &str = "mean_pool";
        let (d, tokens) = (dims.dim, dims.tokens);
        if tokens == 0 {
            return Err(Error::Kernel(KernelError::Dimensions {
                op: OP,
                expected: "at least one patch token",
                found: 0,
            }));
        }
        let out_len = product(&[dims.batch, d]);
        out.check(OP, "out", out_len)?;
        let x = x.floats(OP, "x", dims.len())?;
        let out = out.overwrite(out_len);
        if out.is_empty() {
            return Ok(());
        }
        self.threads
            .for_each(dims.batch, tokens * d, Pieces::new(out, d), |b, out| {
                out.fill(0.0);
                rows::sum_rows(self.isa, out, patch_tokens(dims, x, b), tokens, d);
                for out in out {
                    *out /= tokens as f32;
                }
            });
        Ok(())
    }
}

/// The patch tokens of sequence `b`: `[tokens, dim]`.
pub(crate) fn patch_tokens(dims: TokenDims, x: &[f32], b: usize) -> &[f32] {
    let start = (b * (dims.prefix + dims.tokens) + dims.prefix) * dims.dim;
    &x[start..][..dims.tokens * dims.dim]
}
