//! Reads: those that wait for all that is queued, and one that does not wait for what is queued behind it.

use std::sync::Arc;

use super::{FAULT, Queue, fault};
use crate::Precision;
use crate::driver::{Context, DevicePtr, Event, Pinned, Plain};
use crate::error::Error;
use crate::ring::PIECE;

/// Bytes that can be read so. Of more it is no use to be early.
const ROOM: usize = 4096;

/// What is on its way to the host.
#[derive(Debug)]
pub(super) struct Reading {
    /// What kernels have reported, then the values.
    pinned: Pinned,
    /// Behind the copies.
    here: Event,
    /// Where what was started lies, and how many values.
    started: Option<(DevicePtr, usize)>,
}

impl Reading {
    pub(super) fn new(context: &Arc<Context>) -> Result<Self, Error> {
        Ok(Self {
            pinned: Pinned::new(context, FAULT + ROOM)?,
            here: Event::new(context)?,
            started: None,
        })
    }
}

impl Queue {
    /// Copies f32 from the device, after what is queued. All reads wait for it, and return the error of a fault first.
    pub(crate) fn read_f32(&mut self, to: &mut [f32], from: DevicePtr) -> Result<(), Error> {
        self.read(to, from, |x: f32| x)
    }

    /// Copies bf16 from the device as f32.
    pub(crate) fn read_bf16(&mut self, to: &mut [f32], from: DevicePtr) -> Result<(), Error> {
        self.read(to, from, |x: u16| f32::from_bits(u32::from(x) << 16))
    }

    /// Copies activations from the device.
    pub(crate) fn read_act(&mut self, to: &mut [f32], from: DevicePtr) -> Result<(), Error> {
        match self.precision {
            Precision::F32 => self.read_f32(to, from),
            Precision::Bf16 => self.read_bf16(to, from),
        }
    }

    /// Copies indices from the device.
    pub(crate) fn read_u32(&mut self, to: &mut [u32], from: DevicePtr) -> Result<(), Error> {
        self.read(to, from, |x: u32| x)
    }

    fn read<T, U: Plain>(
        &mut self,
        to: &mut [T],
        from: DevicePtr,
        convert: impl Fn(U) -> T,
    ) -> Result<(), Error> {
        self.flush()?;
        self.context.bind()?;
        let fault_at = self.fault_at.at();
        // SAFETY: only read below, behind an event that follows the copy. A copy of a read that failed may be under way:
        // it brings the same words.
        let seen = unsafe { self.fault_seen.part::<u32>(0, 2) };
        // SAFETY: two words are there.
        unsafe { self.stream.download(seen, fault_at)? };
        let piece = PIECE / size_of::<U>();
        let total = to.len();
        let pieces = total.div_ceil(piece).max(1);
        let len = |i: usize| piece.min(total - (i * piece).min(total));
        let (stream, halves) = (&self.stream, &mut self.halves);
        let fetch = |halves: &mut [(Pinned, Event); 2], i: usize| {
            let (pinned, event) = &mut halves[i % 2];
            if len(i) > 0 {
                // SAFETY: what the last copy brought was read before this is called; a copy of a read that failed comes before
                // this one in the stream, and nobody looks until the event behind this one.
                let part = unsafe { pinned.part::<U>(0, len(i)) };
                // SAFETY: the caller's buffer has as many elements.
                unsafe { stream.download(part, from.plus(i * PIECE))? };
            }
            stream.record(event)
        };
        fetch(halves, 0)?;
        for i in 0..pieces {
            if i + 1 < pieces {
                fetch(halves, i + 1)?;
            }
            let (pinned, event) = &mut halves[i % 2];
            event.wait()?;
            if i == 0 {
                // SAFETY: the copy lies before the event.
                let seen = unsafe { self.fault_seen.part::<u32>(0, 2) };
                let [code, detail] = [seen[0], seen[1]];
                if code != 0 {
                    // SAFETY: memory of the queue.
                    unsafe { stream.zero(fault_at, FAULT)? };
                    return Err(fault(&self.faults, code, detail));
                }
            }
            // SAFETY: the event behind its copy was reached, the next copy goes to the other half.
            let part = unsafe { pinned.part::<U>(0, len(i)) };
            for (to, x) in to[i * piece..].iter_mut().zip(part) {
                *to = convert(*x);
            }
        }
        Ok(())
    }

    /// Starts to copy f32 from the device behind what is queued, which is run.
    pub(crate) fn start_read(&mut self, from: DevicePtr, len: usize) -> Result<(), Error> {
        self.flush()?;
        self.context.bind()?;
        // A copy that nobody has asked for yet may be under way.
        if self.reading.started.take().is_some() {
            self.reading.here.wait()?;
        }
        if len == 0 || len > ROOM / size_of::<f32>() {
            return Ok(());
        }
        let Reading { pinned, here, .. } = &mut self.reading;
        // SAFETY: the copies before were waited for; these are only looked at behind the event.
        let seen = unsafe { pinned.part::<u32>(0, FAULT / size_of::<u32>()) };
        // SAFETY: as many words are there.
        unsafe { self.stream.download(seen, self.fault_at.at())? };
        // SAFETY: as above.
        let values = unsafe { pinned.part::<f32>(FAULT, len) };
        // SAFETY: the caller's buffer has as many elements.
        unsafe { self.stream.download(values, from)? };
        self.stream.record(here)?;
        self.reading.started = Some((from, len));
        Ok(())
    }

    /// Waits for what was started there, and returns the error of a fault before it. Without such a start it is a read.
    pub(crate) fn finish_read(&mut self, to: &mut [f32], from: DevicePtr) -> Result<(), Error> {
        if self.reading.started != Some((from, to.len())) {
            return self.read_f32(to, from);
        }
        self.context.bind()?;
        let Reading {
            pinned,
            here,
            started,
        } = &mut self.reading;
        here.wait()?;
        *started = None;
        // SAFETY: the copies are done.
        let seen = unsafe { pinned.part::<u32>(0, FAULT / size_of::<u32>()) };
        let [code, detail] = [seen[0], seen[1]];
        if code != 0 {
            // SAFETY: memory of the queue.
            unsafe { self.stream.zero(self.fault_at.at(), FAULT)? };
            return Err(fault(&self.faults, code, detail));
        }
        // SAFETY: as above.
        to.copy_from_slice(unsafe { pinned.part::<f32>(FAULT, to.len()) });
        Ok(())
    }
}
