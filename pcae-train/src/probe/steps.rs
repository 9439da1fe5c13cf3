//! Training by SGD and LARS: the learning rate chosen on held-back training pictures, and the classifier with it on all.

use std::time::Instant;

use ndarray::{Array2, Axis};
use pcae_kernel::backend::TrainBackend;
use pcae_kernel::rng::{Purpose, Stream};
use pcae_kernel::schedule::learning_rate;
use serde::Serialize;

use super::linear::{Optimizer, Probe, Recipe};
use super::scores::Scores;
use super::{CHOOSE_EVERY, Part, Probing, Solved, Solver, hold_back, middle, named};
use crate::backends::{self, count};
use crate::data::images::Images;
use crate::data::loader::{Loader, LoaderConfig};
use crate::error::Error;
use crate::features::{Extractor, matrix};
use crate::progress::Progress;

/// A guess costs the logarithm of the number of classes: a loss of this is no longer coming down.
const DIVERGED: f32 = 1e3;
/// MAE's momentum.
const MOMENTUM: f32 = 0.9;
/// MAE's schedule: 90 epochs, 10 of them of rising rate.
const DEFAULT_EPOCHS: u64 = 90;
const WARMUP_OF: u64 = 9;
const DEFAULT_BATCH: usize = 256;
/// Peak learning rates for 256 pictures a step that are tried where nobody says which, from the lowest on. MAE's is 0.1 with LARS, of a
/// million pictures; fewer pictures, with fewer steps, need higher ones.
const LARS_RATES: [f64; 5] = [0.1, 0.3, 1.0, 3.0, 10.0];
const SGD_RATES: [f64; 5] = [0.01, 0.03, 0.1, 0.3, 1.0];

/// A learning rate that was tried.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct TriedRate {
    /// The peak learning rate.
    pub lr: f64,
    /// Top-1 on the part of the training pictures that was not trained on; `None` if the loss rose beyond all bounds.
    pub top1: Option<f64>,
}

/// A training of one classifier.
struct Course {
    recipe: Recipe,
    epochs: u64,
    batch_size: usize,
    lr: f64,
    seed: u64,
}

/// Where the loss stopped coming down.
struct Diverged {
    steps: u64,
    loss: f32,
}

impl Course {
    fn steps(&self, pictures: usize) -> u64 {
        self.epochs
            .saturating_mul((pictures / self.batch_size) as u64)
    }

    /// Trains `probe` on what `batch` returns for the rows of a batch of `pictures`. Returns the mean loss of the last epoch.
    ///
    /// # Errors
    /// Those of `batch`.
    fn train(
        &self,
        probe: &mut Probe,
        pictures: usize,
        shown: &mut Shown,
        mut batch: impl FnMut(&[usize]) -> Result<(Array2<f32>, Vec<u32>), Error>,
    ) -> Result<Result<f64, Diverged>, Error> {
        let steps = self.steps(pictures);
        let per_epoch = (pictures / self.batch_size) as f64;
        let mut order: Vec<usize> = (0..pictures).collect();
        let (mut step, mut loss) = (0, f64::NAN);
        for epoch in 0..self.epochs {
            order.sort_unstable();
            Stream::new(self.seed, epoch, 0, Purpose::Shuffle).shuffle(&mut order);
            loss = 0.0;
            for rows in order.chunks_exact(self.batch_size) {
                let (x, labels) = batch(rows)?;
                let rate = learning_rate(step, steps, steps / WARMUP_OF, self.lr, 0.0);
                let now = probe.step(x.view(), &labels, rate as f32);
                step += 1;
                if now.is_nan() || now > DIVERGED {
                    return Ok(Err(Diverged {
                        steps: step,
                        loss: now,
                    }));
                }
                loss += f64::from(now) / per_epoch;
                shown.step(self.batch_size, now);
            }
        }
        Ok(Ok(loss))
    }
}

/// The progress of several trainings.
struct Shown {
    progress: Progress,
    began: Instant,
    steps: u64,
    images: f64,
}

impl Shown {
    fn new(steps: u64) -> Self {
        Self {
            progress: Progress::new(0, steps),
            began: Instant::now(),
            steps: 0,
            images: 0.0,
        }
    }

    fn step(&mut self, images: usize, loss: f32) {
        self.steps += 1;
        self.images += images as f64;
        let seconds = self.began.elapsed().as_secs_f64();
        self.progress.set(self.steps, self.images / seconds, loss);
    }
}

impl Part {
    /// Some of its rows.
    fn rows(&self, rows: &[usize]) -> (Array2<f32>, Vec<u32>) {
        let labels = rows.iter().map(|&row| self.labels[row]);
        (self.x.select(Axis(0), rows), labels.collect())
    }
}

/// Trains with each of the rates `lrs`, from the lowest on, on four fifths of `part`. Returns the one that classifies the
/// others best (of equals the lowest), or the middle one where there are too few pictures to tell, and what was tried.
fn choose_rate(
    part: &Part,
    classes: usize,
    course: &mut Course,
    lrs: &[f64],
    shown: &mut Shown,
) -> Result<Vec<TriedRate>, Error> {
    let (fit, choose) = hold_back(&part.labels, course.seed);
    // Batch norm needs two.
    let can_tell = !choose.is_empty() && fit.len() > 1;
    let mut tried = Vec::new();
    let mut best: Option<(f64, f64)> = None;
    if lrs.len() > 1 && can_tell {
        let batch_size = course.batch_size;
        course.batch_size = batch_size.min(fit.len());
        let (unseen, labels) = part.rows(&choose);
        for &lr in lrs {
            course.lr = lr;
            let mut probe = Probe::new(course.recipe, part.x.ncols(), classes, course.seed);
            let ended = course.train(&mut probe, fit.len(), shown, |rows| {
                let rows: Vec<usize> = rows.iter().map(|&row| fit[row]).collect();
                Ok(part.rows(&rows))
            })?;
            let top1 = ended
                .ok()
                .map(|_| Scores::of(&probe.logits(unseen.view()), &labels).top1);
            tried.push(TriedRate { lr, top1 });
            if let Some(top1) = top1.filter(|&top1| best.is_none_or(|(most, _)| top1 > most)) {
                best = Some((top1, lr));
            }
        }
        course.batch_size = batch_size;
    }
    // Where the loss rose with all of them, the lowest is worth a last try.
    let lowest = lrs.first().copied().unwrap_or(0.0);
    let unchosen = if tried.is_empty() { middle(lrs) } else { None };
    course.lr = best.map(|(_, lr)| lr).or(unchosen).unwrap_or(lowest);
    Ok(tried)
}

impl Probing<'_> {
    /// SGD or LARS, on the features of one view or of new crops in each epoch. The rate is chosen on one view: it depends on the
    /// scale of features, not on crops.
    pub(super) fn steps<B: TrainBackend>(
        &self,
        backend: &mut B,
        name: &str,
        mut extractor: Extractor<B>,
        train: Part,
        held_out: Part,
    ) -> Result<Solved, Error> {
        let (plan, dataset) = (self.plan, &self.splits.train);
        let largest = train.labels.len();
        let batch_size = plan.batch_size.unwrap_or(DEFAULT_BATCH.min(largest));
        if batch_size < 2 || batch_size > largest {
            return Err(Error::Setting {
                name: named("batch_size"),
                reason: format!(
                    "expected 2 to {largest}, the number of training pictures (batch norm needs two), found {batch_size}"
                ),
            });
        }
        let (optimizer, rates) = match plan.solver {
            Solver::Lars => (Optimizer::Lars, LARS_RATES),
            Solver::Sgd | Solver::Logistic => (Optimizer::Sgd, SGD_RATES),
        };
        let usual = rates.map(|rate| rate * batch_size as f64 / 256.0);
        let lrs = plan.lr.as_ref().map_or(&usual[..], std::slice::from_ref);
        let mut course = Course {
            recipe: Recipe {
                optimizer,
                momentum: MOMENTUM,
                weight_decay: plan.weight_decay.unwrap_or(0.0) as f32,
            },
            epochs: plan.epochs.unwrap_or(DEFAULT_EPOCHS),
            batch_size,
            lr: 0.0,
            seed: plan.seed,
        };
        let classes = dataset.num_classes();
        // About: a part's batches may be smaller.
        let tries = if lrs.len() > 1 { lrs.len() as u64 } else { 0 };
        let of_part = course.steps(largest) / CHOOSE_EVERY as u64 * (CHOOSE_EVERY as u64 - 1);
        let steps = course
            .steps(largest)
            .saturating_add(of_part.saturating_mul(tries));
        let mut shown = Shown::new(steps);
        let tried = choose_rate(&train, classes, &mut course, lrs, &mut shown)?;
        let mut probe = Probe::new(course.recipe, train.x.ncols(), classes, plan.seed);
        let mut loader = if plan.augment {
            let config = LoaderConfig {
                batch_size,
                seed: plan.seed,
                start: 0,
                workers: plan.frozen.machine.workers(),
                leaves_crops: backends::resizes(&plan.frozen.machine),
            };
            let transform = self.encoder.transform.clone();
            Some(Loader::new(dataset.clone(), transform, config)?)
        } else {
            None
        };
        let ended = course.train(&mut probe, largest, &mut shown, |rows| match &mut loader {
            Some(loader) => {
                let batch = loader.next()?;
                let (images, count) = (&batch.images, batch.samples.len());
                let x = self.augmented(backend, name, &mut extractor, images, count)?;
                let label = |&i: &u64| dataset.label(i as usize).unwrap_or_default();
                let labels = batch.samples.iter().map(label).collect();
                loader.recycle(batch);
                Ok((x, labels))
            }
            None => Ok(train.rows(rows)),
        })?;
        shown.progress.finish();
        let loss = ended.map_err(|Diverged { steps, loss }| Error::Setting {
            name: named("lr"),
            reason: format!(
                "expected a rate at which the loss falls, found {}, at which it is {loss:.3e} after {}; lower it",
                course.lr,
                count(steps as usize, "step")
            ),
        })?;
        Ok(Solved {
            logits: [&train.x, &held_out.x].map(|x| probe.logits(x.view())),
            loss,
            l2: None,
            tried: Vec::new(),
            iterations: None,
            converged: None,
            lr: Some(course.lr),
            unchosen: lrs.len() > 1 && tried.is_empty(),
            tried_lr: tried,
        })
    }

    /// Features of pictures that are there already.
    fn augmented<B: TrainBackend>(
        &self,
        backend: &mut B,
        name: &str,
        extractor: &mut Extractor<B>,
        images: &Images,
        count: usize,
    ) -> Result<Array2<f32>, Error> {
        let len = self.encoder.transform.output_len();
        let (mut out, mut left) = ([Vec::new()], count);
        for images in images.chunks(self.plan.frozen.batch_size, len) {
            let batch = left.min(self.plan.frozen.batch_size);
            extractor
                .extract(backend, images, batch, &[self.tap], &mut out)
                .map_err(|error| Error::backend(name, error))?;
            left -= batch;
        }
        let [out] = out;
        matrix(count, out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A feature that tells classes apart beside noise: rates that are far too low or too high lose to the one between.
    #[test]
    fn the_rate_is_chosen_on_what_was_not_trained_on() {
        let mut stream = Stream::new(3, 0, 0, Purpose::Init);
        let labels: Vec<u32> = (0..400).map(|_| stream.below(4)).collect();
        let x = Array2::from_shape_fn((400, 6), |(row, column)| {
            stream.normal() + 3.0 * f32::from(u8::from(labels[row] as usize == column))
        });
        let part = Part { x, labels };
        let mut course = Course {
            recipe: Recipe {
                optimizer: Optimizer::Sgd,
                momentum: MOMENTUM,
                weight_decay: 0.0,
            },
            epochs: 5,
            batch_size: 32,
            lr: 0.0,
            seed: 1,
        };
        let lrs = [1e-9, 0.1, 1e9];
        let mut choose = |lrs: &[f64]| {
            let tried = choose_rate(&part, 4, &mut course, lrs, &mut Shown::new(0)).unwrap();
            (tried, course.lr, course.batch_size)
        };
        let (tried, lr, batch_size) = choose(&lrs);
        let rates: Vec<f64> = tried.iter().map(|tried| tried.lr).collect();
        assert_eq!(rates, lrs);
        assert_eq!((lr, batch_size), (0.1, 32), "{tried:?}");
        let top1 = tried[1].top1.unwrap();
        assert!(top1 > 0.8 && tried[0].top1.unwrap() < top1, "{tried:?}");
        assert_eq!(tried[2].top1, None, "diverges");
        // Of equals the lowest; one needs no choice.
        assert_eq!(choose(&[1e-10, 2e-10]).1, 1e-10);
        assert_eq!(choose(&[0.7]), (Vec::new(), 0.7, 32));
    }
}
