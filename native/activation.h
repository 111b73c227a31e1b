// The operations between a layer's expert products and the input of its down product: scales, biases and the activation,
// read from llama.cpp's graph and built again at the real width. Every op is copied with its op_params, so its bits are
// ggml's own.
#pragma once
#include <string>
#include <utility>
#include <vector>

#include "ggml.h"

namespace moe_edge {

struct ActivationInputs {
    ggml_tensor * gate = nullptr;     // F32 [n_ff, 1, n_rows]; null when fused or ungated
    ggml_tensor * up = nullptr;
    ggml_tensor * gate_up = nullptr;  // F32 [2*n_ff, 1, n_rows], gate rows first
    ggml_tensor * bias_gate = nullptr, * bias_up = nullptr;  // F32 [n_ff, n_expert]
    ggml_tensor * ids = nullptr;      // I32 [1, n_rows], the expert of each row
    int64_t n_ff = 0;
    // Filled by build_activation: leaves F32 [1, 1, n_rows] without data, each to be given its rows' values of the scale
    // F32 [n_expert] beside it before the graph runs.
    std::vector<std::pair<ggml_tensor *, const float *>> row_scales;
};

// `hidden`: the graph's input of the down product. Null, and fills error, for an operation it does not know.
ggml_tensor * build_activation(ggml_context * ctx, const ggml_tensor * hidden, ActivationInputs & in, std::string & error);

// How many tensors of the experts' width are alive in one such graph: the products and everything up to `hidden`.
int count_activation_tensors(const ggml_tensor * hidden);

}  // namespace moe_edge
