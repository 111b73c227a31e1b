// What the AVX-512 kernels for rows of BF16 and F16 share (float_rows_lanes.h). Included by files that define TARGET, INLINE.
#include "float_rows_lanes.h"
#include "sums_avx512.h"

namespace moe_edge {

namespace {

// The sixteen floats of each of four registers added as _mm512_reduce_add_ps does: halves, quarters, pairs, the two.
INLINE __m128 four_sums(__m512 a, __m512 b, __m512 c, __m512 d) {
    const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
    const __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xEE));
    return first_of_four(sum_of_four(
        _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD))));
}

// Two sums added in double precision, to nothing.
INLINE __m128 added_as_doubles(__m128 first, __m128 second) {
    const __m256d sum = _mm256_add_pd(_mm256_setzero_pd(), _mm256_cvtps_pd(first));
    return _mm256_cvtpd_ps(_mm256_add_pd(sum, _mm256_cvtps_pd(second)));
}

struct Lanes {
    using Reg = __m512;
    static constexpr int ROWS = 6;
    INLINE Reg zero() { return _mm512_setzero_ps(); }
};

// BF16: two registers of sums, whose sums are added as doubles.
struct BF16 : Lanes {
    static constexpr int PARTS = 2;
    INLINE __m128 finish(const Reg (&part)[PARTS][WEIGHTS]) {
        return added_as_doubles(four_sums(part[0][0], part[0][1], part[0][2], part[0][3]),
                                four_sums(part[1][0], part[1][1], part[1][2], part[1][3]));
    }
};

}  // namespace

}  // namespace moe_edge
