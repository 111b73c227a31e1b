#include "board.h"

#include <chrono>
#include <vector>

#include "attention.h"
#include "backend.h"
#include "device.h"
#include "ggml-cpu.h"
#include "graph.h"
#include "step.h"

namespace moe_edge {

void Board::announce_graph(bool is_new) {
    std::lock_guard<std::mutex> lock(kinds_mutex_);
    kinds_.push_back(is_new);
}

bool Board::take_graph() {
    std::lock_guard<std::mutex> lock(kinds_mutex_);
    if (kinds_.empty()) return true;
    const bool is_new = kinds_.front();
    kinds_.pop_front();
    return is_new;
}

void Board::forget_graphs() {
    std::lock_guard<std::mutex> lock(kinds_mutex_);
    kinds_.clear();
}

Board & the_board() {
    static Board board;
    return board;
}

namespace {

struct Run {
    bool ours;
    int begin, end;
};

struct BoardBackend {
    StepRunner runner;
    ggml_backend_t cpu = nullptr;
    Model * model = nullptr;  // that the runs below were found for
    std::vector<Run> runs;
};

int g_threads = 1;
void * g_pool = nullptr;

bool is_view(const ggml_tensor * node) {
    return node->op == GGML_OP_NONE || node->op == GGML_OP_VIEW || node->op == GGML_OP_RESHAPE || node->op == GGML_OP_PERMUTE ||
           node->op == GGML_OP_TRANSPOSE;
}

// Splits a new graph into runs. Its tensors have the addresses of the graph's before, so what was bound to those is
// forgotten first. Routers are noted before any node is judged: whether a node feeds the next layer's early router is
// known only when that router has been seen.
void find_runs(BoardBackend & b, Model * model, ggml_cgraph * graph) {
    b.runs.clear();
    b.model = model;
    if (model) {
        unbind(model);
        arm(model);
        for (int i = 0; i < graph->n_nodes; i++) note_router(graph->nodes[i]);
    }
    for (int i = 0; i < graph->n_nodes; i++) {
        const ggml_tensor * node = graph->nodes[i];
        const bool follows = is_view(node) && !b.runs.empty();
        const bool ours = follows ? b.runs.back().ours : model && (is_ours(node) || is_attention(node));
        if (b.runs.empty() || b.runs.back().ours != ours) b.runs.push_back({ours, i, i});
        b.runs.back().end = i + 1;
    }
}

bool compute_runs(BoardBackend & b, ggml_cgraph * graph) {
    for (const Run & run : b.runs) {
        ggml_cgraph part = ggml_graph_view(graph, run.begin, run.end);
        const bool done = run.ours ? compute_nodes(b.runner, &part) : ggml_backend_graph_compute(b.cpu, &part) == GGML_STATUS_SUCCESS;
        if (!done) return false;
    }
    return true;
}

// Never fails: see board.h.
ggml_status board_compute(ggml_backend_t backend, ggml_cgraph * graph) {
    auto & b = *static_cast<BoardBackend *>(backend->context);
    Board & board = the_board();
    const auto t0 = std::chrono::steady_clock::now();
    std::lock_guard<std::mutex> lock(board.compute);
    const bool is_new = board.take_graph();
    if (is_new || b.model != board.model) find_runs(b, board.model, graph);
    if (!compute_runs(b, graph)) board.failed = true;
    board.graphs++;
    board.new_graphs += is_new;
    board.compute_ns += std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - t0).count();
    return GGML_STATUS_SUCCESS;
}

const char * name_of(ggml_backend_t) { return "MOE_EDGE_BOARD"; }
void free_backend(ggml_backend_t backend) {
    auto * b = static_cast<BoardBackend *>(backend->context);
    ggml_backend_free(b->cpu);
    delete b;
    delete backend;
}

const char * device_name(ggml_backend_dev_t) { return "MOE_EDGE_BOARD"; }
const char * device_description(ggml_backend_dev_t) { return "whole layers, experts streamed from disk by moe-edge"; }
void device_memory(ggml_backend_dev_t, size_t * free, size_t * total) {
    const Board & board = the_board();
    const int64_t left = board.limit_bytes - board.buffer_bytes;
    *free = static_cast<size_t>(left > 0 ? left : 0);
    *total = static_cast<size_t>(board.limit_bytes.load());
}
enum ggml_backend_dev_type device_type(ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; }
bool device_supports_op(ggml_backend_dev_t, const ggml_tensor *) { return true; }

ggml_backend_t device_init(ggml_backend_dev_t dev, const char *) {
    static ggml_guid guid = {0x6d, 0x6f, 0x65, 0x2d, 0x65, 0x64, 0x67, 0x65, 0x2d, 0x62, 0x6f, 0x61, 0x72, 0x64, 0x00, 0x01};
    auto * context = new BoardBackend();
    context->cpu = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(context->cpu, g_threads);
    if (g_pool) ggml_backend_cpu_set_threadpool(context->cpu, static_cast<ggml_threadpool_t>(g_pool));
    context->runner.ffn.set_threads(g_threads);
    return new_backend(dev, &guid, context, name_of, free_backend, board_compute);
}

// Never registered with ggml: only the RPC server knows of the device, and asks its registry for optional functions.
const char * reg_name(ggml_backend_reg_t) { return "MOE_EDGE_BOARD"; }
size_t reg_device_count(ggml_backend_reg_t) { return 1; }
ggml_backend_device g_device = {};
ggml_backend_dev_t reg_device(ggml_backend_reg_t, size_t) { return &g_device; }
void * reg_proc_address(ggml_backend_reg_t, const char *) { return nullptr; }
ggml_backend_reg g_reg = {ME_BACKEND_API_VERSION, {reg_name, reg_device_count, reg_device, reg_proc_address}, nullptr};

}  // namespace

ggml_backend_dev_t board_device(int n_threads, void * pool) {
    g_threads = n_threads;
    g_pool = pool;
    fill_device(g_device, &g_reg, {device_name, device_description, device_memory, device_type, device_init, device_supports_op});
    return &g_device;
}

}  // namespace moe_edge
