//! What training adds: `impl TrainBackend for Cuda`.

use pcae_kernel::backend::{
    Accum, AdamW, AttentionDims, Clip, DecoderDims, EmbedParams, Linear, LinearDims, Norm,
    PatchDims, RowDims, Segment, Span, TokenDims, TrainBackend,
};
use pcae_kernel::error::{Error as KernelError, expect_len, product};
use pcae_kernel::layout::Layout;

use crate::Cuda;
use crate::buffers::{Buf, Buffer, Ids, Params, Scores, Vector};
use crate::error::Error;
use crate::gemm::Matmul;
use crate::padding;
use crate::rows::Affine;

impl TrainBackend for Cuda {
    type Vector = Vector;

    fn vector(&mut self, len: usize) -> Result<Vector, Error> {
        Vector::new(&mut self.queue, len)
    }

    fn start_read(&mut self, from: &Vector, at: usize, len: usize) -> Result<(), Error> {
        self.queue
            .expect("start_read", "from", from, at.saturating_add(len))?;
        self.queue.start_read(from.at(at), len)
    }

    fn finish_read(&mut self, to: &mut [f32], from: &Vector, at: usize) -> Result<(), Error> {
        self.queue
            .expect("finish_read", "from", from, at.saturating_add(to.len()))?;
        self.queue.finish_read(to, from.at(at))
    }

    fn warning(&mut self) -> Option<&str> {
        self.queue.warning()
    }

    fn is_queued(&self) -> bool {
        true
    }

    fn wait(&mut self) -> Result<(), Error> {
        self.queue.wait()
    }

    fn start_clock(&mut self) -> Result<(), Error> {
        self.queue.start_clock()
    }

    fn stop_clock(&mut self) -> Result<Option<f64>, Error> {
        self.queue.stop_clock().map(Some)
    }

    fn write_vector(&mut self, to: &mut Vector, at: usize, from: &[f32]) -> Result<(), Error> {
        self.queue
            .expect("write_vector", "to", to, at.saturating_add(from.len()))?;
        self.queue.write_f32(to.at(at), from)
    }

    fn read_vector(&mut self, to: &mut [f32], from: &Vector, at: usize) -> Result<(), Error> {
        self.queue
            .expect("read_vector", "from", from, at.saturating_add(to.len()))?;
        self.queue.read_f32(to, from.at(at))
    }

    fn params(&mut self, layout: &Layout, values: &[f32]) -> Result<Params, Error> {
        expect_len("params", "values", values.len(), layout.len())?;
        Params::new(&mut self.queue, self.precision, &values[..layout.len()])
    }

    fn teacher_params(&mut self, layout: &Layout, values: &[f32]) -> Result<Params, Error> {
        let params = self.params(layout, values)?;
        match self.fp8_teacher {
            true => params.with_e4m3(&mut self.queue, layout),
            false => Ok(params),
        }
    }

    fn read_params(&mut self, to: &mut [f32], from: &Params, span: Span) -> Result<(), Error> {
        const OP: &str = "read_params";
        self.queue.expect_span(OP, "span", from, span, span.len)?;
        expect_len(OP, "to", to.len(), span.len)?;
        self.queue
            .read_f32(&mut to[..span.len], from.at(span.start))
    }

    fn linear_gelu_saving(
        &mut self,
        dims: LinearDims,
        out: &mut Buf,
        pre_gelu: &mut Buf,
        x: &Buf,
        params: &Params,
        layer: Linear,
    ) -> Result<(), Error> {
        const OP: &str = "linear_gelu_saving";
        self.queue.expect(OP, "out", out, dims.out_len())?;
        self.queue
            .expect(OP, "pre_gelu", pre_gelu, dims.out_len())?;
        self.forward_product(OP, dims, pre_gelu, x, params, layer, None)?;
        self.queue.gelu(dims.out_len(), out.at(0), pre_gelu.at(0))
    }

    fn linear_residual(
        &mut self,
        dims: LinearDims,
        out: &mut Buf,
        residual: &Buf,
        x: &Buf,
        params: &Params,
        layer: Linear,
        scale: Option<(&Buf, usize)>,
    ) -> Result<(), Error> {
        const OP: &str = "linear_residual";
        let len = dims.out_len();
        self.queue.expect(OP, "out", out, len)?;
        self.queue.expect(OP, "residual", residual, len)?;
        let Some((scale, per)) = scale else {
            let add = Some(residual.at(0));
            return self.forward_product(OP, dims, out, x, params, layer, add);
        };
        self.queue.expect_scale(OP, dims.rows, scale, per)?;
        self.forward_product(OP, dims, out, x, params, layer, None)?;
        let scale = (scale.at(0), per * dims.out_features);
        self.queue.add_scaled(len, out.at(0), residual.at(0), scale)
    }

    fn scale_rows(
        &mut self,
        dims: RowDims,
        out: &mut Buf,
        x: &Buf,
        scale: &Buf,
        rows_per_scale: usize,
    ) -> Result<(), Error> {
        const OP: &str = "scale_rows";
        self.queue.expect(OP, "out", out, dims.len())?;
        self.queue.expect(OP, "x", x, dims.len())?;
        self.queue
            .expect_scale(OP, dims.rows, scale, rows_per_scale)?;
        let scale = (scale.at(0), product(&[rows_per_scale, dims.dim]));
        self.queue.scale(dims.len(), out.at(0), x.at(0), scale)
    }

    fn linear_backward_input(
        &mut self,
        dims: LinearDims,
        d_x: &mut Buf,
        d_y: &Buf,
        params: &Params,
        layer: Linear,
        pre_gelu: Option<&Buf>,
    ) -> Result<(), Error> {
        const OP: &str = "linear_backward_input";
        self.queue.expect(OP, "d_x", d_x, dims.in_len())?;
        self.queue.expect(OP, "d_y", d_y, dims.out_len())?;
        self.queue
            .expect_span(OP, "weight", params, layer.weight, dims.weight_len())?;
        if let Some(pre_gelu) = pre_gelu {
            self.queue.expect(OP, "pre_gelu", pre_gelu, dims.in_len())?;
        }
        self.queue.matmul(Matmul {
            m: dims.rows,
            n: dims.in_features,
            k: dims.out_features,
            a: d_y.at(0),
            a_transposed: false,
            a_row: dims.out_features,
            b: params.product(layer.weight.start),
            b_transposed: false,
            b_row: dims.in_features,
            bias: None,
            add: None,
            out: d_x.at(0),
            out_f32: false,
            scale: None,
        })?;
        match pre_gelu {
            Some(pre_gelu) => {
                let rows = RowDims {
                    rows: dims.rows,
                    dim: dims.in_features,
                };
                self.queue
                    .gelu_backward(OP, rows, d_x.at(0), pre_gelu.at(0))
            }
            None => Ok(()),
        }
    }

    fn linear_backward_params(
        &mut self,
        dims: LinearDims,
        grads: &mut Vector,
        layer: Linear,
        d_y: &Buf,
        x: &Buf,
    ) -> Result<(), Error> {
        const OP: &str = "linear_backward_params";
        self.queue.expect(OP, "grads", grads, 0)?;
        self.queue.expect_layer(OP, grads, layer, dims)?;
        self.queue.expect(OP, "d_y", d_y, dims.out_len())?;
        self.queue.expect(OP, "x", x, dims.in_len())?;
        if dims.rows == 0 {
            return Ok(());
        }
        // First, as long as sums of `d_y` that its kernel has made are there.
        let rows = RowDims {
            rows: dims.rows,
            dim: dims.out_features,
        };
        let d_bias = grads.at(layer.bias.start);
        self.queue.add_rows(OP, rows, d_bias, d_y.at(0))?;
        let (mut input, mut row) = (x.at(0), dims.in_features);
        if let Some(padded) = padding::padded(self.precision, dims) {
            let size = padding::bytes(self.precision, dims, false);
            let room = self.queue.workspace(size)?;
            self.queue
                .widen_rows(OP, room, input, [dims.rows, row, padded])?;
            (input, row) = (room, padded);
        }
        let d_weight = grads.at(layer.weight.start);
        self.queue.matmul(Matmul {
            m: dims.out_features,
            n: dims.in_features,
            k: dims.rows,
            a: d_y.at(0),
            a_transposed: true,
            a_row: dims.out_features,
            b: input,
            b_transposed: false,
            b_row: row,
            bias: None,
            add: Some(d_weight),
            out: d_weight,
            out_f32: true,
            scale: None,
        })
    }

    fn layer_norm_saving(
        &mut self,
        dims: RowDims,
        out: &mut Buf,
        stats: &mut Vector,
        x: &Buf,
        params: &Params,
        norm: Norm,
    ) -> Result<(), Error> {
        let out = (out, false);
        self.layer_norm_rows("layer_norm_saving", dims, out, Some(stats), x, params, norm)
    }

    fn layer_norm_backward(
        &mut self,
        dims: RowDims,
        d_x: &mut Buf,
        accum: Accum,
        grads: &mut Vector,
        d_y: &Buf,
        x: &Buf,
        stats: &Vector,
        params: &Params,
        norm: Norm,
    ) -> Result<(), Error> {
        const OP: &str = "layer_norm_backward";
        self.queue.expect(OP, "grads", grads, 0)?;
        self.queue.expect(OP, "d_x", d_x, dims.len())?;
        self.queue.expect(OP, "d_y", d_y, dims.len())?;
        self.queue.expect(OP, "x", x, dims.len())?;
        self.queue
            .expect(OP, "stats", stats, product(&[dims.rows, 2]))?;
        self.queue
            .expect_span(OP, "weight", params, norm.weight, dims.dim)?;
        self.queue
            .expect_span(OP, "grads of weight", grads, norm.weight, dims.dim)?;
        self.queue
            .expect_span(OP, "grads of bias", grads, norm.bias, dims.dim)?;
        self.queue.layer_norm_backward(
            OP,
            dims,
            (d_x.at(0), accum == Accum::Add),
            Affine {
                weight: grads.at(norm.weight.start),
                bias: grads.at(norm.bias.start),
            },
            [d_y.at(0), x.at(0), stats.at(0)],
            params.at(norm.weight.start),
        )
    }

    fn attention_saving(
        &mut self,
        dims: AttentionDims,
        out: &mut Buf,
        lse: &mut Vector,
        qkv: &Buf,
    ) -> Result<(), Error> {
        Cuda::attention_forward(self, "attention_saving", dims, out, Some(lse), qkv, false)
    }

    fn attention_backward(
        &mut self,
        dims: AttentionDims,
        d_qkv: &mut Buf,
        d_out: &Buf,
        qkv: &Buf,
        out: &Buf,
        lse: &Vector,
    ) -> Result<(), Error> {
        Cuda::attention_backward(self, dims, d_qkv, d_out, qkv, out, lse)
    }

    fn embed_tokens_backward(
        &mut self,
        dims: TokenDims,
        d_x: &mut Buf,
        grads: &mut Vector,
        d_out: &Buf,
        embed: EmbedParams,
    ) -> Result<(), Error> {
        Cuda::embed_tokens_backward(self, dims, d_x, grads, d_out, embed)
    }

    fn decoder_tokens(
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
        Cuda::decoder_tokens(
            self,
            dims,
            out,
            x,
            ids_visible,
            ids_target,
            params,
            mask_token,
            pos_embed,
        )
    }

    fn decoder_tokens_backward(
        &mut self,
        dims: DecoderDims,
        d_x: &mut Buf,
        grads: &mut Vector,
        d_out: &Buf,
        mask_token: Span,
    ) -> Result<(), Error> {
        Cuda::decoder_tokens_backward(self, dims, d_x, grads, d_out, mask_token)
    }

    fn strip_prefix(&mut self, dims: TokenDims, out: &mut Buf, x: &Buf) -> Result<(), Error> {
        Cuda::strip_prefix(self, dims, out, x)
    }

    fn strip_prefix_backward(
        &mut self,
        dims: TokenDims,
        d_x: &mut Buf,
        d_out: &Buf,
    ) -> Result<(), Error> {
        Cuda::strip_prefix_backward(self, dims, d_x, d_out)
    }

    fn gather_tokens_backward(
        &mut self,
        dims: TokenDims,
        keep: usize,
        d_x: &mut Buf,
        d_out: &Buf,
        picked: &Ids,
    ) -> Result<(), Error> {
        Cuda::gather_tokens_backward(self, dims, keep, d_x, d_out, picked)
    }

    fn mean_pool_backward(
        &mut self,
        dims: TokenDims,
        d_x: &mut Buf,
        d_out: &Buf,
    ) -> Result<(), Error> {
        Cuda::mean_pool_backward(self, dims, d_x, d_out)
    }

    fn pivoted_qr_scores(
        &mut self,
        dims: TokenDims,
        scores: &mut Scores,
        x: &Buf,
    ) -> Result<(), Error> {
        Cuda::pivoted_qr_scores(self, dims, scores, x)
    }

    fn standardise(&mut self, dims: RowDims, out: &mut Buf, x: &Buf) -> Result<(), Error> {
        const OP: &str = "standardise";
        if dims.dim < 2 {
            return Err(Error::Kernel(KernelError::Dimensions {
                op: OP,
                expected: "rows of at least 2 elements",
                found: dims.dim,
            }));
        }
        self.queue.expect(OP, "out", out, dims.len())?;
        self.queue.expect(OP, "x", x, dims.len())?;
        self.queue
            .layer_norm(OP, dims, (out.at(0), false), None, x.at(0), None)
    }

    fn feature_spread(
        &mut self,
        dims: RowDims,
        out: &mut Vector,
        at: usize,
        x: &Buf,
    ) -> Result<(), Error> {
        const OP: &str = "feature_spread";
        self.queue.expect_loss(OP, dims, out, at)?;
        self.queue.expect(OP, "x", x, dims.len())?;
        self.queue.spread(OP, dims, out.at(at), x.at(0))
    }

    fn cosine_loss(
        &mut self,
        dims: RowDims,
        d_pred: &mut Buf,
        losses: &mut Vector,
        at: usize,
        pred: &Buf,
        target: &Buf,
        scale: f64,
    ) -> Result<(), Error> {
        const OP: &str = "cosine_loss";
        self.queue.expect_pair(OP, dims, d_pred, pred, target)?;
        self.queue.expect_loss(OP, dims, losses, at)?;
        let rows = [d_pred.at(0), pred.at(0), target.at(0)];
        self.queue.cosine_loss(OP, dims, rows, losses.at(at), scale)
    }

    fn mse_loss(
        &mut self,
        dims: RowDims,
        d_pred: &mut Buf,
        losses: &mut Vector,
        at: usize,
        pred: &Buf,
        target: &Buf,
        scale: f64,
    ) -> Result<(), Error> {
        const OP: &str = "mse_loss";
        self.queue.expect_pair(OP, dims, d_pred, pred, target)?;
        self.queue.expect_loss(OP, dims, losses, at)?;
        let rows = [d_pred.at(0), pred.at(0), target.at(0)];
        self.queue.mse_loss(dims, rows, losses.at(at), scale)
    }

    fn cross_entropy(
        &mut self,
        dims: RowDims,
        d_logits: &mut Buf,
        losses: &mut Vector,
        at: usize,
        logits: &Buf,
        target: &Buf,
        scale: f64,
    ) -> Result<(), Error> {
        const OP: &str = "cross_entropy";
        self.queue.expect_pair(OP, dims, d_logits, logits, target)?;
        self.queue.expect_loss(OP, dims, losses, at)?;
        let rows = [d_logits.at(0), logits.at(0), target.at(0)];
        self.queue
            .cross_entropy(OP, dims, rows, losses.at(at), scale)
    }

    fn pixel_targets(
        &mut self,
        dims: PatchDims,
        out: &mut Buf,
        images: &Buf,
        ids: &Ids,
    ) -> Result<(), Error> {
        Cuda::pixel_targets(self, dims, out, images, ids)
    }

    fn zero(&mut self, x: &mut Vector, span: Span) -> Result<(), Error> {
        self.queue.expect("zero", "x", x, span.end())?;
        self.queue
            .zero(x.at(span.start), span.len * size_of::<f32>())
    }

    fn copy_vector(
        &mut self,
        to: &mut Vector,
        at: usize,
        from: &Vector,
        span: Span,
    ) -> Result<(), Error> {
        self.queue.expect("copy_vector", "from", from, span.end())?;
        self.queue
            .expect("copy_vector", "to", to, at.saturating_add(span.len))?;
        let bytes = span.len * size_of::<f32>();
        // By itself: `at` is another one in every step, and a step is to stay one graph.
        self.queue.copy_apart(to.at(at), from.at(span.start), bytes)
    }

    fn norm(&mut self, out: &mut Vector, at: usize, x: &Vector) -> Result<(), Error> {
        self.queue
            .expect("norm", "out", out, at.saturating_add(1))?;
        self.queue.expect("norm", "x", x, 0)?;
        self.queue.norm(x.len(), out.at(at), x.at(0))
    }

    fn adamw_ema(
        &mut self,
        student: &mut Params,
        teacher: Option<&mut Params>,
        grads: &mut Vector,
        exp_avg: &mut Vector,
        exp_avg_sq: &mut Vector,
        segments: &[Segment],
        step: &AdamW,
        clip: Option<Clip<'_, Vector>>,
    ) -> Result<(), Error> {
        const OP: &str = "adamw_ema";
        let is_ema = |segment: &&Segment| segment.ema;
        let end = |segment: &Segment| segment.span.end();
        let all = segments.iter().map(end).max().unwrap_or(0);
        let ema = segments.iter().filter(is_ema).map(end).max().unwrap_or(0);
        self.queue.expect(OP, "student", student, all)?;
        self.queue.expect(OP, "grads", grads, all)?;
        self.queue.expect(OP, "exp_avg", exp_avg, all)?;
        self.queue.expect(OP, "exp_avg_sq", exp_avg_sq, all)?;
        if let Some(teacher) = teacher.as_deref() {
            self.queue.expect(OP, "teacher", teacher, ema)?;
        }
        let clip = match clip {
            Some(clip) => {
                self.queue
                    .expect(OP, "norms", clip.norms, clip.at.saturating_add(1))?;
                Some((clip.norms.at(clip.at), clip.max_norm))
            }
            None => None,
        };
        let vectors = [&*grads, &*exp_avg, &*exp_avg_sq];
        self.adamw(student, teacher.as_deref(), vectors, segments, step, clip)
    }
}

impl Cuda {
    /// Layer norm, with or without `stats`; `to_e4m3`: `out` is left in e4m3.
    pub(crate) fn layer_norm_rows(
        &mut self,
        op: &'static str,
        dims: RowDims,
        (out, to_e4m3): (&mut Buf, bool),
        stats: Option<&mut Vector>,
        x: &Buf,
        params: &Params,
        norm: Norm,
    ) -> Result<(), Error> {
        self.queue.expect(op, "out", out, dims.len())?;
        self.queue.expect(op, "x", x, dims.len())?;
        self.queue.expect_norm(op, params, norm, dims.dim)?;
        if let Some(stats) = stats.as_deref() {
            self.queue
                .expect(op, "stats", stats, product(&[dims.rows, 2]))?;
        }
        let affine = Affine {
            weight: params.at(norm.weight.start),
            bias: params.at(norm.bias.start),
        };
        let stats = stats.map(|stats| stats.at(0));
        let out = (out.at(0), to_e4m3);
        self.queue
            .layer_norm(op, dims, out, stats, x.at(0), Some(affine))
    }
}
