//! Work for the device: noted first, run when the host wants to see something, and as one graph if it comes again.
//!
//! Operations only append to a *tape*. [`Queue::flush`] runs it: the first time by issuing each piece to the stream, which
//! also makes the libraries load what they need; when the same tape comes again it is captured into a graph, and from then on that graph
//! is launched. So a training step is one launch, without a line about graphs in a model. What changes from step to step and is no
//! buffer lies in device memory ([`Queue::changing`]), so that the tape stays the same.
//!
//! # What keeps what alive
//! - A buffer that is dropped is freed after the work that was queued or running then ([`Heap`]), and graphs that refer to
//!   it are dropped with it.
//! - Copies go through pinned memory of the queue's own, of which a part is used again only when an event behind its copy
//!   was reached.
//! - [`Queue`] waits for its streams before anything of it is dropped.
//!
//! # Bounds
//! [`GRAPHS`] graphs are kept, the one that was used longest ago goes first. A tape of more than [`TAPE`] words, or more than half of
//! the changing values, is run by itself. Nothing is allocated on the host or the device once tapes repeat.

mod profile;
mod reading;
mod running;
mod upload;
mod writing;

use std::collections::VecDeque;
use std::sync::Arc;

use pcae_kernel::backend::RowDims;
use pcae_kernel::error::Error as KernelError;

use crate::Precision;
use crate::compile::Compiler;
use crate::driver::{
    Block, Context, DevicePtr, Event, Function, Graph, Heap, MAX_ARGS, Memory, Module, Pinned,
    Priority, Stream,
};
use crate::error::Error;
use crate::gemm::{Gemm, Matmul};
use crate::kernels::{File, KERNELS, Kernel};
use crate::ring::{PIECE, Ring};
use crate::sums::ColumnSums;
use crate::versions::{self, Version};
use crate::warnings::Warnings;
pub use profile::KernelTime;
use profile::Profile;
use reading::Reading;
use upload::Upload;
pub(crate) use upload::{crops, stages, stages_of_values};

/// Graphs that are kept: of steps, of the last and shorter batch, of evaluations, at several sizes.
const GRAPHS: usize = 32;

/// Words of a tape that is run without being asked for: some thousand launches.
const TAPE: usize = 1 << 16;

/// Launches from which on a graph is worth its making.
const WORTH: usize = 3;

/// Tapes that ran once, of which the sum is remembered.
const SEEN: usize = 64;

/// Changing values that fit between two runs.
const CHANGING: usize = 16 * 1024;

/// Bytes of shared memory, static and dynamic, that a kernel may have without being asked for.
const SHARED: u32 = 48 * 1024;

/// Bytes on the device that a queue has for itself, beside its workspace.
pub(crate) const OWN: usize = CHANGING * size_of::<f32>() + FAULT;

/// Bytes of the fault's code and detail.
const FAULT: usize = 2 * size_of::<u32>();

/// Bytes of a kernel that something else than memory bounds, see [`KernelTime::bytes`].
pub(crate) const UNCOUNTED: usize = 0;

/// One argument of a kernel. Each is written into 8 bytes, of which the kernel reads as many as its type has, the low ones first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Arg(u64);

impl Arg {
    /// No place: what a kernel compares with `nullptr`.
    pub(crate) const NULL: Self = Self(0);
}

impl From<DevicePtr> for Arg {
    fn from(at: DevicePtr) -> Self {
        Self(at.0)
    }
}

impl From<Option<DevicePtr>> for Arg {
    fn from(at: Option<DevicePtr>) -> Self {
        at.map_or(Self::NULL, Self::from)
    }
}

impl From<u32> for Arg {
    fn from(x: u32) -> Self {
        Self(x.into())
    }
}

impl From<f32> for Arg {
    fn from(x: f32) -> Self {
        Self(x.to_bits().into())
    }
}

impl From<u64> for Arg {
    fn from(x: u64) -> Self {
        Self(x)
    }
}

/// How many blocks of how many threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    /// Blocks; none where one of them is 0.
    pub(crate) grid: [u32; 3],
    /// Threads of a block.
    pub(crate) block: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub(crate) shared: u32,
}

/// What a tape's pieces begin with.
mod word {
    pub(super) const LAUNCH: u64 = 0;
    pub(super) const MATMUL: u64 = 1;
    pub(super) const ZERO: u64 = 2;
    pub(super) const COPY: u64 = 3;
}

/// A tape that became a graph.
#[derive(Debug)]
struct Known {
    sum: u64,
    tape: Vec<u64>,
    graph: Graph,
    /// When it ran last.
    used: u64,
}

/// How work has run so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Runs {
    /// Tapes that were launched as a graph.
    pub graphs: u64,
    /// Tapes that were issued piece by piece.
    pub issued: u64,
    /// Graphs that were made.
    pub made: u64,
    /// Tapes that could not be made into a graph. They are issued.
    pub refused: u64,
    /// Products that a plain kernel computes because cuBLASLt has no algorithm for them, each counted once by its sizes, its operands'
    /// forms and their alignments.
    pub own_products: u64,
    /// Products whose bias is written to the output before them because cuBLASLt does not add it, counted likewise.
    pub spread_biases: u64,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Queue {
    pub(crate) context: Arc<Context>,
    pub(crate) precision: Precision,
    pub(crate) heap: Arc<Heap>,

    tape: Vec<u64>,
    /// Pieces of the tape.
    pieces: usize,
    /// Counts what may change memory, and the sums that were there at a count.
    changes: u64,
    sums: Option<(u64, ColumnSums)>,
    changing: Vec<f32>,
    /// Errors by their code, which is counted from 1.
    faults: Vec<KernelError>,

    known: Vec<Known>,
    /// Sums of tapes that ran once, the oldest of which goes first, and of those that cannot be captured.
    seen: VecDeque<u64>,
    refused: VecDeque<u64>,
    clock: u64,
    runs: Runs,
    warnings: Warnings,

    ring: Ring,
    upload: Upload,
    halves: [(Pinned, Event); 2],
    fault_seen: Pinned,
    reading: Reading,
    /// Where [`Queue::start_clock`] and [`Queue::stop_clock`] were, once there was one.
    clocks: Option<[Event; 2]>,
    clock_runs: bool,
    /// While kernels are timed.
    profile: Option<Profile>,

    changing_at: Memory,
    fault_at: Memory,
    workspace: Option<Memory>,

    pub(crate) gemm: Gemm,
    /// By the place in [`KERNELS`].
    functions: Vec<Loaded>,
    /// Whose functions those are.
    _modules: Vec<Module>,
    stream: Stream,
}

/// A kernel on the device.
#[derive(Clone, Copy, Debug)]
struct Loaded {
    function: Function,
    /// Shared memory, static and dynamic, that it may be launched with.
    shared: u32,
}

impl Queue {
    /// Compiles and loads all kernels.
    pub(crate) fn new(context: Arc<Context>, precision: Precision) -> Result<Self, Error> {
        let compiler = Compiler::new()?;
        let found = versions::Found {
            driver: context.driver,
            nvrtc: compiler.version(),
            cublas: Version::of_cublas_found(),
            needs_ptx: compiler.needs_ptx(context.capability),
        };
        found.check()?;
        let (images, warning) = compiler.all(&context, precision)?;
        let mut warnings = Warnings::default();
        if let Some(warning) = warning {
            warnings.add(warning);
        }
        let modules = images
            .iter()
            .map(|image| Module::new(&context, image))
            .collect::<Result<Vec<_>, _>>()?;
        let functions = KERNELS
            .iter()
            .map(|kernel| {
                let module = File::ALL.iter().position(|file| *file == kernel.file);
                let module = &modules[module.unwrap_or(0)];
                Ok(Loaded {
                    function: module.function(kernel.name)?,
                    shared: SHARED,
                })
            })
            .collect::<Result<Vec<_>, Error>>()?;
        let heap = Heap::new(Arc::clone(&context));
        let half = || Ok::<_, Error>((Pinned::new(&context, PIECE)?, Event::new(&context)?));
        let queue = Self {
            precision,
            tape: Vec::new(),
            pieces: 0,
            changes: 0,
            sums: None,
            changing: Vec::with_capacity(CHANGING),
            faults: Vec::with_capacity(64),
            known: Vec::new(),
            seen: VecDeque::with_capacity(SEEN),
            refused: VecDeque::new(),
            clock: 0,
            runs: Runs::default(),
            warnings,
            ring: Ring::new(&context)?,
            upload: Upload::new(&context)?,
            halves: [half()?, half()?],
            fault_seen: Pinned::new(&context, FAULT)?,
            reading: Reading::new(&context)?,
            clocks: None,
            clock_runs: false,
            profile: None,
            changing_at: heap.allocate(CHANGING * size_of::<f32>())?,
            fault_at: heap.allocate(FAULT)?,
            workspace: None,
            gemm: Gemm::new(&context, &heap, precision)?,
            functions,
            _modules: modules,
            stream: Stream::new(&context, Priority::First)?,
            heap,
            context,
        };
        let (at, bytes) = (queue.fault_at.at(), queue.fault_at.bytes());
        // SAFETY: allocated above, and kept.
        unsafe { queue.stream.zero(at, bytes)? };
        Ok(queue)
    }

    /// Zeros on the device. What was dropped is freed first.
    pub(crate) fn allocate(&mut self, bytes: usize) -> Result<Memory, Error> {
        self.collect()?;
        let memory = self.heap.allocate(bytes)?;
        self.changes += 1;
        // Nothing on the tape can refer to it yet.
        // SAFETY: just allocated; if it is dropped, the heap frees it behind this work.
        unsafe { self.stream.zero(memory.at(), memory.bytes())? };
        Ok(memory)
    }

    /// How work has run so far.
    pub(crate) fn runs(&self) -> Runs {
        Runs {
            own_products: self.gemm.fallbacks.own,
            spread_biases: self.gemm.fallbacks.spread,
            ..self.runs
        }
    }

    /// The next thing that is not as it should be, though everything works. Each is told once.
    pub(crate) fn warning(&mut self) -> Option<&str> {
        let other = self.warnings.next();
        other.or_else(|| self.gemm.fallbacks.warnings.next())
    }

    /// Bytes that are taken from the device.
    pub(crate) fn taken(&self) -> usize {
        self.heap.taken()
    }

    /// Frees what was dropped, after the work that may refer to it.
    fn collect(&mut self) -> Result<(), Error> {
        if !self.heap.has_dropped() {
            return Ok(());
        }
        self.flush()?;
        self.context.bind()?;
        self.upload.stream.wait()?;
        self.stream.wait()?;
        let blocks = self.heap.take();
        self.forget(&blocks);
        self.heap.free(&blocks);
        Ok(())
    }

    /// Drops graphs that refer to `blocks`. A number that is no place may look like one: then a graph is made again.
    fn forget(&mut self, blocks: &[Block]) {
        self.known.retain(|known| {
            let refers = |at: &u64| blocks.iter().any(|block| block.contains(*at));
            !known.tape.iter().any(refers)
        });
    }

    /// Memory for what one operation's kernels hand to each other, of at least `bytes`, with any content. The next
    /// operation gets the same.
    pub(crate) fn workspace(&mut self, bytes: usize) -> Result<DevicePtr, Error> {
        self.changes += 1;
        match &self.workspace {
            Some(memory) if memory.bytes() >= bytes => Ok(memory.at()),
            _ => {
                // Old and new are never there together.
                self.workspace = None;
                self.collect()?;
                let memory = self.heap.allocate(bytes)?;
                Ok(self.workspace.insert(memory).at())
            }
        }
    }

    /// Bytes of so many activations.
    pub(crate) const fn act_bytes(&self, len: usize) -> usize {
        len.saturating_mul(self.precision.size())
    }

    /// Queues a kernel that moves so many `bytes`, or [`UNCOUNTED`], see [`KernelTime::bytes`].
    ///
    /// # Errors
    /// [`Error::Launch`] if the device cannot run that many blocks or threads.
    ///
    /// # Panics
    /// If these are not the arguments that the kernel states.
    pub(crate) fn launch(
        &mut self,
        kernel: Kernel,
        shape: Shape,
        bytes: usize,
        args: &[Arg],
    ) -> Result<(), Error> {
        // The driver would read beyond them.
        assert!(
            args.len() == kernel.args as usize && args.len() <= MAX_ARGS,
            "{} takes {} arguments, found {}",
            kernel.name,
            kernel.args,
            args.len()
        );
        let Shape {
            grid: [x, y, z],
            block,
            shared,
        } = shape;
        if [x, y, z].contains(&0) {
            return Ok(());
        }
        let refuse = |expected, found: u32| Error::Launch {
            kernel: kernel.name,
            expected,
            found: found as usize,
        };
        if x > i32::MAX as u32 {
            return Err(refuse("fewer than 2^31 blocks", x));
        }
        if y.max(z) > u16::MAX.into() {
            return Err(refuse(
                "at most 65535 blocks in the second and third direction",
                y.max(z),
            ));
        }
        if block == 0 || block > kernel.threads {
            return Err(refuse("threads within its launch bounds", block));
        }
        let loaded = &mut self.functions[usize::from(kernel.id)];
        // Static and dynamic together.
        let all = shared.saturating_add(kernel.shared);
        if all > loaded.shared {
            if all > self.context.shared {
                return Err(refuse(
                    "as much shared memory as a block of this device can have",
                    all,
                ));
            }
            self.context.bind()?;
            loaded.function.allow_shared(shared)?;
            loaded.shared = all;
        }
        self.tape.extend_from_slice(&[
            word::LAUNCH | u64::from(kernel.id) << 8 | (args.len() as u64) << 32,
            u64::from(x) | u64::from(y) << 32,
            u64::from(z) | u64::from(block) << 32,
            shared.into(),
            bytes as u64,
        ]);
        self.tape.extend(args.iter().map(|arg| arg.0));
        self.appended()
    }

    /// Queues zeros.
    pub(crate) fn zero(&mut self, at: DevicePtr, bytes: usize) -> Result<(), Error> {
        if bytes == 0 {
            return Ok(());
        }
        self.tape
            .extend_from_slice(&[word::ZERO, at.0, bytes as u64]);
        self.appended()
    }

    /// Queues a copy within the device.
    pub(crate) fn copy(
        &mut self,
        to: DevicePtr,
        from: DevicePtr,
        bytes: usize,
    ) -> Result<(), Error> {
        if bytes == 0 {
            return Ok(());
        }
        self.tape
            .extend_from_slice(&[word::COPY, to.0, from.0, bytes as u64]);
        self.appended()
    }

    /// Copies within the device behind what is queued, which is run.
    pub(crate) fn copy_apart(
        &mut self,
        to: DevicePtr,
        from: DevicePtr,
        bytes: usize,
    ) -> Result<(), Error> {
        if bytes == 0 {
            return Ok(());
        }
        self.changes += 1;
        self.flush()?;
        self.context.bind()?;
        // SAFETY: the operation has checked where both lie.
        unsafe { self.stream.copy(to, from, bytes) }
    }

    /// Queues a matrix product.
    pub(crate) fn matmul(&mut self, matmul: Matmul) -> Result<(), Error> {
        if matmul.m == 0 || matmul.n == 0 {
            return Ok(());
        }
        self.tape.push(word::MATMUL);
        self.tape.extend_from_slice(&matmul.to_words());
        self.appended()
    }

    /// See [`Cuda::time_products`](crate::Cuda::time_products).
    pub(crate) fn time_products(&mut self, timed: bool) {
        self.gemm.time(timed);
    }

    /// Values that may be others the next time that the same work is queued: a place which holds them while the work runs that
    /// is queued *next*. Ask for it just before the launch that reads it.
    ///
    /// # Errors
    /// [`Error::Launch`] for more values than there is room for.
    pub(crate) fn changing(&mut self, values: &[f32]) -> Result<DevicePtr, Error> {
        let at = self.changing.len();
        if values.len() > CHANGING - at {
            return Err(Error::Launch {
                kernel: "with changing values",
                expected: "at most 8192 of them",
                found: values.len(),
            });
        }
        self.changing.extend_from_slice(values);
        Ok(self.changing_at.at().plus(at * size_of::<f32>()))
    }

    /// Where kernels report what they cannot work on: two u32, the first of which is 0 until then.
    ///
    /// A kernel that finds such a value does `atomicCAS(fault, 0, code)` with a code from [`Queue::code`], and if that
    /// returned 0, stores the offending index in the second.
    pub(crate) fn fault(&self) -> DevicePtr {
        self.fault_at.at()
    }

    /// The code by which a kernel reports `error`, whose `found` or `at` is filled in when it is read.
    pub(crate) fn code(&mut self, error: KernelError) -> u32 {
        let at = match self.faults.iter().position(|known| *known == error) {
            Some(at) => at,
            None => {
                self.faults.push(error);
                self.faults.len() - 1
            }
        };
        u32::try_from(at + 1).unwrap_or(u32::MAX)
    }

    /// Keeps sums over rows in the workspace, until anything else is queued.
    pub(crate) fn remember_sums(&mut self, sums: ColumnSums) {
        self.sums = Some((self.changes, sums));
    }

    /// The sums over rows of a matrix, if nothing was queued since they were made.
    pub(crate) fn sums_of(&self, of: DevicePtr, dims: RowDims) -> Option<ColumnSums> {
        let (changes, sums) = self.sums?;
        (changes == self.changes && (sums.of, sums.dims) == (of, dims)).then_some(sums)
    }

    fn appended(&mut self) -> Result<(), Error> {
        self.changes += 1;
        self.pieces += 1;
        if self.tape.len() > TAPE || self.changing.len() > CHANGING / 2 {
            self.flush()?;
        }
        Ok(())
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // Before pinned memory, graphs, modules and workspaces go. What is only queued is never seen by anybody.
        let _ = self.context.bind();
        let _ = self.upload.stream.wait();
        let _ = self.stream.wait();
        self.known.clear();
        self.heap.close();
    }
}

/// The error that a kernel reported.
fn fault(faults: &[KernelError], code: u32, detail: u32) -> Error {
    let known = (code as usize).checked_sub(1).and_then(|i| faults.get(i));
    match known {
        Some(error) => {
            let mut error = *error;
            match &mut error {
                KernelError::IndexOutOfRange { found, .. } => *found = detail as usize,
                KernelError::NotANumber { at, .. } => *at = detail as usize,
                _ => {}
            }
            Error::Kernel(error)
        }
        None => Error::Driver {
            call: "a kernel",
            error: format!("unknown fault {code}"),
        },
    }
}

#[cfg(test)]
mod tests;
