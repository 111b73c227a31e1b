// Rows for weights in blocks of 32 with AVX2 (blocks_of_32.h). Products are made as ggml makes them, of the weights without
// their signs and the row's values with those signs; the weights of two rows are unpacked once for all rows of the group.
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define INLINE TARGET __attribute__((always_inline)) static inline
#include "blocks_of_32.h"

#ifdef MOE_EDGE_X86

#include "sums_avx2.h"

namespace moe_edge {

namespace {

constexpr int WEIGHTS = 2, ROWS = 3;   // at a time: as many sums as registers hold
constexpr int64_t PREPARED = 16384;    // blocks of rows at a time: 64 KiB of the stack

using Prepared = float;                // the scale of a block of a row

struct Unpacked { __m256i values[WEIGHTS]; float d[WEIGHTS]; };

template <class T>
TARGET void unpack(const FewRowsTask & t, int64_t first, int64_t n, Unpacked * out) {
    for (int64_t w = 0; w < WEIGHTS; w++) {
        const char * x = t.weights + (first + (w < n ? w : n - 1)) * t.weight_row_bytes;
        for (int64_t b = 0; b < t.n_blocks; b++, x += T::BYTES) {
            out[b].values[w] = T::values(x);
            out[b].d[w] = T::scale(x);
        }
    }
}

TARGET void prepare(const Operand & row, int64_t n_blocks, Prepared * out) {
    for (int64_t b = 0; b < n_blocks; b++) out[b] = half(row.x + b * Q8_0_BYTES);
}

// Part `part` of the sums of two weight rows with R rows, which are every PARTS-th block.
template <int PARTS, int R>
INLINE void sums_of(const Unpacked * weights, const Operand * rows, const Prepared * scales, int64_t n_blocks, int part,
                    __m256 (&sum)[R][WEIGHTS]) {
    UNROLL
    for (int r = 0; r < R; r++) {
        UNROLL
        for (int w = 0; w < WEIGHTS; w++) sum[r][w] = _mm256_setzero_ps();
    }
    for (int64_t b = part; b < n_blocks; b += PARTS) {
        UNROLL
        for (int w = 0; w < WEIGHTS; w++) {
            const __m256i x = weights[b].values[w], magnitude = _mm256_sign_epi8(x, x);
            const __m256 d = _mm256_set1_ps(weights[b].d[w]);
            UNROLL
            for (int r = 0; r < R; r++) {
                const auto * values = reinterpret_cast<const __m256i *>(rows[r].x + b * Q8_0_BYTES + Q8_0_QUANTS);
                const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(_mm256_loadu_si256(values), x));
                const __m256 products = _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
                sum[r][w] = _mm256_fmadd_ps(_mm256_mul_ps(d, _mm256_set1_ps(scales[r * n_blocks + b])), products, sum[r][w]);
            }
        }
    }
}

template <int PARTS, int R>
TARGET void tile(const FewRowsTask & t, int64_t first, int64_t n, const Unpacked * weights, const Operand * rows,
                 const Prepared * scales) {
    __m256 sum[R][WEIGHTS], other[R][WEIGHTS];
    sums_of<PARTS, R>(weights, rows, scales, t.n_blocks, 0, sum);
    if constexpr (PARTS == 2) sums_of<PARTS, R>(weights, rows, scales, t.n_blocks, 1, other);
    for (int r = 0; r < R; r++) {
        for (int64_t w = 0; w < n; w++) {
            rows[r].out[first + w] = sum_of_eight(PARTS == 2 ? _mm256_add_ps(sum[r][w], other[r][w]) : sum[r][w]);
        }
    }
}

bool usable() { return x86_features().avx2; }

}  // namespace

}  // namespace moe_edge

#include "block_rows_lanes.h"

namespace moe_edge {

const FewRowsSet BLOCK_ROWS_AVX2 = {"AVX2 blocks", usable, block_kernel};

}  // namespace moe_edge

#endif
