//! A row of blocks that keeps what its backward needs.

use alloc::vec::Vec;
use core::mem::swap;

use super::vit::{Scorer, Selector, linear_dims};
use crate::backend::{
    Accum, AttentionDims, Backend, Epilogue, RowDims, Span, TokenDims, TrainBackend,
};
use crate::config::Reduction;
use crate::error::{Error, expect_len, product};
use crate::layout::Blocks;

/// Blocks in a row, with token reduction between them where the task has it.
pub struct Trunk<B: TrainBackend> {
    blocks: Blocks,
    /// `inputs[i]` goes into block `i`; the last one is the output.
    inputs: Vec<B::Buf>,
    saved: Vec<SavedBlock<B>>,
    /// `stages[i]` drops tokens on the way into `inputs[i]`.
    stages: Vec<Option<Stage<B>>>,
    selector: Option<Selector<B>>,
}

/// What one block leaves for its backward.
struct SavedBlock<B: TrainBackend> {
    dims: TokenDims,
    norm1: B::Buf,
    norm1_stats: B::Vector,
    qkv: B::Buf,
    lse: B::Vector,
    attn: B::Buf,
    /// The residual stream between attention and MLP.
    mid: B::Buf,
    norm2: B::Buf,
    norm2_stats: B::Vector,
    pre_gelu: B::Buf,
    hidden: B::Buf,
    /// Stochastic depth's factor of the two branches for each sample.
    drop_path: Option<[B::Buf; 2]>,
}

struct Stage<B: Backend> {
    before: TokenDims,
    keep: usize,
    picked: B::Ids,
}

/// Buffers that no one needs after the call that fills them; shared by all parts of a model.
pub(super) struct Scratch<B: Backend> {
    /// Gradient of the residual stream, at the end of every backward.
    pub(super) a: B::Buf,
    pub(super) b: B::Buf,
    wide: B::Buf,
    /// Gradient of a branch under stochastic depth; the full sequence before a stage.
    pub(super) spare: B::Buf,
    /// Whether `a` and `b` are in each other's place.
    is_swapped: bool,
}

/// The largest matrices of several parts.
#[derive(Clone, Copy, Default)]
pub(super) struct ScratchSize {
    narrow: usize,
    wide: usize,
}

impl ScratchSize {
    /// Also room for the blocks of a trunk.
    pub(super) fn trunk(self, dims: TokenDims, blocks: &Blocks) -> Self {
        let rows = dims.len() / dims.dim.max(1);
        let wide = product(&[rows, blocks.hidden.max(3 * blocks.dim)]);
        Self {
            wide: self.wide.max(wide),
            ..self.matrix(rows, dims.dim)
        }
    }

    /// Also room for a matrix.
    pub(super) fn matrix(self, rows: usize, dim: usize) -> Self {
        Self {
            narrow: self.narrow.max(product(&[rows, dim])),
            ..self
        }
    }
}

impl<B: Backend> Scratch<B> {
    pub(super) fn new(backend: &mut B, size: ScratchSize) -> Result<Self, B::Error> {
        Ok(Self {
            a: backend.buf(size.narrow)?,
            b: backend.buf(size.narrow)?,
            wide: backend.buf(size.wide)?,
            spare: backend.buf(size.narrow)?,
            is_swapped: false,
        })
    }

    /// Swaps `a` and `b`.
    pub(super) fn swap(&mut self) {
        swap(&mut self.a, &mut self.b);
        self.is_swapped = !self.is_swapped;
    }

    /// Ends a backward: whatever the number of swaps, the next one goes through the same buffers.
    pub(super) fn settle(&mut self) {
        if self.is_swapped {
            self.swap();
        }
    }
}

impl<B: TrainBackend> SavedBlock<B> {
    fn new(
        backend: &mut B,
        blocks: &Blocks,
        dims: TokenDims,
        drop_path: bool,
    ) -> Result<Self, B::Error> {
        let rows = dims.len() / dims.dim;
        let lse = product(&[rows, blocks.num_heads]);
        Ok(Self {
            dims,
            norm1: backend.buf(dims.len())?,
            norm1_stats: backend.vector(product(&[rows, 2]))?,
            qkv: backend.buf(product(&[dims.len(), 3]))?,
            lse: backend.vector(lse)?,
            attn: backend.buf(dims.len())?,
            mid: backend.buf(dims.len())?,
            norm2: backend.buf(dims.len())?,
            norm2_stats: backend.vector(product(&[rows, 2]))?,
            pre_gelu: backend.buf(product(&[rows, blocks.hidden]))?,
            hidden: backend.buf(product(&[rows, blocks.hidden]))?,
            drop_path: if drop_path {
                Some([backend.buf(dims.batch)?, backend.buf(dims.batch)?])
            } else {
                None
            },
        })
    }
}

impl<B: TrainBackend> Trunk<B> {
    /// Makes room for sequences of `dims`, of which `reduction` drops tokens on the way.
    ///
    /// # Errors
    /// If memory is short.
    pub fn new(
        backend: &mut B,
        blocks: Blocks,
        dims: TokenDims,
        reduction: &Reduction,
        drop_path: bool,
    ) -> Result<Self, B::Error> {
        let mut trunk = Self {
            blocks,
            inputs: Vec::new(),
            saved: Vec::new(),
            stages: Vec::new(),
            selector: None,
        };
        let mut now = dims;
        for index in 0..=blocks.depth {
            let stage = match reduction.stage(index.checked_sub(1), now.tokens) {
                Some(keep) => {
                    let stage = Stage {
                        before: now,
                        keep,
                        picked: backend.ids(product(&[now.batch, keep]))?,
                    };
                    now.tokens = keep;
                    Some(stage)
                }
                None => None,
            };
            if stage.is_some() && trunk.selector.is_none() {
                trunk.selector = Some(Selector::new(backend, product(&[dims.batch, dims.tokens]))?);
            }
            trunk.stages.push(stage);
            trunk.inputs.push(backend.buf(now.len())?);
            if index < blocks.depth {
                trunk
                    .saved
                    .push(SavedBlock::new(backend, &blocks, now, drop_path)?);
            }
        }
        Ok(trunk)
    }

    /// Where the sequences go before [`Trunk::forward`], which takes `spare` as part of its scratch.
    pub(super) fn input_mut<'a>(&'a mut self, spare: &'a mut B::Buf) -> &'a mut B::Buf {
        if self.stages[0].is_some() {
            spare
        } else {
            &mut self.inputs[0]
        }
    }

    /// The sequences after the last block and stage.
    pub fn output(&self) -> &B::Buf {
        &self.inputs[self.blocks.depth]
    }

    /// Sets stochastic depth's factors.
    ///
    /// # Shapes
    /// `scales: [depth, 2, batch]`: attention's, then the MLP's.
    ///
    /// # Errors
    /// If `scales` is too short, or the trunk was made without.
    pub fn set_drop_path(&mut self, backend: &mut B, scales: &[f32]) -> Result<(), B::Error> {
        const OP: &str = "set_drop_path";
        let batch = self.saved[0].dims.batch;
        expect_len(
            OP,
            "scales",
            scales.len(),
            product(&[self.blocks.depth, 2, batch]),
        )?;
        for (saved, scales) in self.saved.iter_mut().zip(scales.chunks_exact(2 * batch)) {
            let Some(buffers) = &mut saved.drop_path else {
                let expected = "a trunk made with stochastic depth";
                return Err(Error::Dimensions {
                    op: OP,
                    expected,
                    found: 0,
                }
                .into());
            };
            for (buffer, scales) in buffers.iter_mut().zip(scales.chunks_exact(batch)) {
                backend.write(buffer, scales)?;
            }
        }
        Ok(())
    }

    /// Runs the blocks on what [`Trunk::input_mut`] holds.
    pub(super) fn forward(
        &mut self,
        backend: &mut B,
        params: &B::Params,
        scratch: &mut Scratch<B>,
        scorer: &mut impl Scorer<B>,
    ) -> Result<(), B::Error> {
        let mut stage = 0;
        self.reduce(backend, 0, &mut stage, scratch, scorer)?;
        for index in 0..self.blocks.depth {
            let (before, after) = self.inputs.split_at_mut(index + 1);
            // A stage takes the full sequence from the scratch buffer.
            let out = if self.stages[index + 1].is_some() {
                &mut scratch.spare
            } else {
                &mut after[0]
            };
            self.saved[index].forward(backend, params, &self.blocks, index, out, &before[index])?;
            self.reduce(backend, index + 1, &mut stage, scratch, scorer)?;
        }
        Ok(())
    }

    fn reduce(
        &mut self,
        backend: &mut B,
        index: usize,
        number: &mut usize,
        scratch: &mut Scratch<B>,
        scorer: &mut impl Scorer<B>,
    ) -> Result<(), B::Error> {
        let (Some(stage), Some(selector)) = (&mut self.stages[index], &mut self.selector) else {
            return Ok(());
        };
        let (dims, keep) = (stage.before, stage.keep);
        selector.select(
            backend,
            scorer,
            *number,
            dims,
            keep,
            &scratch.spare,
            &mut stage.picked,
            None,
        )?;
        *number += 1;
        backend.gather_tokens(
            dims,
            keep,
            &mut self.inputs[index],
            &scratch.spare,
            &stage.picked,
        )
    }

    /// Takes the gradient of the output in `scratch.a` and leaves there the gradient of what `input_mut` held.
    pub(super) fn backward(
        &mut self,
        backend: &mut B,
        params: &B::Params,
        grads: &mut B::Vector,
        scratch: &mut Scratch<B>,
    ) -> Result<(), B::Error> {
        for index in (0..=self.blocks.depth).rev() {
            if index < self.blocks.depth {
                self.saved[index].backward(
                    backend,
                    params,
                    grads,
                    &self.blocks,
                    index,
                    &self.inputs[index],
                    scratch,
                )?;
            }
            if let Some(stage) = &self.stages[index] {
                backend.gather_tokens_backward(
                    stage.before,
                    stage.keep,
                    &mut scratch.b,
                    &scratch.a,
                    &stage.picked,
                )?;
                scratch.swap();
            }
        }
        Ok(())
    }
}

impl<B: TrainBackend> SavedBlock<B> {
    fn rows(&self) -> RowDims {
        RowDims {
            rows: self.dims.batch * self.tokens(),
            dim: self.dims.dim,
        }
    }

    fn tokens(&self) -> usize {
        self.dims.prefix + self.dims.tokens
    }

    fn attention(&self, blocks: &Blocks) -> AttentionDims {
        let (num_heads, head_dim) = (blocks.num_heads, blocks.dim / blocks.num_heads);
        AttentionDims {
            batch: self.dims.batch,
            tokens: self.tokens(),
            num_heads,
            head_dim,
        }
    }

    /// `mid = x + attn(norm1(x))`, `out = mid + mlp(norm2(mid))`.
    fn forward(
        &mut self,
        backend: &mut B,
        params: &B::Params,
        blocks: &Blocks,
        index: usize,
        out: &mut B::Buf,
        x: &B::Buf,
    ) -> Result<(), B::Error> {
        let (block, rows, tokens) = (blocks.block(index), self.rows(), self.tokens());
        let linear = |from, to| linear_dims(rows.rows, from, to);
        let (d, hidden) = (blocks.dim, blocks.hidden);
        let attention = self.attention(blocks);
        let [attn_scale, mlp_scale] = scales(&self.drop_path, tokens);

        backend.layer_norm_saving(
            rows,
            &mut self.norm1,
            &mut self.norm1_stats,
            x,
            params,
            block.norm1,
        )?;
        backend.linear(
            linear(d, 3 * d),
            &mut self.qkv,
            &self.norm1,
            params,
            block.qkv,
            Epilogue::BiasQkv,
        )?;
        backend.attention_saving(attention, &mut self.attn, &mut self.lse, &self.qkv)?;
        backend.linear_residual(
            linear(d, d),
            &mut self.mid,
            x,
            &self.attn,
            params,
            block.proj,
            attn_scale,
        )?;

        backend.layer_norm_saving(
            rows,
            &mut self.norm2,
            &mut self.norm2_stats,
            &self.mid,
            params,
            block.norm2,
        )?;
        let (hidden_out, pre) = (&mut self.hidden, &mut self.pre_gelu);
        backend.linear_gelu_saving(
            linear(d, hidden),
            hidden_out,
            pre,
            &self.norm2,
            params,
            block.fc1,
        )?;
        backend.linear_residual(
            linear(hidden, d),
            out,
            &self.mid,
            &self.hidden,
            params,
            block.fc2,
            mlp_scale,
        )
    }

    /// From the gradient of `out` in `scratch.a` to the gradient of `x` there.
    fn backward(
        &self,
        backend: &mut B,
        params: &B::Params,
        grads: &mut B::Vector,
        blocks: &Blocks,
        index: usize,
        x: &B::Buf,
        scratch: &mut Scratch<B>,
    ) -> Result<(), B::Error> {
        let (block, rows) = (blocks.block(index), self.rows());
        let linear = |from, to| linear_dims(rows.rows, from, to);
        let (d, hidden) = (blocks.dim, blocks.hidden);
        let Scratch {
            a, b, wide, spare, ..
        } = scratch;
        let [attn_scale, mlp_scale] = scales(&self.drop_path, self.tokens());

        // The MLP. The gradient of a branch is the stream's, scaled as the branch was.
        let d_branch = scaled(backend, rows, spare, a, mlp_scale)?;
        backend.linear_backward_params(
            linear(hidden, d),
            grads,
            block.fc2,
            d_branch,
            &self.hidden,
        )?;
        let pre_gelu = Some(&self.pre_gelu);
        backend.linear_backward_input(
            linear(hidden, d),
            wide,
            d_branch,
            params,
            block.fc2,
            pre_gelu,
        )?;
        backend.linear_backward_params(linear(d, hidden), grads, block.fc1, wide, &self.norm2)?;
        backend.linear_backward_input(linear(d, hidden), b, wide, params, block.fc1, None)?;
        let (mid, stats) = (&self.mid, &self.norm2_stats);
        backend.layer_norm_backward(
            rows,
            a,
            Accum::Add,
            grads,
            b,
            mid,
            stats,
            params,
            block.norm2,
        )?;

        // The attention.
        let d_branch = scaled(backend, rows, spare, a, attn_scale)?;
        backend.linear_backward_params(linear(d, d), grads, block.proj, d_branch, &self.attn)?;
        backend.linear_backward_input(linear(d, d), b, d_branch, params, block.proj, None)?;
        backend.attention_backward(
            self.attention(blocks),
            wide,
            b,
            &self.qkv,
            &self.attn,
            &self.lse,
        )?;
        backend.linear_backward_params(linear(d, 3 * d), grads, block.qkv, wide, &self.norm1)?;
        // A softmax is the same when all scores of a row move alike, so the key's bias has no gradient. AdamW would
        // make full steps of the rounding errors that are there instead.
        backend.zero(
            grads,
            Span {
                start: block.qkv.bias.start + d,
                len: d,
            },
        )?;
        backend.linear_backward_input(linear(d, 3 * d), b, wide, params, block.qkv, None)?;
        backend.layer_norm_backward(
            rows,
            a,
            Accum::Add,
            grads,
            b,
            x,
            &self.norm1_stats,
            params,
            block.norm1,
        )
    }
}

/// The factors of a block's two branches, with the number of rows that share one.
fn scales<T>(drop_path: &Option<[T; 2]>, tokens: usize) -> [Option<(&T, usize)>; 2] {
    match drop_path {
        Some([attn, mlp]) => [Some((attn, tokens)), Some((mlp, tokens))],
        None => [None, None],
    }
}

/// `d_out` itself, or its scaled copy in `spare`.
fn scaled<'a, B: TrainBackend>(
    backend: &mut B,
    rows: RowDims,
    spare: &'a mut B::Buf,
    d_out: &'a B::Buf,
    scale: Option<(&B::Buf, usize)>,
) -> Result<&'a B::Buf, B::Error> {
    match scale {
        Some((scale, per)) => {
            backend.scale_rows(rows, spare, d_out, scale, per)?;
            Ok(spare)
        }
        None => Ok(d_out),
    }
}
