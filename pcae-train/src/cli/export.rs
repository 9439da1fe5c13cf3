//! `pcae export`.

use std::path::PathBuf;
use std::process::ExitCode;

use super::write_out;
use crate::checkpoint::export::{Storage, Weights, read, write};
use crate::error::Error;

#[derive(Debug, clap::Args)]
pub(super) struct ExportArgs {
    /// A run directory, a checkpoint, or an exported encoder
    source: PathBuf,
    /// The file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Number format of the stored parameters
    #[arg(long, value_enum, default_value = "f32")]
    precision: Storage,
    /// Whose parameters
    #[arg(long, value_enum, default_value = "student")]
    weights: Weights,
}

impl ExportArgs {
    pub(super) fn run(&self) -> Result<ExitCode, Error> {
        let encoder = read(&self.source, self.weights)?;
        let same = match (encoder.path.canonicalize(), self.out.canonicalize()) {
            (Ok(source), Ok(out)) => source == out,
            _ => false,
        };
        if same {
            return Err(Error::Setting {
                name: "--out".to_owned(),
                reason: format!(
                    "expected another file than the one that is read, found '{}'",
                    self.out.display()
                ),
            });
        }
        write_out(&format!("{}\n", encoder.report()))?;
        let written = write(&self.out, &encoder, self.precision)?;
        write_out(&format!(
            "wrote {}: {}, {written}\n",
            self.out.display(),
            self.precision
        ))?;
        Ok(ExitCode::SUCCESS)
    }
}
