// Attention over short sequences, forward and backward, without an N x N matrix in memory.
//
// After Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning" (2023): a warp owns 16 rows and keeps
// their sums in registers while it goes over the columns, tile by tile. Forward, rows are queries and columns keys, with the softmax's
// largest score and sum brought up to date from tile to tile. Backward, probabilities come back from the saved log-sum-exp, once with
// queries as rows (gradient of queries) and once with keys as rows (gradients of keys and values): seven products instead of five, but
// every sum stays in one warp, in one order, without atomics.
//
// A block takes one head of one sequence, or a part of its rows. Rows and columns lie in shared memory, filled up with zeros to whole
// tiles. Columns come at once where they fit (then every element is read from memory once), else in chunks, the next one under way
// while one is worked on. One head of 20 tokens takes two warps and some 12 KB: occupancy hides what such a block waits for.
//
// What bounds it, derived, not measured, for an H100 (3.35 TB/s), ViT-B (12 heads of 64), a batch of 256 in bf16. Memory: forward 4 N D numbers a
// sequence, backward 8: 9 and 19 us at 20 tokens, 39 and 78 at 83, 93 and 185 at 197. Operands of tensor cores come from shared memory, 512 bytes
// (4 cycles) for two products of [16, 16] by [16, 8]: at 197 tokens some 72 us forward, 250 us backward. So all is bound by memory but the
// backward of long sequences. Three or four blocks of four warps run at once on a multiprocessor forward, three backward (registers; at 197 tokens
// forward shared memory: 60 KB a block).
//
// qkv and d_qkv: [batch, tokens, 3, heads, width]; out and d_out: [batch, tokens, heads, width]; lse: [batch, heads, tokens].

/// Rows of a warp.
#define ROWS 16u

/// Elements in 16 bytes.
#define CHUNK (16u / static_cast<unsigned>(sizeof(act_t)))

#define LOG2_E 1.4426950408889634f
#define LN_2 0.6931471805599453f
#define INFINITE __uint_as_float(0x7f800000u)

/// 2^x to 2 units in the last place, 0 for what would be subnormal.
__device__ __forceinline__ float power_of_2(float x) {
#ifdef PCAE_EMULATED
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

/// `x`, about which the compiler knows nothing: addresses made from it are computed anew, not kept in registers over the loop between.
__device__ __forceinline__ unsigned anew(unsigned x) {
#ifndef PCAE_EMULATED
    asm volatile("" : "+r"(x));
#endif
    return x;
}

// ------------------------------------------------------------------------------------------------- Rows in memory, rows in shared memory

/// Rows of one head in global memory: queries, keys, values, outputs or gradients of these.
template <typename T>
struct Rows {
    T* first;
    size_t stride;
    unsigned tokens;
    unsigned width;
    /// Whether rows start on multiples of 16 bytes and are made of whole ones.
    bool vectors;
};

/// What is the same for all heads.
struct Dims {
    unsigned tokens;
    unsigned heads;
    unsigned width;

    /// Rows of head `of` (a sequence's heads follow each other) in [batch, tokens, parts, heads, width].
    template <typename T>
    __device__ __forceinline__ Rows<T> rows(T* all, unsigned of, unsigned parts, unsigned part) const {
        of = anew(of);
        const size_t dim = static_cast<size_t>(heads) * width;
        T* const first = all + (static_cast<size_t>(of / heads) * tokens * parts + part) * dim + static_cast<size_t>(of % heads) * width;
        return {first, parts * dim, tokens, width, width % CHUNK == 0 && aligned_16(all)};
    }

    /// Queries (0), keys (1), values (2), or their gradients.
    template <typename T>
    __device__ __forceinline__ Rows<T> part(T* qkv, unsigned of, unsigned part) const {
        return rows(qkv, of, 3, part);
    }

    /// Outputs, or their gradients.
    template <typename T>
    __device__ __forceinline__ Rows<T> output(T* out, unsigned of) const {
        return rows(out, of, 1, 0);
    }

    /// What is saved of a head.
    template <typename T>
    __device__ __forceinline__ T* sums(T* lse, unsigned of) const {
        return lse + static_cast<size_t>(anew(of)) * tokens;
    }
};

/// Where 16 bytes, the `chunk`-th of a row, lie in a matrix of rows of D elements in shared memory: chunks are swapped within a row so
/// that the same chunk of eight rows that follow each other lies in all 32 banks.
///
/// Chunk 2 `pair` + `half`: with a constant `pair`, all that depends on the thread is shared between pairs four apart.
template <unsigned D>
__device__ __forceinline__ unsigned place(unsigned row, unsigned pair, unsigned half) {
    constexpr unsigned CHUNKS = D / CHUNK;
    constexpr unsigned EVEN = CHUNKS & (~CHUNKS + 1);  // the largest power of two in it: 8 rows fill the banks EVEN chunks at a time
    constexpr unsigned SWAPS = EVEN < 8 ? EVEN : 8;
    const unsigned swap = row / (8 / SWAPS) % SWAPS, swap_pair = swap / 2;
    constexpr unsigned PAIRS = SWAPS / 2;
    return row * D + (pair % PAIRS ^ swap_pair) * 2 * CHUNK + (half ^ swap % 2) * CHUNK + pair / PAIRS * PAIRS * 2 * CHUNK;
}

template <unsigned D>
__device__ __forceinline__ unsigned place(unsigned row, unsigned chunk) {
    return place<D>(row, chunk / 2, chunk % 2);
}

/// Starts to copy `count` rows from row `first` on into shared memory, zeros beyond the last token and beyond the width, by `threads`
/// threads. Waiting is up to the caller.
template <unsigned D>
__device__ __forceinline__ void fetch_rows(act_t* to, const Rows<const act_t>& from, unsigned first, unsigned count, unsigned thread, unsigned threads) {
    constexpr unsigned CHUNKS = D / CHUNK;
#pragma unroll 1
    for (unsigned i = anew(thread); i < count * CHUNKS; i += threads) {
        const unsigned row = i / CHUNKS, start = i % CHUNKS * CHUNK, token = first + row;
        act_t* const at = to + place<D>(row, i % CHUNKS);
        const act_t* const source = from.first + token * from.stride + start;
        if (from.vectors) {
            const bool valid = token < from.tokens && start < from.width;
            cp_async_16(at, valid ? source : from.first, valid);
        } else {
#pragma unroll
            for (unsigned j = 0; j < CHUNK; ++j) at[j] = token < from.tokens && start + j < from.width ? source[j] : to_act(0.0f);
        }
    }
}

/// For `count` rows of queries from row `first` on, by `warps` warps: log-sum-exp in base 2 to `to`, and the dot product of output and its
/// gradient to `to + count`. Beyond the last token: infinity, which makes probabilities 0, and 0. A lane loads from AT_ONCE rows at once.
template <unsigned AT_ONCE>
__device__ __forceinline__ void fetch_sums(float* to, const float* lse, const Rows<const act_t>& out, const Rows<const act_t>& d_out, unsigned first,
                                           unsigned count, unsigned warp, unsigned warps) {
    // Eight lanes a row.
    constexpr unsigned STEP = 4 * AT_ONCE;
    const unsigned lane = anew(lane_id()), part = lane % 8;
    const bool vectors = out.vectors && d_out.vectors;
#pragma unroll 1
    for (unsigned base = warp * STEP; base < count; base += warps * STEP) {
        const unsigned row = base + lane / 8;
        float sum[AT_ONCE] = {};
#pragma unroll 1
        for (unsigned i = vectors ? part * CHUNK : part; i < out.width; i += vectors ? 8 * CHUNK : 8) {
            if (vectors) {
                uint4 x[AT_ONCE] = {}, y[AT_ONCE] = {};
#pragma unroll
                for (unsigned j = 0; j < AT_ONCE; ++j) {
                    const unsigned token = first + row + 4 * j;
                    if (token < out.tokens) {
                        x[j] = *reinterpret_cast<const uint4*>(out.first + token * out.stride + i);
                        y[j] = *reinterpret_cast<const uint4*>(d_out.first + token * d_out.stride + i);
                    }
                }
#pragma unroll
                for (unsigned j = 0; j < AT_ONCE; ++j) {
                    const Vec<act_t> a = load_vec(reinterpret_cast<const act_t*>(&x[j])), b = load_vec(reinterpret_cast<const act_t*>(&y[j]));
#pragma unroll
                    for (unsigned k = 0; k < CHUNK; ++k) sum[j] += a.v[k] * b.v[k];
                }
            } else {
#pragma unroll
                for (unsigned j = 0; j < AT_ONCE; ++j) {
                    const unsigned token = first + row + 4 * j;
                    if (token < out.tokens) sum[j] += to_float(out.first[token * out.stride + i]) * to_float(d_out.first[token * d_out.stride + i]);
                }
            }
        }
#pragma unroll
        for (unsigned j = 0; j < AT_ONCE; ++j) {
            const unsigned token = first + row + 4 * j;
#pragma unroll
            for (int step = 4; step > 0; step /= 2) sum[j] += __shfl_xor_sync(FULL_WARP, sum[j], step);
            if (part == 0) {
                to[row + 4 * j] = token < out.tokens ? lse[token] * LOG2_E : INFINITE;
                to[count + row + 4 * j] = sum[j];
            }
        }
    }
}

#ifdef PCAE_BF16

// ----------------------------------------------------------------------------------------------------------- bf16: products of a warp
//
// Tensor cores multiply [16, 16] by [16, 8]. Of a result [16, 8 n], a lane holds rows lane / 4 and lane / 4 + 8 and, of every eight columns,
// lane % 4 * 2 and the next. Two such results of eight columns, rounded, are the left operand [16, 16] of a further product, without a move.

/// Columns in a backward's tile; chunks are made of whole ones.
#define COLUMNS 16u

/// Floats of shared memory that a warp needs beside its rows.
#define FORWARD_TILE 0u
#define BACKWARD_TILE 0u

/// The lane, for addresses in a step: anew where heads are wide, since registers are short there.
template <unsigned D>
__device__ __forceinline__ unsigned step_lane() {
    return D >= 96 ? anew(lane_id()) : lane_id();
}

/// Columns 16 k.. of 16 rows, as left operand.
template <unsigned D>
__device__ __forceinline__ void left_operand(unsigned (&a)[4], const act_t* rows, unsigned k, unsigned lane) {
    ldmatrix_x4(a, rows + place<D>(lane % 16, k, lane / 16));
}

/// (d0, d1) += a @ rows^T, over columns 16 k.. of the 16 rows.
template <unsigned D>
__device__ __forceinline__ void multiply_transposed(float (&d0)[4], float (&d1)[4], const unsigned (&a)[4], const act_t* rows, unsigned k,
                                                    unsigned lane) {
    unsigned b[4];
    ldmatrix_x4(b, rows + place<D>(lane % 8 + lane / 16 * 8, k, lane / 8 % 2));
    const unsigned b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
    mma_m16n8k16(d0, a, b0);
    mma_m16n8k16(d1, a, b1);
}

/// d += a @ rows, all columns of the 16 rows.
template <unsigned D>
__device__ __forceinline__ void multiply(float (&d)[D / 8][4], const unsigned (&a)[4], const act_t* rows, unsigned lane) {
#pragma unroll
    for (unsigned n = 0; n < D / 16; ++n) {
        unsigned b[4];
        ldmatrix_x4_trans(b, rows + place<D>(lane % 16, n, lane / 16));
        const unsigned b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
        mma_m16n8k16(d[2 * n], a, b0);
        mma_m16n8k16(d[2 * n + 1], a, b1);
    }
}

/// Two results of eight columns, as left operand.
__device__ __forceinline__ void round_operand(unsigned (&a)[4], const float (&d0)[4], const float (&d1)[4]) {
    a[0] = pack_bf16(d0[0], d0[1]);
    a[1] = pack_bf16(d0[2], d0[3]);
    a[2] = pack_bf16(d1[0], d1[1]);
    a[3] = pack_bf16(d1[2], d1[3]);
}

template <unsigned D>
__device__ __forceinline__ void clear(float (&d)[D / 8][4]) {
#pragma unroll
    for (unsigned n = 0; n < D / 8; ++n) {
#pragma unroll
        for (unsigned i = 0; i < 4; ++i) d[n][i] = 0.0f;
    }
}

/// Writes a result, times a factor for the upper and one for the lower eight rows, to row `first` and the next of `to`. It goes through `own`,
/// 16 rows of shared memory that only this warp uses, so that 16 bytes are written at once. `as_e4m3`: null, or where `to`'s matrix starts, which is written
/// in e4m3; its rows are made of whole vectors then.
template <unsigned D>
__device__ __forceinline__ void store_rows(const Rows<act_t>& to, unsigned first, const float (&d)[D / 8][4], float upper, float lower, act_t* own,
                                           act_t* as_e4m3 = nullptr) {
    constexpr unsigned CHUNKS = D / CHUNK;
    const unsigned lane = anew(lane_id());
    __syncwarp();  // what was in `own` has been read
#pragma unroll
    for (unsigned n = 0; n < D / 8; ++n) {
        *reinterpret_cast<unsigned*>(own + place<D>(lane / 4, n) + lane % 4 * 2) = pack_bf16(d[n][0] * upper, d[n][1] * upper);
        *reinterpret_cast<unsigned*>(own + place<D>(lane / 4 + 8, n) + lane % 4 * 2) = pack_bf16(d[n][2] * lower, d[n][3] * lower);
    }
    __syncwarp();
    for (unsigned i = lane; i < ROWS * CHUNKS; i += 32) {
        const unsigned token = first + i / CHUNKS, start = i % CHUNKS * CHUNK;
        if (token >= to.tokens) break;
        const act_t* const from = own + place<D>(i / CHUNKS, i % CHUNKS);
        act_t* const at = to.first + token * to.stride + start;
        if (as_e4m3 != nullptr) {
            if (start < to.width) store_e4m3(reinterpret_cast<e4m3*>(as_e4m3) + (at - as_e4m3), load_vec(from));
        } else if (to.vectors) {
            if (start < to.width) *reinterpret_cast<uint4*>(at) = *reinterpret_cast<const uint4*>(from);
        } else {
            for (unsigned j = 0; j < CHUNK && start + j < to.width; ++j) at[j] = from[j];
        }
    }
    __syncwarp();
}

/// The left operands of a warp's rows, in registers where there are enough, else from shared memory every time.
template <unsigned D, bool KEPT>
struct LeftOperands {
    unsigned kept[KEPT ? D / 16 : 1][4];

    __device__ __forceinline__ void begin(const act_t* own) {
        if constexpr (KEPT) {
#pragma unroll
            for (unsigned k = 0; k < D / 16; ++k) left_operand<D>(kept[k], own, k, lane_id());
        }
    }

    __device__ __forceinline__ void get(unsigned (&a)[4], const act_t* own, unsigned k, unsigned lane) const {
        if constexpr (KEPT) {
#pragma unroll
            for (unsigned i = 0; i < 4; ++i) a[i] = kept[k][i];
        } else {
            left_operand<D>(a, own, k, lane);
        }
    }
};

/// 16 queries and what they have seen of the keys so far.
template <unsigned D>
struct Forward {
    LeftOperands<D, (D <= 80)> queries;
    float out[D / 8][4];
    /// Of rows lane / 4 and lane / 4 + 8: the largest score, and this lane's part of the sum. Scores are in base 2.
    float largest[2];
    float total[2];

    __device__ __forceinline__ void begin(const act_t* own) {
        queries.begin(own);
        clear<D>(out);
#pragma unroll
        for (unsigned h = 0; h < 2; ++h) {
            largest[h] = -INFINITE;
            total[h] = 0.0f;
        }
    }

    /// The next 16 `PARTS` keys, of which `count` exist (at least one).
    template <unsigned PARTS>
    __device__ __forceinline__ void step_of(const act_t* keys, const act_t* values, act_t* own, unsigned count, float scale) {
        const unsigned lane = step_lane<D>();
        float s[2 * PARTS][4] = {};
#pragma unroll
        for (unsigned k = 0; k < D / 16; ++k) {
            unsigned a[4];
            queries.get(a, own, k, lane);
#pragma unroll
            for (unsigned j = 0; j < PARTS; ++j) multiply_transposed<D>(s[2 * j], s[2 * j + 1], a, keys + 16 * D * j, k, lane);
        }
        float top[2] = {largest[0], largest[1]};
#pragma unroll
        for (unsigned n = 0; n < 2 * PARTS; ++n) {
#pragma unroll
            for (unsigned i = 0; i < 4; ++i) {
                // Not contracted with the subtraction below: the largest score must give exactly 2^0.
                s[n][i] = 8 * n + lane % 4 * 2 + i % 2 < count ? __fmul_rn(s[n][i], scale) : -INFINITE;
                top[i / 2] = fmaxf(top[i / 2], s[n][i]);
            }
        }
#pragma unroll
        for (unsigned h = 0; h < 2; ++h) {
            top[h] = fmaxf(top[h], __shfl_xor_sync(FULL_WARP, top[h], 1));
            top[h] = fmaxf(top[h], __shfl_xor_sync(FULL_WARP, top[h], 2));
            // `top` is a score of a key that exists, so that nothing here is infinity minus infinity.
            const float factor = power_of_2(largest[h] - top[h]);
            largest[h] = top[h];
            total[h] *= factor;
#pragma unroll
            for (unsigned n = 0; n < D / 8; ++n) {
                out[n][2 * h] *= factor;
                out[n][2 * h + 1] *= factor;
            }
        }
#pragma unroll
        for (unsigned n = 0; n < 2 * PARTS; ++n) {
#pragma unroll
            for (unsigned i = 0; i < 4; ++i) {
                s[n][i] = power_of_2(s[n][i] - top[i / 2]);
                total[i / 2] += s[n][i];
            }
        }
#pragma unroll
        for (unsigned j = 0; j < PARTS; ++j) {
            unsigned a[4];
            round_operand(a, s[2 * j], s[2 * j + 1]);
            multiply<D>(out, a, values + 16 * D * j, lane);
        }
    }

    /// All keys of a chunk, of which `count` exist: 32 at a time, and at the end 16.
    __device__ __forceinline__ void sweep(const act_t* keys, const act_t* values, act_t* own, unsigned count, float scale) {
#pragma unroll 1
        for (; count > 16; keys += 32 * D, values += 32 * D, count -= 32) {
            step_of<2>(keys, values, own, count, scale);
            if (count <= 32) return;
        }
        step_of<1>(keys, values, own, count, scale);
    }

    __device__ __forceinline__ void finish(const Rows<act_t>& to, float* lse, unsigned first, act_t* own, act_t* as_e4m3) {
        const unsigned lane = lane_id();
#pragma unroll
        for (unsigned h = 0; h < 2; ++h) {
            total[h] += __shfl_xor_sync(FULL_WARP, total[h], 1);
            total[h] += __shfl_xor_sync(FULL_WARP, total[h], 2);
            const unsigned token = first + lane / 4 + 8 * h;
            if (lse != nullptr && lane % 4 == 0 && token < to.tokens) lse[token] = (largest[h] + log2f(total[h])) * LN_2;
        }
        store_rows<D>(to, first, out, 1.0f / total[0], 1.0f / total[1], own, as_e4m3);
    }
};

/// 16 queries and the gradient of these so far. `own`: queries, then gradients of outputs.
template <unsigned D>
struct QueryGradient {
    static constexpr bool OF_KEYS = false;
    LeftOperands<D, (D <= 64)> queries, d_out;
    float d_queries[D / 8][4];

    __device__ __forceinline__ void begin(const act_t* own) {
        queries.begin(own);
        d_out.begin(own + ROWS * D);
        clear<D>(d_queries);
    }

    /// The next 16 keys, of which `count` exist. `sums`: of the own rows, log-sum-exp (base 2) and `own_stride` floats further, dot products.
    __device__ __forceinline__ void step(const act_t* keys, const act_t* values, const float* sums, unsigned stride, act_t* own, float*, unsigned count, float scale) {
        const unsigned lane = step_lane<D>();
        float s[2][4] = {}, d_s[2][4] = {};
#pragma unroll
        for (unsigned k = 0; k < D / 16; ++k) {
            unsigned a[4];
            queries.get(a, own, k, lane);
            multiply_transposed<D>(s[0], s[1], a, keys, k, lane);
            d_out.get(a, own + ROWS * D, k, lane);
            multiply_transposed<D>(d_s[0], d_s[1], a, values, k, lane);
        }
#pragma unroll
        for (unsigned n = 0; n < 2; ++n) {
#pragma unroll
            for (unsigned i = 0; i < 4; ++i) {
                const unsigned row = lane / 4 + i / 2 * 8;
                const float p = 8 * n + lane % 4 * 2 + i % 2 < count ? power_of_2(__fmul_rn(s[n][i], scale) - sums[row]) : 0.0f;
                d_s[n][i] = p * (d_s[n][i] - sums[stride + row]);
            }
        }
        unsigned a[4];
        round_operand(a, d_s[0], d_s[1]);
        multiply<D>(d_queries, a, keys, lane);
    }

    __device__ __forceinline__ void finish(const Rows<act_t>& to, const Rows<act_t>&, unsigned first, act_t* own, float scale) {
        store_rows<D>(to, first, d_queries, scale, scale, own);
    }
};

/// 16 keys and the gradients of these and their values so far. `own`: keys, then values.
template <unsigned D>
struct KeyGradient {
    static constexpr bool OF_KEYS = true;
    LeftOperands<D, (D <= 64)> keys, values;
    float d_keys[D / 8][4], d_values[D / 8][4];

    __device__ __forceinline__ void begin(const act_t* own) {
        keys.begin(own);
        values.begin(own + ROWS * D);
        clear<D>(d_keys);
        clear<D>(d_values);
    }

    /// The next 16 queries. `sums`: of these, log-sum-exp (base 2, infinity beyond the last) and `stride` floats further, dot products.
    __device__ __forceinline__ void step(const act_t* queries, const act_t* d_out, const float* sums, unsigned stride, act_t* own, float*, unsigned, float scale) {
        const unsigned lane = step_lane<D>();
        float p[2][4] = {}, d_s[2][4] = {};
#pragma unroll
        for (unsigned k = 0; k < D / 16; ++k) {
            unsigned a[4];
            keys.get(a, own, k, lane);
            multiply_transposed<D>(p[0], p[1], a, queries, k, lane);
            values.get(a, own + ROWS * D, k, lane);
            multiply_transposed<D>(d_s[0], d_s[1], a, d_out, k, lane);
        }
#pragma unroll
        for (unsigned n = 0; n < 2; ++n) {
#pragma unroll
            for (unsigned i = 0; i < 4; ++i) {
                const unsigned column = 8 * n + lane % 4 * 2 + i % 2;
                p[n][i] = power_of_2(__fmul_rn(p[n][i], scale) - sums[column]);
                d_s[n][i] = p[n][i] * (d_s[n][i] - sums[stride + column]);
            }
        }
        unsigned a[4];
        round_operand(a, p[0], p[1]);
        multiply<D>(d_values, a, d_out, lane);
        round_operand(a, d_s[0], d_s[1]);
        multiply<D>(d_keys, a, queries, lane);
    }

    __device__ __forceinline__ void finish(const Rows<act_t>& to_keys, const Rows<act_t>& to_values, unsigned first, act_t* own, float scale) {
        store_rows<D>(to_keys, first, d_keys, scale, scale, own);
        store_rows<D>(to_values, first, d_values, 1.0f, 1.0f, own + ROWS * D);
    }
};

#else

// ------------------------------------------------------------------------------------------------------------ f32: products of a warp
//
// Lane 8 r + c holds, of a tile of 16 rows and 32 columns, rows 4 r.. (four) and columns c, c + 8, c + 16, c + 24; and of a result of 16 rows,
// rows 4 r.. and chunks (four columns) c, c + 8, and so on. Between the two, a tile goes through shared memory of the warp.

/// Columns in a tile; chunks are made of whole ones.
#define COLUMNS 32u

/// Floats of shared memory that a warp needs beside its rows: one or two tiles.
#define FORWARD_TILE (ROWS * 32u)
#define BACKWARD_TILE (2u * ROWS * 32u)

/// Chunks of a row that a lane holds.
template <unsigned D>
constexpr unsigned HELD = (D / CHUNK + 7) / 8;

__device__ __forceinline__ float4 load_chunk(const float* at) { return *reinterpret_cast<const float4*>(at); }

__device__ __forceinline__ void add_product(float& sum, const float4& a, const float4& b) { sum += a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }

__device__ __forceinline__ void add_scaled(float4& sum, float factor, const float4& b) {
    sum.x += factor * b.x;
    sum.y += factor * b.y;
    sum.z += factor * b.z;
    sum.w += factor * b.w;
}

/// tile = rows @ columns^T, 16 rows and 32 columns.
template <unsigned D>
__device__ __forceinline__ void multiply_transposed(float (&tile)[4][4], const float* rows, const float* columns) {
    const unsigned r = lane_id() / 8, c = lane_id() % 8;
#pragma unroll
    for (unsigned i = 0; i < 4; ++i) {
#pragma unroll
        for (unsigned j = 0; j < 4; ++j) tile[i][j] = 0.0f;
    }
#pragma unroll 1
    for (unsigned k = 0; k < D / CHUNK; ++k) {
        float4 a[4], b[4];
#pragma unroll
        for (unsigned i = 0; i < 4; ++i) {
            a[i] = load_chunk(rows + place<D>(4 * r + i, k));
            b[i] = load_chunk(columns + place<D>(8 * i + c, k));
        }
#pragma unroll
        for (unsigned i = 0; i < 4; ++i) {
#pragma unroll
            for (unsigned j = 0; j < 4; ++j) add_product(tile[i][j], a[i], b[j]);
        }
    }
}

/// Writes a tile to the warp's shared memory.
__device__ __forceinline__ void put_tile(float* to, const float (&tile)[4][4]) {
    const unsigned r = lane_id() / 8, c = lane_id() % 8;
#pragma unroll
    for (unsigned i = 0; i < 4; ++i) {
#pragma unroll
        for (unsigned j = 0; j < 4; ++j) to[place<32>(4 * r + i, (8 * j + c) / 4) + c % 4] = tile[i][j];
    }
}

/// d += tile @ rows, 16 rows of the tile, 32 others.
template <unsigned D>
__device__ __forceinline__ void multiply(float4 (&d)[4][HELD<D>], const float* tile, const float* rows) {
    const unsigned r = lane_id() / 8, c = lane_id() % 8;
#pragma unroll 1
    for (unsigned k = 0; k < 8; ++k) {
        float4 a[4];
#pragma unroll
        for (unsigned i = 0; i < 4; ++i) a[i] = load_chunk(tile + place<32>(4 * r + i, k));
#pragma unroll
        for (unsigned n = 0; n < HELD<D>; ++n) {
            if (8 * n + c >= D / CHUNK) break;
            float4 b[4];
#pragma unroll
            for (unsigned j = 0; j < 4; ++j) b[j] = load_chunk(rows + place<D>(4 * k + j, 8 * n + c));
#pragma unroll
            for (unsigned i = 0; i < 4; ++i) {
                add_scaled(d[i][n], a[i].x, b[0]);
                add_scaled(d[i][n], a[i].y, b[1]);
                add_scaled(d[i][n], a[i].z, b[2]);
                add_scaled(d[i][n], a[i].w, b[3]);
            }
        }
    }
}

template <unsigned D>
__device__ __forceinline__ void clear(float4 (&d)[4][HELD<D>]) {
#pragma unroll
    for (unsigned i = 0; i < 4; ++i) {
#pragma unroll
        for (unsigned n = 0; n < HELD<D>; ++n) d[i][n] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
}

/// Writes a result, each of a lane's rows times its factor, to row `first` and the next of `to`.
template <unsigned D>
__device__ __forceinline__ void store_rows(const Rows<float>& to, unsigned first, const float4 (&d)[4][HELD<D>], const float (&factors)[4]) {
    const unsigned r = lane_id() / 8, c = lane_id() % 8;
#pragma unroll
    for (unsigned i = 0; i < 4; ++i) {
        const unsigned token = first + 4 * r + i;
        if (token >= to.tokens) break;
#pragma unroll
        for (unsigned n = 0; n < HELD<D>; ++n) {
            const unsigned start = (8 * n + c) * CHUNK;
            float* const at = to.first + token * to.stride + start;
            const float f = factors[i];
            const float x[4] = {d[i][n].x * f, d[i][n].y * f, d[i][n].z * f, d[i][n].w * f};
            if (to.vectors) {
                if (start < to.width) *reinterpret_cast<float4*>(at) = make_float4(x[0], x[1], x[2], x[3]);
            } else {
#pragma unroll
                for (unsigned j = 0; j < CHUNK; ++j) {
                    if (start + j < to.width) at[j] = x[j];
                }
            }
        }
    }
}

/// 16 queries and what they have seen of the keys so far.
template <unsigned D>
struct Forward {
    float4 out[4][HELD<D>];
    /// Of rows 4 r..: the largest score, and this lane's part of the sum. Scores are in base 2.
    float largest[4];
    float total[4];

    __device__ __forceinline__ void begin(const float*) {
        clear<D>(out);
#pragma unroll
        for (unsigned i = 0; i < 4; ++i) {
            largest[i] = -INFINITE;
            total[i] = 0.0f;
        }
    }

    /// The next 32 keys, of which `count` exist (at least one). `own`: 16 queries, then a tile.
    __device__ __forceinline__ void step(const float* keys, const float* values, float* own, unsigned count, float scale) {
        const unsigned c = lane_id() % 8;
        float s[4][4];
        multiply_transposed<D>(s, own, keys);
#pragma unroll
        for (unsigned i = 0; i < 4; ++i) {
            float top = largest[i];
#pragma unroll
            for (unsigned j = 0; j < 4; ++j) {
                // Not contracted with the subtraction below: the largest score must give exactly 2^0.
                s[i][j] = 8 * j + c < count ? __fmul_rn(s[i][j], scale) : -INFINITE;
                top = fmaxf(top, s[i][j]);
            }
#pragma unroll
            for (int step = 4; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, step));
            // `top` is a score of a key that exists, so that nothing here is infinity minus infinity.
            const float factor = power_of_2(largest[i] - top);
            largest[i] = top;
            total[i] *= factor;
#pragma unroll
            for (unsigned n = 0; n < HELD<D>; ++n) {
                out[i][n].x *= factor;
                out[i][n].y *= factor;
                out[i][n].z *= factor;
                out[i][n].w *= factor;
            }
#pragma unroll
            for (unsigned j = 0; j < 4; ++j) {
                s[i][j] = power_of_2(s[i][j] - top);
                total[i] += s[i][j];
            }
        }
        float* const tile = own + ROWS * D;
        put_tile(tile, s);
        __syncwarp();
        multiply<D>(out, tile, values);
        __syncwarp();
    }

    /// All keys of a chunk, of which `count` exist.
    __device__ __forceinline__ void sweep(const float* keys, const float* values, float* own, unsigned count, float scale) {
#pragma unroll 1
        for (; count > 32; keys += 32 * D, values += 32 * D, count -= 32) step(keys, values, own, 32, scale);
        step(keys, values, own, count, scale);
    }

    __device__ __forceinline__ void finish(const Rows<float>& to, float* lse, unsigned first, float*, float*) {
        const unsigned r = lane_id() / 8, c = lane_id() % 8;
        float factors[4];
#pragma unroll
        for (unsigned i = 0; i < 4; ++i) {
#pragma unroll
            for (int step = 4; step > 0; step /= 2) total[i] += __shfl_xor_sync(FULL_WARP, total[i], step);
            factors[i] = 1.0f / total[i];
            const unsigned token = first + 4 * r + i;
            if (lse != nullptr && c == 0 && token < to.tokens) lse[token] = (largest[i] + log2f(total[i])) * LN_2;
        }
        store_rows<D>(to, first, out, factors);
    }
};

/// 16 queries and the gradient of these so far. `own`: queries, then gradients of outputs.
template <unsigned D>
struct QueryGradient {
    static constexpr bool OF_KEYS = false;
    float4 d_queries[4][HELD<D>];

    __device__ __forceinline__ void begin(const float*) { clear<D>(d_queries); }

    /// The next 32 keys, of which `count` exist. `sums`: of the own rows, log-sum-exp (base 2) and `stride` floats further, dot products.
    __device__ __forceinline__ void step(const float* keys, const float* values, const float* sums, unsigned stride, float* own, float* tile, unsigned count, float scale) {
        const unsigned r = lane_id() / 8, c = lane_id() % 8;
        float s[4][4], d_s[4][4];
        multiply_transposed<D>(s, own, keys);
        multiply_transposed<D>(d_s, own + ROWS * D, values);
#pragma unroll
        for (unsigned i = 0; i < 4; ++i) {
#pragma unroll
            for (unsigned j = 0; j < 4; ++j) {
                const float p = 8 * j + c < count ? power_of_2(__fmul_rn(s[i][j], scale) - sums[4 * r + i]) : 0.0f;
                d_s[i][j] = p * (d_s[i][j] - sums[stride + 4 * r + i]);
            }
        }
        put_tile(tile, d_s);
        __syncwarp();
        multiply<D>(d_queries, tile, keys);
        __syncwarp();
    }

    __device__ __forceinline__ void finish(const Rows<float>& to, const Rows<float>&, unsigned first, float*, float scale) {
        const float factors[4] = {scale, scale, scale, scale};
        store_rows<D>(to, first, d_queries, factors);
    }
};

/// 16 keys and the gradients of these and their values so far. `own`: keys, then values.
template <unsigned D>
struct KeyGradient {
    static constexpr bool OF_KEYS = true;
    float4 d_keys[4][HELD<D>], d_values[4][HELD<D>];

    __device__ __forceinline__ void begin(const float*) {
        clear<D>(d_keys);
        clear<D>(d_values);
    }

    /// The next 32 queries. `sums`: of these, log-sum-exp (base 2, infinity beyond the last) and `stride` floats further, dot products.
    __device__ __forceinline__ void step(const float* queries, const float* d_out, const float* sums, unsigned stride, float* own, float* tiles, unsigned, float scale) {
        const unsigned c = lane_id() % 8;
        float p[4][4], d_s[4][4];
        multiply_transposed<D>(p, own, queries);
        multiply_transposed<D>(d_s, own + ROWS * D, d_out);
#pragma unroll
        for (unsigned i = 0; i < 4; ++i) {
#pragma unroll
            for (unsigned j = 0; j < 4; ++j) {
                p[i][j] = power_of_2(__fmul_rn(p[i][j], scale) - sums[8 * j + c]);
                d_s[i][j] = p[i][j] * (d_s[i][j] - sums[stride + 8 * j + c]);
            }
        }
        put_tile(tiles, p);
        put_tile(tiles + ROWS * 32, d_s);
        __syncwarp();
        multiply<D>(d_values, tiles, d_out);
        multiply<D>(d_keys, tiles + ROWS * 32, queries);
        __syncwarp();
    }

    __device__ __forceinline__ void finish(const Rows<float>& to_keys, const Rows<float>& to_values, unsigned first, float*, float scale) {
        const float factors[4] = {scale, scale, scale, scale}, ones[4] = {1.0f, 1.0f, 1.0f, 1.0f};
        store_rows<D>(to_keys, first, d_keys, factors);
        store_rows<D>(to_values, first, d_values, ones);
    }
};

#endif

// --------------------------------------------------------------------------------------------------------------------- The whole blocks

/// out = softmax(scale q k^T) v and, where `lse` is given, the logarithm of the softmax's sum. `out` is in e4m3 where `to_e4m3` is not 0, which the kernels
/// in bf16 know, for heads of whole vectors.
///
/// Grid: batch * heads * splits. A block's warps take 16 queries each, and `splits` blocks share those of a head.
/// Shared: [1 or 2][keys, values][chunk][D], then for each warp [16][D] and `FORWARD_TILE`; two halves where a chunk is not all tokens.
template <unsigned D>
__device__ __forceinline__ void attention(act_t* out, float* lse, const act_t* qkv, const Dims dims, unsigned chunk, unsigned splits, float scale,
                                          unsigned to_e4m3) {
    DYNAMIC_SHARED(act_t, shared);
    const unsigned split = blockIdx.x % splits, of = blockIdx.x / splits, tokens = dims.tokens;
    const unsigned chunks = (tokens + chunk - 1) / chunk, block_rows = blockDim.x / 32 * ROWS;
    act_t* const own = shared + (chunks > 1 ? 4 : 2) * chunk * D + warp_id() * (ROWS * D + FORWARD_TILE);
    const auto fetch = [&](unsigned c) {
        act_t* const at = shared + c % 2 * 2 * chunk * D;
        fetch_rows<D>(at, dims.part(qkv, of, 1), c * chunk, chunk, threadIdx.x, blockDim.x);
        fetch_rows<D>(at + chunk * D, dims.part(qkv, of, 2), c * chunk, chunk, threadIdx.x, blockDim.x);
    };

    bool all_here = false;
    for (unsigned start = split * block_rows; start < tokens; start += splits * block_rows) {
        const unsigned first = start + warp_id() * ROWS;
        const bool busy = first < tokens;
        if (busy) fetch_rows<D>(own, dims.part(qkv, of, 0), first, ROWS, lane_id(), 32);
        if (!all_here) fetch(0);
        cp_async_commit();
        Forward<D> state;
        for (unsigned c = 0; c < chunks; ++c) {
            if (c + 1 < chunks) {
                fetch(c + 1);
                cp_async_commit();
                cp_async_wait<1>();
            } else {
                cp_async_wait<0>();
            }
            if (all_here) {
                __syncwarp();
            } else {
                __syncthreads();
            }
            if (busy) {
                if (c == 0) state.begin(own);
                const act_t* const at = shared + c % 2 * 2 * chunk * D;
                state.sweep(at, at + chunk * D, own, min(chunk, tokens - c * chunk), scale * LOG2_E);
            }
            if (chunks > 1) __syncthreads();
        }
        if (busy) state.finish(dims.output(out, of), lse == nullptr ? nullptr : dims.sums(lse, of), first, own, to_e4m3 ? out : nullptr);
        __syncwarp();
        all_here = chunks == 1;
    }
}

/// The gradients of one kind for a block: of queries, over all keys; or of keys and values, over all queries.
///
/// Shared: [1 or 2][columns][chunk][D], for each warp [2][16][D], then floats: column sums [1 or 2][2][chunk], and for each warp row sums [2][16] and
/// `BACKWARD_TILE`. Columns are keys and values, or queries and gradients of outputs; rows are the others.
template <unsigned D, typename State>
__device__ __forceinline__ void gradients(act_t* d_qkv, const act_t* d_out, const act_t* qkv, const act_t* out, const float* lse, unsigned of, unsigned split,
                                          const Dims dims, unsigned chunk, unsigned splits, float scale) {
    DYNAMIC_SHARED(act_t, shared);
    const unsigned tokens = dims.tokens, chunks = (tokens + chunk - 1) / chunk, halves = chunks > 1 ? 2 : 1;
    const unsigned warps = blockDim.x / 32, block_rows = warps * ROWS;
    act_t* const own = shared + (halves * 2 * chunk + warp_id() * 2 * ROWS) * D;
    float* const column_sums = reinterpret_cast<float*>(shared + (halves * 2 * chunk + warps * 2 * ROWS) * D);
    float* const row_sums = column_sums + halves * 2 * chunk + warp_id() * (2 * ROWS + BACKWARD_TILE);
    float* const tile = row_sums + 2 * ROWS;
    const auto fetch = [&](unsigned c) {
        act_t* const at = shared + c % 2 * 2 * chunk * D;
        const Rows<const act_t> d_outs = dims.output(d_out, of);
        fetch_rows<D>(at, dims.part(qkv, of, State::OF_KEYS ? 0 : 1), c * chunk, chunk, threadIdx.x, blockDim.x);
        fetch_rows<D>(at + chunk * D, State::OF_KEYS ? d_outs : dims.part(qkv, of, 2), c * chunk, chunk, threadIdx.x, blockDim.x);
    };
    const auto column_sums_of = [&](unsigned c) { return column_sums + c % 2 * 2 * chunk; };

    bool all_here = false;
    for (unsigned start = split * block_rows; start < tokens; start += splits * block_rows) {
        const unsigned first = start + warp_id() * ROWS;
        const bool busy = first < tokens;
        const Rows<const act_t> d_outs = dims.output(d_out, of);
        if (busy) {
            fetch_rows<D>(own, dims.part(qkv, of, State::OF_KEYS ? 1 : 0), first, ROWS, lane_id(), 32);
            fetch_rows<D>(own + ROWS * D, State::OF_KEYS ? dims.part(qkv, of, 2) : d_outs, first, ROWS, lane_id(), 32);
        }
        if (!all_here) fetch(0);
        cp_async_commit();
        if (State::OF_KEYS && !all_here) {
            fetch_sums<4>(column_sums_of(0), dims.sums(lse, of), dims.output(out, of), d_outs, 0, chunk, warp_id(), warps);
        }
        if (busy && !State::OF_KEYS) fetch_sums<4>(row_sums, dims.sums(lse, of), dims.output(out, of), d_outs, first, ROWS, 0, 1);
        State state;
        for (unsigned c = 0; c < chunks; ++c) {
            if (c + 1 < chunks) {
                fetch(c + 1);
                cp_async_commit();
                // Few at once: the state is in registers now.
                if (State::OF_KEYS) {
                    fetch_sums<1>(column_sums_of(c + 1), dims.sums(lse, of), dims.output(out, of), dims.output(d_out, of), (c + 1) * chunk, chunk, warp_id(), warps);
                }
                cp_async_wait<1>();
            } else {
                cp_async_wait<0>();
            }
            if (all_here) {
                __syncwarp();
            } else {
                __syncthreads();
            }
            if (busy) {
                if (c == 0) state.begin(own);
                const act_t* const at = shared + c % 2 * 2 * chunk * D;
                const float* const sums = State::OF_KEYS ? column_sums_of(c) : row_sums;
                const unsigned columns = min(chunk, tokens - c * chunk);
#pragma unroll 1
                for (unsigned column = 0; column < columns; column += COLUMNS) {
                    state.step(at + column * D, at + (chunk + column) * D, State::OF_KEYS ? sums + column : sums, State::OF_KEYS ? chunk : ROWS, own, tile,
                               columns - column, scale * LOG2_E);
                }
            }
            if (chunks > 1) __syncthreads();
        }
        if (busy) state.finish(dims.part(d_qkv, of, State::OF_KEYS ? 1 : 0), dims.part(d_qkv, of, 2), first, own, scale);
        __syncwarp();
        all_here = chunks == 1;
    }
}

/// With p = exp(scale q k^T - lse) and d_s = p (d_out v^T - rowsum(d_out * out)): d_q = scale d_s k, d_k = scale d_s^T q, d_v = p^T d_out.
///
/// Grid: batch * heads * 2 * splits, next to each other the blocks that read the same head, so that all but the first find it in the level-2 cache.
template <unsigned D>
__device__ __forceinline__ void attention_backward(act_t* d_qkv, const act_t* d_out, const act_t* qkv, const act_t* out, const float* lse, const Dims dims,
                                                   unsigned chunk, unsigned splits, float scale) {
    const unsigned split = blockIdx.x % splits, kind = blockIdx.x / splits % 2, of = blockIdx.x / splits / 2;
    if (kind == 0) {
        gradients<D, QueryGradient<D>>(d_qkv, d_out, qkv, out, lse, of, split, dims, chunk, splits, scale);
    } else {
        gradients<D, KeyGradient<D>>(d_qkv, d_out, qkv, out, lse, of, split, dims, chunk, splits, scale);
    }
}

// Heads of a width up to D, by blocks of one to four warps. A multiprocessor must hold as many blocks of four as the numbers say, forward and backward:
// that leaves a thread 512 / number registers, which suffice.
#define ATTENTION(D, FORWARD_BLOCKS, BACKWARD_BLOCKS)                                                                                             \
    extern "C" __global__ void __launch_bounds__(128, FORWARD_BLOCKS)                                                                             \
        attention_##D(act_t* out, float* lse, const act_t* qkv, unsigned tokens, unsigned heads, unsigned width, unsigned chunk, unsigned splits, \
                      float scale, unsigned to_e4m3) {                                                                                            \
        attention<D>(out, lse, qkv, {tokens, heads, width}, chunk, splits, scale, to_e4m3);                                                       \
    }                                                                                                                                             \
    extern "C" __global__ void __launch_bounds__(128, BACKWARD_BLOCKS)                                                                            \
        attention_backward_##D(act_t* d_qkv, const act_t* d_out, const act_t* qkv, const act_t* out, const float* lse, unsigned tokens,           \
                               unsigned heads, unsigned width, unsigned chunk, unsigned splits, float scale) {                                    \
        attention_backward<D>(d_qkv, d_out, qkv, out, lse, {tokens, heads, width}, chunk, splits, scale);                                         \
    }

#ifdef PCAE_BF16
ATTENTION(32, 5, 4)
ATTENTION(64, 4, 3)
ATTENTION(80, 4, 3)
ATTENTION(96, 4, 2)
ATTENTION(128, 2, 2)
#else
ATTENTION(32, 4, 2)
ATTENTION(64, 3, 2)
ATTENTION(80, 2, 2)
ATTENTION(96, 2, 2)
ATTENTION(128, 2, 2)
#endif
