//! From a name to a backend.

use pcae_backend_cpu::{Bf16Unit, Cpu, Isa, Precision as CpuPrecision};
use pcae_backend_cuda::{Cuda, Error as CudaError, FP8_WIDTH, Precision as CudaPrecision};
use pcae_kernel::backend::TrainBackend;
use pcae_kernel::config::{PretrainConfig, Target};
use pcae_kernel::op::Op;
use pcae_kernel::reference::Reference;
use pcae_kernel::sizing::{Memory, Sizes, Sizing};

use crate::bench::describe;
use crate::data::loader;
use crate::data::regularize::Augmentation;
use crate::error::Error;
use crate::settings::{BackendKind, Machine, Precision};
use crate::training::plan::MAX_THREADS;

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

/// Something to make with a backend that it keeps.
pub trait Build {
    /// What comes of it.
    type Output;

    /// Makes it. `name` as in [`Job::run`].
    ///
    /// # Errors
    /// Its own.
    fn build<B: TrainBackend + 'static>(
        self,
        backend: B,
        name: &str,
    ) -> Result<Self::Output, Error>;
}

/// Runs `job` on the backend that `machine` asks for.
///
/// # Errors
/// [`Error::Setting`] if there is no such backend on this machine, or the job's own.
pub fn run<J: Job>(machine: &Machine, job: J) -> Result<J::Output, Error> {
    struct ByReference<J>(J);
    impl<J: Job> Build for ByReference<J> {
        type Output = J::Output;

        fn build<B: TrainBackend + 'static>(
            self,
            mut backend: B,
            name: &str,
        ) -> Result<J::Output, Error> {
            let done = self.0.run(&mut backend, name);
            while let Some(warning) = backend.warning() {
                log::warn!("{warning}");
            }
            done
        }
    }
    build(machine, ByReference(job))
}

/// Gives `job` the backend that `machine` asks for.
///
/// # Errors
/// As [`run`].
pub fn build<J: Build>(machine: &Machine, job: J) -> Result<J::Output, Error> {
    let wrong = |name: &str, reason: String| {
        Err(Error::Setting {
            name: name.to_owned(),
            reason,
        })
    };
    if machine.tune && machine.backend != BackendKind::Cuda {
        log::warn!("--tune changes nothing without --backend cuda");
    }
    match (machine.backend, machine.precision()) {
        (BackendKind::Cpu, _) => {
            let backend = cpu(machine)?;
            let precision = |precision| match precision {
                CpuPrecision::F32 => "f32".to_owned(),
                CpuPrecision::Bf16(unit) => format!("bf16 by {unit}"),
            };
            let mut name = format!(
                "cpu ({}, {}, {}",
                backend.isa(),
                count(backend.threads(), "thread"),
                precision(backend.precisions().0)
            );
            if backend.precisions().1 != backend.precisions().0 {
                name += &format!(", teacher {}", precision(backend.precisions().1));
            }
            job.build(backend, &(name + ")"))
        }
        (BackendKind::Cuda, _) => {
            let mut backend = cuda(machine)?;
            while let Some(warning) = backend.warning() {
                log::warn!("{warning}");
            }
            let precision = match backend.precision() {
                CudaPrecision::F32 => "f32",
                CudaPrecision::Bf16 => "bf16",
            };
            let teacher = match backend.has_fp8_teacher() {
                true => ", teacher fp8",
                false => "",
            };
            let tuned = if machine.tune { ", tuned" } else { "" };
            let name = format!("cuda ({}, {precision}{teacher}{tuned})", backend.name());
            job.build(backend, &name)
        }
        (BackendKind::Reference, precision @ (Precision::Bf16 | Precision::Fp8)) => wrong(
            "--precision",
            format!(
                "expected f32 or f64 for --backend reference, found {}; use --backend cpu --precision bf16",
                name(precision)
            ),
        ),
        (BackendKind::Reference, _) if machine.teacher_precision.is_some() => wrong(
            "--teacher-precision",
            "expected none for --backend reference; use --backend cpu".to_owned(),
        ),
        (BackendKind::Reference, _) if machine.isa.is_some() => wrong(
            "--set isa",
            "expected none for --backend reference, which is scalar; use --backend cpu".to_owned(),
        ),
        (BackendKind::Reference, Precision::F32) => {
            job.build(Reference::<f32, _>::owned(), "reference (1 thread, f32)")
        }
        (BackendKind::Reference, Precision::F64) => {
            job.build(Reference::<f64, _>::owned(), "reference (1 thread, f64)")
        }
    }
}

/// Bytes that the task which `sizing` has seen takes from the backend that `machine` asks for.
///
/// # Errors
/// As [`run`].
pub fn memory(machine: &Machine, sizing: &Sizing) -> Result<Memory, Error> {
    match machine.backend {
        BackendKind::Cpu => {
            let (student, teacher) = cpu_precisions(machine)?;
            let threads = cpu_threads(machine)?;
            Ok(pcae_backend_cpu::memory(
                sizing,
                isa(machine)?,
                threads,
                (student, teacher),
            ))
        }
        BackendKind::Cuda => Ok(pcae_backend_cuda::memory(
            sizing,
            cuda_precision(machine)?,
            has_fp8_teacher(machine)?,
        )),
        BackendKind::Reference => {
            let Sizes {
                bufs,
                scores,
                ids,
                vectors,
                params,
                frozen,
                teacher_weights: _,
                values: _,
            } = sizing.sizes;
            let size = match machine.precision() {
                Precision::F64 => size_of::<f64>(),
                Precision::F32 | Precision::Bf16 | Precision::Fp8 => size_of::<f32>(),
            };
            // Of pivoted QR alone, one sequence at a time.
            let qr = sizing.ops().iter().map(|op| match op {
                Op::PivotedQr(dims) => dims.tokens.saturating_mul(dims.dim),
                _ => 0,
            });
            Ok(Memory {
                activations: ((bufs + scores) * size).saturating_add(ids * size_of::<u32>()),
                state: (vectors + params + frozen) * size,
                scratch: qr.max().unwrap_or(0) * size,
            })
        }
    }
}

/// Memory that a run may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Available {
    /// Bytes that nobody has.
    pub free: usize,
    /// Bytes of them that are better left, for what is not planned.
    pub margin: usize,
    /// Where, for messages.
    pub whose: &'static str,
}

/// The memory that the backend which `machine` asks for can have now.
///
/// On a device a thirty-second part and half a gigabyte are left: for kernels, graphs, libraries, and what the driver rounds up. On
/// the CPU a quarter: for data, evaluations and other programs.
///
/// # Errors
/// [`Error::Setting`] where the system does not say, [`Error::Backend`] if CUDA or a device is missing.
pub fn available(machine: &Machine) -> Result<Available, Error> {
    if machine.backend == BackendKind::Cuda {
        let free = pcae_backend_cuda::free_memory(0);
        let free = free.map_err(|error| Error::backend("cuda", error))?;
        return Ok(Available {
            free,
            margin: free / 32 + (512 << 20),
            whose: "on the device",
        });
    }
    let Some(free) = free_memory() else {
        return Err(Error::Setting {
            name: "--batch-size".to_owned(),
            reason: "expected a number of pictures: this system does not say how much memory is free, which \"auto\" needs"
                .to_owned(),
        });
    };
    Ok(Available {
        free,
        margin: free / 4,
        whose: "on this machine",
    })
}

/// That what is planned fits into a device, before anything of it is taken there.
///
/// # Errors
/// [`Error::Setting`] if it does not.
pub fn check_room(machine: &Machine, planned: Memory) -> Result<(), Error> {
    if machine.backend != BackendKind::Cuda {
        return Ok(());
    }
    match available(machine) {
        Ok(Available { free, .. }) if planned.total() > free => Err(Error::Setting {
            name: "--batch-size".to_owned(),
            reason: format!(
                "expected a batch that fits into the {:.2} GB which are free on the device, found one for which {} are planned; use \
                 --batch-size auto, or fewer pictures and --accum",
                free as f64 / 1e9,
                describe(planned)
            ),
        }),
        // That there is no device is said by whoever opens it.
        _ => Ok(()),
    }
}

/// Bytes that a loader's batches take from the same memory.
pub(crate) fn of_loader(machine: &Machine, augmentation: &Augmentation, batch: usize) -> usize {
    match machine.backend {
        BackendKind::Cuda => 0,
        BackendKind::Cpu | BackendKind::Reference => loader::memory(augmentation, batch),
    }
}

/// Whether the backend that `machine` asks for resizes crops beside the step: others would take as long as the loader's threads do.
pub(crate) fn resizes(machine: &Machine) -> bool {
    machine.backend == BackendKind::Cuda
}

/// Bytes that Linux can give to a program, and its control group lets it have.
fn free_memory() -> Option<usize> {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let free = field(&read("/proc/meminfo")?, "MemAvailable:")?.saturating_mul(1024);
    let group = |name: &str| read(&format!("/sys/fs/cgroup/memory.{name}"));
    let left = || {
        let number = |text: String| text.trim().parse::<usize>().ok();
        // What was read from files, and not lately, is given up first.
        let spare = field(&group("stat")?, "inactive_file").unwrap_or(0);
        let used = number(group("current")?)?.saturating_sub(spare);
        // Without a limit it is "max".
        Some(number(group("max")?)?.saturating_sub(used))
    };
    Some(left().map_or(free, |left| free.min(left)))
}

/// The number behind `name` in lines of names and numbers.
fn field(text: &str, name: &str) -> Option<usize> {
    let mut lines = text.lines().map(str::split_whitespace);
    let mut line = lines.find(|line| line.clone().next() == Some(name))?;
    line.nth(1)?.parse().ok()
}

/// What an operation reads and writes on the backend that `machine` asks for, in bytes and at least.
pub fn bytes(machine: &Machine) -> fn(&Op) -> u64 {
    let student = machine.precision();
    match (machine.backend, student) {
        (BackendKind::Cuda, Precision::Bf16) => {
            |op| pcae_backend_cuda::bytes(op, CudaPrecision::Bf16)
        }
        (BackendKind::Cuda, _) => |op| pcae_backend_cuda::bytes(op, CudaPrecision::F32),
        (BackendKind::Cpu | BackendKind::Reference, _) => {
            let is_bf16 = |precision| precision == Precision::Bf16;
            match [student, machine.teacher_precision.unwrap_or(student)].map(is_bf16) {
                [false, false] => |op| cpu_bytes(op, 0, 0),
                [false, true] => |op| cpu_bytes(op, 0, 2),
                [true, false] => |op| cpu_bytes(op, 4, 0),
                [true, true] => |op| cpu_bytes(op, 4, 2),
            }
        }
    }
}

/// Of 4 bytes each, though in bf16 some activations have 2. An update writes weights in bf16 too, for a student's forward and backward and for a
/// teacher's forward: so many bytes more for each parameter.
fn cpu_bytes(op: &Op, of_student: u64, of_teacher: u64) -> u64 {
    let packed = match *op {
        Op::AdamW { elements, followed } => {
            elements as u64 * of_student + followed as u64 * of_teacher
        }
        _ => 0,
    };
    4 * op.elements() + packed
}

/// The CPU backend with the instruction set and threads that `machine` asks for.
///
/// # Errors
/// [`Error::Setting`] if this CPU lacks the instruction set, the threads cannot be started, or the precision is f64.
pub fn cpu(machine: &Machine) -> Result<Cpu, Error> {
    let (student, teacher) = cpu_precisions(machine)?;
    match Cpu::with(isa(machine)?, cpu_threads(machine)?) {
        Ok(cpu) => Ok(cpu.precision(student).teacher_precision(teacher)),
        Err(error) => Err(Error::Setting {
            name: "--threads".to_owned(),
            reason: error.to_string(),
        }),
    }
}

/// The first device, in the precision that `machine` asks for.
///
/// # Errors
/// [`Error::Setting`] if a setting is not for it, [`Error::Backend`] if CUDA or a device is missing.
pub fn cuda(machine: &Machine) -> Result<Cuda, Error> {
    let wrong = |name: &str, reason: String| {
        Err(Error::Setting {
            name: name.to_owned(),
            reason,
        })
    };
    let precision = cuda_precision(machine)?;
    let fp8_teacher = has_fp8_teacher(machine)?;
    if machine.isa.is_some() {
        return wrong("--set isa", "expected none for --backend cuda".to_owned());
    }
    let mut cuda = Cuda::new(0, precision).map_err(|error| Error::backend("cuda", error))?;
    if fp8_teacher {
        cuda = cuda.with_fp8_teacher().or_else(|error| match error {
            CudaError::NoFp8 { .. } => wrong("--teacher-precision", error.to_string()),
            error => Err(Error::backend("cuda", error)),
        })?;
    }
    cuda.time_products(machine.tune);
    Ok(cuda)
}

/// Whether a teacher on CUDA is to be in fp8, or else in the student's precision.
fn has_fp8_teacher(machine: &Machine) -> Result<bool, Error> {
    match (machine.precision(), machine.teacher_precision) {
        (_, None) => Ok(false),
        (student, Some(teacher)) if student == teacher => Ok(false),
        (Precision::Bf16, Some(Precision::Fp8)) => Ok(true),
        (student, Some(teacher)) => Err(Error::Setting {
            name: "--teacher-precision".to_owned(),
            reason: format!(
                "expected the student's {0}, or fp8 beside bf16, for --backend cuda, found {1}; use --teacher-precision {0}",
                name(student),
                name(teacher)
            ),
        }),
    }
}

/// That the teacher which `machine` asks for can be one of `task`'s.
///
/// # Errors
/// [`Error::Setting`] for a teacher in fp8 of odd widths.
pub fn check_teacher(machine: &Machine, task: &PretrainConfig) -> Result<(), Error> {
    let has_teacher = matches!(task.target, Target::Teacher(_));
    if !has_teacher && machine.teacher_precision.is_some() {
        log::warn!("--teacher-precision changes nothing without a teacher");
    }
    if !has_teacher || machine.teacher_precision != Some(Precision::Fp8) {
        return Ok(());
    }
    let (dim, hidden) = (task.vit.embed_dim, task.vit.mlp_hidden());
    if [dim, hidden]
        .iter()
        .all(|width| width.is_multiple_of(FP8_WIDTH))
    {
        return Ok(());
    }
    Err(Error::Setting {
        name: "--teacher-precision".to_owned(),
        reason: format!(
            "fp8 expects an encoder of widths that are multiples of {FP8_WIDTH}, found {dim} with a hidden width of {hidden}; use --teacher-precision bf16"
        ),
    })
}

fn cuda_precision(machine: &Machine) -> Result<CudaPrecision, Error> {
    match machine.precision() {
        Precision::F32 => Ok(CudaPrecision::F32),
        Precision::Bf16 => Ok(CudaPrecision::Bf16),
        Precision::F64 => Err(Error::Setting {
            name: "--precision".to_owned(),
            reason: "expected f32 or bf16 for --backend cuda, found f64; use --backend reference"
                .to_owned(),
        }),
        Precision::Fp8 => Err(Error::Setting {
            name: "--precision".to_owned(),
            reason: "expected f32 or bf16 for --backend cuda, found fp8, which is for a teacher alone; use --precision bf16 --teacher-precision fp8"
                .to_owned(),
        }),
    }
}

fn cpu_threads(machine: &Machine) -> Result<usize, Error> {
    match machine.threads {
        0 => Ok(std::thread::available_parallelism().map_or(1, usize::from)),
        threads if threads <= MAX_THREADS => Ok(threads),
        threads => {
            let reason = format!("expected at most {MAX_THREADS}, found {threads}");
            Err(Error::Setting {
                name: "--threads".to_owned(),
                reason,
            })
        }
    }
}

/// Of trained parameters and of a teacher's.
fn cpu_precisions(machine: &Machine) -> Result<(CpuPrecision, CpuPrecision), Error> {
    let isa = isa(machine)?;
    let precision = |name: &str, precision| match precision {
        Precision::F32 => Ok(CpuPrecision::F32),
        Precision::Bf16 => Ok(CpuPrecision::Bf16(Bf16Unit::detect(isa))),
        Precision::F64 => Err(Error::Setting {
            name: name.to_owned(),
            reason: "expected f32 or bf16 for --backend cpu, found f64; use --backend reference"
                .to_owned(),
        }),
        Precision::Fp8 => Err(Error::Setting {
            name: name.to_owned(),
            reason: format!(
                "expected f32 or bf16 for --backend cpu, found fp8, which is for a teacher on --backend cuda; use {name} bf16"
            ),
        }),
    };
    let student = precision("--precision", machine.precision())?;
    let teacher = match machine.teacher_precision {
        Some(teacher) => precision("--teacher-precision", teacher)?,
        None => student,
    };
    Ok((student, teacher))
}

/// The instruction set that `machine` asks for, or the best there is.
///
/// # Errors
/// [`Error::Setting`] if this CPU lacks it.
pub fn isa(machine: &Machine) -> Result<Isa, Error> {
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

/// As it is typed.
fn name(precision: Precision) -> &'static str {
    match precision {
        Precision::F32 => "f32",
        Precision::F64 => "f64",
        Precision::Bf16 => "bf16",
        Precision::Fp8 => "fp8",
    }
}

/// `1 thread`, `2 threads`.
pub fn count(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::Settings;

    #[test]
    fn an_update_writes_weights_in_bf16_too() {
        let update = Op::AdamW {
            elements: 100,
            followed: 30,
        };
        let (f32, bf16) = (Precision::F32, Precision::Bf16);
        for (student, teacher, expected) in [
            (f32, None, 100 * 32 + 30 * 8),
            (f32, Some(bf16), 100 * 32 + 30 * 10),
            (bf16, Some(f32), 100 * 36 + 30 * 8),
            (bf16, None, 100 * 36 + 30 * 10),
        ] {
            let machine = Machine {
                precision: Some(student),
                teacher_precision: teacher,
                ..Settings::default().machine
            };
            assert_eq!(
                bytes(&machine)(&update),
                expected,
                "{student:?} {teacher:?}"
            );
        }
    }

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let text = "MemTotal:       24683656 kB\nMemFree:  7 kB\nMemAvailable:   23589776 kB\ninactive_file 12\n";
        assert_eq!(field(text, "MemAvailable:"), Some(23_589_776));
        assert_eq!(field(text, "inactive_file"), Some(12));
        assert_eq!(field(text, "Mem"), None);
        assert_eq!(field("MemAvailable: some", "MemAvailable:"), None);
    }
}
