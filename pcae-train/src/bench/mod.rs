//! Throughput of training steps, of inference and of their parts, held against the machine's measured peak.

mod limits;
mod machine;
mod picture;
mod table;
mod timed;
mod timing;
mod work;

use std::path::PathBuf;
use std::sync::Arc;

use pcae_backend_cpu::{Bf16Unit, Cpu, Isa, Precision as CpuPrecision};
use pcae_kernel::config::{ClassifierConfig, Pool, PretrainConfig};
use pcae_kernel::sizing::Memory;
use serde::Serialize;

pub use machine::{MachineReport, Peaks};
pub use picture::roofline;
pub use table::{budget_header, budget_row, describe, header, limits, planned, row};
pub use timed::{Tally, Timed};

use crate::backends;
use crate::checkpoint::Which;
use crate::data::no_pictures_of;
use crate::encoder;
use crate::error::Error;
use crate::evaluate;
use crate::finetune::EVAL_BATCH;
use crate::network::Network;
use crate::settings::{BackendKind, Machine, Precision, Settings};
use crate::trained::Trained;
use limits::Limits;
use timing::measure;
use work::{Make, Task, finetune_macs};

/// What is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum What {
    /// Multiply-adds in registers, on every instruction set and in every precision (on CUDA, large products), and a copy of memory.
    Peak,
    /// The matrix products of the linear layers.
    Gemm,
    /// A block's forward.
    Block,
    /// A classifier's forward, or the one of a given network.
    Infer,
    /// A pre-training step: pictures copied (on CUDA crops, resized there), teacher, student, decoder, backward, AdamW, moving average.
    Step,
    /// A fine-tuning step of the classifier: pictures as a step's and labels copied, stochastic depth, backward, AdamW.
    Finetune,
}

/// What to measure: every combination.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Model, method and machine; `threads` and `precision` are overruled by those below. Others than the first are for
    /// steps alone.
    pub settings: Vec<Settings>,
    /// What is timed.
    pub what: Vec<What>,
    /// Pictures at a time.
    pub batch_sizes: Vec<usize>,
    /// Threads; 0 for all.
    pub threads: Vec<usize>,
    /// Number formats.
    pub precisions: Vec<Precision>,
    /// A network from a file, whose forward is timed in place of that of a classifier of 1000 classes.
    pub trained: Option<Trained>,
    /// Pictures that a trained classifier is evaluated on, at each drop ratio.
    pub accuracy: Option<Accuracy>,
    /// Part of the patch tokens that each stage drops in a forward and in fine-tuning; if empty as the network in the file does, or none.
    pub drop_ratios: Vec<f64>,
    /// Timed runs, of which the median counts.
    pub repeats: usize,
    /// Whether to time each kind of operation.
    pub breakdown: bool,
    /// Whether to measure the bandwidth of memory; with `breakdown` it is in any case.
    pub bandwidth: bool,
}

/// What a classifier is evaluated on.
#[derive(Clone, Debug, Default)]
pub struct Accuracy {
    /// The weights that are timed.
    pub which: Which,
    /// A folder of labelled pictures; that of its run if `None`.
    pub data: Option<PathBuf>,
}

/// One measurement.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Measurement {
    /// What was timed.
    pub what: What,
    /// Preset of the encoder, or file of a trained network; none of a peak.
    pub model: Option<String>,
    /// `pcae` or `mae`, of a step.
    pub method: Option<String>,
    /// Of a step.
    pub mask_ratio: Option<f64>,
    /// Blocks and width of the decoder, of a step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decoder: Option<[usize; 2]>,
    /// Pictures at a time; none of a peak.
    pub batch: Option<usize>,
    /// Threads, of a backend that has them.
    pub threads: Option<usize>,
    /// Number format.
    pub precision: String,
    /// Number format of the teacher, if it has another one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub teacher_precision: Option<String>,
    /// Whether each matrix product's algorithm was the fastest of some; only on a device.
    pub tuned: Option<bool>,
    /// Of inference and fine-tuning.
    pub drop_ratio: Option<f64>,
    /// Patch tokens before, between and after the stages, of inference and fine-tuning.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<Vec<usize>>,
    /// Multiply-adds of a picture, of inference and of a fine-tuning step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub multiply_adds: Option<u64>,
    /// Part of the pictures classified right, of a trained classifier.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top1: Option<f64>,
    /// Part of the pictures whose class was among the five best.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top5: Option<f64>,
    /// Instruction set, of the CPU backend.
    pub isa: Option<String>,
    /// What multiplies bf16, of the CPU backend.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bf16_unit: Option<String>,
    /// Linear layer of a matrix product.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layer: Option<&'static str>,
    /// Which of the layer's products: forward, training forward, input gradient, parameter gradient.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pass: Option<&'static str>,
    /// Rows, width of the input and width of the output of the layer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shape: Option<[usize; 3]>,
    /// Median seconds of a run; none of a peak.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
    /// Runs in each timing; none of a peak.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calls: Option<u32>,
    /// Slowest less fastest run, over the median.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spread: Option<f64>,
    /// Pictures per second, at the median time; of a matrix product none.
    pub images_per_s: Option<f64>,
    /// Two operations per multiply-add that the method needs.
    pub gflops: f64,
    /// `gflops` over the peak measured in this run with the same threads, instruction set and precision (the student's,
    /// where a teacher has another one); `None` where it is not measured.
    pub share_of_peak: Option<f64>,
    /// The median of each run's share of what multiply-adds alone reach just after it, for a tenth of a millisecond: at the
    /// clock that the run has left. Heavy vector load lowers a processor's clock, and other work on a shared machine too.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub share_of_peak_beside: Option<f64>,
    /// Operations per byte that its parts read and write at least, each for itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flops_per_byte: Option<f64>,
    /// Memory that was planned before the first run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub planned_bytes: Option<usize>,
    /// Where the time went, if that was asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub breakdown: Vec<Part>,
    /// The same kernel by kernel, longest first, on a device.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub kernels: Vec<KernelPart>,
    /// How work ran on a device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub launches: Option<Launches>,
    /// What is not as it should be though everything works, of a device: what was warned of.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// How work ran on a device, warming up included: [`pcae_backend_cuda::Runs`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Launches {
    /// Pieces of work that were launched as a graph.
    pub graphs: u64,
    /// Those that were issued kernel by kernel.
    pub issued: u64,
    /// Graphs that were made.
    pub made: u64,
    /// Pieces of work that could not be made into a graph.
    pub refused: u64,
    /// Products that a plain kernel of ours computes because cuBLASLt has no algorithm for them.
    pub own_products: u64,
    /// Products whose bias is written to the output before them because cuBLASLt does not add it.
    pub spread_biases: u64,
}

impl From<pcae_backend_cuda::Runs> for Launches {
    fn from(runs: pcae_backend_cuda::Runs) -> Self {
        Self {
            graphs: runs.graphs,
            issued: runs.issued,
            made: runs.made,
            refused: runs.refused,
            own_products: runs.own_products,
            spread_biases: runs.spread_biases,
        }
    }
}

/// All operations of one kind in a run, the mean of the timed runs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Part {
    /// Which kind.
    pub operation: &'static str,
    /// Calls in a run.
    pub calls: f64,
    /// Seconds in a run.
    pub seconds: f64,
    /// Part of the run; of all operations together, where each was timed alone on a device.
    pub share: f64,
    /// Of the matrix products.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gflops: Option<f64>,
    /// As [`Measurement::share_of_peak`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub share_of_peak: Option<f64>,
    /// As [`Measurement::flops_per_byte`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flops_per_byte: Option<f64>,
    /// Read and written at least, in 10^9 bytes per second: of the optimizer, on a CPU. On a device [`KernelPart`] tells it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gbytes_per_s: Option<f64>,
    /// `gbytes_per_s` over what a copy or an update in place, whichever is faster, reaches in this run with the same threads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub share_of_bandwidth: Option<f64>,
}

/// All launches of a kernel in a run, the mean of runs beside the timed ones: [`pcae_backend_cuda::KernelTime`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct KernelPart {
    /// Its name; those of matrix products, copies and zeros stand for what libraries launch.
    pub kernel: &'static str,
    /// Launches in a run.
    pub launches: f64,
    /// Seconds in a run, some microseconds for each launch included.
    pub seconds: f64,
    /// Part of the time of all kernels.
    pub share: f64,
    /// Bytes read and written at least in a run; none of a kernel that memory does not bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<f64>,
    /// `bytes` over `seconds`, in 10^9 bytes per second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gbytes_per_s: Option<f64>,
    /// `gbytes_per_s` over what a copy reaches in this run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub share_of_bandwidth: Option<f64>,
}

/// All measurements of a run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// The machine.
    pub machine: MachineReport,
    /// The measurements.
    pub results: Vec<Measurement>,
}

/// What [`run`] tells as it goes.
pub enum Progress<'a> {
    /// Nothing of this has run yet; the memory it will take.
    Planned(&'a Measurement, Memory),
    /// A figure.
    Measured(&'a Measurement),
}

/// Measures, telling `progress` each figure as it comes.
///
/// The combinations run in turn, one after the other and then all again, because a shared machine is faster now and
/// slower then: those that fit into half of the free memory together.
///
/// # Errors
/// [`Error`] of the settings or the backend.
pub fn run(
    plan: &Plan,
    mut progress: impl FnMut(Progress<'_>) -> Result<(), Error>,
) -> Result<Report, Error> {
    check(plan)?;
    let mut machine = MachineReport::new();
    let mut limits =
        Limits::new(plan.bandwidth || plan.breakdown || plan.what.contains(&What::Peak));
    let scores = scores(plan, machine.threads)?;
    let mut cases = cases(plan, machine.threads)?;
    for case in &cases {
        progress(Progress::Planned(&case.blank()?, case.memory))?;
    }
    let mut results = Vec::new();
    if plan.what.contains(&What::Peak) {
        peaks(plan, machine.threads, &mut limits, |result| {
            progress(Progress::Measured(&result))?;
            results.push(result);
            Ok(())
        })?;
    }
    // What cannot be told is not shared out: one after the other.
    let room = match cases.first() {
        Some(case) if case.is_on_cuda() => limits.device_memory(&case.settings.machine)?,
        _ => machine::available_memory().unwrap_or(0),
    };
    let room = room / 2;
    while !cases.is_empty() {
        let mut taken = 0_usize;
        let together = cases.iter().take_while(|case| {
            taken = taken.saturating_add(case.memory.total());
            taken <= room
        });
        let together = together.count().max(1);
        let rest = cases.split_off(together);
        for mut result in measure(cases, plan, &mut limits)? {
            let score = scores.iter().find(|score| score.is_of(&result));
            result.top1 = score.map(|score| score.top1);
            result.top5 = score.map(|score| score.top5);
            progress(Progress::Measured(&result))?;
            results.push(result);
        }
        cases = rest;
    }
    limits.report(&mut machine);
    machine.finish();
    Ok(Report { machine, results })
}

/// Whether the plan asks for what a device does not have.
fn check(plan: &Plan) -> Result<(), Error> {
    let wrong = |name: &str, reason: String| {
        Err(Error::Setting {
            name: name.to_owned(),
            reason,
        })
    };
    let Some(machine) = plan.settings.first().map(|first| &first.machine) else {
        return Ok(());
    };
    if machine.backend != BackendKind::Cuda {
        return Ok(());
    }
    if let Some(threads) = plan.threads.iter().find(|threads| **threads != 0) {
        let reason =
            format!("expected none for --backend cuda, where the device computes, found {threads}");
        return wrong("--threads", reason);
    }
    if let Some(isa) = &machine.isa {
        let reason = format!("expected none for --backend cuda, found {isa}; use --backend cpu");
        return wrong("--isa", reason);
    }
    Ok(())
}

/// As it is typed.
fn name(precision: Precision) -> String {
    format!("{precision:?}").to_lowercase()
}

/// The peak of every instruction set, precision and number of threads that the plan does not rule out; of a device in each
/// precision.
fn peaks(
    plan: &Plan,
    available: usize,
    limits: &mut Limits,
    mut found: impl FnMut(Measurement) -> Result<(), Error>,
) -> Result<(), Error> {
    let Some(settings) = plan.settings.first() else {
        return Ok(());
    };
    if settings.machine.backend == BackendKind::Cuda {
        for &precision in &plan.precisions {
            let machine = Machine {
                precision: Some(precision),
                ..settings.machine.clone()
            };
            for _ in 0..plan.repeats.max(1) {
                limits.measure(&machine)?;
            }
            found(Measurement {
                precision: name(precision),
                gflops: limits.peak(&machine).unwrap_or(0.0) / 1e9,
                ..Measurement::empty(What::Peak)
            })?;
        }
        return Ok(());
    }
    let asked = settings.machine.isa.as_deref();
    for &threads in &plan.threads {
        let threads = if threads == 0 { available } else { threads };
        for &precision in &plan.precisions {
            limits.measure(&Machine {
                threads,
                precision: Some(precision),
                ..settings.machine.clone()
            })?;
        }
        for isa in Isa::available().filter(|isa| asked.is_none_or(|asked| isa.to_string() == asked))
        {
            let units = Bf16Unit::available(isa).map(CpuPrecision::Bf16);
            for precision in [CpuPrecision::F32].into_iter().chain(units) {
                let (precision_name, unit) = match precision {
                    CpuPrecision::F32 => ("f32", None),
                    CpuPrecision::Bf16(unit) => ("bf16", Some(unit.to_string())),
                };
                if !plan.precisions.iter().any(|&p| name(p) == precision_name) {
                    continue;
                }
                let cpu = Cpu::with(isa, threads).map_err(|error| Error::backend("cpu", error))?;
                let cpu = cpu.precision(precision);
                let best = (0..plan.repeats.max(1)).map(|_| cpu.peak_flops());
                found(Measurement {
                    threads: Some(threads),
                    precision: precision_name.to_owned(),
                    isa: Some(isa.to_string()),
                    bf16_unit: unit,
                    gflops: best.fold(0.0, f64::max) / 1e9,
                    ..Measurement::empty(What::Peak)
                })?;
            }
        }
    }
    Ok(())
}

/// What a classifier gets right.
struct Score {
    precision: String,
    drop_ratio: f64,
    top1: f64,
    top5: f64,
}

impl Score {
    fn is_of(&self, result: &Measurement) -> bool {
        let is_forward = result.what == What::Infer;
        is_forward
            && result.precision == self.precision
            && result.drop_ratio == Some(self.drop_ratio)
    }
}

/// Evaluates the plan's classifier, if that is asked for, at every drop ratio and in every precision; the number of threads has
/// no part in it.
fn scores(plan: &Plan, available: usize) -> Result<Vec<Score>, Error> {
    let (Some(accuracy), Some(trained)) = (&plan.accuracy, &plan.trained) else {
        return Ok(Vec::new());
    };
    let mut scores = Vec::new();
    for &precision in &plan.precisions {
        let machine = plan.settings.first().map(|settings| &settings.machine);
        let machine = Machine {
            threads: available,
            precision: Some(precision),
            ..machine.cloned().unwrap_or_default()
        };
        let evaluation = evaluate::Plan {
            checkpoint: trained.path.clone(),
            which: accuracy.which,
            data: accuracy.data.clone(),
            drop_ratios: plan.drop_ratios.clone(),
            drop_layers: None,
            criteria: Vec::new(),
            batch_size: EVAL_BATCH,
            seed: 0,
            machine,
        };
        let report = evaluate::run(&evaluation, |_, _, _| Ok(()))?;
        if let Some(missing) = no_pictures_of(&report.without_pictures)
            && scores.is_empty()
        {
            eprintln!("accuracy  {missing}");
        }
        scores.extend(report.results.into_iter().map(|row| Score {
            precision: name(precision),
            drop_ratio: row.drop_ratio,
            top1: row.top1,
            top5: row.top5,
        }));
    }
    Ok(scores)
}

/// One combination.
struct Case {
    what: What,
    settings: Settings,
    task: PretrainConfig,
    /// Of inference and fine-tuning.
    network: Option<Network>,
    /// Of a trained network.
    file: Option<PathBuf>,
    values: Option<Arc<[f32]>>,
    batch: usize,
    memory: Memory,
}

/// Everything that has a model, those that are compared with each other next to each other.
fn cases(plan: &Plan, available: usize) -> Result<Vec<Case>, Error> {
    let mut cases = Vec::new();
    let values: Option<Arc<[f32]>> = plan.trained.as_ref().map(|it| it.values[..].into());
    let mut what = plan.what.clone();
    what.retain(|&what| what != What::Peak);
    for what in what {
        let variants = match what {
            What::Step => plan.settings.len(),
            _ => 1,
        };
        let networks: Vec<Option<Network>> = match what {
            What::Infer => {
                let trained = plan.trained.as_ref().map(|it| it.network);
                networks(plan, trained)?.into_iter().map(Some).collect()
            }
            What::Finetune => networks(plan, None)?.into_iter().map(Some).collect(),
            _ => vec![None],
        };
        for &batch in &plan.batch_sizes {
            for &network in &networks {
                for settings in plan.settings.iter().take(variants) {
                    for &threads in &plan.threads {
                        for &precision in &plan.precisions {
                            let mut settings = settings.clone();
                            settings.machine.threads =
                                if threads == 0 { available } else { threads };
                            settings.machine.precision = Some(precision);
                            let mut case = Case {
                                what,
                                task: settings.task()?,
                                settings,
                                network,
                                file: plan.trained.as_ref().map(|it| it.path.clone()),
                                values: values.clone(),
                                batch,
                                memory: Memory::default(),
                            };
                            if what == What::Step {
                                backends::check_teacher(&case.settings.machine, &case.task)?;
                            }
                            let sizing = case.make().sizing()?;
                            case.memory = backends::memory(&case.settings.machine, &sizing)?;
                            cases.push(case);
                        }
                    }
                }
            }
        }
    }
    Ok(cases)
}

/// At every drop ratio the `trained` network, or the classifier with 1000 classes that the paper counts, tokens dropped after blocks 0,
/// 7 and 10 of 12.
fn networks(plan: &Plan, trained: Option<Network>) -> Result<Vec<Network>, Error> {
    let base = match (trained, plan.settings.first()) {
        (Some(trained), _) => trained,
        (None, Some(settings)) => {
            let vit = settings.task()?.vit;
            Network::Classifier(ClassifierConfig {
                vit,
                num_classes: 1000,
                pool: Pool::Mean,
                reduction: encoder::reduction(&vit, 0.0, None)?,
            })
        }
        (None, None) => return Ok(Vec::new()),
    };
    if plan.drop_ratios.is_empty() {
        return Ok(vec![base]);
    }
    let ratios = plan.drop_ratios.iter();
    Ok(ratios
        .map(|&drop_ratio| base.at(drop_ratio))
        .collect::<Result<_, _>>()?)
}

impl Case {
    fn make(&self) -> Make {
        let task = match (self.what, self.network) {
            (What::Finetune, Some(Network::Classifier(config))) => Task::Finetune(config),
            (What::Infer, Some(network)) => Task::Infer(network),
            (What::Step, _) => Task::Step(self.task),
            (What::Block, _) => Task::Block(self.task.vit),
            (What::Peak | What::Gemm | What::Infer | What::Finetune, _) => {
                Task::Products(self.task.vit)
            }
        };
        Make {
            task,
            batch: self.batch,
            values: self.values.clone(),
            crops: backends::resizes(&self.settings.machine),
            bytes: backends::bytes(&self.settings.machine),
        }
    }

    /// Of a picture.
    fn multiply_adds(&self) -> Option<u64> {
        Some(match (self.what, self.network?) {
            (What::Finetune, Network::Classifier(config)) => finetune_macs(&config),
            (_, network) => network.multiply_adds(),
        })
    }

    fn is_on_cuda(&self) -> bool {
        self.settings.machine.backend == BackendKind::Cuda
    }

    /// All but the figures.
    fn blank(&self) -> Result<Measurement, Error> {
        let (settings, machine) = (&self.settings, &self.settings.machine);
        let is_step = self.what == What::Step;
        let (mut isa, mut unit) = (None, None);
        if machine.backend == BackendKind::Cpu {
            let found = backends::isa(machine)?;
            isa = Some(found.to_string());
            if machine.precision() == Precision::Bf16 {
                unit = Some(Bf16Unit::detect(found).to_string());
            }
        }
        let decoder = self.task.decoder;
        let teacher = machine.teacher_precision;
        Ok(Measurement {
            model: Some(match &self.file {
                Some(file) => file.display().to_string(),
                None => settings.model.clone(),
            }),
            method: is_step.then(|| settings.method.to_string()),
            mask_ratio: is_step.then_some(self.task.mask_ratio),
            decoder: is_step.then_some([decoder.depth, decoder.embed_dim]),
            batch: Some(self.batch),
            threads: (!self.is_on_cuda()).then_some(machine.threads),
            precision: name(machine.precision()),
            teacher_precision: teacher.filter(|_| is_step).map(name),
            tuned: self.is_on_cuda().then_some(machine.tune),
            drop_ratio: self.network.map(|network| network.drop_ratio()),
            tokens: self.network.map(|network| network.tokens()),
            multiply_adds: self.multiply_adds(),
            isa,
            bf16_unit: unit,
            planned_bytes: Some(self.memory.total()),
            ..Measurement::empty(self.what)
        })
    }
}

impl Measurement {
    fn empty(what: What) -> Self {
        Self {
            what,
            model: None,
            method: None,
            mask_ratio: None,
            decoder: None,
            batch: None,
            threads: None,
            precision: String::new(),
            teacher_precision: None,
            tuned: None,
            drop_ratio: None,
            tokens: None,
            multiply_adds: None,
            top1: None,
            top5: None,
            isa: None,
            bf16_unit: None,
            layer: None,
            pass: None,
            shape: None,
            seconds: None,
            calls: None,
            spread: None,
            images_per_s: None,
            gflops: 0.0,
            share_of_peak: None,
            share_of_peak_beside: None,
            flops_per_byte: None,
            planned_bytes: None,
            breakdown: Vec::new(),
            kernels: Vec::new(),
            launches: None,
            warnings: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use pcae_kernel::op::Op;

    use super::*;

    /// Steps are timed with crops where training leaves them to the backend, and have room for them there, and with whole pictures elsewhere.
    #[test]
    fn steps_pass_crops_where_training_does() {
        for backend in [BackendKind::Cpu, BackendKind::Reference, BackendKind::Cuda] {
            let mut settings = Settings {
                model: "vit-micro".to_owned(),
                ..Settings::default()
            };
            settings.machine.backend = backend;
            let plan = Plan {
                settings: vec![settings],
                what: vec![What::Step, What::Finetune],
                batch_sizes: vec![3],
                threads: vec![1],
                precisions: vec![Precision::F32],
                trained: None,
                accuracy: None,
                drop_ratios: Vec::new(),
                repeats: 1,
                breakdown: false,
                bandwidth: false,
            };
            let cases = cases(&plan, 1).unwrap();
            assert_eq!(cases.len(), 2);
            for case in &cases {
                let sizing = case.make().sizing().unwrap();
                let dims = case.task.vit.pixels(3);
                let expected = match backend {
                    BackendKind::Cuda => Op::Crops(dims),
                    _ => Op::Pixels(dims),
                };
                let is_load = |op: &&Op| matches!(op, Op::Pixels(_) | Op::Crops(_));
                let loads: Vec<&Op> = sizing.ops().iter().filter(is_load).collect();
                assert_eq!(loads, [&expected], "{backend:?}, {:?}", case.what);
            }
        }
    }
}
