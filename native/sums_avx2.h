// Sums of the floats of a register with AVX2, in the order in which ggml adds them. Included by files that define INLINE.
#include <immintrin.h>

namespace moe_edge {

namespace {

// Of four floats (0 + 2) + (1 + 3), and of eight: halves upon halves.
INLINE float sum_of_four(__m128 v) {
    v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)));
}
INLINE float sum_of_eight(__m256 v) { return sum_of_four(_mm_add_ps(_mm256_extractf128_ps(v, 1), _mm256_castps256_ps128(v))); }

}  // namespace

}  // namespace moe_edge
