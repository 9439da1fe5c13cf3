//! Memory of a task, without taking it: a backend that computes nothing and counts what it is asked for.

use alloc::vec::Vec;

use crate::backend::{
    Accum, AdamW, AttentionDims, Backend, Clip, DecoderDims, EmbedParams, Epilogue, Linear,
    LinearDims, Norm, PatchDims, PixelDims, Pixels, RowDims, Segment, Span, TokenDims,
    TrainBackend,
};
use crate::error::Error;
use crate::layout::{Kind, Layout};
use crate::op::Op;

/// Counts the elements that a model takes from a backend, and notes the operations that it runs.
///
/// Build the task on it as on any backend, and run one step. No formula of a size is written twice, so the count is exact.
///
/// ```
/// use pcae_kernel::config::{Reduction, VitConfig};
/// use pcae_kernel::model::Vit;
/// use pcae_kernel::sizing::Sizing;
///
/// let vit = VitConfig::preset("vit-micro").ok_or("no such preset")?;
/// let mut sizing = Sizing::default();
/// Vit::new(&mut sizing, &vit, 1, vit.num_patches(), true, Reduction::NONE)?;
/// let plan = Vit::<Sizing>::plan(&vit, 1, vit.num_patches(), true);
/// assert_eq!(sizing.sizes.bufs + sizing.sizes.scores, plan.floats);
/// # Ok::<(), Box<dyn core::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Sizing {
    /// Elements so far.
    pub sizes: Sizes,
    ops: Vec<Op>,
    weights: Vec<Weight>,
}

/// A weight of a linear layer, of which a backend may keep copies in orders of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Weight {
    /// Its rows.
    pub out_features: usize,
    /// Its columns.
    pub in_features: usize,
    /// Whose it is.
    pub role: Role,
}

/// What parameters are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Training: forward and backward.
    Trained,
    /// A teacher: forwards, and its moving average.
    Teacher,
    /// Forwards alone.
    Frozen,
}

/// Elements that were asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sizes {
    /// In activations.
    pub bufs: usize,
    /// In scores.
    pub scores: usize,
    /// In indices.
    pub ids: usize,
    /// In gradients, moments, statistics and losses.
    pub vectors: usize,
    /// In parameters that may be trained, a teacher's among them.
    pub params: usize,
    /// Of those, in the weights of the linear layers of a teacher's blocks.
    pub teacher_weights: usize,
    /// In parameters for forwards alone.
    pub frozen: usize,
    /// In the largest batch of pictures that comes as values.
    pub values: usize,
}

/// Bytes that a task takes from a backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// In activations, indices and scores.
    pub activations: usize,
    /// In parameters, gradients and moments, and what else is kept in vectors.
    pub state: usize,
    /// In working memory, which grows during the first step.
    pub scratch: usize,
}

impl Memory {
    /// All of it.
    pub const fn total(&self) -> usize {
        self.activations
            .saturating_add(self.state)
            .saturating_add(self.scratch)
    }
}

impl Sizing {
    /// The different operations that ran.
    pub fn ops(&self) -> &[Op] {
        &self.ops
    }

    /// The weights of linear layers among all parameters.
    pub fn weights(&self) -> &[Weight] {
        &self.weights
    }

    fn note_weights(&mut self, layout: &Layout, role: Role) {
        layout.for_each(|tensor| {
            if tensor.kind == Kind::Weight {
                let out_features = tensor.shape().first().copied().unwrap_or(0);
                self.weights.push(Weight {
                    out_features,
                    in_features: tensor.span.len / out_features.max(1),
                    role,
                });
            }
        });
    }

    fn note(&mut self, op: Op) -> Result<(), Error> {
        if !self.ops.contains(&op) {
            self.ops.push(op);
        }
        Ok(())
    }
}

/// Stands for an activation, indices or parameters.
#[derive(Clone, Copy, Debug)]
pub struct Sized(());

/// Stands for a vector.
#[derive(Clone, Copy, Debug)]
pub struct SizedVector {
    len: usize,
}

fn add(count: &mut usize, len: usize) -> Result<Sized, Error> {
    *count = count.saturating_add(len);
    Ok(Sized(()))
}

impl Backend for Sizing {
    type Error = Error;
    type Buf = Sized;
    type Ids = Sized;
    type Scores = Sized;
    type Params = Sized;

    fn buf(&mut self, len: usize) -> Result<Sized, Error> {
        add(&mut self.sizes.bufs, len)
    }

    fn ids(&mut self, len: usize) -> Result<Sized, Error> {
        add(&mut self.sizes.ids, len)
    }

    fn scores(&mut self, len: usize) -> Result<Sized, Error> {
        add(&mut self.sizes.scores, len)
    }

    fn write(&mut self, _to: &mut Sized, from: &[f32]) -> Result<(), Error> {
        self.note(Op::Transfer {
            elements: from.len(),
        })
    }

    /// The dimensions alone count, and whether there are crops: `pixels` may be empty.
    fn write_pixels(
        &mut self,
        dims: PixelDims,
        _to: &mut Sized,
        pixels: Pixels<'_>,
    ) -> Result<(), Error> {
        self.note(Op::pixels(dims, &pixels))
    }

    /// The dimensions alone count: `from` may be empty.
    fn write_values(
        &mut self,
        dims: PixelDims,
        _to: &mut Sized,
        _from: &[f32],
    ) -> Result<(), Error> {
        self.sizes.values = self.sizes.values.max(dims.len());
        self.note(Op::Transfer {
            elements: dims.len(),
        })
    }

    fn read(&mut self, to: &mut [f32], _from: &Sized) -> Result<(), Error> {
        self.note(Op::Transfer { elements: to.len() })
    }

    fn write_ids(&mut self, _to: &mut Sized, from: &[u32]) -> Result<(), Error> {
        self.note(Op::Transfer {
            elements: from.len(),
        })
    }

    fn read_ids(&mut self, to: &mut [u32], _from: &Sized) -> Result<(), Error> {
        self.note(Op::Transfer { elements: to.len() })
    }

    fn write_scores(&mut self, _to: &mut Sized, from: &[f32]) -> Result<(), Error> {
        self.note(Op::Transfer {
            elements: from.len(),
        })
    }

    fn read_scores(&mut self, to: &mut [f32], _from: &Sized) -> Result<(), Error> {
        self.note(Op::Transfer { elements: to.len() })
    }

    fn gather_patches(
        &mut self,
        dims: PatchDims,
        _out: &mut Sized,
        _images: &Sized,
        _ids: Option<&Sized>,
    ) -> Result<(), Error> {
        self.note(Op::tokens(dims.patches_len()))
    }

    fn embed_tokens(
        &mut self,
        dims: TokenDims,
        _out: &mut Sized,
        _x: &Sized,
        _ids: Option<&Sized>,
        _params: &Sized,
        _embed: EmbedParams,
    ) -> Result<(), Error> {
        self.note(Op::tokens(dims.len()))
    }

    fn linear(
        &mut self,
        dims: LinearDims,
        _out: &mut Sized,
        _x: &Sized,
        _params: &Sized,
        _layer: Linear,
        _epilogue: Epilogue,
    ) -> Result<(), Error> {
        self.note(Op::Linear(dims))
    }

    fn layer_norm(
        &mut self,
        dims: RowDims,
        _out: &mut Sized,
        _x: &Sized,
        _params: &Sized,
        _norm: Norm,
    ) -> Result<(), Error> {
        self.note(Op::LayerNorm(dims))
    }

    fn attention(
        &mut self,
        dims: AttentionDims,
        _out: &mut Sized,
        _qkv: &Sized,
    ) -> Result<(), Error> {
        self.note(Op::Attention(dims))
    }

    fn mean_similarity(
        &mut self,
        dims: TokenDims,
        _scores: &mut Sized,
        _x: &Sized,
    ) -> Result<(), Error> {
        self.note(Op::MeanSimilarity(dims))
    }

    fn select(
        &mut self,
        batch: usize,
        tokens: usize,
        _keep: usize,
        _picked: &mut Sized,
        _scores: &Sized,
    ) -> Result<(), Error> {
        self.note(Op::Select { batch, tokens })
    }

    fn gather_tokens(
        &mut self,
        dims: TokenDims,
        keep: usize,
        _out: &mut Sized,
        _x: &Sized,
        _picked: &Sized,
    ) -> Result<(), Error> {
        self.note(Op::tokens(dims.with_tokens(keep).len()))
    }

    fn gather_ids(
        &mut self,
        batch: usize,
        tokens: usize,
        _keep: usize,
        _out: &mut Sized,
        _ids: Option<&Sized>,
        _picked: &Sized,
    ) -> Result<(), Error> {
        self.note(Op::Select { batch, tokens })
    }

    fn mean_pool(&mut self, dims: TokenDims, _out: &mut Sized, _x: &Sized) -> Result<(), Error> {
        self.note(Op::tokens(dims.len()))
    }
}

impl TrainBackend for Sizing {
    type Vector = SizedVector;

    fn vector(&mut self, len: usize) -> Result<SizedVector, Error> {
        self.sizes.vectors = self.sizes.vectors.saturating_add(len);
        Ok(SizedVector { len })
    }

    fn params(&mut self, layout: &Layout, _values: &[f32]) -> Result<Sized, Error> {
        self.note_weights(layout, Role::Trained);
        add(&mut self.sizes.params, layout.len())
    }

    fn teacher_params(&mut self, layout: &Layout, _values: &[f32]) -> Result<Sized, Error> {
        let blocks = layout.encoder.blocks;
        for index in 0..blocks.depth {
            for layer in blocks.block(index).linears() {
                add(&mut self.sizes.teacher_weights, layer.weight.len)?;
            }
        }
        self.note_weights(layout, Role::Teacher);
        add(&mut self.sizes.params, layout.len())
    }

    fn frozen_params(&mut self, layout: &Layout, _values: &[f32]) -> Result<Sized, Error> {
        self.note_weights(layout, Role::Frozen);
        add(&mut self.sizes.frozen, layout.len())
    }

    fn write_vector(
        &mut self,
        _to: &mut SizedVector,
        _at: usize,
        from: &[f32],
    ) -> Result<(), Error> {
        self.note(Op::Transfer {
            elements: from.len(),
        })
    }

    fn read_vector(
        &mut self,
        to: &mut [f32],
        _from: &SizedVector,
        _at: usize,
    ) -> Result<(), Error> {
        self.note(Op::Transfer { elements: to.len() })
    }

    fn read_params(&mut self, _to: &mut [f32], _from: &Sized, span: Span) -> Result<(), Error> {
        self.note(Op::Transfer { elements: span.len })
    }

    fn linear_gelu_saving(
        &mut self,
        dims: LinearDims,
        _out: &mut Sized,
        _pre_gelu: &mut Sized,
        _x: &Sized,
        _params: &Sized,
        _layer: Linear,
    ) -> Result<(), Error> {
        self.note(Op::Linear(dims))
    }

    fn linear_residual(
        &mut self,
        dims: LinearDims,
        _out: &mut Sized,
        _residual: &Sized,
        _x: &Sized,
        _params: &Sized,
        _layer: Linear,
        _scale: Option<(&Sized, usize)>,
    ) -> Result<(), Error> {
        self.note(Op::Linear(dims))
    }

    fn scale_rows(
        &mut self,
        dims: RowDims,
        _out: &mut Sized,
        _x: &Sized,
        _scale: &Sized,
        _rows_per_scale: usize,
    ) -> Result<(), Error> {
        self.note(Op::tokens(dims.len()))
    }

    fn linear_backward_input(
        &mut self,
        dims: LinearDims,
        _d_x: &mut Sized,
        _d_y: &Sized,
        _params: &Sized,
        _layer: Linear,
        _pre_gelu: Option<&Sized>,
    ) -> Result<(), Error> {
        self.note(Op::LinearInput(dims))
    }

    fn linear_backward_params(
        &mut self,
        dims: LinearDims,
        _grads: &mut SizedVector,
        _layer: Linear,
        _d_y: &Sized,
        _x: &Sized,
    ) -> Result<(), Error> {
        self.note(Op::LinearParams(dims))
    }

    fn layer_norm_saving(
        &mut self,
        dims: RowDims,
        _out: &mut Sized,
        _stats: &mut SizedVector,
        _x: &Sized,
        _params: &Sized,
        _norm: Norm,
    ) -> Result<(), Error> {
        self.note(Op::LayerNorm(dims))
    }

    fn layer_norm_backward(
        &mut self,
        dims: RowDims,
        _d_x: &mut Sized,
        _accum: Accum,
        _grads: &mut SizedVector,
        _d_y: &Sized,
        _x: &Sized,
        _stats: &SizedVector,
        _params: &Sized,
        _norm: Norm,
    ) -> Result<(), Error> {
        self.note(Op::LayerNormBackward(dims))
    }

    fn attention_saving(
        &mut self,
        dims: AttentionDims,
        _out: &mut Sized,
        _lse: &mut SizedVector,
        _qkv: &Sized,
    ) -> Result<(), Error> {
        self.note(Op::Attention(dims))
    }

    fn attention_backward(
        &mut self,
        dims: AttentionDims,
        _d_qkv: &mut Sized,
        _d_out: &Sized,
        _qkv: &Sized,
        _out: &Sized,
        _lse: &SizedVector,
    ) -> Result<(), Error> {
        self.note(Op::AttentionBackward(dims))
    }

    fn embed_tokens_backward(
        &mut self,
        dims: TokenDims,
        _d_x: &mut Sized,
        _grads: &mut SizedVector,
        _d_out: &Sized,
        _embed: EmbedParams,
    ) -> Result<(), Error> {
        self.note(Op::tokens(dims.len()))
    }

    fn decoder_tokens(
        &mut self,
        dims: DecoderDims,
        _out: &mut Sized,
        _x: &Sized,
        _ids_visible: &Sized,
        _ids_target: &Sized,
        _params: &Sized,
        _mask_token: Span,
        _pos_embed: Span,
    ) -> Result<(), Error> {
        self.note(Op::tokens(dims.len()))
    }

    fn decoder_tokens_backward(
        &mut self,
        dims: DecoderDims,
        _d_x: &mut Sized,
        _grads: &mut SizedVector,
        _d_out: &Sized,
        _mask_token: Span,
    ) -> Result<(), Error> {
        self.note(Op::tokens(dims.len()))
    }

    fn strip_prefix(&mut self, dims: TokenDims, _out: &mut Sized, _x: &Sized) -> Result<(), Error> {
        self.note(Op::tokens(dims.len()))
    }

    fn strip_prefix_backward(
        &mut self,
        dims: TokenDims,
        _d_x: &mut Sized,
        _d_out: &Sized,
    ) -> Result<(), Error> {
        self.note(Op::tokens(dims.len()))
    }

    fn gather_tokens_backward(
        &mut self,
        dims: TokenDims,
        _keep: usize,
        _d_x: &mut Sized,
        _d_out: &Sized,
        _picked: &Sized,
    ) -> Result<(), Error> {
        self.note(Op::tokens(dims.len()))
    }

    fn mean_pool_backward(
        &mut self,
        dims: TokenDims,
        _d_x: &mut Sized,
        _d_out: &Sized,
    ) -> Result<(), Error> {
        self.note(Op::tokens(dims.len()))
    }

    fn pivoted_qr_scores(
        &mut self,
        dims: TokenDims,
        _scores: &mut Sized,
        _x: &Sized,
    ) -> Result<(), Error> {
        self.note(Op::PivotedQr(dims))
    }

    fn standardise(&mut self, dims: RowDims, _out: &mut Sized, _x: &Sized) -> Result<(), Error> {
        self.note(Op::Target(dims))
    }

    fn feature_spread(
        &mut self,
        dims: RowDims,
        _out: &mut SizedVector,
        _at: usize,
        _x: &Sized,
    ) -> Result<(), Error> {
        self.note(Op::Target(dims))
    }

    fn cosine_loss(
        &mut self,
        dims: RowDims,
        _d_pred: &mut Sized,
        _losses: &mut SizedVector,
        _at: usize,
        _pred: &Sized,
        _target: &Sized,
        _scale: f64,
    ) -> Result<(), Error> {
        self.note(Op::Loss(dims))
    }

    fn mse_loss(
        &mut self,
        dims: RowDims,
        _d_pred: &mut Sized,
        _losses: &mut SizedVector,
        _at: usize,
        _pred: &Sized,
        _target: &Sized,
        _scale: f64,
    ) -> Result<(), Error> {
        self.note(Op::Loss(dims))
    }

    fn cross_entropy(
        &mut self,
        dims: RowDims,
        _d_logits: &mut Sized,
        _losses: &mut SizedVector,
        _at: usize,
        _logits: &Sized,
        _target: &Sized,
        _scale: f64,
    ) -> Result<(), Error> {
        self.note(Op::Loss(dims))
    }

    fn pixel_targets(
        &mut self,
        dims: PatchDims,
        _out: &mut Sized,
        _images: &Sized,
        _ids: &Sized,
    ) -> Result<(), Error> {
        self.note(Op::tokens(dims.patches_len()))
    }

    fn zero(&mut self, _x: &mut SizedVector, span: Span) -> Result<(), Error> {
        self.note(Op::Vector { elements: span.len })
    }

    fn copy_vector(
        &mut self,
        _to: &mut SizedVector,
        _at: usize,
        _from: &SizedVector,
        span: Span,
    ) -> Result<(), Error> {
        self.note(Op::Transfer { elements: span.len })
    }

    fn norm(&mut self, _out: &mut SizedVector, _at: usize, x: &SizedVector) -> Result<(), Error> {
        self.note(Op::Vector { elements: x.len })
    }

    fn adamw_ema(
        &mut self,
        _student: &mut Sized,
        teacher: Option<&mut Sized>,
        _grads: &mut SizedVector,
        _exp_avg: &mut SizedVector,
        _exp_avg_sq: &mut SizedVector,
        segments: &[Segment],
        _step: &AdamW,
        _clip: Option<Clip<'_, SizedVector>>,
    ) -> Result<(), Error> {
        self.note(Op::adamw(segments, teacher.is_some()))
    }
}
