// Recognises a MoE layer in llama.cpp's graph: which stub tensor belongs to which model, layer and projection, which
// nodes are ours, and what lies behind the products. Nodes are found by the name of their weight, never by op and shape
// alone (LLAMACPP.md, section 4). activation.h has the operations between the products.
#pragma once
#include <string>
#include <vector>

#include "ggml.h"
#include "model.h"

namespace moe_edge {

// An expert tensor of a model: the weights and biases of gate and up have width 1 in the skeleton, scales are whole.
struct Stub {
    enum Kind { WEIGHT, BIAS, SCALE };
    Model * model = nullptr;
    int layer_pos = -1;
    Projection projection = UP;
    Kind kind = WEIGHT;
};

void arm(Model * model);
void disarm(Model * model);
void unbind(Model * model);  // forget every stub of the model: its tensors are gone
int bound_tensors(Model * model);

// The stub a weight tensor is, or null. Binds it when a model is armed and the tensor fits one of its layers.
const Stub * find_stub(const ggml_tensor * weight);
// While a model is armed: keep what a node shows of a router, of the norms before it, and of the size of an activation.
// Never a node itself.
void note_router(const ggml_tensor * node);

// The layer whose experts this node ranks, by the scores of its router; null for other nodes, and for models that do not
// select (Model::selecting). The stub names no tensor: only model and layer count.
const Stub * selection_of(const ggml_tensor * node);
// Of such a node: what llama.cpp makes the gate weights of, F32 [n_expert, n_tokens], or null.
const ggml_tensor * gates_behind(const ggml_tensor * ranking);
// To be told of each model that begins or ends to select.
void count_selecting(int more);

// The stub whose product this node is (MUL_MAT_ID with a bound stub), or null.
const Stub * product_of(const ggml_tensor * node);
// True for the nodes the engine computes: expert products and what lies between them.
bool is_ours(const ggml_tensor * node);

// The scale tensor F32 [n_expert] whose values this REPEAT or GET_ROWS hands on to an expert product, or null. llama.cpp
// multiplies gate, up or down by `GET_ROWS(REPEAT(scale), ids)`, before any bias.
const ggml_tensor * scale_behind(const ggml_tensor * node);

// The weighted sum over a token's experts, ((e0*w0 + e1*w1) + e2*w2) ..., as llama.cpp builds it behind the down product.
struct WeightedSum {
    const ggml_tensor * weights = nullptr;  // F32 [1, n_used, n_tokens]
    const ggml_tensor * scale = nullptr;    // F32 [n_expert], multiplies each expert before its weight does; or null
    ggml_tensor * sum = nullptr;            // F32 [n_embd, n_tokens]: the last addition
};
// The down stub of a node that scales, biases, weighs or adds up its layer's outputs; null for other nodes.
const Stub * behind_down(const ggml_tensor * node);
// Of a node that adds a layer's weighted sum to the residual, when the next MoE layer's router takes the result as its
// input (Router::early): that layer's down stub. Null for all other nodes.
const Stub * early_input(const ggml_tensor * node);
// The gate weights F32 [1, n_used, n_tokens] of the layer whose first product is the node at `first`; null when the graph
// does not show them behind the down product.
const ggml_tensor * find_gate_weights(ggml_cgraph * graph, int first);
// Finds the whole sum of the down product at `down` among the nodes behind it. False when it is not all in this graph,
// or not in the form above: its nodes are then computed one by one.
bool find_weighted_sum(ggml_cgraph * graph, int down, WeightedSum & out);

}  // namespace moe_edge
