//! Pre-training of vision transformers on unlabelled pictures.

pub mod checkpoint;
pub mod data;
pub mod durable;
pub mod interrupt;
pub mod metrics;
pub mod parity;
pub mod progress;
pub mod report;
pub mod run_dir;
