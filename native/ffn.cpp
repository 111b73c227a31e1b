#include "ffn.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "ggml-cpu.h"

namespace moe_edge {

constexpr size_t GRAPH_NODES = 64;
constexpr int64_t ROW_CHUNK = 64;   // weight rows a thread takes at a time
constexpr int64_t ROW_TILE = 16;    // weight rows kept in L1 while a group's rows pass over them, as in ggml

static ggml_type vec_dot_type(ggml_type weights) { return ggml_get_type_traits_cpu(weights)->vec_dot_type; }

static int64_t row_work_bytes(const Layer & l) { return l.n_ff * 4 * 7 + l.n_embd * 4 * 3 + 64; }

static int64_t large_rows(const Layer & l, int64_t n_tokens) {
    const int64_t fit = static_cast<int64_t>(WORK_BYTES) / row_work_bytes(l);
    return std::min(std::max<int64_t>(fit, BATCH_ROWS), std::max(n_tokens, BATCH_ROWS));
}

static int64_t small_rows(const Layer & l, int64_t n_tokens, int64_t n_used) {
    return std::min(n_tokens * n_used, (MANY_ROWS - 1) * static_cast<int64_t>(l.n_expert));
}

// ---- the custom nodes -------------------------------------------------------------------------------------------

// Quantize F32 rows, split among threads by blocks as ggml's own products do.
struct QuantizeTask {
    const char * src; size_t src_stride;
    char * dst; ggml_type type;
    int64_t n_cols, n_rows;
};

static void quantize_rows(const QuantizeTask & t, int ith, int nth) {
    const int64_t block = ggml_blck_size(t.type), n_blocks = t.n_cols / block;
    const int64_t from = ith * n_blocks / nth, to = (ith + 1) * n_blocks / nth;
    const size_t row = ggml_row_size(t.type, t.n_cols);
    const auto from_float = ggml_get_type_traits_cpu(t.type)->from_float;
    if (from == to) return;
    for (int64_t r = 0; r < t.n_rows; r++) {
        const float * src = reinterpret_cast<const float *>(t.src + static_cast<size_t>(r) * t.src_stride) + from * block;
        char * dst = t.dst + static_cast<size_t>(r) * row + static_cast<size_t>(from) * ggml_type_size(t.type);
        if (t.type == GGML_TYPE_F32) {
            memcpy(dst, src, static_cast<size_t>(to - from) * sizeof(float));
        } else {
            from_float(src, dst, (to - from) * block);
        }
    }
}

struct DotTask {  // out[row][0..n_rows) = weights . x[row], for the rows of one group
    const char * weights; ggml_type type;
    int64_t n_cols, n_weight_rows;
    struct Operand { const char * x; float * out; };
    const Operand * operands; int64_t n_operands;
};

static void dot_rows(const DotTask & t, int64_t from, int64_t to) {
    const auto vec_dot = ggml_get_type_traits_cpu(t.type)->vec_dot;
    const size_t row = ggml_row_size(t.type, t.n_cols);
    for (int64_t r0 = from; r0 < to; r0 += ROW_TILE) {
        const int64_t r1 = std::min(r0 + ROW_TILE, to);
        for (int64_t i = 0; i < t.n_operands; i++) {
            for (int64_t r = r0; r < r1; r++) {
                vec_dot(static_cast<int>(t.n_cols), t.operands[i].out + r, 0, t.weights + static_cast<size_t>(r) * row, 0,
                        t.operands[i].x, 0, 1);
            }
        }
    }
}

struct CopyTask { const char * src; char * dst; size_t bytes; };

struct Ffn::Task {
    std::vector<QuantizeTask> quantize;
    std::vector<DotTask> dots;
    std::vector<int64_t> chunk_start;  // cumulative chunks of dots
    std::vector<DotTask::Operand> operands;
    std::vector<CopyTask> copies;
    std::atomic<int64_t> next{0};

    void finish_dots() {
        chunk_start.assign(1, 0);
        size_t at = 0;
        for (DotTask & d : dots) {
            d.operands = operands.data() + at;
            at += static_cast<size_t>(d.n_operands);
            chunk_start.push_back(chunk_start.back() + (d.n_weight_rows + ROW_CHUNK - 1) / ROW_CHUNK);
        }
    }
};

struct FfnTasks {
    static void quantize(ggml_tensor *, int ith, int nth, void * arg) {
        for (const QuantizeTask & q : static_cast<Ffn::Task *>(arg)->quantize) quantize_rows(q, ith, nth);
    }
    static void dots(ggml_tensor *, int, int, void * arg) {
        Ffn::Task & t = *static_cast<Ffn::Task *>(arg);
        size_t d = 0;
        for (int64_t c = t.next.fetch_add(1); c < t.chunk_start.back(); c = t.next.fetch_add(1)) {
            while (c >= t.chunk_start[d + 1]) d++;
            const int64_t from = (c - t.chunk_start[d]) * ROW_CHUNK;
            dot_rows(t.dots[d], from, std::min(from + ROW_CHUNK, t.dots[d].n_weight_rows));
        }
    }
    static void copy(ggml_tensor *, int ith, int nth, void * arg) {
        const auto & copies = static_cast<Ffn::Task *>(arg)->copies;
        const size_t n = copies.size(), i = static_cast<size_t>(ith), of = static_cast<size_t>(nth);
        for (size_t c = i * n / of; c < (i + 1) * n / of; c++) memcpy(copies[c].dst, copies[c].src, copies[c].bytes);
    }
};

// ---- life -------------------------------------------------------------------------------------------------------

Ffn::Ffn() : cpu_(ggml_backend_cpu_init()) {
    meta_.resize(ggml_tensor_overhead() * GRAPH_NODES * 2 + ggml_graph_overhead_custom(GRAPH_NODES, false));
}

Ffn::~Ffn() {
    if (ctx_) ggml_free(ctx_);
    ggml_backend_free(cpu_);
}

void Ffn::set_threads(int n) {
    n_threads_ = n;
    ggml_backend_cpu_set_n_threads(cpu_, n);
}

ggml_context * Ffn::fresh_context() {
    if (ctx_) ggml_free(ctx_);
    ctx_ = ggml_init({meta_.size(), meta_.data(), true});
    work_used_ = 0;
    return ctx_;
}

char * Ffn::work(size_t bytes) {
    const size_t at = (work_used_ + 63) & ~static_cast<size_t>(63);
    if (at + bytes > work_.size()) return nullptr;
    work_used_ = at + bytes;
    return work_.data() + at;
}

static void grow(std::vector<char> & v, int64_t bytes) {
    if (static_cast<int64_t>(v.size()) < bytes) v.resize(static_cast<size_t>(bytes));
}

int64_t Ffn::scratch_bytes(const Model & m, int64_t n_ubatch, int64_t n_used, int n_threads) {
    int64_t most = 0;
    for (const Layer & l : m.layers) {
        const int64_t x = n_ubatch * l.n_embd * 4, quantized = x;  // a vec_dot type never exceeds F32; most take a quarter
        const int64_t work = large_rows(l, n_ubatch) * row_work_bytes(l) + 4096;
        const int64_t hidden = small_rows(l, n_ubatch, n_used) * l.n_ff * 4;
        const int64_t rows = n_ubatch * n_used * static_cast<int64_t>(sizeof(Row) + 4);
        most = std::max(most, x + quantized + work + hidden + rows);
    }
    // the CPU backend's own work buffer: ggml's tiled kernels take 512 KiB a thread
    return most + (int64_t{1} << 20) * n_threads + (int64_t{1} << 20);
}

void Ffn::begin(Step & s, const ggml_tensor * x) {
    const Layer & l = s.model->layers[static_cast<size_t>(s.layer_pos)];
    next_hidden_ = 0;
    const size_t row = static_cast<size_t>(l.n_embd) * sizeof(float);
    grow(x_, s.n_tokens * l.n_embd * 4);
    for (int64_t t = 0; t < s.n_tokens; t++) {
        memcpy(x_.data() + static_cast<size_t>(t) * row, static_cast<const char *>(x->data) + static_cast<size_t>(t) * x->nb[2], row);
    }
    for (auto & q : quantized_) q.valid = false;
    grow(work_, large_rows(l, s.n_tokens) * row_work_bytes(l) + 4096);
    grow(hidden_, small_rows(l, s.n_tokens, s.n_used) * l.n_ff * 4);
}

// ---- graphs -----------------------------------------------------------------------------------------------------

ggml_tensor * Ffn::custom(void (*fn)(ggml_tensor *, int, int, void *), ggml_tensor * after, void * arg) {
    static float nothing = 0;
    ggml_tensor * args[1] = {after};
    ggml_tensor * t = ggml_custom_4d(ctx_, GGML_TYPE_F32, 1, 1, 1, 1, args, after ? 1 : 0, fn, GGML_N_TASKS_MAX, arg);
    t->data = &nothing;
    return t;
}

const char * Ffn::x_rows(ggml_type type, const Step & s, std::vector<QuantizeTask> & tasks) {
    if (type == GGML_TYPE_F32) return x_.data();
    const int64_t n_embd = s.model->layers[static_cast<size_t>(s.layer_pos)].n_embd;
    auto q = std::find_if(quantized_.begin(), quantized_.end(), [&](const Quantized & e) { return e.type == type; });
    if (q == quantized_.end()) q = quantized_.insert(q, {type, {}, false});
    if (!q->valid) {
        grow(q->rows, static_cast<int64_t>(ggml_row_size(type, n_embd)) * s.n_tokens);
        tasks.push_back({x_.data(), static_cast<size_t>(n_embd) * sizeof(float), q->rows.data(), type, n_embd, s.n_tokens});
        q->valid = true;
    }
    return q->rows.data();
}

bool Ffn::compute(ggml_cgraph * graph, Step & s, std::string & error) {
    for (int i = 0; i < ggml_graph_n_nodes(graph); i++) {
        ggml_tensor * t = ggml_graph_node(graph, i);
        if (!t->data) t->data = work(ggml_nbytes(t));
        if (!t->data) {
            error = std::string("the activation of this model needs more work memory than planned, at '") + ggml_op_desc(t) + "'";
            return false;
        }
    }
    const auto t0 = std::chrono::steady_clock::now();
    const ggml_status status = ggml_backend_graph_compute(cpu_, graph);
    s.model->counters.compute_ns +=
        std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - t0).count();
    s.model->counters.graphs++;
    if (status != GGML_STATUS_SUCCESS) error = std::string("ggml could not compute the experts: ") + ggml_status_to_string(status);
    return status == GGML_STATUS_SUCCESS;
}

static ggml_tensor * f32_rows(ggml_context * ctx, int64_t n_cols, int64_t n_rows, char * data) {
    ggml_tensor * t = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n_cols, 1, n_rows);
    t->data = data;
    return t;
}

bool Ffn::activation(Step & s, ActivationInputs & in, int64_t n_rows, ggml_tensor ** out, std::string & error) {
    Layer & l = s.model->layers[static_cast<size_t>(s.layer_pos)];
    auto bias = [&](std::vector<float> & values) -> ggml_tensor * {
        if (values.empty()) return nullptr;
        ggml_tensor * t = ggml_new_tensor_2d(ctx_, GGML_TYPE_F32, l.n_ff, l.n_expert);
        t->data = values.data();
        return t;
    };
    in.n_ff = l.n_ff;
    in.bias_up = bias(l.bias_up);
    in.bias_gate = bias(l.bias_gate);
    *out = build_activation(ctx_, s.hidden, in, error);
    return *out != nullptr;
}

// The product tensors of a layer at the real width, in the work area.
static bool product_tensors(ggml_context * ctx, const Layer & l, int64_t n_rows, ActivationInputs & in, char * (*alloc)(void *, size_t),
                            void * self) {
    auto rows = [&](int64_t width) {
        return f32_rows(ctx, width, n_rows, alloc(self, static_cast<size_t>(width * n_rows) * sizeof(float)));
    };
    if (l.fused) {
        in.gate_up = rows(2 * l.n_ff);
        return in.gate_up->data != nullptr;
    }
    in.up = rows(l.n_ff);
    if (l.gated) in.gate = rows(l.n_ff);
    return in.up->data && (!in.gate || in.gate->data);
}

bool Ffn::run_small(Step & s, const std::vector<Group *> & ready, const std::vector<Group *> & hidden, std::string & error) {
    Model & m = *s.model;
    const Layer & l = m.layers[static_cast<size_t>(s.layer_pos)];
    ggml_context * ctx = fresh_context();
    ggml_cgraph * graph = ggml_new_graph_custom(ctx, GRAPH_NODES, false);
    Task quantize_x, up_dots, quantize_h, down_dots;
    ggml_tensor * last = nullptr;
    auto add_node = [&](void (*fn)(ggml_tensor *, int, int, void *), Task & t) {
        last = custom(fn, nullptr, &t);
        ggml_build_forward_expand(graph, last);
    };

    int64_t n_rows = 0;
    for (const Group * g : ready) n_rows += g->n_rows;
    if (n_rows > 0) {
        ActivationInputs in;
        const auto alloc = [](void * self, size_t n) { return static_cast<Ffn *>(self)->work(n); };
        if (!product_tensors(ctx, l, n_rows, in, alloc, this)) {
            error = "the work area is too small for one batch of experts";
            return false;
        }
        in.ids = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 1, n_rows);
        auto * ids = reinterpret_cast<int32_t *>(work(static_cast<size_t>(n_rows) * sizeof(int32_t)));
        in.ids->data = ids;
        int64_t at = 0;
        for (const Group * g : ready) {
            Unit & u = m.unit(g->unit);
            for (int p = 0; p < u.n_pieces; p++) {
                const Piece & piece = u.pieces[p];
                if (piece.projection == DOWN) continue;
                const ggml_type xt = vec_dot_type(piece.type);
                const char * x = x_rows(xt, s, quantize_x.quantize);
                ggml_tensor * out = piece.projection == UP ? in.up : piece.projection == GATE ? in.gate : in.gate_up;
                for (int64_t r = 0; r < g->n_rows; r++) {
                    const Row & row = s.rows[static_cast<size_t>(g->first_row + r)];
                    up_dots.operands.push_back({x + static_cast<size_t>(row.token) * ggml_row_size(xt, l.n_embd),
                                                static_cast<float *>(out->data) + (at + r) * out->ne[0]});
                }
                up_dots.dots.push_back({m.data(u, piece), piece.type, piece.cols, piece.rows, nullptr, g->n_rows});
            }
            for (int64_t r = 0; r < g->n_rows; r++) ids[at + r] = g->expert;
            at += g->n_rows;
        }
        up_dots.finish_dots();
        if (!quantize_x.quantize.empty()) add_node(FfnTasks::quantize, quantize_x);
        add_node(FfnTasks::dots, up_dots);
        ggml_tensor * h = nullptr;
        if (!activation(s, in, n_rows, &h, error)) return false;
        h->data = hidden_.data() + static_cast<size_t>(next_hidden_ * l.n_ff) * sizeof(float);
        ggml_build_forward_expand(graph, h);
    }

    // Where each group's hidden rows are: those computed in this graph come right after the earlier ones.
    std::vector<Group *> down;
    for (Group * g : ready) {
        g->hidden_row = next_hidden_;
        next_hidden_ += g->n_rows;
        g->state = Group::HIDDEN;
        if (m.unit(g->unit).ready & m.unit(g->unit).bit(DOWN)) down.push_back(g);
    }
    down.insert(down.end(), hidden.begin(), hidden.end());
    for (const Group * g : down) {
        Unit & u = m.unit(g->unit);
        const Piece & piece = u.piece(DOWN);
        const ggml_type ht = vec_dot_type(piece.type);
        const size_t row_bytes = ggml_row_size(ht, l.n_ff);
        const char * h = hidden_.data() + static_cast<size_t>(g->hidden_row * l.n_ff) * sizeof(float);
        const char * hq = h;
        if (ht != GGML_TYPE_F32) {
            char * dst = work(row_bytes * static_cast<size_t>(g->n_rows));
            if (!dst) {
                error = "the work area is too small for the hidden rows of one batch of experts";
                return false;
            }
            quantize_h.quantize.push_back({h, static_cast<size_t>(l.n_ff) * sizeof(float), dst, ht, l.n_ff, g->n_rows});
            hq = dst;
        }
        for (int64_t r = 0; r < g->n_rows; r++) {
            const Row & row = s.rows[static_cast<size_t>(g->first_row + r)];
            down_dots.operands.push_back({hq + static_cast<size_t>(r) * row_bytes,
                                          reinterpret_cast<float *>(s.out + static_cast<size_t>(row.slot) * s.out_nb1 +
                                                                    static_cast<size_t>(row.token) * s.out_nb2)});
        }
        down_dots.dots.push_back({m.data(u, piece), piece.type, piece.cols, piece.rows, nullptr, g->n_rows});
    }
    down_dots.finish_dots();
    if (!quantize_h.quantize.empty()) add_node(FfnTasks::quantize, quantize_h);
    if (!down.empty()) add_node(FfnTasks::dots, down_dots);
    if (!compute(graph, s, error)) return false;
    for (Group * g : down) g->state = Group::DONE;
    return true;
}

bool Ffn::run_large(Step & s, Group & g, std::string & error) {
    const Layer & l = s.model->layers[static_cast<size_t>(s.layer_pos)];
    const int64_t most = large_rows(l, s.n_tokens);
    for (int64_t from = 0; from < g.n_rows; from += most) {
        if (!run_large_rows(s, g, from, std::min(most, g.n_rows - from), error)) return false;
    }
    g.state = Group::DONE;
    return true;
}

bool Ffn::run_large_rows(Step & s, Group & g, int64_t from, int64_t n, std::string & error) {
    Model & m = *s.model;
    const Layer & l = m.layers[static_cast<size_t>(s.layer_pos)];
    Unit & u = m.unit(g.unit);
    ggml_context * ctx = fresh_context();
    ggml_cgraph * graph = ggml_new_graph_custom(ctx, GRAPH_NODES, false);
    Task quantize_x, gather, scatter;

    ggml_tensor * zero_ids = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 1, n);
    zero_ids->data = work(static_cast<size_t>(n) * sizeof(int32_t));
    ActivationInputs in;
    in.ids = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 1, n);
    in.ids->data = work(static_cast<size_t>(n) * sizeof(int32_t));
    std::fill_n(static_cast<int32_t *>(zero_ids->data), n, 0);
    std::fill_n(static_cast<int32_t *>(in.ids->data), n, g.expert);

    auto weights = [&](const Piece & p) {
        ggml_tensor * w = ggml_new_tensor_3d(ctx, p.type, p.cols, p.rows, 1);
        w->data = m.data(u, p);
        return w;
    };
    std::vector<ggml_tensor *> products;
    ggml_tensor * xg_by_type[GGML_TYPE_COUNT] = {};
    for (int p = 0; p < u.n_pieces; p++) {
        const Piece & piece = u.pieces[p];
        if (piece.projection == DOWN) continue;
        const ggml_type xt = vec_dot_type(piece.type);
        if (!xg_by_type[xt]) {
            const char * x = x_rows(xt, s, quantize_x.quantize);
            const size_t row_bytes = ggml_row_size(xt, l.n_embd);
            ggml_tensor * xg = ggml_new_tensor_3d(ctx, xt, l.n_embd, 1, n);
            xg->data = work(row_bytes * static_cast<size_t>(n));
            if (!xg->data) {
                error = "the work area is too small for the rows of one expert";
                return false;
            }
            for (int64_t r = 0; r < n; r++) {
                const Row & row = s.rows[static_cast<size_t>(g.first_row + from + r)];
                gather.copies.push_back({x + static_cast<size_t>(row.token) * row_bytes,
                                         static_cast<char *>(xg->data) + static_cast<size_t>(r) * row_bytes, row_bytes});
            }
            xg_by_type[xt] = xg;
        }
        ggml_tensor * product = ggml_mul_mat_id(ctx, weights(piece), xg_by_type[xt], zero_ids);
        product->data = work(ggml_nbytes(product));
        if (!product->data) {
            error = "the work area is too small for the products of one expert";
            return false;
        }
        (piece.projection == UP ? in.up : piece.projection == GATE ? in.gate : in.gate_up) = product;
        products.push_back(product);
    }
    if (!quantize_x.quantize.empty()) ggml_build_forward_expand(graph, custom(FfnTasks::quantize, nullptr, &quantize_x));
    ggml_build_forward_expand(graph, custom(FfnTasks::copy, nullptr, &gather));
    for (ggml_tensor * p : products) ggml_build_forward_expand(graph, p);
    ggml_tensor * h = nullptr;
    if (!activation(s, in, n, &h, error)) return false;
    ggml_tensor * y = ggml_mul_mat_id(ctx, weights(u.piece(DOWN)), h, zero_ids);
    y->data = work(ggml_nbytes(y));
    if (!y->data) {
        error = "the work area is too small for the output of one expert";
        return false;
    }
    ggml_build_forward_expand(graph, y);
    const size_t out_bytes = static_cast<size_t>(l.n_embd) * sizeof(float);
    for (int64_t r = 0; r < n; r++) {
        const Row & row = s.rows[static_cast<size_t>(g.first_row + from + r)];
        scatter.copies.push_back({static_cast<const char *>(y->data) + static_cast<size_t>(r) * out_bytes,
                                  s.out + static_cast<size_t>(row.slot) * s.out_nb1 + static_cast<size_t>(row.token) * s.out_nb2, out_bytes});
    }
    ggml_build_forward_expand(graph, custom(FfnTasks::copy, nullptr, &scatter));
    return compute(graph, s, error);
}

}  // namespace moe_edge
