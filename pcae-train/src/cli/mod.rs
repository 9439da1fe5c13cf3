//! The command line.

mod args;
mod deploy;
mod exchange;
mod export;
mod features;
mod finetune;

use std::io::{ErrorKind, Write};
use std::process::ExitCode;

use clap::Parser;

use crate::backends::count;
use crate::bench::What;
use crate::error::Error;
use crate::output::{self, Kind};
use crate::parity::Tolerance;
use crate::progress::rate;
use crate::report::roofline;
use crate::settings::{Method, Precision, Settings};
use crate::{backends, bench, inspect, pretrain};
use args::{Args, BenchArgs, Command, ParityArgs, PretrainArgs, is_machine_alone};

/// Parses the command line, does what it says, and returns the exit code: 0 for success, 1 for a failure, 2 for a command
/// that was typed wrong, 130 for a run that a signal ended early.
pub fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) if !error.use_stderr() || std::env::args_os().len() < 2 => error.exit(),
        Err(error) => {
            eprintln!("{}", one_line(&error.to_string()));
            return ExitCode::from(2);
        }
    };
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn"))
        .format_timestamp(None)
        .init();
    let done = match args.command {
        Command::Pretrain(args) => pretrain_command(&args),
        Command::Finetune(args) => finetune::finetune_command(&args),
        Command::Evaluate(args) => finetune::evaluate_command(&args),
        Command::Parity(args) => parity_command(&args),
        Command::Knn(args) => features::knn(&args),
        Command::Probe(args) => features::probe(&args),
        Command::Embed(args) => features::embed(&args),
        Command::Bench(args) => bench_command(&args),
        Command::Deploy(args) => args.run(),
        Command::Export(args) => args.run(),
        Command::Convert(args) => args.run(),
        Command::Onnx(args) => args.run(),
        Command::Visualize(args) => args.run(),
        Command::Inspect(args) => inspect::inspect(&args.path).and_then(|text| {
            write_out(&text)?;
            Ok(ExitCode::SUCCESS)
        }),
    };
    done.unwrap_or_else(|error| {
        eprintln!("error: {error}");
        ExitCode::from(if error.is_usage() { 2 } else { 1 })
    })
}

/// clap's message without its usage lines, with the way to them.
fn one_line(message: &str) -> String {
    let lines = message
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:"));
    let parts: Vec<&str> = lines
        .filter(|line| !line.is_empty() && !line.starts_with("For more"))
        .collect();
    format!("{}; see `pcae --help`", parts.join(" "))
}

/// Writes to standard output. A reader that has seen enough, such as `head`, is no failure.
fn write_out(text: &str) -> Result<(), Error> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(Error::Io {
            what: "standard output".to_owned(),
            error,
        }),
        _ => Ok(()),
    }
}

/// The program as it was typed, so that advice can be typed too.
fn program() -> String {
    std::env::args().next().unwrap_or_else(|| "pcae".to_owned())
}

/// `76.4 %`
fn percent(part: Option<f64>) -> String {
    part.map_or_else(|| "-".to_owned(), |part| format!("{:.1} %", 100.0 * part))
}

fn pretrain_command(args: &PretrainArgs) -> Result<ExitCode, Error> {
    let overrides = args.overrides()?;
    let summary = match &args.resume {
        Some(out) => {
            is_machine_alone(args.config.as_deref(), &overrides)?;
            pretrain::resume(out, &overrides)?
        }
        None => pretrain::start(Settings::load(args.config.as_deref(), &overrides)?)?,
    };
    if args.json {
        write_out(
            &(serde_json::to_string(&summary).unwrap_or_default()
                + "
"),
        )?;
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
fn closing(summary: &pretrain::Summary) -> String {
    let out = summary.out.display();
    let program = program();
    let pretrain::Summary {
        step,
        steps,
        loss,
        images_per_s,
        ..
    } = *summary;
    if summary.interrupted {
        return format!(
            "stopped at step {step} of {steps}, saved; continue with:\n  {program} pretrain --resume {out}\n"
        );
    }
    let mut text = format!(
        "done: {}, last loss {loss:.4}",
        count(steps as usize, "step")
    );
    if let Some(images_per_s) = images_per_s {
        text += &format!(", {}", rate(images_per_s));
    }
    text += &unreadable_train(summary.unreadable_train);
    text.push('\n');
    if summary.knn_top1.is_some() {
        text += &format!(
            "kNN top-1: trained {}, untrained {}, raw pixels {}\n",
            percent(summary.knn_top1),
            percent(summary.knn_top1_untrained),
            percent(summary.knn_top1_pixels)
        );
    }
    text += &format!(
        "curves      {out}/curves.png\ncheckpoint  {out}/checkpoints/last.safetensors\nnext:\n  {program} finetune \
         --weights {out}\n  {program} inspect {out}\n  \
         tensorboard --logdir {out}/tensorboard\n"
    );
    if summary.method == Method::Pcae {
        text += &format!(
            "  {program} pretrain --config {out}/config.toml --method mae --out {out}-mae    # the baseline, same code\n"
        );
    }
    text
}

/// `; 3 training pictures could not be read`, or nothing.
fn unreadable_train(unreadable: usize) -> String {
    match unreadable {
        0 => String::new(),
        unreadable => format!(
            "; {} could not be read",
            count(unreadable, "training picture")
        ),
    }
}

fn bench_command(args: &BenchArgs) -> Result<ExitCode, Error> {
    let outputs = [
        ("--roofline", &args.roofline, Kind::Png),
        ("--json", &args.json, Kind::Json),
    ];
    for (flag, path, kind) in outputs {
        if let Some(path) = path {
            output::check(flag, path, kind, &args.inputs()?)?;
        }
    }
    let plan = args.plan()?;
    // Over the first figure: what is refused is refused before, and no line comes between the header and its rows.
    let mut header = Some(match &plan.trained {
        Some(trained) => format!("network    {}\n{}", trained.origin, bench::budget_header()),
        None => bench::header(),
    });
    let is_trained = plan.trained.is_some();
    let report = bench::run(&plan, |progress| match progress {
        bench::Progress::Planned(result, memory) => {
            eprint!("{}", bench::planned(result, memory));
            Ok(())
        }
        bench::Progress::Measured(result) => {
            let mut text = header.take().unwrap_or_default();
            text += &if is_trained && result.what == What::Infer {
                bench::budget_row(result)
            } else {
                bench::row(result)
            };
            write_out(&text)
        }
    })?;
    write_out(&bench::limits(&report.machine))?;
    if let Some(path) = &args.roofline {
        roofline::write_png(path, &bench::roofline(&report))?;
    }
    if let Some(path) = &args.json {
        let json = serde_json::to_vec_pretty(&report).unwrap_or_default();
        crate::durable::atomic_write(path, |out| out.write_all(&json)).map_err(|error| {
            Error::Io {
                what: format!("--json '{}'", path.display()),
                error,
            }
        })?;
    }
    Ok(ExitCode::SUCCESS)
}

fn parity_command(args: &ParityArgs) -> Result<ExitCode, Error> {
    struct Replay<'a>(&'a std::path::Path, Tolerance);
    impl backends::Job for Replay<'_> {
        type Output = crate::parity::Report;

        fn run<B: pcae_kernel::backend::TrainBackend>(
            self,
            backend: &mut B,
            _name: &str,
        ) -> Result<Self::Output, Error> {
            Ok(crate::parity::replay(backend, self.0, self.1)?)
        }
    }
    let machine = args.machine();
    let teacher = machine.teacher_precision.unwrap_or(machine.precision());
    let tolerance = match (machine.precision(), teacher) {
        (_, Precision::Fp8) => Tolerance::FP8_TEACHER,
        (Precision::Bf16, _) | (_, Precision::Bf16) => Tolerance::BF16,
        _ => Tolerance::F32,
    };
    let report = backends::run(&machine, Replay(&args.fixture, tolerance))?;
    write_out(&format!("{report}\n"))?;
    Ok(if report.passes() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
