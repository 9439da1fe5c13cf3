//! Fine-tuning: a classifier on a pre-trained encoder, with token reduction.

pub(crate) mod classes;
pub(crate) mod evaluation;
mod settings;

use std::path::{Path, PathBuf};

use pcae_kernel::backend::{AdamW, Pixels, TrainBackend};
use pcae_kernel::flops;
use pcae_kernel::init::init;
use pcae_kernel::layout::Layout;
use pcae_kernel::model::{ClassifierTrainer, CriterionScorer, Scalars, TrainState};
use pcae_kernel::rng::{Purpose, Stream};
use pcae_kernel::sizing::{Memory, Sizing};

use crate::backends::{Job, count};
use crate::bench::describe;
use crate::checkpoint::weights::Weights;
use crate::checkpoint::{self, AVERAGE, Identity, TASK_CLASSIFY, Which};
use crate::data::images::{Images, View};
use crate::data::loader::Batch;
use crate::data::mix::Shape;
use crate::data::{Dataset, Splits};
use crate::error::Error;
use crate::fit::BatchSize;
use crate::metrics::{Record, series};
use crate::network::{Network, arrows};
use crate::report::curves::{Curves, write_png};
use crate::run_dir::{RunDir, RunState};
use crate::training::draws::{self, Key};
use crate::training::names::LOSS;
use crate::training::{self, Figures, Start, Task};
use crate::{backends, data, fit};
pub use evaluation::{Confusion, Score};
pub use settings::{FinetuneRecipe, FinetuneSettings, PoolSpec, WeightsSpec};

use evaluation::Evaluator;

/// Names of the scalars in `metrics.jsonl` that fine-tuning alone has.
mod names {
    pub(super) const TOP1: &str = "top1";
    pub(super) const TOP5: &str = "top5";
    pub(super) const HELD_OUT_LOSS: &str = "held_out_loss";
    /// Held-out pictures left out; not there where all could be read.
    pub(super) const UNREADABLE: &str = "held_out_unreadable";
    pub(super) const EMA_TOP1: &str = "ema_top1";
    pub(super) const EMA_TOP5: &str = "ema_top5";
    pub(super) const EMA_HELD_OUT_LOSS: &str = "ema_held_out_loss";
}

/// Pictures classified at a time for an evaluation.
pub(crate) const EVAL_BATCH: usize = 100;

/// What a run came to.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Summary {
    /// The run directory.
    pub out: PathBuf,
    /// Optimizer steps done, those of earlier processes included.
    pub step: u64,
    /// Steps of the whole run.
    pub steps: u64,
    /// Loss of the last step, on mixed and smoothed labels.
    pub loss: f64,
    /// Pictures trained on per second in this process, evaluations and checkpoints left out; `None` if there were none.
    pub images_per_s: Option<f64>,
    /// Part of the held-out pictures classified right in the last evaluation.
    pub top1: Option<f64>,
    /// Part of them whose class was among the five best.
    pub top5: Option<f64>,
    /// Held-out pictures left out of the last evaluation because they could not be read.
    pub unreadable: usize,
    /// Training pictures that could not be read, each counted once, among those that this process came to; another one took
    /// the place of each.
    pub unreadable_train: usize,
    /// The same as `top1` of the moving average, if there is one.
    pub ema_top1: Option<f64>,
    /// The best of all evaluations. It was chosen on the held-out pictures, and so is a little too good.
    pub best_top1: Option<f64>,
    /// After which step that was.
    pub best_step: Option<u64>,
    /// Whether a signal ended it early.
    pub interrupted: bool,
}

/// Starts a run in `settings.machine.out`.
///
/// # Errors
/// [`Error`]; nothing is overwritten.
pub fn start(mut settings: FinetuneSettings) -> Result<Summary, Error> {
    if let Some(weights) = open_weights(&settings)? {
        match weights.config()? {
            Some(config) => settings.adopt(&config),
            None if settings.model.is_none() => {
                let reason = "expected the architecture of the weights, which their file does not say, found none";
                return Err(Error::Setting {
                    name: "--model".to_owned(),
                    reason: reason.to_owned(),
                });
            }
            None => {}
        }
    }
    launch(settings, None)
}

/// Continues the run in `out`, on the same settings but for `machine`, which may choose anew what has no part in the
/// numbers: `(key, value)` of [`crate::settings::Machine`].
///
/// # Errors
/// [`Error`]; the run stays as it is.
pub fn resume(out: &Path, machine: &[(String, String)]) -> Result<Summary, Error> {
    let (run, state) = RunDir::open(out)?;
    let mut settings = FinetuneSettings::load(Some(&run.config()), machine)?;
    settings.machine.out = out.to_owned();
    launch(settings, Some((run, state)))
}

fn launch(
    mut settings: FinetuneSettings,
    resume: Option<(RunDir, RunState)>,
) -> Result<Summary, Error> {
    let splits = data::open(settings.data.as_deref(), settings.in_chans)?;
    let fitted = fit(&mut settings, &splits)?;
    let recipe = settings.resolve(&splits)?;
    let machine = settings.machine.clone();
    let memory = planned_memory(&settings, &recipe)?;
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
fn fit(settings: &mut FinetuneSettings, splits: &Splits) -> Result<Option<String>, Error> {
    if settings.batch_size != Some(BatchSize::Auto) {
        return Ok(None);
    }
    let mut one = FinetuneSettings {
        batch_size: Some(BatchSize::Pictures(1)),
        ..settings.clone()
    };
    let recipe = one.resolve(splits)?;
    let (machine, vit) = (&settings.machine, &recipe.task.vit);
    let fitted = fit::largest(
        machine,
        vit,
        splits.train.len(),
        recipe.plan.accum,
        |batch| {
            let mut recipe = recipe.clone();
            recipe.plan.batch_size = batch;
            let memory = planned_memory(&one, &recipe)?.total();
            let loader = backends::of_loader(machine, &recipe.augmentation, batch);
            Ok(memory.saturating_add(loader))
        },
    )?;
    settings.batch_size = Some(BatchSize::Pictures(fitted.batch_size));
    // Which took a pass over the data.
    (settings.mean, settings.std) = (one.mean, one.std);
    Ok(Some(fitted.line))
}

/// What the backend will hold when everything has run once: the state, a step and an evaluation.
fn planned_memory(settings: &FinetuneSettings, recipe: &FinetuneRecipe) -> Result<Memory, Error> {
    let failed = |error| Error::backend("sizing", error);
    let mut sizing = Sizing::default();
    let layout = Layout::classifier(&recipe.task);
    let student = sizing.params(&layout, &[]).map_err(failed)?;
    let average = (settings.ema > 0.0)
        .then(|| sizing.teacher_params(&layout.teacher(), &[]))
        .transpose()
        .map_err(failed)?;
    let state = TrainState::with_params(&mut sizing, layout, student, average, 0.0);
    let mut state = state.map_err(failed)?;
    let mut step = StepModel::new(&mut sizing, recipe).map_err(failed)?;
    let evaluator = Evaluator::new(&mut sizing, &recipe.task, EVAL_BATCH, settings.seed);
    let mut evaluator = evaluator.map_err(failed)?;
    let loaded = if recipe.augmentation.makes_values() {
        step.model.load(&mut sizing, &[], &[])
    } else {
        let has_crops = recipe.augmentation.is_crop_alone() && backends::resizes(&settings.machine);
        let pixels = Pixels {
            crops: has_crops.then_some(&[]),
            ..Pixels::default()
        };
        step.model.load_pixels(&mut sizing, pixels, &[])
    };
    loaded.map_err(failed)?;
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
    evaluator
        .rehearse(&mut sizing, &state.student)
        .map_err(failed)?;
    backends::memory(&settings.machine, &sizing)
}

/// Everything of one micro-batch that is not in the state.
struct StepModel<B: TrainBackend> {
    model: ClassifierTrainer<B>,
    scorer: CriterionScorer<B>,
}

impl<B: TrainBackend> StepModel<B> {
    fn new(backend: &mut B, recipe: &FinetuneRecipe) -> Result<Self, B::Error> {
        let (task, batch) = (&recipe.task, recipe.plan.batch_size);
        let (tokens, depth) = (task.vit.num_patches(), task.vit.depth);
        let reduction = &task.reduction;
        Ok(Self {
            model: ClassifierTrainer::new(backend, task, batch, recipe.drop_path > 0.0)?,
            scorer: CriterionScorer::new(backend, reduction, batch, tokens, depth)?,
        })
    }
}

/// The weights to start from; `None` for random ones.
fn open_weights(settings: &FinetuneSettings) -> Result<Option<Weights>, Error> {
    match &settings.weights {
        Some(WeightsSpec::Path(path)) => Weights::open(path).map(Some),
        Some(WeightsSpec::None) => Ok(None),
        None => Err(Error::Setting {
            name: "--weights".to_owned(),
            reason: "expected a run directory or a file with weights, or \"none\" to start from random ones, found \
                     nothing; `pcae pretrain` makes some"
                .to_owned(),
        }),
    }
}

struct Run {
    settings: FinetuneSettings,
    recipe: FinetuneRecipe,
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
        let layout = Layout::classifier(&task);
        // Weights are read when there is nothing of the run to read yet; all that can fail comes before the run directory.
        let (initial, origin) = match &resume {
            Some((_, RunState::HasCheckpoint(_))) => (Vec::new(), None),
            _ => {
                let (values, origin) = initial(&settings, &recipe, &layout, name)?;
                (values, Some(origin))
            }
        };
        let identity = Identity {
            config: settings.recipe_json(),
            data: splits.train.fingerprint()?,
            more: [
                ("task", TASK_CLASSIFY.to_owned()),
                ("classes", serde_json::json!(recipe.classes).to_string()),
            ]
            .map(|(key, value)| (key.to_owned(), value))
            .into(),
        };
        let start = Start {
            plan: recipe.plan,
            layout,
            has_teacher: settings.ema > 0.0,
            layer_decay: recipe.layer_decay,
            config: settings.to_toml()?,
            identity: identity.clone(),
            introduction: introduction(
                (&settings, &recipe),
                &splits,
                &layout,
                name,
                (memory, fitted),
                origin,
            ),
            dataset: splits.train.clone(),
            augmentation: recipe.augmentation.clone(),
            workers: settings.machine.workers(),
            resizes: backends::resizes(&settings.machine),
            out: settings.machine.out.clone(),
            resume,
        };
        let mut finetuning = Finetuning {
            step: StepModel::new(backend, &recipe).map_err(failed)?,
            evaluator: Evaluator::new(backend, &task, EVAL_BATCH, settings.seed).map_err(failed)?,
            class_map: classes::map(&splits.held_out, &recipe.classes)?,
            name,
            settings: &settings,
            recipe: &recipe,
            train: &splits.train,
            held_out: &splits.held_out,
            identity,
            best: None,
            drop_path: Vec::new(),
            labels: Vec::new(),
            targets: Vec::new(),
        };
        let done = training::run(backend, name, start, &mut finetuning, || Ok(initial))?;
        let last = |name: &str| {
            let series = series(&done.records, name);
            series.last().map(|&(_, value)| value)
        };
        let best = best(&done.records);
        Ok(Summary {
            step: done.step,
            steps: recipe.plan.steps,
            loss: done.loss(),
            images_per_s: done.images_per_s,
            top1: last(names::TOP1),
            top5: last(names::TOP5),
            unreadable: done
                .records
                .iter()
                .rfind(|record| record.scalars.contains_key(names::TOP1))
                .and_then(|record| record.scalars.get(names::UNREADABLE))
                .map_or(0, |&count| count as usize),
            unreadable_train: splits.train.num_broken(),
            ema_top1: last(names::EMA_TOP1),
            best_top1: best.map(|(_, top1)| top1),
            best_step: best.map(|(step, _)| step),
            interrupted: done.interrupted,
            out: done.out,
        })
    }
}

/// The values to start from, and where they are from, in words.
fn initial(
    settings: &FinetuneSettings,
    recipe: &FinetuneRecipe,
    layout: &Layout,
    name: &str,
) -> Result<(Vec<f32>, String), Error> {
    let mut values = vec![0.0; layout.len()];
    init(layout, settings.seed, &mut values).map_err(|error| Error::backend(name, error))?;
    let Some(weights) = open_weights(settings)? else {
        return Ok((values, "random".to_owned()));
    };
    // A head is for its own classes alone.
    let same_classes = weights.classes()?.as_deref() == Some(&recipe.classes[..]);
    let loaded = weights.load(layout, settings.which, same_classes, &mut values)?;
    let fresh = if loaded.fresh.is_empty() {
        String::new()
    } else {
        format!("; new: {}", loaded.fresh.join(", "))
    };
    let (path, found, total) = (weights.path().display(), loaded.found, loaded.total);
    let average = match settings.which {
        Which::Teacher => " (moving average)",
        Which::Student | Which::Untrained => "",
    };
    let origin = format!("{path}{average}: {found} of {total} tensors loaded{fresh}");
    Ok((values, origin))
}

/// The first lines of a run: what is trained on what, where, from what, and how much of everything that takes.
fn introduction(
    (settings, recipe): (&FinetuneSettings, &FinetuneRecipe),
    splits: &Splits,
    layout: &Layout,
    backend: &str,
    (memory, fitted): (Memory, Option<String>),
    origin: Option<String>,
) -> Vec<String> {
    let FinetuneRecipe { task, plan, .. } = recipe;
    let mut lines = vec![
        format!(
            "data      {}; held out {}",
            splits.train.describe(),
            splits.held_out.len()
        ),
        format!(
            "model     {} {:.2} M parameters, {} classes, {} patches; {:.1} M multiply-adds to classify an image",
            settings.model.as_deref().unwrap_or_default(),
            layout.len() as f64 / 1e6,
            task.num_classes,
            arrows(&Network::Classifier(*task).tokens()),
            flops::classifier(task) as f64 / 1e6
        ),
    ];
    let held_out = &splits.held_out;
    let labels = (0..held_out.len()).filter_map(|i| held_out.label(i));
    let missing = data::no_pictures_of(&held_out.classes_without(labels));
    lines.extend(missing.map(|missing| format!("held out  {missing}")));
    let empty = data::no_pictures_of(splits.train.empty_classes());
    lines.extend(empty.map(|empty| format!("classes   {empty}; left out")));
    lines.extend(origin.map(|origin| format!("weights   {origin}")));
    lines.push(format!("backend   {backend}"));
    lines.extend(fitted);
    lines.push(format!(
        "memory    planned: {}, data apart",
        describe(memory)
    ));
    lines.push(format!(
        "schedule  {} of {} ({} an epoch), peak learning rate {:.2e}, run directory {}",
        count(plan.steps as usize, "step"),
        count(plan.batch_size * plan.accum as usize, "image"),
        plan.steps_per_epoch,
        plan.lr,
        settings.machine.out.display()
    ));
    lines
}

/// The step after which the greatest part was classified right, and that part; of equals the first.
fn best(records: &[Record]) -> Option<(u64, f64)> {
    let mut best: Option<(u64, f64)> = None;
    for record in records {
        for name in [names::TOP1, names::EMA_TOP1] {
            if let Some(&top1) = record.scalars.get(name)
                && best.is_none_or(|(_, best)| top1 > best)
            {
                best = Some((record.step, top1));
            }
        }
    }
    best
}

/// Fine-tuning within the loop.
struct Finetuning<'a, B: TrainBackend> {
    step: StepModel<B>,
    evaluator: Evaluator<B>,
    /// For each class of the held-out pictures its number.
    class_map: Vec<u32>,
    name: &'a str,
    settings: &'a FinetuneSettings,
    recipe: &'a FinetuneRecipe,
    train: &'a Dataset,
    held_out: &'a Dataset,
    identity: Identity,
    /// The best part classified right so far.
    best: Option<f64>,
    drop_path: Vec<f32>,
    labels: Vec<u32>,
    targets: Vec<f32>,
}

impl<B: TrainBackend> Task<B> for Finetuning<'_, B> {
    fn recall(&mut self, earlier: &[Record]) {
        self.best = best(earlier).map(|(_, top1)| top1);
    }

    /// Nothing: a new head guesses.
    fn before(
        &mut self,
        _backend: &mut B,
        _state: &TrainState<B>,
        _figures: &mut Figures,
    ) -> Result<Option<String>, Error> {
        Ok(None)
    }

    fn accumulate(
        &mut self,
        backend: &mut B,
        state: &mut TrainState<B>,
        batch: &mut Batch,
        scale: f64,
    ) -> Result<(), Error> {
        let failed = |error: B::Error| Error::backend(self.name, error);
        let (task, seed) = (&self.recipe.task, self.settings.seed);
        let (tokens, depth) = (task.vit.num_patches(), task.vit.depth);
        self.labels.clear();
        // All are labelled, as the settings were checked.
        let labels = batch.samples.iter();
        self.labels
            .extend(labels.filter_map(|&sample| self.train.label(sample as usize)));
        let shape = Shape {
            channels: task.vit.in_chans,
            height: task.vit.img_size[0],
            width: task.vit.img_size[1],
        };
        self.recipe.mix.apply(
            &mut Stream::new(seed, 0, batch.index, Purpose::Mix),
            match &mut batch.images {
                Images::Values(values) => values,
                // Which are not mixed.
                Images::Bytes(_) => &mut [],
            },
            shape,
            &self.labels,
            task.num_classes,
            &mut self.targets,
        );
        let StepModel { model, scorer } = &mut self.step;
        match batch.images.view() {
            View::Bytes(_, pixels) => model.load_pixels(backend, pixels, &self.targets),
            View::Values(images) => model.load(backend, images, &self.targets),
        }
        .map_err(failed)?;
        let key = Key {
            seed,
            epoch: batch.epoch,
            samples: &batch.samples,
        };
        if self.recipe.drop_path > 0.0 {
            draws::drop_path(key, depth, self.recipe.drop_path, &mut self.drop_path);
            model
                .set_drop_path(backend, &self.drop_path)
                .map_err(failed)?;
        }
        draws::selection(backend, key, &task.reduction, tokens, depth, scorer).map_err(failed)?;
        model
            .accumulate(backend, state, scale, scorer)
            .map_err(failed)
    }

    /// Shorter averages at first, which would otherwise remember the start for long.
    fn momentum(&self, step: u64) -> f64 {
        let step = step as f64;
        self.settings.ema.min((1.0 + step) / (10.0 + step))
    }

    fn observe(
        &mut self,
        _seen: &Scalars,
        _adamw: &AdamW,
        _figures: &mut Figures,
    ) -> Option<String> {
        None
    }

    fn evaluate(
        &mut self,
        backend: &mut B,
        state: &TrainState<B>,
        run: &RunDir,
        step: u64,
        figures: &mut Figures,
    ) -> Result<String, Error> {
        const STUDENT: [&str; 3] = [names::TOP1, names::TOP5, names::HELD_OUT_LOSS];
        const EMA: [&str; 3] = [names::EMA_TOP1, names::EMA_TOP5, names::EMA_HELD_OUT_LOSS];
        let student = Some((STUDENT, &state.student));
        let average = state.teacher.as_ref().map(|average| (EMA, average));
        let mut lines: Vec<String> = Vec::new();
        let mut taken = None;
        for (names, params) in student.into_iter().chain(average) {
            let score = self.evaluator.run(
                backend,
                self.name,
                params,
                self.held_out,
                &self.recipe.augmentation.transform,
                &self.class_map,
            )?;
            let Score {
                top1, top5, loss, ..
            } = score;
            for (name, value) in names.into_iter().zip([top1, top5, loss]) {
                figures.insert(name.to_owned(), value);
            }
            if score.unreadable > 0 {
                figures.insert(names::UNREADABLE.to_owned(), score.unreadable as f64);
            }
            let is_average = names == EMA;
            lines.push(format!(
                "{}top-1 {:.2} %, top-5 {:.2} %",
                if is_average { "average " } else { "" },
                100.0 * top1,
                100.0 * top5
            ));
            if self.best.is_none_or(|best| top1 > best) {
                self.best = Some(top1);
                // The average's, if it is better still, takes the place of the student's.
                taken = Some(lines.len() - 1);
                let source = if is_average { AVERAGE } else { "student" };
                let more = [
                    ("step", step.to_string()),
                    ("top1", top1.to_string()),
                    ("weights", source.to_owned()),
                ];
                let (path, model) = (run.best_checkpoint(), (&state.layout, params));
                checkpoint::save_model(&path, backend, self.name, model, &self.identity, &more)?;
                score
                    .confusion
                    .write_csv(&run.confusion(), &self.recipe.classes)?;
            }
        }
        if let Some(line) = taken.and_then(|best| lines.get_mut(best)) {
            line.push_str(" (best)");
        }
        Ok(lines.join("; "))
    }

    fn draw(&self, run: &RunDir, records: &[Record]) -> Result<(), Error> {
        let (accuracy, name) = if self.settings.ema > 0.0 {
            ("top-1 of the average", names::EMA_TOP1)
        } else {
            ("top-1", names::TOP1)
        };
        let curves = Curves {
            title: &format!(
                "fine-tuning {}",
                self.settings.model.as_deref().unwrap_or_default()
            ),
            loss: &series(records, LOSS),
            accuracy,
            top1: &series(records, name),
            ..Curves::default()
        };
        Ok(write_png(&run.curves(), &curves)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of both kinds of weights, and of equals the first; records without an evaluation say nothing.
    #[test]
    fn the_best_is_found_in_the_records() {
        let record = |step, figures: &[(&str, f64)]| Record {
            step,
            scalars: figures
                .iter()
                .map(|&(name, value)| (name.to_owned(), value))
                .collect(),
            ..Record::default()
        };
        let mut records = vec![record(1, &[("loss", 9.0)])];
        assert_eq!(best(&records), None);
        records.push(record(2, &[("top1", 0.5), ("ema_top1", 0.4)]));
        records.push(record(
            3,
            &[("top1", 0.6), ("ema_top1", 0.7), ("top5", 1.0)],
        ));
        records.push(record(4, &[("top1", 0.7)]));
        assert_eq!(best(&records), Some((3, 0.7)));
        records.push(record(5, &[("top1", 0.8), ("ema_top1", 0.8)]));
        assert_eq!(best(&records), Some((5, 0.8)));
    }
}
