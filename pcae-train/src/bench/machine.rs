//! What was measured on.

use std::collections::BTreeMap;
use std::fs;

use serde::Serialize;

/// Gigaflops by precision and number of threads, or `cuda`.
pub type Peaks = BTreeMap<String, BTreeMap<String, f64>>;

/// The machine, the program, and the limits that were measured in the same run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MachineReport {
    /// Architecture that the program was compiled for.
    pub arch: String,
    /// Name of the processor, where the system tells it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu: Option<String>,
    /// Name of the CUDA device, where one was measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// Threads that the system offers.
    pub threads: usize,
    /// Load of the system when the run began and ended, averaged over a minute, where it tells: above what the run itself
    /// uses, figures are too low.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load_average: Option<[f64; 2]>,
    /// Version of this program.
    pub version: String,
    /// Commit that it was built from, if `PCAE_COMMIT` was set then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
    /// The compiler.
    pub rustc: String,
    /// What it compiled for.
    pub target: String,
    /// Multiply-adds in registers, twice: the measured peak of the instruction set in use. Under `cuda`, of large products by
    /// cuBLASLt.
    pub peak_gflops: Peaks,
    /// Read and written by a copy of long vectors, by number of threads or `cuda`, in 10^9 bytes per second.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub copy_gbytes_per_s: BTreeMap<String, f64>,
    /// The same of an update in place.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub update_gbytes_per_s: BTreeMap<String, f64>,
}

impl MachineReport {
    /// This machine, nothing measured yet.
    pub fn new() -> Self {
        Self {
            arch: std::env::consts::ARCH.to_owned(),
            cpu: cpu_name(),
            device: None,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            load_average: load_average().map(|load| [load, load]),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            commit: option_env!("PCAE_COMMIT").map(str::to_owned),
            rustc: env!("PCAE_RUSTC").to_owned(),
            target: env!("PCAE_TARGET").to_owned(),
            peak_gflops: Peaks::new(),
            copy_gbytes_per_s: BTreeMap::new(),
            update_gbytes_per_s: BTreeMap::new(),
        }
    }

    /// The faster of copy and update with as many threads, or `cuda`.
    pub fn bandwidth(&self, threads: &str) -> Option<f64> {
        let both = [&self.copy_gbytes_per_s, &self.update_gbytes_per_s];
        both.into_iter()
            .filter_map(|rates| rates.get(threads).copied())
            .reduce(f64::max)
    }

    /// Notes the load at the end of the run.
    pub fn finish(&mut self) {
        if let (Some(both), Some(load)) = (&mut self.load_average, load_average()) {
            both[1] = load;
        }
    }
}

impl Default for MachineReport {
    fn default() -> Self {
        Self::new()
    }
}

fn cpu_name() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// Of the last minute.
fn load_average() -> Option<f64> {
    let text = fs::read_to_string("/proc/loadavg").ok()?;
    text.split_whitespace().next()?.parse().ok()
}

/// Bytes that programs can still take, where the system tells.
pub(super) fn available_memory() -> Option<usize> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: usize = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}
