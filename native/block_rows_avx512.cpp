// Rows for weights in blocks of 32 with AVX-512 and VNNI (blocks_of_32.h): a register has the eight sums of two weight rows.
// The instruction multiplies bytes without sign with signed ones. So weights get 128 more, and 128 times the row's sums goes
// off again; that is made once for a row and all weight rows.
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")))
#define INLINE TARGET __attribute__((always_inline)) static inline
#include "blocks_of_32.h"

#ifdef MOE_EDGE_X86

#include "sums_avx512.h"

namespace moe_edge {

namespace {

constexpr int WEIGHTS = 8, PAIRS = WEIGHTS / 2;   // weight rows at a time
constexpr int ROWS = 5;                           // rows of a tile: as many sums as registers hold
constexpr int64_t PREPARED = 3072;                // blocks of rows at a time: 108 KiB of the stack

// What a block of a row needs besides its bytes.
struct Prepared { int32_t start[8]; float d; };

// A block of eight weight rows: bytes with 128 more, in pairs, and scales.
struct Unpacked { __m512i u[PAIRS]; float d[WEIGHTS]; };

TARGET void prepare(const Operand & row, int64_t n_blocks, Prepared * out) {
    for (int64_t b = 0; b < n_blocks; b++) {
        const char * y = row.x + b * Q8_0_BYTES;
        const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(y + Q8_0_QUANTS));
        const __m256i sums = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(static_cast<char>(128)), values);
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(out[b].start), _mm256_sub_epi32(_mm256_setzero_si256(), sums));
        out[b].d = half(y);
    }
}

template <class T>
TARGET void unpack(const FewRowsTask & t, int64_t first, int64_t n, Unpacked * out) {
    for (int64_t w = 0; w < WEIGHTS; w++) {
        const char * x = t.weights + (first + (w < n ? w : n - 1)) * t.weight_row_bytes;
        for (int64_t b = 0; b < t.n_blocks; b++, x += T::BYTES) {
            const __m256i u = _mm256_xor_si256(T::values(x), _mm256_set1_epi8(static_cast<char>(128)));
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(&out[b].u[w / 2]) + w % 2, u);
            out[b].d[w] = T::scale(x);
        }
    }
}

// Part `part` of the sums of eight weight rows with R rows, which are every PARTS-th block.
template <int PARTS, int R>
INLINE void sums_of(const Unpacked * weights, const Operand * rows, const Prepared * prepared, int64_t n_blocks, int part,
                    __m512 (&sum)[R][PAIRS]) {
    UNROLL
    for (int r = 0; r < R; r++) {
        UNROLL
        for (int p = 0; p < PAIRS; p++) sum[r][p] = _mm512_setzero_ps();
    }
    for (int64_t b = part; b < n_blocks; b += PARTS) {
        const __m512 d = _mm512_castps256_ps512(_mm256_loadu_ps(weights[b].d));
        __m512i u[PAIRS];
        __m512 scale[PAIRS];
        UNROLL
        for (int p = 0; p < PAIRS; p++) {
            u[p] = weights[b].u[p];
            const __m512i second = _mm512_set1_epi32(2 * p + 1);
            scale[p] = _mm512_permutexvar_ps(_mm512_mask_sub_epi32(second, 0x00FF, second, _mm512_set1_epi32(1)), d);
        }
        UNROLL
        for (int r = 0; r < R; r++) {
            const Prepared & of_row = prepared[r * n_blocks + b];
            const auto * values = reinterpret_cast<const __m256i *>(rows[r].x + b * Q8_0_BYTES + Q8_0_QUANTS);
            const __m512i y = _mm512_broadcast_i64x4(_mm256_loadu_si256(values));
            const __m512i start = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(of_row.start)));
            const __m512 d_row = _mm512_set1_ps(of_row.d);
            UNROLL
            for (int p = 0; p < PAIRS; p++) {
                const __m512 products = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(start, u[p], y));
                sum[r][p] = _mm512_fmadd_ps(_mm512_mul_ps(scale[p], d_row), products, sum[r][p]);
            }
        }
    }
}

// Of each eight floats the sum: halves upon halves.
INLINE void store_sums(__m512 v, float * two) {
    v = sum_of_four(_mm512_add_ps(v, _mm512_shuffle_f32x4(v, v, 0xB1)));
    two[0] = _mm512_cvtss_f32(v);
    two[1] = _mm_cvtss_f32(_mm512_extractf32x4_ps(v, 2));
}

template <int PARTS, int R>
TARGET void tile(const FewRowsTask & t, int64_t first, int64_t n, const Unpacked * weights, const Operand * rows,
                 const Prepared * prepared) {
    __m512 sum[R][PAIRS];
    sums_of<PARTS, R>(weights, rows, prepared, t.n_blocks, 0, sum);
    if constexpr (PARTS == 2) {
        __m512 other[R][PAIRS];
        sums_of<PARTS, R>(weights, rows, prepared, t.n_blocks, 1, other);
        UNROLL
        for (int r = 0; r < R; r++) {
            UNROLL
            for (int p = 0; p < PAIRS; p++) sum[r][p] = _mm512_add_ps(sum[r][p], other[r][p]);
        }
    }
    for (int r = 0; r < R; r++) {
        float products[WEIGHTS];
        for (int p = 0; p < PAIRS; p++) store_sums(sum[r][p], products + 2 * p);
        for (int64_t w = 0; w < n; w++) rows[r].out[first + w] = products[w];
    }
}

bool usable() { return x86_features().vnni; }

}  // namespace

}  // namespace moe_edge

#include "block_rows_lanes.h"

namespace moe_edge {

const FewRowsSet BLOCK_ROWS_AVX512 = {"AVX-512 blocks", usable, block_kernel};

}  // namespace moe_edge

#endif
