// How the kernels for weights in blocks of 32 (blocks_of_32.h) go over the rows of a task. Included by the files for an
// instruction set behind what they define: WEIGHTS weight rows and ROWS rows of a tile; Prepared, what a block of a row needs
// besides its bytes, PREPARED of them at a time; Unpacked, a block of WEIGHTS weight rows; prepare, unpack and tile.

namespace moe_edge {

namespace {

template <int PARTS>
TARGET void tile_of(const FewRowsTask & t, int64_t first, int64_t n, const Unpacked * weights, const Operand * rows, int n_rows,
                    const Prepared * prepared) {
    switch (n_rows) {
        case 1: return tile<PARTS, 1>(t, first, n, weights, rows, prepared);
        case 2: return tile<PARTS, 2>(t, first, n, weights, rows, prepared);
        case 3: return tile<PARTS, 3>(t, first, n, weights, rows, prepared);
        case 4: return tile<PARTS, ROWS < 4 ? 1 : 4>(t, first, n, weights, rows, prepared);
        default: return tile<PARTS, ROWS>(t, first, n, weights, rows, prepared);
    }
}

// Rows in equal parts of as many as are prepared at a time; of those, equal parts that fit registers.
template <class T>
TARGET void block_rows(const FewRowsTask & t) {
    Unpacked weights[MOST_BLOCKS];
    Prepared prepared[PREPARED];
    const int most = static_cast<int>(PREPARED / t.n_blocks), n_parts = (t.n_rows + most - 1) / most;
    for (int part = 0; part < n_parts; part++) {
        const int from = part * t.n_rows / n_parts, n_rows = (part + 1) * t.n_rows / n_parts - from;
        const int n_tiles = (n_rows + ROWS - 1) / ROWS;
        const Operand * rows = t.operands + from;
        for (int r = 0; r < n_rows; r++) prepare(rows[r], t.n_blocks, prepared + r * t.n_blocks);
        for (int64_t w = 0; w < t.n_weight_rows; w += WEIGHTS) {
            const int64_t n = t.n_weight_rows - w < WEIGHTS ? t.n_weight_rows - w : WEIGHTS;
            unpack<T>(t, w, n, weights);
            for (int i = 0; i < n_tiles; i++) {
                const int at = i * n_rows / n_tiles, many = (i + 1) * n_rows / n_tiles - at;
                tile_of<T::PARTS>(t, w, n, weights, rows + at, many, prepared + at * t.n_blocks);
            }
        }
    }
}

FewRowsKernel block_kernel(ggml_type type, RowOrder order) {
    if (order == RowOrder::TILED_FUSED) return nullptr;
    switch (type) {
        case GGML_TYPE_Q8_0: return block_rows<Q8_0>;
        case GGML_TYPE_Q4_0: return block_rows<Q4_0>;
        case GGML_TYPE_Q5_0: return block_rows<Q5_0>;
        case GGML_TYPE_IQ4_NL: return block_rows<IQ4_NL>;
        case GGML_TYPE_MXFP4: return block_rows<MXFP4>;
        default: return nullptr;
    }
}

}  // namespace

}  // namespace moe_edge
