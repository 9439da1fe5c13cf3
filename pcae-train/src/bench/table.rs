//! Measurements as text.

use std::fmt::Write;

use pcae_kernel::sizing::Memory;

use super::limits::CUDA;
use super::{KernelPart, MachineReport, Measurement, Part};
use crate::backends::count;
use crate::network::arrows;

/// Names of the columns of [`row`].
pub fn header() -> String {
    columns([
        "what", "of", "batch", "threads", "format", "isa", "images/s", "GFLOP/s", "of peak",
        "at clock", "spread",
    ])
}

/// A measurement in one line, and where its time went in more.
pub fn row(result: &Measurement) -> String {
    let what = format!("{:?}", result.what).to_lowercase();
    let number = |number: Option<usize>| number.map_or_else(|| "-".to_owned(), |n| n.to_string());
    let share = |share: Option<f64>| share.map_or_else(|| "-".to_owned(), percent);
    let text = columns([
        &what,
        &subject(result),
        &number(result.batch),
        &number(result.threads),
        &format(result),
        result.isa.as_deref().unwrap_or("-"),
        &result
            .images_per_s
            .map_or_else(|| "-".to_owned(), |rate| format!("{rate:.2}")),
        &format!("{:.1}", result.gflops),
        &share(result.share_of_peak),
        &share(result.share_of_peak_beside),
        &result.spread.map_or_else(|| "-".to_owned(), percent),
    ]);
    text + &parts(result)
}

/// Names of the columns of [`budget_row`].
pub fn budget_header() -> String {
    budget_columns([
        "drop",
        "patches",
        "M mult-adds",
        "batch",
        "threads",
        "format",
        "images/s",
        "spread",
        "top-1 %",
        "top-5 %",
    ])
}

/// What a network does at a token budget, in one line, and where its time went in more: the paper's table of budgets.
pub fn budget_row(result: &Measurement) -> String {
    let hundredths = |part: Option<f64>| {
        part.map_or_else(|| "-".to_owned(), |part| format!("{:.2}", 100.0 * part))
    };
    let text = budget_columns([
        &result.drop_ratio.unwrap_or(0.0).to_string(),
        &arrows(result.tokens.as_deref().unwrap_or_default()),
        &format!("{:.1}", result.multiply_adds.unwrap_or(0) as f64 / 1e6),
        &result.batch.unwrap_or(0).to_string(),
        &result
            .threads
            .map_or_else(|| "-".to_owned(), |n| n.to_string()),
        &format(result),
        &format!("{:.2}", result.images_per_s.unwrap_or(0.0)),
        &result.spread.map_or_else(|| "-".to_owned(), percent),
        &hundredths(result.top1),
        &hundredths(result.top5),
    ]);
    text + &parts(result)
}

fn budget_columns(cells: [&str; 10]) -> String {
    let [
        drop,
        patches,
        macs,
        batch,
        threads,
        format,
        images,
        spread,
        top1,
        top5,
    ] = cells;
    format!(
        "{drop:>5}  {patches:<24} {macs:>12} {batch:>6} {threads:>8} {format:<15} {images:>9} {spread:>8} {top1:>8} {top5:>8}\n"
    )
}

/// The memory that a task will take.
pub fn planned(result: &Measurement, memory: Memory) -> String {
    let what = format!("{:?}", result.what).to_lowercase();
    format!(
        "{what} {}, batch {}, {}, {}: planned memory {}\n",
        subject(result),
        result.batch.unwrap_or(0),
        computes(result.threads),
        format(result),
        describe(memory)
    )
}

/// `3.12 GB (state 1.68, activations 1.39, scratch 0.05)`
pub fn describe(memory: Memory) -> String {
    let (unit, size) = match memory.total() {
        0..1_000_000_000 => ("MB", 1e6),
        _ => ("GB", 1e9),
    };
    let scaled = |bytes: usize| format!("{:.2}", bytes as f64 / size);
    format!(
        "{} {unit} (parameters, gradients, moments {}; activations {}; scratch {})",
        scaled(memory.total()),
        scaled(memory.state),
        scaled(memory.activations),
        scaled(memory.scratch)
    )
}

/// What the machine can do at most.
pub fn limits(machine: &MachineReport) -> String {
    let mut text = String::new();
    for (precision, peaks) in &machine.peak_gflops {
        for (threads, peak) in peaks {
            let _ = writeln!(
                text,
                "peak {precision}, {}: {peak:.1} GFLOP/s",
                those(threads)
            );
        }
    }
    for (threads, rate) in &machine.copy_gbytes_per_s {
        let _ = writeln!(
            text,
            "copy, {}: {rate:.1} GB/s read and written",
            those(threads)
        );
    }
    text
}

/// A key of the limits.
fn those(threads: &str) -> String {
    match threads {
        CUDA => CUDA.to_owned(),
        threads => computes(threads.parse().ok()),
    }
}

/// `2 threads`, or `cuda` where there are none.
pub(super) fn computes(threads: Option<usize>) -> String {
    threads.map_or_else(|| CUDA.to_owned(), |threads| count(threads, "thread"))
}

/// The model and what is done with it.
fn subject(result: &Measurement) -> String {
    let mut text = result
        .model
        .clone()
        .unwrap_or_else(|| match result.threads {
            Some(_) => "registers".to_owned(),
            None => "large products".to_owned(),
        });
    if let (Some(layer), Some(pass), Some([rows, from, to])) =
        (result.layer, result.pass, result.shape)
    {
        let _ = write!(text, " {layer} {pass} {rows}x{from}x{to}");
    }
    if let (Some(method), Some(mask_ratio)) = (&result.method, result.mask_ratio) {
        let _ = write!(text, " {method} mask {mask_ratio}");
    }
    if let Some([depth, width]) = result.decoder {
        let _ = write!(text, " decoder {depth}x{width}");
    }
    if let Some(drop_ratio) = result.drop_ratio {
        let _ = write!(text, " drop {drop_ratio}");
    }
    text
}

fn format(result: &Measurement) -> String {
    let mut text = result.precision.clone();
    if let Some(unit) = &result.bf16_unit {
        let _ = write!(text, " {}", unit.trim_end_matches(" bf16"));
    }
    if let Some(teacher) = &result.teacher_precision {
        let _ = write!(text, "/{teacher}");
    }
    text
}

/// Where the time of a measurement went, by operations and then by kernels.
fn parts(result: &Measurement) -> String {
    let operations = result.breakdown.iter().map(part_line);
    let kernels = result.kernels.iter().map(kernel_line);
    operations.chain(kernels).collect()
}

fn part_line(part: &Part) -> String {
    let mut text = timed(part.operation, part.share, part.calls, part.seconds);
    if let (Some(gflops), Some(share)) = (part.gflops, part.share_of_peak) {
        let _ = write!(text, " {gflops:>9.1} GFLOP/s {:>7} of peak", percent(share));
    }
    text += &moved(part.gbytes_per_s, part.share_of_bandwidth);
    text.push('\n');
    text
}

fn kernel_line(part: &KernelPart) -> String {
    let mut text = timed(part.kernel, part.share, part.launches, part.seconds);
    text += &moved(part.gbytes_per_s, part.share_of_bandwidth);
    text.push('\n');
    text
}

fn timed(what: &str, share: f64, calls: f64, seconds: f64) -> String {
    format!(
        "         {what:<26} {:>6} {calls:>7.0} calls {:>10.3} ms",
        percent(share),
        1e3 * seconds
    )
}

fn moved(rate: Option<f64>, share: Option<f64>) -> String {
    match (rate, share) {
        (Some(rate), Some(share)) => {
            format!(" {rate:>9.1} GB/s    {:>7} of memory", percent(share))
        }
        _ => String::new(),
    }
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

fn columns(cells: [&str; 11]) -> String {
    let [
        what,
        of,
        batch,
        threads,
        format,
        isa,
        images,
        gflops,
        peak,
        clock,
        spread,
    ] = cells;
    format!(
        "{what:<8} {of:<56} {batch:>5} {threads:>7} {format:<15} {isa:<8} {images:>9} {gflops:>9} {peak:>8} {clock:>8} {spread:>7}\n"
    )
}
