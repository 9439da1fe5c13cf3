//! What training adds.

use pcae_kernel::backend::{
    Accum, AdamW, AttentionDims, COSINE_EPS, Clip, DecoderDims, EmbedParams, Linear, LinearDims,
    NORM_EPS, Norm, PatchDims, RowDims, Segment, Span, TokenDims, TrainBackend,
};
use pcae_kernel::error::{Error as KernelError, expect_len, product};
use pcae_kernel::layout::Layout;
use pcae_kernel::sizing::Role;

use crate::attention::Attention;
use crate::buf::{Buf, Floats, View};
use crate::checks::{
    check_loss, check_numbers, check_prefix, check_scale, check_span, checked_ids, front,
    front_mut, operand,
};
use crate::cpu::{Cpu, copy_patches, forward_dims, linear_inputs, patch_tokens};
use crate::element::Element;
use crate::error::Error;
use crate::gemm::{Dims, Finish, Left, Mode, Out, Precision, Right};
use crate::params::Params;
use crate::rows;
use crate::threads::Pieces;

/// Elements of a piece of a flat vector.
pub(crate) const PIECE: usize = 4096;
/// Columns that one unit of a sum over rows takes: 256 bytes of each row.
pub(crate) const COLUMNS: usize = 64;

/// Rows of a batch that one product of a weight's gradient sums.
pub(crate) const INNER: usize = 1024;

impl TrainBackend for Cpu {
    type Vector = Floats;

    fn vector(&mut self, len: usize) -> Result<Floats, Error> {
        Floats::zeros(len)
    }

    fn write_vector(&mut self, to: &mut Floats, at: usize, from: &[f32]) -> Result<(), Error> {
        let end = at.saturating_add(from.len());
        front_mut("write_vector", "to", to, end)?[at..].copy_from_slice(from);
        Ok(())
    }

    fn read_vector(&mut self, to: &mut [f32], from: &Floats, at: usize) -> Result<(), Error> {
        let end = at.saturating_add(to.len());
        to.copy_from_slice(&front("read_vector", "from", from, end)?[at..]);
        Ok(())
    }

    fn params(&mut self, layout: &Layout, values: &[f32]) -> Result<Params, Error> {
        let values = front("params", "values", values, layout.len())?;
        Params::new(values, self.precision, self.isa, layout, Role::Trained)
    }

    fn teacher_params(&mut self, layout: &Layout, values: &[f32]) -> Result<Params, Error> {
        let values = front("teacher_params", "values", values, layout.len())?;
        let precision = self.teacher_precision;
        Params::new(values, precision, self.isa, layout, Role::Teacher)
    }

    fn frozen_params(&mut self, layout: &Layout, values: &[f32]) -> Result<Params, Error> {
        let values = front("frozen_params", "values", values, layout.len())?;
        Params::new(values, self.precision, self.isa, layout, Role::Frozen)
    }

    fn read_params(&mut self, to: &mut [f32], from: &Params, span: Span) -> Result<(), Error> {
        const OP: &str = "read_params";
        from.check_trainable(OP)?;
        let values = from.part(OP, "span", span, span.len)?;
        front_mut(OP, "to", to, span.len)?.copy_from_slice(values);
        Ok(())
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
        let len = dims.out_len();
        out.check(OP, "out", len)?;
        pre_gelu.check(OP, "pre_gelu", len)?;
        let (x, weight, bias) = linear_inputs(OP, dims, x, self.isa, params, layer)?;
        params.precision.check(self.isa)?;
        let [out, pre_gelu] = [out, pre_gelu].map(|to| to.overwrite_as(params.precision, len));
        let finish = Finish::to(out, dims.out_features, bias, Mode::GeluSaving { pre_gelu });
        self.product(params.precision, forward_dims(dims), x, weight, &finish)
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
        out.check(OP, "out", len)?;
        let residual = residual.floats(OP, "residual", len)?;
        let (x, weight, bias) = linear_inputs(OP, dims, x, self.isa, params, layer)?;
        let scale = match scale {
            Some((scale, per)) => Some((check_scale(OP, dims.rows, scale, per)?, per)),
            None => None,
        };
        let finish = Finish::new(
            out.overwrite(len),
            dims.out_features,
            bias,
            Mode::Residual { residual, scale },
        );
        self.product(params.precision, forward_dims(dims), x, weight, &finish)
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
        out.check(OP, "out", dims.len())?;
        let x = x.floats(OP, "x", dims.len())?;
        let scale = check_scale(OP, dims.rows, scale, rows_per_scale)?;
        let out = out.overwrite(dims.len());
        if dims.is_empty() {
            return Ok(());
        }
        let d = dims.dim;
        self.threads
            .for_each(dims.rows, 2 * d, Pieces::new(out, d), |row, out| {
                let scale = scale[row / rows_per_scale];
                rows::scale(self.isa, out, &x[row * d..][..d], scale);
            });
        Ok(())
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
        d_x.check(OP, "d_x", dims.in_len())?;
        let d_y = operand(OP, "d_y", d_y, dims.out_len(), params.precision)?;
        let weight = params.weight_backward(OP, self.isa, layer.weight, dims)?;
        let pre_gelu = match pre_gelu {
            Some(pre_gelu) => Some(pre_gelu.view(OP, "pre_gelu", dims.in_len())?),
            None => None,
        };
        params.precision.check(self.isa)?;
        let (d_x, mode) = match pre_gelu {
            // Of a layer's output, which its backward reads and nothing else.
            Some(pre_gelu) => {
                let d_x = d_x.overwrite_as(params.precision, dims.in_len());
                (d_x, Mode::GeluGrad { pre_gelu })
            }
            None => (d_x.overwrite(dims.in_len()).into(), Mode::Store),
        };
        let product = Dims {
            m: dims.rows,
            n: dims.in_features,
            inner: dims.out_features,
        };
        let finish = Finish::to(d_x, dims.in_features, &[], mode);
        self.product(params.precision, product, Left::Rows(d_y), weight, &finish)
    }

    fn linear_backward_params(
        &mut self,
        dims: LinearDims,
        grads: &mut Floats,
        layer: Linear,
        d_y: &Buf,
        x: &Buf,
    ) -> Result<(), Error> {
        const OP: &str = "linear_backward_params";
        let (total, width) = (grads.len(), dims.out_features);
        let weight = check_span(OP, "weight", total, layer.weight, dims.weight_len())?;
        let bias = check_span(OP, "bias", total, layer.bias, width)?;
        let Ok([d_weight, d_bias]) = grads.get_disjoint_mut([weight, bias]) else {
            return Err(Error::Kernel(KernelError::Dimensions {
                op: OP,
                expected: "a weight and a bias that do not overlap",
                found: layer.bias.start,
            }));
        };
        let d_y = operand(OP, "d_y", d_y, dims.out_len(), self.precision)?;
        let x = operand(OP, "x", x, dims.in_len(), self.precision)?;
        // The rows are the inner dimension: cut so that a panel of it stays in cache. The cuts depend on nothing else.
        let (from, to) = (dims.in_features, dims.out_features);
        for first in (0..dims.rows).step_by(INNER) {
            let inner = INNER.min(dims.rows - first);
            let product = Dims {
                m: to,
                n: from,
                inner,
            };
            let x = match x {
                View::F32(x) => Right::Rows(&x[first * from..]),
                View::Bf16(x) => Right::NarrowRows(&x[first * from..]),
            };
            let finish = Finish::new(d_weight, from, &[], Mode::Add).with_row_sums(d_bias);
            self.product(
                self.precision,
                product,
                Left::Columns(d_y.from(first * to)),
                x,
                &finish,
            )?;
        }
        Ok(())
    }

    fn layer_norm_saving(
        &mut self,
        dims: RowDims,
        out: &mut Buf,
        stats: &mut Floats,
        x: &Buf,
        params: &Params,
        norm: Norm,
    ) -> Result<(), Error> {
        self.layer_norm_rows("layer_norm_saving", dims, out, Some(stats), x, params, norm)
    }

    fn layer_norm_backward(
        &mut self,
        dims: RowDims,
        d_x: &mut Buf,
        accum: Accum,
        grads: &mut Floats,
        d_y: &Buf,
        x: &Buf,
        stats: &Floats,
        params: &Params,
        norm: Norm,
    ) -> Result<(), Error> {
        const OP: &str = "layer_norm_backward";
        let d = dims.dim;
        d_x.check(OP, "d_x", dims.len())?;
        let d_y = d_y.floats(OP, "d_y", dims.len())?;
        let x = x.floats(OP, "x", dims.len())?;
        let stats = front(OP, "stats", stats, product(&[dims.rows, 2]))?;
        let weight = params.part(OP, "weight", norm.weight, d)?;
        let d_weight = check_span(OP, "grads of weight", grads.len(), norm.weight, d)?;
        let d_bias = check_span(OP, "grads of bias", grads.len(), norm.bias, d)?;
        if dims.is_empty() {
            return Ok(());
        }
        let (per_group, len) = layer_norm_sums(dims);
        let groups = dims.rows.div_ceil(per_group);
        let d_x = match accum {
            Accum::Replace => d_x.overwrite(dims.len()),
            Accum::Add => d_x.add_to(dims.len()),
        };
        let sums = self.scratch.floats(len)?;
        let parts = (
            Pieces::new(d_x, per_group * d),
            Pieces::new(&mut *sums, 2 * d),
        );
        let isa = self.isa;
        self.threads
            .for_each(groups, 3 * per_group * d, parts, |group, (d_x, sums)| {
                sums.fill(0.0);
                let (d_weight, d_bias) = sums.split_at_mut(d);
                for (i, d_x) in d_x.chunks_exact_mut(d).enumerate() {
                    let row = group * per_group + i;
                    rows::layer_norm_backward(
                        isa,
                        d_x,
                        accum == Accum::Add,
                        d_weight,
                        d_bias,
                        &d_y[row * d..][..d],
                        &x[row * d..][..d],
                        weight,
                        stats[2 * row],
                        stats[2 * row + 1],
                    );
                }
            });
        rows::sum_rows(isa, &mut grads[d_weight], sums, groups, 2 * d);
        rows::sum_rows(isa, &mut grads[d_bias], &sums[d..], groups, 2 * d);
        Ok(())
    }

    fn attention_saving(
        &mut self,
        dims: AttentionDims,
        out: &mut Buf,
        lse: &mut Floats,
        qkv: &Buf,
    ) -> Result<(), Error> {
        // The backward computes the probabilities anew, in f32.
        let precision = Precision::F32;
        self.attention_forward("attention_saving", precision, dims, out, Some(lse), qkv)
    }

    fn attention_backward(
        &mut self,
        dims: AttentionDims,
        d_qkv: &mut Buf,
        d_out: &Buf,
        qkv: &Buf,
        out: &Buf,
        lse: &Floats,
    ) -> Result<(), Error> {
        const OP: &str = "attention_backward";
        d_qkv.check(OP, "d_qkv", dims.qkv_len())?;
        let d_out = d_out.floats(OP, "d_out", dims.out_len())?;
        let qkv = qkv.view(OP, "qkv", dims.qkv_len())?;
        let out = out.floats(OP, "out", dims.out_len())?;
        let lse = front(OP, "lse", lse, dims.lse_len())?;
        if out.is_empty() {
            return Ok(());
        }
        // It goes into the products of the layer before.
        let d_qkv = d_qkv.overwrite_as(self.precision, dims.qkv_len());
        match qkv {
            View::F32(qkv) => self.attend_backward(dims, d_qkv, d_out, qkv, out, lse),
            View::Bf16(qkv) => self.attend_backward(dims, d_qkv, d_out, qkv, out, lse),
        }
    }

    fn embed_tokens_backward(
        &mut self,
        dims: TokenDims,
        d_x: &mut Buf,
        grads: &mut Floats,
        d_out: &Buf,
        embed: EmbedParams,
    ) -> Result<(), Error> {
        const OP: &str = "embed_tokens_backward";
        check_prefix(OP, dims, embed)?;
        d_x.check(OP, "d_x", TokenDims { prefix: 0, ..dims }.len())?;
        let gradient = d_out.floats(OP, "d_out", dims.len())?;
        if let Some(span) = embed.cls_token {
            let d_cls = check_span(OP, "cls_token", grads.len(), span, dims.dim)?;
            if !dims.is_empty() {
                let stride = (1 + dims.tokens) * dims.dim;
                rows::sum_rows(self.isa, &mut grads[d_cls], gradient, dims.batch, stride);
            }
        }
        self.strip_prefix(dims, d_x, d_out)
    }

    fn decoder_tokens(
        &mut self,
        dims: DecoderDims,
        out: &mut Buf,
        x: &Buf,
        ids_visible: &Vec<u32>,
        ids_target: &Vec<u32>,
        params: &Params,
        mask_token: Span,
        pos_embed: Span,
    ) -> Result<(), Error> {
        const OP: &str = "decoder_tokens";
        let DecoderDims {
            batch,
            visible,
            targets,
            dim: d,
        } = dims;
        out.check(OP, "out", dims.len())?;
        let x = x.floats(OP, "x", dims.latent_len())?;
        let mask_token = params.part(OP, "mask_token", mask_token, d)?;
        let (table, positions) = params.positions(OP, pos_embed, d)?;
        expect_len(OP, "pos_embed", table.len(), d)?;
        let count = product(&[batch, visible]);
        let ids_visible = checked_ids(OP, "ids_visible", ids_visible, count, positions)?;
        let count = product(&[batch, targets]);
        let ids_target = checked_ids(OP, "ids_target", ids_target, count, positions)?;
        let out = out.overwrite(dims.len());
        if out.is_empty() {
            return Ok(());
        }
        let (latent, len) = ((1 + visible) * d, (1 + visible + targets) * d);
        let position = |id: u32| &table[(1 + id as usize) * d..][..d];
        self.threads
            .for_each(batch, 2 * len, Pieces::new(out, len), |b, out| {
                let x = &x[b * latent..][..latent];
                let (out_latent, masks) = out.split_at_mut(latent);
                let (cls, patches) = out_latent.split_at_mut(d);
                rows::add_to(self.isa, cls, &x[..d], &table[..d]);
                let ids = &ids_visible[b * visible..][..visible];
                let inputs = x[d..].chunks_exact(d).zip(ids);
                for (out, (x, &id)) in patches.chunks_exact_mut(d).zip(inputs) {
                    rows::add_to(self.isa, out, x, position(id));
                }
                let ids = &ids_target[b * targets..][..targets];
                for (out, &id) in masks.chunks_exact_mut(d).zip(ids) {
                    rows::add_to(self.isa, out, mask_token, position(id));
                }
            });
        Ok(())
    }

    fn decoder_tokens_backward(
        &mut self,
        dims: DecoderDims,
        d_x: &mut Buf,
        grads: &mut Floats,
        d_out: &Buf,
        mask_token: Span,
    ) -> Result<(), Error> {
        const OP: &str = "decoder_tokens_backward";
        let d = dims.dim;
        d_x.check(OP, "d_x", dims.latent_len())?;
        let d_out = d_out.floats(OP, "d_out", dims.len())?;
        let d_mask = check_span(OP, "mask_token", grads.len(), mask_token, d)?;
        let d_x = d_x.overwrite(dims.latent_len());
        if d_x.is_empty() {
            return Ok(());
        }
        let (latent, len) = (
            (1 + dims.visible) * d,
            (1 + dims.visible + dims.targets) * d,
        );
        self.threads.for_each(
            dims.batch,
            2 * latent,
            Pieces::new(d_x, latent),
            |b, d_x| {
                d_x.copy_from_slice(&d_out[b * len..][..latent]);
            },
        );
        // Sequence by sequence, so that the order of the sum is fixed.
        let d_mask = &mut grads[d_mask];
        for d_out in d_out.chunks_exact(len) {
            rows::sum_rows(self.isa, d_mask, &d_out[latent..], dims.targets, d);
        }
        Ok(())
    }

    fn strip_prefix(&mut self, dims: TokenDims, out: &mut Buf, x: &Buf) -> Result<(), Error> {
        const OP: &str = "strip_prefix";
        let out_len = TokenDims { prefix: 0, ..dims }.len();
        out.check(OP, "out", out_len)?;
        let x = x.floats(OP, "x", dims.len())?;
        let out = out.overwrite(out_len);
        if out.is_empty() {
            return Ok(());
        }
        let len = dims.tokens * dims.dim;
        self.threads
            .for_each(dims.batch, 2 * len, Pieces::new(out, len), |b, out| {
                out.copy_from_slice(patch_tokens(dims, x, b));
            });
        Ok(())
    }

    fn strip_prefix_backward(
        &mut self,
        dims: TokenDims,
        d_x: &mut Buf,
        d_out: &Buf,
    ) -> Result<(), Error> {
        const OP: &str = "strip_prefix_backward";
        let patches_len = TokenDims { prefix: 0, ..dims }.len();
        let d_out = d_out.floats(OP, "d_out", patches_len)?;
        let len = dims.tokens * dims.dim;
        self.each_sequence(OP, dims, d_x, |b, prefix, patches| {
            prefix.fill(0.0);
            patches.copy_from_slice(&d_out[b * len..][..len]);
        })
    }

    fn gather_tokens_backward(
        &mut self,
        dims: TokenDims,
        keep: usize,
        d_x: &mut Buf,
        d_out: &Buf,
        picked: &Vec<u32>,
    ) -> Result<(), Error> {
        const OP: &str = "gather_tokens_backward";
        let d = dims.dim;
        let d_out = d_out.floats(OP, "d_out", dims.with_tokens(keep).len())?;
        let count = product(&[dims.batch, keep]);
        let picked = checked_ids(OP, "picked", picked, count, dims.tokens)?;
        self.each_sequence(OP, dims, d_x, |b, prefix, patches| {
            let len = (dims.prefix + keep) * d;
            let (d_prefix, d_patches) = d_out[b * len..][..len].split_at(dims.prefix * d);
            prefix.copy_from_slice(d_prefix);
            patches.fill(0.0);
            let picked = &picked[b * keep..][..keep];
            for (d_out, &token) in d_patches.chunks_exact(d).zip(picked) {
                patches[token as usize * d..][..d].copy_from_slice(d_out);
            }
        })
    }

    fn mean_pool_backward(
        &mut self,
        dims: TokenDims,
        d_x: &mut Buf,
        d_out: &Buf,
    ) -> Result<(), Error> {
        const OP: &str = "mean_pool_backward";
        let d = dims.dim;
        let d_out = d_out.floats(OP, "d_out", product(&[dims.batch, d]))?;
        let share = 1.0 / dims.tokens as f32;
        self.each_sequence(OP, dims, d_x, |b, prefix, patches| {
            prefix.fill(0.0);
            for d_x in patches.chunks_exact_mut(d) {
                rows::scale(self.isa, d_x, &d_out[b * d..][..d], share);
            }
        })
    }

    fn pivoted_qr_scores(
        &mut self,
        dims: TokenDims,
        scores: &mut Floats,
        x: &Buf,
    ) -> Result<(), Error> {
        const OP: &str = "pivoted_qr_scores";
        let (d, tokens) = (dims.dim, dims.tokens);
        let scores = front_mut(OP, "scores", scores, product(&[dims.batch, tokens]))?;
        let x = x.floats(OP, "x", dims.len())?;
        check_numbers(OP, "x", x)?;
        if scores.is_empty() {
            return Ok(());
        }
        // A residual for each token, and the direction that is being removed.
        let len = product(&[tokens.saturating_add(1), d]);
        let scratch = self.scratch.doubles(product(&[dims.batch, len]))?;
        let parts = (Pieces::new(scores, tokens), Pieces::new(scratch, len));
        let cost = len.saturating_mul(tokens);
        self.threads
            .for_each(dims.batch, cost, parts, |b, (scores, scratch)| {
                let (direction, residual) = scratch.split_at_mut(d);
                let x = patch_tokens(dims, x, b);
                rows::pivoted_qr(self.isa, scores, x, residual, direction);
            });
        Ok(())
    }

    fn standardise(&mut self, dims: RowDims, out: &mut Buf, x: &Buf) -> Result<(), Error> {
        const OP: &str = "standardise";
        let d = dims.dim;
        if d < 2 {
            return Err(Error::Kernel(KernelError::Dimensions {
                op: OP,
                expected: "rows of at least 2 elements",
                found: d,
            }));
        }
        out.check(OP, "out", dims.len())?;
        let x = x.floats(OP, "x", dims.len())?;
        let out = out.overwrite(dims.len());
        self.threads
            .for_each(dims.rows, 2 * d, Pieces::new(out, d), |row, out| {
                rows::standardise(self.isa, out, &x[row * d..][..d], NORM_EPS);
            });
        Ok(())
    }

    fn feature_spread(
        &mut self,
        dims: RowDims,
        out: &mut Floats,
        at: usize,
        x: &Buf,
    ) -> Result<(), Error> {
        const OP: &str = "feature_spread";
        check_loss(OP, dims, out, at)?;
        let x = x.floats(OP, "x", dims.len())?;
        let blocks = dims.dim.div_ceil(COLUMNS);
        let sums = self.scratch.doubles(blocks)?;
        self.threads.for_each(
            blocks,
            2 * COLUMNS * dims.rows,
            Pieces::new(&mut *sums, 1),
            |i, sum| {
                let first = i * COLUMNS;
                let columns = COLUMNS.min(dims.dim - first);
                sum[0] = rows::sum_of_spreads(self.isa, &x[first..], dims.rows, dims.dim, columns);
            },
        );
        out[at] = (sums.iter().sum::<f64>() / dims.dim as f64) as f32;
        Ok(())
    }

    fn cosine_loss(
        &mut self,
        dims: RowDims,
        d_pred: &mut Buf,
        losses: &mut Floats,
        at: usize,
        pred: &Buf,
        target: &Buf,
        scale: f64,
    ) -> Result<(), Error> {
        let isa = self.isa;
        let weight = scale / dims.rows as f64;
        let total = self.loss_rows(
            "cosine_loss",
            dims,
            d_pred,
            (losses, at),
            [pred, target],
            |d_pred, pred, target| rows::cosine(isa, d_pred, pred, target, COSINE_EPS, -weight),
        )?;
        losses[at] = (f64::from(losses[at]) + scale - weight * total) as f32;
        Ok(())
    }

    fn mse_loss(
        &mut self,
        dims: RowDims,
        d_pred: &mut Buf,
        losses: &mut Floats,
        at: usize,
        pred: &Buf,
        target: &Buf,
        scale: f64,
    ) -> Result<(), Error> {
        let isa = self.isa;
        let weight = scale / dims.len() as f64;
        let factor = (2.0 * weight) as f32;
        let total = self.loss_rows(
            "mse_loss",
            dims,
            d_pred,
            (losses, at),
            [pred, target],
            |d_pred, pred, target| rows::squared_error(isa, d_pred, pred, target, factor),
        )?;
        losses[at] = (f64::from(losses[at]) + weight * total) as f32;
        Ok(())
    }

    fn cross_entropy(
        &mut self,
        dims: RowDims,
        d_logits: &mut Buf,
        losses: &mut Floats,
        at: usize,
        logits: &Buf,
        target: &Buf,
        scale: f64,
    ) -> Result<(), Error> {
        let isa = self.isa;
        let weight = scale / dims.rows as f64;
        let total = self.loss_rows(
            "cross_entropy",
            dims,
            d_logits,
            (losses, at),
            [logits, target],
            |d_logits, logits, target| {
                rows::cross_entropy(isa, d_logits, logits, target, weight as f32)
            },
        )?;
        losses[at] = (f64::from(losses[at]) + weight * total) as f32;
        Ok(())
    }

    fn pixel_targets(
        &mut self,
        dims: PatchDims,
        out: &mut Buf,
        images: &Buf,
        ids: &Vec<u32>,
    ) -> Result<(), Error> {
        let (p, channels) = (dims.patch_size, dims.channels);
        copy_patches(
            "pixel_targets",
            &self.threads,
            dims,
            out,
            images,
            Some(ids),
            |channel, row, pixels, out| {
                let out = out[row * p * channels + channel..].iter_mut();
                for (out, pixel) in out.step_by(channels).zip(pixels) {
                    *out = *pixel;
                }
            },
        )
    }

    fn zero(&mut self, x: &mut Floats, span: Span) -> Result<(), Error> {
        expect_len("zero", "x", x.len(), span.end())?;
        self.zero_all(&mut x[span.start..span.end()]);
        Ok(())
    }

    fn copy_vector(
        &mut self,
        to: &mut Floats,
        at: usize,
        from: &Floats,
        span: Span,
    ) -> Result<(), Error> {
        expect_len("copy_vector", "from", from.len(), span.end())?;
        expect_len("copy_vector", "to", to.len(), at.saturating_add(span.len))?;
        to[at..at + span.len].copy_from_slice(&from[span.start..span.end()]);
        Ok(())
    }

    fn norm(&mut self, out: &mut Floats, at: usize, x: &Floats) -> Result<(), Error> {
        expect_len("norm", "out", out.len(), at.saturating_add(1))?;
        let sums = self.scratch.doubles(x.len().div_ceil(PIECE))?;
        self.threads
            .for_each(sums.len(), PIECE, Pieces::new(&mut *sums, 1), |i, sum| {
                let end = x.len().min((i + 1) * PIECE);
                sum[0] = rows::sum_squares(self.isa, &x[i * PIECE..end]);
            });
        out[at] = sums.iter().sum::<f64>().sqrt() as f32;
        Ok(())
    }

    fn adamw_ema(
        &mut self,
        student: &mut Params,
        teacher: Option<&mut Params>,
        grads: &mut Floats,
        exp_avg: &mut Floats,
        exp_avg_sq: &mut Floats,
        segments: &[Segment],
        step: &AdamW,
        clip: Option<Clip<'_, Floats>>,
    ) -> Result<(), Error> {
        let moments = [exp_avg, exp_avg_sq];
        self.update(student, teacher, grads, moments, segments, step, clip)
    }
}

impl Cpu {
    /// In f32, from and to either format.
    fn attend_backward<T: Element>(
        &mut self,
        dims: AttentionDims,
        d_qkv: Out<'_>,
        d_out: &[f32],
        qkv: &[T],
        out: &[f32],
        lse: &[f32],
    ) -> Result<(), Error> {
        let attention = Attention::new(self.isa, &self.threads, Precision::F32, dims, qkv);
        let scratch = self.scratch.floats(attention.backward_scratch())?;
        match d_qkv {
            Out::F32(d_qkv) => attention.backward(d_qkv, d_out, out, lse, scratch),
            Out::Bf16(d_qkv) => attention.backward(d_qkv, d_out, out, lse, scratch),
        }
        Ok(())
    }

    /// Calls `work(b, prefix, patch tokens)` for every sequence of `d_x`.
    fn each_sequence(
        &self,
        op: &'static str,
        dims: TokenDims,
        d_x: &mut Buf,
        work: impl Fn(usize, &mut [f32], &mut [f32]) + Sync,
    ) -> Result<(), Error> {
        d_x.check(op, "d_x", dims.len())?;
        let d_x = d_x.overwrite(dims.len());
        if d_x.is_empty() {
            return Ok(());
        }
        let len = (dims.prefix + dims.tokens) * dims.dim;
        self.threads
            .for_each(dims.batch, 2 * len, Pieces::new(d_x, len), |b, d_x| {
                let (prefix, patches) = d_x.split_at_mut(dims.prefix * dims.dim);
                work(b, prefix, patches);
            });
        Ok(())
    }

    /// The sum of `row_loss(d_pred, pred, target)` over the rows, in their order.
    fn loss_rows(
        &mut self,
        op: &'static str,
        dims: RowDims,
        d_pred: &mut Buf,
        (losses, at): (&[f32], usize),
        [pred, target]: [&Buf; 2],
        row_loss: impl Fn(&mut [f32], &[f32], &[f32]) -> f64 + Sync,
    ) -> Result<f64, Error> {
        check_loss(op, dims, losses, at)?;
        d_pred.check(op, "gradient", dims.len())?;
        let pred = pred.floats(op, "prediction", dims.len())?;
        let target = target.floats(op, "target", dims.len())?;
        let d_pred = d_pred.overwrite(dims.len());
        let d = dims.dim;
        let sums = self.scratch.doubles(dims.rows)?;
        let parts = (Pieces::new(d_pred, d), Pieces::new(&mut *sums, 1));
        self.threads
            .for_each(dims.rows, 3 * d, parts, |row, (d_pred, sum)| {
                let at = row * d;
                sum[0] = row_loss(d_pred, &pred[at..][..d], &target[at..][..d]);
            });
        Ok(sums.iter().sum())
    }
}

/// Rows that share sums for the parameters of a layer norm, and the elements of all sums: groups depend on the number of rows alone,
/// and there are at most 64, so that their sums stay small beside the rows. They are added in order.
pub(crate) fn layer_norm_sums(dims: RowDims) -> (usize, usize) {
    let per_group = dims.rows.div_ceil(64).max(32);
    (
        per_group,
        product(&[dims.rows.div_ceil(per_group), 2, dims.dim]),
    )
}
