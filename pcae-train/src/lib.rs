//! Pre-training of vision transformers on unlabelled pictures.

pub mod backends;
pub mod bench;
pub mod checkpoint;
pub mod cli;
pub mod data;
pub mod durable;
pub mod error;
pub mod inspect;
pub mod interrupt;
pub mod knn;
pub mod metrics;
pub mod parity;
pub mod pretrain;
pub mod progress;
pub mod report;
pub mod run_dir;
pub mod settings;
