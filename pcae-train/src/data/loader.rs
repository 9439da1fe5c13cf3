//! Batches for training, prepared ahead by worker threads, and for evaluation, in order.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use pcae_kernel::resize::Crop;
use pcae_kernel::rng::{Purpose, Stream};
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::augment::{Scratch, Transform};
use super::images::{Format, Images};
use super::regularize::Augmentation;
use super::{DataError, Dataset, MAX_SUBSTITUTIONS, Picture};

/// Finished batches that wait for the training loop; with the one being filled and the one in use, four exist.
const QUEUE: usize = 2;

/// What a [`Loader`] gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoaderConfig {
    /// Pictures in a batch, at most as many as there are in the data set.
    pub batch_size: usize,
    /// Seed of the order and of the augmentation.
    pub seed: u64,
    /// Index of the first batch: 0, or the number of batches a resumed run has seen.
    pub start: u64,
    /// Threads that prepare batches ahead; 0 prepares each in the caller's thread when it is asked for.
    pub workers: usize,
    /// Whether crops are left to a backend to resize, as far as it can ([`Crop::fits`]) and nothing but a crop is to be done.
    pub leaves_crops: bool,
}

/// Augmented pictures for one training step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// `batch_size` of them: bytes, where nothing is done to their values.
    pub images: Images,
    /// Which samples of the data set these are. Each appears at most once in an epoch, but for those that took the place
    /// of a broken one.
    pub samples: Vec<u64>,
    /// How often the data set was gone through before.
    pub epoch: u64,
    /// The batch's place in the endless sequence, from 0.
    pub index: u64,
}

/// The endless sequence of training batches, from any place.
///
/// An epoch is a random order of the data set, cut in batches; what does not fill a batch is dropped. A batch depends on
/// the seed and its index alone, not on `start`, the number of workers or their timing.
#[derive(Debug)]
pub struct Loader {
    batches_per_epoch: u64,
    mode: Mode,
}

#[derive(Debug)]
enum Mode {
    Inline {
        filler: Box<Filler>,
        next: u64,
        spare: Option<Batch>,
    },
    Prefetch(Prefetch),
}

#[derive(Debug)]
struct Prefetch {
    /// `None` only while dropping.
    batches: Option<Receiver<Result<Batch, DataError>>>,
    used: Sender<Batch>,
    stop: Arc<AtomicBool>,
    coordinator: Option<JoinHandle<()>>,
}

/// Bytes of all batches that exist at a time, of which no crop is left to a backend.
pub(crate) fn memory(augmentation: &Augmentation, batch_size: usize) -> usize {
    let element = match augmentation.makes_values() {
        true => size_of::<f32>(),
        false => size_of::<u8>(),
    };
    let len = augmentation.transform.output_len().saturating_mul(element);
    len.saturating_mul(batch_size).saturating_mul(QUEUE + 2)
}

impl Loader {
    /// Checks the settings and starts the workers.
    ///
    /// # Errors
    /// If a field of `augmentation` is out of range or does not fit the pictures, `batch_size` is 0 or larger than the
    /// data set, or threads cannot be started.
    pub fn new(
        dataset: Arc<Dataset>,
        augmentation: impl Into<Augmentation>,
        config: LoaderConfig,
    ) -> Result<Self, DataError> {
        let augmentation = augmentation.into();
        augmentation.check()?;
        check(&dataset, &augmentation.transform)?;
        if config.batch_size == 0 || config.batch_size > dataset.len() {
            return Err(DataError::BatchSize {
                batch_size: config.batch_size,
                len: dataset.len(),
                dataset: dataset.describe(),
            });
        }
        let filler = Filler {
            batches_per_epoch: (dataset.len() / config.batch_size) as u64,
            order: Vec::with_capacity(dataset.len()),
            ordered_epoch: None,
            slots: (0..config.workers.max(1))
                .map(|_| Mutex::default())
                .collect(),
            dataset,
            format: match (augmentation.makes_values(), config.leaves_crops) {
                (true, _) => Format::Values,
                (false, true) if augmentation.is_crop_alone() => Format::Crops,
                (false, _) => Format::Bytes,
            },
            augmentation,
            batch_size: config.batch_size,
            seed: config.seed,
        };
        let batches_per_epoch = filler.batches_per_epoch;
        let mode = if config.workers == 0 {
            Mode::Inline {
                filler: Box::new(filler),
                next: config.start,
                spare: None,
            }
        } else {
            Mode::Prefetch(Prefetch::start(filler, config)?)
        };
        Ok(Self {
            batches_per_epoch,
            mode,
        })
    }

    /// Number of batches in an epoch, at least 1.
    pub fn batches_per_epoch(&self) -> u64 {
        self.batches_per_epoch
    }

    /// The next batch, once it is ready.
    ///
    /// # Errors
    /// If a hundred pictures in a row are unreadable, or a worker panicked. Nothing more comes after an error.
    #[expect(
        clippy::should_implement_trait,
        reason = "the sequence is endless: an iterator's `None` would have no meaning"
    )]
    pub fn next(&mut self) -> Result<Batch, DataError> {
        match &mut self.mode {
            Mode::Inline {
                filler,
                next,
                spare,
            } => {
                let mut batch = spare.take().unwrap_or_default();
                filler.order(*next, &mut batch);
                filler.fill(&mut batch)?;
                *next += 1;
                Ok(batch)
            }
            Mode::Prefetch(prefetch) => prefetch.next(),
        }
    }

    /// Gives a batch's buffers back for one to come, so that a loop allocates only at its start.
    pub fn recycle(&mut self, batch: Batch) {
        match &mut self.mode {
            Mode::Inline { spare, .. } => *spare = Some(batch),
            // After an error nobody takes it: then it is only dropped.
            Mode::Prefetch(prefetch) => drop(prefetch.used.send(batch)),
        }
    }
}

impl Prefetch {
    fn start(mut filler: Filler, config: LoaderConfig) -> Result<Self, DataError> {
        let failed = |error: &dyn std::fmt::Display| DataError::Worker {
            reason: format!("{} threads could not be started: {error}", config.workers),
        };
        let pool = ThreadPoolBuilder::new()
            .num_threads(config.workers)
            .thread_name(|i| format!("data-{i}"))
            .build()
            .map_err(|error| failed(&error))?;
        let (ready, batches) = sync_channel(QUEUE);
        let (used, spare) = channel();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let coordinator = std::thread::Builder::new()
            .name("data".to_owned())
            .spawn(move || {
                let work = AssertUnwindSafe(|| {
                    filler.prefetch(config.start, &pool, &ready, &spare, &stopped);
                });
                if let Err(panic) = catch_unwind(work) {
                    let reason = format!("a worker panicked: {}", panic_message(&*panic));
                    // Fails only if nobody waits for batches any more.
                    drop(ready.send(Err(DataError::Worker { reason })));
                }
            })
            .map_err(|error| failed(&error))?;
        Ok(Self {
            batches: Some(batches),
            used,
            stop,
            coordinator: Some(coordinator),
        })
    }

    fn next(&mut self) -> Result<Batch, DataError> {
        let batch = self.batches.as_ref().and_then(|ready| ready.recv().ok());
        batch.unwrap_or_else(|| {
            Err(DataError::Worker {
                reason: "an error was returned before".to_owned(),
            })
        })
    }
}

impl Drop for Prefetch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // Lets go of a coordinator that waits for room in the queue.
        self.batches = None;
        if let Some(coordinator) = self.coordinator.take() {
            // Its panics were caught and sent.
            drop(coordinator.join());
        }
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

/// Fills batches by their index.
#[derive(Debug)]
struct Filler {
    dataset: Arc<Dataset>,
    augmentation: Augmentation,
    format: Format,
    batch_size: usize,
    seed: u64,
    batches_per_epoch: u64,
    /// The data set's samples in the order of `ordered_epoch`.
    order: Vec<usize>,
    ordered_epoch: Option<u64>,
    /// One for each worker, which alone locks it.
    slots: Vec<Mutex<Slot>>,
}

#[derive(Debug, Default)]
struct Slot {
    picture: Picture,
    scratch: Scratch,
}

impl Filler {
    /// Sends batch after batch until there is an error or nobody listens.
    fn prefetch(
        &mut self,
        start: u64,
        pool: &ThreadPool,
        ready: &SyncSender<Result<Batch, DataError>>,
        spare: &Receiver<Batch>,
        stop: &AtomicBool,
    ) {
        for index in start.. {
            let mut batch = spare.try_recv().unwrap_or_default();
            self.order(index, &mut batch);
            let filled = pool.install(|| self.fill_parallel(&mut batch, stop));
            let failed = filled.is_err();
            if ready.send(filled.map(|()| batch)).is_err() || failed {
                return;
            }
        }
    }

    /// Says which samples batch `index` holds, and makes room for them.
    fn order(&mut self, index: u64, batch: &mut Batch) {
        let epoch = index / self.batches_per_epoch;
        if self.ordered_epoch != Some(epoch) {
            // From sorted, not from the epoch before: the order depends on the key alone.
            self.order.clear();
            self.order.extend(0..self.dataset.len());
            Stream::new(self.seed, epoch, 0, Purpose::Shuffle).shuffle(&mut self.order);
            self.ordered_epoch = Some(epoch);
        }
        let first = (index % self.batches_per_epoch) as usize * self.batch_size;
        let samples = &self.order[first..][..self.batch_size];
        batch.samples.clear();
        batch.samples.extend(samples.iter().map(|&i| i as u64));
        let Augmentation { transform, .. } = &self.augmentation;
        batch
            .images
            .prepare(transform, self.batch_size, self.format);
        (batch.epoch, batch.index) = (epoch, index);
    }

    fn fill(&self, batch: &mut Batch) -> Result<(), DataError> {
        let len = self.augmentation.transform.output_len();
        let (epoch, samples) = (batch.epoch, &mut batch.samples);
        match &mut batch.images {
            Images::Values(values) => values
                .chunks_exact_mut(len)
                .zip(samples)
                .try_for_each(|(out, sample)| self.fill_one(0, epoch, sample, Out::Values(out))),
            Images::Bytes(bytes) => bytes
                .values
                .chunks_exact_mut(bytes.room)
                .zip(&mut bytes.crops)
                .zip(&mut bytes.flips)
                .zip(samples)
                .try_for_each(|(((out, crop), flip), sample)| {
                    self.fill_one(0, epoch, sample, Out::Bytes(out, crop, flip))
                }),
        }
    }

    /// In the threads of the pool this is called in.
    fn fill_parallel(&self, batch: &mut Batch, stop: &AtomicBool) -> Result<(), DataError> {
        let len = self.augmentation.transform.output_len();
        let (epoch, samples) = (batch.epoch, &mut batch.samples);
        let fill_one = |sample: &mut u64, out: Out<'_>| {
            if stop.load(Ordering::Relaxed) {
                return Err(DataError::Worker {
                    reason: "the loader was dropped".to_owned(),
                });
            }
            let worker = rayon::current_thread_index().unwrap_or(0);
            self.fill_one(worker, epoch, sample, out)
        };
        match &mut batch.images {
            Images::Values(values) => values
                .par_chunks_exact_mut(len)
                .zip(samples)
                .try_for_each(|(out, sample)| fill_one(sample, Out::Values(out))),
            Images::Bytes(bytes) => bytes
                .values
                .par_chunks_exact_mut(bytes.room)
                .zip(&mut bytes.crops)
                .zip(&mut bytes.flips)
                .zip(samples)
                .try_for_each(|(((out, crop), flip), sample)| {
                    fill_one(sample, Out::Bytes(out, crop, flip))
                }),
        }
    }

    /// Fills one image, and puts in `sample` which one it became.
    fn fill_one(
        &self,
        worker: usize,
        epoch: u64,
        sample: &mut u64,
        out: Out<'_>,
    ) -> Result<(), DataError> {
        let mut slot = self.slots[worker]
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let Slot { picture, scratch } = &mut *slot;
        // The stream of the sample that was drawn: its substitute gets another crop than in its own turn.
        let mut stream = Stream::new(self.seed, epoch, *sample, Purpose::Augment);
        *sample = self.dataset.load(*sample as usize, picture)? as u64;
        let (augmentation, stream) = (&self.augmentation, &mut stream);
        match out {
            Out::Values(out) => augmentation.train(picture, stream, scratch, out),
            Out::Bytes(out, crop, flip) => {
                *flip = match self.format {
                    Format::Crops => {
                        let transform = &augmentation.transform;
                        transform.cut(picture, stream, scratch, out, crop)?
                    }
                    _ => augmentation.train_bytes(picture, stream, scratch, out)?,
                };
                Ok(())
            }
        }
    }
}

/// Where a picture goes.
enum Out<'a> {
    Values(&'a mut [f32]),
    /// With its size, and whether it is mirrored.
    Bytes(&'a mut [u8], &'a mut Crop, &'a mut bool),
}

fn check(dataset: &Dataset, transform: &Transform) -> Result<(), DataError> {
    transform.check()?;
    if transform.channels == dataset.channels() {
        return Ok(());
    }
    Err(DataError::Setting {
        name: "channels",
        expected: format!("{}, as in {}", dataset.channels(), dataset.describe()),
        found: transform.channels.to_string(),
    })
}

/// Pictures as evaluation sees them.
#[derive(Clone, Debug, PartialEq)]
pub struct EvalBatch {
    /// As many as `samples`.
    pub images: Images,
    /// Which samples of the data set these are.
    pub samples: Vec<u64>,
    /// The class of each, if the data set has labels.
    pub labels: Option<Vec<u32>>,
    /// Pictures between these that could not be read, and that nothing takes the place of.
    pub unreadable: usize,
}

/// A data set from its first sample to its last, see [`eval_batches`].
#[derive(Debug)]
pub struct EvalBatches<'a> {
    dataset: &'a Dataset,
    transform: &'a Transform,
    batch_size: usize,
    next: usize,
    /// Unreadable pictures just before `next`, and why the first of them is.
    in_a_row: usize,
    first: Option<DataError>,
}

/// Goes through the whole of `dataset` in order, with [`Transform::eval`], in batches of `batch_size`; the last one may be
/// shorter. Each batch is prepared when it is asked for, in the threads of the current rayon pool.
///
/// Pictures that cannot be read are left out and counted: unlike in training, where another one takes the place, each picture
/// counts once in a figure. A batch may so be shorter, or empty.
///
/// # Errors
/// If a field of `transform` is out of range or does not fit the pictures, or `batch_size` is 0. The iterator gives an
/// error, and ends, if a hundred pictures in a row, or all, are unreadable.
pub fn eval_batches<'a>(
    dataset: &'a Dataset,
    transform: &'a Transform,
    batch_size: usize,
) -> Result<EvalBatches<'a>, DataError> {
    check(dataset, transform)?;
    if batch_size == 0 {
        return Err(DataError::BatchSize {
            batch_size,
            len: dataset.len(),
            dataset: dataset.describe(),
        });
    }
    Ok(EvalBatches {
        dataset,
        transform,
        batch_size,
        next: 0,
        in_a_row: 0,
        first: None,
    })
}

impl EvalBatches<'_> {
    fn fill(&mut self, end: usize) -> Result<EvalBatch, DataError> {
        let (dataset, transform) = (self.dataset, self.transform);
        let len = transform.output_len();
        let mut images = vec![0; (end - self.next) * len];
        let errors: Vec<Option<DataError>> = images
            .par_chunks_exact_mut(len)
            .zip(self.next..end)
            .map_init(Slot::default, |slot, (out, i)| {
                let Slot { picture, scratch } = slot;
                match dataset.picture(i, picture) {
                    Ok(()) => transform.eval_bytes(picture, scratch, out).map(|()| None),
                    Err(error) => Ok(Some(error)),
                }
            })
            .collect::<Result<_, DataError>>()?;
        let mut samples: Vec<u64> = Vec::with_capacity(errors.len());
        let most = MAX_SUBSTITUTIONS.min(dataset.len());
        for (at, (i, error)) in (self.next..end).zip(errors).enumerate() {
            let Some(error) = error else {
                images.copy_within(at * len..(at + 1) * len, samples.len() * len);
                samples.push(i as u64);
                (self.in_a_row, self.first) = (0, None);
                continue;
            };
            dataset.note_broken(i, &error, "left out");
            self.in_a_row += 1;
            let first = self.first.take().unwrap_or(error);
            if self.in_a_row == most {
                return Err(DataError::Unreadable {
                    tried: most,
                    first: Box::new(first),
                });
            }
            self.first = Some(first);
        }
        let unreadable = end - self.next - samples.len();
        images.truncate(samples.len() * len);
        let labels = samples
            .iter()
            .map(|&sample| self.dataset.label(sample as usize))
            .collect();
        Ok(EvalBatch {
            images: Images::of_bytes(transform, images),
            samples,
            labels,
            unreadable,
        })
    }
}

impl Iterator for EvalBatches<'_> {
    type Item = Result<EvalBatch, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.next == self.dataset.len() {
            return None;
        }
        let end = self
            .dataset
            .len()
            .min(self.next.saturating_add(self.batch_size));
        let batch = self.fill(end);
        self.next = if batch.is_ok() {
            end
        } else {
            self.dataset.len()
        };
        Some(batch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::open;
    use std::collections::BTreeSet;

    fn transform(channels: usize) -> Transform {
        Transform {
            height: 12,
            width: 10,
            channels,
            scale: (0.2, 1.0),
            ratio: (3.0 / 4.0, 4.0 / 3.0),
            flip: true,
            mean: vec![0.3; channels],
            std: vec![0.4; channels],
        }
    }

    fn config(workers: usize, start: u64) -> LoaderConfig {
        LoaderConfig {
            batch_size: 300,
            seed: 11,
            start,
            workers,
            leaves_crops: false,
        }
    }

    fn held_out() -> Arc<Dataset> {
        open(None, None).unwrap().held_out
    }

    /// Batches `start..start + count`, with buffers that go round.
    fn batches(config: LoaderConfig, count: usize) -> Vec<Batch> {
        let mut loader = Loader::new(held_out(), transform(1), config).unwrap();
        (0..count)
            .map(|_| {
                let batch = loader.next().unwrap();
                let copy = batch.clone();
                loader.recycle(batch);
                copy
            })
            .collect()
    }

    #[test]
    fn batches_depend_on_seed_and_index_alone() {
        // 2000 / 300: six batches in an epoch.
        let all = batches(config(0, 0), 14);
        assert_eq!((all[5].epoch, all[6].epoch, all[13].epoch), (0, 1, 2));
        assert_eq!(batches(config(1, 0), 14), all);
        assert_eq!(batches(config(3, 0), 14), all);
        for workers in [0, 3] {
            assert_eq!(batches(config(workers, 8), 6), all[8..]);
        }
        let mut other = config(0, 0);
        other.seed = 12;
        assert_ne!(batches(other, 1)[0].samples, all[0].samples);
    }

    #[test]
    fn an_epoch_has_each_sample_at_most_once_and_epochs_differ() {
        let all = batches(config(2, 0), 12);
        let epoch = |batches: &[Batch]| -> Vec<u64> {
            batches.iter().flat_map(|b| b.samples.clone()).collect()
        };
        let (first, second) = (epoch(&all[..6]), epoch(&all[6..]));
        assert_ne!(first, second);
        for samples in [first, second] {
            let distinct: BTreeSet<u64> = samples.iter().copied().collect();
            assert_eq!((samples.len(), distinct.len()), (1800, 1800));
            assert!(distinct.last() < Some(&2000));
        }
    }

    /// What is mixed comes as values, all else as bytes of which a backend makes the same.
    #[test]
    fn bytes_and_values_are_the_same_pictures() {
        let plain = Augmentation {
            rand_augment: 5.0,
            ..transform(1).into()
        };
        let mixed = Augmentation {
            mixes: true,
            ..plain.clone()
        };
        for workers in [0, 2] {
            let [bytes, values] = [&plain, &mixed].map(|augmentation| {
                let loader = Loader::new(held_out(), augmentation.clone(), config(workers, 3));
                loader.unwrap().next().unwrap().images
            });
            assert!(matches!(bytes, Images::Bytes(_)) && matches!(values, Images::Values(_)));
            assert!(bytes.values() == values.values());
        }
    }

    /// Where pictures lie.
    fn place(images: &Images) -> *const u8 {
        match images {
            Images::Bytes(bytes) => bytes.values.as_ptr(),
            Images::Values(values) => values.as_ptr().cast(),
        }
    }

    #[test]
    fn recycled_buffers_are_used_again() {
        let mut loader = Loader::new(held_out(), transform(1), config(0, 0)).unwrap();
        let batch = loader.next().unwrap();
        let images = place(&batch.images);
        loader.recycle(batch);
        assert_eq!(place(&loader.next().unwrap().images), images);
    }

    #[test]
    fn no_more_than_four_buffers_exist() {
        let mut loader = Loader::new(held_out(), transform(1), config(2, 0)).unwrap();
        let mut buffers = BTreeSet::new();
        for _ in 0..30 {
            let batch = loader.next().unwrap();
            buffers.insert(place(&batch.images));
            loader.recycle(batch);
        }
        // The queue, one being filled, one sent and waiting for room, one in use.
        assert!(buffers.len() <= QUEUE + 2, "{}", buffers.len());
    }

    #[test]
    fn settings_are_checked() {
        let message = |batch_size, channels| {
            let config = LoaderConfig {
                batch_size,
                ..config(0, 0)
            };
            let error = Loader::new(held_out(), transform(channels), config).unwrap_err();
            error.to_string()
        };
        let error = message(2001, 1);
        assert!(
            error.starts_with("--batch-size 2001: expected 1 to 2000"),
            "{error}"
        );
        assert!(message(0, 1).starts_with("--batch-size 0: expected 1 to 2000"));
        assert!(message(1, 3).starts_with("channels: expected 1"));
    }

    #[test]
    fn a_panic_in_a_worker_reaches_the_caller() {
        let good = held_out();
        let members = vec![0, 1, usize::MAX, 2];
        let bad = Dataset::new("bad".to_owned(), Arc::clone(&good.source), members, 1);
        let config = LoaderConfig {
            batch_size: 4,
            ..config(2, 0)
        };
        let mut loader = Loader::new(Arc::new(bad), transform(1), config).unwrap();
        let error = loader.next().unwrap_err().to_string();
        assert!(error.contains("a worker panicked: "), "{error}");
        let error = loader.next().unwrap_err().to_string();
        assert!(error.contains("returned before"), "{error}");
        loader.recycle(Batch::default());
    }

    #[test]
    fn broken_pictures_are_replaced_until_all_are_broken() {
        let dir = tempfile::tempdir().unwrap();
        for i in 0..10 {
            image::RgbImage::from_pixel(9, 9, image::Rgb([20 * i; 3]))
                .save(dir.path().join(format!("{i}.png")))
                .unwrap();
        }
        let train = open(Some(dir.path()), None).unwrap().train;
        std::fs::write(train.name(3), "").unwrap();
        let run = |workers| {
            let config = LoaderConfig {
                batch_size: 9,
                ..config(workers, 0)
            };
            let mut loader = Loader::new(Arc::clone(&train), transform(3), config).unwrap();
            loader.next()
        };
        for workers in [0, 2] {
            let mut samples = run(workers).unwrap().samples;
            samples.sort_unstable();
            assert_eq!(samples, [0, 1, 2, 4, 4, 5, 6, 7, 8]);
        }
        assert_eq!(train.num_broken(), 1);
        for i in 0..9 {
            std::fs::write(train.name(i), "").unwrap();
        }
        for workers in [0, 2] {
            let error = run(workers).unwrap_err().to_string();
            assert!(error.contains("9 in a row"), "{error}");
        }
    }

    /// Nothing takes the place of what cannot be read, whatever the batches; nothing left is an error.
    #[test]
    fn evaluation_leaves_out_what_cannot_be_read() {
        let dir = tempfile::tempdir().unwrap();
        for i in 0..10 {
            image::RgbImage::from_pixel(9, 9, image::Rgb([20 * i; 3]))
                .save(dir.path().join(format!("{i}.png")))
                .unwrap();
        }
        let train = open(Some(dir.path()), None).unwrap().train;
        let transform = transform(3);
        let all = |batch_size| {
            let (mut samples, mut images, mut unreadable) = (Vec::new(), Vec::new(), 0);
            for batch in eval_batches(&train, &transform, batch_size).unwrap() {
                let batch = batch.unwrap();
                samples.extend(batch.samples);
                images.extend_from_slice(&batch.images.values());
                unreadable += batch.unreadable;
            }
            (samples, images, unreadable)
        };
        let (samples, images, unreadable) = all(4);
        assert_eq!((samples.len(), unreadable), (9, 0));
        for i in [2, 3, 8] {
            std::fs::write(train.name(i), "").unwrap();
        }
        let len = transform.output_len();
        let left = [0, 1, 4, 5, 6, 7_u64];
        let want: Vec<f32> = left
            .iter()
            .flat_map(|&i| &images[i as usize * len..][..len])
            .copied()
            .collect();
        for batch_size in [1, 2, 4, 9] {
            assert_eq!(all(batch_size), (left.to_vec(), want.clone(), 3));
        }
        assert_eq!(train.num_broken(), 3);
        for i in left {
            std::fs::write(train.name(i as usize), "").unwrap();
        }
        for batch_size in [2, 9] {
            let batches = eval_batches(&train, &transform, batch_size).unwrap();
            let error = batches.last().unwrap().unwrap_err().to_string();
            assert!(error.contains("9 in a row"), "{error}");
        }
    }

    #[test]
    fn evaluation_goes_through_everything_in_order() {
        let dataset = held_out();
        let transform = transform(1);
        let batches: Vec<EvalBatch> = eval_batches(&dataset, &transform, 300)
            .unwrap()
            .map(Result::unwrap)
            .collect();
        assert_eq!(batches.len(), 7);
        assert_eq!(batches[6].samples.len(), 200);
        let samples: Vec<u64> = batches.iter().flat_map(|b| b.samples.clone()).collect();
        assert_eq!(samples, (0..2000).collect::<Vec<u64>>());
        let labels = batches[6].labels.as_ref().unwrap();
        assert_eq!(Some(labels[199]), dataset.label(1999));
        let mut picture = Picture::default();
        let mut want = vec![0.0; transform.output_len()];
        dataset.picture(1801, &mut picture).unwrap();
        transform
            .eval(&picture, &mut Scratch::default(), &mut want)
            .unwrap();
        assert_eq!(
            batches[6].images.values()[transform.output_len()..][..want.len()],
            want
        );
        assert!(eval_batches(&dataset, &transform, 0).is_err());
    }
}
