//! Operations by their dimensions: what a call works on and moves, without doing it.

use crate::backend::{AttentionDims, LinearDims, PixelDims, Pixels, RowDims, TokenDims};
use crate::error::product;

/// One call of a backend's method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// A linear layer's forward, with any epilogue.
    Linear(LinearDims),
    /// The gradient of its input.
    LinearInput(LinearDims),
    /// The gradients of its parameters.
    LinearParams(LinearDims),
    /// Attention, saving or not.
    Attention(AttentionDims),
    /// The gradient of attention.
    AttentionBackward(AttentionDims),
    /// Layer norm, saving or not.
    LayerNorm(RowDims),
    /// The gradients of layer norm.
    LayerNormBackward(RowDims),
    /// Patches and tokens that are cut out, embedded, gathered, scaled or averaged, forward or backward.
    Tokens {
        /// Read and written.
        elements: usize,
    },
    /// Scores by similarity to the mean token.
    MeanSimilarity(TokenDims),
    /// Scores by pivoted QR decomposition.
    PivotedQr(TokenDims),
    /// The tokens with the lowest scores, and their positions.
    Select {
        /// Sequences.
        batch: usize,
        /// Patch tokens of each.
        tokens: usize,
    },
    /// A loss with its gradient.
    Loss(RowDims),
    /// Standardised targets, or their spread.
    Target(RowDims),
    /// The norm of a vector, or zeros.
    Vector {
        /// Of the vector.
        elements: usize,
    },
    /// AdamW with the teacher's moving average.
    AdamW {
        /// Parameters that are updated.
        elements: usize,
        /// Those that a teacher follows.
        followed: usize,
    },
    /// Between host and backend.
    Transfer {
        /// Copied.
        elements: usize,
    },
    /// Pictures of 8 bits from the host, normalised.
    Pixels(PixelDims),
    /// Crops of 8 bits from the host, resized to these and normalised.
    Crops(PixelDims),
}

/// Operations that a profile shows as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum OpKind {
    /// [`Op::Linear`]
    LinearForward,
    /// [`Op::LinearInput`]
    LinearInputGradient,
    /// [`Op::LinearParams`]
    LinearParamsGradient,
    /// [`Op::Attention`]
    AttentionForward,
    /// [`Op::AttentionBackward`]
    AttentionBackward,
    /// [`Op::LayerNorm`]
    LayerNormForward,
    /// [`Op::LayerNormBackward`]
    LayerNormBackward,
    /// [`Op::Tokens`]
    Tokens,
    /// [`Op::MeanSimilarity`], [`Op::PivotedQr`], [`Op::Select`]
    Selection,
    /// [`Op::Loss`], [`Op::Target`]
    Loss,
    /// [`Op::Vector`]
    Vectors,
    /// [`Op::AdamW`]
    Optimizer,
    /// [`Op::Transfer`], [`Op::Pixels`], [`Op::Crops`]
    Transfer,
}

impl OpKind {
    /// All of them, in the order of a step.
    pub const ALL: [Self; 13] = [
        Self::LinearForward,
        Self::LinearInputGradient,
        Self::LinearParamsGradient,
        Self::AttentionForward,
        Self::AttentionBackward,
        Self::LayerNormForward,
        Self::LayerNormBackward,
        Self::Tokens,
        Self::Selection,
        Self::Loss,
        Self::Vectors,
        Self::Optimizer,
        Self::Transfer,
    ];

    /// For tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::LinearForward => "linear forward",
            Self::LinearInputGradient => "linear input gradient",
            Self::LinearParamsGradient => "linear parameter gradient",
            Self::AttentionForward => "attention forward",
            Self::AttentionBackward => "attention backward",
            Self::LayerNormForward => "layer norm forward",
            Self::LayerNormBackward => "layer norm backward",
            Self::Tokens => "embed, gather, pool",
            Self::Selection => "selection",
            Self::Loss => "target and loss",
            Self::Vectors => "gradient norm, zeros",
            Self::Optimizer => "AdamW and moving average",
            Self::Transfer => "transfer",
        }
    }
}

impl Op {
    /// What `write_pixels` does with `pixels`.
    pub const fn pixels(dims: PixelDims, pixels: &Pixels<'_>) -> Self {
        match pixels.crops {
            Some(_) => Self::Crops(dims),
            None => Self::Pixels(dims),
        }
    }

    /// Tokens of `elements` elements in all, each read and written.
    pub const fn tokens(elements: usize) -> Self {
        Self::Tokens {
            elements: elements.saturating_mul(2),
        }
    }

    /// An update of `segments`.
    #[cfg(feature = "train")]
    pub fn adamw(segments: &[crate::backend::Segment], has_teacher: bool) -> Self {
        let (mut elements, mut followed) = (0_usize, 0_usize);
        for segment in segments {
            elements = elements.saturating_add(segment.span.len);
            if segment.ema && has_teacher {
                followed = followed.saturating_add(segment.span.len);
            }
        }
        Self::AdamW { elements, followed }
    }

    /// What a profile counts it as.
    pub const fn kind(&self) -> OpKind {
        match self {
            Self::Linear(_) => OpKind::LinearForward,
            Self::LinearInput(_) => OpKind::LinearInputGradient,
            Self::LinearParams(_) => OpKind::LinearParamsGradient,
            Self::Attention(_) => OpKind::AttentionForward,
            Self::AttentionBackward(_) => OpKind::AttentionBackward,
            Self::LayerNorm(_) => OpKind::LayerNormForward,
            Self::LayerNormBackward(_) => OpKind::LayerNormBackward,
            Self::Tokens { .. } => OpKind::Tokens,
            Self::MeanSimilarity(_) | Self::PivotedQr(_) | Self::Select { .. } => OpKind::Selection,
            Self::Loss(_) | Self::Target(_) => OpKind::Loss,
            Self::Vector { .. } => OpKind::Vectors,
            Self::AdamW { .. } => OpKind::Optimizer,
            Self::Transfer { .. } | Self::Pixels(_) | Self::Crops(_) => OpKind::Transfer,
        }
    }

    /// Multiply-adds of its matrix products, counted as [`crate::flops`] counts them: a backward twice its forward,
    /// what is linear in the tokens not at all.
    pub const fn macs(&self) -> u64 {
        let macs = match self {
            Self::Linear(dims) | Self::LinearInput(dims) | Self::LinearParams(dims) => {
                product(&[dims.rows, dims.in_features, dims.out_features])
            }
            Self::Attention(dims) => product(&[2, dims.out_len(), dims.tokens]),
            Self::AttentionBackward(dims) => product(&[4, dims.out_len(), dims.tokens]),
            _ => 0,
        };
        macs as u64
    }

    /// Elements that it reads and writes, each operand once: what crosses the memory bus at least where nothing is in a
    /// cache yet.
    pub const fn elements(&self) -> u64 {
        let elements = match self {
            Self::Linear(dims) | Self::LinearInput(dims) => dims
                .in_len()
                .saturating_add(dims.out_len())
                .saturating_add(dims.weight_len()),
            // The gradient is added to.
            Self::LinearParams(dims) => dims
                .in_len()
                .saturating_add(dims.out_len())
                .saturating_add(product(&[2, dims.weight_len()])),
            Self::Attention(dims) => dims.qkv_len().saturating_add(dims.out_len()),
            // Reads queries, keys, values, result and its gradient, writes the gradients of three.
            Self::AttentionBackward(dims) => product(&[8, dims.out_len()]),
            Self::LayerNorm(dims) | Self::Target(dims) => product(&[2, dims.len()]),
            Self::LayerNormBackward(dims) | Self::Loss(dims) => product(&[3, dims.len()]),
            Self::MeanSimilarity(dims) | Self::PivotedQr(dims) => dims.len(),
            Self::Select { batch, tokens } => product(&[2, *batch, *tokens]),
            Self::Tokens { elements } | Self::Vector { elements } => *elements,
            // Parameters, gradient and two moments are read and written, and the teacher where it follows.
            Self::AdamW { elements, followed } => {
                product(&[8, *elements]).saturating_add(product(&[2, *followed]))
            }
            Self::Transfer { elements } => product(&[2, *elements]),
            // Four pixels are read in the place of an element.
            Self::Pixels(dims) => dims.len().saturating_add(dims.len().div_ceil(4)),
            // They are written and read again in between. A crop may be of any size: it is not counted.
            Self::Crops(dims) => dims.len().saturating_add(dims.len().div_ceil(2)),
        };
        elements as u64
    }
}
