// Few rows with AVX2 (few_rows.h): 32 weights in a register, which go with up to four rows before the next are unpacked.
#include "few_rows_x86.h"

#ifdef MOE_EDGE_X86

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define INLINE TARGET __attribute__((always_inline)) static inline
#include "sums_avx2.h"

namespace moe_edge {

namespace {

constexpr int AT_ONCE = 4;  // rows: sixteen registers hold their sums

INLINE __m256i load(const void * from) { return _mm256_loadu_si256(static_cast<const __m256i *>(from)); }

// sum[r] += scale * (q . 32 values of row r); q without sign.
template <int R>
INLINE void multiply(const Operand * rows, int64_t at, __m256i q, __m256i scale, __m256i (&sum)[R]) {
    UNROLL
    for (int r = 0; r < R; r++) {
        sum[r] = _mm256_add_epi32(sum[r], _mm256_madd_epi16(scale, _mm256_maddubs_epi16(q, load(rows[r].x + at))));
    }
}

INLINE float scale_of(const Operand & row, int64_t b) {
    float d;
    memcpy(&d, row.x + b * Q8_K_BYTES, sizeof(d));
    return d;
}

// The word at `at` of eight, sixteen times.
INLINE __m256i spread(__m256i words, int at) {
    return _mm256_shuffle_epi8(words, _mm256_set1_epi16(static_cast<int16_t>((2 * at + 1) << 8 | 2 * at)));
}

template <int R>
TARGET void q4_k_rows(const FewRowsTask & t, const Operand * rows) {
    const __m256i low_bits = _mm256_set1_epi8(15);
    for (int64_t row = 0; row < t.n_weight_rows; row++) {
        const char * x = t.weights + row * t.weight_row_bytes;
        __m256 acc[R];
        __m128 acc_min[R];
        UNROLL
        for (int r = 0; r < R; r++) {
            acc[r] = _mm256_setzero_ps();
            acc_min[r] = _mm_setzero_ps();
        }
        for (int64_t b = 0; b < t.n_blocks; b++, x += Q4_K_BYTES) {
            uint64_t packed_scales, packed_mins;
            scales_and_mins(x + Q4_K_SCALES, packed_scales, packed_mins);
            const __m128i scales = _mm_cvtepu8_epi16(_mm_cvtsi64_si128(static_cast<long long>(packed_scales)));
            const __m128i mins = _mm_cvtepu8_epi16(_mm_cvtsi64_si128(static_cast<long long>(packed_mins)));
            const __m256i each = _mm256_broadcastsi128_si256(scales);
            __m256i sum[R];
            UNROLL
            for (int r = 0; r < R; r++) sum[r] = _mm256_setzero_si256();
            UNROLL
            for (int j = 0; j < 4; j++) {
                const __m256i bytes = load(x + Q4_K_QUANTS + 32 * j);
                const int64_t at = b * Q8_K_BYTES + Q8_K_QUANTS + 64 * j;
                multiply<R>(rows, at, _mm256_and_si256(bytes, low_bits), spread(each, 2 * j), sum);
                multiply<R>(rows, at + 32, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low_bits), spread(each, 2 * j + 1), sum);
            }
            const float d = half(x), dmin = half(x + 2);
            UNROLL
            for (int r = 0; r < R; r++) {
                const float dr = scale_of(rows[r], b);
                acc[r] = _mm256_fmadd_ps(_mm256_set1_ps(dr * d), _mm256_cvtepi32_ps(sum[r]), acc[r]);
                const __m256i sums = load(rows[r].x + b * Q8_K_BYTES + Q8_K_SUMS);
                const __m128i of_32 = _mm_hadd_epi16(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
                acc_min[r] = _mm_fmadd_ps(_mm_set1_ps(-dr * dmin), _mm_cvtepi32_ps(_mm_madd_epi16(mins, of_32)), acc_min[r]);
            }
        }
        UNROLL
        for (int r = 0; r < R; r++) rows[r].out[row] = sum_of_eight(acc[r]) + sum_of_four(acc_min[r]);
    }
}

template <int R>
TARGET void q6_k_rows(const FewRowsTask & t, const Operand * rows) {
    const __m256i low_bits = _mm256_set1_epi8(15), high_bits = _mm256_set1_epi8(48);
    for (int64_t row = 0; row < t.n_weight_rows; row++) {
        const char * x = t.weights + row * t.weight_row_bytes;
        __m256 acc[R];
        UNROLL
        for (int r = 0; r < R; r++) acc[r] = _mm256_setzero_ps();
        for (int64_t b = 0; b < t.n_blocks; b++, x += Q6_K_BYTES) {
            const __m256i scales = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(x + Q6_K_SCALES)));
            // Weights are 32 less than their bits say: that many times the sums of 16 values.
            const __m256i minus = _mm256_slli_epi16(_mm256_sub_epi16(_mm256_setzero_si256(), scales), 5);
            __m256i sum[R];
            UNROLL
            for (int r = 0; r < R; r++) sum[r] = _mm256_madd_epi16(minus, load(rows[r].x + b * Q8_K_BYTES + Q8_K_SUMS));
            UNROLL
            for (int h = 0; h < 2; h++) {
                const __m256i first = load(x + 64 * h), second = load(x + 64 * h + 32), high = load(x + Q6_K_HIGH + 32 * h);
                const int64_t at = b * Q8_K_BYTES + Q8_K_QUANTS + 128 * h;
                const __m256i q[4] = {
                    _mm256_or_si256(_mm256_and_si256(first, low_bits), _mm256_and_si256(_mm256_slli_epi16(high, 4), high_bits)),
                    _mm256_or_si256(_mm256_and_si256(second, low_bits), _mm256_and_si256(_mm256_slli_epi16(high, 2), high_bits)),
                    _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(first, 4), low_bits), _mm256_and_si256(high, high_bits)),
                    _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(second, 4), low_bits),
                                    _mm256_and_si256(_mm256_srli_epi16(high, 2), high_bits))};
                const __m256i of_half = h == 0 ? _mm256_permute4x64_epi64(scales, 0x44) : _mm256_permute4x64_epi64(scales, 0xEE);
                UNROLL
                for (int j = 0; j < 4; j++) {
                    const __m128i even = _mm_set1_epi16(static_cast<int16_t>((4 * j + 1) << 8 | 4 * j));
                    const __m128i odd = _mm_set1_epi16(static_cast<int16_t>((4 * j + 3) << 8 | (4 * j + 2)));
                    multiply<R>(rows, at + 32 * j, q[j], _mm256_shuffle_epi8(of_half, _mm256_set_m128i(odd, even)), sum);
                }
            }
            const float d = half(x + Q6_K_D);
            UNROLL
            for (int r = 0; r < R; r++) {
                acc[r] = _mm256_fmadd_ps(_mm256_set1_ps(scale_of(rows[r], b) * d), _mm256_cvtepi32_ps(sum[r]), acc[r]);
            }
        }
        UNROLL
        for (int r = 0; r < R; r++) rows[r].out[row] = sum_of_eight(acc[r]);
    }
}

bool usable() { return x86_features().avx2; }

using Rows = void (*)(const FewRowsTask &, const Operand *);
constexpr Rows Q4_K[AT_ONCE] = {q4_k_rows<1>, q4_k_rows<2>, q4_k_rows<3>, q4_k_rows<4>};
constexpr Rows Q6_K[AT_ONCE] = {q6_k_rows<1>, q6_k_rows<2>, q6_k_rows<3>, q6_k_rows<4>};

// Equal parts: 5 rows are 3 and 2, not 4 and 1.
void in_parts(const FewRowsTask & t, const Rows * rows) {
    const int n_parts = (t.n_rows + AT_ONCE - 1) / AT_ONCE;
    for (int part = 0; part < n_parts; part++) {
        const int from = part * t.n_rows / n_parts, to = (part + 1) * t.n_rows / n_parts;
        rows[to - from - 1](t, t.operands + from);
    }
}

void q4_k(const FewRowsTask & t) { in_parts(t, Q4_K); }
void q6_k(const FewRowsTask & t) { in_parts(t, Q6_K); }

FewRowsKernel kernel(ggml_type type, RowOrder order) {
    if (order != RowOrder::VEC_DOT) return nullptr;
    return type == GGML_TYPE_Q4_K ? q4_k : type == GGML_TYPE_Q6_K ? q6_k : nullptr;
}

}  // namespace

const FewRowsSet FEW_ROWS_AVX2 = {"AVX2", usable, kernel};

}  // namespace moe_edge

#endif
