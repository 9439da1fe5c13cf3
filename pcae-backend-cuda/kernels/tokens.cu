// Tokens: embedded, gathered, pooled, and their backwards. A token is a row of `dim` elements.
//
// All kernels but those that sum are copies with a rule: any grid of blocks of 256 threads, each word of the output once. A word is 16 bytes where
// pointers and `dim` allow, an element otherwise. Tensors have fewer than 2^32 elements.

#define BLOCK 256
/// Warps of a block that sums rows, each every eighth row.
#define WARPS (BLOCK / 32)

/// Whether rows of `dim` elements can be read and written 16 bytes at a time.
__device__ __forceinline__ bool in_vectors(const act_t* a, const act_t* b, unsigned dim) { return aligned_16(a) && aligned_16(b) && dim % Vec<act_t>::SIZE == 0; }

template <unsigned N>
__device__ __forceinline__ Floats<N> zeros() {
    Floats<N> x;
#pragma unroll
    for (unsigned i = 0; i < N; ++i) x.v[i] = 0.0f;
    return x;
}

template <unsigned N>
__device__ __forceinline__ Floats<N> sum(const Floats<N>& a, const Floats<N>& b) {
    Floats<N> x;
#pragma unroll
    for (unsigned i = 0; i < N; ++i) x.v[i] = a.v[i] + b.v[i];
    return x;
}

/// `value(sequence, token, column)` for every word of out [batch, tokens, dim], `N` elements from `column` on.
template <unsigned N, typename Value>
__device__ __forceinline__ void fill_tokens(act_t* out, unsigned batch, unsigned tokens, unsigned dim, Value value) {
    const unsigned words = dim / N;
    auto load = [&](size_t at) {
        unsigned word = static_cast<unsigned>(at), row = word / words, sequence = row / tokens;
        return value(sequence, row - sequence * tokens, (word - row * words) * N);
    };
    for_each_word(static_cast<size_t>(batch) * tokens * words, load, [&](size_t at, const Floats<N>& x) { store_floats(out + at * N, x); });
}

/// `N` elements of a row of a matrix of rows of `dim`.
template <unsigned N>
__device__ __forceinline__ Floats<N> row_of(const act_t* x, size_t row, unsigned dim, unsigned column) {
    return load_floats<N>(x + row * dim + column);
}

/// A token with its position; an id that has none is reported.
template <unsigned N>
__device__ __forceinline__ Floats<N> with_position(const Floats<N>& token, const float* pos, unsigned id, unsigned positions, unsigned dim, unsigned column,
                                                   unsigned* fault, unsigned code) {
    if (id >= positions) {
        report(fault, code, id);
        return zeros<N>();
    }
    return sum(token, load_params<N>(pos + (static_cast<size_t>(id) + 1) * dim + column));
}

template <unsigned N>
__device__ __forceinline__ void embed(act_t* out, const act_t* x, const unsigned* ids, const float* cls_token, const float* pos, unsigned batch,
                                      unsigned tokens, unsigned dim, unsigned positions, unsigned* fault, unsigned code) {
    const unsigned prefix = cls_token ? 1 : 0;
    fill_tokens<N>(out, batch, prefix + tokens, dim, [&](unsigned b, unsigned token, unsigned column) {
        if (token < prefix) return sum(load_params<N>(cls_token + column), load_params<N>(pos + column));
        size_t patch = static_cast<size_t>(b) * tokens + token - prefix;
        unsigned id = ids ? ids[patch] : token - prefix;
        return with_position(row_of<N>(x, patch, dim, column), pos, id, positions, dim, column, fault, code);
    });
}

/// out[b, 0] = cls_token + pos[0] where that is not null, out[b, prefix + j] = x[b, j] + pos[1 + ids[b, j]], or pos[1 + j] without ids.
///
/// out [batch, prefix + tokens, dim], x [batch, tokens, dim], cls_token [dim] and pos [1 + positions, dim] in f32 at any address.
/// Reads x and the positions of its tokens (from cache: a picture's are the next one's), writes out.
extern "C" __global__ void __launch_bounds__(BLOCK, 4) embed_tokens(act_t* out, const act_t* x, const unsigned* ids, const float* cls_token, const float* pos,
                                                               unsigned batch, unsigned tokens, unsigned dim, unsigned positions, unsigned* fault,
                                                               unsigned code) {
    if (in_vectors(out, x, dim)) {
        embed<Vec<act_t>::SIZE>(out, x, ids, cls_token, pos, batch, tokens, dim, positions, fault, code);
    } else {
        embed<1>(out, x, ids, cls_token, pos, batch, tokens, dim, positions, fault, code);
    }
}

template <unsigned N>
__device__ __forceinline__ void decoder(act_t* out, const act_t* x, const unsigned* ids_visible, const unsigned* ids_target, const float* mask_token,
                                        const float* pos, unsigned batch, unsigned visible, unsigned targets, unsigned dim, unsigned positions,
                                        unsigned* fault, unsigned visible_code, unsigned target_code) {
    const unsigned latent = 1 + visible;
    fill_tokens<N>(out, batch, latent + targets, dim, [&](unsigned b, unsigned token, unsigned column) {
        if (token >= latent) {
            unsigned id = ids_target[static_cast<size_t>(b) * targets + token - latent];
            return with_position(load_params<N>(mask_token + column), pos, id, positions, dim, column, fault, target_code);
        }
        Floats<N> value = row_of<N>(x, static_cast<size_t>(b) * latent + token, dim, column);
        if (token == 0) return sum(value, load_params<N>(pos + column));
        unsigned id = ids_visible[static_cast<size_t>(b) * visible + token - 1];
        return with_position(value, pos, id, positions, dim, column, fault, visible_code);
    });
}

/// The decoder's sequence: out[b, 0] = x[b, 0] + pos[0], out[b, 1 + j] = x[b, 1 + j] + pos[1 + ids_visible[b, j]],
/// out[b, 1 + visible + j] = mask_token + pos[1 + ids_target[b, j]].
///
/// out [batch, 1 + visible + targets, dim], x [batch, 1 + visible, dim], otherwise as `embed_tokens`. Reads x, writes out.
extern "C" __global__ void __launch_bounds__(BLOCK, 4)
    decoder_tokens(act_t* out, const act_t* x, const unsigned* ids_visible, const unsigned* ids_target, const float* mask_token, const float* pos,
                   unsigned batch, unsigned visible, unsigned targets, unsigned dim, unsigned positions, unsigned* fault, unsigned visible_code,
                   unsigned target_code) {
    if (in_vectors(out, x, dim)) {
        decoder<Vec<act_t>::SIZE>(out, x, ids_visible, ids_target, mask_token, pos, batch, visible, targets, dim, positions, fault, visible_code,
                                  target_code);
    } else {
        decoder<1>(out, x, ids_visible, ids_target, mask_token, pos, batch, visible, targets, dim, positions, fault, visible_code, target_code);
    }
}

template <unsigned N>
__device__ __forceinline__ void shift(act_t* out, const act_t* x, unsigned batch, unsigned out_tokens, unsigned x_tokens, unsigned skip, unsigned pad,
                                      unsigned dim) {
    fill_tokens<N>(out, batch, out_tokens, dim, [&](unsigned b, unsigned token, unsigned column) {
        return token < pad ? zeros<N>() : row_of<N>(x, static_cast<size_t>(b) * x_tokens + skip + token - pad, dim, column);
    });
}

/// A piece of each sequence: out[b, j] = x[b, skip + j - pad], zero where j < pad. Leaves a prefix out (skip) or puts zeros in its place (pad).
///
/// out [batch, out_tokens, dim], x [batch, x_tokens, dim], out_tokens - pad <= x_tokens - skip. Reads what it writes.
extern "C" __global__ void __launch_bounds__(BLOCK, 4)
    shift_tokens(act_t* out, const act_t* x, unsigned batch, unsigned out_tokens, unsigned x_tokens, unsigned skip, unsigned pad, unsigned dim) {
    if (in_vectors(out, x, dim)) {
        shift<Vec<act_t>::SIZE>(out, x, batch, out_tokens, x_tokens, skip, pad, dim);
    } else {
        shift<1>(out, x, batch, out_tokens, x_tokens, skip, pad, dim);
    }
}

template <unsigned N>
__device__ __forceinline__ void gather(act_t* out, const act_t* x, const unsigned* picked, unsigned batch, unsigned prefix, unsigned tokens, unsigned keep,
                                       unsigned dim, unsigned* fault, unsigned code) {
    fill_tokens<N>(out, batch, prefix + keep, dim, [&](unsigned b, unsigned token, unsigned column) {
        if (token >= prefix) {
            unsigned id = picked[static_cast<size_t>(b) * keep + token - prefix];
            if (id >= tokens) {
                report(fault, code, id);
                return zeros<N>();
            }
            token = prefix + id;
        }
        return row_of<N>(x, static_cast<size_t>(b) * (prefix + tokens) + token, dim, column);
    });
}

/// Keeps the prefix and the picked tokens: out[b, j] = x[b, j] for j < prefix, out[b, prefix + j] = x[b, prefix + picked[b, j]].
///
/// out [batch, prefix + keep, dim], x [batch, prefix + tokens, dim], picked [batch, keep]. Reads what it writes. An index out of range is reported,
/// and its token is zero.
extern "C" __global__ void __launch_bounds__(BLOCK, 4) gather_tokens(act_t* out, const act_t* x, const unsigned* picked, unsigned batch, unsigned prefix,
                                                                unsigned tokens, unsigned keep, unsigned dim, unsigned* fault, unsigned code) {
    if (in_vectors(out, x, dim)) {
        gather<Vec<act_t>::SIZE>(out, x, picked, batch, prefix, tokens, keep, dim, fault, code);
    } else {
        gather<1>(out, x, picked, batch, prefix, tokens, keep, dim, fault, code);
    }
}

/// Copies a row, or zeros where `x` is null, by one warp.
template <unsigned N>
__device__ __forceinline__ void copy_row(act_t* out, const act_t* x, unsigned dim) {
#pragma unroll 4
    for (unsigned column = lane_id() * N; column < dim; column += 32 * N) store_floats(out + column, x ? load_floats<N>(x + column) : zeros<N>());
}

/// Backward of `gather_tokens`: d_x[b, prefix + picked[b, j]] = d_out[b, prefix + j], the prefix as it is, and zeros for what was dropped.
///
/// Grid: a warp for each row of d_x [batch, prefix + tokens, dim], `WARPS` of them a block. It looks for its token among the picked ones, so that each
/// element is written once: reads d_out and, for each row, the picked indices (from cache), writes d_x. An index out of range is reported.
extern "C" __global__ void __launch_bounds__(BLOCK, 4)
    gather_tokens_backward(act_t* d_x, const act_t* d_out, const unsigned* picked, unsigned batch, unsigned prefix, unsigned tokens, unsigned keep,
                           unsigned dim, unsigned* fault, unsigned code) {
    const unsigned row = blockIdx.x * WARPS + warp_id(), b = row / (prefix + tokens), token = row - b * (prefix + tokens);
    if (b >= batch) return;
    const unsigned* const ids = picked + static_cast<size_t>(b) * keep;
    // Where the row is in d_out's sequence; that of a dropped one is after its end.
    unsigned place = token < prefix ? token : prefix + keep;
    for (unsigned first = 0; first < keep; first += 32) {
        unsigned at = first + lane_id();
        unsigned id = at < keep ? ids[at] : 0;
        if (token == 0 && at < keep && id >= tokens) report(fault, code, id);
        unsigned found = __ballot_sync(FULL_WARP, token >= prefix && at < keep && id == token - prefix);
        if (found != 0) {
            place = prefix + first + __ffs(found) - 1;
            if (token != 0) break;
        }
    }
    const act_t* const x = place < prefix + keep ? d_out + (static_cast<size_t>(b) * (prefix + keep) + place) * dim : nullptr;
    act_t* const out = d_x + static_cast<size_t>(row) * dim;
    if (in_vectors(d_x, d_out, dim)) {
        copy_row<Vec<act_t>::SIZE>(out, x, dim);
    } else {
        copy_row<1>(out, x, dim);
    }
}

/// Positions followed through a selection: out[b, j] = ids[b, picked[b, j]], or picked[b, j] where ids is null.
///
/// A thread for each of `count` = batch * keep. An index out of range is reported.
extern "C" __global__ void __launch_bounds__(BLOCK, 4)
    gather_ids(unsigned* out, const unsigned* ids, const unsigned* picked, unsigned count, unsigned tokens, unsigned keep, unsigned* fault, unsigned code) {
    const unsigned at = blockIdx.x * BLOCK + threadIdx.x;
    if (at >= count) return;
    unsigned id = picked[at];
    if (id >= tokens) {
        report(fault, code, id);
        id = 0;
    } else if (ids) {
        id = ids[static_cast<size_t>(at / keep) * tokens + id];
    }
    out[at] = id;
}

template <unsigned N>
__device__ __forceinline__ void spread(act_t* d_x, const act_t* d_out, unsigned batch, unsigned prefix, unsigned tokens, unsigned dim) {
    fill_tokens<N>(d_x, batch, prefix + tokens, dim, [&](unsigned b, unsigned token, unsigned column) {
        if (token < prefix) return zeros<N>();
        Floats<N> x = row_of<N>(d_out, b, dim, column);
#pragma unroll
        for (unsigned i = 0; i < N; ++i) x.v[i] /= static_cast<float>(tokens);
        return x;
    });
}

/// Backward of `mean_pool`: d_x[b, prefix + j] = d_out[b] / tokens, zeros at the prefix.
///
/// d_x [batch, prefix + tokens, dim], d_out [batch, dim]. Writes d_x.
extern "C" __global__ void __launch_bounds__(BLOCK, 4)
    mean_pool_backward(act_t* d_x, const act_t* d_out, unsigned batch, unsigned prefix, unsigned tokens, unsigned dim) {
    if (in_vectors(d_x, d_out, dim)) {
        spread<Vec<act_t>::SIZE>(d_x, d_out, batch, prefix, tokens, dim);
    } else {
        spread<1>(d_x, d_out, batch, prefix, tokens, dim);
    }
}

/// Sums `count` rows of x, the `i`-th being row `row(i)`, column by column, and gives `store` each column (the first of `N`) with its sums.
///
/// The blocks blockIdx.y share the columns, 32 N at a time. A warp adds every eighth row, then the first adds what the eight have.
template <unsigned N, typename Row, typename Store>
__device__ __forceinline__ void sum_rows(const act_t* x, unsigned dim, unsigned count, Row row, Store store) {
    __shared__ float partial[WARPS][N][32];
    for (unsigned left = blockIdx.y * 32 * N; left < dim; left += gridDim.y * 32 * N) {
        const unsigned column = left + lane_id() * N;
        Floats<N> total = zeros<N>();
        if (column < dim) {
#pragma unroll 4
            for (unsigned i = warp_id(); i < count; i += WARPS) total = sum(total, row_of<N>(x, row(i), dim, column));
        }
        __syncthreads();  // the first warp has read the sums of the columns before
#pragma unroll
        for (unsigned i = 0; i < N; ++i) partial[warp_id()][i][lane_id()] = total.v[i];
        __syncthreads();
        if (warp_id() == 0 && column < dim) {
            for (unsigned warp = 1; warp < WARPS; ++warp) {
#pragma unroll
                for (unsigned i = 0; i < N; ++i) total.v[i] += partial[warp][i][lane_id()];
            }
            store(column, total);
        }
    }
}

template <unsigned N>
__device__ __forceinline__ void pool(act_t* out, const act_t* x, unsigned prefix, unsigned tokens, unsigned dim) {
    const size_t first = static_cast<size_t>(blockIdx.x) * (prefix + tokens) + prefix;
    act_t* const pooled = out + static_cast<size_t>(blockIdx.x) * dim;
    auto store = [&](unsigned column, Floats<N> total) {
#pragma unroll
        for (unsigned i = 0; i < N; ++i) total.v[i] /= static_cast<float>(tokens);
        store_floats(pooled + column, total);
    };
    sum_rows<N>(x, dim, tokens, [&](unsigned i) { return first + i; }, store);
}

/// Mean of each sequence's patch tokens: out[b] = sum over j of x[b, prefix + j] / tokens.
///
/// Grid: sequences, any number of blocks for the columns. out [batch, dim], x [batch, prefix + tokens, dim]. Reads x once.
extern "C" __global__ void __launch_bounds__(BLOCK, 4) mean_pool(act_t* out, const act_t* x, unsigned prefix, unsigned tokens, unsigned dim) {
    if (in_vectors(out, x, dim)) {
        pool<Vec<act_t>::SIZE>(out, x, prefix, tokens, dim);
    } else {
        pool<1>(out, x, prefix, tokens, dim);
    }
}

template <unsigned N>
__device__ __forceinline__ void partial_sums(float* parts, const act_t* x, unsigned rows, unsigned rows_per_part, unsigned count, unsigned first,
                                             unsigned tokens, unsigned dim) {
    const unsigned begin = blockIdx.x * rows_per_part;
    auto row = [&](unsigned i) {
        unsigned sequence = (begin + i) / count;
        return static_cast<size_t>(sequence) * tokens + first + (begin + i - sequence * count);
    };
    float* const part = parts + static_cast<size_t>(blockIdx.x) * dim;
    auto store = [&](unsigned column, const Floats<N>& total) {
#pragma unroll
        for (unsigned i = 0; i < N; ++i) part[column + i] = total.v[i];
    };
    sum_rows<N>(x, dim, min(rows_per_part, rows - begin), row, store);
}

/// First half of a sum over all sequences of their tokens `first..first + count`: parts[p] = sum of `rows_per_part` of these `rows` = batch * count
/// tokens, in their order. `add_column_sums` in rows.cu is the second.
///
/// Grid: parts, any number of blocks for the columns. x [batch, tokens, dim], parts [parts, dim]. Reads the tokens once.
extern "C" __global__ void __launch_bounds__(BLOCK, 4)
    sum_tokens(float* parts, const act_t* x, unsigned rows, unsigned rows_per_part, unsigned count, unsigned first, unsigned tokens, unsigned dim) {
    if (in_vectors(x, x, dim)) {
        partial_sums<Vec<act_t>::SIZE>(parts, x, rows, rows_per_part, count, first, tokens, dim);
    } else {
        partial_sums<1>(parts, x, rows, rows_per_part, count, first, tokens, dim);
    }
}
