//! Buffers that begin on a cache line.

use core::ops::{Deref, DerefMut};

use pcae_kernel::error::{Error as KernelError, expect_len};

use crate::cpu::{LINE, zeroed};
use crate::element::Bf16;
use crate::error::Error;
use crate::gemm::{Out, Precision};
use crate::simd::Simd;

/// Elements of a gradient, a moment, parameters, scores: a slice that begins on a cache line, so that no vector of a row whose
/// length is a multiple of a line's straddles two, and whole lines can be written past the caches.
#[derive(Debug, Default)]
pub struct Floats {
    all: Vec<f32>,
    start: usize,
}

impl Floats {
    /// `len` zeros.
    pub(crate) fn zeros(len: usize) -> Result<Self, Error> {
        let mut all: Vec<f32> = zeroed(len.saturating_add(LINE))?;
        let start = line_start(&all);
        all.truncate(start + len);
        Ok(Self { all, start })
    }
}

impl Deref for Floats {
    type Target = [f32];

    #[inline(always)]
    fn deref(&self) -> &[f32] {
        &self.all[self.start..]
    }
}

impl DerefMut for Floats {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.all[self.start..]
    }
}

/// The first element on a boundary of cache lines.
pub(crate) fn line_start(x: &[f32]) -> usize {
    x.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE)
}

/// Activations, in memory for as many f32.
///
/// The operation that writes them chooses their format. The first `narrow` elements are bf16, next to each other from the
/// front of the memory; each of the others is f32, in its own place. So a result in bf16 leaves what lies behind it, and one
/// in f32 does unless it is shorter than a result in bf16 before it, of which nothing is left then.
#[derive(Debug, Default)]
pub struct Buf {
    memory: Floats,
    narrow: usize,
}

/// The front of a buffer.
#[derive(Clone, Copy, Debug)]
pub(crate) enum View<'a> {
    F32(&'a [f32]),
    Bf16(&'a [Bf16]),
}

impl View<'_> {
    /// A vector of the elements `at..at + len`; zeros in the rest.
    #[inline(always)]
    pub(crate) fn load<S: Simd>(&self, s: S, at: usize, len: usize) -> S::V {
        match self {
            Self::F32(x) => s.load(&x[at..][..len]),
            Self::Bf16(x) => s.load_bf16(&x[at..][..len]),
        }
    }

    pub(crate) fn len(&self) -> usize {
        match self {
            Self::F32(x) => x.len(),
            Self::Bf16(x) => x.len(),
        }
    }

    /// The elements from `at` on.
    pub(crate) fn from(&self, at: usize) -> Self {
        match self {
            Self::F32(x) => Self::F32(&x[at..]),
            Self::Bf16(x) => Self::Bf16(&x[at..]),
        }
    }
}

impl Buf {
    /// `len` zeros.
    pub(crate) fn zeros(len: usize) -> Result<Self, Error> {
        let memory = Floats::zeros(len)?;
        Ok(Self { memory, narrow: 0 })
    }

    /// # Errors
    /// If it is shorter than `len`.
    pub(crate) fn check(
        &self,
        op: &'static str,
        what: &'static str,
        len: usize,
    ) -> Result<(), KernelError> {
        expect_len(op, what, self.memory.len(), len)
    }

    /// The first `len` elements, for what takes either format.
    ///
    /// # Errors
    /// If there are fewer, or only the first of them are bf16.
    pub(crate) fn view(
        &self,
        op: &'static str,
        what: &'static str,
        len: usize,
    ) -> Result<View<'_>, Error> {
        self.check(op, what, len)?;
        match self.narrow {
            _ if len == 0 => Ok(View::F32(&[])),
            0 => Ok(View::F32(&self.memory[..len])),
            narrow if len <= narrow => Ok(View::Bf16(&self.halves()[..len])),
            _ => Err(Error::Narrow { op, what }),
        }
    }

    /// The first `len` elements, for what takes f32 alone.
    ///
    /// # Errors
    /// If there are fewer, or some of them are bf16.
    pub(crate) fn floats(
        &self,
        op: &'static str,
        what: &'static str,
        len: usize,
    ) -> Result<&[f32], Error> {
        match self.view(op, what, len)? {
            View::F32(x) => Ok(x),
            View::Bf16(_) => Err(Error::Narrow { op, what }),
        }
    }

    /// Copies the first elements to `to`, in f32. There must be as many.
    pub(crate) fn read(&self, to: &mut [f32]) {
        let (front, rest) = to.split_at_mut(self.narrow.min(to.len()));
        for (to, from) in front.iter_mut().zip(self.halves()) {
            *to = from.widened();
        }
        rest.copy_from_slice(&self.memory[front.len()..][..rest.len()]);
    }

    /// The first `len` elements, to be overwritten in f32. There must be as many.
    pub(crate) fn overwrite(&mut self, len: usize) -> &mut [f32] {
        if len > 0 {
            self.narrow = 0;
        }
        &mut self.memory[..len]
    }

    /// The first `len` elements, to be overwritten in bf16. There must be as many.
    pub(crate) fn overwrite_narrow(&mut self, len: usize) -> &mut [Bf16] {
        self.narrow = self.narrow.max(len);
        &mut self.halves_mut()[..len]
    }

    /// The first `len` elements, to be overwritten as products of `precision` take them. There must be as many.
    pub(crate) fn overwrite_as(&mut self, precision: Precision, len: usize) -> Out<'_> {
        match precision {
            Precision::F32 => self.overwrite(len).into(),
            Precision::Bf16(_) => self.overwrite_narrow(len).into(),
        }
    }

    /// The first `len` elements in f32, to be added to. There must be as many.
    pub(crate) fn add_to(&mut self, len: usize) -> &mut [f32] {
        // From the back: an f32 covers only what was moved already.
        for i in (0..self.narrow).rev() {
            let x = self.halves()[i].widened();
            self.memory[i] = x;
        }
        self.narrow = 0;
        &mut self.memory[..len]
    }

    /// The memory as bf16, of which there are twice as many.
    fn halves(&self) -> &[Bf16] {
        let (at, len) = (self.memory.as_ptr(), 2 * self.memory.len());
        // SAFETY: the same bytes, to which a `u16`'s alignment is enough and of which any are one.
        unsafe { core::slice::from_raw_parts(at.cast(), len) }
    }

    fn halves_mut(&mut self) -> &mut [Bf16] {
        let (at, len) = (self.memory.as_mut_ptr(), 2 * self.memory.len());
        // SAFETY: as in `halves`; any bytes are an f32 too.
        unsafe { core::slice::from_raw_parts_mut(at.cast(), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_begins_on_a_line_and_has_its_length() {
        for len in [0, 1, 16, 1000, 1 << 20] {
            let buf = Floats::zeros(len).unwrap();
            assert_eq!(buf.len(), len);
            assert!(buf.as_ptr().addr().is_multiple_of(64));
            assert!(buf.iter().all(|x| *x == 0.0));
        }
    }

    /// What a buffer of 7 holds.
    fn read(buf: &Buf) -> [f32; 7] {
        let mut held = [f32::NAN; 7];
        buf.read(&mut held);
        held
    }

    fn narrow(buf: &mut Buf, values: &[f32]) {
        for (to, x) in buf.overwrite_narrow(values.len()).iter_mut().zip(values) {
            *to = Bf16((x.to_bits() >> 16) as u16);
        }
    }

    #[test]
    fn formats_take_turns_and_leave_what_lies_behind() {
        let mut buf = Buf::zeros(7).unwrap();
        buf.overwrite(7)
            .copy_from_slice(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]);
        narrow(&mut buf, &[-1.0, -2.0, -3.0, -4.0, -5.0]);
        assert_eq!(read(&buf), [-1.0, -2.0, -3.0, -4.0, -5.0, 6.0, 7.0]);
        narrow(&mut buf, &[0.5, 0.25]);
        assert_eq!(read(&buf), [0.5, 0.25, -3.0, -4.0, -5.0, 6.0, 7.0]);
        // Added to is what they are, in f32.
        buf.add_to(3)[2] += 1.0;
        assert_eq!(read(&buf), [0.5, 0.25, -2.0, -4.0, -5.0, 6.0, 7.0]);
        narrow(&mut buf, &[9.0]);
        buf.overwrite(3).copy_from_slice(&[10.0, 20.0, 30.0]);
        assert_eq!(read(&buf), [10.0, 20.0, 30.0, -4.0, -5.0, 6.0, 7.0]);
    }

    #[test]
    fn a_view_says_the_format_and_both_at_once_are_an_error() {
        let mut buf = Buf::zeros(7).unwrap();
        assert!(matches!(buf.view("op", "x", 7), Ok(View::F32(x)) if x.len() == 7));
        narrow(&mut buf, &[1.0, 2.0]);
        assert!(matches!(buf.view("op", "x", 2), Ok(View::Bf16(x)) if x[1].widened() == 2.0));
        let error = Error::Narrow {
            op: "op",
            what: "x",
        };
        assert_eq!(buf.view("op", "x", 3).unwrap_err(), error);
        assert_eq!(buf.floats("op", "x", 1).unwrap_err(), error);
        assert!(matches!(buf.view("op", "x", 8), Err(Error::Kernel(_))));
        // Nothing written changes nothing.
        let _ = buf.overwrite(0);
        assert!(matches!(buf.view("op", "x", 2), Ok(View::Bf16(_))));
    }
}
