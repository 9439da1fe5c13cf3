//! train

pub mod checkpoint;
pub mod durable;
pub mod interrupt;
pub mod metrics;
pub mod progress;
pub mod report;
pub mod run_dir;
