#include "selection.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "ggml-cpu.h"
#include "graph.h"

namespace moe_edge {

static int64_t now_ns() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

int64_t Selector::bytes(int64_t n_expert, int64_t n_tokens) {
    return n_expert * n_tokens * static_cast<int64_t>(2 * sizeof(int32_t));  // the order, and at most as many selected
}

// By ggml's own sort, so that equal scores rank as they do in stock llama.cpp.
bool Selector::sort(const ggml_tensor * ranking, Lane & lane) {
    ggml_context * ctx = lane.fresh_context();
    ggml_tensor * scores = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, ranking->ne[0], ranking->ne[1]);
    scores->data = ranking->src[0]->data;
    ggml_tensor * sorted = ggml_argsort(ctx, scores, GGML_SORT_ORDER_DESC);
    order_.resize(static_cast<size_t>(ggml_nelements(ranking)));
    sorted->data = order_.data();
    ggml_cgraph * graph = ggml_new_graph_custom(ctx, 4, false);
    ggml_build_forward_expand(graph, sorted);
    return ggml_backend_graph_compute(lane.cpu, graph) == GGML_STATUS_SUCCESS;
}

// What the scheduler is told of a single token, best expert first.
void Selector::mail_one(const Model & model) const {
    const me_mailbox & mail = model.mail;
    for (int32_t rank = 0; rank < view_.n_expert; rank++) {
        const auto expert = static_cast<size_t>(view_.order[rank]);
        mail.select_order[rank] = view_.order[rank];
        mail.select_scores[rank] = view_.scores[expert];
        mail.select_gates[rank] = view_.gates ? view_.gates[expert] : 0.0f;
    }
}

bool Selector::ask(Model & model, int layer_pos, std::string & error) {
    const auto n = static_cast<size_t>(view_.n_expert), n_used = static_cast<size_t>(view_.n_used);
    for (size_t t = 0; t < static_cast<size_t>(view_.n_tokens); t++) {
        std::copy_n(order_.data() + t * n, n_used, selected_.data() + t * n_used);  // the model's own choice
    }
    const bool one = view_.n_tokens == 1;
    if (one) mail_one(model);
    const int64_t t0 = now_ns();
    model.selection = &view_;
    const int32_t status = model.select(model.schedule_user, layer_pos, view_.n_tokens, view_.n_used);
    model.selection = nullptr;
    model.counters.schedule_ns += now_ns() - t0;
    if (one && status == ME_SCHEDULE_OK) std::copy_n(model.mail.selected, n_used, selected_.data());
    if (status == ME_SCHEDULE_OK || status == ME_SCHEDULE_RESIDENT) return true;
    error = status == ME_SCHEDULE_STOP ? "stopped" : "the scheduler failed";
    return false;
}

// The ranking, row by row: the selected experts first, then the others, both by rank. So the sum over a token's experts
// does not depend on what was replaced by what.
bool Selector::write(Model & model, const Layer & layer, ggml_tensor * ranking, std::string & error) {
    const auto n = static_cast<size_t>(view_.n_expert), n_used = static_cast<size_t>(view_.n_used);
    for (size_t t = 0; t < static_cast<size_t>(view_.n_tokens); t++) {
        const int32_t * own = order_.data() + t * n, * selected = selected_.data() + t * n_used;
        wanted_.assign(n, 0);
        for (size_t j = 0; j < n_used; j++) {
            if (selected[j] < 0 || selected[j] >= view_.n_expert || wanted_[static_cast<size_t>(selected[j])]) {
                error = "layer " + std::to_string(layer.number) + ": the scheduler selected expert " + std::to_string(selected[j]) +
                        ", which is not one of " + std::to_string(n) + " or is selected twice";
                return false;
            }
            wanted_[static_cast<size_t>(selected[j])] = 1;
        }
        auto * row = reinterpret_cast<int32_t *>(static_cast<char *>(ranking->data) + t * ranking->nb[1]);
        size_t front = 0, back = n_used;
        for (size_t rank = 0; rank < n; rank++) {
            const bool first = wanted_[static_cast<size_t>(own[rank])] != 0;
            model.counters.substituted_uses += first && rank >= n_used;
            row[first ? front++ : back++] = own[rank];
        }
    }
    return true;
}

bool Selector::run(Model & model, int layer_pos, ggml_tensor * ranking, Lane & lane, std::string & error) {
    const Layer & layer = model.layers[static_cast<size_t>(layer_pos)];
    if (ranking->ne[1] == 0) return true;  // the last layer of a micro-batch whose logits nobody wants
    if (layer.n_used < 1 || layer.n_used > layer.n_expert) {
        error = "layer " + std::to_string(layer.number) + ": llama.cpp has not shown how many experts a token uses";
        return false;
    }
    const ggml_tensor * scores = ranking->src[0], * gates = gates_behind(ranking);
    if (!sort(ranking, lane)) {
        error = "ggml could not sort the scores of a router";
        return false;
    }
    selected_.resize(static_cast<size_t>(ranking->ne[1]) * static_cast<size_t>(layer.n_used));
    view_ = {static_cast<const float *>(scores->data), gates ? static_cast<const float *>(gates->data) : nullptr, order_.data(), selected_.data(), static_cast<int32_t>(ranking->ne[1]),
             static_cast<int32_t>(ranking->ne[0]), layer.n_used, 0};
    return ask(model, layer_pos, error) && write(model, layer, ranking, error);
}

}  // namespace moe_edge
