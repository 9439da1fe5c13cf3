// What a compiled kernel file and the emulated driver know of each other.
#pragma once

#include <stddef.h>

namespace emulated {

struct Index {
    unsigned x, y, z;
};

/// What the lanes of a warp do together, once all of `mask` have come: `lanes[i]` is what lane i brought.
typedef void (*Together)(void** lanes, unsigned mask);

/// The thread that runs, and what it can ask for. Written by the driver at every switch.
struct Runtime {
    Index thread, block, block_dim, grid_dim;
    unsigned char* dynamic_shared;

    /// Waits for all threads of the block. `vote` is counted; the result is the number of votes.
    int (*barrier)(const char* place, int vote);
    /// Waits for the lanes of `mask`, of which the last to come calls `together` for all.
    void (*warp)(const char* what, const char* place, unsigned mask, Together together, void* mine);
    /// `cp.async`: the 16 bytes arrive at the wait, not before.
    void (*copy)(void* shared, const void* global, bool valid);
    void (*copy_commit)();
    void (*copy_wait)(int pending);
    /// Whether `size` bytes lie in the block's shared memory.
    bool (*is_shared)(const void* at, size_t size);
    /// Ends the kernel with an error.
    void (*fail)(const char* format, ...) __attribute__((noreturn, format(printf, 1, 2)));
};

/// A `__global__` function.
struct Kernel {
    const char* name;
    /// Calls it, with pointers to its arguments.
    void (*call)(void** arguments);
    /// Bytes of each argument.
    const size_t* sizes;
    size_t arguments;
    /// From `__launch_bounds__`; 0 where there is none.
    unsigned max_threads;
};

/// What a compiled file exports, as `emulated_module`.
struct Module {
    const Kernel* kernels;
    size_t count;
    Runtime** runtime;
};

}  // namespace emulated
