// libcublasLt.so.13: products of column-major matrices in f32, bf16 and e4m3, summed in f32, with a bias as the only epilogue.
//
// Held against what the library promises: pointers as aligned as the preference has said, an algorithm that was found for this
// very product, a workspace as large as that algorithm wants (which is written), operands that do not overlap.
//
// Which products of odd sizes a library has an algorithm for depends on its version and the device, and is documented for none. So this
// one refuses whole classes of them (`refuses`), offers algorithms that it then refuses, and says which is the fastest.

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <string>
#include <vector>

#include "work.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

typedef int Status;   // cublasStatus_t

namespace {

enum : Status { SUCCESS = 0, INVALID_VALUE = 7, NOT_SUPPORTED = 15 };
enum : int { R_32F = 0, R_16BF = 14, R_8F_E4M3 = 28, COMPUTE_32F = 68, EPILOGUE_DEFAULT = 1, EPILOGUE_BIAS = 4 };

struct Desc {
    int transpose_a = 0, transpose_b = 0, epilogue = EPILOGUE_DEFAULT;
    const void* bias = nullptr;
    const float* a_scale = nullptr;
    bool fast = false;
};

struct Layout {
    int type;
    uint64_t rows, columns;
    int64_t leading;

    size_t size() const { return type == R_32F ? 4 : type == R_16BF ? 2 : 1; }
    size_t bytes() const { return rows == 0 || columns == 0 ? 0 : ((columns - 1) * static_cast<size_t>(leading) + rows) * size(); }
    bool operator==(const Layout& o) const { return type == o.type && rows == o.rows && columns == o.columns && leading == o.leading; }
};

struct Preference {
    uint64_t workspace = 0;
    uint32_t reductions = 7;   // all, as cublasLt.h says
    uint32_t alignments[4] = {256, 256, 256, 256};
};

struct Algo {
    uint64_t magic, product, workspace;
    uint32_t alignments[4];
    uint64_t bias_alignment;
    uint64_t number;   // in the order in which they are offered
    uint64_t is_refused;   // by cublasLtMatmul
};
static_assert(sizeof(Algo) == 64, "cublasLtMatmulAlgo_t");

struct Found {   // cublasLtMatmulHeuristicResult_t
    Algo algo;
    size_t workspace;
    Status state;
    float waves;
    int reserved[4];
};

/// Algorithms for a product.
constexpr int OFFERED = 4;
/// The fastest, and by how much: by the device's clock alone, and far more than a busy host takes for a product.
constexpr uint64_t FASTEST = 2, NANOSECONDS = 100000000;
constexpr uint64_t MAGIC = 0x70636165656d75ULL;

Status refuse(Status status, const std::string& reason) {
    emulated_complain("cuBLASLt: %s", reason.c_str());
    return status;
}

uint64_t sum(const Desc& desc, const Layout& a, const Layout& b, const Layout& c, const Layout& d) {
    uint64_t hash = 0xcbf29ce484222325ULL;
    auto add = [&](uint64_t word) { hash = (hash ^ word) * 0x100000001b3ULL; };
    for (int each : {desc.transpose_a, desc.transpose_b, desc.epilogue, desc.fast ? 1 : 0, desc.a_scale != nullptr ? 1 : 0}) add(static_cast<uint64_t>(each));
    for (const Layout* each : {&a, &b, &c, &d}) {
        add(static_cast<uint64_t>(each->type));
        add(each->rows);
        add(each->columns);
        add(static_cast<uint64_t>(each->leading));
    }
    return hash;
}

/// What a product of e4m3 must be on Ada and Hopper, from the documentation of cublasLtMatmul: the first operand transposed and the second not, output
/// and what is added of one type, bf16 or f32, and what "Tensor Core Usage" wants: columns of A and B, and of C and D, of whole 16 bytes, in themselves
/// and from one to the next. n is free (as in PyTorch's `_scaled_mm`, since pull request 108308).
Status check_fp8(const Desc& desc, const Layout& a, const Layout& b, const Layout& c, const Layout& d, size_t k) {
    const char* set = getenv("PCAE_EMULATED_FP8");
    if (set != nullptr && strcmp(set, "none") == 0) return NOT_SUPPORTED;
    if (b.type != R_8F_E4M3 || c.type != d.type || (d.type != R_16BF && d.type != R_32F)) return refuse(NOT_SUPPORTED, "this combination of types with e4m3");
    if (!desc.transpose_a || desc.transpose_b) return refuse(NOT_SUPPORTED, "a product of e4m3 in another form than TN");
    for (size_t bytes : {k, static_cast<size_t>(a.leading), static_cast<size_t>(b.leading), d.rows * d.size(), static_cast<size_t>(d.leading) * d.size(), static_cast<size_t>(c.leading) * c.size()})
        if (bytes % 16 != 0) return refuse(NOT_SUPPORTED, "a product of e4m3 with a column of " + std::to_string(bytes) + " bytes");
    return SUCCESS;
}

/// Whether the four are a product; its m, n, k.
Status check(const Desc& desc, const Layout& a, const Layout& b, const Layout& c, const Layout& d, size_t& m, size_t& n, size_t& k) {
    size_t a_rows = desc.transpose_a ? a.columns : a.rows, a_columns = desc.transpose_a ? a.rows : a.columns;
    size_t b_rows = desc.transpose_b ? b.columns : b.rows, b_columns = desc.transpose_b ? b.rows : b.columns;
    m = d.rows;
    n = d.columns;
    k = a_columns;
    if (a_rows != m || b_columns != n || b_rows != k || c.rows != m || c.columns != n || m == 0 || n == 0 || k == 0)
        return refuse(INVALID_VALUE, "[" + std::to_string(a_rows) + ", " + std::to_string(a_columns) + "] @ [" + std::to_string(b_rows) + ", " + std::to_string(b_columns) + "] is not [" +
                                         std::to_string(m) + ", " + std::to_string(n) + "]");
    if (a.type == R_8F_E4M3) return check_fp8(desc, a, b, c, d, k);
    if (desc.a_scale != nullptr || desc.fast) return refuse(NOT_SUPPORTED, "a scale, or fast sums, of operands that are not in fp8");
    if (a.type != b.type || c.type != d.type || (a.type == R_32F && d.type != R_32F)) return refuse(NOT_SUPPORTED, "this combination of types");
    return SUCCESS;
}

enum class Refusal { NONE, SAID, NOTHING_FOUND };

/// Whether there is no algorithm. What the documentation asks for the best use of tensor cores, 16 bytes, is what the output of an epilogue needs here; columns
/// of bf16 that begin at odd elements, and products of one term in f32, are not computed at all.
Refusal refuses(const Desc& desc, const Layout& a, const Layout& b, const Layout& d, size_t k) {
    if (a.type == R_16BF ? k % 2 == 1 && (a.leading % 2 == 1 || b.leading % 2 == 1) : k == 1) return Refusal::NOTHING_FOUND;
    if (desc.epilogue == EPILOGUE_BIAS && d.rows * d.size() % 16 != 0) return Refusal::SAID;
    return Refusal::NONE;
}

/// Sign, 4 bits of exponent (bias 7), 3 of mantissa.
float of_e4m3(unsigned bits) {
    const unsigned exponent = bits >> 3 & 15, mantissa = bits & 7;
    if (exponent == 15 && mantissa == 7) return NAN;
    const float magnitude = exponent == 0 ? ldexpf(static_cast<float>(mantissa), -9) : ldexpf(static_cast<float>(8 + mantissa), static_cast<int>(exponent) - 10);
    return bits & 0x80 ? -magnitude : magnitude;
}

struct Table {
    float values[256];
    Table() {
        for (unsigned i = 0; i < 256; i++) values[i] = of_e4m3(i);
    }
};

float load(const void* at, size_t i, int type) {
    if (type == R_32F) return static_cast<const float*>(at)[i];
    if (type == R_8F_E4M3) {
        static const Table table;
        return table.values[static_cast<const unsigned char*>(at)[i]];
    }
    uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(at)[i]) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

void store(void* at, size_t i, int type, float value) {
    if (type == R_32F) {
        static_cast<float*>(at)[i] = value;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &value, 4);
    static_cast<uint16_t*>(at)[i] = value != value ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

constexpr size_t ROWS = 32, COLUMNS = 4;

/// sums[j][i] = sum over k of a[k][i] * b[j][k], for one tile.
#if defined(__x86_64__)
__attribute__((target_clones("default", "arch=haswell")))
#endif
void
tile(float (&sums)[COLUMNS][ROWS], const float* a, size_t a_step, const float* b, size_t b_step, size_t k) {
    float local[COLUMNS][ROWS] = {};
    for (size_t p = 0; p < k; p++)
        for (size_t j = 0; j < COLUMNS; j++)
            for (size_t i = 0; i < ROWS; i++) local[j][i] += a[p * a_step + i] * b[j * b_step + p];
    memcpy(sums, local, sizeof local);
}

}  // namespace

EXPORT Status cublasLtCreate(void** handle) {
    *handle = new int(0);
    return SUCCESS;
}

EXPORT Status cublasLtDestroy(void* handle) {
    delete static_cast<int*>(handle);
    return SUCCESS;
}

EXPORT Status cublasLtMatmulDescCreate(void** desc, int compute, int scale) {
    // TF32 and the like round operands: `f32` means f32 here.
    if (compute != COMPUTE_32F || scale != R_32F) return refuse(NOT_SUPPORTED, "a product computed as " + std::to_string(compute) + ", scaled as " + std::to_string(scale));
    *desc = new Desc();
    return SUCCESS;
}

EXPORT Status cublasLtMatmulDescDestroy(void* desc) {
    delete static_cast<Desc*>(desc);
    return SUCCESS;
}

EXPORT Status cublasLtMatmulDescSetAttribute(void* handle, int attribute, const void* value, size_t size) {
    Desc* desc = static_cast<Desc*>(handle);
    int number = 0;
    const size_t wanted = attribute == 8 || attribute == 17 ? sizeof(void*) : attribute == 25 ? 1 : sizeof(int);
    if (size != wanted) return refuse(INVALID_VALUE, "attribute " + std::to_string(attribute) + " of a product in " + std::to_string(size) + " bytes");
    if (attribute == 8) {
        memcpy(&desc->bias, value, sizeof desc->bias);
        return SUCCESS;
    }
    if (attribute == 17) {
        memcpy(&desc->a_scale, value, sizeof desc->a_scale);
        return SUCCESS;
    }
    if (attribute == 25) {
        desc->fast = *static_cast<const int8_t*>(value) != 0;
        return SUCCESS;
    }
    memcpy(&number, value, sizeof number);
    if (attribute == 3 && (number == 0 || number == 1))
        desc->transpose_a = number;
    else if (attribute == 4 && (number == 0 || number == 1))
        desc->transpose_b = number;
    else if (attribute == 7 && (number == EPILOGUE_DEFAULT || number == EPILOGUE_BIAS))
        desc->epilogue = number;
    else
        return refuse(NOT_SUPPORTED, "attribute " + std::to_string(attribute) + " of a product with value " + std::to_string(number) + " is not emulated");
    return SUCCESS;
}

EXPORT Status cublasLtMatrixLayoutCreate(void** layout, int type, uint64_t rows, uint64_t columns, int64_t leading) {
    if (type != R_32F && type != R_16BF && type != R_8F_E4M3) return refuse(NOT_SUPPORTED, "a matrix of type " + std::to_string(type));
    if (leading < static_cast<int64_t>(rows) || leading < 1) return refuse(INVALID_VALUE, "columns of " + std::to_string(rows) + " elements " + std::to_string(leading) + " apart");
    *layout = new Layout{type, rows, columns, leading};
    return SUCCESS;
}

EXPORT Status cublasLtMatrixLayoutDestroy(void* layout) {
    delete static_cast<Layout*>(layout);
    return SUCCESS;
}

EXPORT Status cublasLtMatmulPreferenceCreate(void** preference) {
    *preference = new Preference();
    return SUCCESS;
}

EXPORT Status cublasLtMatmulPreferenceDestroy(void* preference) {
    delete static_cast<Preference*>(preference);
    return SUCCESS;
}

EXPORT Status cublasLtMatmulPreferenceSetAttribute(void* handle, int attribute, const void* value, size_t size) {
    Preference* preference = static_cast<Preference*>(handle);
    if (attribute == 1 && size == 8) {
        memcpy(&preference->workspace, value, 8);
        return SUCCESS;
    }
    if (attribute == 3 && size == 4) {
        memcpy(&preference->reductions, value, 4);
        return SUCCESS;
    }
    if (attribute >= 5 && attribute <= 8 && size == 4) {
        memcpy(&preference->alignments[attribute - 5], value, 4);
        return SUCCESS;
    }
    return refuse(NOT_SUPPORTED, "attribute " + std::to_string(attribute) + " of a preference in " + std::to_string(size) + " bytes is not emulated");
}

EXPORT Status cublasLtMatmulAlgoGetHeuristic(void*, const void* desc, const void* a, const void* b, const void* c, const void* d, const void* wanted, int asked, void* results, int* found) {
    *found = 0;
    const Layout &la = *static_cast<const Layout*>(a), &lb = *static_cast<const Layout*>(b), &lc = *static_cast<const Layout*>(c), &ld = *static_cast<const Layout*>(d);
    const Preference& preference = *static_cast<const Preference*>(wanted);
    size_t m, n, k;
    if (Status status = check(*static_cast<const Desc*>(desc), la, lb, lc, ld, m, n, k)) return status;
    if (asked < 1) return refuse(INVALID_VALUE, "no algorithm is asked for");
    // What versions make of it differs.
    if (static_cast<const Desc*>(desc)->epilogue == EPILOGUE_BIAS && reinterpret_cast<uintptr_t>(static_cast<const Desc*>(desc)->bias) % 16 != 0)
        return refuse(INVALID_VALUE, "a bias that is no multiple of 16");
    // Otherwise partial sums may be rounded to the output's format, or added in any order.
    if (preference.reductions != 2) return refuse(NOT_SUPPORTED, "reduction schemes other than CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE are allowed");
    switch (refuses(*static_cast<const Desc*>(desc), la, lb, ld, k)) {
        case Refusal::SAID: return NOT_SUPPORTED;
        case Refusal::NOTHING_FOUND: return SUCCESS;
        case Refusal::NONE: break;
    }
    size_t workspace = k >= 32 ? std::min<size_t>(preference.workspace, 4096) : 0;
    Algo algo = {MAGIC, sum(*static_cast<const Desc*>(desc), la, lb, lc, ld), workspace, {}, {}, {}, {}};
    // As cublasLt.h says: the alignment of the bias is taken from the pointer.
    const uintptr_t bias_at = reinterpret_cast<uintptr_t>(static_cast<const Desc*>(desc)->bias);
    algo.bias_alignment = bias_at == 0 ? 1 : std::min<uint64_t>(256, bias_at & -bias_at);
    memcpy(algo.alignments, preference.alignments, sizeof algo.alignments);
    for (int number = 0; number < std::min(asked, OFFERED); number++) {
        algo.number = static_cast<uint64_t>(number);
        algo.is_refused = number == 1 || k % 16 == 14 || (number == 0 && k % 16 == 15);
        // Of the second it is said at once, of others only when they are launched.
        static_cast<Found*>(results)[number] = {algo, workspace, number == 1 ? NOT_SUPPORTED : SUCCESS, 1.0f, {}};
        *found = number + 1;
    }
    return SUCCESS;
}

EXPORT size_t cublasLtGetVersion() {
    const char* set = getenv("PCAE_EMULATED_CUBLASLT");
    return set != nullptr ? strtoul(set, nullptr, 10) : 130000;
}

EXPORT Status cublasLtMatmul(void*, const void* desc_handle, const void* alpha_at, const void* a, const void* a_layout, const void* b, const void* b_layout, const void* beta_at, const void* c,
                             const void* c_layout, void* d, const void* d_layout, const void* algo_at, void* workspace, size_t workspace_bytes, void* stream) {
    const Desc desc = *static_cast<const Desc*>(desc_handle);
    const Layout la = *static_cast<const Layout*>(a_layout), lb = *static_cast<const Layout*>(b_layout), lc = *static_cast<const Layout*>(c_layout), ld = *static_cast<const Layout*>(d_layout);
    size_t m, n, k;
    if (Status status = check(desc, la, lb, lc, ld, m, n, k)) return status;
    if (algo_at == nullptr) return refuse(NOT_SUPPORTED, "a product without an algorithm");
    const Algo algo = *static_cast<const Algo*>(algo_at);
    if (algo.magic != MAGIC || algo.product != sum(desc, la, lb, lc, ld)) return refuse(INVALID_VALUE, "the algorithm was found for another product");
    if (algo.is_refused) return NOT_SUPPORTED;
    if (algo.workspace > workspace_bytes) return refuse(INVALID_VALUE, "the algorithm wants " + std::to_string(algo.workspace) + " bytes and gets " + std::to_string(workspace_bytes));
    if (algo.workspace > 0 && reinterpret_cast<uintptr_t>(workspace) % 256 != 0) return refuse(INVALID_VALUE, "the workspace is no multiple of 256");
    const void* operands[] = {a, b, c, d};
    for (int i = 0; i < 4; i++)
        if (reinterpret_cast<uintptr_t>(operands[i]) % algo.alignments[i] != 0)
            return refuse(INVALID_VALUE, std::string("operand ") + "ABCD"[i] + " is no multiple of " + std::to_string(algo.alignments[i]) + ", for which the algorithm was found");
    if (la.type == R_8F_E4M3)
        for (const void* operand : {a, b, c, static_cast<const void*>(d)})
            if (reinterpret_cast<uintptr_t>(operand) % 16 != 0) return refuse(INVALID_VALUE, "an operand of a product of e4m3 is no multiple of 16");
    const void* bias = desc.epilogue == EPILOGUE_BIAS ? desc.bias : nullptr;
    if (desc.epilogue == EPILOGUE_BIAS && bias == nullptr) return refuse(INVALID_VALUE, "no bias");
    if (reinterpret_cast<uintptr_t>(bias) % algo.bias_alignment != 0)
        return refuse(INVALID_VALUE, "the bias is no multiple of " + std::to_string(algo.bias_alignment) + ", for which the algorithm was found");
    // By value, as they are now: both are in host memory.
    const float alpha = *static_cast<const float*>(alpha_at), beta = *static_cast<const float*>(beta_at);

    auto run = [=](std::string& error) {
        const struct {
            const char* name;
            const void* at;
            size_t bytes;
        } pieces[] = {{"A", a, la.bytes()}, {"B", b, lb.bytes()}, {"C", beta != 0 ? c : d, lc.bytes()}, {"D", d, ld.bytes()}, {"bias", bias, bias != nullptr ? m * ld.size() : 0},
                      {"workspace", workspace, algo.workspace}, {"the scale of A", desc.a_scale, desc.a_scale != nullptr ? sizeof(float) : 0}};
        std::string product = "cublasLtMatmul [" + std::to_string(m) + ", " + std::to_string(k) + "] @ [" + std::to_string(k) + ", " + std::to_string(n) + "]";
        auto overlap = [](const void* p, size_t p_bytes, const void* q, size_t q_bytes) {
            uintptr_t x = reinterpret_cast<uintptr_t>(p), y = reinterpret_cast<uintptr_t>(q);
            return p_bytes > 0 && q_bytes > 0 && x < y + q_bytes && y < x + p_bytes;
        };
        for (const auto& piece : pieces) {
            if (piece.bytes > 0 && !emulated_is_device(piece.at, piece.bytes)) {
                error = product + ": " + piece.name + " is no memory of the device";
                return;
            }
            bool in_place = piece.at == d && lc == ld && piece.name[0] == 'C';
            if (piece.at != d && !in_place && overlap(piece.at, piece.bytes, d, ld.bytes())) {
                error = product + ": " + piece.name + " overlaps with D";
                return;
            }
        }
        if (a == d || b == d || bias == d) {
            error = product + ": an operand is D";
            return;
        }
        memset(workspace, 0xff, algo.workspace);
        // In the memory of the device: as it is when the product runs.
        const float factor = desc.a_scale != nullptr ? alpha * *desc.a_scale : alpha;
        if (algo.number != FASTEST) emulated_spend(NANOSECONDS);
        // In f32, op(A) as [k][m] and op(B) as [n][k], filled up to whole tiles.
        size_t rows = (m + ROWS - 1) / ROWS * ROWS, columns = (n + COLUMNS - 1) / COLUMNS * COLUMNS;
        std::vector<float> left(rows * k), right(columns * k);
        for (size_t p = 0; p < k; p++)
            for (size_t i = 0; i < m; i++) left[p * rows + i] = load(a, desc.transpose_a ? i * static_cast<size_t>(la.leading) + p : p * static_cast<size_t>(la.leading) + i, la.type);
        for (size_t j = 0; j < n; j++)
            for (size_t p = 0; p < k; p++) right[j * k + p] = load(b, desc.transpose_b ? p * static_cast<size_t>(lb.leading) + j : j * static_cast<size_t>(lb.leading) + p, lb.type);
        for (size_t j0 = 0; j0 < n; j0 += COLUMNS)
            for (size_t i0 = 0; i0 < m; i0 += ROWS) {
                float sums[COLUMNS][ROWS];
                tile(sums, &left[i0], rows, &right[j0 * k], k, k);
                for (size_t j = j0; j < std::min(n, j0 + COLUMNS); j++)
                    for (size_t i = i0; i < std::min(m, i0 + ROWS); i++) {
                        float value = factor * sums[j - j0][i - i0];
                        if (beta != 0) value += beta * load(c, j * static_cast<size_t>(lc.leading) + i, lc.type);
                        if (bias != nullptr) value += load(bias, i, ld.type);
                        store(d, j * static_cast<size_t>(ld.leading) + i, ld.type, value);
                    }
            }
    };
    return emulated_enqueue(stream, "cublasLtMatmul", run) == 0 ? SUCCESS : INVALID_VALUE;
}
