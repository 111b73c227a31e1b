#include "ffn.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "few_rows.h"
#include "ggml-cpu.h"

namespace moe_edge {

constexpr size_t GRAPH_NODES = 64;
constexpr int64_t ROW_CHUNK = 64;   // weight rows a thread takes at a time
constexpr int64_t ROW_TILE = 16;    // weight rows kept in L1 while a group's rows pass over them, as in ggml

static_assert(FEW_ROWS == MANY_ROWS - 1, "the kernels change their order where ggml changes its product");
static_assert(MOST_FEW_ROWS <= BATCH_ROWS, "a group that a kernel takes fits into one graph of small groups");

static ggml_type vec_dot_type(ggml_type weights) { return ggml_get_type_traits_cpu(weights)->vec_dot_type; }

// What a product's input rows are in.
static ggml_type input_type(const Piece & p) { return p.kernel == Kernel::PLAIN ? vec_dot_type(p.type) : GGML_TYPE_F32; }

// Products and activations of one row, its input, and its output or its hidden row as the down product takes it.
static int64_t row_work_bytes(const Layer & l) {
    const int64_t n_tensors = std::max(5, l.activation_tensors + 1);
    return l.n_ff * 4 * n_tensors + l.n_embd * 4 + std::max(l.n_embd * 4, l.n_ff * 2) + 64;
}

static int64_t most_rows(const Layer & l, int64_t n_tokens) {
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

// Whether a product with so many rows, MANY_ROWS or more, is made by `dots` and not by a product node of ggml's.
static bool has_dots(const Piece & p, int64_t n_rows) {
    return p.kernel != Kernel::PLAIN || few_rows_kernel(p.type, p.cols, n_rows) != nullptr;
}

static int64_t chunk_rows(const DotTask & t) { return t.kernel == Kernel::PLAIN ? ROW_CHUNK : Tile::rows(t.type, t.n_cols); }

static void dot_rows(const DotTask & t, int64_t from, int64_t to) {
    if (multiply_few_rows(t.type, t.n_cols, t.weights, from, to, t.operands, t.n_operands)) return;
    const size_t row = ggml_row_size(t.type, t.n_cols);
    const auto vec_dot = ggml_get_type_traits_cpu(t.type)->vec_dot;
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

// sum[t] = ((e0*w0 + e1*w1) + e2*w2) ..., each e times its expert's scale where there is one: ggml's MUL and ADD nodes in
// one pass, rounded as they round (built with -ffp-contract=off).
static void sum_tokens(const Step & s, int64_t n_embd, int64_t from, int64_t to) {
    constexpr int64_t TILE = 512;
    for (int64_t t = from; t < to; t++) {
        const float * w = s.weights.data() + t * s.n_used;
        float * sum = reinterpret_cast<float *>(s.sum) + t * n_embd;
        for (int64_t c = 0; c < n_embd; c += TILE) {
            const int64_t n = std::min(TILE, n_embd - c);
            float acc[TILE];
            for (int64_t j = 0; j < s.n_used; j++) {
                const float * e = reinterpret_cast<const float *>(s.out + static_cast<size_t>(j) * s.out_nb1 +
                                                                  static_cast<size_t>(t) * s.out_nb2) + c;
                const float wj = w[j];
                if (s.down_scale) {
                    const float scale = s.down_scale[s.ids[static_cast<size_t>(t * s.n_used + j)]];
                    for (int64_t i = 0; i < n; i++) {
                        const float y = (e[i] * scale) * wj;
                        acc[i] = j == 0 ? y : acc[i] + y;
                    }
                } else if (j == 0) {
                    for (int64_t i = 0; i < n; i++) acc[i] = e[i] * wj;
                } else {
                    for (int64_t i = 0; i < n; i++) acc[i] = acc[i] + e[i] * wj;
                }
            }
            memcpy(sum + c, acc, static_cast<size_t>(n) * sizeof(float));
        }
    }
}

struct CopyTask { const char * src; char * dst; size_t bytes; };

struct Ffn::Task {
    std::vector<QuantizeTask> quantize;
    std::vector<DotTask> dots;
    std::vector<int64_t> chunk_start;  // cumulative chunks of dots
    std::vector<Operand> operands;
    std::vector<CopyTask> copies;
    const std::vector<Tile *> * tiles = nullptr;  // for dots
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};

    void finish_dots(const Lane & lane) {
        tiles = &lane.tiles;
        chunk_start.assign(1, 0);
        size_t at = 0;
        for (DotTask & d : dots) {
            d.operands = operands.data() + at;
            at += static_cast<size_t>(d.n_operands);
            chunk_start.push_back(chunk_start.back() + (d.n_weight_rows + chunk_rows(d) - 1) / chunk_rows(d));
        }
    }
};

struct FfnTasks {
    static void quantize(ggml_tensor *, int ith, int nth, void * arg) {
        for (const QuantizeTask & q : static_cast<Ffn::Task *>(arg)->quantize) quantize_rows(q, ith, nth);
    }
    static void dots(ggml_tensor *, int ith, int, void * arg) {
        Ffn::Task & t = *static_cast<Ffn::Task *>(arg);
        size_t d = 0;
        for (int64_t c = t.next.fetch_add(1); c < t.chunk_start.back(); c = t.next.fetch_add(1)) {
            while (c >= t.chunk_start[d + 1]) d++;
            const DotTask & dot = t.dots[d];
            const int64_t from = (c - t.chunk_start[d]) * chunk_rows(dot), to = std::min(from + chunk_rows(dot), dot.n_weight_rows);
            if (dot.kernel == Kernel::PLAIN) {
                dot_rows(dot, from, to);
            } else if (!(*t.tiles)[static_cast<size_t>(ith)]->multiply(dot, from, to)) {
                t.failed = true;
            }
        }
    }
    static void sum(ggml_tensor *, int ith, int nth, void * arg) {
        const Step & s = *static_cast<const Step *>(arg);
        const int64_t n_embd = s.model->layers[static_cast<size_t>(s.layer_pos)].n_embd;
        sum_tokens(s, n_embd, ith * s.n_tokens / nth, (ith + 1) * s.n_tokens / nth);
    }
    static void work(ggml_tensor *, int ith, int, void * arg) { (*static_cast<std::function<void(int)> *>(arg))(ith); }
    static void copy(ggml_tensor *, int ith, int nth, void * arg) {
        const auto & copies = static_cast<Ffn::Task *>(arg)->copies;
        const size_t n = copies.size(), i = static_cast<size_t>(ith), of = static_cast<size_t>(nth);
        for (size_t c = i * n / of; c < (i + 1) * n / of; c++) memcpy(copies[c].dst, copies[c].src, copies[c].bytes);
    }
};

// Whether a group is computed by dot products in one graph: of up to MANY_ROWS - 1 rows always, of some more where kernels
// give the bits of ggml's products of many rows.
static bool takes_dots(const Unit & u, int64_t n_rows) {
    if (n_rows < MANY_ROWS) return true;
    if (n_rows > MOST_FEW_ROWS) return false;
    for (int p = 0; p < u.n_pieces; p++) {
        if (!few_rows_kernel(u.pieces[p].type, u.pieces[p].cols, n_rows)) return false;
    }
    return true;
}

// ---- life -------------------------------------------------------------------------------------------------------

static std::atomic<ggml_threadpool *> g_pool{nullptr};
static std::atomic<int> g_pool_threads{0};

void set_shared_pool(ggml_threadpool * pool, int n_threads) {
    g_pool = pool;
    g_pool_threads = n_threads;
}

void forget_shared_pool(ggml_threadpool * pool) {
    if (g_pool == pool) set_shared_pool(nullptr, 0);
}

Lane::Lane(int n_threads) : cpu(ggml_backend_cpu_init()) {
    ggml_backend_cpu_set_n_threads(cpu, n_threads);
    if (n_threads > 1 && n_threads == g_pool_threads) ggml_backend_cpu_set_threadpool(cpu, g_pool);
    meta.resize(ggml_tensor_overhead() * GRAPH_NODES * 2 + ggml_graph_overhead_custom(GRAPH_NODES, false));
}

Lane::~Lane() {
    if (ctx) ggml_free(ctx);
    ggml_backend_free(cpu);
}

ggml_context * Lane::fresh_context() {
    if (ctx) ggml_free(ctx);
    ctx = ggml_init({meta.size(), meta.data(), true});
    used = 0;
    return ctx;
}

char * Lane::work(size_t bytes) {
    const size_t at = (used + 63) & ~static_cast<size_t>(63);
    if (at + bytes > work_area.size()) return nullptr;
    used = at + bytes;
    return work_area.data() + at;
}

Ffn::Ffn() {
    set_threads(1);
    try_few_rows();  // here, where no thread waits for it
}

void Ffn::set_threads(int n) {
    if (n == n_threads_) return;
    n_threads_ = n;
    all_ = std::make_unique<Lane>(n);
    own_.clear();
    tiles_.clear();
    for (int i = 0; i < n; i++) {
        own_.push_back(std::make_unique<Lane>(1));
        tiles_.push_back(std::make_unique<Tile>());
        own_.back()->tiles.push_back(tiles_.back().get());
        all_->tiles.push_back(tiles_.back().get());
    }
}

static void grow(std::vector<char> & v, int64_t bytes) {
    if (static_cast<int64_t>(v.size()) < bytes) v.resize(static_cast<size_t>(bytes));
}

static int64_t lane_bytes(const Layer & l, int64_t n_tokens) { return most_rows(l, n_tokens) * row_work_bytes(l) + 4096; }

void Ffn::reserve(Lane & lane, const Step & s, int64_t hidden_rows) {
    const Layer & l = s.model->layers[static_cast<size_t>(s.layer_pos)];
    grow(lane.work_area, lane_bytes(l, s.n_tokens));
    grow(lane.hidden, hidden_rows * l.n_ff * 4);
}

void Ffn::choose_kernels(Model & m, int32_t repacking) {
    for (int id = 0; id < m.n_units(); id++) {
        Unit & u = m.unit(id);
        for (int p = 0; p < u.n_pieces; p++) {
            Piece & piece = u.pieces[p];
            piece.kernel = kernel_of(piece.type, piece.cols, piece.rows, repacking);
            if (piece.kernel == Kernel::PLAIN) continue;
            const auto eight_rows = static_cast<int64_t>(8 * ggml_row_size(piece.type, piece.cols));
            m.tile_bytes = std::max(m.tile_bytes, Tile::bytes(piece.type, piece.cols));
            m.rearranging_bytes = std::max({m.rearranging_bytes, static_cast<int64_t>(REPACK_BYTES), eight_rows});
        }
    }
    m.rearrange = [](const Piece & p, char * data) { repack_in_place(p.type, p.cols, p.rows, data); };
}

int64_t Ffn::scratch_bytes(const Model & m, int64_t n_ubatch, int64_t n_used, int n_threads) {
    int64_t most = 0;
    for (const Layer & l : m.layers) {
        const int64_t x = n_ubatch * l.n_embd * 4, quantized = x;  // a vec_dot type never exceeds F32; most take a quarter
        // a lane: work area, hidden rows, and the backend's copy of the down product's input in the type of its kernel
        const int64_t lane = lane_bytes(l, n_ubatch) + MOST_FEW_ROWS * l.n_ff * 4 + most_rows(l, n_ubatch) * l.n_ff * 2;
        const int64_t lanes = (n_threads + 1) * lane;
        const int64_t hidden = small_rows(l, n_ubatch, n_used) * l.n_ff * 4;
        const int64_t rows = n_ubatch * n_used * static_cast<int64_t>(sizeof(Row) + 4);
        const int64_t routed = l.router.early ? routed_bytes(l.n_expert, n_ubatch) : 0;
        most = std::max(most, x + quantized + lanes + hidden + rows + routed);
    }
    // the CPU backends' own work buffers: ggml's tiled kernels take 512 KiB a thread
    return most + m.tile_bytes * n_threads + m.rearranging_bytes * 2 * m.io_threads() + (int64_t{1} << 20) * n_threads + (int64_t{1} << 20);
}

void Ffn::begin(Step & s, const ggml_tensor * x) {
    const Layer & l = s.model->layers[static_cast<size_t>(s.layer_pos)];
    const size_t row = static_cast<size_t>(l.n_embd) * sizeof(float);
    grow(x_, s.n_tokens * l.n_embd * 4);
    for (int64_t t = 0; t < s.n_tokens; t++) {
        memcpy(x_.data() + static_cast<size_t>(t) * row, static_cast<const char *>(x->data) + static_cast<size_t>(t) * x->nb[2], row);
    }
    for (auto & q : quantized_) q.valid = false;
    all_->next_hidden = 0;
}

// ---- graphs -----------------------------------------------------------------------------------------------------

// A node that runs fn(thread, threads, arg) on every thread of the lane; added to the graph after what is there.
static void add_custom(Lane & lane, ggml_cgraph * graph, void (*fn)(ggml_tensor *, int, int, void *), void * arg) {
    static float nothing = 0;
    ggml_tensor * t = ggml_custom_4d(lane.ctx, GGML_TYPE_F32, 1, 1, 1, 1, nullptr, 0, fn, GGML_N_TASKS_MAX, arg);
    t->data = &nothing;
    ggml_build_forward_expand(graph, t);
}

const char * Ffn::x_rows(ggml_type type, const Step & s, std::vector<QuantizeTask> & tasks) {
    if (type == GGML_TYPE_F32) return x_.data();
    const int64_t n_embd = s.model->layers[static_cast<size_t>(s.layer_pos)].n_embd;
    auto q = std::find_if(quantized_.begin(), quantized_.end(), [&](const Quantized & e) { return e.type == type; });
    if (q == quantized_.end()) q = quantized_.insert(q, {type, {}, false});
    if (!q->valid) {
        grow(q->rows, static_cast<int64_t>(ggml_row_size(type, n_embd)) * s.n_tokens);
        const QuantizeTask task{x_.data(), static_cast<size_t>(n_embd) * sizeof(float), q->rows.data(), type, n_embd, s.n_tokens};
        // A few rows take less time than a barrier between threads.
        if (s.n_tokens * n_embd <= 16384) {
            quantize_rows(task, 0, 1);
        } else {
            tasks.push_back(task);
        }
        q->valid = true;
    }
    return q->rows.data();
}

static bool compute(Lane & lane, ggml_cgraph * graph, std::string & error) {
    for (int i = 0; i < ggml_graph_n_nodes(graph); i++) {
        ggml_tensor * t = ggml_graph_node(graph, i);
        if (!t->data) t->data = lane.work(ggml_nbytes(t));
        if (!t->data) {
            error = std::string("the activation of this model needs more work memory than planned, at '") + ggml_op_desc(t) + "'";
            return false;
        }
    }
    const ggml_status status = ggml_backend_graph_compute(lane.cpu, graph);
    if (status != GGML_STATUS_SUCCESS) error = std::string("ggml could not compute the experts: ") + ggml_status_to_string(status);
    return status == GGML_STATUS_SUCCESS;
}

static bool repacked_failed(const std::atomic<bool> & failed, std::string & error) {
    if (failed) error = "ggml could not compute the repacked experts; is there memory for the work space of its threads?";
    return failed;
}

// Time a cooperative graph as computing.
class Timed {
public:
    explicit Timed(Model & m) : m_(m), t0_(std::chrono::steady_clock::now()) {}
    ~Timed() {
        m_.counters.compute_ns +=
            std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - t0_).count();
        m_.counters.graphs++;
    }
private:
    Model & m_;
    std::chrono::steady_clock::time_point t0_;
};

static ggml_tensor * f32_rows(ggml_context * ctx, int64_t n_cols, int64_t n_rows, char * data) {
    ggml_tensor * t = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n_cols, 1, n_rows);
    t->data = data;
    return t;
}

static ggml_tensor * activation(Lane & lane, Step & s, ActivationInputs & in, std::string & error) {
    Layer & l = s.model->layers[static_cast<size_t>(s.layer_pos)];
    auto bias = [&](std::vector<float> & values) -> ggml_tensor * {
        if (values.empty()) return nullptr;
        ggml_tensor * t = ggml_new_tensor_2d(lane.ctx, GGML_TYPE_F32, l.n_ff, l.n_expert);
        t->data = values.data();
        return t;
    };
    in.n_ff = l.n_ff;
    in.bias_up = bias(l.bias_up);
    in.bias_gate = bias(l.bias_gate);
    ggml_tensor * h = build_activation(lane.ctx, s.hidden, in, error);
    for (const auto & [values, scale] : in.row_scales) {
        values->data = lane.work(ggml_nbytes(values));
        if (!values->data) {
            error = "the work area is too small for the scales of one batch of experts";
            return nullptr;
        }
        for (int64_t r = 0; r < values->ne[2]; r++) {
            static_cast<float *>(values->data)[r] = scale[static_cast<const int32_t *>(in.ids->data)[r]];
        }
    }
    return h;
}

// The product tensors of a layer at the real width, in the work area; false when it is used up.
static bool product_tensors(Lane & lane, const Layer & l, int64_t n_rows, ActivationInputs & in) {
    auto rows = [&](int64_t width) {
        return f32_rows(lane.ctx, width, n_rows, lane.work(static_cast<size_t>(width * n_rows) * sizeof(float)));
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
    reserve(*all_, s, small_rows(s.model->layers[static_cast<size_t>(s.layer_pos)], s.n_tokens, s.n_used));
    const Timed timed(*s.model);
    return small(*all_, s, ready, hidden, error);
}

bool Ffn::run_large(Step & s, Group & g, std::string & error) {
    const Timed timed(*s.model);
    return whole(*all_, s, g, error);
}

// A group of any size whose pieces are all there. Its hidden rows go behind those of waiting groups, and are gone after.
bool Ffn::whole(Lane & lane, Step & s, Group & g, std::string & error) {
    if (!takes_dots(s.model->unit(g.unit), g.n_rows)) {
        reserve(lane, s, 0);
        return large(lane, s, g, error);
    }
    const int64_t waiting = lane.next_hidden;
    reserve(lane, s, waiting + g.n_rows);
    const bool done = small(lane, s, {&g}, {}, error);
    lane.next_hidden = waiting;
    return done;
}

bool Ffn::run_alone(Step & s, int thread, Group & g, std::string & error) {
    return whole(*own_[static_cast<size_t>(thread)], s, g, error);
}

bool Ffn::run_workers(Step & s, const std::function<void(int)> & worker, std::string & error) {
    // The input is quantized once, by all threads, into every type that a planned unit asks for.
    Task quantize_x;
    for (const Group & g : s.groups) {
        const Unit & u = s.model->unit(g.unit);
        for (int p = 0; p < u.n_pieces; p++) {
            if (u.pieces[p].projection != DOWN) x_rows(input_type(u.pieces[p]), s, quantize_x.quantize);
        }
    }
    Lane & lane = *all_;
    ggml_cgraph * graph = ggml_new_graph_custom(lane.fresh_context(), GRAPH_NODES, false);
    if (!quantize_x.quantize.empty()) add_custom(lane, graph, FfnTasks::quantize, &quantize_x);
    add_custom(lane, graph, FfnTasks::work, const_cast<std::function<void(int)> *>(&worker));
    if (s.sum) add_custom(lane, graph, FfnTasks::sum, &s);
    s.model->counters.graphs++;
    return compute(lane, graph, error);
}

bool Ffn::run_sum(Step & s, std::string & error) {
    if (!s.sum) return true;
    const int64_t n_embd = s.model->layers[static_cast<size_t>(s.layer_pos)].n_embd;
    if (s.n_tokens * s.n_used * n_embd <= 32768) {  // a few microseconds: less than waking the threads
        sum_tokens(s, n_embd, 0, s.n_tokens);
        return true;
    }
    ggml_cgraph * graph = ggml_new_graph_custom(all_->fresh_context(), GRAPH_NODES, false);
    add_custom(*all_, graph, FfnTasks::sum, &s);
    return compute(*all_, graph, error);
}

bool Ffn::run_node(ggml_tensor * node, Lane & lane, std::string & error) {
    ggml_cgraph * graph = ggml_new_graph_custom(lane.fresh_context(), GRAPH_NODES, false);
    ggml_graph_add_node(graph, node);
    return compute(lane, graph, error);
}

bool Ffn::small(Lane & lane, Step & s, const std::vector<Group *> & ready, const std::vector<Group *> & hidden, std::string & error) {
    ggml_cgraph * graph = ggml_new_graph_custom(lane.fresh_context(), GRAPH_NODES, false);
    Task quantize_x, up_dots, quantize_h, down_dots;
    if (!ready.empty() && !add_hidden(lane, graph, s, ready, quantize_x, up_dots, error)) return false;
    std::vector<Group *> down;
    place_hidden(lane, s, ready, down);
    down.insert(down.end(), hidden.begin(), hidden.end());
    if (!add_down(lane, graph, s, down, quantize_h, down_dots, error)) return false;
    if (!compute(lane, graph, error) || repacked_failed(up_dots.failed, error) ||
        repacked_failed(down_dots.failed, error)) return false;
    for (Group * g : down) g->state = Group::DONE;
    return true;
}

// Up and gate products and the activation of `ready`; the hidden rows go behind those that the lane has.
bool Ffn::add_hidden(Lane & lane, ggml_cgraph * graph, Step & s, const std::vector<Group *> & ready, Task & quantize, Task & dots,
                     std::string & error) {
    const Layer & l = s.model->layers[static_cast<size_t>(s.layer_pos)];
    int64_t n_rows = 0;
    for (const Group * g : ready) n_rows += g->n_rows;
    ActivationInputs in;
    if (!product_tensors(lane, l, n_rows, in)) {
        error = "the work area is too small for one batch of experts";
        return false;
    }
    in.ids = ggml_new_tensor_2d(lane.ctx, GGML_TYPE_I32, 1, n_rows);
    auto * ids = reinterpret_cast<int32_t *>(lane.work(static_cast<size_t>(n_rows) * sizeof(int32_t)));
    in.ids->data = ids;
    int64_t at = 0;
    for (const Group * g : ready) {
        up_dots(s, *g, in, at, quantize, dots);
        for (int64_t r = 0; r < g->n_rows; r++) ids[at + r] = g->expert;
        at += g->n_rows;
    }
    dots.finish_dots(lane);
    if (!quantize.quantize.empty()) add_custom(lane, graph, FfnTasks::quantize, &quantize);
    add_custom(lane, graph, FfnTasks::dots, &dots);
    ggml_tensor * h = activation(lane, s, in, error);
    if (!h) return false;
    h->data = lane.hidden.data() + static_cast<size_t>(lane.next_hidden * l.n_ff) * sizeof(float);
    ggml_build_forward_expand(graph, h);
    return true;
}

// The products of one group's up, gate or fused pieces, into rows `at` and on.
void Ffn::up_dots(const Step & s, const Group & g, const ActivationInputs & in, int64_t at, Task & quantize, Task & dots) {
    Model & m = *s.model;
    const Layer & l = m.layers[static_cast<size_t>(s.layer_pos)];
    Unit & u = m.unit(g.unit);
    for (int p = 0; p < u.n_pieces; p++) {
        const Piece & piece = u.pieces[p];
        if (piece.projection == DOWN) continue;
        const ggml_type xt = input_type(piece);
        const char * x = x_rows(xt, s, quantize.quantize);
        ggml_tensor * out = piece.projection == UP ? in.up : piece.projection == GATE ? in.gate : in.gate_up;
        for (int64_t r = 0; r < g.n_rows; r++) {
            const Row & row = s.rows[static_cast<size_t>(g.first_row + r)];
            dots.operands.push_back({x + static_cast<size_t>(row.token) * ggml_row_size(xt, l.n_embd),
                                     static_cast<float *>(out->data) + (at + r) * out->ne[0]});
        }
        dots.dots.push_back({m.data(u, piece), piece.type, piece.kernel, piece.cols, piece.rows, nullptr, g.n_rows});
    }
}

// Where each group's hidden rows are, one behind the other; `down`: those whose down piece is there.
void Ffn::place_hidden(Lane & lane, Step & s, const std::vector<Group *> & ready, std::vector<Group *> & down) {
    for (Group * g : ready) {
        g->hidden_row = lane.next_hidden;
        lane.next_hidden += g->n_rows;
        g->state = Group::HIDDEN;
        const Unit & u = s.model->unit(g->unit);
        if (u.ready & u.bit(DOWN)) down.push_back(g);
    }
}

bool Ffn::add_down(Lane & lane, ggml_cgraph * graph, Step & s, const std::vector<Group *> & down, Task & quantize, Task & dots,
                   std::string & error) {
    Model & m = *s.model;
    const int64_t n_ff = m.layers[static_cast<size_t>(s.layer_pos)].n_ff;
    for (const Group * g : down) {
        Unit & u = m.unit(g->unit);
        const Piece & piece = u.piece(DOWN);
        const ggml_type ht = input_type(piece);
        const size_t row_bytes = ggml_row_size(ht, n_ff);
        const char * h = lane.hidden.data() + static_cast<size_t>(g->hidden_row * n_ff) * sizeof(float);
        const char * hq = h;
        if (ht != GGML_TYPE_F32) {
            char * dst = lane.work(row_bytes * static_cast<size_t>(g->n_rows));
            if (!dst) {
                error = "the work area is too small for the hidden rows of one batch of experts";
                return false;
            }
            quantize.quantize.push_back({h, static_cast<size_t>(n_ff) * sizeof(float), dst, ht, n_ff, g->n_rows});
            hq = dst;
        }
        for (int64_t r = 0; r < g->n_rows; r++) {
            const Row & row = s.rows[static_cast<size_t>(g->first_row + r)];
            dots.operands.push_back({hq + static_cast<size_t>(r) * row_bytes, reinterpret_cast<float *>(s.output(row))});
        }
        dots.dots.push_back({m.data(u, piece), piece.type, piece.kernel, piece.cols, piece.rows, nullptr, g->n_rows});
    }
    dots.finish_dots(lane);
    if (!quantize.quantize.empty()) add_custom(lane, graph, FfnTasks::quantize, &quantize);
    if (!down.empty()) add_custom(lane, graph, FfnTasks::dots, &dots);
    return true;
}

bool Ffn::large(Lane & lane, Step & s, Group & g, std::string & error) {
    const int64_t most = most_rows(s.model->layers[static_cast<size_t>(s.layer_pos)], s.n_tokens);
    // Equal parts: a rest of fewer than MANY_ROWS would get another kernel than the whole, and other bits.
    const int64_t n_parts = (g.n_rows + most - 1) / most;
    for (int64_t part = 0; part < n_parts; part++) {
        const int64_t from = part * g.n_rows / n_parts, to = (part + 1) * g.n_rows / n_parts;
        if (!large_rows(lane, s, g, from, to - from, error)) return false;
    }
    g.state = Group::DONE;
    return true;
}

static ggml_tensor * weight_tensor(Lane & lane, const Model & m, const Unit & u, const Piece & p) {
    ggml_tensor * w = ggml_new_tensor_3d(lane.ctx, p.type, p.cols, p.rows, 1);
    w->data = m.data(u, p);
    return w;
}

static ggml_tensor * same_ids(Lane & lane, int64_t n, int32_t id) {
    ggml_tensor * ids = ggml_new_tensor_2d(lane.ctx, GGML_TYPE_I32, 1, n);
    ids->data = lane.work(static_cast<size_t>(n) * sizeof(int32_t));
    std::fill_n(static_cast<int32_t *>(ids->data), n, id);
    return ids;
}

// A product of one expert's matrix with its rows; null, with an error, when the work area is used up.
static ggml_tensor * product_of(Lane & lane, ggml_tensor * weights, ggml_tensor * rows, ggml_tensor * zero_ids, const char * what,
                                std::string & error) {
    ggml_tensor * product = ggml_mul_mat_id(lane.ctx, weights, rows, zero_ids);
    product->data = lane.work(ggml_nbytes(product));
    if (product->data) return product;
    error = std::string("the work area is too small for the ") + what + " of one expert";
    return nullptr;
}

bool Ffn::large_rows(Lane & lane, Step & s, Group & g, int64_t from, int64_t n, std::string & error) {
    Model & m = *s.model;
    Unit & u = m.unit(g.unit);
    ggml_cgraph * graph = ggml_new_graph_custom(lane.fresh_context(), GRAPH_NODES, false);
    Task quantize_x, gather, up_dots, quantize_h, down_dots, scatter;
    ggml_tensor * zero_ids = same_ids(lane, n, 0);
    ActivationInputs in;
    in.ids = same_ids(lane, n, g.expert);

    std::vector<ggml_tensor *> products;
    ggml_tensor * xg_by_type[GGML_TYPE_COUNT] = {};
    for (int p = 0; p < u.n_pieces; p++) {
        const Piece & piece = u.pieces[p];
        if (piece.projection == DOWN) continue;
        ggml_tensor *& product = piece.projection == UP ? in.up : piece.projection == GATE ? in.gate : in.gate_up;
        if (has_dots(piece, n)) {
            product = dot_product(lane, s, g, from, n, piece, quantize_x, up_dots, error);
            if (!product) return false;
            continue;
        }
        ggml_tensor *& xg = xg_by_type[vec_dot_type(piece.type)];
        if (!xg && !(xg = gathered(lane, s, g, from, n, vec_dot_type(piece.type), quantize_x, gather, error))) return false;
        product = product_of(lane, weight_tensor(lane, m, u, piece), xg, zero_ids, "products", error);
        if (!product) return false;
        products.push_back(product);
    }
    up_dots.finish_dots(lane);
    if (!quantize_x.quantize.empty()) add_custom(lane, graph, FfnTasks::quantize, &quantize_x);
    if (!gather.copies.empty()) add_custom(lane, graph, FfnTasks::copy, &gather);
    if (!up_dots.dots.empty()) add_custom(lane, graph, FfnTasks::dots, &up_dots);
    for (ggml_tensor * p : products) ggml_build_forward_expand(graph, p);
    ggml_tensor * h = activation(lane, s, in, error);
    if (!h) return false;
    if (has_dots(u.piece(DOWN), n)) {
        if (!dot_down(lane, graph, s, g, from, h, quantize_h, down_dots, error)) return false;
    } else {
        ggml_tensor * y = product_of(lane, weight_tensor(lane, m, u, u.piece(DOWN)), h, zero_ids, "output", error);
        if (!y) return false;
        ggml_build_forward_expand(graph, y);
        scatter_rows(s, g, from, n, y, scatter);
        add_custom(lane, graph, FfnTasks::copy, &scatter);
    }
    return compute(lane, graph, error) && !repacked_failed(up_dots.failed, error) && !repacked_failed(down_dots.failed, error);
}

// A product of rows of the step's input, which it reads where they are; `dots` computes it.
ggml_tensor * Ffn::dot_product(Lane & lane, const Step & s, const Group & g, int64_t from, int64_t n, const Piece & piece,
                               Task & quantize, Task & dots, std::string & error) {
    ggml_tensor * product = f32_rows(lane.ctx, piece.rows, n, lane.work(static_cast<size_t>(piece.rows * n) * sizeof(float)));
    if (!product->data) {
        error = "the work area is too small for the products of one expert";
        return nullptr;
    }
    const ggml_type xt = input_type(piece);
    const char * x = x_rows(xt, s, quantize.quantize);
    for (int64_t r = 0; r < n; r++) {
        const Row & row = s.rows[static_cast<size_t>(g.first_row + from + r)];
        dots.operands.push_back({x + static_cast<size_t>(row.token) * ggml_row_size(xt, piece.cols),
                                 static_cast<float *>(product->data) + r * piece.rows});
    }
    dots.dots.push_back({s.model->data(s.model->unit(g.unit), piece), piece.type, piece.kernel, piece.cols, piece.rows, nullptr, n});
    return product;
}

// The down product of the hidden rows `h`, into the step's output.
bool Ffn::dot_down(Lane & lane, ggml_cgraph * graph, const Step & s, const Group & g, int64_t from, ggml_tensor * h, Task & quantize,
                   Task & dots, std::string & error) {
    const Unit & u = s.model->unit(g.unit);
    const Piece & piece = u.piece(DOWN);
    const ggml_type ht = input_type(piece);
    const int64_t n = h->ne[2];
    if (!h->data) h->data = lane.work(ggml_nbytes(h));
    const char * rows = static_cast<const char *>(h->data);
    size_t row_bytes = h->nb[2];
    if (rows && ht != GGML_TYPE_F32) {
        row_bytes = ggml_row_size(ht, piece.cols);
        char * quantized = lane.work(row_bytes * static_cast<size_t>(n));
        quantize.quantize.push_back({rows, h->nb[2], quantized, ht, piece.cols, n});
        rows = quantized;
    }
    if (!rows) {
        error = "the work area is too small for the hidden rows of one expert";
        return false;
    }
    ggml_build_forward_expand(graph, h);
    for (int64_t r = 0; r < n; r++) {
        dots.operands.push_back({rows + static_cast<size_t>(r) * row_bytes,
                                 reinterpret_cast<float *>(s.output(s.rows[static_cast<size_t>(g.first_row + from + r)]))});
    }
    dots.dots.push_back({s.model->data(u, piece), piece.type, piece.kernel, piece.cols, piece.rows, nullptr, n});
    dots.finish_dots(lane);
    if (!quantize.quantize.empty()) add_custom(lane, graph, FfnTasks::quantize, &quantize);
    add_custom(lane, graph, FfnTasks::dots, &dots);
    return true;
}

// The step's input rows of a group, in `type`, side by side; `gather` copies them there.
ggml_tensor * Ffn::gathered(Lane & lane, const Step & s, const Group & g, int64_t from, int64_t n, ggml_type type, Task & quantize,
                            Task & gather, std::string & error) {
    const int64_t n_embd = s.model->layers[static_cast<size_t>(s.layer_pos)].n_embd;
    const char * x = x_rows(type, s, quantize.quantize);
    const size_t row_bytes = ggml_row_size(type, n_embd);
    ggml_tensor * xg = ggml_new_tensor_3d(lane.ctx, type, n_embd, 1, n);
    xg->data = lane.work(row_bytes * static_cast<size_t>(n));
    if (!xg->data) {
        error = "the work area is too small for the rows of one expert";
        return nullptr;
    }
    for (int64_t r = 0; r < n; r++) {
        const Row & row = s.rows[static_cast<size_t>(g.first_row + from + r)];
        gather.copies.push_back({x + static_cast<size_t>(row.token) * row_bytes,
                                 static_cast<char *>(xg->data) + static_cast<size_t>(r) * row_bytes, row_bytes});
    }
    return xg;
}

void Ffn::scatter_rows(const Step & s, const Group & g, int64_t from, int64_t n, const ggml_tensor * y, Task & scatter) {
    const size_t out_bytes = static_cast<size_t>(s.model->layers[static_cast<size_t>(s.layer_pos)].n_embd) * sizeof(float);
    for (int64_t r = 0; r < n; r++) {
        const Row & row = s.rows[static_cast<size_t>(g.first_row + from + r)];
        scatter.copies.push_back({static_cast<const char *>(y->data) + static_cast<size_t>(r) * out_bytes, s.output(row), out_bytes});
    }
}

}  // namespace moe_edge
