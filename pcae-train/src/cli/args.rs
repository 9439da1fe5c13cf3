//! The flags. One thing has one name in every command.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use crate::error::Error;
use crate::settings::{BackendKind, Machine, Precision};

/// Pre-trains vision transformers on unlabelled pictures with PCAE, the progressively compressed autoencoder.
#[derive(Debug, Parser)]
#[command(name = "pcae", version, arg_required_else_help = true)]
pub(super) struct Args {
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Pre-train an encoder on pictures without labels.
    #[command(after_help = "Examples:
  pcae pretrain                                   vit-micro on the embedded Fashion-MNIST, about three minutes
  pcae pretrain --data photos --model vit-s16 --epochs 100 --out runs/photos
  pcae pretrain --resume runs/photos              continue, to the same bits
  pcae pretrain --method mae --set clip_grad=1    the baseline; any setting of config.toml works with --set")]
    Pretrain(PretrainArgs),
    /// Replay a golden fixture on a backend and print the largest error of every tensor.
    #[command(after_help = "Example:
  pcae parity tests/fixtures/pcae_small.safetensors --backend reference")]
    Parity(ParityArgs),
    /// Say what a checkpoint, a data set or a run directory holds.
    #[command(after_help = "Example:
  pcae inspect runs/pretrain")]
    Inspect(InspectArgs),
}

#[derive(Debug, clap::Args)]
pub(super) struct PretrainArgs {
    /// Folder of pictures: IDX files, class folders or plain pictures [default: the embedded Fashion-MNIST]
    #[arg(long, value_name = "DIR")]
    data: Option<String>,
    /// Encoder: vit-micro, vit-ti16, vit-s16, vit-b16, vit-l16 or vit-h14 [default: vit-micro]
    #[arg(long)]
    model: Option<String>,
    /// What is predicted: pcae (teacher's features) or mae (pixels) [default: pcae]
    #[arg(long)]
    method: Option<String>,
    /// What computes: cpu or reference [default: cpu]
    #[arg(long)]
    backend: Option<String>,
    /// Number format of the computation: f32, or f64 on the reference [default: f32]
    #[arg(long)]
    precision: Option<String>,
    /// Passes over the data [default: 20]
    #[arg(long, conflicts_with = "steps")]
    epochs: Option<String>,
    /// Optimizer steps, instead of --epochs
    #[arg(long)]
    steps: Option<String>,
    /// Pictures in a micro-batch [default: 128]
    #[arg(long)]
    batch_size: Option<String>,
    /// Micro-batches in an optimizer step [default: 1]
    #[arg(long)]
    accum: Option<String>,
    /// Peak learning rate [default: blr * batch_size * accum / 256]
    #[arg(long)]
    lr: Option<String>,
    /// Part of the patches that the student does not see [default: 0.75]
    #[arg(long)]
    mask_ratio: Option<String>,
    /// Part of the teacher's tokens that each stage keeps [default: 0.5]
    #[arg(long)]
    keep_ratio: Option<String>,
    /// After which blocks the teacher drops tokens: 0,4,8 or starts:3, ends:3, even:3, first:3, none [default: starts:3]
    #[arg(long)]
    drop_layers: Option<String>,
    /// Threads that compute, 0 for all [default: 0]
    #[arg(long)]
    threads: Option<String>,
    /// Threads that prepare batches [default: 1]
    #[arg(long)]
    workers: Option<String>,
    /// Seed of everything random [default: 0]
    #[arg(long)]
    seed: Option<String>,
    /// Run directory to make [default: runs/pretrain]
    #[arg(long, value_name = "DIR")]
    out: Option<String>,
    /// Continue the run in this directory
    #[arg(long, value_name = "DIR", conflicts_with = "out")]
    pub(super) resume: Option<PathBuf>,
    /// Settings in TOML; flags and --set come over them
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// Any setting of config.toml; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Print the result as one line of JSON
    #[arg(long)]
    pub(super) json: bool,
}

impl PretrainArgs {
    /// Flags and `--set` as settings, the flags last.
    pub(super) fn overrides(&self) -> Result<Vec<(String, String)>, Error> {
        let mut overrides = Vec::new();
        for text in &self.set {
            let Some((key, value)) = text.split_once('=') else {
                let reason = format!("expected KEY=VALUE, found {text:?}");
                return Err(Error::Setting {
                    name: "--set".to_owned(),
                    reason,
                });
            };
            overrides.push((key.trim().to_owned(), value.trim().to_owned()));
        }
        let flags = [
            ("data", &self.data),
            ("model", &self.model),
            ("method", &self.method),
            ("backend", &self.backend),
            ("precision", &self.precision),
            ("epochs", &self.epochs),
            ("steps", &self.steps),
            ("batch_size", &self.batch_size),
            ("accum", &self.accum),
            ("lr", &self.lr),
            ("mask_ratio", &self.mask_ratio),
            ("keep_ratio", &self.keep_ratio),
            ("drop_layers", &self.drop_layers),
            ("threads", &self.threads),
            ("workers", &self.workers),
            ("seed", &self.seed),
            ("out", &self.out),
        ];
        for (key, value) in flags {
            if let Some(value) = value {
                overrides.push((key.to_owned(), value.clone()));
            }
        }
        Ok(overrides)
    }
}

#[derive(Debug, clap::Args)]
pub(super) struct ParityArgs {
    /// The fixture, a safetensors file
    pub(super) fixture: PathBuf,
    /// What computes
    #[arg(long, value_enum, default_value = "cpu")]
    backend: BackendKind,
    /// Number format of the computation
    #[arg(long, value_enum, default_value = "f32")]
    precision: Precision,
    /// Instruction set of the CPU backend [default: the best there is]
    #[arg(long)]
    isa: Option<String>,
    /// Threads that compute, 0 for all
    #[arg(long, default_value = "0")]
    threads: usize,
}

impl ParityArgs {
    pub(super) fn machine(&self) -> Machine {
        Machine {
            backend: self.backend,
            precision: self.precision,
            isa: self.isa.clone(),
            threads: self.threads,
            ..Machine::default()
        }
    }
}

#[derive(Debug, clap::Args)]
pub(super) struct InspectArgs {
    /// A run directory, a safetensors file, or a folder of pictures
    pub(super) path: PathBuf,
}
