// Sums of the floats of a register with AVX-512, in the order in which ggml adds them. Included by files that define INLINE.
#include <immintrin.h>

namespace moe_edge {

namespace {

// Of each four floats the sum (0 + 2) + (1 + 3), at the first place.
INLINE __m512 sum_of_four(__m512 v) {
    v = _mm512_add_ps(v, _mm512_permute_ps(v, 0xEE));
    return _mm512_add_ps(v, _mm512_movehdup_ps(v));
}

INLINE __m128 first_of_four(__m512 v) {
    return _mm512_castps512_ps128(
        _mm512_permutexvar_ps(_mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 12, 8, 4, 0), v));
}

}  // namespace

}  // namespace moe_edge
