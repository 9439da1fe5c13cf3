//! The driver: owners of what it hands out, which give it back when they are dropped.
//!
//! Of the driver's functions these are called, here and nowhere else, each loaded when it is first called:
//!
//! - `cuInit`, `cuDriverGetVersion`, `cuGetErrorName`, `cuGetErrorString`
//! - `cuDeviceGetCount`, `cuDeviceGet`, `cuDeviceGetName`, `cuDeviceGetAttribute`, `cuDevicePrimaryCtxRetain`,
//!   `cuDevicePrimaryCtxRelease_v2`, `cuCtxSetCurrent`
//! - `cuMemAlloc_v2`, `cuMemFree_v2`, `cuMemGetInfo_v2`, `cuMemHostAlloc`, `cuMemFreeHost`
//! - `cuStreamCreate`, `cuStreamDestroy_v2`, `cuStreamSynchronize`, `cuStreamWaitEvent`, `cuEventCreate`, `cuEventRecord`, `cuEventSynchronize`,
//!   `cuEventElapsedTime_v2`, `cuEventDestroy_v2`
//! - `cuMemcpyHtoDAsync_v2`, `cuMemcpyDtoHAsync_v2`, `cuMemcpyDtoDAsync_v2`, `cuMemsetD8Async`
//! - `cuModuleLoadData`, `cuModuleUnload`, `cuModuleGetFunction`, `cuFuncSetAttribute`, `cuLaunchKernel`
//! - `cuStreamBeginCapture_v2`, `cuStreamEndCapture`, `cuGraphInstantiateWithFlags`, `cuGraphLaunch`,
//!   `cuGraphExecDestroy`, `cuGraphDestroy`
//!
//! `versions.rs` calls of cuBLASLt: `cublasLtGetVersion`.
//!
//! `compile.rs` calls of NVRTC: `nvrtcVersion`, `nvrtcGetNumSupportedArchs`, `nvrtcGetSupportedArchs`, `nvrtcCreateProgram`,
//! `nvrtcCompileProgram`, `nvrtcGetProgramLogSize`, `nvrtcGetProgramLog`, `nvrtcGetCUBINSize`, `nvrtcGetCUBIN`,
//! `nvrtcGetPTXSize`, `nvrtcGetPTX`, `nvrtcDestroyProgram`.
//!
//! `gemm.rs` and `gemm/plan.rs` call of cuBLASLt: `cublasLtCreate`, `cublasLtDestroy`, `cublasLtMatmulDescCreate`,
//! `cublasLtMatmulDescSetAttribute` (TRANSA, TRANSB, EPILOGUE, BIAS_POINTER), `cublasLtMatmulDescDestroy`,
//! `cublasLtMatrixLayoutCreate`, `cublasLtMatrixLayoutDestroy`, `cublasLtMatmulPreferenceCreate`,
//! `cublasLtMatmulPreferenceSetAttribute` (REDUCTION_SCHEME_MASK, MAX_WORKSPACE_BYTES, MIN_ALIGNMENT_{A,B,C,D}_BYTES),
//! `cublasLtMatmulPreferenceDestroy`, `cublasLtMatmulAlgoGetHeuristic`, `cublasLtMatmul`.

use core::ffi::{CStr, c_int, c_void};
use core::fmt;
use core::mem::MaybeUninit;
use core::ptr::NonNull;
use std::ffi::CString;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::result::DriverError;
use cudarc::driver::{result, sys};

use crate::error::Error;
use crate::versions::{self, Version};

/// The oldest devices that have bf16 in their tensor cores and asynchronous copies.
const OLDEST: u32 = 80;

/// What every block of memory is a multiple of.
pub(crate) const GRAIN: usize = 256;

/// A place in device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct DevicePtr(pub(crate) u64);

impl DevicePtr {
    /// `bytes` further on.
    pub(crate) fn plus(self, bytes: usize) -> Self {
        Self(self.0.wrapping_add(bytes as u64))
    }
}

/// Names a failed call.
fn check(call: &'static str, result: Result<(), DriverError>) -> Result<(), Error> {
    result.map_err(|error| failed(call, error))
}

fn failed(call: &'static str, error: DriverError) -> Error {
    Error::Driver {
        call,
        error: meaning(error),
    }
}

/// Names a failed call and what it was about.
fn explained(call: &'static str, about: &str, error: DriverError) -> Error {
    Error::Driver {
        call,
        error: format!("{} ({about})", meaning(error)),
    }
}

fn meaning(error: DriverError) -> String {
    let text =
        |text: Result<&CStr, DriverError>| text.map(|text| text.to_string_lossy().into_owned());
    match (text(error.error_name()), text(error.error_string())) {
        (Ok(name), Ok(meaning)) => format!("{name}, {meaning}"),
        _ => format!("error {}", error.0 as u32),
    }
}

/// The names under which cudarc looks for a library, the usual ones first.
fn names(library: &str) -> String {
    cudarc::get_lib_name_candidates(library)
        .into_iter()
        .filter(|name| !name.contains("64")) // those of Windows
        .collect::<Vec<_>>()
        .join(", ")
}

/// Looks for all libraries: cudarc panics where it calls one that is not there.
///
/// # Errors
/// [`Error::Library`] for the first that is missing.
pub(crate) fn libraries() -> Result<(), Error> {
    driver_library()?;
    nvrtc_library()?;
    // SAFETY: loads a library by name, as any program that uses it does.
    if !unsafe { cudarc::cublaslt::sys::is_culib_present() } {
        return Err(Error::Library {
            what: "cuBLASLt",
            names: names("cublasLt"),
            advice: "install a CUDA toolkit or the wheel nvidia-cublas and put its library folder into LD_LIBRARY_PATH, or use --backend cpu",
        });
    }
    Ok(())
}

fn driver_library() -> Result<(), Error> {
    // SAFETY: as above.
    if unsafe { sys::is_culib_present() } {
        return Ok(());
    }
    Err(Error::Library {
        what: "CUDA driver",
        names: names("cuda"),
        advice: "install NVIDIA's driver, or use --backend cpu",
    })
}

/// Looks for NVRTC, which works without a device and its driver.
///
/// # Errors
/// [`Error::Library`] if it is missing.
pub(crate) fn nvrtc_library() -> Result<(), Error> {
    // SAFETY: as above.
    if unsafe { cudarc::nvrtc::sys::is_culib_present() } {
        return Ok(());
    }
    Err(Error::Library {
        what: "NVRTC",
        names: names("nvrtc"),
        advice: "install a CUDA toolkit or the wheel nvidia-cuda-nvrtc and put its library folder into LD_LIBRARY_PATH, or use --backend cpu",
    })
}

/// How many devices the driver sees.
///
/// # Errors
/// [`Error::Library`] without a driver, [`Error::Driver`] if it fails to start.
pub fn device_count() -> Result<usize, Error> {
    driver_library()?;
    match result::init() {
        // What a driver says that finds no device at all.
        Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => return Ok(0),
        other => check("cuInit", other)?,
    }
    let count = result::device::get_count().map_err(|error| failed("cuDeviceGetCount", error))?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// Bytes of the memory of device number `device`, counted from 0, that nobody has, while a context is there.
///
/// # Errors
/// [`Error::Library`] without a driver, [`Error::Device`] if there is no such device, [`Error::Driver`] if the driver fails.
pub fn free_memory(device: usize) -> Result<usize, Error> {
    Context::new(device)?.free_memory()
}

/// A device and its primary context.
#[derive(Debug)]
pub(crate) struct Context {
    device: sys::CUdevice,
    raw: sys::CUcontext,
    /// The device's name.
    pub(crate) name: String,
    /// Compute capability, as 90 for 9.0.
    pub(crate) capability: u32,
    /// Streaming multiprocessors.
    pub(crate) multiprocessors: u32,
    /// Dynamic shared memory that a block may ask for, in bytes.
    pub(crate) shared: u32,
    /// The newest CUDA that the driver knows.
    pub(crate) driver: Version,
}

// SAFETY: contexts may be used by any thread that makes them current, and by several at once.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// The primary context of device number `asked`, current on this thread.
    pub(crate) fn new(asked: usize) -> Result<Arc<Self>, Error> {
        let found = device_count()?;
        let ordinal = match c_int::try_from(asked) {
            Ok(ordinal) if asked < found => ordinal,
            _ => return Err(Error::Device { asked, found }),
        };
        let device = result::device::get(ordinal).map_err(|error| failed("cuDeviceGet", error))?;
        let name =
            result::device::get_name(device).map_err(|error| failed("cuDeviceGetName", error))?;
        let attribute = |attribute| {
            // SAFETY: the device is one that the driver gave.
            unsafe { result::device::get_attribute(device, attribute) }
                .map(|value| u32::try_from(value).unwrap_or(0))
                .map_err(|error| failed("cuDeviceGetAttribute", error))
        };
        use sys::CUdevice_attribute as A;
        let capability = attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? * 10
            + attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        if capability < OLDEST {
            return Err(Error::TooOld { name, capability });
        }
        let multiprocessors = attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let shared = attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let mut driver: c_int = 0;
        // SAFETY: writes one integer.
        check("cuDriverGetVersion", unsafe {
            sys::cuDriverGetVersion(&raw mut driver).result()
        })?;
        // SAFETY: the device is one that the driver gave. `Drop` releases what is retained.
        let raw = unsafe { result::primary_ctx::retain(device) }
            .map_err(|error| failed("cuDevicePrimaryCtxRetain", error))?;
        let context = Arc::new(Self {
            device,
            raw,
            name,
            capability,
            multiprocessors,
            shared,
            driver: Version::of_driver(u32::try_from(driver).unwrap_or(0)),
        });
        context.bind()?;
        Ok(context)
    }

    /// Makes it current on this thread: what every other call of the driver needs.
    pub(crate) fn bind(&self) -> Result<(), Error> {
        // SAFETY: retained until `self` is dropped.
        check("cuCtxSetCurrent", unsafe {
            result::ctx::set_current(self.raw)
        })
    }

    fn allocate(&self, bytes: usize) -> Result<Block, Error> {
        self.bind()?;
        // An empty buffer has a place too.
        let bytes = bytes
            .max(1)
            .checked_next_multiple_of(GRAIN)
            .unwrap_or(bytes);
        // SAFETY: no requirement but a current context.
        match unsafe { result::malloc_sync(bytes) } {
            Ok(at) => Ok(Block {
                at: DevicePtr(at),
                bytes,
            }),
            Err(DriverError(
                sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY | sys::CUresult::CUDA_ERROR_INVALID_VALUE,
            )) => Err(Error::OutOfMemory {
                bytes,
                free: result::mem_get_info().map_or(0, |(free, _)| free),
            }),
            Err(error) => Err(failed("cuMemAlloc_v2", error)),
        }
    }

    /// Bytes of the device's memory that nobody has.
    pub(crate) fn free_memory(&self) -> Result<usize, Error> {
        self.bind()?;
        match result::mem_get_info() {
            Ok((free, _)) => Ok(free),
            Err(error) => Err(failed("cuMemGetInfo_v2", error)),
        }
    }

    /// Waits for work that is still running on it.
    fn free(&self, block: Block) {
        if self.bind().is_ok() {
            // SAFETY: allocated above, and its owner gives it up. There is nobody to tell of a failure: one that work
            // before it has caused is found by the next call.
            let _ = unsafe { result::free_sync(block.at.0) };
        }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained by `new`; everything made in it holds an `Arc` of it and is gone.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

/// Allocated memory of which nobody is the owner yet, or any more.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Block {
    pub(crate) at: DevicePtr,
    pub(crate) bytes: usize,
}

impl Block {
    /// Whether a place may lie in it.
    pub(crate) fn contains(self, at: u64) -> bool {
        at.wrapping_sub(self.at.0) < self.bytes as u64
    }
}

/// Where memory of a queue comes from and goes to.
///
/// A buffer may be dropped while work that is queued, or running, still refers to it. So it is only noted then, and freed by the
/// queue after that work; without a queue there is no such work.
#[derive(Debug)]
pub(crate) struct Heap {
    context: Arc<Context>,
    /// Of buffers that were dropped; `None` once the queue is gone.
    dropped: Mutex<Option<Vec<Block>>>,
    /// Bytes that are allocated.
    taken: AtomicUsize,
}

impl Heap {
    pub(crate) fn new(context: Arc<Context>) -> Arc<Self> {
        Arc::new(Self {
            context,
            dropped: Mutex::new(Some(Vec::new())),
            taken: AtomicUsize::new(0),
        })
    }

    fn dropped(&self) -> std::sync::MutexGuard<'_, Option<Vec<Block>>> {
        self.dropped.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Memory with any content.
    pub(crate) fn allocate(self: &Arc<Self>, bytes: usize) -> Result<Memory, Error> {
        let block = self.context.allocate(bytes)?;
        self.taken.fetch_add(block.bytes, Ordering::Relaxed);
        Ok(Memory {
            block,
            heap: Arc::clone(self),
        })
    }

    /// Bytes that are allocated, those of dropped buffers too until they are freed.
    pub(crate) fn taken(&self) -> usize {
        self.taken.load(Ordering::Relaxed)
    }

    /// Whether a buffer was dropped since the last [`Heap::take`].
    pub(crate) fn has_dropped(&self) -> bool {
        self.dropped()
            .as_ref()
            .is_some_and(|blocks| !blocks.is_empty())
    }

    /// What was dropped, to be given to [`Heap::free`] when no work refers to it any more.
    pub(crate) fn take(&self) -> Vec<Block> {
        self.dropped()
            .as_mut()
            .map(core::mem::take)
            .unwrap_or_default()
    }

    /// Frees memory that no work refers to, and that no graph does.
    pub(crate) fn free_at_once(&self, memory: Memory) {
        let block = memory.block;
        // Noted as all that is dropped, and then not left to the queue.
        drop(memory);
        let noted = self.dropped().as_mut().is_some_and(|blocks| {
            let before = blocks.len();
            blocks.retain(|dropped| dropped.at != block.at);
            blocks.len() < before
        });
        if noted {
            self.free(&[block]);
        }
    }

    pub(crate) fn free(&self, blocks: &[Block]) {
        for block in blocks {
            self.context.free(*block);
            self.taken.fetch_sub(block.bytes, Ordering::Relaxed);
        }
    }

    /// Frees what was dropped, and from now on what is dropped at once. All work must be done.
    pub(crate) fn close(&self) {
        let blocks = self.dropped().take().unwrap_or_default();
        self.free(&blocks);
    }
}

impl Drop for Heap {
    fn drop(&mut self) {
        // Of a queue that was not finished. All its memory is dropped, and no work was ever queued.
        self.close();
    }
}

/// Memory on the device, given back when dropped.
#[derive(Debug)]
pub(crate) struct Memory {
    heap: Arc<Heap>,
    block: Block,
}

impl Memory {
    pub(crate) fn at(&self) -> DevicePtr {
        self.block.at
    }

    pub(crate) fn bytes(&self) -> usize {
        self.block.bytes
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let mut dropped = self.heap.dropped();
        match dropped.as_mut() {
            Some(blocks) => blocks.push(self.block),
            None => self.heap.free(&[self.block]),
        }
    }
}

/// Numbers that any bytes are, of at most the alignment of pinned memory.
pub(crate) trait Plain: Copy {}

impl Plain for u8 {}
impl Plain for u16 {}
impl Plain for u32 {}
impl Plain for f32 {}

/// Memory of the host that the device copies from and to by itself.
#[derive(Debug)]
pub(crate) struct Pinned {
    context: Arc<Context>,
    at: NonNull<u8>,
    bytes: usize,
}

// SAFETY: memory of the whole process, reached through `&mut self` alone.
unsafe impl Send for Pinned {}
// SAFETY: as above; `&self` gives nothing but numbers.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// Zeros.
    pub(crate) fn new(context: &Arc<Context>, bytes: usize) -> Result<Self, Error> {
        context.bind()?;
        // SAFETY: no requirement but a current context.
        let at = unsafe { result::malloc_host(bytes, 0) }
            .map_err(|error| failed("cuMemHostAlloc", error))?;
        let Some(at) = NonNull::new(at.cast::<u8>()) else {
            return Err(Error::Driver {
                call: "cuMemHostAlloc",
                error: "no memory".to_owned(),
            });
        };
        // SAFETY: as many bytes as were allocated, which nobody else knows yet.
        unsafe { at.write_bytes(0, bytes) };
        Ok(Self {
            context: Arc::clone(context),
            at,
            bytes,
        })
    }

    /// `len` numbers from byte `at` on.
    ///
    /// # Safety
    /// No copy that is under way may touch them.
    ///
    /// # Panics
    /// If they do not lie within, or not on their alignment.
    pub(crate) unsafe fn part<T: Plain>(&mut self, at: usize, len: usize) -> &mut [T] {
        let bytes = len.checked_mul(size_of::<T>());
        assert!(
            bytes.and_then(|bytes| bytes.checked_add(at)) <= Some(self.bytes)
                && bytes.is_some()
                && at.is_multiple_of(align_of::<T>())
        );
        // SAFETY: within the memory and aligned, both checked (pages are aligned to more than any number); initialised by
        // `new`; any bytes are a `Plain`; nobody else writes, by the caller.
        unsafe { core::slice::from_raw_parts_mut(self.at.add(at).cast().as_ptr(), len) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: allocated by `new`. The owner's streams are done: see `Queue::drop`.
            let _ = unsafe { result::free_host(self.at.as_ptr().cast()) };
        }
    }
}

/// A point in a stream's work.
#[derive(Debug)]
pub(crate) struct Event {
    context: Arc<Context>,
    raw: sys::CUevent,
}

// SAFETY: events may be used by any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// One that is reached already.
    pub(crate) fn new(context: &Arc<Context>) -> Result<Self, Error> {
        Self::with(context, sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
    }

    /// One that keeps when it is reached.
    pub(crate) fn timed(context: &Arc<Context>) -> Result<Self, Error> {
        Self::with(context, sys::CUevent_flags::CU_EVENT_DEFAULT)
    }

    fn with(context: &Arc<Context>, flags: sys::CUevent_flags) -> Result<Self, Error> {
        context.bind()?;
        let raw = result::event::create(flags).map_err(|error| failed("cuEventCreate", error))?;
        Ok(Self {
            context: Arc::clone(context),
            raw,
        })
    }

    /// Waits until the work before it is done.
    pub(crate) fn wait(&self) -> Result<(), Error> {
        // SAFETY: created by `new`.
        check("cuEventSynchronize", unsafe {
            result::event::synchronize(self.raw)
        })
    }

    /// Seconds between two of [`Event::timed`] that were recorded and waited for.
    pub(crate) fn seconds_since(&self, before: &Self) -> Result<f64, Error> {
        let driver = self.context.driver;
        if driver < versions::CLOCK {
            // cudarc would look for a function that is not there.
            return Err(Error::Version {
                what: "the CUDA driver",
                found: driver.to_string(),
                needed: format!("at least {} to time work on the device", versions::CLOCK),
                advice: "update NVIDIA's driver, or leave out what times it (bench, --tune)"
                    .to_owned(),
            });
        }
        // SAFETY: both created by `with`.
        let milliseconds = unsafe { result::event::elapsed(before.raw, self.raw) }
            .map_err(|error| failed("cuEventElapsedTime_v2", error))?;
        Ok(f64::from(milliseconds) / 1e3)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: created by `with`.
            let _ = unsafe { result::event::destroy(self.raw) };
        }
    }
}

/// Code on the device.
#[derive(Debug)]
pub(crate) struct Module {
    context: Arc<Context>,
    raw: sys::CUmodule,
}

// SAFETY: modules may be used by any thread.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

/// A kernel of a [`Module`], valid as long as that.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Function(sys::CUfunction);

// SAFETY: functions may be used by any thread.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

impl Module {
    /// Loads what NVRTC made: a cubin, or PTX with a zero at its end.
    pub(crate) fn new(context: &Arc<Context>, image: &[u8]) -> Result<Self, Error> {
        context.bind()?;
        // SAFETY: an image by the compiler (or the cache, by its sum), which says its length itself.
        let raw = unsafe { result::module::load_data(image.as_ptr().cast::<c_void>()) }.map_err(
            // An old driver may refuse what a new compiler makes.
            |error| {
                let driver = format!("the driver is for CUDA {}", context.driver);
                explained("cuModuleLoadData", &driver, error)
            },
        )?;
        Ok(Self {
            context: Arc::clone(context),
            raw,
        })
    }

    /// Its kernel of that name.
    pub(crate) fn function(&self, name: &'static str) -> Result<Function, Error> {
        let c_name = CString::new(name).unwrap_or_default();
        // SAFETY: loaded by `new`.
        unsafe { result::module::get_function(self.raw, c_name) }
            .map(Function)
            .map_err(|error| explained("cuModuleGetFunction", name, error))
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: loaded by `new`.
            let _ = unsafe { result::module::unload(self.raw) };
        }
    }
}

impl Function {
    /// Lets it be launched with this much dynamic shared memory, if it is more than any kernel may have.
    pub(crate) fn allow_shared(self, bytes: u32) -> Result<(), Error> {
        let bytes = c_int::try_from(bytes).unwrap_or(c_int::MAX);
        // SAFETY: a function of a loaded module.
        check("cuFuncSetAttribute", unsafe {
            result::function::set_function_attribute(
                self.0,
                sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                bytes,
            )
        })
    }
}

/// An executable graph.
#[derive(Debug)]
pub(crate) struct Graph {
    context: Arc<Context>,
    raw: sys::CUgraphExec,
}

// SAFETY: executable graphs may be used by any thread, by one at a time: launches take the `&mut` queue.
unsafe impl Send for Graph {}
// SAFETY: as above.
unsafe impl Sync for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: instantiated by `Stream::capture`. The driver keeps one that is running until it is done.
            let _ = unsafe { result::graph::exec_destroy(self.raw) };
        }
    }
}

/// Work that is done in order.
pub(crate) struct Stream {
    context: Arc<Context>,
    raw: sys::CUstream,
}

// SAFETY: streams may be used by any thread.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Stream({:p})", self.raw)
    }
}

impl Stream {
    /// One that does not wait for the default stream.
    pub(crate) fn new(context: &Arc<Context>) -> Result<Self, Error> {
        context.bind()?;
        let raw = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(|error| failed("cuStreamCreate", error))?;
        Ok(Self {
            context: Arc::clone(context),
            raw,
        })
    }

    /// For cuBLASLt.
    pub(crate) fn raw(&self) -> sys::CUstream {
        self.raw
    }

    /// Waits until all work is done.
    pub(crate) fn wait(&self) -> Result<(), Error> {
        // SAFETY: created by `new`.
        check("cuStreamSynchronize", unsafe {
            result::stream::synchronize(self.raw)
        })
    }

    /// Has `event` reached by the work so far.
    pub(crate) fn record(&self, event: &Event) -> Result<(), Error> {
        // SAFETY: both exist.
        check("cuEventRecord", unsafe {
            result::event::record(event.raw, self.raw)
        })
    }

    /// Has what comes later wait until `event` is reached, as it was last recorded; if it never was, for nothing.
    pub(crate) fn wait_for(&self, event: &Event) -> Result<(), Error> {
        // SAFETY: both exist.
        check("cuStreamWaitEvent", unsafe {
            result::stream::wait_event(
                self.raw,
                event.raw,
                sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT,
            )
        })
    }

    /// Copies to the device, later.
    ///
    /// # Safety
    /// The bytes of `from` stay as they are until the copy is done, and `to` is memory for them.
    pub(crate) unsafe fn upload<T: Plain>(&self, to: DevicePtr, from: &[T]) -> Result<(), Error> {
        // SAFETY: by the caller.
        check("cuMemcpyHtoDAsync_v2", unsafe {
            result::memcpy_htod_async(to.0, from, self.raw)
        })
    }

    /// Copies from the device, later.
    ///
    /// # Safety
    /// Nobody looks at `to` until the copy is done, and `from` is memory of as many.
    pub(crate) unsafe fn download<T: Plain>(
        &self,
        to: &mut [T],
        from: DevicePtr,
    ) -> Result<(), Error> {
        // SAFETY: by the caller.
        check("cuMemcpyDtoHAsync_v2", unsafe {
            result::memcpy_dtoh_async(to, from.0, self.raw)
        })
    }

    /// Copies within the device, later.
    ///
    /// # Safety
    /// Both are memory when the work is done, and do not overlap.
    pub(crate) unsafe fn copy(
        &self,
        to: DevicePtr,
        from: DevicePtr,
        bytes: usize,
    ) -> Result<(), Error> {
        // SAFETY: by the caller.
        check("cuMemcpyDtoDAsync_v2", unsafe {
            result::memcpy_dtod_async(to.0, from.0, bytes, self.raw)
        })
    }

    /// Sets bytes to zero, later.
    ///
    /// # Safety
    /// They are memory when the work is done.
    pub(crate) unsafe fn zero(&self, at: DevicePtr, bytes: usize) -> Result<(), Error> {
        // SAFETY: by the caller.
        check("cuMemsetD8Async", unsafe {
            result::memset_d8_async(at.0, 0, bytes, self.raw)
        })
    }

    /// Launches a kernel.
    ///
    /// # Safety
    /// `args` are as many as the kernel takes, each of at most 8 bytes, and what it makes of them is memory.
    pub(crate) unsafe fn launch(
        &self,
        function: Function,
        grid: [u32; 3],
        block: u32,
        shared: u32,
        args: &[u64],
    ) -> Result<(), Error> {
        let mut places = [core::ptr::null_mut::<c_void>(); MAX_ARGS];
        let places = &mut places[..args.len()];
        for (place, arg) in places.iter_mut().zip(args) {
            *place = core::ptr::from_ref(arg).cast_mut().cast();
        }
        // SAFETY: by the caller; the driver reads the arguments before it returns.
        check("cuLaunchKernel", unsafe {
            result::launch_kernel(
                function.0,
                grid.into(),
                (block, 1, 1),
                shared,
                self.raw,
                places,
            )
        })
    }

    /// Runs a graph of [`Stream::capture`].
    ///
    /// # Safety
    /// What its work refers to is still there.
    pub(crate) unsafe fn run(&self, graph: &Graph) -> Result<(), Error> {
        // SAFETY: both exist; by the caller.
        check("cuGraphLaunch", unsafe {
            result::graph::launch(graph.raw, self.raw)
        })
    }

    /// Makes a graph of what `work` puts into this stream, and runs none of it.
    ///
    /// Other threads may meanwhile do what they want; this one must do nothing that waits or allocates.
    pub(crate) fn capture(&self, work: impl FnOnce() -> Result<(), Error>) -> Result<Graph, Error> {
        const MODE: sys::CUstreamCaptureMode =
            sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: created by `new`.
        check("cuStreamBeginCapture_v2", unsafe {
            result::stream::begin_capture(self.raw, MODE)
        })?;
        let done = work();
        // The stream is of no use before this, whatever has happened.
        // SAFETY: created by `new`, and capturing.
        let graph = unsafe { result::stream::end_capture(self.raw) };
        // What `work` says comes first: a failure within breaks the capture too.
        let graph = match graph {
            Ok(graph) => graph,
            Err(error) => {
                return Err(done
                    .err()
                    .unwrap_or_else(|| failed("cuStreamEndCapture", error)));
            }
        };
        let mut raw = MaybeUninit::uninit();
        let made = done.and_then(|()| {
            // SAFETY: a graph by the driver; writes one pointer.
            check("cuGraphInstantiateWithFlags", unsafe {
                sys::cuGraphInstantiateWithFlags(raw.as_mut_ptr(), graph, 0).result()
            })
        });
        // SAFETY: by the driver, and the executable one is independent of it.
        let _ = unsafe { result::graph::destroy(graph) };
        made?;
        Ok(Graph {
            context: Arc::clone(&self.context),
            // SAFETY: written, as the call succeeded.
            raw: unsafe { raw.assume_init() },
        })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: created by `new`.
            let _ = unsafe { result::stream::destroy(self.raw) };
        }
    }
}

/// Arguments of a kernel at most.
pub(crate) const MAX_ARGS: usize = 32;

#[cfg(test)]
mod tests {
    /// A toolkit of either version may be what is there.
    #[test]
    fn libraries_of_cuda_12_and_13_are_looked_for() {
        for library in ["nvrtc", "cublasLt"] {
            let names = super::names(library);
            for version in ["", ".12", ".13"] {
                let name = format!("lib{library}.so{version}");
                let found = names.split(", ").any(|it| it == name);
                assert!(found || !cfg!(target_os = "linux"), "{name} in {names}");
            }
        }
    }
}
