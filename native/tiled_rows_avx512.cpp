// Rows as ggml's tiled products add them (few_rows.h), with AVX-512 and VNNI: sixteen rows' sums in one register.
#include "few_rows_avx512.h"

#ifdef MOE_EDGE_X86

namespace moe_edge {

namespace {

constexpr int AT_ONCE = 16, LEAST = 4;   // rows of a part
constexpr int64_t NEAR_BLOCKS = 128;     // of rows, as many as the nearest cache keeps beside the weights

// What the sums need of up to sixteen rows: their scales, and sums of 32 values, the two of 64 values side by side.
struct Prepared {
    float d[AT_ONCE];
    int16_t sums[4][AT_ONCE][2];
};

TARGET void prepare(const Operand * rows, int n_rows, int64_t n_blocks, Prepared * all) {
    for (int64_t b = 0; b < n_blocks; b++) {
        Prepared & p = all[b];
        memset(&p, 0, sizeof(p));
        for (int r = 0; r < n_rows; r++) {
            const char * y = rows[r].x + b * Q8_K_BYTES;
            memcpy(&p.d[r], y, sizeof(float));
            alignas(16) int16_t sums[4][2];
            _mm_store_si128(reinterpret_cast<__m128i *>(sums), sums_of_32(y));
            for (int i = 0; i < 4; i++) memcpy(p.sums[i][r], sums[i], sizeof(sums[i]));
        }
    }
}

INLINE __m512i add_words(__m512i a, __m512i b) { return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b)); }
INLINE __m512i add_pairs(__m512i a, __m512i b) { return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b)); }
INLINE __m512i add_quarters(__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xDD));
}

// Of N rows, at most four: the sum of the block's products with each, in four parts, one in each 128 bits. Added at once,
// so that no more than four rows hold registers. SHIFTED: weights are less than their bits say, see unpack_q6_k.
template <int N, bool SHIFTED>
INLINE __m512i quarters(const Operand * rows, int64_t b, const Block & w, __m256i minus) {
    __m512i sum[N];
    if constexpr (SHIFTED) {
        start_q6_k<N>(rows, b, minus, sum);
    } else {
        start_q4_k<N>(sum);
    }
    multiply<N>(rows, b, w, sum);
    const __m512i first = add_words(sum[0], sum[N > 1 ? 1 : 0]);
    return add_pairs(first, N > 2 ? add_words(sum[N > 2 ? 2 : 0], sum[N > 3 ? 3 : 0]) : first);
}

constexpr int least(int a, int b) { return a < b ? a : b; }

// The sum of the block's products with each row, at the row's place. Places from R on are whatever they are.
template <int R, bool SHIFTED>
INLINE __m512i totals(const Operand * rows, int64_t b, const Block & w, __m256i minus) {
    const __m512i first = quarters<least(R, 4), SHIFTED>(rows, b, w, minus);
    __m512i second = first, third = first, fourth = first;
    if constexpr (R > 4) second = quarters<least(R - 4, 4), SHIFTED>(rows + 4, b, w, minus);
    if constexpr (R > 8) third = quarters<least(R - 8, 4), SHIFTED>(rows + 8, b, w, minus);
    if constexpr (R > 12) fourth = quarters<least(R - 12, 4), SHIFTED>(rows + 12, b, w, minus);
    const __m512i low = add_quarters(first, second);
    return add_quarters(low, R > 8 ? add_quarters(third, fourth) : low);
}

// sum += result * d, in one rounding or in two, as ggml's compiler made it.
template <bool FUSED>
INLINE __m512 add_block(__m512 sum, __m512 result, const Prepared & p) {
    const __m512 d = _mm512_loadu_ps(p.d);
    return FUSED ? _mm512_fmadd_ps(result, d, sum) : _mm512_add_ps(sum, _mm512_mul_ps(result, d));
}

template <int R>
INLINE void store(const Operand * rows, int64_t row, __m512 sum) {
    alignas(64) float products[AT_ONCE];
    _mm512_store_ps(products, sum);
    for (int r = 0; r < R; r++) rows[r].out[row] = products[r];
}

template <int R, bool FUSED>
TARGET void q4_k_rows(const FewRowsTask & t, const Operand * rows) {
    Prepared prepared[FEW_ROWS_BLOCKS];
    prepare(rows, R, t.n_blocks, prepared);
    for (int64_t row = 0; row < t.n_weight_rows; row++) {
        const char * x = t.weights + row * t.weight_row_bytes;
        __m512 acc = _mm512_setzero_ps();
        for (int64_t b = 0; b < t.n_blocks; b++, x += Q4_K_BYTES) {
            const Prepared & p = prepared[b];
            uint64_t mins;
            Block w;
            unpack_q4_k(x, w, mins);
            const __m512i of_products = totals<R, false>(rows, b, w, _mm256_setzero_si256());
            alignas(16) int16_t words[8];
            _mm_store_si128(reinterpret_cast<__m128i *>(words), _mm_cvtepu8_epi16(_mm_cvtsi64_si128(static_cast<long long>(mins))));
            __m512i of_mins = _mm512_setzero_si512();
            UNROLL
            for (int i = 0; i < 4; i++) {
                int32_t both;
                memcpy(&both, words + 2 * i, sizeof(both));
                of_mins = _mm512_dpwssd_epi32(of_mins, _mm512_set1_epi32(both), load(p.sums[i]));
            }
            const __m512 result = _mm512_mul_ps(_mm512_cvtepi32_ps(of_products), _mm512_set1_ps(half(x)));
            acc = add_block<FUSED>(acc, _mm512_fnmadd_ps(_mm512_set1_ps(half(x + 2)), _mm512_cvtepi32_ps(of_mins), result), p);
        }
        store<R>(rows, row, acc);
    }
}

template <int R, bool FUSED>
TARGET void q6_k_rows(const FewRowsTask & t, const Operand * rows) {
    Prepared prepared[FEW_ROWS_BLOCKS];
    prepare(rows, R, t.n_blocks, prepared);
    for (int64_t row = 0; row < t.n_weight_rows; row++) {
        const char * x = t.weights + row * t.weight_row_bytes;
        __m512 acc = _mm512_setzero_ps();
        for (int64_t b = 0; b < t.n_blocks; b++, x += Q6_K_BYTES) {
            __m256i minus;
            Block w;
            unpack_q6_k(x, w, minus);
            const __m512i of_products = totals<R, true>(rows, b, w, minus);
            const __m512 result = _mm512_mul_ps(_mm512_cvtepi32_ps(of_products), _mm512_set1_ps(half(x + Q6_K_D)));
            acc = add_block<FUSED>(acc, result, prepared[b]);
        }
        store<R>(rows, row, acc);
    }
}

using Rows = void (*)(const FewRowsTask &, const Operand *);

#define OF_ANY_NUMBER(rows, fused)                                                                                             \
    {rows<4, fused>, rows<5, fused>, rows<6, fused>, rows<7, fused>, rows<8, fused>, rows<9, fused>, rows<10, fused>,          \
     rows<11, fused>, rows<12, fused>, rows<13, fused>, rows<14, fused>, rows<15, fused>, rows<16, fused>}
constexpr Rows Q4_K[] = OF_ANY_NUMBER(q4_k_rows, false), Q4_K_FUSED[] = OF_ANY_NUMBER(q4_k_rows, true);
constexpr Rows Q6_K[] = OF_ANY_NUMBER(q6_k_rows, false), Q6_K_FUSED[] = OF_ANY_NUMBER(q6_k_rows, true);

// Equal parts, of no more rows than the nearest cache keeps.
void in_parts(const FewRowsTask & t, const Rows * rows) {
    const int64_t near = NEAR_BLOCKS / t.n_blocks;
    const int most = near >= AT_ONCE ? AT_ONCE : near <= 2 * LEAST ? 2 * LEAST : static_cast<int>(near);
    const int n_parts = (t.n_rows + most - 1) / most;
    for (int part = 0; part < n_parts; part++) {
        const int from = part * t.n_rows / n_parts, to = (part + 1) * t.n_rows / n_parts;
        rows[to - from - LEAST](t, t.operands + from);
    }
}

void q4_k(const FewRowsTask & t) { in_parts(t, Q4_K); }
void q4_k_fused(const FewRowsTask & t) { in_parts(t, Q4_K_FUSED); }
void q6_k(const FewRowsTask & t) { in_parts(t, Q6_K); }
void q6_k_fused(const FewRowsTask & t) { in_parts(t, Q6_K_FUSED); }

}  // namespace

FewRowsKernel tiled_rows_avx512(ggml_type type, bool fused) {
    if (type == GGML_TYPE_Q4_K) return fused ? q4_k_fused : q4_k;
    if (type == GGML_TYPE_Q6_K) return fused ? q6_k_fused : q6_k;
    return nullptr;
}

}  // namespace moe_edge

#endif
