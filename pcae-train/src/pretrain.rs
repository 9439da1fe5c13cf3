//! The pre-training loop.

use std::path::{Path, PathBuf};

use ndarray::Array2;
use pcae_kernel::backend::{AdamW, Pixels, TrainBackend};
use pcae_kernel::config::{PretrainConfig, Reduction, Target};
use pcae_kernel::init::init;
use pcae_kernel::layout::Layout;
use pcae_kernel::model::{CriterionScorer, MeanSimilarity, Pretrainer, Scalars, TrainState, Vit};
use pcae_kernel::rng::{Purpose, Stream};
use pcae_kernel::schedule::{momentum, random_masking};
use pcae_kernel::sizing::{Memory, Sizing};

use crate::backends::{Job, count};
use crate::bench::describe;
use crate::checkpoint::Identity;
use crate::data::augment::Transform;
use crate::data::images::{Images, View};
use crate::data::loader::{Batch, eval_batches};
use crate::data::{Dataset, Splits};
use crate::error::Error;
use crate::fit::BatchSize;
use crate::knn::{self, Features, Scaling};
use crate::metrics::{Record, series};
use crate::report::curves::{Curves, write_png};
use crate::run_dir::{RunDir, RunState};
use crate::settings::{Method, Recipe, Settings};
use crate::training::draws::{self, Key};
use crate::training::names::LOSS;
use crate::training::{self, Figures, Start, Task};
use crate::{backends, data, fit};

/// Names of the scalars in `metrics.jsonl` that pre-training alone has.
mod names {
    pub(super) const SPREAD: &str = "target_spread";
    pub(super) const MOMENTUM: &str = "momentum";
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
    /// Training pictures that could not be read, each counted once, among those that this process came to; another one took
    /// the place of each.
    pub unreadable_train: usize,
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
    let fitted = fit(&mut settings, &splits)?;
    let recipe = settings.resolve(&splits)?;
    let machine = settings.machine.clone();
    backends::check_teacher(&machine, &recipe.task)?;
    let memory = planned_memory(&settings, &recipe, &splits)?;
    backends::check_room(&machine, memory)?;
    backends::run(
        &machine,
        Run {
            settings,
            recipe,
            memory,
            fitted,
            splits,
            resume,
        },
    )
}

/// Chooses how many pictures a micro-batch has where the settings leave that open, and says so in a line.
fn fit(settings: &mut Settings, splits: &Splits) -> Result<Option<String>, Error> {
    if settings.batch_size != BatchSize::Auto {
        return Ok(None);
    }
    let mut one = Settings {
        batch_size: BatchSize::Pictures(1),
        ..settings.clone()
    };
    let recipe = one.resolve(splits)?;
    let augmentation = recipe.transform.clone().into();
    let (machine, vit) = (&settings.machine, &recipe.task.vit);
    let fitted = fit::largest(
        machine,
        vit,
        splits.train.len(),
        recipe.plan.accum,
        |batch| {
            let mut recipe = recipe.clone();
            recipe.plan.batch_size = batch;
            let memory = planned_memory(&one, &recipe, splits)?.total();
            Ok(memory.saturating_add(backends::of_loader(machine, &augmentation, batch)))
        },
    )?;
    settings.batch_size = BatchSize::Pictures(fitted.batch_size);
    // Which took a pass over the data.
    (settings.mean, settings.std) = (one.mean, one.std);
    Ok(Some(fitted.line))
}

/// What the backend will hold when everything has run once: the state, a step and an evaluation.
fn planned_memory(settings: &Settings, recipe: &Recipe, splits: &Splits) -> Result<Memory, Error> {
    let failed = |error| Error::backend("sizing", error);
    let (task, mut sizing) = (&recipe.task, Sizing::default());
    let layout = Layout::pretrain(task);
    let student = sizing.params(&layout, &[]).map_err(failed)?;
    let teacher = match task.target {
        Target::Teacher(_) => Some(
            sizing
                .teacher_params(&layout.teacher(), &[])
                .map_err(failed)?,
        ),
        Target::Pixels { .. } => None,
    };
    let state = TrainState::with_params(&mut sizing, layout, student, teacher, 0.0);
    let mut state = state.map_err(failed)?;
    let mut step = StepModel::new(&mut sizing, settings, recipe).map_err(failed)?;
    let mut evaluation = Evaluation::new(&mut sizing, settings, recipe, splits).map_err(failed)?;
    let pixels = Pixels {
        crops: backends::resizes(&settings.machine).then_some(&[]),
        ..Pixels::default()
    };
    step.model
        .load_pixels(&mut sizing, pixels, &[], &[])
        .map_err(failed)?;
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
        let images = View::Bytes(task.vit.pixels(EVAL_BATCH), Pixels::default());
        encoder
            .encode(&mut sizing, &state.student, images, EVAL_BATCH, dim)
            .map_err(failed)?;
    }
    backends::memory(&settings.machine, &sizing)
}

struct Run {
    settings: Settings,
    recipe: Recipe,
    /// What was planned.
    memory: Memory,
    /// How the batch size was chosen, if it was.
    fitted: Option<String>,
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
            fitted,
            splits,
            resume,
        } = self;
        let failed = |error: B::Error| Error::backend(name, error);
        let task = recipe.task;
        let layout = Layout::pretrain(&task);
        // Everything that can fail for want of memory or data comes before the run directory is touched.
        let start = Start {
            plan: recipe.plan,
            layout,
            has_teacher: matches!(task.target, Target::Teacher(_)),
            layer_decay: 1.0,
            config: settings.to_toml()?,
            identity: Identity {
                config: settings.recipe_json(),
                data: splits.train.fingerprint()?,
                more: Default::default(),
            },
            introduction: introduction(
                &settings,
                &recipe,
                &splits,
                &layout,
                (name, memory, fitted),
            ),
            dataset: splits.train.clone(),
            augmentation: recipe.transform.clone().into(),
            workers: settings.machine.workers(),
            resizes: backends::resizes(&settings.machine),
            out: settings.machine.out.clone(),
            resume,
        };
        let mut pretraining = Pretraining {
            model: StepModel::new(backend, &settings, &recipe).map_err(failed)?,
            evaluation: Evaluation::new(backend, &settings, &recipe, &splits).map_err(failed)?,
            name,
            settings: &settings,
            recipe: &recipe,
            first_spread: None,
            warned: false,
        };
        let done = training::run(backend, name, start, &mut pretraining, || {
            let mut student = vec![0.0; layout.len()];
            init(&layout, settings.seed, &mut student)
                .map_err(|error| Error::backend(name, error))?;
            Ok(student)
        })?;
        let knn = series(&done.records, names::KNN);
        let at = |wanted: u64| {
            knn.iter()
                .find(|(step, _)| *step == wanted)
                .map(|&(_, value)| value)
        };
        Ok(Summary {
            method: settings.method,
            step: done.step,
            steps: recipe.plan.steps,
            loss: done.loss(),
            images_per_s: done.images_per_s,
            knn_top1: at(recipe.plan.steps),
            knn_top1_untrained: at(0),
            knn_top1_pixels: series(&done.records, names::KNN_PIXELS)
                .first()
                .map(|&(_, value)| value),
            unreadable_train: splits.train.num_broken(),
            interrupted: done.interrupted,
            out: done.out,
        })
    }
}

/// Pre-training within the loop.
struct Pretraining<'a, B: TrainBackend> {
    model: StepModel<B>,
    evaluation: Evaluation<B>,
    name: &'a str,
    settings: &'a Settings,
    recipe: &'a Recipe,
    /// Spread of the teacher's features in the first step.
    first_spread: Option<f32>,
    /// Whether a collapse was reported by this process.
    warned: bool,
}

impl<B: TrainBackend> Task<B> for Pretraining<'_, B> {
    fn recall(&mut self, earlier: &[Record]) {
        self.first_spread = series(earlier, names::SPREAD)
            .first()
            .map(|&(_, spread)| spread as f32)
            .filter(|spread| *spread > 0.0);
    }

    fn before(
        &mut self,
        backend: &mut B,
        state: &TrainState<B>,
        figures: &mut Figures,
    ) -> Result<Option<String>, Error> {
        self.evaluation.pixels(figures)?;
        self.evaluation
            .student(backend, self.name, state, figures)?;
        Ok(Some(format!("before training: {}", describe_knn(figures))))
    }

    fn accumulate(
        &mut self,
        backend: &mut B,
        state: &mut TrainState<B>,
        batch: &mut Batch,
        scale: f64,
    ) -> Result<(), Error> {
        let (settings, task) = (self.settings, &self.recipe.task);
        self.model
            .accumulate(backend, self.name, state, settings, task, batch, scale)
    }

    fn momentum(&self, step: u64) -> f64 {
        let (steps, start) = (self.recipe.plan.steps, self.recipe.momentum);
        momentum(step, steps, start, self.settings.momentum_end)
    }

    fn observe(&mut self, seen: &Scalars, adamw: &AdamW, figures: &mut Figures) -> Option<String> {
        if !matches!(self.recipe.task.target, Target::Teacher(_)) {
            return None;
        }
        let spread = seen.spread;
        figures.insert(names::SPREAD.to_owned(), f64::from(spread));
        figures.insert(names::MOMENTUM.to_owned(), adamw.momentum);
        let first = *self.first_spread.get_or_insert(spread);
        if spread >= COLLAPSED * first || self.warned {
            return None;
        }
        self.warned = true;
        Some(format!(
            "warning: step {}: the spread of the teacher's features fell from {first:.3} to {spread:.3}: it is \
             collapsing to a constant. Raise momentum (now {:.4}) or lower --lr (now {:.1e})",
            adamw.step, adamw.momentum, adamw.lr
        ))
    }

    fn evaluate(
        &mut self,
        backend: &mut B,
        state: &TrainState<B>,
        _run: &RunDir,
        _step: u64,
        figures: &mut Figures,
    ) -> Result<String, Error> {
        self.evaluation
            .student(backend, self.name, state, figures)?;
        Ok(describe_knn(figures))
    }

    /// Saves the curves so far.
    fn draw(&self, run: &RunDir, records: &[Record]) -> Result<(), Error> {
        let knn = series(records, names::KNN);
        let first = |series: &[(u64, f64)]| series.first().map(|&(_, value)| value);
        let curves = Curves {
            title: &format!("{} {}", self.settings.method, self.settings.model),
            loss: &series(records, LOSS),
            spread: &series(records, names::SPREAD),
            accuracy: "kNN top-1",
            top1: &knn,
            raw_pixels_top1: first(&series(records, names::KNN_PIXELS)),
            untrained_top1: first(&knn),
        };
        Ok(write_png(&run.curves(), &curves)?)
    }
}

/// The first lines of a run: what is trained on what, where, and how much of everything that takes.
fn introduction(
    settings: &Settings,
    recipe: &Recipe,
    splits: &Splits,
    layout: &Layout,
    (backend, memory, fitted): (&str, Memory, Option<String>),
) -> Vec<String> {
    let task = &recipe.task;
    let cost = pcae_kernel::flops::Step::new(task);
    let images = recipe.plan.batch_size as u64 * settings.accum;
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
    let mut lines = vec![
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
    ];
    lines.extend(fitted);
    lines.extend([
        format!("memory    planned: {}, data apart", describe(memory)),
        format!(
            "schedule  {} of {} ({} an epoch), peak learning rate {:.2e}, run directory {}",
            count(recipe.plan.steps as usize, "step"),
            count(images as usize, "image"),
            recipe.plan.steps_per_epoch,
            recipe.plan.lr,
            settings.machine.out.display()
        ),
    ]);
    lines
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
}

impl<B: TrainBackend> StepModel<B> {
    fn new(backend: &mut B, settings: &Settings, recipe: &Recipe) -> Result<Self, B::Error> {
        let task = &recipe.task;
        let reduction = match task.target {
            Target::Teacher(reduction) => reduction,
            Target::Pixels { .. } => Reduction::NONE,
        };
        let batch = recipe.plan.batch_size;
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
            drop_path: Vec::new(),
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
        scale: f64,
    ) -> Result<(), Error> {
        let failed = |error: B::Error| Error::backend(name, error);
        let key = Key {
            seed: settings.seed,
            epoch: batch.epoch,
            samples: &batch.samples,
        };
        self.ids_keep.clear();
        self.ids_remove.clear();
        for &sample in &batch.samples {
            let mut stream = Stream::new(settings.seed, batch.epoch, sample, Purpose::Mask);
            self.noise.fill_with(|| stream.uniform());
            random_masking(&self.noise, &mut self.order)
                .map_err(|error| Error::backend(name, error))?;
            let (keep, remove) = self.order.split_at(task.visible());
            self.ids_keep.extend_from_slice(keep);
            self.ids_remove.extend_from_slice(remove);
        }
        let (keep, remove) = (&self.ids_keep, &self.ids_remove);
        match batch.images.view() {
            View::Bytes(_, pixels) => self.model.load_pixels(backend, pixels, keep, remove),
            View::Values(images) => self.model.load(backend, images, keep, remove),
        }
        .map_err(failed)?;
        if settings.drop_path > 0.0 {
            draws::drop_path(key, task.vit.depth, settings.drop_path, &mut self.drop_path);
            self.model
                .set_drop_path(backend, &self.drop_path)
                .map_err(failed)?;
        }
        if let Target::Teacher(reduction) = task.target {
            let (tokens, depth) = (task.masked(), task.vit.depth);
            draws::selection(backend, key, &reduction, tokens, depth, &mut self.scorer)
                .map_err(failed)?;
        }
        self.model
            .accumulate(backend, state, scale, &mut self.scorer)
            .map_err(failed)
    }
}

fn describe_knn(figures: &Figures) -> String {
    let Some(knn) = figures.get(names::KNN) else {
        return "no labels, so no kNN".to_owned();
    };
    let pixels = figures
        .get(names::KNN_PIXELS)
        .map(|pixels| format!("; on raw pixels {:.1} %", 100.0 * pixels));
    format!(
        "kNN top-1 {:.1} %{}",
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
    fn pixels(&self, scalars: &mut Figures) -> Result<(), Error> {
        if self.encoder.is_none() {
            return Ok(());
        }
        let features = |dataset| {
            self.features(dataset, self.transform.output_len(), |images, _| {
                Ok(images.values().into_owned())
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
        scalars: &mut Figures,
    ) -> Result<(), Error> {
        let Some(mut encoder) = self.encoder.take() else {
            return Ok(());
        };
        let dim = state.layout.vit.embed_dim;
        let mut features = |dataset| {
            self.features(dataset, dim, |images, batch| {
                let features = encoder.encode(backend, &state.student, images.view(), batch, dim);
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
        mut encode: impl FnMut(&Images, usize) -> Result<Vec<f32>, Error>,
    ) -> Result<Features, Error> {
        let mut x = Vec::with_capacity(dataset.len() * dim);
        let mut labels = Vec::with_capacity(dataset.len());
        for batch in eval_batches(dataset, &self.transform, EVAL_BATCH)? {
            let batch = batch?;
            if batch.samples.is_empty() {
                continue;
            }
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
        images: View<'_>,
        batch: usize,
        dim: usize,
    ) -> Result<Vec<f32>, B::Error> {
        images.write(backend, &mut self.images)?;
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
