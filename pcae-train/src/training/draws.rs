//! What training draws at random for a micro-batch besides the pictures: keyed by sample, so that nothing depends on the
//! order in which pictures come.

use pcae_kernel::backend::TrainBackend;
use pcae_kernel::config::{Criterion, Reduction};
use pcae_kernel::model::CriterionScorer;
use pcae_kernel::rng::{Purpose, Stream};
use pcae_kernel::schedule::{drop_path_rate, drop_path_scale};

/// Which samples, in which epoch, of which seed.
#[derive(Clone, Copy)]
pub(crate) struct Key<'a> {
    /// The run's seed.
    pub(crate) seed: u64,
    /// Passes over the data before.
    pub(crate) epoch: u64,
    /// The samples of the micro-batch.
    pub(crate) samples: &'a [u64],
}

/// Factors of stochastic depth, `[depth, 2, batch]`, for `depth` blocks and at most `rate` at the last.
pub(crate) fn drop_path(key: Key<'_>, depth: usize, rate: f64, scales: &mut Vec<f32>) {
    let count = key.samples.len();
    scales.clear();
    scales.resize(depth * 2 * count, 0.0);
    for (i, &sample) in key.samples.iter().enumerate() {
        let mut stream = Stream::new(key.seed, key.epoch, sample, Purpose::DropPath);
        for branch in 0..2 * depth {
            let rate = drop_path_rate(branch / 2, depth, rate);
            scales[branch * count + i] = drop_path_scale(&mut stream, rate);
        }
    }
}

/// Scores at random for each stage of a [`Criterion::Random`] that starts from `tokens`; nothing for the other criteria.
///
/// # Errors
/// What the backend reports.
pub(crate) fn selection<B: TrainBackend>(
    backend: &mut B,
    key: Key<'_>,
    reduction: &Reduction,
    tokens: usize,
    depth: usize,
    scorer: &mut CriterionScorer<B>,
) -> Result<(), B::Error> {
    if reduction.criterion != Criterion::Random {
        return Ok(());
    }
    let mut stages = Vec::new();
    reduction.for_each_stage(tokens, depth, |tokens, _| stages.push(tokens));
    let mut scores = Vec::new();
    for (stage, tokens) in stages.into_iter().enumerate() {
        scores.clear();
        for &sample in key.samples {
            // A stage is one more dimension of the key: data sets have fewer than 2^48 samples.
            let sample = sample ^ (stage as u64) << 48;
            let mut stream = Stream::new(key.seed, key.epoch, sample, Purpose::Selection);
            scores.extend((0..tokens).map(|_| stream.uniform()));
        }
        scorer.set_noise(backend, stage, &scores)?;
    }
    Ok(())
}
