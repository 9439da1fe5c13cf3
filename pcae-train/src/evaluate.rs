//! A fine-tuned classifier at any token budget: one model, many drop ratios, no retraining.

use std::path::PathBuf;

use pcae_kernel::backend::TrainBackend;
use pcae_kernel::config::{Budget, ClassifierConfig};
use pcae_kernel::layout::Layout;
use serde::Serialize;

use crate::backends::{self, Job};
use crate::checkpoint::Which;
use crate::checkpoint::exchange::Hints;
use crate::data::augment::Transform;
use crate::data::{self, DataError, Dataset};
use crate::encoder;
use crate::error::Error;
use crate::finetune::evaluation::Evaluator;
use crate::finetune::{Confusion, Score, classes};
use crate::network::Network;
use crate::settings::shared::{Crops, transform};
use crate::settings::{CriterionSpec, DropLayersSpec, Machine};
use crate::trained::{Finetuned, Trained};

/// What to evaluate.
#[derive(Clone, Debug)]
pub struct Plan {
    /// A run directory of `pcae finetune`, or a checkpoint of it.
    pub checkpoint: PathBuf,
    /// Which of its weights.
    pub which: Which,
    /// Folder of the pictures, of which the held-out ones are classified; those of the run if `None`.
    pub data: Option<PathBuf>,
    /// Parts of the patch tokens that each stage drops; if empty the one that it was deployed or trained with.
    pub drop_ratios: Vec<f64>,
    /// After which blocks; as deployed or trained if `None`.
    pub drop_layers: Option<DropLayersSpec>,
    /// Which tokens are dropped; as in training if empty.
    pub criteria: Vec<CriterionSpec>,
    /// Pictures at a time.
    pub batch_size: usize,
    /// Seed of what is dropped at random.
    pub seed: u64,
    /// Where it is computed.
    pub machine: Machine,
}

/// What was measured at one drop ratio.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// Which tokens were dropped.
    pub criterion: CriterionSpec,
    /// Part of the patch tokens that each stage dropped.
    pub drop_ratio: f64,
    /// Patch tokens before, between and after the stages.
    pub tokens: Vec<usize>,
    /// Multiply-adds to classify a picture.
    pub multiply_adds: u64,
    /// Part of the pictures classified right.
    pub top1: f64,
    /// Part of the pictures whose class was among the five best.
    pub top5: f64,
    /// Mean cross-entropy.
    pub loss: f64,
    /// Pictures per second, their preparation left out.
    pub images_per_s: f64,
}

/// All of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// The checkpoint's file.
    pub checkpoint: PathBuf,
    /// The file, which of its weights, and what was found there, in a line.
    pub origin: String,
    /// The data, in words.
    pub data: String,
    /// What computed.
    pub backend: String,
    /// Pictures at a time.
    pub batch_size: usize,
    /// Names of the classes.
    pub classes: Vec<String>,
    /// Pictures left out because they could not be read.
    pub unreadable: usize,
    /// Names of the classes of which no picture was classified: no figure says anything about them.
    pub without_pictures: Vec<String>,
    /// The measurements.
    pub results: Vec<Row>,
}

/// Evaluates, telling `progress` each row as it comes, with the classes that were taken for each other.
///
/// # Errors
/// [`Error`]; among them a checkpoint that is no classifier, and data of other classes.
pub fn run(
    plan: &Plan,
    progress: impl FnMut(&Report, &Row, &Confusion) -> Result<(), Error>,
) -> Result<Report, Error> {
    if plan.batch_size == 0 {
        return Err(Error::Setting {
            name: "--batch-size".to_owned(),
            reason: "expected at least 1, found 0".to_owned(),
        });
    }
    let trained = Trained::load(&plan.checkpoint, plan.which, &Hints::default())?;
    let (Some(Finetuned { settings, classes }), Network::Classifier(mut task)) =
        (trained.finetuned, trained.network)
    else {
        return Err(Error::Checkpoint {
            path: trained.path,
            reason: "expected a classifier of `pcae finetune`, with its classes in the metadata, found none; fine-tune it first"
                .to_owned(),
        });
    };
    if let Some(layers) = &plan.drop_layers {
        task.reduction.drop_layers = layers.layers(task.vit.depth)?;
    }
    let criteria = if plan.criteria.is_empty() {
        vec![CriterionSpec(task.reduction.criterion)]
    } else {
        plan.criteria.clone()
    };
    let ratios = if plan.drop_ratios.is_empty() {
        vec![trained.network.drop_ratio()]
    } else {
        plan.drop_ratios.clone()
    };
    // All are checked before the first is measured.
    let mut budgets = Vec::new();
    for criterion in criteria {
        for &ratio in &ratios {
            let mut task = task;
            task.reduction.criterion = criterion.0;
            task.reduction.budget = Budget::Drop(ratio);
            task.check()?;
            budgets.push((ratio, task));
        }
    }
    let path = encoder::pictures(
        &trained.path,
        plan.data.as_deref().or(settings.data.as_deref()),
        trained.data_fingerprint.as_deref(),
        task.vit.in_chans,
    )?;
    let held_out = data::open(path, Some(task.vit.in_chans))?.held_out;
    let class_map = classes::map(&held_out, &classes)?;
    let crops = Crops {
        scale: [1.0; 2],
        ratio: [1.0; 2],
        flip: false,
    };
    let (mut mean, mut std) = (settings.mean, settings.std);
    let transform = transform(&task.vit, &held_out, crops, &mut mean, &mut std)?;
    backends::run(
        &plan.machine,
        Evaluate {
            plan,
            budgets,
            layout: trained.network.layout(),
            values: trained.values,
            held_out: &held_out,
            transform,
            class_map,
            report: Report {
                checkpoint: trained.path,
                origin: trained.origin,
                data: held_out.describe(),
                backend: String::new(),
                batch_size: plan.batch_size,
                classes,
                unreadable: 0,
                without_pictures: Vec::new(),
                results: Vec::new(),
            },
            progress,
        },
    )
}

struct Evaluate<'a, P> {
    plan: &'a Plan,
    budgets: Vec<(f64, ClassifierConfig)>,
    layout: Layout,
    values: Vec<f32>,
    held_out: &'a Dataset,
    transform: Transform,
    class_map: Vec<u32>,
    report: Report,
    progress: P,
}

impl<P: FnMut(&Report, &Row, &Confusion) -> Result<(), Error>> Job for Evaluate<'_, P> {
    type Output = Report;

    fn run<B: TrainBackend>(mut self, backend: &mut B, name: &str) -> Result<Report, Error> {
        let failed = |error: B::Error| Error::backend(name, error);
        self.report.backend = name.to_owned();
        let params = backend
            .frozen_params(&self.layout, &self.values)
            .map_err(failed)?;
        let Some((_, first)) = self.budgets.first() else {
            return Ok(self.report);
        };
        let batch = self.plan.batch_size;
        let mut evaluator =
            Evaluator::new(backend, first, batch, self.plan.seed).map_err(failed)?;
        let (transform, class_map) = (&self.transform, &self.class_map);
        // Untimed: pages and caches of the buffers are touched for the first time.
        let few = self.held_out.thinned(batch);
        match evaluator.run(backend, name, &params, &few, transform, class_map) {
            // That all of these few are unreadable says nothing about the others.
            Err(Error::Data(DataError::Unreadable { .. })) => {}
            warm => drop(warm?),
        }
        for (drop_ratio, task) in &self.budgets {
            evaluator.set_reduction(task.reduction);
            let score =
                evaluator.run(backend, name, &params, self.held_out, transform, class_map)?;
            self.report.unreadable = score.unreadable;
            let classes = self.report.classes.iter().enumerate();
            let missing = classes.filter(|&(class, _)| score.confusion.pictures(class) == 0);
            self.report.without_pictures = missing.map(|(_, name)| name.clone()).collect();
            let row = row(task, *drop_ratio, &score);
            (self.progress)(&self.report, &row, &score.confusion)?;
            self.report.results.push(row);
        }
        Ok(self.report)
    }
}

fn row(task: &ClassifierConfig, drop_ratio: f64, score: &Score) -> Row {
    let network = Network::Classifier(*task);
    Row {
        criterion: CriterionSpec(task.reduction.criterion),
        drop_ratio,
        tokens: network.tokens(),
        multiply_adds: network.multiply_adds(),
        top1: score.top1,
        top5: score.top5,
        loss: score.loss,
        images_per_s: score.images_per_s,
    }
}
