//! Throughput of training steps and of inference, held against the machine's measured peak.

use std::collections::BTreeMap;
use std::time::Instant;

use pcae_kernel::backend::{AdamW, TrainBackend};
use pcae_kernel::config::{
    Budget, ClassifierConfig, Criterion, DropLayers, Place, PretrainConfig, Reduction, Target,
};
use pcae_kernel::flops;
use pcae_kernel::init::init;
use pcae_kernel::layout::Layout;
use pcae_kernel::model::{Classifier, MeanSimilarity, Pretrainer, TrainState};
use pcae_kernel::rng::{Purpose, Stream};
use pcae_kernel::schedule::random_masking;
use serde::Serialize;

use crate::backends::{self, Job};
use crate::error::Error;
use crate::settings::{BackendKind, Machine, Settings};

/// What is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum What {
    /// A classifier's forward.
    Infer,
    /// A pre-training step: teacher, student, decoder, backward, AdamW, moving average.
    Step,
}

/// What to measure: every combination.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Model, method and machine; `threads` is overruled by `threads` below.
    pub settings: Settings,
    /// What is timed.
    pub what: Vec<What>,
    /// Pictures at a time.
    pub batch_sizes: Vec<usize>,
    /// Threads; 0 for all.
    pub threads: Vec<usize>,
    /// Part of the patch tokens that each stage of a classifier drops.
    pub drop_ratios: Vec<f64>,
    /// Timed runs, of which the median counts.
    pub repeats: usize,
}

/// One measurement.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Measurement {
    /// What was timed.
    pub what: What,
    /// Preset of the encoder.
    pub model: String,
    /// `pcae` or `mae`, of a step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub method: Option<String>,
    /// Of a step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mask_ratio: Option<f64>,
    /// Of inference.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drop_ratio: Option<f64>,
    /// Pictures at a time.
    pub batch: usize,
    /// Threads.
    pub threads: usize,
    /// Number format.
    pub precision: String,
    /// Instruction set, of the CPU backend.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub isa: Option<String>,
    /// Pictures per second, at the median time.
    pub images_per_s: f64,
    /// Two operations per multiply-add that the method needs.
    pub gflops: f64,
    /// `gflops` over the peak measured in this run with the same threads; `None` where it is not measured.
    pub share_of_peak: Option<f64>,
}

/// All measurements of a run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// The machine.
    pub machine: MachineReport,
    /// The measurements.
    pub results: Vec<Measurement>,
}

/// What was measured on.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MachineReport {
    /// Architecture that the program was compiled for.
    pub arch: String,
    /// Threads that the system offers.
    pub threads: usize,
    /// Measured peak by precision and number of threads.
    pub peak_gflops: BTreeMap<String, BTreeMap<String, f64>>,
}

/// Measures, telling `progress` each figure as it comes.
///
/// # Errors
/// [`Error`] of the settings or the backend.
pub fn run(
    plan: &Plan,
    mut progress: impl FnMut(&Measurement) -> Result<(), Error>,
) -> Result<Report, Error> {
    let task = plan.settings.task()?;
    let available = std::thread::available_parallelism().map_or(1, usize::from);
    let mut peaks: BTreeMap<String, f64> = BTreeMap::new();
    let mut results = Vec::new();
    for &threads in &plan.threads {
        let threads = if threads == 0 { available } else { threads };
        let machine = Machine {
            threads,
            ..plan.settings.machine.clone()
        };
        let (isa, peak) = match machine.backend {
            BackendKind::Cpu => {
                let cpu = backends::cpu(&machine)?;
                (Some(cpu.isa().to_string()), Some(cpu.peak_flops()))
            }
            BackendKind::Reference => (None, None),
        };
        if let Some(peak) = peak {
            peaks.insert(threads.to_string(), peak / 1e9);
        }
        for &what in &plan.what {
            for &batch in &plan.batch_sizes {
                let drop_ratios: &[f64] = if what == What::Infer {
                    &plan.drop_ratios
                } else {
                    &[0.0]
                };
                for &drop_ratio in drop_ratios {
                    let (work, macs) = match what {
                        What::Step => (Work::Step(task), flops::Step::new(&task).total()),
                        What::Infer => {
                            let config = classifier(&task, drop_ratio)?;
                            (Work::Infer(config), flops::classifier(&config))
                        }
                    };
                    let timed = Timed {
                        work,
                        batch,
                        repeats: plan.repeats,
                    };
                    let images_per_s = batch as f64 / backends::run(&machine, timed)?;
                    let gflops = 2.0 * macs as f64 * images_per_s / 1e9;
                    let of_step = what == What::Step;
                    let method = plan.settings.method.to_string();
                    let result = Measurement {
                        what,
                        model: plan.settings.model.clone(),
                        method: of_step.then_some(method),
                        mask_ratio: of_step.then_some(task.mask_ratio),
                        drop_ratio: (!of_step).then_some(drop_ratio),
                        batch,
                        threads,
                        precision: format!("{:?}", machine.precision).to_lowercase(),
                        isa: isa.clone(),
                        images_per_s,
                        gflops,
                        share_of_peak: peak.map(|peak| gflops * 1e9 / peak),
                    };
                    progress(&result)?;
                    results.push(result);
                }
            }
        }
    }
    let precision = format!("{:?}", plan.settings.machine.precision).to_lowercase();
    let peak_gflops = BTreeMap::from([(precision, peaks)]);
    let machine = MachineReport {
        arch: std::env::consts::ARCH.to_owned(),
        threads: available,
        peak_gflops,
    };
    Ok(Report { machine, results })
}

/// The classifier with 1000 classes that the paper counts, tokens dropped after blocks 0, 7 and 10 of 12.
fn classifier(task: &PretrainConfig, drop_ratio: f64) -> Result<ClassifierConfig, Error> {
    let depth = task.vit.depth;
    let blocks = [0, depth * 7 / 12, depth * 10 / 12];
    let reduction = Reduction {
        criterion: Criterion::MeanSimilarity,
        place: Place::Progressive,
        drop_layers: DropLayers::new(&blocks, depth)?,
        budget: Budget::Drop(drop_ratio),
    };
    let config = ClassifierConfig {
        vit: task.vit,
        num_classes: 1000,
        reduction,
    };
    config.check()?;
    Ok(config)
}

enum Work {
    Infer(ClassifierConfig),
    Step(PretrainConfig),
}

struct Timed {
    work: Work,
    batch: usize,
    repeats: usize,
}

impl Job for Timed {
    /// Median seconds.
    type Output = f64;

    fn run<B: TrainBackend>(self, backend: &mut B, name: &str) -> Result<f64, Error> {
        let failed = |error: B::Error| Error::backend(name, error);
        match &self.work {
            Work::Infer(config) => self.infer(backend, config).map_err(failed),
            Work::Step(config) => self.step(backend, config).map_err(failed),
        }
    }
}

impl Timed {
    fn infer<B: TrainBackend>(
        &self,
        backend: &mut B,
        config: &ClassifierConfig,
    ) -> Result<f64, B::Error> {
        let layout = Layout::classifier(config);
        let params = random_params(&layout)?;
        let params = backend.frozen_params(&layout, &params)?;
        let mut model = Classifier::new(backend, config, self.batch)?;
        let images = random_images(
            self.batch * config.vit.in_chans * config.vit.img_size[0] * config.vit.img_size[1],
        );
        let mut on_device = backend.buf(images.len())?;
        backend.write(&mut on_device, &images)?;
        let mut logits = vec![0.0; self.batch * config.num_classes];
        self.median(|| {
            let result = model.forward(
                backend,
                &params,
                self.batch,
                &on_device,
                &mut MeanSimilarity,
            )?;
            backend.read(&mut logits, result)
        })
    }

    fn step<B: TrainBackend>(
        &self,
        backend: &mut B,
        config: &PretrainConfig,
    ) -> Result<f64, B::Error> {
        let layout = Layout::pretrain(config);
        let student = random_params(&layout)?;
        let teacher = match config.target {
            Target::Teacher(_) => Some(&student[..layout.encoder_len()]),
            Target::Pixels { .. } => None,
        };
        let mut state = TrainState::new(backend, layout, &student, teacher, 0.05)?;
        let mut model = Pretrainer::new(backend, config, self.batch, false)?;
        let images = random_images(
            self.batch * config.vit.in_chans * config.vit.img_size[0] * config.vit.img_size[1],
        );
        let (mut keep, mut remove) = (Vec::new(), Vec::new());
        let mut order = vec![0; config.vit.num_patches()];
        for sample in 0..self.batch {
            let mut stream = Stream::new(0, 0, sample as u64, Purpose::Mask);
            let noise: Vec<f32> = order.iter().map(|_| stream.uniform()).collect();
            random_masking(&noise, &mut order)?;
            keep.extend_from_slice(&order[..config.visible()]);
            remove.extend_from_slice(&order[config.visible()..]);
        }
        let mut adamw = AdamW {
            lr: 1e-4,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            step: 0,
            momentum: 0.9999,
        };
        self.median(|| {
            adamw.step += 1;
            state.begin_step(backend)?;
            model.load(backend, &images, &keep, &remove)?;
            model.accumulate(backend, &mut state, 1.0, &mut MeanSimilarity)?;
            state.update(backend, &adamw, None)?;
            state.scalars(backend).map(|_| ())
        })
    }

    /// Median time of `repeats` calls in seconds, after one that is not timed.
    fn median<E>(&self, mut work: impl FnMut() -> Result<(), E>) -> Result<f64, E> {
        work()?;
        let mut times = Vec::new();
        for _ in 0..self.repeats.max(1) {
            let began = Instant::now();
            work()?;
            times.push(began.elapsed().as_secs_f64());
        }
        times.sort_unstable_by(f64::total_cmp);
        Ok(times[times.len() / 2])
    }
}

fn random_params(layout: &Layout) -> Result<Vec<f32>, pcae_kernel::error::Error> {
    let mut params = vec![0.0; layout.len()];
    init(layout, 0, &mut params)?;
    Ok(params)
}

fn random_images(len: usize) -> Vec<f32> {
    let mut stream = Stream::new(0, 0, 0, Purpose::Augment);
    (0..len).map(|_| stream.normal()).collect()
}
