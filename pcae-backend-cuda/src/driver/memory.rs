//! Memory of the device and of the host.

use core::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::result;

use super::failure::failed;
use super::{Context, DevicePtr};
use crate::error::Error;

/// Allocated memory of which nobody is the owner yet, or any more.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Block {
    pub(crate) at: DevicePtr,
    pub(crate) bytes: usize,
}

impl Block {
    /// Whether a place may lie in it.
    pub(crate) fn contains(self, at: u64) -> bool {
        at.wrapping_sub(self.at.0) < self.bytes as u64
    }
}

/// Where memory of a queue comes from and goes to.
///
/// A buffer may be dropped while work that is queued, or running, still refers to it. So it is only noted then, and freed by the
/// queue after that work; without a queue there is no such work.
#[derive(Debug)]
pub(crate) struct Heap {
    context: Arc<Context>,
    /// Of buffers that were dropped; `None` once the queue is gone.
    dropped: Mutex<Option<Vec<Block>>>,
    /// Bytes that are allocated.
    taken: AtomicUsize,
}

impl Heap {
    pub(crate) fn new(context: Arc<Context>) -> Arc<Self> {
        Arc::new(Self {
            context,
            dropped: Mutex::new(Some(Vec::new())),
            taken: AtomicUsize::new(0),
        })
    }

    fn dropped(&self) -> std::sync::MutexGuard<'_, Option<Vec<Block>>> {
        self.dropped.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Memory with any content.
    pub(crate) fn allocate(self: &Arc<Self>, bytes: usize) -> Result<Memory, Error> {
        let block = self.context.allocate(bytes)?;
        self.taken.fetch_add(block.bytes, Ordering::Relaxed);
        Ok(Memory {
            block,
            heap: Arc::clone(self),
        })
    }

    /// The device's name.
    pub(crate) fn device(&self) -> &str {
        &self.context.name
    }

    /// Bytes that are allocated, those of dropped buffers too until they are freed.
    pub(crate) fn taken(&self) -> usize {
        self.taken.load(Ordering::Relaxed)
    }

    /// Whether a buffer was dropped since the last [`Heap::take`].
    pub(crate) fn has_dropped(&self) -> bool {
        self.dropped()
            .as_ref()
            .is_some_and(|blocks| !blocks.is_empty())
    }

    /// What was dropped, to be given to [`Heap::free`] when no work refers to it any more.
    pub(crate) fn take(&self) -> Vec<Block> {
        self.dropped()
            .as_mut()
            .map(core::mem::take)
            .unwrap_or_default()
    }

    /// Frees memory that no work refers to, and that no graph does.
    pub(crate) fn free_at_once(&self, memory: Memory) {
        let block = memory.block;
        // Noted as all that is dropped, and then not left to the queue.
        drop(memory);
        let noted = self.dropped().as_mut().is_some_and(|blocks| {
            let before = blocks.len();
            blocks.retain(|dropped| dropped.at != block.at);
            blocks.len() < before
        });
        if noted {
            self.free(&[block]);
        }
    }

    pub(crate) fn free(&self, blocks: &[Block]) {
        for block in blocks {
            self.context.free(*block);
            self.taken.fetch_sub(block.bytes, Ordering::Relaxed);
        }
    }

    /// Frees what was dropped, and from now on what is dropped at once. All work must be done.
    pub(crate) fn close(&self) {
        let blocks = self.dropped().take().unwrap_or_default();
        self.free(&blocks);
    }
}

impl Drop for Heap {
    fn drop(&mut self) {
        // Of a queue that was not finished. All its memory is dropped, and no work was ever queued.
        self.close();
    }
}

/// Memory on the device, given back when dropped.
#[derive(Debug)]
pub(crate) struct Memory {
    heap: Arc<Heap>,
    block: Block,
}

impl Memory {
    pub(crate) fn at(&self) -> DevicePtr {
        self.block.at
    }

    pub(crate) fn bytes(&self) -> usize {
        self.block.bytes
    }

    /// Whose it is.
    pub(crate) fn heap(&self) -> &Arc<Heap> {
        &self.heap
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let mut dropped = self.heap.dropped();
        match dropped.as_mut() {
            Some(blocks) => blocks.push(self.block),
            None => self.heap.free(&[self.block]),
        }
    }
}

/// Numbers that any bytes are, of at most the alignment of pinned memory.
pub(crate) trait Plain: Copy {}

impl Plain for u8 {}
impl Plain for u16 {}
impl Plain for u32 {}
impl Plain for f32 {}

/// Memory of the host that the device copies from and to by itself.
#[derive(Debug)]
pub(crate) struct Pinned {
    context: Arc<Context>,
    at: NonNull<u8>,
    bytes: usize,
}

// SAFETY: memory of the whole process, reached through `&mut self` alone.
unsafe impl Send for Pinned {}
// SAFETY: as above; `&self` gives nothing but numbers.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// Zeros.
    pub(crate) fn new(context: &Arc<Context>, bytes: usize) -> Result<Self, Error> {
        context.bind()?;
        // SAFETY: no requirement but a current context.
        let at = unsafe { result::malloc_host(bytes, 0) }
            .map_err(|error| failed("cuMemHostAlloc", error))?;
        let Some(at) = NonNull::new(at.cast::<u8>()) else {
            return Err(Error::Driver {
                call: "cuMemHostAlloc",
                error: "no memory".to_owned(),
            });
        };
        // SAFETY: as many bytes as were allocated, which nobody else knows yet.
        unsafe { at.write_bytes(0, bytes) };
        Ok(Self {
            context: Arc::clone(context),
            at,
            bytes,
        })
    }

    /// `len` numbers from byte `at` on.
    ///
    /// # Safety
    /// No copy that is under way may touch them.
    ///
    /// # Panics
    /// If they do not lie within, or not on their alignment.
    pub(crate) unsafe fn part<T: Plain>(&mut self, at: usize, len: usize) -> &mut [T] {
        let bytes = len.checked_mul(size_of::<T>());
        assert!(
            bytes.and_then(|bytes| bytes.checked_add(at)) <= Some(self.bytes)
                && bytes.is_some()
                && at.is_multiple_of(align_of::<T>())
        );
        // SAFETY: within the memory and aligned, both checked (pages are aligned to more than any number); initialised by
        // `new`; any bytes are a `Plain`; nobody else writes, by the caller.
        unsafe { core::slice::from_raw_parts_mut(self.at.add(at).cast().as_ptr(), len) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: allocated by `new`. The owner's streams are done: see `Queue::drop`.
            let _ = unsafe { result::free_host(self.at.as_ptr().cast()) };
        }
    }
}
