//! The commands that use a frozen encoder.

use std::fmt::Display;
use std::path::PathBuf;
use std::process::ExitCode;

use serde::Serialize;

use super::exchange::HintArgs;
use super::write_out;
use crate::checkpoint::Which;
use crate::error::Error;
use crate::features::{Frozen, Pool};
use crate::knn::Scaling;
use crate::settings::{BackendKind, DropLayersSpec, Machine, Precision};
use crate::{embed, knn, probe};

/// Pictures encoded at a time: enough to keep threads busy, and little memory.
const BATCH_SIZE: usize = 64;

#[derive(Debug, clap::Args)]
struct FrozenArgs {
    /// A run directory (its best checkpoint, else its newest), a safetensors file, or a folder with model.safetensors in it
    encoder: PathBuf,
    /// Which parameters of it
    #[arg(long, value_enum, default_value = "student")]
    which: Which,
    /// Part of the patch tokens that each stage drops [default: as deployed, else 0]
    #[arg(long, value_name = "RATIO")]
    drop_ratio: Option<f64>,
    /// After which blocks: 0,7,10 or starts:3, ends:3, even:3, first:3, none [default: as deployed, else 0, 7 and 10 of 12]
    #[arg(long)]
    drop_layers: Option<DropLayersSpec>,
    #[command(flatten)]
    hints: HintArgs,
    /// What computes
    #[arg(long, value_enum, default_value = "cpu")]
    backend: BackendKind,
    /// Number format of the computation [default: f32, or bf16 on cuda]
    #[arg(long, value_enum)]
    precision: Option<Precision>,
    /// Threads that compute, 0 for all
    #[arg(long, default_value = "0")]
    threads: usize,
    /// Print the result as one line of JSON
    #[arg(long)]
    json: bool,
}

impl FrozenArgs {
    fn frozen(&self, batch_size: usize, workers: Option<usize>) -> Frozen {
        Frozen {
            encoder: self.encoder.clone(),
            which: self.which,
            hints: self.hints.hints(),
            drop_ratio: self.drop_ratio,
            drop_layers: self.drop_layers.clone(),
            batch_size,
            machine: Machine {
                backend: self.backend,
                precision: self.precision,
                threads: self.threads,
                workers,
                ..Machine::default()
            },
        }
    }

    /// Writes what came out.
    fn show(&self, report: &(impl Serialize + Display)) -> Result<(), Error> {
        if self.json {
            write_out(&(serde_json::to_string(report).unwrap_or_default() + "\n"))
        } else {
            write_out(&report.to_string())
        }
    }
}

#[derive(Debug, clap::Args)]
pub(super) struct KnnArgs {
    #[command(flatten)]
    frozen: FrozenArgs,
    /// Folder of labelled pictures: IDX files or class folders [default: what the encoder was trained on]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Class folders to classify, in place of those that --data holds out
    #[arg(long, value_name = "DIR")]
    val: Option<PathBuf>,
    /// Numbers of neighbours that vote [default: 1,5,10,20,100,200]
    #[arg(long, value_delimiter = ',')]
    k: Vec<usize>,
    /// Blocks after which features are taken, from 0 [default: the last]
    #[arg(long, value_delimiter = ',')]
    layer: Vec<usize>,
    /// What of the tokens there: mean of the patch tokens, or class token
    #[arg(long, value_enum, value_delimiter = ',', default_value = "mean")]
    pool: Vec<Pool>,
    /// How columns are brought to one scale before cosines are taken
    #[arg(long, value_enum, default_value = "standardised")]
    scaling: Scaling,
    /// Pictures encoded at a time
    #[arg(long, default_value_t = BATCH_SIZE)]
    batch_size: usize,
}

pub(super) fn knn(args: &KnnArgs) -> Result<ExitCode, Error> {
    let report = knn::command::run(&knn::command::Plan {
        frozen: args.frozen.frozen(args.batch_size, None),
        data: args.data.clone(),
        val: args.val.clone(),
        ks: args.k.clone(),
        layers: args.layer.clone(),
        pools: args.pool.clone(),
        scaling: args.scaling,
    })?;
    args.frozen.show(&report)?;
    Ok(ExitCode::SUCCESS)
}

#[derive(Debug, clap::Args)]
#[command(allow_negative_numbers = true)]
pub(super) struct ProbeArgs {
    #[command(flatten)]
    frozen: FrozenArgs,
    /// Folder of labelled pictures: IDX files or class folders [default: what the encoder was trained on]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Class folders to classify, in place of those that --data holds out
    #[arg(long, value_name = "DIR")]
    val: Option<PathBuf>,
    /// Block after which features are taken, from 0 [default: the last]
    #[arg(long)]
    layer: Option<usize>,
    /// What of the tokens there: mean of the patch tokens, or class token
    #[arg(long, value_enum, default_value = "mean")]
    pool: Pool,
    /// What trains the classifier
    #[arg(long, value_enum, default_value = "logistic")]
    solver: probe::Solver,
    /// Penalties that the logistic regression chooses from [default: 1 to 1e-8]
    #[arg(long, value_delimiter = ',')]
    l2: Vec<f64>,
    /// SGD and LARS: new crops in each epoch, as in pre-training, instead of one view
    #[arg(long)]
    augment: bool,
    /// SGD and LARS: passes over the data [default: 90]
    #[arg(long)]
    epochs: Option<u64>,
    /// SGD and LARS: pictures in a step [default: 256]
    #[arg(long)]
    batch_size: Option<usize>,
    /// SGD and LARS: peak learning rate [default: 5 rates are tried on held-back training pictures]
    #[arg(long)]
    lr: Option<f64>,
    /// SGD and LARS: weight decay [default: 0]
    #[arg(long)]
    weight_decay: Option<f64>,
    /// Seed of everything random
    #[arg(long, default_value = "0")]
    seed: u64,
    /// Threads that prepare the crops of --augment [default: 1; on cuda all cores but one]
    #[arg(long)]
    workers: Option<usize>,
}

pub(super) fn probe(args: &ProbeArgs) -> Result<ExitCode, Error> {
    let report = probe::run(&probe::Plan {
        frozen: args.frozen.frozen(BATCH_SIZE, args.workers),
        data: args.data.clone(),
        val: args.val.clone(),
        layer: args.layer,
        pool: args.pool,
        solver: args.solver,
        l2: args.l2.clone(),
        augment: args.augment,
        epochs: args.epochs,
        batch_size: args.batch_size,
        lr: args.lr,
        weight_decay: args.weight_decay,
        seed: args.seed,
    })?;
    args.frozen.show(&report)?;
    Ok(ExitCode::SUCCESS)
}

#[derive(Debug, clap::Args)]
pub(super) struct EmbedArgs {
    #[command(flatten)]
    frozen: FrozenArgs,
    /// Folder of pictures, of tar files or of IDX files, a tar file, or a list with a path in each line, from the working folder on
    /// unless absolute [default: what the encoder was trained on]
    #[arg(long, value_name = "PATH")]
    data: Option<PathBuf>,
    /// Block after which features are taken, from 0 [default: the last]
    #[arg(long)]
    layer: Option<usize>,
    /// What of the tokens there: mean of the patch tokens, class token, or all tokens
    #[arg(long, value_enum, default_value = "mean")]
    pool: Pool,
    /// File to write; its name ends with .safetensors, .npy, .csv or .parquet
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Pictures encoded at a time
    #[arg(long, default_value_t = BATCH_SIZE)]
    batch_size: usize,
    /// Threads that decode pictures [default: 1; on cuda all cores but one]
    #[arg(long)]
    workers: Option<usize>,
}

pub(super) fn embed(args: &EmbedArgs) -> Result<ExitCode, Error> {
    let report = embed::run(&embed::Plan {
        frozen: args.frozen.frozen(args.batch_size, args.workers),
        data: args.data.clone(),
        layer: args.layer,
        pool: args.pool,
        out: args.out.clone(),
    })?;
    args.frozen.show(&report)?;
    Ok(if report.interrupted {
        ExitCode::from(130)
    } else {
        ExitCode::SUCCESS
    })
}
