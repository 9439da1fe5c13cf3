//! What training adds to the contract.

use super::*;
use crate::layout::Layout;

/// Whether a gradient is stored or added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accum {
    /// `out = value`
    Replace,
    /// `out += value`
    Add,
}

/// Parameters that one optimizer pass treats alike.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Segment {
    /// Which parameters.
    pub span: Span,
    /// Decoupled weight decay, as a fraction of the learning rate.
    pub weight_decay: f64,
    /// Factor on the learning rate (layer-wise decay).
    pub lr_scale: f64,
    /// Whether the teacher follows.
    pub ema: bool,
}

/// Constants of one AdamW step (Loshchilov & Hutter, 2019).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the mean gradient.
    pub beta1: f64,
    /// Decay of the mean squared gradient.
    pub beta2: f64,
    /// Added to the root of the mean squared gradient.
    pub eps: f64,
    /// Number of this step, from 1.
    pub step: u64,
    /// Momentum of the teacher, `teacher += (1 - momentum) * (student - teacher)`.
    pub momentum: f64,
}

/// Scales the gradient so that its norm, found at `norms[at]`, is at most `max_norm`.
#[derive(Debug)]
pub struct Clip<'a, V> {
    /// Where the norm is.
    pub norms: &'a V,
    /// At which element.
    pub at: usize,
    /// The bound.
    pub max_norm: f64,
}

impl<V> Clone for Clip<'_, V> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<V> Copy for Clip<'_, V> {}

/// What training adds: forwards that save, their backwards, losses, optimizer.
///
/// Gradients of parameters are added to (`+=`) at their span in `grads`, so that micro-batches accumulate.
pub trait TrainBackend: Backend {
    /// A flat vector, f32 at least: gradients, moments, scalars.
    type Vector;

    /// A zeroed vector.
    ///
    /// # Errors
    /// If there is no memory left for it.
    fn vector(&mut self, len: usize) -> Result<Self::Vector, Self::Error>;

    /// Copies host values to `to[at..]`.
    ///
    /// # Errors
    /// If they do not fit.
    fn write_vector(
        &mut self,
        to: &mut Self::Vector,
        at: usize,
        from: &[f32],
    ) -> Result<(), Self::Error>;

    /// Copies `from[at..]` to the host, until `to` is full.
    ///
    /// # Errors
    /// If there are not as many.
    fn read_vector(
        &mut self,
        to: &mut [f32],
        from: &Self::Vector,
        at: usize,
    ) -> Result<(), Self::Error>;

    /// Starts to copy `from[at..at + len]` to the host, behind all operations so far, and does not wait for it.
    /// [`TrainBackend::finish_read`] of the same elements returns them; until then nobody may write them or start another.
    ///
    /// # Errors
    /// If there are not as many, at the latest when it is finished.
    fn start_read(
        &mut self,
        _from: &Self::Vector,
        _at: usize,
        _len: usize,
    ) -> Result<(), Self::Error> {
        Ok(())
    }

    /// Waits for what [`TrainBackend::start_read`] has started, and for no operation behind it.
    ///
    /// # Errors
    /// As [`TrainBackend::read_vector`].
    fn finish_read(
        &mut self,
        to: &mut [f32],
        from: &Self::Vector,
        at: usize,
    ) -> Result<(), Self::Error> {
        self.read_vector(to, from, at)
    }

    /// Whether operations are only queued. Reading then waits for all of them, and is better done seldom.
    fn is_queued(&self) -> bool {
        false
    }

    /// The next thing that is not as it should be though everything works, such as work that runs slower than it might. Each is told
    /// once.
    fn warning(&mut self) -> Option<&str> {
        None
    }

    /// Waits until all operations so far are done: for who wants to know how long they take.
    ///
    /// # Errors
    /// What a device found in them and has not reported yet.
    fn wait(&mut self) -> Result<(), Self::Error> {
        Ok(())
    }

    /// Starts the device's clock, if it has one, behind all operations so far.
    ///
    /// # Errors
    /// As [`TrainBackend::wait`].
    fn start_clock(&mut self) -> Result<(), Self::Error> {
        self.wait()
    }

    /// Waits as [`TrainBackend::wait`], and returns the seconds that the operations since [`TrainBackend::start_clock`] took by the
    /// device's clock; `None` where the host's tells as much.
    ///
    /// # Errors
    /// As [`TrainBackend::wait`].
    fn stop_clock(&mut self) -> Result<Option<f64>, Self::Error> {
        self.wait().map(|()| None)
    }

    /// Parameters laid out by `layout`, with the given values.
    ///
    /// # Errors
    /// If `values` is shorter than the layout or memory is short.
    fn params(&mut self, layout: &Layout, values: &[f32]) -> Result<Self::Params, Self::Error>;

    /// [`TrainBackend::params`] for a teacher: they have no gradient, so a backend may compute with them in a lower
    /// precision. Their moving average is kept in f32 at least.
    ///
    /// # Errors
    /// As [`TrainBackend::params`].
    fn teacher_params(
        &mut self,
        layout: &Layout,
        values: &[f32],
    ) -> Result<Self::Params, Self::Error> {
        self.params(layout, values)
    }

    /// [`TrainBackend::params`] for forwards alone: a backend may keep weights in the order that its products read.
    /// No other method than those of [`Backend`] need take them.
    ///
    /// # Errors
    /// As [`TrainBackend::params`].
    fn frozen_params(
        &mut self,
        layout: &Layout,
        values: &[f32],
    ) -> Result<Self::Params, Self::Error> {
        self.params(layout, values)
    }

    /// Copies the parameters of `span` to the host.
    ///
    /// # Errors
    /// If `to` is shorter than the span or the span leaves the parameters.
    fn read_params(
        &mut self,
        to: &mut [f32],
        from: &Self::Params,
        span: Span,
    ) -> Result<(), Self::Error>;

    /// [`Backend::linear`] with [`Epilogue::BiasGelu`] that also saves what goes into the GELU, for
    /// [`TrainBackend::linear_backward_input`] to read.
    ///
    /// # Shapes
    /// `out, pre_gelu: [rows, out_features]`.
    ///
    /// # Errors
    /// If a buffer or span is too short.
    fn linear_gelu_saving(
        &mut self,
        dims: LinearDims,
        out: &mut Self::Buf,
        pre_gelu: &mut Self::Buf,
        x: &Self::Buf,
        params: &Self::Params,
        layer: Linear,
    ) -> Result<(), Self::Error>;

    /// `out = residual + scale[i / rows_per_scale] * (x @ weight^T + bias)`, row by row; `scale` 1 where it is
    /// `None`. The scale is stochastic depth's: 0 or `1 / keep probability` per sample.
    ///
    /// # Shapes
    /// `residual, out: [rows, out_features]`, `scale: [rows / rows_per_scale]`.
    ///
    /// # Errors
    /// If a buffer or span is too short or `rows_per_scale` does not divide `rows`.
    fn linear_residual(
        &mut self,
        dims: LinearDims,
        out: &mut Self::Buf,
        residual: &Self::Buf,
        x: &Self::Buf,
        params: &Self::Params,
        layer: Linear,
        scale: Option<(&Self::Buf, usize)>,
    ) -> Result<(), Self::Error>;

    /// `out[i] = scale[i / rows_per_scale] * x[i]`: the backward of stochastic depth.
    ///
    /// # Shapes
    /// `x, out: [rows, dim]`, `scale: [rows / rows_per_scale]`.
    ///
    /// # Errors
    /// If a buffer is too short or `rows_per_scale` does not divide `rows`.
    fn scale_rows(
        &mut self,
        dims: RowDims,
        out: &mut Self::Buf,
        x: &Self::Buf,
        scale: &Self::Buf,
        rows_per_scale: usize,
    ) -> Result<(), Self::Error>;

    /// `d_x = d_y @ weight`, multiplied by `gelu'(pre_gelu)` element by element where that is given: `d_x` is then another linear
    /// layer's `d_y`, for its backward to read.
    ///
    /// # Shapes
    /// `d_y: [rows, out_features]`, `d_x, pre_gelu: [rows, in_features]`.
    ///
    /// # Errors
    /// If a buffer or span is too short.
    fn linear_backward_input(
        &mut self,
        dims: LinearDims,
        d_x: &mut Self::Buf,
        d_y: &Self::Buf,
        params: &Self::Params,
        layer: Linear,
        pre_gelu: Option<&Self::Buf>,
    ) -> Result<(), Self::Error>;

    /// `grads[weight] += d_y^T @ x`, `grads[bias] += sum over rows of d_y`.
    ///
    /// # Shapes
    /// `d_y: [rows, out_features]`, `x: [rows, in_features]`.
    ///
    /// # Errors
    /// If a buffer or span is too short.
    fn linear_backward_params(
        &mut self,
        dims: LinearDims,
        grads: &mut Self::Vector,
        layer: Linear,
        d_y: &Self::Buf,
        x: &Self::Buf,
    ) -> Result<(), Self::Error>;

    /// [`Backend::layer_norm`] that saves `stats[i] = (mean, rstd)` of each row.
    ///
    /// # Shapes
    /// `x, out: [rows, dim]`, `stats: [rows, 2]`.
    ///
    /// # Errors
    /// If a buffer or span is too short.
    fn layer_norm_saving(
        &mut self,
        dims: RowDims,
        out: &mut Self::Buf,
        stats: &mut Self::Vector,
        x: &Self::Buf,
        params: &Self::Params,
        norm: Norm,
    ) -> Result<(), Self::Error>;

    /// With `h = (x - mean) * rstd` and `g = d_y * weight`:
    /// `d_x (=, +=) rstd * (g - mean(g) - h * mean(g * h))`, `grads[weight] += sum of d_y * h`,
    /// `grads[bias] += sum of d_y`.
    ///
    /// # Shapes
    /// `d_x, d_y, x: [rows, dim]`, `stats: [rows, 2]`.
    ///
    /// # Errors
    /// If a buffer or span is too short.
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
    ) -> Result<(), Self::Error>;

    /// [`Backend::attention`] that saves the log-sum-exp of each row of scores.
    ///
    /// # Shapes
    /// `lse: [B, num_heads, N]`, natural logarithm of the sum of `exp(q . k / sqrt(head_dim))`.
    ///
    /// # Errors
    /// If a buffer is too short.
    fn attention_saving(
        &mut self,
        dims: AttentionDims,
        out: &mut Self::Buf,
        lse: &mut Self::Vector,
        qkv: &Self::Buf,
    ) -> Result<(), Self::Error>;

    /// Gradient of attention with respect to `qkv`, the probabilities recomputed from `lse`; `d_qkv` is for the backward of the
    /// linear layer before to read.
    ///
    /// # Shapes
    /// `d_qkv, qkv: [B, N, 3, num_heads, head_dim]`, `d_out, out: [B, N, D]`, `lse: [B, num_heads, N]`.
    ///
    /// # Errors
    /// If a buffer is too short.
    fn attention_backward(
        &mut self,
        dims: AttentionDims,
        d_qkv: &mut Self::Buf,
        d_out: &Self::Buf,
        qkv: &Self::Buf,
        out: &Self::Buf,
        lse: &Self::Vector,
    ) -> Result<(), Self::Error>;

    /// `d_x[b, j] = d_out[b, prefix + j]`, and with a class token `grads[cls_token] += sum over b of d_out[b, 0]`.
    /// Positions are fixed.
    ///
    /// # Shapes
    /// `d_x: [B, tokens, dim]`, `d_out: [B, prefix + tokens, dim]`.
    ///
    /// # Errors
    /// If a buffer or span is too short.
    fn embed_tokens_backward(
        &mut self,
        dims: TokenDims,
        d_x: &mut Self::Buf,
        grads: &mut Self::Vector,
        d_out: &Self::Buf,
        embed: EmbedParams,
    ) -> Result<(), Self::Error>;

    /// The decoder's sequence: the projected latent, then a mask token per target, each with its position.
    ///
    /// `out[b, 0] = x[b, 0] + pos[0]`, `out[b, 1 + j] = x[b, 1 + j] + pos[1 + ids_visible[b, j]]`,
    /// `out[b, 1 + visible + j] = mask_token + pos[1 + ids_target[b, j]]`.
    ///
    /// # Shapes
    /// `x: [B, 1 + visible, dim]`, `out: [B, 1 + visible + targets, dim]`, `ids_visible: [B, visible]`,
    /// `ids_target: [B, targets]`, `mask_token: [dim]`, `pos_embed: [1 + num_patches, dim]`.
    ///
    /// # Errors
    /// If a buffer or span is too short or an id has no position.
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
    ) -> Result<(), Self::Error>;

    /// `d_x = d_out[:, ..1 + visible]`, `grads[mask_token] += sum of d_out[:, 1 + visible..]`.
    ///
    /// # Shapes
    /// As [`TrainBackend::decoder_tokens`].
    ///
    /// # Errors
    /// If a buffer or span is too short.
    fn decoder_tokens_backward(
        &mut self,
        dims: DecoderDims,
        d_x: &mut Self::Buf,
        grads: &mut Self::Vector,
        d_out: &Self::Buf,
        mask_token: Span,
    ) -> Result<(), Self::Error>;

    /// The patch tokens without the prefix: `out[b, j] = x[b, prefix + j]`.
    ///
    /// # Shapes
    /// `x: [B, prefix + tokens, dim]`, `out: [B, tokens, dim]`.
    ///
    /// # Errors
    /// If a buffer is too short.
    fn strip_prefix(
        &mut self,
        dims: TokenDims,
        out: &mut Self::Buf,
        x: &Self::Buf,
    ) -> Result<(), Self::Error>;

    /// Backward of [`TrainBackend::strip_prefix`]: the prefix gets zeros.
    ///
    /// # Shapes
    /// `d_x: [B, prefix + tokens, dim]`, `d_out: [B, tokens, dim]`.
    ///
    /// # Errors
    /// If a buffer is too short.
    fn strip_prefix_backward(
        &mut self,
        dims: TokenDims,
        d_x: &mut Self::Buf,
        d_out: &Self::Buf,
    ) -> Result<(), Self::Error>;

    /// Backward of [`Backend::gather_tokens`]: dropped tokens get zeros.
    ///
    /// # Shapes
    /// `d_x: [B, prefix + tokens, dim]`, `d_out: [B, prefix + keep, dim]`, `picked: [B, keep]`, no index twice.
    ///
    /// # Errors
    /// If a buffer is too short or an index is out of range.
    fn gather_tokens_backward(
        &mut self,
        dims: TokenDims,
        keep: usize,
        d_x: &mut Self::Buf,
        d_out: &Self::Buf,
        picked: &Self::Ids,
    ) -> Result<(), Self::Error>;

    /// Backward of [`Backend::mean_pool`]: `d_x[b, prefix + j] = d_out[b] / tokens`, zeros at the prefix.
    ///
    /// # Shapes
    /// `d_x: [B, prefix + tokens, dim]`, `d_out: [B, dim]`.
    ///
    /// # Errors
    /// If a buffer is too short.
    fn mean_pool_backward(
        &mut self,
        dims: TokenDims,
        d_x: &mut Self::Buf,
        d_out: &Self::Buf,
    ) -> Result<(), Self::Error>;

    /// Order of the tokens in a QR decomposition with column pivoting, the exact measure of redundancy that the mean
    /// similarity approximates: the token that is chosen first has score 0, the next 1, …
    ///
    /// Each step takes the token with the largest residual (the lower index of equal ones) and removes its
    /// direction from the others. Tokens are used at their own length.
    ///
    /// # Shapes
    /// `x: [B, prefix + tokens, dim]`, `scores: [B, tokens]`.
    ///
    /// # Errors
    /// If a buffer is too short or a token is NaN.
    fn pivoted_qr_scores(
        &mut self,
        dims: TokenDims,
        scores: &mut Self::Scores,
        x: &Self::Buf,
    ) -> Result<(), Self::Error>;

    /// `out[i] = (x[i] - mean(x[i])) / sqrt(var(x[i]) + NORM_EPS)`, with the unbiased variance.
    ///
    /// # Shapes
    /// `x, out: [rows, dim]`, `dim` at least 2.
    ///
    /// # Errors
    /// If a buffer is too short or `dim < 2`.
    fn standardise(
        &mut self,
        dims: RowDims,
        out: &mut Self::Buf,
        x: &Self::Buf,
    ) -> Result<(), Self::Error>;

    /// Mean over the columns of the (biased) standard deviation of each column: 0 when all rows are equal (a collapsed
    /// teacher), near 1 for standardised rows that have nothing in common. Stored at `out[at]`.
    ///
    /// # Shapes
    /// `x: [rows, dim]`.
    ///
    /// # Errors
    /// If a buffer is too short or there is no row.
    fn feature_spread(
        &mut self,
        dims: RowDims,
        out: &mut Self::Vector,
        at: usize,
        x: &Self::Buf,
    ) -> Result<(), Self::Error>;

    /// `loss = 1 - mean over rows of cos(pred, target)`; `losses[at] += scale * loss`, and
    /// `d_pred = scale * d loss / d pred`. `scale` is 1 over the number of micro-batches.
    ///
    /// # Shapes
    /// `pred, target, d_pred: [rows, dim]`.
    ///
    /// # Errors
    /// If a buffer is too short or there is no row.
    fn cosine_loss(
        &mut self,
        dims: RowDims,
        d_pred: &mut Self::Buf,
        losses: &mut Self::Vector,
        at: usize,
        pred: &Self::Buf,
        target: &Self::Buf,
        scale: f64,
    ) -> Result<(), Self::Error>;

    /// As [`TrainBackend::cosine_loss`], for the mean squared error over all elements (MAE).
    ///
    /// # Shapes
    /// `pred, target, d_pred: [rows, dim]`.
    ///
    /// # Errors
    /// If a buffer is too short or there is no element.
    fn mse_loss(
        &mut self,
        dims: RowDims,
        d_pred: &mut Self::Buf,
        losses: &mut Self::Vector,
        at: usize,
        pred: &Self::Buf,
        target: &Self::Buf,
        scale: f64,
    ) -> Result<(), Self::Error>;

    /// As [`TrainBackend::cosine_loss`], for the mean over rows of the cross-entropy of `softmax(logits)` against
    /// `target`, a distribution per row (one-hot, smoothed or mixed labels).
    ///
    /// # Shapes
    /// `logits, target, d_logits: [rows, dim]`, `dim` the number of classes.
    ///
    /// # Errors
    /// If a buffer is too short or there is no row.
    fn cross_entropy(
        &mut self,
        dims: RowDims,
        d_logits: &mut Self::Buf,
        losses: &mut Self::Vector,
        at: usize,
        logits: &Self::Buf,
        target: &Self::Buf,
        scale: f64,
    ) -> Result<(), Self::Error>;

    /// Pixels of the patches `ids` in the order of MAE's target (row, column, channel).
    ///
    /// # Shapes
    /// `images: [B, channels, height, width]`, `ids: [B, taken]`, `out: [B, taken, p * p * channels]`.
    ///
    /// # Errors
    /// If a buffer is too short, an id is no patch, or `dims` does not [`check`](PatchDims::check).
    fn pixel_targets(
        &mut self,
        dims: PatchDims,
        out: &mut Self::Buf,
        images: &Self::Buf,
        ids: &Self::Ids,
    ) -> Result<(), Self::Error>;

    /// Sets the elements of `span` to zero.
    ///
    /// # Errors
    /// If the span leaves the vector.
    fn zero(&mut self, x: &mut Self::Vector, span: Span) -> Result<(), Self::Error>;

    /// `to[at + i] = from[span.start + i]` for `i < span.len`, without the host.
    ///
    /// # Errors
    /// If the span leaves `from`, or what it holds does not fit.
    fn copy_vector(
        &mut self,
        to: &mut Self::Vector,
        at: usize,
        from: &Self::Vector,
        span: Span,
    ) -> Result<(), Self::Error>;

    /// `out[at] = sqrt(sum of x[i]^2)`.
    ///
    /// # Errors
    /// If `out` is too short.
    fn norm(
        &mut self,
        out: &mut Self::Vector,
        at: usize,
        x: &Self::Vector,
    ) -> Result<(), Self::Error>;

    /// One pass over memory: clip, AdamW on `student`, the teacher's moving average, gradients back to zero.
    ///
    /// For each element of a segment, with `g` the clipped gradient, `lr' = lr * lr_scale` and `t` the step:
    /// `m = beta1 * m + (1 - beta1) * g`, `v = beta2 * v + (1 - beta2) * g^2`,
    /// `w = w * (1 - lr' * weight_decay) - lr' * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)`, and where
    /// the segment has `ema` and a teacher is given `teacher += (1 - momentum) * (w - teacher)`.
    /// `grads` is zero afterwards. Parameters in no segment stay as they are. Segments do not overlap.
    ///
    /// # Errors
    /// If a segment leaves one of the vectors.
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
    ) -> Result<(), Self::Error>;
}
