//! The loop that all training shares: the run directory, batches, optimizer steps, checkpoints, metrics, signals.
//!
//! What is trained for is a `Task`. Everything here depends on the settings and the data alone, so that a run that was
//! killed and resumed ends in the same bits as one that was not.

pub(crate) mod draws;
pub(crate) mod plan;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use pcae_kernel::backend::{AdamW, Span, TrainBackend};
use pcae_kernel::layout::Layout;
use pcae_kernel::model::{HALVES, RECORDS, Scalars, TrainState};
use pcae_kernel::schedule::learning_rate;

use crate::checkpoint::{self, Identity, Position};
use crate::data::Dataset;
use crate::data::loader::{Batch, Loader, LoaderConfig};
use crate::data::regularize::Augmentation;
use crate::error::Error;
use crate::interrupt;
use crate::metrics::{Metrics, Record, read_metrics, series};
use crate::progress::Progress;
use crate::run_dir::{RunDir, RunState};
pub use plan::Plan;

/// Names of the scalars in `metrics.jsonl` that every kind of training has.
pub(crate) mod names {
    pub(crate) const LOSS: &str = "loss";
    pub(crate) const GRAD_NORM: &str = "grad_norm";
    pub(crate) const LR: &str = "lr";
    pub(crate) const IMAGES_PER_S: &str = "images_per_s";
}

/// Steps that a device has before it while the host waits for those before them, and then prepares the next.
const AHEAD: usize = 2;

/// The other values of a step by name.
pub(crate) type Figures = BTreeMap<String, f64>;

/// What one kind of training does within the loop. Whatever it remembers from step to step must follow from the
/// checkpoint, the records and the settings: nothing else survives a kill.
pub(crate) trait Task<B: TrainBackend> {
    /// Takes in what earlier processes recorded; nothing at the start of a run.
    fn recall(&mut self, earlier: &[Record]);

    /// Measures before the first step, into `figures`, and says so in a line; `None` if there is nothing to measure.
    ///
    /// # Errors
    /// [`Error`].
    fn before(
        &mut self,
        backend: &mut B,
        state: &TrainState<B>,
        figures: &mut Figures,
    ) -> Result<Option<String>, Error>;

    /// Adds the gradients and the loss of a micro-batch, each times `scale`, to `state`. It may change the batch.
    ///
    /// # Errors
    /// [`Error`].
    fn accumulate(
        &mut self,
        backend: &mut B,
        state: &mut TrainState<B>,
        batch: &mut Batch,
        scale: f64,
    ) -> Result<(), Error>;

    /// Momentum of the moving average in the step after `step` others.
    fn momentum(&self, step: u64) -> f64;

    /// Adds to `figures` what else is known of step number `adamw.step`, and returns a warning if there is reason for one.
    fn observe(&mut self, seen: &Scalars, adamw: &AdamW, figures: &mut Figures) -> Option<String>;

    /// Measures the model after a step, into `figures`, and returns a line about it. What it saves in `run` must be
    /// there before the loop saves its own checkpoint of the step.
    ///
    /// # Errors
    /// [`Error`].
    fn evaluate(
        &mut self,
        backend: &mut B,
        state: &TrainState<B>,
        run: &RunDir,
        step: u64,
        figures: &mut Figures,
    ) -> Result<String, Error>;

    /// Draws the curves so far.
    ///
    /// # Errors
    /// [`Error`].
    fn draw(&self, run: &RunDir, records: &[Record]) -> Result<(), Error>;
}

/// What a loop is started with.
pub(crate) struct Start {
    /// The numbers of the loop.
    pub(crate) plan: Plan,
    /// Where the parameters lie.
    pub(crate) layout: Layout,
    /// Whether a moving average follows the student.
    pub(crate) has_teacher: bool,
    /// Factor on the learning rate from layer to layer, downwards.
    pub(crate) layer_decay: f64,
    /// The text of `config.toml`.
    pub(crate) config: String,
    /// What the checkpoints say about the run.
    pub(crate) identity: Identity,
    /// The first lines on standard error.
    pub(crate) introduction: Vec<String>,
    /// What is learned from.
    pub(crate) dataset: Arc<Dataset>,
    /// What happens to a picture on its way in.
    pub(crate) augmentation: Augmentation,
    /// Threads that prepare batches.
    pub(crate) workers: usize,
    /// Whether the backend resizes crops.
    pub(crate) resizes: bool,
    /// The run directory of a new run.
    pub(crate) out: PathBuf,
    /// The run to continue.
    pub(crate) resume: Option<(RunDir, RunState)>,
}

/// What a loop came to.
pub(crate) struct Outcome {
    /// The run directory.
    pub(crate) out: PathBuf,
    /// Optimizer steps done, those of earlier processes included.
    pub(crate) step: u64,
    /// Pictures trained on per second in this process; `None` if there were none.
    pub(crate) images_per_s: Option<f64>,
    /// Whether a signal ended it early.
    pub(crate) interrupted: bool,
    /// Everything that was recorded.
    pub(crate) records: Vec<Record>,
}

impl Outcome {
    /// Loss of the last step.
    pub(crate) fn loss(&self) -> f64 {
        series(&self.records, names::LOSS)
            .last()
            .map_or(f64::NAN, |&(_, loss)| loss)
    }
}

/// Runs the loop from where it is to its end. `initial` makes the values of a new run's parameters; the moving average
/// starts as the front of them.
///
/// # Errors
/// [`Error`]; what was saved stays.
pub(crate) fn run<B: TrainBackend, T: Task<B>>(
    backend: &mut B,
    name: &str,
    start: Start,
    task: &mut T,
    initial: impl FnOnce() -> Result<Vec<f32>, Error>,
) -> Result<Outcome, Error> {
    let Start {
        plan,
        layout,
        has_teacher,
        identity,
        resume,
        ..
    } = start;
    let failed = |error: B::Error| Error::backend(name, error);
    // Everything that can fail for want of memory or data comes before the run directory is touched.
    let (mut state, position) = match &resume {
        Some((_, RunState::HasCheckpoint(path))) => {
            let values = checkpoint::load(path, &layout, has_teacher, &identity)?;
            let position = values.position;
            let state = values.into_state(backend, layout, plan.weight_decay);
            (state.map_err(failed)?, position)
        }
        _ => {
            let values = initial()?;
            let student = backend.params(&layout, &values).map_err(failed)?;
            let teacher = has_teacher
                .then(|| backend.teacher_params(&layout.teacher(), &values))
                .transpose()
                .map_err(failed)?;
            // Before the vectors of the state are made, which are larger.
            drop(values);
            let state =
                TrainState::with_params(backend, layout, student, teacher, plan.weight_decay);
            (state.map_err(failed)?, Position::default())
        }
    };
    state.set_layer_decay(start.layer_decay);
    let config = LoaderConfig {
        batch_size: plan.batch_size,
        seed: plan.seed,
        start: position.batches,
        workers: start.workers,
        leaves_crops: start.resizes,
    };
    let mut loader = Loader::new(start.dataset, start.augmentation, config)?;
    let mut first = if position.step < plan.steps {
        Some(loader.next()?)
    } else {
        None
    };

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
            let run = RunDir::create(&start.out, &start.config)?;
            let metrics = Metrics::create(&run)?;
            (run, metrics)
        }
    };
    for line in &start.introduction {
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
    task.recall(&earlier);
    let Position {
        mut step,
        mut batches,
    } = position;
    let (mut images, mut seconds) = (0_u64, 0.0);

    // From here on there is something to save.
    interrupt::install().map_err(|error| Error::Io {
        what: "signal handlers".to_owned(),
        error,
    })?;
    if step == 0 && earlier.is_empty() {
        let mut scalars = Figures::new();
        if let Some(line) = task.before(backend, &state, &mut scalars)? {
            eprintln!("{line}");
            metrics.log(&Record {
                step,
                epoch: 0.0,
                time_s: clock,
                scalars,
            })?;
        }
    }
    let save = |backend: &mut B, state: &TrainState<B>, position: Position| {
        checkpoint::save(
            &run.last_checkpoint(),
            backend,
            name,
            state,
            &identity,
            position,
        )
    };
    // After the evaluation, which would spoil the estimate of the time left.
    let mut progress = Progress::new(step, plan.steps);
    let every = plan.eval_every.saturating_mul(plan.steps_per_epoch);
    // Steps that are done, or on their way in a device that is not waited for: those that leave their scalars in `half`, and those of
    // the other half, which are being read.
    let mut unread: Vec<(AdamW, u64)> = Vec::with_capacity(RECORDS);
    let mut coming: Vec<(AdamW, u64)> = Vec::with_capacity(RECORDS);
    let mut seen = Vec::with_capacity(HALVES * RECORDS);
    let mut half = 0;
    let mut began = Instant::now();
    loop {
        let stops = step == plan.steps || interrupt::requested();
        let evaluates = step == plan.steps || (every > 0 && step.is_multiple_of(every));
        let saves = evaluates || step.is_multiple_of(plan.save_every);
        let settles = stops || saves || !backend.is_queued();
        let other = HALVES - 1 - half;
        if !coming.is_empty() && (settles || unread.len() == AHEAD) {
            match state.finish_records(backend, other) {
                Ok(records) => seen.extend(records.into_iter().zip(coming.drain(..))),
                Err(error) => {
                    let (error, at) = (failed(error), coming[0].0.step);
                    return Err(diverged_or(error, backend, &state, name, at)?);
                }
            }
        }
        if !unread.is_empty() && settles {
            match state.finish_records(backend, half) {
                Ok(records) => seen.extend(records.into_iter().zip(unread.drain(..))),
                Err(error) => {
                    let (error, at) = (failed(error), unread[0].0.step);
                    return Err(diverged_or(error, backend, &state, name, at)?);
                }
            }
        } else if unread.len() == RECORDS {
            state.start_records(backend, half).map_err(failed)?;
            std::mem::swap(&mut unread, &mut coming);
            half = other;
        }
        if !seen.is_empty() {
            while let Some(warning) = backend.warning() {
                progress.println(&format!("warning: {warning}"));
            }
            let step_images = plan.batch_size as u64 * plan.accum;
            let taken = began.elapsed().as_secs_f64();
            let each = taken / seen.len() as f64;
            images += step_images * seen.len() as u64;
            seconds += taken;
            for (seen, (adamw, batches)) in seen.drain(..) {
                if !(seen.loss.is_finite() && seen.grad_norm.is_finite()) {
                    return Err(Error::Diverged {
                        step: adamw.step,
                        loss: seen.loss,
                    });
                }
                clock += each;
                let mut scalars = BTreeMap::from([
                    (names::LOSS.to_owned(), f64::from(seen.loss)),
                    (names::GRAD_NORM.to_owned(), f64::from(seen.grad_norm)),
                    (names::LR.to_owned(), adamw.lr),
                    (names::IMAGES_PER_S.to_owned(), step_images as f64 / each),
                ]);
                if let Some(warning) = task.observe(&seen, &adamw, &mut scalars) {
                    progress.println(&warning);
                }
                let evaluated = if adamw.step == step && evaluates {
                    Some(task.evaluate(backend, &state, &run, step, &mut scalars)?)
                } else {
                    None
                };
                let epoch = batches as f64 / loader.batches_per_epoch() as f64;
                metrics.log(&Record {
                    step: adamw.step,
                    epoch,
                    time_s: clock,
                    scalars,
                })?;
                progress.set(adamw.step, images as f64 / seconds, seen.loss);
                if let Some(line) = &evaluated {
                    progress.println(&format!("step {step}, epoch {epoch:.1}: {line}"));
                }
            }
            if saves {
                metrics.sync()?;
                save(backend, &state, Position { step, batches })?;
                task.draw(&run, &read_metrics(&run.metrics())?)?;
            }
            began = Instant::now();
        }
        if stops {
            break;
        }

        state.begin_step(backend).map_err(failed)?;
        for _ in 0..plan.accum {
            let mut batch = match first.take() {
                Some(batch) => batch,
                None => loader.next()?,
            };
            let scale = 1.0 / plan.accum as f64;
            let done = task.accumulate(backend, &mut state, &mut batch, scale);
            if let Err(error) = done {
                return Err(diverged_or(error, backend, &state, name, step + 1)?);
            }
            loader.recycle(batch);
            batches += 1;
        }
        let adamw = AdamW {
            lr: learning_rate(step, plan.steps, plan.warmup_steps, plan.lr, plan.min_lr),
            beta1: plan.beta1,
            beta2: plan.beta2,
            eps: 1e-8,
            step: step + 1,
            momentum: task.momentum(step),
        };
        let max_norm = (plan.clip_grad > 0.0).then_some(plan.clip_grad);
        state.update(backend, &adamw, max_norm).map_err(failed)?;
        state.record(backend, half, unread.len()).map_err(failed)?;
        unread.push((adamw, batches));
        step += 1;
    }
    let interrupted = step < plan.steps;
    if interrupted {
        metrics.sync()?;
        save(backend, &state, Position { step, batches })?;
    }
    progress.finish();
    let records = read_metrics(&run.metrics())?;
    task.draw(&run, &records)?;
    Ok(Outcome {
        out: run.path().to_owned(),
        step,
        images_per_s: (images > 0).then(|| images as f64 / seconds),
        interrupted,
        records,
    })
}

/// What stopped step number `step`: the run has diverged, or `error` is all there is to say.
fn diverged_or<B: TrainBackend>(
    error: Error,
    backend: &mut B,
    state: &TrainState<B>,
    name: &str,
    step: u64,
) -> Result<Error, Error> {
    let finite = is_finite(backend, state).map_err(|error| Error::backend(name, error))?;
    Ok(if finite {
        error
    } else {
        let loss = f32::NAN;
        Error::Diverged { step, loss }
    })
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
