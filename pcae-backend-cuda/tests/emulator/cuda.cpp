// libcuda.so.1: the driver's functions that the backend calls, for one device that is emulated.
//
// A stream's work runs when somebody waits for it, not before: what is read, freed or overwritten too early shows. Device
// memory lies between pages that cannot be touched and starts full of NaN; freed, it cannot be touched either. Every refusal
// says its reason on standard error.

#include <dlfcn.h>
#include <link.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include "fibers.h"
#include "work.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

using emulated::Index;
using emulated::Run;

typedef int Result;   // CUresult
typedef uint64_t DevicePtr;

namespace {

enum : Result {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    LAUNCH_FAILED = 719,
    NOT_SUPPORTED = 801,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_UNMATCHED = 903,
    CAPTURE_WRONG_THREAD = 908,
};

const struct {
    Result code;
    const char *name, *meaning;
} ERRORS[] = {
    {SUCCESS, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
    {CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "operation failed due to a previous error during capture"},
    {CAPTURE_UNMATCHED, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED", "capture was not initiated in this stream"},
    {CAPTURE_WRONG_THREAD, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD", "attempt to terminate a thread-local capture sequence from another thread"},
};

constexpr size_t CAPACITY = size_t(4) << 30;
constexpr size_t PAGE = 4096;
constexpr size_t ALIGNMENT = 256;   // what cuMemAlloc promises
constexpr size_t MAX_SHARED = 227 * 1024;
constexpr size_t MAX_SHARED_UNASKED = 48 * 1024;
constexpr unsigned char POISON = 0xff;
constexpr unsigned char CANARY = 0xfd;

/// Work that waits to be done, or a graph's node.
struct Op {
    std::string what;
    Run run;
    /// When it comes into a stream (for a graph's: at each launch): what host memory it needs unchanged until it runs.
    std::function<Run(Run)> arm;
};

struct Graph {
    std::vector<Op> nodes;
};

struct Stream {
    bool waits_for_default;
    std::deque<Op> waiting;
    uint64_t enqueued = 0, done = 0;
    Result error = SUCCESS;
    std::unique_ptr<Graph> capture;
    bool invalidated = false;
    int capture_mode = 0;
    std::thread::id capture_thread;
    /// Streams that have waited for this one, or it for them.
    std::set<Stream*> linked;
    /// Whether it runs without being waited for.
    bool eager = false;
};

/// What `emulated_spend` has added to the clock.
std::chrono::nanoseconds spent{0};

struct Event {
    Stream* stream = nullptr;
    uint64_t at = 0;
    /// When it was reached, of those that keep it.
    std::shared_ptr<std::chrono::steady_clock::time_point> time;
};

struct Module;
struct Function {
    const emulated::Kernel* kernel;
    Module* module;
    size_t max_dynamic;
};
struct Module {
    void* library;
    int file;
    emulated::Runtime** runtime;
    unsigned char* static_shared;
    size_t static_bytes;
    std::vector<std::unique_ptr<Function>> functions;
};

struct Allocation {
    size_t bytes;
    unsigned char* pages;
    size_t page_bytes;
};

std::recursive_mutex lock;
bool initialized = false;
int retained = 0;
thread_local void* current_context = nullptr;
char the_context;

std::map<uintptr_t, Allocation> device;
/// Freed blocks, whose addresses are never given out again.
std::map<uintptr_t, size_t> freed;
std::map<uintptr_t, size_t> pinned;
size_t allocated = 0;

std::set<void*> streams, events, modules, functions, graphs;
std::map<void*, std::shared_ptr<std::vector<Op>>> executables;

#define GUARD std::lock_guard<std::recursive_mutex> guard(lock)

void complain(const char* format, ...) __attribute__((format(printf, 1, 2)));
void complain(const char* format, ...) {
    char text[4096];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    fprintf(stderr, "emulator: %s\n", text);
}

Result refuse(Result code, const char* format, ...) __attribute__((format(printf, 2, 3)));
Result refuse(Result code, const char* format, ...) {
    char text[4096];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    complain("%s", text);
    return code;
}

Result need_context(const char* call) {
    if (!initialized) return refuse(NOT_INITIALIZED, "%s before cuInit", call);
    if (current_context == nullptr || retained == 0) return refuse(INVALID_CONTEXT, "%s: no context is current on this thread", call);
    return SUCCESS;
}

#define NEED_CONTEXT                                      \
    GUARD;                                                \
    if (Result code = need_context(__func__)) return code

/// Calls that may wait for the device are not allowed while a stream is captured: to this thread, or to all of them.
Result need_no_capture(const char* call) {
    for (void* each : streams) {
        Stream* stream = static_cast<Stream*>(each);
        if (!stream->capture || stream->capture_mode == 2) continue;
        if (stream->capture_mode == 0 || stream->capture_thread == std::this_thread::get_id()) {
            stream->invalidated = true;
            return refuse(CAPTURE_UNSUPPORTED, "%s while a stream is being captured", call);
        }
    }
    return SUCCESS;
}

#define NEED_NO_CAPTURE \
    if (Result code = need_no_capture(__func__)) return code

// ---- Memory

std::map<uintptr_t, Allocation>::iterator block_of(uintptr_t at, size_t bytes) {
    auto found = device.upper_bound(at);
    if (found == device.begin()) return device.end();
    --found;
    return at >= found->first && bytes <= found->second.bytes && at - found->first <= found->second.bytes - bytes ? found : device.end();
}

bool is_device(uintptr_t at, size_t bytes) { return block_of(at, bytes) != device.end(); }

bool is_pinned(const void* at, size_t bytes) {
    uintptr_t address = reinterpret_cast<uintptr_t>(at);
    auto found = pinned.upper_bound(address);
    if (found == pinned.begin()) return false;
    --found;
    return address + bytes <= found->first + found->second;
}

/// The pieces around a block in which nobody may have written: what the pages have before it and behind it.
template <typename Visit>
void around(uintptr_t at, const Allocation& block, Visit visit) {
    unsigned char *first = reinterpret_cast<unsigned char*>(at), *end = first + block.bytes;
    unsigned char* from = first - block.pages > 64 ? first - 64 : block.pages;
    visit(from, static_cast<size_t>(first - from));
    visit(end, static_cast<size_t>(block.pages + block.page_bytes - end));
}

void check_around(const char* what, std::string& error) {
    for (const auto& [at, block] : device) {
        around(at, block, [&](unsigned char* piece, size_t bytes) {
            for (size_t i = 0; i < bytes; i++) {
                if (piece[i] == CANARY) continue;
                if (error.empty()) {
                    char text[256];
                    snprintf(text, sizeof text, "%s wrote at byte %td of a block of %zu bytes", what, piece + i - reinterpret_cast<unsigned char*>(at), block.bytes);
                    error = text;
                }
                piece[i] = CANARY;
            }
        });
    }
}

/// What a kernel may have meant by an address outside of all blocks.
std::string describe(const void* at) {
    uintptr_t address = reinterpret_cast<uintptr_t>(at);
    char text[128] = "";
    auto behind = device.upper_bound(address), before = behind;
    auto gone = freed.upper_bound(address);
    if (gone != freed.begin() && address < std::prev(gone)->first + std::prev(gone)->second) {
        --gone;
        snprintf(text, sizeof text, ": byte %zu of a block of %zu bytes that was freed", address - gone->first, gone->second);
    } else if (before != device.begin() && address - std::prev(before)->first < std::prev(before)->second.bytes + PAGE) {
        --before;
        snprintf(text, sizeof text, ": byte %zu of a block of %zu bytes", address - before->first, before->second.bytes);
    } else if (behind != device.end() && behind->first - address < 2 * PAGE) {
        snprintf(text, sizeof text, ": %zu bytes before a block of %zu bytes", behind->first - address, behind->second.bytes);
    }
    return text;
}

// ---- Streams

void run_next(Stream* stream) {
    Op op = std::move(stream->waiting.front());
    stream->waiting.pop_front();
    stream->done++;
    if (stream->error != SUCCESS) return;
    std::string error;
    op.run(error);
    if (error.empty()) check_around(op.what.c_str(), error);
    if (error.empty()) return;
    complain("%s", error.c_str());
    stream->error = error.find("no memory of the device") != std::string::npos ? ILLEGAL_ADDRESS : LAUNCH_FAILED;
}

Result run_until(Stream* stream, uint64_t at) {
    while (stream->done < at && !stream->waiting.empty()) run_next(stream);
    return stream->error;
}

/// Of streams that are ordered by events, each may be done with its work as soon as more comes into another: so what one does too early shows, and
/// what the other does too late. Which it is, is drawn anew with every event.
void run_eager(const Stream* beside) {
    for (Stream* each : std::set<Stream*>(beside->linked))
        if (each->eager && !each->capture) run_until(each, each->enqueued);
}

bool draw() {
    static std::minstd_rand random;
    return (random() >> 8) % 2 == 0;
}

Result run_all(Stream* stream) { return run_until(stream, stream->enqueued); }

void run_everything() {
    for (void* stream : std::set<void*>(streams)) run_all(static_cast<Stream*>(stream));
}

/// What a call on the default stream waits for.
void run_before_default() {
    for (void* each : std::set<void*>(streams)) {
        Stream* stream = static_cast<Stream*>(each);
        if (stream->waits_for_default) run_all(stream);
    }
}

Result enqueue(const char* call, void* handle, Op op) {
    if (handle == nullptr) return refuse(NOT_SUPPORTED, "%s (%s) in the default stream, which the emulator has only for calls that wait", call, op.what.c_str());
    if (streams.count(handle) == 0) return refuse(INVALID_HANDLE, "%s: no stream", call);
    Stream* stream = static_cast<Stream*>(handle);
    if (stream->capture) {
        if (stream->invalidated) return CAPTURE_INVALIDATED;
        stream->capture->nodes.push_back(std::move(op));
        return SUCCESS;
    }
    if (stream->error != SUCCESS) return stream->error;
    if (op.arm) op.run = op.arm(op.run);
    stream->waiting.push_back(std::move(op));
    stream->enqueued++;
    run_eager(stream);
    return SUCCESS;
}

std::string range(const char* format, uint64_t at, size_t bytes) {
    char text[256];
    snprintf(text, sizeof text, format, bytes, reinterpret_cast<void*>(at));
    return text;
}

Result need_device(const char* call, DevicePtr at, size_t bytes) {
    if (is_device(at, bytes)) return SUCCESS;
    return refuse(INVALID_VALUE, "%s: %zu bytes at %p are not in one block of device memory", call, bytes, reinterpret_cast<void*>(at));
}

void* byte(DevicePtr at) { return reinterpret_cast<void*>(at); }

Run on_device(DevicePtr at, size_t bytes, const char* call, std::function<void()> work) {
    return [=](std::string& error) {
        if (!is_device(at, bytes))
            error = std::string(call) + range(": %zu bytes at %p are no memory of the device any more", at, bytes);
        else
            work();
    };
}

void fill(DevicePtr at, uint32_t value, size_t size, size_t count) {
    if (size == 1)
        memset(byte(at), static_cast<int>(value), count);
    else
        for (size_t i = 0; i < count; i++) memcpy(static_cast<char*>(byte(at)) + i * size, &value, size);
}

Result set_memory(const char* call, void* stream, DevicePtr at, uint32_t value, size_t size, size_t count) {
    if (at % size != 0) return refuse(INVALID_VALUE, "%s at %p, no multiple of %zu", call, byte(at), size);
    if (count == 0) return SUCCESS;
    if (Result code = need_device(call, at, size * count)) return code;
    return enqueue(call, stream, {call, on_device(at, size * count, call, [=] { fill(at, value, size, count); }), nullptr});
}

Result set_now(const char* call, DevicePtr at, uint32_t value, size_t size, size_t count) {
    if (Result code = need_no_capture(call)) return code;
    if (at % size != 0) return refuse(INVALID_VALUE, "%s at %p, no multiple of %zu", call, byte(at), size);
    if (count == 0) return SUCCESS;
    if (Result code = need_device(call, at, size * count)) return code;
    run_before_default();
    fill(at, value, size, count);
    return SUCCESS;
}

}  // namespace

extern "C" int emulated_enqueue(void* stream, const char* what, const Run& run) {
    GUARD;
    return enqueue(what, stream, {what, run, nullptr});
}

extern "C" bool emulated_is_device(const void* at, size_t bytes) {
    GUARD;
    return is_device(reinterpret_cast<uintptr_t>(at), bytes);
}

extern "C" void emulated_spend(uint64_t nanoseconds) { spent += std::chrono::nanoseconds(nanoseconds); }

extern "C" void emulated_complain(const char* format, ...) {
    char text[4096];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    complain("%s", text);
}

// ---- Device and context

EXPORT Result cuInit(unsigned flags) {
    GUARD;
    if (flags != 0) return INVALID_VALUE;
    const char* set = getenv("PCAE_EMULATED_INIT");
    if (set != nullptr) return static_cast<Result>(atoi(set));
    initialized = true;
    return SUCCESS;
}

EXPORT Result cuDriverGetVersion(int* version) {
    const char* set = getenv("PCAE_EMULATED_DRIVER");
    *version = set != nullptr ? atoi(set) : 13000;
    return SUCCESS;
}

EXPORT Result cuGetErrorName(Result code, const char** name) {
    for (const auto& each : ERRORS)
        if (each.code == code) {
            *name = each.name;
            return SUCCESS;
        }
    *name = nullptr;
    return INVALID_VALUE;
}

EXPORT Result cuGetErrorString(Result code, const char** meaning) {
    for (const auto& each : ERRORS)
        if (each.code == code) {
            *meaning = each.meaning;
            return SUCCESS;
        }
    *meaning = nullptr;
    return INVALID_VALUE;
}

EXPORT Result cuDeviceGetCount(int* count) {
    *count = 1;
    return initialized ? SUCCESS : NOT_INITIALIZED;
}

EXPORT Result cuDeviceGet(int* which, int ordinal) {
    if (!initialized) return NOT_INITIALIZED;
    if (ordinal != 0) return INVALID_DEVICE;
    *which = 0;
    return SUCCESS;
}

EXPORT Result cuDeviceGetName(char* name, int length, int which) {
    if (which != 0) return INVALID_DEVICE;
    snprintf(name, static_cast<size_t>(length), "emulated sm_90");
    return SUCCESS;
}

EXPORT Result cuDeviceTotalMem_v2(size_t* bytes, int which) {
    if (which != 0) return INVALID_DEVICE;
    *bytes = CAPACITY;
    return SUCCESS;
}

EXPORT Result cuDeviceGetAttribute(int* value, int attribute, int which) {
    if (which != 0) return INVALID_DEVICE;
    switch (attribute) {
        case 1: *value = 1024; break;                                      // MAX_THREADS_PER_BLOCK
        case 8: *value = static_cast<int>(MAX_SHARED_UNASKED); break;      // MAX_SHARED_MEMORY_PER_BLOCK
        case 10: *value = 32; break;                                       // WARP_SIZE
        case 16: *value = 5; break;                                        // MULTIPROCESSOR_COUNT: no power of two
        case 75: *value = 9; break;                                        // COMPUTE_CAPABILITY_MAJOR
        case 76: *value = 0; break;                                        // COMPUTE_CAPABILITY_MINOR
        case 97: *value = static_cast<int>(MAX_SHARED); break;             // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        default: return refuse(INVALID_VALUE, "cuDeviceGetAttribute: attribute %d is not emulated; add it in cuda.cpp", attribute);
    }
    return SUCCESS;
}

EXPORT Result cuDevicePrimaryCtxRetain(void** context, int which) {
    GUARD;
    if (!initialized) return NOT_INITIALIZED;
    if (which != 0) return INVALID_DEVICE;
    retained++;
    *context = &the_context;
    return SUCCESS;
}

EXPORT Result cuDevicePrimaryCtxRelease_v2(int which) {
    GUARD;
    if (which != 0) return INVALID_DEVICE;
    if (retained == 0) return refuse(INVALID_CONTEXT, "the primary context is released more often than retained");
    if (--retained == 0) {
        run_everything();
        // Nobody is left who could give them back.
        if (!device.empty() || !pinned.empty() || !streams.empty() || !events.empty() || !modules.empty() || !executables.empty() || !graphs.empty())
            complain("the context is released with %zu blocks of device memory, %zu of pinned memory, %zu streams, %zu events, %zu modules, %zu graphs", device.size(), pinned.size(),
                     streams.size(), events.size(), modules.size(), executables.size() + graphs.size());
    }
    return SUCCESS;
}

EXPORT Result cuCtxSetCurrent(void* context) {
    GUARD;
    if (!initialized) return NOT_INITIALIZED;
    if (context != nullptr && (context != &the_context || retained == 0)) return refuse(INVALID_CONTEXT, "cuCtxSetCurrent: no such context");
    current_context = context;
    return SUCCESS;
}

EXPORT Result cuCtxGetCurrent(void** context) {
    *context = current_context;
    return SUCCESS;
}

EXPORT Result cuCtxSynchronize() {
    NEED_CONTEXT;
    NEED_NO_CAPTURE;
    run_everything();
    for (void* stream : streams)
        if (static_cast<Stream*>(stream)->error != SUCCESS) return static_cast<Stream*>(stream)->error;
    return SUCCESS;
}

// ---- Memory

EXPORT Result cuMemAlloc_v2(DevicePtr* at, size_t bytes) {
    NEED_CONTEXT;
    NEED_NO_CAPTURE;
    if (bytes == 0) return refuse(INVALID_VALUE, "cuMemAlloc of no bytes");
    if (bytes > CAPACITY - allocated) return OUT_OF_MEMORY;
    size_t aligned = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT, page_bytes = (aligned + PAGE - 1) / PAGE * PAGE;
    void* all = mmap(nullptr, page_bytes + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED) return OUT_OF_MEMORY;
    unsigned char* pages = static_cast<unsigned char*>(all) + PAGE;
    if (mprotect(pages, page_bytes, PROT_READ | PROT_WRITE) != 0) return OUT_OF_MEMORY;
    unsigned char* first = pages + page_bytes - aligned;
    Allocation block = {bytes, pages, page_bytes};
    memset(first, POISON, bytes);
    around(reinterpret_cast<uintptr_t>(first), block, [](unsigned char* piece, size_t length) { memset(piece, CANARY, length); });
    device[reinterpret_cast<uintptr_t>(first)] = block;
    allocated += bytes;
    *at = reinterpret_cast<uintptr_t>(first);
    return SUCCESS;
}

EXPORT Result cuMemFree_v2(DevicePtr at) {
    NEED_CONTEXT;
    NEED_NO_CAPTURE;
    if (at == 0) return SUCCESS;
    run_everything();
    auto found = device.find(at);
    if (found == device.end()) return refuse(INVALID_VALUE, "cuMemFree of %p, which is no block of device memory", byte(at));
    allocated -= found->second.bytes;
    // The addresses stay taken, so that whoever still uses them is caught.
    void* pages = mmap(found->second.pages, found->second.page_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    freed[found->first] = found->second.bytes;
    device.erase(found);
    return pages == MAP_FAILED ? OUT_OF_MEMORY : SUCCESS;
}

EXPORT Result cuMemGetInfo_v2(size_t* free, size_t* total) {
    NEED_CONTEXT;
    *total = CAPACITY;
    *free = CAPACITY - allocated;
    return SUCCESS;
}

EXPORT Result cuMemHostAlloc(void** at, size_t bytes, unsigned flags) {
    NEED_CONTEXT;
    NEED_NO_CAPTURE;
    if (bytes == 0) return refuse(INVALID_VALUE, "cuMemHostAlloc of no bytes");
    if ((flags & ~7u) != 0) return refuse(INVALID_VALUE, "cuMemHostAlloc: flags %#x", flags);
    *at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (*at == MAP_FAILED) return OUT_OF_MEMORY;
    memset(*at, POISON, bytes);
    pinned[reinterpret_cast<uintptr_t>(*at)] = bytes;
    return SUCCESS;
}

EXPORT Result cuMemFreeHost(void* at) {
    NEED_CONTEXT;
    NEED_NO_CAPTURE;
    run_everything();
    auto found = pinned.find(reinterpret_cast<uintptr_t>(at));
    if (found == pinned.end()) return refuse(INVALID_VALUE, "cuMemFreeHost of %p, which is no pinned memory", at);
    munmap(at, found->second);
    pinned.erase(found);
    return SUCCESS;
}

EXPORT Result cuMemcpyHtoDAsync_v2(DevicePtr to, const void* from, size_t bytes, void* stream) {
    NEED_CONTEXT;
    if (bytes == 0) return SUCCESS;
    if (Result code = need_device(__func__, to, bytes)) return code;
    if (!is_pinned(from, bytes)) {
        if (streams.count(stream) != 0 && static_cast<Stream*>(stream)->capture) {
            static_cast<Stream*>(stream)->invalidated = true;
            return refuse(CAPTURE_UNSUPPORTED, "cuMemcpyHtoDAsync from memory that is not pinned, while the stream is captured");
        }
        // The driver takes its own copy of such memory before it returns.
        auto staged = std::make_shared<std::vector<char>>(static_cast<const char*>(from), static_cast<const char*>(from) + bytes);
        return enqueue(__func__, stream, {"cuMemcpyHtoDAsync", on_device(to, bytes, "cuMemcpyHtoDAsync", [=] { memcpy(byte(to), staged->data(), bytes); }), nullptr});
    }
    Run run = on_device(to, bytes, "cuMemcpyHtoDAsync", [=] { memcpy(byte(to), from, bytes); });
    auto arm = [=](Run copy) -> Run {
        auto before = std::make_shared<std::vector<char>>(static_cast<const char*>(from), static_cast<const char*>(from) + bytes);
        return [=](std::string& error) {
            if (!is_pinned(from, bytes))
                error = "cuMemcpyHtoDAsync: the pinned memory was freed before the copy";
            else if (memcmp(before->data(), from, bytes) != 0)
                error = "cuMemcpyHtoDAsync: the host changed the pinned memory before the copy was done";
            else
                copy(error);
        };
    };
    return enqueue(__func__, stream, {"cuMemcpyHtoDAsync", run, arm});
}

EXPORT Result cuMemcpyDtoHAsync_v2(void* to, DevicePtr from, size_t bytes, void* stream) {
    NEED_CONTEXT;
    if (bytes == 0) return SUCCESS;
    if (Result code = need_device(__func__, from, bytes)) return code;
    if (!is_pinned(to, bytes)) {
        if (streams.count(stream) == 0) return refuse(INVALID_HANDLE, "%s: no stream", __func__);
        Stream* found = static_cast<Stream*>(stream);
        if (found->capture) {
            found->invalidated = true;
            return refuse(CAPTURE_UNSUPPORTED, "cuMemcpyDtoHAsync to memory that is not pinned, while the stream is captured");
        }
        // To such memory the call waits.
        Result code = run_all(found);
        if (code == SUCCESS) memcpy(to, byte(from), bytes);
        return code;
    }
    Run run = on_device(from, bytes, "cuMemcpyDtoHAsync", [=] { memcpy(to, byte(from), bytes); });
    auto arm = [=](Run copy) -> Run {
        // Nobody may look before the copy is done.
        memset(to, POISON, bytes);
        return [=](std::string& error) {
            if (!is_pinned(to, bytes))
                error = "cuMemcpyDtoHAsync: the pinned memory was freed before the copy";
            else
                copy(error);
        };
    };
    return enqueue(__func__, stream, {"cuMemcpyDtoHAsync", run, arm});
}

EXPORT Result cuMemcpyDtoDAsync_v2(DevicePtr to, DevicePtr from, size_t bytes, void* stream) {
    NEED_CONTEXT;
    if (bytes == 0) return SUCCESS;
    if (Result code = need_device(__func__, from, bytes)) return code;
    if (Result code = need_device(__func__, to, bytes)) return code;
    if (to < from + bytes && from < to + bytes) return refuse(INVALID_VALUE, "cuMemcpyDtoDAsync: the two overlap");
    Run copy = on_device(from, bytes, "cuMemcpyDtoDAsync", [=] { memcpy(byte(to), byte(from), bytes); });
    Run run = [=](std::string& error) {
        on_device(to, bytes, "cuMemcpyDtoDAsync", [] {})(error);
        if (error.empty()) copy(error);
    };
    return enqueue(__func__, stream, {"cuMemcpyDtoDAsync", run, nullptr});
}

EXPORT Result cuMemcpyHtoD_v2(DevicePtr to, const void* from, size_t bytes) {
    NEED_CONTEXT;
    NEED_NO_CAPTURE;
    if (bytes == 0) return SUCCESS;
    if (Result code = need_device(__func__, to, bytes)) return code;
    run_before_default();
    memcpy(byte(to), from, bytes);
    return SUCCESS;
}

EXPORT Result cuMemcpyDtoH_v2(void* to, DevicePtr from, size_t bytes) {
    NEED_CONTEXT;
    NEED_NO_CAPTURE;
    if (bytes == 0) return SUCCESS;
    if (Result code = need_device(__func__, from, bytes)) return code;
    run_before_default();
    memcpy(to, byte(from), bytes);
    return SUCCESS;
}

EXPORT Result cuMemsetD8Async(DevicePtr at, unsigned char value, size_t count, void* stream) {
    NEED_CONTEXT;
    return set_memory(__func__, stream, at, value, 1, count);
}

EXPORT Result cuMemsetD16Async(DevicePtr at, unsigned short value, size_t count, void* stream) {
    NEED_CONTEXT;
    return set_memory(__func__, stream, at, value, 2, count);
}

EXPORT Result cuMemsetD32Async(DevicePtr at, unsigned value, size_t count, void* stream) {
    NEED_CONTEXT;
    return set_memory(__func__, stream, at, value, 4, count);
}

EXPORT Result cuMemsetD8_v2(DevicePtr at, unsigned char value, size_t count) {
    NEED_CONTEXT;
    return set_now(__func__, at, value, 1, count);
}

EXPORT Result cuMemsetD32_v2(DevicePtr at, unsigned value, size_t count) {
    NEED_CONTEXT;
    return set_now(__func__, at, value, 4, count);
}

// ---- Streams and events

// As on devices so far. Work of all streams goes by chance here anyway.
static constexpr int GREATEST_PRIORITY = -5;

EXPORT Result cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    NEED_CONTEXT;
    *least = 0;
    *greatest = GREATEST_PRIORITY;
    return SUCCESS;
}

EXPORT Result cuStreamCreateWithPriority(void** stream, unsigned flags, int priority) {
    NEED_CONTEXT;
    if (flags > 1) return refuse(INVALID_VALUE, "cuStreamCreateWithPriority: flags %#x", flags);
    if (priority > 0 || priority < GREATEST_PRIORITY) return refuse(INVALID_VALUE, "cuStreamCreateWithPriority: priority %d", priority);
    Stream* made = new Stream();
    made->waits_for_default = flags == 0;
    streams.insert(made);
    *stream = made;
    return SUCCESS;
}

EXPORT Result cuStreamDestroy_v2(void* handle) {
    NEED_CONTEXT;
    if (streams.count(handle) == 0) return refuse(INVALID_HANDLE, "cuStreamDestroy: no stream");
    Stream* stream = static_cast<Stream*>(handle);
    if (stream->capture) complain("cuStreamDestroy while the stream is captured");
    run_all(stream);
    for (void* event : events)
        if (static_cast<Event*>(event)->stream == stream) static_cast<Event*>(event)->stream = nullptr;
    for (Stream* other : stream->linked) other->linked.erase(stream);
    streams.erase(handle);
    delete stream;
    return SUCCESS;
}

EXPORT Result cuStreamSynchronize(void* handle) {
    NEED_CONTEXT;
    if (handle == nullptr) {
        NEED_NO_CAPTURE;
        run_before_default();
        return SUCCESS;
    }
    if (streams.count(handle) == 0) return refuse(INVALID_HANDLE, "cuStreamSynchronize: no stream");
    Stream* stream = static_cast<Stream*>(handle);
    if (stream->capture) {
        stream->invalidated = true;
        return refuse(CAPTURE_UNSUPPORTED, "cuStreamSynchronize while the stream is captured");
    }
    NEED_NO_CAPTURE;
    return run_all(stream);
}

EXPORT Result cuStreamWaitEvent(void* handle, void* event_handle, unsigned flags) {
    NEED_CONTEXT;
    if (streams.count(handle) == 0) return refuse(INVALID_HANDLE, "cuStreamWaitEvent: no stream");
    if (events.count(event_handle) == 0) return refuse(INVALID_HANDLE, "cuStreamWaitEvent: no event");
    if (flags != 0) return refuse(INVALID_VALUE, "cuStreamWaitEvent: flags %#x are not emulated", flags);
    Stream* stream = static_cast<Stream*>(handle);
    const Event* event = static_cast<Event*>(event_handle);
    if (stream->capture) return refuse(NOT_SUPPORTED, "cuStreamWaitEvent while the stream is captured is not emulated");
    // Where it is now: what is recorded later is another wait. Never recorded, or of a stream that is gone and so done, it is reached.
    Stream* other = event->stream;
    if (other == nullptr || other == stream) return SUCCESS;
    uint64_t at = event->at;
    stream->linked.insert(other);
    other->linked.insert(stream);
    return enqueue(__func__, handle, {"cuStreamWaitEvent", [=](std::string& error) {
        if (streams.count(other) == 0) return;
        if (run_until(other, at) != SUCCESS) error = "cuStreamWaitEvent: the work that is waited for failed";
    }, nullptr});
}

EXPORT Result cuStreamQuery(void* handle) {
    NEED_CONTEXT;
    if (streams.count(handle) == 0) return refuse(INVALID_HANDLE, "cuStreamQuery: no stream");
    Stream* stream = static_cast<Stream*>(handle);
    if (stream->capture) {
        stream->invalidated = true;
        return refuse(CAPTURE_UNSUPPORTED, "cuStreamQuery while the stream is captured");
    }
    NEED_NO_CAPTURE;
    if (stream->error != SUCCESS || stream->done == stream->enqueued) return stream->error;
    // Who asks again and again gets there.
    run_next(stream);
    return stream->error != SUCCESS ? stream->error : NOT_READY;
}

EXPORT Result cuEventCreate(void** event, unsigned flags) {
    NEED_CONTEXT;
    Event* made = new Event();
    if ((flags & 2) == 0) made->time.reset(new std::chrono::steady_clock::time_point());  // DISABLE_TIMING
    events.insert(made);
    *event = made;
    return SUCCESS;
}

EXPORT Result cuEventDestroy_v2(void* event) {
    NEED_CONTEXT;
    if (events.erase(event) == 0) return refuse(INVALID_HANDLE, "cuEventDestroy: no event");
    delete static_cast<Event*>(event);
    return SUCCESS;
}

EXPORT Result cuEventRecord(void* handle, void* stream) {
    NEED_CONTEXT;
    if (events.count(handle) == 0) return refuse(INVALID_HANDLE, "cuEventRecord: no event");
    if (streams.count(stream) == 0) return refuse(INVALID_HANDLE, "cuEventRecord: no stream");
    Stream* found = static_cast<Stream*>(stream);
    if (found->capture) return refuse(NOT_SUPPORTED, "cuEventRecord while the stream is captured is not emulated");
    if (found->error != SUCCESS) return found->error;
    Event* event = static_cast<Event*>(handle);
    if (auto time = event->time) {
        *time = {};
        if (Result code = enqueue(__func__, stream, {"cuEventRecord", [=](std::string&) { *time = std::chrono::steady_clock::now() + spent; }, nullptr})) return code;
    }
    event->stream = found;
    event->at = found->enqueued;
    found->eager = draw();
    return SUCCESS;
}

EXPORT Result cuEventSynchronize(void* handle) {
    NEED_CONTEXT;
    NEED_NO_CAPTURE;
    if (events.count(handle) == 0) return refuse(INVALID_HANDLE, "cuEventSynchronize: no event");
    Event* event = static_cast<Event*>(handle);
    return event->stream == nullptr ? SUCCESS : run_until(event->stream, event->at);
}

/// What every driver has.
EXPORT Result cuEventElapsedTime(float* milliseconds, void* first, void* second) {
    NEED_CONTEXT;
    std::chrono::steady_clock::time_point times[2];
    void* handles[] = {first, second};
    for (int i = 0; i < 2; i++) {
        if (events.count(handles[i]) == 0) return refuse(INVALID_HANDLE, "cuEventElapsedTime: no event");
        const Event* event = static_cast<Event*>(handles[i]);
        if (!event->time) return refuse(INVALID_HANDLE, "cuEventElapsedTime: the event was created to keep no time");
        if (event->stream == nullptr) return refuse(INVALID_HANDLE, "cuEventElapsedTime: the event was not recorded");
        if (event->stream->done < event->at) return NOT_READY;
        times[i] = *event->time;
    }
    *milliseconds = std::chrono::duration<float, std::milli>(times[1] - times[0]).count();
    return SUCCESS;
}

EXPORT Result cuEventElapsedTime_v2(float* milliseconds, void* first, void* second) {
    int version = 0;
    cuDriverGetVersion(&version);
    if (version < 12080) return refuse(NOT_SUPPORTED, "cuEventElapsedTime_v2 is not in this driver");
    return cuEventElapsedTime(milliseconds, first, second);
}

EXPORT Result cuEventQuery(void* handle) {
    NEED_CONTEXT;
    NEED_NO_CAPTURE;
    if (events.count(handle) == 0) return refuse(INVALID_HANDLE, "cuEventQuery: no event");
    Event* event = static_cast<Event*>(handle);
    if (event->stream == nullptr || event->stream->done >= event->at) return SUCCESS;
    run_next(event->stream);
    return event->stream->error != SUCCESS ? event->stream->error : NOT_READY;
}

// ---- Graphs

EXPORT Result cuStreamBeginCapture_v2(void* handle, int mode) {
    NEED_CONTEXT;
    if (streams.count(handle) == 0) return refuse(INVALID_HANDLE, "cuStreamBeginCapture: no stream (the default one cannot be captured)");
    Stream* stream = static_cast<Stream*>(handle);
    if (stream->error != SUCCESS) return stream->error;
    if (stream->capture) return refuse(INVALID_VALUE, "cuStreamBeginCapture: the stream is being captured");
    if (mode < 0 || mode > 2) return refuse(INVALID_VALUE, "cuStreamBeginCapture: mode %d", mode);
    stream->capture.reset(new Graph());
    stream->invalidated = false;
    stream->capture_mode = mode;
    stream->capture_thread = std::this_thread::get_id();
    return SUCCESS;
}

EXPORT Result cuStreamEndCapture(void* handle, void** graph) {
    NEED_CONTEXT;
    *graph = nullptr;
    if (streams.count(handle) == 0) return refuse(INVALID_HANDLE, "cuStreamEndCapture: no stream");
    Stream* stream = static_cast<Stream*>(handle);
    if (!stream->capture) return refuse(CAPTURE_UNMATCHED, "cuStreamEndCapture: the stream is not captured");
    if (stream->capture_mode != 2 && stream->capture_thread != std::this_thread::get_id()) return refuse(CAPTURE_WRONG_THREAD, "cuStreamEndCapture by another thread");
    std::unique_ptr<Graph> made = std::move(stream->capture);
    if (stream->invalidated) return CAPTURE_INVALIDATED;
    *graph = made.get();
    graphs.insert(made.release());
    return SUCCESS;
}

EXPORT Result cuStreamIsCapturing(void* handle, int* status) {
    NEED_CONTEXT;
    if (streams.count(handle) == 0) return refuse(INVALID_HANDLE, "cuStreamIsCapturing: no stream");
    Stream* stream = static_cast<Stream*>(handle);
    *status = !stream->capture ? 0 : stream->invalidated ? 2 : 1;
    return SUCCESS;
}

EXPORT Result cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long flags) {
    NEED_CONTEXT;
    if (graphs.count(graph) == 0) return refuse(INVALID_HANDLE, "cuGraphInstantiate: no graph");
    if (flags != 0) return refuse(INVALID_VALUE, "cuGraphInstantiate: flags %#llx are not emulated", flags);
    if (getenv("PCAE_EMULATED_NO_GRAPHS") != nullptr) return NOT_SUPPORTED;
    auto nodes = std::make_shared<std::vector<Op>>(static_cast<Graph*>(graph)->nodes);
    *executable = nodes.get();
    executables[*executable] = nodes;
    return SUCCESS;
}

EXPORT Result cuGraphLaunch(void* executable, void* stream) {
    NEED_CONTEXT;
    auto found = executables.find(executable);
    if (found == executables.end()) return refuse(INVALID_HANDLE, "cuGraphLaunch: no executable graph");
    if (streams.count(stream) == 0) return refuse(INVALID_HANDLE, "cuGraphLaunch: no stream");
    if (static_cast<Stream*>(stream)->capture) return refuse(NOT_SUPPORTED, "cuGraphLaunch while the stream is captured is not emulated");
    // A launched graph lives until it is done, whatever becomes of its handle: each node is copied.
    for (const Op& node : *found->second)
        if (Result code = enqueue(__func__, stream, node)) return code;
    return SUCCESS;
}

EXPORT Result cuGraphExecDestroy(void* executable) {
    NEED_CONTEXT;
    if (executables.erase(executable) == 0) return refuse(INVALID_HANDLE, "cuGraphExecDestroy: no executable graph");
    return SUCCESS;
}

EXPORT Result cuGraphDestroy(void* graph) {
    NEED_CONTEXT;
    if (graphs.erase(graph) == 0) return refuse(INVALID_HANDLE, "cuGraphDestroy: no graph");
    delete static_cast<Graph*>(graph);
    return SUCCESS;
}

// ---- Modules and kernels

namespace {

/// Length of a shared object: up to the end of its last section, or of the table of sections.
size_t image_length(const unsigned char* image) {
    ElfW(Ehdr) header;
    if (memcmp(image, ELFMAG, SELFMAG) != 0) return 0;
    memcpy(&header, image, sizeof header);
    size_t length = header.e_shoff + size_t(header.e_shnum) * header.e_shentsize;
    for (size_t i = 0; i < header.e_shnum; i++) {
        ElfW(Shdr) section;
        memcpy(&section, image + header.e_shoff + i * header.e_shentsize, sizeof section);
        if (section.sh_type != SHT_NOBITS && section.sh_offset + section.sh_size > length) length = section.sh_offset + section.sh_size;
    }
    return length;
}

int find_bss(struct dl_phdr_info* info, size_t, void* data) {
    Module* module = static_cast<Module*>(data);
    struct link_map* map = nullptr;
    dlinfo(module->library, RTLD_DI_LINKMAP, &map);
    if (info->dlpi_addr != map->l_addr) return 0;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr)& segment = info->dlpi_phdr[i];
        if (segment.p_type != PT_LOAD || segment.p_memsz <= segment.p_filesz) continue;
        module->static_shared = reinterpret_cast<unsigned char*>(info->dlpi_addr + segment.p_vaddr + segment.p_filesz);
        module->static_bytes = segment.p_memsz - segment.p_filesz;
    }
    return 1;
}

}  // namespace

EXPORT Result cuModuleLoadData(void** handle, const void* image) {
    NEED_CONTEXT;
    NEED_NO_CAPTURE;
    size_t length = image_length(static_cast<const unsigned char*>(image));
    if (length == 0) return refuse(INVALID_IMAGE, "cuModuleLoadData: not what the emulated compiler makes");
    std::unique_ptr<Module> module(new Module());
    module->file = memfd_create("kernels", MFD_CLOEXEC);
    for (size_t written = 0; written < length;) {
        ssize_t more = write(module->file, static_cast<const char*>(image) + written, length - written);
        if (more <= 0) return refuse(OUT_OF_MEMORY, "cuModuleLoadData: no memory for the image");
        written += static_cast<size_t>(more);
    }
    std::string path = "/proc/self/fd/" + std::to_string(module->file);
    module->library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    const emulated::Module* table = module->library != nullptr ? static_cast<const emulated::Module*>(dlsym(module->library, "emulated_module")) : nullptr;
    if (table == nullptr) {
        const char* reason = dlerror();
        close(module->file);
        return refuse(INVALID_IMAGE, "cuModuleLoadData: %s", reason);
    }
    module->runtime = table->runtime;
    dl_iterate_phdr(find_bss, module.get());
    for (size_t i = 0; i < table->count; i++) {
        module->functions.emplace_back(new Function{&table->kernels[i], module.get(), MAX_SHARED_UNASKED});
        functions.insert(module->functions.back().get());
    }
    modules.insert(module.get());
    *handle = module.release();
    return SUCCESS;
}

EXPORT Result cuModuleUnload(void* handle) {
    NEED_CONTEXT;
    NEED_NO_CAPTURE;
    if (modules.count(handle) == 0) return refuse(INVALID_HANDLE, "cuModuleUnload: no module");
    run_everything();
    Module* module = static_cast<Module*>(handle);
    for (const auto& function : module->functions) functions.erase(function.get());
    dlclose(module->library);
    close(module->file);
    modules.erase(handle);
    delete module;
    return SUCCESS;
}

EXPORT Result cuModuleGetFunction(void** function, void* handle, const char* name) {
    NEED_CONTEXT;
    if (modules.count(handle) == 0) return refuse(INVALID_HANDLE, "cuModuleGetFunction: no module");
    std::string known;
    for (const auto& each : static_cast<Module*>(handle)->functions) {
        if (strcmp(each->kernel->name, name) == 0) {
            *function = each.get();
            return SUCCESS;
        }
        known += std::string(known.empty() ? "" : ", ") + each->kernel->name;
    }
    return refuse(NOT_FOUND, "cuModuleGetFunction: no kernel %s, only %s", name, known.c_str());
}

EXPORT Result cuFuncSetAttribute(void* handle, int attribute, int value) {
    NEED_CONTEXT;
    if (functions.count(handle) == 0) return refuse(INVALID_HANDLE, "cuFuncSetAttribute: no function");
    Function* function = static_cast<Function*>(handle);
    if (attribute != 8) return refuse(INVALID_VALUE, "cuFuncSetAttribute: attribute %d is not emulated", attribute);
    if (value < 0 || static_cast<size_t>(value) > MAX_SHARED)
        return refuse(INVALID_VALUE, "cuFuncSetAttribute: %d bytes of dynamic shared memory for %s, of %zu", value, function->kernel->name, MAX_SHARED);
    function->max_dynamic = static_cast<size_t>(value);
    return SUCCESS;
}

EXPORT Result cuLaunchKernel(void* handle, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared, void* stream,
                             void** arguments, void** extra) {
    NEED_CONTEXT;
    if (functions.count(handle) == 0) return refuse(INVALID_HANDLE, "cuLaunchKernel: no function");
    const Function* function = static_cast<Function*>(handle);
    const emulated::Kernel* kernel = function->kernel;
    if (extra != nullptr) return refuse(NOT_SUPPORTED, "cuLaunchKernel of %s: `extra` is not emulated", kernel->name);
    Index grid = {grid_x, grid_y, grid_z}, block = {block_x, block_y, block_z};
    if (grid_x == 0 || grid_y == 0 || grid_z == 0 || grid_x > 0x7fffffff || grid_y > 65535 || grid_z > 65535)
        return refuse(INVALID_VALUE, "cuLaunchKernel of %s: a grid of %u x %u x %u", kernel->name, grid_x, grid_y, grid_z);
    size_t threads = size_t(block_x) * block_y * block_z, most = kernel->max_threads != 0 ? kernel->max_threads : 1024;
    if (block_z > 64 || threads == 0 || threads > most)
        return refuse(INVALID_VALUE, "cuLaunchKernel of %s: a block of %u x %u x %u, at most %zu threads", kernel->name, block_x, block_y, block_z, most);
    if (shared > function->max_dynamic)
        return refuse(INVALID_VALUE, "cuLaunchKernel of %s: %u bytes of dynamic shared memory, allowed were %zu", kernel->name, shared, function->max_dynamic);
    // Each argument in its own 16 bytes, as it is now.
    auto values = std::make_shared<std::vector<std::array<unsigned char, 16>>>(kernel->arguments);
    for (size_t i = 0; i < kernel->arguments; i++) {
        if (arguments == nullptr || arguments[i] == nullptr) return refuse(INVALID_VALUE, "cuLaunchKernel of %s: %zu arguments, but number %zu is missing", kernel->name, kernel->arguments, i);
        if (kernel->sizes[i] > 16) return refuse(NOT_SUPPORTED, "cuLaunchKernel of %s: argument %zu has %zu bytes", kernel->name, i, kernel->sizes[i]);
        memcpy((*values)[i].data(), arguments[i], kernel->sizes[i]);
    }
    Run run = [=](std::string& error) {
        if (functions.count(handle) == 0) {
            error = "a kernel of an unloaded module is launched";
            return;
        }
        std::vector<void*> places;
        for (auto& value : *values) places.push_back(value.data());
        const Module* module = function->module;
        emulated::execute({kernel, grid, block, shared, places.data(), module->static_shared, module->static_bytes, module->runtime, describe}, error);
    };
    return enqueue("cuLaunchKernel", stream, {std::string("kernel ") + kernel->name, run, nullptr});
}
