//! What `pcae deploy` writes into a file's metadata, under `deployment`, as JSON.

use std::fmt;

use pcae_kernel::config::{Budget, ConfigError, DropLayers, Reduction};
use serde::{Deserialize, Serialize};

use crate::network::arrows;

/// Its key in the metadata.
pub(crate) const KEY: &str = "deployment";

/// A token budget that was chosen for a machine, and what it was chosen by.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Deployment {
    /// Part of the patch tokens that each stage drops.
    pub drop_ratio: f64,
    /// The blocks that stages come after.
    pub drop_layers: Vec<usize>,
    /// Patch tokens before, between and after the stages.
    pub tokens: Vec<usize>,
    /// Multiply-adds of a picture.
    pub multiply_adds: u64,
    /// Median milliseconds of a batch, from pictures in memory to the result in memory.
    pub latency_ms: f64,
    /// What that was measured on.
    pub measured_on: MeasuredOn,
}

/// Where a latency comes from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MeasuredOn {
    /// Name of the processor, or its architecture where the system tells no more.
    pub cpu: String,
    /// What computed: instruction set, threads, number format.
    pub backend: String,
    /// Pictures in a batch.
    pub batch_size: usize,
    /// Timed runs.
    pub runs: usize,
    /// Upper less lower quartile of the runs, over the median.
    pub spread: f64,
    /// Load of the system then, averaged over a minute, where it tells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub load_average: Option<f64>,
    /// Version of this program.
    pub version: String,
}

impl fmt::Display for Deployment {
    /// In a line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let on = &self.measured_on;
        write!(
            f,
            "drop ratio {} after blocks {:?}, {} patches, {:.1} M multiply-adds; {:.3} ms on {} ({}, batch {}, median of {} runs, \
             spread {:.1} %)",
            self.drop_ratio,
            self.drop_layers,
            arrows(&self.tokens),
            self.multiply_adds as f64 / 1e6,
            self.latency_ms,
            on.cpu,
            on.backend,
            on.batch_size,
            on.runs,
            100.0 * on.spread
        )
    }
}

impl Deployment {
    /// What it drops in a network of `depth` blocks that else would drop as `base` says.
    ///
    /// # Errors
    /// [`ConfigError`] for blocks that there are not.
    pub fn reduction(&self, base: &Reduction, depth: usize) -> Result<Reduction, ConfigError> {
        Ok(Reduction {
            drop_layers: DropLayers::new(&self.drop_layers, depth)?,
            budget: Budget::Drop(self.drop_ratio),
            ..*base
        })
    }
}
