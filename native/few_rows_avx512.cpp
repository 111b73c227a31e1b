// Few rows with AVX-512 and VNNI (few_rows.h): 64 weights in a register, the float sums of two rows in one.
#include "few_rows_avx512.h"

#ifdef MOE_EDGE_X86

namespace moe_edge {

namespace {

// What the float sums need of the rows, in the places of the sums: a register holds two rows' eight partial sums, or
// four rows' four partial sums of minimums.
struct Prepared {
    float d[4][16];         // [pair of rows]: eight times the scale of one row, eight times that of the other
    float minus_d[2][16];   // [four rows]: four times each, negated
    int16_t sums[2][32];    // [four rows]: of each, the sums of 32 values
};

TARGET void prepare(const FewRowsTask & t, Prepared * all) {
    for (int64_t b = 0; b < t.n_blocks; b++) {
        Prepared & p = all[b];
        memset(&p, 0, sizeof(p));
        for (int r = 0; r < t.n_rows; r++) {
            const char * y = t.operands[r].x + b * Q8_K_BYTES;
            float d;
            memcpy(&d, y, sizeof(d));
            for (int i = 0; i < 8; i++) p.d[r / 2][8 * (r % 2) + i] = d;
            for (int i = 0; i < 4; i++) p.minus_d[r / 4][4 * (r % 4) + i] = -d;
            _mm_storeu_si128(reinterpret_cast<__m128i *>(p.sums[r / 4] + 8 * (r % 4)), sums_of_32(y));
        }
    }
}

// Partial sums of two rows in sixteen places each, to eight each: as `low + high` of a register of eight.
INLINE __m512i fold(__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_inserti64x4(a, _mm512_castsi512_si256(b), 1), _mm512_shuffle_i64x2(a, b, 0xEE));
}

// Products of four rows from the sums of two pairs, added as ggml adds a register of eight.
INLINE __m512 sum_of_eight(__m512 first, __m512 second) {
    return sum_of_four(_mm512_add_ps(_mm512_shuffle_f32x4(first, second, 0xDD), _mm512_shuffle_f32x4(first, second, 0x88)));
}

template <int R>
INLINE void store(const FewRowsTask & t, int64_t row, const __m512 (&sums)[2]) {
    alignas(16) float products[8];
    _mm_store_ps(products, first_of_four(sums[0]));
    if (R > 4) _mm_store_ps(products + 4, first_of_four(sums[1]));
    for (int r = 0; r < R; r++) t.operands[r].out[row] = products[r];
}

template <int R>
INLINE void add_pairs(const __m512i (&sum)[R], const Prepared & p, __m512 d, __m512 (&acc)[4]) {
    UNROLL
    for (int r = 0; r < R; r += 2) {
        const __m512i both = fold(sum[r], sum[r + 1 < R ? r + 1 : r]);
        acc[r / 2] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_loadu_ps(p.d[r / 2]), d), _mm512_cvtepi32_ps(both), acc[r / 2]);
    }
}

template <int R>
TARGET void q4_k_rows(const FewRowsTask & t) {
    Prepared prepared[FEW_ROWS_BLOCKS];
    prepare(t, prepared);
    // Of eight bytes in each 128 bits: all as words.
    const __m512i as_words = _mm512_broadcast_i32x4(_mm_set_epi8(-1, 7, -1, 6, -1, 5, -1, 4, -1, 3, -1, 2, -1, 1, -1, 0));
    for (int64_t row = 0; row < t.n_weight_rows; row++) {
        const char * x = t.weights + row * t.weight_row_bytes;
        __m512 acc[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
        __m512 acc_min[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int64_t b = 0; b < t.n_blocks; b++, x += Q4_K_BYTES) {
            const Prepared & p = prepared[b];
            uint64_t mins;
            Block w;
            unpack_q4_k(x, w, mins);
            __m512i sum[R];
            start_q4_k<R>(sum);
            multiply<R>(t.operands, b, w, sum);
            add_pairs<R>(sum, p, _mm512_set1_ps(half(x)), acc);
            const __m512i m = _mm512_shuffle_epi8(_mm512_set1_epi64(static_cast<int64_t>(mins)), as_words);
            const __m512 dmin = _mm512_set1_ps(half(x + 2));
            UNROLL
            for (int f = 0; f < (R + 3) / 4; f++) {
                const __m512i products = _mm512_madd_epi16(m, load(p.sums[f]));
                acc_min[f] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_loadu_ps(p.minus_d[f]), dmin), _mm512_cvtepi32_ps(products),
                                             acc_min[f]);
            }
        }
        const __m512 sums[2] = {_mm512_add_ps(sum_of_eight(acc[0], acc[1]), sum_of_four(acc_min[0])),
                                _mm512_add_ps(sum_of_eight(acc[2], acc[3]), sum_of_four(acc_min[1]))};
        store<R>(t, row, sums);
    }
}

template <int R>
TARGET void q6_k_rows(const FewRowsTask & t) {
    Prepared prepared[FEW_ROWS_BLOCKS];
    prepare(t, prepared);
    for (int64_t row = 0; row < t.n_weight_rows; row++) {
        const char * x = t.weights + row * t.weight_row_bytes;
        __m512 acc[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int64_t b = 0; b < t.n_blocks; b++, x += Q6_K_BYTES) {
            __m256i minus;
            Block w;
            unpack_q6_k(x, w, minus);
            __m512i sum[R];
            start_q6_k<R>(t.operands, b, minus, sum);
            multiply<R>(t.operands, b, w, sum);
            add_pairs<R>(sum, prepared[b], _mm512_set1_ps(half(x + Q6_K_D)), acc);
        }
        const __m512 sums[2] = {sum_of_eight(acc[0], acc[1]), sum_of_eight(acc[2], acc[3])};
        store<R>(t, row, sums);
    }
}

bool usable() { return x86_features().vnni; }

constexpr FewRowsKernel Q4_K[] = {q4_k_rows<1>, q4_k_rows<2>, q4_k_rows<3>, q4_k_rows<4>, q4_k_rows<5>, q4_k_rows<6>, q4_k_rows<7>};
constexpr FewRowsKernel Q6_K[] = {q6_k_rows<1>, q6_k_rows<2>, q6_k_rows<3>, q6_k_rows<4>, q6_k_rows<5>, q6_k_rows<6>, q6_k_rows<7>};

void q4_k(const FewRowsTask & t) { Q4_K[t.n_rows - 1](t); }
void q6_k(const FewRowsTask & t) { Q6_K[t.n_rows - 1](t); }

FewRowsKernel kernel(ggml_type type, RowOrder order) {
    if (order != RowOrder::VEC_DOT) return tiled_rows_avx512(type, order == RowOrder::TILED_FUSED);
    return type == GGML_TYPE_Q4_K ? q4_k : type == GGML_TYPE_Q6_K ? q6_k : nullptr;
}

}  // namespace

const FewRowsSet FEW_ROWS_AVX512 = {"AVX-512", usable, kernel};

}  // namespace moe_edge

#endif
