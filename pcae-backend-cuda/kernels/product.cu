// Matrix products that cuBLASLt does not do: of rows that are aligned to nothing, and a bias that it does not add itself. Neither is fast; layers
// of usual sizes never come here.

#define TILE 64
/// Of the inner dimension, at a time.
#define DEPTH 16
/// Rows and columns of a thread.
#define EACH 4

/// Element [row][column] of a matrix that is stored, or whose transpose is, in rows of `stride` elements; 0 outside of it.
__device__ __forceinline__ float element(const act_t* x, unsigned row, unsigned column, unsigned rows, unsigned columns, unsigned stride, bool transposed) {
    if (row >= rows || column >= columns) return 0.0f;
    return to_float(transposed ? x[static_cast<size_t>(column) * stride + row] : x[static_cast<size_t>(row) * stride + column]);
}

template <typename Out>
__device__ __forceinline__ void product_tile(Out* out, const Out* add, const act_t* bias, const act_t* a, const act_t* b, unsigned m, unsigned n, unsigned k,
                                             unsigned a_row, unsigned b_row, bool a_transposed, bool b_transposed, float (&left)[DEPTH][TILE], float (&right)[DEPTH][TILE]) {
    const unsigned top = blockIdx.x * TILE, first = blockIdx.y * TILE;
    const unsigned row = threadIdx.x / (TILE / EACH) * EACH, column = threadIdx.x % (TILE / EACH) * EACH;
    float sums[EACH][EACH] = {};
    for (unsigned depth = 0; depth < k; depth += DEPTH) {
        // Neighbours take what lies together.
        for (unsigned i = threadIdx.x; i < TILE * DEPTH; i += blockDim.x) {
            unsigned along = a_transposed ? i / TILE : i % DEPTH, across = a_transposed ? i % TILE : i / DEPTH;
            left[along][across] = element(a, top + across, depth + along, m, k, a_row, a_transposed);
            along = b_transposed ? i % DEPTH : i / TILE, across = b_transposed ? i / DEPTH : i % TILE;
            right[along][across] = element(b, depth + along, first + across, k, n, b_row, b_transposed);
        }
        __syncthreads();
#pragma unroll
        for (unsigned p = 0; p < DEPTH; ++p) {
#pragma unroll
            for (unsigned i = 0; i < EACH; ++i) {
#pragma unroll
                for (unsigned j = 0; j < EACH; ++j) sums[i][j] += left[p][row + i] * right[p][column + j];
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (unsigned i = 0; i < EACH; ++i) {
#pragma unroll
        for (unsigned j = 0; j < EACH; ++j) {
            const unsigned y = top + row + i, x = first + column + j;
            if (y >= m || x >= n) continue;
            const size_t at = static_cast<size_t>(y) * n + x;
            float sum = sums[i][j];
            if (add) sum += to_float(add[at]);
            if (bias) sum += to_float(bias[x]);
            out[at] = from_float<Out>(sum);
        }
    }
}

/// `out = op(a) @ op(b) (+ add) (+ bias)`, summed in f32 over the inner dimension in order and rounded once.
///
/// op(a) [m, k], op(b) [k, n], each stored by rows, `a_row` and `b_row` elements apart, or transposed where bit 0 or 1 of `flags` is set; bias [n]; out and add [m, n], which may be the
/// same, in f32 where bit 2 is set. Launch: grid (ceil(m / 64), ceil(n / 64)), 256 threads.
extern "C" __global__ void __launch_bounds__(256) product(void* out, const void* add, const act_t* bias, const act_t* a, const act_t* b, unsigned m, unsigned n,
                                                          unsigned k, unsigned a_row, unsigned b_row, unsigned flags) {
    __shared__ float left[DEPTH][TILE], right[DEPTH][TILE];
    const bool a_transposed = flags & 1, b_transposed = flags & 2;
    if (flags & 4) {
        product_tile(static_cast<float*>(out), static_cast<const float*>(add), bias, a, b, m, n, k, a_row, b_row, a_transposed, b_transposed, left, right);
    } else {
        product_tile(static_cast<act_t*>(out), static_cast<const act_t*>(add), bias, a, b, m, n, k, a_row, b_row, a_transposed, b_transposed, left, right);
    }
}

/// `out[i, j] = bias[j] (+ add[i, j])`.
///
/// bias [dim]; out and add [rows, dim], which may be the same, in f32 where `is_f32`; `add` may be null. Launch: grid (ceil(dim / 256), any number), 256
/// threads, each of which keeps its bias. Bytes: A, with `add` 2 A.
extern "C" __global__ void __launch_bounds__(256) spread_bias(void* out, const void* add, const act_t* bias, unsigned rows, unsigned dim, unsigned is_f32) {
    const unsigned column = blockIdx.x * 256 + threadIdx.x;
    if (column >= dim) return;
    const float shift = to_float(bias[column]);
    for (unsigned row = blockIdx.y; row < rows; row += gridDim.y) {
        const size_t at = static_cast<size_t>(row) * dim + column;
        if (is_f32) {
            static_cast<float*>(out)[at] = add ? static_cast<const float*>(add)[at] + shift : shift;
        } else {
            static_cast<act_t*>(out)[at] = to_act(add ? to_float(static_cast<const act_t*>(add)[at]) + shift : shift);
        }
    }
}

/// Words of a row as long as its rows allow, and zeros up to `row`.
template <typename Word>
__device__ __forceinline__ void widen(act_t* out, const act_t* x, unsigned rows, unsigned dim, unsigned row) {
    constexpr unsigned ELEMENTS = sizeof(Word) / sizeof(act_t), WORDS = 16 / sizeof(Word);
    struct alignas(16) Words {
        Word w[WORDS];
    };
    const unsigned warps = gridDim.x * (blockDim.x / 32);
    for (unsigned i = blockIdx.x * (blockDim.x / 32) + warp_id(); i < rows; i += warps) {
        const Word* const from = reinterpret_cast<const Word*>(x + static_cast<size_t>(i) * dim);
        Words* const to = reinterpret_cast<Words*>(out + static_cast<size_t>(i) * row);
        for (unsigned vector = lane_id(); vector < row / Vec<act_t>::SIZE; vector += 32) {
            Words words;
#pragma unroll
            for (unsigned j = 0; j < WORDS; ++j) {
                const unsigned word = vector * WORDS + j;
                words.w[j] = word * ELEMENTS < dim ? from[word] : Word{};
            }
            to[vector] = words;
        }
    }
}

/// out[i, ..dim] = x[i], zeros behind: rows that begin on multiples of 16 bytes, as tensor cores are fed fastest.
///
/// x [rows, dim]; out [rows, row], `row` a multiple of 16 bytes and at least `dim`. Any grid of 256 threads, a warp for each row. Bytes: 2 A.
extern "C" __global__ void __launch_bounds__(256) widen_rows(act_t* out, const act_t* x, unsigned rows, unsigned dim, unsigned row) {
    if ((reinterpret_cast<size_t>(x) | dim * sizeof(act_t)) % 8 == 0) {
        widen<unsigned long long>(out, x, rows, dim, row);
    } else {
        widen<act_t>(out, x, rows, dim, row);
    }
}
