#include "codec.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "exponents.h"
#include "ggml.h"

namespace moe_edge {

Zstd zstd;

namespace {

CodeUnpacker code_unpacker = best_code_unpacker();

constexpr uint32_t MAGIC = 0x4b50454d;  // "MEPK"
constexpr int MAX_PLANES = 8;

struct Header {  // then uint32_t sizes[n_planes][n_chunks], then the chunks, plane after plane
    uint32_t magic, type, chunk_blocks, n_planes;
    uint64_t n_blocks;
    uint32_t n_chunks, coding;  // coding: of the exponents, 1 with codec `codes`; else 0
};
static_assert(sizeof(Header) == 32, "it is written by Python");

// The fields of a block, one after the other: so many bytes each. A 16-bit float is one "block" of two planes, see join16.
struct Fields {
    int32_t type;
    int n;
    int bytes[MAX_PLANES];
};
constexpr Fields FIELDS[] = {
    {GGML_TYPE_F16, 2, {1, 1}},
    {GGML_TYPE_BF16, 2, {1, 1}},
    {GGML_TYPE_Q4_0, 3, {1, 1, 16}},
    {GGML_TYPE_Q4_1, 5, {1, 1, 1, 1, 16}},
    {GGML_TYPE_Q5_0, 4, {1, 1, 4, 16}},
    {GGML_TYPE_Q5_1, 6, {1, 1, 1, 1, 4, 16}},
    {GGML_TYPE_Q8_0, 3, {1, 1, 32}},
    {GGML_TYPE_Q2_K, 6, {16, 64, 1, 1, 1, 1}},
    {GGML_TYPE_Q4_K, 6, {1, 1, 1, 1, 12, 128}},
    {GGML_TYPE_IQ4_NL, 3, {1, 1, 16}},
    {GGML_TYPE_MXFP4, 2, {1, 16}},
    {GGML_TYPE_TQ2_0, 3, {64, 1, 1}},
};

const Fields * fields_of(int32_t type) {
    for (const Fields & f : FIELDS) {
        if (f.type == type) return &f;
    }
    return nullptr;
}

bool is_16_bit(int32_t type) { return type == GGML_TYPE_F16 || type == GGML_TYPE_BF16; }

// A decompression context and a buffer for one chunk, kept by each thread that decodes.
struct Scratch {
    void * context = nullptr;
    std::vector<char> bytes;
    ~Scratch() {
        if (context) zstd.free(context);
    }
};

// The low plane holds seven bits of mantissa and, in the last one, the sign: the value rotated left by one.
void join16(const uint8_t * high, const uint8_t * low, char * dst, int64_t n) {
    auto * out = reinterpret_cast<uint16_t *>(dst);
    for (int64_t i = 0; i < n; i++) {
        const auto rotated = static_cast<uint16_t>(high[i] << 8 | low[i]);
        out[i] = static_cast<uint16_t>(rotated >> 1 | rotated << 15);
    }
}

template <int N>
void scatter(const char * plane, char * dst, int64_t stride, int64_t n) {
    for (int64_t i = 0; i < n; i++) memcpy(dst + i * stride, plane + i * N, N);
}

void place(const char * plane, int bytes, char * dst, int64_t stride, int64_t n) {
    switch (bytes) {
        case 1: return scatter<1>(plane, dst, stride, n);
        case 4: return scatter<4>(plane, dst, stride, n);
        case 12: return scatter<12>(plane, dst, stride, n);
        case 16: return scatter<16>(plane, dst, stride, n);
        case 32: return scatter<32>(plane, dst, stride, n);
        case 64: return scatter<64>(plane, dst, stride, n);
        default: return scatter<128>(plane, dst, stride, n);
    }
}

// Some bytes of a piece: where they lie, or put together in `joined` when they run over the end of the head.
const char * stretch(const Stored & s, int64_t at, int64_t n, std::vector<char> & joined) {
    if (at + n <= s.head_bytes) return s.head + at;
    if (at >= s.tail_from) return s.tail + (at - s.tail_from);
    joined.resize(static_cast<size_t>(n));
    const int64_t in_head = s.head_bytes - at;  // the tail goes on from there: it begins before the head ends
    memcpy(joined.data(), s.head + at, static_cast<size_t>(in_head));
    memcpy(joined.data() + in_head, s.tail + (s.head_bytes - s.tail_from), static_cast<size_t>(n - in_head));
    return joined.data();
}

// A packed piece whose header and table have been checked against its size.
struct Packed {
    Stored stored;
    const Fields * fields = nullptr;
    Header header{};
    int64_t block_bytes = 0;
    std::vector<uint32_t> sizes;
    std::vector<int64_t> next;  // of each plane: its next chunk, from the start of the piece
    std::vector<char> joined[MAX_PLANES];

    std::string open(const Stored & stored, int32_t codec, int32_t type, int64_t nbytes);
    int64_t blocks_of(uint32_t chunk) const {
        const uint64_t first = static_cast<uint64_t>(chunk) * header.chunk_blocks;
        return static_cast<int64_t>(std::min<uint64_t>(header.chunk_blocks, header.n_blocks - first));
    }
    size_t size_of(int p, uint32_t chunk) const { return sizes[static_cast<size_t>(p) * header.n_chunks + chunk]; }
    const char * take(int p, uint32_t chunk);  // its stored bytes; each chunk once, in order
    std::string plane(int p, uint32_t chunk, Scratch & scratch, char * room, const char *& out);
    std::string join_zstd(uint32_t chunk, Scratch & scratch, char * dst);
    std::string join_coded(uint32_t chunk, char * dst);
};

std::string Packed::open(const Stored & from, int32_t codec, int32_t type, int64_t nbytes) {
    stored = from;
    const int64_t stored_bytes = stored.bytes;
    fields = packs_type(codec, type) ? fields_of(type) : nullptr;
    if (!fields) return "is packed in planes, which its type does not have";
    for (int p = 0; p < fields->n; p++) block_bytes += fields->bytes[p];
    if (stored_bytes < static_cast<int64_t>(sizeof header)) return "is packed in fewer bytes than a header takes";
    memcpy(&header, stretch(stored, 0, sizeof header, joined[0]), sizeof header);
    const auto n_blocks = static_cast<uint64_t>(nbytes / block_bytes);
    const bool sound = header.magic == MAGIC && header.type == static_cast<uint32_t>(type) && header.n_blocks == n_blocks &&
                       header.n_planes == static_cast<uint32_t>(fields->n) && header.chunk_blocks > 0 &&
                       header.coding == (codec == CODEC_CODES ? 1u : 0u) &&
                       header.n_chunks == (n_blocks + header.chunk_blocks - 1) / header.chunk_blocks;
    if (!sound) return "is packed with a header of another matrix; it is damaged: convert or download it again";
    const int64_t n_sizes = static_cast<int64_t>(header.n_planes) * header.n_chunks;
    int64_t at = static_cast<int64_t>(sizeof header) + n_sizes * 4;
    if (at > stored_bytes) return "is packed with a table that is cut short; convert or download it again";
    sizes.resize(static_cast<size_t>(n_sizes));
    memcpy(sizes.data(), stretch(stored, sizeof header, n_sizes * 4, joined[0]), static_cast<size_t>(n_sizes) * 4);
    for (int64_t i = 0; i < n_sizes; i++) {
        if (i % header.n_chunks == 0) next.push_back(at);
        at += sizes[static_cast<size_t>(i)];
    }
    if (at != stored_bytes) {
        return "is packed in " + std::to_string(stored_bytes) + " bytes but its chunks take " + std::to_string(at) +
               "; it is damaged: convert or download it again";
    }
    return {};
}

const char * Packed::take(int p, uint32_t chunk) {
    int64_t & at = next[static_cast<size_t>(p)];
    const auto size = static_cast<int64_t>(size_of(p, chunk));
    at += size;
    return stretch(stored, at - size, size, joined[p]);
}

// A chunk of a plane: where it lies when it is raw, else unpacked into `room`.
std::string Packed::plane(int p, uint32_t chunk, Scratch & scratch, char * room, const char *& out) {
    const size_t size = size_of(p, chunk), needed = static_cast<size_t>(blocks_of(chunk) * fields->bytes[p]);
    const char * chunk_bytes = take(p, chunk);
    out = chunk_bytes;
    if (size == needed) return {};
    out = room;
    const size_t got = zstd.decompress(scratch.context, room, needed, chunk_bytes, size);
    if (!zstd.is_error(got) && got == needed) return {};
    return "does not unpack: plane " + std::to_string(p) + ", chunk " + std::to_string(chunk) + " should give " +
           std::to_string(needed) + " bytes; it is damaged: convert or download it again";
}

// A chunk of the matrix, with zstd.
std::string Packed::join_zstd(uint32_t chunk, Scratch & scratch, char * dst) {
    const int64_t n = blocks_of(chunk);
    const char * planes[MAX_PLANES];
    char * room = scratch.bytes.data();
    for (int p = 0; p < fields->n; p++) {
        const std::string error = plane(p, chunk, scratch, room, planes[p]);
        if (!error.empty()) return error;
        room += n * fields->bytes[p];
    }
    if (is_16_bit(static_cast<int32_t>(header.type))) {
        join16(reinterpret_cast<const uint8_t *>(planes[0]), reinterpret_cast<const uint8_t *>(planes[1]), dst, n);
        return {};
    }
    int offset = 0;
    for (int p = 0; p < fields->n; p++) {
        place(planes[p], fields->bytes[p], dst + offset, block_bytes, n);
        offset += fields->bytes[p];
    }
    return {};
}

// A chunk of the matrix, its exponents raw or in codes: how many escape, the table, the escapes, the groups of codes.
std::string Packed::join_coded(uint32_t chunk, char * dst) {
    const int64_t n = blocks_of(chunk), size = static_cast<int64_t>(size_of(0, chunk));
    const auto * high = reinterpret_cast<const uint8_t *>(take(0, chunk));
    const auto * low = reinterpret_cast<const uint8_t *>(take(1, chunk));
    const std::string damaged = "does not unpack: the exponents of chunk " + std::to_string(chunk) +
                                " contradict their size; it is damaged: convert or download it again";
    if (static_cast<int64_t>(size_of(1, chunk)) != n) return damaged;
    if (size == n) {
        join16(high, low, dst, n);
        return {};
    }
    CodedExponents coded;
    coded.is_f16 = header.type == GGML_TYPE_F16;
    constexpr int64_t front = 4 + CODE_TABLE;
    coded.n_escapes = size - front - code_bytes(n, coded.is_f16);
    if (coded.n_escapes < 0) return damaged;
    uint32_t n_escapes;
    memcpy(&n_escapes, high, 4);
    memcpy(coded.table, high + 4, CODE_TABLE);
    coded.escapes = high + front;
    coded.groups = coded.escapes + coded.n_escapes;
    const bool sound = n_escapes == coded.n_escapes && coded.table[CODE_TABLE - 1] == 0;
    return sound && join_codes(code_unpacker, coded, low, dst, n) ? std::string() : damaged;
}

}  // namespace

bool packs_type(int32_t codec, int32_t type) {
    return codec == CODEC_CODES ? is_16_bit(type) : codec == CODEC_PLANES && fields_of(type) != nullptr;
}

bool use_code_unpacker(int32_t which) {
    const auto wanted = static_cast<CodeUnpacker>(which);
    const bool usable = code_unpacker_usable(wanted);
    if (usable) code_unpacker = wanted;
    return usable;
}

int64_t planes_cut(int32_t type, int64_t stored_bytes, int64_t nbytes) {
    const Fields * fields = fields_of(type);
    if (!fields || fields->n != 2) return 0;
    const int64_t last = nbytes / (fields->bytes[0] + fields->bytes[1]) * fields->bytes[1];
    return last < stored_bytes ? stored_bytes - last : 0;
}

std::string decode_packed(const Stored & stored, int32_t codec, int32_t type, char * dst, int64_t nbytes) {
    static thread_local Scratch scratch;
    Packed packed;
    std::string error = packed.open(stored, codec, type, nbytes);
    if (!error.empty()) return error;
    if (codec == CODEC_PLANES) {
        if (!scratch.context) scratch.context = zstd.usable() ? zstd.create() : nullptr;
        if (!scratch.context) return "is packed, and zstd could not be started to unpack it";
        const int64_t chunk_bytes = static_cast<int64_t>(packed.header.chunk_blocks) * packed.block_bytes;
        const auto room = static_cast<size_t>(std::min(chunk_bytes, nbytes));
        if (scratch.bytes.size() < room) scratch.bytes.resize(room);
    }
    for (uint32_t c = 0; c < packed.header.n_chunks; c++) {
        error = codec == CODEC_CODES ? packed.join_coded(c, dst) : packed.join_zstd(c, scratch, dst);
        if (!error.empty()) return error;
        dst += packed.blocks_of(c) * packed.block_bytes;
    }
    return {};
}

}  // namespace moe_edge
