//! The pre-training loop.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use ndarray::Array2;
use pcae_backend_cpu::Memory;
use pcae_kernel::backend::{AdamW, Span, TrainBackend};
use pcae_kernel::config::{Criterion, PretrainConfig, Reduction, Target};
use pcae_kernel::init::init;
use pcae_kernel::layout::Layout;
use pcae_kernel::model::{CriterionScorer, MeanSimilarity, Pretrainer, Scalars, TrainState, Vit};
use pcae_kernel::rng::{Purpose, Stream};
use pcae_kernel::schedule::{
    drop_path_rate, drop_path_scale, learning_rate, momentum, random_masking,
};
use pcae_kernel::sizing::Sizing;

use crate::backends::Job;
use crate::bench::describe;
use crate::checkpoint::{self, Position};
use crate::data::augment::Transform;
use crate::data::loader::{Batch, Loader, LoaderConfig, eval_batches};
use crate::data::{Dataset, Splits};
use crate::error::Error;
use crate::knn::{self, Features, Scaling};
use crate::metrics::{Metrics, Record, read_metrics, series};
use crate::progress::Progress;
use crate::report::curves::{Curves, write_png};
use crate::run_dir::{RunDir, RunState};
use crate::settings::{Method, Recipe, Settings};
use crate::{backends, data, interrupt};

/// Names of the scalars in `metrics.jsonl`.
mod names {
    pub(super) const LOSS: &str = "loss";
    pub(super) const SPREAD: &str = "target_spread";
    pub(super) const GRAD_NORM: &str = "grad_norm";
    pub(super) const LR: &str = "lr";
    pub(super) const MOMENTUM: &str = "momentum";
    pub(super) const IMAGES_PER_S: &str = "images_per_s";
    pub(super) const KNN: &str = "knn_top1";
    pub(super) const KNN_PIXELS: &str = "knn_top1_pixels";
}

/// The teacher has nearly collapsed when the spread of its features is below this part of what it was at first.
const COLLAPSED: f32 = 0.25;
/// Pictures encoded at a time for an evaluation.
const EVAL_BATCH: usize = 250;
/// Training pictures that an evaluation compares with, and held-out ones that it classifies, at most: the embedded set
/// whole, and on large sets an evaluation still takes seconds.
const EVAL_PICTURES: (usize, usize) = (10_000, 2_000);

/// What a run came to.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Summary {
    /// What was predicted.
    pub method: Method,
    /// The run directory.
    pub out: PathBuf,
    /// Optimizer steps done, those of earlier processes included.
    pub step: u64,
    /// Steps of the whole run.
    pub steps: u64,
    /// Loss of the last step.
    pub loss: f64,
    /// Pictures trained on per second in this process, evaluations and checkpoints left out; `None` if there were none.
    pub images_per_s: Option<f64>,
    /// kNN top-1 of the student's features; `None` without labels, or if the run was interrupted.
    pub knn_top1: Option<f64>,
    /// The same before training.
    pub knn_top1_untrained: Option<f64>,
    /// The same on the pixels themselves.
    pub knn_top1_pixels: Option<f64>,
    /// Whether a signal ended it early.
    pub interrupted: bool,
}

/// Starts a run in `settings.machine.out`.
///
/// # Errors
/// [`Error`]; nothing is overwritten.
pub fn start(settings: Settings) -> Result<Summary, Error> {
    launch(settings, None)
}

/// Continues the run in `out`, on the same settings but for `machine`, which may choose anew what has no part in the
/// numbers: `(key, value)` of [`crate::settings::Machine`].
///
/// # Errors
/// [`Error`]; the run stays as it is.
pub fn resume(out: &Path, machine: &[(String, String)]) -> Result<Summary, Error> {
    let (run, state) = RunDir::open(out)?;
    let mut settings = Settings::load(Some(&run.config()), machine)?;
    settings.machine.out = out.to_owned();
    launch(settings, Some((run, state)))
}

fn launch(mut settings: Settings, resume: Option<(RunDir, RunState)>) -> Result<Summary, Error> {
    let splits = data::open(settings.data.as_deref(), settings.in_chans)?;
    let recipe = settings.resolve(&splits)?;
    let machine = settings.machine.clone();
    let memory = planned_memory(&settings, &recipe, &splits)?;
    backends::run(
        &machine,
        Run {
            settings,
            recipe,
            memory,
            splits,
            resume,
        },
    )
}

/// What the backend will hold when everything has run once: the state, a step and an evaluation.
fn planned_memory(settings: &Settings, recipe: &Recipe, splits: &Splits) -> Result<Memory, Error> {
    let failed = |error| Error::backend("sizing", error);
    let (task, mut sizing) = (&recipe.task, Sizing::default());
    let layout = Layout::pretrain(task);
    let student = sizing.params(&layout, &[]).map_err(failed)?;
    let teacher = match task.target {
        Target::Teacher(_) => {
            let layout = TrainState::<Sizing>::teacher_layout(&task.vit);
            Some(sizing.teacher_params(&layout, &[]).map_err(failed)?)
        }
        Target::Pixels { .. } => None,
    };
    let state = TrainState::with_params(&mut sizing, layout, student, teacher, 0.0);
    let mut state = state.map_err(failed)?;
    let mut step = StepModel::new(&mut sizing, settings, task).map_err(failed)?;
    let mut evaluation = Evaluation::new(&mut sizing, settings, recipe, splits).map_err(failed)?;
    step.model
        .accumulate(&mut sizing, &mut state, 1.0, &mut step.scorer)
        .map_err(failed)?;
    let adamw = AdamW {
        lr: 0.0,
        beta1: 0.0,
        beta2: 0.0,
        eps: 0.0,
        step: 1,
        momentum: 0.0,
    };
    state.update(&mut sizing, &adamw, None).map_err(failed)?;
    if let Some(encoder) = &mut evaluation.encoder {
        let dim = task.vit.embed_dim;
        encoder
            .encode(&mut sizing, &state.student, &[], EVAL_BATCH, dim)
            .map_err(failed)?;
    }
    backends::memory(&settings.machine, &sizing)
}

struct Run {
    settings: Settings,
    recipe: Recipe,
    /// What was planned.
    memory: Memory,
    splits: Splits,
    resume: Option<(RunDir, RunState)>,
}

impl Job for Run {
    type Output = Summary;

    fn run<B: TrainBackend>(self, backend: &mut B, name: &str) -> Result<Summary, Error> {
        let Self {
            settings,
            recipe,
            memory,
            splits,
            resume,
        } = self;
        let failed = |error: B::Error| Error::backend(name, error);
        let task = recipe.task;
        let layout = Layout::pretrain(&task);
        let has_teacher = matches!(task.target, Target::Teacher(_));
        // Everything that can fail for want of memory or data comes before the run directory is touched.
        let fingerprint = splits.train.fingerprint()?;
        let mut step_model = StepModel::new(backend, &settings, &task).map_err(failed)?;
        let restored = match &resume {
            Some((_, RunState::HasCheckpoint(path))) => Some(checkpoint::load(
                path,
                &layout,
                has_teacher,
                &settings,
                &fingerprint,
            )?),
            _ => None,
        };
        let position = restored
            .as_ref()
            .map_or_else(Position::default, |values| values.position);
        let mut state = match restored {
            Some(values) => values
                .into_state(backend, layout, settings.weight_decay)
                .map_err(failed)?,
            None => {
                let mut student = vec![0.0; layout.len()];
                init(&layout, settings.seed, &mut student)
                    .map_err(|error| Error::backend(name, error))?;
                let params = backend.params(&layout, &student).map_err(failed)?;
                let teacher_layout = TrainState::<B>::teacher_layout(&task.vit);
                let teacher = has_teacher
                    .then(|| backend.teacher_params(&teacher_layout, &student))
                    .transpose()
                    .map_err(failed)?;
                // Before the vectors of the state are made, which are larger.
                drop(student);
                TrainState::with_params(backend, layout, params, teacher, settings.weight_decay)
                    .map_err(failed)?
            }
        };
        let mut evaluation =
            Evaluation::new(backend, &settings, &recipe, &splits).map_err(failed)?;
        let config = LoaderConfig {
            batch_size: settings.batch_size,
            seed: settings.seed,
            start: position.batches,
            workers: settings.machine.workers,
        };
        let mut loader = Loader::new(splits.train.clone(), recipe.transform.clone(), config)?;

        let is_new = resume.is_none();
        let (run, mut metrics) = match resume {
            Some((run, RunState::HasCheckpoint(_))) => {
                let metrics = Metrics::resume(&run, position.step)?;
                (run, metrics)
            }
            Some((run, RunState::Fresh)) => {
                let metrics = Metrics::create(&run)?;
                (run, metrics)
            }
            None => {
                let run = RunDir::create(&settings.machine.out, &settings.to_toml()?)?;
                let metrics = Metrics::create(&run)?;
                (run, metrics)
            }
        };
        for line in introduction(&settings, &recipe, &splits, &layout, name, memory) {
            eprintln!("{line}");
        }
        if !is_new {
            eprintln!(
                "resuming {} after step {}",
                run.path().display(),
                position.step
            );
        }
        let earlier = read_metrics(&run.metrics())?;
        let mut clock = earlier.last().map_or(0.0, |record| record.time_s);
        let mut first_spread = series(&earlier, names::SPREAD)
            .first()
            .map(|&(_, spread)| spread as f32)
            .filter(|spread| *spread > 0.0);
        let mut warned = false;
        let mut step = position.step;
        let mut batches = position.batches;
        let (mut images, mut seconds) = (0_u64, 0.0);

        // From here on there is something to save.
        interrupt::install().map_err(|error| Error::Io {
            what: "signal handlers".to_owned(),
            error,
        })?;
        if step == 0 && earlier.is_empty() {
            let mut scalars = BTreeMap::new();
            evaluation.pixels(&mut scalars)?;
            evaluation.student(backend, name, &state, &mut scalars)?;
            eprintln!("{}", describe_knn("before training", &scalars));
            metrics.log(&Record {
                step,
                epoch: 0.0,
                time_s: clock,
                scalars,
            })?;
        }
        // After the evaluation, which would spoil the estimate of the time left.
        let mut progress = Progress::new(step, recipe.steps);
        while step < recipe.steps && !interrupt::requested() {
            let began = Instant::now();
            state.begin_step(backend).map_err(failed)?;
            for _ in 0..settings.accum {
                let batch = loader.next()?;
                let done =
                    step_model.accumulate(backend, name, &mut state, &settings, &task, &batch);
                if done.is_err() && !is_finite(backend, &state).map_err(failed)? {
                    return Err(Error::Diverged {
                        step: step + 1,
                        loss: f32::NAN,
                    });
                }
                done?;
                loader.recycle(batch);
                batches += 1;
            }
            let adamw = AdamW {
                lr: learning_rate(
                    step,
                    recipe.steps,
                    recipe.warmup_steps,
                    recipe.lr,
                    settings.min_lr,
                ),
                beta1: settings.beta1,
                beta2: settings.beta2,
                eps: 1e-8,
                step: step + 1,
                momentum: momentum(step, recipe.steps, recipe.momentum, settings.momentum_end),
            };
            let Scalars { loss, spread, .. } = state.scalars(backend).map_err(failed)?;
            if !loss.is_finite() {
                return Err(Error::Diverged {
                    step: step + 1,
                    loss,
                });
            }
            let max_norm = (settings.clip_grad > 0.0).then_some(settings.clip_grad);
            state.update(backend, &adamw, max_norm).map_err(failed)?;
            let grad_norm = state.scalars(backend).map_err(failed)?.grad_norm;
            if !grad_norm.is_finite() {
                return Err(Error::Diverged {
                    step: step + 1,
                    loss,
                });
            }
            step += 1;

            let taken = began.elapsed().as_secs_f64();
            let step_images = settings.batch_size as u64 * settings.accum;
            images += step_images;
            seconds += taken;
            clock += taken;
            let mut scalars = BTreeMap::from([
                (names::LOSS.to_owned(), f64::from(loss)),
                (names::GRAD_NORM.to_owned(), f64::from(grad_norm)),
                (names::LR.to_owned(), adamw.lr),
                (names::IMAGES_PER_S.to_owned(), step_images as f64 / taken),
            ]);
            if has_teacher {
                scalars.insert(names::SPREAD.to_owned(), f64::from(spread));
                scalars.insert(names::MOMENTUM.to_owned(), adamw.momentum);
                let first = *first_spread.get_or_insert(spread);
                if spread < COLLAPSED * first && !warned {
                    warned = true;
                    progress.println(&format!(
                        "warning: step {step}: the spread of the teacher's features fell from {first:.3} to {spread:.3}: \
                         it is collapsing to a constant. Raise momentum (now {:.4}) or lower --lr (now {:.1e})",
                        adamw.momentum, adamw.lr
                    ));
                }
            }
            let done = step == recipe.steps;
            let evaluate = done
                || (settings.eval_every > 0
                    && step.is_multiple_of(
                        settings.eval_every.saturating_mul(recipe.steps_per_epoch),
                    ));
            if evaluate {
                evaluation.student(backend, name, &state, &mut scalars)?;
            }
            let epoch = batches as f64 / loader.batches_per_epoch() as f64;
            let record = Record {
                step,
                epoch,
                time_s: clock,
                scalars,
            };
            metrics.log(&record)?;
            progress.set(step, images as f64 / seconds, loss);
            if evaluate {
                progress.println(&describe_knn(
                    &format!("step {step}, epoch {epoch:.1}"),
                    &record.scalars,
                ));
            }
            if evaluate || done || step.is_multiple_of(recipe.save_every) {
                metrics.sync()?;
                checkpoint::save(
                    &run.last_checkpoint(),
                    backend,
                    &state,
                    &settings,
                    &fingerprint,
                    Position { step, batches },
                )?;
                draw(&run, &settings)?;
            }
        }
        let interrupted = step < recipe.steps;
        if interrupted {
            metrics.sync()?;
            checkpoint::save(
                &run.last_checkpoint(),
                backend,
                &state,
                &settings,
                &fingerprint,
                Position { step, batches },
            )?;
        }
        progress.finish();
        let records = read_metrics(&run.metrics())?;
        draw(&run, &settings)?;
        let knn = series(&records, names::KNN);
        let at = |wanted: u64| {
            knn.iter()
                .find(|(step, _)| *step == wanted)
                .map(|&(_, value)| value)
        };
        Ok(Summary {
            method: settings.method,
            out: run.path().to_owned(),
            step,
            steps: recipe.steps,
            loss: series(&records, names::LOSS)
                .last()
                .map_or(f64::NAN, |&(_, loss)| loss),
            images_per_s: (images > 0).then(|| images as f64 / seconds),
            knn_top1: at(recipe.steps),
            knn_top1_untrained: at(0),
            knn_top1_pixels: series(&records, names::KNN_PIXELS)
                .first()
                .map(|&(_, value)| value),
            interrupted,
        })
    }
}

/// The first lines of a run: what is trained on what, where, and how much of everything that takes.
fn introduction(
    settings: &Settings,
    recipe: &Recipe,
    splits: &Splits,
    layout: &Layout,
    backend: &str,
    memory: Memory,
) -> [String; 5] {
    let task = &recipe.task;
    let cost = pcae_kernel::flops::Step::new(task);
    let images = settings.batch_size as u64 * settings.accum;
    let reduction = match task.target {
        Target::Teacher(reduction) => {
            let mut counts = vec![task.masked().to_string()];
            reduction.for_each_stage(task.masked(), task.vit.depth, |_, keep| {
                counts.push(keep.to_string())
            });
            format!("teacher {}", counts.join(" -> "))
        }
        Target::Pixels { .. } => format!("pixels of {}", task.masked()),
    };
    [
        format!(
            "data      {}; held out {}",
            splits.train.describe(),
            splits.held_out.len()
        ),
        format!(
            "model     {} {:.2} M parameters, {}: {} patches, {} visible, {reduction}; {:.1} M multiply-adds an image",
            settings.model,
            layout.len() as f64 / 1e6,
            settings.method,
            task.vit.num_patches(),
            task.visible(),
            cost.total() as f64 / 1e6
        ),
        format!("backend   {backend}"),
        format!("memory    planned: {}, data apart", describe(memory)),
        format!(
            "schedule  {} steps of {images} images ({} an epoch), peak learning rate {:.2e}, run directory {}",
            recipe.steps,
            recipe.steps_per_epoch,
            recipe.lr,
            settings.machine.out.display()
        ),
    ]
}

/// Everything of one micro-batch that is not in the state.
struct StepModel<B: TrainBackend> {
    model: Pretrainer<B>,
    scorer: CriterionScorer<B>,
    noise: Vec<f32>,
    order: Vec<u32>,
    ids_keep: Vec<u32>,
    ids_remove: Vec<u32>,
    drop_path: Vec<f32>,
    selection: Vec<f32>,
}

impl<B: TrainBackend> StepModel<B> {
    fn new(backend: &mut B, settings: &Settings, task: &PretrainConfig) -> Result<Self, B::Error> {
        let reduction = match task.target {
            Target::Teacher(reduction) => reduction,
            Target::Pixels { .. } => Reduction::NONE,
        };
        let batch = settings.batch_size;
        Ok(Self {
            model: Pretrainer::new(backend, task, batch, settings.drop_path > 0.0)?,
            scorer: CriterionScorer::new(
                backend,
                &reduction,
                batch,
                task.masked(),
                task.vit.depth,
            )?,
            noise: vec![0.0; task.vit.num_patches()],
            order: vec![0; task.vit.num_patches()],
            ids_keep: Vec::with_capacity(batch * task.visible()),
            ids_remove: Vec::with_capacity(batch * task.masked()),
            drop_path: vec![0.0; task.vit.depth * 2 * batch],
            selection: Vec::with_capacity(batch * task.masked()),
        })
    }

    fn accumulate(
        &mut self,
        backend: &mut B,
        name: &str,
        state: &mut TrainState<B>,
        settings: &Settings,
        task: &PretrainConfig,
        batch: &Batch,
    ) -> Result<(), Error> {
        let failed = |error: B::Error| Error::backend(name, error);
        let stream =
            |sample: u64, purpose| Stream::new(settings.seed, batch.epoch, sample, purpose);
        self.ids_keep.clear();
        self.ids_remove.clear();
        for &sample in &batch.samples {
            let mut stream = stream(sample, Purpose::Mask);
            self.noise.fill_with(|| stream.uniform());
            random_masking(&self.noise, &mut self.order)
                .map_err(|error| Error::backend(name, error))?;
            let (keep, remove) = self.order.split_at(task.visible());
            self.ids_keep.extend_from_slice(keep);
            self.ids_remove.extend_from_slice(remove);
        }
        self.model
            .load(backend, &batch.images, &self.ids_keep, &self.ids_remove)
            .map_err(failed)?;
        if settings.drop_path > 0.0 {
            let count = batch.samples.len();
            for (i, &sample) in batch.samples.iter().enumerate() {
                let mut stream = stream(sample, Purpose::DropPath);
                for branch in 0..2 * task.vit.depth {
                    let rate = drop_path_rate(branch / 2, task.vit.depth, settings.drop_path);
                    self.drop_path[branch * count + i] = drop_path_scale(&mut stream, rate);
                }
            }
            self.model
                .set_drop_path(backend, &self.drop_path)
                .map_err(failed)?;
        }
        if let Target::Teacher(reduction) = task.target
            && reduction.criterion == Criterion::Random
        {
            self.draw_selection(backend, &reduction, settings, task, batch)
                .map_err(failed)?;
        }
        let scale = 1.0 / settings.accum as f64;
        self.model
            .accumulate(backend, state, scale, &mut self.scorer)
            .map_err(failed)
    }

    /// Random scores for each stage.
    fn draw_selection(
        &mut self,
        backend: &mut B,
        reduction: &Reduction,
        settings: &Settings,
        task: &PretrainConfig,
        batch: &Batch,
    ) -> Result<(), B::Error> {
        let mut stages = Vec::new();
        reduction.for_each_stage(task.masked(), task.vit.depth, |tokens, _| {
            stages.push(tokens)
        });
        for (stage, tokens) in stages.into_iter().enumerate() {
            self.selection.clear();
            for &sample in &batch.samples {
                // A stage is one more dimension of the key: data sets have fewer than 2^48 samples.
                let key = sample ^ (stage as u64) << 48;
                let mut stream = Stream::new(settings.seed, batch.epoch, key, Purpose::Selection);
                self.selection.extend((0..tokens).map(|_| stream.uniform()));
            }
            self.scorer.set_noise(backend, stage, &self.selection)?;
        }
        Ok(())
    }
}

/// Whether all of the student's parameters are numbers of a size that can be computed with.
fn is_finite<B: TrainBackend>(backend: &mut B, state: &TrainState<B>) -> Result<bool, B::Error> {
    let mut values = vec![0.0; state.layout.len()];
    let span = Span {
        start: 0,
        len: values.len(),
    };
    backend.read_params(&mut values, &state.student, span)?;
    // Squares of larger ones overflow f32.
    Ok(values.iter().all(|value| value.abs() < 1e18))
}

/// Saves the curves so far.
fn draw(run: &RunDir, settings: &Settings) -> Result<(), Error> {
    let records = read_metrics(&run.metrics())?;
    let knn = series(&records, names::KNN);
    let first = |series: &[(u64, f64)]| series.first().map(|&(_, value)| value);
    let curves = Curves {
        title: &format!("{} {}", settings.method, settings.model),
        loss: &series(&records, names::LOSS),
        spread: &series(&records, names::SPREAD),
        knn_top1: &knn,
        raw_pixels_top1: first(&series(&records, names::KNN_PIXELS)),
        untrained_top1: first(&knn),
    };
    Ok(write_png(&run.curves(), &curves)?)
}

fn describe_knn(when: &str, scalars: &BTreeMap<String, f64>) -> String {
    let Some(knn) = scalars.get(names::KNN) else {
        return format!("{when}: no labels, so no kNN");
    };
    let pixels = scalars
        .get(names::KNN_PIXELS)
        .map(|pixels| format!("; on raw pixels {:.1} %", 100.0 * pixels));
    format!(
        "{when}: kNN top-1 {:.1} %{}",
        100.0 * knn,
        pixels.unwrap_or_default()
    )
}

/// kNN of the student's features, averaged over the patches after the final norm.
struct Evaluation<B: TrainBackend> {
    /// `None` where the data has no two classes to tell apart.
    encoder: Option<Encoder<B>>,
    train: Dataset,
    held_out: Dataset,
    transform: Transform,
    knn_k: usize,
}

struct Encoder<B: TrainBackend> {
    vit: Vit<B>,
    images: B::Buf,
    mean: B::Buf,
}

impl<B: TrainBackend> Evaluation<B> {
    fn new(
        backend: &mut B,
        settings: &Settings,
        recipe: &Recipe,
        splits: &Splits,
    ) -> Result<Self, B::Error> {
        let vit = &recipe.task.vit;
        let labelled =
            |part: &Dataset| !part.is_empty() && (0..part.len()).all(|i| part.label(i).is_some());
        let has_labels = labelled(&splits.train) && labelled(&splits.held_out);
        let encoder = if splits.train.num_classes() < 2 || !has_labels {
            None
        } else {
            Some(Encoder {
                vit: Vit::new(
                    backend,
                    vit,
                    EVAL_BATCH,
                    vit.num_patches(),
                    true,
                    Reduction::NONE,
                )?,
                images: backend.buf(EVAL_BATCH * recipe.transform.output_len())?,
                mean: backend.buf(EVAL_BATCH * vit.embed_dim)?,
            })
        };
        Ok(Self {
            encoder,
            train: splits.train.thinned(EVAL_PICTURES.0),
            held_out: splits.held_out.thinned(EVAL_PICTURES.1),
            transform: recipe.transform.clone(),
            knn_k: settings.knn_k,
        })
    }

    /// Adds the figure of the pixels.
    fn pixels(&self, scalars: &mut BTreeMap<String, f64>) -> Result<(), Error> {
        if self.encoder.is_none() {
            return Ok(());
        }
        let features = |dataset| {
            self.features(dataset, self.transform.output_len(), |images, _| {
                Ok(images.to_vec())
            })
        };
        let (train, held_out) = (features(&self.train)?, features(&self.held_out)?);
        let top1 = knn::top1(&train, &held_out, Scaling::Raw, self.knn_k);
        scalars.insert(names::KNN_PIXELS.to_owned(), top1);
        Ok(())
    }

    /// Adds the figure of the student.
    fn student(
        &mut self,
        backend: &mut B,
        name: &str,
        state: &TrainState<B>,
        scalars: &mut BTreeMap<String, f64>,
    ) -> Result<(), Error> {
        let Some(mut encoder) = self.encoder.take() else {
            return Ok(());
        };
        let dim = state.layout.vit.embed_dim;
        let mut features = |dataset| {
            self.features(dataset, dim, |images, batch| {
                let features = encoder.encode(backend, &state.student, images, batch, dim);
                features.map_err(|error| Error::backend(name, error))
            })
        };
        let (train, held_out) = (features(&self.train), features(&self.held_out));
        self.encoder = Some(encoder);
        let top1 = knn::top1(&train?, &held_out?, Scaling::Standardised, self.knn_k);
        scalars.insert(names::KNN.to_owned(), top1);
        Ok(())
    }

    /// Features of a whole data set; `encode` maps the pixels of a batch of pictures.
    fn features(
        &self,
        dataset: &Dataset,
        dim: usize,
        mut encode: impl FnMut(&[f32], usize) -> Result<Vec<f32>, Error>,
    ) -> Result<Features, Error> {
        let mut x = Vec::with_capacity(dataset.len() * dim);
        let mut labels = Vec::with_capacity(dataset.len());
        for batch in eval_batches(dataset, &self.transform, EVAL_BATCH)? {
            let batch = batch?;
            x.extend(encode(&batch.images, batch.samples.len())?);
            labels.extend(batch.labels.unwrap_or_default());
        }
        let x =
            Array2::from_shape_vec((x.len() / dim, dim), x).map_err(|error| Error::Setting {
                name: "features".to_owned(),
                reason: error.to_string(),
            })?;
        Ok(Features { x, labels })
    }
}

impl<B: TrainBackend> Encoder<B> {
    fn encode(
        &mut self,
        backend: &mut B,
        params: &B::Params,
        images: &[f32],
        batch: usize,
        dim: usize,
    ) -> Result<Vec<f32>, B::Error> {
        backend.write(&mut self.images, images)?;
        self.vit.forward(
            backend,
            params,
            batch,
            &self.images,
            None,
            &mut MeanSimilarity,
        )?;
        let dims = self.vit.dims();
        let tokens = self.vit.final_norm(backend, params)?;
        backend.mean_pool(dims, &mut self.mean, tokens)?;
        let mut features = vec![0.0; batch * dim];
        backend.read(&mut features, &self.mean)?;
        Ok(features)
    }
}
