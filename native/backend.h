// Registers the moe-edge device with ggml. Call once, before the first llama_context; a second call does nothing.
#pragma once
#include "ggml-backend.h"

namespace moe_edge {

class StepRunner;

void register_backend();
// Computes a run of nodes that are all ours, or views between them. False: the model has the error.
bool compute_nodes(StepRunner & runner, ggml_cgraph * graph);

}  // namespace moe_edge
