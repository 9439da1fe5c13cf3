//! What lies on the device: activations, indices, vectors, scores, parameters.

use pcae_kernel::backend::Linear;
use pcae_kernel::layout::Layout;

use crate::Precision;
use crate::driver::{DevicePtr, Memory};
use crate::error::Error;
use crate::fp8::Weights;
use crate::queue::Queue;

/// `len` elements of `T` from a pointer on: where one lies.
fn place(memory: &Memory, len: usize, offset: usize, size: usize) -> DevicePtr {
    debug_assert!(offset <= len);
    memory.at().plus(offset * size)
}

fn bytes(len: usize, size: usize) -> usize {
    // What does not fit is refused by the device.
    len.saturating_mul(size)
}

/// What has `len` elements in memory of one queue.
pub(crate) trait Buffer {
    fn len(&self) -> usize;
    fn memory(&self) -> &Memory;
}

/// Activations, in the backend's [`Precision`].
#[derive(Debug)]
pub struct Buf {
    memory: Memory,
    precision: Precision,
    len: usize,
}

impl Buffer for Buf {
    fn len(&self) -> usize {
        self.len
    }

    fn memory(&self) -> &Memory {
        &self.memory
    }
}

impl Buf {
    /// Zeros.
    pub(crate) fn new(queue: &mut Queue, precision: Precision, len: usize) -> Result<Self, Error> {
        Ok(Self {
            memory: queue.allocate(bytes(len, precision.size()))?,
            precision,
            len,
        })
    }

    /// Where element `offset` lies.
    pub(crate) fn at(&self, offset: usize) -> DevicePtr {
        place(&self.memory, self.len, offset, self.precision.size())
    }
}

macro_rules! words {
    ($($(#[$doc:meta])* $name:ident;)*) => {$(
        $(#[$doc])*
        #[derive(Debug)]
        pub struct $name {
            memory: Memory,
            len: usize,
        }

        impl Buffer for $name {
            fn len(&self) -> usize {
                self.len
            }

            fn memory(&self) -> &Memory {
                &self.memory
            }
        }

        impl $name {
            /// Zeros.
            pub(crate) fn new(queue: &mut Queue, len: usize) -> Result<Self, Error> {
                Ok(Self { memory: queue.allocate(bytes(len, size_of::<u32>()))?, len })
            }

            /// Where element `offset` lies.
            pub(crate) fn at(&self, offset: usize) -> DevicePtr {
                place(&self.memory, self.len, offset, size_of::<u32>())
            }
        }
    )*};
}

words! {
    /// Token positions and sequence indices, u32.
    Ids;
    /// Gradients, moments, statistics and losses, f32.
    Vector;
    /// Scores of tokens, f32 whatever the activations are.
    Scores;
}

/// All parameters of a model: f32, and beside it in bf16 what products read, if the backend computes in that; of a teacher in fp8 the
/// weights of its blocks in e4m3 too.
#[derive(Debug)]
pub struct Params {
    master: Memory,
    half: Option<Memory>,
    e4m3: Option<Weights>,
    len: usize,
}

impl Buffer for Params {
    fn len(&self) -> usize {
        self.len
    }

    /// The other formats come from the same queue.
    fn memory(&self) -> &Memory {
        &self.master
    }
}

impl Params {
    /// With the given values, in both formats.
    pub(crate) fn new(
        queue: &mut Queue,
        precision: Precision,
        values: &[f32],
    ) -> Result<Self, Error> {
        let len = values.len();
        let master = queue.allocate(bytes(len, size_of::<f32>()))?;
        queue.write_f32(master.at(), values)?;
        let half = match precision {
            Precision::F32 => None,
            Precision::Bf16 => {
                let half = queue.allocate(bytes(len, precision.size()))?;
                queue.write_bf16(half.at(), values)?;
                Some(half)
            }
        };
        Ok(Self {
            master,
            half,
            e4m3: None,
            len,
        })
    }

    /// Those of a teacher in fp8.
    pub(crate) fn with_e4m3(mut self, queue: &mut Queue, layout: &Layout) -> Result<Self, Error> {
        self.e4m3 = Some(Weights::new(queue, layout)?);
        self.renew_e4m3(queue)?;
        Ok(self)
    }

    /// Queues making the weights in e4m3 anew, if there are any: after the parameters have changed.
    pub(crate) fn renew_e4m3(&self, queue: &mut Queue) -> Result<(), Error> {
        match (&self.e4m3, self.half(0)) {
            (Some(weights), Some(half)) => weights.make(queue, half),
            _ => Ok(()),
        }
    }

    /// Whether these are a teacher's in fp8.
    pub(crate) fn are_fp8(&self) -> bool {
        self.e4m3.is_some()
    }

    /// Where a layer's weight lies in e4m3, and its scale, if there is one.
    pub(crate) fn e4m3(&self, layer: Linear) -> Option<(DevicePtr, DevicePtr)> {
        self.e4m3.as_ref()?.find(layer.weight.start)
    }

    /// Where element `offset` lies in f32: what norms, tokens, positions and the optimizer read.
    pub(crate) fn at(&self, offset: usize) -> DevicePtr {
        place(&self.master, self.len, offset, size_of::<f32>())
    }

    /// Where element `offset` lies in the format of products: weights and biases of linear layers.
    pub(crate) fn product(&self, offset: usize) -> DevicePtr {
        match &self.half {
            Some(half) => place(half, self.len, offset, Precision::Bf16.size()),
            None => self.at(offset),
        }
    }

    /// Where element `offset` of the bf16 copy lies, if there is one: the optimizer keeps it up to date.
    pub(crate) fn half(&self, offset: usize) -> Option<DevicePtr> {
        let half = self.half.as_ref()?;
        Some(place(half, self.len, offset, Precision::Bf16.size()))
    }
}
