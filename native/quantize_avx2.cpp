// The quantizers of quantize.h with registers of eight floats.
#include "x86_features.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include <cstdint>

#define TARGET __attribute__((target("avx2,fma")))
#define INLINE TARGET __attribute__((always_inline)) static inline
#define LANES 8

namespace moe_edge {

namespace {

typedef float VF __attribute__((vector_size(32), aligned(32)));
typedef int32_t VI __attribute__((vector_size(32), aligned(32)));

INLINE VF spread(float v) { return (VF) _mm256_set1_ps(v); }
INLINE VI spread_int(int v) { return (VI) _mm256_set1_epi32(v); }
INLINE VF load(const float * from) { return (VF) _mm256_loadu_ps(from); }
INLINE void store(float * to, VF v) { _mm256_storeu_ps(to, (__m256) v); }
INLINE void store_ints(int * to, VI v) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), (__m256i) v); }
INLINE VI as_ints(VF v) { return (VI) _mm256_castps_si256((__m256) v); }
INLINE VF to_floats(VI v) { return (VF) _mm256_cvtepi32_ps((__m256i) v); }
INLINE VI to_ints(VF v) { return (VI) _mm256_cvttps_epi32((__m256) v); }
INLINE VF root(VF v) { return (VF) _mm256_sqrt_ps((__m256) v); }
INLINE VF bytes(const uint8_t * from) {
    const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(from));
    return (VF) _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight));
}
INLINE VI load_ints(const int * from) { return (VI) _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)); }
INLINE VF fused(VF a, VF b, VF c) { return (VF) _mm256_fmadd_ps((__m256) a, (__m256) b, (__m256) c); }
INLINE VF smaller(VF a, VF b) { return (VF) _mm256_min_ps((__m256) a, (__m256) b); }
INLINE VF larger(VF a, VF b) { return (VF) _mm256_max_ps((__m256) a, (__m256) b); }
typedef __m256 Mask;
INLINE Mask less(VF a, VF b) { return _mm256_cmp_ps((__m256) a, (__m256) b, _CMP_LT_OQ); }
INLINE Mask equal(VI a, VI b) { return _mm256_castsi256_ps(_mm256_cmpeq_epi32((__m256i) a, (__m256i) b)); }
INLINE unsigned bits_of(Mask m) { return static_cast<unsigned>(_mm256_movemask_ps(m)); }
INLINE VF pick(Mask m, VF yes, VF no) { return (VF) _mm256_blendv_ps((__m256) no, (__m256) yes, m); }
INLINE VI pick_int(Mask m, VI yes, VI no) { return (VI) _mm256_blendv_ps((__m256) no, (__m256) yes, m); }
// The lanes that hold the least number.
INLINE unsigned least_lanes(VF v) {
    __m256 least = _mm256_min_ps((__m256) v, _mm256_permute2f128_ps((__m256) v, (__m256) v, 1));
    least = _mm256_min_ps(least, _mm256_shuffle_ps(least, least, 0x4e));
    least = _mm256_min_ps(least, _mm256_shuffle_ps(least, least, 0xb1));
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps((__m256) v, least, _CMP_EQ_OQ)));
}

}  // namespace

}  // namespace moe_edge

#include "quantize_lanes.h"

#include "quantize_grid_lanes.h"
#include "quantize_k_lanes.h"

namespace moe_edge {

Quantizers avx2_quantizers() {
    if (!x86_features().avx2) return {};
    return {LANES, iq2_xxs, iq3_xxs, q2_k, q3_k, q4_k};
}

}  // namespace moe_edge

#else
#include "quantize.h"

namespace moe_edge {

Quantizers avx2_quantizers() { return {}; }

}  // namespace moe_edge
#endif
