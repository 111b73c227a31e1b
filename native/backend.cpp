// The ggml backend: an ACCEL device that llama.cpp asks before the CPU. It claims the expert nodes of bound stubs and
// hands each MoE layer to a StepRunner. No buffer type of its own: tensors live in CPU buffers (LLAMACPP.md, section 2).
#include "backend.h"

#include <chrono>
#include <cstring>

#include "device.h"
#include "repack.h"
#include "step.h"

namespace moe_edge {

static StepRunner & runner_of(ggml_backend_t b) { return *static_cast<StepRunner *>(b->context); }

bool compute_nodes(StepRunner & r, ggml_cgraph * graph) {
    const auto t0 = std::chrono::steady_clock::now();
    Model * model = nullptr;
    const ggml_tensor * summed_until = nullptr;  // nodes up to this one were computed with their down product
    for (int i = 0; i < ggml_graph_n_nodes(graph); i++) {
        ggml_tensor * node = ggml_graph_node(graph, i);
        if (summed_until) {
            if (node == summed_until) summed_until = nullptr;
            continue;
        }
        if (const Stub * stub = product_of(node)) {
            model = stub->model;
            std::lock_guard<std::mutex> lock(model->step_mutex);
            if (!r.begun(*stub, node) && !r.begin(*stub, node, find_gate_weights(graph, i))) return false;
            if (stub->projection != DOWN) continue;
            WeightedSum sum;
            const bool whole = find_weighted_sum(graph, i, sum);
            if (!r.finish(*stub, node, whole ? &sum : nullptr)) return false;
            if (whole) summed_until = sum.sum;
        } else if (is_attention(node)) {
            if (!r.run_attention(node)) return false;
        } else if (const Stub * selects = selection_of(node)) {
            std::lock_guard<std::mutex> lock(selects->model->step_mutex);
            if (!r.select(*selects, node)) return false;
        } else if (const Stub * behind = behind_down(node)) {
            if (!r.run_node(*behind->model, node)) return false;
        } else if (const Stub * before = early_input(node)) {
            std::lock_guard<std::mutex> lock(before->model->step_mutex);
            if (!r.announce(*before, node)) return false;
        }
        // the rest are views, and what lies between the products: done at the down product
    }
    if (model) {
        model->counters.step_ns +=
            std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - t0).count();
    }
    return true;
}

static ggml_status graph_compute(ggml_backend_t backend, ggml_cgraph * graph) {
    return compute_nodes(runner_of(backend), graph) ? GGML_STATUS_SUCCESS : GGML_STATUS_FAILED;
}

static const char * backend_name(ggml_backend_t) { return "MOE_EDGE"; }
static void backend_free(ggml_backend_t b) {
    delete static_cast<StepRunner *>(b->context);
    delete b;
}
static void set_n_threads(ggml_backend_t b, int n) { runner_of(b).ffn.set_threads(n); }
static void set_abort_callback(ggml_backend_t b, ggml_abort_callback callback, void * data) {
    runner_of(b).abort = callback;
    runner_of(b).abort_data = data;
}

static const char * device_name(ggml_backend_dev_t) { return "MOE_EDGE"; }
static const char * device_description(ggml_backend_dev_t) { return "experts streamed from disk by moe-edge"; }
static void device_memory(ggml_backend_dev_t, size_t * free, size_t * total) { *free = *total = 0; }
static enum ggml_backend_dev_type device_type(ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_ACCEL; }
static bool device_supports_op(ggml_backend_dev_t, const ggml_tensor * op) {
    switch (op->op) {
        case GGML_OP_NONE:
        case GGML_OP_VIEW:
        case GGML_OP_RESHAPE:
            return true;
        default:
            note_router(op);
            return is_ours(op) || is_attention(op);
    }
}

static ggml_backend_t device_init(ggml_backend_dev_t dev, const char *) {
    static ggml_guid guid = {0x6d, 0x6f, 0x65, 0x2d, 0x65, 0x64, 0x67, 0x65, 0x2d, 0x65, 0x6e, 0x67, 0x69, 0x6e, 0x65, 0x01};
    return new_backend(dev, &guid, new StepRunner(), backend_name, backend_free, graph_compute);
}

static const char * reg_name(ggml_backend_reg_t) { return "MOE_EDGE"; }
static size_t reg_device_count(ggml_backend_reg_t) { return 1; }
static ggml_backend_dev_t reg_device(ggml_backend_reg_t reg, size_t);
static void * reg_proc_address(ggml_backend_reg_t, const char * name) {
    if (strcmp(name, "ggml_backend_set_n_threads") == 0) return reinterpret_cast<void *>(set_n_threads);
    if (strcmp(name, "ggml_backend_set_abort_callback") == 0) return reinterpret_cast<void *>(set_abort_callback);
    return nullptr;
}

static ggml_backend_reg g_reg = {ME_BACKEND_API_VERSION, {reg_name, reg_device_count, reg_device, reg_proc_address}, nullptr};
static ggml_backend_device g_device = {};
static ggml_backend_dev_t reg_device(ggml_backend_reg_t, size_t) { return &g_device; }

// Backends that a load would take by itself and that no plan counts. BLAS, on by default on macOS, multiplies 32 rows and
// more with an F32 copy of the weight, which also rounds otherwise. macOS builds always have Metal: memory there is the
// GPU's too, and llama.cpp would hand it large products. Process-wide, and before any model is loaded through us.
static void unload_uncounted_backends() {
    if (ggml_backend_reg_t blas = ggml_backend_reg_by_name("BLAS")) ggml_backend_unload(blas);
#ifdef __APPLE__
    for (size_t i = ggml_backend_dev_count(); i-- > 0;) {
        if (i >= ggml_backend_dev_count()) continue;  // went with another device of its backend
        ggml_backend_dev_t dev = ggml_backend_dev_get(i);
        const auto type = ggml_backend_dev_type(dev);
        ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(dev);
        const bool gpu = type == GGML_BACKEND_DEVICE_TYPE_GPU || type == GGML_BACKEND_DEVICE_TYPE_IGPU;
        if (gpu && strcmp(ggml_backend_reg_name(reg), "RPC") != 0) ggml_backend_unload(reg);
    }
#endif
}

// ggml says in its log what it repacks, which here is every expert that is read. Taken once more by whoever takes llama.cpp's
// log after us (me_log in capi.h).
static void filter_log() {
    ggml_log_callback theirs = nullptr;
    void * user = nullptr;
    ggml_log_get(&theirs, &user);
    if (theirs && !user) ggml_log_set(log_without_repacking, reinterpret_cast<void *>(theirs));
}

void register_backend() {
    static bool done = false;
    if (done) return;
    unload_uncounted_backends();
    filter_log();
    fill_device(g_device, &g_reg, {device_name, device_description, device_memory, device_type, device_init, device_supports_op});
    ggml_backend_register(&g_reg);
    done = true;
}

}  // namespace moe_edge
