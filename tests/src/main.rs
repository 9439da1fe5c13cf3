//! The command `pcae` under a name of its own, so that the tests here can start and kill it.

use std::process::ExitCode;

fn main() -> ExitCode {
    pcae_train::cli::main()
}
