// What the AVX-512 kernels of few rows share (few_rows.h): a block of 256 weights in four registers, and its whole-number
// products with rows. For files that are compiled for x86-64.
#pragma once
#include "few_rows_x86.h"

#ifdef MOE_EDGE_X86

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")))
#define INLINE TARGET __attribute__((always_inline)) static inline
#include "sums_avx512.h"

namespace moe_edge {

INLINE __m512i load(const void * from) { return _mm512_loadu_si512(from); }
INLINE __m512i twice(const void * from) { return _mm512_broadcast_i64x4(_mm256_loadu_si256(static_cast<const __m256i *>(from))); }
INLINE __m512i halves(int16_t low, int16_t high) {
    return _mm512_inserti64x4(_mm512_set1_epi16(low), _mm256_set1_epi16(high), 1);
}

FewRowsKernel tiled_rows_avx512(ggml_type type, bool fused);  // null for other types

// The sums of 32 values each of a block of a row.
INLINE __m128i sums_of_32(const char * y) {
    const auto * sums = reinterpret_cast<const __m128i *>(y + Q8_K_SUMS);
    return _mm_hadd_epi16(_mm_loadu_si128(sums), _mm_loadu_si128(sums + 1));
}

// One block of weights: 256 of them as bytes without sign, and what each is multiplied by.
struct Block { __m512i q[4], scale[4]; };

INLINE void unpack_q4_k(const char * x, Block & w, uint64_t & mins) {
    uint64_t scales;
    scales_and_mins(x + Q4_K_SCALES, scales, mins);
    const __m512i each = _mm512_set1_epi64(static_cast<int64_t>(scales));
    UNROLL
    for (int j = 0; j < 4; j++) {
        const __m512i nibbles = _mm512_srlv_epi16(twice(x + Q4_K_QUANTS + 32 * j), halves(0, 4));
        w.q[j] = _mm512_and_si512(nibbles, _mm512_set1_epi8(15));
        const auto at = static_cast<int16_t>(0x8000 | (2 * j));  // the byte 2 j, and a zero above it
        w.scale[j] = _mm512_shuffle_epi8(each, halves(at, static_cast<int16_t>(at + 1)));
    }
}

// minus: weights are 32 less than their bits say, so that many times the sums of 16 values goes off.
INLINE void unpack_q6_k(const char * x, Block & w, __m256i & minus) {
    const __m512i low_bits = _mm512_set1_epi8(15), high_bits = _mm512_set1_epi8(48);
    const __m256i scales = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(x + Q6_K_SCALES)));
    // Sixteen scales as words: number 4 j + i fills the i-th 128 bits of register j.
    const __m512i fill = _mm512_inserti64x4(_mm512_inserti32x4(_mm512_setzero_si512(), _mm_set1_epi16(1), 1),
                                            _mm256_inserti128_si256(_mm256_set1_epi16(2), _mm_set1_epi16(3), 1), 1);
    UNROLL
    for (int h = 0; h < 2; h++) {
        const __m512i low = load(x + 64 * h), high = twice(x + Q6_K_HIGH + 32 * h);
        w.q[2 * h] = _mm512_or_si512(_mm512_and_si512(low, low_bits),
                                     _mm512_and_si512(_mm512_sllv_epi16(high, halves(4, 2)), high_bits));
        w.q[2 * h + 1] = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(low, 4), low_bits),
                                         _mm512_and_si512(_mm512_srlv_epi16(high, halves(0, 2)), high_bits));
    }
    UNROLL
    for (int j = 0; j < 4; j++) {
        const __m512i which = _mm512_add_epi16(fill, _mm512_set1_epi16(static_cast<int16_t>(4 * j)));
        w.scale[j] = _mm512_permutexvar_epi16(which, _mm512_castsi256_si512(scales));
    }
    minus = _mm256_slli_epi16(_mm256_sub_epi16(_mm256_setzero_si256(), scales), 5);
}

// sum[r] += the block's products with row r, in sixteen parts.
template <int R>
INLINE void multiply(const Operand * rows, int64_t b, const Block & w, __m512i (&sum)[R]) {
    UNROLL
    for (int r = 0; r < R; r++) {
        const char * y = rows[r].x + b * Q8_K_BYTES + Q8_K_QUANTS;
        UNROLL
        for (int j = 0; j < 4; j++) {
            sum[r] = _mm512_dpwssd_epi32(sum[r], w.scale[j], _mm512_maddubs_epi16(w.q[j], load(y + 64 * j)));
        }
    }
}

template <int R>
INLINE void start_q4_k(__m512i (&sum)[R]) {
    UNROLL
    for (int r = 0; r < R; r++) sum[r] = _mm512_setzero_si512();
}

template <int R>
INLINE void start_q6_k(const Operand * rows, int64_t b, __m256i minus, __m512i (&sum)[R]) {
    UNROLL
    for (int r = 0; r < R; r++) {
        const auto * sums = reinterpret_cast<const __m256i *>(rows[r].x + b * Q8_K_BYTES + Q8_K_SUMS);
        sum[r] = _mm512_zextsi256_si512(_mm256_madd_epi16(minus, _mm256_loadu_si256(sums)));
    }
}

}  // namespace moe_edge

#endif
