//! Shapes of operations, and where their parameters lie.

use crate::error::{Error, expect_len, product};
use crate::resize::Crop;

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

/// One block of a vision transformer on `batch` sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockDims {
    /// What its attention works on; its width is that of the residual stream.
    pub attention: AttentionDims,
    /// Hidden width of the MLP.
    pub hidden: usize,
}

impl BlockDims {
    /// All tokens of the residual stream.
    pub const fn rows(self) -> RowDims {
        RowDims {
            rows: product(&[self.attention.batch, self.attention.tokens]),
            dim: self.attention.dim(),
        }
    }

    /// A linear layer on all tokens.
    pub const fn linear(self, in_features: usize, out_features: usize) -> LinearDims {
        LinearDims {
            rows: self.rows().rows,
            in_features,
            out_features,
        }
    }
}

/// `batch` pictures of `channels` planes of `height` rows of `width` pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PixelDims {
    /// Pictures.
    pub batch: usize,
    /// Channels of a picture.
    pub channels: usize,
    /// Rows of pixels.
    pub height: usize,
    /// Columns of pixels.
    pub width: usize,
}

impl PixelDims {
    /// Elements of the pictures.
    pub const fn len(self) -> usize {
        product(&[self.batch, self.channels, self.height, self.width])
    }

    /// Whether there is no pixel.
    pub const fn is_empty(self) -> bool {
        self.len() == 0
    }
}

/// Pictures of 8 bits, and how they are normalised; by default none.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pixels<'a> {
    /// `[B, height, width, channels]`, as decoders give them; with crops those of any size, each where its crop says.
    pub values: &'a [u8],
    /// `[B]`: where a picture lies in `values`, and its size, from which it is resized; `None` where they lie one behind the other and
    /// have the size of the output.
    pub crops: Option<&'a [Crop]>,
    /// `[B]`: whether a picture is mirrored left to right; `None` where none is.
    pub flips: Option<&'a [bool]>,
    /// `[channels]`: mean of each channel, of pixels in `[0, 1]`.
    pub mean: &'a [f32],
    /// `[channels]`: standard deviation of each channel, of pixels in `[0, 1]`.
    pub std: &'a [f32],
}

impl Pixels<'_> {
    /// The value of a pixel: `(value / 255 - mean) / std` in f32, rounded after each of the three.
    #[inline]
    pub fn normalise(value: u8, mean: f32, std: f32) -> f32 {
        (f32::from(value) / 255.0 - mean) / std
    }

    /// Picture `b` of those in `dims`, and the size that it has.
    #[inline]
    pub fn crop(&self, b: usize, dims: PixelDims) -> Crop {
        let whole = Crop {
            start: product(&[b, dims.channels, dims.height, dims.width]),
            height: dims.height,
            width: dims.width,
        };
        let crop = self.crops.and_then(|crops| crops.get(b));
        crop.copied().unwrap_or(whole)
    }

    /// Checks the lengths, and the sizes of crops.
    ///
    /// # Errors
    /// [`Error::TooShort`] for the first that is too short, [`Error::Dimensions`] for a crop that does not [fit](Crop::fits).
    pub fn check(&self, op: &'static str, dims: PixelDims) -> Result<(), Error> {
        if let Some(crops) = self.crops {
            expect_len(op, "crops", crops.len(), dims.batch)?;
            for crop in crops.iter().take(dims.batch) {
                let len = product(&[crop.height, crop.width, dims.channels]);
                if !crop.fits(dims) {
                    return Err(Error::Dimensions {
                        op,
                        expected: "a crop of one pixel or more, and at most four times the height, the width and the pixels of its result",
                        found: product(&[crop.height, crop.width]),
                    });
                }
                expect_len(
                    op,
                    "values",
                    self.values.len(),
                    crop.start.saturating_add(len),
                )?;
            }
        } else {
            expect_len(op, "values", self.values.len(), dims.len())?;
        }
        if let Some(flips) = self.flips {
            expect_len(op, "flips", flips.len(), dims.batch)?;
        }
        expect_len(op, "mean", self.mean.len(), dims.channels)?;
        expect_len(op, "std", self.std.len(), dims.channels)
    }

    /// Whether picture `b` is mirrored.
    #[inline]
    pub fn is_flipped(&self, b: usize) -> bool {
        let flip = self.flips.and_then(|flips| flips.get(b));
        flip.copied().unwrap_or(false)
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
