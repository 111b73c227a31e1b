// Types whose blocks are of 32 weights, and are multiplied with rows of Q8_0: what a block holds, as signed bytes and one
// float. Included by the files for an instruction set, which define TARGET and INLINE.
// ggml has one product for each, whatever the number of rows. In every block it makes eight whole numbers, each the sum of
// four products, makes them floats, and adds them times both scales to one register of eight, or with PARTS 2 to two in
// turns; at the end those are added, halves upon halves.
#include "few_rows_x86.h"

#ifdef MOE_EDGE_X86

namespace moe_edge {

namespace {

constexpr int64_t OF_32 = 32;
constexpr int64_t Q8_0_QUANTS = 2, Q8_0_BYTES = 34;   // a half, 32 signed bytes
constexpr int64_t MOST_BLOCKS = 512;                  // widest row

// Sixteen bytes have the lower halves of the first sixteen values and the upper halves of the others.
INLINE __m256i nibbles(const char * from) {
    const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from));
    return _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(both, 4), both), _mm256_set1_epi8(15));
}

INLINE __m256i looked_up(const char * from, __m128i values) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(values), nibbles(from));
}

struct Q8_0 {
    static constexpr int64_t BYTES = 34;
    static constexpr int PARTS = 1;
    INLINE float scale(const char * x) { return half(x); }
    INLINE __m256i values(const char * x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(x + 2)); }
};

struct Q4_0 {
    static constexpr int64_t BYTES = 18;
    static constexpr int PARTS = 1;
    INLINE float scale(const char * x) { return half(x); }
    INLINE __m256i values(const char * x) { return _mm256_sub_epi8(nibbles(x + 2), _mm256_set1_epi8(8)); }
};

// Four bytes have a fifth bit for each value; where it is not set, 16 goes off.
struct Q5_0 {
    static constexpr int64_t BYTES = 22;
    static constexpr int PARTS = 1;
    INLINE float scale(const char * x) { return half(x); }
    INLINE __m256i values(const char * x) {
        int32_t bits;
        memcpy(&bits, x + 2, sizeof(bits));
        const __m256i byte_of = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
        const __m256i bit_of = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201));
        const __m256i is_clear = _mm256_cmpeq_epi8(
            _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), byte_of), bit_of), _mm256_setzero_si256());
        return _mm256_or_si256(nibbles(x + 6), _mm256_and_si256(is_clear, _mm256_set1_epi8(static_cast<char>(0xF0))));
    }
};

struct IQ4_NL {
    static constexpr int64_t BYTES = 18;
    static constexpr int PARTS = 2;
    INLINE float scale(const char * x) { return half(x); }
    INLINE __m256i values(const char * x) {
        return looked_up(x + 2, _mm_set_epi8(113, 89, 69, 53, 38, 25, 13, 1, -10, -22, -35, -49, -65, -83, -104, -127));
    }
};

// The scale is an exponent, 128 more than it says; values are twice those of FP4.
struct MXFP4 {
    static constexpr int64_t BYTES = 17;
    static constexpr int PARTS = 2;
    INLINE float scale(const char * x) {
        const auto exponent = static_cast<uint8_t>(*x);
        const uint32_t bits = exponent < 2 ? 0x00200000u << exponent : static_cast<uint32_t>(exponent - 1) << 23;
        float scale;
        memcpy(&scale, &bits, sizeof(scale));
        return scale;
    }
    INLINE __m256i values(const char * x) {
        return looked_up(x + 1, _mm_set_epi8(-12, -8, -6, -4, -3, -2, -1, 0, 12, 8, 6, 4, 3, 2, 1, 0));
    }
};

}  // namespace

}  // namespace moe_edge

#endif
