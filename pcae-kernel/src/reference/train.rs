//! Training: each backward beside its forward's formula.

use super::infer::{
    attention, copy_patches, for_each_output, head_of, layer_norm, patch_tokens, softmax_scale,
};
use super::{
    Heap, Reference, check_ids, dot, gelu, mean_rstd, normal_cdf, param, rows, rows_mut, sum,
    zeroed,
};
use alloc::vec::Vec;

use crate::backend::{
    Accum, AdamW, AttentionDims, COSINE_EPS, Clip, DecoderDims, EmbedParams, Linear, LinearDims,
    Norm, PatchDims, RowDims, Segment, Span, TokenDims, TrainBackend,
};
use crate::error::{Error, expect_len, product};
use crate::float::Float;
use crate::layout::Layout;

impl<T: Float> TrainBackend for Reference<T, Heap<T>> {
    type Vector = Vec<T>;

    fn vector(&mut self, len: usize) -> Result<Vec<T>, Error> {
        zeroed(len)
    }

    fn write_vector(&mut self, to: &mut Vec<T>, at: usize, from: &[f32]) -> Result<(), Error> {
        expect_len(
            "write_vector",
            "to",
            to.len(),
            at.saturating_add(from.len()),
        )?;
        for (to, &from) in to[at..].iter_mut().zip(from) {
            *to = T::from_f64(f64::from(from));
        }
        Ok(())
    }

    fn read_vector(&mut self, to: &mut [f32], from: &Vec<T>, at: usize) -> Result<(), Error> {
        expect_len(
            "read_vector",
            "from",
            from.len(),
            at.saturating_add(to.len()),
        )?;
        for (to, &from) in to.iter_mut().zip(&from[at..]) {
            *to = from.to_f64() as f32;
        }
        Ok(())
    }

    fn params(&mut self, layout: &Layout, values: &[f32]) -> Result<Vec<T>, Error> {
        expect_len("params", "values", values.len(), layout.len())?;
        let mut params = zeroed(layout.len())?;
        self.write_vector(&mut params, 0, &values[..layout.len()])?;
        Ok(params)
    }

    fn read_params(&mut self, to: &mut [f32], from: &Vec<T>, span: Span) -> Result<(), Error> {
        expect_len("read_params", "to", to.len(), span.len)?;
        self.read_vector(&mut to[..span.len], from, span.start)
    }

    fn linear_gelu_saving(
        &mut self,
        dims: LinearDims,
        out: &mut Vec<T>,
        pre_gelu: &mut Vec<T>,
        x: &Vec<T>,
        params: &Vec<T>,
        layer: Linear,
    ) -> Result<(), Error> {
        const OP: &str = "linear_gelu_saving";
        expect_len(OP, "pre_gelu", pre_gelu.len(), dims.out_len())?;
        for_each_output(OP, dims, out, x, params, layer, |i, out, y| {
            pre_gelu[i] = y;
            *out = gelu(y);
        })
    }

    fn linear_residual(
        &mut self,
        dims: LinearDims,
        out: &mut Vec<T>,
        residual: &Vec<T>,
        x: &Vec<T>,
        params: &Vec<T>,
        layer: Linear,
        scale: Option<(&Vec<T>, usize)>,
    ) -> Result<(), Error> {
        const OP: &str = "linear_residual";
        expect_len(OP, "residual", residual.len(), dims.out_len())?;
        if let Some((scale, per)) = scale {
            check_scale(OP, dims.rows, scale, per)?;
        }
        for_each_output(OP, dims, out, x, params, layer, |i, out, y| {
            let factor = scale.map_or(T::ONE, |(scale, per)| scale[i / dims.out_features / per]);
            *out = residual[i] + factor * y;
        })
    }

    fn scale_rows(
        &mut self,
        dims: RowDims,
        out: &mut Vec<T>,
        x: &Vec<T>,
        scale: &Vec<T>,
        rows_per_scale: usize,
    ) -> Result<(), Error> {
        const OP: &str = "scale_rows";
        expect_len(OP, "x", x.len(), dims.len())?;
        expect_len(OP, "out", out.len(), dims.len())?;
        check_scale(OP, dims.rows, scale, rows_per_scale)?;
        for (i, (out, &x)) in out[..dims.len()].iter_mut().zip(x).enumerate() {
            *out = scale[i / dims.dim / rows_per_scale] * x;
        }
        Ok(())
    }

    // y = x W^T + b, so dL/dx = dL/dy W; behind a GELU, x = gelu(pre) and dL/dpre = dL/dx * gelu'(pre).
    fn linear_backward_input(
        &mut self,
        dims: LinearDims,
        d_x: &mut Vec<T>,
        d_y: &Vec<T>,
        params: &Vec<T>,
        layer: Linear,
        pre_gelu: Option<&Vec<T>>,
    ) -> Result<(), Error> {
        const OP: &str = "linear_backward_input";
        expect_len(OP, "d_y", d_y.len(), dims.out_len())?;
        expect_len(OP, "d_x", d_x.len(), dims.in_len())?;
        if let Some(pre_gelu) = pre_gelu {
            expect_len(OP, "pre_gelu", pre_gelu.len(), dims.in_len())?;
        }
        let weight = param(OP, "weight", params, layer.weight, dims.weight_len())?;
        let d_x = &mut d_x[..dims.in_len()];
        d_x.fill(T::ZERO);
        for (d_x, d_y) in rows_mut(d_x, dims.in_features).zip(rows(d_y, dims.out_features)) {
            for (&d_y, weight) in d_y.iter().zip(rows(weight, dims.in_features)) {
                add_scaled(d_x, d_y, weight);
            }
        }
        if let Some(pre_gelu) = pre_gelu {
            for (d_x, &x) in d_x.iter_mut().zip(pre_gelu) {
                *d_x = *d_x * gelu_derivative(x);
            }
        }
        Ok(())
    }

    // y = x W^T + b, so dL/dW = (dL/dy)^T x and dL/db = sum of dL/dy.
    fn linear_backward_params(
        &mut self,
        dims: LinearDims,
        grads: &mut Vec<T>,
        layer: Linear,
        d_y: &Vec<T>,
        x: &Vec<T>,
    ) -> Result<(), Error> {
        const OP: &str = "linear_backward_params";
        expect_len(OP, "d_y", d_y.len(), dims.out_len())?;
        expect_len(OP, "x", x.len(), dims.in_len())?;
        param(OP, "weight", grads, layer.weight, dims.weight_len())?;
        param(OP, "bias", grads, layer.bias, dims.out_features)?;
        for (d_y, x) in
            rows(&d_y[..dims.out_len()], dims.out_features).zip(rows(x, dims.in_features))
        {
            let d_weight = &mut grads[layer.weight.start..][..dims.weight_len()];
            for (d_weight, &d_y) in rows_mut(d_weight, dims.in_features).zip(d_y) {
                add_scaled(d_weight, d_y, x);
            }
            add_scaled(
                &mut grads[layer.bias.start..][..dims.out_features],
                T::ONE,
                d_y,
            );
        }
        Ok(())
    }

    fn layer_norm_saving(
        &mut self,
        dims: RowDims,
        out: &mut Vec<T>,
        stats: &mut Vec<T>,
        x: &Vec<T>,
        params: &Vec<T>,
        norm: Norm,
    ) -> Result<(), Error> {
        const OP: &str = "layer_norm_saving";
        expect_len(OP, "stats", stats.len(), product(&[dims.rows, 2]))?;
        layer_norm(OP, dims, out, x, params, norm, |row, mean, rstd| {
            (stats[2 * row], stats[2 * row + 1]) = (mean, rstd);
        })
    }

    // h = (x - mean) rstd, y = h w + b. With g = dL/dy w:
    // dL/dx = rstd (g - mean(g) - h mean(g h)), the two means being the ways through `mean` and `rstd`.
    fn layer_norm_backward(
        &mut self,
        dims: RowDims,
        d_x: &mut Vec<T>,
        accum: Accum,
        grads: &mut Vec<T>,
        d_y: &Vec<T>,
        x: &Vec<T>,
        stats: &Vec<T>,
        params: &Vec<T>,
        norm: Norm,
    ) -> Result<(), Error> {
        const OP: &str = "layer_norm_backward";
        expect_len(OP, "d_x", d_x.len(), dims.len())?;
        expect_len(OP, "d_y", d_y.len(), dims.len())?;
        expect_len(OP, "x", x.len(), dims.len())?;
        expect_len(OP, "stats", stats.len(), product(&[dims.rows, 2]))?;
        let weight = param(OP, "weight", params, norm.weight, dims.dim)?;
        param(OP, "grads of weight", grads, norm.weight, dims.dim)?;
        param(OP, "grads of bias", grads, norm.bias, dims.dim)?;
        let width = T::from_usize(dims.dim);
        for row in 0..dims.rows {
            let at = row * dims.dim;
            let (mean, rstd) = (stats[2 * row], stats[2 * row + 1]);
            let h = |i: usize| (x[at + i] - mean) * rstd;
            let g = |i: usize| d_y[at + i] * weight[i];
            let mean_g = (0..dims.dim).fold(T::ZERO, |sum, i| sum + g(i)) / width;
            let mean_gh = (0..dims.dim).fold(T::ZERO, |sum, i| sum + g(i) * h(i)) / width;
            for i in 0..dims.dim {
                let value = rstd * (g(i) - mean_g - h(i) * mean_gh);
                match accum {
                    Accum::Replace => d_x[at + i] = value,
                    Accum::Add => d_x[at + i] += value,
                }
                grads[norm.weight.start + i] += d_y[at + i] * h(i);
                grads[norm.bias.start + i] += d_y[at + i];
            }
        }
        Ok(())
    }

    fn attention_saving(
        &mut self,
        dims: AttentionDims,
        out: &mut Vec<T>,
        lse: &mut Vec<T>,
        qkv: &Vec<T>,
    ) -> Result<(), Error> {
        const OP: &str = "attention_saving";
        expect_len(OP, "lse", lse.len(), dims.lse_len())?;
        attention(OP, dims, out, qkv, |i, value| lse[i] = value)
    }

    // s = scale q k^T, p = softmax(s) = exp(s - lse), o = p v. With d = dL/do:
    // dL/dv_j = sum_i p_ij d_i,  dL/ds_ij = p_ij (d_i . v_j - d_i . o_i),
    // dL/dq_i = scale sum_j dL/ds_ij k_j,  dL/dk_j = scale sum_i dL/ds_ij q_i.
    fn attention_backward(
        &mut self,
        dims: AttentionDims,
        d_qkv: &mut Vec<T>,
        d_out: &Vec<T>,
        qkv: &Vec<T>,
        out: &Vec<T>,
        lse: &Vec<T>,
    ) -> Result<(), Error> {
        const OP: &str = "attention_backward";
        expect_len(OP, "d_qkv", d_qkv.len(), dims.qkv_len())?;
        expect_len(OP, "d_out", d_out.len(), dims.out_len())?;
        expect_len(OP, "qkv", qkv.len(), dims.qkv_len())?;
        expect_len(OP, "out", out.len(), dims.out_len())?;
        expect_len(OP, "lse", lse.len(), dims.lse_len())?;
        if dims.qkv_len() == 0 {
            return Ok(());
        }
        let (n, scale) = (dims.tokens, softmax_scale::<T>(dims));
        d_qkv[..dims.qkv_len()].fill(T::ZERO);
        for b in 0..dims.batch {
            for head in 0..dims.num_heads {
                let of = |part, token| head_of(dims, qkv, part, b, head, token);
                let at = |part: usize, token: usize| {
                    ((b * n + token) * 3 + part) * dims.dim() + head * dims.head_dim
                };
                for i in 0..n {
                    let row = (b * n + i) * dims.dim() + head * dims.head_dim;
                    let d_out = &d_out[row..][..dims.head_dim];
                    let through_sum = dot(d_out, &out[row..][..dims.head_dim]);
                    for j in 0..n {
                        let score = dot(of(0, i), of(1, j)) * scale;
                        let p = (score - lse[(b * dims.num_heads + head) * n + i]).exp();
                        let d_score = p * (dot(d_out, of(2, j)) - through_sum) * scale;
                        add_scaled(&mut d_qkv[at(0, i)..][..dims.head_dim], d_score, of(1, j));
                        add_scaled(&mut d_qkv[at(1, j)..][..dims.head_dim], d_score, of(0, i));
                        add_scaled(&mut d_qkv[at(2, j)..][..dims.head_dim], p, d_out);
                    }
                }
            }
        }
        Ok(())
    }

    fn embed_tokens_backward(
        &mut self,
        dims: TokenDims,
        d_x: &mut Vec<T>,
        grads: &mut Vec<T>,
        d_out: &Vec<T>,
        embed: EmbedParams,
    ) -> Result<(), Error> {
        const OP: &str = "embed_tokens_backward";
        expect_len(OP, "d_out", d_out.len(), dims.len())?;
        expect_len(OP, "d_x", d_x.len(), TokenDims { prefix: 0, ..dims }.len())?;
        if let Some(cls_token) = embed.cls_token {
            param(OP, "cls_token", grads, cls_token, dims.dim)?;
            if dims.prefix != 1 {
                return Err(Error::Dimensions {
                    op: OP,
                    expected: "a prefix of 1 with a class token",
                    found: dims.prefix,
                });
            }
            if dims.is_empty() {
                return Ok(());
            }
            for d_out in rows(&d_out[..dims.len()], (1 + dims.tokens) * dims.dim) {
                let d_cls = &d_out[..dims.dim];
                add_scaled(&mut grads[cls_token.start..][..dims.dim], T::ONE, d_cls);
            }
        }
        self.strip_prefix(dims, d_x, d_out)
    }

    fn decoder_tokens(
        &mut self,
        dims: DecoderDims,
        out: &mut Vec<T>,
        x: &Vec<T>,
        ids_visible: &Vec<u32>,
        ids_target: &Vec<u32>,
        params: &Vec<T>,
        mask_token: Span,
        pos_embed: Span,
    ) -> Result<(), Error> {
        const OP: &str = "decoder_tokens";
        expect_len(OP, "out", out.len(), dims.len())?;
        expect_len(OP, "x", x.len(), dims.latent_len())?;
        let mask_token = param(OP, "mask_token", params, mask_token, dims.dim)?;
        let pos = param(OP, "pos_embed", params, pos_embed, pos_embed.len)?;
        let positions = (pos.len() / dims.dim.max(1)).saturating_sub(1);
        expect_len(OP, "pos_embed", pos.len(), dims.dim)?;
        for (what, ids, count) in [
            (
                "ids_visible",
                ids_visible,
                product(&[dims.batch, dims.visible]),
            ),
            (
                "ids_target",
                ids_target,
                product(&[dims.batch, dims.targets]),
            ),
        ] {
            expect_len(OP, what, ids.len(), count)?;
            check_ids(OP, what, &ids[..count], positions)?;
        }
        if dims.is_empty() {
            return Ok(());
        }
        let latent = 1 + dims.visible;
        let d = dims.dim;
        for b in 0..dims.batch {
            for j in 0..latent + dims.targets {
                let position = match j {
                    0 => 0,
                    _ if j < latent => 1 + ids_visible[b * dims.visible + j - 1] as usize,
                    _ => 1 + ids_target[b * dims.targets + j - latent] as usize,
                };
                let token = if j < latent {
                    &x[(b * latent + j) * d..][..d]
                } else {
                    mask_token
                };
                let out = &mut out[(b * (latent + dims.targets) + j) * d..][..d];
                for ((out, &x), &pos) in out.iter_mut().zip(token).zip(&pos[position * d..]) {
                    *out = x + pos;
                }
            }
        }
        Ok(())
    }

    fn decoder_tokens_backward(
        &mut self,
        dims: DecoderDims,
        d_x: &mut Vec<T>,
        grads: &mut Vec<T>,
        d_out: &Vec<T>,
        mask_token: Span,
    ) -> Result<(), Error> {
        const OP: &str = "decoder_tokens_backward";
        expect_len(OP, "d_out", d_out.len(), dims.len())?;
        expect_len(OP, "d_x", d_x.len(), dims.latent_len())?;
        param(OP, "mask_token", grads, mask_token, dims.dim)?;
        if dims.is_empty() {
            return Ok(());
        }
        let (latent, d) = ((1 + dims.visible) * dims.dim, dims.dim);
        for (d_out, d_x) in
            rows(&d_out[..dims.len()], latent + dims.targets * d).zip(rows_mut(d_x, latent))
        {
            let (d_latent, d_masks) = d_out.split_at(latent);
            d_x.copy_from_slice(d_latent);
            for d_mask in rows(d_masks, d) {
                add_scaled(&mut grads[mask_token.start..][..d], T::ONE, d_mask);
            }
        }
        Ok(())
    }

    fn strip_prefix(&mut self, dims: TokenDims, out: &mut Vec<T>, x: &Vec<T>) -> Result<(), Error> {
        const OP: &str = "strip_prefix";
        expect_len(OP, "x", x.len(), dims.len())?;
        let stripped = TokenDims { prefix: 0, ..dims };
        expect_len(OP, "out", out.len(), stripped.len())?;
        if stripped.is_empty() {
            return Ok(());
        }
        for (b, out) in rows_mut(out, dims.tokens * dims.dim)
            .take(dims.batch)
            .enumerate()
        {
            out.copy_from_slice(patch_tokens(dims, x, b));
        }
        Ok(())
    }

    fn strip_prefix_backward(
        &mut self,
        dims: TokenDims,
        d_x: &mut Vec<T>,
        d_out: &Vec<T>,
    ) -> Result<(), Error> {
        const OP: &str = "strip_prefix_backward";
        expect_len(OP, "d_x", d_x.len(), dims.len())?;
        expect_len(
            OP,
            "d_out",
            d_out.len(),
            TokenDims { prefix: 0, ..dims }.len(),
        )?;
        if dims.is_empty() {
            return Ok(());
        }
        for b in 0..dims.batch {
            let (prefix, patches) = sequence_mut(dims, d_x, b);
            prefix.fill(T::ZERO);
            patches.copy_from_slice(&d_out[b * dims.tokens * dims.dim..][..dims.tokens * dims.dim]);
        }
        Ok(())
    }

    fn gather_tokens_backward(
        &mut self,
        dims: TokenDims,
        keep: usize,
        d_x: &mut Vec<T>,
        d_out: &Vec<T>,
        picked: &Vec<u32>,
    ) -> Result<(), Error> {
        const OP: &str = "gather_tokens_backward";
        let kept = dims.with_tokens(keep);
        expect_len(OP, "d_x", d_x.len(), dims.len())?;
        expect_len(OP, "d_out", d_out.len(), kept.len())?;
        expect_len(OP, "picked", picked.len(), product(&[dims.batch, keep]))?;
        check_ids(OP, "picked", &picked[..dims.batch * keep], dims.tokens)?;
        if dims.is_empty() {
            return Ok(());
        }
        let d = dims.dim;
        for b in 0..dims.batch {
            let d_out = &d_out[b * (dims.prefix + keep) * d..][..(dims.prefix + keep) * d];
            let (prefix, patches) = sequence_mut(dims, d_x, b);
            prefix.copy_from_slice(&d_out[..dims.prefix * d]);
            patches.fill(T::ZERO);
            for (d_out, &token) in
                rows(&d_out[dims.prefix * d..], d).zip(&picked[b * keep..][..keep])
            {
                patches[token as usize * d..][..d].copy_from_slice(d_out);
            }
        }
        Ok(())
    }

    fn mean_pool_backward(
        &mut self,
        dims: TokenDims,
        d_x: &mut Vec<T>,
        d_out: &Vec<T>,
    ) -> Result<(), Error> {
        const OP: &str = "mean_pool_backward";
        expect_len(OP, "d_x", d_x.len(), dims.len())?;
        expect_len(OP, "d_out", d_out.len(), product(&[dims.batch, dims.dim]))?;
        if dims.is_empty() {
            return Ok(());
        }
        for b in 0..dims.batch {
            let d_out = &d_out[b * dims.dim..][..dims.dim];
            let (prefix, patches) = sequence_mut(dims, d_x, b);
            prefix.fill(T::ZERO);
            for d_x in rows_mut(patches, dims.dim) {
                for (d_x, &d_out) in d_x.iter_mut().zip(d_out) {
                    *d_x = d_out / T::from_usize(dims.tokens);
                }
            }
        }
        Ok(())
    }

    fn pivoted_qr_scores(
        &mut self,
        dims: TokenDims,
        scores: &mut Vec<T>,
        x: &Vec<T>,
    ) -> Result<(), Error> {
        const OP: &str = "pivoted_qr_scores";
        expect_len(OP, "x", x.len(), dims.len())?;
        expect_len(
            OP,
            "scores",
            scores.len(),
            product(&[dims.batch, dims.tokens]),
        )?;
        if let Some(at) = x[..dims.len()].iter().position(|x| x.to_f64().is_nan()) {
            return Err(Error::NotANumber {
                op: OP,
                what: "x",
                at,
            });
        }
        if product(&[dims.batch, dims.tokens]) == 0 {
            return Ok(());
        }
        let d = dims.dim;
        for b in 0..dims.batch {
            let residual = &mut self.storage.scratch;
            residual.clear();
            residual.extend_from_slice(patch_tokens(dims, x, b));
            let scores = &mut scores[b * dims.tokens..][..dims.tokens];
            let undecided = T::from_f64(f64::INFINITY);
            scores.fill(undecided);
            for rank in 0..dims.tokens {
                let mut pivot = None;
                for token in (0..dims.tokens).filter(|&token| scores[token] == undecided) {
                    let residual = &residual[token * d..][..d];
                    let square = dot(residual, residual);
                    if pivot.is_none_or(|(_, largest)| square > largest) {
                        pivot = Some((token, square));
                    }
                }
                let Some((pivot, square)) = pivot else { break };
                scores[pivot] = T::from_usize(rank);
                if square == T::ZERO {
                    continue;
                }
                for token in (0..dims.tokens).filter(|&token| scores[token] == undecided) {
                    let along =
                        dot(&residual[token * d..][..d], &residual[pivot * d..][..d]) / square;
                    for i in 0..d {
                        residual[token * d + i] =
                            residual[token * d + i] - along * residual[pivot * d + i];
                    }
                }
            }
        }
        Ok(())
    }

    fn standardise(&mut self, dims: RowDims, out: &mut Vec<T>, x: &Vec<T>) -> Result<(), Error> {
        const OP: &str = "standardise";
        if dims.dim < 2 {
            return Err(Error::Dimensions {
                op: OP,
                expected: "rows of at least 2 elements",
                found: dims.dim,
            });
        }
        expect_len(OP, "x", x.len(), dims.len())?;
        expect_len(OP, "out", out.len(), dims.len())?;
        for (out, x) in rows_mut(&mut out[..dims.len()], dims.dim).zip(rows(x, dims.dim)) {
            let (mean, rstd) = mean_rstd(x, 1);
            for (out, &x) in out.iter_mut().zip(x) {
                *out = (x - mean) * rstd;
            }
        }
        Ok(())
    }

    fn feature_spread(
        &mut self,
        dims: RowDims,
        out: &mut Vec<T>,
        at: usize,
        x: &Vec<T>,
    ) -> Result<(), Error> {
        const OP: &str = "feature_spread";
        check_loss(OP, dims, out, at, [x])?;
        let count = T::from_usize(dims.rows);
        let mut total = T::ZERO;
        for column in 0..dims.dim {
            let values = || x[..dims.len()].iter().skip(column).step_by(dims.dim);
            let mean = values().fold(T::ZERO, |sum, &x| sum + x) / count;
            let variance = values().fold(T::ZERO, |sum, &x| sum + (x - mean) * (x - mean)) / count;
            total += variance.sqrt();
        }
        out[at] = total / T::from_usize(dims.dim);
        Ok(())
    }

    // cos = p . t / (|p| |t|), so d cos / dp = (t / |t| - cos p / |p|) / |p|.
    fn cosine_loss(
        &mut self,
        dims: RowDims,
        d_pred: &mut Vec<T>,
        losses: &mut Vec<T>,
        at: usize,
        pred: &Vec<T>,
        target: &Vec<T>,
        scale: f64,
    ) -> Result<(), Error> {
        check_loss("cosine_loss", dims, losses, at, [d_pred, pred, target])?;
        let (eps, weight) = (
            T::from_f64(COSINE_EPS),
            T::from_f64(scale) / T::from_usize(dims.rows),
        );
        let mut total = T::ZERO;
        let pairs = rows(&pred[..dims.len()], dims.dim).zip(rows(target, dims.dim));
        for (d_pred, (pred, target)) in rows_mut(d_pred, dims.dim).zip(pairs) {
            let (pred_norm, target_norm) =
                (dot(pred, pred).sqrt(), dot(target, target).sqrt().max(eps));
            let length = pred_norm.max(eps);
            let cosine = dot(pred, target) / (length * target_norm);
            total += cosine;
            // Below eps the length is a constant, and only the first term depends on the prediction.
            let shrink = if pred_norm > eps {
                cosine / length
            } else {
                T::ZERO
            };
            for ((d_pred, &pred), &target) in d_pred.iter_mut().zip(pred).zip(target) {
                *d_pred = -weight * (target / target_norm - shrink * pred) / length;
            }
        }
        losses[at] += T::from_f64(scale) - weight * total;
        Ok(())
    }

    fn mse_loss(
        &mut self,
        dims: RowDims,
        d_pred: &mut Vec<T>,
        losses: &mut Vec<T>,
        at: usize,
        pred: &Vec<T>,
        target: &Vec<T>,
        scale: f64,
    ) -> Result<(), Error> {
        check_loss("mse_loss", dims, losses, at, [d_pred, pred, target])?;
        let weight = T::from_f64(scale) / T::from_usize(dims.len());
        let mut total = T::ZERO;
        for (d_pred, (&pred, &target)) in d_pred
            .iter_mut()
            .zip(pred.iter().zip(target))
            .take(dims.len())
        {
            let difference = pred - target;
            total += difference * difference;
            *d_pred = weight * (difference + difference);
        }
        losses[at] += weight * total;
        Ok(())
    }

    // loss = -sum_c t_c ln p_c with p = softmax(x), so d loss / dx = p sum(t) - t.
    fn cross_entropy(
        &mut self,
        dims: RowDims,
        d_logits: &mut Vec<T>,
        losses: &mut Vec<T>,
        at: usize,
        logits: &Vec<T>,
        target: &Vec<T>,
        scale: f64,
    ) -> Result<(), Error> {
        check_loss(
            "cross_entropy",
            dims,
            losses,
            at,
            [d_logits, logits, target],
        )?;
        let weight = T::from_f64(scale) / T::from_usize(dims.rows);
        let mut total = T::ZERO;
        let pairs = rows(&logits[..dims.len()], dims.dim).zip(rows(target, dims.dim));
        for (d_logits, (logits, target)) in rows_mut(d_logits, dims.dim).zip(pairs) {
            let largest = logits
                .iter()
                .fold(T::from_f64(f64::NEG_INFINITY), |a, &b| b.max(a));
            let exp_sum = logits
                .iter()
                .fold(T::ZERO, |sum, &x| sum + (x - largest).exp());
            let lse = largest + exp_sum.ln();
            let mass = sum(target);
            for ((d_logit, &logit), &target) in d_logits.iter_mut().zip(logits).zip(target) {
                total += target * (lse - logit);
                *d_logit = weight * ((logit - lse).exp() * mass - target);
            }
        }
        losses[at] += weight * total;
        Ok(())
    }

    fn pixel_targets(
        &mut self,
        dims: PatchDims,
        out: &mut Vec<T>,
        images: &Vec<T>,
        ids: &Vec<u32>,
    ) -> Result<(), Error> {
        let p = dims.patch_size;
        copy_patches(
            "pixel_targets",
            dims,
            out,
            images,
            Some(ids),
            |channel, row, col| (row * p + col) * dims.channels + channel,
        )
    }

    fn zero(&mut self, x: &mut Vec<T>, span: Span) -> Result<(), Error> {
        expect_len("zero", "x", x.len(), span.end())?;
        x[span.start..span.end()].fill(T::ZERO);
        Ok(())
    }

    fn copy_vector(
        &mut self,
        to: &mut Vec<T>,
        at: usize,
        from: &Vec<T>,
        span: Span,
    ) -> Result<(), Error> {
        expect_len("copy_vector", "from", from.len(), span.end())?;
        expect_len("copy_vector", "to", to.len(), at.saturating_add(span.len))?;
        to[at..at + span.len].copy_from_slice(&from[span.start..span.end()]);
        Ok(())
    }

    fn norm(&mut self, out: &mut Vec<T>, at: usize, x: &Vec<T>) -> Result<(), Error> {
        expect_len("norm", "out", out.len(), at.saturating_add(1))?;
        out[at] = dot(x, x).sqrt();
        Ok(())
    }

    fn adamw_ema(
        &mut self,
        student: &mut Vec<T>,
        mut teacher: Option<&mut Vec<T>>,
        grads: &mut Vec<T>,
        exp_avg: &mut Vec<T>,
        exp_avg_sq: &mut Vec<T>,
        segments: &[Segment],
        step: &AdamW,
        clip: Option<Clip<'_, Vec<T>>>,
    ) -> Result<(), Error> {
        const OP: &str = "adamw_ema";
        for segment in segments {
            let end = segment.span.end();
            let vectors = [
                ("student", &*student),
                ("grads", grads),
                ("exp_avg", exp_avg),
                ("exp_avg_sq", exp_avg_sq),
            ];
            for (what, vector) in vectors {
                expect_len(OP, what, vector.len(), end)?;
            }
            if let Some(teacher) = teacher.as_ref().filter(|_| segment.ema) {
                expect_len(OP, "teacher", teacher.len(), end)?;
            }
        }
        let shrink = match clip {
            Some(Clip {
                norms,
                at,
                max_norm,
            }) => {
                expect_len(OP, "norms", norms.len(), at.saturating_add(1))?;
                let norm = norms[at].to_f64();
                if norm > max_norm {
                    max_norm / norm
                } else {
                    1.0
                }
            }
            None => 1.0,
        };
        let of = T::from_f64;
        let exponent = step.step as f64;
        let bias1 = 1.0 - libm::pow(step.beta1, exponent);
        let bias2 = 1.0 - libm::pow(step.beta2, exponent);
        for segment in segments {
            let lr = step.lr * segment.lr_scale;
            for i in segment.span.start..segment.span.end() {
                let g = grads[i] * of(shrink);
                let m = of(step.beta1) * exp_avg[i] + of(1.0 - step.beta1) * g;
                let v = of(step.beta2) * exp_avg_sq[i] + of(1.0 - step.beta2) * g * g;
                let update = of(lr / bias1) * m / ((v / of(bias2)).sqrt() + of(step.eps));
                let w = student[i] * of(1.0 - lr * segment.weight_decay) - update;
                (student[i], exp_avg[i], exp_avg_sq[i]) = (w, m, v);
                if let Some(teacher) = teacher.as_mut().filter(|_| segment.ema) {
                    teacher[i] = teacher[i] + of(1.0 - step.momentum) * (w - teacher[i]);
                }
            }
        }
        grads.fill(T::ZERO);
        Ok(())
    }
}

/// `out += factor * x`
fn add_scaled<T: Float>(out: &mut [T], factor: T, x: &[T]) {
    for (out, &x) in out.iter_mut().zip(x) {
        *out += factor * x;
    }
}

/// `Phi(x) + x phi(x)`, the derivative of the exact GELU.
fn gelu_derivative<T: Float>(x: T) -> T {
    let density = (x * x * T::from_f64(-0.5)).exp()
        * T::from_f64(0.5 * core::f64::consts::FRAC_2_SQRT_PI)
        * T::from_f64(core::f64::consts::FRAC_1_SQRT_2);
    normal_cdf(x) + x * density
}

/// The prefix and the patch tokens of sequence `b`.
fn sequence_mut<T>(dims: TokenDims, x: &mut [T], b: usize) -> (&mut [T], &mut [T]) {
    let len = (dims.prefix + dims.tokens) * dims.dim;
    x[b * len..][..len].split_at_mut(dims.prefix * dims.dim)
}

fn check_scale<T>(
    op: &'static str,
    rows: usize,
    scale: &[T],
    rows_per_scale: usize,
) -> Result<(), Error> {
    if rows_per_scale == 0 || !rows.is_multiple_of(rows_per_scale) {
        let expected = "rows that `rows_per_scale` divides";
        return Err(Error::Dimensions {
            op,
            expected,
            found: rows_per_scale,
        });
    }
    expect_len(op, "scale", scale.len(), rows / rows_per_scale)
}

fn check_loss<T, const N: usize>(
    op: &'static str,
    dims: RowDims,
    losses: &[T],
    at: usize,
    matrices: [&Vec<T>; N],
) -> Result<(), Error> {
    if dims.is_empty() {
        return Err(Error::Dimensions {
            op,
            expected: "at least one row and column",
            found: 0,
        });
    }
    expect_len(op, "losses", losses.len(), at.saturating_add(1))?;
    for matrix in matrices {
        expect_len(op, "a matrix", matrix.len(), dims.len())?;
    }
    Ok(())
}
