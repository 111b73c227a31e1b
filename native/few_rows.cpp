#include "few_rows.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "few_rows_x86.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"

namespace moe_edge {

#ifdef MOE_EDGE_X86
const FewRowsSet * const FEW_ROWS_SETS[] = {&FEW_ROWS_AVX512, &FEW_ROWS_AVX2, &BF16_ROWS_AVX512, &FLOAT_ROWS_AVX512,
                                            &FLOAT_ROWS_AVX512_UNFUSED, &FLOAT_ROWS_AVX2, &FLOAT_ROWS_AVX2_UNFUSED,
                                            &BLOCK_ROWS_AVX512, &BLOCK_ROWS_AVX2, nullptr};
#else
const FewRowsSet * const FEW_ROWS_SETS[] = {nullptr};
#endif

namespace {

constexpr int64_t BLOCK = 256, COLUMNS = 3 * BLOCK;
constexpr int WEIGHT_ROWS = 5, ROWS = 19;

struct Trial {
    ggml_type type, row_type;
    size_t weight_row, row;
    std::vector<char> weights, rows;
};

// Values in -1 to 1 that are the same at each start (xorshift, Marsaglia 2003).
std::vector<float> some_values(int64_t n) {
    std::vector<float> values(static_cast<size_t>(n));
    uint32_t state = 2463534242;
    for (float & v : values) {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        v = static_cast<float>(static_cast<int32_t>(state)) / 2147483648.0f;
    }
    return values;
}

// A product of two numbers of BF16 is exact, so one rounding or two are told apart only where it is too large for a float:
// -2^127, and 2^128 added to it by the same sum, are 2^127 in one rounding and infinite in two.
void add_overflow(Trial & t) {
    auto put = [](std::vector<char> & row, int64_t at, float value) {
        const ggml_bf16_t number = ggml_fp32_to_bf16(value);
        memcpy(row.data() + 2 * at, &number, sizeof(number));
    };
    put(t.weights, 0, -0x1p120f);
    put(t.rows, 0, 0x1p7f);
    put(t.weights, BLOCK, 0x1p120f);
    put(t.rows, BLOCK, 0x1p8f);
}

Trial make_trial(ggml_type type) {
    const ggml_type row_type = ggml_get_type_traits_cpu(type)->vec_dot_type;
    Trial t{type, row_type, ggml_row_size(type, COLUMNS), ggml_row_size(row_type, COLUMNS), {}, {}};
    const std::vector<float> values = some_values((WEIGHT_ROWS + ROWS) * COLUMNS);
    t.weights.resize(WEIGHT_ROWS * t.weight_row);
    t.rows.resize(ROWS * t.row);
    ggml_quantize_chunk(type, values.data(), t.weights.data(), 0, WEIGHT_ROWS, COLUMNS, nullptr);
    ggml_get_type_traits_cpu(row_type)->from_float(values.data() + WEIGHT_ROWS * COLUMNS, t.rows.data(), ROWS * COLUMNS);
    if (type == GGML_TYPE_BF16) add_overflow(t);
    return t;
}

using Products = std::vector<float>;  // [row][weight row]

Products by_vec_dot(const Trial & t, int n_rows) {
    const auto vec_dot = ggml_get_type_traits_cpu(t.type)->vec_dot;
    Products products(static_cast<size_t>(n_rows * WEIGHT_ROWS));
    for (size_t r = 0; r < static_cast<size_t>(n_rows); r++) {
        for (size_t w = 0; w < WEIGHT_ROWS; w++) {
            vec_dot(COLUMNS, &products[r * WEIGHT_ROWS + w], 0, t.weights.data() + w * t.weight_row, 0, t.rows.data() + r * t.row, 0, 1);
        }
    }
    return products;
}

// By the product of stock's graph; none when ggml fails at it.
Products by_matrix(Trial & t, int n_rows) {
    Products products(static_cast<size_t>(n_rows * WEIGHT_ROWS));
    std::vector<int32_t> zeros(static_cast<size_t>(n_rows), 0);
    std::vector<char> meta(ggml_tensor_overhead() * 8 + ggml_graph_overhead_custom(8, false));
    ggml_backend_t cpu = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(cpu, 1);
    ggml_context * ctx = ggml_init({meta.size(), meta.data(), true});
    ggml_tensor * weights = ggml_new_tensor_3d(ctx, t.type, COLUMNS, WEIGHT_ROWS, 1);
    ggml_tensor * rows = ggml_new_tensor_3d(ctx, t.row_type, COLUMNS, 1, n_rows);
    ggml_tensor * ids = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 1, n_rows);
    ggml_tensor * product = ggml_mul_mat_id(ctx, weights, rows, ids);
    weights->data = t.weights.data();
    rows->data = t.rows.data();
    ids->data = zeros.data();
    product->data = products.data();
    ggml_cgraph * graph = ggml_new_graph_custom(ctx, 8, false);
    ggml_build_forward_expand(graph, product);
    const ggml_status status = ggml_backend_graph_compute(cpu, graph);
    ggml_free(ctx);
    ggml_backend_free(cpu);
    return status == GGML_STATUS_SUCCESS ? products : Products();
}

bool gives(FewRowsKernel kernel, const Trial & t, int n_rows, const Products & want) {
    Products got(static_cast<size_t>(n_rows * WEIGHT_ROWS), -1.0f);
    Operand operands[ROWS];
    for (int r = 0; r < n_rows; r++) operands[r] = {t.rows.data() + static_cast<size_t>(r) * t.row, got.data() + r * WEIGHT_ROWS};
    kernel({COLUMNS / ggml_blck_size(t.type), t.weights.data(), static_cast<int64_t>(t.weight_row), WEIGHT_ROWS, operands, n_rows});
    return got.size() == want.size() && memcmp(got.data(), want.data(), got.size() * sizeof(float)) == 0;
}

}  // namespace

bool few_rows_agrees(FewRowsKernel kernel, ggml_type type, RowOrder order) {
    Trial t = make_trial(type);
    if (order == RowOrder::VEC_DOT) {
        for (int n = 1; n <= FEW_ROWS; n++) {
            if (!gives(kernel, t, n, by_vec_dot(t, n))) return false;
        }
        return true;
    }
    // ggml goes through a matrix in one way for up to 16 rows and in another for more.
    for (int n : {FEW_ROWS + 1, FEW_ROWS + 4, ROWS}) {
        if (!gives(kernel, t, n, by_matrix(t, n))) return false;
    }
    return true;
}

namespace {

struct Chosen {
    FewRowsKernel few[GGML_TYPE_COUNT] = {}, more[GGML_TYPE_COUNT] = {};

    Chosen() {
        for (auto set = FEW_ROWS_SETS; *set; set++) {
            if (!(*set)->usable()) continue;
            for (int type = 0; type < GGML_TYPE_COUNT; type++) {
                choose(**set, static_cast<ggml_type>(type), RowOrder::VEC_DOT, few[type]);
                choose(**set, static_cast<ggml_type>(type), RowOrder::TILED_FUSED, more[type]);
                choose(**set, static_cast<ggml_type>(type), RowOrder::TILED, more[type]);
            }
        }
    }

    static void choose(const FewRowsSet & set, ggml_type type, RowOrder order, FewRowsKernel & chosen) {
        const FewRowsKernel kernel = chosen ? nullptr : set.kernel(type, order);
        if (kernel && few_rows_agrees(kernel, type, order)) chosen = kernel;
    }
};

const Chosen & chosen() {
    static const Chosen made;
    return made;
}

// Types that ggml has one product for, whatever the number of rows; and so have the kernels. K-quants have tiled ones.
bool has_one_product(ggml_type type) { return ggml_blck_size(type) < BLOCK; }

// A single row shares nothing. ggml's tiled products fill rows up to sixteens, and from 32 rows of Q4_K on one of theirs
// takes 6/7 of one of ours.
bool pays(ggml_type type, int64_t n_rows) {
    const int64_t filled = (n_rows + 15) / 16 * 16;
    if (has_one_product(type)) return n_rows > 1;
    return n_rows > 1 && n_rows <= MOST_FEW_ROWS && (n_rows < 32 || type != GGML_TYPE_Q4_K || 7 * n_rows <= 6 * filled);
}

}  // namespace

void try_few_rows() { chosen(); }

FewRowsKernel few_rows_kernel(ggml_type type, int64_t n_cols, int64_t n_rows) {
    const bool fits = n_cols <= FEW_ROWS_BLOCKS * BLOCK && (!has_one_product(type) || n_cols % FEW_ROWS_STEP == 0);
    if (!fits || !pays(type, n_rows)) return nullptr;
    return n_rows <= FEW_ROWS ? chosen().few[type] : chosen().more[type];
}

bool multiply_few_rows(ggml_type type, int64_t n_cols, const char * weights, int64_t from, int64_t to, const Operand * operands,
                       int64_t n_operands) {
    const FewRowsKernel kernel = few_rows_kernel(type, n_cols, n_operands);
    if (!kernel) return false;
    const auto row = static_cast<int64_t>(ggml_row_size(type, n_cols));
    Operand shifted[MOST_FEW_ROWS];
    for (int64_t first = 0; first < n_operands; first += MOST_FEW_ROWS) {
        const int64_t n = std::min<int64_t>(MOST_FEW_ROWS, n_operands - first);
        for (int64_t i = 0; i < n; i++) shifted[i] = {operands[first + i].x, operands[first + i].out + from};
        kernel({n_cols / ggml_blck_size(type), weights + from * row, row, to - from, shifted, static_cast<int>(n)});
    }
    return true;
}

}  // namespace moe_edge
