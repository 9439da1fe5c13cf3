//! Caches, and large pages for large buffers.
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

/// Whether so many bytes are written past the caches, if they are read later: more than three level-2 caches. What is smaller is better
/// read back from the level-3 cache, whose share of one core nobody tells.
pub(crate) fn is_streamed(bytes: usize) -> bool {
    bytes > 3 * level2_cache()
}

/// Bytes of a core's level-2 cache; 512 KiB where the processor does not say.
pub(crate) fn level2_cache() -> usize {
    const UNKNOWN: usize = 512 * 1024;
    #[cfg(target_arch = "x86_64")]
    {
        use std::sync::OnceLock;

        use crate::isa::cpuid;

        static FOUND: OnceLock<usize> = OnceLock::new();
        *FOUND.get_or_init(|| {
            // Intel's leaf, then AMD's, which describe one cache in each subleaf in the same way.
            for (leaf, base) in [(4, 0), (0x8000_001d, 0x8000_0000)] {
                if cpuid(base, 0).eax < leaf {
                    continue;
                }
                for index in 0..8 {
                    let cache = cpuid(leaf, index);
                    if cache.eax & 0x1f == 0 {
                        break;
                    }
                    if cache.eax >> 5 & 7 == 2 {
                        let [ways, partitions, line] = [22, 12, 0].map(|at| {
                            let width = if at == 0 { 12 } else { 10 };
                            (cache.ebx >> at & ((1 << width) - 1)) as usize + 1
                        });
                        return ways * partitions * line * (cache.ecx as usize + 1);
                    }
                }
            }
            UNKNOWN
        })
    }
    #[cfg(not(target_arch = "x86_64"))]
    UNKNOWN
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_2_cache_has_a_plausible_size() {
        let size = level2_cache();
        assert!((64 << 10..256 << 20).contains(&size), "{size}");
    }

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
