// In front of every kernel file: the activation format, vector access, sums over warps and blocks, and what CUDA C++ has no name for.
//
// Activations (`act_t`) are f32, or bf16 with -DPCAE_BF16; everything is computed in f32. For sm_80 and newer, without any header.
// With -DPCAE_EMULATED (tests/emulator) the same text compiles for a CPU: what is PTX here comes from the emulator there.

/// The upper half of an f32.
struct alignas(2) bf16 {
    unsigned short bits;
};

/// Sign, 4 bits of exponent (bias 7), 3 of mantissa, and no infinity: 0, 2^-9 to 448, NaN (Micikevicius et al., "FP8 Formats for Deep
/// Learning", 2022). What a teacher in fp8 multiplies.
struct e4m3 {
    unsigned char bits;
};

#ifdef PCAE_BF16
typedef bf16 act_t;
#else
typedef float act_t;
#endif

#define FULL_WARP 0xffffffffu

// ---------------------------------------------------------------------------------------------------------------- Instructions

#ifndef PCAE_EMULATED

/// A block's dynamic shared memory (Shape.shared), as an array of `type` that starts on a multiple of 128 bytes.
#define DYNAMIC_SHARED(type, name)                                      \
    extern __shared__ __align__(128) unsigned char dynamic_shared_bytes[]; \
    type* const name = reinterpret_cast<type*>(dynamic_shared_bytes)

/// Two f32 rounded to bf16 (to nearest even), `low` in the lower half. A NaN stays one.
__device__ __forceinline__ unsigned pack_bf16(float low, float high) {
    unsigned packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

/// Two f32 rounded to e4m3 (to nearest even, beyond the largest to that), `low` in the lower byte. A NaN stays one. For sm_89 and newer: the host
/// launches nothing on others that comes here.
__device__ __forceinline__ unsigned short pack_e4m3(float low, float high) {
#if __CUDA_ARCH__ >= 890
    unsigned short packed;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
    return packed;
#else
    __trap();
    return 0;
#endif
}

/// d += a @ b on tensor cores, for a warp: a [16, 16] row-major, b [16, 8] column-major, bf16; d [16, 8] f32.
///
/// With group = lane / 4 and pair = lane % 4 * 2, a lane holds (PTX, mma.m16n8k16)
/// a: {[group][pair..], [group + 8][pair..], [group][pair + 8..], [group + 8][pair + 8..]}, two columns a register;
/// b: {[pair..][group], [pair + 8..][group]}, two rows a register; d: {[group][pair], [group][pair + 1], [group + 8][pair], [group + 8][pair + 1]}.
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/// Four 8 x 8 matrices of 16-bit elements from shared memory; lane 8 i + j names row j of matrix i (16 bytes, so aligned).
/// Register i of a lane becomes elements [lane / 4][lane % 4 * 2..] of matrix i.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], const void* row) {
    unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}

/// As `ldmatrix_x4`, each matrix transposed: elements [lane % 4 * 2..][lane / 4].
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&r)[4], const void* row) {
    unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}

/// Starts a copy of 16 bytes from global to shared memory, both so aligned; not `valid`: 16 zero bytes, and `global` is not read.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid = true) {
    unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    unsigned bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" : : "r"(at), "l"(global), "r"(bytes) : "memory");
}

/// Makes one group of the copies this thread started since the last group.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" : : : "memory"); }

/// Waits until at most the `PENDING` newest groups of this thread are under way. Other threads' copies need a barrier after it.
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" : : "n"(PENDING) : "memory");
}

#endif

// --------------------------------------------------------------------------------------------------------------------- Formats

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

/// The f32 values in the lower and the upper half of a register.
__device__ __forceinline__ float low_bf16(unsigned packed) { return __uint_as_float(packed << 16); }
__device__ __forceinline__ float high_bf16(unsigned packed) { return __uint_as_float(packed & 0xffff0000u); }

/// `x` in format `T`, rounded to nearest even; a NaN stays one.
template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
    bf16 rounded;
    rounded.bits = static_cast<unsigned short>(pack_bf16(x, 0.0f));
    return rounded;
}

__device__ __forceinline__ act_t to_act(float x) { return from_float<act_t>(x); }

// --------------------------------------------------------------------------------------------------------------- Vector access

/// Elements of 16 bytes, as f32: 4 f32 or 8 bf16.
template <typename T>
struct Vec {
    static constexpr unsigned SIZE = 16 / sizeof(T);
    float v[SIZE];
};

/// Whether 16-byte accesses to `at` are allowed.
__device__ __forceinline__ bool aligned_16(const void* at) { return (reinterpret_cast<size_t>(at) & 15) == 0; }

/// 16 bytes from an address that is a multiple of 16.
__device__ __forceinline__ Vec<float> load_vec(const float* at) {
    float4 raw = *reinterpret_cast<const float4*>(at);
    return {{raw.x, raw.y, raw.z, raw.w}};
}
__device__ __forceinline__ Vec<bf16> load_vec(const bf16* at) {
    uint4 raw = *reinterpret_cast<const uint4*>(at);
    return {{low_bf16(raw.x), high_bf16(raw.x), low_bf16(raw.y), high_bf16(raw.y), low_bf16(raw.z), high_bf16(raw.z), low_bf16(raw.w),
             high_bf16(raw.w)}};
}

/// 16 bytes to an address that is a multiple of 16, each element rounded.
__device__ __forceinline__ void store_vec(float* at, const Vec<float>& x) {
    *reinterpret_cast<float4*>(at) = make_float4(x.v[0], x.v[1], x.v[2], x.v[3]);
}
__device__ __forceinline__ void store_vec(bf16* at, const Vec<bf16>& x) {
    *reinterpret_cast<uint4*>(at) = make_uint4(pack_bf16(x.v[0], x.v[1]), pack_bf16(x.v[2], x.v[3]), pack_bf16(x.v[4], x.v[5]), pack_bf16(x.v[6], x.v[7]));
}

/// As many elements as 16 bytes of activations have, as e4m3, to an address that is a multiple of their number. They are rounded to activations
/// first: the same bits, whether a kernel does this to its results or another one to the activations that were stored.
template <typename T>
__device__ __forceinline__ void store_e4m3(e4m3* at, const Vec<T>& x) {
    unsigned words[Vec<T>::SIZE / 4];
#pragma unroll
    for (unsigned i = 0; i < Vec<T>::SIZE; i += 4) {
        float rounded[4];
#pragma unroll
        for (unsigned j = 0; j < 4; ++j) rounded[j] = to_float(from_float<T>(x.v[i + j]));
        words[i / 4] = pack_e4m3(rounded[0], rounded[1]) | static_cast<unsigned>(pack_e4m3(rounded[2], rounded[3])) << 16;
    }
    if constexpr (Vec<T>::SIZE == 8) {
        *reinterpret_cast<uint2*>(at) = make_uint2(words[0], words[1]);
    } else {
        *reinterpret_cast<unsigned*>(at) = words[0];
    }
}

// ------------------------------------------------------------------------------------------------------------ Warps and blocks
// Blocks are one-dimensional and made of whole warps. All threads call; the order of every sum is fixed.

__device__ __forceinline__ unsigned lane_id() { return threadIdx.x & 31; }
__device__ __forceinline__ unsigned warp_id() { return threadIdx.x >> 5; }

/// Sum over the warp, the same bits in every lane.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(FULL_WARP, x, step);
    return x;
}

/// Largest value of the warp, in every lane; a NaN is ignored.
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, step));
    return x;
}

/// Sum over the block, the same bits in every thread. Two barriers.
__device__ __forceinline__ float block_sum(float x) {
    __shared__ float partial[32];
    x = warp_sum(x);
    __syncthreads();  // the results of a call before this one have been read
    if (lane_id() == 0) partial[warp_id()] = x;
    __syncthreads();
    return warp_sum(lane_id() < blockDim.x / 32 ? partial[lane_id()] : 0.0f);
}

/// Largest value of the block, in every thread; a NaN is ignored. Two barriers.
__device__ __forceinline__ float block_max(float x) {
    __shared__ float partial[32];
    x = warp_max(x);
    __syncthreads();
    if (lane_id() == 0) partial[warp_id()] = x;
    __syncthreads();
    return warp_max(partial[lane_id() < blockDim.x / 32 ? lane_id() : 0]);
}

// --------------------------------------------------------------------------------------------------------- Element by element

/// `N` elements as f32: those of 16 bytes of activations, or one.
template <unsigned N>
struct Floats {
    static constexpr unsigned SIZE = N;
    float v[N];
};

/// `N` elements; more than one from an address that is a multiple of 16.
template <unsigned N, typename T>
__device__ __forceinline__ Floats<N> load_floats(const T* at) {
    Floats<N> x;
    if constexpr (N == 1) {
        x.v[0] = to_float(*at);
    } else {
#pragma unroll
        for (unsigned i = 0; i < N; i += Vec<T>::SIZE) {
            Vec<T> part = load_vec(at + i);
#pragma unroll
            for (unsigned j = 0; j < Vec<T>::SIZE; ++j) x.v[i + j] = part.v[j];
        }
    }
    return x;
}

/// `N` parameters from any address.
template <unsigned N>
__device__ __forceinline__ Floats<N> load_params(const float* at) {
    if (N > 1 && aligned_16(at)) return load_floats<N>(at);
    Floats<N> x;
#pragma unroll
    for (unsigned i = 0; i < N; ++i) x.v[i] = at[i];
    return x;
}

/// Stores `N` elements, rounded; more than one to an address that is a multiple of 16.
template <unsigned N>
__device__ __forceinline__ void store_floats(act_t* at, const Floats<N>& x) {
    if constexpr (N == 1) {
        *at = to_act(x.v[0]);
    } else {
        Vec<act_t> all;
#pragma unroll
        for (unsigned i = 0; i < N; ++i) all.v[i] = x.v[i];
        store_vec(at, all);
    }
}

/// `store(i, load(i))` for every `i < count`, by all threads of a grid of any size; a thread has four loads under way.
template <typename Load, typename Store>
__device__ __forceinline__ void for_each_word(size_t count, Load load, Store store) {
    const size_t step = static_cast<size_t>(gridDim.x) * blockDim.x;
    for (size_t first = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x; first < count; first += 4 * step) {
        decltype(load(first)) words[4];
#pragma unroll
        for (unsigned i = 0; i < 4; ++i) {
            if (first + i * step < count) words[i] = load(first + i * step);
        }
#pragma unroll
        for (unsigned i = 0; i < 4; ++i) {
            if (first + i * step < count) store(first + i * step, words[i]);
        }
    }
}

// -------------------------------------------------------------------------------------------------------------------- Formulas

/// The exact GELU, x times the normal distribution function.
__device__ __forceinline__ float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }

/// Derivative of `gelu`: distribution function plus x times density.
__device__ __forceinline__ float gelu_derivative(float x) {
    return 0.5f * (1.0f + erff(x * 0.70710678118654752f)) + x * 0.39894228040143268f * expf(-0.5f * x * x);
}

/// Keeps the first error code that any kernel reports, and which index or element it is about, for the host to find at its next read.
__device__ __forceinline__ void report(unsigned* fault, unsigned code, unsigned about) {
    if (atomicCAS(fault, 0u, code) == 0) fault[1] = about;
}
