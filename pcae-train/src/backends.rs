//! From a name to a backend.

use pcae_backend_cpu::{Cpu, Isa};
use pcae_kernel::backend::TrainBackend;
use pcae_kernel::reference::Reference;

use crate::error::Error;
use crate::settings::{BackendKind, MAX_THREADS, Machine, Precision};

/// Something to do on whatever backend was asked for.
pub trait Job {
    /// What comes of it.
    type Output;

    /// Does it. `name` says what computes, for messages: `cpu (avx512, 2 threads, f32)`.
    ///
    /// # Errors
    /// The job's own.
    fn run<B: TrainBackend>(self, backend: &mut B, name: &str) -> Result<Self::Output, Error>;
}

/// Runs `job` on the backend that `machine` asks for.
///
/// # Errors
/// [`Error::Setting`] if there is no such backend on this machine, or the job's own.
pub fn run<J: Job>(machine: &Machine, job: J) -> Result<J::Output, Error> {
    let wrong = |name: &str, reason: String| {
        Err(Error::Setting {
            name: name.to_owned(),
            reason,
        })
    };
    match (machine.backend, machine.precision) {
        (BackendKind::Cpu, Precision::F32) => {
            let mut backend = cpu(machine)?;
            let name = format!(
                "cpu ({}, {}, f32)",
                backend.isa(),
                count(backend.threads(), "thread")
            );
            job.run(&mut backend, &name)
        }
        (BackendKind::Cpu, Precision::F64) => wrong(
            "--precision",
            "expected f32 for --backend cpu, found f64; use --backend reference".to_owned(),
        ),
        (BackendKind::Reference, _) if machine.isa.is_some() => wrong(
            "--set isa",
            "expected none for --backend reference, which is scalar; use --backend cpu".to_owned(),
        ),
        (BackendKind::Reference, Precision::F32) => job.run(
            &mut Reference::<f32, _>::owned(),
            "reference (1 thread, f32)",
        ),
        (BackendKind::Reference, Precision::F64) => job.run(
            &mut Reference::<f64, _>::owned(),
            "reference (1 thread, f64)",
        ),
    }
}

/// The CPU backend with the instruction set and threads that `machine` asks for.
///
/// # Errors
/// [`Error::Setting`] if this CPU lacks the instruction set or the threads cannot be started.
pub fn cpu(machine: &Machine) -> Result<Cpu, Error> {
    let threads = match machine.threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads if threads <= MAX_THREADS => threads,
        threads => {
            let reason = format!("expected at most {MAX_THREADS}, found {threads}");
            return Err(Error::Setting {
                name: "--threads".to_owned(),
                reason,
            });
        }
    };
    Cpu::with(isa(machine)?, threads).map_err(|error| Error::Setting {
        name: "--threads".to_owned(),
        reason: error.to_string(),
    })
}

fn isa(machine: &Machine) -> Result<Isa, Error> {
    let Some(name) = &machine.isa else {
        return Ok(Isa::detect());
    };
    Isa::available()
        .find(|isa| isa.to_string() == *name)
        .ok_or_else(|| {
            let available: Vec<String> = Isa::available().map(|isa| isa.to_string()).collect();
            let reason = format!(
                "expected one that this CPU has ({}), found {name}",
                available.join(", ")
            );
            Error::Setting {
                name: "--set isa".to_owned(),
                reason,
            }
        })
}

/// `1 thread`, `2 threads`.
pub fn count(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}
