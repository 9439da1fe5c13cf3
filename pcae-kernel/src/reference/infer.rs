//! Inference.

use super::{Reference, Storage, check_ids, dot, gelu, mean_rstd, param, rows, rows_mut};
use crate::backend::{
    AttentionDims, Backend, EmbedParams, Epilogue, Linear, LinearDims, Norm, PatchDims, PixelDims,
    Pixels, RowDims, SCORE_EPS, TokenDims,
};
use crate::error::{Error, expect_len, product};
use crate::float::Float;
use crate::resize::Axis;

impl<T: Float, S: Storage<T>> Backend for Reference<T, S> {
    type Error = Error;
    type Buf = S::Buf;
    type Ids = S::Ids;
    type Scores = S::Buf;
    type Params = S::Params;

    fn buf(&mut self, len: usize) -> Result<S::Buf, Error> {
        self.storage.buf(len)
    }

    fn ids(&mut self, len: usize) -> Result<S::Ids, Error> {
        self.storage.ids(len)
    }

    fn scores(&mut self, len: usize) -> Result<S::Buf, Error> {
        self.storage.buf(len)
    }

    fn write(&mut self, to: &mut S::Buf, from: &[f32]) -> Result<(), Error> {
        let to = to.as_mut();
        expect_len("write", "to", to.len(), from.len())?;
        for (to, &from) in to.iter_mut().zip(from) {
            *to = T::from_f64(f64::from(from));
        }
        Ok(())
    }

    fn write_pixels(
        &mut self,
        dims: PixelDims,
        to: &mut S::Buf,
        pixels: Pixels<'_>,
    ) -> Result<(), Error> {
        const OP: &str = "write_pixels";
        let to = to.as_mut();
        expect_len(OP, "to", to.len(), dims.len())?;
        pixels.check(OP, dims)?;
        let PixelDims {
            channels,
            height,
            width,
            ..
        } = dims;
        if dims.is_empty() {
            return Ok(());
        }
        let picture = product(&[channels, height, width]);
        for (b, to) in to[..dims.len()].chunks_exact_mut(picture).enumerate() {
            let crop = pixels.crop(b, dims);
            let from = &pixels.values[crop.start..];
            // From the crop's rows and columns to those of the output.
            let axes = pixels.crops.map(|_| {
                let rows = Axis::new(crop.height, height);
                (rows, Axis::new(crop.width, width))
            });
            for y in 0..height {
                for x in 0..width {
                    let from_x = match pixels.is_flipped(b) {
                        true => width - 1 - x,
                        false => x,
                    };
                    let taps = axes.map(|(rows, columns)| (rows.taps(y), columns.taps(from_x)));
                    for c in 0..channels {
                        let pixel = |i: usize, j: usize| from[(i * crop.width + j) * channels + c];
                        let value = match taps {
                            Some((row, column)) => column.blend(|j| row.blend(|i| pixel(i, j))),
                            None => pixel(y, from_x),
                        };
                        let value = Pixels::normalise(value, pixels.mean[c], pixels.std[c]);
                        to[(c * height + y) * width + x] = T::from_f64(f64::from(value));
                    }
                }
            }
        }
        Ok(())
    }

    fn read(&mut self, to: &mut [f32], from: &S::Buf) -> Result<(), Error> {
        let from = from.as_ref();
        expect_len("read", "from", from.len(), to.len())?;
        for (to, &from) in to.iter_mut().zip(from) {
            *to = from.to_f64() as f32;
        }
        Ok(())
    }

    fn write_ids(&mut self, to: &mut S::Ids, from: &[u32]) -> Result<(), Error> {
        let to = to.as_mut();
        expect_len("write_ids", "to", to.len(), from.len())?;
        to[..from.len()].copy_from_slice(from);
        Ok(())
    }

    fn read_ids(&mut self, to: &mut [u32], from: &S::Ids) -> Result<(), Error> {
        let from = from.as_ref();
        expect_len("read_ids", "from", from.len(), to.len())?;
        to.copy_from_slice(&from[..to.len()]);
        Ok(())
    }

    fn write_scores(&mut self, to: &mut S::Buf, from: &[f32]) -> Result<(), Error> {
        self.write(to, from)
    }

    fn read_scores(&mut self, to: &mut [f32], from: &S::Buf) -> Result<(), Error> {
        self.read(to, from)
    }

    fn gather_patches(
        &mut self,
        dims: PatchDims,
        out: &mut S::Buf,
        images: &S::Buf,
        ids: Option<&S::Ids>,
    ) -> Result<(), Error> {
        let ids = ids.map(S::Ids::as_ref);
        let p = dims.patch_size;
        copy_patches(
            "gather_patches",
            dims,
            out.as_mut(),
            images.as_ref(),
            ids,
            |channel, row, col| (channel * p + row) * p + col,
        )
    }

    fn embed_tokens(
        &mut self,
        dims: TokenDims,
        out: &mut S::Buf,
        x: &S::Buf,
        ids: Option<&S::Ids>,
        params: &S::Params,
        embed: EmbedParams,
    ) -> Result<(), Error> {
        const OP: &str = "embed_tokens";
        let (out, x, params) = (out.as_mut(), x.as_ref(), params.as_ref());
        let prefix = usize::from(embed.cls_token.is_some());
        if dims.prefix != prefix {
            let expected = "a prefix of 1 with a class token, of 0 without";
            return Err(Error::Dimensions {
                op: OP,
                expected,
                found: dims.prefix,
            });
        }
        expect_len(OP, "out", out.len(), dims.len())?;
        let patches = TokenDims { prefix: 0, ..dims };
        expect_len(OP, "x", x.len(), patches.len())?;
        let pos = param(
            OP,
            "pos_embed",
            params,
            embed.pos_embed,
            embed.pos_embed.len,
        )?;
        let positions = (pos.len() / dims.dim.max(1)).saturating_sub(1);
        expect_len(OP, "pos_embed", pos.len(), product(&[prefix, dims.dim]))?;
        let cls = match embed.cls_token {
            Some(span) => Some(param(OP, "cls_token", params, span, dims.dim)?),
            None => None,
        };
        let ids = match ids {
            Some(ids) => {
                let count = product(&[dims.batch, dims.tokens]);
                expect_len(OP, "ids", ids.as_ref().len(), count)?;
                check_ids(OP, "ids", &ids.as_ref()[..count], positions)?;
                Some(ids.as_ref())
            }
            None => {
                expect_len(OP, "pos_embed", positions, dims.tokens)?;
                None
            }
        };
        if dims.is_empty() {
            return Ok(());
        }
        let d = dims.dim;
        for b in 0..dims.batch {
            let out = &mut out[b * (prefix + dims.tokens) * d..][..(prefix + dims.tokens) * d];
            if let Some(cls) = cls {
                add(&mut out[..d], cls, &pos[..d]);
            }
            for j in 0..dims.tokens {
                let patch = b * dims.tokens + j;
                let position = ids.map_or(j, |ids| ids[patch] as usize);
                add(
                    &mut out[(prefix + j) * d..][..d],
                    &x[patch * d..][..d],
                    &pos[(1 + position) * d..][..d],
                );
            }
        }
        Ok(())
    }

    fn linear(
        &mut self,
        dims: LinearDims,
        out: &mut S::Buf,
        x: &S::Buf,
        params: &S::Params,
        layer: Linear,
        epilogue: Epilogue,
    ) -> Result<(), Error> {
        for_each_output(
            "linear",
            dims,
            out.as_mut(),
            x.as_ref(),
            params.as_ref(),
            layer,
            |_, out, y| match epilogue {
                Epilogue::Bias | Epilogue::BiasQkv => *out = y,
                Epilogue::BiasGelu => *out = gelu(y),
                Epilogue::BiasResidual => *out += y,
            },
        )
    }

    fn layer_norm(
        &mut self,
        dims: RowDims,
        out: &mut S::Buf,
        x: &S::Buf,
        params: &S::Params,
        norm: Norm,
    ) -> Result<(), Error> {
        layer_norm(
            "layer_norm",
            dims,
            out.as_mut(),
            x.as_ref(),
            params.as_ref(),
            norm,
            |_, _, _| (),
        )
    }

    fn attention(
        &mut self,
        dims: AttentionDims,
        out: &mut S::Buf,
        qkv: &S::Buf,
    ) -> Result<(), Error> {
        attention("attention", dims, out.as_mut(), qkv.as_ref(), |_, _| ())
    }

    fn mean_similarity(
        &mut self,
        dims: TokenDims,
        scores: &mut S::Buf,
        x: &S::Buf,
    ) -> Result<(), Error> {
        const OP: &str = "mean_similarity";
        let (scores, x) = (scores.as_mut(), x.as_ref());
        expect_len(OP, "x", x.len(), dims.len())?;
        expect_len(
            OP,
            "scores",
            scores.len(),
            product(&[dims.batch, dims.tokens]),
        )?;
        if product(&[dims.batch, dims.tokens]) == 0 {
            return Ok(());
        }
        let inverse_norm = |x: &[T]| T::ONE / dot(x, x).sqrt().max(T::from_f64(SCORE_EPS));
        for b in 0..dims.batch {
            let tokens = patch_tokens(dims, x, b);
            let scores = &mut scores[b * dims.tokens..][..dims.tokens];
            // The dot product with the mean is the mean of the dot products, which needs no room for the mean token.
            scores.fill(T::ZERO);
            for other in rows(tokens, dims.dim) {
                let inverse = inverse_norm(other);
                for (score, token) in scores.iter_mut().zip(rows(tokens, dims.dim)) {
                    *score += dot(token, other) * inverse;
                }
            }
            for (score, token) in scores.iter_mut().zip(rows(tokens, dims.dim)) {
                *score = *score * inverse_norm(token) / T::from_usize(dims.tokens);
            }
        }
        Ok(())
    }

    fn select(
        &mut self,
        batch: usize,
        tokens: usize,
        keep: usize,
        picked: &mut S::Ids,
        scores: &S::Buf,
    ) -> Result<(), Error> {
        const OP: &str = "select";
        let (picked, scores) = (picked.as_mut(), scores.as_ref());
        let expected = "at most as many tokens kept as there are";
        if keep > tokens {
            return Err(Error::Dimensions {
                op: OP,
                expected,
                found: keep,
            });
        }
        expect_len(OP, "scores", scores.len(), product(&[batch, tokens]))?;
        expect_len(OP, "picked", picked.len(), product(&[batch, keep]))?;
        let scores = &scores[..batch * tokens];
        if let Some(at) = scores.iter().position(|&score| score.to_f64().is_nan()) {
            return Err(Error::NotANumber {
                op: OP,
                what: "scores",
                at,
            });
        }
        if product(&[batch, keep]) == 0 {
            return Ok(());
        }
        for b in 0..batch {
            let scores = &scores[b * tokens..][..tokens];
            lowest(&mut picked[b * keep..][..keep], scores);
        }
        Ok(())
    }

    fn gather_tokens(
        &mut self,
        dims: TokenDims,
        keep: usize,
        out: &mut S::Buf,
        x: &S::Buf,
        picked: &S::Ids,
    ) -> Result<(), Error> {
        const OP: &str = "gather_tokens";
        let (out, x, picked) = (out.as_mut(), x.as_ref(), picked.as_ref());
        let kept = dims.with_tokens(keep);
        expect_len(OP, "x", x.len(), dims.len())?;
        expect_len(OP, "out", out.len(), kept.len())?;
        expect_len(OP, "picked", picked.len(), product(&[dims.batch, keep]))?;
        check_ids(OP, "picked", &picked[..dims.batch * keep], dims.tokens)?;
        if kept.is_empty() {
            return Ok(());
        }
        let d = dims.dim;
        for b in 0..dims.batch {
            let out = &mut out[b * (dims.prefix + keep) * d..][..(dims.prefix + keep) * d];
            let x = &x[b * (dims.prefix + dims.tokens) * d..][..(dims.prefix + dims.tokens) * d];
            let (prefix, patches) = out.split_at_mut(dims.prefix * d);
            prefix.copy_from_slice(&x[..dims.prefix * d]);
            for (out, &token) in rows_mut(patches, d).zip(&picked[b * keep..][..keep]) {
                out.copy_from_slice(&x[(dims.prefix + token as usize) * d..][..d]);
            }
        }
        Ok(())
    }

    fn gather_ids(
        &mut self,
        batch: usize,
        tokens: usize,
        keep: usize,
        out: &mut S::Ids,
        ids: Option<&S::Ids>,
        picked: &S::Ids,
    ) -> Result<(), Error> {
        const OP: &str = "gather_ids";
        let (out, picked) = (out.as_mut(), picked.as_ref());
        let count = product(&[batch, keep]);
        expect_len(OP, "out", out.len(), count)?;
        expect_len(OP, "picked", picked.len(), count)?;
        check_ids(OP, "picked", &picked[..count], tokens)?;
        match ids {
            None => out[..count].copy_from_slice(&picked[..count]),
            Some(ids) => {
                let ids = ids.as_ref();
                expect_len(OP, "ids", ids.len(), product(&[batch, tokens]))?;
                for (i, (out, &token)) in out.iter_mut().zip(picked).take(count).enumerate() {
                    *out = ids[i / keep * tokens + token as usize];
                }
            }
        }
        Ok(())
    }

    fn mean_pool(&mut self, dims: TokenDims, out: &mut S::Buf, x: &S::Buf) -> Result<(), Error> {
        const OP: &str = "mean_pool";
        let (out, x) = (out.as_mut(), x.as_ref());
        if dims.tokens == 0 {
            return Err(Error::Dimensions {
                op: OP,
                expected: "at least one patch token",
                found: 0,
            });
        }
        expect_len(OP, "x", x.len(), dims.len())?;
        expect_len(OP, "out", out.len(), product(&[dims.batch, dims.dim]))?;
        if dims.is_empty() {
            return Ok(());
        }
        for b in 0..dims.batch {
            let out = &mut out[b * dims.dim..][..dims.dim];
            out.fill(T::ZERO);
            for token in rows(patch_tokens(dims, x, b), dims.dim) {
                for (out, &x) in out.iter_mut().zip(token) {
                    *out += x;
                }
            }
            for out in out {
                *out = *out / T::from_usize(dims.tokens);
            }
        }
        Ok(())
    }
}

/// The indices of the lowest scores, as many as `picked` holds, in ascending order; of equal scores the lower index
/// first. `scores` holds no NaN and at least as many elements.
fn lowest<T: Float>(picked: &mut [u32], scores: &[T]) {
    let mut count = 0;
    for (token, &score) in scores.iter().enumerate() {
        // Only what is strictly greater moves back, so that the earlier of two equal tokens stays in front.
        let mut at = count;
        while at > 0 && scores[picked[at - 1] as usize] > score {
            at -= 1;
        }
        if at < picked.len() {
            count = (count + 1).min(picked.len());
            picked[at..count].rotate_right(1);
            picked[at] = token as u32;
        }
    }
}

fn add<T: Float>(out: &mut [T], a: &[T], b: &[T]) {
    for (out, (&a, &b)) in out.iter_mut().zip(a.iter().zip(b)) {
        *out = a + b;
    }
}

/// The patch tokens of sequence `b`: `[tokens, dim]`.
pub(super) fn patch_tokens<T>(dims: TokenDims, x: &[T], b: usize) -> &[T] {
    // Saturating, since tokens without width may be more than can be counted.
    let before = b.saturating_mul(dims.prefix.saturating_add(dims.tokens));
    let start = product(&[before.saturating_add(dims.prefix), dims.dim]);
    &x[start..][..dims.tokens * dims.dim]
}

/// Copies each wanted patch, its pixel (channel, row, column) to element `place(channel, row, column)`.
pub(super) fn copy_patches<T: Float>(
    op: &'static str,
    dims: PatchDims,
    out: &mut [T],
    images: &[T],
    ids: Option<&[u32]>,
    place: impl Fn(usize, usize, usize) -> usize,
) -> Result<(), Error> {
    dims.check(op, ids.is_some())?;
    expect_len(op, "images", images.len(), dims.images_len())?;
    expect_len(op, "out", out.len(), dims.patches_len())?;
    let count = product(&[dims.batch, dims.taken]);
    if let Some(ids) = ids {
        expect_len(op, "ids", ids.len(), count)?;
        check_ids(op, "ids", &ids[..count], dims.num_patches())?;
    }
    let (p, cols) = (dims.patch_size, dims.width / dims.patch_size);
    for (i, out) in rows_mut(&mut out[..dims.patches_len()], dims.patch_len()).enumerate() {
        let patch = ids.map_or(i % dims.taken, |ids| ids[i] as usize);
        let (top, left) = (patch / cols * p, patch % cols * p);
        for channel in 0..dims.channels {
            let plane = (i / dims.taken * dims.channels + channel) * dims.height * dims.width;
            for row in 0..p {
                let line = &images[plane + (top + row) * dims.width + left..][..p];
                for (col, &pixel) in line.iter().enumerate() {
                    out[place(channel, row, col)] = pixel;
                }
            }
        }
    }
    Ok(())
}

/// Gives `store` each output's index and place with `x @ weight^T + bias` of it.
pub(super) fn for_each_output<T: Float>(
    op: &'static str,
    dims: LinearDims,
    out: &mut [T],
    x: &[T],
    params: &[T],
    layer: Linear,
    mut store: impl FnMut(usize, &mut T, T),
) -> Result<(), Error> {
    expect_len(op, "x", x.len(), dims.in_len())?;
    expect_len(op, "out", out.len(), dims.out_len())?;
    let weight = param(op, "weight", params, layer.weight, dims.weight_len())?;
    let bias = param(op, "bias", params, layer.bias, dims.out_features)?;
    for (i, out) in out[..dims.out_len()].iter_mut().enumerate() {
        let (row, col) = (i / dims.out_features, i % dims.out_features);
        let x = &x[row * dims.in_features..][..dims.in_features];
        let weight = &weight[col * dims.in_features..][..dims.in_features];
        store(i, out, dot(x, weight) + bias[col]);
    }
    Ok(())
}

/// Normalises each row and gives `save` its index, mean and reciprocal standard deviation.
pub(super) fn layer_norm<T: Float>(
    op: &'static str,
    dims: RowDims,
    out: &mut [T],
    x: &[T],
    params: &[T],
    norm: Norm,
    mut save: impl FnMut(usize, T, T),
) -> Result<(), Error> {
    expect_len(op, "x", x.len(), dims.len())?;
    expect_len(op, "out", out.len(), dims.len())?;
    let weight = param(op, "weight", params, norm.weight, dims.dim)?;
    let bias = param(op, "bias", params, norm.bias, dims.dim)?;
    let pairs = rows_mut(&mut out[..dims.len()], dims.dim).zip(rows(x, dims.dim));
    for (row, (out, x)) in pairs.enumerate() {
        let (mean, rstd) = mean_rstd(x, 0);
        for (i, (out, &x)) in out.iter_mut().zip(x).enumerate() {
            *out = (x - mean) * rstd * weight[i] + bias[i];
        }
        save(row, mean, rstd);
    }
    Ok(())
}

/// Query (`part` 0), key (1) or value (2) of one token and head.
pub(super) fn head_of<T>(
    dims: AttentionDims,
    qkv: &[T],
    part: usize,
    b: usize,
    head: usize,
    token: usize,
) -> &[T] {
    &qkv[((b * dims.tokens + token) * 3 + part) * dims.dim() + head * dims.head_dim..]
        [..dims.head_dim]
}

/// `1 / sqrt(head_dim)`
pub(super) fn softmax_scale<T: Float>(dims: AttentionDims) -> T {
    T::ONE / T::from_usize(dims.head_dim).sqrt()
}

/// Attention, giving `save` the index `(b, head, query)` and the log-sum-exp of each row of scores.
pub(super) fn attention<T: Float>(
    op: &'static str,
    dims: AttentionDims,
    out: &mut [T],
    qkv: &[T],
    mut save: impl FnMut(usize, T),
) -> Result<(), Error> {
    expect_len(op, "qkv", qkv.len(), dims.qkv_len())?;
    expect_len(op, "out", out.len(), dims.out_len())?;
    if dims.out_len() == 0 {
        return Ok(());
    }
    let (n, scale) = (dims.tokens, softmax_scale::<T>(dims));
    for b in 0..dims.batch {
        for head in 0..dims.num_heads {
            for i in 0..n {
                let query = head_of(dims, qkv, 0, b, head, i);
                let score = |j| dot(query, head_of(dims, qkv, 1, b, head, j)) * scale;
                let largest = (0..n)
                    .map(score)
                    .fold(T::from_f64(f64::NEG_INFINITY), |a, b| b.max(a));
                let out =
                    &mut out[(b * n + i) * dims.dim() + head * dims.head_dim..][..dims.head_dim];
                out.fill(T::ZERO);
                let mut total = T::ZERO;
                for j in 0..n {
                    let weight = (score(j) - largest).exp();
                    total += weight;
                    for (out, &value) in out.iter_mut().zip(head_of(dims, qkv, 2, b, head, j)) {
                        *out += weight * value;
                    }
                }
                for out in out {
                    *out = *out / total;
                }
                save((b * dims.num_heads + head) * n + i, largest + total.ln());
            }
        }
    }
    Ok(())
}
