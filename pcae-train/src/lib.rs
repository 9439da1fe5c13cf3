//! Pre-training of vision transformers on unlabelled pictures with PCAE, and their fine-tuning: data, loop, checkpoints,
//! evaluation, and the command `pcae`.
//!
//! A run from code, as `pcae pretrain --epochs 1 --out runs/mine` does it:
//!
//! ```no_run
//! use pcae_train::{pretrain, settings::Settings};
//!
//! let mut settings = Settings { epochs: Some(1), ..Settings::default() };
//! settings.machine.out = "runs/mine".into();
//! let summary = pretrain::start(settings)?;
//! println!("loss {:.3}, kNN top-1 {:?}", summary.loss, summary.knn_top1);
//! # Ok::<(), pcae_train::error::Error>(())
//! ```
//!
//! [`finetune`] makes a classifier of what comes out, and [`evaluate`] measures that at any token budget.
//!
//! The model alone, without data or files, is in `pcae-kernel` and a backend.

pub mod backends;
pub mod bench;
pub mod checkpoint;
pub mod cli;
pub mod data;
pub mod deploy;
pub mod durable;
pub mod embed;
pub mod encoder;
pub mod error;
pub mod evaluate;
pub mod features;
pub mod finetune;
pub mod inspect;
pub mod interrupt;
pub mod knn;
pub mod metrics;
pub mod network;
pub mod onnx;
pub mod parity;
pub mod pretrain;
pub mod probe;
pub mod progress;
pub mod report;
pub mod run_dir;
pub mod settings;
pub mod trained;
pub mod training;
pub mod visualize;
