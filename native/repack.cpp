#include "repack.h"

#include <algorithm>
#include <cstring>
#include <mutex>

#include "capi.h"
#include "ggml-cpu.h"

namespace moe_edge {

constexpr size_t TILE_BYTES = 128u << 10;  // of weights: many tiles for the threads to share, few graphs
constexpr int64_t TILE_OPERANDS = 16;      // rows of the input multiplied at a time
constexpr int64_t INTERLEAVED = 8;         // the most weight rows that ggml interleaves

// Types that gain on ARM: repacking a matrix pays after one row of input or two, and each row after that takes 1.3 to 3.8
// times fewer instructions, the fewer the more rows come together. Other types repack at the price of ten rows and more, or
// gain nothing. Counted in emulation (tests/arm/count.py; docs/LOG.md, 2026-11-28). On x86-64 tiled kernels serve many rows.
static bool gains(ggml_type type) {
#ifdef __aarch64__
    return type == GGML_TYPE_Q4_0 || type == GGML_TYPE_MXFP4;
#else
    return type == GGML_TYPE_COUNT;
#endif
}

// ---- ggml's repacked form of a type -----------------------------------------------------------------------------------

static thread_local bool g_repacking = false;

void log_without_repacking(ggml_log_level level, const char * text, void * user) {
    if (!g_repacking && user) reinterpret_cast<void (*)(ggml_log_level, const char *, void *)>(user)(level, text, nullptr);
}

struct Form {
    bool known = false;
    ggml_backend_buffer_t buffer = nullptr;  // of CPU_REPACK; tells ggml that a tensor's data are repacked
    void * extra = nullptr;                  // how; null: not on this processor
    Kernel kernel = Kernel::PLAIN;           // GEMM or GEMV
};

static std::mutex g_forms_mutex;
static Form g_forms[GGML_TYPE_COUNT][2];  // of matrices whose rows are a multiple of 4 only, of 8

static Form & form_of(ggml_type type, int64_t n_weight_rows) { return g_forms[type][n_weight_rows % INTERLEAVED == 0]; }

ggml_backend_buffer_type_t * extra_buffer_types() {
    ggml_backend_dev_t dev = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    if (!dev) return nullptr;
    const auto get = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
        ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(dev), "ggml_backend_dev_get_extra_bufts"));
    return get ? get(dev) : nullptr;
}

bool is_repacked_buffer_type(ggml_backend_buffer_type_t type) { return strcmp(ggml_backend_buft_name(type), "CPU_REPACK") == 0; }

ggml_backend_buffer_type_t repacked_buffer_type() {
    for (ggml_backend_buffer_type_t * type = extra_buffer_types(); type && *type; type++) {
        if (is_repacked_buffer_type(*type)) return *type;
    }
    return nullptr;
}

// A matrix in that form; its data are the caller's.
static ggml_tensor matrix_of(ggml_type type, int64_t n_cols, int64_t n_weight_rows, const Form & form) {
    ggml_tensor t = {};
    const size_t row = ggml_row_size(type, n_cols), whole = row * static_cast<size_t>(n_weight_rows);
    t.type = type;
    t.ne[0] = n_cols;
    t.ne[1] = n_weight_rows;
    t.ne[2] = t.ne[3] = 1;
    t.nb[0] = ggml_type_size(type);
    t.nb[1] = row;
    t.nb[2] = t.nb[3] = whole;
    t.buffer = form.buffer;
    t.extra = form.extra;
    return t;
}

// Some rows at a time go aside, and come back interleaved: ggml repacks from one place to another.
void repack_in_place(ggml_type type, int64_t n_cols, int64_t n_weight_rows, char * weights) {
    static thread_local std::vector<char> aside;
    const size_t row = ggml_row_size(type, n_cols);
    const auto fit = static_cast<int64_t>(REPACK_BYTES / row);
    const int64_t step = std::max(INTERLEAVED, fit - fit % INTERLEAVED);
    aside.resize(std::max(aside.size(), row * static_cast<size_t>(std::min(step, n_weight_rows))));
    for (int64_t from = 0; from < n_weight_rows; from += step) {
        const int64_t n = std::min(step, n_weight_rows - from);
        ggml_tensor t = matrix_of(type, n_cols, n, form_of(type, n_weight_rows));
        t.data = weights + static_cast<size_t>(from) * row;
        memcpy(aside.data(), t.data, row * static_cast<size_t>(n));
        g_repacking = true;
        ggml_backend_tensor_set(&t, aside.data(), 0, row * static_cast<size_t>(n));
        g_repacking = false;
    }
}

// A tensor in a buffer of CPU_REPACK learns from ggml how its type is repacked. The buffer stays: later tensors name it,
// with data of their own.
static void ask_ggml(Form & form, ggml_type type, int64_t n_weight_rows) {
    ggml_backend_buffer_type_t where = repacked_buffer_type();
    if (!where) return;
    ggml_context * ctx = ggml_init({ggml_tensor_overhead(), nullptr, true});
    ggml_tensor * t = ggml_new_tensor_2d(ctx, type, ggml_blck_size(type), n_weight_rows);
    form.buffer = ggml_backend_buft_alloc_buffer(where, ggml_nbytes(t) + ggml_backend_buft_get_alignment(where));
    if (form.buffer && ggml_backend_tensor_alloc(form.buffer, t, ggml_backend_buffer_get_base(form.buffer)) == GGML_STATUS_SUCCESS) {
        form.extra = t->extra;
    }
    ggml_free(ctx);
    if (form.buffer && !form.extra) {
        ggml_backend_buffer_free(form.buffer);
        form.buffer = nullptr;
    }
}

// Whether GEMM gives the bits of GEMV: both multiply the same random matrix with every number of rows that a tile takes.
// How a kernel rounds does not depend on the numbers, so one matrix of several blocks and tiles tells.
static bool gemm_is_gemv(ggml_type type, int64_t n_weight_rows) {
    const int64_t n_cols = std::max<int64_t>(512, 2 * ggml_blck_size(type));
    uint32_t state = 1;
    auto random = [&] {
        state = state * 1664525u + 1013904223u;
        return static_cast<float>(state >> 8) / 16777216.0f - 0.5f;
    };
    std::vector<float> w(static_cast<size_t>(n_cols * n_weight_rows)), x(static_cast<size_t>(n_cols * TILE_OPERANDS));
    for (float & v : w) v = random();
    for (float & v : x) v = random();
    std::vector<char> weights(ggml_row_size(type, n_cols) * static_cast<size_t>(n_weight_rows));
    ggml_quantize_chunk(type, w.data(), weights.data(), 0, n_weight_rows, n_cols, nullptr);
    repack_in_place(type, n_cols, n_weight_rows, weights.data());
    Tile tile;
    auto product = [&](Kernel kernel, int64_t n) {
        std::vector<float> out(static_cast<size_t>(n_weight_rows * n));
        std::vector<Operand> operands;
        for (int64_t i = 0; i < n; i++) {
            operands.push_back({reinterpret_cast<const char *>(x.data() + i * n_cols), out.data() + i * n_weight_rows});
        }
        const DotTask task{weights.data(), type, kernel, n_cols, n_weight_rows, operands.data(), n};
        if (!tile.multiply(task, 0, n_weight_rows)) out.clear();
        return out;
    };
    for (int64_t n = 1; n <= TILE_OPERANDS; n++) {
        const std::vector<float> gemv = product(Kernel::GEMV, n), gemm = product(Kernel::GEMM, n);
        if (gemv.empty() || gemm.size() != gemv.size()) return false;
        if (memcmp(gemv.data(), gemm.data(), gemv.size() * sizeof(float)) != 0) return false;
    }
    return true;
}

Kernel kernel_of(ggml_type type, int64_t n_cols, int64_t n_weight_rows, int32_t repacking) {
    if (repacking == ME_REPACK_NEVER || (repacking == ME_REPACK_AUTO && !gains(type))) return Kernel::PLAIN;
    const int64_t block = type >= 0 && type < GGML_TYPE_COUNT ? ggml_blck_size(type) : 0;
    if (block == 0 || n_cols % block != 0 || n_weight_rows % 4 != 0) return Kernel::PLAIN;
    std::lock_guard<std::mutex> lock(g_forms_mutex);
    Form & form = form_of(type, n_weight_rows);
    if (!form.known) {
        const int64_t n = n_weight_rows % INTERLEAVED == 0 ? 3 * INTERLEAVED : 3 * INTERLEAVED + 4;
        ask_ggml(form, type, n);
        if (form.extra) form.kernel = gemm_is_gemv(type, n) ? Kernel::GEMM : Kernel::GEMV;
        form.known = true;
    }
    return form.kernel;
}

// ---- a tile -------------------------------------------------------------------------------------------------------------

constexpr size_t TILE_NODES = 4;

static void grow(std::vector<char> & v, size_t bytes) {
    if (v.size() < bytes) v.resize(bytes);
}

Tile::Tile() : cpu_(ggml_backend_cpu_init()) {
    const ggml_threadpool_params params = ggml_threadpool_params_default(1);
    pool_ = ggml_threadpool_new(const_cast<ggml_threadpool_params *>(&params));
    ggml_backend_cpu_set_n_threads(cpu_, 1);
    if (pool_) ggml_backend_cpu_set_threadpool(cpu_, pool_);
    meta_.resize(ggml_tensor_overhead() * TILE_NODES + ggml_graph_overhead_custom(TILE_NODES, false));
}

Tile::~Tile() {
    ggml_backend_free(cpu_);
    if (pool_) ggml_threadpool_free(pool_);
}

int64_t Tile::rows(ggml_type type, int64_t n_cols) {
    const auto fit = static_cast<int64_t>(TILE_BYTES / ggml_row_size(type, n_cols));
    return std::max(INTERLEAVED, fit - fit % INTERLEAVED);
}

int64_t Tile::bytes(ggml_type type, int64_t n_cols) {
    // the input, and the backend's copy in 8 bits and a scale for each block; the output
    return TILE_OPERANDS * (n_cols * 4 + n_cols * 2 + rows(type, n_cols) * 4) + 16384;
}

bool Tile::multiply(const DotTask & t, int64_t from, int64_t to) {
    for (int64_t i = 0; i < t.n_operands; i += TILE_OPERANDS) {
        if (!multiply_operands(t, from, to, t.operands + i, std::min(TILE_OPERANDS, t.n_operands - i))) return false;
    }
    return true;
}

// The rows of the input side by side, or one where it is; the output likewise.
bool Tile::multiply_operands(const DotTask & t, int64_t from, int64_t to, const Operand * operands, int64_t n) {
    const size_t x_bytes = static_cast<size_t>(t.n_cols) * sizeof(float), out_bytes = static_cast<size_t>(to - from) * sizeof(float);
    ggml_context * ctx = ggml_init({meta_.size(), meta_.data(), true});
    ggml_tensor weights = matrix_of(t.type, t.n_cols, to - from, form_of(t.type, t.n_weight_rows));
    weights.data = const_cast<char *>(t.weights) + static_cast<size_t>(from) * ggml_row_size(t.type, t.n_cols);
    ggml_tensor * x = t.kernel == Kernel::GEMM ? ggml_new_tensor_2d(ctx, GGML_TYPE_F32, t.n_cols, n)
                                               : ggml_new_tensor_3d(ctx, GGML_TYPE_F32, t.n_cols, 1, n);
    ggml_tensor * y = ggml_mul_mat(ctx, &weights, x);
    if (n == 1) {
        x->data = const_cast<char *>(operands[0].x);
        y->data = operands[0].out + from;
    } else {
        grow(x_, x_bytes * static_cast<size_t>(n));
        grow(out_, out_bytes * static_cast<size_t>(n));
        for (int64_t i = 0; i < n; i++) memcpy(x_.data() + static_cast<size_t>(i) * x_bytes, operands[i].x, x_bytes);
        x->data = x_.data();
        y->data = out_.data();
    }
    ggml_cgraph * graph = ggml_new_graph_custom(ctx, TILE_NODES, false);
    ggml_build_forward_expand(graph, y);
    const bool done = ggml_backend_graph_compute(cpu_, graph) == GGML_STATUS_SUCCESS;
    ggml_free(ctx);
    for (int64_t i = 0; n > 1 && i < n; i++) {
        memcpy(operands[i].out + from, out_.data() + static_cast<size_t>(i) * out_bytes, out_bytes);
    }
    return done;
}

}  // namespace moe_edge
