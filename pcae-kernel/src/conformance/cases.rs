//! The calls that are made.

use alloc::vec::Vec;
use core::fmt;

use crate::backend::{
    Accum, AttentionDims, BlockDims, DecoderDims, EmbedParams, Epilogue, Linear, LinearDims, Norm,
    PatchDims, PixelDims, RowDims, Span, TokenDims,
};
use crate::config::{DecoderConfig, VitConfig};
use crate::layout::{BlockParams, Blocks, Layout, Tail};

/// One call. `Display` is its name in reports.
#[derive(Clone, Copy, Debug)]
pub(super) enum Op {
    Write {
        len: usize,
    },
    Read {
        len: usize,
    },
    WritePixels {
        dims: PixelDims,
        flips: bool,
        crops: bool,
    },
    WriteIds {
        len: usize,
    },
    ReadIds {
        len: usize,
    },
    WriteVector {
        len: usize,
        at: usize,
    },
    ReadVector {
        len: usize,
        at: usize,
    },
    ReadParams {
        span: Span,
    },
    GatherPatches {
        dims: PatchDims,
        ids: bool,
    },
    PixelTargets {
        dims: PatchDims,
    },
    EmbedTokens {
        dims: TokenDims,
        ids: bool,
        embed: EmbedParams,
    },
    EmbedTokensBackward {
        dims: TokenDims,
        embed: EmbedParams,
    },
    Linear {
        dims: LinearDims,
        layer: Linear,
        epilogue: Epilogue,
    },
    LinearGeluSaving {
        dims: LinearDims,
        layer: Linear,
    },
    LinearResidual {
        dims: LinearDims,
        layer: Linear,
        rows_per_scale: Option<usize>,
    },
    LinearBackwardInput {
        dims: LinearDims,
        layer: Linear,
        gelu: bool,
    },
    LinearBackwardParams {
        dims: LinearDims,
        layer: Linear,
    },
    ScaleRows {
        dims: RowDims,
        rows_per_scale: usize,
    },
    LayerNorm {
        dims: RowDims,
        norm: Norm,
    },
    LayerNormSaving {
        dims: RowDims,
        norm: Norm,
    },
    LayerNormBackward {
        dims: RowDims,
        norm: Norm,
        accum: Accum,
    },
    Attention {
        dims: AttentionDims,
    },
    AttentionSaving {
        dims: AttentionDims,
    },
    AttentionBackward {
        dims: AttentionDims,
    },
    Block {
        dims: BlockDims,
        block: BlockParams,
        of: Of,
    },
    MeanSimilarity {
        dims: TokenDims,
    },
    Select {
        batch: usize,
        tokens: usize,
        keep: usize,
        scores: Scores,
    },
    GatherTokens {
        dims: TokenDims,
        keep: usize,
    },
    GatherTokensBackward {
        dims: TokenDims,
        keep: usize,
    },
    GatherIds {
        batch: usize,
        tokens: usize,
        keep: usize,
        ids: bool,
    },
    MeanPool {
        dims: TokenDims,
    },
    MeanPoolBackward {
        dims: TokenDims,
    },
    DecoderTokens {
        dims: DecoderDims,
        mask_token: Span,
        pos_embed: Span,
    },
    DecoderTokensBackward {
        dims: DecoderDims,
        mask_token: Span,
    },
    StripPrefix {
        dims: TokenDims,
    },
    StripPrefixBackward {
        dims: TokenDims,
    },
    PivotedQr {
        dims: TokenDims,
        input: QrInput,
    },
    Standardise {
        dims: RowDims,
    },
    FeatureSpread {
        dims: RowDims,
    },
    CosineLoss {
        dims: RowDims,
        zero: bool,
    },
    MseLoss {
        dims: RowDims,
    },
    CrossEntropy {
        dims: RowDims,
    },
    Zero {
        len: usize,
    },
    CopyVector {
        len: usize,
        at: usize,
    },
    Norm {
        len: usize,
    },
    AdamW {
        teacher: bool,
        max_norm: Option<f64>,
        step: u64,
    },
}

/// Whose parameters a block has.
#[derive(Clone, Copy, Debug)]
pub(super) enum Of {
    Student,
    Teacher,
    Frozen,
}

/// Scores to select from.
#[derive(Clone, Copy, Debug)]
pub(super) enum Scores {
    Different,
    /// Five values, zeros of both signs and infinities among them.
    Ties,
    /// One is NaN.
    NaN,
}

/// Tokens to decompose.
#[derive(Clone, Copy, Debug)]
pub(super) enum QrInput {
    Random,
    /// Powers of 2 times unit vectors, some more than once: all residuals are exact.
    Repeated,
    /// One element is NaN.
    NaN,
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

pub(super) fn layouts() -> [Layout; 2] {
    // Patches of 48 elements, tokens of 3 heads of 7, hidden layers of 52; then widths beyond 10 vectors of 16.
    [(21, 3, 2.5, 26, 35), (150, 5, 2.21, 66, 131)].map(
        |(embed_dim, num_heads, mlp_ratio, decoder_dim, target_dim)| {
            let vit = VitConfig {
                img_size: [12, 20],
                patch_size: 4,
                in_chans: 3,
                embed_dim,
                depth: 1,
                num_heads,
                mlp_ratio,
            };
            let decoder = DecoderConfig {
                embed_dim: decoder_dim,
                depth: 1,
                num_heads: 2,
            };
            Layout::with_decoder(&vit, &decoder, target_dim)
        },
    )
}

/// Teachers. Widths are multiples of 16, as backends may ask for whose teachers multiply in fp8. Heads are 16 and 12 wide, the MLP is
/// narrower and wider than queries, keys and values.
pub(super) fn teachers() -> [Layout; 2] {
    [(3, 80.0), (4, 160.0)].map(|(num_heads, hidden)| {
        Layout::encoder(&VitConfig {
            img_size: [8, 12],
            patch_size: 4,
            in_chans: 1,
            embed_dim: 48,
            depth: 2,
            num_heads,
            mlp_ratio: hidden / 48.0,
        })
    })
}

/// All calls on a teacher of `layout`.
pub(super) fn of_teacher(layout: &Layout) -> Vec<Op> {
    let mut ops = Vec::new();
    let sizes = [(1, 1), (3, 5), (1, 37), (5, 21), (0, 7)];
    blocks(&mut ops, layout.encoder.blocks, &[Of::Teacher], &sizes);
    ops
}

/// The last block, with each kind of parameters, on each `(batch, tokens)`.
fn blocks(ops: &mut Vec<Op>, blocks: Blocks, kinds: &[Of], sizes: &[(usize, usize)]) {
    for &of in kinds {
        for &(batch, tokens) in sizes {
            ops.push(Op::Block {
                dims: BlockDims {
                    attention: AttentionDims {
                        batch,
                        tokens,
                        num_heads: blocks.num_heads,
                        head_dim: blocks.dim / blocks.num_heads,
                    },
                    hidden: blocks.hidden,
                },
                block: blocks.block(blocks.depth - 1),
                of,
            });
        }
    }
}

/// Whether it is told by others of the same kind what is refused: that does not depend on the size.
pub(super) fn is_large(layout: &Layout, op: &Op) -> bool {
    let is_long = matches!(op, Op::Block { dims, .. } if dims.rows().rows > 15);
    is_long || is_wide(layout)
}

fn is_wide(layout: &Layout) -> bool {
    layout.vit.embed_dim > 100
}

/// All calls on parameters of `layout`.
pub(super) fn all(layout: &Layout) -> Vec<Op> {
    let mut ops = Vec::new();
    let Tail::Decoder(decoder) = layout.tail else {
        return ops;
    };
    let vit = &layout.vit;
    let (d, e) = (vit.embed_dim, decoder.blocks.dim);
    let block = layout.encoder.blocks.block(0);
    let hidden = vit.mlp_hidden();
    let small = !is_wide(layout);
    ops.push(Op::ReadParams {
        span: block.fc1.weight,
    });

    let layers = [
        (layout.encoder.patch_embed, vit.patch_len(), d),
        (block.qkv, d, 3 * d),
        (block.fc1, d, hidden),
        (block.fc2, hidden, d),
        (decoder.embed, d, e),
        (decoder.pred, e, decoder.target_dim),
    ];
    let rows: &[usize] = if small { &[0, 1, 2, 6, 13] } else { &[5, 137] };
    for (layer, in_features, out_features) in layers {
        for &rows in rows {
            let dims = LinearDims {
                rows,
                in_features,
                out_features,
            };
            for epilogue in [
                Epilogue::Bias,
                Epilogue::BiasQkv,
                Epilogue::BiasGelu,
                Epilogue::BiasResidual,
            ] {
                ops.push(Op::Linear {
                    dims,
                    layer,
                    epilogue,
                });
            }
            ops.push(Op::LinearGeluSaving { dims, layer });
            for rows_per_scale in [None, Some(1), Some(2)] {
                ops.push(Op::LinearResidual {
                    dims,
                    layer,
                    rows_per_scale,
                });
            }
            for gelu in [false, true] {
                ops.push(Op::LinearBackwardInput { dims, layer, gelu });
            }
            ops.push(Op::LinearBackwardParams { dims, layer });
        }
    }

    let sizes: &[(usize, usize)] = match small {
        true => &[(1, 1), (3, 5), (2, 0), (0, 7)],
        false => &[(1, 33), (3, 7)],
    };
    for stack in [layout.encoder.blocks, decoder.blocks] {
        blocks(&mut ops, stack, &[Of::Student, Of::Frozen], sizes);
    }

    let norms = [(block.norm1, d), (decoder.norm, e)];
    let rows: &[usize] = if small { &[0, 1, 3, 34] } else { &[3, 701] };
    for (norm, dim) in norms {
        for &rows in rows {
            let dims = RowDims { rows, dim };
            ops.push(Op::LayerNorm { dims, norm });
            ops.push(Op::LayerNormSaving { dims, norm });
            for accum in [Accum::Replace, Accum::Add] {
                ops.push(Op::LayerNormBackward { dims, norm, accum });
            }
        }
    }

    let num_patches = vit.num_patches();
    for (batch, with_cls, tokens, ids) in [
        (1, true, num_patches, false),
        (3, false, num_patches, false),
        (1, false, 4, true),
        (3, true, 7, true),
        (3, true, 0, true),
        (0, true, 7, true),
        (2, false, num_patches + 1, false),
    ] {
        let dims = TokenDims {
            batch,
            prefix: usize::from(with_cls),
            tokens,
            dim: d,
        };
        let embed = layout.encoder.embed(with_cls);
        ops.push(Op::EmbedTokens { dims, ids, embed });
        // The reference's `strip_prefix` does not do without patch tokens.
        if tokens > 0 {
            ops.push(Op::EmbedTokensBackward { dims, embed });
        }
    }
    for (batch, visible, targets) in [(1, 4, 5), (3, 2, 9), (3, 0, 1), (2, 3, 0), (0, 2, 2)] {
        let dims = DecoderDims {
            batch,
            visible,
            targets,
            dim: e,
        };
        let (mask_token, pos_embed) = (decoder.mask_token, decoder.pos_embed);
        ops.push(Op::DecoderTokens {
            dims,
            mask_token,
            pos_embed,
        });
        ops.push(Op::DecoderTokensBackward { dims, mask_token });
    }
    for (teacher, max_norm, step) in [
        (false, None, 1),
        (true, None, 7),
        (true, Some(0.9), 2),
        (true, Some(1e9), 1000),
    ] {
        ops.push(Op::AdamW {
            teacher,
            max_norm,
            step,
        });
    }
    if small {
        without_params(&mut ops);
    }
    ops
}

/// The calls that need no parameters.
fn without_params(ops: &mut Vec<Op>) {
    for len in [0, 1, 35] {
        ops.extend([
            Op::Write { len },
            Op::Read { len },
            Op::WriteIds { len },
            Op::ReadIds { len },
            Op::WriteVector { len, at: 3 },
            Op::ReadVector { len, at: 3 },
        ]);
    }
    // Rows that are and are not whole words of 16 bytes, odd ones, no picture, no pixel.
    for (batch, channels, height, width) in [
        (3, 3, 5, 7),
        (2, 1, 3, 11),
        (3, 3, 4, 16),
        (2, 1, 2, 32),
        (5, 2, 1, 1),
        (2, 5, 3, 4),
        (0, 3, 5, 7),
        (2, 3, 0, 7),
    ] {
        let dims = PixelDims {
            batch,
            channels,
            height,
            width,
        };
        for flips in [false, true] {
            let crops = flips && !dims.is_empty();
            ops.push(Op::WritePixels {
                dims,
                flips,
                crops: false,
            });
            if crops {
                ops.push(Op::WritePixels { dims, flips, crops });
            }
        }
    }
    let pictures = PatchDims {
        batch: 3,
        channels: 2,
        height: 6,
        width: 15,
        patch_size: 3,
        taken: 4,
    };
    for (dims, ids) in [
        (pictures, true),
        (
            PatchDims {
                taken: 10,
                ..pictures
            },
            false,
        ),
        (
            PatchDims {
                batch: 1,
                channels: 3,
                patch_size: 1,
                taken: 7,
                ..pictures
            },
            true,
        ),
        (
            PatchDims {
                batch: 0,
                ..pictures
            },
            true,
        ),
        (
            PatchDims {
                taken: 0,
                ..pictures
            },
            true,
        ),
        // Not a whole number of patches, no patch size, not all patches.
        (
            PatchDims {
                width: 16,
                ..pictures
            },
            true,
        ),
        (
            PatchDims {
                patch_size: 0,
                ..pictures
            },
            true,
        ),
        (pictures, false),
    ] {
        ops.push(Op::GatherPatches { dims, ids });
        if ids {
            ops.push(Op::PixelTargets { dims });
        }
    }
    // Tokens below, at and beyond vectors of 16; the last with heads of 16 lanes in each of which a row has a tail.
    for (batch, tokens, num_heads, head_dim) in [
        (1, 1, 1, 1),
        (3, 5, 2, 3),
        (1, 19, 3, 7),
        (2, 33, 1, 16),
        (1, 70, 2, 35),
        (1, 0, 2, 3),
        (0, 4, 2, 3),
    ] {
        let dims = AttentionDims {
            batch,
            tokens,
            num_heads,
            head_dim,
        };
        ops.extend([
            Op::Attention { dims },
            Op::AttentionSaving { dims },
            Op::AttentionBackward { dims },
        ]);
    }
    for (batch, prefix, tokens, dim, keep) in [
        (1, 0, 1, 1, 1),
        (1, 1, 5, 9, 3),
        (3, 0, 18, 33, 7),
        (3, 1, 11, 20, 11),
        (2, 1, 6, 5, 0),
        (2, 1, 0, 5, 0),
        (0, 1, 4, 5, 2),
        (2, 0, 4, 3, 5),
    ] {
        let dims = TokenDims {
            batch,
            prefix,
            tokens,
            dim,
        };
        ops.extend([
            Op::MeanSimilarity { dims },
            Op::MeanPool { dims },
            Op::StripPrefixBackward { dims },
        ]);
        if tokens > 0 {
            // Neither does the reference's `strip_prefix` do without patch tokens.
            ops.push(Op::StripPrefix { dims });
            ops.push(Op::MeanPoolBackward { dims });
        }
        for scores in [Scores::Different, Scores::Ties, Scores::NaN] {
            ops.push(Op::Select {
                batch,
                tokens,
                keep,
                scores,
            });
        }
        if keep <= tokens {
            ops.push(Op::GatherTokens { dims, keep });
            ops.push(Op::GatherTokensBackward { dims, keep });
            for ids in [false, true] {
                ops.push(Op::GatherIds {
                    batch,
                    tokens,
                    keep,
                    ids,
                });
            }
        }
    }
    for (batch, prefix, tokens, dim) in [(1, 0, 5, 7), (3, 1, 9, 20), (2, 1, 0, 3)] {
        let dims = TokenDims {
            batch,
            prefix,
            tokens,
            dim,
        };
        for input in [QrInput::Random, QrInput::Repeated, QrInput::NaN] {
            ops.push(Op::PivotedQr { dims, input });
        }
    }
    for (rows, dim) in [(1, 2), (3, 17), (6, 33), (1, 1), (200, 100), (0, 4)] {
        let dims = RowDims { rows, dim };
        ops.extend([
            Op::Standardise { dims },
            Op::FeatureSpread { dims },
            Op::CosineLoss { dims, zero: false },
            Op::CosineLoss { dims, zero: true },
            Op::MseLoss { dims },
            Op::CrossEntropy { dims },
            Op::Norm { len: dims.len() },
            Op::Zero { len: dims.len() },
            Op::CopyVector {
                len: dims.len(),
                at: 2,
            },
        ]);
        for rows_per_scale in [0, 1, 2, 3] {
            ops.push(Op::ScaleRows {
                dims,
                rows_per_scale,
            });
        }
    }
}
