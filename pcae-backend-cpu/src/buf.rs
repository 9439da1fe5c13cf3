//! Buffers that begin on a cache line.

use core::ops::{Deref, DerefMut};

use crate::cpu::{LINE, zeroed};
use crate::error::Error;

/// Elements of an activation, a gradient, a moment: a slice that begins on a cache line, so that no vector of a row whose
/// length is a multiple of a line's straddles two, and whole lines can be written past the caches.
#[derive(Debug, Default)]
pub struct Buf {
    all: Vec<f32>,
    start: usize,
}

impl Buf {
    /// `len` zeros.
    pub(crate) fn zeros(len: usize) -> Result<Self, Error> {
        let mut all: Vec<f32> = zeroed(len.saturating_add(LINE))?;
        let start = line_start(&all);
        all.truncate(start + len);
        Ok(Self { all, start })
    }
}

impl Deref for Buf {
    type Target = [f32];

    #[inline(always)]
    fn deref(&self) -> &[f32] {
        &self.all[self.start..]
    }
}

impl DerefMut for Buf {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.all[self.start..]
    }
}

/// The first element on a boundary of cache lines.
pub(crate) fn line_start(x: &[f32]) -> usize {
    x.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_begins_on_a_line_and_has_its_length() {
        for len in [0, 1, 16, 1000, 1 << 20] {
            let buf = Buf::zeros(len).unwrap();
            assert_eq!(buf.len(), len);
            assert!(buf.as_ptr().addr().is_multiple_of(64));
            assert!(buf.iter().all(|x| *x == 0.0));
        }
    }
}
