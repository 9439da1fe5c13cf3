// Kernels on rows: layer norm and its gradients, standardised targets, the cosine loss, GELU, sums over rows.
//
// All of them are bound by memory. "Bytes" counts what each element of a matrix costs at the memory bus, with A the size of an activation
// (4 in f32, 2 in bf16); what a row, a column or a block costs beside it is left out.

static constexpr int LANES = Vec<act_t>::SIZE;

// ---------------------------------------------------------------------------------------------------------- Rows in registers

/// 16 bytes of activations as they lie in memory: a row of bf16 kept so takes half the registers that its values would.
struct Raw {
    unsigned r[4];
};

/// Element `i` of the vector; `i` is known to the compiler.
__device__ __forceinline__ float value(const Raw& raw, int i) {
#ifdef PCAE_BF16
    return i % 2 ? high_bf16(raw.r[i / 2]) : low_bf16(raw.r[i / 2]);
#else
    return __uint_as_float(raw.r[i]);
#endif
}

/// Columns `column..column + LANES` of a row of `dim`, zeros past its end. `WHOLE`: the row starts on a multiple of 16 bytes and is whole vectors.
template <bool WHOLE>
__device__ __forceinline__ Raw load_raw(const act_t* row, unsigned column, unsigned dim) {
    Raw raw = {{0, 0, 0, 0}};
    if constexpr (WHOLE) {
        if (column < dim) {
            uint4 bits = *reinterpret_cast<const uint4*>(row + column);
            raw = {{bits.x, bits.y, bits.z, bits.w}};
        }
    } else {
#pragma unroll
        for (int i = 0; i < LANES; ++i) {
            if (column + i < dim) {
#ifdef PCAE_BF16
                raw.r[i / 2] |= static_cast<unsigned>(row[column + i].bits) << (i % 2 * 16);
#else
                raw.r[i] = __float_as_uint(row[column + i]);
#endif
            }
        }
    }
    return raw;
}

/// Stores what of `x` is before the end of the row; the counterpart of `load_raw`.
template <bool WHOLE>
__device__ __forceinline__ void store_row(act_t* row, unsigned column, unsigned dim, const Vec<act_t>& x) {
    if constexpr (WHOLE) {
        if (column < dim) store_vec(row + column, x);
    } else {
#pragma unroll
        for (int i = 0; i < LANES; ++i) {
            if (column + i < dim) row[column + i] = to_act(x.v[i]);
        }
    }
}

/// As `store_row`, in e4m3.
template <bool WHOLE>
__device__ __forceinline__ void store_row(e4m3* row, unsigned column, unsigned dim, const Vec<act_t>& x) {
    if constexpr (WHOLE) {
        if (column < dim) store_e4m3(row + column, x);
    } else {
#pragma unroll
        for (int i = 0; i < LANES; ++i) {
            if (column + i < dim) row[column + i].bits = static_cast<unsigned char>(pack_e4m3(to_float(to_act(x.v[i])), 0.0f));
        }
    }
}

/// As many f32 as an activation vector has elements, zeros past the end.
template <bool WHOLE>
__device__ __forceinline__ void load_floats(float (&x)[LANES], const float* row, unsigned column, unsigned dim) {
    if constexpr (WHOLE) {
        bool inside = column < dim;
#pragma unroll
        for (int i = 0; i < LANES; i += 4) {
            float4 part = inside ? *reinterpret_cast<const float4*>(row + column + i) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            x[i] = part.x, x[i + 1] = part.y, x[i + 2] = part.z, x[i + 3] = part.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < LANES; ++i) x[i] = column + i < dim ? row[column + i] : 0.0f;
    }
}

template <bool WHOLE>
__device__ __forceinline__ void store_floats(float* row, unsigned column, unsigned dim, const float (&x)[LANES]) {
    if constexpr (WHOLE) {
        if (column >= dim) return;
#pragma unroll
        for (int i = 0; i < LANES; i += 4) *reinterpret_cast<float4*>(row + column + i) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
    } else {
#pragma unroll
        for (int i = 0; i < LANES; ++i) {
            if (column + i < dim) row[column + i] = x[i];
        }
    }
}

/// Sums of `N` values each over the `WARPS` neighbouring warps that share a row. All threads of the block call.
template <int WARPS, int N>
__device__ __forceinline__ void row_sums(float (&x)[N]) {
#pragma unroll
    for (int n = 0; n < N; ++n) x[n] = warp_sum(x[n]);
    if constexpr (WARPS > 1) {
        __shared__ float partial[N][32];
        __syncthreads();  // the results of a call before this one have been read
        if (lane_id() == 0) {
#pragma unroll
            for (int n = 0; n < N; ++n) partial[n][warp_id()] = x[n];
        }
        __syncthreads();
        unsigned first = warp_id() / WARPS * WARPS;
#pragma unroll
        for (int n = 0; n < N; ++n) {
            if constexpr (WARPS == 32) {
                x[n] = warp_sum(partial[n][lane_id()]);
            } else {
                x[n] = partial[n][first];
#pragma unroll
                for (int warp = 1; warp < WARPS; ++warp) x[n] += partial[n][first + warp];
            }
        }
    }
}

/// How rows are spread over blocks: `WARPS` warps keep a row, 8 * `V` elements a thread, so at most 256 * `WARPS` * `V` elements. `BLOCK` is the
/// number of threads of a block.
///
/// `WHOLE`: the width is a multiple of LANES, and so every row of matrices and parameters starts on a multiple of 16 bytes.
template <int WARPS, int V, int BLOCK, bool WHOLE>
struct Spread {
    static constexpr int VECS = 8 * V / LANES;
    static constexpr unsigned ROW_THREADS = 32 * WARPS;
    /// Rows that a block keeps at a time.
    static constexpr unsigned ROWS = BLOCK / ROW_THREADS;

    __device__ static unsigned row() { return threadIdx.x / ROW_THREADS; }
    __device__ static unsigned column(int vec) { return (vec * ROW_THREADS + threadIdx.x % ROW_THREADS) * LANES; }
};

// ----------------------------------------------------------------------------------------------------------------- Layer norm

/// `out[i] = (x[i] - mean) * rstd * weight + bias` with `rstd = 1 / sqrt(var + 1e-6)`; `stats[i] = (mean, rstd)` unless it is null.
/// Without a weight: `out[i] = (x[i] - mean) * rstd`, and the variance is the unbiased one (standardised targets).
///
/// x, out [rows, dim], `out` in e4m3 where `to_e4m3` is not 0, which the kernels in bf16 know; weight, bias [dim]; stats [rows, 2]. The row stays in registers: the variance is
/// summed about the mean. Launch: ceil(rows / ROWS) blocks of BLOCK threads. Bytes: 2 A, or A + 1.
template <int WARPS, int V, int BLOCK, bool WHOLE>
__device__ __forceinline__ void layer_norm_rows(void* out, float* stats, const act_t* x, const float* weight, const float* bias, unsigned rows,
                                                unsigned dim, unsigned to_e4m3) {
    typedef Spread<WARPS, V, BLOCK, WHOLE> S;
    unsigned row = blockIdx.x * S::ROWS + S::row();
    bool active = row < rows;
    size_t first = static_cast<size_t>(active ? row : 0) * dim;
    x += first;
    unsigned end = active ? dim : 0;

    Raw held[S::VECS];
    float sum[1] = {0.0f};
#pragma unroll
    for (int j = 0; j < S::VECS; ++j) held[j] = load_raw<WHOLE>(x, S::column(j), end);
#pragma unroll
    for (int j = 0; j < S::VECS; ++j) {
#pragma unroll
        for (int i = 0; i < LANES; ++i) sum[0] += value(held[j], i);
    }
    row_sums<WARPS>(sum);
    float mean = sum[0] / static_cast<float>(dim);

    float squares[1] = {0.0f};
#pragma unroll
    for (int j = 0; j < S::VECS; ++j) {
#pragma unroll
        for (int i = 0; i < LANES; ++i) {
            float about = S::column(j) + (WHOLE ? 0 : i) < dim ? value(held[j], i) - mean : 0.0f;
            squares[0] += about * about;
        }
    }
    row_sums<WARPS>(squares);
    float rstd = 1.0f / sqrtf(squares[0] / static_cast<float>(weight ? dim : dim - 1) + 1e-6f);
    if (stats && active && threadIdx.x % S::ROW_THREADS == 0) {
        stats[2 * static_cast<size_t>(row)] = mean;
        stats[2 * static_cast<size_t>(row) + 1] = rstd;
    }

#pragma unroll
    for (int j = 0; j < S::VECS; ++j) {
        unsigned column = S::column(j);
        Vec<act_t> y;
#pragma unroll
        for (int i = 0; i < LANES; ++i) y.v[i] = (value(held[j], i) - mean) * rstd;
        if (weight) {
            float scale[LANES], shift[LANES];
            load_floats<WHOLE>(scale, weight, column, end);
            load_floats<WHOLE>(shift, bias, column, end);
#pragma unroll
            for (int i = 0; i < LANES; ++i) y.v[i] = y.v[i] * scale[i] + shift[i];
        }
        if (sizeof(act_t) == 2 && to_e4m3) {
            store_row<WHOLE>(static_cast<e4m3*>(out) + first, column, end, y);
        } else {
            store_row<WHOLE>(static_cast<act_t*>(out) + first, column, end, y);
        }
    }
}

#define LAYER_NORM(NAME, WARPS, V, BLOCK, WHOLE)                                                                                            \
    extern "C" __global__ void __launch_bounds__(BLOCK, BLOCK == 256 && WHOLE ? 3 : 1)                                                      \
        NAME(void* out, float* stats, const act_t* x, const float* weight, const float* bias, unsigned rows, unsigned dim, unsigned to_e4m3) { \
        layer_norm_rows<WARPS, V, BLOCK, WHOLE>(out, stats, x, weight, bias, rows, dim, to_e4m3);                                           \
    }

// By the widest row.
LAYER_NORM(layer_norm_256, 1, 1, 256, true)
LAYER_NORM(layer_norm_512, 1, 2, 256, true)
LAYER_NORM(layer_norm_768, 1, 3, 256, true)
LAYER_NORM(layer_norm_1024, 1, 4, 256, true)
LAYER_NORM(layer_norm_1536, 2, 3, 256, true)
LAYER_NORM(layer_norm_2048, 2, 4, 256, true)
LAYER_NORM(layer_norm_4096, 4, 4, 256, true)
LAYER_NORM(layer_norm_odd_1024, 1, 4, 256, false)
LAYER_NORM(layer_norm_odd_16384, 32, 2, 1024, false)

// ------------------------------------------------------------------------------------------------------- Layer norm's gradients

/// With `h = (x - mean) * rstd` and `g = d_y * weight`: `d_x (=, +=) rstd * (g - mean(g) - h * mean(g * h))`, and of each block's rows
/// `partial[block] = (sum of d_y * h, sum of d_y, sum of d_x)`. The last is the gradient of the bias of the layer whose output's gradient `d_x` is.
///
/// d_x, d_y, x [rows, dim]; stats [rows, 2]; weight [dim]; partial [blocks, 3, dim]. A block takes `rows_per_block` rows, in turns of
/// ROWS; its sums over rows stay in registers and meet in shared memory at its end, in an order that never changes.
/// Launch: ceil(rows / rows_per_block) blocks of BLOCK threads; dynamic shared memory: 48 * BLOCK * V bytes (BLOCK / 2 threads' sums), none where
/// a block keeps one row. Bytes: 3 A, where `add` is set 4 A.
template <int WARPS, int V, int BLOCK, bool WHOLE>
__device__ __forceinline__ void layer_norm_backward_rows(act_t* d_x, float* partial, const act_t* d_y, const act_t* x, const float* stats,
                                                         const float* weight, unsigned rows, unsigned dim, unsigned rows_per_block,
                                                         unsigned add) {
    typedef Spread<WARPS, V, BLOCK, WHOLE> S;
    float width = static_cast<float>(dim);

    float d_weight[S::VECS][LANES], d_bias[S::VECS][LANES], d_before[S::VECS][LANES];
#pragma unroll
    for (int j = 0; j < S::VECS; ++j) {
#pragma unroll
        for (int i = 0; i < LANES; ++i) d_weight[j][i] = d_bias[j][i] = d_before[j][i] = 0.0f;
    }

    unsigned first = blockIdx.x * rows_per_block;
    unsigned last = min(rows, first + rows_per_block);
    for (unsigned turn = first; turn < last; turn += S::ROWS) {
        bool active = turn + S::row() < last;
        size_t row = active ? turn + S::row() : first;
        unsigned end = active ? dim : 0;
        act_t* d_x_row = d_x + row * dim;
        float mean = stats[2 * row], rstd = stats[2 * row + 1];

        Raw x_held[S::VECS], d_y_held[S::VECS];
#pragma unroll
        for (int j = 0; j < S::VECS; ++j) {
            x_held[j] = load_raw<WHOLE>(x + row * dim, S::column(j), end);
            d_y_held[j] = load_raw<WHOLE>(d_y + row * dim, S::column(j), end);
        }
        float sums[2] = {0.0f, 0.0f};
#pragma unroll
        for (int j = 0; j < S::VECS; ++j) {
            float scale[LANES];
            load_floats<WHOLE>(scale, weight, S::column(j), end);
#pragma unroll
            for (int i = 0; i < LANES; ++i) {
                // Past the end of the row `d_y` is 0, and so is all that is added.
                float d = value(d_y_held[j], i), h = (value(x_held[j], i) - mean) * rstd;
                float g = d * scale[i];
                sums[0] += g;
                sums[1] += g * h;
                d_weight[j][i] += d * h;
                d_bias[j][i] += d;
            }
        }
        row_sums<WARPS>(sums);
        float mean_g = sums[0] / width, mean_gh = sums[1] / width;
#pragma unroll
        for (int j = 0; j < S::VECS; ++j) {
            unsigned column = S::column(j);
            Raw old = {{0, 0, 0, 0}};
            if (add) old = load_raw<WHOLE>(d_x_row, column, end);
            float scale[LANES];
            load_floats<WHOLE>(scale, weight, column, end);
            Vec<act_t> d;
#pragma unroll
            for (int i = 0; i < LANES; ++i) {
                float h = (value(x_held[j], i) - mean) * rstd;
                d.v[i] = value(old, i) + rstd * (value(d_y_held[j], i) * scale[i] - mean_g - h * mean_gh);
                // Of a row that is not there 0; past the end of one anything, which nobody stores.
                d_before[j][i] += d.v[i];
            }
            store_row<WHOLE>(d_x_row, column, end, d);
        }
    }

    // The upper half of the rows' threads hands its sums to the lower half, until one row's threads have them all.
    DYNAMIC_SHARED(float, shared);
#pragma unroll
    for (unsigned half = S::ROWS / 2; half > 0; half /= 2) {
        float* mine = shared + threadIdx.x % (half * S::ROW_THREADS);
        __syncthreads();
        if (S::row() >= half && S::row() < 2 * half) {
#pragma unroll
            for (int j = 0; j < S::VECS; ++j) {
#pragma unroll
                for (int i = 0; i < LANES; ++i) {
                    mine[3 * (j * LANES + i) * (BLOCK / 2)] = d_weight[j][i];
                    mine[(3 * (j * LANES + i) + 1) * (BLOCK / 2)] = d_bias[j][i];
                    mine[(3 * (j * LANES + i) + 2) * (BLOCK / 2)] = d_before[j][i];
                }
            }
        }
        __syncthreads();
        if (S::row() < half) {
#pragma unroll
            for (int j = 0; j < S::VECS; ++j) {
#pragma unroll
                for (int i = 0; i < LANES; ++i) {
                    d_weight[j][i] += mine[3 * (j * LANES + i) * (BLOCK / 2)];
                    d_bias[j][i] += mine[(3 * (j * LANES + i) + 1) * (BLOCK / 2)];
                    d_before[j][i] += mine[(3 * (j * LANES + i) + 2) * (BLOCK / 2)];
                }
            }
        }
    }
    if (S::row() > 0) return;
    partial += static_cast<size_t>(blockIdx.x) * 3 * dim;
#pragma unroll
    for (int j = 0; j < S::VECS; ++j) {
        store_floats<WHOLE>(partial, S::column(j), dim, d_weight[j]);
        store_floats<WHOLE>(partial + dim, S::column(j), dim, d_bias[j]);
        store_floats<WHOLE>(partial + 2 * dim, S::column(j), dim, d_before[j]);
    }
}

// As many blocks beside each other as registers allow; left to itself, the compiler makes room for one more and spills.
#define LAYER_NORM_BACKWARD(NAME, WARPS, V, BLOCK, WHOLE)                                                                                   \
    extern "C" __global__ void __launch_bounds__(BLOCK, BLOCK == 512 ? 1 : V == 1 ? 5 : 6 - V)                                              \
        NAME(act_t* d_x, float* partial, const act_t* d_y, const act_t* x, const float* stats, const float* weight, unsigned rows,          \
             unsigned dim, unsigned rows_per_block, unsigned add) {                                                                         \
        layer_norm_backward_rows<WARPS, V, BLOCK, WHOLE>(d_x, partial, d_y, x, stats, weight, rows, dim, rows_per_block, add);              \
    }

// By the widest row.
LAYER_NORM_BACKWARD(layer_norm_backward_256, 1, 1, 128, true)
LAYER_NORM_BACKWARD(layer_norm_backward_512, 1, 2, 128, true)
LAYER_NORM_BACKWARD(layer_norm_backward_768, 1, 3, 128, true)
LAYER_NORM_BACKWARD(layer_norm_backward_1024, 1, 4, 128, true)
LAYER_NORM_BACKWARD(layer_norm_backward_1536, 2, 3, 128, true)
LAYER_NORM_BACKWARD(layer_norm_backward_2048, 2, 4, 128, true)
LAYER_NORM_BACKWARD(layer_norm_backward_4096, 4, 4, 128, true)
LAYER_NORM_BACKWARD(layer_norm_backward_odd_256, 1, 1, 128, false)
LAYER_NORM_BACKWARD(layer_norm_backward_odd_4096, 16, 1, 512, false)

// -------------------------------------------------------------------------------------------------------------- Sums over rows

/// Of each group of rows `partial[group] = sum of f(x[0][i], ..)`, and `out[i]` those values unless there is only one operand. `f` of zeros is 0.
///
/// x, out [rows, dim], `out` may be one of `x`; partial [groups, dim]. A warp takes 32 vectors of a row, the warps of a block its rows in turns.
/// Launch: grid (ceil(dim / (32 * LANES)), groups = ceil(rows / rows_per_group)), 256 threads. Bytes: A for each operand, and A for `out`.
template <bool WHOLE, int OPERANDS, typename F>
__device__ __forceinline__ void column_sums_of(float* partial, act_t* out, const act_t* const (&x)[OPERANDS], unsigned rows, unsigned dim,
                                               unsigned rows_per_group, F f) {
    constexpr unsigned WARPS = 8, AHEAD = 4;
    unsigned column = (blockIdx.x * 32 + lane_id()) * LANES;
    unsigned first = blockIdx.y * rows_per_group;
    unsigned last = min(rows, first + rows_per_group);

    float sums[LANES];
#pragma unroll
    for (int i = 0; i < LANES; ++i) sums[i] = 0.0f;
    for (unsigned turn = first + warp_id(); turn < last; turn += WARPS * AHEAD) {
        Raw held[AHEAD][OPERANDS];
#pragma unroll
        for (unsigned k = 0; k < AHEAD; ++k) {
            unsigned row = turn + k * WARPS;
#pragma unroll
            for (int n = 0; n < OPERANDS; ++n) {
                held[k][n] = load_raw<WHOLE>(x[n] + static_cast<size_t>(row < last ? row : first) * dim, column, row < last ? dim : 0);
            }
        }
#pragma unroll
        for (unsigned k = 0; k < AHEAD; ++k) {
            Vec<act_t> y;
#pragma unroll
            for (int i = 0; i < LANES; ++i) {
                float operands[OPERANDS];
#pragma unroll
                for (int n = 0; n < OPERANDS; ++n) operands[n] = value(held[k][n], i);
                y.v[i] = f(operands);
                sums[i] += y.v[i];
            }
            if constexpr (OPERANDS > 1) {
                unsigned row = turn + k * WARPS;
                if (row < last) store_row<WHOLE>(out + static_cast<size_t>(row) * dim, column, dim, y);
            }
        }
    }

    __shared__ float shared[WARPS / 2][LANES][32];
#pragma unroll
    for (unsigned half = WARPS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (warp_id() >= half && warp_id() < 2 * half) {
#pragma unroll
            for (int i = 0; i < LANES; ++i) shared[warp_id() - half][i][lane_id()] = sums[i];
        }
        __syncthreads();
        if (warp_id() < half) {
#pragma unroll
            for (int i = 0; i < LANES; ++i) sums[i] += shared[warp_id()][i][lane_id()];
        }
    }
    if (warp_id() == 0) store_floats<WHOLE>(partial + static_cast<size_t>(blockIdx.y) * dim, column, dim, sums);
}

extern "C" __global__ void __launch_bounds__(256) column_sums(float* partial, const act_t* x, unsigned rows, unsigned dim, unsigned rows_per_group) {
    column_sums_of<true, 1>(partial, nullptr, {x}, rows, dim, rows_per_group, [](const float(&x)[1]) { return x[0]; });
}

extern "C" __global__ void __launch_bounds__(256)
    column_sums_odd(float* partial, const act_t* x, unsigned rows, unsigned dim, unsigned rows_per_group) {
    column_sums_of<false, 1>(partial, nullptr, {x}, rows, dim, rows_per_group, [](const float(&x)[1]) { return x[0]; });
}

/// `first += sum over groups of partial[:, 0]`, and for a grid of two rows `second += sum over groups of partial[:, 1]`.
///
/// partial: of each group `sums` rows, of which these are the first; first, second [width]. Eight slices of the groups at a time, then those in order.
/// Launch: grid (ceil(width / 32), 1 or 2), 256 threads. Bytes: 4 an element that is read.
extern "C" __global__ void __launch_bounds__(256)
    add_column_sums(float* first, float* second, const float* partial, unsigned groups, unsigned width, unsigned sums) {
    __shared__ float slices[8][32];
    unsigned column = blockIdx.x * 32 + lane_id();
    size_t stride = static_cast<size_t>(sums) * width;
    float sum = 0.0f;
    if (column < width) {
        const float* from = partial + static_cast<size_t>(blockIdx.y) * width + column;
#pragma unroll 8
        for (unsigned group = warp_id(); group < groups; group += 8) sum += from[group * stride];
    }
    slices[warp_id()][lane_id()] = sum;
    __syncthreads();
    if (warp_id() > 0 || column >= width) return;
#pragma unroll
    for (int slice = 1; slice < 8; ++slice) sum += slices[slice][lane_id()];
    float* to = blockIdx.y == 0 ? first : second;
    to[column] += sum;
}

// ---------------------------------------------------------------------------------------------------------------- Cosine loss

/// `cosines[i] = cos(pred[i], target[i])` with norms of 1e-8 at least, and `d_pred = factor * d cosines[i] / d pred`.
///
/// pred, target, d_pred [rows, dim]; cosines [rows]. A warp takes a row, and keeps its first 4 vectors a lane in registers.
/// Launch: ceil(rows / 8) blocks of 256 threads. Bytes: 3 A; beyond a width of 128 * LANES 5 A, of which a cache may save 2.
template <bool WHOLE>
__device__ __forceinline__ void cosine_rows(act_t* d_pred, float* cosines, const act_t* pred, const act_t* target, unsigned rows, unsigned dim,
                                            float factor) {
    constexpr int KEPT = 4;
    constexpr unsigned STEP = 32 * LANES;
    unsigned row = blockIdx.x * 8 + warp_id();
    if (row >= rows) return;
    d_pred += static_cast<size_t>(row) * dim;
    pred += static_cast<size_t>(row) * dim;
    target += static_cast<size_t>(row) * dim;
    unsigned start = lane_id() * LANES;

    Raw p_held[KEPT], t_held[KEPT];
#pragma unroll
    for (int j = 0; j < KEPT; ++j) {
        p_held[j] = load_raw<WHOLE>(pred, start + j * STEP, dim);
        t_held[j] = load_raw<WHOLE>(target, start + j * STEP, dim);
    }
    float pp = 0.0f, tt = 0.0f, pt = 0.0f;
    auto add = [&](const Raw& p, const Raw& t) {
#pragma unroll
        for (int i = 0; i < LANES; ++i) {
            pp += value(p, i) * value(p, i);
            tt += value(t, i) * value(t, i);
            pt += value(p, i) * value(t, i);
        }
    };
#pragma unroll
    for (int j = 0; j < KEPT; ++j) add(p_held[j], t_held[j]);
    for (unsigned column = start + KEPT * STEP; column < dim; column += STEP) {
        add(load_raw<WHOLE>(pred, column, dim), load_raw<WHOLE>(target, column, dim));
    }
    float norm_pred = sqrtf(warp_sum(pp));
    float norm_target = fmaxf(sqrtf(warp_sum(tt)), 1e-8f);
    float product = 1.0f / fmaxf(norm_pred, 1e-8f) / norm_target;
    float cosine = warp_sum(pt) * product;
    if (lane_id() == 0) cosines[row] = cosine;

    float toward = factor * product;
    // A norm at its lower bound is a constant.
    float own = norm_pred > 1e-8f ? factor * cosine / norm_pred / norm_pred : 0.0f;
    auto store = [&](unsigned column, const Raw& p, const Raw& t) {
        Vec<act_t> d;
#pragma unroll
        for (int i = 0; i < LANES; ++i) d.v[i] = toward * value(t, i) - own * value(p, i);
        store_row<WHOLE>(d_pred, column, dim, d);
    };
#pragma unroll
    for (int j = 0; j < KEPT; ++j) store(start + j * STEP, p_held[j], t_held[j]);
    for (unsigned column = start + KEPT * STEP; column < dim; column += STEP) {
        store(column, load_raw<WHOLE>(pred, column, dim), load_raw<WHOLE>(target, column, dim));
    }
}

extern "C" __global__ void __launch_bounds__(256)
    cosine_loss(act_t* d_pred, float* cosines, const act_t* pred, const act_t* target, unsigned rows, unsigned dim, float factor) {
    cosine_rows<true>(d_pred, cosines, pred, target, rows, dim, factor);
}

extern "C" __global__ void __launch_bounds__(256)
    cosine_loss_odd(act_t* d_pred, float* cosines, const act_t* pred, const act_t* target, unsigned rows, unsigned dim, float factor) {
    cosine_rows<false>(d_pred, cosines, pred, target, rows, dim, factor);
}

// ------------------------------------------------------------------------------------------------------------ Element by element

/// Vectors that a thread has on their way from memory at once.
static constexpr unsigned AHEAD = 4;

/// `out[i] = f(x[0][i], .., context)` over `len` elements, by a grid of any size. Blocks of the grid take neighbouring vectors, and the last
/// elements, which make no vector, are taken one by one; `context(at)` is asked once for each of either.
///
/// `whole`: all elements of a vector have the same context. `x` may be `out`.
template <int OPERANDS, typename Context, typename F>
__device__ __forceinline__ void each_element(act_t* out, const act_t* const (&x)[OPERANDS], unsigned long long len, bool whole, Context context, F f) {
    whole = whole && aligned_16(out);
#pragma unroll
    for (int n = 0; n < OPERANDS; ++n) whole = whole && aligned_16(x[n]);
    unsigned long long vecs = whole ? len / LANES : 0;
    unsigned long long threads = static_cast<unsigned long long>(gridDim.x) * blockDim.x;
    unsigned long long thread = static_cast<unsigned long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    for (unsigned long long turn = thread; turn < vecs; turn += AHEAD * threads) {
        Raw held[OPERANDS][AHEAD];
#pragma unroll
        for (unsigned k = 0; k < AHEAD; ++k) {
            unsigned long long vec = turn + k * threads;
#pragma unroll
            for (int n = 0; n < OPERANDS; ++n) {
                if (vec < vecs) held[n][k] = load_raw<true>(x[n] + vec * LANES, 0, LANES);
            }
        }
#pragma unroll
        for (unsigned k = 0; k < AHEAD; ++k) {
            unsigned long long vec = turn + k * threads;
            if (vec < vecs) {
                auto shared = context(vec * LANES);
                Vec<act_t> y;
#pragma unroll
                for (int i = 0; i < LANES; ++i) {
                    float operands[OPERANDS];
#pragma unroll
                    for (int n = 0; n < OPERANDS; ++n) operands[n] = value(held[n][k], i);
                    y.v[i] = f(operands, shared);
                }
                store_vec(out + vec * LANES, y);
            }
        }
    }
    for (unsigned long long at = vecs * LANES + thread; at < len; at += threads) {
        float operands[OPERANDS];
#pragma unroll
        for (int n = 0; n < OPERANDS; ++n) operands[n] = to_float(x[n][at]);
        out[at] = to_act(f(operands, context(at)));
    }
}

/// For what is the same everywhere.
struct NoContext {};
__device__ __forceinline__ NoContext no_context(unsigned long long) { return {}; }

/// A factor for each `share` elements.
struct Shares {
    const act_t* scale;
    unsigned long long share;

    __device__ bool whole() const { return share % LANES == 0; }
    __device__ float operator()(unsigned long long at) const { return to_float(scale[at / share]); }
};

#ifdef PCAE_BF16

/// The normal distribution function at `x`, and `exp(-x^2 / 2)`, for results that become bf16.
///
/// `erf` has as many instructions as memory leaves time for. This is Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26, whose
/// exponential the density needs anyway: at most 7.5e-8 off, and below 0 relative to the function itself by 5e-4 at x = -4, where GELU is 1e-4.
struct Normal {
    float distribution, exponential;
};
__device__ __forceinline__ Normal normal(float x) {
    float exponential = exp2f(x * x * -0.72134752044448170f);
    float t = __fdividef(1.0f, 1.0f + 0.23164189f * fabsf(x));
    float tail = t * (0.127414796f + t * (-0.142248368f + t * (0.710706870f + t * (-0.726576013f + t * 0.530702714f)))) * exponential;
    return {x < 0.0f ? tail : 1.0f - tail, exponential};
}
__device__ __forceinline__ float act_gelu(float x) { return x * normal(x).distribution; }
__device__ __forceinline__ float act_gelu_derivative(float x) {
    Normal n = normal(x);
    return n.distribution + x * n.exponential * 0.39894228040143268f;
}

#else

__device__ __forceinline__ float act_gelu(float x) { return gelu(x); }
__device__ __forceinline__ float act_gelu_derivative(float x) { return gelu_derivative(x); }

#endif

/// `x[i] = gelu(x[i])`. Launch: any grid, 256 threads. Bytes: 2 A.
extern "C" __global__ void __launch_bounds__(256) gelu_in_place(act_t* x, unsigned long long len) {
    each_element(x, {x}, len, true, no_context, [](const float(&x)[1], NoContext) { return act_gelu(x[0]); });
}

/// `out[i] = gelu(x[i])`. Launch: any grid, 256 threads. Bytes: 2 A.
extern "C" __global__ void __launch_bounds__(256) gelu_of(act_t* out, const act_t* x, unsigned long long len) {
    each_element(out, {x}, len, true, no_context, [](const float(&x)[1], NoContext) { return act_gelu(x[0]); });
}

/// `out[i] = gelu(x[i])` in e4m3, rounded to activations first; `len` is a multiple of 16. Launch: any grid, 256 threads. Bytes: A + 1.
extern "C" __global__ void __launch_bounds__(256) gelu_to_e4m3(e4m3* out, const act_t* x, unsigned long long len) {
    for_each_word(
        len / LANES, [&](size_t i) { return load_raw<true>(x + i * LANES, 0, LANES); },
        [&](size_t i, const Raw& held) {
            Vec<act_t> y;
#pragma unroll
            for (int j = 0; j < LANES; ++j) y.v[j] = act_gelu(value(held, j));
            store_e4m3(out + i * LANES, y);
        });
}

/// `d[i] *= gelu'(x[i])`, and their sums over rows: the gradient of the bias that was added before GELU. Launch as `column_sums_of`. Bytes: 3 A.
template <bool WHOLE>
__device__ __forceinline__ void gelu_backward_of(float* partial, act_t* d, const act_t* x, unsigned rows, unsigned dim, unsigned rows_per_group) {
    column_sums_of<WHOLE, 2>(partial, d, {d, x}, rows, dim, rows_per_group, [](const float(&x)[2]) { return x[0] * act_gelu_derivative(x[1]); });
}

extern "C" __global__ void __launch_bounds__(256)
    gelu_backward(float* partial, act_t* d, const act_t* x, unsigned rows, unsigned dim, unsigned rows_per_group) {
    gelu_backward_of<true>(partial, d, x, rows, dim, rows_per_group);
}

extern "C" __global__ void __launch_bounds__(256)
    gelu_backward_odd(float* partial, act_t* d, const act_t* x, unsigned rows, unsigned dim, unsigned rows_per_group) {
    gelu_backward_of<false>(partial, d, x, rows, dim, rows_per_group);
}

/// `out[i] = scale[i / share] * x[i]`. Launch: any grid, 256 threads. Bytes: 2 A.
extern "C" __global__ void __launch_bounds__(256)
    scale_rows(act_t* out, const act_t* x, const act_t* scale, unsigned long long len, unsigned long long share) {
    Shares shares = {scale, share};
    each_element(out, {x}, len, shares.whole(), shares, [](const float(&x)[1], float scale) { return scale * x[0]; });
}

/// `out[i] = residual[i] + scale[i / share] * out[i]`. Launch: any grid, 256 threads. Bytes: 3 A.
extern "C" __global__ void __launch_bounds__(256)
    add_scaled_rows(act_t* out, const act_t* residual, const act_t* scale, unsigned long long len, unsigned long long share) {
    Shares shares = {scale, share};
    each_element(out, {residual, out}, len, shares.whole(), shares, [](const float(&x)[2], float scale) { return x[0] + scale * x[1]; });
}
