//! `pcae finetune` and `pcae evaluate`.

use std::path::PathBuf;
use std::process::ExitCode;

use super::args::{is_machine_alone, key_values};
use super::{percent, program, unreadable_train, write_out};
use crate::backends::count;
use crate::checkpoint::{Which, locate};
use crate::data::no_pictures_of;
use crate::error::Error;
use crate::evaluate::{self, Plan, Report, Row};
use crate::finetune::{self, FinetuneSettings};
use crate::network::arrows;
use crate::output::{self, Kind};
use crate::progress::rate;
use crate::settings::{BackendKind, CriterionSpec, DropLayersSpec, Machine, Precision};

#[derive(Debug, clap::Args)]
#[command(allow_negative_numbers = true)]
pub(super) struct FinetuneArgs {
    /// Run directory or safetensors file to start from, or "none" for random weights
    #[arg(long, value_name = "PATH")]
    weights: Option<String>,
    /// Which of its weights: student or teacher (its moving average) [default: student]
    #[arg(long, value_name = "WHICH")]
    which: Option<String>,
    /// Folder of labelled pictures: IDX files or class folders [default: the embedded Fashion-MNIST]
    #[arg(long, value_name = "DIR")]
    data: Option<String>,
    /// Encoder: vit-micro, vit-ti16, vit-s16, vit-b16, vit-l16 or vit-h14 [default: that of the weights]
    #[arg(long)]
    model: Option<String>,
    /// What computes: cpu, cuda or reference [default: cpu]
    #[arg(long)]
    backend: Option<String>,
    /// Number format of the computation: f32, bf16 (cpu, cuda), f64 (reference) [default: f32, or bf16 on cuda]
    #[arg(long)]
    precision: Option<String>,
    /// Passes over the data [default: 20 for vit-micro, 100 for larger ones]
    #[arg(long, conflicts_with = "steps")]
    epochs: Option<String>,
    /// Optimizer steps, instead of --epochs
    #[arg(long)]
    steps: Option<String>,
    /// Pictures in a micro-batch, or auto for as many as there is memory for, to four significant bits [default: 64, or all of fewer]
    #[arg(long)]
    batch_size: Option<String>,
    /// Micro-batches in an optimizer step [default: 1]
    #[arg(long)]
    accum: Option<String>,
    /// Peak learning rate of the head [default: blr * batch_size * accum / 256]
    #[arg(long)]
    lr: Option<String>,
    /// Part of the patch tokens that each stage drops in training [default: 0]
    #[arg(long)]
    drop_ratio: Option<String>,
    /// After which blocks tokens are dropped: 0,7,10 or starts:3, ends:3, even:3, first:3 [default: as 0,7,10 of 12]
    #[arg(long)]
    drop_layers: Option<String>,
    /// Threads that compute, 0 for all [default: 0]
    #[arg(long)]
    threads: Option<String>,
    /// Threads that prepare batches [default: 1; on cuda all cores but one]
    #[arg(long)]
    workers: Option<String>,
    /// Seed of everything random [default: 0]
    #[arg(long)]
    seed: Option<String>,
    /// Run directory to make [default: runs/finetune]
    #[arg(long, value_name = "DIR")]
    out: Option<String>,
    /// Continue the run in this directory
    #[arg(long, value_name = "DIR", conflicts_with = "out")]
    resume: Option<PathBuf>,
    /// Settings in TOML; flags and --set come over them
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Any setting of config.toml; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Print the result as one line of JSON
    #[arg(long)]
    json: bool,
}

impl FinetuneArgs {
    /// Flags and `--set` as settings, the flags last.
    fn overrides(&self) -> Result<Vec<(String, String)>, Error> {
        let mut overrides = key_values("--set", &self.set)?;
        let flags = [
            ("weights", &self.weights),
            ("which", &self.which),
            ("data", &self.data),
            ("model", &self.model),
            ("backend", &self.backend),
            ("precision", &self.precision),
            ("epochs", &self.epochs),
            ("steps", &self.steps),
            ("batch_size", &self.batch_size),
            ("accum", &self.accum),
            ("lr", &self.lr),
            ("drop_ratio", &self.drop_ratio),
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

pub(super) fn finetune_command(args: &FinetuneArgs) -> Result<ExitCode, Error> {
    let overrides = args.overrides()?;
    let summary = match &args.resume {
        Some(out) => {
            is_machine_alone(args.config.as_deref(), &overrides)?;
            finetune::resume(out, &overrides)?
        }
        None => finetune::start(FinetuneSettings::load(args.config.as_deref(), &overrides)?)?,
    };
    if args.json {
        write_out(&(serde_json::to_string(&summary).unwrap_or_default() + "\n"))?;
    } else {
        write_out(&closing(&summary))?;
    }
    Ok(if summary.interrupted {
        ExitCode::from(130)
    } else {
        ExitCode::SUCCESS
    })
}

/// The last lines of a run: its figures, and what to type next.
fn closing(summary: &finetune::Summary) -> String {
    let (out, program) = (summary.out.display(), program());
    let finetune::Summary {
        step,
        steps,
        loss,
        images_per_s,
        ..
    } = *summary;
    if summary.interrupted {
        return format!(
            "stopped at step {step} of {steps}, saved; continue with:\n  {program} finetune --resume {out}\n"
        );
    }
    let mut text = format!(
        "done: {}, last loss {loss:.4}",
        count(steps as usize, "step")
    );
    if let Some(images_per_s) = images_per_s {
        text += &format!(", {}", rate(images_per_s));
    }
    text += &format!(
        "\ntop-1 {}, top-5 {}",
        percent(summary.top1),
        percent(summary.top5)
    );
    text += &left_out(summary.unreadable);
    text += &unreadable_train(summary.unreadable_train);
    if summary.ema_top1.is_some() {
        text += &format!("; average {}", percent(summary.ema_top1));
    }
    if let Some(best_step) = summary.best_step {
        text += &format!(
            "; best {} after step {best_step}, chosen on the held-out pictures",
            percent(summary.best_top1)
        );
    }
    text += &format!(
        "\ncurves      {out}/curves.png\nconfusion   {out}/confusion.csv\nbest        {out}/checkpoints/best.safetensors\n\
         checkpoint  {out}/checkpoints/last.safetensors\nnext:\n\
         \x20 {program} evaluate {out} --drop-ratio 0,0.1,0.2,0.3,0.4         # one model, many budgets\n\
         \x20 {program} bench {out} --drop-ratio 0,0.2,0.4 --accuracy        # what they cost and what they are worth\n\
         \x20 {program} deploy {out} --latency 20ms --out deployed.safetensors  # the most tokens that fit in 20 ms here\n"
    );
    text
}

#[derive(Debug, clap::Args)]
#[command(allow_negative_numbers = true)]
pub(super) struct EvaluateArgs {
    /// A run directory of `pcae finetune` (its best checkpoint), or a checkpoint of one
    checkpoint: PathBuf,
    /// Which of the checkpoint's weights
    #[arg(long, value_enum, default_value = "student", value_name = "WHICH")]
    which: Which,
    /// Folder of labelled pictures, whose held-out part is classified [default: that of the run]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Parts of the patch tokens that each stage drops [default: as deployed or trained]
    #[arg(long, value_delimiter = ',')]
    drop_ratio: Vec<f64>,
    /// After which blocks tokens are dropped [default: as deployed or trained]
    #[arg(long)]
    drop_layers: Option<String>,
    /// Which tokens are dropped: mean-similarity, random, pivoted-qr [default: as in training]
    #[arg(long, value_delimiter = ',')]
    criterion: Vec<String>,
    /// Pictures at a time
    #[arg(long, default_value = "100")]
    batch_size: usize,
    /// Seed of what is dropped at random
    #[arg(long, default_value = "0")]
    seed: u64,
    /// What computes
    #[arg(long, value_enum, default_value = "cpu")]
    backend: BackendKind,
    /// Number format of the computation [default: f32, or bf16 on cuda]
    #[arg(long, value_enum)]
    precision: Option<Precision>,
    /// Instruction set of the CPU backend [default: the best there is]
    #[arg(long)]
    isa: Option<String>,
    /// Threads that compute, 0 for all
    #[arg(long, default_value = "0")]
    threads: usize,
    /// Save which classes are taken for which, at the first drop ratio, as CSV
    #[arg(long, value_name = "FILE")]
    confusion: Option<PathBuf>,
    /// Print the result as one line of JSON
    #[arg(long)]
    json: bool,
}

impl EvaluateArgs {
    fn plan(&self) -> Result<Plan, Error> {
        let wrong = |name: &str| {
            let name = name.to_owned();
            move |reason| Error::Setting { name, reason }
        };
        let layers = self
            .drop_layers
            .as_deref()
            .map(str::parse::<DropLayersSpec>);
        let criteria = self
            .criterion
            .iter()
            .map(|text| text.parse::<CriterionSpec>());
        Ok(Plan {
            checkpoint: self.checkpoint.clone(),
            which: self.which,
            data: self.data.clone(),
            drop_ratios: self.drop_ratio.clone(),
            drop_layers: layers.transpose().map_err(wrong("--drop-layers"))?,
            criteria: criteria
                .collect::<Result<_, _>>()
                .map_err(wrong("--criterion"))?,
            batch_size: self.batch_size,
            seed: self.seed,
            machine: Machine {
                backend: self.backend,
                precision: self.precision,
                isa: self.isa.clone(),
                threads: self.threads,
                ..Machine::default()
            },
        })
    }
}

pub(super) fn evaluate_command(args: &EvaluateArgs) -> Result<ExitCode, Error> {
    if let Some(path) = &args.confusion {
        let checkpoint = locate(&args.checkpoint)?;
        let inputs: Vec<PathBuf> = [checkpoint].into_iter().chain(args.data.clone()).collect();
        output::check("--confusion", path, Kind::Csv, &inputs)?;
    }
    let mut is_first = true;
    let report = evaluate::run(&args.plan()?, |report, row, confusion| {
        if is_first {
            if let Some(path) = &args.confusion {
                confusion.write_csv(path, &report.classes)?;
            }
            if !args.json {
                write_out(&heading(report))?;
            }
        }
        is_first = false;
        if args.json {
            Ok(())
        } else {
            write_out(&line(row))
        }
    })?;
    if args.json {
        write_out(&(serde_json::to_string(&report).unwrap_or_default() + "\n"))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// `; 2 pictures left out, which could not be read`, if there are any.
fn left_out(unreadable: usize) -> String {
    match unreadable {
        0 => String::new(),
        unreadable => format!(
            "; {} left out, which could not be read",
            count(unreadable, "picture")
        ),
    }
}

fn heading(report: &Report) -> String {
    let missing = no_pictures_of(&report.without_pictures);
    format!(
        "checkpoint {}\ndata       {}{}\n{}backend    {}, {} at a time\n{:<15} {:>5}  {:<24} {:>12} {:>9} {:>9} {:>10}\n",
        report.origin,
        report.data,
        left_out(report.unreadable),
        missing.map_or_else(String::new, |missing| format!("           {missing}\n")),
        report.backend,
        count(report.batch_size, "image"),
        "criterion",
        "drop",
        "patches",
        "M mult-adds",
        "top-1 %",
        "top-5 %",
        "images/s"
    )
}

fn line(row: &Row) -> String {
    format!(
        "{:<15} {:>5}  {:<24} {:>12.1} {:>9.2} {:>9.2} {:>10.1}\n",
        row.criterion.to_string(),
        row.drop_ratio,
        arrows(&row.tokens),
        row.multiply_adds as f64 / 1e6,
        100.0 * row.top1,
        100.0 * row.top5,
        row.images_per_s
    )
}
