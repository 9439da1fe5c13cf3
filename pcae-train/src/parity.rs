//! Replays a golden fixture on a backend and measures the error of every tensor.
//!
//! A fixture is a safetensors file: `__metadata__["config"]` is the JSON of the case, `input.*` what goes in, `param.*` and
//! `teacher.*` the parameters, and `expect.*`, `grad.*`, `step.*`, `ema.*` what must come out.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

use pcae_kernel::backend::{AdamW, Backend, TokenDims, TrainBackend};
use pcae_kernel::config::{
    Budget, ClassifierConfig, ConfigError, Criterion, DecoderConfig, DropLayers, Place, Pool,
    PretrainConfig, Reduction, Target, VitConfig,
};
use pcae_kernel::layout::Layout;
use pcae_kernel::model::{
    ClassifierTrainer, MeanSimilarity, Pretrainer, Scorer, Selection, TrainState, Vit,
};
use pcae_kernel::schedule::random_masking;

use crate::checkpoint::file::{FileError, Reader};

/// What a replay may differ by, in the norm of each tensor over that of the expected one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance {
    /// Of activations.
    pub activations: f64,
    /// Of scores, targets, what a teacher computes, and losses.
    pub targets: f64,
    /// Of gradients, updated parameters and moving averages.
    pub gradients: f64,
    /// The part of a stage's tokens that may be others than the expected ones. Above 0 the replay goes on with the expected
    /// tokens, so that what comes after can be compared; at 0 it goes on with its own, and their order counts too.
    pub selected: f64,
}

impl Tolerance {
    /// For backends that compute in f32 or better.
    pub const F32: Self = Self {
        activations: 1e-5,
        targets: 1e-5,
        gradients: 1e-4,
        selected: 0.0,
    };

    /// For linear layers with operands in bf16 and sums in f32.
    ///
    /// Rounding two operands to 8 bits moves their product by `2^-9 * sqrt(2 / 3)`, 1.6e-3, in the mean square, and a sum of
    /// products of random signs by the same part of its norm. Errors of layers add up like their squares: the 40 layers of
    /// a model 10 blocks deep make 1e-2. Gradients start from what differs between prediction and target, have the same way
    /// back, and are sums of terms that cancel: measured 2.7e-2 at most on the fixtures, 4 blocks deep, where activations
    /// have 7.4e-3 and the losses of ten steps in a row 1.2e-2.
    pub const BF16: Self = Self {
        activations: 2e-2,
        targets: 2e-2,
        gradients: 5e-2,
        selected: 0.25,
    };

    /// For a teacher in fp8 beside a student in bf16, whose own activations are those of [`Tolerance::BF16`].
    ///
    /// Rounding an operand to the 4 bits of e4m3 moves it by `2^-4 / sqrt(3)` of the power of two below it, 2.6e-2 of itself in
    /// the mean square, and the product of two by 3.7e-2. A block adds to its stream two branches of two layers, each smaller than
    /// the stream: measured 6.3e-2 on a fixture 3 blocks deep, where scores have 5e-3, the loss 5.4e-3, and 1 of 30 tokens is
    /// another. Gradients start from the targets: 6e-2 in the mean, 1.03e-1 at most, of the class token.
    pub const FP8_TEACHER: Self = Self {
        targets: 1.2e-1,
        gradients: 2e-1,
        ..Self::BF16
    };
}

/// Why a fixture cannot be replayed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ParityError {
    /// The file cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// It is no fixture.
    #[error("fixture '{}': {reason}; make one with `pcae_reference.py --case JSON`", path.display())]
    NotAFixture {
        /// The file.
        path: PathBuf,
        /// What is missing or wrong.
        reason: String,
    },
    /// The case's configuration is impossible.
    #[error("fixture '{}': {error}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        error: ConfigError,
    },
    /// The backend failed.
    #[error("fixture '{}': {reason}", path.display())]
    Backend {
        /// The file.
        path: PathBuf,
        /// What the backend said.
        reason: String,
    },
}

/// One tensor's comparison.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Its name in the fixture.
    pub name: String,
    /// Largest absolute difference; for indices, the number of elements that differ.
    pub max_abs: f64,
    /// `‖found − expected‖ / ‖expected‖`, or `‖found‖` where nothing is expected; infinite if a value is not finite.
    pub relative: f64,
    /// What `relative` may be; 0 for indices that have to be exact.
    pub tolerance: f64,
}

impl Row {
    /// Whether the tensor is as expected.
    pub fn passes(&self) -> bool {
        self.relative <= self.tolerance
    }
}

/// All comparisons of one fixture.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// One row per tensor, in the order of computation.
    pub rows: Vec<Row>,
}

impl Report {
    /// Whether every tensor is as expected, and there was one.
    pub fn passes(&self) -> bool {
        !self.rows.is_empty() && self.rows.iter().all(Row::passes)
    }

    /// The tensor nearest to its tolerance or furthest beyond it.
    pub fn worst(&self) -> Option<&Row> {
        // Indices tolerate nothing: exact ones are never the worst, others always are.
        let share = |row: &Row| {
            if row.relative == 0.0 {
                0.0
            } else {
                row.relative / row.tolerance
            }
        };
        self.rows
            .iter()
            .max_by(|a, b| share(a).total_cmp(&share(b)))
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<44} {:>12} {:>12} {:>9}",
            "tensor", "max abs", "relative", "tolerance"
        )?;
        for row in &self.rows {
            let verdict = if row.passes() { "" } else { "  FAILS" };
            let Row {
                name,
                max_abs,
                relative,
                tolerance,
                ..
            } = row;
            writeln!(
                f,
                "{name:<44} {max_abs:>12.3e} {relative:>12.3e} {tolerance:>9.1e}{verdict}"
            )?;
        }
        match self.worst() {
            Some(worst) => {
                let failed = self.rows.iter().filter(|row| !row.passes()).count();
                let count = self.rows.len();
                write!(
                    f,
                    "parity: {count} tensors, worst {:.3e} ({})",
                    worst.relative, worst.name
                )?;
                if failed > 0 {
                    write!(f, ", {failed} beyond tolerance")
                } else {
                    Ok(())
                }
            }
            None => write!(f, "parity: 0 tensors, worst none"),
        }
    }
}

#[derive(Debug, serde::Deserialize)]
struct Case {
    task: String,
    img_size: [usize; 2],
    patch_size: usize,
    in_chans: usize,
    embed_dim: usize,
    depth: usize,
    num_heads: usize,
    mlp_ratio: f64,
    batch: usize,
    #[serde(default)]
    decoder_embed_dim: usize,
    #[serde(default)]
    decoder_depth: usize,
    #[serde(default)]
    decoder_num_heads: usize,
    #[serde(default)]
    lr: f64,
    #[serde(default)]
    weight_decay: f64,
    #[serde(default)]
    mask_ratio: f64,
    #[serde(default)]
    keep_ratio: f64,
    #[serde(default)]
    drop_layers: Vec<usize>,
    #[serde(default)]
    drop_ratio: f64,
    #[serde(default)]
    num_classes: usize,
    #[serde(default)]
    norm_pix: bool,
    #[serde(default)]
    ema_momentum: f64,
}

impl Case {
    fn vit(&self) -> VitConfig {
        VitConfig {
            img_size: self.img_size,
            in_chans: self.in_chans,
            patch_size: self.patch_size,
            embed_dim: self.embed_dim,
            depth: self.depth,
            num_heads: self.num_heads,
            mlp_ratio: self.mlp_ratio,
        }
    }

    fn reduction(&self, budget: Budget) -> Result<Reduction, ConfigError> {
        Ok(Reduction {
            criterion: Criterion::MeanSimilarity,
            place: Place::Progressive,
            drop_layers: DropLayers::new(&self.drop_layers, self.depth)?,
            budget,
        })
    }

    fn pretrain(&self) -> Result<PretrainConfig, ConfigError> {
        let target = if self.task == "mae" {
            Target::Pixels {
                norm_pix: self.norm_pix,
            }
        } else {
            Target::Teacher(self.reduction(Budget::Keep(self.keep_ratio))?)
        };
        let config = PretrainConfig {
            vit: self.vit(),
            decoder: DecoderConfig {
                embed_dim: self.decoder_embed_dim,
                depth: self.decoder_depth,
                num_heads: self.decoder_num_heads,
            },
            mask_ratio: self.mask_ratio,
            target,
        };
        config.check()?;
        Ok(config)
    }

    fn classifier(&self) -> Result<ClassifierConfig, ConfigError> {
        let reduction = self.reduction(Budget::Drop(self.drop_ratio))?;
        let config = ClassifierConfig {
            vit: self.vit(),
            num_classes: self.num_classes,
            pool: Pool::Mean,
            reduction,
        };
        config.check()?;
        Ok(config)
    }
}

/// Replays the fixture at `path`.
///
/// # Errors
/// [`ParityError`]; differences are no error but in the report.
pub fn replay<B: TrainBackend>(
    backend: &mut B,
    path: &Path,
    tolerance: Tolerance,
) -> Result<Report, ParityError> {
    let reader = Reader::open(path)?;
    let not_a_fixture = |reason: String| ParityError::NotAFixture {
        path: path.to_owned(),
        reason,
    };
    let config = reader
        .metadata()
        .get("config")
        .map(|config| (*config).to_owned());
    let config =
        config.ok_or_else(|| not_a_fixture("its metadata has no \"config\"".to_owned()))?;
    let case: Case = serde_json::from_str(&config)
        .map_err(|error| not_a_fixture(format!("its \"config\": {error}")))?;
    if case.batch == 0 || case.batch > 1 << 20 {
        return Err(not_a_fixture(format!(
            "expected a \"batch\" of at least 1, found {}",
            case.batch
        )));
    }
    let mut replay = Replay {
        path,
        tolerance,
        reader,
        case,
        compared: BTreeSet::new(),
        report: Report::default(),
    };
    match replay.case.task.as_str() {
        "pcae" | "mae" => replay.pretrain(backend)?,
        "classify" => replay.classify(backend)?,
        "encode" => replay.encode(backend)?,
        other => {
            let expected = "expected task \"pcae\", \"mae\", \"classify\" or \"encode\"";
            return Err(not_a_fixture(format!("{expected}, found {other:?}")));
        }
    }
    replay.all_compared()?;
    Ok(replay.report)
}

struct Replay<'a> {
    path: &'a Path,
    tolerance: Tolerance,
    reader: Reader,
    case: Case,
    compared: BTreeSet<String>,
    report: Report,
}

/// What the stages of a reduction decided, on the host.
#[derive(Default)]
struct Recorder {
    batch: usize,
    /// The tokens that each stage is made to keep, `[batch, keep]` patch positions in order; without any it keeps its own.
    expected: Vec<Vec<u32>>,
    /// Patch positions of the tokens before the next stage, `[batch, tokens]`.
    positions: Vec<u32>,
    /// Scores, and positions of the tokens with the lowest.
    stages: Vec<(Vec<f32>, Vec<u32>)>,
}

impl<B: Backend> Scorer<B> for Recorder {
    fn score(
        &mut self,
        backend: &mut B,
        stage: usize,
        dims: TokenDims,
        scores: &mut B::Scores,
        x: &B::Buf,
    ) -> Result<(), B::Error> {
        MeanSimilarity.score(backend, stage, dims, scores, x)?;
        let Some(expected) = self.expected.get(stage) else {
            return Ok(());
        };
        let (tokens, keep) = (dims.tokens, expected.len() / self.batch.max(1));
        let mut own = vec![0.0; self.batch * tokens];
        backend.read_scores(&mut own, scores)?;
        let (mut lowest, mut forced) = (Vec::new(), Vec::new());
        for (sequence, own) in own.chunks_exact(tokens).enumerate() {
            let positions = &self.positions[sequence * tokens..][..tokens];
            let wanted = &expected[sequence * keep..][..keep];
            let mut order: Vec<usize> = (0..tokens).collect();
            order.sort_by(|&i, &j| own[i].total_cmp(&own[j]));
            lowest.extend(order[..keep].iter().map(|&token| positions[token]));
            // The expected tokens come first, in their order.
            forced.extend(positions.iter().map(|position| {
                let rank = wanted.iter().position(|wanted| wanted == position);
                rank.unwrap_or(keep) as f32
            }));
        }
        self.positions.clone_from(expected);
        self.stages.push((own, lowest));
        backend.write_scores(scores, &forced)
    }

    fn selected(&mut self, backend: &mut B, selection: Selection<'_, B>) -> Result<(), B::Error> {
        if selection.stage < self.expected.len() {
            return Ok(());
        }
        let mut scores = vec![0.0; self.batch * selection.tokens];
        let mut ids = vec![0; self.batch * selection.keep];
        backend.read_scores(&mut scores, selection.scores)?;
        backend.read_ids(&mut ids, selection.ids)?;
        self.stages.push((scores, ids));
        Ok(())
    }
}

impl Replay<'_> {
    fn config_error(&self) -> impl Fn(ConfigError) -> ParityError + use<> {
        let path = self.path.to_owned();
        move |error| ParityError::Config {
            path: path.clone(),
            error,
        }
    }

    fn backend_error<E: fmt::Display>(&self) -> impl Fn(E) -> ParityError + use<E> {
        let path = self.path.to_owned();
        move |error| ParityError::Backend {
            path: path.clone(),
            reason: error.to_string(),
        }
    }

    /// Parameters `prefix.<name>` in the order of `layout`.
    fn parameters(&mut self, prefix: &str, layout: &Layout) -> Result<Vec<f32>, ParityError> {
        let mut tensors = Vec::new();
        layout.for_each(|tensor| tensors.push(tensor));
        // Before there is memory for them: the sizes come from the file, which may ask for more than there is.
        for tensor in &tensors {
            let name = format!("{prefix}.{}", tensor.name);
            let found = self.reader.shape(&name).unwrap_or_default();
            if found != tensor.shape() {
                let (expected, found) = (tensor.shape().to_vec(), found.to_vec());
                return Err(FileError::WrongShape {
                    path: self.path.to_owned(),
                    name,
                    expected,
                    found,
                }
                .into());
            }
        }
        let mut values = vec![0.0; layout.len()];
        for tensor in tensors {
            let found = self
                .reader
                .tensor_f32(&format!("{prefix}.{}", tensor.name), tensor.shape())?;
            values[tensor.span.start..tensor.span.end()].copy_from_slice(&found);
        }
        Ok(values)
    }

    fn images(&mut self) -> Result<Vec<f32>, ParityError> {
        let [height, width] = self.case.img_size;
        Ok(self.reader.tensor_f32(
            "input.images",
            &[self.case.batch, self.case.in_chans, height, width],
        )?)
    }

    fn pretrain<B: TrainBackend>(&mut self, backend: &mut B) -> Result<(), ParityError> {
        let config = self.case.pretrain().map_err(self.config_error())?;
        let failed = self.backend_error::<B::Error>();
        let layout = Layout::pretrain(&config);
        let (batch, patches) = (self.case.batch, config.vit.num_patches());
        let (visible, targets, d) = (config.visible(), config.targets(), config.vit.embed_dim);
        let has_teacher = matches!(config.target, Target::Teacher(_));

        let images = self.images()?;
        let noise = self.reader.tensor_f32("input.noise", &[batch, patches])?;
        let student = self.parameters("param", &layout)?;
        let teacher = if has_teacher {
            Some(self.parameters("teacher", &Layout::encoder(&config.vit))?)
        } else {
            None
        };
        let mut state = TrainState::new(
            backend,
            layout,
            &student,
            teacher.as_deref(),
            self.case.weight_decay,
        )
        .map_err(&failed)?;
        let mut model = Pretrainer::new(backend, &config, batch, false).map_err(&failed)?;

        let (keep, remove) = masks(&noise, patches, visible).map_err(self.backend_error())?;
        self.ids("expect.ids_keep", &keep, &[batch, visible])?;
        self.ids("expect.ids_remove", &remove, &[batch, patches - visible])?;
        let mut recorder = self.recorder(remove.clone())?;
        model
            .load(backend, &images, &keep, &remove)
            .map_err(&failed)?;
        model
            .accumulate(backend, &mut state, 1.0, &mut recorder)
            .map_err(&failed)?;
        self.stages(recorder)?;
        if let Some(latent) = model.teacher_latent() {
            self.buffer(
                backend,
                "expect.teacher_latent",
                latent,
                &[batch, targets, d],
            )?;
        }
        let shape = [batch, targets, config.target_dim()];
        self.buffer(backend, "expect.target", model.target(), &shape)?;
        self.buffer(
            backend,
            "expect.student_latent",
            model.student_latent(),
            &[batch, 1 + visible, d],
        )?;
        self.buffer(backend, "expect.pred", model.pred(), &shape)?;
        let loss = state.scalars(backend).map_err(&failed)?.loss;
        self.floats("expect.loss", &[loss], &[], self.tolerance.targets)?;
        self.update(backend, &mut state)?;

        if let Some(&[steps, ..]) = self.reader.shape("input.noise_steps") {
            let noises = self
                .reader
                .tensor_f32("input.noise_steps", &[steps, batch, patches])?;
            let mut state = TrainState::new(
                backend,
                layout,
                &student,
                teacher.as_deref(),
                self.case.weight_decay,
            )
            .map_err(&failed)?;
            let mut losses = Vec::new();
            for (step, noise) in (1..).zip(noises.chunks_exact(batch * patches)) {
                let (keep, remove) =
                    masks(noise, patches, visible).map_err(self.backend_error())?;
                model
                    .load(backend, &images, &keep, &remove)
                    .map_err(&failed)?;
                state.begin_step(backend).map_err(&failed)?;
                model
                    .accumulate(backend, &mut state, 1.0, &mut MeanSimilarity)
                    .map_err(&failed)?;
                losses.push(state.scalars(backend).map_err(&failed)?.loss);
                state
                    .update(backend, &self.adamw(step), None)
                    .map_err(&failed)?;
            }
            self.floats("expect.losses", &losses, &[steps], self.tolerance.targets)?;
        }
        Ok(())
    }

    fn classify<B: TrainBackend>(&mut self, backend: &mut B) -> Result<(), ParityError> {
        let config = self.case.classifier().map_err(self.config_error())?;
        let failed = self.backend_error::<B::Error>();
        let layout = Layout::classifier(&config);
        let (batch, classes) = (self.case.batch, config.num_classes);
        let images = self.images()?;
        let params = self.parameters("param", &layout)?;
        let labels = self.reader.tensor_i64("input.labels")?;
        let mut one_hot = vec![0.0; batch * classes];
        if labels.len() != batch {
            let reason = format!("expected {batch} labels, found {}", labels.len());
            return Err(ParityError::NotAFixture {
                path: self.path.to_owned(),
                reason,
            });
        }
        for (row, &label) in one_hot.chunks_exact_mut(classes).zip(&labels) {
            match usize::try_from(label)
                .ok()
                .and_then(|label| row.get_mut(label))
            {
                Some(hot) => *hot = 1.0,
                None => {
                    let reason =
                        format!("expected labels from 0 to {}, found {label}", classes - 1);
                    return Err(ParityError::NotAFixture {
                        path: self.path.to_owned(),
                        reason,
                    });
                }
            }
        }
        let mut state = TrainState::new(backend, layout, &params, None, self.case.weight_decay)
            .map_err(&failed)?;
        let mut model = ClassifierTrainer::new(backend, &config, batch, false).map_err(&failed)?;
        let patches = config.vit.num_patches() as u32;
        let mut recorder = self.recorder((0..batch).flat_map(|_| 0..patches).collect())?;
        model.load(backend, &images, &one_hot).map_err(&failed)?;
        model
            .accumulate(backend, &mut state, 1.0, &mut recorder)
            .map_err(&failed)?;
        self.stages(recorder)?;
        self.buffer(
            backend,
            "expect.pooled",
            model.pooled(),
            &[batch, config.vit.embed_dim],
        )?;
        self.buffer(backend, "expect.logits", model.logits(), &[batch, classes])?;
        let loss = state.scalars(backend).map_err(&failed)?.loss;
        self.floats("expect.loss", &[loss], &[], self.tolerance.targets)?;
        self.update(backend, &mut state)
    }

    fn encode<B: TrainBackend>(&mut self, backend: &mut B) -> Result<(), ParityError> {
        let vit = self.case.vit();
        vit.check().map_err(self.config_error())?;
        let failed = self.backend_error::<B::Error>();
        let layout = Layout::encoder(&vit);
        let batch = self.case.batch;
        let images = self.images()?;
        let params = self.parameters("param", &layout)?;
        let params = backend.params(&layout, &params).map_err(&failed)?;
        let mut on_device = backend.buf(images.len()).map_err(&failed)?;
        backend.write(&mut on_device, &images).map_err(&failed)?;
        let mut model = Vit::new(
            backend,
            &vit,
            batch,
            vit.num_patches(),
            true,
            Reduction::NONE,
        )
        .map_err(&failed)?;
        model
            .forward(
                backend,
                &params,
                batch,
                &on_device,
                None,
                &mut MeanSimilarity,
            )
            .map_err(&failed)?;
        let tokens = model.final_norm(backend, &params).map_err(&failed)?;
        self.buffer(
            backend,
            "expect.tokens",
            tokens,
            &[batch, 1 + vit.num_patches(), vit.embed_dim],
        )
    }

    fn adamw(&self, step: u64) -> AdamW {
        AdamW {
            lr: self.case.lr,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            step,
            momentum: self.case.ema_momentum,
        }
    }

    /// Records what the stages decide about the tokens at `positions`.
    fn recorder(&self, positions: Vec<u32>) -> Result<Recorder, ParityError> {
        let mut expected = Vec::new();
        if self.tolerance.selected > 0.0 {
            loop {
                let name = format!("expect.stage{}.ids", expected.len());
                if self.reader.shape(&name).is_none() {
                    break;
                }
                let ids = self.reader.tensor_i64(&name)?;
                // What is no position is found by nobody, and counts as another token.
                expected.push(ids.iter().map(|&id| id as u32).collect());
            }
        }
        Ok(Recorder {
            batch: self.case.batch,
            expected,
            positions,
            stages: Vec::new(),
        })
    }

    fn stages(&mut self, recorder: Recorder) -> Result<(), ParityError> {
        for (stage, (scores, ids)) in recorder.stages.into_iter().enumerate() {
            let batch = self.case.batch;
            let name = format!("expect.stage{stage}.scores");
            self.floats(
                &name,
                &scores,
                &[batch, scores.len() / batch],
                self.tolerance.targets,
            )?;
            self.selected(
                &format!("expect.stage{stage}.ids"),
                &ids,
                &[batch, ids.len() / batch],
            )?;
        }
        Ok(())
    }

    /// Compares the gradients, does the first optimizer step, and compares what it changed.
    fn update<B: TrainBackend>(
        &mut self,
        backend: &mut B,
        state: &mut TrainState<B>,
    ) -> Result<(), ParityError> {
        let failed = self.backend_error::<B::Error>();
        let mut tensors = Vec::new();
        state.layout.for_each(|tensor| tensors.push(tensor));
        for tensor in tensors.iter().filter(|tensor| tensor.is_trained()) {
            let mut values = vec![0.0; tensor.span.len];
            backend
                .read_vector(&mut values, &state.grads, tensor.span.start)
                .map_err(&failed)?;
            self.floats(
                &format!("grad.{}", tensor.name),
                &values,
                tensor.shape(),
                self.tolerance.gradients,
            )?;
        }
        state
            .update(backend, &self.adamw(1), None)
            .map_err(&failed)?;
        for tensor in &tensors {
            let mut values = vec![0.0; tensor.span.len];
            if tensor.is_trained() {
                backend
                    .read_params(&mut values, &state.student, tensor.span)
                    .map_err(&failed)?;
                self.floats(
                    &format!("step.{}", tensor.name),
                    &values,
                    tensor.shape(),
                    self.tolerance.gradients,
                )?;
            }
            if let Some(teacher) = state
                .teacher
                .as_ref()
                .filter(|_| tensor.span.end() <= state.layout.encoder_len())
            {
                backend
                    .read_params(&mut values, teacher, tensor.span)
                    .map_err(&failed)?;
                self.floats(
                    &format!("ema.{}", tensor.name),
                    &values,
                    tensor.shape(),
                    self.tolerance.gradients,
                )?;
            }
        }
        Ok(())
    }

    fn buffer<B: TrainBackend>(
        &mut self,
        backend: &mut B,
        name: &str,
        found: &B::Buf,
        shape: &[usize],
    ) -> Result<(), ParityError> {
        let mut values = vec![0.0; shape.iter().product()];
        backend
            .read(&mut values, found)
            .map_err(self.backend_error())?;
        let tolerance = match name {
            "expect.teacher_latent" | "expect.target" => self.tolerance.targets,
            _ => self.tolerance.activations,
        };
        self.floats(name, &values, shape, tolerance)
    }

    fn floats(
        &mut self,
        name: &str,
        found: &[f32],
        shape: &[usize],
        tolerance: f64,
    ) -> Result<(), ParityError> {
        let expected = self.reader.tensor_f32(name, shape)?;
        let (mut max_abs, mut difference, mut norm) = (0.0_f64, 0.0, 0.0);
        let mut finite = true;
        for (&found, &expected) in found.iter().zip(&expected) {
            finite &= found.is_finite() && expected.is_finite();
            let (found, expected) = (f64::from(found), f64::from(expected));
            max_abs = max_abs.max((found - expected).abs());
            difference += (found - expected).powi(2);
            norm += expected.powi(2);
        }
        let relative = match (finite, norm > 0.0) {
            (false, _) => f64::INFINITY,
            (true, true) => (difference / norm).sqrt(),
            (true, false) => difference.sqrt(),
        };
        self.compared.insert(name.to_owned());
        self.report.rows.push(Row {
            name: name.to_owned(),
            max_abs,
            relative,
            tolerance,
        });
        Ok(())
    }

    fn ids(&mut self, name: &str, found: &[u32], shape: &[usize]) -> Result<(), ParityError> {
        let expected = self.reader.tensor_i64(name)?;
        let in_file = self.reader.shape(name).unwrap_or_default();
        if in_file != shape {
            return Err(FileError::WrongShape {
                path: self.path.to_owned(),
                name: name.to_owned(),
                expected: shape.to_vec(),
                found: in_file.to_vec(),
            }
            .into());
        }
        let differ = found
            .iter()
            .zip(&expected)
            .filter(|&(&found, &expected)| i64::from(found) != expected);
        self.indices(name, differ.count(), expected.len(), 0.0);
        Ok(())
    }

    /// Tokens that a stage keeps, in any order where the tolerance lets it keep others.
    fn selected(&mut self, name: &str, found: &[u32], shape: &[usize]) -> Result<(), ParityError> {
        let tolerance = self.tolerance.selected;
        if tolerance == 0.0 {
            return self.ids(name, found, shape);
        }
        let expected = self.reader.tensor_i64(name)?;
        let each = (expected.len() / self.case.batch.max(1)).max(1);
        let missing = |(expected, found): (&[i64], &[u32])| {
            let is_missing = |id: &&i64| !found.iter().any(|&found| i64::from(found) == **id);
            expected.iter().filter(is_missing).count()
        };
        let pairs = expected.chunks(each).zip(found.chunks(each));
        let differ = pairs.map(missing).sum();
        self.indices(name, differ, expected.len(), tolerance);
        Ok(())
    }

    fn indices(&mut self, name: &str, differ: usize, of: usize, tolerance: f64) {
        self.compared.insert(name.to_owned());
        self.report.rows.push(Row {
            name: name.to_owned(),
            max_abs: differ as f64,
            relative: differ as f64 / of.max(1) as f64,
            tolerance,
        });
    }

    /// A result in the file that was not compared would be a check that cannot fail.
    fn all_compared(&self) -> Result<(), ParityError> {
        let is_result = |name: &String| {
            ["expect.", "grad.", "step.", "ema."]
                .iter()
                .any(|p| name.starts_with(p))
        };
        match self
            .reader
            .names()
            .into_iter()
            .find(|name| is_result(name) && !self.compared.contains(name))
        {
            Some(name) => {
                let reason = format!("it expects {name:?}, which its task does not compute");
                Err(ParityError::NotAFixture {
                    path: self.path.to_owned(),
                    reason,
                })
            }
            None => Ok(()),
        }
    }
}

/// Visible and masked patches of each picture, by ascending noise.
fn masks(
    noise: &[f32],
    patches: usize,
    visible: usize,
) -> Result<(Vec<u32>, Vec<u32>), pcae_kernel::error::Error> {
    let (mut keep, mut remove) = (Vec::new(), Vec::new());
    let mut order = vec![0; patches];
    for noise in noise.chunks_exact(patches) {
        random_masking(noise, &mut order)?;
        keep.extend_from_slice(&order[..visible]);
        remove.extend_from_slice(&order[visible..]);
    }
    Ok((keep, remove))
}
