//! What unit tests share: a device to run on, and a count of allocations.
//!
//! As in `tests/emulated`, a test binary runs itself once more with the emulated libraries in the loader's path; tests that need
//! a device pass without one otherwise, and say so.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::path::Path;
use std::process::Command;

use crate::driver::{self, Context};
use crate::queue::Queue;
use crate::{Precision, device_count};

const VARIABLE: &str = "PCAE_EMULATED";

/// Whether devices are emulated ones.
pub(crate) fn is_emulated() -> bool {
    std::env::var_os(VARIABLE).is_some()
}

/// A queue on the device, if there is one.
pub(crate) fn queue(precision: Precision) -> Option<Queue> {
    let found = device_count();
    if is_emulated() {
        assert_eq!(found, Ok(1), "the emulated driver is found");
    } else if !matches!(found, Ok(1..)) {
        println!("skipped: no CUDA device ({found:?})");
        return None;
    }
    driver::libraries().unwrap();
    let mut queue = Queue::new(Context::new(0).unwrap(), precision).unwrap();
    assert_eq!(queue.warning(), None);
    Some(queue)
}

/// Counts what this thread allocates.
struct Counting;

thread_local! {
    static COUNT: Cell<usize> = const { Cell::new(0) };
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: the system's allocator, which keeps the contract.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = COUNT.try_with(|count| count.set(count.get() + 1));
        // SAFETY: by the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: by the caller.
        unsafe { System.dealloc(at, layout) }
    }
}

/// How often `work` allocates on this thread.
pub(crate) fn allocations(work: impl FnOnce()) -> usize {
    let before = COUNT.get();
    work();
    COUNT.get() - before
}

#[test]
fn on_the_emulator() {
    if is_emulated() || !cfg!(target_os = "linux") {
        return;
    }
    let build = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/emulator/build");
    // As there.
    if !Path::new(build).is_file() {
        println!("skipped: no sources of the emulator here");
        return;
    }
    let built = match Command::new("sh").arg(build).output() {
        Ok(built) if built.status.code() != Some(3) => built,
        other => {
            println!("skipped: no C++ compiler for the emulator ({other:?})");
            return;
        }
    };
    let said = String::from_utf8_lossy(&built.stderr);
    assert!(built.status.success(), "the emulator is not built: {said}");
    let folder = String::from_utf8(built.stdout).unwrap();
    let folder = folder.trim_end();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--skip", "on_the_emulator", "--nocapture"])
        .env(VARIABLE, "1")
        .env("LD_LIBRARY_PATH", folder)
        .env("PCAE_CACHE", format!("{folder}/images"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "on the emulator:\n{said}");
    println!("{said}");
}
