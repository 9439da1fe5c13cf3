//! What the machine can do at most.

use std::collections::BTreeMap;

use pcae_backend_cpu::{Bandwidth as CpuBandwidth, Cpu};
use pcae_backend_cuda::Cuda;

use super::{MachineReport, name};
use crate::backends;
use crate::error::Error;
use crate::settings::{BackendKind, Machine};

/// What stands for the number of threads of a device.
pub(super) const CUDA: &str = "cuda";

/// As far as it was measured.
pub(super) struct Limits {
    /// By precision, and [what computes](computes).
    peaks: BTreeMap<(String, String), Peak>,
    wants_bandwidth: bool,
    /// By what computes.
    bandwidths: BTreeMap<String, Bandwidth>,
}

struct Peak {
    on: On,
    /// Operations per second.
    best: f64,
}

enum On {
    Cpu(Cpu),
    Cuda(Box<Cuda>),
}

/// Bytes per second, read and written.
struct Bandwidth {
    copy: f64,
    /// In place; not of a device.
    update: Option<f64>,
}

/// Threads, or [`CUDA`].
fn computes(machine: &Machine) -> String {
    match machine.backend {
        BackendKind::Cuda => CUDA.to_owned(),
        BackendKind::Cpu | BackendKind::Reference => machine.threads.to_string(),
    }
}

fn key(machine: &Machine) -> (String, String) {
    (name(machine.precision()), computes(machine))
}

impl Limits {
    /// Nothing is measured yet.
    pub(super) fn new(wants_bandwidth: bool) -> Self {
        Self {
            peaks: BTreeMap::new(),
            wants_bandwidth,
            bandwidths: BTreeMap::new(),
        }
    }

    /// Measures what `machine` can do, a CPU again where it was before: its clock moves, and the best counts.
    pub(super) fn measure(&mut self, machine: &Machine) -> Result<(), Error> {
        let wants_bandwidth =
            self.wants_bandwidth && !self.bandwidths.contains_key(&computes(machine));
        let Some(peak) = self.of(machine)? else {
            return Ok(());
        };
        if peak.best > 0.0 && matches!(peak.on, On::Cuda(_)) {
            return Ok(());
        }
        let bandwidth = wants_bandwidth.then(|| peak.on.bandwidth()).transpose()?;
        peak.best = peak.best.max(peak.on.flops()?);
        if let Some(bandwidth) = bandwidth {
            self.bandwidths.insert(computes(machine), bandwidth);
        }
        Ok(())
    }

    /// Where `machine` is measured, unless it is the reference, which has no limit.
    fn of(&mut self, machine: &Machine) -> Result<Option<&mut Peak>, Error> {
        let key = key(machine);
        if !self.peaks.contains_key(&key) {
            let on = match machine.backend {
                BackendKind::Cpu => On::Cpu(backends::cpu(machine)?),
                BackendKind::Cuda => On::Cuda(Box::new(backends::cuda(machine)?)),
                BackendKind::Reference => return Ok(None),
            };
            self.peaks.insert(key.clone(), Peak { on, best: 0.0 });
        }
        Ok(self.peaks.get_mut(&key))
    }

    /// Bytes that the device of `machine` has left.
    pub(super) fn device_memory(&mut self, machine: &Machine) -> Result<usize, Error> {
        match self.of(machine)?.map(|peak| &peak.on) {
            Some(On::Cuda(cuda)) => cuda.free().map_err(on_cuda),
            Some(On::Cpu(_)) | None => Ok(0),
        }
    }

    /// The peak of a CPU at the clock of this moment, if it is known at all.
    pub(super) fn now(&self, machine: &Machine) -> Option<f64> {
        match &self.peaks.get(&key(machine))?.on {
            On::Cpu(cpu) => {
                // Wakes the threads, while those of the work go to sleep.
                cpu.spin_rate();
                Some(cpu.spin_rate())
            }
            On::Cuda(_) => None,
        }
    }

    /// Operations per second.
    pub(super) fn peak(&self, machine: &Machine) -> Option<f64> {
        self.peaks.get(&key(machine)).map(|peak| peak.best)
    }

    /// Bytes per second of a copy or an update in place, whichever is faster.
    pub(super) fn bandwidth(&self, machine: &Machine) -> Option<f64> {
        let Bandwidth { copy, update } = self.bandwidths.get(&computes(machine))?;
        Some(update.map_or(*copy, |update| copy.max(update)))
    }

    /// Notes everything that was measured, and on what.
    pub(super) fn report(self, machine: &mut MachineReport) {
        for ((precision, computes), peak) in self.peaks {
            let peaks = machine.peak_gflops.entry(precision).or_default();
            peaks.insert(computes, peak.best / 1e9);
            if let On::Cuda(cuda) = peak.on {
                machine.device = Some(cuda.name().to_owned());
            }
        }
        for (computes, Bandwidth { copy, update }) in self.bandwidths {
            let updates = update.map(|update| (computes.clone(), update / 1e9));
            machine.update_gbytes_per_s.extend(updates);
            machine.copy_gbytes_per_s.insert(computes, copy / 1e9);
        }
    }
}

impl On {
    fn flops(&mut self) -> Result<f64, Error> {
        match self {
            Self::Cpu(cpu) => Ok(cpu.peak_flops()),
            Self::Cuda(cuda) => cuda.peak_flops().map_err(on_cuda),
        }
    }

    fn bandwidth(&mut self) -> Result<Bandwidth, Error> {
        match self {
            Self::Cpu(cpu) => {
                let CpuBandwidth { copy, update } = cpu
                    .memory_bandwidth()
                    .map_err(|error| Error::backend("cpu", error))?;
                Ok(Bandwidth {
                    copy,
                    update: Some(update),
                })
            }
            Self::Cuda(cuda) => Ok(Bandwidth {
                copy: cuda.memory_bandwidth().map_err(on_cuda)?,
                update: None,
            }),
        }
    }
}

fn on_cuda(error: pcae_backend_cuda::Error) -> Error {
    Error::backend("cuda", error)
}
