// How the bytes of a piece lie in their file. A codec turns `stored_bytes` that a source has delivered into the `nbytes`
// that a product reads. `raw` is the only one: what is stored is what is used, in place.
#pragma once
#include <cstdint>

namespace moe_edge {

enum Codec : int32_t { CODEC_RAW = 0 };

inline bool knows_codec(int32_t id) { return id == CODEC_RAW; }

}  // namespace moe_edge
