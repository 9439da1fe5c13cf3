//! What training does with tokens, and what both traits share about them. `impl TrainBackend` calls these methods by their names.

use pcae_kernel::backend::{DecoderDims, EmbedParams, PatchDims, Span, TokenDims};
use pcae_kernel::error::{Error as KernelError, expect_len, product};

use crate::Cuda;
use crate::buffers::{Buf, Ids, Params, Scores, Vector};
use crate::checks::small;
use crate::driver::DevicePtr;
use crate::error::Error;
use crate::kernels::{self, Kernel};
use crate::queue::{Arg, Shape, UNCOUNTED};

/// Threads of a block of every kernel that goes element by element.
pub(crate) const BLOCK: u32 = 256;
/// Words that a thread of such a kernel has under way at once.
const WORDS: u32 = 4;
/// Blocks that keep any device busy; as long as there are fewer, threads take a word each.
const BUSY: u32 = 512;
/// Warps of a block.
const WARPS: usize = BLOCK as usize / 32;
/// Groups of rows in which a sum over many is made.
const PARTS: usize = 128;

impl Cuda {
    /// Elements that kernels take at once of rows of `dim`: 16 bytes, or one.
    fn word(&self, dim: usize) -> usize {
        let vector = 16 / self.precision.size();
        match dim.is_multiple_of(vector) {
            true => vector,
            false => 1,
        }
    }

    /// Blocks for a kernel that goes through `len` elements of rows of `dim`.
    pub(crate) fn blocks(&self, len: u32, dim: usize) -> Shape {
        let words = len / self.word(dim) as u32;
        let few = words.div_ceil(BLOCK).min(BUSY);
        self.grid(words.div_ceil(WORDS * BLOCK).max(few), 1)
    }

    /// `x` by `y` blocks.
    pub(crate) fn grid(&self, x: u32, y: u32) -> Shape {
        Shape {
            grid: [x, y, 1],
            block: BLOCK,
            shared: 0,
        }
    }

    /// Blocks beside each other for a kernel that sums rows of `dim`, a word for each of 32 lanes.
    pub(crate) fn columns(&self, op: &'static str, dim: usize) -> Result<u32, KernelError> {
        small(op, dim.div_ceil(32 * self.word(dim)))
    }

    /// By which code a kernel reports an index that is not below `limit`, of `count`.
    pub(crate) fn index_code(
        &mut self,
        op: &'static str,
        what: &'static str,
        count: usize,
        limit: usize,
    ) -> Result<u32, KernelError> {
        let error = KernelError::IndexOutOfRange {
            op,
            what,
            limit,
            found: 0,
        };
        if limit == 0 && count > 0 {
            return Err(error);
        }
        Ok(self.queue.code(error))
    }

    /// Cuts patches out of pictures with `kernel`, which has the arguments of `gather_patches`.
    pub(crate) fn cut_patches(
        &mut self,
        op: &'static str,
        kernel: Kernel,
        dims: PatchDims,
        out: &mut Buf,
        images: &Buf,
        ids: Option<&Ids>,
    ) -> Result<(), Error> {
        dims.check(op, ids.is_some())?;
        self.queue.expect(op, "images", images, dims.images_len())?;
        self.queue.expect(op, "out", out, dims.patches_len())?;
        let patches = product(&[dims.batch, dims.taken]);
        let code = match ids {
            Some(ids) => {
                self.queue.expect(op, "ids", ids, patches)?;
                self.index_code(op, "ids", patches, dims.num_patches())?
            }
            None => 0,
        };
        if dims.patches_len() == 0 {
            return Ok(());
        }
        small(op, dims.images_len())?;
        let len = small(op, dims.patches_len())?;
        let shape = self.blocks(len, dims.patch_size);
        self.queue.launch(
            kernel,
            shape,
            self.queue.act_bytes(2 * dims.patches_len()),
            &[
                out.at(0).into(),
                images.at(0).into(),
                ids.map(|ids| ids.at(0)).into(),
                small(op, patches)?.into(),
                small(op, dims.channels)?.into(),
                small(op, dims.height)?.into(),
                small(op, dims.width)?.into(),
                small(op, dims.patch_size)?.into(),
                small(op, dims.taken)?.into(),
                self.queue.fault().into(),
                code.into(),
            ],
        )
    }

    pub(crate) fn pixel_targets(
        &mut self,
        dims: PatchDims,
        out: &mut Buf,
        images: &Buf,
        ids: &Ids,
    ) -> Result<(), Error> {
        let kernel = kernels::PIXEL_TARGETS;
        self.cut_patches("pixel_targets", kernel, dims, out, images, Some(ids))
    }

    /// `out[b, j] = x[b, skip + j - pad]`, zero where `j < pad`, of `[tokens, dim]` in each sequence.
    fn shift_tokens(
        &mut self,
        op: &'static str,
        (out, out_tokens): (DevicePtr, usize),
        (x, x_tokens): (DevicePtr, usize),
        batch: usize,
        [skip, pad]: [usize; 2],
        dim: usize,
    ) -> Result<(), Error> {
        let len = small(op, product(&[batch, out_tokens, dim]))?;
        if len == 0 {
            return Ok(());
        }
        let shape = self.blocks(len, dim);
        self.queue.launch(
            kernels::SHIFT_TOKENS,
            shape,
            self.queue
                .act_bytes(2 * len as usize - product(&[batch, pad, dim])),
            &[
                out.into(),
                x.into(),
                small(op, batch)?.into(),
                small(op, out_tokens)?.into(),
                small(op, x_tokens)?.into(),
                small(op, skip)?.into(),
                small(op, pad)?.into(),
                small(op, dim)?.into(),
            ],
        )
    }

    /// `to += sum over b and j of x[b, first + j]`, of `[tokens, dim]` in each sequence and `count` tokens of it.
    fn add_tokens(
        &mut self,
        op: &'static str,
        to: DevicePtr,
        x: DevicePtr,
        batch: usize,
        (first, count): (usize, usize),
        tokens: usize,
        dim: usize,
    ) -> Result<(), Error> {
        let rows = product(&[batch, count]);
        if product(&[rows, dim]) == 0 {
            return Ok(());
        }
        // Of some size at least, so that a part costs more than to add it.
        let rows_per_part = rows.div_ceil(PARTS).max(4 * WARPS);
        let groups = small(op, rows.div_ceil(rows_per_part))?;
        let width = small(op, dim)?;
        let sums = product(&[groups as usize, dim, size_of::<f32>()]);
        let parts = self.queue.workspace(sums)?;
        let shape = self.grid(groups, self.columns(op, dim)?);
        self.queue.launch(
            kernels::SUM_TOKENS,
            shape,
            self.queue.act_bytes(rows * dim) + sums,
            &[
                parts.into(),
                x.into(),
                small(op, rows)?.into(),
                small(op, rows_per_part)?.into(),
                small(op, count)?.into(),
                small(op, first)?.into(),
                small(op, tokens)?.into(),
                width.into(),
            ],
        )?;
        let shape = self.grid(width.div_ceil(32), 1);
        self.queue.launch(
            kernels::ADD_COLUMN_SUMS,
            shape,
            sums + 2 * dim * size_of::<f32>(),
            &[
                to.into(),
                Arg::NULL,
                parts.into(),
                groups.into(),
                width.into(),
                1_u32.into(),
            ],
        )
    }

    pub(crate) fn embed_tokens_backward(
        &mut self,
        dims: TokenDims,
        d_x: &mut Buf,
        grads: &mut Vector,
        d_out: &Buf,
        embed: EmbedParams,
    ) -> Result<(), Error> {
        const OP: &str = "embed_tokens_backward";
        self.queue.expect(OP, "grads", grads, 0)?;
        self.queue.expect(OP, "d_out", d_out, dims.len())?;
        self.queue
            .expect(OP, "d_x", d_x, TokenDims { prefix: 0, ..dims }.len())?;
        if let Some(cls_token) = embed.cls_token {
            self.queue
                .expect_span(OP, "cls_token", grads, cls_token, dims.dim)?;
            if dims.prefix != 1 {
                return Err(Error::Kernel(KernelError::Dimensions {
                    op: OP,
                    expected: "a prefix of 1 with a class token",
                    found: dims.prefix,
                }));
            }
            let (to, tokens) = (grads.at(cls_token.start), 1 + dims.tokens);
            self.add_tokens(OP, to, d_out.at(0), dims.batch, (0, 1), tokens, dims.dim)?;
        }
        self.strip(OP, dims, d_x, d_out)
    }

    fn strip(
        &mut self,
        op: &'static str,
        dims: TokenDims,
        out: &mut Buf,
        x: &Buf,
    ) -> Result<(), Error> {
        if (TokenDims { prefix: 0, ..dims }).is_empty() {
            return Ok(());
        }
        let (out, x) = (
            (out.at(0), dims.tokens),
            (x.at(0), dims.prefix + dims.tokens),
        );
        self.shift_tokens(op, out, x, dims.batch, [dims.prefix, 0], dims.dim)
    }

    pub(crate) fn strip_prefix(
        &mut self,
        dims: TokenDims,
        out: &mut Buf,
        x: &Buf,
    ) -> Result<(), Error> {
        const OP: &str = "strip_prefix";
        self.queue.expect(OP, "x", x, dims.len())?;
        self.queue
            .expect(OP, "out", out, TokenDims { prefix: 0, ..dims }.len())?;
        self.strip(OP, dims, out, x)
    }

    pub(crate) fn strip_prefix_backward(
        &mut self,
        dims: TokenDims,
        d_x: &mut Buf,
        d_out: &Buf,
    ) -> Result<(), Error> {
        const OP: &str = "strip_prefix_backward";
        self.queue.expect(OP, "d_x", d_x, dims.len())?;
        let stripped = TokenDims { prefix: 0, ..dims };
        self.queue.expect(OP, "d_out", d_out, stripped.len())?;
        if dims.is_empty() {
            return Ok(());
        }
        let (d_x, d_out) = (
            (d_x.at(0), dims.prefix + dims.tokens),
            (d_out.at(0), dims.tokens),
        );
        self.shift_tokens(OP, d_x, d_out, dims.batch, [0, dims.prefix], dims.dim)
    }

    pub(crate) fn decoder_tokens(
        &mut self,
        dims: DecoderDims,
        out: &mut Buf,
        x: &Buf,
        ids_visible: &Ids,
        ids_target: &Ids,
        params: &Params,
        mask_token: Span,
        pos_embed: Span,
    ) -> Result<(), Error> {
        const OP: &str = "decoder_tokens";
        self.queue.expect(OP, "out", out, dims.len())?;
        self.queue.expect(OP, "x", x, dims.latent_len())?;
        self.queue
            .expect_span(OP, "mask_token", params, mask_token, dims.dim)?;
        let positions = self.queue.positions(OP, params, pos_embed, dims.dim)?;
        expect_len(OP, "pos_embed", pos_embed.len, dims.dim)?;
        let visible = product(&[dims.batch, dims.visible]);
        let targets = product(&[dims.batch, dims.targets]);
        self.queue.expect(OP, "ids_visible", ids_visible, visible)?;
        self.queue.expect(OP, "ids_target", ids_target, targets)?;
        let visible_code = self.index_code(OP, "ids_visible", visible, positions)?;
        let target_code = self.index_code(OP, "ids_target", targets, positions)?;
        if dims.is_empty() {
            return Ok(());
        }
        let shape = self.blocks(small(OP, dims.len())?, dims.dim);
        self.queue.launch(
            kernels::DECODER_TOKENS,
            shape,
            self.queue.act_bytes(dims.len() + dims.latent_len()),
            &[
                out.at(0).into(),
                x.at(0).into(),
                ids_visible.at(0).into(),
                ids_target.at(0).into(),
                params.at(mask_token.start).into(),
                params.at(pos_embed.start).into(),
                small(OP, dims.batch)?.into(),
                small(OP, dims.visible)?.into(),
                small(OP, dims.targets)?.into(),
                small(OP, dims.dim)?.into(),
                small(OP, positions)?.into(),
                self.queue.fault().into(),
                visible_code.into(),
                target_code.into(),
            ],
        )
    }

    pub(crate) fn decoder_tokens_backward(
        &mut self,
        dims: DecoderDims,
        d_x: &mut Buf,
        grads: &mut Vector,
        d_out: &Buf,
        mask_token: Span,
    ) -> Result<(), Error> {
        const OP: &str = "decoder_tokens_backward";
        self.queue.expect(OP, "grads", grads, 0)?;
        self.queue.expect(OP, "d_out", d_out, dims.len())?;
        self.queue.expect(OP, "d_x", d_x, dims.latent_len())?;
        self.queue
            .expect_span(OP, "mask_token", grads, mask_token, dims.dim)?;
        if dims.is_empty() {
            return Ok(());
        }
        let latent = 1 + dims.visible;
        let tokens = latent + dims.targets;
        let (to, d_out) = (grads.at(mask_token.start), d_out.at(0));
        let masks = (latent, dims.targets);
        self.add_tokens(OP, to, d_out, dims.batch, masks, tokens, dims.dim)?;
        let d_x = (d_x.at(0), latent);
        self.shift_tokens(OP, d_x, (d_out, tokens), dims.batch, [0, 0], dims.dim)
    }

    pub(crate) fn gather_tokens_backward(
        &mut self,
        dims: TokenDims,
        keep: usize,
        d_x: &mut Buf,
        d_out: &Buf,
        picked: &Ids,
    ) -> Result<(), Error> {
        const OP: &str = "gather_tokens_backward";
        self.queue.expect(OP, "d_x", d_x, dims.len())?;
        self.queue
            .expect(OP, "d_out", d_out, dims.with_tokens(keep).len())?;
        let count = product(&[dims.batch, keep]);
        self.queue.expect(OP, "picked", picked, count)?;
        let code = self.index_code(OP, "picked", count, dims.tokens)?;
        if dims.is_empty() {
            return Ok(());
        }
        small(OP, dims.len())?;
        let rows = dims.batch * (dims.prefix + dims.tokens);
        let shape = self.grid(small(OP, rows.div_ceil(WARPS))?, 1);
        self.queue.launch(
            kernels::GATHER_TOKENS_BACKWARD,
            shape,
            self.queue
                .act_bytes(dims.len() + dims.with_tokens(keep).len()),
            &[
                d_x.at(0).into(),
                d_out.at(0).into(),
                picked.at(0).into(),
                small(OP, dims.batch)?.into(),
                small(OP, dims.prefix)?.into(),
                small(OP, dims.tokens)?.into(),
                small(OP, keep)?.into(),
                small(OP, dims.dim)?.into(),
                self.queue.fault().into(),
                code.into(),
            ],
        )
    }

    pub(crate) fn mean_pool_backward(
        &mut self,
        dims: TokenDims,
        d_x: &mut Buf,
        d_out: &Buf,
    ) -> Result<(), Error> {
        const OP: &str = "mean_pool_backward";
        self.queue.expect(OP, "d_x", d_x, dims.len())?;
        self.queue
            .expect(OP, "d_out", d_out, product(&[dims.batch, dims.dim]))?;
        if dims.is_empty() {
            return Ok(());
        }
        let shape = self.blocks(small(OP, dims.len())?, dims.dim);
        self.queue.launch(
            kernels::MEAN_POOL_BACKWARD,
            shape,
            self.queue
                .act_bytes(dims.len() + product(&[dims.batch, dims.dim])),
            &[
                d_x.at(0).into(),
                d_out.at(0).into(),
                small(OP, dims.batch)?.into(),
                small(OP, dims.prefix)?.into(),
                small(OP, dims.tokens)?.into(),
                small(OP, dims.dim)?.into(),
            ],
        )
    }

    pub(crate) fn pivoted_qr_scores(
        &mut self,
        dims: TokenDims,
        scores: &mut Scores,
        x: &Buf,
    ) -> Result<(), Error> {
        const OP: &str = "pivoted_qr_scores";
        let count = product(&[dims.batch, dims.tokens]);
        self.queue.expect(OP, "scores", scores, count)?;
        self.queue.expect(OP, "x", x, dims.len())?;
        if dims.batch == 0 || dims.prefix.saturating_add(dims.tokens) == 0 {
            return Ok(());
        }
        small(OP, dims.len())?;
        let code = self.queue.code(KernelError::NotANumber {
            op: OP,
            what: "x",
            at: 0,
        });
        let residuals = self
            .queue
            .workspace(product(&[count, dims.dim, size_of::<f64>()]))?;
        let shape = Shape {
            grid: [small(OP, dims.batch)?, 1, 1],
            block: kernels::PIVOTED_QR_SCORES.threads,
            shared: small(
                OP,
                product(&[dims.dim.saturating_add(dims.tokens), size_of::<f64>()]),
            )?,
        };
        self.queue.launch(
            kernels::PIVOTED_QR_SCORES,
            shape,
            UNCOUNTED,
            &[
                scores.at(0).into(),
                residuals.into(),
                x.at(0).into(),
                small(OP, dims.prefix)?.into(),
                small(OP, dims.tokens)?.into(),
                small(OP, dims.dim)?.into(),
                self.queue.fault().into(),
                code.into(),
            ],
        )
    }
}
