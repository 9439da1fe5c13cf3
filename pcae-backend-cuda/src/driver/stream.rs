//! Work on the device: in order, as a graph, and the points in between.

use core::ffi::c_void;
use core::fmt;
use core::mem::MaybeUninit;
use std::sync::Arc;

use cudarc::driver::{result, sys};

use super::failure::{check, failed};
use super::{Context, DevicePtr, Function, Plain};
use crate::error::Error;
use crate::versions;

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
        let mut milliseconds = 0.0;
        if self.context.driver >= versions::CLOCK {
            // SAFETY: both created by `with`; writes one number.
            check("cuEventElapsedTime_v2", unsafe {
                sys::cuEventElapsedTime_v2(&raw mut milliseconds, before.raw, self.raw).result()
            })?;
        } else {
            // cudarc has only the newer one, and panics where that is missing. This one every driver has, with the same arguments.
            type Elapsed =
                unsafe extern "C" fn(*mut f32, sys::CUevent, sys::CUevent) -> sys::CUresult;
            // SAFETY: a library that was found before; the function's type is that of `cuda.h`.
            let elapsed = unsafe { sys::culib().get::<Elapsed>(c"cuEventElapsedTime") };
            let elapsed = elapsed.map_err(|error| Error::Driver {
                call: "cuEventElapsedTime",
                error: format!("not found: {error}"),
            })?;
            // SAFETY: as above.
            check("cuEventElapsedTime", unsafe {
                elapsed(&raw mut milliseconds, before.raw, self.raw).result()
            })?;
        }
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

/// Whose blocks a device begins with, where those of several streams wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Priority {
    /// Before all others.
    First,
    /// In what others leave free.
    Last,
}

impl Stream {
    /// One that does not wait for the default stream.
    pub(crate) fn new(context: &Arc<Context>, priority: Priority) -> Result<Self, Error> {
        context.bind()?;
        let (least, greatest) = result::stream::get_priority_range()
            .map_err(|error| failed("cuCtxGetStreamPriorityRange", error))?;
        let priority = match priority {
            Priority::First => greatest,
            Priority::Last => least,
        };
        let kind = result::stream::StreamKind::NonBlocking;
        let raw = result::stream::create_with_priority(kind, priority)
            .map_err(|error| failed("cuStreamCreateWithPriority", error))?;
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
