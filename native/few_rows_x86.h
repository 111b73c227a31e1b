// What the few-row kernels of x86-64 share (few_rows.h): where things lie in ggml's blocks of 256 values, and their halves.
#pragma once
#include "few_rows.h"
#include "x86_features.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define MOE_EDGE_X86
#include <immintrin.h>

#include <cstring>

#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 8")
// GCC 12 takes the registers that its own header leaves undefined on purpose for mistakes of ours.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace moe_edge {

// Q8_K: a float scale, 256 signed bytes, 16 sums of 16 of them.
constexpr int64_t Q8_K_QUANTS = 4, Q8_K_SUMS = 260, Q8_K_BYTES = 292;
// Q4_K: two halves (the scale of scales and of minimums), 12 bytes of those, 256 halves of a byte.
constexpr int64_t Q4_K_SCALES = 4, Q4_K_QUANTS = 16, Q4_K_BYTES = 144;
// Q6_K: 256 lower halves of a byte, 256 times two upper bits, 16 signed scales, a half (the scale of scales).
constexpr int64_t Q6_K_HIGH = 128, Q6_K_SCALES = 192, Q6_K_D = 208, Q6_K_BYTES = 210;

__attribute__((target("avx2,fma,f16c"), always_inline)) static inline float half(const char * from) {
    uint16_t bits;
    memcpy(&bits, from, sizeof(bits));
    return _cvtsh_ss(bits);
}

// Twelve bytes are eight scales and eight minimums of six bits: four of each whole, the others in two parts. To a byte each.
__attribute__((always_inline)) static inline void scales_and_mins(const char * from, uint64_t & scales, uint64_t & mins) {
    uint32_t part[3];
    memcpy(part, from, sizeof(part));
    const uint64_t six = 0x3f3f3f3f, four = 0x0f0f0f0f, top = 0x30303030;
    scales = (part[0] & six) | ((part[2] & four) | ((uint64_t{part[0]} >> 2) & top)) << 32;
    mins = (part[1] & six) | (((part[2] >> 4) & four) | ((uint64_t{part[1]} >> 2) & top)) << 32;
}

extern const FewRowsSet FEW_ROWS_AVX512, FEW_ROWS_AVX2;                                          // K-quants
extern const FewRowsSet BF16_ROWS_AVX512, FLOAT_ROWS_AVX512, FLOAT_ROWS_AVX512_UNFUSED;         // BF16, F16
extern const FewRowsSet FLOAT_ROWS_AVX2, FLOAT_ROWS_AVX2_UNFUSED;
extern const FewRowsSet BLOCK_ROWS_AVX512, BLOCK_ROWS_AVX2;                                      // blocks of 32

}  // namespace moe_edge

#endif
