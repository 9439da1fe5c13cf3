//! What a classifier gets right.

use std::fmt::Write as _;
use std::io;
use std::path::Path;
use std::time::Instant;

use pcae_kernel::backend::{Pixels, TrainBackend};
use pcae_kernel::config::{ClassifierConfig, Reduction};
use pcae_kernel::model::{Classifier, CriterionScorer};

use crate::data::Dataset;
use crate::data::augment::Transform;
use crate::data::images::View;
use crate::data::loader::eval_batches;
use crate::durable::atomic_write;
use crate::error::Error;
use crate::training::draws::{self, Key};

/// How often each class was taken for each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Confusion {
    classes: usize,
    counts: Vec<u64>,
}

impl Confusion {
    fn new(classes: usize) -> Self {
        Self {
            classes,
            counts: vec![0; classes * classes],
        }
    }

    /// How many pictures of class `label` were taken for class `predicted`.
    ///
    /// # Panics
    /// If there are no such classes.
    pub fn count(&self, label: usize, predicted: usize) -> u64 {
        self.counts[label * self.classes..][..self.classes][predicted]
    }

    /// Pictures of class `label`.
    pub fn pictures(&self, label: usize) -> u64 {
        self.counts[label * self.classes..][..self.classes]
            .iter()
            .sum()
    }

    /// Saves it as CSV, a row for each true class, with the names of the classes.
    ///
    /// # Errors
    /// [`Error::Io`]; a previous file is then intact.
    pub fn write_csv(&self, path: &Path, classes: &[String]) -> Result<(), Error> {
        let quoted = |name: &String| format!("\"{}\"", name.replace('"', "\"\""));
        let names: Vec<String> = classes.iter().map(quoted).collect();
        let mut text = format!("true \\ predicted,{}\n", names.join(","));
        for (name, row) in names.iter().zip(self.counts.chunks_exact(self.classes)) {
            let row: Vec<String> = row.iter().map(u64::to_string).collect();
            let _ = writeln!(text, "{name},{}", row.join(","));
        }
        atomic_write(path, |out: &mut dyn io::Write| {
            out.write_all(text.as_bytes())
        })
        .map_err(|error| Error::Io {
            what: format!("cannot write '{}'", path.display()),
            error,
        })
    }
}

/// What was measured on a data set.
#[derive(Clone, Debug, PartialEq)]
pub struct Score {
    /// Pictures.
    pub pictures: usize,
    /// Pictures left out because they could not be read.
    pub unreadable: usize,
    /// Part of them whose class has the greatest score.
    pub top1: f64,
    /// Part of them whose class is among the five greatest.
    pub top5: f64,
    /// Mean cross-entropy.
    pub loss: f64,
    /// Which classes were taken for which.
    pub confusion: Confusion,
    /// Pictures classified per second, their preparation left out.
    pub images_per_s: f64,
}

/// A classifier's forward over a data set.
pub(crate) struct Evaluator<B: TrainBackend> {
    config: ClassifierConfig,
    model: Classifier<B>,
    images: B::Buf,
    batch: usize,
    /// Of a random selection.
    seed: u64,
}

impl<B: TrainBackend> Evaluator<B> {
    /// Makes room for `batch` pictures at a time.
    ///
    /// # Errors
    /// If memory is short.
    pub(crate) fn new(
        backend: &mut B,
        config: &ClassifierConfig,
        batch: usize,
        seed: u64,
    ) -> Result<Self, B::Error> {
        let vit = &config.vit;
        let pixels = vit.in_chans * vit.img_size[0] * vit.img_size[1];
        Ok(Self {
            config: *config,
            model: Classifier::new(backend, config, batch)?,
            images: backend.buf(batch * pixels)?,
            batch,
            seed,
        })
    }

    /// Changes what is dropped from the next run on. `reduction` must have been checked.
    pub(crate) fn set_reduction(&mut self, reduction: Reduction) {
        self.config.reduction = reduction;
        self.model.set_reduction(reduction);
    }

    /// Classifies whatever is in its buffers, for a backend that only counts.
    ///
    /// # Errors
    /// What the backend reports.
    pub(crate) fn rehearse(&mut self, backend: &mut B, params: &B::Params) -> Result<(), B::Error> {
        let ClassifierConfig { vit, reduction, .. } = self.config;
        let (tokens, depth, batch) = (vit.num_patches(), vit.depth, self.batch);
        let mut scorer = CriterionScorer::new(backend, &reduction, batch, tokens, depth)?;
        let images = View::Bytes(vit.pixels(batch), Pixels::default());
        images.write(backend, &mut self.images)?;
        self.model
            .forward(backend, params, batch, &self.images, &mut scorer)
            .map(|_| ())
    }

    /// Classifies all of `dataset` that can be read, whose class `i` is the classifier's class `classes[i]`.
    ///
    /// # Errors
    /// [`Error::Data`] or [`Error::Backend`].
    pub(crate) fn run(
        &mut self,
        backend: &mut B,
        name: &str,
        params: &B::Params,
        dataset: &Dataset,
        transform: &Transform,
        classes: &[u32],
    ) -> Result<Score, Error> {
        let failed = |error: B::Error| Error::backend(name, error);
        let ClassifierConfig {
            vit,
            num_classes,
            reduction,
            ..
        } = self.config;
        let (tokens, depth) = (vit.num_patches(), vit.depth);
        let mut scorer =
            CriterionScorer::new(backend, &reduction, self.batch, tokens, depth).map_err(failed)?;
        let mut tally = Tally::new(num_classes);
        let mut seconds = 0.0;
        let mut logits = Vec::new();
        for batch in eval_batches(dataset, transform, self.batch)? {
            let batch = batch?;
            let count = batch.samples.len();
            tally.unreadable += batch.unreadable;
            if count == 0 {
                continue;
            }
            logits.resize(count * num_classes, 0.0);
            let images = batch.images.view();
            images.write(backend, &mut self.images).map_err(failed)?;
            let key = Key {
                seed: self.seed,
                epoch: 0,
                samples: &batch.samples,
            };
            draws::selection(backend, key, &reduction, tokens, depth, &mut scorer)
                .map_err(failed)?;
            let began = Instant::now();
            let scores = self
                .model
                .forward(backend, params, count, &self.images, &mut scorer)
                .map_err(failed)?;
            backend.read(&mut logits, scores).map_err(failed)?;
            seconds += began.elapsed().as_secs_f64();
            let labels = batch.labels.unwrap_or_default();
            for (logits, label) in logits.chunks_exact(num_classes).zip(labels) {
                tally.add(logits, classes[label as usize] as usize);
            }
        }
        Ok(tally.score(seconds))
    }
}

/// Sums over pictures.
struct Tally {
    confusion: Confusion,
    pictures: usize,
    unreadable: usize,
    top1: usize,
    top5: usize,
    loss: f64,
}

impl Tally {
    fn new(classes: usize) -> Self {
        Self {
            confusion: Confusion::new(classes),
            pictures: 0,
            unreadable: 0,
            top1: 0,
            top5: 0,
            loss: 0.0,
        }
    }

    /// Counts one picture of class `label`. Of equal scores the lower class counts as the greater.
    fn add(&mut self, logits: &[f32], label: usize) {
        let own = logits[label];
        let is_ahead = |(class, &score): (usize, &f32)| {
            // NaN is ahead of everything: a broken model gets nothing right.
            let order = score.partial_cmp(&own);
            class != label
                && order.is_none_or(|order| order.is_gt() || (order.is_eq() && class < label))
        };
        let ahead = logits
            .iter()
            .enumerate()
            .filter(|&pair| is_ahead(pair))
            .count();
        let is_number = own.is_finite();
        self.pictures += 1;
        self.top1 += usize::from(ahead == 0 && is_number);
        self.top5 += usize::from(ahead < 5 && is_number);
        let best = logits
            .iter()
            .enumerate()
            .max_by(|(i, a), (j, b)| a.total_cmp(b).then(j.cmp(i)));
        let predicted = best.map_or(0, |(class, _)| class);
        self.confusion.counts[label * self.confusion.classes + predicted] += 1;
        let greatest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        let sum: f64 = logits
            .iter()
            .map(|&x| libm::exp(f64::from(x) - greatest))
            .sum();
        self.loss += greatest + libm::log(sum) - f64::from(own);
    }

    fn score(self, seconds: f64) -> Score {
        let count = self.pictures as f64;
        Score {
            pictures: self.pictures,
            unreadable: self.unreadable,
            top1: self.top1 as f64 / count,
            top5: self.top5 as f64 / count,
            loss: self.loss / count,
            confusion: self.confusion,
            images_per_s: count / seconds,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_and_ties() {
        let mut tally = Tally::new(7);
        // First, second, sixth, twice tied with a lower class, tied with a higher one.
        tally.add(&[0.0, 3.0, 1.0, 0.0, 0.0, 0.0, 0.0], 1);
        tally.add(&[0.0, 3.0, 1.0, 0.0, 0.0, 0.0, 0.0], 2);
        tally.add(&[6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0], 5);
        tally.add(&[2.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0], 1);
        tally.add(&[2.0, 2.0, 2.0, 0.0, 0.0, 0.0, 0.0], 2);
        tally.add(&[2.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0], 0);
        let score = tally.score(2.0);
        assert_eq!((score.pictures, score.images_per_s), (6, 3.0));
        assert_eq!((score.top1, score.top5), (2.0 / 6.0, 5.0 / 6.0));
        assert_eq!(score.confusion.count(1, 1), 1);
        assert_eq!(score.confusion.count(2, 1), 1);
        assert_eq!(score.confusion.count(5, 0), 1);
        assert_eq!(score.confusion.count(1, 0), 1);
        assert_eq!(score.confusion.count(2, 0), 1);
        assert_eq!(score.confusion.counts.iter().sum::<u64>(), 6);
        assert_eq!(
            [0, 1, 3].map(|label| score.confusion.pictures(label)),
            [1, 2, 0]
        );
    }

    #[test]
    fn a_broken_model_gets_nothing_right() {
        let mut tally = Tally::new(3);
        tally.add(&[f32::NAN; 3], 0);
        tally.add(&[1.0, f32::NAN, 0.0], 0);
        tally.add(&[f32::INFINITY, 0.0, 0.0], 0);
        let score = tally.score(1.0);
        assert_eq!((score.top1, score.top5), (0.0, 1.0 / 3.0));
    }

    /// Against the formula, also where exponentials alone would overflow.
    #[test]
    fn cross_entropy() {
        let mut tally = Tally::new(2);
        tally.add(&[1.0, 3.0], 0);
        tally.add(&[1000.0, 1002.0], 1);
        let want = (1.0 + 2.0_f64.exp()).ln() + (1.0 + (-2.0_f64).exp()).ln();
        assert!((tally.score(1.0).loss - want / 2.0).abs() < 1e-12);
    }

    #[test]
    fn names_in_csv_are_quoted() {
        let mut tally = Tally::new(2);
        tally.add(&[0.0, 1.0], 0);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("confusion.csv");
        let classes = ["a, b".to_owned(), "say \"c\"".to_owned()];
        tally.confusion.write_csv(&path, &classes).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(
            text,
            "true \\ predicted,\"a, b\",\"say \"\"c\"\"\"\n\"a, b\",0,1\n\"say \"\"c\"\"\",0,0\n"
        );
    }
}
