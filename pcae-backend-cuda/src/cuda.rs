//! The backend and its construction.

use core::fmt;

use crate::driver::{self, Context};
use crate::error::Error;
use crate::optimizer::Pieces;
use crate::queue::{KernelTime, Queue, Runs};

/// The format of activations, and of what products read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// f32 in all, multiplied in f32 and not in TF32.
    F32,
    /// Activations in bf16, products of bf16 summed in f32; norms, softmax and losses computed in f32; trained
    /// parameters, gradients and moments f32.
    Bf16,
}

impl Precision {
    /// Bytes of an activation.
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

/// The CUDA backend: one device, a stream for all work, and one for pictures on their way to it.
///
/// Operations are noted and run later, at the latest when something is read: see the crate's documentation. Buffers belong to the
/// backend that made them; another one refuses them with [`Error::Foreign`].
pub struct Cuda {
    pub(crate) queue: Queue,
    pub(crate) precision: Precision,
    /// What the optimizer treats alike.
    pub(crate) pieces: Option<Pieces>,
    /// See [`Cuda::with_fp8_teacher`].
    pub(crate) fp8_teacher: bool,
}

impl Cuda {
    /// Device number `device`, counted from 0. The first time on a machine this compiles the kernels, for some seconds.
    ///
    /// # Errors
    /// If a library or the device is missing or too old, its memory is used up, or the compiler refuses a kernel.
    pub fn new(device: usize, precision: Precision) -> Result<Self, Error> {
        driver::libraries()?;
        let queue = Queue::new(Context::new(device)?, precision)?;
        Ok(Self {
            queue,
            precision,
            pieces: None,
            fp8_teacher: false,
        })
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        &self.queue.context.name
    }

    /// The device's compute capability, as (9, 0).
    pub fn capability(&self) -> (u32, u32) {
        let capability = self.queue.context.capability;
        (capability / 10, capability % 10)
    }

    /// The format of activations and products.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Bytes of the device's memory that are taken: by buffers, those too that were dropped since the last one was made, and
    /// by working memory.
    pub fn taken(&self) -> usize {
        self.queue.taken()
    }

    /// Bytes of the device's memory that nobody has.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn free(&self) -> Result<usize, Error> {
        self.queue.context.free_memory()
    }

    /// Whether matrix products that come for the first time from now on time all algorithms that cuBLASLt offers, on the device, and
    /// keep the fastest; otherwise the first one is taken.
    ///
    /// Which is the fastest may change from run to run, and with it the last bits of every result: only the first is the same
    /// each time. A copy of an output that is added to in place is kept while its product is timed, of one at a time: memory
    /// which no plan has.
    pub fn time_products(&mut self, timed: bool) {
        self.queue.time_products(timed);
    }

    /// Times each kernel from now on, until [`Cuda::stop_profile`]. Work is issued piece by piece meanwhile and is no graph; each tape runs
    /// alone on the device, even pictures that would be resized beside it.
    ///
    /// # Errors
    /// If the device fails, or what was queued does.
    pub fn start_profile(&mut self) -> Result<(), Error> {
        self.queue.start_profile()
    }

    /// Waits for all work, and returns what took how long since [`Cuda::start_profile`], longest first.
    ///
    /// # Errors
    /// If the device fails, or what was queued does.
    pub fn stop_profile(&mut self) -> Result<Vec<KernelTime>, Error> {
        self.queue.stop_profile()
    }

    /// How work has run so far.
    pub fn runs(&self) -> Runs {
        self.queue.runs()
    }
}

impl fmt::Debug for Cuda {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Cuda({}, {:?}, {:?})",
            self.name(),
            self.precision,
            self.runs()
        )
    }
}
