// Rows of BF16 and F16 made 32-bit floats, with AVX2 (float_rows_lanes.h).
#include "few_rows_x86.h"

#ifdef MOE_EDGE_X86

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define INLINE TARGET __attribute__((always_inline)) static inline
#include "float_rows_lanes.h"

namespace moe_edge {

namespace {

// The four parts of four sums added, and then the two halves of each: two registers, of two of them each.
struct Halves { __m256 ab, cd; };

INLINE Halves added_halves(const __m256 (&part)[4][WEIGHTS]) {
    __m256 v[WEIGHTS];
    UNROLL
    for (int w = 0; w < WEIGHTS; w++) {
        v[w] = _mm256_add_ps(_mm256_add_ps(part[0][w], part[2][w]), _mm256_add_ps(part[1][w], part[3][w]));
    }
    return {_mm256_add_ps(_mm256_permute2f128_ps(v[0], v[1], 0x20), _mm256_permute2f128_ps(v[0], v[1], 0x31)),
            _mm256_add_ps(_mm256_permute2f128_ps(v[2], v[3], 0x20), _mm256_permute2f128_ps(v[2], v[3], 0x31))};
}

// The first float of each half of two registers.
INLINE __m128 firsts(__m256 ab, __m256 cd) {
    const __m256 both = _mm256_unpacklo_ps(ab, cd);  // a c . . | b d . .
    return _mm_unpacklo_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
}

struct Lanes {
    using Reg = __m256;
    static constexpr int WIDTH = 8, PARTS = 4, STEP = 32, ROWS = 2;
    INLINE Reg zero() { return _mm256_setzero_ps(); }
};

// FUSED: a multiplication and an addition in one rounding, as ggml's compiler may have made of them.
template <bool FUSED>
struct BF16AsFloats : Lanes {
    INLINE Reg load(const char * from) {
        const __m128i numbers = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(numbers), 16));
    }
    INLINE Reg add_product(Reg sum, Reg a, Reg b) {
        return FUSED ? _mm256_fmadd_ps(a, b, sum) : _mm256_add_ps(_mm256_mul_ps(a, b), sum);
    }
    // Of four floats the sum (0 + 2) + (1 + 3), which is added to nothing in double precision.
    INLINE __m128 finish(const Reg (&part)[PARTS][WEIGHTS]) {
        Halves v = added_halves(part);
        v.ab = _mm256_add_ps(v.ab, _mm256_permute_ps(v.ab, 0xEE));
        v.cd = _mm256_add_ps(v.cd, _mm256_permute_ps(v.cd, 0xEE));
        v.ab = _mm256_add_ps(v.ab, _mm256_movehdup_ps(v.ab));
        v.cd = _mm256_add_ps(v.cd, _mm256_movehdup_ps(v.cd));
        return _mm_add_ps(firsts(v.ab, v.cd), _mm_setzero_ps());
    }
};

struct F16AsFloats : Lanes {
    INLINE Reg load(const char * from) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from))); }
    INLINE Reg add_product(Reg sum, Reg a, Reg b) { return _mm256_fmadd_ps(a, b, sum); }
    // Of four floats the sum (0 + 1) + (2 + 3).
    INLINE __m128 finish(const Reg (&part)[PARTS][WEIGHTS]) {
        const Halves v = added_halves(part);
        const __m256 pairs = _mm256_hadd_ps(v.ab, v.cd);    // a01 a23 c01 c23 | b01 b23 d01 d23
        const __m256 each = _mm256_hadd_ps(pairs, pairs);   // a c a c | b d b d
        return _mm_unpacklo_ps(_mm256_castps256_ps128(each), _mm256_extractf128_ps(each, 1));
    }
};

bool usable() { return x86_features().avx2; }

template <bool FUSED>
FewRowsKernel kernel(ggml_type type, RowOrder order) {
    if (order == RowOrder::TILED_FUSED) return nullptr;
    return type == GGML_TYPE_BF16 ? float_rows<BF16AsFloats<FUSED>> : type == GGML_TYPE_F16 && FUSED ? float_rows<F16AsFloats> : nullptr;
}

}  // namespace

const FewRowsSet FLOAT_ROWS_AVX2 = {"AVX2 floats", usable, kernel<true>};
const FewRowsSet FLOAT_ROWS_AVX2_UNFUSED = {"AVX2 floats, two roundings", usable, kernel<false>};

}  // namespace moe_edge

#endif
