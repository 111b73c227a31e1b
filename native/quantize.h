// Rows of floats to ggml's smallest types, with the bytes that ggml's own quantizers give, several times as fast. ggml tries
// scale after scale and, for the grid types, point after point of the grid; here the lanes of a register try them at once.
// Every sum keeps ggml's order of additions, so that even ties fall as they do there (convert/quantize.py compares).
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace moe_edge {

constexpr int SUPER = 256;  // weights of a block of every type here

// Points of `dims` odd numbers each, and for any other such vector those that are nearest to it.
struct Grid {
    struct Place {
        int32_t first;   // where its near points begin in `near_points`
        int16_t point;   // the point that is here, or -1
        int16_t n_near;  // how many points are near; 0 where a point is here
    };
    int dims = 0, bits = 0, lanes = 0;  // bits: of a number in the address of a vector
    std::vector<uint8_t> points;        // [n_points][dims]
    std::vector<uint64_t> words;        // the same in bytes of a word, the first lowest
    std::vector<Place> places;          // by address
    std::vector<uint8_t> near_points;   // of each place, nearest first; its last register is filled up with the first of them
    std::vector<uint8_t> near;          // [register][dims][lanes]: the numbers of those points
};

struct QuantizeTask {
    const float * x;           // [n_rows][n_blocks * SUPER]
    const float * importance;  // [n_blocks * SUPER]
    char * out;
    int64_t n_rows, n_blocks;
    const Grid * grid;  // of the grid types
};

using Quantizer = void (*)(const QuantizeTask & task);

struct Quantizers {
    int lanes = 0;  // 0: this processor has none of these
    Quantizer iq2_xxs = nullptr, iq3_xxs = nullptr, q2_k = nullptr, q3_k = nullptr, q4_k = nullptr;
};

Quantizers avx2_quantizers();
Quantizers avx512_quantizers();

}  // namespace moe_edge
