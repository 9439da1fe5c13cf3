//! `pcae deploy`.

use std::path::PathBuf;
use std::process::ExitCode;

use super::exchange::HintArgs;
use super::{program, write_out};
use crate::checkpoint::export::Storage;
use crate::checkpoint::{Which, locate};
use crate::deploy::{self, Goal, Latency, Plan, Progress, RATIOS, Report, Tried};
use crate::error::Error;
use crate::network::arrows;
use crate::output::{self, Kind};
use crate::settings::{BackendKind, DropLayersSpec, Machine, Precision};

#[derive(Debug, clap::Args)]
pub(super) struct DeployArgs {
    /// A run directory (its best checkpoint), a safetensors file, or a folder with model.safetensors in it
    source: PathBuf,
    #[command(flatten)]
    goal: GoalArgs,
    /// After which blocks tokens are dropped: 0,7,10 or starts:3 [default: as in training, else 0, 7 and 10 of 12]
    #[arg(long)]
    drop_layers: Option<DropLayersSpec>,
    /// Pictures at a time, whose time is the latency
    #[arg(long, default_value = "1")]
    batch_size: usize,
    /// Timed runs of each budget, of which the median counts; quick ones are run more often
    #[arg(long, default_value = "15")]
    repeats: usize,
    /// Which of its weights
    #[arg(long, value_enum, default_value = "student")]
    which: Which,
    #[command(flatten)]
    hints: HintArgs,
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
    /// Number format of the stored parameters
    #[arg(long, value_enum, default_value = "f32")]
    dtype: Storage,
    /// The file to write
    #[arg(long, value_name = "FILE", default_value = "deployed.safetensors")]
    out: PathBuf,
    /// Print the result as one line of JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
#[command(allow_negative_numbers = true)]
struct GoalArgs {
    /// Longest median time of a batch on this machine, such as 20ms
    #[arg(long, value_name = "TIME")]
    latency: Option<Latency>,
    /// Most multiply-adds of a picture in billions: what papers call GFLOPs
    #[arg(long, value_name = "G")]
    gflops: Option<f64>,
    /// Part of the patch tokens that each stage drops
    #[arg(long, value_name = "RATIO")]
    drop_ratio: Option<f64>,
}

impl GoalArgs {
    fn goal(&self) -> Result<Goal, Error> {
        match (self.latency, self.gflops, self.drop_ratio) {
            (Some(Latency(seconds)), ..) => Ok(Goal::Latency(seconds)),
            (_, Some(gflops), _) if gflops > 0.0 => Ok(Goal::MultiplyAdds(1e9 * gflops)),
            (_, Some(gflops), _) => Err(Error::Setting {
                name: "--gflops".to_owned(),
                reason: format!("expected more than 0, found {gflops}"),
            }),
            (_, _, drop_ratio) => Ok(Goal::DropRatio(drop_ratio.unwrap_or_default())),
        }
    }
}

/// Quartiles further apart than this part of the median are a sign of other programs.
const NOISY: f64 = 0.25;

impl DeployArgs {
    pub(super) fn run(&self) -> Result<ExitCode, Error> {
        let source = locate(&self.source)?;
        output::check("--out", &self.out, Kind::Safetensors, &[&source])?;
        let plan = Plan {
            source: self.source.clone(),
            which: self.which,
            hints: self.hints.hints(),
            goal: self.goal.goal()?,
            drop_layers: self.drop_layers.clone(),
            batch_size: self.batch_size,
            repeats: self.repeats,
            machine: Machine {
                backend: self.backend,
                precision: self.precision,
                isa: self.isa.clone(),
                threads: self.threads,
                ..Machine::default()
            },
            storage: self.dtype,
            out: self.out.clone(),
        };
        let report = deploy::run(&plan, |progress| match progress {
            _ if self.json => Ok(()),
            Progress::Begun {
                origin,
                backend,
                budgets,
            } => write_out(&begun(&plan, origin, backend, budgets)),
            Progress::Round(tried) => write_out(&round(tried)),
        })?;
        if self.json {
            write_out(&(serde_json::to_string(&report).unwrap_or_default() + "\n"))?;
        } else {
            write_out(&closing(&report))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn begun(plan: &Plan, origin: &str, backend: &str, budgets: Option<usize>) -> String {
    let mut text = format!(
        "network    {origin}\nbackend    {backend}, {} at a time\ngoal       {}\n",
        crate::backends::count(plan.batch_size, "picture"),
        plan.goal
    );
    if let Some(budgets) = budgets {
        text += &format!(
            "budgets    {budgets}: drop ratios from 0 in steps of {}, but for those that leave the same tokens\n",
            1.0 / f64::from(RATIOS)
        );
    }
    text
}

fn round(tried: &[Tried]) -> String {
    let runs = tried.first().map_or(0, |tried| tried.runs);
    let mut text = format!(
        "\n{} taking turns, {runs} runs each\n{:>5}  {:<24} {:>12} {:>10} {:>8}\n",
        crate::backends::count(tried.len(), "budget"),
        "drop",
        "patches",
        "M mult-adds",
        "median ms",
        "spread"
    );
    for tried in tried {
        text += &format!(
            "{:>5}  {:<24} {:>12.1} {:>10.3} {:>6.1} %\n",
            tried.drop_ratio,
            arrows(&tried.tokens),
            tried.multiply_adds as f64 / 1e6,
            tried.latency_ms,
            100.0 * tried.spread
        );
    }
    text
}

fn closing(report: &Report) -> String {
    let (out, program) = (report.out.display(), program());
    let noise = if report.deployment.measured_on.spread > NOISY {
        "note       the runs differ much, as where other programs run beside; on a quiet machine more tokens may fit\n"
    } else {
        ""
    };
    format!(
        "\nchosen     {}\n{noise}wrote {out}: {}\nnext:\n  {program} inspect {out}\n  {program} onnx {out} --out model.onnx\n",
        report.deployment, report.written
    )
}
