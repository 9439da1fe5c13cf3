//! The command `pcae`.

use std::process::ExitCode;

fn main() -> ExitCode {
    pcae_train::cli::main()
}
