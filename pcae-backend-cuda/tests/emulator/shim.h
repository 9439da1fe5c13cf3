// CUDA C++ for g++, in front of a kernel file: what the compiler for devices knows by itself.
//
// Every CUDA thread is a fiber of the driver (fibers.cpp). What makes threads wait for each other goes there.
#pragma once

#include "interface.h"

// No header of the C library: it declares other things of these names. And who needs one forgets NVRTC, which has none.
#define EMULATED_MATH(name)                                   \
    extern "C" float name##f(float) noexcept;                 \
    extern "C" double name(double) noexcept;                  \
    static inline float name(float x) { return name##f(x); }
EMULATED_MATH(exp)
EMULATED_MATH(exp2)
EMULATED_MATH(log)
EMULATED_MATH(log2)
EMULATED_MATH(log1p)
EMULATED_MATH(expm1)
EMULATED_MATH(sqrt)
EMULATED_MATH(erf)
EMULATED_MATH(tanh)
EMULATED_MATH(sin)
EMULATED_MATH(cos)
EMULATED_MATH(fabs)
EMULATED_MATH(floor)
EMULATED_MATH(ceil)
EMULATED_MATH(round)
EMULATED_MATH(rint)
#undef EMULATED_MATH
extern "C" float powf(float, float) noexcept;
extern "C" float fmaf(float, float, float) noexcept;
extern "C" float fmaxf(float, float) noexcept;
extern "C" float fminf(float, float) noexcept;
extern "C" float fmodf(float, float) noexcept;
extern "C" float copysignf(float, float) noexcept;
extern "C" float ldexpf(float, int) noexcept;
extern "C" double pow(double, double) noexcept;
extern "C" double fma(double, double, double) noexcept;
extern "C" double fmax(double, double) noexcept;
extern "C" double fmin(double, double) noexcept;
extern "C" int printf(const char*, ...);

#define __global__ __attribute__((visibility("default")))
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__
/// One block runs at a time, so a block's arrays can be the file's. They are filled with NaN before each block.
#define __shared__ static

namespace emulated {
// Not in .bss, which is where the arrays in shared memory are.
__attribute__((visibility("hidden"), section(".data"))) Runtime* runtime = nullptr;

inline void need_aligned(const void* at, const char* what) {
    if (reinterpret_cast<size_t>(at) % 16 != 0) runtime->fail("%s: address %p is no multiple of 16", what, at);
}
}  // namespace emulated

#define EMULATED_TEXT_OF(x) #x
#define EMULATED_TEXT(x) EMULATED_TEXT_OF(x)
/// Where a thread waits, for messages.
#define EMULATED_PLACE (__FILE__ ":" EMULATED_TEXT(__LINE__))

#define threadIdx (emulated::runtime->thread)
#define blockIdx (emulated::runtime->block)
#define blockDim (emulated::runtime->block_dim)
#define gridDim (emulated::runtime->grid_dim)
static const int warpSize = 32;

#define DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(emulated::runtime->dynamic_shared)

// ---------------------------------------------------------------------------------------------------------------- Vector types

#define EMULATED_VECTOR(name, element, size2, size4)                                                        \
    struct alignas(size2) name##2 {                                                                         \
        element x, y;                                                                                       \
    };                                                                                                      \
    struct name##3 {                                                                                        \
        element x, y, z;                                                                                    \
    };                                                                                                      \
    struct alignas(size4) name##4 {                                                                         \
        element x, y, z, w;                                                                                 \
    };                                                                                                      \
    static inline name##2 make_##name##2(element x, element y) { return {x, y}; }                           \
    static inline name##3 make_##name##3(element x, element y, element z) { return {x, y, z}; }             \
    static inline name##4 make_##name##4(element x, element y, element z, element w) { return {x, y, z, w}; }
EMULATED_VECTOR(float, float, 8, 16)
EMULATED_VECTOR(int, int, 8, 16)
EMULATED_VECTOR(uint, unsigned, 8, 16)
EMULATED_VECTOR(ushort, unsigned short, 4, 8)
#undef EMULATED_VECTOR
struct alignas(16) double2 {
    double x, y;
};
static inline double2 make_double2(double x, double y) { return {x, y}; }
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// -------------------------------------------------------------------------------------------------------------------- Barriers

#define __syncthreads() ((void)emulated::runtime->barrier(EMULATED_PLACE, 0))
#define __syncthreads_count(predicate) (emulated::runtime->barrier(EMULATED_PLACE, (predicate) ? 1 : 0))
#define __syncthreads_or(predicate) (emulated::runtime->barrier(EMULATED_PLACE, (predicate) ? 1 : 0) > 0)
#define __syncthreads_and(predicate) (emulated::runtime->barrier(EMULATED_PLACE, (predicate) ? 0 : 1) == 0)

namespace emulated {

inline void nothing(void**, unsigned) {}
struct Syncwarp {
    const char* place;
    void operator()(unsigned mask = 0xffffffffu) const { runtime->warp("__syncwarp", place, mask, nothing, nullptr); }
};

template <typename T>
struct Shuffle {
    T value, result;
    unsigned from;
};

template <typename T>
void shuffle_all(void** lanes, unsigned mask) {
    for (unsigned lane = 0; lane < 32; lane++) {
        if (!(mask >> lane & 1)) continue;
        Shuffle<T>* mine = static_cast<Shuffle<T>*>(lanes[lane]);
        if (!(mask >> mine->from & 1)) runtime->fail("shuffle: lane %u reads lane %u, which takes no part (mask %#x)", lane, mine->from, mask);
        mine->result = static_cast<Shuffle<T>*>(lanes[mine->from])->value;
    }
}

inline unsigned lane() { return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) & 31; }

inline unsigned segment(const char* place, int width) {
    if (width < 1 || width > 32 || (width & (width - 1)) != 0) runtime->fail("shuffle, %s: width %d is no power of two up to 32", place, width);
    return lane() & ~(static_cast<unsigned>(width) - 1);
}

template <typename T>
T shuffle(const char* place, unsigned mask, T value, unsigned from) {
    Shuffle<T> mine = {value, value, from};
    runtime->warp("__shfl_sync", place, mask, shuffle_all<T>, &mine);
    return mine.result;
}

template <typename T>
T shfl(const char* place, unsigned mask, T value, int from, int width = 32) {
    unsigned first = segment(place, width);
    return shuffle(place, mask, value, first + (static_cast<unsigned>(from) & (static_cast<unsigned>(width) - 1)));
}
template <typename T>
T shfl_up(const char* place, unsigned mask, T value, unsigned delta, int width = 32) {
    unsigned first = segment(place, width), at = lane();
    return shuffle(place, mask, value, at >= first + delta ? at - delta : at);
}
template <typename T>
T shfl_down(const char* place, unsigned mask, T value, unsigned delta, int width = 32) {
    unsigned first = segment(place, width), at = lane();
    return shuffle(place, mask, value, at + delta < first + static_cast<unsigned>(width) ? at + delta : at);
}
template <typename T>
T shfl_xor(const char* place, unsigned mask, T value, int bits, int width = 32) {
    unsigned first = segment(place, width), at = lane(), from = at ^ static_cast<unsigned>(bits);
    return shuffle(place, mask, value, from < first + static_cast<unsigned>(width) ? from : at);
}

struct Vote {
    bool predicate;
    unsigned ballot;
};
inline void vote_all(void** lanes, unsigned mask) {
    unsigned ballot = 0;
    for (unsigned lane = 0; lane < 32; lane++)
        if (mask >> lane & 1 && static_cast<Vote*>(lanes[lane])->predicate) ballot |= 1u << lane;
    for (unsigned lane = 0; lane < 32; lane++)
        if (mask >> lane & 1) static_cast<Vote*>(lanes[lane])->ballot = ballot;
}
inline unsigned ballot(const char* place, unsigned mask, bool predicate) {
    Vote mine = {predicate, 0};
    runtime->warp("__ballot_sync", place, mask, vote_all, &mine);
    return mine.ballot;
}

enum Reduction { ADD, MIN, MAX, AND, OR, XOR };
template <typename T>
T reduce(const char* place, unsigned mask, T value, Reduction reduction) {
    // One shuffle a lane of the mask: slow, and plainly right.
    T sum = value;
    bool first = true;
    for (unsigned from = 0; from < 32; from++) {
        if (!(mask >> from & 1)) continue;
        T other = shuffle(place, mask, value, from);
        if (first)
            sum = other;
        else if (reduction == ADD)
            sum += other;
        else if (reduction == MIN)
            sum = other < sum ? other : sum;
        else if (reduction == MAX)
            sum = other > sum ? other : sum;
        else if (reduction == AND)
            sum &= other;
        else if (reduction == OR)
            sum |= other;
        else
            sum ^= other;
        first = false;
    }
    return sum;
}

}  // namespace emulated

#define __syncwarp(...) emulated::Syncwarp{EMULATED_PLACE}(__VA_ARGS__)
#define __shfl_sync(...) emulated::shfl(EMULATED_PLACE, __VA_ARGS__)
#define __shfl_up_sync(...) emulated::shfl_up(EMULATED_PLACE, __VA_ARGS__)
#define __shfl_down_sync(...) emulated::shfl_down(EMULATED_PLACE, __VA_ARGS__)
#define __shfl_xor_sync(...) emulated::shfl_xor(EMULATED_PLACE, __VA_ARGS__)
#define __ballot_sync(mask, predicate) emulated::ballot(EMULATED_PLACE, mask, predicate)
#define __any_sync(mask, predicate) (emulated::ballot(EMULATED_PLACE, mask, predicate) != 0)
#define __all_sync(mask, predicate) (emulated::ballot(EMULATED_PLACE, mask, !(predicate)) == 0)
#define __reduce_add_sync(mask, value) emulated::reduce(EMULATED_PLACE, mask, value, emulated::ADD)
#define __reduce_min_sync(mask, value) emulated::reduce(EMULATED_PLACE, mask, value, emulated::MIN)
#define __reduce_max_sync(mask, value) emulated::reduce(EMULATED_PLACE, mask, value, emulated::MAX)
#define __reduce_and_sync(mask, value) emulated::reduce(EMULATED_PLACE, mask, value, emulated::AND)
#define __reduce_or_sync(mask, value) emulated::reduce(EMULATED_PLACE, mask, value, emulated::OR)
#define __reduce_xor_sync(mask, value) emulated::reduce(EMULATED_PLACE, mask, value, emulated::XOR)
static inline void __threadfence() {}
static inline void __threadfence_block() {}
static inline void __trap() { emulated::runtime->fail("__trap"); }

// --------------------------------------------------------------------------------------------------------------------- Atomics
// One thread runs at a time, and is interrupted only where it waits.

template <typename T>
static inline T atomicCAS(T* at, T expected, T value) {
    T old = *at;
    if (old == expected) *at = value;
    return old;
}
template <typename T>
static inline T atomicExch(T* at, T value) {
    T old = *at;
    *at = value;
    return old;
}
template <typename T>
static inline T atomicAdd(T* at, T value) {
    static_assert(static_cast<T>(0.5f) == static_cast<T>(0), "the order of floating-point atomics is not fixed: same bits every time");
    T old = *at;
    *at = old + value;
    return old;
}
template <typename T>
static inline T atomicMin(T* at, T value) {
    T old = *at;
    if (value < old) *at = value;
    return old;
}
template <typename T>
static inline T atomicMax(T* at, T value) {
    T old = *at;
    if (value > old) *at = value;
    return old;
}
template <typename T>
static inline T atomicOr(T* at, T value) {
    T old = *at;
    *at = old | value;
    return old;
}
template <typename T>
static inline T atomicAnd(T* at, T value) {
    T old = *at;
    *at = old & value;
    return old;
}

// ------------------------------------------------------------------------------------------------------------------- Functions

template <typename To, typename From>
static inline To emulated_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}
static inline unsigned __float_as_uint(float x) { return emulated_bits<unsigned>(x); }
static inline float __uint_as_float(unsigned x) { return emulated_bits<float>(x); }
static inline int __float_as_int(float x) { return emulated_bits<int>(x); }
static inline float __int_as_float(int x) { return emulated_bits<float>(x); }
static inline long long __double_as_longlong(double x) { return emulated_bits<long long>(x); }
static inline double __longlong_as_double(long long x) { return emulated_bits<double>(x); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<unsigned long long>(a) * b >> 32); }
static inline unsigned __brev(unsigned x) {
    unsigned reversed = 0;
    for (int i = 0; i < 32; i++) reversed |= (x >> i & 1) << (31 - i);
    return reversed;
}

static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline float __expf(float x) { return expf(x); }
static inline float __logf(float x) { return logf(x); }
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline double __dadd_rn(double a, double b) { return a + b; }
static inline double __dsub_rn(double a, double b) { return a - b; }
static inline double __dmul_rn(double a, double b) { return a * b; }
static inline double __ddiv_rn(double a, double b) { return a / b; }
static inline float __fsqrt_rn(float x) { return sqrtf(x); }
static inline float __frcp_rn(float x) { return 1.0f / x; }

// The templates of the standard library are not there on a device; these are.
template <typename T>
static constexpr T min(T a, T b) {
    return b < a ? b : a;
}
template <typename T>
static constexpr T max(T a, T b) {
    return a < b ? b : a;
}
static inline float min(float a, float b) { return fminf(a, b); }
static inline float max(float a, float b) { return fmaxf(a, b); }
static inline unsigned min(unsigned a, int b) { return min(a, static_cast<unsigned>(b)); }
static inline unsigned max(unsigned a, int b) { return max(a, static_cast<unsigned>(b)); }
static inline unsigned min(int a, unsigned b) { return min(static_cast<unsigned>(a), b); }
static inline unsigned max(int a, unsigned b) { return max(static_cast<unsigned>(a), b); }
static inline bool isnan(float x) { return __builtin_isnan(x); }
static inline bool isinf(float x) { return __builtin_isinf(x); }
static inline bool isfinite(float x) { return __builtin_isfinite(x); }

template <typename T>
static inline T __ldg(const T* at) {
    return *at;
}
template <typename T>
static inline T __ldcs(const T* at) {
    return *at;
}
template <typename T>
static inline T __ldcg(const T* at) {
    return *at;
}
template <typename T>
static inline void __stcs(T* at, T value) {
    *at = value;
}
template <typename T>
static inline void __stcg(T* at, T value) {
    *at = value;
}

// -------------------------------------------------------------------------------------- What common.cuh says in PTX on a device

/// To nearest, ties to even; any NaN becomes 0x7fff, as `cvt` makes it.
static inline unsigned short emulated_bf16(float x) {
    unsigned bits = __float_as_uint(x);
    if (x != x) return 0x7fff;
    return static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline unsigned pack_bf16(float low, float high) { return emulated_bf16(low) | static_cast<unsigned>(emulated_bf16(high)) << 16; }

/// To nearest, ties to even, beyond the largest to that; any NaN becomes 0x7f, as `cvt` makes it.
static inline unsigned short emulated_e4m3(float x) {
    if (x != x) return 0x7f;
    const unsigned sign = __float_as_uint(x) >> 24 & 0x80;
    const float magnitude = fminf(fabsf(x), 448.0f);
    // Below the smallest normal number, steps of 2^-9; the eighth is that number.
    if (magnitude < 0.015625f) return static_cast<unsigned short>(sign | static_cast<unsigned>(rintf(magnitude * 512.0f)));
    const unsigned bits = __float_as_uint(magnitude);
    return static_cast<unsigned short>(sign | (((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3)));
}

static inline unsigned short pack_e4m3(float low, float high) { return static_cast<unsigned short>(emulated_e4m3(low) | emulated_e4m3(high) << 8); }

namespace emulated {

struct Mma {
    float* d;
    const unsigned *a, *b;
};

inline float half_of(unsigned packed, unsigned half) { return __uint_as_float(half != 0 ? packed & 0xffff0000u : packed << 16); }

/// mma.m16n8k16.row.col, from the fragments' layout in the PTX manual.
inline void mma_all(void** lanes, unsigned) {
    float a[16][16], b[16][8];
    for (unsigned lane = 0; lane < 32; lane++) {
        const Mma* mine = static_cast<const Mma*>(lanes[lane]);
        unsigned group = lane / 4, in_group = lane % 4;
        // Element i of a fragment is half i % 2 of register i / 2.
        for (unsigned i = 0; i < 8; i++) {
            unsigned row = i % 4 < 2 ? group : group + 8, col = in_group * 2 + (i & 1) + (i < 4 ? 0 : 8);
            a[row][col] = half_of(mine->a[i / 2], i & 1);
        }
        for (unsigned i = 0; i < 4; i++) {
            unsigned row = in_group * 2 + (i & 1) + (i < 2 ? 0 : 8), col = group;
            b[row][col] = half_of(mine->b[i / 2], i & 1);
        }
    }
    float product[16][8] = {};
    for (unsigned row = 0; row < 16; row++)
        for (unsigned k = 0; k < 16; k++)
            for (unsigned col = 0; col < 8; col++) product[row][col] += a[row][k] * b[k][col];
    for (unsigned lane = 0; lane < 32; lane++) {
        const Mma* mine = static_cast<const Mma*>(lanes[lane]);
        for (unsigned i = 0; i < 4; i++) mine->d[i] += product[i < 2 ? lane / 4 : lane / 4 + 8][lane % 4 * 2 + (i & 1)];
    }
}

struct Ldmatrix {
    unsigned* r;
    const unsigned short* row;
};

template <bool TRANS>
void ldmatrix_all(void** lanes, unsigned) {
    for (unsigned lane = 0; lane < 32; lane++) {
        for (unsigned matrix = 0; matrix < 4; matrix++) {
            unsigned packed = 0;
            for (unsigned half = 0; half < 2; half++) {
                unsigned row = lane / 4, col = lane % 4 * 2 + half;
                if (TRANS) {
                    unsigned swapped = row;
                    row = col;
                    col = swapped;
                }
                packed |= static_cast<unsigned>(static_cast<const Ldmatrix*>(lanes[matrix * 8 + row])->row[col]) << 16 * half;
            }
            static_cast<const Ldmatrix*>(lanes[lane])->r[matrix] = packed;
        }
    }
}

template <bool TRANS>
void ldmatrix(unsigned (&r)[4], const void* row) {
    need_aligned(row, "ldmatrix");
    if (!runtime->is_shared(row, 16)) runtime->fail("ldmatrix: row %p is not in shared memory", row);
    Ldmatrix mine = {r, static_cast<const unsigned short*>(row)};
    runtime->warp("ldmatrix", "", 0xffffffffu, ldmatrix_all<TRANS>, &mine);
}

}  // namespace emulated

static inline void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    emulated::Mma mine = {d, a, b};
    emulated::runtime->warp("mma", "", 0xffffffffu, emulated::mma_all, &mine);
}
static inline void ldmatrix_x4(unsigned (&r)[4], const void* row) { emulated::ldmatrix<false>(r, row); }
static inline void ldmatrix_x4_trans(unsigned (&r)[4], const void* row) { emulated::ldmatrix<true>(r, row); }
static inline void cp_async_16(void* shared, const void* global, bool valid = true) {
    emulated::need_aligned(shared, "cp.async");
    if (valid) emulated::need_aligned(global, "cp.async");
    emulated::runtime->copy(shared, global, valid);
}
static inline void cp_async_commit() { emulated::runtime->copy_commit(); }
template <int PENDING>
static inline void cp_async_wait() {
    emulated::runtime->copy_wait(PENDING);
}

// ----------------------------------------------------------------------------------- What -fsanitize=bounds,alignment,… calls

namespace emulated {
struct Place {
    const char* file;
    unsigned line, column;
};
struct Type {
    unsigned short kind, info;
    char name[1];
};
struct OutOfBounds {
    Place place;
    const Type *array, *index;
};
struct TypeMismatch {
    Place place;
    const Type* type;
    unsigned char log_alignment, kind;
};
struct ShiftOutOfBounds {
    Place place;
    const Type *left, *right;
};
struct Overflow {
    Place place;
    const Type* type;
};
}  // namespace emulated

extern "C" {
#define EMULATED_CHECK __attribute__((visibility("hidden"), used, noreturn)) inline
EMULATED_CHECK void __ubsan_handle_out_of_bounds(emulated::OutOfBounds* what, size_t index) {
    emulated::runtime->fail("%s:%u: index %zd of %s", what->place.file, what->place.line, index, what->array->name);
}
EMULATED_CHECK void __ubsan_handle_type_mismatch_v1(emulated::TypeMismatch* what, size_t at) {
    emulated::runtime->fail("%s:%u: access to %s at %#zx, which must be a multiple of %u", what->place.file, what->place.line, what->type->name, at, 1u << what->log_alignment);
}
EMULATED_CHECK void __ubsan_handle_shift_out_of_bounds(emulated::ShiftOutOfBounds* what, size_t, size_t by) {
    emulated::runtime->fail("%s:%u: shift of %s by %zd", what->place.file, what->place.line, what->left->name, by);
}
EMULATED_CHECK void __ubsan_handle_divrem_overflow(emulated::Overflow* what, size_t, size_t by) {
    emulated::runtime->fail("%s:%u: division of %s by %zd", what->place.file, what->place.line, what->type->name, by);
}
#undef EMULATED_CHECK
}

// --------------------------------------------------------------------------------------------------------- The table of kernels

namespace emulated {

/// A kernel by its type: takes its arguments out of a launch's.
template <auto KERNEL>
struct Launch;
template <typename... T, void (*KERNEL)(T...)>
struct Launch<KERNEL> {
    static constexpr size_t sizes[sizeof...(T) + 1] = {sizeof(T)..., 0};
    template <size_t... I>
    struct Each {
        static void call(void** arguments) { KERNEL(*static_cast<T*>(arguments[I])...); }
    };
    template <size_t N, size_t... I>
    struct Count : Count<N - 1, N - 1, I...> {};
    template <size_t... I>
    struct Count<0, I...> : Each<I...> {};

    static constexpr Kernel kernel(const char* name, unsigned max_threads) { return {name, Count<sizeof...(T)>::call, sizes, sizeof...(T), max_threads}; }
};

}  // namespace emulated

/// Put behind the file's text by the emulated compiler, with all its kernels.
#define EMULATED_MODULE(...)                                                                                                       \
    static const emulated::Kernel emulated_kernels[] = {__VA_ARGS__};                                                              \
    extern "C" __attribute__((visibility("default"))) const emulated::Module emulated_module = {emulated_kernels, sizeof emulated_kernels / sizeof *emulated_kernels, &emulated::runtime};
#define EMULATED_KERNEL(name, max_threads) emulated::Launch<name>::kernel(#name, max_threads)
