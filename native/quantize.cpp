// The grids of quantize.h, and its face for Python: a library of its own, which needs nothing of llama.cpp but ggml-base.
#include "quantize.h"

#include <algorithm>
#include <cstring>

#include "ggml.h"

namespace moe_edge {

namespace {

constexpr int N_POINTS = 256, SHELLS = 2;  // of neighbours: at the least distance there is, and at the next

// The numbers 0, 1, 2 ... of each point, as ggml reads them back: a block of nothing but that point. ggml does not show its
// grids otherwise. IQ2_XXS: of each 8 bytes, four are points; IQ3_XXS: the 64 bytes behind the scale.
std::vector<uint8_t> grid_points(ggml_type type, int dims) {
    const ggml_type_traits * traits = ggml_get_type_traits(type);
    std::vector<uint8_t> found;
    std::vector<char> block(traits->type_size);
    float values[SUPER];
    for (int p = 0; p < N_POINTS; p++) {
        std::fill(block.begin(), block.end(), 0);
        const ggml_fp16_t one = ggml_fp32_to_fp16(1.f);
        memcpy(block.data(), &one, sizeof(one));
        memset(block.data() + 2, p, 4);
        traits->to_float(block.data(), values, SUPER);
        // What comes back are 1, 3.125 and 5.375 (IQ2_XXS) or 1, 3, 5 and so on to 13, and 15.5 (IQ3_XXS).
        for (int i = 0; i < dims; i++) found.push_back(static_cast<uint8_t>(2 * static_cast<int>((values[i] - 1) / 2 + 0.25f) + 1));
    }
    return found;
}

int distance(const uint8_t * a, const uint8_t * b, int n) {
    int sum = 0;
    for (int i = 0; i < n; i++) sum += (a[i] - b[i]) * (a[i] - b[i]);
    return sum;
}

// The points of the nearest shells around a vector, the nearest first, those of one shell by number.
std::vector<uint8_t> neighbours(const Grid & grid, const uint8_t * at) {
    std::vector<std::pair<int, uint8_t>> all;
    for (int p = 0; p < N_POINTS; p++) all.emplace_back(distance(at, &grid.points[p * grid.dims], grid.dims), static_cast<uint8_t>(p));
    std::sort(all.begin(), all.end());
    std::vector<uint8_t> near;
    int shells = 0, last = -1;
    for (const auto & [d, p] : all) {
        if (d != last && ++shells > SHELLS) break;
        last = d;
        near.push_back(p);
    }
    return near;
}

void add_neighbours(Grid & grid, int address, std::vector<uint8_t> near) {
    grid.places[address] = {static_cast<int32_t>(grid.near_points.size()), -1, static_cast<int16_t>(near.size())};
    near.resize((near.size() + grid.lanes - 1) / grid.lanes * grid.lanes, near[0]);
    grid.near_points.insert(grid.near_points.end(), near.begin(), near.end());
    for (size_t c = 0; c < near.size(); c += grid.lanes) {
        for (int i = 0; i < grid.dims; i++) {
            for (int lane = 0; lane < grid.lanes; lane++) grid.near.push_back(grid.points[near[c + lane] * grid.dims + i]);
        }
    }
}

// levels: numbers that a part of a vector may be.
Grid make_grid(ggml_type type, int dims, int bits, int levels, int lanes) {
    Grid grid;
    grid.dims = dims;
    grid.bits = bits;
    grid.lanes = lanes;
    grid.points = grid_points(type, dims);
    grid.words.assign(N_POINTS, 0);
    grid.places.assign(size_t{1} << (dims * bits), {0, -1, 0});
    for (int p = 0; p < N_POINTS; p++) {
        int address = 0;
        for (int i = 0; i < dims; i++) grid.words[p] |= uint64_t{grid.points[p * dims + i]} << (8 * i);
        for (int i = 0; i < dims; i++) address |= (grid.points[p * dims + i] - 1) / 2 << (bits * i);
        grid.places[address].point = static_cast<int16_t>(p);
    }
    for (size_t address = 0; address < grid.places.size(); address++) {
        uint8_t at[8];
        bool is_used = true;
        for (int i = 0; i < dims; i++) {
            const int level = static_cast<int>(address) >> (bits * i) & ((1 << bits) - 1);
            is_used = is_used && level < levels;
            at[i] = static_cast<uint8_t>(2 * level + 1);
        }
        if (is_used && grid.places[address].point < 0) add_neighbours(grid, static_cast<int>(address), neighbours(grid, at));
    }
    return grid;
}

template <int L>
const Grid & iq2_grid() {
    static const Grid grid = make_grid(GGML_TYPE_IQ2_XXS, 8, 2, 3, L);
    return grid;
}
template <int L>
const Grid & iq3_grid() {
    static const Grid grid = make_grid(GGML_TYPE_IQ3_XXS, 4, 3, 8, L);
    return grid;
}

// most_lanes: of a register, at the most.
Quantizers best(int most_lanes) {
    const Quantizers wide = most_lanes >= 16 ? avx512_quantizers() : Quantizers{};
    return wide.lanes || most_lanes < 8 ? wide : avx2_quantizers();
}

}  // namespace

}  // namespace moe_edge

using namespace moe_edge;

// Quantize n_rows rows of n_cols floats to a ggml type, with the importance of each column. lanes: 16 or 8 of a register at the
// most. Returns the bytes written; 0: not a type of these, or not a processor. Any thread may call it.
extern "C" __attribute__((visibility("default"))) int64_t meq_quantize(
    int32_t type, const float * x, const float * importance, char * out, int64_t n_rows, int64_t n_cols, int32_t lanes) {
    const Quantizers q = best(lanes);
    if (q.lanes == 0 || n_cols % SUPER) return 0;
    QuantizeTask task{x, importance, out, n_rows, n_cols / SUPER, nullptr};
    Quantizer run = nullptr;
    switch (type) {
        case GGML_TYPE_IQ2_XXS:
            run = q.iq2_xxs;
            task.grid = q.lanes == 16 ? &iq2_grid<16>() : &iq2_grid<8>();
            break;
        case GGML_TYPE_IQ3_XXS:
            run = q.iq3_xxs;
            task.grid = q.lanes == 16 ? &iq3_grid<16>() : &iq3_grid<8>();
            break;
        case GGML_TYPE_Q2_K: run = q.q2_k; break;
        case GGML_TYPE_Q3_K: run = q.q3_k; break;
        case GGML_TYPE_Q4_K: run = q.q4_k; break;
        default: return 0;
    }
    run(task);
    return n_rows * n_cols / SUPER * static_cast<int64_t>(ggml_type_size(static_cast<ggml_type>(type)));
}
