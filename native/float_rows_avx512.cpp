// Rows of BF16 and F16 made 32-bit floats, with AVX-512 (float_rows_lanes.h).
#include "few_rows_x86.h"

#ifdef MOE_EDGE_X86

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define INLINE TARGET __attribute__((always_inline)) static inline
#include "float_rows_avx512.h"

namespace moe_edge {

namespace {

// FUSED: a multiplication and an addition in one rounding, as ggml's compiler may have made of them.
template <bool FUSED>
struct BF16AsFloats : BF16 {
    static constexpr int WIDTH = 16, STEP = 32;
    INLINE Reg load(const char * from) {
        const __m256i numbers = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16));
    }
    INLINE Reg add_product(Reg sum, Reg a, Reg b) {
        return FUSED ? _mm512_fmadd_ps(a, b, sum) : _mm512_add_ps(_mm512_mul_ps(a, b), sum);
    }
};

struct F16AsFloats : Lanes {
    static constexpr int WIDTH = 16, PARTS = 4, STEP = 64;
    INLINE Reg load(const char * from) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from))); }
    INLINE Reg add_product(Reg sum, Reg a, Reg b) { return _mm512_fmadd_ps(a, b, sum); }
    INLINE __m128 finish(const Reg (&part)[PARTS][WEIGHTS]) {
        Reg sum[WEIGHTS];
        UNROLL
        for (int w = 0; w < WEIGHTS; w++) {
            sum[w] = _mm512_add_ps(_mm512_add_ps(part[0][w], part[2][w]), _mm512_add_ps(part[1][w], part[3][w]));
        }
        return four_sums(sum[0], sum[1], sum[2], sum[3]);
    }
};

bool usable() { return x86_features().avx512; }

template <bool FUSED>
FewRowsKernel kernel(ggml_type type, RowOrder order) {
    if (order == RowOrder::TILED_FUSED) return nullptr;
    return type == GGML_TYPE_BF16 ? float_rows<BF16AsFloats<FUSED>> : type == GGML_TYPE_F16 && FUSED ? float_rows<F16AsFloats> : nullptr;
}

}  // namespace

const FewRowsSet FLOAT_ROWS_AVX512 = {"AVX-512 floats", usable, kernel<true>};
const FewRowsSet FLOAT_ROWS_AVX512_UNFUSED = {"AVX-512 floats, two roundings", usable, kernel<false>};

}  // namespace moe_edge

#endif
