//! Large pages for large buffers.
//!
//! Weights and activations are read in long streams. A processor fetches ahead only within a page, and has to look up
//! each page: with 4 KiB, and without fetching ahead by ourselves, a product whose weights come from memory loses a
//! fifth of its speed.

use core::mem::MaybeUninit;

/// Asks the system to back the fresh memory `spare` by large pages, where it is large enough to hold some. Only a hint:
/// nothing depends on its success.
pub(crate) fn prefer_huge_pages<T>(spare: &mut [MaybeUninit<T>]) {
    #[cfg(target_os = "linux")]
    {
        // Of most processors; what is smaller gains nothing.
        const HUGE: usize = 2 << 20;
        const PAGE: usize = 4096;
        let range = spare.as_mut_ptr_range();
        let start = range.start.addr().next_multiple_of(PAGE);
        let end = range.end.addr() / PAGE * PAGE;
        if end.saturating_sub(start) >= HUGE {
            let at = range.start.wrapping_byte_add(start - range.start.addr());
            // SAFETY: whole pages within memory that is ours. The advice changes no content.
            unsafe { libc::madvise(at.cast(), end - start, libc::MADV_HUGEPAGE) };
        }
    }
    let _ = spare;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_and_capacity_stay() {
        for len in [0, 10, 3 << 20] {
            let mut x: Vec<u32> = Vec::with_capacity(len);
            let capacity = x.capacity();
            prefer_huge_pages(x.spare_capacity_mut());
            x.resize(len, 7);
            assert!(x.capacity() == capacity && x.iter().all(|x| *x == 7));
        }
    }
}
