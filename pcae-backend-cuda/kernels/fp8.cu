// What a teacher in fp8 multiplies, made from what lies there in the format of activations: its weights once a step, and activations that the kernel
// before has not written as e4m3 itself.

/// `out[i] = x[i]` in e4m3; `len` is a multiple of 16, both start on multiples of 16 bytes. Launch: any grid, 256 threads. Bytes: A + 1.
extern "C" __global__ void __launch_bounds__(256) to_e4m3(e4m3* out, const act_t* x, unsigned long long len) {
    constexpr unsigned SIZE = Vec<act_t>::SIZE;
    for_each_word(
        len / SIZE, [&](size_t i) { return load_vec(x + i * SIZE); }, [&](size_t i, const Vec<act_t>& v) { store_e4m3(out + i * SIZE, v); });
}

/// A weight: where it starts among parameters and among weights in e4m3, and how many elements it has. All are multiples of 16.
struct Weight {
    unsigned from, to, len;
};

/// The largest magnitude of each weight, as the bits of an f32. A NaN is ignored.
///
/// params: of all layers; maxima [gridDim.y], zeros before. Maxima, other than sums, are the same in any order, and numbers that are not negative have the
/// order of their bits: atomics do no harm here. Launch: grid (any number, weights), 256 threads. Bytes: A.
extern "C" __global__ void __launch_bounds__(256) weight_maxima(unsigned* maxima, const act_t* params, const Weight* weights) {
    constexpr unsigned SIZE = Vec<act_t>::SIZE;
    const Weight weight = weights[blockIdx.y];
    float largest = 0.0f;
    for_each_word(
        weight.len / SIZE, [&](size_t i) { return load_vec(params + weight.from + i * SIZE); },
        [&](size_t, const Vec<act_t>& v) {
#pragma unroll
            for (unsigned j = 0; j < SIZE; ++j) largest = fmaxf(largest, fabsf(v.v[j]));
        });
    largest = block_max(largest);
    if (threadIdx.x == 0) atomicMax(maxima + blockIdx.y, __float_as_uint(largest));
}

/// The exponent of the largest power of two that leaves a weight of this largest magnitude within +-448. One of zeros is not scaled, and what has no use
/// for a factor beyond 2^64 gets that.
__device__ __forceinline__ int scale_exponent(unsigned largest) {
    if (largest == 0) return 0;
    // 448 = 1.75 * 2^8.
    const int exponent = static_cast<int>(largest >> 23) - 127;
    const int scale = 8 - exponent - ((largest & 0x7fffff) > 0x600000 ? 1 : 0);
    return scale > 64 ? 64 : scale < -64 ? -64 : scale;
}

__device__ __forceinline__ float power_of_two(int exponent) { return __uint_as_float(static_cast<unsigned>(exponent + 127) << 23); }

/// Weights times a power of two each, in e4m3, and in `scales` what a product of them has to be multiplied with.
///
/// params, weights, maxima: as `weight_maxima` takes and leaves them; out: weights in e4m3; scales [gridDim.y]. Launch: grid (any number, weights), 256
/// threads. Bytes: A + 1.
extern "C" __global__ void __launch_bounds__(256) weights_to_e4m3(e4m3* out, float* scales, const unsigned* maxima, const act_t* params, const Weight* weights) {
    constexpr unsigned SIZE = Vec<act_t>::SIZE;
    const Weight weight = weights[blockIdx.y];
    const int exponent = scale_exponent(maxima[blockIdx.y]);
    const float scale = power_of_two(exponent);
    if (blockIdx.x == 0 && threadIdx.x == 0) scales[blockIdx.y] = power_of_two(-exponent);
    for_each_word(
        weight.len / SIZE, [&](size_t i) { return load_vec(params + weight.from + i * SIZE); },
        [&](size_t i, const Vec<act_t>& v) {
            Vec<act_t> scaled;
#pragma unroll
            for (unsigned j = 0; j < SIZE; ++j) scaled.v[j] = v.v[j] * scale;
            store_e4m3(out + weight.to + i * SIZE, scaled);
        });
}
