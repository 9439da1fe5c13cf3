//! A backend that times another one, operation by operation.

use std::time::{Duration, Instant};

use pcae_kernel::backend::{
    Accum, AdamW, AttentionDims, Backend, BlockDims, Clip, DecoderDims, EmbedParams, Epilogue,
    Linear, LinearDims, Norm, PatchDims, PixelDims, Pixels, RowDims, Segment, Span, TokenDims,
    TrainBackend, block_by_layers,
};
use pcae_kernel::layout::{BlockParams, Layout};
use pcae_kernel::op::{Op, OpKind};

/// Passes everything on to `inner`, and keeps what each kind of operation took while it is [started](Timed::start).
///
/// A backend that queues is then waited for before and after each operation, which is timed by the device's clock. So nothing of it
/// runs as a graph.
#[derive(Debug)]
pub struct Timed<B> {
    inner: B,
    bytes: fn(&Op) -> u64,
    runs: bool,
    tallies: [Tally; OpKind::ALL.len()],
}

/// What operations of one kind came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Calls.
    pub calls: u64,
    /// Time in them.
    pub time: Duration,
    /// Multiply-adds that the method needs, see [`Op::macs`].
    pub macs: u64,
    /// Bytes read and written at least.
    pub bytes: u64,
}

impl<B> Timed<B> {
    /// Nothing is timed yet. `bytes` says what an operation reads and writes.
    pub fn new(inner: B, bytes: fn(&Op) -> u64) -> Self {
        Self {
            inner,
            bytes,
            runs: false,
            tallies: Default::default(),
        }
    }

    /// The backend itself.
    pub fn inner(&self) -> &B {
        &self.inner
    }

    /// The backend itself.
    pub fn inner_mut(&mut self) -> &mut B {
        &mut self.inner
    }

    /// The backend itself.
    pub fn into_inner(self) -> B {
        self.inner
    }

    /// Forgets what was, and times from now on.
    pub fn start(&mut self) {
        self.runs = true;
        self.tallies = Default::default();
    }

    /// Times no longer.
    pub fn stop(&mut self) {
        self.runs = false;
    }

    /// What was timed, in the order of [`OpKind::ALL`].
    pub fn tallies(&self) -> impl Iterator<Item = (OpKind, Tally)> {
        OpKind::ALL.into_iter().zip(self.tallies)
    }
}

impl<B: TrainBackend> Timed<B> {
    fn timed(
        &mut self,
        op: Op,
        work: impl FnOnce(&mut B) -> Result<(), B::Error>,
    ) -> Result<(), B::Error> {
        if !self.runs {
            return work(&mut self.inner);
        }
        self.inner.start_clock()?;
        let began = Instant::now();
        work(&mut self.inner)?;
        let took = began.elapsed();
        let of_device = self.inner.stop_clock()?;
        let tally = &mut self.tallies[op.kind() as usize];
        tally.calls += 1;
        tally.time += of_device.map_or(took, |seconds| Duration::from_secs_f64(seconds.max(0.0)));
        tally.macs += op.macs();
        tally.bytes += (self.bytes)(&op);
        Ok(())
    }
}

impl<B: TrainBackend> Backend for Timed<B> {
    type Error = B::Error;
    type Buf = B::Buf;
    type Ids = B::Ids;
    type Scores = B::Scores;
    type Params = B::Params;

    fn buf(&mut self, len: usize) -> Result<Self::Buf, Self::Error> {
        self.inner.buf(len)
    }

    fn ids(&mut self, len: usize) -> Result<Self::Ids, Self::Error> {
        self.inner.ids(len)
    }

    fn scores(&mut self, len: usize) -> Result<Self::Scores, Self::Error> {
        self.inner.scores(len)
    }

    fn write(&mut self, to: &mut Self::Buf, from: &[f32]) -> Result<(), Self::Error> {
        self.timed(
            Op::Transfer {
                elements: from.len(),
            },
            |inner| inner.write(to, from),
        )
    }

    fn write_pixels(
        &mut self,
        dims: PixelDims,
        to: &mut Self::Buf,
        pixels: Pixels<'_>,
    ) -> Result<(), Self::Error> {
        self.timed(Op::pixels(dims, &pixels), |inner| {
            inner.write_pixels(dims, to, pixels)
        })
    }

    fn write_values(
        &mut self,
        dims: PixelDims,
        to: &mut Self::Buf,
        from: &[f32],
    ) -> Result<(), Self::Error> {
        self.timed(
            Op::Transfer {
                elements: from.len(),
            },
            |inner| inner.write_values(dims, to, from),
        )
    }

    fn read(&mut self, to: &mut [f32], from: &Self::Buf) -> Result<(), Self::Error> {
        self.timed(Op::Transfer { elements: to.len() }, |inner| {
            inner.read(to, from)
        })
    }

    fn write_ids(&mut self, to: &mut Self::Ids, from: &[u32]) -> Result<(), Self::Error> {
        self.timed(
            Op::Transfer {
                elements: from.len(),
            },
            |inner| inner.write_ids(to, from),
        )
    }

    fn read_ids(&mut self, to: &mut [u32], from: &Self::Ids) -> Result<(), Self::Error> {
        self.timed(Op::Transfer { elements: to.len() }, |inner| {
            inner.read_ids(to, from)
        })
    }

    fn write_scores(&mut self, to: &mut Self::Scores, from: &[f32]) -> Result<(), Self::Error> {
        self.timed(
            Op::Transfer {
                elements: from.len(),
            },
            |inner| inner.write_scores(to, from),
        )
    }

    fn read_scores(&mut self, to: &mut [f32], from: &Self::Scores) -> Result<(), Self::Error> {
        self.timed(Op::Transfer { elements: to.len() }, |inner| {
            inner.read_scores(to, from)
        })
    }

    fn gather_patches(
        &mut self,
        dims: PatchDims,
        out: &mut Self::Buf,
        images: &Self::Buf,
        ids: Option<&Self::Ids>,
    ) -> Result<(), Self::Error> {
        self.timed(Op::tokens(dims.patches_len()), |inner| {
            inner.gather_patches(dims, out, images, ids)
        })
    }

    fn embed_tokens(
        &mut self,
        dims: TokenDims,
        out: &mut Self::Buf,
        x: &Self::Buf,
        ids: Option<&Self::Ids>,
        params: &Self::Params,
        embed: EmbedParams,
    ) -> Result<(), Self::Error> {
        self.timed(Op::tokens(dims.len()), |inner| {
            inner.embed_tokens(dims, out, x, ids, params, embed)
        })
    }

    fn linear(
        &mut self,
        dims: LinearDims,
        out: &mut Self::Buf,
        x: &Self::Buf,
        params: &Self::Params,
        layer: Linear,
        epilogue: Epilogue,
    ) -> Result<(), Self::Error> {
        self.timed(Op::Linear(dims), |inner| {
            inner.linear(dims, out, x, params, layer, epilogue)
        })
    }

    fn layer_norm(
        &mut self,
        dims: RowDims,
        out: &mut Self::Buf,
        x: &Self::Buf,
        params: &Self::Params,
        norm: Norm,
    ) -> Result<(), Self::Error> {
        self.timed(Op::LayerNorm(dims), |inner| {
            inner.layer_norm(dims, out, x, params, norm)
        })
    }

    fn attention(
        &mut self,
        dims: AttentionDims,
        out: &mut Self::Buf,
        qkv: &Self::Buf,
    ) -> Result<(), Self::Error> {
        self.timed(Op::Attention(dims), |inner| inner.attention(dims, out, qkv))
    }

    fn block(
        &mut self,
        dims: BlockDims,
        x: &mut Self::Buf,
        scratch: [&mut Self::Buf; 2],
        params: &Self::Params,
        block: BlockParams,
    ) -> Result<(), Self::Error> {
        match self.runs {
            // Layers that the backend runs as one cannot be timed each.
            true => block_by_layers(self, dims, x, scratch, params, block),
            false => self.inner.block(dims, x, scratch, params, block),
        }
    }

    fn mean_similarity(
        &mut self,
        dims: TokenDims,
        scores: &mut Self::Scores,
        x: &Self::Buf,
    ) -> Result<(), Self::Error> {
        self.timed(Op::MeanSimilarity(dims), |inner| {
            inner.mean_similarity(dims, scores, x)
        })
    }

    fn select(
        &mut self,
        batch: usize,
        tokens: usize,
        keep: usize,
        picked: &mut Self::Ids,
        scores: &Self::Scores,
    ) -> Result<(), Self::Error> {
        self.timed(Op::Select { batch, tokens }, |inner| {
            inner.select(batch, tokens, keep, picked, scores)
        })
    }

    fn gather_tokens(
        &mut self,
        dims: TokenDims,
        keep: usize,
        out: &mut Self::Buf,
        x: &Self::Buf,
        picked: &Self::Ids,
    ) -> Result<(), Self::Error> {
        self.timed(Op::tokens(dims.with_tokens(keep).len()), |inner| {
            inner.gather_tokens(dims, keep, out, x, picked)
        })
    }

    fn gather_ids(
        &mut self,
        batch: usize,
        tokens: usize,
        keep: usize,
        out: &mut Self::Ids,
        ids: Option<&Self::Ids>,
        picked: &Self::Ids,
    ) -> Result<(), Self::Error> {
        self.timed(Op::Select { batch, tokens }, |inner| {
            inner.gather_ids(batch, tokens, keep, out, ids, picked)
        })
    }

    fn mean_pool(
        &mut self,
        dims: TokenDims,
        out: &mut Self::Buf,
        x: &Self::Buf,
    ) -> Result<(), Self::Error> {
        self.timed(Op::tokens(dims.len()), |inner| {
            inner.mean_pool(dims, out, x)
        })
    }
}

impl<B: TrainBackend> TrainBackend for Timed<B> {
    type Vector = B::Vector;

    fn vector(&mut self, len: usize) -> Result<Self::Vector, Self::Error> {
        self.inner.vector(len)
    }

    fn start_read(
        &mut self,
        from: &Self::Vector,
        at: usize,
        len: usize,
    ) -> Result<(), Self::Error> {
        self.inner.start_read(from, at, len)
    }

    fn finish_read(
        &mut self,
        to: &mut [f32],
        from: &Self::Vector,
        at: usize,
    ) -> Result<(), Self::Error> {
        self.inner.finish_read(to, from, at)
    }

    fn is_queued(&self) -> bool {
        self.inner.is_queued()
    }

    fn warning(&mut self) -> Option<&str> {
        self.inner.warning()
    }

    fn wait(&mut self) -> Result<(), Self::Error> {
        self.inner.wait()
    }

    fn write_vector(
        &mut self,
        to: &mut Self::Vector,
        at: usize,
        from: &[f32],
    ) -> Result<(), Self::Error> {
        self.timed(
            Op::Transfer {
                elements: from.len(),
            },
            |inner| inner.write_vector(to, at, from),
        )
    }

    fn read_vector(
        &mut self,
        to: &mut [f32],
        from: &Self::Vector,
        at: usize,
    ) -> Result<(), Self::Error> {
        self.timed(Op::Transfer { elements: to.len() }, |inner| {
            inner.read_vector(to, from, at)
        })
    }

    fn params(&mut self, layout: &Layout, values: &[f32]) -> Result<Self::Params, Self::Error> {
        self.inner.params(layout, values)
    }

    fn teacher_params(
        &mut self,
        layout: &Layout,
        values: &[f32],
    ) -> Result<Self::Params, Self::Error> {
        self.inner.teacher_params(layout, values)
    }

    fn frozen_params(
        &mut self,
        layout: &Layout,
        values: &[f32],
    ) -> Result<Self::Params, Self::Error> {
        self.inner.frozen_params(layout, values)
    }

    fn read_params(
        &mut self,
        to: &mut [f32],
        from: &Self::Params,
        span: Span,
    ) -> Result<(), Self::Error> {
        self.timed(Op::Transfer { elements: span.len }, |inner| {
            inner.read_params(to, from, span)
        })
    }

    fn linear_gelu_saving(
        &mut self,
        dims: LinearDims,
        out: &mut Self::Buf,
        pre_gelu: &mut Self::Buf,
        x: &Self::Buf,
        params: &Self::Params,
        layer: Linear,
    ) -> Result<(), Self::Error> {
        self.timed(Op::Linear(dims), |inner| {
            inner.linear_gelu_saving(dims, out, pre_gelu, x, params, layer)
        })
    }

    fn linear_residual(
        &mut self,
        dims: LinearDims,
        out: &mut Self::Buf,
        residual: &Self::Buf,
        x: &Self::Buf,
        params: &Self::Params,
        layer: Linear,
        scale: Option<(&Self::Buf, usize)>,
    ) -> Result<(), Self::Error> {
        self.timed(Op::Linear(dims), |inner| {
            inner.linear_residual(dims, out, residual, x, params, layer, scale)
        })
    }

    fn scale_rows(
        &mut self,
        dims: RowDims,
        out: &mut Self::Buf,
        x: &Self::Buf,
        scale: &Self::Buf,
        rows_per_scale: usize,
    ) -> Result<(), Self::Error> {
        self.timed(Op::tokens(dims.len()), |inner| {
            inner.scale_rows(dims, out, x, scale, rows_per_scale)
        })
    }

    fn linear_backward_input(
        &mut self,
        dims: LinearDims,
        d_x: &mut Self::Buf,
        d_y: &Self::Buf,
        params: &Self::Params,
        layer: Linear,
        pre_gelu: Option<&Self::Buf>,
    ) -> Result<(), Self::Error> {
        self.timed(Op::LinearInput(dims), |inner| {
            inner.linear_backward_input(dims, d_x, d_y, params, layer, pre_gelu)
        })
    }

    fn linear_backward_params(
        &mut self,
        dims: LinearDims,
        grads: &mut Self::Vector,
        layer: Linear,
        d_y: &Self::Buf,
        x: &Self::Buf,
    ) -> Result<(), Self::Error> {
        self.timed(Op::LinearParams(dims), |inner| {
            inner.linear_backward_params(dims, grads, layer, d_y, x)
        })
    }

    fn layer_norm_saving(
        &mut self,
        dims: RowDims,
        out: &mut Self::Buf,
        stats: &mut Self::Vector,
        x: &Self::Buf,
        params: &Self::Params,
        norm: Norm,
    ) -> Result<(), Self::Error> {
        self.timed(Op::LayerNorm(dims), |inner| {
            inner.layer_norm_saving(dims, out, stats, x, params, norm)
        })
    }

    fn layer_norm_backward(
        &mut self,
        dims: RowDims,
        d_x: &mut Self::Buf,
        accum: Accum,
        grads: &mut Self::Vector,
        d_y: &Self::Buf,
        x: &Self::Buf,
        stats: &Self::Vector,
        params: &Self::Params,
        norm: Norm,
    ) -> Result<(), Self::Error> {
        self.timed(Op::LayerNormBackward(dims), |inner| {
            inner.layer_norm_backward(dims, d_x, accum, grads, d_y, x, stats, params, norm)
        })
    }

    fn attention_saving(
        &mut self,
        dims: AttentionDims,
        out: &mut Self::Buf,
        lse: &mut Self::Vector,
        qkv: &Self::Buf,
    ) -> Result<(), Self::Error> {
        self.timed(Op::Attention(dims), |inner| {
            inner.attention_saving(dims, out, lse, qkv)
        })
    }

    fn attention_backward(
        &mut self,
        dims: AttentionDims,
        d_qkv: &mut Self::Buf,
        d_out: &Self::Buf,
        qkv: &Self::Buf,
        out: &Self::Buf,
        lse: &Self::Vector,
    ) -> Result<(), Self::Error> {
        self.timed(Op::AttentionBackward(dims), |inner| {
            inner.attention_backward(dims, d_qkv, d_out, qkv, out, lse)
        })
    }

    fn embed_tokens_backward(
        &mut self,
        dims: TokenDims,
        d_x: &mut Self::Buf,
        grads: &mut Self::Vector,
        d_out: &Self::Buf,
        embed: EmbedParams,
    ) -> Result<(), Self::Error> {
        self.timed(Op::tokens(dims.len()), |inner| {
            inner.embed_tokens_backward(dims, d_x, grads, d_out, embed)
        })
    }

    fn decoder_tokens(
        &mut self,
        dims: DecoderDims,
        out: &mut Self::Buf,
        x: &Self::Buf,
        ids_visible: &Self::Ids,
        ids_target: &Self::Ids,
        params: &Self::Params,
        mask_token: Span,
        pos_embed: Span,
    ) -> Result<(), Self::Error> {
        self.timed(Op::tokens(dims.len()), |inner| {
            inner.decoder_tokens(
                dims,
                out,
                x,
                ids_visible,
                ids_target,
                params,
                mask_token,
                pos_embed,
            )
        })
    }

    fn decoder_tokens_backward(
        &mut self,
        dims: DecoderDims,
        d_x: &mut Self::Buf,
        grads: &mut Self::Vector,
        d_out: &Self::Buf,
        mask_token: Span,
    ) -> Result<(), Self::Error> {
        self.timed(Op::tokens(dims.len()), |inner| {
            inner.decoder_tokens_backward(dims, d_x, grads, d_out, mask_token)
        })
    }

    fn strip_prefix(
        &mut self,
        dims: TokenDims,
        out: &mut Self::Buf,
        x: &Self::Buf,
    ) -> Result<(), Self::Error> {
        self.timed(Op::tokens(dims.len()), |inner| {
            inner.strip_prefix(dims, out, x)
        })
    }

    fn strip_prefix_backward(
        &mut self,
        dims: TokenDims,
        d_x: &mut Self::Buf,
        d_out: &Self::Buf,
    ) -> Result<(), Self::Error> {
        self.timed(Op::tokens(dims.len()), |inner| {
            inner.strip_prefix_backward(dims, d_x, d_out)
        })
    }

    fn gather_tokens_backward(
        &mut self,
        dims: TokenDims,
        keep: usize,
        d_x: &mut Self::Buf,
        d_out: &Self::Buf,
        picked: &Self::Ids,
    ) -> Result<(), Self::Error> {
        self.timed(Op::tokens(dims.len()), |inner| {
            inner.gather_tokens_backward(dims, keep, d_x, d_out, picked)
        })
    }

    fn mean_pool_backward(
        &mut self,
        dims: TokenDims,
        d_x: &mut Self::Buf,
        d_out: &Self::Buf,
    ) -> Result<(), Self::Error> {
        self.timed(Op::tokens(dims.len()), |inner| {
            inner.mean_pool_backward(dims, d_x, d_out)
        })
    }

    fn pivoted_qr_scores(
        &mut self,
        dims: TokenDims,
        scores: &mut Self::Scores,
        x: &Self::Buf,
    ) -> Result<(), Self::Error> {
        self.timed(Op::PivotedQr(dims), |inner| {
            inner.pivoted_qr_scores(dims, scores, x)
        })
    }

    fn standardise(
        &mut self,
        dims: RowDims,
        out: &mut Self::Buf,
        x: &Self::Buf,
    ) -> Result<(), Self::Error> {
        self.timed(Op::Target(dims), |inner| inner.standardise(dims, out, x))
    }

    fn feature_spread(
        &mut self,
        dims: RowDims,
        out: &mut Self::Vector,
        at: usize,
        x: &Self::Buf,
    ) -> Result<(), Self::Error> {
        self.timed(Op::Target(dims), |inner| {
            inner.feature_spread(dims, out, at, x)
        })
    }

    fn cosine_loss(
        &mut self,
        dims: RowDims,
        d_pred: &mut Self::Buf,
        losses: &mut Self::Vector,
        at: usize,
        pred: &Self::Buf,
        target: &Self::Buf,
        scale: f64,
    ) -> Result<(), Self::Error> {
        self.timed(Op::Loss(dims), |inner| {
            inner.cosine_loss(dims, d_pred, losses, at, pred, target, scale)
        })
    }

    fn mse_loss(
        &mut self,
        dims: RowDims,
        d_pred: &mut Self::Buf,
        losses: &mut Self::Vector,
        at: usize,
        pred: &Self::Buf,
        target: &Self::Buf,
        scale: f64,
    ) -> Result<(), Self::Error> {
        self.timed(Op::Loss(dims), |inner| {
            inner.mse_loss(dims, d_pred, losses, at, pred, target, scale)
        })
    }

    fn cross_entropy(
        &mut self,
        dims: RowDims,
        d_logits: &mut Self::Buf,
        losses: &mut Self::Vector,
        at: usize,
        logits: &Self::Buf,
        target: &Self::Buf,
        scale: f64,
    ) -> Result<(), Self::Error> {
        self.timed(Op::Loss(dims), |inner| {
            inner.cross_entropy(dims, d_logits, losses, at, logits, target, scale)
        })
    }

    fn pixel_targets(
        &mut self,
        dims: PatchDims,
        out: &mut Self::Buf,
        images: &Self::Buf,
        ids: &Self::Ids,
    ) -> Result<(), Self::Error> {
        self.timed(Op::tokens(dims.patches_len()), |inner| {
            inner.pixel_targets(dims, out, images, ids)
        })
    }

    fn zero(&mut self, x: &mut Self::Vector, span: Span) -> Result<(), Self::Error> {
        self.timed(Op::Vector { elements: span.len }, |inner| {
            inner.zero(x, span)
        })
    }

    fn copy_vector(
        &mut self,
        to: &mut Self::Vector,
        at: usize,
        from: &Self::Vector,
        span: Span,
    ) -> Result<(), Self::Error> {
        self.timed(Op::Transfer { elements: span.len }, |inner| {
            inner.copy_vector(to, at, from, span)
        })
    }

    fn norm(
        &mut self,
        out: &mut Self::Vector,
        at: usize,
        x: &Self::Vector,
    ) -> Result<(), Self::Error> {
        // A vector does not tell its length.
        self.timed(Op::Vector { elements: 0 }, |inner| inner.norm(out, at, x))
    }

    fn adamw_ema(
        &mut self,
        student: &mut Self::Params,
        teacher: Option<&mut Self::Params>,
        grads: &mut Self::Vector,
        exp_avg: &mut Self::Vector,
        exp_avg_sq: &mut Self::Vector,
        segments: &[Segment],
        step: &AdamW,
        clip: Option<Clip<'_, Self::Vector>>,
    ) -> Result<(), Self::Error> {
        let op = Op::adamw(segments, teacher.is_some());
        self.timed(op, |inner| {
            inner.adamw_ema(
                student, teacher, grads, exp_avg, exp_avg_sq, segments, step, clip,
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use pcae_kernel::config::{ClassifierConfig, Pool, Reduction, VitConfig};
    use pcae_kernel::conformance::{self, Tolerance};
    use pcae_kernel::flops;
    use pcae_kernel::model::{Classifier, MeanSimilarity};
    use pcae_kernel::reference::Reference;

    use super::*;

    #[test]
    fn passes_everything_on() {
        let mut timed = Timed::new(Reference::<f64, _>::owned(), Op::elements);
        timed.start();
        if let Err(failure) = conformance::run(&mut timed, Tolerance::F32, |_| ()) {
            panic!("{failure}");
        }
        for (kind, tally) in timed.tallies() {
            assert!(tally.calls > 0, "{}", kind.name());
        }
    }

    #[test]
    fn counts_what_a_forward_needs() {
        let vit = VitConfig {
            img_size: [8, 12],
            in_chans: 1,
            patch_size: 4,
            embed_dim: 12,
            depth: 2,
            num_heads: 3,
            mlp_ratio: 2.0,
        };
        let config = ClassifierConfig {
            vit,
            num_classes: 5,
            pool: Pool::Mean,
            reduction: Reduction::NONE,
        };
        let mut timed = Timed::new(Reference::<f32, _>::owned(), Op::elements);
        let layout = Layout::classifier(&config);
        let params = timed
            .frozen_params(&layout, &vec![0.1; layout.len()])
            .unwrap();
        let mut model = Classifier::new(&mut timed, &config, 3).unwrap();
        let images = timed.buf(3 * 8 * 12).unwrap();
        let mut forward = |timed: &mut Timed<_>| {
            model
                .forward(timed, &params, 3, &images, &mut MeanSimilarity)
                .map(|_| ())
        };
        forward(&mut timed).unwrap();
        assert!(timed.tallies().all(|(_, tally)| tally == Tally::default()));
        timed.start();
        forward(&mut timed).unwrap();
        timed.stop();
        forward(&mut timed).unwrap();
        let macs: u64 = timed.tallies().map(|(_, tally)| tally.macs).sum();
        assert_eq!(macs, 3 * flops::classifier(&config));
    }
}
