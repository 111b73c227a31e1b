// Look-ahead: which experts the next MoE layers will select, asked of their own routers with this layer's input. The
// router weights are llama.cpp's, seen while the model was armed (graph.cpp); they live as long as its tensors do.
// Used under the step mutex, from the thread that schedules.
#pragma once
#include <cstdint>
#include <vector>

#include "capi.h"
#include "ggml.h"

namespace moe_edge {

class Model;

constexpr int64_t AHEAD_TOKENS = 4;  // larger micro-batches touch most experts of a layer anyway

struct Router {
    const ggml_tensor * weight = nullptr;  // [n_embd, n_expert]
    const ggml_tensor * bias = nullptr;    // F32 [n_expert], added to the logits
    const ggml_tensor * choice_bias = nullptr;  // F32 [n_expert], added to the probabilities to choose by (exp_probs_b)
    const ggml_tensor * norm = nullptr;    // F32 [n_embd], the norm weight behind the router's input
    const ggml_tensor * input_norm = nullptr;   // and the one behind the experts' input, usually the same
    bool sigmoid = false;                  // probabilities; else a softmax
};

struct LookAhead {
    int depth = 0, width = 0;   // layers ahead, experts of each; 0: off
    bool rescale = true;        // from this layer's norm weights to those of the layer asked about
    std::vector<float> x, scaled, sum, score, logits;
    std::vector<char> converted;
    std::vector<int32_t> order;
};

// Fill the mailbox's ahead_* with the best `width` experts of each of the next min(depth, most) layers, best first, for
// the mean over the step's tokens. Returns the number of layers filled; a layer whose router is not known has count 0.
int look_ahead(Model & model, int layer_pos, const float * input, int64_t n_tokens, int most);

}  // namespace moe_edge
