// A block's threads as fibers on the calling thread: each runs until it waits for others.
//
// Blocks run forward or backward, and so do the warps and lanes of each block, at random: what is right only in one order
// shows. Static and dynamic shared memory is full of NaN when a block starts.

#include "fibers.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ucontext.h>

#include <vector>

#if defined(__x86_64__) && !defined(PCAE_EMULATED_UCONTEXT)
#define EMULATED_OWN_SWITCH 1
#else
#include <ucontext.h>
#endif

namespace emulated {
namespace {

constexpr size_t STACK = 256 * 1024;
constexpr size_t PAGE = 4096;
/// Below each stack, so much that cannot be touched: more than a kernel's largest frame.
constexpr size_t GAP = 64 * 1024;
constexpr unsigned char POISON = 0xff;   // a NaN in every format
constexpr unsigned char CANARY = 0xfd;

enum class State { READY, AT_BARRIER, IN_WARP, DONE };

struct Copy {
    void* shared;
    unsigned char bytes[16];
    const void* global;
    bool valid;
    unsigned group;
};

struct Fiber {
#ifdef EMULATED_OWN_SWITCH
    void* stack_pointer;
#else
    ucontext_t context;
#endif
    State state;
    Index index;
    const char* place;
    int vote;
    // In a warp's common operation:
    const char* what;
    unsigned mask;
    Together together;
    void* mine;
    // cp.async
    std::vector<Copy> copies;
    unsigned group;
};

std::vector<Fiber> fibers;
unsigned char* stacks = nullptr;
unsigned char* shared_end = nullptr;   // behind it is a page that cannot be touched
size_t shared_capacity = 0;

const Launch* launch = nullptr;
Runtime runtime;
unsigned count = 0;   // threads of a block
unsigned current = 0;
int votes = 0;
std::string failure;
sigjmp_buf escape;
volatile sig_atomic_t in_kernel = 0;

#ifdef EMULATED_OWN_SWITCH
void* scheduler;
extern "C" void emulated_switch(void** from, void* to);
// The registers that a called function must keep (System V), and the stack.
asm(R"(
.text
.globl emulated_switch
.hidden emulated_switch
.type emulated_switch, @function
emulated_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulated_switch, .-emulated_switch
)");
#else
ucontext_t scheduler;
#endif

void to_scheduler() {
#ifdef EMULATED_OWN_SWITCH
    emulated_switch(&fibers[current].stack_pointer, scheduler);
#else
    swapcontext(&fibers[current].context, &scheduler);
#endif
}

void to_fiber(unsigned which) {
    current = which;
    runtime.thread = fibers[which].index;
#ifdef EMULATED_OWN_SWITCH
    emulated_switch(&scheduler, fibers[which].stack_pointer);
#else
    swapcontext(&scheduler, &fibers[which].context);
#endif
}

void body() {
    launch->kernel->call(launch->arguments);
    fibers[current].state = State::DONE;
    to_scheduler();
    abort();
}

void prepare(Fiber& fiber, unsigned which) {
    unsigned char* stack = stacks + which * (STACK + GAP) + GAP;
#ifdef EMULATED_OWN_SWITCH
    void** top = reinterpret_cast<void**>(stack + STACK);
    *--top = nullptr;   // keeps the alignment that a called function expects
    *--top = reinterpret_cast<void*>(body);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    fiber.stack_pointer = top;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, body, 0);
#endif
    fiber.state = State::READY;
    fiber.copies.clear();
    fiber.group = 0;
}

void print(std::string& to, const char* format, ...) __attribute__((format(printf, 2, 3)));
void print(std::string& to, const char* format, ...) {
    char text[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    to += text;
}

void name_thread(std::string& to) {
    print(to, "kernel %s<<<(%u, %u, %u), (%u, %u, %u)>>>, block (%u, %u, %u), thread (%u, %u, %u): ", launch->kernel->name, launch->grid.x, launch->grid.y, launch->grid.z,
          launch->block.x, launch->block.y, launch->block.z, runtime.block.x, runtime.block.y, runtime.block.z, runtime.thread.x, runtime.thread.y, runtime.thread.z);
}

void fail(const char* format, ...) {
    char text[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    failure.clear();
    name_thread(failure);
    failure += text;
    siglongjmp(escape, 1);
}

// ---- What threads ask for

bool same(const char* a, const char* b) { return a == b || (a != nullptr && b != nullptr && strcmp(a, b) == 0); }

int barrier(const char* place, int vote) {
    Fiber& fiber = fibers[current];
    fiber.state = State::AT_BARRIER;
    fiber.place = place;
    fiber.vote = vote;
    to_scheduler();
    return votes;
}

void warp(const char* what, const char* place, unsigned mask, Together together, void* mine) {
    Fiber& fiber = fibers[current];
    unsigned first = current & ~31u, lane = current & 31u;
    if (!(mask >> lane & 1)) fail("%s (%s): lane %u is not in its own mask %#x", what, place, lane, mask);
    fiber.state = State::IN_WARP;
    fiber.what = what;
    fiber.place = place;
    fiber.mask = mask;
    fiber.together = together;
    fiber.mine = mine;
    bool last = true;
    for (unsigned i = 0; i < 32; i++) {
        if (!(mask >> i & 1)) continue;
        if (first + i >= count) fail("%s (%s): the mask %#x names lane %u, but the block ends before it", what, place, mask, i);
        const Fiber& other = fibers[first + i];
        if (other.state != State::IN_WARP || other.mask != mask || other.together != together) last = false;
    }
    if (last) {
        void* lanes[32] = {};
        for (unsigned i = 0; i < 32; i++)
            if (mask >> i & 1) lanes[i] = fibers[first + i].mine;
        together(lanes, mask);
        for (unsigned i = 0; i < 32; i++)
            if (mask >> i & 1) fibers[first + i].state = State::READY;
        return;
    }
    to_scheduler();
}

bool is_shared(const void* at, size_t size) {
    const unsigned char* byte = static_cast<const unsigned char*>(at);
    return (byte >= runtime.dynamic_shared && byte + size <= runtime.dynamic_shared + launch->dynamic_bytes) ||
           (byte >= launch->static_shared && byte + size <= launch->static_shared + launch->static_bytes);
}

void copy(void* shared, const void* global, bool valid) {
    if (!is_shared(shared, 16)) fail("cp.async to %p, which is not in shared memory", shared);
    Fiber& fiber = fibers[current];
    Copy started = {shared, {}, global, valid, fiber.group};
    // What is not there now faults here, where it can be named.
    if (valid) memcpy(started.bytes, global, 16);
    memset(shared, POISON, 16);
    fiber.copies.push_back(started);
}

void copy_commit() { fibers[current].group++; }

void copy_wait(int pending) {
    Fiber& fiber = fibers[current];
    size_t kept = 0;
    for (const Copy& started : fiber.copies) {
        // Groups are numbered from 0 and `group` is the one being collected.
        if (started.group + static_cast<unsigned>(pending) < fiber.group)
            memcpy(started.shared, started.bytes, 16);
        else
            fiber.copies[kept++] = started;
    }
    fiber.copies.resize(kept);
}

// ---- One block

void describe_deadlock() {
    failure.clear();
    print(failure, "kernel %s<<<(%u, %u, %u), (%u, %u, %u)>>>, block (%u, %u, %u): threads wait for each other for ever:", launch->kernel->name, launch->grid.x, launch->grid.y,
          launch->grid.z, launch->block.x, launch->block.y, launch->block.z, runtime.block.x, runtime.block.y, runtime.block.z);
    // Neighbours that are in the same place are named together.
    for (unsigned first = 0; first < count;) {
        const Fiber& fiber = fibers[first];
        unsigned last = first;
        while (last + 1 < count && fibers[last + 1].state == fiber.state && (fiber.state == State::DONE || same(fibers[last + 1].place, fiber.place))) last++;
        if (first == last)
            print(failure, "\n  thread %u ", first);
        else
            print(failure, "\n  threads %u to %u ", first, last);
        if (fiber.state == State::DONE)
            failure += "returned";
        else if (fiber.state == State::AT_BARRIER)
            print(failure, "at the barrier of %s", fiber.place);
        else
            print(failure, "at %s (%s) with mask %#x", fiber.what, fiber.place, fiber.mask);
        first = last + 1;
        if (failure.size() > 4000) {
            failure += "\n  …";
            break;
        }
    }
}

void run_block(bool backward) {
    for (unsigned i = 0; i < count; i++) prepare(fibers[i], i);
    unsigned warps = (count + 31) / 32;
    for (;;) {
        bool progress = false;
        for (unsigned w = 0; w < warps; w++) {
            unsigned first = (backward ? warps - 1 - w : w) * 32, lanes = count - first < 32 ? count - first : 32;
            for (bool again = true; again;) {
                again = false;
                for (unsigned l = 0; l < lanes; l++) {
                    unsigned which = first + (backward ? lanes - 1 - l : l);
                    if (fibers[which].state != State::READY) continue;
                    to_fiber(which);
                    again = progress = true;
                }
            }
        }
        unsigned done = 0, waiting = 0;
        votes = 0;
        bool same_place = true;
        for (unsigned i = 0; i < count; i++) {
            done += fibers[i].state == State::DONE;
            if (fibers[i].state != State::AT_BARRIER) continue;
            waiting++;
            votes += fibers[i].vote;
            same_place &= same(fibers[i].place, fibers[0].place);
        }
        if (done == count) return;
        if (waiting == count && same_place) {
            for (unsigned i = 0; i < count; i++) fibers[i].state = State::READY;
        } else if (!progress || waiting + done == count) {
            describe_deadlock();
            siglongjmp(escape, 1);
        }
    }
}

// ---- Signals: an access outside of all memory ends the kernel, not the process

struct sigaction before_segv, before_bus, before_ill, before_fpe;

void on_signal(int signal, siginfo_t* info, void* context) {
    if (in_kernel != 0) {
        failure.clear();
        name_thread(failure);
        const unsigned char* at = static_cast<const unsigned char*>(info->si_addr);
        const unsigned char* stack = stacks + current * (STACK + GAP);
        if (signal == SIGFPE)
            failure += "division by zero";
        else if (signal == SIGILL)
            failure += "illegal instruction";
        else if (at >= stack && at < stack + GAP)
            failure += "the stack is full";
        else if (at >= shared_end && at < shared_end + PAGE)
            print(failure, "access beyond dynamic shared memory (%zu bytes), at byte %zd", launch->dynamic_bytes, at - runtime.dynamic_shared);
        else
            // An address that is no address (a poisoned index) is reported as 0.
            print(failure, "access to %p, which is no memory of the device%s", info->si_addr, launch->describe(info->si_addr).c_str());
        siglongjmp(escape, 1);
    }
    const struct sigaction& before = signal == SIGSEGV ? before_segv : signal == SIGBUS ? before_bus : signal == SIGILL ? before_ill : before_fpe;
    if (before.sa_flags & SA_SIGINFO) {
        before.sa_sigaction(signal, info, context);
    } else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
        before.sa_handler(signal);
    } else {
        sigaction(signal, &before, nullptr);   // returning runs into it again
    }
}

void set_up() {
    static bool done = false;
    if (!done) {
        done = true;
        runtime.barrier = barrier;
        runtime.warp = warp;
        runtime.copy = copy;
        runtime.copy_commit = copy_commit;
        runtime.copy_wait = copy_wait;
        runtime.is_shared = is_shared;
        runtime.fail = fail;
        fibers.resize(1024);
        stacks = static_cast<unsigned char*>(mmap(nullptr, 1024 * (STACK + GAP), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        shared_capacity = 256 * 1024;
        unsigned char* shared = static_cast<unsigned char*>(mmap(nullptr, shared_capacity + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        if (stacks == MAP_FAILED || shared == MAP_FAILED) {
            fprintf(stderr, "emulator: no memory for the stacks of 1024 threads\n");
            abort();
        }
        for (unsigned i = 0; i < 1024; i++) mprotect(stacks + i * (STACK + GAP), GAP, PROT_NONE);
        shared_end = shared + shared_capacity;
        mprotect(shared_end, PAGE, PROT_NONE);
        struct sigaction action = {};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        sigaction(SIGSEGV, &action, &before_segv);
        sigaction(SIGBUS, &action, &before_bus);
        sigaction(SIGILL, &action, &before_ill);
        sigaction(SIGFPE, &action, &before_fpe);
    }
    // A full stack needs another one for its signal; threads of Rust's standard library have one.
    stack_t alternate = {};
    sigaltstack(nullptr, &alternate);
    if (alternate.ss_flags & SS_DISABLE) {
        alternate.ss_size = 64 * 1024;
        alternate.ss_sp = mmap(nullptr, alternate.ss_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        alternate.ss_flags = 0;
        if (alternate.ss_sp != MAP_FAILED) sigaltstack(&alternate, nullptr);
    }
}

}  // namespace

void execute(const Launch& what, std::string& error) {
    set_up();
    launch = &what;
    count = what.block.x * what.block.y * what.block.z;
    runtime.block_dim = what.block;
    runtime.grid_dim = what.grid;
    *what.runtime = &runtime;
    for (unsigned i = 0; i < count; i++) fibers[i].index = {i % what.block.x, i / what.block.x % what.block.y, i / what.block.x / what.block.y};
    // The end lies at the page that cannot be touched, as nearly as the alignment of 128 allows.
    runtime.dynamic_shared = shared_end - (what.dynamic_bytes + 127) / 128 * 128;
    size_t slack = static_cast<size_t>(shared_end - runtime.dynamic_shared) - what.dynamic_bytes;
    // The same numbers in every process, and others for every launch.
    static uint64_t random = 1;
    auto toss = [] {
        random = random * 6364136223846793005u + 1442695040888963407u;
        return (random >> 63) != 0;
    };
    bool backward = toss();
    failure.clear();
    if (sigsetjmp(escape, 1) == 0) {
        size_t blocks = size_t(what.grid.x) * what.grid.y * what.grid.z;
        for (size_t i = 0; i < blocks; i++) {
            size_t block = backward ? blocks - 1 - i : i;
            runtime.block = {static_cast<unsigned>(block % what.grid.x), static_cast<unsigned>(block / what.grid.x % what.grid.y),
                             static_cast<unsigned>(block / what.grid.x / what.grid.y)};
            memset(what.static_shared, POISON, what.static_bytes);
            memset(runtime.dynamic_shared, POISON, what.dynamic_bytes);
            memset(runtime.dynamic_shared + what.dynamic_bytes, CANARY, slack);
            in_kernel = 1;
            run_block(toss());
            in_kernel = 0;
            for (size_t byte = 0; byte < slack; byte++)
                if (runtime.dynamic_shared[what.dynamic_bytes + byte] != CANARY) {
                    name_thread(failure);
                    print(failure, "byte %zu of dynamic shared memory was written, which has %zu", what.dynamic_bytes + byte, what.dynamic_bytes);
                    error = failure;
                    return;
                }
        }
    }
    in_kernel = 0;
    error = failure;
}

}  // namespace emulated
