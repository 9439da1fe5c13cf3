//! `pcae embed`: the features of many pictures in a file.
//!
//! It streams: in memory are the names and a few batches. What is done is in a folder beside the output, so that a second
//! call goes on after an interruption. What cannot be read is listed and left out.

mod output;
mod partial;
mod source;

use std::fmt;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use pcae_kernel::backend::TrainBackend;
use pcae_kernel::config::Reduction;
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};
use serde::Serialize;

use crate::backends::{self, Job, count};
use crate::data::augment::{Scratch, Transform};
use crate::data::images::Images;
use crate::data::{DataError, Picture};
use crate::durable::{atomic_write, sync_folder};
use crate::encoder::Encoder;
use crate::error::Error;
use crate::features::{Extractor, Frozen, Pool, Tap, layer};
use crate::inspect::plain;
use crate::interrupt;
use crate::network::{budget, drop_ratio};
use crate::output as output_files;
use crate::progress::{Progress, rate};
use output::{Format, Raw};
use partial::Partial;
use source::Source;

/// What follows the name of the output in those of the files beside it.
const NAMES: &str = ".names.txt";
const UNREADABLE: &str = ".unreadable.txt";
/// Time between two savings of what is done.
const SAVE_INTERVAL: Duration = Duration::from_secs(5);

/// What to embed, and how.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The encoder.
    pub frozen: Frozen,
    /// A folder of pictures, of tar shards or of IDX files, a tar file, or a list of files; what the encoder was trained
    /// on if `None`.
    pub data: Option<PathBuf>,
    /// Block after which features are taken; the last one if `None`.
    pub layer: Option<usize>,
    /// What of the tokens there.
    pub pool: Pool,
    /// The file to write; its extension says the format.
    pub out: PathBuf,
}

/// What came out.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// The file.
    pub out: PathBuf,
    /// Its shape: pictures, tokens where there are several, width.
    pub shape: Vec<usize>,
    /// Pictures there are.
    pub pictures: usize,
    /// Pictures looked at; fewer than there are if a signal ended it early.
    pub done: usize,
    /// Pictures left out because they could not be read.
    pub unreadable: usize,
    /// The list of them, if there are any.
    pub unreadable_list: Option<PathBuf>,
    /// Pictures a second in this process.
    pub images_per_s: Option<f64>,
    /// Whether a signal ended it early; the same command goes on.
    pub interrupted: bool,
}

/// Embeds.
///
/// # Errors
/// [`Error`] for an encoder, pictures or settings that cannot be used, or a disk that fails; what was done is kept.
pub fn run(plan: &Plan) -> Result<Report, Error> {
    let wrong = |reason: String| Error::Setting {
        name: format!("--out '{}'", plan.out.display()),
        reason,
    };
    let Some(format) = Format::of(&plan.out) else {
        let known = Format::EXTENSIONS.map(|(name, _)| format!(".{name}"));
        return Err(wrong(format!(
            "expected a name that ends with {}",
            known.join(", ")
        )));
    };
    if plan.out.exists() {
        return Err(wrong(
            "expected a new file, found one; remove it or choose another --out".to_owned(),
        ));
    }
    let (encoder, reduction) = plan.frozen.load()?;
    let tap = Tap {
        layer: layer(plan.layer, encoder.vit.depth)?,
        pool: plan.pool,
    };
    let drops = plan.pool == Pool::Tokens && reduction.stages(tap.layer + 1) > 0;
    if drops && format != Format::Safetensors {
        return Err(wrong(
            "expected .safetensors for --pool tokens with --drop-ratio: the other formats have no place for the positions \
             of the tokens that are left"
                .to_owned(),
        ));
    }
    let data = encoder.pictures(plan.data.as_deref())?;
    let inputs: Vec<&Path> = data.into_iter().collect();
    for ending in [NAMES, UNREADABLE] {
        output_files::refuse_inputs("--out", &beside(&plan.out, ending), &inputs)?;
    }
    let source = Source::open(data, encoder.vit.in_chans)?;
    let embedding = Embedding {
        plan,
        format,
        tap,
        drops,
        encoder,
        reduction,
        source,
    };
    backends::run(&plan.frozen.machine, embedding)
}

struct Embedding<'a> {
    plan: &'a Plan,
    format: Format,
    tap: Tap,
    /// Whether tokens are missing, so that positions must be told.
    drops: bool,
    encoder: Encoder,
    reduction: Reduction,
    source: Source,
}

/// A batch on its way to the encoder.
struct Prepared {
    /// The readable ones.
    images: Images,
    names: Vec<String>,
    /// Names and reasons.
    unreadable: Vec<(String, String)>,
    /// The picture after the batch.
    end: usize,
}

impl Job for Embedding<'_> {
    type Output = Report;

    fn run<B: TrainBackend>(self, backend: &mut B, name: &str) -> Result<Report, Error> {
        let out = &self.plan.out;
        let failed = |error| Error::Io {
            what: format!("--out '{}'", out.display()),
            error,
        };
        // Before the folder is there: who sees it may send a signal.
        interrupt::install().map_err(|error| Error::Io {
            what: "signal handlers".to_owned(),
            error,
        })?;
        let folder = Partial::folder_of(out);
        let job = self.job()?;
        let mut partial = Partial::open(folder.clone(), &job).map_err(failed)?;
        if partial.state.job != job {
            return Err(Error::Setting {
                name: format!("--out '{}'", out.display()),
                reason: format!(
                    "expected the same pictures, encoder and settings as in '{}', which is not finished, found others; repeat \
                     its command, remove it, or choose another --out",
                    folder.display()
                ),
            });
        }
        eprintln!("encoder   {}", self.encoder.origin);
        eprintln!("budget    {}", budget(&self.encoder.vit, &self.reduction));
        eprintln!("data      {}", count(self.source.len(), "picture"));
        eprintln!("backend   {name}");
        if partial.state.done > 0 {
            eprintln!("going on after {}", count(partial.state.done, "picture"));
        }
        let images_per_s = self.extract(backend, name, &mut partial)?;
        partial.save().map_err(failed)?;
        let mut report = Report {
            out: out.clone(),
            shape: Vec::new(),
            pictures: self.source.len(),
            done: partial.state.done,
            unreadable: partial.state.unreadable,
            unreadable_list: None,
            images_per_s,
            interrupted: partial.state.done < self.source.len(),
        };
        if !report.interrupted {
            self.finish(partial, &mut report)?;
        }
        Ok(report)
    }
}

impl Embedding<'_> {
    /// What is computed, from what: an interrupted job must be the same to go on.
    fn job(&self) -> Result<String, Error> {
        let values = self.encoder.values.iter();
        let sum = values.fold(0, |sum, value| {
            crc32c::crc32c_append(sum, &value.to_le_bytes())
        });
        let Transform {
            height,
            width,
            channels,
            mean,
            std,
            ..
        } = &self.encoder.transform;
        Ok(format!(
            "{}; encoder crc32c {sum:08x}, {channels}x{height}x{width}, mean {mean:?}, std {std:?}; layer {}, {}; {:?}; {:?}",
            self.source.fingerprint()?,
            self.tap.layer,
            self.tap.pool,
            self.reduction,
            self.plan.frozen.machine.precision()
        ))
    }

    /// Embeds what is not done, until the end or a signal.
    fn extract<B: TrainBackend>(
        &self,
        backend: &mut B,
        name: &str,
        partial: &mut Partial,
    ) -> Result<Option<f64>, Error> {
        let (first, end) = (partial.state.done, self.source.len());
        if first == end {
            return Ok(None);
        }
        let failed = |error: B::Error| Error::backend(name, error);
        let disk = |error| Error::Io {
            what: format!("--out '{}'", self.plan.out.display()),
            error,
        };
        let batch_size = self.plan.frozen.batch_size.min(end - first);
        let mut extractor =
            Extractor::new(backend, &self.encoder, batch_size, self.reduction).map_err(failed)?;
        let workers = self.plan.frozen.machine.workers().max(1);
        let pool = ThreadPoolBuilder::new()
            .num_threads(workers)
            .build()
            .map_err(|error| Error::Setting {
                name: "--workers".to_owned(),
                reason: error.to_string(),
            })?;
        let mut progress = Progress::of("picture", first as u64, end as u64);
        let (began, mut saved) = (Instant::now(), Instant::now());
        // One batch waits while the next is prepared.
        let (ready, batches) = sync_channel(1);
        std::thread::scope(|scope| {
            let pool = &pool;
            scope.spawn(move || {
                for start in (first..end).step_by(batch_size) {
                    let batch = self.prepare(pool, start..(start + batch_size).min(end));
                    if ready.send(batch).is_err() {
                        return;
                    }
                }
            });
            // Moved in here, so that an early end lets the other thread go.
            let batches = batches;
            let (mut features, mut positions) = ([Vec::new()], Vec::new());
            while let Ok(batch) = batches.recv() {
                features[0].clear();
                positions.clear();
                let rows = batch.names.len();
                if rows > 0 {
                    extractor
                        .extract(backend, &batch.images, rows, &[self.tap], &mut features)
                        .map_err(failed)?;
                    if self.drops {
                        extractor
                            .positions(backend, self.tap.layer, &mut positions)
                            .map_err(failed)?;
                    }
                }
                if let Some(value) = features[0].iter().find(|value| !value.is_finite()) {
                    return Err(Error::Setting {
                        name: "--precision".to_owned(),
                        reason: format!(
                            "expected one in which features are finite, found {value} among them"
                        ),
                    });
                }
                partial
                    .add(
                        batch.end,
                        &features[0],
                        &positions,
                        &batch.names,
                        &batch.unreadable,
                    )
                    .map_err(disk)?;
                let per_second = (batch.end - first) as f64 / began.elapsed().as_secs_f64();
                progress.count(batch.end as u64, per_second);
                if saved.elapsed() >= SAVE_INTERVAL {
                    partial.save().map_err(disk)?;
                    saved = Instant::now();
                }
                if interrupt::requested() {
                    break;
                }
            }
            Ok(())
        })?;
        progress.finish();
        let done = partial.state.done - first;
        Ok(Some(done as f64 / began.elapsed().as_secs_f64()))
    }

    /// Decodes some pictures, and closes the gaps of the unreadable ones.
    fn prepare(&self, pool: &ThreadPool, range: std::ops::Range<usize>) -> Prepared {
        let transform = &self.encoder.transform;
        let len = transform.output_len();
        let mut images = vec![0; range.len() * len];
        let results: Vec<Result<(), DataError>> = pool.install(|| {
            images
                .par_chunks_exact_mut(len)
                .zip(range.clone())
                .map_init(
                    || (Picture::default(), Scratch::default()),
                    |(picture, scratch), (out, i)| {
                        self.source.picture(i, transform.channels, picture)?;
                        transform.eval_bytes(picture, scratch, out)
                    },
                )
                .collect()
        });
        let (mut names, mut unreadable) = (Vec::new(), Vec::new());
        for (at, (i, result)) in range.clone().zip(results).enumerate() {
            match result {
                Ok(()) => {
                    images.copy_within(at * len..(at + 1) * len, names.len() * len);
                    names.push(self.source.name(i));
                }
                Err(error) => {
                    unreadable.push((self.source.name(i), plain(&error.to_string())));
                }
            }
        }
        images.truncate(names.len() * len);
        Prepared {
            images: Images::of_bytes(transform, images),
            names,
            unreadable,
            end: range.end,
        }
    }

    /// Writes the output from the raw files, and removes them.
    fn finish(&self, partial: Partial, report: &mut Report) -> Result<(), Error> {
        let out = &self.plan.out;
        let failed = |error| Error::Io {
            what: format!("--out '{}'", out.display()),
            error,
        };
        let rows = partial.state.rows;
        if rows == 0 {
            let list = std::fs::read_to_string(partial.path("unreadable")).unwrap_or_default();
            let (_, reason) = list
                .lines()
                .next()
                .and_then(|line| line.split_once('\t'))
                .unwrap_or_default();
            let error = io::Error::new(
                io::ErrorKind::InvalidData,
                format!(
                    "expected pictures that can be read, found none among {}; the first: {reason}",
                    report.pictures
                ),
            );
            let what = "--data".to_owned();
            partial.remove().map_err(failed)?;
            return Err(Error::Io { what, error });
        }
        let vit = &self.encoder.vit;
        let tokens = (self.plan.pool == Pool::Tokens).then(|| {
            1 + self
                .reduction
                .remaining(vit.num_patches(), self.tap.layer + 1)
        });
        let positions = self.drops.then(|| partial.path("positions"));
        let raw = Raw {
            features: &partial.path("features"),
            positions: positions.as_deref(),
            names: &partial.path("names"),
            rows,
            tokens,
            dim: vit.embed_dim,
            metadata: vec![
                ("format", "pcae-features".to_owned()),
                ("layer", self.tap.layer.to_string()),
                ("pool", self.tap.pool.to_string()),
                ("weights", self.plan.frozen.which.to_string()),
                ("drop_ratio", drop_ratio(&self.reduction).to_string()),
            ],
        };
        report.shape = raw.shape();
        let mut write = || -> io::Result<()> {
            let output = partial.path("output");
            raw.write(self.format, &output)?;
            if self.format == Format::Npy {
                copy(&partial.path("names"), &beside(out, NAMES))?;
            }
            if partial.state.unreadable > 0 {
                let list = beside(out, UNREADABLE);
                copy(&partial.path("unreadable"), &list)?;
                report.unreadable_list = Some(list);
            }
            // Last: where it is, all is there.
            std::fs::rename(output, out)?;
            let parent = out.parent().filter(|parent| !parent.as_os_str().is_empty());
            sync_folder(parent.unwrap_or(Path::new(".")))
        };
        write().map_err(failed)?;
        partial.remove().map_err(failed)
    }
}

fn copy(from: &Path, to: &Path) -> io::Result<()> {
    let mut from = File::open(from)?;
    atomic_write(to, |out| io::copy(&mut from, out).map(drop))
}

/// `out` with something after its name.
fn beside(out: &Path, ending: &str) -> PathBuf {
    let mut name = out.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let out = self.out.display();
        if self.interrupted {
            return writeln!(
                f,
                "stopped after {} of {}, saved in {out}.partial; the same command goes on",
                self.done,
                count(self.pictures, "picture")
            );
        }
        write!(f, "features  {out}, {:?} f32", self.shape)?;
        if let Some(images_per_s) = self.images_per_s {
            write!(f, ", {}", rate(images_per_s))?;
        }
        writeln!(f)?;
        if let Some(list) = &self.unreadable_list {
            writeln!(
                f,
                "{} could not be read: {}",
                count(self.unreadable, "picture"),
                list.display()
            )?;
        }
        Ok(())
    }
}
