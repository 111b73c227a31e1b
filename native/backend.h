// Registers the moe-edge device with ggml. Call once, before the first llama_context; a second call does nothing.
#pragma once

namespace moe_edge {

void register_backend();

}  // namespace moe_edge
