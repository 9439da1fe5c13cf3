//! How each operation is called.

use alloc::vec;
use alloc::vec::Vec;

use super::FailureKind;
use super::cases::{Of, Op, QrInput, Scores};
use super::stage::{Stage, buffer_error, held};
use crate::backend::{
    AdamW, AttentionDims, Backend, BlockDims, Clip, EmbedParams, Linear, PatchDims, PixelDims,
    Pixels, RowDims, Segment, Span, TokenDims, TrainBackend,
};
use crate::layout::{BlockParams, Kind, Layout};
use crate::reference::Reference;
use crate::resize::Crop;

impl<B: TrainBackend> Stage<'_, B> {
    pub(super) fn call(&mut self, op: Op) -> Result<(), FailureKind> {
        match op {
            Op::Write { .. }
            | Op::WritePixels { .. }
            | Op::Read { .. }
            | Op::WriteIds { .. }
            | Op::ReadIds { .. }
            | Op::WriteVector { .. }
            | Op::ReadVector { .. }
            | Op::ReadParams { .. } => self.copies(op),
            Op::Linear { .. }
            | Op::LinearGeluSaving { .. }
            | Op::LinearResidual { .. }
            | Op::LinearBackwardInput { .. }
            | Op::LinearBackwardParams { .. } => self.linears(op),
            Op::ScaleRows { .. }
            | Op::LayerNorm { .. }
            | Op::LayerNormSaving { .. }
            | Op::LayerNormBackward { .. }
            | Op::Standardise { .. }
            | Op::FeatureSpread { .. }
            | Op::CosineLoss { .. }
            | Op::MseLoss { .. }
            | Op::CrossEntropy { .. } => self.rows(op),
            Op::Attention { .. } | Op::AttentionSaving { .. } | Op::AttentionBackward { .. } => {
                self.attentions(op)
            }
            Op::Block { dims, block, of } => self.block(dims, block, of),
            Op::GatherPatches { .. }
            | Op::PixelTargets { .. }
            | Op::EmbedTokens { .. }
            | Op::EmbedTokensBackward { .. }
            | Op::DecoderTokens { .. }
            | Op::DecoderTokensBackward { .. } => self.embeddings(op),
            Op::MeanSimilarity { .. }
            | Op::Select { .. }
            | Op::GatherTokens { .. }
            | Op::GatherTokensBackward { .. }
            | Op::GatherIds { .. }
            | Op::MeanPool { .. }
            | Op::MeanPoolBackward { .. }
            | Op::StripPrefix { .. }
            | Op::StripPrefixBackward { .. }
            | Op::PivotedQr { .. } => self.tokens(op),
            Op::Zero { .. } | Op::CopyVector { .. } | Op::Norm { .. } | Op::AdamW { .. } => {
                self.flat(op)
            }
        }
    }

    fn copies(&mut self, op: Op) -> Result<(), FailureKind> {
        match op {
            Op::Write { len } => {
                let mut to = self.output("to", len)?;
                let from = self.noise(len);
                let result = self.backend.write(&mut to, &from);
                self.done(result);
                self.read(&to)
            }
            Op::WritePixels { dims, flips, crops } => {
                let mut to = self.output("to", dims.len())?;
                let mut rng = self.rng();
                let (mut places, mut len) = (Vec::new(), dims.len());
                if crops {
                    (places, len) = places_of_crops(dims);
                }
                // The ends of the range among them.
                let values: Vec<u8> = (0..len)
                    .map(|i| match i {
                        0 => 255,
                        1 => 0,
                        _ => rng.below(256) as u8,
                    })
                    .collect();
                let which: Vec<bool> = (0..dims.batch).map(|i| i % 3 != 1).collect();
                let mut stats = |least: f32| -> Vec<f32> {
                    let stats = (0..dims.channels).map(|_| least + 0.5 * rng.uniform());
                    stats.collect()
                };
                let (mean, std) = (stats(0.2), stats(0.15));
                let pixels = Pixels {
                    values: self.shorten("values", &values),
                    crops: crops.then(|| self.shorten("crops", &places)),
                    flips: flips.then(|| self.shorten("flips", &which)),
                    mean: self.shorten("mean", &mean),
                    std: self.shorten("std", &std),
                };
                let result = self.backend.write_pixels(dims, &mut to, pixels);
                self.done(result);
                self.read(&to)
            }
            Op::Read { len } => {
                let from = self.input("from", len)?;
                let mut to = self.noise(len);
                self.before.push(to.clone());
                let result = self.backend.read(&mut to, &from);
                self.done(result);
                self.after.push(to);
                Ok(())
            }
            Op::WriteIds { len } => {
                let mut to = self.ids_output("to", len)?;
                let from: Vec<u32> = (0..len as u32).map(|i| 3 * i + 1).collect();
                let result = self.backend.write_ids(&mut to, &from);
                self.done(result);
                self.read_ids(&to)
            }
            Op::ReadIds { len } => {
                let from: Vec<u32> = (0..len as u32).map(|i| 3 * i + 1).collect();
                let from = self.shorten("from", &from);
                let from = self.ids_of(from)?;
                let mut to = vec![7; len];
                self.before.push(vec![7.0; len]);
                let result = self.backend.read_ids(&mut to, &from);
                self.done(result);
                self.after
                    .push(to.into_iter().map(|id| id as f32).collect());
                Ok(())
            }
            Op::WriteVector { len, at } => {
                let mut to = self.vector_output("to", len + at)?;
                let from = self.noise(len);
                let result = self.backend.write_vector(&mut to, at, &from);
                self.done(result);
                self.read_vector(&to)
            }
            Op::ReadVector { len, at } => {
                let from = self.vector_input("from", len + at)?;
                let mut to = self.noise(len);
                self.before.push(to.clone());
                let result = self.backend.read_vector(&mut to, &from, at);
                self.done(result);
                self.after.push(to);
                Ok(())
            }
            Op::ReadParams { span } => {
                let params = self.params()?;
                let mut to = self.before("to", span.len);
                let span = Span {
                    start: self.span_of("span", span, false).start,
                    ..span
                };
                let result = self.backend.read_params(&mut to, &params, span);
                self.done(result);
                self.after.push(to);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn linears(&mut self, op: Op) -> Result<(), FailureKind> {
        match op {
            Op::Linear {
                dims,
                layer,
                epilogue,
            } => {
                let (params, layer) = (self.params()?, self.linear(layer));
                let x = self.input("x", dims.in_len())?;
                let mut out = self.output("out", dims.out_len())?;
                let result = self
                    .backend
                    .linear(dims, &mut out, &x, &params, layer, epilogue);
                self.done(result);
                self.read(&out)
            }
            Op::LinearGeluSaving { dims, layer } => {
                let (params, layer) = (self.params()?, self.linear(layer));
                let x = self.input("x", dims.in_len())?;
                let mut out = self.output("out", dims.out_len())?;
                let mut pre = self.output("pre_gelu", dims.out_len())?;
                let result = self
                    .backend
                    .linear_gelu_saving(dims, &mut out, &mut pre, &x, &params, layer);
                self.done(result);
                self.read(&out)?;
                self.read(&pre)
            }
            Op::LinearResidual {
                dims,
                layer,
                rows_per_scale,
            } => {
                let (params, layer) = (self.params()?, self.linear(layer));
                let x = self.input("x", dims.in_len())?;
                let residual = self.input("residual", dims.out_len())?;
                let scale = match rows_per_scale {
                    Some(per) => Some((self.input("scale", dims.rows / per)?, per)),
                    None => None,
                };
                let scale = scale.as_ref().map(|(scale, per)| (scale, *per));
                let mut out = self.output("out", dims.out_len())?;
                let result = self
                    .backend
                    .linear_residual(dims, &mut out, &residual, &x, &params, layer, scale);
                self.done(result);
                self.read(&out)
            }
            Op::LinearBackwardInput { dims, layer, gelu } => {
                let params = self.params()?;
                let layer = Linear {
                    weight: self.span("layer.weight", layer.weight),
                    ..layer
                };
                let d_y = self.input("d_y", dims.out_len())?;
                let pre = match gelu {
                    true => Some(self.input("pre_gelu", dims.in_len())?),
                    false => None,
                };
                let mut d_x = self.output("d_x", dims.in_len())?;
                let result = self.backend.linear_backward_input(
                    dims,
                    &mut d_x,
                    &d_y,
                    &params,
                    layer,
                    pre.as_ref(),
                );
                self.done(result);
                self.read(&d_x)
            }
            Op::LinearBackwardParams { dims, layer } => {
                let layer = self.linear(layer);
                let d_y = self.input("d_y", dims.out_len())?;
                let x = self.input("x", dims.in_len())?;
                let mut grads = self.grads()?;
                let result = self
                    .backend
                    .linear_backward_params(dims, &mut grads, layer, &d_y, &x);
                self.done(result);
                self.read_vector(&grads)
            }
            _ => Ok(()),
        }
    }

    fn rows(&mut self, op: Op) -> Result<(), FailureKind> {
        match op {
            Op::ScaleRows {
                dims,
                rows_per_scale,
            } => {
                let x = self.input("x", dims.len())?;
                let groups = dims.rows.checked_div(rows_per_scale).unwrap_or(0);
                let scale = self.input("scale", groups)?;
                let mut out = self.output("out", dims.len())?;
                let result = self
                    .backend
                    .scale_rows(dims, &mut out, &x, &scale, rows_per_scale);
                self.done(result);
                self.read(&out)
            }
            Op::LayerNorm { dims, norm } => {
                let (params, norm) = (self.params()?, self.norm(norm));
                let x = self.input("x", dims.len())?;
                let mut out = self.output("out", dims.len())?;
                let result = self.backend.layer_norm(dims, &mut out, &x, &params, norm);
                self.done(result);
                self.read(&out)
            }
            Op::LayerNormSaving { dims, norm } => {
                let (params, norm) = (self.params()?, self.norm(norm));
                let x = self.input("x", dims.len())?;
                let mut out = self.output("out", dims.len())?;
                let mut stats = self.vector_output("stats", 2 * dims.rows)?;
                let result = self
                    .backend
                    .layer_norm_saving(dims, &mut out, &mut stats, &x, &params, norm);
                self.done(result);
                self.read(&out)?;
                self.read_vector(&stats)
            }
            Op::LayerNormBackward { dims, norm, accum } => {
                let (params, norm) = (self.params()?, self.norm(norm));
                let d_y = self.input("d_y", dims.len())?;
                let x = self.input("x", dims.len())?;
                let stats = self.vector_input("stats", 2 * dims.rows)?;
                let mut d_x = self.output("d_x", dims.len())?;
                let mut grads = self.grads()?;
                let result = self.backend.layer_norm_backward(
                    dims, &mut d_x, accum, &mut grads, &d_y, &x, &stats, &params, norm,
                );
                self.done(result);
                self.read(&d_x)?;
                self.read_vector(&grads)
            }
            Op::Standardise { dims } => {
                let x = self.input("x", dims.len())?;
                let mut out = self.output("out", dims.len())?;
                let result = self.backend.standardise(dims, &mut out, &x);
                self.done(result);
                self.read(&out)
            }
            Op::FeatureSpread { dims } => {
                let x = self.input("x", dims.len())?;
                let mut out = self.losses()?;
                let result = self.backend.feature_spread(dims, &mut out, LOSS_AT, &x);
                self.done(result);
                self.read_vector(&out)
            }
            Op::CosineLoss { dims, zero } => {
                // A prediction of zeros has a norm at its lower bound.
                let pred = self.noise(dims.len());
                let pred = if zero { vec![0.0; dims.len()] } else { pred };
                // The gradient is then as large as 1 over that bound: kept near 1 by the scale.
                let scale = if zero { 1e-8 } else { 0.75 };
                let pred = self.input_of("pred", &pred)?;
                self.loss(dims, pred, |backend, d_pred, losses, pred, target| {
                    backend.cosine_loss(dims, d_pred, losses, LOSS_AT, pred, target, scale)
                })
            }
            Op::MseLoss { dims } => {
                let pred = self.input("pred", dims.len())?;
                self.loss(dims, pred, |backend, d_pred, losses, pred, target| {
                    backend.mse_loss(dims, d_pred, losses, LOSS_AT, pred, target, 0.75)
                })
            }
            Op::CrossEntropy { dims } => {
                let logits = self.input("logits", dims.len())?;
                self.loss(dims, logits, |backend, d_logits, losses, logits, target| {
                    backend.cross_entropy(dims, d_logits, losses, LOSS_AT, logits, target, 0.75)
                })
            }
            _ => Ok(()),
        }
    }

    /// Room for results at [`LOSS_AT`], and no further.
    fn losses(&mut self) -> Result<B::Vector, FailureKind> {
        let mut values = self.noise(LOSS_AT + 1);
        if self.spoil("losses") {
            values.truncate(LOSS_AT);
        }
        self.before.push(values.clone());
        self.vector_of(&values)
    }

    fn loss(
        &mut self,
        dims: RowDims,
        pred: B::Buf,
        run: impl FnOnce(&mut B, &mut B::Buf, &mut B::Vector, &B::Buf, &B::Buf) -> Result<(), B::Error>,
    ) -> Result<(), FailureKind> {
        let target = self.input("target", dims.len())?;
        let mut d_pred = self.output("d_pred", dims.len())?;
        let mut losses = self.losses()?;
        let result = run(self.backend, &mut d_pred, &mut losses, &pred, &target);
        self.done(result);
        self.read(&d_pred)?;
        self.read_vector(&losses)
    }

    fn attentions(&mut self, op: Op) -> Result<(), FailureKind> {
        match op {
            Op::Attention { dims } => {
                let qkv = self.input("qkv", dims.qkv_len())?;
                let mut out = self.output("out", dims.out_len())?;
                let result = self.backend.attention(dims, &mut out, &qkv);
                self.done(result);
                self.read(&out)
            }
            Op::AttentionSaving { dims } => {
                let qkv = self.input("qkv", dims.qkv_len())?;
                let mut out = self.output("out", dims.out_len())?;
                let mut lse = self.vector_output("lse", dims.lse_len())?;
                let result = self
                    .backend
                    .attention_saving(dims, &mut out, &mut lse, &qkv);
                self.done(result);
                self.read(&out)?;
                self.read_vector(&lse)
            }
            Op::AttentionBackward { dims } => {
                // What a forward gives, from the reference: the same for every backend.
                let qkv = self.noise(dims.qkv_len());
                let (mut out, mut lse) = (vec![0.0; dims.out_len()], vec![0.0; dims.lse_len()]);
                forward(dims, &mut out, &mut lse, &qkv).map_err(buffer_error)?;
                let qkv = self.input_of("qkv", &qkv)?;
                let out = self.input_of("out", &out)?;
                let lse = self.vector_input_of("lse", &lse)?;
                let d_out = self.input("d_out", dims.out_len())?;
                let mut d_qkv = self.output("d_qkv", dims.qkv_len())?;
                let result = self
                    .backend
                    .attention_backward(dims, &mut d_qkv, &d_out, &qkv, &out, &lse);
                self.done(result);
                self.read(&d_qkv)
            }
            _ => Ok(()),
        }
    }

    fn block(&mut self, dims: BlockDims, block: BlockParams, of: Of) -> Result<(), FailureKind> {
        let values = self.block_values(block);
        let params = match of {
            Of::Student => self.backend.params(self.layout, &values),
            Of::Teacher => self.backend.teacher_params(self.layout, &values),
            Of::Frozen => self.backend.frozen_params(self.layout, &values),
        };
        let params = params.map_err(buffer_error)?;
        let block = BlockParams {
            norm1: self.norm(block.norm1),
            qkv: self.linear(block.qkv),
            proj: self.linear(block.proj),
            norm2: self.norm(block.norm2),
            fc1: self.linear(block.fc1),
            fc2: self.linear(block.fc2),
        };
        let rows = dims.rows();
        let widest = dims.hidden.max(3 * rows.dim);
        let mut x = self.output("x", rows.len())?;
        let (y_len, wide_len) = (rows.len(), rows.rows * widest);
        let mut y = self.output("y", y_len)?;
        let mut wide = self.output("wide", wide_len)?;
        let result = self
            .backend
            .block(dims, &mut x, [&mut y, &mut wide], &params, block);
        self.done(result);
        // Layers before the one that found what is wrong have run.
        self.is_undefined = self.error.is_some();
        self.read(&x)?;
        self.read_beyond(&y, y_len)?;
        self.read_beyond(&wide, wide_len)
    }

    /// Parameters of all sizes that blocks have in a trained network: what a layer adds to the stream is about half as large as the stream, and
    /// attention neither averages nor picks a single token.
    fn block_values(&mut self, block: BlockParams) -> Vec<f32> {
        let mut values = self.noise(self.layout.len());
        let mut change = |span: Span, change: &dyn Fn(f32) -> f32| {
            for value in &mut values[span.start..span.end()] {
                *value = held(change(*value), self.coarse);
            }
        };
        for norm in [block.norm1, block.norm2] {
            change(norm.weight, &|x| 1.0 + 0.25 * x);
            change(norm.bias, &|x| 0.25 * x);
        }
        for (layer, gain) in [
            (block.qkv, 1.0),
            (block.proj, 0.75),
            (block.fc1, 1.0),
            (block.fc2, 0.75),
        ] {
            let in_features = layer.weight.len / layer.bias.len;
            let scale = gain / libm::sqrtf(in_features as f32);
            change(layer.weight, &|x| scale * x);
            change(layer.bias, &|x| 0.5 * x);
        }
        values
    }

    fn embeddings(&mut self, op: Op) -> Result<(), FailureKind> {
        match op {
            Op::GatherPatches { dims, ids } => {
                let images = self.input("images", dims.images_len())?;
                let ids = match ids {
                    true => Some(self.patch_ids(dims)?),
                    false => None,
                };
                let mut out = self.output("out", dims.patches_len())?;
                let result = self
                    .backend
                    .gather_patches(dims, &mut out, &images, ids.as_ref());
                self.done(result);
                self.read(&out)
            }
            Op::PixelTargets { dims } => {
                let images = self.input("images", dims.images_len())?;
                let ids = self.patch_ids(dims)?;
                let mut out = self.output("out", dims.patches_len())?;
                let result = self.backend.pixel_targets(dims, &mut out, &images, &ids);
                self.done(result);
                self.read(&out)
            }
            Op::EmbedTokens { dims, ids, embed } => {
                let params = self.params()?;
                let patches = TokenDims { prefix: 0, ..dims };
                let x = self.input("x", patches.len())?;
                let positions = self.layout.vit.num_patches();
                let needed = !ids || !patches.is_empty();
                let embed = EmbedParams {
                    cls_token: embed.cls_token.map(|span| self.span("cls_token", span)),
                    pos_embed: self.span_of("pos_embed", embed.pos_embed, needed),
                };
                let ids = match ids {
                    true => Some(self.ids_input("ids", dims.batch, dims.tokens, positions)?),
                    false => None,
                };
                let mut out = self.output("out", dims.len())?;
                let result =
                    self.backend
                        .embed_tokens(dims, &mut out, &x, ids.as_ref(), &params, embed);
                self.done(result);
                self.read(&out)
            }
            Op::EmbedTokensBackward { dims, embed } => {
                let patches = TokenDims { prefix: 0, ..dims };
                let d_out = self.input("d_out", dims.len())?;
                let embed = EmbedParams {
                    cls_token: embed.cls_token.map(|span| self.span("cls_token", span)),
                    ..embed
                };
                let mut d_x = self.output("d_x", patches.len())?;
                let mut grads = self.grads()?;
                let result = self
                    .backend
                    .embed_tokens_backward(dims, &mut d_x, &mut grads, &d_out, embed);
                self.done(result);
                self.read(&d_x)?;
                self.read_vector(&grads)
            }
            Op::DecoderTokens {
                dims,
                mask_token,
                pos_embed,
            } => {
                let params = self.params()?;
                let x = self.input("x", dims.latent_len())?;
                let positions = self.layout.vit.num_patches();
                let visible = self.ids_input("ids_visible", dims.batch, dims.visible, positions)?;
                let target = self.ids_input("ids_target", dims.batch, dims.targets, positions)?;
                let mask_token = self.span("mask_token", mask_token);
                let pos_embed = self.span_of("pos_embed", pos_embed, dims.batch > 0);
                let mut out = self.output("out", dims.len())?;
                let result = self.backend.decoder_tokens(
                    dims, &mut out, &x, &visible, &target, &params, mask_token, pos_embed,
                );
                self.done(result);
                self.read(&out)
            }
            Op::DecoderTokensBackward { dims, mask_token } => {
                let d_out = self.input("d_out", dims.len())?;
                let mask_token = self.span("mask_token", mask_token);
                let mut d_x = self.output("d_x", dims.latent_len())?;
                let mut grads = self.grads()?;
                let result = self
                    .backend
                    .decoder_tokens_backward(dims, &mut d_x, &mut grads, &d_out, mask_token);
                self.done(result);
                self.read(&d_x)?;
                self.read_vector(&grads)
            }
            _ => Ok(()),
        }
    }

    fn patch_ids(&mut self, dims: PatchDims) -> Result<B::Ids, FailureKind> {
        self.ids_input("ids", dims.batch, dims.taken, dims.num_patches())
    }

    fn tokens(&mut self, op: Op) -> Result<(), FailureKind> {
        match op {
            Op::MeanSimilarity { dims } => {
                let mut values = self.noise(dims.len());
                // A token of zeros has a norm at its lower bound.
                if let Some(token) = values.rchunks_mut(dims.dim).next() {
                    token.fill(0.0);
                }
                let x = self.input_of("x", &values)?;
                let mut scores = self.scores_output("scores", dims.batch * dims.tokens)?;
                let result = self.backend.mean_similarity(dims, &mut scores, &x);
                self.done(result);
                self.read_scores(&scores)
            }
            Op::Select {
                batch,
                tokens,
                keep,
                scores,
            } => {
                let mut values = self.noise(batch * tokens);
                match scores {
                    Scores::Different => {}
                    Scores::Ties => {
                        const VALUES: [f32; 5] = [f32::INFINITY, 0.0, f32::NEG_INFINITY, -0.0, 1.5];
                        for value in &mut values {
                            *value = VALUES[(*value + 1.8) as usize % VALUES.len()];
                        }
                    }
                    Scores::NaN => {
                        if let Some(last) = values.last_mut() {
                            *last = f32::NAN;
                        }
                    }
                }
                let values = self.shorten("scores", &values);
                let scores = self.scores_of(values)?;
                let mut picked = self.ids_output("picked", batch * keep)?;
                let result = self
                    .backend
                    .select(batch, tokens, keep, &mut picked, &scores);
                self.done(result);
                self.read_ids(&picked)
            }
            Op::GatherTokens { dims, keep } => {
                let x = self.input("x", dims.len())?;
                let picked = self.ids_input("picked", dims.batch, keep, dims.tokens)?;
                let mut out = self.output("out", dims.with_tokens(keep).len())?;
                let result = self
                    .backend
                    .gather_tokens(dims, keep, &mut out, &x, &picked);
                self.done(result);
                self.read(&out)
            }
            Op::GatherTokensBackward { dims, keep } => {
                let d_out = self.input("d_out", dims.with_tokens(keep).len())?;
                let picked = self.ids_input("picked", dims.batch, keep, dims.tokens)?;
                let mut d_x = self.output("d_x", dims.len())?;
                let result = self
                    .backend
                    .gather_tokens_backward(dims, keep, &mut d_x, &d_out, &picked);
                self.done(result);
                self.read(&d_x)
            }
            Op::GatherIds {
                batch,
                tokens,
                keep,
                ids,
            } => {
                let ids = match ids {
                    true => {
                        let ids: Vec<u32> = (0..(batch * tokens) as u32).map(|i| 5 * i).collect();
                        let ids = self.shorten("ids", &ids);
                        Some(self.ids_of(ids)?)
                    }
                    false => None,
                };
                let picked = self.ids_input("picked", batch, keep, tokens)?;
                let mut out = self.ids_output("out", batch * keep)?;
                let result =
                    self.backend
                        .gather_ids(batch, tokens, keep, &mut out, ids.as_ref(), &picked);
                self.done(result);
                self.read_ids(&out)
            }
            Op::MeanPool { dims } => {
                let x = self.input("x", dims.len())?;
                let mut out = self.output("out", dims.batch * dims.dim)?;
                let result = self.backend.mean_pool(dims, &mut out, &x);
                self.done(result);
                self.read(&out)
            }
            Op::MeanPoolBackward { dims } => {
                let d_out = self.input("d_out", dims.batch * dims.dim)?;
                let mut d_x = self.output("d_x", dims.len())?;
                let result = self.backend.mean_pool_backward(dims, &mut d_x, &d_out);
                self.done(result);
                self.read(&d_x)
            }
            Op::StripPrefix { dims } => {
                let x = self.input("x", dims.len())?;
                let mut out = self.output("out", TokenDims { prefix: 0, ..dims }.len())?;
                let result = self.backend.strip_prefix(dims, &mut out, &x);
                self.done(result);
                self.read(&out)
            }
            Op::StripPrefixBackward { dims } => {
                let d_out = self.input("d_out", TokenDims { prefix: 0, ..dims }.len())?;
                let mut d_x = self.output("d_x", dims.len())?;
                let result = self.backend.strip_prefix_backward(dims, &mut d_x, &d_out);
                self.done(result);
                self.read(&d_x)
            }
            Op::PivotedQr { dims, input } => {
                let mut values = self.noise(dims.len());
                match input {
                    QrInput::Random => {}
                    QrInput::Repeated => {
                        for (token, row) in values.chunks_mut(dims.dim).enumerate() {
                            row.fill(0.0);
                            row[token * 2 % 3] = [1.0, 4.0, 0.0, 2.0][token % 4];
                        }
                    }
                    QrInput::NaN => {
                        if let Some(last) = values.last_mut() {
                            *last = f32::NAN;
                        }
                    }
                }
                let x = self.input_of("x", &values)?;
                let mut scores = self.scores_output("scores", dims.batch * dims.tokens)?;
                let result = self.backend.pivoted_qr_scores(dims, &mut scores, &x);
                self.done(result);
                self.read_scores(&scores)
            }
            _ => Ok(()),
        }
    }

    fn flat(&mut self, op: Op) -> Result<(), FailureKind> {
        match op {
            Op::Zero { len } => {
                let span = Span { start: 3, len };
                let mut x = self.vector_output("x", span.end())?;
                let result = self.backend.zero(&mut x, span);
                self.done(result);
                self.read_vector(&x)
            }
            Op::CopyVector { len, at } => {
                let span = Span { start: 5, len };
                let from = self.vector_input("from", span.end())?;
                let mut to = self.vector_output("to", at + len)?;
                let result = self.backend.copy_vector(&mut to, at, &from, span);
                self.done(result);
                self.read_vector(&to)
            }
            Op::Norm { len } => {
                let values = self.noise(len);
                let x = self.vector_of(&values)?;
                let mut out = self.losses()?;
                let result = self.backend.norm(&mut out, LOSS_AT, &x);
                self.done(result);
                self.read_vector(&out)
            }
            Op::AdamW {
                teacher,
                max_norm,
                step,
            } => self.adamw(teacher, max_norm, step),
            _ => Ok(()),
        }
    }

    fn adamw(
        &mut self,
        with_teacher: bool,
        max_norm: Option<f64>,
        step: u64,
    ) -> Result<(), FailureKind> {
        let layout = self.layout;
        let mut segments = Vec::new();
        layout.for_each(|tensor| {
            // Positions, and some that a run might freeze, in no segment.
            if tensor.is_trained() && tensor.kind != Kind::Token {
                segments.push(Segment {
                    span: tensor.span,
                    weight_decay: if tensor.decays() { 0.3 } else { 0.0 },
                    lr_scale: if tensor.kind == Kind::Norm { 0.5 } else { 1.0 },
                    ema: tensor.span.end() <= layout.encoder_len(),
                });
            }
        });
        if let Some(last) = segments.last_mut()
            && self.spoil("segments")
        {
            last.span.start += 1;
        }
        let mut student = self.params()?;
        let values = self.all_params(&student)?;
        self.before.push(values);
        let encoder = Layout::encoder(&layout.vit);
        let mut teacher = match with_teacher {
            true => Some(self.params_of(&encoder)?),
            false => None,
        };
        if let Some(teacher) = &teacher {
            let values = self.params_values(&encoder, teacher)?;
            self.before.push(values);
        }
        let mut vectors = Vec::new();
        for name in ["grads", "exp_avg", "exp_avg_sq"] {
            let mut values = self.noise(layout.len());
            if name == "exp_avg_sq" {
                values.iter_mut().for_each(|value| *value *= *value);
            }
            let values = self.shorten(name, &values).to_vec();
            vectors.push(self.vector_of(&values)?);
            self.before.push(values);
        }
        let norms = match max_norm {
            Some(_) => Some(self.vector_input_of("norms", &[0.1, 0.2, 1.25])?),
            None => None,
        };
        let clip = norms.as_ref().zip(max_norm);
        let clip = clip.map(|(norms, max_norm)| Clip {
            norms,
            at: 2,
            max_norm,
        });
        let constants = AdamW {
            lr: 0.01,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            step,
            momentum: 0.875,
        };
        if let [grads, exp_avg, exp_avg_sq] = &mut vectors[..] {
            let result = self.backend.adamw_ema(
                &mut student,
                teacher.as_mut(),
                grads,
                exp_avg,
                exp_avg_sq,
                &segments,
                &constants,
                clip,
            );
            self.done(result);
        }
        let values = self.all_params(&student)?;
        self.after.push(values);
        if let Some(teacher) = &teacher {
            let values = self.params_values(&encoder, teacher)?;
            self.after.push(values);
        }
        for vector in &vectors {
            self.read_vector(vector)?;
        }
        Ok(())
    }
}

/// Crops that grow, stay and shrink as far as they may, the first of them behind the others, and how many values they are.
fn places_of_crops(dims: PixelDims) -> (Vec<Crop>, usize) {
    let PixelDims { height, width, .. } = dims;
    let sizes = [
        (height.div_ceil(2), 2 * width),
        (4 * height, width.div_ceil(2)),
        (height, width),
        (1, 1),
        (2 * height, 2 * width),
    ];
    let mut len = 0;
    let mut places: Vec<Crop> = (0..dims.batch)
        .rev()
        .map(|b| {
            let (height, width) = sizes[b % sizes.len()];
            let start = len;
            len += height * width * dims.channels;
            Crop {
                start,
                height,
                width,
            }
        })
        .collect();
    places.reverse();
    (places, len)
}

/// Where losses and other single results go.
const LOSS_AT: usize = 2;

/// Output and log-sum-exp of attention, by the reference.
fn forward(
    dims: AttentionDims,
    out: &mut [f32],
    lse: &mut [f32],
    qkv: &[f32],
) -> Result<(), crate::error::Error> {
    let mut reference = Reference::<f64, _>::owned();
    let mut qkv_buf = reference.buf(qkv.len())?;
    reference.write(&mut qkv_buf, qkv)?;
    let (mut out_buf, mut lse_buf) = (reference.buf(out.len())?, reference.vector(lse.len())?);
    reference.attention_saving(dims, &mut out_buf, &mut lse_buf, &qkv_buf)?;
    reference.read(out, &out_buf)?;
    reference.read_vector(lse, &lse_buf, 0)
}
