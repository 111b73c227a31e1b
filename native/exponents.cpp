#include "exponents.h"

#include <algorithm>
#include <cstring>
#include <initializer_list>

#if defined(__x86_64__)
#include <immintrin.h>

#include "x86_features.h"
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace moe_edge {

namespace {

constexpr uint32_t ESCAPE = 7;
constexpr int64_t LOOK = 64;  // bytes that vectors read at most from where the next escape lies

// A group: eight bytes with two bits of each code, then four with the third. Byte b has values b, 8 + b, 16 + b, 24 + b;
// of the four, byte b has values b, 4 + b, ..., 28 + b; lowest bits first.
struct Group {
    uint64_t two;
    uint32_t one;
    explicit Group(const uint8_t * group) {
        memcpy(&two, group, 8);
        memcpy(&one, group + 8, 4);
    }
    // Codes of the values 8k to 8k + 7, the first in the lowest byte.
    uint64_t eight(int k) const {
        const uint64_t low = one >> (2 * k) & 0x01010101u, high = one >> (2 * k + 1) & 0x01010101u;
        return (two >> (2 * k) & 0x0303030303030303u) | (low | high << 32) << 2;
    }
};

// Values [first, n) of a chunk, first that of a group. Returns the escapes used; more than there are: it has stopped.
int64_t join_plain(const CodedExponents & coded, const uint8_t * low, char * dst, int64_t first, int64_t n, int64_t used) {
    const uint8_t * group = coded.groups + code_bytes(first, coded.is_f16);
    uint8_t table[CODE_TABLE], high[CODE_GROUP], lows[CODE_GROUP] = {};
    uint16_t values[CODE_GROUP];
    memcpy(table, coded.table, sizeof table);
    for (int64_t i = first; i < n; i += CODE_GROUP) {
        const auto some = static_cast<size_t>(std::min(CODE_GROUP, n - i));
        const Group codes(group), more(group + (coded.is_f16 ? CODE_GROUP_BYTES : 0));
        group += CODE_GROUP_BYTES * (coded.is_f16 ? 2 : 1);
        for (int k = 0; k < 4; k++) {
            const uint64_t eight = codes.eight(k);
            for (int b = 0; b < 8; b++) high[8 * k + b] = table[eight >> (8 * b) & 7];
            if (eight & eight >> 1 & eight >> 2 & 0x0101010101010101u) {  // one of them, or more, escapes
                for (int b = 0; b < 8; b++) {
                    if ((eight >> (8 * b) & 7) != ESCAPE) continue;
                    if (used >= coded.n_escapes) return coded.n_escapes + 1;
                    high[8 * k + b] = coded.escapes[used++];
                }
            }
            if (!coded.is_f16) continue;
            const uint64_t mantissas = more.eight(k);
            for (int b = 0; b < 8; b++) high[8 * k + b] |= static_cast<uint8_t>(mantissas >> (8 * b));
        }
        memcpy(lows, low + i, some);
        for (int64_t j = 0; j < CODE_GROUP; j++) {
            const auto rotated = static_cast<uint16_t>(high[j] << 8 | lows[j]);
            values[j] = static_cast<uint16_t>(rotated >> 1 | rotated << 15);
        }
        memcpy(dst + 2 * i, values, some * 2);
    }
    return used;
}

// Of a mask of eight values: which of the next escapes each takes; 0x80, which shuffles read as nothing, for the others.
struct Spread {
    alignas(8) uint8_t index[256][8];
    constexpr Spread() : index() {
        for (int mask = 0; mask < 256; mask++) {
            uint8_t next = 0;
            for (int i = 0; i < 8; i++) index[mask][i] = (mask >> i & 1) ? next++ : 0x80;
        }
    }
};
[[maybe_unused]] constexpr Spread SPREAD;

#if defined(__x86_64__)

__attribute__((target("avx2"))) inline __m256i codes32(const uint8_t * group) {
    int64_t two;
    int32_t one;
    memcpy(&two, group, 8);
    memcpy(&one, group + 8, 4);
    const __m256i pairs = _mm256_srlv_epi64(_mm256_set1_epi64x(two), _mm256_setr_epi64x(0, 2, 4, 6));
    const __m256i bits = _mm256_srlv_epi32(_mm256_set1_epi32(one), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    const __m256i third = _mm256_slli_epi16(_mm256_and_si256(bits, _mm256_set1_epi8(1)), 2);
    return _mm256_or_si256(_mm256_and_si256(pairs, _mm256_set1_epi8(3)), third);
}

__attribute__((target("avx2"))) inline __m128i spread8(const uint8_t * escapes, uint32_t mask) {
    const __m128i index = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(SPREAD.index[mask & 255]));
    return _mm_shuffle_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(escapes)), index);
}

__attribute__((target("avx2,popcnt"))) inline __m256i spread32(const uint8_t * escapes, uint32_t mask) {
    const __m128i a = spread8(escapes, mask);
    const __m128i b = spread8(escapes + _mm_popcnt_u32(mask & 0xff), mask >> 8);
    const __m128i c = spread8(escapes + _mm_popcnt_u32(mask & 0xffff), mask >> 16);
    const __m128i d = spread8(escapes + _mm_popcnt_u32(mask & 0xffffff), mask >> 24);
    return _mm256_set_m128i(_mm_unpacklo_epi64(c, d), _mm_unpacklo_epi64(a, b));
}

// Whole groups, as long as there is something to read behind the escapes. Returns the escapes used, sets the values done.
template <bool F16>
__attribute__((target("avx2,popcnt"))) int64_t join_avx2(const CodedExponents & coded, const uint8_t * low, char * dst,
                                                          int64_t n, int64_t & done) {
    const __m256i table = _mm256_broadcastsi128_si256(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(coded.table)));
    const uint8_t * group = coded.groups;
    int64_t used = 0, i = 0;
    for (; i + CODE_GROUP <= n && used <= coded.n_escapes; i += CODE_GROUP) {
        const __m256i codes = codes32(group);
        const auto mask = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(codes, _mm256_set1_epi8(ESCAPE))));
        __m256i high = _mm256_or_si256(_mm256_shuffle_epi8(table, codes), spread32(coded.escapes + used, mask));
        used += _mm_popcnt_u32(mask);
        group += CODE_GROUP_BYTES;
        if (F16) {
            high = _mm256_or_si256(high, codes32(group));
            group += CODE_GROUP_BYTES;
        }
        const __m256i lows = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(low + i));
        const __m256i a = _mm256_unpacklo_epi8(lows, high), b = _mm256_unpackhi_epi8(lows, high);
        const __m256i ra = _mm256_or_si256(_mm256_srli_epi16(a, 1), _mm256_slli_epi16(a, 15));
        const __m256i rb = _mm256_or_si256(_mm256_srli_epi16(b, 1), _mm256_slli_epi16(b, 15));
        auto * out = reinterpret_cast<__m256i *>(dst + 2 * i);
        _mm256_storeu_si256(out, _mm256_permute2x128_si256(ra, rb, 0x20));
        _mm256_storeu_si256(out + 1, _mm256_permute2x128_si256(ra, rb, 0x31));
    }
    done = i;
    return used;
}

#define ME_AVX512 "avx512f,avx512bw,avx512vl,avx512vbmi2,avx2,popcnt"

template <bool F16>
__attribute__((target(ME_AVX512))) int64_t join_avx512(const CodedExponents & coded, const uint8_t * low, char * dst, int64_t n,
                                                        int64_t & done) {
    const __m256i table = _mm256_broadcastsi128_si256(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(coded.table)));
    const uint8_t * group = coded.groups;
    int64_t used = 0, i = 0;
    for (; i + CODE_GROUP <= n && used <= coded.n_escapes; i += CODE_GROUP) {
        const __m256i codes = codes32(group);
        const __mmask32 mask = _mm256_cmpeq_epi8_mask(codes, _mm256_set1_epi8(ESCAPE));
        const __m256i next = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(coded.escapes + used));
        __m256i high = _mm256_or_si256(_mm256_shuffle_epi8(table, codes), _mm256_maskz_expand_epi8(mask, next));
        used += _mm_popcnt_u32(mask);
        group += CODE_GROUP_BYTES;
        if (F16) {
            high = _mm256_or_si256(high, codes32(group));
            group += CODE_GROUP_BYTES;
        }
        const __m256i lows = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(low + i));
        const __m512i wide = _mm512_or_si512(_mm512_slli_epi16(_mm512_cvtepu8_epi16(high), 8), _mm512_cvtepu8_epi16(lows));
        _mm512_storeu_si512(dst + 2 * i, _mm512_shrdi_epi16(wide, wide, 1));
    }
    done = i;
    return used;
}

#elif defined(__ARM_NEON) && defined(__aarch64__)

struct Codes32 {
    uint8x16_t a, b;
};

inline Codes32 codes32(const uint8_t * group) {
    static const int8_t PAIR_A[16] = {0, 0, 0, 0, 0, 0, 0, 0, -2, -2, -2, -2, -2, -2, -2, -2};
    static const int8_t BIT_A[16] = {0, 0, 0, 0, -1, -1, -1, -1, -2, -2, -2, -2, -3, -3, -3, -3};
    const uint8x8_t two = vld1_u8(group);
    uint32_t one;
    memcpy(&one, group + 8, 4);
    const uint8x16_t pairs = vcombine_u8(two, two), bits = vreinterpretq_u8_u32(vdupq_n_u32(one));
    const int8x16_t pair_a = vld1q_s8(PAIR_A), bit_a = vld1q_s8(BIT_A);
    const uint8x16_t three = vdupq_n_u8(3), first = vdupq_n_u8(1);
    const auto code = [&](int8x16_t pair, int8x16_t bit) {
        const uint8x16_t third = vandq_u8(vshlq_u8(bits, bit), first);
        return vorrq_u8(vandq_u8(vshlq_u8(pairs, pair), three), vshlq_n_u8(third, 2));
    };
    return {code(pair_a, bit_a), code(vsubq_s8(pair_a, vdupq_n_s8(4)), vsubq_s8(bit_a, vdupq_n_s8(4)))};
}

// The escapes of 16 values: those whose code is ESCAPE, the next ones in order. `used` counts on.
inline uint8x16_t spread16(uint8x16_t codes, const uint8_t * escapes, int64_t & used) {
    static const uint8_t WEIGHTS[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    const uint8x16_t set = vandq_u8(vceqq_u8(codes, vdupq_n_u8(ESCAPE)), vld1q_u8(WEIGHTS));
    const uint8_t first = vaddv_u8(vget_low_u8(set)), second = vaddv_u8(vget_high_u8(set));
    const uint8x8_t a = vtbl1_u8(vld1_u8(escapes + used), vld1_u8(SPREAD.index[first]));
    used += __builtin_popcount(first);
    const uint8x8_t b = vtbl1_u8(vld1_u8(escapes + used), vld1_u8(SPREAD.index[second]));
    used += __builtin_popcount(second);
    return vcombine_u8(a, b);
}

inline void store16(uint8x16_t high, uint8x16_t low, char * dst) {
    const auto turned = [](uint8x16_t bytes) {
        const uint16x8_t words = vreinterpretq_u16_u8(bytes);
        return vreinterpretq_u8_u16(vsliq_n_u16(vshrq_n_u16(words, 1), words, 15));
    };
    vst1q_u8(reinterpret_cast<uint8_t *>(dst), turned(vzip1q_u8(low, high)));
    vst1q_u8(reinterpret_cast<uint8_t *>(dst) + 16, turned(vzip2q_u8(low, high)));
}

template <bool F16>
int64_t join_neon(const CodedExponents & coded, const uint8_t * low, char * dst, int64_t n, int64_t & done) {
    const uint8x16_t table = vcombine_u8(vld1_u8(coded.table), vdup_n_u8(0));
    const uint8_t * group = coded.groups;
    int64_t used = 0, i = 0;
    for (; i + CODE_GROUP <= n && used <= coded.n_escapes; i += CODE_GROUP) {
        const Codes32 codes = codes32(group);
        uint8x16_t a = vorrq_u8(vqtbl1q_u8(table, codes.a), spread16(codes.a, coded.escapes, used));
        uint8x16_t b = vorrq_u8(vqtbl1q_u8(table, codes.b), spread16(codes.b, coded.escapes, used));
        group += CODE_GROUP_BYTES;
        if (F16) {
            const Codes32 more = codes32(group);
            a = vorrq_u8(a, more.a);
            b = vorrq_u8(b, more.b);
            group += CODE_GROUP_BYTES;
        }
        store16(a, vld1q_u8(low + i), dst + 2 * i);
        store16(b, vld1q_u8(low + i + 16), dst + 2 * i + 32);
    }
    done = i;
    return used;
}

#endif

}  // namespace

bool code_unpacker_usable(CodeUnpacker which) {
    if (which == CodeUnpacker::PLAIN) return true;
#if defined(__x86_64__)
    static const X86Features features = x86_features();
    return which == CodeUnpacker::AVX2 ? features.avx2 : which == CodeUnpacker::AVX512 && features.vbmi2;
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return which == CodeUnpacker::NEON;
#else
    return false;
#endif
}

CodeUnpacker best_code_unpacker() {
    for (CodeUnpacker each : {CodeUnpacker::AVX512, CodeUnpacker::AVX2, CodeUnpacker::NEON}) {
        if (code_unpacker_usable(each)) return each;
    }
    return CodeUnpacker::PLAIN;
}

bool join_codes(CodeUnpacker which, const CodedExponents & coded, const uint8_t * low, char * dst, int64_t n) {
    int64_t used = 0, done = 0;
    // Vectors read on behind the last escape: into the groups, which must be long enough for it.
    const bool plain = code_bytes(n, coded.is_f16) < LOOK + CODE_GROUP;
    if (!plain) {
        switch (which) {
#if defined(__x86_64__)
            case CodeUnpacker::AVX2:
                used = coded.is_f16 ? join_avx2<true>(coded, low, dst, n, done) : join_avx2<false>(coded, low, dst, n, done);
                break;
            case CodeUnpacker::AVX512:
                used = coded.is_f16 ? join_avx512<true>(coded, low, dst, n, done) : join_avx512<false>(coded, low, dst, n, done);
                break;
#elif defined(__ARM_NEON) && defined(__aarch64__)
            case CodeUnpacker::NEON:
                used = coded.is_f16 ? join_neon<true>(coded, low, dst, n, done) : join_neon<false>(coded, low, dst, n, done);
                break;
#endif
            default: break;
        }
    }
    return join_plain(coded, low, dst, done, n, used) == coded.n_escapes;
}

}  // namespace moe_edge
