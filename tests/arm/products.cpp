// One product of an expert's matrix with the rows of a group on ggml's CPU backend, in three ways, marked on stderr so that
// an emulator's trace can be cut into them. rows: as moe-edge computes prefill where ggml has no tiled kernels, MUL_MAT_ID
// on the weights as they are. gemm: MUL_MAT on the repacked matrix. gemv: MUL_MAT_ID on it, which is what stock llama.cpp
// does with repacked experts. The last word is a hash of the bits.
// Usage: products TYPE COLUMNS WEIGHT_ROWS GROUP...; WEIGHT_ROWS a multiple of 8; see count.py
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

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

static uint64_t hash_of(const ggml_tensor * t) {
    uint64_t hash = 1469598103934665603ull;
    for (size_t i = 0; i < ggml_nbytes(t); i++) {
        hash = (hash ^ static_cast<const unsigned char *>(t->data)[i]) * 1099511628211ull;
    }
    return hash;
}

// Between two lines of these on stderr, the emulator's trace holds the instructions of one way.
static void mark(const char * what, int64_t n, uint64_t hash) {
    fprintf(stderr, "mark %s %lld %016llx\n", what, static_cast<long long>(n), static_cast<unsigned long long>(hash));
}

int main(int argc, char ** argv) {
    if (argc < 5) return 2;
    const ggml_type type = type_named(argv[1]);
    const int64_t cols = atoll(argv[2]), weight_rows = atoll(argv[3]);
    ggml_log_set(silent, nullptr);
    constexpr int64_t N_DIFFERENT = 8;  // rows, then again the same: quantizing is the slowest thing in an emulator
    std::vector<float> w(static_cast<size_t>(cols * N_DIFFERENT));
    uint32_t state = 1;
    auto next = [&] { state = state * 1664525u + 1013904223u; return static_cast<float>(state >> 8) / 16777216.0f - 0.5f; };
    for (float & v : w) v = next();
    const size_t part = ggml_row_size(type, cols) * N_DIFFERENT;
    std::vector<char> quantized(part * static_cast<size_t>(weight_rows / N_DIFFERENT));
    ggml_quantize_chunk(type, w.data(), quantized.data(), 0, N_DIFFERENT, cols, nullptr);
    for (size_t at = part; at < quantized.size(); at += part) memcpy(quantized.data() + at, quantized.data(), part);
    ggml_backend_t cpu = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(cpu, 1);
    for (int arg = 4; arg < argc; arg++) {
        const int64_t n = atoll(argv[arg]);
        std::vector<float> x(static_cast<size_t>(cols * n));
        for (float & v : x) v = next();
        for (const char * how : {"rows", "gemm", "gemv"}) {
            ggml_context * ctx = ggml_init({ggml_tensor_overhead() * 64 + 2 * ggml_graph_overhead(), nullptr, true});
            const bool plain = strcmp(how, "rows") == 0, id = strcmp(how, "gemm") != 0;
            Product p = product(ctx, type, cols, weight_rows, n, id, plain ? ggml_backend_cpu_buffer_type() : repack_type(), x);
            if (!plain && !p.weights->extra) continue;  // ggml has no repacked form for this processor
            mark("begin", n, 0);
            ggml_backend_tensor_set(p.weights, quantized.data(), 0, quantized.size());
            mark(plain ? "copy" : "repack", n, 0);
            if (ggml_backend_graph_compute(cpu, p.graph) != GGML_STATUS_SUCCESS) return 1;
            mark(how, n, hash_of(p.out));
            ggml_free(ctx);
        }
    }
    return 0;
}
