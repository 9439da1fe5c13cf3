//! Inference, with token reduction on the way.

use crate::backend::{
    AttentionDims, Backend, BlockDims, Epilogue, Linear, LinearDims, PatchDims, RowDims, TokenDims,
};
use crate::config::{ClassifierConfig, Pool, Reduction, VitConfig};
use crate::error::{Error, product};
use crate::layout::{EncoderParams, Layout, Tail};

/// Elements that a model's buffers take up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Activations.
    pub floats: usize,
    /// Indices.
    pub ids: usize,
}

/// What one stage decided, for those who record or draw it.
#[derive(Debug)]
pub struct Selection<'a, B: Backend> {
    /// Number of the stage, from 0.
    pub stage: usize,
    /// Tokens before it, the class token not counted.
    pub tokens: usize,
    /// Tokens after it.
    pub keep: usize,
    /// Redundancy of each token, `[B, tokens]`.
    pub scores: &'a B::Scores,
    /// Patch positions of the tokens that stay, `[B, keep]`.
    pub ids: &'a B::Ids,
}

/// How redundancy is judged.
pub trait Scorer<B: Backend> {
    /// Writes the scores of the patch tokens of `x` at `stage`; the lowest stay.
    ///
    /// # Errors
    /// What the backend reports.
    fn score(
        &mut self,
        backend: &mut B,
        stage: usize,
        dims: TokenDims,
        scores: &mut B::Scores,
        x: &B::Buf,
    ) -> Result<(), B::Error>;

    /// Is told what was selected.
    ///
    /// # Errors
    /// What the backend reports.
    fn selected(&mut self, backend: &mut B, selection: Selection<'_, B>) -> Result<(), B::Error> {
        let _ = (backend, selection);
        Ok(())
    }

    /// Takes back what [`Scorer::score`] may have put into the place of `scores`, once the stage is done: all buffers are then where
    /// they were, and the next forward is the same work for a backend that keeps it.
    ///
    /// # Errors
    /// What the backend reports.
    fn take_back(&mut self, stage: usize, scores: &mut B::Scores) -> Result<(), B::Error> {
        let _ = (stage, scores);
        Ok(())
    }
}

/// The method's criterion: similarity to the mean token.
#[derive(Clone, Copy, Debug, Default)]
pub struct MeanSimilarity;

impl<B: Backend> Scorer<B> for MeanSimilarity {
    fn score(
        &mut self,
        backend: &mut B,
        _stage: usize,
        dims: TokenDims,
        scores: &mut B::Scores,
        x: &B::Buf,
    ) -> Result<(), B::Error> {
        backend.mean_similarity(dims, scores, x)
    }
}

/// Buffers of one stage of reduction.
pub(super) struct Selector<B: Backend> {
    scores: B::Scores,
    /// Patch positions of the tokens now, once a stage has run or the caller gave some.
    ids: B::Ids,
    next_ids: B::Ids,
    /// Whether these two are in each other's place.
    is_swapped: bool,
}

impl<B: Backend> Selector<B> {
    /// For at most `count` patch tokens in all.
    pub(super) fn new(backend: &mut B, count: usize) -> Result<Self, B::Error> {
        Ok(Self {
            scores: backend.scores(count)?,
            ids: backend.ids(count)?,
            next_ids: backend.ids(count)?,
            is_swapped: false,
        })
    }

    /// Scores `x`, writes the picked indices to `picked`, and follows the positions.
    pub(super) fn select(
        &mut self,
        backend: &mut B,
        scorer: &mut impl Scorer<B>,
        stage: usize,
        dims: TokenDims,
        keep: usize,
        x: &B::Buf,
        picked: &mut B::Ids,
        ids: Option<&B::Ids>,
    ) -> Result<(), B::Error> {
        let TokenDims { batch, tokens, .. } = dims;
        // Every forward goes through the same buffers, whatever the number of stages.
        if stage == 0 && self.is_swapped {
            self.swap();
        }
        scorer.score(backend, stage, dims, &mut self.scores, x)?;
        backend.select(batch, tokens, keep, picked, &self.scores)?;
        let before = if stage == 0 { ids } else { Some(&self.ids) };
        backend.gather_ids(batch, tokens, keep, &mut self.next_ids, before, picked)?;
        self.swap();
        scorer.selected(
            backend,
            Selection {
                stage,
                tokens,
                keep,
                scores: &self.scores,
                ids: &self.ids,
            },
        )?;
        scorer.take_back(stage, &mut self.scores)
    }

    fn swap(&mut self) {
        core::mem::swap(&mut self.ids, &mut self.next_ids);
        self.is_swapped = !self.is_swapped;
    }

    pub(super) fn ids(&self) -> &B::Ids {
        &self.ids
    }
}

/// Number of patch tokens and with it the shape of everything.
pub(super) fn linear_dims(rows: usize, in_features: usize, out_features: usize) -> LinearDims {
    LinearDims {
        rows,
        in_features,
        out_features,
    }
}

/// A vision transformer's forward in three buffers, whatever the depth.
pub struct Vit<B: Backend> {
    config: VitConfig,
    params: EncoderParams,
    with_cls_token: bool,
    reduction: Reduction,
    /// What the buffers were made for; `tokens` is the number of patches per picture before any stage.
    largest: TokenDims,
    /// The sequences now.
    now: TokenDims,
    /// Blocks run on them.
    blocks: usize,
    /// Stages run on them.
    stage: usize,
    /// The residual stream.
    x: B::Buf,
    /// Outputs of norms, of attention, of gathering, and in the end of the final norm.
    y: B::Buf,
    /// Patches, queries with keys and values, the MLP's hidden layer.
    wide: B::Buf,
    picked: B::Ids,
    selector: Selector<B>,
}

impl<B: Backend> Vit<B> {
    /// What [`Vit::new`] takes from the backend for the same arguments.
    pub const fn plan(
        config: &VitConfig,
        batch: usize,
        patches: usize,
        with_cls_token: bool,
    ) -> Plan {
        let rows = product(&[batch, patches.saturating_add(with_cls_token as usize)]);
        let row = config
            .embed_dim
            .saturating_mul(2)
            .saturating_add(Self::wide_dim(config));
        let tokens = product(&[batch, patches]);
        Plan {
            floats: product(&[rows, row]).saturating_add(tokens),
            ids: product(&[tokens, 3]),
        }
    }

    const fn wide_dim(config: &VitConfig) -> usize {
        let mut widest = 3 * config.embed_dim;
        if config.mlp_hidden() > widest {
            widest = config.mlp_hidden();
        }
        if config.patch_len() > widest {
            config.patch_len()
        } else {
            widest
        }
    }

    /// Makes room for `batch` pictures of which `patches` patches are looked at, with or without a class token.
    ///
    /// `config` and `reduction` must have been checked.
    ///
    /// # Errors
    /// If the backend has no room for [`Vit::plan`].
    pub fn new(
        backend: &mut B,
        config: &VitConfig,
        batch: usize,
        patches: usize,
        with_cls_token: bool,
        reduction: Reduction,
    ) -> Result<Self, B::Error> {
        let prefix = usize::from(with_cls_token);
        let largest = TokenDims {
            batch,
            prefix,
            tokens: patches,
            dim: config.embed_dim,
        };
        let rows = product(&[batch, prefix.saturating_add(patches)]);
        let tokens = product(&[batch, patches]);
        Ok(Self {
            config: *config,
            params: Layout::encoder(config).encoder,
            with_cls_token,
            reduction,
            largest,
            now: largest,
            blocks: 0,
            stage: 0,
            x: backend.buf(largest.len())?,
            y: backend.buf(largest.len())?,
            wide: backend.buf(product(&[rows, Self::wide_dim(config)]))?,
            picked: backend.ids(tokens)?,
            selector: Selector::new(backend, tokens)?,
        })
    }

    /// Changes what is dropped from the next forward on: one model, many budgets. `reduction` must have been checked.
    pub fn set_reduction(&mut self, reduction: Reduction) {
        self.reduction = reduction;
    }

    /// Runs the blocks on the patches `ids` of `batch` pictures (all patches for `None`), without the final norm.
    /// `batch` may be smaller than what there is room for.
    ///
    /// # Shapes
    /// `images: [batch, in_chans, height, width]`, `ids: [batch, patches]`.
    ///
    /// # Errors
    /// If there is no room for `batch`, or what the backend reports.
    pub fn forward(
        &mut self,
        backend: &mut B,
        params: &B::Params,
        batch: usize,
        images: &B::Buf,
        ids: Option<&B::Ids>,
        scorer: &mut impl Scorer<B>,
    ) -> Result<(), B::Error> {
        self.start(backend, params, batch, images, ids, scorer)?;
        self.advance(backend, params, self.config.depth, ids, scorer)
    }

    /// The part of [`Vit::forward`] before the first block. [`Vit::advance`] goes on from there, and in between
    /// [`Vit::tokens`] and [`Vit::final_norm`] show the tokens as they are: features of any layer in one forward.
    ///
    /// # Shapes
    /// As [`Vit::forward`].
    ///
    /// # Errors
    /// If there is no room for `batch`, or what the backend reports.
    pub fn start(
        &mut self,
        backend: &mut B,
        params: &B::Params,
        batch: usize,
        images: &B::Buf,
        ids: Option<&B::Ids>,
        scorer: &mut impl Scorer<B>,
    ) -> Result<(), B::Error> {
        if batch > self.largest.batch {
            let expected = "at most as many pictures as there is room for";
            return Err(Error::Dimensions {
                op: "forward",
                expected,
                found: batch,
            }
            .into());
        }
        self.now = TokenDims {
            batch,
            ..self.largest
        };
        // As at the first forward: each stage swaps them.
        if !self.stage.is_multiple_of(2) {
            core::mem::swap(&mut self.x, &mut self.y);
        }
        (self.blocks, self.stage) = (0, 0);
        self.embed(backend, params, images, ids)?;
        self.reduce(backend, None, ids, scorer)
    }

    /// Runs blocks, each with the stage that may follow it, until `blocks` have run since [`Vit::start`], whose `params`,
    /// `ids` and `scorer` it needs again.
    ///
    /// # Errors
    /// If there are fewer blocks or more have run, or what the backend reports.
    pub fn advance(
        &mut self,
        backend: &mut B,
        params: &B::Params,
        blocks: usize,
        ids: Option<&B::Ids>,
        scorer: &mut impl Scorer<B>,
    ) -> Result<(), B::Error> {
        if blocks < self.blocks || blocks > self.config.depth {
            let expected = "a number of blocks from those already run to all";
            return Err(Error::Dimensions {
                op: "advance",
                expected,
                found: blocks,
            }
            .into());
        }
        while self.blocks < blocks {
            let index = self.blocks;
            self.block(backend, params, index)?;
            self.blocks += 1;
            self.reduce(backend, Some(index), ids, scorer)?;
        }
        Ok(())
    }

    /// Patch embedding of the needed patches only, positions, class token.
    fn embed(
        &mut self,
        backend: &mut B,
        params: &B::Params,
        images: &B::Buf,
        ids: Option<&B::Ids>,
    ) -> Result<(), B::Error> {
        let patches = patch_dims(&self.config, self.now.batch, self.now.tokens);
        let dims = linear_dims(
            self.now.batch * self.now.tokens,
            self.config.patch_len(),
            self.config.embed_dim,
        );
        backend.gather_patches(patches, &mut self.wide, images, ids)?;
        backend.linear(
            dims,
            &mut self.y,
            &self.wide,
            params,
            self.params.patch_embed,
            Epilogue::Bias,
        )?;
        let embed = self.params.embed(self.with_cls_token);
        backend.embed_tokens(self.now, &mut self.x, &self.y, ids, params, embed)
    }

    /// `x = x + attn(norm1(x))`, `x = x + mlp(norm2(x))`.
    fn block(&mut self, backend: &mut B, params: &B::Params, index: usize) -> Result<(), B::Error> {
        let num_heads = self.config.num_heads;
        let dims = BlockDims {
            attention: AttentionDims {
                batch: self.now.batch,
                tokens: self.now.prefix + self.now.tokens,
                num_heads,
                head_dim: self.config.embed_dim / num_heads,
            },
            hidden: self.config.mlp_hidden(),
        };
        let Self { x, y, wide, .. } = self;
        let block = self.params.blocks.block(index);
        backend.block(dims, x, [y, wide], params, block)
    }

    /// Drops tokens if `after` (`None`: the input) is a stage.
    fn reduce(
        &mut self,
        backend: &mut B,
        after: Option<usize>,
        ids: Option<&B::Ids>,
        scorer: &mut impl Scorer<B>,
    ) -> Result<(), B::Error> {
        let Some(keep) = self.reduction.stage(after, self.now.tokens) else {
            return Ok(());
        };
        self.selector.select(
            backend,
            scorer,
            self.stage,
            self.now,
            keep,
            &self.x,
            &mut self.picked,
            ids,
        )?;
        backend.gather_tokens(self.now, keep, &mut self.y, &self.x, &self.picked)?;
        core::mem::swap(&mut self.x, &mut self.y);
        self.now.tokens = keep;
        self.stage += 1;
        Ok(())
    }

    /// The final norm of every token.
    ///
    /// # Shapes
    /// Returns `[batch, prefix + tokens, embed_dim]`, see [`Vit::dims`].
    ///
    /// # Errors
    /// What the backend reports.
    pub fn final_norm(&mut self, backend: &mut B, params: &B::Params) -> Result<&B::Buf, B::Error> {
        let rows = RowDims {
            rows: self.now.batch * (self.now.prefix + self.now.tokens),
            dim: self.now.dim,
        };
        backend.layer_norm(rows, &mut self.y, &self.x, params, self.params.norm)?;
        Ok(&self.y)
    }

    /// What [`Vit::final_norm`] last returned.
    pub fn normed(&self) -> &B::Buf {
        &self.y
    }

    /// The sequences after the last forward.
    pub fn dims(&self) -> TokenDims {
        self.now
    }

    /// The tokens after the last forward, before the final norm, shaped as [`Vit::dims`] says.
    pub fn tokens(&self) -> &B::Buf {
        &self.x
    }

    /// Patch positions of the tokens left, `[batch, tokens]`, once a stage has dropped some.
    pub fn ids(&self) -> &B::Ids {
        self.selector.ids()
    }
}

pub(super) fn patch_dims(vit: &VitConfig, batch: usize, taken: usize) -> PatchDims {
    PatchDims {
        batch,
        channels: vit.in_chans,
        height: vit.img_size[0],
        width: vit.img_size[1],
        patch_size: vit.patch_size,
        taken,
    }
}

/// A classifier's forward: class token kept, patch tokens reduced, pooling, norm, head.
pub struct Classifier<B: Backend> {
    config: ClassifierConfig,
    vit: Vit<B>,
    head: Linear,
    /// The patch tokens' mean, or the class token.
    token: B::Buf,
    /// `token` after the norm.
    pooled: B::Buf,
    logits: B::Buf,
}

impl<B: Backend> Classifier<B> {
    /// What [`Classifier::new`] takes from the backend.
    pub const fn plan(config: &ClassifierConfig, batch: usize) -> Plan {
        let plan = Vit::<B>::plan(&config.vit, batch, config.vit.num_patches(), true);
        let own = product(&[
            batch,
            config
                .vit
                .embed_dim
                .saturating_mul(2)
                .saturating_add(config.num_classes),
        ]);
        Plan {
            floats: plan.floats.saturating_add(own),
            ids: plan.ids,
        }
    }

    /// Makes room for `batch` pictures. `config` must have been checked.
    ///
    /// # Errors
    /// If the backend has no room for [`Classifier::plan`].
    pub fn new(backend: &mut B, config: &ClassifierConfig, batch: usize) -> Result<Self, B::Error> {
        let Tail::Head(head, _) = Layout::classifier(config).tail else {
            return Err(Error::Dimensions {
                op: "Classifier::new",
                expected: "a layout with a head",
                found: 0,
            }
            .into());
        };
        let vit = Vit::new(
            backend,
            &config.vit,
            batch,
            config.vit.num_patches(),
            true,
            config.reduction,
        )?;
        let width = product(&[batch, config.vit.embed_dim]);
        Ok(Self {
            config: *config,
            vit,
            head,
            token: backend.buf(width)?,
            pooled: backend.buf(width)?,
            logits: backend.buf(product(&[batch, config.num_classes]))?,
        })
    }

    /// Changes what is dropped from the next forward on, see [`Vit::set_reduction`].
    pub fn set_reduction(&mut self, reduction: Reduction) {
        self.config.reduction = reduction;
        self.vit.set_reduction(reduction);
    }

    /// Classifies `batch` pictures.
    ///
    /// # Shapes
    /// `images: [batch, in_chans, height, width]`; returns logits `[batch, num_classes]`.
    ///
    /// # Errors
    /// If there is no room for `batch`, or what the backend reports.
    pub fn forward(
        &mut self,
        backend: &mut B,
        params: &B::Params,
        batch: usize,
        images: &B::Buf,
        scorer: &mut impl Scorer<B>,
    ) -> Result<&B::Buf, B::Error> {
        self.vit
            .forward(backend, params, batch, images, None, scorer)?;
        let d = self.config.vit.embed_dim;
        let (dims, token, tokens) = (self.vit.dims(), &mut self.token, self.vit.tokens());
        match self.config.pool {
            Pool::Mean => backend.mean_pool(dims, token, tokens)?,
            // Of the patch tokens none, whatever was picked before.
            Pool::ClsToken => backend.gather_tokens(dims, 0, token, tokens, &self.vit.picked)?,
        }
        let norm = self.vit.params.norm;
        backend.layer_norm(
            RowDims {
                rows: batch,
                dim: d,
            },
            &mut self.pooled,
            &self.token,
            params,
            norm,
        )?;
        let head = linear_dims(batch, d, self.config.num_classes);
        backend.linear(
            head,
            &mut self.logits,
            &self.pooled,
            params,
            self.head,
            Epilogue::Bias,
        )?;
        Ok(&self.logits)
    }

    /// What the head saw, `[batch, embed_dim]`.
    pub fn pooled(&self) -> &B::Buf {
        &self.pooled
    }
}
