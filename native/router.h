// Look-ahead: which experts the next MoE layers will select, asked of their own routers with this layer's input. The
// router weights are llama.cpp's, seen while the model was armed (graph.cpp); they live as long as its tensors do.
// Some models route before attention (smallthinker): the router's input is what the MoE layer before it left in the
// residual stream. There is nothing to guess then: the routing is worked out as soon as that input is there.
// Used under the step mutex, from the thread that schedules.
#pragma once
#include <cstdint>
#include <vector>

#include "capi.h"
#include "ggml.h"

namespace moe_edge {

class Model;
struct Lane;

constexpr int64_t AHEAD_TOKENS = 4;  // larger micro-batches touch most experts of a layer anyway

struct Router {
    const ggml_tensor * weight = nullptr;  // [n_embd, n_expert]
    const ggml_tensor * bias = nullptr;    // F32 [n_expert], added to the logits
    const ggml_tensor * choice_bias = nullptr;  // F32 [n_expert], added to the probabilities to choose by (exp_probs_b)
    const ggml_tensor * norm = nullptr;    // F32 [n_embd], the norm weight behind the router's input
    const ggml_tensor * input_norm = nullptr;   // and the one behind the experts' input, usually the same
    bool sigmoid = false;                  // probabilities; else a softmax
    bool early = false;                    // its input is what the MoE layer before it left, as it is: known before attention
    bool some_rows = false;                // routes only the tokens whose logits are wanted, as a last layer does
    bool sorts = false;                    // its experts are the first ones of an argsort over its scores
    bool shared = false;                   // and that choice is used for something else as well
    int gates = ME_GATES_UNKNOWN;          // how the gate weights are made of the probabilities, and the factor
    float gate_scale = 1;
};

struct LookAhead {
    int depth = 0, width = 0;   // layers ahead, experts of each; 0: off
    bool rescale = true;        // from this layer's norm weights to those of the layer asked about
    std::vector<float> x, scaled, sum, score, logits;
    std::vector<char> converted, routed;
    std::vector<int32_t> order;
};

// Fill the mailbox's ahead_* with the best `width` experts of each of the next min(depth, most) layers, best first, for
// the mean over the step's tokens. Returns the number of layers filled; a layer whose router is not known, or is early,
// has count 0.
int look_ahead(Model & model, int layer_pos, const float * input, int64_t n_tokens, int most);

// What an early router will say, by the operations and kernels that llama.cpp will take: for its input [n_embd, n_tokens]
// the experts of each token [n_used, n_tokens], strided, and the probabilities [n_expert, n_tokens]. Both are valid until
// the lane's next graph. False when ggml fails. Not for expert groups: no model that routes early has them.
struct Routed { const ggml_tensor * ids; const ggml_tensor * probabilities; };
bool route(LookAhead & a, const Router & r, const ggml_tensor * input, int64_t n_used, Lane & lane, Routed & out);
// Bytes that route() keeps for micro-batches of n_tokens.
int64_t routed_bytes(int64_t n_expert, int64_t n_tokens);

}  // namespace moe_edge
