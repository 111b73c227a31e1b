// How the bytes of a piece lie in their file. A codec turns `stored_bytes` that a source has delivered into the `nbytes`
// that a product reads. `raw`: what is stored is what is used, in place. `planes`: fields of ggml's blocks apart, those
// that entropy coding shortens packed with zstd. `codes`: 16-bit floats alone, in the same two planes, but exponents in
// codes of one width (exponents.h). models/store/planes.py writes them, docs/FORMAT.md has every byte.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace moe_edge {

enum Codec : int32_t { CODEC_RAW = 0, CODEC_PLANES = 1, CODEC_CODES = 2 };

inline bool knows_codec(int32_t id) { return id >= CODEC_RAW && id <= CODEC_CODES; }

// zstd comes from the process, not from the linker: Python finds the system's library or that of the package zstandard.
struct Zstd {
    void * (*create)() = nullptr;
    size_t (*free)(void *) = nullptr;
    size_t (*decompress)(void *, void *, size_t, const void *, size_t) = nullptr;
    unsigned (*is_error)(size_t) = nullptr;
    bool usable() const { return create && free && decompress && is_error; }
};
extern Zstd zstd;

// The stored bytes of a packed piece, in two stretches that may overlap: [0, head_bytes) at `head`, and [tail_from, bytes)
// at `tail`. Whole in one place: a head that is all of it.
struct Stored {
    const char * head = nullptr;
    int64_t head_bytes = 0;
    const char * tail = nullptr;
    int64_t tail_from = 0;
    int64_t bytes = 0;
};

// Whether a codec that packs has a layout for a ggml type.
bool packs_type(int32_t codec, int32_t type);
// Where the stored bytes of a piece are best cut in two: before its last plane, the one of 16-bit floats that does not
// pack (sign and mantissa). 0: its type has no such plane, or the rest before it would be nothing.
int64_t planes_cut(int32_t type, int64_t stored_bytes, int64_t nbytes);
// What a thread that unpacks keeps between calls, at most: a chunk of 128 KiB, and zstd's context.
constexpr int64_t UNPACK_BYTES = 512 << 10;
// Unpack a piece of nbytes of this type into dst. Returns what is wrong, or nothing. Any thread may call it.
std::string decode_packed(const Stored & stored, int32_t codec, int32_t type, char * dst, int64_t nbytes);
// `codes` unpacks with the best that this processor has, or, for checks, with that of exponents.h that has this number.
// False: the processor does not have it. Not while anything is unpacked.
bool use_code_unpacker(int32_t which);

}  // namespace moe_edge
