//! What can go wrong in a command.

use std::io::ErrorKind;
use std::path::PathBuf;

use pcae_kernel::config::ConfigError;

use crate::checkpoint::file::FileError;
use crate::data::DataError;
use crate::metrics::MetricsError;
use crate::parity::ParityError;
use crate::report::curves::CurvesError;
use crate::run_dir::RunDirError;

/// Any failure of a command. Each message is one line that names the thing, what was expected, what came and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A flag or setting has a value that it cannot have.
    #[error("{name}: {reason}")]
    Setting {
        /// The flag, or the key of `--set`.
        name: String,
        /// What was expected and found.
        reason: String,
    },
    /// The model cannot be built so.
    #[error("{}", config_message(.0))]
    Config(#[from] ConfigError),
    /// A TOML file cannot be used.
    #[error("--config '{}': {reason}", path.display())]
    ConfigFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The data.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The labels of a data set.
    #[error("--data: {data}: {reason}")]
    Labels {
        /// The data set, in words.
        data: String,
        /// What was expected, what was found, what to do.
        reason: String,
    },
    /// A safetensors file.
    #[error(transparent)]
    File(#[from] FileError),
    /// A checkpoint does not fit.
    #[error("checkpoint '{}': {reason}", path.display())]
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// What was expected, what was found, what to do.
        reason: String,
    },
    /// The run directory.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// The metrics of a run.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// The picture of the curves.
    #[error(transparent)]
    Curves(#[from] CurvesError),
    /// A fixture.
    #[error(transparent)]
    Parity(#[from] ParityError),
    /// The backend failed.
    #[error("backend {backend}: {reason}")]
    Backend {
        /// Which one.
        backend: String,
        /// What it said.
        reason: String,
    },
    /// Nothing meets what was asked for.
    #[error("{name}: {reason}")]
    Unreachable {
        /// The flag.
        name: String,
        /// What was expected, what can be had, what to do.
        reason: String,
    },
    /// The loss is no longer a number.
    #[error(
        "step {step}: the loss is {loss}; a checkpoint, if there is one, is from before. Lower --lr, or set clip_grad, and start anew with another --out"
    )]
    Diverged {
        /// The step.
        step: u64,
        /// The loss.
        loss: f32,
    },
    /// Anything of the operating system without a better place.
    #[error("{what}: {error}{}", advice(error))]
    Io {
        /// What was tried.
        what: String,
        /// What the system said.
        error: std::io::Error,
    },
}

impl Error {
    /// Whether the command was typed wrong (exit code 2), rather than something failing (exit code 1).
    pub fn is_usage(&self) -> bool {
        match self {
            Self::Setting { .. } | Self::Config(_) | Self::ConfigFile { .. } => true,
            Self::Data(error) => matches!(
                error,
                DataError::BatchSize { .. } | DataError::Setting { .. }
            ),
            _ => false,
        }
    }

    /// Wraps what a backend reports.
    pub fn backend(name: impl Into<String>, error: impl std::fmt::Display) -> Self {
        Self::Backend {
            backend: name.into(),
            reason: error.to_string(),
        }
    }
}

/// What to do about an error of the operating system, where that is plain.
pub(crate) fn advice(error: &std::io::Error) -> &'static str {
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            "; free space there or choose another path"
        }
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
            "; check its permissions or choose another path"
        }
        ErrorKind::NotFound => "; check the path",
        _ => "",
    }
}

/// Settings that have a flag of their own.
const FLAGS: [&str; 22] = [
    "data",
    "model",
    "method",
    "backend",
    "precision",
    "teacher_precision",
    "epochs",
    "steps",
    "batch_size",
    "accum",
    "lr",
    "mask_ratio",
    "keep_ratio",
    "drop_layers",
    "drop_ratio",
    "weights",
    "which",
    "threads",
    "tune",
    "workers",
    "seed",
    "out",
];

/// How the setting `key` is typed: its flag if it has one, else `--set key`.
pub fn flag(key: &str) -> String {
    if FLAGS.contains(&key) {
        format!("--{}", key.replace('_', "-"))
    } else {
        format!("--set {key}")
    }
}

/// A configuration error with the flag in place of the field.
fn config_message(error: &ConfigError) -> String {
    let text = error.to_string();
    let end = text
        .find(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
        .unwrap_or(text.len());
    let (field, rest) = text.split_at(end);
    format!("{}{rest}", flag(field))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of the system's own errors those that the user can mend say how.
    #[test]
    fn errors_of_the_system_have_advice() {
        for (kind, advice) in [
            (ErrorKind::StorageFull, "free space"),
            (ErrorKind::PermissionDenied, "check its permissions"),
            (ErrorKind::NotFound, "check the path"),
        ] {
            let error = Error::Io {
                what: "--out 'x.onnx'".to_owned(),
                error: kind.into(),
            };
            let error = error.to_string();
            assert!(
                error.starts_with("--out 'x.onnx': ") && error.contains(advice),
                "{error}"
            );
        }
    }
}
