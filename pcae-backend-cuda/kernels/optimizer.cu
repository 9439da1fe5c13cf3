// Norm of a vector, and AdamW with everything that goes over all parameters once a step. All of it is f32 but for the copies that products read.

/// Of each block's elements `squares[block] = sum of x[i]^2`.
///
/// x [len], on a multiple of 16 bytes; squares [gridDim.x]. Launch: any grid, 256 threads. Bytes: 4 an element.
extern "C" __global__ void __launch_bounds__(256) sum_squares(float* squares, const float* x, unsigned long long len) {
    constexpr unsigned AHEAD = 4;
    unsigned long long vecs = len / 4;
    unsigned long long threads = static_cast<unsigned long long>(gridDim.x) * blockDim.x;
    unsigned long long thread = static_cast<unsigned long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    float sums[AHEAD] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (unsigned long long turn = thread; turn < vecs; turn += AHEAD * threads) {
        Vec<float> v[AHEAD];
#pragma unroll
        for (unsigned k = 0; k < AHEAD; ++k) {
            v[k] = {{0.0f, 0.0f, 0.0f, 0.0f}};
            if (turn + k * threads < vecs) v[k] = load_vec(x + (turn + k * threads) * 4);
        }
#pragma unroll
        for (unsigned k = 0; k < AHEAD; ++k) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[k] += v[k].v[i] * v[k].v[i];
        }
    }
    for (unsigned long long at = vecs * 4 + thread; at < len; at += threads) sums[0] += x[at] * x[at];
    float sum = block_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    if (threadIdx.x == 0) squares[blockIdx.x] = sum;
}

/// Neighbouring parameters that are treated alike, a block's work.
struct Piece {
    unsigned start, len;
    float weight_decay, lr_scale;
    /// `TRAINED`: not only the gradient becomes zero. `FOLLOWED`: the teacher follows.
    unsigned flags;
};
static constexpr unsigned TRAINED = 1, FOLLOWED = 2;

/// What is the same for all elements of a piece.
struct Step {
    float clip, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, unbias2, one_minus_momentum;
    /// `lr' * weight_decay`, and `lr' / (1 - beta1^t)`.
    float decay, size;
};

/// One parameter: gradient `g`, moments `m` and `v`, value `w`.
__device__ __forceinline__ void update(const Step& s, float g, float& m, float& v, float& w) {
    g *= s.clip;
    m = s.beta1 * m + s.one_minus_beta1 * g;
    v = s.beta2 * v + s.one_minus_beta2 * (g * g);
    w -= s.decay * w;
    w -= s.size * (m / (sqrtf(v * s.unbias2) + s.eps));
}

/// AdamW (Loshchilov & Hutter, 2019) on `student`, the moving average `teacher += (1 - momentum) * (student - teacher)`, their copies in bf16, and
/// `grads = 0`, in one pass over memory.
///
/// student, grads, exp_avg, exp_avg_sq: f32, each on a multiple of 16 bytes; teacher, student_half, teacher_half: null where there is none;
/// pieces [gridDim.x], which cover the gradients; changing: {lr, lr / (1 - beta1^t), 1 / (1 - beta2^t), 1 - momentum}; norm: null, or the
/// gradient's, by which it is scaled down to `max_norm`. Launch: a block of 256 threads for each piece.
/// Bytes: 32 a parameter (four f32 read and written), 8 more where a teacher follows, and 2 for each copy in bf16: 44 for an encoder in bf16.
extern "C" __global__ void __launch_bounds__(256, 5)
    adamw_ema(float* student, bf16* student_half, float* teacher, bf16* teacher_half, float* grads, float* exp_avg, float* exp_avg_sq,
              const Piece* pieces, const float* changing, const float* norm, float max_norm, float beta1, float one_minus_beta1, float beta2,
              float one_minus_beta2, float eps) {
    Piece piece = pieces[blockIdx.x];
    bool trained = piece.flags & TRAINED, followed = teacher && piece.flags & FOLLOWED;
    float lr = changing[0] * piece.lr_scale;
    Step step;
    step.clip = norm && *norm > max_norm ? max_norm / *norm : 1.0f;
    step.beta1 = beta1, step.one_minus_beta1 = one_minus_beta1;
    step.beta2 = beta2, step.one_minus_beta2 = one_minus_beta2;
    step.eps = eps;
    step.decay = lr * piece.weight_decay;
    step.size = changing[1] * piece.lr_scale;
    step.unbias2 = changing[2];
    step.one_minus_momentum = changing[3];

    // Every fourth element of the vectors, not of the piece, starts on a multiple of 16 bytes. Counted from there in 32 bits, which
    // nothing here overflows: with 64, NVRTC 12.1 spills.
    unsigned first = piece.start / 4 * 4, start = piece.start - first, end = start + piece.len;
    for (unsigned vec = 4 * threadIdx.x; vec < end; vec += 4 * blockDim.x) {
        unsigned at = first + vec;
        if (vec >= start && vec + 4 <= end) {
            if (trained) {
                Vec<float> g = load_vec(grads + at), m = load_vec(exp_avg + at), v = load_vec(exp_avg_sq + at), w = load_vec(student + at);
                Vec<float> t = w;
                if (followed) t = load_vec(teacher + at);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    update(step, g.v[i], m.v[i], v.v[i], w.v[i]);
                    t.v[i] += step.one_minus_momentum * (w.v[i] - t.v[i]);
                }
                store_vec(exp_avg + at, m);
                store_vec(exp_avg_sq + at, v);
                store_vec(student + at, w);
                if (student_half) {
                    *reinterpret_cast<uint2*>(student_half + at) = make_uint2(pack_bf16(w.v[0], w.v[1]), pack_bf16(w.v[2], w.v[3]));
                }
                if (followed) {
                    store_vec(teacher + at, t);
                    if (teacher_half) {
                        *reinterpret_cast<uint2*>(teacher_half + at) = make_uint2(pack_bf16(t.v[0], t.v[1]), pack_bf16(t.v[2], t.v[3]));
                    }
                }
            }
            store_vec(grads + at, {{0.0f, 0.0f, 0.0f, 0.0f}});
        } else {
            // The ends of a piece, where a neighbour's elements share the 16 bytes.
            for (unsigned k = max(vec, start); k < min(vec + 4, end); ++k) {
                unsigned i = first + k;
                if (trained) {
                    float w = student[i], m = exp_avg[i], v = exp_avg_sq[i];
                    update(step, grads[i], m, v, w);
                    exp_avg[i] = m;
                    exp_avg_sq[i] = v;
                    student[i] = w;
                    if (student_half) student_half[i] = from_float<bf16>(w);
                    if (followed) {
                        float t = teacher[i];
                        t += step.one_minus_momentum * (w - t);
                        teacher[i] = t;
                        if (teacher_half) teacher_half[i] = from_float<bf16>(t);
                    }
                }
                grads[i] = 0.0f;
            }
        }
    }
}
