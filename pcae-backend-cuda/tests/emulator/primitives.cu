// What tests/primitives.rs launches: each wrapper of common.cuh beside the plain formula that it stands for.

/// c = a @ b on tensor cores, one warp: a [16, 16], b [16, 8], both row-major; c [16, 8].
extern "C" __global__ void __launch_bounds__(32) product(float* c, const bf16* a, const bf16* b) {
    __shared__ __align__(16) bf16 rows_a[16 * 16];
    __shared__ __align__(16) bf16 rows_b[16 * 16];
    unsigned lane = lane_id();
    // 32 pieces of 8 elements; of b every second one lies in the half that is not used.
    cp_async_16(rows_a + lane * 8, a + lane * 8);
    cp_async_16(rows_b + lane * 8, b + lane / 2 * 8, lane % 2 == 0);
    cp_async_commit();
    cp_async_wait<0>();
    __syncwarp();
    unsigned of_a[4], of_b[4];
    // Matrices: rows 0 to 7 and 8 to 15 of the left half, then of the right one.
    ldmatrix_x4(of_a, rows_a + (lane % 16) * 16 + lane / 16 * 8);
    // b comes by rows and is needed by columns.
    ldmatrix_x4_trans(of_b, rows_b + (lane % 16) * 16 + lane / 16 * 8);
    float d[4] = {1.0f, 2.0f, 3.0f, 4.0f};
    unsigned columns[2] = {of_b[0], of_b[1]};
    mma_m16n8k16(d, of_a, columns);
    for (unsigned i = 0; i < 4; i++) {
        unsigned row = i < 2 ? lane / 4 : lane / 4 + 8, column = lane % 4 * 2 + i % 2;
        c[row * 8 + column] = d[i] - static_cast<float>(i + 1);
    }
    // What was not copied is zero, and not what lies behind b.
    if (of_b[2] != 0 || of_b[3] != 0) c[lane] = 1e9f;
}

/// The same from fragments that are put together by hand, b column-major.
extern "C" __global__ void __launch_bounds__(32) product_by_hand(float* c, const bf16* a, const bf16* b) {
    unsigned group = lane_id() / 4, pair = lane_id() % 4 * 2;
    auto two = [](const bf16* at, unsigned step) { return at[0].bits | static_cast<unsigned>(at[step].bits) << 16; };
    unsigned of_a[4] = {two(a + group * 16 + pair, 1), two(a + (group + 8) * 16 + pair, 1), two(a + group * 16 + pair + 8, 1), two(a + (group + 8) * 16 + pair + 8, 1)};
    unsigned of_b[2] = {two(b + pair * 8 + group, 8), two(b + (pair + 8) * 8 + group, 8)};
    float d[4] = {};
    mma_m16n8k16(d, of_a, of_b);
    c[group * 8 + pair] = d[0];
    c[group * 8 + pair + 1] = d[1];
    c[(group + 8) * 8 + pair] = d[2];
    c[(group + 8) * 8 + pair + 1] = d[3];
}

/// Sums and largest values of warps and of the block of 96, and what each lane gets by shuffles.
extern "C" __global__ void __launch_bounds__(96) sums(float* out, const float* x) {
    float mine = x[threadIdx.x];
    out[threadIdx.x] = warp_sum(mine);
    out[96 + threadIdx.x] = warp_max(mine);
    out[192 + threadIdx.x] = block_sum(mine);
    out[288 + threadIdx.x] = block_max(mine) + block_sum(0.0f);
    out[384 + threadIdx.x] = __shfl_up_sync(FULL_WARP, mine, 3, 16);
    out[480 + threadIdx.x] = __shfl_down_sync(FULL_WARP, mine, 3, 16);
    out[576 + threadIdx.x] = __shfl_sync(FULL_WARP, mine, 5, 8);
    out[672 + threadIdx.x] = static_cast<float>(__popc(__ballot_sync(FULL_WARP, mine > 0.5f)));
    // Half a warp waits for itself alone.
    out[768 + threadIdx.x] = lane_id() < 16 ? __shfl_xor_sync(0xffffu, mine, 1) : 0.0f;
}

/// To e4m3, two at a time and as a vector of activations is stored. Launch: a block of a thread for each eight elements.
extern "C" __global__ void __launch_bounds__(1024) to_e4m3(unsigned short* pairs, e4m3* vectors, const float* x) {
    const float* const from = x + 8 * threadIdx.x;
    for (unsigned i = 0; i < 4; i++) pairs[4 * threadIdx.x + i] = pack_e4m3(from[2 * i], from[2 * i + 1]);
    for (unsigned i = 0; i < 8; i += 4) store_e4m3(vectors + 8 * threadIdx.x + i, load_vec(from + i));
}

/// To bf16 and back, eight at a time and one at a time.
extern "C" __global__ void __launch_bounds__(32) formats(bf16* together, bf16* alone, const float* x) {
    Vec<bf16> v;
    for (unsigned i = 0; i < 8; i++) v.v[i] = x[threadIdx.x * 8 + i];
    store_vec(together + threadIdx.x * 8, v);
    v = load_vec(together + threadIdx.x * 8);
    for (unsigned i = 0; i < 8; i++) alone[threadIdx.x * 8 + i] = from_float<bf16>(v.v[i]);
}

// -------------------------------------------------------------------------------- Mistakes that the emulator must find

extern "C" __global__ void __launch_bounds__(64) some_miss_the_barrier(float* out, unsigned which) {
    if (threadIdx.x < which) return;
    __syncthreads();
    out[threadIdx.x] = 1.0f;
}

extern "C" __global__ void __launch_bounds__(64) two_barriers(float* out, unsigned which) {
    if (threadIdx.x < which)
        __syncthreads();
    else
        __syncthreads();
    out[threadIdx.x] = 1.0f;
}

extern "C" __global__ void __launch_bounds__(64) some_miss_the_shuffle(float* out, unsigned which) {
    if (threadIdx.x < which) out[threadIdx.x] = __shfl_xor_sync(FULL_WARP, 1.0f, 1);
}

/// Writes element `which` of `out`.
extern "C" __global__ void __launch_bounds__(64) writes(float* out, unsigned which) {
    if (threadIdx.x == 0) out[which] = 1.0f;
}

extern "C" __global__ void __launch_bounds__(64) writes_dynamic_shared(float* out, unsigned which) {
    DYNAMIC_SHARED(float, tile);
    if (threadIdx.x == 0) tile[which] = 1.0f;
    if (threadIdx.x == 0) out[0] = tile[0];
}

extern "C" __global__ void __launch_bounds__(64) writes_static_shared(float* out, unsigned which) {
    __shared__ float tile[64];
    tile[threadIdx.x + which] = 1.0f;
    __syncthreads();
    out[threadIdx.x] = tile[threadIdx.x];
}

/// Neighbours' values without a barrier, by which the result depends on the order of threads.
extern "C" __global__ void __launch_bounds__(64) no_barrier(float* out, unsigned) {
    __shared__ float tile[64];
    tile[threadIdx.x] = 1.0f;
    out[blockIdx.x * 64 + threadIdx.x] = tile[63 - threadIdx.x];
}

/// Reads what was copied before it must have come.
extern "C" __global__ void __launch_bounds__(32) no_wait(float* out, const float* x) {
    __shared__ __align__(16) float tile[128];
    cp_async_16(tile + threadIdx.x * 4, x);
    cp_async_commit();
    out[threadIdx.x] = tile[threadIdx.x * 4];
    cp_async_wait<0>();
}

extern "C" __global__ void __launch_bounds__(64) misaligned(float* out, unsigned which) {
    Vec<float> v = load_vec(out + which);
    if (threadIdx.x == 0) store_vec(out, v);
}

extern "C" __global__ void __launch_bounds__(64) endless_stack(float* out, unsigned which) {
    struct Deep {
        static __device__ float down(unsigned n, float* out) {
            volatile float local[1024];
            local[n % 1024] = out[0];
            return n == 0 ? local[0] : down(n - 1, out) + local[n % 1024];
        }
    };
    out[threadIdx.x] = Deep::down(which, out);
}
