// Rows of BF16 with the AVX-512 instruction for them (float_rows_lanes.h), as ggml has them where it was built for a processor
// with it.
#include "few_rows_x86.h"

#ifdef MOE_EDGE_X86

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")))
#define INLINE TARGET __attribute__((always_inline)) static inline
#include "float_rows_avx512.h"

namespace moe_edge {

namespace {

struct BF16ByInstruction : BF16 {
    static constexpr int WIDTH = 32, STEP = 64;
    INLINE Reg load(const char * from) { return _mm512_loadu_ps(from); }
    INLINE Reg add_product(Reg sum, Reg a, Reg b) {
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
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
