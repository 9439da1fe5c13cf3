//! train

pub mod checkpoint;
pub mod durable;
pub mod metrics;
pub mod run_dir;
