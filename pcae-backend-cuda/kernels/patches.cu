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

// ------------------------------------------------------------------------------------------------------------------------ Crops

/// Where a picture lies among bytes, in words of 16, and its size.
struct alignas(16) Crop {
    unsigned start, height, width, unused;
};

/// The pixels that count for one of the output, as in `resize.rs` of the crate pcae-kernel: 17 of them at most.
struct alignas(16) Taps {
    short weights[18];
    unsigned start, count, shift;
};

/// Keys' cubic filter. Every operation is rounded by itself, here and below, as on any host.
__device__ __forceinline__ double keys(double x) {
    x = fabs(x);
    if (x < 1.0) return __dadd_rn(__dmul_rn(__dmul_rn(__dsub_rn(__dmul_rn(1.5, x), 2.5), x), x), 1.0);
    if (x < 2.0) return __dmul_rn(__dsub_rn(__dmul_rn(__dadd_rn(__dmul_rn(__dsub_rn(x, 5.0), x), 8.0), x), 4.0), -0.5);
    return 0.0;
}

/// Pixels `start..end` of a line of `from` count for one of the output, and what they weigh.
struct Window {
    double centre, narrow;
    unsigned start, end;

    __device__ __forceinline__ Window(unsigned i, unsigned from, double scale) {
        const double wide = fmax(scale, 1.0), radius = __dmul_rn(2.0, wide);
        centre = __dmul_rn(__dadd_rn(i, 0.5), scale);
        narrow = __ddiv_rn(1.0, wide);
        start = static_cast<unsigned>(fmax(floor(__dsub_rn(centre, radius)), 0.0));
        end = min(from, static_cast<unsigned>(ceil(__dadd_rn(centre, radius))));
    }

    /// Not yet divided by the sum of all of them.
    __device__ __forceinline__ double weight(unsigned j) const { return keys(__dmul_rn(__dsub_rn(j, __dsub_rn(centre, 0.5)), narrow)); }

    __device__ __forceinline__ double sum() const {
        double sum = 0.0;
        for (unsigned j = start; j < end; ++j) sum = __dadd_rn(sum, weight(j));
        return sum;
    }
};

/// What is to be known of each row and column of the output: taps [B, height + width], crops [B].
///
/// Two blocks of 256 threads for each picture, one for rows and one for columns. Reads next to nothing and writes 48 bytes for each.
extern "C" __global__ void __launch_bounds__(256) crop_taps(Taps* taps, const Crop* crops, unsigned height, unsigned width) {
    __shared__ unsigned long long greatest;
    const unsigned picture = blockIdx.x / 2;
    const bool rows = blockIdx.x % 2 == 0;
    const unsigned from = rows ? crops[picture].height : crops[picture].width, to = rows ? height : width;
    taps += static_cast<size_t>(picture) * (height + width) + (rows ? 0 : height);
    const double scale = __ddiv_rn(from, to);
    if (threadIdx.x == 0) greatest = 0;
    __syncthreads();
    for (unsigned i = threadIdx.x; i < to; i += blockDim.x) {
        const Window window(i, from, scale);
        double most = 0.0;
        for (unsigned j = window.start; j < window.end; ++j) most = fmax(most, window.weight(j));
        // Numbers above zero are ordered as their bits are, and quotients as what is divided.
        atomicMax(&greatest, static_cast<unsigned long long>(__double_as_longlong(__ddiv_rn(most, window.sum()))));
    }
    __syncthreads();
    const double most = __longlong_as_double(static_cast<long long>(greatest));
    unsigned shift = 21;
    while (shift > 1 && round(__dmul_rn(most, 1u << shift)) >= 32768.0) --shift;
    for (unsigned i = threadIdx.x; i < to; i += blockDim.x) {
        const Window window(i, from, scale);
        const double sum = window.sum();
        for (unsigned j = window.start; j < window.end; ++j) {
            taps[i].weights[j - window.start] = static_cast<short>(round(__dmul_rn(__ddiv_rn(window.weight(j), sum), 1u << shift)));
        }
        taps[i].start = window.start;
        taps[i].count = window.end - window.start;
        taps[i].shift = shift;
    }
}

/// A pixel from the sum of those that count for it.
__device__ __forceinline__ unsigned clamped(int sum, unsigned shift) { return static_cast<unsigned>(min(max(sum >> shift, 0), 255)); }

/// A pixel of those that count for it, which lie `step` apart.
__device__ __forceinline__ unsigned char blend(const Taps& taps, const unsigned char* pixels, unsigned step) {
    int sum = 1 << (taps.shift - 1);
    for (unsigned k = 0; k < taps.count; ++k) sum += taps.weights[k] * pixels[k * step];
    return static_cast<unsigned char>(clamped(sum, taps.shift));
}

/// Four bytes that begin anywhere, of which `left` are wanted, out of the words in which these lie. No other word is read.
__device__ __forceinline__ unsigned word_at(const unsigned char* bytes, unsigned left) {
    const unsigned skip = reinterpret_cast<size_t>(bytes) % 4;
    const unsigned* const words = reinterpret_cast<const unsigned*>(bytes - skip);
    const unsigned long long high = skip != 0 && left > 4 - skip ? words[1] : 0;
    return static_cast<unsigned>((high << 32 | words[0]) >> 8 * skip);
}

/// Four neighbouring `blend`s with rows of pixels `pitch` apart, of which `left` are wanted.
__device__ __forceinline__ unsigned blend_word(const Taps& taps, const unsigned char* pixels, unsigned pitch, unsigned left) {
    int sums[4];
#pragma unroll
    for (unsigned i = 0; i < 4; ++i) sums[i] = 1 << (taps.shift - 1);
    for (unsigned k = 0; k < taps.count; ++k, pixels += pitch) {
        const unsigned word = word_at(pixels, left);
        const int weight = taps.weights[k];
#pragma unroll
        for (unsigned i = 0; i < 4; ++i) sums[i] += weight * static_cast<int>(word >> 8 * i & 255u);
    }
    unsigned word = 0;
#pragma unroll
    for (unsigned i = 0; i < 4; ++i) word |= clamped(sums[i], taps.shift) << 8 * i;
    return word;
}

#define TILE_ROWS 16
#define TILE_COLUMNS 64

/// Pictures resized to out [B, height, width, channels]: crops [B] lie in `pixels`, with taps [B, height + width].
///
/// A block of 256 threads for each tile of a picture, row by row, with shared memory for TILE_ROWS lines of `line` bytes, whole words: what becomes of the columns
/// that count for its own. Neighbouring threads read neighbouring words of 4 bytes, each row of a crop from where its words begin; they write
/// neighbouring bytes, whole sectors. Lines are read as often as they count, from the cache but for the first time.
extern "C" __global__ void __launch_bounds__(256)
    resize_crops(unsigned char* out, const unsigned char* pixels, const Crop* crops, const Taps* taps, unsigned channels, unsigned height, unsigned width,
                 unsigned line) {
    DYNAMIC_SHARED(unsigned char, lines);
    __shared__ Taps rows[TILE_ROWS], columns[TILE_COLUMNS];
    constexpr unsigned WORDS = sizeof(Taps) / sizeof(uint4);
    const unsigned tile_columns = (width + TILE_COLUMNS - 1) / TILE_COLUMNS, tiles = (height + TILE_ROWS - 1) / TILE_ROWS * tile_columns;
    const unsigned picture = blockIdx.x / tiles, tile = blockIdx.x - picture * tiles;
    const unsigned top = tile / tile_columns * TILE_ROWS, left = tile % tile_columns * TILE_COLUMNS;
    const unsigned high = min(height - top, static_cast<unsigned>(TILE_ROWS)), wide = min(width - left, static_cast<unsigned>(TILE_COLUMNS));
    const Taps* const of_rows = taps + static_cast<size_t>(picture) * (height + width) + top;
    const Taps* const of_columns = of_rows - top + height + left;
    for (unsigned i = threadIdx.x; i < high * WORDS; i += blockDim.x) {
        reinterpret_cast<uint4*>(rows)[i] = reinterpret_cast<const uint4*>(of_rows)[i];
    }
    for (unsigned i = threadIdx.x; i < wide * WORDS; i += blockDim.x) {
        reinterpret_cast<uint4*>(columns)[i] = reinterpret_cast<const uint4*>(of_columns)[i];
    }
    __syncthreads();
    const Crop crop = crops[picture];
    const unsigned first = columns[0].start, bytes = (columns[wide - 1].start + columns[wide - 1].count - first) * channels;
    const unsigned pitch = crop.width * channels;
    pixels += static_cast<size_t>(crop.start) * 16 + static_cast<size_t>(first) * channels;
    for (unsigned y = warp_id(); y < high; y += blockDim.x / 32) {
        const unsigned char* const from = pixels + static_cast<size_t>(rows[y].start) * pitch;
        unsigned* const to = reinterpret_cast<unsigned*>(lines + y * line);
        for (unsigned x = 4 * lane_id(); x < bytes; x += 4 * 32) to[x / 4] = blend_word(rows[y], from + x, pitch, bytes - x);
    }
    __syncthreads();
    out += ((static_cast<size_t>(picture) * height + top) * width + left) * channels;
    for (unsigned y = warp_id(); y < high; y += blockDim.x / 32) {
        for (unsigned x = lane_id(); x < wide * channels; x += 32) {
            const unsigned column = x / channels, channel = x - column * channels;
            const unsigned char* const from = lines + y * line + (columns[column].start - first) * channels + channel;
            out[static_cast<size_t>(y) * width * channels + x] = blend(columns[column], from, channels);
        }
    }
}
