// Kernels of a few rows against ggml's own products, bit by bit: every set of instructions that this processor has, every
// type, 1 to 7 rows against vec_dot and 8 to MOST_FEW_ROWS against MUL_MAT_ID, widths from one block to the widest, ordinary
// and extreme values. Kernels for what another build of ggml does with BF16 and F16 are compared with the same sums in plain
// C++. Prints what it compared.
#include <cmath>
#include <cstring>

#include "../../native/few_rows.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "stress.h"

using namespace moe_edge;

constexpr int64_t BLOCK = 256, N_ROWS = MOST_FEW_ROWS, MARGIN = 3;  // floats on both sides of the products, which must stay as they are

struct Data {
    ggml_type type;
    int64_t n_blocks, n_weight_rows;
    std::vector<char> weights, rows;
    int64_t weight_row() const { return static_cast<int64_t>(ggml_row_size(type, n_blocks * BLOCK)); }
    ggml_type row_type() const { return ggml_get_type_traits_cpu(type)->vec_dot_type; }
    int64_t row() const { return static_cast<int64_t>(ggml_row_size(row_type(), n_blocks * BLOCK)); }
};

static bool is_float(ggml_type type) { return type == GGML_TYPE_BF16 || type == GGML_TYPE_F16; }

// Types that ggml has one product for, whatever the number of rows.
static bool has_one_product(ggml_type type) { return ggml_blck_size(type) < BLOCK; }

// Where a type has its halves in a block: the scale of the scales, and that of the minimums.
static std::vector<int64_t> halves_of(ggml_type type) {
    switch (type) {
        case GGML_TYPE_Q4_K: return {0, 2};
        case GGML_TYPE_Q6_K: return {208};
        case GGML_TYPE_MXFP4: return {};  // an exponent of one byte
        case GGML_TYPE_Q8_0: case GGML_TYPE_Q4_0: case GGML_TYPE_Q5_0: case GGML_TYPE_IQ4_NL: return {0};
        default: CHECK(false, "%s: say here where its halves are", ggml_type_name(type)); return {};
    }
}

enum Kind { ORDINARY, EXTREME, NOT_FINITE, N_KINDS };

// Numbers of two bytes of all sizes, nothing and subnormal ones among them; of the last kind also what is not finite.
static void make_extreme_floats(Data & d, Kind kind, Random & random) {
    const uint16_t exponent = d.type == GGML_TYPE_BF16 ? 0x7F80 : 0x7C00;
    for (size_t i = 0; i < d.weights.size(); i += sizeof(uint16_t)) {
        auto bits = static_cast<uint16_t>(pick(random, 0, 0xFFFF));
        const int64_t as = pick(random, 0, 20);
        if (as == 0) bits &= 0x8000;
        if (as == 1) bits = static_cast<uint16_t>(bits & ~exponent);
        if (kind == EXTREME && (bits & exponent) == exponent) bits = static_cast<uint16_t>(bits & ~0x0400);
        memcpy(d.weights.data() + i, &bits, sizeof(bits));
    }
}

static Data make(ggml_type type, int64_t n_blocks, int64_t n_weight_rows, Kind kind, Random & random) {
    Data d{type, n_blocks, n_weight_rows, {}, {}};
    const int64_t n_cols = n_blocks * BLOCK;
    std::normal_distribution<float> normal;
    std::vector<float> values(static_cast<size_t>((n_weight_rows + N_ROWS) * n_cols));
    for (float & v : values) v = normal(random);
    float * const of_rows = values.data() + n_weight_rows * n_cols;
    if (kind != ORDINARY) {  // by row: nothing, largest, smallest, and scales of all sizes
        std::fill_n(of_rows, n_cols, 0.0f);
        for (int64_t c = 0; c < n_cols; c++) {
            of_rows[n_cols + c] = c % 3 ? 3e30f : -3e30f;
            of_rows[2 * n_cols + c] *= 1e-40f;
            of_rows[3 * n_cols + c] = -5.0f;
            of_rows[4 * n_cols + c] *= std::ldexp(1.0f, static_cast<int>(pick(random, -60, 60)));
        }
    }
    d.weights.resize(static_cast<size_t>(n_weight_rows * d.weight_row()));
    d.rows.resize(static_cast<size_t>(N_ROWS * d.row()));
    ggml_quantize_chunk(type, values.data(), d.weights.data(), 0, n_weight_rows, n_cols, nullptr);
    ggml_get_type_traits_cpu(d.row_type())->from_float(of_rows, d.rows.data(), N_ROWS * n_cols);
    if (kind == ORDINARY) return d;
    if (is_float(type)) {
        make_extreme_floats(d, kind, random);
        return d;
    }
    // Every pattern of bits in the weights; scales from nothing and subnormal to the largest, of both signs.
    const std::vector<uint16_t> scales = {0, 0x8000, 1, 0x83FF, 0x0400, 0x3C00, 0xBC00, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00};
    const int64_t n_scales = kind == EXTREME ? 9 : 12;
    for (int64_t b = 0; b < n_weight_rows * n_cols / ggml_blck_size(type); b++) {
        char * const block = d.weights.data() + b * static_cast<int64_t>(ggml_type_size(type));
        const int64_t fill = pick(random, 0, 3);
        for (size_t i = 0; i < ggml_type_size(type); i++) {
            block[i] = static_cast<char>(fill == 0 ? 0 : fill == 1 ? 0xFF : fill == 2 ? 0x80 : pick(random, 0, 255));
        }
        for (int64_t at : halves_of(type)) {
            memcpy(block + at, &scales[static_cast<size_t>(pick(random, 0, n_scales - 1))], sizeof(uint16_t));
        }
    }
    return d;
}

static bool same(float a, float b) { return memcmp(&a, &b, sizeof(a)) == 0 || (std::isnan(a) && std::isnan(b)); }

using Products = std::vector<std::vector<float>>;  // [row][weight row]

static Products by_vec_dot(const Data & d, int first, int n) {
    Products products(static_cast<size_t>(n), std::vector<float>(static_cast<size_t>(d.n_weight_rows)));
    for (int r = 0; r < n; r++) {
        for (int64_t w = 0; w < d.n_weight_rows; w++) {
            ggml_get_type_traits_cpu(d.type)->vec_dot(static_cast<int>(d.n_blocks * BLOCK),
                                                      &products[static_cast<size_t>(r)][static_cast<size_t>(w)], 0,
                                                      d.weights.data() + w * d.weight_row(), 0, d.rows.data() + (first + r) * d.row(), 0, 1);
        }
    }
    return products;
}

static Products by_matrix(const Data & d, int first, int n) {
    static ggml_backend_t cpu = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(cpu, 1);
    std::vector<char> meta(1 << 16);
    std::vector<int32_t> zeros(static_cast<size_t>(n));
    std::vector<float> flat(static_cast<size_t>(n * d.n_weight_rows));
    ggml_context * ctx = ggml_init({meta.size(), meta.data(), true});
    ggml_tensor * weights = ggml_new_tensor_3d(ctx, d.type, d.n_blocks * BLOCK, d.n_weight_rows, 1);
    ggml_tensor * rows = ggml_new_tensor_3d(ctx, d.row_type(), d.n_blocks * BLOCK, 1, n);
    ggml_tensor * ids = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 1, n);
    ggml_tensor * product = ggml_mul_mat_id(ctx, weights, rows, ids);
    weights->data = const_cast<char *>(d.weights.data());
    rows->data = const_cast<char *>(d.rows.data()) + first * d.row();
    ids->data = zeros.data();
    product->data = flat.data();
    ggml_cgraph * graph = ggml_new_graph_custom(ctx, 8, false);
    ggml_build_forward_expand(graph, product);
    CHECK(ggml_backend_graph_compute(cpu, graph) == GGML_STATUS_SUCCESS, "ggml's product");
    ggml_free(ctx);
    Products products;
    for (int r = 0; r < n; r++) products.emplace_back(flat.begin() + r * d.n_weight_rows, flat.begin() + (r + 1) * d.n_weight_rows);
    return products;
}

// How a kernel for BF16 or F16 adds: as ggml does that was built for such a processor.
struct Sums { int width; bool fused; };  // floats of a register

static float to_float(ggml_type type, const char * from) {
    uint16_t bits;
    memcpy(&bits, from, sizeof(bits));
    return type == GGML_TYPE_BF16 ? ggml_bf16_to_fp32({bits}) : ggml_fp16_to_fp32(bits);
}

// Floats of a register to one, halves upon halves; or, pairwise, the last four by neighbours.
static float added(std::vector<float> v, bool pairwise) {
    for (size_t n = v.size() / 2; n > (pairwise ? 2 : 0); n /= 2) {
        for (size_t i = 0; i < n; i++) v[i] = v[i] + v[i + n];
    }
    return pairwise ? (v[0] + v[1]) + (v[2] + v[3]) : v[0];
}

static float in_plain_words(const Data & d, Sums as, const char * x, const char * y) {
    const bool bf16 = d.type == GGML_TYPE_BF16;
    const size_t width = static_cast<size_t>(as.width), n_parts = bf16 && width == 16 ? 2 : 4;
    std::vector<std::vector<float>> part(n_parts, std::vector<float>(width));
    for (size_t i = 0; i < static_cast<size_t>(d.n_blocks * BLOCK); i++) {
        float & sum = part[i / width % n_parts][i % width];
        const float a = to_float(d.type, x + 2 * i), b = to_float(d.type, y + 2 * i), product = a * b;
        sum = as.fused ? std::fma(a, b, sum) : product + sum;
    }
    if (n_parts == 2) return static_cast<float>(0.0 + static_cast<double>(added(part[0], false)) + static_cast<double>(added(part[1], false)));
    for (size_t i = 0; i < width; i++) part[0][i] = (part[0][i] + part[2][i]) + (part[1][i] + part[3][i]);
    const float sum = added(part[0], !bf16 && width == 8);
    return bf16 ? static_cast<float>(0.0 + static_cast<double>(sum)) : sum;
}

static Products in_plain_words(const Data & d, Sums as, int first, int n) {
    Products products(static_cast<size_t>(n), std::vector<float>(static_cast<size_t>(d.n_weight_rows)));
    for (int r = 0; r < n; r++) {
        for (int64_t w = 0; w < d.n_weight_rows; w++) {
            products[static_cast<size_t>(r)][static_cast<size_t>(w)] =
                in_plain_words(d, as, d.weights.data() + w * d.weight_row(), d.rows.data() + (first + r) * d.row());
        }
    }
    return products;
}

// as: null to compare with ggml.
static void compare(const FewRowsSet & set, RowOrder order, const Data & d, Kind kind, int first, int n, const Sums * as) {
    const Products want = as ? in_plain_words(d, *as, first, n)
                             : order == RowOrder::VEC_DOT ? by_vec_dot(d, first, n) : by_matrix(d, first, n);
    const auto n_out = static_cast<size_t>(d.n_weight_rows);
    Products got(static_cast<size_t>(n), std::vector<float>(n_out + 2 * MARGIN, -1.5f));
    Operand operands[N_ROWS];
    for (int r = 0; r < n; r++) operands[r] = {d.rows.data() + (first + r) * d.row(), got[static_cast<size_t>(r)].data() + MARGIN};
    const int64_t n_blocks = d.n_blocks * BLOCK / ggml_blck_size(d.type);
    set.kernel(d.type, order)({n_blocks, d.weights.data(), d.weight_row(), d.n_weight_rows, operands, n});
    for (int r = 0; r < n; r++) {
        const auto & row = got[static_cast<size_t>(r)];
        for (size_t i = 0; i < row.size(); i++) {
            const bool inside = i >= MARGIN && i < MARGIN + n_out;
            const float right = inside ? want[static_cast<size_t>(r)][i - MARGIN] : -1.5f;
            CHECK(same(row[i], right), "%s %s order %d kind %d, %lld blocks, row %d of %d, weight row %lld: %a, not %a", set.name,
                  ggml_type_name(d.type), static_cast<int>(order), kind, static_cast<long long>(d.n_blocks), r, n,
                  static_cast<long long>(i) - MARGIN, static_cast<double>(row[i]), static_cast<double>(right));
        }
    }
}

static int64_t compare_all(const FewRowsSet & set, RowOrder order, const Data & d, Kind kind, const Sums * as) {
    int64_t n_compared = 0;
    const bool few = order == RowOrder::VEC_DOT;
    for (int n = few ? 1 : FEW_ROWS + 1; n <= (few ? FEW_ROWS : MOST_FEW_ROWS); n++) {
        for (int first : {0, (few ? FEW_ROWS : MOST_FEW_ROWS) - n}) {
            compare(set, order, d, kind, first, n, as);
            n_compared += n * d.n_weight_rows;
        }
    }
    return n_compared;
}

// Kernels that are nearly right: one adds the blocks from the last to the first, one takes 1 row only for right.
static void backwards(const FewRowsTask & t) {
    const int64_t row_bytes = static_cast<int64_t>(ggml_row_size(GGML_TYPE_Q8_K, BLOCK));
    const auto weight_bytes = static_cast<int64_t>(ggml_type_size(GGML_TYPE_Q4_K));
    for (int r = 0; r < t.n_rows; r++) {
        for (int64_t w = 0; w < t.n_weight_rows; w++) {
            float sum = 0;
            for (int64_t b = t.n_blocks - 1; b >= 0; b--) {
                float one;
                ggml_get_type_traits_cpu(GGML_TYPE_Q4_K)->vec_dot(BLOCK, &one, 0, t.weights + w * t.weight_row_bytes + b * weight_bytes, 0,
                                                                  t.operands[r].x + b * row_bytes, 0, 1);
                sum += one;
            }
            t.operands[r].out[w] = sum;
        }
    }
}

static void row_by_row(const FewRowsTask & t) {
    for (int r = 0; r < t.n_rows; r++) {
        for (int64_t w = 0; w < t.n_weight_rows; w++) {
            ggml_get_type_traits_cpu(GGML_TYPE_Q4_K)->vec_dot(static_cast<int>(t.n_blocks * BLOCK), &t.operands[r].out[w], 0,
                                                              t.weights + w * t.weight_row_bytes, 0, t.operands[r].x, 0, 1);
        }
    }
}

static void wrong_from_the_second_row(const FewRowsTask & t) {
    row_by_row(t);
    if (t.n_rows > 1) t.operands[1].out[0] = std::nextafterf(t.operands[1].out[0], 1e30f);
}

static void the_trial_finds_a_kernel_that_adds_otherwise() {
    CHECK(few_rows_agrees(row_by_row, GGML_TYPE_Q4_K, RowOrder::VEC_DOT), "vec_dot itself");
    CHECK(!few_rows_agrees(backwards, GGML_TYPE_Q4_K, RowOrder::VEC_DOT), "blocks from the last to the first");
    CHECK(!few_rows_agrees(wrong_from_the_second_row, GGML_TYPE_Q4_K, RowOrder::VEC_DOT), "one bit of the second row");
}

static void every_choice_is_the_fastest_that_agrees() {
    FewRowsKernel few[GGML_TYPE_COUNT] = {}, more[GGML_TYPE_COUNT] = {};
    for (auto set = FEW_ROWS_SETS; *set; set++) {
        for (int t = 0; (*set)->usable() && t < GGML_TYPE_COUNT; t++) {
            const auto type = static_cast<ggml_type>(t);
            for (RowOrder order : {RowOrder::VEC_DOT, RowOrder::TILED, RowOrder::TILED_FUSED}) {
                FewRowsKernel & chosen = order == RowOrder::VEC_DOT ? few[t] : more[t];
                const FewRowsKernel kernel = (*set)->kernel(type, order);
                if (!chosen && kernel && few_rows_agrees(kernel, type, order)) chosen = kernel;
            }
        }
    }
    for (int t = 0; t < GGML_TYPE_COUNT; t++) {
        const auto type = static_cast<ggml_type>(t);
        for (int64_t n_cols : {BLOCK, FEW_ROWS_BLOCKS * BLOCK, (FEW_ROWS_BLOCKS + 1) * BLOCK}) {
            for (int n = 1; n <= MOST_FEW_ROWS + 1; n++) {
                if (has_one_product(type)) {  // any number of rows and any width of whole steps
                    const bool is_wide = n_cols > FEW_ROWS_BLOCKS * BLOCK;
                    const FewRowsKernel want = n == 1 || is_wide ? nullptr : n <= FEW_ROWS ? few[t] : more[t];
                    CHECK(few_rows_kernel(type, n_cols, n) == want && few_rows_kernel(type, n_cols - FEW_ROWS_STEP, n) == want &&
                              few_rows_kernel(type, n_cols, 100 * n) == (is_wide ? nullptr : more[t]) &&
                              !few_rows_kernel(type, n_cols - 32, n),
                          "%s, %lld columns, %d rows", ggml_type_name(type), static_cast<long long>(n_cols), n);
                    continue;
                }
                // Of Q4_K, 32 rows and 42 to 48 are nearly whole sixteens, which ggml has faster.
                const bool ggml_is_faster = n == 1 || n > 48 || (type == GGML_TYPE_Q4_K && (n == 32 || n > 41));
                const bool none = ggml_is_faster || n_cols > FEW_ROWS_BLOCKS * BLOCK;
                const FewRowsKernel want = none ? nullptr : n <= FEW_ROWS ? few[t] : more[t];
                CHECK(few_rows_kernel(type, n_cols, n) == want, "%s, %lld columns, %d rows", ggml_type_name(type),
                      static_cast<long long>(n_cols), n);
            }
        }
    }
}

static int64_t compare_kinds(const FewRowsSet & set, RowOrder order, ggml_type type, const Sums * as, Random & random) {
    int64_t n_compared = 0;
    for (int kind = 0; kind < N_KINDS; kind++) {
        for (int64_t n_blocks : as ? std::vector<int64_t>{1, 3} : std::vector<int64_t>{1, 2, 3, 8, 11}) {
            const Data d = make(type, n_blocks, pick(random, 1, as ? 7 : 20), static_cast<Kind>(kind), random);
            n_compared += compare_all(set, order, d, static_cast<Kind>(kind), as);
        }
        if (as) continue;  // plain words take their time
        const Data widest = make(type, FEW_ROWS_BLOCKS, 1, static_cast<Kind>(kind), random);
        n_compared += compare_all(set, order, widest, static_cast<Kind>(kind), as);
    }
    return n_compared;
}

// Of a set whose kernels for BF16 and F16 are not what this ggml does: how they add. False for the instruction for BF16.
static bool sums_of(const FewRowsSet & set, Sums & sums) {
    if (!strstr(set.name, "floats")) return false;
    sums = {strstr(set.name, "AVX2") ? 8 : 16, !strstr(set.name, "two roundings")};
    return true;
}

static int64_t check_type(const FewRowsSet & set, ggml_type type, Random & random) {
    int64_t n_compared = 0;
    const FewRowsKernel fused = set.kernel(type, RowOrder::TILED_FUSED);
    const bool is_fused = fused && few_rows_agrees(fused, type, RowOrder::TILED_FUSED);
    for (RowOrder order : {RowOrder::VEC_DOT, is_fused ? RowOrder::TILED_FUSED : RowOrder::TILED}) {
        const FewRowsKernel kernel = set.kernel(type, order);
        if (!kernel) continue;
        const bool agrees = few_rows_agrees(kernel, type, order);
        Sums sums{};
        CHECK(agrees || is_float(type), "%s %s", set.name, ggml_type_name(type));
        if (agrees || sums_of(set, sums)) n_compared += compare_kinds(set, order, type, agrees ? nullptr : &sums, random);
        printf(" %s%s%s", agrees ? "" : "~", ggml_type_name(type), order == RowOrder::VEC_DOT ? "" : "+");
    }
    return n_compared;
}

int main() {
    ggml_cpu_init();
    the_trial_finds_a_kernel_that_adds_otherwise();
    every_choice_is_the_fastest_that_agrees();
    Random random(7);
    int64_t n_compared = 0;
    for (auto set = FEW_ROWS_SETS; *set; set++) {
        if (!(*set)->usable()) continue;
        printf("%s:", (*set)->name);
        for (int t = 0; t < GGML_TYPE_COUNT; t++) n_compared += check_type(**set, static_cast<ggml_type>(t), random);
        printf("\n");
    }
    printf("used:");
    for (int t = 0; t < GGML_TYPE_COUNT; t++) {
        const auto type = static_cast<ggml_type>(t);
        if (few_rows_kernel(type, BLOCK, 2)) printf(" %s", ggml_type_name(type));
        if (few_rows_kernel(type, BLOCK, 9)) printf(" %s+", ggml_type_name(type));
    }
    printf("\n%lld products\n", static_cast<long long>(n_compared));
}
