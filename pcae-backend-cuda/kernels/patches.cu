// Patches, cut out of the pictures before they are embedded: only the pixels of patches that are needed are read.

/// How pictures are cut (`PatchDims`); the patches of a picture are numbered row by row.
struct Patches {
    unsigned channels, height, width, patch_size, taken;

    /// Elements of one patch.
    __device__ __forceinline__ unsigned len() const { return channels * patch_size * patch_size; }

    /// The first pixel, in channel 0, of the patch that is taken as number `i` of all pictures. An id that is no patch is reported, and
    /// `found` is false.
    __device__ __forceinline__ size_t corner(unsigned i, const unsigned* ids, bool& found, unsigned* fault, unsigned code) const {
        unsigned picture = i / taken, columns = width / patch_size;
        unsigned patch = ids ? ids[i] : i - picture * taken;
        found = patch < height / patch_size * columns;
        if (!found) {
            report(fault, code, patch);
            return 0;
        }
        size_t top = patch / columns * patch_size;
        return (static_cast<size_t>(picture) * channels * height + top) * width + patch % columns * patch_size;
    }
};

/// Copies patches in words of `PIXELS` pixels of a row, a warp each at a time. Divisions are per patch, and a few per thread: on its way through a patch
/// a lane goes on by 32 words each time.
template <typename Word>
__device__ __forceinline__ void copy_patches(act_t* out, const act_t* images, const unsigned* ids, unsigned patches, const Patches& dims, unsigned* fault,
                                             unsigned code) {
    constexpr unsigned PIXELS = sizeof(Word) / sizeof(act_t), AHEAD = 4;
    const unsigned row_words = dims.patch_size / PIXELS, patch_words = dims.len() / PIXELS;
    const unsigned lane_line = lane_id() / row_words, lane_column = lane_id() % row_words;
    const unsigned step_line = 32 / row_words, step_column = 32 % row_words;
    const unsigned step_channel = step_line / dims.patch_size, step_row = step_line % dims.patch_size;
    const unsigned warps = gridDim.x * (blockDim.x / 32);
    for (unsigned patch = blockIdx.x * (blockDim.x / 32) + warp_id(); patch < patches; patch += warps) {
        bool found;
        const act_t* const corner = images + dims.corner(patch, ids, found, fault, code);
        Word* const to = reinterpret_cast<Word*>(out) + static_cast<size_t>(patch) * patch_words;
        unsigned channel = lane_line / dims.patch_size, row = lane_line % dims.patch_size, column = lane_column;
        for (unsigned word = lane_id(); word < patch_words; word += 32 * AHEAD) {
            Word held[AHEAD];
#pragma unroll
            for (unsigned k = 0; k < AHEAD; ++k) {
                held[k] = Word{};
                if (found && word + 32 * k < patch_words) {
                    const act_t* pixels = corner + (static_cast<size_t>(channel) * dims.height + row) * dims.width;
                    held[k] = reinterpret_cast<const Word*>(pixels)[column];
                }
                column += step_column;
                row += step_row;
                channel += step_channel;
                if (column >= row_words) {
                    column -= row_words;
                    ++row;
                }
                if (row >= dims.patch_size) {
                    row -= dims.patch_size;
                    ++channel;
                }
            }
#pragma unroll
            for (unsigned k = 0; k < AHEAD; ++k) {
                if (word + 32 * k < patch_words) to[word + 32 * k] = held[k];
            }
        }
    }
}

/// The patches `ids` (all of them where it is null) of pictures [B, channels, height, width]: out [B, taken, channels, patch_size, patch_size].
///
/// Any grid of blocks of 256 threads; words are as long as rows of a patch allow. `patches` is B * taken, and there are fewer than 2^32
/// elements. Reads the pixels of the patches and writes as much. An id that is no patch is reported as `code`, and its patch is zero.
extern "C" __global__ void __launch_bounds__(256)
    gather_patches(act_t* out, const act_t* images, const unsigned* ids, unsigned patches, unsigned channels, unsigned height, unsigned width,
                   unsigned patch_size, unsigned taken, unsigned* fault, unsigned code) {
    const Patches dims = {channels, height, width, patch_size, taken};
    // Every row of a patch starts at a multiple of its length, in either tensor.
    const size_t places = reinterpret_cast<size_t>(out) | reinterpret_cast<size_t>(images) | patch_size * sizeof(act_t);
    if (places % 16 == 0) {
        copy_patches<uint4>(out, images, ids, patches, dims, fault, code);
    } else if (places % 8 == 0) {
        copy_patches<unsigned long long>(out, images, ids, patches, dims, fault, code);
    } else if (places % 4 == 0) {
        copy_patches<unsigned>(out, images, ids, patches, dims, fault, code);
    } else {
        copy_patches<act_t>(out, images, ids, patches, dims, fault, code);
    }
}

/// Collects `N` elements at a time.
template <unsigned N>
__device__ __forceinline__ void collect_pixels(act_t* out, const act_t* images, const unsigned* ids, unsigned patches, const Patches& dims, unsigned* fault,
                                               unsigned code) {
    const unsigned len = dims.len();
    auto load = [&](size_t at) {
        unsigned element = static_cast<unsigned>(at) * N, patch = element / len, within = element - patch * len;
        unsigned pixel = within / dims.channels, channel = within - pixel * dims.channels;
        unsigned row = pixel / dims.patch_size, column = pixel - row * dims.patch_size;
        bool found;
        const act_t* corner = images + dims.corner(patch, ids, found, fault, code);
        Floats<N> values;
#pragma unroll
        for (unsigned i = 0; i < N; ++i) {
            values.v[i] = found ? to_float(corner[(static_cast<size_t>(channel) * dims.height + row) * dims.width + column]) : 0.0f;
            if (++channel == dims.channels) {
                channel = 0;
                if (++column == dims.patch_size) {
                    column = 0;
                    ++row;
                }
            }
        }
        return values;
    };
    for_each_word(static_cast<size_t>(patches) * len / N, load, [&](size_t at, const Floats<N>& values) { store_floats(out + at * N, values); });
}

/// Pixels of the patches `ids` in the order of MAE's target: out [B, taken, patch_size, patch_size, channels].
///
/// Any grid of blocks of 256 threads; a thread collects the 16 bytes that it writes pixel by pixel, its neighbours from the same lines of cache.
/// Otherwise as `gather_patches`.
extern "C" __global__ void __launch_bounds__(256)
    pixel_targets(act_t* out, const act_t* images, const unsigned* ids, unsigned patches, unsigned channels, unsigned height, unsigned width,
                  unsigned patch_size, unsigned taken, unsigned* fault, unsigned code) {
    const Patches dims = {channels, height, width, patch_size, taken};
    if (dims.len() % Vec<act_t>::SIZE == 0 && aligned_16(out)) {
        collect_pixels<Vec<act_t>::SIZE>(out, images, ids, patches, dims, fault, code);
    } else {
        collect_pixels<1>(out, images, ids, patches, dims, fault, code);
    }
}

/// Pixels that a thread of `normalise_pixels` takes at once, of all channels.
#define RUN 16

/// Pictures in runs of pixels; `table` [CHANNELS, 256] says what a pixel becomes.
template <unsigned CHANNELS>
__device__ __forceinline__ void normalise_runs(act_t* out, const unsigned char* values, const unsigned char* flips, const float* table, unsigned runs,
                                               unsigned height, unsigned width) {
    constexpr unsigned SIZE = Vec<act_t>::SIZE;
    const unsigned row_runs = width / RUN, picture_runs = height * row_runs, plane = height * width;
    for (unsigned run = blockIdx.x * blockDim.x + threadIdx.x; run < runs; run += gridDim.x * blockDim.x) {
        // 16 bytes for each channel, in which the channels take turns.
        unsigned bytes[4 * CHANNELS];
#pragma unroll
        for (unsigned i = 0; i < CHANNELS; ++i) {
            uint4 word = reinterpret_cast<const uint4*>(values)[static_cast<size_t>(run) * CHANNELS + i];
            bytes[4 * i] = word.x, bytes[4 * i + 1] = word.y, bytes[4 * i + 2] = word.z, bytes[4 * i + 3] = word.w;
        }
        unsigned picture = run / picture_runs, within = run - picture * picture_runs;
        unsigned row = within / row_runs, column = within - row * row_runs;
        const bool flip = flips[picture] != 0;
        act_t* to = out + static_cast<size_t>(picture) * CHANNELS * plane + row * width + (flip ? row_runs - 1 - column : column) * RUN;
#pragma unroll
        for (unsigned channel = 0; channel < CHANNELS; ++channel) {
#pragma unroll
            for (unsigned part = 0; part < RUN; part += SIZE) {
                Vec<act_t> straight, chosen;
#pragma unroll
                for (unsigned i = 0; i < SIZE; ++i) {
                    unsigned at = (part + i) * CHANNELS + channel;
                    straight.v[i] = table[channel * 256 + (bytes[at / 4] >> at % 4 * 8 & 255u)];
                }
#pragma unroll
                for (unsigned i = 0; i < SIZE; ++i) chosen.v[i] = flip ? straight.v[SIZE - 1 - i] : straight.v[i];
                store_vec(to + static_cast<size_t>(channel) * plane + (flip ? RUN - SIZE - part : part), chosen);
            }
        }
    }
}

/// Pixels of 8 bits as values, some pictures mirrored: out [B, channels, height, width]. `staged` starts on a multiple of 16 and holds mean and standard
/// deviation, f32 [channels] each, whether a picture is mirrored [B], and from the next multiple of 16 on values [B, height, width, channels].
///
/// Any grid of blocks of 256 threads; there are fewer than 2^32 elements. Rows of whole runs, of one or three channels, are read and written in words of
/// 16 bytes, and what a pixel becomes is looked up: two exact divisions take longer. Reads a byte for each element, and writes it.
extern "C" __global__ void __launch_bounds__(256)
    normalise_pixels(act_t* out, const unsigned char* staged, unsigned batch, unsigned channels, unsigned height, unsigned width) {
    __shared__ float table[3 * 256];
    const float* mean = reinterpret_cast<const float*>(staged);
    const float* std = mean + channels;
    const unsigned char* flips = reinterpret_cast<const unsigned char*>(std + channels);
    const unsigned char* values = staged + (2 * sizeof(float) * channels + batch + 15) / 16 * 16;
    auto normalise = [&](unsigned value, unsigned channel) { return (static_cast<float>(value) / 255.0f - mean[channel]) / std[channel]; };
    const bool by_runs = width % RUN == 0 && (channels == 1 || channels == 3) && aligned_16(out);
    if (!by_runs) {
        auto load = [&](size_t at) {
            unsigned element = static_cast<unsigned>(at), line = element / width, x = element - line * width;
            unsigned plane = line / height, y = line - plane * height, picture = plane / channels, channel = plane - picture * channels;
            if (flips[picture] != 0) x = width - 1 - x;
            return normalise(values[((static_cast<size_t>(picture) * height + y) * width + x) * channels + channel], channel);
        };
        for_each_word(static_cast<size_t>(batch) * channels * height * width, load, [&](size_t at, float value) { out[at] = to_act(value); });
        return;
    }
    for (unsigned i = threadIdx.x; i < channels * 256; i += blockDim.x) table[i] = normalise(i % 256, i / 256);
    __syncthreads();
    const unsigned runs = batch * height * (width / RUN);
    if (channels == 1) {
        normalise_runs<1>(out, values, flips, table, runs, height, width);
    } else {
        normalise_runs<3>(out, values, flips, table, runs, height, width);
    }
}
