//! Writes: behind what is queued, through pinned memory, without waiting for it.

use super::Queue;
use crate::Precision;
use crate::driver::{DevicePtr, Plain};
use crate::error::Error;
use crate::ring::to_bf16;

impl Queue {
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
