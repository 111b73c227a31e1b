// Exponents of 16-bit floats in codes of three bits (codec `codes`; docs/FORMAT.md has the bytes). Seven exponents make
// up 97 % of a matrix's weights and have a code each; the eighth code says that the exponent is the next in a list. Codes
// of one width are unpacked 32 and 64 at a time, which zstd's of many widths cannot be.
#pragma once
#include <cstdint>

namespace moe_edge {

constexpr int64_t CODE_GROUP = 32;      // values whose codes lie together
constexpr int64_t CODE_TABLE = 8;       // exponents, the last unused
constexpr int64_t CODE_GROUP_BYTES = 12;

// What unpacks codes: PLAIN is C++ alone; the others are the vectors of x86 and ARM.
enum class CodeUnpacker : int32_t { PLAIN = 0, AVX2 = 1, AVX512 = 2, NEON = 3 };
bool code_unpacker_usable(CodeUnpacker which);
CodeUnpacker best_code_unpacker();  // of this processor

// A chunk's exponents. is_f16: they have five bits, and three of the mantissa come with them, in codes of their own.
struct CodedExponents {
    uint8_t table[CODE_TABLE] = {};     // the last is 0
    const uint8_t * escapes = nullptr;  // in order; `groups` follow them in memory
    int64_t n_escapes = 0;
    const uint8_t * groups = nullptr;
    bool is_f16 = false;
};

// What groups of n values take.
inline int64_t code_bytes(int64_t n, bool is_f16) { return (n + CODE_GROUP - 1) / CODE_GROUP * CODE_GROUP_BYTES * (is_f16 ? 2 : 1); }

// Write n 16-bit floats: exponents beside `low`, mantissa and sign, turned right by one bit. False: there are more escapes
// or fewer than codes for them; what is written then is worth nothing, and nothing is written or read outside.
bool join_codes(CodeUnpacker which, const CodedExponents & coded, const uint8_t * low, char * dst, int64_t n);

}  // namespace moe_edge
