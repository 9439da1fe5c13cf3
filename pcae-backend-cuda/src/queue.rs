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

mod reading;
mod upload;

use std::collections::VecDeque;
use std::sync::Arc;

use pcae_kernel::backend::RowDims;
use pcae_kernel::error::Error as KernelError;

use crate::Precision;
use crate::compile::Compiler;
use crate::driver::{
    Block, Context, DevicePtr, Event, Function, Graph, Heap, MAX_ARGS, Memory, Module, Pinned,
    Plain, Stream,
};
use crate::error::Error;
use crate::gemm::{Gemm, Matmul};
use crate::kernels::{File, KERNELS, Kernel};
use crate::ring::{PIECE, Ring, to_bf16};
use crate::sums::ColumnSums;
use crate::versions::{self, Version};
use crate::warnings::Warnings;
use reading::Reading;
use upload::Upload;
pub(crate) use upload::{crops, stages};

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
    heap: Arc<Heap>,

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
            changing_at: heap.allocate(CHANGING * size_of::<f32>())?,
            fault_at: heap.allocate(FAULT)?,
            workspace: None,
            gemm: Gemm::new(&context, &heap, precision)?,
            functions,
            _modules: modules,
            stream: Stream::new(&context)?,
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

    /// Queues a kernel.
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

    /// Runs what is queued, and does not wait for it.
    pub(crate) fn flush(&mut self) -> Result<(), Error> {
        if self.tape.is_empty() {
            return Ok(());
        }
        self.context.bind()?;
        let run = self.send_changing().and_then(|()| self.run());
        // After a failure too: what could not run once will not run the next time.
        self.clear();
        run
    }

    /// Forgets what is queued.
    fn clear(&mut self) {
        self.tape.clear();
        self.pieces = 0;
        self.changing.clear();
    }

    /// Runs what is queued and waits for it, and returns the error of a fault.
    pub(crate) fn wait(&mut self) -> Result<(), Error> {
        self.read_u32(&mut [], self.fault_at.at())
    }

    /// Starts a clock on the device. Until it is stopped, work is issued piece by piece and not made into graphs.
    ///
    /// The device is given something to do before, of no use to anybody, during which the host comes with the work: else its way to the
    /// device would count. It pushes some of what was read and written before out of the cache, too.
    pub(crate) fn start_clock(&mut self) -> Result<(), Error> {
        self.wait()?;
        if self.clocks.is_none() {
            let clock = || Event::timed(&self.context);
            self.clocks = Some([clock()?, clock()?]);
        }
        self.gemm.spoil_workspace(&self.stream)?;
        if let Some([started, _]) = &self.clocks {
            self.stream.record(started)?;
        }
        self.clock_runs = true;
        Ok(())
    }

    /// Waits as [`Queue::wait`], and returns the seconds since [`Queue::start_clock`] by the device's clock.
    pub(crate) fn stop_clock(&mut self) -> Result<f64, Error> {
        let flushed = self.flush();
        self.clock_runs = false;
        flushed?;
        if let Some([_, stopped]) = &self.clocks {
            self.stream.record(stopped)?;
        }
        self.wait()?;
        match &self.clocks {
            Some([started, stopped]) => stopped.seconds_since(started),
            None => Ok(0.0),
        }
    }

    fn send_changing(&mut self) -> Result<(), Error> {
        if self.changing.is_empty() {
            return Ok(());
        }
        let (changing, to) = (&self.changing, self.changing_at.at());
        self.ring.send(&self.stream, to, changing, |x| *x)
    }

    fn run(&mut self) -> Result<(), Error> {
        if self.clock_runs {
            self.runs.issued += 1;
            return self.issue();
        }
        self.clock += 1;
        let sum = sum(&self.tape);
        let same = |known: &&mut Known| known.sum == sum && known.tape == self.tape;
        if let Some(known) = self.known.iter_mut().find(same) {
            known.used = self.clock;
            self.runs.graphs += 1;
            // SAFETY: its graph refers to what its tape does, and `forget` drops it with that.
            return unsafe { self.stream.run(&known.graph) };
        }
        if self.pieces >= WORTH && self.seen.contains(&sum) && !self.refused.contains(&sum) {
            match self.capture(sum) {
                Ok(()) => {
                    self.runs.graphs += 1;
                    let known = self.known.last();
                    // SAFETY: as above.
                    return known.map_or(Ok(()), |known| unsafe { self.stream.run(&known.graph) });
                }
                Err(error) => {
                    // It may still run piece by piece, and says so if not.
                    if self.runs.refused == 0 {
                        self.warnings.add(format!(
                            "work that comes again does not become a graph, and the host issues it piece by piece, slower: {error}"
                        ));
                    }
                    self.runs.refused += 1;
                    remember(&mut self.refused, sum);
                }
            }
        }
        remember(&mut self.seen, sum);
        self.runs.issued += 1;
        self.issue()
    }

    /// Makes a graph of the tape.
    fn capture(&mut self, sum: u64) -> Result<(), Error> {
        let Self {
            stream,
            tape,
            functions,
            gemm,
            ..
        } = self;
        let graph = stream.capture(|| issue(stream, functions, gemm, tape))?;
        self.runs.made += 1;
        if self.known.len() == GRAPHS {
            let oldest = (0..GRAPHS).min_by_key(|i| self.known[*i].used);
            self.known.swap_remove(oldest.unwrap_or(0));
        }
        self.known.push(Known {
            sum,
            tape: self.tape.clone(),
            graph,
            used: self.clock,
        });
        Ok(())
    }

    /// Puts the tape's pieces into the stream.
    fn issue(&mut self) -> Result<(), Error> {
        issue(&self.stream, &self.functions, &mut self.gemm, &self.tape)
    }

    /// Copies f32 to the device, after what is queued.
    pub(crate) fn write_f32(&mut self, to: DevicePtr, from: &[f32]) -> Result<(), Error> {
        self.write(to, from, |x| *x)
    }

    /// Copies f32 to the device as bf16, rounded to nearest even.
    pub(crate) fn write_bf16(&mut self, to: DevicePtr, from: &[f32]) -> Result<(), Error> {
        self.write(to, from, |x| to_bf16(*x))
    }

    /// Copies f32 to the device in the format of activations.
    pub(crate) fn write_act(&mut self, to: DevicePtr, from: &[f32]) -> Result<(), Error> {
        match self.precision {
            Precision::F32 => self.write_f32(to, from),
            Precision::Bf16 => self.write_bf16(to, from),
        }
    }

    /// Copies indices to the device.
    pub(crate) fn write_u32(&mut self, to: DevicePtr, from: &[u32]) -> Result<(), Error> {
        self.write(to, from, |x| *x)
    }

    fn write<T, U: Plain>(
        &mut self,
        to: DevicePtr,
        from: &[T],
        convert: impl Fn(&T) -> U,
    ) -> Result<(), Error> {
        if from.is_empty() {
            return Ok(());
        }
        self.changes += 1;
        // What is queued reads what was there before.
        self.flush()?;
        self.context.bind()?;
        self.ring.send(&self.stream, to, from, convert)
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

/// Puts the pieces of `tape` into a stream.
fn issue(
    stream: &Stream,
    functions: &[Loaded],
    gemm: &mut Gemm,
    tape: &[u64],
) -> Result<(), Error> {
    let mut rest = tape;
    while let [first, after @ ..] = rest {
        rest = match first & 0xff {
            word::LAUNCH => {
                let [xy, z_block, shared, after @ ..] = after else {
                    break;
                };
                let (args, after) = after.split_at((first >> 32) as usize);
                let low = |x: u64| x as u32;
                // SAFETY: `Queue::launch` has checked their number; where they point, the operation that queued it has.
                unsafe {
                    stream.launch(
                        functions[usize::from((first >> 8) as u16)].function,
                        [low(*xy), low(*xy >> 32), low(*z_block)],
                        low(*z_block >> 32),
                        low(*shared),
                        args,
                    )?;
                }
                after
            }
            word::MATMUL => {
                let Some((words, after)) = after.split_first_chunk() else {
                    break;
                };
                let launch = |kernel: Kernel, shape: Shape, args: &[Arg]| {
                    let mut words = [0; MAX_ARGS];
                    let words = &mut words[..args.len()];
                    for (word, arg) in words.iter_mut().zip(args) {
                        *word = arg.0;
                    }
                    let function = functions[usize::from(kernel.id)].function;
                    // SAFETY: as below; `Gemm` passes what the kernel takes.
                    unsafe { stream.launch(function, shape.grid, shape.block, shape.shared, words) }
                };
                gemm.run(stream, &launch, &Matmul::from_words(words))?;
                after
            }
            word::COPY => {
                let [to, from, bytes, after @ ..] = after else {
                    break;
                };
                let bytes = *bytes as usize;
                // SAFETY: the operation that queued it has checked where both lie.
                unsafe { stream.copy(DevicePtr(*to), DevicePtr(*from), bytes)? };
                after
            }
            _ => {
                let [at, bytes, after @ ..] = after else {
                    break;
                };
                // SAFETY: the operation that queued it has checked where it lies.
                unsafe { stream.zero(DevicePtr(*at), *bytes as usize)? };
                after
            }
        };
    }
    Ok(())
}

fn remember(sums: &mut VecDeque<u64>, sum: u64) {
    if !sums.contains(&sum) {
        if sums.len() == SEEN {
            sums.pop_front();
        }
        sums.push_back(sum);
    }
}

/// Tells tapes apart; equal ones are compared word by word.
fn sum(tape: &[u64]) -> u64 {
    // The multiplier of FxHash, whose high bits depend on all words.
    tape.iter().fold(tape.len() as u64, |sum, word| {
        (sum.rotate_left(5) ^ word).wrapping_mul(0x517c_c1b7_2722_0a95)
    })
}

#[cfg(test)]
mod tests;
