// One product of an expert's matrix with the rows of a group on ggml's CPU backend, in four ways, marked on stderr so that
// an emulator's trace can be cut into them. rows: MUL_MAT_ID on the weights as they are, without repacking. gemm: MUL_MAT on
// the repacked matrix. gemv: MUL_MAT_ID on it, which is what stock llama.cpp does with repacked experts. ours: what moe-edge
// does (native/repack.cpp), by gemm where that has gemv's bits. Behind each is a hash of its output.
// Usage: products TYPE COLUMNS WEIGHT_ROWS GROUP...; WEIGHT_ROWS a multiple of 8; see count.py
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "capi.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"
#include "repack.h"

static ggml_backend_buffer_type_t repack_type() {
    ggml_backend_dev_t dev = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    auto get = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
        ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(dev), "ggml_backend_dev_get_extra_bufts"));
    for (auto * t = get(dev); t && *t; t++) {
        if (strcmp(ggml_backend_buft_name(*t), "CPU_REPACK") == 0) return *t;
    }
    return nullptr;
}

struct Product {
    ggml_tensor * weights = nullptr, * out = nullptr;
    ggml_cgraph * graph = nullptr;
};

static ggml_type type_named(const char * name) {
    for (int t = 0; t < GGML_TYPE_COUNT; t++) {
        const char * n = ggml_type_name(static_cast<ggml_type>(t));
        if (n && strcmp(n, name) == 0) return static_cast<ggml_type>(t);
    }
    fprintf(stderr, "no type %s\n", name);
    exit(2);
}

// id: MUL_MAT_ID with one expert, else MUL_MAT.
static Product product(ggml_context * ctx, ggml_type type, int64_t cols, int64_t weight_rows, int64_t n, bool id,
                       ggml_backend_buffer_type_t where, std::vector<float> & x) {
    Product p;
    ggml_tensor * rows;
    if (id) {
        p.weights = ggml_new_tensor_3d(ctx, type, cols, weight_rows, 1);
        rows = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, cols, 1, n);
        ggml_tensor * ids = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 1, n);
        ids->data = calloc(static_cast<size_t>(n), sizeof(int32_t));
        p.out = ggml_mul_mat_id(ctx, p.weights, rows, ids);
    } else {
        p.weights = ggml_new_tensor_2d(ctx, type, cols, weight_rows);
        rows = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, cols, n);
        p.out = ggml_mul_mat(ctx, p.weights, rows);
    }
    rows->data = x.data();
    p.out->data = malloc(ggml_nbytes(p.out));
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(where, ggml_nbytes(p.weights) + 4096);
    ggml_backend_tensor_alloc(buffer, p.weights, ggml_backend_buffer_get_base(buffer));
    p.graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(p.graph, p.out);
    return p;
}

// The library writes a line for each tensor it repacks; what is counted should not hold it.
static void silent(ggml_log_level, const char *, void *) {}

static uint64_t hash_of(const void * data, size_t bytes) {
    uint64_t hash = 1469598103934665603ull;
    for (size_t i = 0; i < bytes; i++) hash = (hash ^ static_cast<const unsigned char *>(data)[i]) * 1099511628211ull;
    return hash;
}

// Between two lines of these on stderr, the emulator's trace holds the instructions of one way.
static void mark(const char * what, int64_t n) { fprintf(stderr, "mark %s %lld\n", what, static_cast<long long>(n)); }

static void tell_bits(uint64_t hash) { fprintf(stderr, "bits %016llx\n", static_cast<unsigned long long>(hash)); }

// Everything twice, and marked the second time: the first call of a function asks the linker, and work space grows.
template <typename Way>
static void counted(const char * what, int64_t n, Way way) {
    way();
    mark("begin", n);
    way();
    mark(what, n);
}

struct Weights {
    ggml_type type;
    int64_t cols, rows;
    std::vector<char> bytes;
};

// One of ggml's own ways. False where ggml has no repacked form for this processor.
static bool count_ggml(const char * how, ggml_backend_t cpu, const Weights & w, std::vector<float> & x, int64_t n) {
    const bool plain = strcmp(how, "rows") == 0, id = strcmp(how, "gemm") != 0;
    ggml_context * ctx = ggml_init({ggml_tensor_overhead() * 64 + 2 * ggml_graph_overhead(), nullptr, true});
    Product p = product(ctx, w.type, w.cols, w.rows, n, id, plain ? ggml_backend_cpu_buffer_type() : repack_type(), x);
    const bool can = plain || p.weights->extra;
    if (can) {
        counted(plain ? "copy" : "repack", n, [&] { ggml_backend_tensor_set(p.weights, w.bytes.data(), 0, w.bytes.size()); });
        counted(how, n, [&] { if (ggml_backend_graph_compute(cpu, p.graph) != GGML_STATUS_SUCCESS) exit(1); });
        tell_bits(hash_of(p.out->data, ggml_nbytes(p.out)));
    }
    ggml_free(ctx);
    return can;
}

// As moe-edge does it: native/repack.cpp.
static void count_ours(const Weights & w, const std::vector<float> & x, int64_t n) {
    using namespace moe_edge;
    const Kernel kernel = kernel_of(w.type, w.cols, w.rows, ME_REPACK_ALWAYS);
    std::vector<char> bytes = w.bytes;
    counted("in_place", n, [&] {
        memcpy(bytes.data(), w.bytes.data(), bytes.size());
        repack_in_place(w.type, w.cols, w.rows, bytes.data());
    });
    std::vector<float> out(static_cast<size_t>(w.rows * n));
    std::vector<DotTask::Operand> operands;
    for (int64_t i = 0; i < n; i++) operands.push_back({reinterpret_cast<const char *>(x.data() + i * w.cols), out.data() + i * w.rows});
    const DotTask task{bytes.data(), w.type, kernel, w.cols, w.rows, operands.data(), n};
    const int64_t step = Tile::rows(w.type, w.cols);
    Tile tile;
    counted(kernel == Kernel::GEMM ? "ours_gemm" : "ours_gemv", n, [&] {
        for (int64_t from = 0; from < w.rows; from += step) {
            if (!tile.multiply(task, from, std::min(from + step, w.rows))) exit(1);
        }
    });
    tell_bits(hash_of(out.data(), out.size() * sizeof(float)));
}

int main(int argc, char ** argv) {
    if (argc < 5) return 2;
    ggml_log_set(silent, nullptr);
    Weights weights{type_named(argv[1]), atoll(argv[2]), atoll(argv[3]), {}};
    constexpr int64_t N_DIFFERENT = 8;  // rows, then again the same: quantizing is the slowest thing in an emulator
    std::vector<float> w(static_cast<size_t>(weights.cols * N_DIFFERENT));
    uint32_t state = 1;
    auto next = [&] { state = state * 1664525u + 1013904223u; return static_cast<float>(state >> 8) / 16777216.0f - 0.5f; };
    for (float & v : w) v = next();
    const size_t part = ggml_row_size(weights.type, weights.cols) * N_DIFFERENT;
    weights.bytes.resize(part * static_cast<size_t>(weights.rows / N_DIFFERENT));
    ggml_quantize_chunk(weights.type, w.data(), weights.bytes.data(), 0, N_DIFFERENT, weights.cols, nullptr);
    for (size_t at = part; at < weights.bytes.size(); at += part) memcpy(weights.bytes.data() + at, weights.bytes.data(), part);
    ggml_backend_t cpu = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(cpu, 1);
    for (int arg = 4; arg < argc; arg++) {
        const int64_t n = atoll(argv[arg]);
        std::vector<float> x(static_cast<size_t>(weights.cols * n));
        for (float & v : x) v = next();
        count_ggml("rows", cpu, weights, x, n);
        if (!count_ggml("gemm", cpu, weights, x, n)) continue;
        count_ggml("gemv", cpu, weights, x, n);
        count_ours(weights, x, n);
    }
    return 0;
}
