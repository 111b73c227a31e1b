// Recognises a MoE layer in llama.cpp's graph: which stub tensor belongs to which model, layer and projection, which
// nodes are ours, and which operations lie between the expert products (the activation). Nodes are found by the name
// of their weight, never by op and shape alone (LLAMACPP.md, section 4).
#pragma once
#include <string>
#include <vector>

#include "ggml.h"
#include "model.h"

namespace moe_edge {

struct Stub {
    Model * model = nullptr;
    int layer_pos = -1;
    Projection projection = UP;
    bool bias = false;
};

void arm(Model * model);
void disarm(Model * model);
void unbind(Model * model);  // forget every stub of the model: its tensors are gone
int bound_tensors(Model * model);

// The stub a weight tensor is, or null. Binds it when a model is armed and the tensor fits one of its layers.
const Stub * find_stub(const ggml_tensor * weight);
// While a model is armed: keep what a node shows of a router and of the norms before it. Never a node itself.
void note_router(const ggml_tensor * node);

// The stub whose product this node is (MUL_MAT_ID with a bound stub), or null.
const Stub * product_of(const ggml_tensor * node);
// True for the nodes the engine computes: expert products and what lies between them.
bool is_ours(const ggml_tensor * node);

// The weighted sum over a token's experts, ((e0*w0 + e1*w1) + e2*w2) ..., as llama.cpp builds it behind the down product.
struct WeightedSum {
    const ggml_tensor * weights = nullptr;  // F32 [1, n_used, n_tokens]
    ggml_tensor * sum = nullptr;            // F32 [n_embd, n_tokens]: the last addition
};
bool is_weighted(const ggml_tensor * node);      // the down product times the gate weights
bool is_partial_sum(const ggml_tensor * node);   // an addition of slices of it
bool is_down_bias(const ggml_tensor * node);     // the down product plus the bias of each expert
// Of a node that adds a layer's weighted sum to the residual, when the next MoE layer's router takes the result as its
// input (Router::early): that layer's down stub. Null for all other nodes.
const Stub * early_input(const ggml_tensor * node);
// The gate weights F32 [1, n_used, n_tokens] of the layer whose first product is the node at `first`; null when the graph
// does not show them behind the down product.
const ggml_tensor * find_gate_weights(ggml_cgraph * graph, int first);
// Finds the whole sum of the down product at `down` among the nodes behind it. False when it is not all in this graph,
// or not in the form above: its nodes are then computed one by one.
bool find_weighted_sum(ggml_cgraph * graph, int down, WeightedSum & out);

// Rebuilds, at the real width and for n_rows rows, the operations between the expert products and `hidden` (the
// input of the down product). `gate_up` holds gate rows first. Every op is copied with its op_params, so its bits are
// ggml's own. Returns null and fills error for an operation it does not know.
struct ActivationInputs {
    ggml_tensor * gate = nullptr;     // F32 [n_ff, 1, n_rows]; null when fused or ungated
    ggml_tensor * up = nullptr;
    ggml_tensor * gate_up = nullptr;  // F32 [2*n_ff, 1, n_rows]
    ggml_tensor * bias_gate = nullptr, * bias_up = nullptr;  // F32 [n_ff, n_expert]
    ggml_tensor * ids = nullptr;      // I32 [1, n_rows], the expert of each row
    int64_t n_ff = 0;
};
ggml_tensor * build_activation(ggml_context * ctx, const ggml_tensor * hidden, const ActivationInputs & in, std::string & error);

}  // namespace moe_edge
