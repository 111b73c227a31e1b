// The quantizers of native/quantize.h against ggml's own, byte by byte: every type, both widths of a register where this
// processor has them, ordinary rows and those that tie, vanish, jump or lie on the grid. Prints what it compared.
#include <cmath>
#include <cstring>
#include <vector>

#include "../../native/quantize.h"
#include "ggml.h"
#include "stress.h"

extern "C" int64_t meq_quantize(int32_t type, const float * x, const float * importance, char * out, int64_t n_rows,
                                int64_t n_cols, int32_t lanes);

using namespace moe_edge;

constexpr int64_t MARGIN = 7;  // bytes on both sides of what is written, which must stay as they are
constexpr int N_KINDS = 12, N_IMPORTANCES = 6;

static float value(int kind, int64_t at, Random & random) {
    std::normal_distribution<float> normal;
    const float v = normal(random);
    switch (kind) {
        case 0: return 0.02f * v;
        case 1: return v * v * v * v * v;                                        // far outliers
        case 2: return std::round(2 * v) / 4;                                    // ties
        case 3: return 0.5f;                                                     // nothing but ties
        case 4: return at % 3 ? 0.0f : v;                                        // mostly nothing
        case 5: return at / 32 % 2 ? 0.0f : at % 2 ? -0.0f : 1e-3f * v;          // groups of nothing
        case 6: return v * std::ldexp(1.0f, -static_cast<int>(pick(random, 20, 55)));  // around what counts as nothing
        case 7: return std::fabs(v);
        case 8: return -std::fabs(v);
        case 9: return at % 64 == 5 ? 6e4f : v;
        case 10: return static_cast<float>(2 * pick(random, 0, 7) + 1) * (pick(random, 0, 1) ? 1.0f : -1.0f);  // on a grid
        default: return at % 256 == 0 ? std::ldexp(v, static_cast<int>(pick(random, -10, 10))) : 1e-4f * v;
    }
}

static float importance(int kind, int64_t at, Random & random) {
    std::normal_distribution<float> normal;
    switch (kind) {
        case 0: return 1.0f;
        case 1: return 0.01f + std::fabs(normal(random));
        case 2: return std::exp(3 * normal(random)) + 1e-6f;
        case 3: return at % 17 ? 1e-6f : 100.0f;
        case 4: return at % 32 ? 1e-6f : 100.0f;  // the first of a group, which then decides alone
        default: return at % 16 ? 1e-7f : 1e4f;
    }
}

static int64_t compare(ggml_type type, int lanes, int kind, int of_columns, Random & random) {
    const int64_t n_rows = pick(random, 1, 3), n_cols = SUPER * pick(random, 1, 5);
    std::vector<float> x(static_cast<size_t>(n_rows * n_cols)), w(static_cast<size_t>(n_cols));
    for (size_t i = 0; i < x.size(); i++) x[i] = value(kind, static_cast<int64_t>(i), random);
    for (size_t i = 0; i < w.size(); i++) w[i] = importance(of_columns, static_cast<int64_t>(i), random);
    const size_t n = static_cast<size_t>(n_rows) * ggml_row_size(type, n_cols);
    std::vector<char> ours(n + 2 * MARGIN, 0x5a), theirs(n + 2 * MARGIN, 0x5a);
    const int64_t written = meq_quantize(type, x.data(), w.data(), ours.data() + MARGIN, n_rows, n_cols, lanes);
    if (written == 0) return 0;
    CHECK(written == static_cast<int64_t>(n), "%s: %lld bytes", ggml_type_name(type), static_cast<long long>(written));
    ggml_quantize_chunk(type, x.data(), theirs.data() + MARGIN, 0, n_rows, n_cols, w.data());
    for (size_t i = 0; i < ours.size(); i++) {
        CHECK(ours[i] == theirs[i], "%s, %d lanes, values %d, importance %d: byte %zu of block %zu", ggml_type_name(type), lanes,
              kind, of_columns, (i - MARGIN) % ggml_type_size(type), (i - MARGIN) / ggml_type_size(type));
    }
    return n_rows * n_cols;
}

int main() {
    const std::vector<ggml_type> types = {GGML_TYPE_IQ2_XXS, GGML_TYPE_IQ3_XXS, GGML_TYPE_Q2_K, GGML_TYPE_Q3_K, GGML_TYPE_Q4_K};
    for (const ggml_type type : types) ggml_quantize_init(type);
    std::vector<std::thread> both;  // the tables are made once, whoever comes first
    for (int i = 0; i < 2; i++) {
        both.emplace_back([&, i] {
            Random random(static_cast<unsigned>(i));
            for (const ggml_type type : types) compare(type, 16, 0, 1, random);
        });
    }
    for (std::thread & each : both) each.join();
    int64_t total = 0;
    for (const int lanes : {8, 16}) {
        for (const ggml_type type : types) {
            Random random(static_cast<unsigned>(1000 * lanes + type));
            int64_t n = 0;
            for (int turn = 0; turn < N_KINDS * N_IMPORTANCES * 4; turn++) {
                n += compare(type, lanes, turn % N_KINDS, turn / N_KINDS % N_IMPORTANCES, random);
            }
            if (n) printf("%s, %d lanes: %lld\n", ggml_type_name(type), lanes, static_cast<long long>(n));
            total += n;
        }
    }
    std::vector<char> none(4096);
    std::vector<float> x(SUPER, 1.0f);
    CHECK(meq_quantize(GGML_TYPE_Q6_K, x.data(), x.data(), none.data(), 1, SUPER, 16) == 0, "a type that it does not have");
    CHECK(meq_quantize(GGML_TYPE_Q2_K, x.data(), x.data(), none.data(), 1, SUPER - 1, 16) == 0, "rows that are no blocks");
    CHECK(meq_quantize(GGML_TYPE_Q2_K, x.data(), x.data(), none.data(), 1, SUPER, 4) == 0, "narrower than any");
    printf("%lld weights\n", static_cast<long long>(total));
    return 0;
}
