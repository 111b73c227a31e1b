#include "graph.h"

#include <atomic>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>

#include "activation.h"
#include "ggml-backend.h"

namespace moe_edge {

static std::shared_mutex g_mutex;
static std::unordered_map<const ggml_tensor *, Stub> g_stubs;  // guarded by g_mutex
static std::unordered_map<const ggml_tensor *, Stub> g_routers;  // guarded by g_mutex: router weight -> its layer
static Model * g_armed = nullptr;                              // guarded by g_mutex
static std::atomic<int> g_selecting{0};                        // models that do
static std::atomic<bool> g_any_armed{false};                   // so that asking costs nothing when none is

void arm(Model * model) {
    std::unique_lock<std::shared_mutex> lock(g_mutex);
    g_armed = model;
    g_any_armed = true;
}

void disarm(Model * model) {
    std::unique_lock<std::shared_mutex> lock(g_mutex);
    if (g_armed == model) g_armed = nullptr;
    g_any_armed = g_armed != nullptr;
}

void unbind(Model * model) {
    std::unique_lock<std::shared_mutex> lock(g_mutex);
    for (Layer & l : model->layers) l.router = Router();
    for (auto * map : {&g_stubs, &g_routers}) {
        for (auto it = map->begin(); it != map->end();) it = it->second.model == model ? map->erase(it) : std::next(it);
    }
}

int bound_tensors(Model * model) {
    std::shared_lock<std::shared_mutex> lock(g_mutex);
    int n = 0;
    for (const auto & s : g_stubs) n += s.second.model == model;
    return n;
}

// "blk.7.ffn_gate_exps.weight" -> 7, GATE, WEIGHT
static bool parse_name(const char * name, int & layer, Projection & projection, Stub::Kind & kind) {
    int end = 0;
    if (sscanf(name, "blk.%d.ffn_%n", &layer, &end) != 1 || end == 0) return false;
    static const struct { const char * text; Projection projection; Stub::Kind kind; } KNOWN[] = {
        {"up_exps.weight", UP, Stub::WEIGHT},     {"gate_exps.weight", GATE, Stub::WEIGHT},
        {"down_exps.weight", DOWN, Stub::WEIGHT}, {"gate_up_exps.weight", GATE_UP, Stub::WEIGHT},
        {"up_exps.bias", UP, Stub::BIAS},         {"gate_exps.bias", GATE, Stub::BIAS},
        {"up_exps.scale", UP, Stub::SCALE},       {"gate_exps.scale", GATE, Stub::SCALE},
        {"down_exps.scale", DOWN, Stub::SCALE},
    };
    for (const auto & k : KNOWN) {
        if (strcmp(name + end, k.text) == 0) {
            projection = k.projection;
            kind = k.kind;
            return true;
        }
    }
    return false;
}

static bool is_stub_shape(const ggml_tensor * w, const Layer & l, Projection projection, Stub::Kind kind) {
    if (kind == Stub::SCALE) return w->type == GGML_TYPE_F32 && w->ne[0] == l.n_expert && w->ne[1] == 1;
    if (kind == Stub::BIAS) return w->ne[0] == 1 && w->ne[1] == l.n_expert;
    if (w->ne[2] != l.n_expert) return false;
    if (projection == DOWN) return w->ne[0] == 1 && w->ne[1] == l.n_embd;
    return w->ne[0] == l.n_embd && w->ne[1] == (projection == GATE_UP ? 2 : 1);
}

const Stub * find_stub(const ggml_tensor * weight) {
    {
        std::shared_lock<std::shared_mutex> lock(g_mutex);
        const auto it = g_stubs.find(weight);
        if (it != g_stubs.end()) return &it->second;
        if (!g_armed) return nullptr;
    }
    int number = 0;
    Stub stub;
    if (!parse_name(weight->name, number, stub.projection, stub.kind)) return nullptr;
    std::unique_lock<std::shared_mutex> lock(g_mutex);
    if (!g_armed) return nullptr;
    stub.model = g_armed;
    stub.layer_pos = g_armed->layer_pos(number);
    if (stub.layer_pos < 0) return nullptr;
    const Layer & layer = g_armed->layers[static_cast<size_t>(stub.layer_pos)];
    if (!is_stub_shape(weight, layer, stub.projection, stub.kind)) return nullptr;
    return &g_stubs.emplace(weight, stub).first->second;
}

// The weight of the norm that made t: RMS_NORM(h) * weight, perhaps scaled or reshaped.
static const ggml_tensor * norm_weight(const ggml_tensor * t) {
    while (t && (t->op == GGML_OP_RESHAPE || t->op == GGML_OP_SCALE)) t = t->src[0];
    if (!t || t->op != GGML_OP_MUL || !t->src[0] || !t->src[1]) return nullptr;
    const ggml_tensor * h = t->src[0], * w = t->src[1];
    if (h->op == GGML_OP_SCALE) h = h->src[0];
    if (!h || (h->op != GGML_OP_RMS_NORM && h->op != GGML_OP_NORM)) return nullptr;
    return w->op == GGML_OP_NONE && w->type == GGML_TYPE_F32 && w->ne[0] == t->ne[0] && w->ne[1] == 1 ? w : nullptr;
}

static bool is_block_tensor(const ggml_tensor * t, const char * name, int & layer) {
    int end = 0;
    return t && t->op == GGML_OP_NONE && sscanf(t->name, "blk.%d.%n", &layer, &end) == 1 && end > 0 && strcmp(t->name + end, name) == 0;
}

// ---- a layer's choice of experts

// The product with the router matrix that t's values come from, by the steps that gating takes: softmax, sigmoid and the
// like, a bias, and the masking of groups.
static const ggml_tensor * router_product(const ggml_tensor * t) {
    for (int depth = 0; t && depth < 12; depth++) {
        switch (t->op) {
            case GGML_OP_MUL_MAT:
                return t;
            case GGML_OP_RESHAPE: case GGML_OP_VIEW: case GGML_OP_CONT: case GGML_OP_ADD: case GGML_OP_SOFT_MAX:
            case GGML_OP_UNARY: case GGML_OP_SQRT: case GGML_OP_SCALE: case GGML_OP_SET_ROWS: case GGML_OP_GET_ROWS:
                t = t->src[0];
                break;
            default:
                return nullptr;
        }
    }
    return nullptr;
}

// The layer whose experts a node ranks: all of them, for each token, falling.
static const Stub * ranking_of(const ggml_tensor * node) {
    if (!node || node->op != GGML_OP_ARGSORT || !ggml_is_matrix(node)) return nullptr;
    if (node->src[0]->type != GGML_TYPE_F32 || !ggml_is_contiguous(node->src[0])) return nullptr;
    int32_t order = 0;
    memcpy(&order, node->op_params, sizeof(order));
    const ggml_tensor * product = order == GGML_SORT_ORDER_DESC ? router_product(node->src[0]) : nullptr;
    if (!product) return nullptr;
    std::shared_lock<std::shared_mutex> lock(g_mutex);
    const auto it = g_routers.find(product->src[0]);
    if (it == g_routers.end()) return nullptr;
    const Stub & s = it->second;
    return node->ne[0] == s.model->layers[static_cast<size_t>(s.layer_pos)].n_expert ? &s : nullptr;
}

// The ranking that a tensor holds the first experts of, or null.
static const ggml_tensor * ranking_behind(const ggml_tensor * ids) {
    if (!ids || ids->op != GGML_OP_VIEW || ids->view_offs != 0 || !ids->src[0]) return nullptr;
    return ids->src[0]->op == GGML_OP_ARGSORT && ids->nb[1] == ids->src[0]->nb[1] ? ids->src[0] : nullptr;
}

void count_selecting(int more) { g_selecting += more; }

const Stub * selection_of(const ggml_tensor * node) {
    if (node->op != GGML_OP_ARGSORT || g_selecting == 0) return nullptr;
    const Stub * s = ranking_of(node);
    return s && s->model->selecting ? s : nullptr;
}

const ggml_tensor * gates_behind(const ggml_tensor * ranking) {
    const ggml_tensor * t = ranking->src[0];
    for (int depth = 0; depth < 12; depth++) {
        int number = 0;
        const bool biased = t->op == GGML_OP_ADD && is_block_tensor(t->src[1], "exp_probs_b.bias", number);
        if (!biased && t->op != GGML_OP_RESHAPE && t->op != GGML_OP_SET_ROWS && t->op != GGML_OP_GET_ROWS) break;
        t = t->src[0];
    }
    const bool fits = t->type == GGML_TYPE_F32 && ggml_is_contiguous(t) && ggml_nelements(t) == ggml_nelements(ranking);
    return fits && t->ne[0] == ranking->ne[0] ? t : nullptr;
}

// How the gate weights come about, from their end back to the values that were picked for the chosen experts.
static int read_gating(const ggml_tensor * t, float & scale) {
    int kind = ME_GATES_PLAIN;
    scale = 1;
    for (int depth = 0; t && depth < 12; depth++) {
        float factor[2] = {1, 0};
        switch (t->op) {
            case GGML_OP_RESHAPE:
                break;
            case GGML_OP_SCALE:
                memcpy(factor, t->op_params, sizeof(factor));
                if (factor[1] != 0) return ME_GATES_UNKNOWN;
                scale *= factor[0];
                break;
            case GGML_OP_DIV:
                kind = ME_GATES_NORMALISED;
                break;
            case GGML_OP_SOFT_MAX:
                kind = ME_GATES_SOFTMAX;
                break;
            case GGML_OP_GET_ROWS:
                return ranking_behind(t->src[1]) ? kind : ME_GATES_UNKNOWN;
            default:
                return ME_GATES_UNKNOWN;
        }
        t = t->src[0];
    }
    return ME_GATES_UNKNOWN;
}

static const Stub * residual_of(const ggml_tensor * node);
static const Stub * weighted_of(const ggml_tensor * node);

// grovemoe has a second set of experts, which follow what is chosen of the first.
static void note_other_experts(const ggml_tensor * weight) {
    int number = 0;
    if (!is_block_tensor(weight, "ffn_up_chexps.weight", number)) return;
    std::unique_lock<std::shared_mutex> lock(g_mutex);
    const int pos = g_armed ? g_armed->layer_pos(number) : -1;
    if (pos >= 0) g_armed->layers[static_cast<size_t>(pos)].router.shared = true;
}

// What an expert product shows of its layer.
static void note_product(const ggml_tensor * node) {
    const Stub * s = find_stub(node->src[0]);
    if (!s) return note_other_experts(node->src[0]);
    const int n_tensors = s->projection == DOWN ? count_activation_tensors(node->src[1]) : 0;
    const Stub * ranked = ranking_of(ranking_behind(node->src[2]));
    std::unique_lock<std::shared_mutex> lock(g_mutex);
    if (g_armed != s->model) return;
    Layer & layer = s->model->layers[static_cast<size_t>(s->layer_pos)];
    layer.n_used = static_cast<int>(node->src[2]->ne[0]);
    layer.router.sorts = ranked && ranked->model == s->model && ranked->layer_pos == s->layer_pos;
    if (s->projection == DOWN) {
        layer.activation_tensors = n_tensors;
    } else {
        layer.router.input_norm = norm_weight(node->src[1]);
    }
}

// What weighs a layer's outputs.
static void note_gates(const ggml_tensor * node) {
    const Stub * s = weighted_of(node);
    if (!s) return;
    float scale = 1;
    const int gates = read_gating(node->src[1], scale);
    std::unique_lock<std::shared_mutex> lock(g_mutex);
    if (g_armed != s->model) return;
    Router & router = s->model->layers[static_cast<size_t>(s->layer_pos)].router;
    router.gates = gates;
    router.gate_scale = scale;
}

void note_router(const ggml_tensor * node) {
    if (!g_any_armed) return;
    if (node->op == GGML_OP_MUL) return note_gates(node);
    if (node->op == GGML_OP_MUL_MAT_ID) return note_product(node);
    if (node->op != GGML_OP_MUL_MAT && node->op != GGML_OP_ADD && node->op != GGML_OP_UNARY && node->op != GGML_OP_GET_ROWS) return;
    const Stub * before = node->op == GGML_OP_MUL_MAT ? residual_of(node->src[1]) : nullptr;
    std::unique_lock<std::shared_mutex> lock(g_mutex);
    if (!g_armed) return;
    int number = 0;
    const auto router = [&]() -> Router * {
        const int pos = g_armed->layer_pos(number);
        return pos < 0 ? nullptr : &g_armed->layers[static_cast<size_t>(pos)].router;
    };
    if (node->op == GGML_OP_MUL_MAT && is_block_tensor(node->src[0], "ffn_gate_inp.weight", number)) {
        Router * r = router();
        const Layer * l = r ? &g_armed->layers[static_cast<size_t>(g_armed->layer_pos(number))] : nullptr;
        if (!l || node->src[0]->ne[1] != l->n_expert) return;
        g_routers[node->src[0]] = {g_armed, g_armed->layer_pos(number), UP, Stub::WEIGHT};
        if (node->src[0]->ne[0] != l->n_embd) return;  // of a model whose experts see something else
        const ggml_backend_buffer_t buffer = node->src[0]->buffer;
        if (buffer && !ggml_backend_buffer_is_host(buffer)) return;  // repacked: only ggml can read it
        r->weight = node->src[0];
        r->norm = norm_weight(node->src[1]);
        r->early = before && before->model == g_armed && before->layer_pos + 1 == g_armed->layer_pos(number);
    } else if (node->op == GGML_OP_GET_ROWS && node->src[0]->op == GGML_OP_MUL_MAT && is_block_tensor(node->src[0]->src[0], "ffn_gate_inp.weight", number)) {
        if (Router * r = router()) r->some_rows = true;
    } else if (node->op == GGML_OP_ADD && node->src[1] && node->src[1]->type == GGML_TYPE_F32) {
        if (is_block_tensor(node->src[1], "ffn_gate_inp.bias", number)) {
            if (Router * r = router()) r->bias = node->src[1];
        } else if (is_block_tensor(node->src[1], "exp_probs_b.bias", number)) {
            if (Router * r = router()) r->choice_bias = node->src[1];
        }
    } else if (node->op == GGML_OP_UNARY && ggml_get_unary_op(node) == GGML_UNARY_OP_SIGMOID) {
        const ggml_tensor * logits = node->src[0];
        if (logits && (logits->op == GGML_OP_ADD || logits->op == GGML_OP_GET_ROWS)) logits = logits->src[0];
        if (logits && logits->op == GGML_OP_MUL_MAT && is_block_tensor(logits->src[0], "ffn_gate_inp.weight", number)) {
            if (Router * r = router()) r->sigmoid = true;
        }
    }
}

const Stub * product_of(const ggml_tensor * node) {
    return node->op == GGML_OP_MUL_MAT_ID ? find_stub(node->src[0]) : nullptr;
}

// A value of the experts' inner width: an expert product other than down, or made from one.
static bool is_hidden(const ggml_tensor * t, int depth) {
    if (!t || depth > 12) return false;
    switch (t->op) {
        case GGML_OP_MUL_MAT_ID: {
            const Stub * s = find_stub(t->src[0]);
            return s && s->projection != DOWN;
        }
        case GGML_OP_GLU:
        case GGML_OP_MUL:
            return is_hidden(t->src[0], depth + 1) || (t->src[1] && is_hidden(t->src[1], depth + 1));
        case GGML_OP_UNARY:
        case GGML_OP_CLAMP:
        case GGML_OP_SQR:
        case GGML_OP_SCALE:
        case GGML_OP_VIEW:
            return is_hidden(t->src[0], depth + 1);
        case GGML_OP_ADD_ID:  // asking for the bias binds it while the model is armed
            return is_hidden(t->src[0], depth + 1) && find_stub(t->src[1]);
        default:
            return false;
    }
}

static const Stub * down_product(const ggml_tensor * node) {
    const Stub * s = node ? product_of(node) : nullptr;
    return s && s->projection == DOWN ? s : nullptr;
}

static const Stub * scale_stub(const ggml_tensor * node) {
    const ggml_tensor * scale = scale_behind(node);
    return scale ? find_stub(scale) : nullptr;
}

const ggml_tensor * scale_behind(const ggml_tensor * node) {
    const ggml_tensor * t = node->op == GGML_OP_GET_ROWS ? node->src[0] : node;
    if (t->op != GGML_OP_REPEAT) return nullptr;
    for (t = t->src[0]; t && t->op == GGML_OP_RESHAPE;) t = t->src[0];
    const Stub * s = t ? find_stub(t) : nullptr;
    return s && s->kind == Stub::SCALE ? t : nullptr;
}

// The down product times the scale of each expert.
static bool is_down_scale(const ggml_tensor * node) {
    return node->op == GGML_OP_MUL && down_product(node->src[0]) && node->src[1]->op == GGML_OP_GET_ROWS && scale_behind(node->src[1]);
}

// The down product, scaled or not, plus the bias of each expert.
static bool is_down_bias(const ggml_tensor * node) {
    return node->op == GGML_OP_ADD_ID && (down_product(node->src[0]) || is_down_scale(node->src[0]));
}

// The down stub below a layer's outputs, however scaled and biased, or null.
static const Stub * stub_of_outputs(const ggml_tensor * t) {
    if (is_down_bias(t)) t = t->src[0];
    if (is_down_scale(t)) t = t->src[0];
    return down_product(t);
}

// A layer's outputs times the gate weights.
static bool is_weighted(const ggml_tensor * node) {
    if (node->op != GGML_OP_MUL || node->type != GGML_TYPE_F32 || !node->src[0] || is_down_scale(node)) return false;
    const ggml_tensor * w = node->src[1];
    return stub_of_outputs(node->src[0]) && w->type == GGML_TYPE_F32 && w->ne[0] == 1 && w->ne[1] == node->ne[1] && w->ne[2] == node->ne[2];
}

static const Stub * weighted_of(const ggml_tensor * node) { return is_weighted(node) ? stub_of_outputs(node->src[0]) : nullptr; }

static bool is_slice(const ggml_tensor * t) { return t && t->op == GGML_OP_VIEW && t->src[0] && is_weighted(t->src[0]); }

// An addition of slices of the weighted outputs.
static bool is_partial_sum(const ggml_tensor * node) {
    while (node->op == GGML_OP_ADD && is_slice(node->src[1])) {
        if (is_slice(node->src[0])) return true;
        node = node->src[0];
    }
    return false;
}

const Stub * behind_down(const ggml_tensor * node) {
    if (product_of(node)) return nullptr;
    if (const Stub * s = scale_stub(node)) return s->projection == DOWN ? s : nullptr;
    if (is_partial_sum(node)) node = node->src[1]->src[0];
    if (is_weighted(node)) node = node->src[0];
    return stub_of_outputs(node);
}

// The down stub of the layer whose weighted sum this node adds to something else, else null.
static const Stub * residual_of(const ggml_tensor * node) {
    if (!node || node->op != GGML_OP_ADD || node->type != GGML_TYPE_F32 || is_slice(node->src[1])) return nullptr;
    for (const ggml_tensor * sum : {node->src[0], node->src[1]}) {
        if (!is_partial_sum(sum)) continue;
        return stub_of_outputs(sum->src[1]->src[0]->src[0]);
    }
    return nullptr;
}

const Stub * early_input(const ggml_tensor * node) {
    const Stub * s = residual_of(node);
    if (!s || !ggml_is_contiguous(node)) return nullptr;
    const auto next = static_cast<size_t>(s->layer_pos) + 1;
    return next < s->model->layers.size() && s->model->layers[next].router.early ? s : nullptr;
}

const ggml_tensor * find_gate_weights(ggml_cgraph * graph, int first) {
    const Stub * mine = product_of(ggml_graph_node(graph, first));
    for (int i = first; i < ggml_graph_n_nodes(graph); i++) {
        const ggml_tensor * t = ggml_graph_node(graph, i);
        if (const Stub * s = product_of(t)) {
            if (s->model != mine->model || s->layer_pos != mine->layer_pos) return nullptr;
        } else if (is_weighted(t)) {
            return t->src[1];
        }
    }
    return nullptr;
}

bool find_weighted_sum(ggml_cgraph * graph, int down, WeightedSum & out) {
    const ggml_tensor * product = ggml_graph_node(graph, down);
    const ggml_tensor * outputs = product;
    const ggml_tensor * weighted = nullptr;
    const ggml_tensor * last = nullptr;
    const int64_t n_used = product->ne[1];
    int64_t n_added = 0;
    for (int i = down + 1; i < ggml_graph_n_nodes(graph) && n_added < n_used; i++) {
        ggml_tensor * t = ggml_graph_node(graph, i);
        if (!weighted) {
            if (t->op == GGML_OP_VIEW || t->op == GGML_OP_RESHAPE || scale_behind(t)) continue;
            if (t->flags & GGML_TENSOR_FLAG_OUTPUT) return false;
            if (outputs == product && is_down_scale(t) && t->src[0] == product && t->src[1]->src[1] == product->src[2]) {
                out.scale = scale_behind(t->src[1]);
                outputs = t;
                continue;
            }
            if (!is_weighted(t) || t->src[0] != outputs) return false;
            weighted = t;
        } else if (t->op == GGML_OP_ADD) {
            auto slice = [&](const ggml_tensor * v, int64_t j) {
                return is_slice(v) && v->src[0] == weighted && v->ne[0] == weighted->ne[0] && v->ne[1] == weighted->ne[2] &&
                       v->nb[1] == weighted->nb[2] && v->view_offs == static_cast<size_t>(j) * weighted->nb[1];
            };
            const int64_t j = n_added == 0 ? 1 : n_added;
            const bool first = n_added == 0 && slice(t->src[0], 0);
            if (!(first || (last && t->src[0] == last)) || !slice(t->src[1], j)) return false;
            n_added = j + 1;
            last = t;
            if (n_added == n_used) {
                out.weights = weighted->src[1];
                out.sum = t;
                return ggml_is_contiguous(t);
            }
            if (t->flags & GGML_TENSOR_FLAG_OUTPUT) return false;
        } else if (t->op != GGML_OP_VIEW) {
            return false;
        }
    }
    return false;
}

bool is_ours(const ggml_tensor * node) {
    if (node->op == GGML_OP_MUL_MAT_ID) return find_stub(node->src[0]) != nullptr;
    return is_hidden(node, 0) || behind_down(node) || scale_behind(node) || early_input(node) || selection_of(node);
}

}  // namespace moe_edge
