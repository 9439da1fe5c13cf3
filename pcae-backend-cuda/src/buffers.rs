//! What lies on the device: activations, indices, vectors, scores, parameters.

use crate::Precision;
use crate::driver::{DevicePtr, Memory};
use crate::error::Error;
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

/// Activations, in the backend's [`Precision`].
#[derive(Debug)]
pub struct Buf {
    memory: Memory,
    pub(crate) precision: Precision,
    pub(crate) len: usize,
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
            pub(crate) len: usize,
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

/// All parameters of a model: f32, and beside it in bf16 what products read, if the backend computes in that.
#[derive(Debug)]
pub struct Params {
    master: Memory,
    half: Option<Memory>,
    pub(crate) len: usize,
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
        Ok(Self { master, half, len })
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
