//! The pre-training step: PCAE, and MAE as its baseline.

use alloc::vec::Vec;
use core::mem::swap;

use super::state::{Scalars, TrainState, wrong_layout};
use super::trunk::{Scratch, ScratchSize, Trunk};
use super::vit::{MeanSimilarity, Scorer, Vit, linear_dims, patch_dims};
use crate::backend::{Accum, DecoderDims, Epilogue, Pixels, RowDims, TokenDims, TrainBackend};
use crate::config::{Criterion, PretrainConfig, Reduction, Target};
use crate::error::{Error, product};
use crate::layout::{DecoderParams, Layout, Tail};

/// Forward and backward of one micro-batch, and the buffers that takes.
pub struct Pretrainer<B: TrainBackend> {
    config: PretrainConfig,
    batch: usize,
    layout: Layout,
    decoder_params: DecoderParams,
    images: B::Buf,
    ids_keep: B::Ids,
    ids_remove: B::Ids,
    patches: B::Buf,
    student: Trunk<B>,
    latent: B::Buf,
    latent_stats: B::Vector,
    /// The latent in the decoder's width.
    embedded: B::Buf,
    decoder: Trunk<B>,
    /// The decoder's tokens at the positions to predict.
    tail: B::Buf,
    tail_stats: B::Vector,
    tail_norm: B::Buf,
    pred: B::Buf,
    d_pred: B::Buf,
    target: B::Buf,
    source: Source<B>,
    scratch: Scratch<B>,
}

/// Where targets come from.
#[expect(
    clippy::large_enum_variant,
    reason = "there is one, and a box would cost more"
)]
enum Source<B: TrainBackend> {
    Teacher { vit: Vit<B>, has_stages: bool },
    Pixels { raw: Option<B::Buf> },
}

impl<B: TrainBackend> Pretrainer<B> {
    /// Makes room for micro-batches of `batch` pictures, with or without stochastic depth in the student.
    ///
    /// `config` must have been checked.
    ///
    /// # Errors
    /// If memory is short.
    pub fn new(
        backend: &mut B,
        config: &PretrainConfig,
        batch: usize,
        drop_path: bool,
    ) -> Result<Self, B::Error> {
        let layout = Layout::pretrain(config);
        let Tail::Decoder(decoder_params) = layout.tail else {
            return Err(wrong_layout("Pretrainer::new").into());
        };
        let (vit, visible, targets) = (&config.vit, config.visible(), config.targets());
        let (d, e) = (vit.embed_dim, config.decoder.embed_dim);
        let student = TokenDims {
            batch,
            prefix: 1,
            tokens: visible,
            dim: d,
        };
        let decoder = TokenDims {
            batch,
            prefix: 1 + visible,
            tokens: targets,
            dim: e,
        };
        let latent_rows = product(&[batch, 1 + visible]);
        let target_rows = product(&[batch, targets]);
        let size = ScratchSize::default()
            .trunk(student, &layout.encoder.blocks)
            .trunk(decoder, &decoder_params.blocks)
            .matrix(latent_rows, d.max(e));
        let predictions = product(&[target_rows, config.target_dim()]);
        let source = match config.target {
            Target::Teacher(reduction) => Source::Teacher {
                vit: Vit::new(backend, vit, batch, config.masked(), false, reduction)?,
                has_stages: reduction.stages(vit.depth) > 0,
            },
            Target::Pixels { norm_pix: true } => Source::Pixels {
                raw: Some(backend.buf(predictions)?),
            },
            Target::Pixels { norm_pix: false } => Source::Pixels { raw: None },
        };
        Ok(Self {
            config: *config,
            batch,
            decoder_params,
            images: backend.buf(patch_dims(vit, batch, visible).images_len())?,
            ids_keep: backend.ids(product(&[batch, visible]))?,
            ids_remove: backend.ids(product(&[batch, config.masked()]))?,
            patches: backend.buf(patch_dims(vit, batch, visible).patches_len())?,
            student: Trunk::new(
                backend,
                layout.encoder.blocks,
                student,
                &Reduction::NONE,
                drop_path,
            )?,
            latent: backend.buf(student.len())?,
            latent_stats: backend.vector(product(&[latent_rows, 2]))?,
            embedded: backend.buf(product(&[latent_rows, e]))?,
            decoder: Trunk::new(
                backend,
                decoder_params.blocks,
                decoder,
                &Reduction::NONE,
                false,
            )?,
            tail: backend.buf(product(&[target_rows, e]))?,
            tail_stats: backend.vector(product(&[target_rows, 2]))?,
            tail_norm: backend.buf(product(&[target_rows, e]))?,
            pred: backend.buf(predictions)?,
            d_pred: backend.buf(predictions)?,
            target: backend.buf(predictions)?,
            source,
            scratch: Scratch::new(backend, size)?,
            layout,
        })
    }

    /// Takes the next micro-batch.
    ///
    /// # Shapes
    /// `images: [batch, in_chans, height, width]`, normalised; `ids_keep: [batch, visible]`,
    /// `ids_remove: [batch, masked]`.
    ///
    /// # Errors
    /// If one has more elements than its buffer.
    pub fn load(
        &mut self,
        backend: &mut B,
        images: &[f32],
        ids_keep: &[u32],
        ids_remove: &[u32],
    ) -> Result<(), B::Error> {
        backend.write(&mut self.images, images)?;
        backend.write_ids(&mut self.ids_keep, ids_keep)?;
        backend.write_ids(&mut self.ids_remove, ids_remove)
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
        ids_keep: &[u32],
        ids_remove: &[u32],
    ) -> Result<(), B::Error> {
        let dims = self.config.vit.pixels(self.batch);
        backend.write_pixels(dims, &mut self.images, pixels)?;
        backend.write_ids(&mut self.ids_keep, ids_keep)?;
        backend.write_ids(&mut self.ids_remove, ids_remove)
    }

    /// Sets the student's stochastic depth, see [`Trunk::set_drop_path`].
    ///
    /// # Errors
    /// As there.
    pub fn set_drop_path(&mut self, backend: &mut B, scales: &[f32]) -> Result<(), B::Error> {
        self.student.set_drop_path(backend, scales)
    }

    /// Adds the micro-batch's gradients, times `scale`, to `state.grads`, and its loss likewise to the scalars.
    ///
    /// # Errors
    /// What the backend reports; a NaN among the teacher's scores is one.
    pub fn accumulate(
        &mut self,
        backend: &mut B,
        state: &mut TrainState<B>,
        scale: f64,
        scorer: &mut impl Scorer<B>,
    ) -> Result<(), B::Error> {
        self.make_target(backend, state, scorer)?;
        self.encode(backend, &state.student)?;
        self.decode(backend, &state.student)?;
        let (rows, losses) = (self.predictions(), &mut state.scalars);
        let (d_pred, pred, target) = (&mut self.d_pred, &self.pred, &self.target);
        match self.source {
            Source::Teacher { .. } => {
                backend.cosine_loss(rows, d_pred, losses, Scalars::LOSS, pred, target, scale)?;
            }
            Source::Pixels { .. } => {
                backend.mse_loss(rows, d_pred, losses, Scalars::LOSS, pred, target, scale)?
            }
        }
        self.decode_backward(backend, &state.student, &mut state.grads)?;
        self.encode_backward(backend, &state.student, &mut state.grads)
    }

    fn predictions(&self) -> RowDims {
        RowDims {
            rows: self.batch * self.config.targets(),
            dim: self.config.target_dim(),
        }
    }

    /// The masked patches through the teacher, or their pixels.
    fn make_target(
        &mut self,
        backend: &mut B,
        state: &mut TrainState<B>,
        scorer: &mut impl Scorer<B>,
    ) -> Result<(), B::Error> {
        let (rows, target) = (self.predictions(), &mut self.target);
        match &mut self.source {
            Source::Teacher { vit, .. } => {
                let Some(teacher) = &state.teacher else {
                    return Err(wrong_layout("Pretrainer::accumulate").into());
                };
                vit.forward(
                    backend,
                    teacher,
                    self.batch,
                    &self.images,
                    Some(&self.ids_remove),
                    scorer,
                )?;
                let latent = vit.final_norm(backend, teacher)?;
                backend.standardise(rows, target, latent)?;
                backend.feature_spread(rows, &mut state.scalars, Scalars::SPREAD, target)
            }
            Source::Pixels { raw } => {
                let dims = patch_dims(&self.config.vit, self.batch, self.config.masked());
                match raw {
                    Some(raw) => {
                        backend.pixel_targets(dims, raw, &self.images, &self.ids_remove)?;
                        backend.standardise(rows, target, raw)
                    }
                    None => backend.pixel_targets(dims, target, &self.images, &self.ids_remove),
                }
            }
        }
    }

    /// Class token and visible patches through the student.
    fn encode(&mut self, backend: &mut B, params: &B::Params) -> Result<(), B::Error> {
        let (vit, encoder) = (&self.config.vit, &self.layout.encoder);
        let dims = self.student_dims();
        let visible = self.config.visible();
        let project = linear_dims(self.batch * visible, vit.patch_len(), vit.embed_dim);
        let patches = patch_dims(vit, self.batch, visible);
        backend.gather_patches(
            patches,
            &mut self.patches,
            &self.images,
            Some(&self.ids_keep),
        )?;
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
        let (input, ids) = (self.student.input_mut(spare), Some(&self.ids_keep));
        backend.embed_tokens(dims, input, projected, ids, params, encoder.embed(true))?;
        self.student
            .forward(backend, params, &mut self.scratch, &mut MeanSimilarity)?;
        let rows = RowDims {
            rows: self.batch * (1 + visible),
            dim: vit.embed_dim,
        };
        let (latent, stats) = (&mut self.latent, &mut self.latent_stats);
        backend.layer_norm_saving(
            rows,
            latent,
            stats,
            self.student.output(),
            params,
            encoder.norm,
        )
    }

    fn student_dims(&self) -> TokenDims {
        TokenDims {
            batch: self.batch,
            prefix: 1,
            tokens: self.config.visible(),
            dim: self.config.vit.embed_dim,
        }
    }

    /// The decoder's sequence, of which the last tokens are predictions.
    fn decoder_sequence(&self) -> TokenDims {
        let (prefix, tokens) = (1 + self.config.visible(), self.config.targets());
        TokenDims {
            batch: self.batch,
            prefix,
            tokens,
            dim: self.config.decoder.embed_dim,
        }
    }

    fn decoder_dims(&self) -> DecoderDims {
        let (visible, targets) = (self.config.visible(), self.config.targets());
        DecoderDims {
            batch: self.batch,
            visible,
            targets,
            dim: self.config.decoder.embed_dim,
        }
    }

    /// Latent to predictions. Norm and prediction see only the positions that count.
    fn decode(&mut self, backend: &mut B, params: &B::Params) -> Result<(), B::Error> {
        let p = self.decoder_params;
        let (d, e) = (self.config.vit.embed_dim, self.config.decoder.embed_dim);
        let (dims, sequence, rows) = (
            self.decoder_dims(),
            self.decoder_sequence(),
            self.predictions(),
        );
        let embed = linear_dims(self.batch * (1 + self.config.visible()), d, e);
        backend.linear(
            embed,
            &mut self.embedded,
            &self.latent,
            params,
            p.embed,
            Epilogue::Bias,
        )?;
        let ids_target = match &self.source {
            Source::Teacher {
                vit,
                has_stages: true,
            } => vit.ids(),
            _ => &self.ids_remove,
        };
        let (input, keep) = (
            self.decoder.input_mut(&mut self.scratch.spare),
            &self.ids_keep,
        );
        backend.decoder_tokens(
            dims,
            input,
            &self.embedded,
            keep,
            ids_target,
            params,
            p.mask_token,
            p.pos_embed,
        )?;
        self.decoder
            .forward(backend, params, &mut self.scratch, &mut MeanSimilarity)?;
        backend.strip_prefix(sequence, &mut self.tail, self.decoder.output())?;
        let tail = RowDims {
            rows: rows.rows,
            dim: e,
        };
        backend.layer_norm_saving(
            tail,
            &mut self.tail_norm,
            &mut self.tail_stats,
            &self.tail,
            params,
            p.norm,
        )?;
        let pred = linear_dims(rows.rows, e, rows.dim);
        backend.linear(
            pred,
            &mut self.pred,
            &self.tail_norm,
            params,
            p.pred,
            Epilogue::Bias,
        )
    }

    /// From `d_pred` to the gradient of the student's last block in `scratch.a`.
    fn decode_backward(
        &mut self,
        backend: &mut B,
        params: &B::Params,
        grads: &mut B::Vector,
    ) -> Result<(), B::Error> {
        let (p, dims, sequence, rows) = (
            self.decoder_params,
            self.decoder_dims(),
            self.decoder_sequence(),
            self.predictions(),
        );
        let (d, e) = (self.config.vit.embed_dim, self.config.decoder.embed_dim);
        let latent_rows = self.batch * (1 + self.config.visible());

        let pred = linear_dims(rows.rows, e, rows.dim);
        let tail = RowDims {
            rows: rows.rows,
            dim: e,
        };
        let Scratch { a, b, .. } = &mut self.scratch;
        backend.linear_backward_params(pred, grads, p.pred, &self.d_pred, &self.tail_norm)?;
        backend.linear_backward_input(pred, b, &self.d_pred, params, p.pred, None)?;
        let stats = &self.tail_stats;
        backend.layer_norm_backward(
            tail,
            a,
            Accum::Replace,
            grads,
            b,
            &self.tail,
            stats,
            params,
            p.norm,
        )?;
        backend.strip_prefix_backward(sequence, b, a)?;
        self.scratch.swap();
        self.decoder
            .backward(backend, params, grads, &mut self.scratch)?;

        let embed = linear_dims(latent_rows, d, e);
        let latent = RowDims {
            rows: latent_rows,
            dim: d,
        };
        let Scratch { a, b, .. } = &mut self.scratch;
        backend.decoder_tokens_backward(dims, b, grads, a, p.mask_token)?;
        backend.linear_backward_params(embed, grads, p.embed, b, &self.latent)?;
        backend.linear_backward_input(embed, a, b, params, p.embed, None)?;
        let (x, stats, norm) = (
            self.student.output(),
            &self.latent_stats,
            self.layout.encoder.norm,
        );
        backend.layer_norm_backward(latent, b, Accum::Replace, grads, a, x, stats, params, norm)?;
        self.scratch.swap();
        Ok(())
    }

    fn encode_backward(
        &mut self,
        backend: &mut B,
        params: &B::Params,
        grads: &mut B::Vector,
    ) -> Result<(), B::Error> {
        self.student
            .backward(backend, params, grads, &mut self.scratch)?;
        let (vit, encoder) = (&self.config.vit, &self.layout.encoder);
        let project = linear_dims(
            self.batch * self.config.visible(),
            vit.patch_len(),
            vit.embed_dim,
        );
        let dims = self.student_dims();
        let Scratch { a, b, .. } = &mut self.scratch;
        backend.embed_tokens_backward(dims, b, grads, a, encoder.embed(true))?;
        backend.linear_backward_params(project, grads, encoder.patch_embed, b, &self.patches)?;
        self.scratch.settle();
        Ok(())
    }

    /// The student's output after its final norm, `[batch, 1 + visible, embed_dim]`.
    pub fn student_latent(&self) -> &B::Buf {
        &self.latent
    }

    /// The teacher's output after its final norm, `[batch, targets, embed_dim]`, where there is a teacher.
    pub fn teacher_latent(&self) -> Option<&B::Buf> {
        match &self.source {
            Source::Teacher { vit, .. } => Some(vit.normed()),
            Source::Pixels { .. } => None,
        }
    }

    /// What is to be predicted, `[batch, targets, target_dim]`.
    pub fn target(&self) -> &B::Buf {
        &self.target
    }

    /// What is predicted, `[batch, targets, target_dim]`.
    pub fn pred(&self) -> &B::Buf {
        &self.pred
    }
}

/// Any [`Criterion`], the ablations included.
pub struct CriterionScorer<B: TrainBackend> {
    criterion: Criterion,
    noise: Vec<B::Scores>,
}

impl<B: TrainBackend> CriterionScorer<B> {
    /// The criterion of `reduction`, for `batch` sequences of `tokens` tokens before `depth` blocks.
    ///
    /// # Errors
    /// If memory is short.
    pub fn new(
        backend: &mut B,
        reduction: &Reduction,
        batch: usize,
        tokens: usize,
        depth: usize,
    ) -> Result<Self, B::Error> {
        let mut noise = Vec::new();
        if reduction.criterion == Criterion::Random {
            for _ in 0..reduction.stages(depth) {
                // Each trades places with a buffer for the longest sequence, so each must be as large.
                noise.push(backend.scores(product(&[batch, tokens]))?);
            }
        }
        Ok(Self {
            criterion: reduction.criterion,
            noise,
        })
    }

    /// Gives [`Criterion::Random`] its scores for the next forward; the other criteria need none.
    ///
    /// # Shapes
    /// `noise: [B, tokens of the stage]`.
    ///
    /// # Errors
    /// If there is no such stage or the noise is too long.
    pub fn set_noise(
        &mut self,
        backend: &mut B,
        stage: usize,
        noise: &[f32],
    ) -> Result<(), B::Error> {
        backend.write_scores(self.noise_of(stage)?, noise)
    }

    fn noise_of(&mut self, stage: usize) -> Result<&mut B::Scores, Error> {
        let limit = self.noise.len();
        let missing = Error::IndexOutOfRange {
            op: "CriterionScorer",
            what: "stage",
            limit,
            found: stage,
        };
        self.noise.get_mut(stage).ok_or(missing)
    }
}

impl<B: TrainBackend> Scorer<B> for CriterionScorer<B> {
    fn score(
        &mut self,
        backend: &mut B,
        stage: usize,
        dims: TokenDims,
        scores: &mut B::Scores,
        x: &B::Buf,
    ) -> Result<(), B::Error> {
        match self.criterion {
            Criterion::MeanSimilarity => backend.mean_similarity(dims, scores, x),
            Criterion::PivotedQr => backend.pivoted_qr_scores(dims, scores, x),
            Criterion::Random => {
                swap(scores, self.noise_of(stage)?);
                Ok(())
            }
        }
    }

    fn take_back(&mut self, stage: usize, scores: &mut B::Scores) -> Result<(), B::Error> {
        if self.criterion == Criterion::Random {
            swap(scores, self.noise_of(stage)?);
        }
        Ok(())
    }
}
