//! What a backend must compute: every operation against [`Reference<f64>`](crate::reference::Reference).
//!
//! A case is one call of one operation. It is described once, for any backend, and runs:
//!
//! 1. on the reference and on the backend under test, whose outputs must agree, beyond their used front too;
//! 2. on the backend once per argument with that argument spoiled (a buffer or span one element short, an index out of
//!    range), which must be refused with every output as it was.
//!
//! Outputs start from noise, so that what is added to something and what is overwritten differ. Sizes are small, odd and
//! pairwise different, so that swapped dimensions show.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;
use core::fmt;

use crate::backend::{
    Accum, AdamW, AttentionDims, Backend, Clip, DecoderDims, EmbedParams, Epilogue, Linear,
    LinearDims, Norm, PatchDims, RowDims, Segment, Span, TokenDims, TrainBackend,
};
use crate::config::{DecoderConfig, VitConfig};
use crate::layout::{Kind, Layout, Tail};
use crate::reference::Reference;
use crate::rng::{Purpose, Stream};

/// How far an output may be from the reference: `atol + rtol * |expected|`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance {
    /// Absolute part.
    pub atol: f64,
    /// Relative part.
    pub rtol: f64,
}

impl Tolerance {
    /// For backends that compute in f32.
    ///
    /// The longest sums here, over 701 rows, have terms of standard deviation 1.4: partial sums grow to some 37, and 701
    /// roundings of at most half a unit in the last place of that, 2^-20, at random signs make `26 * 2^-20 = 2.5e-5`.
    /// Other chains (softmax, norms, losses) are shorter. Measured: 0.83 of it for the scalar reference in f32, which adds
    /// one term after the other, and 0.3 with sums in vectors.
    pub const F32: Self = Self {
        atol: 3e-5,
        rtol: 1e-5,
    };
}

/// An output of a case beside the reference's.
#[derive(Clone, Copy, Debug)]
pub struct Compared<'a> {
    /// The call.
    pub case: &'a str,
    /// Number of the output among those of the call.
    pub output: usize,
    /// What the backend gave.
    pub got: &'a [f32],
    /// What the reference gave.
    pub want: &'a [f32],
    /// Largest error, as a fraction of what the tolerance allows.
    pub worst: f64,
}

/// Why a backend does not conform.
#[derive(Clone, Debug, PartialEq)]
pub struct Failure {
    /// The call.
    pub case: String,
    /// What is wrong.
    pub kind: FailureKind,
}

/// What is wrong.
#[derive(Clone, Debug, PartialEq)]
pub enum FailureKind {
    /// An element is off.
    Value {
        /// Number of the output.
        output: usize,
        /// Number of the element.
        at: usize,
        /// What the backend gave.
        got: f32,
        /// What the reference gave.
        want: f32,
    },
    /// A call was refused that the reference takes.
    Refused {
        /// The backend's reason.
        error: String,
    },
    /// A call was taken that must be refused.
    Accepted {
        /// The argument that was spoiled; `None` where the call itself is wrong.
        argument: Option<&'static str>,
    },
    /// A call was refused after something had been written.
    Written {
        /// The argument that was spoiled; `None` where the call itself is wrong.
        argument: Option<&'static str>,
        /// Number of the output.
        output: usize,
    },
    /// A buffer could not be made, filled or read.
    Buffer {
        /// The backend's reason.
        error: String,
    },
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { case, kind } = self;
        let spoiled = |argument: &Option<&'static str>| match argument {
            Some(argument) => format!(" with `{argument}` spoiled"),
            None => String::new(),
        };
        match kind {
            FailureKind::Value {
                output,
                at,
                got,
                want,
            } => {
                write!(
                    f,
                    "{case}: output {output} is {got} at {at}, expected {want}"
                )
            }
            FailureKind::Refused { error } => write!(f, "{case}: refused: {error}"),
            FailureKind::Accepted { argument } => {
                write!(f, "{case}: taken{}, expected an error", spoiled(argument))
            }
            FailureKind::Written { argument, output } => write!(
                f,
                "{case}: refused{}, but output {output} had been written",
                spoiled(argument)
            ),
            FailureKind::Buffer { error } => write!(f, "{case}: buffer: {error}"),
        }
    }
}

impl core::error::Error for Failure {}

/// Runs every case on `backend` and gives each output to `report`, in an order that does not change.
///
/// # Errors
/// The first [`Failure`].
pub fn run<B: TrainBackend>(
    backend: &mut B,
    tolerance: Tolerance,
    mut report: impl FnMut(Compared<'_>),
) -> Result<(), Failure> {
    let mut reference = Reference::<f64, _>::owned();
    for layout in layouts() {
        for op in cases(&layout) {
            let case = op.to_string();
            let fail = |kind| Failure {
                case: case.clone(),
                kind,
            };
            let want = call(&mut reference, &layout, &op, None).map_err(fail)?;
            let got = call(backend, &layout, &op, None).map_err(fail)?;
            compare(&case, &got, &want, tolerance, &mut report).map_err(fail)?;
            if want.error.is_some() {
                unchanged(&got, None).map_err(fail)?;
                continue;
            }
            // Refusals do not depend on the size.
            if is_large(&layout) {
                continue;
            }
            for fault in 0..got.arguments.len() {
                let spoiled = call(backend, &layout, &op, Some(fault)).map_err(fail)?;
                unchanged(&spoiled, got.arguments.get(fault).copied()).map_err(fail)?;
            }
        }
    }
    Ok(())
}

/// What came of one call.
struct Outcome {
    /// Why it was refused.
    error: Option<String>,
    /// Each output before and after.
    outputs: Vec<(Vec<f32>, Vec<f32>)>,
    /// Arguments that can be spoiled.
    arguments: Vec<&'static str>,
}

fn compare(
    case: &str,
    got: &Outcome,
    want: &Outcome,
    tolerance: Tolerance,
    report: &mut impl FnMut(Compared<'_>),
) -> Result<(), FailureKind> {
    match (&got.error, &want.error) {
        (Some(error), None) => {
            return Err(FailureKind::Refused {
                error: error.clone(),
            });
        }
        (None, Some(_)) => return Err(FailureKind::Accepted { argument: None }),
        _ => {}
    }
    for (output, ((_, got), (_, want))) in got.outputs.iter().zip(&want.outputs).enumerate() {
        let mut worst = 0.0f64;
        for (at, (&got, &want)) in got.iter().zip(want).enumerate() {
            let allowed = tolerance.atol + tolerance.rtol * f64::from(want).abs();
            let share = (f64::from(got) - f64::from(want)).abs() / allowed;
            if share.is_nan() || share > 1.0 {
                return Err(FailureKind::Value {
                    output,
                    at,
                    got,
                    want,
                });
            }
            worst = worst.max(share);
        }
        report(Compared {
            case,
            output,
            got,
            want,
            worst,
        });
    }
    Ok(())
}

/// The call was refused, and nothing had been written.
fn unchanged(outcome: &Outcome, argument: Option<&'static str>) -> Result<(), FailureKind> {
    if outcome.error.is_none() {
        return Err(FailureKind::Accepted { argument });
    }
    match outcome
        .outputs
        .iter()
        .position(|(before, after)| before != after)
    {
        Some(output) => Err(FailureKind::Written { argument, output }),
        None => Ok(()),
    }
}

/// One call. `Display` is its name in reports.
#[derive(Clone, Copy, Debug)]
enum Op {
    Write {
        len: usize,
    },
    Read {
        len: usize,
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
    Norm {
        len: usize,
    },
    AdamW {
        teacher: bool,
        max_norm: Option<f64>,
        step: u64,
    },
}

/// Scores to select from.
#[derive(Clone, Copy, Debug)]
enum Scores {
    Different,
    /// Five values, zeros of both signs and infinities among them.
    Ties,
    /// One is NaN.
    NaN,
}

/// Tokens to decompose.
#[derive(Clone, Copy, Debug)]
enum QrInput {
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

fn layouts() -> [Layout; 2] {
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

fn is_large(layout: &Layout) -> bool {
    layout.vit.embed_dim > 100
}

/// All calls on parameters of `layout`.
fn cases(layout: &Layout) -> Vec<Op> {
    let mut ops = Vec::new();
    let Tail::Decoder(decoder) = layout.tail else {
        return ops;
    };
    let vit = &layout.vit;
    let (d, e) = (vit.embed_dim, decoder.blocks.dim);
    let block = layout.encoder.blocks.block(0);
    let hidden = vit.mlp_hidden();
    let small = !is_large(layout);
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
            for epilogue in [Epilogue::Bias, Epilogue::BiasGelu, Epilogue::BiasResidual] {
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
        ]);
        for rows_per_scale in [0, 1, 2, 3] {
            ops.push(Op::ScaleRows {
                dims,
                rows_per_scale,
            });
        }
    }
}

/// Makes the arguments of a call and keeps what the outputs held.
struct Stage<'a, B: TrainBackend> {
    backend: &'a mut B,
    layout: &'a Layout,
    /// Number of the argument to spoil.
    fault: Option<usize>,
    arguments: Vec<&'static str>,
    before: Vec<Vec<f32>>,
    after: Vec<Vec<f32>>,
    error: Option<String>,
    made: u64,
}

/// Elements of an output beyond those that the call may use.
const BEYOND: usize = 3;

fn buffer_error(error: impl core::error::Error) -> FailureKind {
    FailureKind::Buffer {
        error: error.to_string(),
    }
}

impl<B: TrainBackend> Stage<'_, B> {
    fn rng(&mut self) -> Stream {
        self.made += 1;
        Stream::new(1, 0, self.made, Purpose::Init)
    }

    /// Numbers of mean 0 and variance 1.
    fn noise(&mut self, len: usize) -> Vec<f32> {
        let mut rng = self.rng();
        let wide = 2.0 * 1.732_050_8;
        (0..len).map(|_| (rng.uniform() - 0.5) * wide).collect()
    }

    /// Whether to spoil the argument that comes now.
    fn spoil(&mut self, name: &'static str) -> bool {
        self.arguments.push(name);
        self.fault == Some(self.arguments.len() - 1)
    }

    /// `values` without its last element if this is the argument to spoil.
    fn shorten<'v, T>(&mut self, name: &'static str, values: &'v [T]) -> &'v [T] {
        match values.split_last() {
            Some((_, shorter)) if self.spoil(name) => shorter,
            _ => values,
        }
    }

    fn buf_of(&mut self, values: &[f32]) -> Result<B::Buf, FailureKind> {
        let mut buf = self.backend.buf(values.len()).map_err(buffer_error)?;
        self.backend.write(&mut buf, values).map_err(buffer_error)?;
        Ok(buf)
    }

    fn vector_of(&mut self, values: &[f32]) -> Result<B::Vector, FailureKind> {
        let mut vector = self.backend.vector(values.len()).map_err(buffer_error)?;
        self.backend
            .write_vector(&mut vector, 0, values)
            .map_err(buffer_error)?;
        Ok(vector)
    }

    fn ids_of(&mut self, values: &[u32]) -> Result<B::Ids, FailureKind> {
        let mut ids = self.backend.ids(values.len()).map_err(buffer_error)?;
        self.backend
            .write_ids(&mut ids, values)
            .map_err(buffer_error)?;
        Ok(ids)
    }

    fn input_of(&mut self, name: &'static str, values: &[f32]) -> Result<B::Buf, FailureKind> {
        let values = self.shorten(name, values);
        self.buf_of(values)
    }

    fn input(&mut self, name: &'static str, len: usize) -> Result<B::Buf, FailureKind> {
        let values = self.noise(len);
        self.input_of(name, &values)
    }

    fn vector_input_of(
        &mut self,
        name: &'static str,
        values: &[f32],
    ) -> Result<B::Vector, FailureKind> {
        let values = self.shorten(name, values);
        self.vector_of(values)
    }

    fn vector_input(&mut self, name: &'static str, len: usize) -> Result<B::Vector, FailureKind> {
        let values = self.noise(len);
        self.vector_input_of(name, &values)
    }

    /// What an output of `len` elements holds at first.
    fn before(&mut self, name: &'static str, len: usize) -> Vec<f32> {
        let mut values = self.noise(len + BEYOND);
        if len > 0 && self.spoil(name) {
            values.truncate(len - 1);
        }
        self.before.push(values.clone());
        values
    }

    fn output(&mut self, name: &'static str, len: usize) -> Result<B::Buf, FailureKind> {
        let values = self.before(name, len);
        self.buf_of(&values)
    }

    fn vector_output(&mut self, name: &'static str, len: usize) -> Result<B::Vector, FailureKind> {
        let values = self.before(name, len);
        self.vector_of(&values)
    }

    /// The gradient of all parameters.
    fn grads(&mut self) -> Result<B::Vector, FailureKind> {
        let values = self.noise(self.layout.len());
        self.before.push(values.clone());
        self.vector_of(&values)
    }

    fn ids_output(&mut self, name: &'static str, len: usize) -> Result<B::Ids, FailureKind> {
        let mut values: Vec<u32> = (0..len + BEYOND).map(|i| 1000 + i as u32).collect();
        if len > 0 && self.spoil(name) {
            values.truncate(len - 1);
        }
        self.before
            .push(values.iter().map(|&id| id as f32).collect());
        self.ids_of(&values)
    }

    /// For each of `batch` sequences `count` different ids below `limit`, the largest among them.
    fn ids_input(
        &mut self,
        name: &'static str,
        batch: usize,
        count: usize,
        limit: usize,
    ) -> Result<B::Ids, FailureKind> {
        let mut rng = self.rng();
        let mut values = Vec::new();
        for _ in 0..batch {
            let mut ids: Vec<u32> = (0..limit as u32).collect();
            rng.shuffle(&mut ids);
            let last = ids.iter().position(|&id| id as usize + 1 == limit);
            if let Some(last) = last
                && last >= count
                && count > 0
            {
                ids.swap(0, last);
            }
            values.extend(ids.into_iter().take(count));
        }
        if let Some(last) = values.last_mut()
            && self.spoil(name)
        {
            *last = limit as u32;
        }
        let values = self.shorten(name, &values);
        self.ids_of(values)
    }

    fn span(&mut self, name: &'static str, span: Span) -> Span {
        self.span_of(name, span, true)
    }

    /// `needed`: whether the last element is.
    fn span_of(&mut self, name: &'static str, span: Span, needed: bool) -> Span {
        if needed && self.spoil(name) {
            return Span {
                len: span.len - 1,
                ..span
            };
        }
        if self.spoil(name) {
            return Span {
                start: self.layout.len() - span.len + 1,
                ..span
            };
        }
        span
    }

    fn linear(&mut self, layer: Linear) -> Linear {
        Linear {
            weight: self.span("layer.weight", layer.weight),
            bias: self.span("layer.bias", layer.bias),
        }
    }

    fn norm(&mut self, norm: Norm) -> Norm {
        Norm {
            weight: self.span("norm.weight", norm.weight),
            bias: self.span("norm.bias", norm.bias),
        }
    }

    /// Parameters around 0, of the size that keeps sums near 1.
    fn params_of(&mut self, layout: &Layout) -> Result<B::Params, FailureKind> {
        let mut values = self.noise(layout.len());
        layout.for_each(|tensor| {
            if tensor.kind == Kind::Weight {
                for value in &mut values[tensor.span.start..tensor.span.end()] {
                    *value *= 0.3;
                }
            }
        });
        self.backend.params(layout, &values).map_err(buffer_error)
    }

    fn params(&mut self) -> Result<B::Params, FailureKind> {
        self.params_of(self.layout)
    }

    fn done(&mut self, result: Result<(), B::Error>) {
        self.error = result.err().map(|error| error.to_string());
    }

    /// Reads the next output back. Outputs are read in the order in which they were made.
    fn read(&mut self, buf: &B::Buf) -> Result<(), FailureKind> {
        let mut values = self.blank();
        self.backend.read(&mut values, buf).map_err(buffer_error)?;
        self.after.push(values);
        Ok(())
    }

    fn read_vector(&mut self, vector: &B::Vector) -> Result<(), FailureKind> {
        let mut values = self.blank();
        self.backend
            .read_vector(&mut values, vector, 0)
            .map_err(buffer_error)?;
        self.after.push(values);
        Ok(())
    }

    fn read_ids(&mut self, ids: &B::Ids) -> Result<(), FailureKind> {
        let mut values: Vec<u32> = self.blank().iter().map(|_| 0).collect();
        self.backend
            .read_ids(&mut values, ids)
            .map_err(buffer_error)?;
        self.after
            .push(values.into_iter().map(|id| id as f32).collect());
        Ok(())
    }

    /// Room for the output that is read next.
    fn blank(&self) -> Vec<f32> {
        vec![0.0; self.before.get(self.after.len()).map_or(0, Vec::len)]
    }

    fn all_params(&mut self, params: &B::Params) -> Result<Vec<f32>, FailureKind> {
        self.params_values(self.layout, params)
    }

    fn params_values(
        &mut self,
        layout: &Layout,
        params: &B::Params,
    ) -> Result<Vec<f32>, FailureKind> {
        let mut values = Vec::new();
        let mut spans = Vec::new();
        layout.for_each(|tensor| spans.push(tensor.span));
        for span in spans {
            let mut tensor = vec![0.0; span.len];
            self.backend
                .read_params(&mut tensor, params, span)
                .map_err(buffer_error)?;
            values.extend(tensor);
        }
        Ok(values)
    }
}

/// Makes the arguments, calls the operation and reads its outputs back.
fn call<B: TrainBackend>(
    backend: &mut B,
    layout: &Layout,
    op: &Op,
    fault: Option<usize>,
) -> Result<Outcome, FailureKind> {
    let mut stage = Stage {
        backend,
        layout,
        fault,
        arguments: Vec::new(),
        before: Vec::new(),
        after: Vec::new(),
        error: None,
        made: 0,
    };
    stage.call(*op)?;
    Ok(Outcome {
        error: stage.error,
        outputs: stage.before.into_iter().zip(stage.after).collect(),
        arguments: stage.arguments,
    })
}

impl<B: TrainBackend> Stage<'_, B> {
    fn call(&mut self, op: Op) -> Result<(), FailureKind> {
        match op {
            Op::Write { .. }
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
            Op::Zero { .. } | Op::Norm { .. } | Op::AdamW { .. } => self.flat(op),
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
                let mut scores = self.output("scores", dims.batch * dims.tokens)?;
                let result = self.backend.mean_similarity(dims, &mut scores, &x);
                self.done(result);
                self.read(&scores)
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
                let scores = self.input_of("scores", &values)?;
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
                let mut scores = self.output("scores", dims.batch * dims.tokens)?;
                let result = self.backend.pivoted_qr_scores(dims, &mut scores, &x);
                self.done(result);
                self.read(&scores)
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

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;

    #[test]
    fn the_reference_in_f32_conforms() {
        let (mut outputs, mut worst) = (0, (0.0, String::new()));
        let result = run(
            &mut Reference::<f32, _>::owned(),
            Tolerance::F32,
            |compared| {
                outputs += 1;
                if compared.worst > worst.0 {
                    worst = (
                        compared.worst,
                        format!("{} {}", compared.case, compared.output),
                    );
                }
            },
        );
        std::println!("{outputs} outputs, worst {worst:?}");
        if let Err(failure) = result {
            panic!("{failure}");
        }
        assert!(outputs > 500);
    }
}
