//! Checked configuration and the presets.

use core::fmt;

use crate::backend::PixelDims;

/// Most blocks that an encoder or a decoder may have.
pub const MAX_DEPTH: usize = 64;
/// Widths, image edges and the like are at most this: products of three still fit 64 bits.
pub const MAX_SIZE: usize = 1 << 20;
/// Most elements that one tensor of a model may have, so that [`MAX_DEPTH`] blocks of encoder and decoder can be laid out
/// in a `usize` and their multiply-adds counted in a `u64`.
pub const MAX_ELEMENTS: usize = if usize::BITS >= 64 {
    (1 << 16) << 16
} else {
    1 << 22
};

/// Why a configuration cannot be used. Each names the field as the user types it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ConfigError {
    /// A size is zero or beyond what can be addressed.
    Size {
        /// The field.
        field: &'static str,
        /// The least that is allowed.
        min: usize,
        /// The most that is allowed.
        max: usize,
        /// What was given.
        found: usize,
    },
    /// A size must be a multiple of another one.
    Multiple {
        /// The field.
        field: &'static str,
        /// Of what it must be a multiple.
        of: &'static str,
        /// That value.
        divisor: usize,
        /// What was given.
        found: usize,
    },
    /// A number is outside its range, or not a number.
    Range {
        /// The field.
        field: &'static str,
        /// The range in words.
        expected: &'static str,
        /// What was given.
        found: f64,
    },
    /// A ratio leaves no token where there must be one.
    NothingLeft {
        /// The field.
        field: &'static str,
        /// What is left without a token.
        of: &'static str,
        /// The ratio that was given.
        found: f64,
        /// Out of how many tokens.
        tokens: usize,
    },
    /// A block index is not below the depth.
    Block {
        /// The field.
        field: &'static str,
        /// Number of blocks.
        depth: usize,
        /// What was given.
        found: usize,
    },
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Size {
                field,
                min,
                max,
                found,
            } => {
                write!(f, "{field}: expected {min} to {max}, found {found}")
            }
            Self::Multiple {
                field,
                of,
                divisor,
                found,
            } => {
                write!(
                    f,
                    "{field}: expected a multiple of {of} ({divisor}), found {found}"
                )
            }
            Self::Range {
                field,
                expected,
                found,
            } => write!(f, "{field}: expected {expected}, found {found}"),
            Self::NothingLeft {
                field,
                of,
                found,
                tokens,
            } => {
                write!(
                    f,
                    "{field}: {found} leaves no {of} out of {tokens}; choose a ratio further from the extreme"
                )
            }
            Self::Block {
                field,
                depth,
                found,
            } => {
                write!(
                    f,
                    "{field}: expected block numbers from 0 to {}, found {found}",
                    depth.saturating_sub(1)
                )
            }
        }
    }
}

impl core::error::Error for ConfigError {}

fn size(field: &'static str, min: usize, max: usize, found: usize) -> Result<(), ConfigError> {
    if (min..=max).contains(&found) {
        Ok(())
    } else {
        Err(ConfigError::Size {
            field,
            min,
            max,
            found,
        })
    }
}

fn multiple(
    field: &'static str,
    of: &'static str,
    divisor: usize,
    found: usize,
) -> Result<(), ConfigError> {
    if found.is_multiple_of(divisor) {
        Ok(())
    } else {
        Err(ConfigError::Multiple {
            field,
            of,
            divisor,
            found,
        })
    }
}

/// The encoder, a plain vision transformer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct VitConfig {
    /// Height and width of a picture in pixels.
    pub img_size: [usize; 2],
    /// Channels of a picture.
    pub in_chans: usize,
    /// Edge of a patch in pixels.
    pub patch_size: usize,
    /// Width of a token.
    pub embed_dim: usize,
    /// Number of blocks.
    pub depth: usize,
    /// Heads of each attention.
    pub num_heads: usize,
    /// Hidden width of the MLP over `embed_dim`.
    pub mlp_ratio: f64,
}

impl VitConfig {
    /// A preset with `img_size` and `in_chans` as used for pictures of its kind.
    ///
    /// `vit-micro` is made for pictures of 28 x 28 or 32 x 32 pixels; the others are the sizes of Dosovitskiy et al. (2021)
    /// and Touvron et al. (2021).
    pub const fn preset(name: &str) -> Option<Self> {
        let (patch_size, embed_dim, depth, num_heads) = match name.as_bytes() {
            b"vit-micro" => (4, 96, 4, 3),
            b"vit-ti16" => (16, 192, 12, 3),
            b"vit-s16" => (16, 384, 12, 6),
            b"vit-b16" => (16, 768, 12, 12),
            b"vit-l16" => (16, 1024, 24, 16),
            b"vit-h14" => (14, 1280, 32, 16),
            _ => return None,
        };
        let (edge, in_chans) = if patch_size == 4 { (28, 1) } else { (224, 3) };
        Some(Self {
            img_size: [edge, edge],
            in_chans,
            patch_size,
            embed_dim,
            depth,
            num_heads,
            mlp_ratio: 4.0,
        })
    }

    /// The names that [`VitConfig::preset`] knows.
    pub const PRESETS: [&'static str; 6] = [
        "vit-micro",
        "vit-ti16",
        "vit-s16",
        "vit-b16",
        "vit-l16",
        "vit-h14",
    ];

    /// The decoder that goes with an encoder: two blocks, as wide as the encoder (the recipe behind the paper's 2.25x).
    pub const fn default_decoder(&self) -> DecoderConfig {
        DecoderConfig {
            embed_dim: self.embed_dim,
            depth: 2,
            num_heads: self.num_heads,
        }
    }

    /// Rows and columns of patches.
    pub const fn grid(&self) -> [usize; 2] {
        match (
            self.img_size[0].checked_div(self.patch_size),
            self.img_size[1].checked_div(self.patch_size),
        ) {
            (Some(rows), Some(cols)) => [rows, cols],
            _ => [0, 0],
        }
    }

    /// The shape of `batch` pictures.
    pub const fn pixels(&self, batch: usize) -> PixelDims {
        PixelDims {
            batch,
            channels: self.in_chans,
            height: self.img_size[0],
            width: self.img_size[1],
        }
    }

    /// Patches of a picture.
    pub const fn num_patches(&self) -> usize {
        self.grid()[0].saturating_mul(self.grid()[1])
    }

    /// Elements of a patch, `in_chans * patch_size²`.
    pub const fn patch_len(&self) -> usize {
        self.in_chans
            .saturating_mul(self.patch_size)
            .saturating_mul(self.patch_size)
    }

    /// Hidden width of the MLP.
    pub const fn mlp_hidden(&self) -> usize {
        hidden(self.embed_dim, self.mlp_ratio)
    }

    /// Checks every field, so that every size computed from them is sound.
    ///
    /// # Errors
    /// The first [`ConfigError`] found.
    pub fn check(&self) -> Result<(), ConfigError> {
        size("patch_size", 1, MAX_SIZE, self.patch_size)?;
        for edge in self.img_size {
            size("img_size", 1, MAX_SIZE, edge)?;
            multiple("img_size", "patch_size", self.patch_size, edge)?;
        }
        size("in_chans", 1, 1024, self.in_chans)?;
        size(
            "img_size / patch_size, the number of patches",
            1,
            MAX_SIZE,
            self.num_patches(),
        )?;
        size(
            "patch_size, the elements of a patch",
            1,
            MAX_SIZE,
            self.patch_len(),
        )?;
        check_trunk(
            ["embed_dim", "depth", "num_heads"],
            self.embed_dim,
            self.depth,
            self.num_heads,
        )?;
        if !(self.mlp_ratio > 0.0 && self.mlp_ratio <= 1024.0) {
            let expected = "more than 0 and at most 1024";
            return Err(ConfigError::Range {
                field: "mlp_ratio",
                expected,
                found: self.mlp_ratio,
            });
        }
        size(
            "mlp_ratio, the hidden width",
            1,
            MAX_SIZE,
            self.mlp_hidden(),
        )?;
        elements(
            "img_size, the position table",
            [self.num_patches() + 1, self.embed_dim],
        )?;
        elements(
            "embed_dim, the patch projection",
            [self.embed_dim, self.patch_len()],
        )?;
        elements(
            "embed_dim, a weight",
            [self.embed_dim, self.mlp_hidden().max(3 * self.embed_dim)],
        )
    }
}

fn elements(field: &'static str, shape: [usize; 2]) -> Result<(), ConfigError> {
    size(field, 1, MAX_ELEMENTS, shape[0].saturating_mul(shape[1]))
}

const fn hidden(dim: usize, mlp_ratio: f64) -> usize {
    (dim as f64 * mlp_ratio) as usize
}

fn check_trunk(
    fields: [&'static str; 3],
    dim: usize,
    depth: usize,
    num_heads: usize,
) -> Result<(), ConfigError> {
    size(fields[0], 4, MAX_SIZE, dim)?;
    multiple(fields[0], "4, as sine and cosine of two axes need", 4, dim)?;
    size(fields[1], 1, MAX_DEPTH, depth)?;
    size(fields[2], 1, dim, num_heads)?;
    multiple(fields[0], fields[2], num_heads, dim)
}

/// The decoder. Its patches, channels and `mlp_ratio` are the encoder's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecoderConfig {
    /// Width of a token.
    pub embed_dim: usize,
    /// Number of blocks.
    pub depth: usize,
    /// Heads of each attention.
    pub num_heads: usize,
}

impl DecoderConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// The first [`ConfigError`] found.
    pub fn check(&self, vit: &VitConfig) -> Result<(), ConfigError> {
        let fields = ["decoder_embed_dim", "decoder_depth", "decoder_num_heads"];
        check_trunk(fields, self.embed_dim, self.depth, self.num_heads)?;
        let hidden = self.mlp_hidden(vit);
        size("mlp_ratio, the decoder's hidden width", 1, MAX_SIZE, hidden)?;
        let widest = hidden
            .max(3 * self.embed_dim)
            .max(vit.embed_dim)
            .max(vit.num_patches().saturating_add(1))
            .max(vit.patch_len());
        elements("decoder_embed_dim, a weight", [self.embed_dim, widest])
    }

    /// Hidden width of the MLP.
    pub const fn mlp_hidden(&self, vit: &VitConfig) -> usize {
        hidden(self.embed_dim, vit.mlp_ratio)
    }
}

/// A set of block numbers, all below [`MAX_DEPTH`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DropLayers(u64);

/// Where the stages of a progressive reduction lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StageLayout {
    /// After the first block of each of `stages` equal parts: 0, 4, 8 of 12. The paper's choice.
    Starts,
    /// After the last block of each part: 3, 7, 11 of 12.
    Ends,
    /// At equal distances from both ends and each other: 2, 5, 8 of 12.
    Even,
    /// After the first blocks: 0, 1, 2.
    First,
}

impl DropLayers {
    /// No block.
    pub const NONE: Self = Self(0);

    /// The given blocks of an encoder of `depth`.
    ///
    /// # Errors
    /// [`ConfigError::Block`] for a block that there is not.
    pub fn new(blocks: &[usize], depth: usize) -> Result<Self, ConfigError> {
        let mut set = 0;
        for &block in blocks {
            if block >= depth.min(MAX_DEPTH) {
                return Err(ConfigError::Block {
                    field: "drop_layers",
                    depth,
                    found: block,
                });
            }
            set |= 1 << block;
        }
        Ok(Self(set))
    }

    /// `stages` blocks of an encoder of `depth`.
    ///
    /// # Errors
    /// [`ConfigError::Size`] if there are more stages than blocks or none.
    pub fn preset(layout: StageLayout, stages: usize, depth: usize) -> Result<Self, ConfigError> {
        size("depth", 1, MAX_DEPTH, depth)?;
        size("drop_layers, the number of stages", 1, depth, stages)?;
        let mut set = 0;
        for i in 0..stages {
            let block = match layout {
                StageLayout::Starts => i * depth / stages,
                StageLayout::Ends => (i + 1) * depth / stages - 1,
                StageLayout::Even => (i + 1) * (depth + 1) / (stages + 1) - 1,
                StageLayout::First => i,
            };
            set |= 1 << block;
        }
        Ok(Self(set))
    }

    /// Where a classifier of `depth` blocks drops tokens: after blocks 0, 7 and 10 of 12, with which the multiply-adds are
    /// the paper's.
    ///
    /// # Errors
    /// [`ConfigError::Size`] if there is no block, or too many.
    pub fn classification(depth: usize) -> Result<Self, ConfigError> {
        size("depth", 1, MAX_DEPTH, depth)?;
        Self::new(&[0, depth * 7 / 12, depth * 10 / 12], depth)
    }

    /// Whether tokens are dropped after `block`.
    pub const fn contains(self, block: usize) -> bool {
        block < MAX_DEPTH && self.0 >> block & 1 == 1
    }

    /// The blocks in ascending order.
    pub fn iter(self) -> impl Iterator<Item = usize> {
        (0..MAX_DEPTH).filter(move |&block| self.contains(block))
    }

    /// Number of blocks.
    pub const fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    /// Whether there is no block.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }
}

/// How redundancy is judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Criterion {
    /// Similarity of each token to the mean token (the method).
    MeanSimilarity,
    /// Any tokens (ablation).
    Random,
    /// Order of a QR decomposition with column pivoting (the exact criterion that the mean similarity approximates).
    PivotedQr,
}

/// Where tokens are dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Some after each of the drop layers (the method).
    Progressive,
    /// All at once after this block (ablation).
    OneStage(usize),
    /// All at once before the first block (ablation): the dropped ones pass nothing on to the others.
    Input,
}

/// How many tokens a stage leaves of `n`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Budget {
    /// `int(n * keep_ratio)`: pre-training.
    Keep(f64),
    /// `ceil(n * (1 - drop_ratio))`: classification.
    Drop(f64),
}

impl Budget {
    /// Tokens left of `n`, never more than `n`.
    pub fn apply(self, n: usize) -> usize {
        let left = match self {
            Self::Keep(keep_ratio) => n as f64 * keep_ratio,
            // 49 * (1 - 0.9) is 4.8999…9 in binary, and 50 * (1 - 0.9) is 5.000…1: the offset makes both right.
            Self::Drop(drop_ratio) => libm::ceil(n as f64 * (1.0 - drop_ratio) - 1e-9),
        };
        (left as usize).min(n)
    }
}

/// A whole token reduction.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reduction {
    /// How redundancy is judged.
    pub criterion: Criterion,
    /// Where tokens are dropped.
    pub place: Place,
    /// After which blocks a progressive reduction drops; the others apply the budget as many times at their one place.
    pub drop_layers: DropLayers,
    /// How many tokens stay.
    pub budget: Budget,
}

impl Reduction {
    /// No token is dropped.
    pub const NONE: Self = Self {
        criterion: Criterion::MeanSimilarity,
        place: Place::Progressive,
        drop_layers: DropLayers::NONE,
        budget: Budget::Keep(1.0),
    };

    /// Tokens that stay of `n` after `block` (`None`: before the first block), or `None` if that is no stage.
    pub fn stage(&self, block: Option<usize>, n: usize) -> Option<usize> {
        let all_stages = || self.drop_layers.iter().fold(n, |n, _| self.budget.apply(n));
        match (self.place, block) {
            // Classification without a drop ratio is the dense model: not a stage that keeps everything, but none.
            _ if self.budget == Budget::Drop(0.0) => None,
            (Place::Progressive, Some(block)) if self.drop_layers.contains(block) => {
                Some(self.budget.apply(n))
            }
            (Place::OneStage(at), Some(block)) if at == block => Some(all_stages()),
            (Place::Input, None) => Some(all_stages()),
            _ => None,
        }
    }

    /// Gives `visit` the number of tokens before and after each stage of an encoder of `depth` that starts with `n`.
    pub fn for_each_stage(&self, n: usize, depth: usize, mut visit: impl FnMut(usize, usize)) {
        let mut tokens = n;
        for block in core::iter::once(None).chain((0..depth.min(MAX_DEPTH)).map(Some)) {
            if let Some(keep) = self.stage(block, tokens) {
                visit(tokens, keep);
                tokens = keep;
            }
        }
    }

    /// Tokens left of `n` after `depth` blocks.
    pub fn remaining(&self, n: usize, depth: usize) -> usize {
        let mut left = n;
        self.for_each_stage(n, depth, |_, keep| left = keep);
        left
    }

    /// Number of stages in `depth` blocks.
    pub fn stages(&self, depth: usize) -> usize {
        let mut count = 0;
        self.for_each_stage(1, depth, |_, _| count += 1);
        count
    }

    /// Checks that the blocks exist and that some of `n` tokens stay.
    ///
    /// # Errors
    /// The first [`ConfigError`] found.
    pub fn check(&self, n: usize, depth: usize) -> Result<(), ConfigError> {
        if let Some(found) = self.drop_layers.iter().find(|&block| block >= depth) {
            return Err(ConfigError::Block {
                field: "drop_layers",
                depth,
                found,
            });
        }
        if let Place::OneStage(found) = self.place
            && found >= depth.min(MAX_DEPTH)
        {
            return Err(ConfigError::Block {
                field: "drop_place",
                depth,
                found,
            });
        }
        let (field, ratio, expected) = match self.budget {
            Budget::Keep(ratio) => ("keep_ratio", ratio, "more than 0 and at most 1"),
            Budget::Drop(ratio) => ("drop_ratio", ratio, "at least 0 and less than 1"),
        };
        let fine = match self.budget {
            Budget::Keep(ratio) => ratio > 0.0 && ratio <= 1.0,
            Budget::Drop(ratio) => (0.0..1.0).contains(&ratio),
        };
        if !fine {
            return Err(ConfigError::Range {
                field,
                expected,
                found: ratio,
            });
        }
        if self.remaining(n, depth) == 0 {
            return Err(ConfigError::NothingLeft {
                field,
                of: "token after the last stage",
                found: ratio,
                tokens: n,
            });
        }
        Ok(())
    }
}

/// Visible patches: `int(num_patches * (1 - mask_ratio))`, in f64 and truncated, as Python computes it.
pub fn len_keep(num_patches: usize, mask_ratio: f64) -> usize {
    ((num_patches as f64 * (1.0 - mask_ratio)) as usize).min(num_patches)
}

/// What the decoder predicts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Target {
    /// Standardised features of the momentum teacher at the tokens it retains (PCAE).
    Teacher(Reduction),
    /// Pixels of every masked patch (MAE), standardised per patch with `norm_pix`.
    Pixels {
        /// Whether each patch is standardised.
        norm_pix: bool,
    },
}

/// One pre-training task.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PretrainConfig {
    /// The encoder.
    pub vit: VitConfig,
    /// The decoder.
    pub decoder: DecoderConfig,
    /// Part of the patches that the student does not see.
    pub mask_ratio: f64,
    /// What is predicted.
    pub target: Target,
}

impl PretrainConfig {
    /// Patches that the student sees.
    pub fn visible(&self) -> usize {
        len_keep(self.vit.num_patches(), self.mask_ratio)
    }

    /// Patches that it does not see.
    pub fn masked(&self) -> usize {
        self.vit.num_patches() - self.visible()
    }

    /// Positions that the decoder predicts.
    pub fn targets(&self) -> usize {
        match self.target {
            Target::Teacher(reduction) => reduction.remaining(self.masked(), self.vit.depth),
            Target::Pixels { .. } => self.masked(),
        }
    }

    /// Width of a prediction: the encoder's width, or the elements of a patch.
    pub const fn target_dim(&self) -> usize {
        match self.target {
            Target::Teacher(_) => self.vit.embed_dim,
            Target::Pixels { .. } => self.vit.patch_len(),
        }
    }

    /// Checks every field.
    ///
    /// # Errors
    /// The first [`ConfigError`] found.
    pub fn check(&self) -> Result<(), ConfigError> {
        self.vit.check()?;
        self.decoder.check(&self.vit)?;
        let found = self.mask_ratio;
        if !(0.0..=1.0).contains(&found) {
            return Err(ConfigError::Range {
                field: "mask_ratio",
                expected: "between 0 and 1",
                found,
            });
        }
        let tokens = self.vit.num_patches();
        if self.visible() == 0 {
            return Err(ConfigError::NothingLeft {
                field: "mask_ratio",
                of: "visible patch",
                found,
                tokens,
            });
        }
        if self.masked() == 0 {
            return Err(ConfigError::NothingLeft {
                field: "mask_ratio",
                of: "masked patch",
                found,
                tokens,
            });
        }
        match self.target {
            Target::Teacher(reduction) => reduction.check(self.masked(), self.vit.depth),
            // A patch of one element has no variance to divide by.
            Target::Pixels { norm_pix: true } => size(
                "patch_size, the elements of a patch",
                2,
                MAX_SIZE,
                self.vit.patch_len(),
            ),
            Target::Pixels { norm_pix: false } => Ok(()),
        }
    }
}

/// What of the last block's output the head sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pool {
    /// The mean of the patch tokens that are left, then `fc_norm` (timm's `avg`, MAE's `global_pool`).
    #[default]
    Mean,
    /// The class token, then the encoder's `norm` (timm's `token`).
    ClsToken,
}

/// A classifier: the encoder's blocks, pooling, a norm, a linear head.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ClassifierConfig {
    /// The encoder.
    pub vit: VitConfig,
    /// Number of classes.
    pub num_classes: usize,
    /// What the head sees.
    pub pool: Pool,
    /// Which patch tokens are dropped on the way.
    pub reduction: Reduction,
}

impl ClassifierConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// The first [`ConfigError`] found.
    pub fn check(&self) -> Result<(), ConfigError> {
        self.vit.check()?;
        size("num_classes", 1, MAX_SIZE, self.num_classes)?;
        elements(
            "num_classes, the head",
            [self.num_classes, self.vit.embed_dim],
        )?;
        self.reduction.check(self.vit.num_patches(), self.vit.depth)
    }
}
