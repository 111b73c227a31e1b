// Rows of BF16 with the AVX-512 instruction for them (float_rows_lanes.h), as ggml has them where it was built for a processor
// with it.
#include "few_rows_x86.h"

#ifdef MOE_EDGE_X86

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")))
#define INLINE TARGET __attribute__((always_inline)) static inline
#include "float_rows_avx512.h"

namespace moe_edge {

namespace {

struct BF16ByInstruction : Lanes {
    static constexpr int WIDTH = 32, PARTS = 2, STEP = 64, ROWS = 6;
    INLINE Reg load(const char * from) { return _mm512_loadu_ps(from); }
    INLINE Reg add_product(Reg sum, Reg a, Reg b) {
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
    }
    INLINE __m128 finish(const Reg (&part)[PARTS][WEIGHTS]) {
        return added_as_doubles(four_sums(part[0][0], part[0][1], part[0][2], part[0][3]),
                                four_sums(part[1][0], part[1][1], part[1][2], part[1][3]));
    }
};

bool usable() { return x86_features().bf16; }

FewRowsKernel kernel(ggml_type type, RowOrder order) {
    return type == GGML_TYPE_BF16 && order != RowOrder::TILED_FUSED ? float_rows<BF16ByInstruction> : nullptr;
}

}  // namespace

const FewRowsSet BF16_ROWS_AVX512 = {"AVX-512 BF16", usable, kernel};

}  // namespace moe_edge

#endif
