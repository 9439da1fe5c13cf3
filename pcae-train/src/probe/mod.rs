//! `pcae probe`: how well a linear classifier tells classes apart on a frozen encoder's features.

mod condition;
mod lbfgs;
mod linear;
mod logistic;
mod scores;
mod steps;

use std::fmt;
use std::path::PathBuf;
use std::time::Instant;

use ndarray::Array2;
use pcae_kernel::backend::TrainBackend;
use pcae_kernel::config::Reduction;
use pcae_kernel::rng::{Purpose, Stream};
use serde::Serialize;

use crate::backends::{self, Job, count};
use crate::data::{Splits, no_pictures_of};
use crate::encoder::Encoder;
use crate::error::Error;
use crate::features::{
    Extracted, Extractor, Frozen, Pool, Tap, class_name, extract_all, layer, open_labelled,
};
use crate::knn::standardise;
use crate::network::{budget, drop_ratio};
pub use logistic::Tried;
use scores::Scores;
pub use steps::TriedRate;

/// Penalties that are tried where nobody says which.
const DEFAULT_PENALTIES: [f64; 9] = [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8];
/// Of how many training pictures one chooses the penalty or the learning rate.
const CHOOSE_EVERY: usize = 5;
/// What the classifier is trained by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Solver {
    /// Logistic regression with an L2 penalty chosen on held-back training pictures, by L-BFGS.
    #[default]
    Logistic,
    /// SGD with momentum behind a batch norm.
    Sgd,
    /// The same by LARS: MAE's linear probe.
    Lars,
}

/// What to probe, and how.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The encoder.
    pub frozen: Frozen,
    /// The pictures; what the encoder was trained on if `None`.
    pub data: Option<PathBuf>,
    /// Pictures to classify, in place of those that `data` holds out.
    pub val: Option<PathBuf>,
    /// Block after which features are taken; the last one if `None`.
    pub layer: Option<usize>,
    /// What of the tokens there.
    pub pool: Pool,
    /// What the classifier is trained by.
    pub solver: Solver,
    /// Penalties of the logistic regression; empty for the usual ones.
    pub l2: Vec<f64>,
    /// Whether each epoch sees new crops of the pictures, as pre-training did, instead of the features of one view.
    pub augment: bool,
    /// Passes over the data of SGD and LARS.
    pub epochs: Option<u64>,
    /// Pictures in a step of SGD and LARS.
    pub batch_size: Option<usize>,
    /// Peak learning rate of SGD and LARS; chosen on held-back training pictures if `None`.
    pub lr: Option<f64>,
    /// Weight decay of SGD and LARS.
    pub weight_decay: Option<f64>,
    /// Seed of the initial classifier, the order of the pictures, their crops and what is held back.
    pub seed: u64,
}

/// What came out.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// What was probed.
    pub encoder: String,
    /// What the classifier was trained by.
    pub solver: Solver,
    /// The block, from 0.
    pub layer: usize,
    /// What of the tokens.
    pub pool: Pool,
    /// Part of the patch tokens that each stage dropped.
    pub drop_ratio: f64,
    /// Training pictures.
    pub train: usize,
    /// Pictures classified.
    pub held_out: usize,
    /// Pictures left out because they could not be read.
    pub unreadable: usize,
    /// Part of the held-out pictures classified right.
    pub top1: f64,
    /// Part whose class is among the five likeliest, where there are more than five.
    pub top5: Option<f64>,
    /// The same on the training pictures.
    pub train_top1: f64,
    /// Training loss at the end: the objective of the logistic regression, the mean of the last epoch of SGD and LARS.
    pub loss: f64,
    /// The logistic regression's penalty.
    pub l2: Option<f64>,
    /// The penalties that were tried for it.
    pub tried: Vec<Tried>,
    /// Iterations of the logistic regression, at the end.
    pub iterations: Option<usize>,
    /// Whether it came to its minimum in them.
    pub converged: Option<bool>,
    /// Peak learning rate of SGD and LARS.
    pub lr: Option<f64>,
    /// The rates that were tried for it.
    pub tried_lr: Vec<TriedRate>,
    /// Whether there were too few pictures to choose the penalty or the rate by, so that the middle one was taken.
    pub unchosen: bool,
    /// Each class.
    pub per_class: Vec<ClassScore>,
    /// Seconds to train the classifier, features apart.
    pub seconds: f64,
}

/// How well one class is recognised.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ClassScore {
    /// Its name, or number.
    pub class: String,
    /// Held-out pictures of it.
    pub pictures: usize,
    /// Part of them classified right; `None` where there are none.
    pub top1: Option<f64>,
}

/// Probes.
///
/// # Errors
/// [`Error`] for an encoder, data or settings that cannot be used.
pub fn run(plan: &Plan) -> Result<Report, Error> {
    check(plan)?;
    let (encoder, reduction) = plan.frozen.load()?;
    let tap = Tap {
        layer: layer(plan.layer, encoder.vit.depth)?,
        pool: plan.pool,
    };
    let splits = open_labelled(&encoder, plan.data.as_deref(), plan.val.as_deref())?;
    let probing = Probing {
        plan,
        tap,
        encoder,
        reduction,
        splits,
    };
    backends::run(&plan.frozen.machine, probing)
}

/// A setting as it is typed.
fn named(key: &str) -> String {
    format!("--{}", key.replace('_', "-"))
}

/// What needs neither encoder nor data.
fn check(plan: &Plan) -> Result<(), Error> {
    let wrong = |name: &str, reason: String| {
        Err(Error::Setting {
            name: named(name),
            reason,
        })
    };
    if plan.pool == Pool::Tokens {
        return wrong(
            "pool",
            "expected cls or mean, one vector a picture, found tokens".to_owned(),
        );
    }
    let steps = [
        ("augment", plan.augment),
        ("epochs", plan.epochs.is_some()),
        ("batch_size", plan.batch_size.is_some()),
        ("lr", plan.lr.is_some()),
        ("weight_decay", plan.weight_decay.is_some()),
    ];
    let logistic = plan.solver == Solver::Logistic;
    if let Some((name, _)) = steps.into_iter().find(|&(_, given)| given && logistic) {
        let reason =
            "expected with --solver sgd or lars: the logistic regression has no steps of its own";
        return wrong(name, reason.to_owned());
    }
    if !logistic && !plan.l2.is_empty() {
        return wrong(
            "l2",
            "expected with --solver logistic; use --weight-decay".to_owned(),
        );
    }
    if let Some(l2) = plan.l2.iter().find(|&&l2| !(l2 > 0.0 && l2.is_finite())) {
        return wrong("l2", format!("expected positive numbers, found {l2}"));
    }
    if plan.epochs == Some(0) {
        return wrong("epochs", "expected at least 1, found 0".to_owned());
    }
    if let Some(lr) = plan.lr.filter(|lr| !(*lr > 0.0 && lr.is_finite())) {
        return wrong("lr", format!("expected a positive number, found {lr}"));
    }
    if let Some(decay) = plan
        .weight_decay
        .filter(|decay| !(*decay >= 0.0 && decay.is_finite()))
    {
        return wrong(
            "weight_decay",
            format!("expected at least 0, found {decay}"),
        );
    }
    Ok(())
}

struct Probing<'a> {
    plan: &'a Plan,
    tap: Tap,
    encoder: Encoder,
    reduction: Reduction,
    splits: Splits,
}

/// Features with their labels.
struct Part {
    x: Array2<f32>,
    labels: Vec<u32>,
}

/// What a solver leaves.
struct Solved {
    /// Logits of training and held-out pictures.
    logits: [Array2<f32>; 2],
    loss: f64,
    l2: Option<f64>,
    tried: Vec<Tried>,
    iterations: Option<usize>,
    converged: Option<bool>,
    lr: Option<f64>,
    tried_lr: Vec<TriedRate>,
    unchosen: bool,
}

impl Job for Probing<'_> {
    type Output = Report;

    fn run<B: TrainBackend>(self, backend: &mut B, name: &str) -> Result<Report, Error> {
        let Self {
            plan,
            tap,
            ref encoder,
            ref splits,
            ..
        } = self;
        eprintln!("encoder   {}", encoder.origin);
        eprintln!("budget    {}", budget(&encoder.vit, &self.reduction));
        eprintln!(
            "data      {}; held out {}",
            splits.train.describe(),
            splits.held_out.len()
        );
        eprintln!("backend   {name}");
        let mut extractor =
            Extractor::new(backend, encoder, plan.frozen.batch_size, self.reduction)
                .map_err(|error| Error::backend(name, error))?;
        let mut unreadable = 0;
        let mut extract = |extractor: &mut Extractor<B>, backend: &mut B, dataset| {
            let batch_size = plan.frozen.batch_size;
            let transform = &encoder.transform;
            let Extracted {
                features,
                labels,
                unreadable: missing,
            } = extract_all(
                backend,
                name,
                extractor,
                dataset,
                transform,
                batch_size,
                &[tap],
            )?;
            unreadable += missing;
            let x = features.into_iter().next().unwrap_or_default();
            Ok::<_, Error>(Part { x, labels })
        };
        let train = extract(&mut extractor, backend, &splits.train)?;
        let held_out = extract(&mut extractor, backend, &splits.held_out)?;
        let missing = splits
            .held_out
            .classes_without(held_out.labels.iter().copied());
        if let Some(missing) = no_pictures_of(&missing) {
            eprintln!("held out  {missing}");
        }
        let began = Instant::now();
        let classes = splits.train.num_classes();
        let (train_labels, held_out_labels) = (train.labels.clone(), held_out.labels.clone());
        let solved = match plan.solver {
            Solver::Logistic => logistic(plan, train, held_out, classes),
            Solver::Sgd | Solver::Lars => self.steps(backend, name, extractor, train, held_out)?,
        };
        let [on_train, on_held_out] = &solved.logits;
        let scores = Scores::of(on_held_out, &held_out_labels);
        let per_class = scores.per_class.iter().enumerate();
        let per_class = per_class.map(|(class, &(pictures, right))| ClassScore {
            class: class_name(&splits.train, class),
            pictures,
            top1: (pictures > 0).then(|| right as f64 / pictures as f64),
        });
        Ok(Report {
            encoder: encoder.origin.clone(),
            solver: plan.solver,
            layer: tap.layer,
            pool: tap.pool,
            drop_ratio: drop_ratio(&self.reduction),
            train: train_labels.len(),
            held_out: held_out_labels.len(),
            unreadable,
            top1: scores.top1,
            top5: scores.top5,
            train_top1: Scores::of(on_train, &train_labels).top1,
            loss: solved.loss,
            l2: solved.l2,
            tried: solved.tried,
            iterations: solved.iterations,
            converged: solved.converged,
            lr: solved.lr,
            tried_lr: solved.tried_lr,
            unchosen: solved.unchosen,
            per_class: per_class.collect(),
            seconds: began.elapsed().as_secs_f64(),
        })
    }
}

fn logistic(plan: &Plan, mut train: Part, mut held_out: Part, classes: usize) -> Solved {
    standardise(&mut train.x, &mut held_out.x);
    let penalties = if plan.l2.is_empty() {
        &DEFAULT_PENALTIES[..]
    } else {
        &plan.l2
    };
    let (fit, choose) = hold_back(&train.labels, plan.seed);
    let fitted = logistic::fit(
        train.x.view(),
        &train.labels,
        classes,
        (&fit, &choose),
        penalties,
    );
    Solved {
        unchosen: penalties.len() > 1 && fitted.tried.is_empty(),
        logits: [&train.x, &held_out.x].map(|x| fitted.head.logits(x.view())),
        loss: fitted.loss,
        l2: Some(fitted.l2),
        tried: fitted.tried,
        iterations: Some(fitted.iterations),
        converged: Some(fitted.converged),
        lr: None,
        tried_lr: Vec::new(),
    }
}

/// Rows to fit and rows to choose by, a fifth of each class but at least one, at random; a class of one picture holds back none.
fn hold_back(labels: &[u32], seed: u64) -> (Vec<usize>, Vec<usize>) {
    let mut rows: Vec<usize> = (0..labels.len()).collect();
    Stream::new(seed, 0, 0, Purpose::Split).shuffle(&mut rows);
    // Stable: the order within a class stays random.
    rows.sort_by_key(|&row| labels[row]);
    let (mut fit, mut choose) = (Vec::new(), Vec::new());
    for class in rows.chunk_by(|&a, &b| labels[a] == labels[b]) {
        let held = (class.len() / CHOOSE_EVERY).max(usize::from(class.len() > 1));
        let (held, fitted) = class.split_at(held);
        choose.extend_from_slice(held);
        fit.extend_from_slice(fitted);
    }
    fit.sort_unstable();
    choose.sort_unstable();
    (fit, choose)
}

/// What is to be known about a value that was tried, if it is the one that was taken: beyond the outermost one there may be
/// better ones.
fn taken(own: Option<f64>, value: f64, tried: &[f64]) -> &'static str {
    if own != Some(value) {
        ""
    } else if tried.len() > 1 && tried.iter().all(|&other| other <= value) {
        ", taken: the highest tried"
    } else if tried.len() > 1 && tried.iter().all(|&other| other >= value) {
        ", taken: the lowest tried"
    } else {
        ", taken"
    }
}

/// The middle one of values; of an even number the first of the two.
fn middle(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().checked_sub(1)?;
    sorted.get(last / 2).copied()
}

/// What is to be known about a fit that was ended early.
fn unless(converged: bool) -> &'static str {
    if converged { "" } else { ", not converged" }
}

impl fmt::Display for Report {
    /// The classes, the penalties, and the whole in the last line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percent = |x: f64| format!("{:.2} %", 100.0 * x);
        writeln!(f, "{:<32} {:>8} {:>9}", "class", "pictures", "top-1")?;
        for class in &self.per_class {
            let top1 = class.top1.map_or_else(|| "-".to_owned(), percent);
            writeln!(f, "{:<32} {:>8} {top1:>9}", class.class, class.pictures)?;
        }
        let penalties: Vec<f64> = self.tried.iter().map(|tried| tried.l2).collect();
        for tried in &self.tried {
            writeln!(
                f,
                "l2 {:e}: {} of the held-back training pictures, {}{}{}",
                tried.l2,
                percent(tried.top1),
                count(tried.iterations, "iteration"),
                unless(tried.converged),
                taken(self.l2, tried.l2, &penalties)
            )?;
        }
        if self.unchosen {
            let value = match (self.l2, self.lr) {
                (Some(l2), _) => format!("l2 {l2:e}"),
                (None, lr) => format!("learning rate {}", lr.unwrap_or_default()),
            };
            writeln!(
                f,
                "too few pictures to choose by: {value}, the middle one, is taken"
            )?;
        }
        let rates: Vec<f64> = self.tried_lr.iter().map(|tried| tried.lr).collect();
        for tried in &self.tried_lr {
            let top1 = tried.top1.map_or_else(
                || "the loss rises beyond all bounds".to_owned(),
                |top1| format!("{} of the held-back training pictures", percent(top1)),
            );
            let taken = taken(self.lr, tried.lr, &rates);
            writeln!(f, "learning rate {}: {top1}{taken}", tried.lr)?;
        }
        if let (Some(iterations), Some(converged)) = (self.iterations, self.converged) {
            writeln!(
                f,
                "on all training pictures: loss {:.5} after {}{}",
                self.loss,
                count(iterations, "iteration"),
                unless(converged)
            )?;
        }
        if self.unreadable > 0 {
            writeln!(f, "{} could not be read", count(self.unreadable, "picture"))?;
        }
        let solver = format!("{:?}", self.solver).to_lowercase();
        write!(
            f,
            "probe ({solver}, layer {}, {}): top-1 {}",
            self.layer,
            self.pool,
            percent(self.top1)
        )?;
        if let Some(top5) = self.top5 {
            write!(f, ", top-5 {}", percent(top5))?;
        }
        writeln!(
            f,
            " on {}; {} on the {}",
            count(self.held_out, "picture"),
            percent(self.train_top1),
            count(self.train, "training picture")
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fifth_of_small_classes_is_one_picture() {
        // Of sizes 1, 2, 4 and 9: none of the only one, of the others one.
        let labels: Vec<u32> = [(0, 1), (1, 2), (2, 4), (3, 9)]
            .into_iter()
            .flat_map(|(class, size)| std::iter::repeat_n(class, size))
            .collect();
        let (fit, choose) = hold_back(&labels, 3);
        let classes: Vec<u32> = choose.iter().map(|&row| labels[row]).collect();
        assert_eq!((classes, fit.len()), (vec![1, 2, 3], 13));
        assert_eq!(hold_back(&[0, 1], 3), (vec![0, 1], Vec::new()));
    }

    #[test]
    fn the_outermost_value_is_said() {
        let tried = [1.0, 0.1, 10.0];
        assert_eq!(
            taken(Some(10.0), 10.0, &tried),
            ", taken: the highest tried"
        );
        assert_eq!(taken(Some(0.1), 0.1, &tried), ", taken: the lowest tried");
        assert_eq!(taken(Some(1.0), 1.0, &tried), ", taken");
        assert_eq!(taken(Some(1.0), 0.1, &tried), "");
        assert_eq!(taken(Some(1.0), 1.0, &[1.0]), ", taken");
        assert_eq!(middle(&tried), Some(1.0));
        assert_eq!((middle(&[4.0, 1.0]), middle(&[])), (Some(1.0), None));
    }

    #[test]
    fn a_fifth_of_each_class_is_held_back() {
        let labels: Vec<u32> = (0..100)
            .map(|i| u32::from(i >= 60) + u32::from(i >= 90))
            .collect();
        let (fit, choose) = hold_back(&labels, 3);
        assert_eq!((fit.len(), choose.len()), (80, 20));
        let of = |class| choose.iter().filter(|&&row| labels[row] == class).count();
        assert_eq!([of(0), of(1), of(2)], [12, 6, 2]);
        let mut all = [fit, choose].concat();
        all.sort_unstable();
        assert!(all.into_iter().eq(0..100));
        assert_eq!(hold_back(&labels, 3), hold_back(&labels, 3));
        assert_ne!(hold_back(&labels, 3), hold_back(&labels, 4));
    }
}
