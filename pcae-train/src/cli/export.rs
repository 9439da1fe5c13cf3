//! `pcae export`.

use std::path::PathBuf;
use std::process::ExitCode;

use super::write_out;
use crate::checkpoint::Which;
use crate::checkpoint::exchange::Hints;
use crate::checkpoint::export::Storage;
use crate::error::Error;
use crate::output::{self, Kind};
use crate::trained::Trained;

#[derive(Debug, clap::Args)]
pub(super) struct ExportArgs {
    /// A run directory, a checkpoint, or what was exported before
    source: PathBuf,
    /// The file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Number format of the stored parameters
    #[arg(long, value_enum, default_value = "f32")]
    dtype: Storage,
    /// Which of its weights: student or teacher
    #[arg(long, value_enum, default_value = "student")]
    which: Which,
}

impl ExportArgs {
    pub(super) fn run(&self) -> Result<ExitCode, Error> {
        let trained = Trained::load(&self.source, self.which, &Hints::default())?;
        output::check("--out", &self.out, Kind::Safetensors, &[&trained.path])?;
        write_out(&format!("{}\n", trained.origin))?;
        let deployment = trained.deployment.as_ref();
        let written = trained.write(&self.out, self.dtype, deployment)?;
        write_out(&format!(
            "wrote {}: {}, {written}\n",
            self.out.display(),
            self.dtype
        ))?;
        Ok(ExitCode::SUCCESS)
    }
}
