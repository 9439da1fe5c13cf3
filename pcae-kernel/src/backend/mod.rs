//! The traits that a backend implements: one method per layer of this architecture.
//!
//! [`Backend`] is what inference needs, [`TrainBackend`] what training adds. Rules that hold for every method:
//!
//! - Buffers come from the caller, sized by the dimensions; longer ones are used at their front. After the model is
//!   built nothing allocates.
//! - Lengths and spans are checked before the first write, and errors are values. What only a device can see, an index
//!   out of range or a NaN among scores, may be reported by the next read instead, whatever it reads; outputs of the
//!   call are then undefined, but nothing else was touched.
//! - Matrices are row-major. Shapes use B for batch, N for tokens, D for width.
//! - The backend owns the number format of [`Backend::Buf`] and [`Backend::Params`] (f32, f64, bf16 …). Norms,
//!   softmax, standardisation and losses are computed in f32 at least; a [`TrainBackend::Vector`] holds f32 at least.
//! - What is said to be for linear layers or attention to read may be held in the format of their products, narrower than
//!   other activations. They, their backwards and [`Backend::read`] read it; another method may refuse it.
//! - Results may depend on the backend and the instruction set, never on the number of threads or on the run.
//! - What a method *adds to* is said by `+=` in its formula; everything else is overwritten.

mod block;
mod dims;
#[cfg(feature = "train")]
mod train;

pub use block::block_by_layers;
pub use dims::*;
#[cfg(feature = "train")]
pub use train::*;

use crate::error::Error;
use crate::layout::BlockParams;

/// What is done to each output of a linear layer before it is stored.
///
/// It states the result, not the method: a backend that cannot fuse runs a second pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Epilogue {
    /// `out[i, j] = acc[i, j] + bias[j]`
    Bias,
    /// [`Epilogue::Bias`] of queries, keys and values, for attention to read.
    BiasQkv,
    /// `out[i, j] = gelu(acc[i, j] + bias[j])`, the exact (erf) GELU, for linear layers to read.
    BiasGelu,
    /// `out[i, j] += acc[i, j] + bias[j]`; `out` is the residual stream.
    BiasResidual,
}

/// What inference needs. Methods write only where the caller says, and never allocate (but for [`Backend::buf`],
/// [`Backend::ids`] and [`Backend::scores`], which a model calls only while it is built).
pub trait Backend {
    /// What can go wrong.
    type Error: core::error::Error + From<Error>;
    /// Activations: a piece of a static arena, `Vec<f32>`, device memory.
    type Buf;
    /// Token positions and sequence indices, as `u32`.
    type Ids;
    /// Scores of tokens, f32 at least: in a narrower format tokens would tie.
    type Scores;
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

    /// Room for `len` scores, zeroed.
    ///
    /// # Errors
    /// If there is no memory left for it.
    fn scores(&mut self, len: usize) -> Result<Self::Scores, Self::Error>;

    /// Copies host values to the front of `to`.
    ///
    /// # Errors
    /// If `to` is shorter than `from`.
    fn write(&mut self, to: &mut Self::Buf, from: &[f32]) -> Result<(), Self::Error>;

    /// Copies pictures of 8 bits to the front of `to`, mirrored where `pixels.flips` says so, as normalised values:
    ///
    /// `to[b, c, y, x] = (values[b, y, x', c] / 255 - mean[c]) / std[c]`, where `x'` is `width - 1 - x` in a mirrored picture
    /// and else `x`; computed in f32 and rounded after each operation ([`Pixels::normalise`]), then to the format of `to`.
    ///
    /// With `pixels.crops`, `values[b]` is made of picture `v` at `pixels.values[crops[b].start..]` first, `crops[b].height` rows of
    /// `crops[b].width` pixels, with the integer weights `r` of its rows and `q` of its columns that [`resize`](crate::resize) states:
    ///
    /// `t[i, j, c] = clamp((2^(s - 1) + sum over k of r[i, k] v[k, j, c]) >> s, 0, 255)`, then
    /// `values[b, i, j, c] = clamp((2^(s' - 1) + sum over k of q[j, k] t[i, k, c]) >> s', 0, 255)`. These are the same bytes on every
    /// backend; a crop of the output's size stays as it is.
    ///
    /// # Shapes
    /// `pixels.values: [B, height, width, channels]`, or any with crops; `pixels.crops, pixels.flips: [B]`,
    /// `pixels.mean, pixels.std: [channels]`, `to: [B, channels, height, width]`.
    ///
    /// # Errors
    /// If `to` or a part of `pixels` is too short, or a crop does not [fit](crate::resize::Crop::fits).
    fn write_pixels(
        &mut self,
        dims: PixelDims,
        to: &mut Self::Buf,
        pixels: Pixels<'_>,
    ) -> Result<(), Self::Error>;

    /// [`Self::write`] of pictures that are values already. A backend may copy them beside the work that is queued, and plans the memory
    /// for it by `dims`.
    ///
    /// # Shapes
    /// `from, to: [B, channels, height, width]`
    ///
    /// # Errors
    /// As [`Self::write`].
    fn write_values(
        &mut self,
        _dims: PixelDims,
        to: &mut Self::Buf,
        from: &[f32],
    ) -> Result<(), Self::Error> {
        self.write(to, from)
    }

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

    /// Copies host values to the front of `to`.
    ///
    /// # Errors
    /// If `to` is shorter than `from`.
    fn write_scores(&mut self, to: &mut Self::Scores, from: &[f32]) -> Result<(), Self::Error>;

    /// Copies the front of `from` to the host, until `to` is full.
    ///
    /// # Errors
    /// If `from` is shorter than `to`.
    fn read_scores(&mut self, to: &mut [f32], from: &Self::Scores) -> Result<(), Self::Error>;

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

    /// `out = softmax(q @ k^T / sqrt(head_dim)) @ v`, per sequence and head; `out` is for linear layers to read.
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

    /// A block of a vision transformer: `x += proj(attention(qkv(norm1(x))))`, then `x += fc2(gelu(fc1(norm2(x))))`.
    ///
    /// `y` and `wide` are working memory, and hold anything afterwards: a backend that overrides this may hand values from layer to
    /// layer in a format of its own.
    ///
    /// # Shapes
    /// With D and H the widths of stream and MLP, `x, y: [rows, D]`, `wide: [rows, max(3 D, H)]`.
    ///
    /// # Errors
    /// If a buffer or span is too short. `x` then holds anything: layers before the one that is wrong may have run.
    fn block(
        &mut self,
        dims: BlockDims,
        x: &mut Self::Buf,
        [y, wide]: [&mut Self::Buf; 2],
        params: &Self::Params,
        block: BlockParams,
    ) -> Result<(), Self::Error>
    where
        Self: Sized,
    {
        block_by_layers(self, dims, x, [y, wide], params, block)
    }

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
        scores: &mut Self::Scores,
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
        scores: &Self::Scores,
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
