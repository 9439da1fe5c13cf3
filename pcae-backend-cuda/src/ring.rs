//! Pinned memory for copies to the device.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::driver::{Context, DevicePtr, Event, Pinned, Plain, Stream};
use crate::error::Error;

/// Bytes of pinned memory, used round and round: three batches of 256 pictures of 224 x 224 in 8 bits, or between one and two of crops that
/// are resized on the device, which are nearly twice as large. So the host can send the next one while the device is busy.
pub(crate) const RING: usize = 128 << 20;

/// Copies that may be under way: those of some steps, each of a batch in pieces and of what is drawn for every block.
const COPIES: usize = 256;

/// Bytes of one copy.
pub(crate) const PIECE: usize = 4 << 20;

/// Pinned memory from which copies to the device go, used round and round, on whichever stream. A part is used again when its own copy is
/// done and all those before it.
#[derive(Debug)]
pub(crate) struct Ring {
    pinned: Pinned,
    /// Bytes that were ever handed out, and of those the ones that are free again.
    handed: usize,
    free: usize,
    /// Copies under way: up to which byte, and the event behind them.
    pending: VecDeque<(usize, Event)>,
    spare: Vec<Event>,
}

impl Ring {
    pub(crate) fn new(context: &Arc<Context>) -> Result<Self, Error> {
        Ok(Self {
            pinned: Pinned::new(context, RING)?,
            handed: 0,
            free: 0,
            pending: VecDeque::with_capacity(COPIES),
            spare: (0..COPIES)
                .map(|_| Event::new(context))
                .collect::<Result<_, _>>()?,
        })
    }

    /// Copies to the device behind what is in the stream. Waits only where the ring is full of copies under way.
    pub(crate) fn send<T, U: Plain>(
        &mut self,
        stream: &Stream,
        to: DevicePtr,
        from: &[T],
        convert: impl Fn(&T) -> U,
    ) -> Result<(), Error> {
        let mut to = to;
        for from in from.chunks(PIECE / size_of::<U>()) {
            let bytes = size_of_val(from) / size_of::<T>() * size_of::<U>();
            let at = self.reserve(bytes)?;
            // SAFETY: `reserve` has waited for the copies that went from here.
            let part = unsafe { self.pinned.part::<U>(at, from.len()) };
            for (to, x) in part.iter_mut().zip(from) {
                *to = convert(x);
            }
            self.upload(stream, to, at, bytes)?;
            to = to.plus(bytes);
        }
        Ok(())
    }

    /// Copies bytes to the device behind what is in the stream, each part to the next multiple of `ALIGN` behind the one before, in as
    /// few copies as may be. `ALIGN` divides a piece.
    pub(crate) fn send_parts<'a, const ALIGN: usize>(
        &mut self,
        stream: &Stream,
        to: DevicePtr,
        parts: impl Iterator<Item = &'a [u8]> + Clone,
    ) -> Result<(), Error> {
        let lens = parts.clone().map(|part| part.len().next_multiple_of(ALIGN));
        let (mut parts, mut part) = (parts, &[][..]);
        let (mut sent, len) = (0, lens.sum::<usize>());
        while sent < len {
            let bytes = PIECE.min(len - sent);
            let at = self.reserve(bytes)?;
            // SAFETY: as above.
            let piece = unsafe { self.pinned.part::<u8>(at, bytes) };
            let mut filled = 0;
            while filled < bytes {
                if part.is_empty() {
                    let Some(next) = parts.next() else { break };
                    part = next;
                }
                let (now, later) = part.split_at(part.len().min(bytes - filled));
                piece[filled..filled + now.len()].copy_from_slice(now);
                // At its end, or that of the piece.
                (part, filled) = (later, (filled + now.len()).next_multiple_of(ALIGN));
            }
            self.upload(stream, to.plus(sent), at, bytes)?;
            sent += bytes;
        }
        Ok(())
    }

    /// Copies `bytes` that were written at `at`.
    fn upload(
        &mut self,
        stream: &Stream,
        to: DevicePtr,
        at: usize,
        bytes: usize,
    ) -> Result<(), Error> {
        // SAFETY: written by the caller, whom `reserve` gave them.
        let part = unsafe { self.pinned.part::<u8>(at, bytes) };
        // SAFETY: nobody writes there before the event below is reached. The caller's buffer is long enough.
        unsafe { stream.upload(to, part)? };
        // There is one: `reserve` leaves one over.
        if let Some(event) = self.spare.pop() {
            if let Err(error) = stream.record(&event) {
                // The copy still reads what the next one would write.
                let _ = stream.wait();
                self.spare.push(event);
                return Err(error);
            }
            self.pending.push_back((self.handed, event));
        }
        Ok(())
    }

    /// Where `bytes`, at most a piece, can be written now.
    fn reserve(&mut self, bytes: usize) -> Result<usize, Error> {
        const ALIGN: usize = 64;
        let bytes = bytes.next_multiple_of(ALIGN);
        let mut at = self.handed % RING;
        let mut handed = self.handed + bytes;
        if at + bytes > RING {
            // What is left at the end is handed out with it.
            handed += RING - at;
            at = 0;
        }
        while handed - self.free > RING || self.spare.is_empty() {
            let Some((end, event)) = self.pending.pop_front() else {
                break;
            };
            let done = event.wait();
            self.spare.push(event);
            done?;
            self.free = end;
        }
        if self.pending.is_empty() {
            self.free = self.handed;
        }
        self.handed = handed;
        Ok(at)
    }
}

/// To nearest even; a NaN stays one.
pub(crate) fn to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    // Quiet, so that dropping the low half cannot make it infinite. Both are computed: a branch would keep a loop from vectors.
    let nan = (bits >> 16) | 0x40;
    let round = 0x7fff + (bits >> 16 & 1);
    let nearest = bits.wrapping_add(round) >> 16;
    (if x.is_nan() { nan } else { nearest }) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_is_the_nearest_even() {
        for (x, expected) in [
            (0.0, 0),
            (-0.0, 0x8000),
            (1.0, 0x3f80),
            // Half of the last place of 1.0 and of the number after it: to even.
            (1.0 + 1.0 / 256.0, 0x3f80),
            (1.0 + 3.0 / 256.0, 0x3f82),
            (1.0 + 1.001 / 256.0, 0x3f81),
            (f32::MAX, 0x7f80),
            (f32::INFINITY, 0x7f80),
            (f32::NEG_INFINITY, 0xff80),
            (f32::from_bits(1), 0),
        ] {
            assert_eq!(to_bf16(x), expected, "{x}");
        }
        for bits in [0x7f80_0001, 0xffff_ffff, 0x7fc0_0000] {
            let x = f32::from_bits(u32::from(to_bf16(f32::from_bits(bits))) << 16);
            assert!(x.is_nan());
        }
    }
}
