#include "router.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "ffn.h"
#include "ggml-cpu.h"
#include "model.h"

namespace moe_edge {

static const float * floats(const ggml_tensor * t) { return t ? static_cast<const float *>(t->data) : nullptr; }

// The input as the router's norm would have left it: the hidden state changes little from layer to layer, its norm
// weights do. A router without a norm sees the hidden state itself, here without its scale. One token.
static const float * router_input(LookAhead & a, const Router & here, const Router & there, const float * x, int64_t n) {
    const float * from = floats(here.input_norm), * to = floats(there.norm);
    if (!a.rescale || !from || from == to) return x;
    a.scaled.resize(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; i++) {
        a.scaled[static_cast<size_t>(i)] = std::fabs(from[i]) > 1e-6f ? x[i] * ((to ? to[i] : 1.0f) / from[i]) : 0.0f;
    }
    return a.scaled.data();
}

static void add_probabilities(LookAhead & a, const Router & r, const float * x) {
    const int64_t n = r.weight->ne[0], n_expert = r.weight->ne[1];
    const ggml_type_traits_cpu * traits = ggml_get_type_traits_cpu(r.weight->type);
    const void * row = x;
    if (traits->vec_dot_type != GGML_TYPE_F32) {
        a.converted.resize(ggml_row_size(traits->vec_dot_type, n));
        ggml_get_type_traits_cpu(traits->vec_dot_type)->from_float(x, a.converted.data(), n);
        row = a.converted.data();
    }
    a.logits.resize(static_cast<size_t>(n_expert));
    float largest = -INFINITY;
    for (int64_t e = 0; e < n_expert; e++) {
        float & v = a.logits[static_cast<size_t>(e)];
        traits->vec_dot(static_cast<int>(n), &v, 0, static_cast<const char *>(r.weight->data) + static_cast<size_t>(e) * r.weight->nb[1], 0, row, 0, 1);
        if (r.bias) v += floats(r.bias)[e];
        largest = std::max(largest, v);
    }
    float total = 0;
    for (float & v : a.logits) {
        v = r.sigmoid ? 1.0f / (1.0f + std::exp(-v)) : std::exp(v - largest);
        total += v;
    }
    for (size_t e = 0; e < a.logits.size(); e++) {
        if (!r.sigmoid) a.logits[e] /= total;
        a.sum[e] += a.logits[e];
    }
}

int look_ahead(Model & model, int layer_pos, const float * input, int64_t n_tokens, int most) {
    LookAhead & a = model.look;
    const Layer & here = model.layers[static_cast<size_t>(layer_pos)];
    const int depth = std::min(std::min(a.depth, most), static_cast<int>(model.layers.size()) - 1 - layer_pos);
    if (depth <= 0 || n_tokens > AHEAD_TOKENS) return 0;
    for (int d = 0; d < depth; d++) {
        const Layer & there = model.layers[static_cast<size_t>(layer_pos + 1 + d)];
        const Router & r = there.router;
        model.mail.ahead_counts[d] = 0;
        if (!r.weight || r.early || there.n_embd != here.n_embd) continue;
        const auto n_expert = static_cast<size_t>(there.n_expert);
        a.sum.assign(n_expert, 0.0f);
        for (int64_t t = 0; t < n_tokens; t++) {
            add_probabilities(a, r, router_input(a, here.router, r, input + t * here.n_embd, here.n_embd));
        }
        a.score = a.sum;
        if (r.choice_bias) {
            for (size_t e = 0; e < n_expert; e++) a.score[e] += static_cast<float>(n_tokens) * floats(r.choice_bias)[e];
        }
        a.order.resize(n_expert);
        for (size_t e = 0; e < n_expert; e++) a.order[e] = static_cast<int32_t>(e);
        const auto k = static_cast<size_t>(std::min<int64_t>(a.width, there.n_expert));
        std::partial_sort(a.order.begin(), a.order.begin() + static_cast<std::ptrdiff_t>(k), a.order.end(), [&](int32_t i, int32_t j) {
            const float si = a.score[static_cast<size_t>(i)], sj = a.score[static_cast<size_t>(j)];
            return si != sj ? si > sj : i < j;
        });
        model.mail.ahead_counts[d] = static_cast<int32_t>(k);
        const size_t at = static_cast<size_t>(d) * static_cast<size_t>(a.width);
        for (size_t i = 0; i < k; i++) {
            model.mail.ahead_experts[at + i] = a.order[i];
            model.mail.ahead_scores[at + i] = a.sum[static_cast<size_t>(a.order[i])] / static_cast<float>(n_tokens);
        }
    }
    return depth;
}

// logits, made probabilities in place; those with the choice bias; and the order
int64_t routed_bytes(int64_t n_expert, int64_t n_tokens) { return 3 * n_expert * n_tokens * static_cast<int64_t>(sizeof(float)); }

bool route(LookAhead & a, const Router & r, const ggml_tensor * input, int64_t n_used, Lane & lane, Routed & out) {
    const auto bytes = static_cast<size_t>(routed_bytes(r.weight->ne[1], input->ne[1]));
    if (a.routed.size() < bytes) a.routed.resize(bytes);
    ggml_context * ctx = lane.fresh_context();
    size_t used = 0;
    auto keep = [&](ggml_tensor * t) {
        t->data = a.routed.data() + used;
        used += bytes / 3;
        return t;
    };
    ggml_tensor * x = ggml_new_tensor_2d(ctx, input->type, input->ne[0], input->ne[1]);  // a leaf: its sources are done
    x->data = input->data;
    auto weight = [](const ggml_tensor * t) { return const_cast<ggml_tensor *>(t); };  // which ggml only reads
    ggml_tensor * p = keep(ggml_mul_mat(ctx, weight(r.weight), x));
    if (r.bias) p = ggml_add_inplace(ctx, p, weight(r.bias));
    p = r.sigmoid ? ggml_sigmoid_inplace(ctx, p) : ggml_soft_max_inplace(ctx, p);
    ggml_tensor * choice = r.choice_bias ? keep(ggml_add(ctx, p, weight(r.choice_bias))) : p;
    ggml_tensor * order = keep(ggml_argsort(ctx, choice, GGML_SORT_ORDER_DESC));
    ggml_cgraph * graph = ggml_new_graph_custom(ctx, 16, false);
    ggml_build_forward_expand(graph, order);
    if (ggml_backend_graph_compute(lane.cpu, graph) != GGML_STATUS_SUCCESS) return false;
    out.ids = ggml_view_2d(ctx, order, n_used, input->ne[1], order->nb[1], 0);
    out.probabilities = p;
    return true;
}

}  // namespace moe_edge
