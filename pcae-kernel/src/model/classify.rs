//! Training of a classifier with token reduction.

use super::state::{Scalars, TrainState, wrong_layout};
use super::trunk::{Scratch, ScratchSize, Trunk};
use super::vit::{Scorer, linear_dims, patch_dims};
use crate::backend::{
    Accum, Epilogue, Linear, LinearDims, Pixels, RowDims, TokenDims, TrainBackend,
};
use crate::config::{ClassifierConfig, Pool};
use crate::error::product;
use crate::layout::{Layout, Tail};

/// Forward and backward of one micro-batch of labelled pictures, and the buffers that takes.
pub struct ClassifierTrainer<B: TrainBackend> {
    config: ClassifierConfig,
    batch: usize,
    layout: Layout,
    head: Linear,
    images: B::Buf,
    /// A distribution over the classes per picture.
    labels: B::Buf,
    patches: B::Buf,
    trunk: Trunk<B>,
    /// The patch tokens' mean, or the class token.
    token: B::Buf,
    /// Which patch tokens pooling by the class token keeps: none.
    no_patches: B::Ids,
    /// `token` after the norm.
    pooled: B::Buf,
    pooled_stats: B::Vector,
    logits: B::Buf,
    d_logits: B::Buf,
    scratch: Scratch<B>,
}

impl<B: TrainBackend> ClassifierTrainer<B> {
    /// Makes room for micro-batches of `batch` pictures, with or without stochastic depth.
    ///
    /// `config` must have been checked.
    ///
    /// # Errors
    /// If memory is short.
    pub fn new(
        backend: &mut B,
        config: &ClassifierConfig,
        batch: usize,
        drop_path: bool,
    ) -> Result<Self, B::Error> {
        let layout = Layout::classifier(config);
        let Tail::Head(head, classes) = layout.tail else {
            return Err(wrong_layout("ClassifierTrainer::new").into());
        };
        let vit = &config.vit;
        let dims = TokenDims {
            batch,
            prefix: 1,
            tokens: vit.num_patches(),
            dim: vit.embed_dim,
        };
        let blocks = layout.encoder.blocks;
        let pooled = product(&[batch, vit.embed_dim]);
        let logits = product(&[batch, classes]);
        let patches = patch_dims(vit, batch, vit.num_patches());
        Ok(Self {
            config: *config,
            batch,
            head,
            images: backend.buf(patches.images_len())?,
            labels: backend.buf(logits)?,
            patches: backend.buf(patches.patches_len())?,
            trunk: Trunk::new(backend, blocks, dims, &config.reduction, drop_path)?,
            token: backend.buf(pooled)?,
            no_patches: backend.ids(0)?,
            pooled: backend.buf(pooled)?,
            pooled_stats: backend.vector(product(&[batch, 2]))?,
            logits: backend.buf(logits)?,
            d_logits: backend.buf(logits)?,
            scratch: Scratch::new(backend, ScratchSize::default().trunk(dims, &blocks))?,
            layout,
        })
    }

    /// Takes the next micro-batch.
    ///
    /// # Shapes
    /// `images: [batch, in_chans, height, width]`, normalised; `labels: [batch, num_classes]`, each row summing to 1.
    ///
    /// # Errors
    /// If one has more elements than its buffer.
    pub fn load(
        &mut self,
        backend: &mut B,
        images: &[f32],
        labels: &[f32],
    ) -> Result<(), B::Error> {
        let dims = self.config.vit.pixels(self.batch);
        backend.write_values(dims, &mut self.images, images)?;
        backend.write(&mut self.labels, labels)
    }

    /// [`Self::load`] of pictures of 8 bits; the batch, and the edges and channels of a picture, are those of the model.
    ///
    /// # Shapes
    /// `pixels`: see [`write_pixels`](crate::backend::Backend::write_pixels).
    ///
    /// # Errors
    /// As [`Self::load`], or if a part of `pixels` is too short.
    pub fn load_pixels(
        &mut self,
        backend: &mut B,
        pixels: Pixels<'_>,
        labels: &[f32],
    ) -> Result<(), B::Error> {
        let dims = self.config.vit.pixels(self.batch);
        backend.write_pixels(dims, &mut self.images, pixels)?;
        backend.write(&mut self.labels, labels)
    }

    /// Sets stochastic depth, see [`Trunk::set_drop_path`].
    ///
    /// # Errors
    /// As there.
    pub fn set_drop_path(&mut self, backend: &mut B, scales: &[f32]) -> Result<(), B::Error> {
        self.trunk.set_drop_path(backend, scales)
    }

    /// Adds the micro-batch's gradients, times `scale`, to `state.grads`, and its loss likewise to the scalars.
    ///
    /// # Errors
    /// What the backend reports.
    pub fn accumulate(
        &mut self,
        backend: &mut B,
        state: &mut TrainState<B>,
        scale: f64,
        scorer: &mut impl Scorer<B>,
    ) -> Result<(), B::Error> {
        self.forward(backend, &state.student, scorer)?;
        let rows = RowDims {
            rows: self.batch,
            dim: self.config.num_classes,
        };
        let (losses, logits, labels) = (&mut state.scalars, &self.logits, &self.labels);
        backend.cross_entropy(
            rows,
            &mut self.d_logits,
            losses,
            Scalars::LOSS,
            logits,
            labels,
            scale,
        )?;
        self.backward(backend, &state.student, &mut state.grads)
    }

    fn input_dims(&self) -> TokenDims {
        let vit = &self.config.vit;
        TokenDims {
            batch: self.batch,
            prefix: 1,
            tokens: vit.num_patches(),
            dim: vit.embed_dim,
        }
    }

    fn output_dims(&self) -> TokenDims {
        let dims = self.input_dims();
        dims.with_tokens(
            self.config
                .reduction
                .remaining(dims.tokens, self.config.vit.depth),
        )
    }

    fn project_dims(&self) -> LinearDims {
        let vit = &self.config.vit;
        linear_dims(
            self.batch * vit.num_patches(),
            vit.patch_len(),
            vit.embed_dim,
        )
    }

    fn forward(
        &mut self,
        backend: &mut B,
        params: &B::Params,
        scorer: &mut impl Scorer<B>,
    ) -> Result<(), B::Error> {
        let (vit, encoder) = (&self.config.vit, &self.layout.encoder);
        let (dims, out_dims, project) =
            (self.input_dims(), self.output_dims(), self.project_dims());
        let patches = patch_dims(vit, self.batch, dims.tokens);
        backend.gather_patches(patches, &mut self.patches, &self.images, None)?;
        let Scratch {
            a: projected,
            spare,
            ..
        } = &mut self.scratch;
        backend.linear(
            project,
            projected,
            &self.patches,
            params,
            encoder.patch_embed,
            Epilogue::Bias,
        )?;
        let input = self.trunk.input_mut(spare);
        backend.embed_tokens(dims, input, projected, None, params, encoder.embed(true))?;
        self.trunk
            .forward(backend, params, &mut self.scratch, scorer)?;
        let (token, tokens) = (&mut self.token, self.trunk.output());
        match self.config.pool {
            Pool::Mean => backend.mean_pool(out_dims, token, tokens)?,
            Pool::ClsToken => {
                backend.gather_tokens(out_dims, 0, token, tokens, &self.no_patches)?
            }
        }
        let rows = RowDims {
            rows: self.batch,
            dim: vit.embed_dim,
        };
        let (pooled, stats) = (&mut self.pooled, &mut self.pooled_stats);
        backend.layer_norm_saving(rows, pooled, stats, &self.token, params, encoder.norm)?;
        let head = linear_dims(self.batch, vit.embed_dim, self.config.num_classes);
        backend.linear(
            head,
            &mut self.logits,
            &self.pooled,
            params,
            self.head,
            Epilogue::Bias,
        )
    }

    fn backward(
        &mut self,
        backend: &mut B,
        params: &B::Params,
        grads: &mut B::Vector,
    ) -> Result<(), B::Error> {
        let encoder = &self.layout.encoder;
        let (dims, out_dims, project) =
            (self.input_dims(), self.output_dims(), self.project_dims());
        let d = dims.dim;
        let head = linear_dims(self.batch, d, self.config.num_classes);
        let rows = RowDims {
            rows: self.batch,
            dim: d,
        };
        let Scratch { a, b, .. } = &mut self.scratch;
        backend.linear_backward_params(head, grads, self.head, &self.d_logits, &self.pooled)?;
        backend.linear_backward_input(head, b, &self.d_logits, params, self.head, None)?;
        let stats = &self.pooled_stats;
        backend.layer_norm_backward(
            rows,
            a,
            Accum::Replace,
            grads,
            b,
            &self.token,
            stats,
            params,
            encoder.norm,
        )?;
        match self.config.pool {
            Pool::Mean => backend.mean_pool_backward(out_dims, b, a)?,
            Pool::ClsToken => {
                backend.gather_tokens_backward(out_dims, 0, b, a, &self.no_patches)?;
            }
        }
        self.scratch.swap();
        self.trunk
            .backward(backend, params, grads, &mut self.scratch)?;
        let Scratch { a, b, .. } = &mut self.scratch;
        backend.embed_tokens_backward(dims, b, grads, a, encoder.embed(true))?;
        backend.linear_backward_params(project, grads, encoder.patch_embed, b, &self.patches)?;
        self.scratch.settle();
        Ok(())
    }

    /// Scores of the classes, `[batch, num_classes]`.
    pub fn logits(&self) -> &B::Buf {
        &self.logits
    }

    /// What the head saw, `[batch, embed_dim]`.
    pub fn pooled(&self) -> &B::Buf {
        &self.pooled
    }
}
