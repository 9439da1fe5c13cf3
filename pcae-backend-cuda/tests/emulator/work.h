// What the emulated libraries ask of the emulated driver.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <functional>
#include <string>

namespace emulated {

/// Work of a stream. What went wrong goes to `error`.
typedef std::function<void(std::string& error)> Run;

}  // namespace emulated

/// Puts work into a stream, or into the graph that the stream is captured to.
extern "C" int emulated_enqueue(void* stream, const char* what, const emulated::Run& run) __attribute__((visibility("default")));

/// Whether so many bytes are allocated on the device, in one block.
extern "C" bool emulated_is_device(const void* at, size_t bytes) __attribute__((visibility("default")));

/// Says on standard error what a call was refused for.
extern "C" void emulated_complain(const char* format, ...) __attribute__((visibility("default"), format(printf, 1, 2)));

/// Lets time pass for events, and for nothing else. From within work.
extern "C" void emulated_spend(uint64_t nanoseconds) __attribute__((visibility("default")));
