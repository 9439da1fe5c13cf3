//! Fused attention, one sequence and head at a time.
//!
//! A thread takes head after head. It copies the head's keys and values next to each other, keys (and values, backwards)
//! transposed, so that products read whole vectors from the level-1 or level-2 cache, and then works through blocks of
//! queries: scores, softmax and result of a block stay in its scratch. No N by N matrix exists. Backwards, the
//! probabilities of a block are computed again from the saved log-sum-exp, and the gradients of keys and values are
//! summed over the blocks in their order.

mod bf16;
mod kernels;

use pcae_kernel::backend::AttentionDims;

use crate::element::Element;
use crate::gemm::{Bf16Unit, Precision, Ready, SmallProduct};
use crate::isa::Isa;
use crate::threads::{Pieces, Shared, Threads};

use kernels::{
    Columns, Copy, FetchRows, Lanes, Left, Multiply, Put, Softmax, SoftmaxBackward, TILE, Transpose,
};

/// Scores of a block of queries, at most: half of a level-1 cache.
const SCORES: usize = 6144;

/// One backward or forward: what all its heads share.
#[derive(Clone, Copy)]
pub(crate) struct Attention<'a, T = f32> {
    isa: Isa,
    threads: &'a Threads,
    precision: Precision,
    dims: AttentionDims,
    qkv: &'a [T],
    /// Tokens and width of a head, filled up to whole vectors.
    tokens: usize,
    width: usize,
}

/// Queries, keys or values.
#[derive(Clone, Copy)]
enum Part {
    Query,
    Key,
    Value,
}

impl<'a, T: Element> Attention<'a, T> {
    /// `precision` is that of the forward's products. `qkv` must be as long as `dims` say, and no dimension may be 0.
    pub(crate) fn new(
        isa: Isa,
        threads: &'a Threads,
        precision: Precision,
        dims: AttentionDims,
        qkv: &'a [T],
    ) -> Self {
        let lanes = isa.run(Lanes);
        Self {
            isa,
            threads,
            precision,
            dims,
            qkv,
            tokens: dims.tokens.next_multiple_of(lanes),
            width: dims.head_dim.next_multiple_of(lanes),
        }
    }

    /// Queries in a block: whole tiles, but for the last.
    fn block(&self) -> usize {
        let fits = (SCORES / self.tokens).max(TILE);
        let blocks = self.dims.tokens.div_ceil(fits);
        self.dims
            .tokens
            .div_ceil(blocks)
            .next_multiple_of(TILE)
            .min(self.dims.tokens)
    }

    /// Scratch of one thread of the forward: transposed keys, values, and of a block queries, scores, result, sums.
    fn forward_len(&self) -> usize {
        let keys = self.dims.head_dim * self.tokens + self.dims.tokens * self.width;
        keys + self.block() * (2 * self.width + self.tokens + 1)
    }

    /// Scratch of one thread of the backward: transposed keys and values, keys, gradients of keys and values, and of a
    /// block queries, gradients of the output, of the queries, probabilities and their gradients.
    fn backward_len(&self) -> usize {
        let keys = 2 * self.dims.head_dim * self.tokens + 3 * self.dims.tokens * self.width;
        keys + self.block() * (3 * self.width + 2 * self.tokens)
    }

    /// Elements of scratch that [`Attention::forward`] needs.
    pub(crate) fn forward_scratch(&self) -> usize {
        let len = match self.precision {
            Precision::F32 => self.forward_len(),
            Precision::Bf16(unit) => self.products(unit).scratch_len(self),
        };
        self.threads.count() * len
    }

    /// Elements of scratch that [`Attention::backward`] needs.
    pub(crate) fn backward_scratch(&self) -> usize {
        self.threads.count() * self.backward_len()
    }

    /// Calls `work(head, scratch)` for every head of every sequence.
    fn for_each_head(
        &self,
        scratch: &mut [f32],
        len: usize,
        work: impl Fn(usize, &mut [f32]) + Sync,
    ) {
        let AttentionDims {
            batch,
            tokens,
            num_heads,
            head_dim,
        } = self.dims;
        // In elements that are moved, of which a head costs as much as some 16 multiply-adds each.
        let cost = tokens * tokens * head_dim / 8;
        let scratch = Pieces::new(scratch, len);
        self.threads
            .for_each_with(batch * num_heads, cost, (), scratch, |head, (), scratch| {
                work(head, scratch)
            });
    }

    fn scale(&self) -> f32 {
        (1.0 / (self.dims.head_dim as f64).sqrt()) as f32
    }

    /// Where a part of a head begins in `qkv`.
    fn start(&self, head: usize, part: Part) -> usize {
        let AttentionDims {
            tokens,
            num_heads,
            head_dim,
            ..
        } = self.dims;
        let (sequence, head) = (head / num_heads, head % num_heads);
        sequence * tokens * 3 * num_heads * head_dim + (part as usize * num_heads + head) * head_dim
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

    /// Copies `rows` rows of a head, `stride` apart, next to each other: `to: [rows, width]`, zeros beyond the head.
    fn copy<F: Element>(&self, to: &mut [f32], from: &[F], stride: usize, rows: usize) {
        let (from, width, len) = (
            Columns {
                data: from,
                stride,
                rows,
                len: self.dims.head_dim,
            },
            self.width,
            rows * self.width,
        );
        self.isa.run(Copy {
            to: &mut to[..len],
            width,
            from,
        });
    }

    /// `rows` rows of a head, `stride` apart in `from`, and how far apart they are: where they lie if whole vectors of f32 can
    /// be read there and they are few, else copied to `to`.
    fn rows<'s, F: Element>(
        &self,
        to: &'s mut [f32],
        from: &'s [F],
        stride: usize,
        rows: usize,
    ) -> (&'s [f32], usize) {
        // Rows of a wide model fall on few sets of a level-1 cache: more than so many would evict each other.
        const FEW: usize = 64;
        if self.width == self.dims.head_dim
            && self.dims.tokens <= FEW
            && let Some(from) = F::as_f32(from)
        {
            return (from, stride);
        }
        self.copy(to, from, stride, rows);
        (to, self.width)
    }

    /// Asks for rows `first..first + rows` of this part of a head, if there are such a head and rows: a row has few cache
    /// lines and the next lies far away, which no processor foresees.
    fn fetch(&self, head: usize, parts: &[Part], first: usize, rows: usize) {
        let AttentionDims {
            batch,
            tokens,
            num_heads,
            ..
        } = self.dims;
        if head < batch * num_heads {
            for &part in parts {
                let stride = 3 * self.dims.dim();
                self.isa.run(FetchRows {
                    start: self.qkv[self.start(head, part) + first * stride..].as_ptr(),
                    stride,
                    rows: rows.min(tokens - first),
                    len: self.dims.head_dim,
                });
            }
        }
    }

    /// Asks for rows `first..first + rows` of a head's output, or of what is laid out like it.
    fn fetch_out<O>(&self, head: usize, of: *const O, first: usize, rows: usize) {
        let stride = self.dims.dim();
        self.isa.run(FetchRows {
            start: of.wrapping_add(self.out_start(head) + first * stride),
            stride,
            rows: rows.min(self.dims.tokens - first),
            len: self.dims.head_dim,
        });
    }

    /// Copies a part of a head transposed: `to: [head_dim, tokens]`, zeros beyond the last token.
    fn transpose(&self, to: &mut [f32], head: usize, part: Part) {
        let from = Columns {
            data: &self.qkv[self.start(head, part)..],
            stride: 3 * self.dims.dim(),
            rows: self.dims.tokens,
            len: self.dims.head_dim,
        };
        self.isa.run(Transpose {
            to,
            width: self.tokens,
            from,
        });
    }

    /// Copies `rows` rows of `width` to where they belong, `stride` apart, divided by `divisors` where there are some.
    ///
    /// # Safety
    /// Nobody else uses these rows of this head in `to`.
    unsafe fn put<O: Element>(
        &self,
        to: Shared<'_, O>,
        start: usize,
        stride: usize,
        from: &[f32],
        rows: usize,
        divisors: Option<&[f32]>,
    ) {
        let (width, len) = (self.width, self.dims.head_dim);
        self.isa.run(Put {
            to,
            start,
            stride,
            len,
            from: &from[..rows * width],
            width,
            divisors,
        });
    }

    /// `out = softmax(q @ k^T / sqrt(head_dim)) @ v`, and the log-sum-exp of each row of scores where asked for.
    pub(crate) fn forward<O: Element>(
        &self,
        out: &mut [O],
        lse: Option<&mut [f32]>,
        scratch: &mut [f32],
    ) {
        match self.precision {
            Precision::F32 => self.forward_f32(out, lse, scratch),
            Precision::Bf16(unit) => self.forward_bf16(unit, out, lse, scratch),
        }
    }

    fn forward_f32<O: Element>(&self, out: &mut [O], lse: Option<&mut [f32]>, scratch: &mut [f32]) {
        let AttentionDims {
            tokens, head_dim, ..
        } = self.dims;
        let (dim, block, isa) = (self.dims.dim(), self.block(), self.isa);
        let (out, lse) = (Shared::new(out), lse.map(Shared::new));
        self.for_each_head(scratch, self.forward_len(), |head, scratch| {
            let mut scratch = Scratch(scratch);
            let keys = scratch.take(head_dim * self.tokens);
            let values = scratch.take(tokens * self.width);
            let queries = scratch.take(block * self.width);
            let p = scratch.take(block * self.tokens);
            let result = scratch.take(block * self.width);
            let totals = scratch.take(block);
            self.transpose(keys, head, Part::Key);
            let from = &self.qkv[self.start(head, Part::Value)..];
            let (values, values_step) = self.rows(values, from, 3 * dim, tokens);
            // SAFETY: the piece of this head, which comes once.
            let mut lse = lse.map(|lse| unsafe { lse.part(head * tokens, tokens) });
            for first in (0..tokens).step_by(block) {
                let rows = block.min(tokens - first);
                self.fetch_out(head, out.as_ptr(), first, rows);
                self.fetch(
                    head + 1,
                    &[Part::Query, Part::Key, Part::Value],
                    first,
                    rows,
                );
                let from = &self.qkv[self.start(head, Part::Query) + first * 3 * dim..];
                let (queries, queries_step) = self.rows(queries, from, 3 * dim, rows);
                isa.run(Multiply {
                    out: p,
                    rows,
                    width: self.tokens,
                    inner: head_dim,
                    left: Left::rows(queries, queries_step),
                    right: keys,
                    right_step: self.tokens,
                    add: false,
                });
                isa.run(Softmax {
                    p,
                    rows,
                    width: self.tokens,
                    tokens,
                    scale: self.scale(),
                    totals,
                    lse: lse.as_mut().map(|lse| &mut lse[first..][..rows]),
                });
                isa.run(Multiply {
                    out: result,
                    rows,
                    width: self.width,
                    inner: tokens,
                    left: Left::rows(p, self.tokens),
                    right: values,
                    right_step: values_step,
                    add: false,
                });
                // SAFETY: every head comes once, and heads have their own columns.
                unsafe {
                    let start = self.out_start(head) + first * dim;
                    self.put(out, start, dim, result, rows, Some(&*totals));
                };
            }
        });
    }

    /// Gradient with respect to `qkv`.
    pub(crate) fn backward<O: Element>(
        &self,
        d_qkv: Shared<'_, O>,
        d_out: &[f32],
        out: &[f32],
        lse: &[f32],
        scratch: &mut [f32],
    ) {
        let AttentionDims {
            tokens, head_dim, ..
        } = self.dims;
        let (dim, block, isa) = (self.dims.dim(), self.block(), self.isa);
        self.for_each_head(scratch, self.backward_len(), |head, scratch| {
            let mut scratch = Scratch(scratch);
            let keys_t = scratch.take(head_dim * self.tokens);
            let values_t = scratch.take(head_dim * self.tokens);
            let keys = scratch.take(tokens * self.width);
            let d_keys = scratch.take(tokens * self.width);
            let d_values = scratch.take(tokens * self.width);
            let queries = scratch.take(block * self.width);
            let d_result = scratch.take(block * self.width);
            let d_queries = scratch.take(block * self.width);
            let p = scratch.take(block * self.tokens);
            let d_p = scratch.take(block * self.tokens);
            self.transpose(keys_t, head, Part::Key);
            self.transpose(values_t, head, Part::Value);
            let from = &self.qkv[self.start(head, Part::Key)..];
            let (keys, keys_step) = self.rows(keys, from, 3 * dim, tokens);
            for first in (0..tokens).step_by(block) {
                let rows = block.min(tokens - first);
                let at = self.start(head, Part::Query) + first * 3 * dim;
                let out_at = self.out_start(head) + first * dim;
                self.fetch(
                    head + 1,
                    &[Part::Query, Part::Key, Part::Value],
                    first,
                    rows,
                );
                if head + 1 < self.dims.batch * self.dims.num_heads {
                    self.fetch_out(head + 1, d_out.as_ptr(), first, rows);
                    self.fetch_out(head + 1, out.as_ptr(), first, rows);
                }
                let (queries, queries_step) = self.rows(queries, &self.qkv[at..], 3 * dim, rows);
                let (d_result, d_result_step) = self.rows(d_result, &d_out[out_at..], dim, rows);
                for (out, left, right) in [
                    (&mut *p, Left::rows(queries, queries_step), &*keys_t),
                    (&mut *d_p, Left::rows(d_result, d_result_step), &*values_t),
                ] {
                    isa.run(Multiply {
                        out,
                        rows,
                        width: self.tokens,
                        inner: head_dim,
                        left,
                        right,
                        right_step: self.tokens,
                        add: false,
                    });
                }
                isa.run(SoftmaxBackward {
                    p,
                    d_p,
                    width: self.tokens,
                    scale: self.scale(),
                    lse: &lse[head * tokens + first..][..rows],
                    d_out: &d_out[out_at..],
                    out: &out[out_at..],
                    stride: dim,
                    len: head_dim,
                });
                isa.run(Multiply {
                    out: d_queries,
                    rows,
                    width: self.width,
                    inner: tokens,
                    left: Left::rows(d_p, self.tokens),
                    right: keys,
                    right_step: keys_step,
                    add: false,
                });
                // SAFETY: every head comes once, and heads and their three parts have their own columns.
                unsafe { self.put(d_qkv, at, 3 * dim, d_queries, rows, None) };
                for (out, left, right, right_step) in [
                    (&mut *d_keys, &*d_p, queries, queries_step),
                    (&mut *d_values, &*p, d_result, d_result_step),
                ] {
                    isa.run(Multiply {
                        out,
                        rows: tokens,
                        width: self.width,
                        inner: rows,
                        left: Left::columns(left, self.tokens),
                        right,
                        right_step,
                        add: first > 0,
                    });
                }
            }
            for (part, from) in [(Part::Key, d_keys), (Part::Value, d_values)] {
                // SAFETY: as above.
                unsafe { self.put(d_qkv, self.start(head, part), 3 * dim, from, tokens, None) };
            }
        });
    }
}

/// What is left of a thread's scratch.
struct Scratch<'a>(&'a mut [f32]);

impl<'a> Scratch<'a> {
    fn take(&mut self, len: usize) -> &'a mut [f32] {
        let (taken, rest) = core::mem::take(&mut self.0).split_at_mut(len);
        self.0 = rest;
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::element::Bf16;
    use crate::gemm::{narrowed, rounded};
    use proptest::prelude::*;

    fn values(len: usize, seed: u64) -> Vec<f32> {
        (0..len as u64)
            .map(|i| ((i * 7 + seed) * 2_654_435_761 % 1009) as f32 / 504.5 - 1.0)
            .collect()
    }

    /// Output, log-sum-exp and gradient of `qkv` in f64.
    fn exact(dims: AttentionDims, qkv: &[f32], d_out: &[f32]) -> [Vec<f64>; 3] {
        let AttentionDims {
            batch,
            tokens,
            num_heads,
            head_dim,
        } = dims;
        let dim = dims.dim();
        let mut results = [
            vec![0.0; dims.out_len()],
            vec![0.0; dims.lse_len()],
            vec![0.0; dims.qkv_len()],
        ];
        let [out, lse, d_qkv] = &mut results;
        for (b, h) in (0..batch).flat_map(|b| (0..num_heads).map(move |h| (b, h))) {
            let place = |t: usize, part: usize, i: usize| {
                (b * tokens + t) * 3 * dim + part * dim + h * head_dim + i
            };
            let at = |t, part, i| f64::from(qkv[place(t, part, i)]);
            let scale = 1.0 / (head_dim as f64).sqrt();
            for t in 0..tokens {
                let dot = |u| {
                    (0..head_dim)
                        .map(|i| at(t, 0, i) * at(u, 1, i))
                        .sum::<f64>()
                        * scale
                };
                let scores: Vec<f64> = (0..tokens).map(dot).collect();
                let total: f64 = scores.iter().map(|s| s.exp()).sum();
                lse[(b * num_heads + h) * tokens + t] = total.ln();
                let p: Vec<f64> = scores.iter().map(|s| s.exp() / total).collect();
                let out_at = |i| (b * tokens + t) * dim + h * head_dim + i;
                let d = |i| f64::from(d_out[out_at(i)]);
                let d_p: Vec<f64> = (0..tokens)
                    .map(|u| (0..head_dim).map(|i| d(i) * at(u, 2, i)).sum())
                    .collect();
                let delta: f64 = p.iter().zip(&d_p).map(|(p, d)| p * d).sum();
                for u in 0..tokens {
                    let d_s = p[u] * (d_p[u] - delta) * scale;
                    for i in 0..head_dim {
                        out[out_at(i)] += p[u] * at(u, 2, i);
                        d_qkv[place(t, 0, i)] += d_s * at(u, 1, i);
                        d_qkv[place(u, 1, i)] += d_s * at(t, 0, i);
                        d_qkv[place(u, 2, i)] += p[u] * d(i);
                    }
                }
            }
        }
        results
    }

    fn run(
        isa: Isa,
        threads: &Threads,
        dims: AttentionDims,
        qkv: &[f32],
        d_out: &[f32],
    ) -> [Vec<f32>; 3] {
        let attention = Attention::new(isa, threads, Precision::F32, dims, qkv);
        let (mut out, mut lse) = (
            vec![f32::NAN; dims.out_len()],
            vec![f32::NAN; dims.lse_len()],
        );
        let mut d_qkv = vec![f32::NAN; dims.qkv_len()];
        attention.forward(
            &mut out,
            Some(&mut lse),
            &mut vec![f32::NAN; attention.forward_scratch()],
        );
        let mut scratch = vec![f32::NAN; attention.backward_scratch()];
        attention.backward(Shared::new(&mut d_qkv), d_out, &out, &lse, &mut scratch);
        let mut again = vec![f32::NAN; dims.out_len()];
        attention.forward(
            &mut again,
            None,
            &mut vec![f32::NAN; attention.forward_scratch()],
        );
        assert_eq!(out, again);
        [out, lse, d_qkv]
    }

    fn check(pools: &[Threads], dims: AttentionDims) {
        let (qkv, d_out) = (values(dims.qkv_len(), 1), values(dims.out_len(), 2));
        let want = exact(dims, &qkv, &d_out);
        for isa in Isa::available() {
            let first = run(isa, &pools[0], dims, &qkv, &d_out);
            for (which, (got, want)) in first.iter().zip(&want).enumerate() {
                for (i, (got, want)) in got.iter().zip(want).enumerate() {
                    // Numbers below 1: scores of at most 9, rounded to 2^-21, move a probability by 5e-7 of itself;
                    // gradients sum up to 257 products of such.
                    let bound = if which == 2 { 2e-5 } else { 3e-6 };
                    assert!(
                        (f64::from(*got) - want).abs() <= bound,
                        "{isa} {dims:?} {which} {i}: {got} {want}"
                    );
                }
            }
            for pool in &pools[1..] {
                assert_eq!(first, run(isa, pool, dims, &qkv, &d_out), "{isa} {dims:?}");
            }
        }
    }

    fn pools() -> Vec<Threads> {
        let counts: &[usize] = if cfg!(feature = "threads") {
            &[1, 2, 3]
        } else {
            &[1]
        };
        counts.iter().map(|&n| Threads::new(n).unwrap()).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn attention_matches_f64(
            batch in 1usize..4,
            tokens in 1usize..70,
            num_heads in 1usize..4,
            head_dim in prop::sample::select(vec![1usize, 3, 16, 32, 48, 64, 80]),
        ) {
            check(&pools()[..1], AttentionDims { batch, tokens, num_heads, head_dim });
        }
    }

    /// The forward in bf16, on operands that bf16 holds: what is rounded then are the numerators, to a part of 2^-9 each.
    fn check_bf16(pools: &[Threads], dims: AttentionDims) {
        let qkv: Vec<f32> = values(dims.qkv_len(), 1)
            .iter()
            .map(|x| rounded(*x))
            .collect();
        let [want, want_lse, _] = exact(dims, &qkv, &vec![0.0; dims.out_len()]);
        for (isa, unit) in
            Isa::available().flat_map(|isa| Bf16Unit::available(isa).map(move |unit| (isa, unit)))
        {
            let run = |threads| {
                let attention = Attention::new(isa, threads, Precision::Bf16(unit), dims, &qkv);
                let mut out = vec![f32::NAN; dims.out_len()];
                let mut lse = vec![f32::NAN; dims.lse_len()];
                let mut scratch = vec![f32::NAN; attention.forward_scratch()];
                attention.forward(&mut out, Some(&mut lse), &mut scratch);
                (out, lse)
            };
            let (out, lse) = run(&pools[0]);
            let close = |got: &[f32], want: &[f64], bound: f64| {
                got.iter()
                    .zip(want)
                    .all(|(got, want)| (f64::from(*got) - want).abs() <= bound)
            };
            // Values are below 1, and so is their mean.
            assert!(
                close(&out, &want, 1.0 / 512.0 + 3e-6),
                "{isa} {unit} {dims:?}"
            );
            assert!(close(&lse, &want_lse, 3e-6), "{isa} {unit} {dims:?}");
            // From and to bf16 in memory, the same.
            let narrow = narrowed(&qkv);
            let attention = Attention::new(isa, &pools[0], Precision::Bf16(unit), dims, &narrow);
            let (mut narrow_out, mut narrow_lse) = (vec![Bf16(7); out.len()], lse.clone());
            attention.forward(
                &mut narrow_out,
                Some(&mut narrow_lse),
                &mut vec![f32::NAN; attention.forward_scratch()],
            );
            assert_eq!(narrow_out, narrowed(&out), "{isa} {unit} {dims:?}");
            assert_eq!(narrow_lse, lse, "{isa} {unit} {dims:?}");
            for pool in &pools[1..] {
                assert_eq!(
                    (&out, &lse),
                    (&run(pool).0, &run(pool).1),
                    "{isa} {unit} {dims:?}"
                );
            }
        }
    }

    #[test]
    fn bf16_matches_f64_on_any_number_of_threads() {
        let pools = pools();
        for (batch, tokens, num_heads, head_dim) in [
            (2, 197, 3, 64),
            (1, 257, 2, 32),
            (3, 49, 1, 80),
            (2, 1, 2, 3),
            (2, 25, 3, 16),
        ] {
            check_bf16(
                &pools,
                AttentionDims {
                    batch,
                    tokens,
                    num_heads,
                    head_dim,
                },
            );
        }
    }

    #[test]
    fn long_sequences_match_f64_on_any_number_of_threads() {
        let pools = pools();
        for (tokens, head_dim) in [(197, 64), (257, 32), (49, 80), (24, 64), (25, 16)] {
            check(
                &pools,
                AttentionDims {
                    batch: 2,
                    tokens,
                    num_heads: 3,
                    head_dim,
                },
            );
        }
    }
}
