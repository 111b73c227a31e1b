// Repacked dense weights: what ggml's CPU_REPACK buffers take, and no other kind of them in a load of ours.
#include <memory>
#include <vector>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "capi.h"
#include "ggml-backend.h"
#include "repack.h"

using namespace moe_edge;

static constexpr int64_t TOKENS = 512;  // of the product that is asked for: as llama.cpp's weight_buft_supported

static std::vector<ggml_backend_buffer_type_t> & all_types() {
    static std::vector<ggml_backend_buffer_type_t> all = [] {
        std::vector<ggml_backend_buffer_type_t> found;
        for (auto * t = extra_buffer_types(); t && *t; t++) found.push_back(*t);
        return found;
    }();
    return all;
}

void me_only_repack(int32_t on) {
    ggml_backend_buffer_type_t * at = extra_buffer_types();
    if (!at) return;
    for (ggml_backend_buffer_type_t type : all_types()) {
        if (!on || is_repacked_buffer_type(type)) *at++ = type;
    }
    *at = nullptr;
}

int32_t me_repacks(int32_t type, int64_t cols, int64_t rows, int64_t n_expert) {
    const ggml_backend_buffer_type_t repack = repacked_buffer_type();
    const auto kind = static_cast<ggml_type>(type);
    if (!repack || type < 0 || type >= GGML_TYPE_COUNT || ggml_blck_size(kind) <= 0 || cols % ggml_blck_size(kind) != 0) return 0;
    const ggml_init_params params = {16 * ggml_tensor_overhead(), nullptr, true};
    std::unique_ptr<ggml_context, decltype(&ggml_free)> owner(ggml_init(params), ggml_free);
    ggml_context * ctx = owner.get();
    if (!ctx) return 0;
    ggml_tensor * w = n_expert > 1 ? ggml_new_tensor_3d(ctx, kind, cols, rows, n_expert) : ggml_new_tensor_2d(ctx, kind, cols, rows);
    ggml_tensor * op = nullptr;
    if (n_expert > 1) {
        ggml_tensor * x = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, cols, 1, TOKENS);
        op = ggml_mul_mat_id(ctx, w, x, ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 1, TOKENS));
    } else {
        op = ggml_mul_mat(ctx, w, ggml_new_tensor_2d(ctx, GGML_TYPE_F32, cols, TOKENS));
    }
    std::unique_ptr<ggml_backend_buffer, decltype(&ggml_backend_buffer_free)> none(
        ggml_backend_buft_alloc_buffer(repack, 0), ggml_backend_buffer_free);
    w->buffer = none.get();
    return w->buffer && ggml_backend_dev_supports_op(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU), op);
}

void me_trim_memory(void) {
#ifdef __GLIBC__
    malloc_trim(0);
#endif
}
