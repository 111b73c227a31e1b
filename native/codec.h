// How the bytes of a piece lie in their file. A codec turns `stored_bytes` that a source has delivered into the `nbytes`
// that a product reads. `raw`: what is stored is what is used, in place. `planes`: fields of ggml's blocks apart, those
// that entropy coding shortens packed with zstd (models/store/planes.py writes them, docs/FORMAT.md has every byte).
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace moe_edge {

enum Codec : int32_t { CODEC_RAW = 0, CODEC_PLANES = 1 };

inline bool knows_codec(int32_t id) { return id == CODEC_RAW || id == CODEC_PLANES; }

// zstd comes from the process, not from the linker: Python finds the system's library or that of the package zstandard.
struct Zstd {
    void * (*create)() = nullptr;
    size_t (*free)(void *) = nullptr;
    size_t (*decompress)(void *, void *, size_t, const void *, size_t) = nullptr;
    unsigned (*is_error)(size_t) = nullptr;
    bool usable() const { return create && free && decompress && is_error; }
};
extern Zstd zstd;

// Whether `planes` has a layout for a ggml type.
bool planes_of_type(int32_t type);
// What a thread that unpacks keeps between calls, at most: a chunk of 128 KiB, and zstd's context.
constexpr int64_t UNPACK_BYTES = 512 << 10;
// Unpack a piece of nbytes of this type into dst. Returns what is wrong, or nothing. Any thread may call it.
std::string decode_planes(const char * stored, int64_t stored_bytes, int32_t type, char * dst, int64_t nbytes);

}  // namespace moe_edge
