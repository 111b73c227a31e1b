// The quantizers of quantize.h with registers of sixteen floats.
#include "x86_features.h"

#if defined(__x86_64__) && defined(__GNUC__)
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // of GCC 12's own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <cstdint>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define INLINE TARGET __attribute__((always_inline)) static inline
#define LANES 16

namespace moe_edge {

namespace {

typedef float VF __attribute__((vector_size(64), aligned(64)));
typedef int32_t VI __attribute__((vector_size(64), aligned(64)));

INLINE VF spread(float v) { return (VF) _mm512_set1_ps(v); }
INLINE VI spread_int(int v) { return (VI) _mm512_set1_epi32(v); }
INLINE VF load(const float * from) { return (VF) _mm512_loadu_ps(from); }
INLINE void store(float * to, VF v) { _mm512_storeu_ps(to, (__m512) v); }
INLINE void store_ints(int * to, VI v) { _mm512_storeu_si512(to, (__m512i) v); }
INLINE VI as_ints(VF v) { return (VI) _mm512_castps_si512((__m512) v); }
INLINE VF to_floats(VI v) { return (VF) _mm512_cvtepi32_ps((__m512i) v); }
INLINE VI to_ints(VF v) { return (VI) _mm512_cvttps_epi32((__m512) v); }
INLINE VF root(VF v) { return (VF) _mm512_sqrt_ps((__m512) v); }
INLINE VF bytes(const uint8_t * from) {
    return (VF) _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from))));
}
INLINE VI load_ints(const int * from) { return (VI) _mm512_loadu_si512(from); }
INLINE VF fused(VF a, VF b, VF c) { return (VF) _mm512_fmadd_ps((__m512) a, (__m512) b, (__m512) c); }
INLINE VF smaller(VF a, VF b) { return (VF) _mm512_min_ps((__m512) a, (__m512) b); }
INLINE VF larger(VF a, VF b) { return (VF) _mm512_max_ps((__m512) a, (__m512) b); }
typedef __mmask16 Mask;
INLINE Mask less(VF a, VF b) { return _mm512_cmp_ps_mask((__m512) a, (__m512) b, _CMP_LT_OQ); }
INLINE Mask equal(VI a, VI b) { return _mm512_cmpeq_epi32_mask((__m512i) a, (__m512i) b); }
INLINE unsigned bits_of(Mask m) { return m; }
INLINE VF pick(Mask m, VF yes, VF no) { return (VF) _mm512_mask_blend_ps(m, (__m512) no, (__m512) yes); }
INLINE VI pick_int(Mask m, VI yes, VI no) { return (VI) _mm512_mask_blend_epi32(m, (__m512i) no, (__m512i) yes); }
// The lanes that hold the least number.
INLINE unsigned least_lanes(VF v) {
    return _mm512_cmp_ps_mask((__m512) v, _mm512_set1_ps(_mm512_reduce_min_ps((__m512) v)), _CMP_EQ_OQ);
}

}  // namespace

}  // namespace moe_edge

#include "quantize_lanes.h"

#include "quantize_grid_lanes.h"
#include "quantize_k_lanes.h"

namespace moe_edge {

Quantizers avx512_quantizers() {
    if (!x86_features().avx512) return {};
    return {LANES, iq2_xxs, iq3_xxs, q2_k, q3_k, q4_k};
}

}  // namespace moe_edge

#else
#include "quantize.h"

namespace moe_edge {

Quantizers avx512_quantizers() { return {}; }

}  // namespace moe_edge
#endif
