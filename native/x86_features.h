// What an x86-64 processor and its system can run, asked of the processor itself. __builtin_cpu_supports says no to everything
// where the compiler's runtime never asked, as in what Zig builds (docs/LOG.md, 2026-11-28).
#pragma once
#if defined(__x86_64__)
#include <cpuid.h>

#include <cstdint>

namespace moe_edge {

struct X86Features {
    bool avx2 = false;    // with FMA, F16C and POPCNT
    bool avx512 = false;  // F, BW, DQ and VL
    bool vnni = false, vbmi2 = false, bf16 = false;
};

// Registers that the system keeps when it switches programs: XCR0.
inline uint64_t kept_registers() {
    uint32_t low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (static_cast<uint64_t>(high) << 32) | low;
}

inline X86Features x86_features() {
    constexpr uint64_t YMM = 0x6, ZMM = 0xe6;
    constexpr uint32_t FMA = 1u << 12, POPCNT = 1u << 23, OSXSAVE = 1u << 27, F16C = 1u << 29;  // leaf 1, ecx
    constexpr uint32_t AVX2 = 1u << 5, AVX512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // leaf 7, ebx: F, DQ, BW, VL
    constexpr uint32_t VBMI2 = 1u << 6, VNNI = 1u << 11;                                  // leaf 7, ecx
    constexpr uint32_t BF16 = 1u << 5;                                                    // leaf 7.1, eax
    X86Features found;
    uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & OSXSAVE)) return found;
    const bool has_rest = (ecx & FMA) && (ecx & POPCNT) && (ecx & F16C);
    const uint64_t kept = kept_registers();
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return found;
    found.avx2 = has_rest && (ebx & AVX2) && (kept & YMM) == YMM;
    found.avx512 = found.avx2 && (ebx & AVX512) == AVX512 && (kept & ZMM) == ZMM;
    found.vnni = found.avx512 && (ecx & VNNI);
    found.vbmi2 = found.avx512 && (ecx & VBMI2);
    if (__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) found.bf16 = found.avx512 && (eax & BF16);
    return found;
}

}  // namespace moe_edge
#endif
