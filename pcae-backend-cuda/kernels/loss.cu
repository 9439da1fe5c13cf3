// Losses other than the cosine's (rows.cu), the spread of targets, and how sums become one number.
//
// "Bytes" counts what each element of a matrix costs at the memory bus, with A the size of an activation.

static constexpr unsigned LANES = Vec<act_t>::SIZE;

/// A sum over the block in f64, the same bits in every thread.
__device__ __forceinline__ double block_sum_f64(double x) {
    __shared__ double partial[32];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(FULL_WARP, x, step);
    __syncthreads();  // the results of a call before this one have been read
    if (lane_id() == 0) partial[warp_id()] = x;
    __syncthreads();
    x = lane_id() < blockDim.x / 32 ? partial[lane_id()] : 0.0;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(FULL_WARP, x, step);
    return x;
}

/// `out = keep * out + offset + factor * sum of values`, or the root of that where `root` is set.
///
/// values [count]; `out` one element, which is not read where `keep` is 0. Launch: one block of 1024 threads. Bytes: 4 a value.
extern "C" __global__ void __launch_bounds__(1024)
    finish_sum(float* out, const float* values, unsigned count, float keep, double offset, double factor, unsigned root) {
    double sum = 0.0;
    for (unsigned at = threadIdx.x; at < count; at += blockDim.x) sum += values[at];
    sum = block_sum_f64(sum);
    if (threadIdx.x > 0) return;
    double result = offset + factor * sum;
    if (keep != 0.0f) result += static_cast<double>(keep) * *out;
    *out = static_cast<float>(root ? sqrt(result) : result);
}

/// `d_pred[i] = factor * (pred[i] - target[i])`, and of each block's elements `squares[block] = sum of (pred - target)^2`.
///
/// pred, target, d_pred [len]; squares [gridDim.x]. Launch: any grid, 256 threads. Bytes: 3 A.
extern "C" __global__ void __launch_bounds__(256)
    mse_loss(act_t* d_pred, float* squares, const act_t* pred, const act_t* target, unsigned long long len, float factor) {
    bool whole = aligned_16(d_pred) && aligned_16(pred) && aligned_16(target);
    unsigned long long vecs = whole ? len / LANES : 0;
    unsigned long long threads = static_cast<unsigned long long>(gridDim.x) * blockDim.x;
    unsigned long long thread = static_cast<unsigned long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    float sum = 0.0f;
#pragma unroll 2
    for (unsigned long long vec = thread; vec < vecs; vec += threads) {
        Vec<act_t> p = load_vec(pred + vec * LANES), t = load_vec(target + vec * LANES), d;
#pragma unroll
        for (unsigned i = 0; i < LANES; ++i) {
            float difference = p.v[i] - t.v[i];
            sum += difference * difference;
            d.v[i] = factor * difference;
        }
        store_vec(d_pred + vec * LANES, d);
    }
    for (unsigned long long at = vecs * LANES + thread; at < len; at += threads) {
        float difference = to_float(pred[at]) - to_float(target[at]);
        sum += difference * difference;
        d_pred[at] = to_act(factor * difference);
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) squares[blockIdx.x] = sum;
}

/// `losses[i] = sum of target * (log(sum of exp(logits)) - logits)`, and `d_logits = factor * (softmax(logits) * sum of target - target)`.
///
/// logits, target, d_logits [rows, dim]; losses [rows]. Launch: a block of up to 256 threads, whole warps, for each row. Bytes: 3 A; each row is read
/// three times, and comes from a cache after the first.
extern "C" __global__ void __launch_bounds__(256)
    cross_entropy(act_t* d_logits, float* losses, const act_t* logits, const act_t* target, unsigned dim, float factor) {
    size_t start = static_cast<size_t>(blockIdx.x) * dim;
    d_logits += start, logits += start, target += start;
    bool whole = dim % LANES == 0 && aligned_16(d_logits) && aligned_16(logits) && aligned_16(target);
    unsigned vecs = whole ? dim / LANES : 0;

    float max = __uint_as_float(0xff800000u);
    for (unsigned vec = threadIdx.x; vec < vecs; vec += blockDim.x) {
        Vec<act_t> x = load_vec(logits + vec * LANES);
#pragma unroll
        for (unsigned i = 0; i < LANES; ++i) max = fmaxf(max, x.v[i]);
    }
    for (unsigned at = vecs * LANES + threadIdx.x; at < dim; at += blockDim.x) max = fmaxf(max, to_float(logits[at]));
    max = block_max(max);

    float total = 0.0f, mass = 0.0f, weighted = 0.0f;
    auto add = [&](float x, float t) {
        total += expf(x - max);
        mass += t;
        weighted += t * (x - max);
    };
    for (unsigned vec = threadIdx.x; vec < vecs; vec += blockDim.x) {
        Vec<act_t> x = load_vec(logits + vec * LANES), t = load_vec(target + vec * LANES);
#pragma unroll
        for (unsigned i = 0; i < LANES; ++i) add(x.v[i], t.v[i]);
    }
    for (unsigned at = vecs * LANES + threadIdx.x; at < dim; at += blockDim.x) add(to_float(logits[at]), to_float(target[at]));
    total = block_sum(total);
    mass = block_sum(mass);
    weighted = block_sum(weighted);
    if (threadIdx.x == 0) losses[blockIdx.x] = mass * logf(total) - weighted;

    float probability = mass / total;
    for (unsigned vec = threadIdx.x; vec < vecs; vec += blockDim.x) {
        Vec<act_t> x = load_vec(logits + vec * LANES), t = load_vec(target + vec * LANES);
#pragma unroll
        for (unsigned i = 0; i < LANES; ++i) x.v[i] = factor * (expf(x.v[i] - max) * probability - t.v[i]);
        store_vec(d_logits + vec * LANES, x);
    }
    for (unsigned at = vecs * LANES + threadIdx.x; at < dim; at += blockDim.x) {
        d_logits[at] = to_act(factor * (expf(to_float(logits[at]) - max) * probability - to_float(target[at])));
    }
}

/// Of each group of rows and each column `partial[group] = (sum of (x - x[0]), sum of (x - x[0])^2)`, about the first of all rows: what columns
/// have in common cancels before it is squared.
///
/// x [rows, dim]; partial [groups, 2, dim]. Launch: grid (ceil(dim / (32 * LANES)), groups = ceil(rows / rows_per_group)), 256 threads. Bytes: A.
extern "C" __global__ void __launch_bounds__(256)
    column_moments(float* partial, const act_t* x, unsigned rows, unsigned dim, unsigned rows_per_group) {
    constexpr unsigned WARPS = 8;
    bool whole = dim % LANES == 0 && aligned_16(x);
    unsigned column = (blockIdx.x * 32 + lane_id()) * LANES;
    unsigned first = blockIdx.y * rows_per_group;
    unsigned last = min(rows, first + rows_per_group);
    auto load = [&](const act_t* row) {
        Vec<act_t> v;
        if (whole) {
            if (column < dim) return load_vec(row + column);
        }
#pragma unroll
        for (unsigned i = 0; i < LANES; ++i) v.v[i] = column + i < dim ? to_float(row[column + i]) : 0.0f;
        return v;
    };

    Vec<act_t> base = load(x);
    float sums[2][LANES];
#pragma unroll
    for (unsigned i = 0; i < LANES; ++i) sums[0][i] = sums[1][i] = 0.0f;
#pragma unroll 4
    for (unsigned row = first + warp_id(); row < last; row += WARPS) {
        Vec<act_t> v = load(x + static_cast<size_t>(row) * dim);
#pragma unroll
        for (unsigned i = 0; i < LANES; ++i) {
            float about = v.v[i] - base.v[i];
            sums[0][i] += about;
            sums[1][i] += about * about;
        }
    }

    __shared__ float shared[WARPS][2][LANES][32];
#pragma unroll
    for (unsigned i = 0; i < LANES; ++i) {
        shared[warp_id()][0][i][lane_id()] = sums[0][i];
        shared[warp_id()][1][i][lane_id()] = sums[1][i];
    }
    __syncthreads();
    // Warp 0 adds the sums, warp 1 the squares.
    unsigned which = warp_id();
    if (which > 1) return;
    partial += (static_cast<size_t>(blockIdx.y) * 2 + which) * dim;
#pragma unroll
    for (unsigned i = 0; i < LANES; ++i) {
        float sum = shared[0][which][i][lane_id()];
#pragma unroll
        for (unsigned warp = 1; warp < WARPS; ++warp) sum += shared[warp][which][i][lane_id()];
        if (column + i < dim) partial[column + i] = sum;
    }
}

/// Of each 32 columns `spreads[block] = sum of their standard deviations` (biased), from what `column_moments` found.
///
/// partial [groups, 2, dim]; spreads [gridDim.x]. Launch: ceil(dim / 32) blocks of 256 threads. Bytes: 4 an element of `partial`.
extern "C" __global__ void __launch_bounds__(256)
    column_spreads(float* spreads, const float* partial, unsigned groups, unsigned rows, unsigned dim) {
    __shared__ double slices[2][8][32];
    unsigned column = blockIdx.x * 32 + lane_id();
    double sum = 0.0, squares = 0.0;
    if (column < dim) {
#pragma unroll 4
        for (unsigned group = warp_id(); group < groups; group += 8) {
            const float* from = partial + static_cast<size_t>(group) * 2 * dim + column;
            sum += from[0];
            squares += from[dim];
        }
    }
    slices[0][warp_id()][lane_id()] = sum;
    slices[1][warp_id()][lane_id()] = squares;
    __syncthreads();
    if (warp_id() > 0) return;
    for (int slice = 1; slice < 8; ++slice) {
        sum += slices[0][slice][lane_id()];
        squares += slices[1][slice][lane_id()];
    }
    double mean = sum / rows;
    float variance = static_cast<float>(squares / rows - mean * mean);
    // Rounding may leave a little less than 0; a NaN stays one.
    float spread = warp_sum(column < dim ? sqrtf(variance < 0.0f ? 0.0f : variance) : 0.0f);
    if (lane_id() == 0) spreads[blockIdx.x] = spread;
}
