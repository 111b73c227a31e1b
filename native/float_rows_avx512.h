// What the AVX-512 kernels for rows of BF16 and F16 share (float_rows_lanes.h). Included by files that define TARGET, INLINE.
#include "float_rows_lanes.h"

namespace moe_edge {

namespace {

// The sixteen floats of each of four registers added as _mm512_reduce_add_ps does: halves, quarters, pairs, the two.
INLINE __m128 four_sums(__m512 a, __m512 b, __m512 c, __m512 d) {
    const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
    const __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xEE));
    __m512 v = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD));
    v = _mm512_add_ps(v, _mm512_permute_ps(v, 0xEE));
    v = _mm512_add_ps(v, _mm512_movehdup_ps(v));
    return _mm512_castps512_ps128(
        _mm512_permutexvar_ps(_mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 12, 8, 4, 0), v));
}

// Two sums added in double precision, to nothing.
INLINE __m128 added_as_doubles(__m128 first, __m128 second) {
    const __m256d sum = _mm256_add_pd(_mm256_setzero_pd(), _mm256_cvtps_pd(first));
    return _mm256_cvtpd_ps(_mm256_add_pd(sum, _mm256_cvtps_pd(second)));
}

struct Lanes {
    using Reg = __m512;
    INLINE Reg zero() { return _mm512_setzero_ps(); }
};

}  // namespace

}  // namespace moe_edge
