//! `pcae export`.

use std::path::PathBuf;
use std::process::ExitCode;

use super::exchange::refuse_same;
use super::write_out;
use crate::checkpoint::Which;
use crate::checkpoint::export::{Storage, read, write};
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
    dtype: Storage,
    /// Which of its weights
    #[arg(long, value_enum, default_value = "student")]
    which: Which,
}

impl ExportArgs {
    pub(super) fn run(&self) -> Result<ExitCode, Error> {
        let encoder = read(&self.source, self.which)?;
        refuse_same(&encoder.path, &self.out)?;
        write_out(&format!("{}\n", encoder.report()))?;
        let written = write(&self.out, &encoder, self.dtype)?;
        write_out(&format!(
            "wrote {}: {}, {written}\n",
            self.out.display(),
            self.dtype
        ))?;
        Ok(ExitCode::SUCCESS)
    }
}
