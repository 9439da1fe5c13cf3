//! The forward with products of bf16.
//!
//! Queries, keys, values and the numerators of the softmax are rounded as they are packed. Scores, their exponentials, the
//! sums of both products and the divisor, which is that of the numerators before they are rounded, are f32.

use super::*;

/// The two products of a head: `queries @ keys^T` and `numerators @ values`.
pub(super) struct Products {
    scores: SmallProduct,
    result: SmallProduct,
    /// Queries in a block.
    block: usize,
}

impl Products {
    /// Scratch of one thread: packed keys and values, and of a block packed queries, scores, packed numerators, result,
    /// sums, and the sums of a tile.
    pub(super) fn scratch_len<T>(&self, attention: &Attention<'_, T>) -> usize {
        let AttentionDims {
            tokens, head_dim, ..
        } = attention.dims;
        let rows = self.block;
        self.scores.right_len(tokens)
            + self.result.right_len(head_dim)
            + self.scores.left_len(rows)
            + self.result.left_len(rows)
            + rows * (attention.tokens + attention.width + 1)
            + self.scores.tile_len()
    }
}

impl<T: Element> Attention<'_, T> {
    pub(super) fn products(&self, unit: Bf16Unit) -> Products {
        let AttentionDims {
            tokens, head_dim, ..
        } = self.dims;
        let scores = SmallProduct::new(self.isa, unit, head_dim);
        let tile = scores.tile_rows();
        Products {
            result: SmallProduct::new(self.isa, unit, tokens),
            block: (SCORES / self.tokens / tile * tile).clamp(tile, tokens.next_multiple_of(tile)),
            scores,
        }
    }

    pub(super) fn forward_bf16<O: Element>(
        &self,
        unit: Bf16Unit,
        out: &mut [O],
        lse: Option<&mut [f32]>,
        scratch: &mut [f32],
    ) {
        let AttentionDims {
            tokens, head_dim, ..
        } = self.dims;
        let (dim, products) = (self.dims.dim(), self.products(unit));
        let (block, stride) = (products.block, 3 * dim);
        let (out, lse) = (Shared::new(out), lse.map(Shared::new));
        self.for_each_head(scratch, products.scratch_len(self), |head, scratch| {
            let Products { scores, result, .. } = &products;
            let ready = Ready::new(self.isa, unit);
            let mut scratch = Scratch(scratch);
            // Where AMX reads comes first, in whole cache lines.
            let keys = scratch.take(scores.right_len(tokens));
            let values = scratch.take(result.right_len(head_dim));
            let queries = scratch.take(scores.left_len(block));
            let numerators = scratch.take(result.left_len(block));
            let sums = scratch.take(scores.tile_len());
            let p = scratch.take(block * self.tokens);
            let results = scratch.take(block * self.width);
            let totals = scratch.take(block);
            let part = |part| &self.qkv[self.start(head, part)..];
            scores.pack_columns(keys, part(Part::Key), stride, tokens);
            result.pack_rows(values, part(Part::Value), stride, head_dim);
            // SAFETY: the piece of this head, which comes once.
            let mut lse = lse.map(|lse| unsafe { lse.part(head * tokens, tokens) });
            for first in (0..tokens).step_by(block) {
                let rows = block.min(tokens - first);
                self.fetch_out(head, out.as_ptr(), first, rows);
                let parts = [Part::Query, Part::Key, Part::Value];
                self.fetch(head + 1, &parts, first, rows);
                let from = &part(Part::Query)[first * stride..];
                scores.pack_left(queries, from, stride, rows);
                scores.run(&ready, queries, keys, rows, tokens, sums, p, self.tokens);
                self.isa.run(Softmax {
                    p,
                    rows,
                    width: self.tokens,
                    tokens,
                    scale: self.scale(),
                    totals,
                    lse: lse.as_mut().map(|lse| &mut lse[first..][..rows]),
                });
                result.pack_left(numerators, p, self.tokens, rows);
                let width = self.width;
                result.run(
                    &ready, numerators, values, rows, head_dim, sums, results, width,
                );
                // SAFETY: every head comes once, and heads have their own columns.
                unsafe {
                    let start = self.out_start(head) + first * dim;
                    self.put(out, start, dim, results, rows, Some(&*totals));
                };
            }
        });
    }
}
