// Running one kernel launch.
#pragma once

#include <string>

#include "interface.h"

namespace emulated {

struct Launch {
    const Kernel* kernel;
    Index grid, block;
    size_t dynamic_bytes;
    void** arguments;
    /// The file's arrays in shared memory.
    unsigned char* static_shared;
    size_t static_bytes;
    Runtime** runtime;
    /// What lies near an address, for messages.
    std::string (*describe)(const void* at);
};

/// Runs all blocks, one after the other. `error` says what went wrong, and in which thread; empty if nothing did.
/// Not for two threads at a time.
void execute(const Launch& launch, std::string& error);

}  // namespace emulated
