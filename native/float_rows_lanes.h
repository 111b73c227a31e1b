// Rows of BF16 and F16 (few_rows.h), for any instruction set. ggml has one product for them, whatever the number of rows:
// several registers of partial sums, each over its own part of every STEP values, added at the end. One product alone waits
// for the sum before it; here the sums of four weight rows and some rows of the group are made together, one register of
// each at a time, and every number loaded is multiplied several times. Each sum is added in ggml's order.
// Included by the files for an instruction set, which define TARGET, INLINE, UNROLL and for each type of numbers a struct:
// Reg; WIDTH values of it; PARTS registers of partial sums over STEP values; ROWS of the group that fit beside four weight
// rows; load; add_product(sum, weight, x); finish(parts of four sums), which are four products.
#include "few_rows.h"

namespace moe_edge {

namespace {

constexpr int WEIGHTS = 4;                 // weight rows at a time
constexpr int64_t NEAR_BYTES = 24 << 10;   // of rows, which the nearest cache keeps beside the weights

// Part `part` of the sums of four weight rows with R rows.
template <class L, int R>
INLINE void sums_of(const char * const (&x)[WEIGHTS], const Operand * rows, int64_t n_cols, int part,
                    typename L::Reg (&sum)[R][WEIGHTS]) {
    UNROLL
    for (int r = 0; r < R; r++) {
        UNROLL
        for (int w = 0; w < WEIGHTS; w++) sum[r][w] = L::zero();
    }
    for (int64_t i = part * L::WIDTH; i < n_cols; i += L::STEP) {
        typename L::Reg weights[WEIGHTS];
        UNROLL
        for (int w = 0; w < WEIGHTS; w++) weights[w] = L::load(x[w] + 2 * i);
        UNROLL
        for (int r = 0; r < R; r++) {
            const typename L::Reg row = L::load(rows[r].x + 2 * i);
            UNROLL
            for (int w = 0; w < WEIGHTS; w++) sum[r][w] = L::add_product(sum[r][w], weights[w], row);
        }
    }
}

// Products of the weight rows from `first` on, at most four, with R rows.
template <class L, int R>
TARGET void tile(const FewRowsTask & t, int64_t first, const Operand * rows) {
    const char * x[WEIGHTS];
    const int64_t n = t.n_weight_rows - first < WEIGHTS ? t.n_weight_rows - first : WEIGHTS;
    for (int64_t w = 0; w < WEIGHTS; w++) x[w] = t.weights + (first + (w < n ? w : n - 1)) * t.weight_row_bytes;
    typename L::Reg parts[L::PARTS][R][WEIGHTS];
    for (int part = 0; part < L::PARTS; part++) {
        typename L::Reg sum[R][WEIGHTS];  // in registers until the part is done
        sums_of<L, R>(x, rows, t.n_blocks, part, sum);
        UNROLL
        for (int r = 0; r < R; r++) {
            UNROLL
            for (int w = 0; w < WEIGHTS; w++) parts[part][r][w] = sum[r][w];
        }
    }
    for (int r = 0; r < R; r++) {
        typename L::Reg of_row[L::PARTS][WEIGHTS];
        for (int part = 0; part < L::PARTS; part++) {
            for (int w = 0; w < WEIGHTS; w++) of_row[part][w] = parts[part][r][w];
        }
        float products[WEIGHTS];
        _mm_storeu_ps(products, L::finish(of_row));
        for (int64_t w = 0; w < n; w++) rows[r].out[first + w] = products[w];
    }
}

template <class L>
void tile_of(const FewRowsTask & t, int64_t first, const Operand * rows, int n_rows) {
    switch (n_rows) {
        case 1: return tile<L, 1>(t, first, rows);
        case 2: return tile<L, 2>(t, first, rows);
        case 3: return tile<L, L::ROWS < 3 ? 1 : 3>(t, first, rows);
        case 4: return tile<L, L::ROWS < 4 ? 1 : 4>(t, first, rows);
        case 5: return tile<L, L::ROWS < 5 ? 1 : 5>(t, first, rows);
        default: return tile<L, L::ROWS>(t, first, rows);
    }
}

// Rows in equal parts that stay in the nearest cache while all weight rows pass; of those, equal parts that fit registers.
template <class L>
void float_rows(const FewRowsTask & t) {
    const int64_t near = NEAR_BYTES / (2 * t.n_blocks);
    const int most = near < L::ROWS ? L::ROWS : near > t.n_rows ? t.n_rows : static_cast<int>(near);
    const int n_parts = (t.n_rows + most - 1) / most;
    for (int part = 0; part < n_parts; part++) {
        const int from = part * t.n_rows / n_parts, n_rows = (part + 1) * t.n_rows / n_parts - from;
        const int n_tiles = (n_rows + L::ROWS - 1) / L::ROWS;
        for (int64_t w = 0; w < t.n_weight_rows; w += WEIGHTS) {
            for (int i = 0; i < n_tiles; i++) {
                const int at = i * n_rows / n_tiles, n = (i + 1) * n_rows / n_tiles - at;
                tile_of<L>(t, w, t.operands + from + at, n);
            }
        }
    }
}

}  // namespace

}  // namespace moe_edge
