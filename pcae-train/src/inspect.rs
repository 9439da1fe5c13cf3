//! What a checkpoint, a data set or a run directory holds.

use std::fmt::Write as _;
use std::path::Path;

use crate::checkpoint::exchange;
use crate::checkpoint::file::Reader;
use crate::checkpoint::locate;
use crate::checkpoint::weights::Weights;
use crate::data;
use crate::error::Error;
use crate::metrics::read_metrics;

/// Describes what is at `path`: a run directory, a safetensors file, a folder that holds one as the other commands read it, or else
/// a data set.
///
/// # Errors
/// [`Error`] if it cannot be read as that.
pub fn inspect(path: &Path) -> Result<String, Error> {
    if path.join("config.toml").is_file() {
        run(path)
    } else if path.is_file() {
        tensors(path)
    } else if let Ok(file) = locate(path) {
        tensors(&file)
    } else {
        data_set(path)
    }
}

fn run(path: &Path) -> Result<String, Error> {
    let mut text = format!("run directory {}\n", path.display());
    let records = read_metrics(&path.join("metrics.jsonl"))?;
    if let Some(last) = records.last() {
        let (step, epoch, time) = (last.step, last.epoch, last.time_s);
        let _ = writeln!(
            text,
            "last record: step {step}, epoch {epoch:.1}, {time:.0} s of training"
        );
        for (name, value) in &last.scalars {
            let _ = writeln!(text, "  {name:<24} {value:.6}");
        }
    }
    let checkpoints = path.join("checkpoints");
    let last = checkpoints.join("last.safetensors");
    let best = checkpoints.join("best.safetensors");
    if !last.is_file() {
        text.push_str("no checkpoint yet\n");
        return Ok(text);
    }
    if best.is_file() {
        text.push_str("its best, which other commands read: ");
        text.push_str(&tensors(&best)?);
        text.push_str("its newest, to resume it: ");
    }
    text.push_str(&tensors(&last)?);
    Ok(text)
}

fn tensors(path: &Path) -> Result<String, Error> {
    let reader = Reader::open(path)?;
    let names = reader.names();
    let mut text = format!("safetensors file {}\n", path.display());
    for (key, value) in reader.metadata() {
        let _ = writeln!(text, "  {}: {}", plain(key), plain(value));
    }
    if let Some(line) = exchange::identify(path, &reader) {
        let _ = writeln!(text, "{line}");
    }
    if let Ok(Some(deployment)) = Weights::open(path)?.deployment() {
        let _ = writeln!(text, "deployed: {}", plain(&deployment.to_string()));
    }
    let mut elements = 0;
    let mut lines = String::new();
    for name in &names {
        let (Some(shape), Some(dtype)) = (reader.shape(name), reader.dtype(name)) else {
            continue;
        };
        elements += shape.iter().product::<usize>();
        let _ = writeln!(lines, "  {:<56} {dtype:?} {shape:?}", plain(name));
    }
    let _ = writeln!(text, "{} tensors, {elements} elements", names.len());
    Ok(text + &lines)
}

/// Text of a stranger's file, its control characters written out: they could otherwise drive the terminal.
pub(crate) fn plain(text: &str) -> String {
    let escape = |c: char| {
        if c.is_control() {
            c.escape_default().to_string()
        } else {
            c.to_string()
        }
    };
    text.chars().map(escape).collect()
}

fn data_set(path: &Path) -> Result<String, Error> {
    let splits = data::open(Some(path), None)?;
    let mut text = String::new();
    for (part, dataset) in [("train", &splits.train), ("held out", &splits.held_out)] {
        let _ = writeln!(text, "{part}: {}", dataset.describe());
        let mut counts = vec![0_usize; dataset.num_classes()];
        for label in (0..dataset.len()).filter_map(|i| dataset.label(i)) {
            if let Some(count) = counts.get_mut(label as usize) {
                *count += 1;
            }
        }
        for (class, count) in (0_u32..).zip(&counts) {
            let name = dataset
                .class_name(class)
                .map_or_else(|| class.to_string(), plain);
            let _ = writeln!(text, "  {name:<32} {count}");
        }
    }
    Ok(text)
}
