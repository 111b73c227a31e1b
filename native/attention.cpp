#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "ggml-cpu.h"

namespace moe_edge {

static std::atomic<int> g_watchers{0};

void watch_attention(bool on) { g_watchers += on ? 1 : -1; }

bool is_attention(const ggml_tensor * node) {
    if (g_watchers == 0) return false;
    if (node->op == GGML_OP_SOFT_MAX) {
        return strncmp(node->name, "kq_soft_max", 11) == 0 && node->src[1] && node->ne[1] >= WATCHED_TOKENS;
    }
    return node->op == GGML_OP_FLASH_ATTN_EXT && node->src[3] && node->src[0]->ne[1] >= WATCHED_TOKENS;
}

static float mask_at(const ggml_tensor * mask, int64_t cell, int64_t token) {
    const char * row = static_cast<const char *>(mask->data) + static_cast<size_t>(token) * mask->nb[1];
    return mask->type == GGML_TYPE_F16 ? ggml_fp16_to_fp32(reinterpret_cast<const ggml_fp16_t *>(row)[cell])
                                       : reinterpret_cast<const float *>(row)[cell];
}

// A token's own cell is the last one it may look at. False when they do not follow each other: a cache with holes.
bool AttentionWatch::find_cells(const ggml_tensor * mask, int64_t n_kv, int64_t n_tokens) {
    if (mask->type != GGML_TYPE_F16 && mask->type != GGML_TYPE_F32) return false;
    if (mask->ne[0] != n_kv || mask->ne[1] < n_tokens) return false;
    cells_.assign(static_cast<size_t>(n_tokens), -1);
    int64_t cell = n_kv - 1;
    for (int64_t t = n_tokens - 1; t >= 0; t--) {
        while (cell >= 0 && mask_at(mask, cell, t) != 0) cell--;
        if (cell < 0) return false;
        if (t + 1 < n_tokens && cells_[static_cast<size_t>(t) + 1] != cell + 1) return false;
        cells_[static_cast<size_t>(t)] = cell;
    }
    return true;
}

// probabilities [n_queries][n_kv] of one head; the queries are tokens first_query and on.
void AttentionWatch::add(const float * probabilities, int64_t n_kv, int64_t first_query, int64_t n_queries) {
    for (int64_t q = 0; q < n_queries; q++) {
        const float * row = probabilities + q * n_kv + cells_[0];
        for (int64_t t = 0; t <= first_query + q; t++) received_[static_cast<size_t>(t)] += row[t];
    }
}

void AttentionWatch::read(const ggml_tensor * node, Lane & lane) {
    known_ = false;
    const bool flash = node->op == GGML_OP_FLASH_ATTN_EXT;
    const ggml_tensor * mask = node->src[flash ? 3 : 1];
    float params[3] = {};  // scale, largest ALiBi bias, and of flash attention the soft cap
    memcpy(params, node->op_params, (flash ? 3 : 2) * sizeof(float));
    if (params[1] != 0 || params[2] != 0) return;
    const ggml_tensor * q = node->src[0];  // of flash attention: [head_dim, n_tokens, n_head]
    const ggml_tensor * k = node->src[1];  // of flash attention: [head_dim, n_kv, n_head_kv]
    const int64_t n_kv = flash ? k->ne[1] : node->ne[0];
    const int64_t n_tokens = flash ? q->ne[1] : node->ne[1];
    if (node->ne[3] != 1 || !find_cells(mask, n_kv, n_tokens)) return;
    received_.assign(static_cast<size_t>(n_tokens), 0.0f);

    int64_t n_queries = n_tokens;
    if (!flash) {
        for (int64_t h = 0; h < node->ne[2]; h++) {
            add(reinterpret_cast<const float *>(static_cast<const char *>(node->data) + static_cast<size_t>(h) * node->nb[2]), n_kv, 0, n_tokens);
        }
    } else {
        n_queries = std::min(LAST_QUERIES, n_tokens);
        const int64_t first = n_tokens - n_queries, group = q->ne[2] / k->ne[2];
        const size_t bytes = static_cast<size_t>(n_kv * n_queries * group) * sizeof(float);
        if (scores_.size() < 2 * bytes) scores_.resize(2 * bytes);
        for (int64_t h = 0; h < k->ne[2]; h++) {  // the heads of one group at a time keep the scores small
            ggml_context * ctx = lane.fresh_context();
            auto part = [&](const ggml_tensor * of, int64_t n1, int64_t n2, size_t offset) {
                ggml_tensor * t = ggml_new_tensor_3d(ctx, of->type, of->ne[0], n1, n2);
                memcpy(t->nb, of->nb, sizeof(t->nb));
                t->data = static_cast<char *>(of->data) + offset;
                return t;
            };
            ggml_tensor * kh = part(k, n_kv, 1, static_cast<size_t>(h) * k->nb[2]);
            ggml_tensor * qh = part(q, n_queries, group, static_cast<size_t>(h * group) * q->nb[2] + static_cast<size_t>(first) * q->nb[1]);
            ggml_tensor * mh = part(mask, n_queries, 1, static_cast<size_t>(first) * mask->nb[1]);
            mh->ne[0] = n_kv;
            ggml_tensor * scores = ggml_mul_mat(ctx, kh, qh);
            scores->data = scores_.data();
            ggml_tensor * p = ggml_soft_max_ext(ctx, scores, mh, params[0], 0.0f);
            p->data = scores_.data() + bytes;
            ggml_cgraph * graph = ggml_new_graph_custom(ctx, 8, false);
            ggml_build_forward_expand(graph, p);
            if (ggml_backend_graph_compute(lane.cpu, graph) != GGML_STATUS_SUCCESS) return;
            for (int64_t g = 0; g < group; g++) {
                add(static_cast<const float *>(p->data) + g * n_kv * n_queries, n_kv, first, n_queries);
            }
        }
    }
    for (int64_t t = 0; t < n_tokens; t++) {
        received_[static_cast<size_t>(t)] /= static_cast<float>(std::min(n_queries, n_tokens - t));
    }
    known_ = true;
}

const float * AttentionWatch::take(int64_t n_tokens) {
    if (!known_ || static_cast<int64_t>(received_.size()) != n_tokens) return nullptr;
    known_ = false;
    taken_ = received_;
    return taken_.data();
}

}  // namespace moe_edge
