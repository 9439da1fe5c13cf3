//! What inference needs: `impl Backend for Cuda`.

use pcae_kernel::backend::{
    AttentionDims, Backend, BlockDims, EmbedParams, Epilogue, Linear, LinearDims, Norm, PatchDims,
    PixelDims, Pixels, RowDims, TokenDims, block_by_layers,
};
use pcae_kernel::error::{Error as KernelError, expect_len, product};
use pcae_kernel::layout::BlockParams;

use crate::Cuda;
use crate::buffers::{Buf, Ids, Params, Scores};
use crate::checks::small;
use crate::driver::DevicePtr;
use crate::error::Error;
use crate::gemm::Matmul;
use crate::kernels;
use crate::padding;
use crate::queue::{Shape, UNCOUNTED};
use crate::tokens::BLOCK;

/// Columns of a token that a warp of `mean_similarity` keeps in registers, and its warps.
const SLAB: usize = 1024;
const SCORE_WARPS: usize = 16;

/// Blocks that keep a device busy with scores: one for each of 132 multiprocessors.
const SCORE_BLOCKS: usize = 132;

/// Tokens of a sequence that one block of `mean_similarity` takes; all of them where there are enough sequences. It depends on sizes alone,
/// and so do the bits of the scores.
fn score_part(dims: TokenDims) -> usize {
    let parts =
        (SCORE_BLOCKS / dims.batch.max(1)).clamp(1, dims.tokens.div_ceil(SCORE_WARPS).max(1));
    dims.tokens.div_ceil(parts).next_multiple_of(SCORE_WARPS)
}

/// Bytes for the sums of those parts, where a sequence has more than one.
pub(crate) fn score_sums(dims: TokenDims) -> usize {
    let parts = dims.tokens.div_ceil(score_part(dims).max(1));
    match parts {
        0 | 1 => 0,
        _ => product(&[dims.batch, parts, dims.dim, size_of::<f32>()]),
    }
}

/// Up to so many tokens are selected by counting; a sort takes fewer comparisons, one after the other.
const COUNTED: usize = 1024;

impl Cuda {
    /// `out = x @ weight^T + bias (+ add)`, all of them checked.
    pub(crate) fn forward_product(
        &mut self,
        op: &'static str,
        dims: LinearDims,
        out: &mut Buf,
        x: &Buf,
        params: &Params,
        layer: Linear,
        add: Option<DevicePtr>,
    ) -> Result<(), Error> {
        self.queue.expect(op, "out", out, dims.out_len())?;
        self.queue.expect(op, "x", x, dims.in_len())?;
        self.queue.expect_layer(op, params, layer, dims)?;
        if params.e4m3(layer).is_some() {
            let x = self.round_to_e4m3(dims.in_len(), x.at(0))?;
            return self.fp8_product(op, dims, out.at(0), x, params, layer, add);
        }
        let (mut a, mut b) = (x.at(0), params.product(layer.weight.start));
        let mut row = dims.in_features;
        if let Some(padded) = padding::padded(self.precision, dims) {
            let size = padding::bytes(self.precision, dims, true);
            let room = self.queue.workspace(size)?;
            let behind = room.plus(dims.rows * padded * self.precision.size());
            self.queue
                .widen_rows(op, room, a, [dims.rows, row, padded])?;
            self.queue
                .widen_rows(op, behind, b, [dims.out_features, row, padded])?;
            (a, b, row) = (room, behind, padded);
        }
        self.queue.matmul(Matmul {
            m: dims.rows,
            n: dims.out_features,
            k: row,
            a,
            a_transposed: false,
            a_row: row,
            b,
            b_transposed: true,
            b_row: row,
            bias: Some(params.product(layer.bias.start)),
            add,
            out: out.at(0),
            out_f32: false,
            scale: None,
        })
    }
}

impl Backend for Cuda {
    type Error = Error;
    type Buf = Buf;
    type Ids = Ids;
    type Scores = Scores;
    type Params = Params;

    fn buf(&mut self, len: usize) -> Result<Buf, Error> {
        Buf::new(&mut self.queue, self.precision, len)
    }

    fn ids(&mut self, len: usize) -> Result<Ids, Error> {
        Ids::new(&mut self.queue, len)
    }

    fn scores(&mut self, len: usize) -> Result<Scores, Error> {
        Scores::new(&mut self.queue, len)
    }

    fn write(&mut self, to: &mut Buf, from: &[f32]) -> Result<(), Error> {
        self.queue.expect("write", "to", to, from.len())?;
        self.queue.write_act(to.at(0), from)
    }

    fn write_pixels(
        &mut self,
        dims: PixelDims,
        to: &mut Buf,
        pixels: Pixels<'_>,
    ) -> Result<(), Error> {
        const OP: &str = "write_pixels";
        self.queue.expect(OP, "to", to, dims.len())?;
        pixels.check(OP, dims)?;
        if dims.is_empty() {
            return Ok(());
        }
        self.queue.write_pixels(dims, to.at(0), pixels)
    }

    fn write_values(&mut self, _dims: PixelDims, to: &mut Buf, from: &[f32]) -> Result<(), Error> {
        self.queue.expect("write_values", "to", to, from.len())?;
        match from.is_empty() {
            true => Ok(()),
            false => self.queue.write_values(to.at(0), from),
        }
    }

    fn read(&mut self, to: &mut [f32], from: &Buf) -> Result<(), Error> {
        self.queue.expect("read", "from", from, to.len())?;
        self.queue.read_act(to, from.at(0))
    }

    fn write_ids(&mut self, to: &mut Ids, from: &[u32]) -> Result<(), Error> {
        self.queue.expect("write_ids", "to", to, from.len())?;
        self.queue.write_u32(to.at(0), from)
    }

    fn read_ids(&mut self, to: &mut [u32], from: &Ids) -> Result<(), Error> {
        self.queue.expect("read_ids", "from", from, to.len())?;
        self.queue.read_u32(to, from.at(0))
    }

    fn write_scores(&mut self, to: &mut Scores, from: &[f32]) -> Result<(), Error> {
        self.queue.expect("write_scores", "to", to, from.len())?;
        self.queue.write_f32(to.at(0), from)
    }

    fn read_scores(&mut self, to: &mut [f32], from: &Scores) -> Result<(), Error> {
        self.queue.expect("read_scores", "from", from, to.len())?;
        self.queue.read_f32(to, from.at(0))
    }

    fn gather_patches(
        &mut self,
        dims: PatchDims,
        out: &mut Buf,
        images: &Buf,
        ids: Option<&Ids>,
    ) -> Result<(), Error> {
        let kernel = kernels::GATHER_PATCHES;
        self.cut_patches("gather_patches", kernel, dims, out, images, ids)
    }

    fn embed_tokens(
        &mut self,
        dims: TokenDims,
        out: &mut Buf,
        x: &Buf,
        ids: Option<&Ids>,
        params: &Params,
        embed: EmbedParams,
    ) -> Result<(), Error> {
        const OP: &str = "embed_tokens";
        if dims.prefix != usize::from(embed.cls_token.is_some()) {
            return Err(Error::Kernel(KernelError::Dimensions {
                op: OP,
                expected: "a prefix of 1 with a class token, of 0 without",
                found: dims.prefix,
            }));
        }
        self.queue.expect(OP, "out", out, dims.len())?;
        self.queue
            .expect(OP, "x", x, TokenDims { prefix: 0, ..dims }.len())?;
        let positions = self
            .queue
            .positions(OP, params, embed.pos_embed, dims.dim)?;
        if let Some(cls_token) = embed.cls_token {
            expect_len(OP, "pos_embed", embed.pos_embed.len, dims.dim)?;
            self.queue
                .expect_span(OP, "cls_token", params, cls_token, dims.dim)?;
        }
        let code = match ids {
            Some(ids) => {
                let count = product(&[dims.batch, dims.tokens]);
                self.queue.expect(OP, "ids", ids, count)?;
                self.index_code(OP, "ids", count, positions)?
            }
            None => {
                expect_len(OP, "pos_embed", positions, dims.tokens)?;
                0
            }
        };
        if dims.is_empty() {
            return Ok(());
        }
        let shape = self.blocks(small(OP, dims.len())?, dims.dim);
        let cls_token = embed.cls_token.map(|span| params.at(span.start));
        self.queue.launch(
            kernels::EMBED_TOKENS,
            shape,
            self.queue
                .act_bytes(dims.len() + TokenDims { prefix: 0, ..dims }.len()),
            &[
                out.at(0).into(),
                x.at(0).into(),
                ids.map(|ids| ids.at(0)).into(),
                cls_token.into(),
                params.at(embed.pos_embed.start).into(),
                small(OP, dims.batch)?.into(),
                small(OP, dims.tokens)?.into(),
                small(OP, dims.dim)?.into(),
                small(OP, positions)?.into(),
                self.queue.fault().into(),
                code.into(),
            ],
        )
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
        let add = (epilogue == Epilogue::BiasResidual).then(|| out.at(0));
        self.forward_product(OP, dims, out, x, params, layer, add)?;
        if epilogue == Epilogue::BiasGelu {
            let len = dims.out_len();
            let args = [out.at(0).into(), (len as u64).into()];
            let shape = self.queue.elements(len);
            let bytes = self.queue.act_bytes(2 * len);
            self.queue
                .launch(kernels::GELU_IN_PLACE, shape, bytes, &args)?;
        }
        Ok(())
    }

    fn layer_norm(
        &mut self,
        dims: RowDims,
        out: &mut Buf,
        x: &Buf,
        params: &Params,
        norm: Norm,
    ) -> Result<(), Error> {
        self.layer_norm_rows("layer_norm", dims, (out, false), None, x, params, norm)
    }

    fn attention(&mut self, dims: AttentionDims, out: &mut Buf, qkv: &Buf) -> Result<(), Error> {
        self.attention_forward("attention", dims, out, None, qkv, false)
    }

    fn block(
        &mut self,
        dims: BlockDims,
        x: &mut Buf,
        scratch: [&mut Buf; 2],
        params: &Params,
        block: BlockParams,
    ) -> Result<(), Error> {
        match params.are_fp8() {
            true => self.block_in_fp8(dims, x, scratch, params, block),
            false => block_by_layers(self, dims, x, scratch, params, block),
        }
    }

    fn mean_similarity(
        &mut self,
        dims: TokenDims,
        scores: &mut Scores,
        x: &Buf,
    ) -> Result<(), Error> {
        const OP: &str = "mean_similarity";
        let count = product(&[dims.batch, dims.tokens]);
        self.queue.expect(OP, "scores", scores, count)?;
        self.queue.expect(OP, "x", x, dims.len())?;
        if count == 0 {
            return Ok(());
        }
        small(OP, dims.len())?;
        let (x, scores) = (x.at(0), scores.at(0));
        let [prefix, tokens, dim] = [dims.prefix, dims.tokens, dims.dim].map(|n| small(OP, n));
        let (prefix, tokens, dim) = (prefix?, tokens?, dim?);
        // Of either kernel. The first finds what it reads twice in the level-2 cache.
        let bytes = self.queue.act_bytes(count * dims.dim);
        let shape = |parts, block, floats| -> Result<Shape, KernelError> {
            Ok(Shape {
                grid: [small(OP, dims.batch)?, parts, 1],
                block,
                shared: small(OP, product(&[floats, size_of::<f32>()]))?,
            })
        };
        // Each warp's part of a slab of the sum of the tokens.
        let slab = SCORE_WARPS * dims.dim.min(SLAB);
        let each = score_part(dims);
        if each >= dims.tokens {
            let kernel = kernels::MEAN_SIMILARITY;
            let shape = shape(1, kernel.threads, dims.dim.saturating_add(slab))?;
            let args = [
                scores.into(),
                x.into(),
                prefix.into(),
                tokens.into(),
                dim.into(),
            ];
            return self.queue.launch(kernel, shape, bytes, &args);
        }
        let (parts, each) = (small(OP, dims.tokens.div_ceil(each))?, small(OP, each)?);
        let sums = self.queue.workspace(score_sums(dims))?;
        let (first, second) = (kernels::SIMILARITY_SUMS, kernels::SIMILARITY_SCORES);
        let [prefix, tokens, dim, each] = [prefix, tokens, dim, each].map(Into::into);
        let args = [sums.into(), x.into(), prefix, tokens, dim, each];
        self.queue
            .launch(first, shape(parts, first.threads, slab)?, bytes, &args)?;
        let args = [
            scores.into(),
            sums.into(),
            x.into(),
            prefix,
            tokens,
            dim,
            each,
        ];
        self.queue.launch(
            second,
            shape(parts, second.threads, dims.dim)?,
            bytes,
            &args,
        )
    }

    fn select(
        &mut self,
        batch: usize,
        tokens: usize,
        keep: usize,
        picked: &mut Ids,
        scores: &Scores,
    ) -> Result<(), Error> {
        const OP: &str = "select";
        if keep > tokens {
            return Err(Error::Kernel(KernelError::Dimensions {
                op: OP,
                expected: "at most as many tokens kept as there are",
                found: keep,
            }));
        }
        let count = product(&[batch, tokens]);
        self.queue.expect(OP, "scores", scores, count)?;
        self.queue
            .expect(OP, "picked", picked, product(&[batch, keep]))?;
        if count == 0 {
            return Ok(());
        }
        small(OP, count)?;
        let code = self.queue.code(KernelError::NotANumber {
            op: OP,
            what: "scores",
            at: 0,
        });
        let (x, n, keep) = (small(OP, batch)?, small(OP, tokens)?, small(OP, keep)?);
        let (picked, scores, fault) = (picked.at(0), scores.at(0), self.queue.fault());
        let padded = n.checked_next_power_of_two();
        let pairs = padded.map_or(u32::MAX, |padded| padded.saturating_mul(8));
        match padded {
            Some(padded) if tokens > COUNTED && pairs <= self.queue.context.shared => {
                let shape = Shape {
                    grid: [x, 1, 1],
                    block: kernels::SELECT_BY_SORT.threads,
                    shared: pairs,
                };
                self.queue.launch(
                    kernels::SELECT_BY_SORT,
                    shape,
                    UNCOUNTED,
                    &[
                        picked.into(),
                        scores.into(),
                        n.into(),
                        keep.into(),
                        padded.into(),
                        fault.into(),
                        code.into(),
                    ],
                )
            }
            _ => {
                let shape = self.grid(x, n.div_ceil(BLOCK));
                self.queue.launch(
                    kernels::SELECT_BY_RANK,
                    shape,
                    UNCOUNTED,
                    &[
                        picked.into(),
                        scores.into(),
                        n.into(),
                        keep.into(),
                        fault.into(),
                        code.into(),
                    ],
                )
            }
        }
    }

    fn gather_tokens(
        &mut self,
        dims: TokenDims,
        keep: usize,
        out: &mut Buf,
        x: &Buf,
        picked: &Ids,
    ) -> Result<(), Error> {
        const OP: &str = "gather_tokens";
        let kept = dims.with_tokens(keep);
        self.queue.expect(OP, "x", x, dims.len())?;
        self.queue.expect(OP, "out", out, kept.len())?;
        let count = product(&[dims.batch, keep]);
        self.queue.expect(OP, "picked", picked, count)?;
        let code = self.index_code(OP, "picked", count, dims.tokens)?;
        if kept.is_empty() {
            return Ok(());
        }
        let shape = self.blocks(small(OP, kept.len())?, dims.dim);
        self.queue.launch(
            kernels::GATHER_TOKENS,
            shape,
            self.queue.act_bytes(2 * kept.len()),
            &[
                out.at(0).into(),
                x.at(0).into(),
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

    fn gather_ids(
        &mut self,
        batch: usize,
        tokens: usize,
        keep: usize,
        out: &mut Ids,
        ids: Option<&Ids>,
        picked: &Ids,
    ) -> Result<(), Error> {
        const OP: &str = "gather_ids";
        let count = product(&[batch, keep]);
        self.queue.expect(OP, "out", out, count)?;
        self.queue.expect(OP, "picked", picked, count)?;
        if let Some(ids) = ids {
            self.queue
                .expect(OP, "ids", ids, product(&[batch, tokens]))?;
        }
        let code = self.index_code(OP, "picked", count, tokens)?;
        let len = small(OP, count)?;
        let shape = self.grid(len.div_ceil(BLOCK), 1);
        self.queue.launch(
            kernels::GATHER_IDS,
            shape,
            (2 + usize::from(ids.is_some())) * count * size_of::<u32>(),
            &[
                out.at(0).into(),
                ids.map(|ids| ids.at(0)).into(),
                picked.at(0).into(),
                len.into(),
                small(OP, tokens)?.into(),
                small(OP, keep)?.into(),
                self.queue.fault().into(),
                code.into(),
            ],
        )
    }

    fn mean_pool(&mut self, dims: TokenDims, out: &mut Buf, x: &Buf) -> Result<(), Error> {
        const OP: &str = "mean_pool";
        if dims.tokens == 0 {
            return Err(Error::Kernel(KernelError::Dimensions {
                op: OP,
                expected: "at least one patch token",
                found: 0,
            }));
        }
        self.queue
            .expect(OP, "out", out, product(&[dims.batch, dims.dim]))?;
        self.queue.expect(OP, "x", x, dims.len())?;
        if dims.is_empty() {
            return Ok(());
        }
        let shape = self.grid(small(OP, dims.batch)?, self.columns(OP, dims.dim)?);
        self.queue.launch(
            kernels::MEAN_POOL,
            shape,
            self.queue
                .act_bytes(product(&[dims.batch, dims.tokens + 1, dims.dim])),
            &[
                out.at(0).into(),
                x.at(0).into(),
                small(OP, dims.prefix)?.into(),
                small(OP, dims.tokens)?.into(),
                small(OP, dims.dim)?.into(),
            ],
        )
    }
}
