//! How long the cases take, by turns.

use std::time::Instant;

use pcae_backend_cuda::KernelTime;
use pcae_kernel::op::OpKind;

use super::limits::Limits;
use super::timed::Tally;
use super::work::{Track, Workload};
use super::{Case, KernelPart, Measurement, Part, Plan};
use crate::backends;
use crate::error::Error;

/// A run shorter than this is repeated within one timing, which else the clock would spoil.
const LEAST_SECONDS: f64 = 2e-3;

/// The same where the way to a device and back counts too.
const LEAST_SECONDS_QUEUED: f64 = 5e-2;

/// The same where each run brings pictures, which come while the device works on the run before: the first of a timing have to be waited
/// for, some 10 ms for a batch of 256, as they never are in training.
const LEAST_SECONDS_UPLOADED: f64 = 1.0;

/// Runs in one timing at most.
const MOST_CALLS: f64 = 10_000.0;

/// The same where they become one graph.
const MOST_CALLS_QUEUED: f64 = 500.0;

/// One track of a case.
struct Timing {
    track: Track,
    /// Runs in one timing.
    calls: u32,
    flops_per_byte: Option<f64>,
    /// Seconds of a run, one for each timing.
    seconds: Vec<f64>,
    /// Its share of the peak at that time.
    beside: Vec<f64>,
    tallies: Vec<(OpKind, Tally)>,
    /// Of one run for each timing.
    kernels: Vec<KernelTime>,
    /// Operations are timed in runs of their own, each alone on a device.
    is_queued: bool,
}

/// Times the cases, which take turns.
pub(super) fn measure(
    cases: Vec<Case>,
    plan: &Plan,
    limits: &mut Limits,
) -> Result<Vec<Measurement>, Error> {
    let mut live = Vec::new();
    for case in cases {
        let mut work = backends::build(&case.settings.machine, case.make())?;
        let timings = (0..work.tracks().len())
            .map(|track| warm_up(work.as_mut(), track))
            .collect::<Result<Vec<_>, _>>()?;
        live.push((case, work, timings));
    }
    for _ in 0..plan.repeats.max(1) {
        for (case, work, timings) in &mut live {
            limits.measure(&case.settings.machine)?;
            for (track, timing) in timings.iter_mut().enumerate() {
                if plan.breakdown && !timing.is_queued {
                    work.start();
                }
                let seconds = pass(work.as_mut(), track, timing.calls)? / f64::from(timing.calls);
                timing.seconds.push(seconds);
                let flops = 2.0 * timing.track.macs as f64 / seconds;
                let peak = limits.now(&case.settings.machine);
                timing.beside.extend(peak.map(|peak| flops / peak));
                if plan.breakdown {
                    // Apart from the figures: alone, operations are no graph, and wait for the host.
                    if timing.is_queued {
                        work.start();
                        work.run(track)?;
                    }
                    work.stop();
                    timing.add(&work.tallies());
                    timing.add_kernels(&work.profile(track)?);
                }
            }
        }
    }
    let mut results = Vec::new();
    for (case, mut work, timings) in live {
        let warnings = work.warnings();
        for warning in &warnings {
            log::warn!("{warning}");
        }
        let blank = Measurement {
            launches: work.launches(),
            warnings,
            ..case.blank()?
        };
        let peak = limits.peak(&case.settings.machine);
        let bandwidth = limits.bandwidth(&case.settings.machine);
        for timing in timings {
            results.push(timing.result(blank.clone(), case.batch, peak, bandwidth));
        }
    }
    Ok(results)
}

/// Runs a track some times, for what happens only then and to see how long it takes.
fn warm_up(work: &mut dyn Workload, track: usize) -> Result<Timing, Error> {
    work.start();
    work.run(track)?;
    work.stop();
    let tallies = work.tallies();
    let (macs, bytes) = tallies.iter().fold((0, 0), |(macs, bytes), (_, tally)| {
        (macs + tally.macs, bytes + tally.bytes)
    });
    let took = pass(work, track, 1)?;
    let is_queued = work.is_queued();
    let (least, most) = match (is_queued, work.uploads()) {
        (true, true) => (LEAST_SECONDS_UPLOADED, MOST_CALLS_QUEUED),
        (true, false) => (LEAST_SECONDS_QUEUED, MOST_CALLS_QUEUED),
        (false, _) => (LEAST_SECONDS, MOST_CALLS),
    };
    let calls = |took: f64| (least / took).ceil().clamp(1.0, most) as u32;
    let calls = match is_queued {
        // Issued, made into a graph, launched as that; a run that brings pictures is a graph of its own.
        true if work.uploads() => {
            pass(work, track, 2)?;
            calls(pass(work, track, 1)?)
        }
        true => {
            let calls = calls(took);
            for _ in 0..3 {
                pass(work, track, calls)?;
            }
            calls
        }
        false => calls(took),
    };
    Ok(Timing {
        track: work.tracks()[track].clone(),
        calls,
        flops_per_byte: per_byte(macs, bytes),
        seconds: Vec::new(),
        beside: Vec::new(),
        tallies: OpKind::ALL.map(|kind| (kind, Tally::default())).to_vec(),
        kernels: Vec::new(),
        is_queued,
    })
}

/// Seconds until so many runs of a track are done.
fn pass(work: &mut dyn Workload, track: usize, calls: u32) -> Result<f64, Error> {
    work.begin();
    let began = Instant::now();
    for _ in 0..calls {
        work.run(track)?;
    }
    work.wait()?;
    Ok(began.elapsed().as_secs_f64())
}

/// Operations per byte.
fn per_byte(macs: u64, bytes: u64) -> Option<f64> {
    (macs > 0 && bytes > 0).then(|| 2.0 * macs as f64 / bytes as f64)
}

impl Timing {
    fn add(&mut self, tallies: &[(OpKind, Tally)]) {
        for ((_, sum), (_, tally)) in self.tallies.iter_mut().zip(tallies) {
            sum.calls += tally.calls;
            sum.time += tally.time;
            sum.macs += tally.macs;
            sum.bytes += tally.bytes;
        }
    }

    fn add_kernels(&mut self, times: &[KernelTime]) {
        for time in times {
            match self.kernels.iter_mut().find(|sum| sum.name == time.name) {
                Some(sum) => {
                    sum.launches += time.launches;
                    sum.seconds += time.seconds;
                    sum.bytes = sum.bytes.zip(time.bytes).map(|(sum, bytes)| sum + bytes);
                }
                None => self.kernels.push(*time),
            }
        }
    }

    fn result(
        mut self,
        blank: Measurement,
        batch: usize,
        peak: Option<f64>,
        bandwidth: Option<f64>,
    ) -> Measurement {
        let calls = f64::from(self.calls);
        let total = self.seconds.iter().sum::<f64>() * calls;
        let breakdown = self.breakdown(total, self.seconds.len() as f64, peak, bandwidth);
        let kernels = self.kernel_parts(self.seconds.len() as f64, bandwidth);
        self.seconds.sort_unstable_by(f64::total_cmp);
        let median = self.seconds[self.seconds.len() / 2];
        let range = self.seconds[self.seconds.len() - 1] - self.seconds[0];
        let flops = 2.0 * self.track.macs as f64 / median;
        self.beside.sort_unstable_by(f64::total_cmp);
        let product = self.track.product;
        Measurement {
            layer: product.map(|(layer, _, _)| layer),
            pass: product.map(|(_, pass, _)| pass),
            shape: product.map(|(_, _, dims)| [dims.rows, dims.in_features, dims.out_features]),
            seconds: Some(median),
            calls: Some(self.calls),
            spread: Some(range / median),
            images_per_s: product.is_none().then_some(batch as f64 / median),
            gflops: flops / 1e9,
            share_of_peak: peak.map(|peak| flops / peak),
            share_of_peak_beside: self.beside.get(self.beside.len() / 2).copied(),
            flops_per_byte: self.flops_per_byte,
            breakdown,
            kernels,
            ..blank
        }
    }

    /// Of so many `timings` that took `total` seconds. What is left is the model between the operations; a device does that, and
    /// what is not timed, while it computes.
    fn breakdown(
        &self,
        total: f64,
        timings: f64,
        peak: Option<f64>,
        bandwidth: Option<f64>,
    ) -> Vec<Part> {
        let (total, runs) = match self.is_queued {
            true => {
                let times = self
                    .tallies
                    .iter()
                    .map(|(_, tally)| tally.time.as_secs_f64());
                (times.sum(), timings)
            }
            false => (total, timings * f64::from(self.calls)),
        };
        let mut parts = Vec::new();
        let mut rest = total;
        for &(kind, tally) in &self.tallies {
            if tally.calls == 0 {
                continue;
            }
            let seconds = tally.time.as_secs_f64();
            rest -= seconds;
            let flops = (tally.macs > 0).then(|| 2.0 * tally.macs as f64 / seconds);
            // Others find much of what they read in a cache, and of a device its kernels tell.
            let is_bound_by_memory = !self.is_queued && kind == OpKind::Optimizer;
            let bytes = is_bound_by_memory.then(|| tally.bytes as f64 / seconds);
            parts.push(Part {
                operation: kind.name(),
                calls: tally.calls as f64 / runs,
                seconds: seconds / runs,
                share: seconds / total,
                gflops: flops.map(|flops| flops / 1e9),
                share_of_peak: flops.zip(peak).map(|(flops, peak)| flops / peak),
                flops_per_byte: per_byte(tally.macs, tally.bytes),
                gbytes_per_s: bytes.map(|bytes| bytes / 1e9),
                share_of_bandwidth: bytes.zip(bandwidth).map(|(bytes, most)| bytes / most),
            });
        }
        if !parts.is_empty() && !self.is_queued {
            parts.push(Part {
                operation: "between operations",
                calls: 0.0,
                seconds: rest / runs,
                share: rest / total,
                gflops: None,
                share_of_peak: None,
                flops_per_byte: None,
                gbytes_per_s: None,
                share_of_bandwidth: None,
            });
        }
        parts
    }

    /// Of so many runs.
    fn kernel_parts(&self, runs: f64, bandwidth: Option<f64>) -> Vec<KernelPart> {
        let all: f64 = self.kernels.iter().map(|time| time.seconds).sum();
        let part = |time: &KernelTime| {
            let rate = time.bytes.map(|bytes| bytes as f64 / time.seconds);
            KernelPart {
                kernel: time.name,
                launches: time.launches as f64 / runs,
                seconds: time.seconds / runs,
                share: time.seconds / all,
                bytes: time.bytes.map(|bytes| bytes as f64 / runs),
                gbytes_per_s: rate.map(|rate| rate / 1e9),
                share_of_bandwidth: rate.zip(bandwidth).map(|(rate, most)| rate / most),
            }
        };
        let mut parts: Vec<KernelPart> = self.kernels.iter().map(part).collect();
        parts.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        parts
    }
}
