// Scores of tokens, and the selection of the lowest. Scores are f32 whatever the activations are.

// ------------------------------------------------------------------------------------------------------------- Mean similarity

#define SCORE_BLOCK 512
#define SCORE_WARPS (SCORE_BLOCK / 32)
/// Columns that a warp holds of a row, 32 a lane: a slab.
#define SLAB 1024
/// Least norm of a token (`SCORE_EPS`).
#define SCORE_EPS 1e-12f

/// `N` elements as they lie in memory.
template <unsigned N>
struct alignas(N * sizeof(act_t)) Word {
    act_t x[N];
};

/// This lane's part of a row's sum of squares and of its product with another.
struct Products {
    float squares = 0.0f, product = 0.0f;

    /// Adds what `word` has, whose first element stands in column `column`; `with` may be null.
    template <unsigned N>
    __device__ __forceinline__ void add(const Word<N>& word, const float* with, unsigned column) {
#pragma unroll
        for (unsigned i = 0; i < N; ++i) {
            float x = to_float(word.x[i]);
            squares += x * x;
            if (with) product += x * with[column + i];
        }
    }
};

/// What a lane holds of a row's slab: words of `N` elements, 32 N columns apart.
template <unsigned N>
struct Slab {
    /// Half as many where each is a word by itself, whose places take registers too.
    static constexpr unsigned COLUMNS = N == 1 ? SLAB / 2 : SLAB;
    static constexpr unsigned WORDS = COLUMNS / 32 / N;
    Word<N> words[WORDS];

    static __device__ __forceinline__ unsigned column(unsigned word) { return (word * 32 + lane_id()) * N; }

    /// Columns from `left` on of a row of `dim`; zeros beyond.
    __device__ __forceinline__ void load(const act_t* row, unsigned left, unsigned dim) {
#pragma unroll
        for (unsigned i = 0; i < WORDS; ++i) {
            unsigned at = left + column(i);
            words[i] = at < dim ? *reinterpret_cast<const Word<N>*>(row + at) : Word<N>{};
        }
    }

    __device__ __forceinline__ float get(unsigned i) const { return to_float(words[i / N].x[i % N]); }
};

__device__ __forceinline__ float inverse_norm(float squares) { return 1.0f / fmaxf(sqrtf(squares), SCORE_EPS); }

/// `body(token, slab, squares, product)` for this warp's tokens: their slab of columns from `left` on, the sum of their squares and, where `with`
/// is not null, their product with it. The next token is on its way meanwhile.
template <unsigned N, typename Body>
__device__ __forceinline__ void for_each_token(const act_t* x, unsigned tokens, unsigned dim, unsigned left, const float* with, Body body) {
    Slab<N> next;
    if (warp_id() < tokens) next.load(x + static_cast<size_t>(warp_id()) * dim, left, dim);
    // As often in every warp, so that the compiler knows that no lane is missing where lanes meet.
    for (unsigned first = 0; first < tokens; first += SCORE_WARPS) {
        const unsigned token = first + warp_id();
        const unsigned end = token < tokens ? dim : 0;
        const Slab<N> slab = next;
        const act_t* const row = x + static_cast<size_t>(token) * dim;
        if (token + SCORE_WARPS < tokens) next.load(row + static_cast<size_t>(SCORE_WARPS) * dim, left, dim);
        Products sums;
#pragma unroll
        for (unsigned i = 0; i < Slab<N>::WORDS; ++i) {
            unsigned column = left + Slab<N>::column(i);
            if (column < end) sums.add(slab.words[i], with, column);
        }
        // The other slabs of a row that has more than one.
        for (unsigned column = lane_id() * N; column < end; column += 32 * N) {
            if (column < left || column - left >= Slab<N>::COLUMNS) {
                sums.add(*reinterpret_cast<const Word<N>*>(row + column), with, column);
            } else {
                column = left + Slab<N>::COLUMNS + lane_id() * N - 32 * N;
            }
        }
        const float squares = warp_sum(sums.squares), product = with ? warp_sum(sums.product) : 0.0f;
        if (token < tokens) body(token, slab, squares, product);
    }
}

/// total = sum of the unit-length tokens. `partial` has room for each warp's part of a slab.
template <unsigned N>
__device__ __forceinline__ void sum_units(float* total, const act_t* x, unsigned tokens, unsigned dim, float* partial) {
    // Slab by slab: each warp's in its registers, then those of all warps, in order.
    for (unsigned left = 0; left < dim; left += Slab<N>::COLUMNS) {
        float sums[Slab<N>::COLUMNS / 32];
#pragma unroll
        for (unsigned i = 0; i < Slab<N>::COLUMNS / 32; ++i) sums[i] = 0.0f;
        for_each_token<N>(x, tokens, dim, left, nullptr, [&](unsigned, const Slab<N>& slab, float squares, float) {
            const float inverse = inverse_norm(squares);
#pragma unroll
            for (unsigned i = 0; i < Slab<N>::COLUMNS / 32; ++i) sums[i] += slab.get(i) * inverse;
        });
        const unsigned width = min(Slab<N>::COLUMNS, dim - left);
        __syncthreads();  // the sums of the slab before have been read
#pragma unroll
        for (unsigned word = 0; word < Slab<N>::WORDS; ++word) {
            unsigned column = Slab<N>::column(word);
#pragma unroll
            for (unsigned i = 0; i < N; ++i) {
                if (column < width) partial[warp_id() * width + column + i] = sums[word * N + i];
            }
        }
        __syncthreads();
        for (unsigned column = threadIdx.x; column < width; column += SCORE_BLOCK) {
            float sum = 0.0f;
#pragma unroll
            for (unsigned warp = 0; warp < SCORE_WARPS; ++warp) sum += partial[warp * width + column];
            total[left + column] = sum;
        }
    }
    __syncthreads();
}

/// scores[j] = x_j / |x_j| . total / all
template <unsigned N>
__device__ __forceinline__ void score_tokens(float* scores, const act_t* x, unsigned tokens, unsigned dim, const float* total, unsigned all) {
    for_each_token<N>(x, tokens, dim, 0, total, [&](unsigned token, const Slab<N>&, float squares, float product) {
        if (lane_id() == 0) scores[token] = product * inverse_norm(squares) / static_cast<float>(all);
    });
}

/// Whether rows are whole words of 16 bytes.
__device__ __forceinline__ bool has_vectors(const act_t* x, unsigned dim) { return dim % Vec<act_t>::SIZE == 0 && aligned_16(x); }

/// Redundancy of each patch token: with u_j = x_j / max(|x_j|, SCORE_EPS), scores[b, j] = u_j . (sum over i of u_i) / tokens.
///
/// Grid: a block for each sequence, with (dim + SCORE_WARPS * min(dim, SLAB)) * 4 bytes of dynamic shared memory. x [B, prefix + tokens, dim], scores [B, tokens].
/// Reads x from memory once and from the level-2 cache once more, and again for each slab of columns beyond the first.
extern "C" __global__ void __launch_bounds__(SCORE_BLOCK)
    mean_similarity(float* scores, const act_t* x, unsigned prefix, unsigned tokens, unsigned dim) {
    // The sum of the tokens, and each warp's part of a slab of it.
    DYNAMIC_SHARED(float, total);
    x += (static_cast<size_t>(blockIdx.x) * (prefix + tokens) + prefix) * dim;
    scores += static_cast<size_t>(blockIdx.x) * tokens;
    if (has_vectors(x, dim)) {
        sum_units<Vec<act_t>::SIZE>(total, x, tokens, dim, total + dim);
        score_tokens<Vec<act_t>::SIZE>(scores, x, tokens, dim, total, tokens);
    } else {
        sum_units<1>(total, x, tokens, dim, total + dim);
        score_tokens<1>(scores, x, tokens, dim, total, tokens);
    }
}

/// The first half of `mean_similarity` where there are fewer sequences than multiprocessors: sums[b, part] = sum of the part's unit-length tokens.
///
/// Grid: sequences, parts of `each` tokens (the last may have fewer, not none), with SCORE_WARPS * min(dim, SLAB) * 4 bytes of dynamic shared memory.
/// sums [B, parts, dim].
extern "C" __global__ void __launch_bounds__(SCORE_BLOCK)
    similarity_sums(float* sums, const act_t* x, unsigned prefix, unsigned tokens, unsigned dim, unsigned each) {
    DYNAMIC_SHARED(float, partial);
    const unsigned first = blockIdx.y * each;
    x += (static_cast<size_t>(blockIdx.x) * (prefix + tokens) + prefix + first) * dim;
    sums += (static_cast<size_t>(blockIdx.x) * gridDim.y + blockIdx.y) * dim;
    const unsigned count = min(each, tokens - first);
    if (has_vectors(x, dim)) {
        sum_units<Vec<act_t>::SIZE>(sums, x, count, dim, partial);
    } else {
        sum_units<1>(sums, x, count, dim, partial);
    }
}

/// The second half: the scores of each part's tokens. Every block adds all parts, in order, so that equal tokens have equal scores in whichever part.
///
/// Grid as of `similarity_sums`, with dim * 4 bytes of dynamic shared memory.
extern "C" __global__ void __launch_bounds__(SCORE_BLOCK)
    similarity_scores(float* scores, const float* sums, const act_t* x, unsigned prefix, unsigned tokens, unsigned dim, unsigned each) {
    DYNAMIC_SHARED(float, total);
    const unsigned first = blockIdx.y * each;
    x += (static_cast<size_t>(blockIdx.x) * (prefix + tokens) + prefix + first) * dim;
    scores += static_cast<size_t>(blockIdx.x) * tokens + first;
    sums += static_cast<size_t>(blockIdx.x) * gridDim.y * dim;
    for (unsigned column = threadIdx.x; column < dim; column += SCORE_BLOCK) {
        float sum = 0.0f;
#pragma unroll 4
        for (unsigned part = 0; part < gridDim.y; ++part) sum += sums[static_cast<size_t>(part) * dim + column];
        total[column] = sum;
    }
    __syncthreads();
    const unsigned count = min(each, tokens - first);
    if (has_vectors(x, dim)) {
        score_tokens<Vec<act_t>::SIZE>(scores, x, count, dim, total, tokens);
    } else {
        score_tokens<1>(scores, x, count, dim, total, tokens);
    }
}

// ------------------------------------------------------------------------------------------------------------------- Selection

/// An integer that has the order of the scores: zeros of both signs are equal, a NaN is greater than all numbers.
__device__ __forceinline__ unsigned order_key(float score) {
    if (score != score) return 0xfffffffeu;
    unsigned bits = score == 0.0f ? 0 : __float_as_uint(score);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

#define RANK_BLOCK 256

/// The `keep` tokens of each sequence with the lowest scores, in ascending order, the lower index first where scores are equal: each token counts
/// those that come before it, and so knows its place. For some thousand comparisons a token; a sort is faster for more.
///
/// Grid: sequences, blocks that have a thread for each token. scores [B, tokens], picked [B, keep], keep <= tokens. A NaN is reported.
extern "C" __global__ void __launch_bounds__(RANK_BLOCK)
    select_by_rank(unsigned* picked, const float* scores, unsigned tokens, unsigned keep, unsigned* fault, unsigned code) {
    __shared__ uint4 tile[RANK_BLOCK / 4];
    unsigned* const keys = reinterpret_cast<unsigned*>(tile);
    scores += static_cast<size_t>(blockIdx.x) * tokens;
    picked += static_cast<size_t>(blockIdx.x) * keep;
    const unsigned token = blockIdx.y * RANK_BLOCK + threadIdx.x;
    const float score = token < tokens ? scores[token] : 0.0f;
    if (score != score) report(fault, code, blockIdx.x * tokens + token);
    const unsigned key = order_key(score);
    unsigned rank = 0;
    for (unsigned first = 0; first < tokens; first += RANK_BLOCK) {
        __syncthreads();  // the tile before has been read
        keys[threadIdx.x] = first + threadIdx.x < tokens ? order_key(scores[first + threadIdx.x]) : 0xffffffffu;
        __syncthreads();
        const unsigned end = min(RANK_BLOCK, tokens - first);
        for (unsigned i = 0; i < end; i += 4) {
            const uint4 four = tile[i / 4];
            // Of equal keys those at a lower index come first.
            rank += four.x < key + (first + i < token);
            rank += four.y < key + (first + i + 1 < token);
            rank += four.z < key + (first + i + 2 < token);
            rank += four.w < key + (first + i + 3 < token);
        }
    }
    if (token < tokens && rank < keep) picked[rank] = token;
}

#define SORT_BLOCK 1024

/// As `select_by_rank`, by a bitonic sort (Batcher, 1968) of pairs of key and index.
///
/// Grid: a block for each sequence, with 8 * `padded` bytes of dynamic shared memory, `padded` the next power of 2 (at least 2) from `tokens` on.
extern "C" __global__ void __launch_bounds__(SORT_BLOCK)
    select_by_sort(unsigned* picked, const float* scores, unsigned tokens, unsigned keep, unsigned padded, unsigned* fault, unsigned code) {
    DYNAMIC_SHARED(unsigned long long, pairs);
    scores += static_cast<size_t>(blockIdx.x) * tokens;
    for (unsigned token = threadIdx.x; token < padded; token += SORT_BLOCK) {
        unsigned key = 0xffffffffu;
        if (token < tokens) {
            float score = scores[token];
            if (score != score) report(fault, code, blockIdx.x * tokens + token);
            key = order_key(score);
        }
        pairs[token] = static_cast<unsigned long long>(key) << 32 | token;
    }
    __syncthreads();
    for (unsigned size = 2; size <= padded; size *= 2) {
        for (unsigned stride = size / 2; stride > 0; stride /= 2) {
            for (unsigned i = threadIdx.x; i < padded / 2; i += SORT_BLOCK) {
                unsigned low = 2 * i - (i & (stride - 1)), high = low + stride;
                unsigned long long a = pairs[low], b = pairs[high];
                if ((a > b) == ((low & size) == 0)) {
                    pairs[low] = b;
                    pairs[high] = a;
                }
            }
            __syncthreads();
        }
    }
    for (unsigned i = threadIdx.x; i < keep; i += SORT_BLOCK) picked[static_cast<size_t>(blockIdx.x) * keep + i] = static_cast<unsigned>(pairs[i]);
}

// ------------------------------------------------------------------------------------------------------- QR with column pivoting

#define QR_BLOCK 512
#define QR_WARPS (QR_BLOCK / 32)

__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(FULL_WARP, x, step);
    return x;
}

/// The undecided token with the largest residual, of equal ones the lower index, in every thread. Two barriers.
///
/// A square that is no negative number has the order of its bits; those of decided tokens are negative.
__device__ __forceinline__ unsigned largest_residual(const long long* squares, unsigned tokens, long long* warp_best, unsigned* warp_token) {
    long long best = -1;
    unsigned token = 0;
    for (unsigned i = threadIdx.x; i < tokens; i += QR_BLOCK) {
        if (squares[i] > best) {
            best = squares[i];
            token = i;
        }
    }
    for (int step = 16; step > 0; step /= 2) {
        long long other = __shfl_xor_sync(FULL_WARP, best, step);
        unsigned other_token = __shfl_xor_sync(FULL_WARP, token, step);
        if (other > best || (other == best && other_token < token)) {
            best = other;
            token = other_token;
        }
    }
    if (lane_id() == 0) {
        warp_best[warp_id()] = best;
        warp_token[warp_id()] = token;
    }
    __syncthreads();
    best = warp_best[0];
    token = warp_token[0];
    for (unsigned warp = 1; warp < QR_WARPS; ++warp) {
        if (warp_best[warp] > best || (warp_best[warp] == best && warp_token[warp] < token)) {
            best = warp_best[warp];
            token = warp_token[warp];
        }
    }
    __syncthreads();
    return token;
}

/// Order of the tokens in a QR decomposition with column pivoting: the token with the largest residual gets the next score and its direction is
/// removed from the others (modified Gram-Schmidt), in f64, since residuals of similar tokens are small differences.
///
/// Grid: a block for each sequence, with (dim + tokens) * 8 bytes of dynamic shared memory. x [B, prefix + tokens, dim], scores [B, tokens],
/// residuals [B, tokens, dim] for work. Reads and writes the residuals of all undecided tokens for each token. A NaN in x is reported.
extern "C" __global__ void __launch_bounds__(QR_BLOCK) pivoted_qr_scores(float* scores, double* residuals, const act_t* x, unsigned prefix, unsigned tokens,
                                                                       unsigned dim, unsigned* fault, unsigned code) {
    DYNAMIC_SHARED(double, direction);
    long long* const squares = reinterpret_cast<long long*>(direction + dim);
    __shared__ long long warp_best[QR_WARPS];
    __shared__ unsigned warp_token[QR_WARPS];
    const act_t* const sequence = x + static_cast<size_t>(blockIdx.x) * (prefix + tokens) * dim;
    residuals += static_cast<size_t>(blockIdx.x) * tokens * dim;
    scores += static_cast<size_t>(blockIdx.x) * tokens;
    for (unsigned token = warp_id(); token < prefix + tokens; token += QR_WARPS) {
        double square = 0.0;
        for (unsigned i = lane_id(); i < dim; i += 32) {
            float value = to_float(sequence[static_cast<size_t>(token) * dim + i]);
            if (value != value) report(fault, code, (blockIdx.x * (prefix + tokens) + token) * dim + i);
            if (token >= prefix) residuals[static_cast<size_t>(token - prefix) * dim + i] = value;
            square += static_cast<double>(value) * value;
        }
        square = warp_sum(square);
        if (token >= prefix && lane_id() == 0) squares[token - prefix] = __double_as_longlong(square);
    }
    __syncthreads();
    for (unsigned rank = 0; rank < tokens; ++rank) {
        const unsigned pivot = largest_residual(squares, tokens, warp_best, warp_token);
        const double length = __longlong_as_double(squares[pivot]);
        for (unsigned i = threadIdx.x; i < dim; i += QR_BLOCK) direction[i] = residuals[static_cast<size_t>(pivot) * dim + i];
        __syncthreads();  // all have read the pivot's square
        if (threadIdx.x == 0) {
            scores[pivot] = static_cast<float>(rank);
            squares[pivot] = -1;
        }
        __syncthreads();
        for (unsigned token = warp_id(); length != 0.0 && token < tokens; token += QR_WARPS) {
            if (squares[token] < 0) continue;
            double* const residual = residuals + static_cast<size_t>(token) * dim;
            double along = 0.0;
            for (unsigned i = lane_id(); i < dim; i += 32) along += residual[i] * direction[i];
            along = warp_sum(along) / length;
            double square = 0.0;
            for (unsigned i = lane_id(); i < dim; i += 32) {
                double rest = residual[i] - along * direction[i];
                residual[i] = rest;
                square += rest * rest;
            }
            square = warp_sum(square);
            if (lane_id() == 0) squares[token] = __double_as_longlong(square);
        }
        __syncthreads();
    }
}
