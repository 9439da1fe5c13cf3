//! The traits that a backend implements: one method per layer of this architecture.
//!
//! [`Backend`] is what inference needs, [`TrainBackend`] what training adds. Rules that hold for every method:
//!
//! - Buffers come from the caller, sized by the dimensions; longer ones are used at their front. After the model is
//!   built nothing allocates.
//! - Lengths and spans are checked before the first write, and errors are values.
//! - Matrices are row-major. Shapes use B for batch, N for tokens, D for width.
//! - The backend owns the number format of [`Backend::Buf`] and [`Backend::Params`] (f32, f64, bf16 …). Norms,
//!   softmax, standardisation and losses are computed in f32 at least; a [`TrainBackend::Vector`] holds f32 at least.
//! - Results may depend on the backend and the instruction set, never on the number of threads or on the run.
//! - What a method *adds to* is said by `+=` in its formula; everything else is overwritten.

use crate::error::{Error, product};

/// A contiguous piece of the flat parameter vector that [`crate::layout::Layout`] lays out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    /// First element.
    pub start: usize,
    /// Number of elements.
    pub len: usize,
}

impl Span {
    /// One past the last element; `usize::MAX` if that overflows.
    pub const fn end(self) -> usize {
        self.start.saturating_add(self.len)
    }
}

/// Parameters of a linear layer: `weight: [out_features, in_features]`, `bias: [out_features]`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Linear {
    /// Row-major, as PyTorch's `nn.Linear.weight`.
    pub weight: Span,
    /// Added to every row.
    pub bias: Span,
}

/// Parameters of a LayerNorm: `weight: [dim]`, `bias: [dim]`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Norm {
    /// Scale.
    pub weight: Span,
    /// Shift.
    pub bias: Span,
}

/// The variance offset of every LayerNorm, and of the target's standardisation.
pub const NORM_EPS: f64 = 1e-6;
/// Norms of the cosine loss are at least this (PyTorch's `cosine_similarity`, `eps`).
pub const COSINE_EPS: f64 = 1e-8;
/// Norms of the redundancy score are at least this.
pub const SCORE_EPS: f64 = 1e-12;

/// A matrix of `rows` rows of `dim` elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowDims {
    /// Number of rows.
    pub rows: usize,
    /// Elements of a row.
    pub dim: usize,
}

impl RowDims {
    /// Elements of the matrix.
    pub const fn len(self) -> usize {
        product(&[self.rows, self.dim])
    }

    /// Whether the matrix has no element.
    pub const fn is_empty(self) -> bool {
        self.len() == 0
    }
}

/// `[rows, in_features] -> [rows, out_features]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearDims {
    /// Rows of input and output.
    pub rows: usize,
    /// Width of the input.
    pub in_features: usize,
    /// Width of the output.
    pub out_features: usize,
}

impl LinearDims {
    /// Elements of the input.
    pub const fn in_len(self) -> usize {
        product(&[self.rows, self.in_features])
    }

    /// Elements of the output.
    pub const fn out_len(self) -> usize {
        product(&[self.rows, self.out_features])
    }

    /// Elements of the weight.
    pub const fn weight_len(self) -> usize {
        product(&[self.out_features, self.in_features])
    }
}

/// `batch` sequences of `tokens` tokens, `num_heads` heads of `head_dim`; D = `num_heads * head_dim`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionDims {
    /// Sequences; attention never crosses them.
    pub batch: usize,
    /// Tokens of each sequence.
    pub tokens: usize,
    /// Heads.
    pub num_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl AttentionDims {
    /// Width of a token.
    pub const fn dim(self) -> usize {
        product(&[self.num_heads, self.head_dim])
    }

    /// Elements of the output, `[B, N, D]`.
    pub const fn out_len(self) -> usize {
        product(&[self.batch, self.tokens, self.num_heads, self.head_dim])
    }

    /// Elements of `qkv`, `[B, N, 3, num_heads, head_dim]`.
    pub const fn qkv_len(self) -> usize {
        product(&[self.out_len(), 3])
    }

    /// Elements of the log-sum-exp, `[B, num_heads, N]`.
    pub const fn lse_len(self) -> usize {
        product(&[self.batch, self.num_heads, self.tokens])
    }
}

/// How pictures are cut. The patches of a picture are numbered row by row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PatchDims {
    /// Pictures.
    pub batch: usize,
    /// Channels of a picture.
    pub channels: usize,
    /// Rows of pixels, a multiple of `patch_size`.
    pub height: usize,
    /// Columns of pixels, a multiple of `patch_size`.
    pub width: usize,
    /// Edge of a patch in pixels, at least 1.
    pub patch_size: usize,
    /// Patches taken from each picture.
    pub taken: usize,
}

impl PatchDims {
    /// Patches a picture has.
    pub const fn num_patches(self) -> usize {
        match (
            self.height.checked_div(self.patch_size),
            self.width.checked_div(self.patch_size),
        ) {
            (Some(rows), Some(cols)) => product(&[rows, cols]),
            _ => 0,
        }
    }

    /// Elements of one patch.
    pub const fn patch_len(self) -> usize {
        product(&[self.channels, self.patch_size, self.patch_size])
    }

    /// Elements of the pictures, `[B, channels, height, width]`.
    pub const fn images_len(self) -> usize {
        product(&[self.batch, self.channels, self.height, self.width])
    }

    /// Elements of the patches taken, `[B, taken, patch_len]`.
    pub const fn patches_len(self) -> usize {
        product(&[self.batch, self.taken, self.patch_len()])
    }

    /// Checks what lengths cannot: the picture is a whole number of patches, and without ids all are taken.
    ///
    /// # Errors
    /// [`Error::Dimensions`] naming what must hold.
    pub fn check(self, op: &'static str, has_ids: bool) -> Result<(), Error> {
        if self.patch_size == 0 {
            return Err(Error::Dimensions {
                op,
                expected: "a patch size of at least 1",
                found: 0,
            });
        }
        for found in [self.height, self.width] {
            if !found.is_multiple_of(self.patch_size) {
                return Err(Error::Dimensions {
                    op,
                    expected: "an image size divisible by the patch size",
                    found,
                });
            }
        }
        if !has_ids && self.taken != self.num_patches() {
            return Err(Error::Dimensions {
                op,
                expected: "all patches where no ids are given",
                found: self.taken,
            });
        }
        Ok(())
    }
}

/// `[batch, prefix + tokens, dim]`: sequences with `prefix` tokens (the class token, or none) before the patch tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenDims {
    /// Sequences.
    pub batch: usize,
    /// Tokens at the front that are never scored, dropped or pooled.
    pub prefix: usize,
    /// Patch tokens.
    pub tokens: usize,
    /// Width.
    pub dim: usize,
}

impl TokenDims {
    /// Elements of the sequences.
    pub const fn len(self) -> usize {
        product(&[
            self.batch,
            self.prefix.saturating_add(self.tokens),
            self.dim,
        ])
    }

    /// Whether there is no element.
    pub const fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// The same sequences with `tokens` patch tokens.
    pub const fn with_tokens(self, tokens: usize) -> Self {
        Self { tokens, ..self }
    }
}

/// Where a student's or decoder's tokens get their positions from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EmbedParams {
    /// `[dim]`; put at the front of each sequence when given.
    pub cls_token: Option<Span>,
    /// `[1 + num_patches, dim]`; row 0 belongs to the class token.
    pub pos_embed: Span,
}

/// Sequence of the decoder: class token and visible tokens, then one mask token per target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecoderDims {
    /// Sequences.
    pub batch: usize,
    /// Visible patch tokens, the class token not counted.
    pub visible: usize,
    /// Positions to predict.
    pub targets: usize,
    /// Width of the decoder.
    pub dim: usize,
}

impl DecoderDims {
    /// Elements of the latent, `[B, 1 + visible, dim]`.
    pub const fn latent_len(self) -> usize {
        product(&[self.batch, self.visible.saturating_add(1), self.dim])
    }

    /// Elements of the decoder's sequence, `[B, 1 + visible + targets, dim]`.
    pub const fn len(self) -> usize {
        product(&[
            self.batch,
            self.visible.saturating_add(1).saturating_add(self.targets),
            self.dim,
        ])
    }

    /// Whether there is no element.
    pub const fn is_empty(self) -> bool {
        self.len() == 0
    }
}

/// What is done to each output of a linear layer before it is stored.
///
/// It states the result, not the method: a backend that cannot fuse runs a second pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Epilogue {
    /// `out[i, j] = acc[i, j] + bias[j]`
    Bias,
    /// `out[i, j] = gelu(acc[i, j] + bias[j])`, the exact (erf) GELU.
    BiasGelu,
    /// `out[i, j] += acc[i, j] + bias[j]`; `out` is the residual stream.
    BiasResidual,
}

/// What inference needs. Methods write only where the caller says, and never allocate (but for [`Backend::buf`] and
/// [`Backend::ids`], which a model calls only while it is built).
pub trait Backend {
    /// What can go wrong.
    type Error: core::error::Error + From<Error>;
    /// Activations: a piece of a static arena, `Vec<f32>`, device memory.
    type Buf;
    /// Token positions and sequence indices, as `u32`.
    type Ids;
    /// All parameters of a model, in the backend's own format and order; operations name theirs by [`Span`].
    type Params;

    /// A buffer of `len` zeroed elements.
    ///
    /// # Errors
    /// If there is no memory left for it.
    fn buf(&mut self, len: usize) -> Result<Self::Buf, Self::Error>;

    /// An index buffer of `len` zeros.
    ///
    /// # Errors
    /// If there is no memory left for it.
    fn ids(&mut self, len: usize) -> Result<Self::Ids, Self::Error>;

    /// Copies host values to the front of `to`.
    ///
    /// # Errors
    /// If `to` is shorter than `from`.
    fn write(&mut self, to: &mut Self::Buf, from: &[f32]) -> Result<(), Self::Error>;

    /// Copies the front of `from` to the host, until `to` is full.
    ///
    /// # Errors
    /// If `from` is shorter than `to`.
    fn read(&mut self, to: &mut [f32], from: &Self::Buf) -> Result<(), Self::Error>;

    /// Copies host indices to the front of `to`.
    ///
    /// # Errors
    /// If `to` is shorter than `from`.
    fn write_ids(&mut self, to: &mut Self::Ids, from: &[u32]) -> Result<(), Self::Error>;

    /// Copies the front of `from` to the host, until `to` is full.
    ///
    /// # Errors
    /// If `from` is shorter than `to`.
    fn read_ids(&mut self, to: &mut [u32], from: &Self::Ids) -> Result<(), Self::Error>;

    /// Cuts the patches `ids` (all of them for `None`) out of the pictures.
    ///
    /// # Shapes
    /// `images: [B, channels, height, width]`, `ids: [B, taken]`, `out: [B, taken, channels * p * p]` in the order of a
    /// flattened convolution kernel (channel, row, column).
    ///
    /// # Errors
    /// If a buffer is too short, an id is no patch, or `dims` does not [`check`](PatchDims::check).
    fn gather_patches(
        &mut self,
        dims: PatchDims,
        out: &mut Self::Buf,
        images: &Self::Buf,
        ids: Option<&Self::Ids>,
    ) -> Result<(), Self::Error>;

    /// Adds positions to the projected patches, and puts the class token in front where `embed` names one
    /// (`dims.prefix` is then 1, else 0).
    ///
    /// `out[b, 0] = cls_token + pos_embed[0]`, `out[b, prefix + j] = x[b, j] + pos_embed[1 + ids[b, j]]`; without ids
    /// patch `j` has position `j`.
    ///
    /// # Shapes
    /// `x: [B, tokens, dim]`, `ids: [B, tokens]`, `out: [B, prefix + tokens, dim]`.
    ///
    /// # Errors
    /// If a buffer or span is too short or an id has no position.
    fn embed_tokens(
        &mut self,
        dims: TokenDims,
        out: &mut Self::Buf,
        x: &Self::Buf,
        ids: Option<&Self::Ids>,
        params: &Self::Params,
        embed: EmbedParams,
    ) -> Result<(), Self::Error>;

    /// `out = epilogue(x @ weight^T)`.
    ///
    /// # Shapes
    /// `x: [rows, in_features]`, `out: [rows, out_features]`.
    ///
    /// # Errors
    /// If a buffer or span is too short.
    fn linear(
        &mut self,
        dims: LinearDims,
        out: &mut Self::Buf,
        x: &Self::Buf,
        params: &Self::Params,
        layer: Linear,
        epilogue: Epilogue,
    ) -> Result<(), Self::Error>;

    /// `out[i] = (x[i] - mean(x[i])) / sqrt(var(x[i]) + NORM_EPS) * weight + bias`, with the biased variance.
    ///
    /// # Shapes
    /// `x, out: [rows, dim]`.
    ///
    /// # Errors
    /// If a buffer or span is too short.
    fn layer_norm(
        &mut self,
        dims: RowDims,
        out: &mut Self::Buf,
        x: &Self::Buf,
        params: &Self::Params,
        norm: Norm,
    ) -> Result<(), Self::Error>;

    /// `out = softmax(q @ k^T / sqrt(head_dim)) @ v`, per sequence and head.
    ///
    /// # Shapes
    /// `qkv: [B, N, 3, num_heads, head_dim]`, `out: [B, N, num_heads * head_dim]`.
    ///
    /// # Errors
    /// If a buffer is too short.
    fn attention(
        &mut self,
        dims: AttentionDims,
        out: &mut Self::Buf,
        qkv: &Self::Buf,
    ) -> Result<(), Self::Error>;

    /// Redundancy of each patch token: the dot product of the unit-length token with the mean of its sequence's
    /// unit-length tokens (that mean is not normalised again). Norms are at least [`SCORE_EPS`].
    ///
    /// # Shapes
    /// `x: [B, prefix + tokens, dim]`, `scores: [B, tokens]`.
    ///
    /// # Errors
    /// If a buffer is too short.
    fn mean_similarity(
        &mut self,
        dims: TokenDims,
        scores: &mut Self::Buf,
        x: &Self::Buf,
    ) -> Result<(), Self::Error>;

    /// The `keep` tokens of each sequence with the lowest scores, in ascending order of score; of equal scores the
    /// lower index comes first.
    ///
    /// # Shapes
    /// `scores: [B, tokens]`, `picked: [B, keep]` indices into `0..tokens`.
    ///
    /// # Errors
    /// If a buffer is too short, `keep > tokens`, or a score is NaN.
    fn select(
        &mut self,
        batch: usize,
        tokens: usize,
        keep: usize,
        picked: &mut Self::Ids,
        scores: &Self::Buf,
    ) -> Result<(), Self::Error>;

    /// Keeps the prefix and the picked patch tokens: `out[b, prefix + j] = x[b, prefix + picked[b, j]]`.
    ///
    /// # Shapes
    /// `x: [B, prefix + tokens, dim]`, `picked: [B, keep]`, `out: [B, prefix + keep, dim]`.
    ///
    /// # Errors
    /// If a buffer is too short or an index is out of range.
    fn gather_tokens(
        &mut self,
        dims: TokenDims,
        keep: usize,
        out: &mut Self::Buf,
        x: &Self::Buf,
        picked: &Self::Ids,
    ) -> Result<(), Self::Error>;

    /// Follows positions through a selection: `out[b, j] = ids[b, picked[b, j]]`, or `picked[b, j]` without ids.
    ///
    /// # Shapes
    /// `ids: [B, tokens]`, `picked, out: [B, keep]`.
    ///
    /// # Errors
    /// If a buffer is too short or an index is out of range.
    fn gather_ids(
        &mut self,
        batch: usize,
        tokens: usize,
        keep: usize,
        out: &mut Self::Ids,
        ids: Option<&Self::Ids>,
        picked: &Self::Ids,
    ) -> Result<(), Self::Error>;

    /// Mean of each sequence's patch tokens.
    ///
    /// # Shapes
    /// `x: [B, prefix + tokens, dim]`, `out: [B, dim]`.
    ///
    /// # Errors
    /// If a buffer is too short or there is no patch token.
    fn mean_pool(
        &mut self,
        dims: TokenDims,
        out: &mut Self::Buf,
        x: &Self::Buf,
    ) -> Result<(), Self::Error>;
}

#[cfg(feature = "train")]
pub use train::*;

#[cfg(feature = "train")]
mod train {
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

        /// Parameters laid out by `layout`, with the given values.
        ///
        /// # Errors
        /// If `values` is shorter than the layout or memory is short.
        fn params(&mut self, layout: &Layout, values: &[f32]) -> Result<Self::Params, Self::Error>;

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

        /// [`Backend::linear`] with [`Epilogue::BiasGelu`] that also saves what goes into the GELU.
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

        /// `d_x = d_y @ weight`, multiplied by `gelu'(pre_gelu)` element by element where that is given.
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

        /// Gradient of attention with respect to `qkv`, the probabilities recomputed from `lse`.
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
            scores: &mut Self::Buf,
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
}
