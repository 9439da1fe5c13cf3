//! Pre-training of vision transformers on unlabelled pictures with PCAE, and their fine-tuning: data, loop, checkpoints,
//! evaluation, and the command `pcae`.
//!
//! A run from code, as `pcae pretrain --data photos --model vit-s16 --epochs 100 --out runs/photos` does it:
//!
//! ```no_run
//! use pcae_train::{Machine, Settings, pretrain};
//!
//! let summary = pretrain::start(Settings {
//!     data: Some("photos".into()),
//!     model: "vit-s16".into(),
//!     epochs: Some(100),
//!     machine: Machine { out: "runs/photos".into(), ..Machine::default() },
//!     ..Settings::default()
//! })?;
//! println!("loss {:.3}, kNN top-1 {:?}", summary.loss, summary.knn_top1);
//! # Ok::<(), pcae_train::Error>(())
//! ```
//!
//! `examples/pretrain_own_data.rs` is that as a program. [`finetune`] makes a classifier of what comes out, [`evaluate`]
//! measures that at any token budget, and [`deploy`] chooses the one that a machine can afford.
//!
//! The model alone, without data or files, is in `pcae-kernel` and a backend.

pub use error::Error;
pub use settings::{Machine, Settings};
pub use trained::Trained;

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
pub mod fit;
pub mod inspect;
pub mod interrupt;
pub mod knn;
pub mod metrics;
pub mod network;
pub mod onnx;
mod output;
pub mod parity;
pub mod pretrain;
pub mod probe;
pub mod progress;
pub mod report;
pub mod run_dir;
mod run_settings;
pub mod settings;
pub mod trained;
pub mod training;
pub mod visualize;
