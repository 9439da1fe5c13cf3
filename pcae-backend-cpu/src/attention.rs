//! Attention of one sequence and head at a time.
//!
//! The scores of a head, N by N, live in scratch that one thread uses for one head after the other: 257 tokens take
//! 258 KiB, which a level-2 cache holds. Queries, keys and values are read where they lie in `qkv`; only keys (and
//! values, backwards) are transposed, since the products want their second operand in rows.

use pcae_kernel::backend::AttentionDims;

use crate::gemm::{Matrix, Shared, small_gemm};
use crate::isa::Isa;
use crate::rows;
use crate::threads::{Pieces, Threads};

/// One backward or forward: what all its heads share.
#[derive(Clone, Copy)]
pub(crate) struct Attention<'a> {
    isa: Isa,
    threads: &'a Threads,
    dims: AttentionDims,
    qkv: &'a [f32],
}

/// Heads of all sequences, dealt to as many tasks as there are pieces of scratch.
struct Deal {
    heads: usize,
    tasks: usize,
    per_task: usize,
}

impl<'a> Attention<'a> {
    /// `qkv` must be as long as `dims` say, and no dimension may be 0.
    pub(crate) fn new(isa: Isa, threads: &'a Threads, dims: AttentionDims, qkv: &'a [f32]) -> Self {
        Self {
            isa,
            threads,
            dims,
            qkv,
        }
    }

    /// Scratch of one task of the forward.
    fn forward_len(&self) -> usize {
        let AttentionDims {
            tokens, head_dim, ..
        } = self.dims;
        tokens * tokens + 2 * tokens * head_dim
    }

    /// Scratch of one task of the backward.
    fn backward_len(&self) -> usize {
        let AttentionDims {
            tokens, head_dim, ..
        } = self.dims;
        2 * tokens * tokens + 3 * tokens * head_dim
    }

    /// Elements of scratch that [`Attention::forward`] needs.
    pub(crate) fn forward_scratch(&self) -> usize {
        self.deal().tasks * self.forward_len()
    }

    /// Elements of scratch that [`Attention::backward`] needs.
    pub(crate) fn backward_scratch(&self) -> usize {
        self.deal().tasks * self.backward_len()
    }

    /// Two tasks per thread, so that one that is held up does not hold up all.
    fn deal(&self) -> Deal {
        let heads = self.dims.batch * self.dims.num_heads;
        let tasks = match self.threads.count() {
            1 => 1,
            threads => heads.min(2 * threads),
        };
        let per_task = heads.div_ceil(tasks);
        Deal {
            heads,
            tasks: heads.div_ceil(per_task),
            per_task,
        }
    }

    /// Calls `work(head, scratch)` for every head of every sequence; each touches about `cost` elements.
    fn for_each_head(
        &self,
        scratch: &mut [f32],
        len: usize,
        work: impl Fn(usize, &mut [f32]) + Sync,
    ) {
        let deal = self.deal();
        let cost = len * self.dims.head_dim * deal.per_task / 8;
        let scratch = Pieces::new(&mut scratch[..deal.tasks * len], len);
        self.threads
            .for_each(deal.tasks, cost, scratch, |task, scratch| {
                let first = task * deal.per_task;
                for head in first..(first + deal.per_task).min(deal.heads) {
                    work(head, scratch);
                }
            });
    }

    fn scale(&self) -> f32 {
        (1.0 / (self.dims.head_dim as f64).sqrt()) as f32
    }

    /// Where the queries, keys or values (`which` 0, 1, 2) of a head begin in `qkv`.
    fn start(&self, head: usize, which: usize) -> usize {
        let AttentionDims {
            tokens,
            num_heads,
            head_dim,
            ..
        } = self.dims;
        let (sequence, head) = (head / num_heads, head % num_heads);
        sequence * tokens * 3 * num_heads * head_dim + (which * num_heads + head) * head_dim
    }

    /// The queries, keys or values of a head.
    fn part(&self, head: usize, which: usize) -> Matrix<'a> {
        let AttentionDims {
            tokens, head_dim, ..
        } = self.dims;
        let data = &self.qkv[self.start(head, which)..];
        Matrix::strided(data, tokens, head_dim, 3 * self.dims.dim())
    }

    /// Copies the transpose of one of them: `to: [head_dim, tokens]`.
    fn transpose(&self, to: &mut [f32], head: usize, which: usize) {
        let tokens = self.dims.tokens;
        let data = &self.qkv[self.start(head, which)..];
        for (token, row) in data.chunks(3 * self.dims.dim()).take(tokens).enumerate() {
            for (to, from) in to.chunks_mut(tokens).zip(&row[..self.dims.head_dim]) {
                to[token] = *from;
            }
        }
    }

    /// Where a head begins in the output.
    fn out_start(&self, head: usize) -> usize {
        let AttentionDims {
            tokens,
            num_heads,
            head_dim,
            ..
        } = self.dims;
        (head / num_heads) * tokens * num_heads * head_dim + (head % num_heads) * head_dim
    }

    /// `out = softmax(q @ k^T / sqrt(head_dim)) @ v`, and the log-sum-exp of each row of scores where asked for.
    pub(crate) fn forward(&self, out: &mut [f32], lse: Option<&mut [f32]>, scratch: &mut [f32]) {
        let AttentionDims {
            tokens, head_dim, ..
        } = self.dims;
        let (out, lse) = (Shared::new(out), lse.map(Shared::new));
        self.for_each_head(scratch, self.forward_len(), |head, scratch| {
            let (p, rest) = scratch.split_at_mut(tokens * tokens);
            let (keys, result) = rest.split_at_mut(tokens * head_dim);
            self.transpose(keys, head, 1);
            small_gemm(
                self.isa,
                p,
                self.part(head, 0),
                Matrix::new(keys, head_dim, tokens),
            );
            // SAFETY: the piece of this head, which comes once.
            let mut lse = lse.map(|lse| unsafe { lse.part(head * tokens, tokens) });
            for (token, row) in p.chunks_mut(tokens).enumerate() {
                let log_sum = rows::softmax(self.isa, row, self.scale());
                if let Some(lse) = &mut lse {
                    lse[token] = log_sum;
                }
            }
            let p = Matrix::new(p, tokens, tokens);
            small_gemm(self.isa, result, p, self.part(head, 2));
            // SAFETY: every head comes once, and heads have their own columns.
            unsafe { self.put(out, self.out_start(head), self.dims.dim(), result) };
        });
    }

    /// Copies the rows of one head's result to where they belong, `stride` apart.
    ///
    /// # Safety
    /// Nobody else uses these rows of this head in `to`.
    unsafe fn put(&self, to: Shared<'_>, start: usize, stride: usize, from: &[f32]) {
        let head_dim = self.dims.head_dim;
        for (token, row) in from.chunks(head_dim).enumerate() {
            // SAFETY: by contract the columns of this head in this row are free.
            let to = unsafe { to.part(start + token * stride, head_dim) };
            to.copy_from_slice(row);
        }
    }

    /// Gradient with respect to `qkv`.
    pub(crate) fn backward(
        &self,
        d_qkv: &mut [f32],
        d_out: &[f32],
        out: &[f32],
        lse: &[f32],
        scratch: &mut [f32],
    ) {
        let AttentionDims {
            tokens, head_dim, ..
        } = self.dims;
        let (dim, scale) = (self.dims.dim(), self.scale());
        let d_qkv = Shared::new(d_qkv);
        self.for_each_head(scratch, self.backward_len(), |head, scratch| {
            let (p, rest) = scratch.split_at_mut(tokens * tokens);
            let (d_p, rest) = rest.split_at_mut(tokens * tokens);
            let (keys, rest) = rest.split_at_mut(tokens * head_dim);
            let (values, result) = rest.split_at_mut(tokens * head_dim);
            let start = self.out_start(head);
            let d_out_head = Matrix::strided(&d_out[start..], tokens, head_dim, dim);
            self.transpose(keys, head, 1);
            self.transpose(values, head, 2);
            small_gemm(
                self.isa,
                p,
                self.part(head, 0),
                Matrix::new(keys, head_dim, tokens),
            );
            small_gemm(
                self.isa,
                d_p,
                d_out_head,
                Matrix::new(values, head_dim, tokens),
            );
            let lse = &lse[head * tokens..][..tokens];
            let pairs = p.chunks_mut(tokens).zip(d_p.chunks_mut(tokens));
            for (token, ((p, d_p), lse)) in pairs.zip(lse).enumerate() {
                rows::softmax_from(self.isa, p, scale, *lse);
                let at = start + token * dim;
                // sum over j of p[j] * d_p[j], since out is p @ v.
                let delta = rows::dot(self.isa, &d_out[at..][..head_dim], &out[at..][..head_dim]);
                rows::softmax_backward(self.isa, d_p, p, scale, delta);
            }
            let (p, d_s) = (
                Matrix::new(p, tokens, tokens),
                Matrix::new(d_p, tokens, tokens),
            );
            let products = [
                (d_s, self.part(head, 1)),
                (d_s.t(), self.part(head, 0)),
                (p.t(), d_out_head),
            ];
            for (which, (a, b)) in products.into_iter().enumerate() {
                small_gemm(self.isa, result, a, b);
                // SAFETY: every head comes once, and heads and their three parts have their own columns.
                unsafe { self.put(d_qkv, self.start(head, which), 3 * dim, result) };
            }
        });
    }
}
