// What the quantizers of quantize.h share, for registers of LANES floats. Included by quantize_avx2.cpp and
// quantize_avx512.cpp, which define LANES, INLINE, TARGET, VF (floats), VI (int32), Mask and what has no operator.
#include <cfloat>
#include <cmath>
#include <cstring>

#include "ggml.h"
#include "quantize.h"

namespace moe_edge {

namespace {

// ggml's rounding, ties to even: the lower bits of a float of this size are the integer.
INLINE VI nearest(VF v) {
    const VI bits = as_ints(v + spread(12582912.f));
    return (bits & spread_int(0x007fffff)) - spread_int(0x00400000);
}
INLINE int nearest_int(float v) {
    v += 12582912.f;
    int bits;
    memcpy(&bits, &v, sizeof(bits));
    return (bits & 0x007fffff) - 0x00400000;
}
INLINE VI between(VI v, int low, int high) {
    v = v < spread_int(low) ? spread_int(low) : v;
    return v > spread_int(high) ? spread_int(high) : v;
}
INLINE int between(int v, int low, int high) { return v < low ? low : v > high ? high : v; }
INLINE void put_half(char * to, float v) {
    const ggml_fp16_t half = ggml_fp32_to_fp16(v);
    memcpy(to, &half, sizeof(half));
}

INLINE float sum_of_squares(const float * x) {
    float sum = 0;
    for (int i = 0; i < SUPER; i++) sum += x[i] * x[i];
    return sum;
}
// What an error of each number costs: importance * sqrt(sigma2 + x * x). sigma2 comes from the squares of the whole block.
INLINE void weigh(const float * x, const float * importance, float sigma2, int n, float * weight) {
    for (int i = 0; i < n; i += LANES) {
        const VF v = load(x + i);
        store(weight + i, load(importance + i) * root(spread(sigma2) + v * v));
    }
}

// The scale at which levels 0..most times it are nearest to x, and the levels: a search and some steps of descent.
INLINE float qp_start(int n, int most, const float * x, float max, const float * w, float * error) {
    const float inverse = static_cast<float>(most) / max, scale = 1 / inverse;
    *error = 0;
    for (int i = 0; i < n; i++) {
        const uint8_t level = static_cast<uint8_t>(nearest_int(inverse * x[i]));
        const float diff = x[i] - scale * level;
        *error += w[i] * diff * diff;
    }
    return inverse;
}

INLINE float qp_best_inverse(int n, int most, const float * x, float max, const float * w) {
    float least, inverses[LANES], errors[LANES];
    float best = qp_start(n, most, x, max, w, &least);
    static const float steps[8] = {-4, -3, -2, -1, 1, 2, 3, 4};
    for (int from = 0; from < 8; from += LANES) {
        for (int lane = 0; lane < LANES; lane++) inverses[lane] = (0.1f * steps[(from + lane) % 8] + most) / max;
        const VF inverse = load(inverses), scale = spread(1.f) / inverse;
        VF error = spread(0);
        for (int i = 0; i < n; i++) {
            VI level = nearest(inverse * spread(x[i]));
            level = level > spread_int(most) ? spread_int(most) : level;
            const VF diff = spread(x[i]) - scale * to_floats(level);
            error += spread(w[i]) * diff * diff;
        }
        store(errors, error);
        for (int lane = 0; lane < LANES && from + lane < 8; lane++) {
            if (errors[lane] < least) {
                least = errors[lane];
                best = inverses[lane];
            }
        }
    }
    return best;
}

TARGET static float qp_quants(int n, int most, const float * x, uint8_t * levels, const float * w) {
    float max = 0;
    for (int i = 0; i < n; i++) max = max > x[i] ? max : x[i];
    if (max < 1e-15f) {
        memset(levels, 0, n);
        return 0;
    }
    const float inverse = qp_best_inverse(n, most, x, max, w);
    float sum_lx = 0, sum_l2 = 0;
    for (int i = 0; i < n; i++) {
        int level = nearest_int(inverse * x[i]);
        if (level > most) level = most;
        levels[i] = static_cast<uint8_t>(level);
        sum_lx += w[i] * x[i] * level;
        sum_l2 += w[i] * level * level;
    }
    for (int turn = 0; turn < 5; turn++) {
        bool changed = false;
        for (int i = 0; i < n; i++) {
            float lx = sum_lx - w[i] * x[i] * levels[i];
            float l2 = sum_l2 - w[i] * levels[i] * levels[i];
            if (!(lx > 0 && l2 > 0)) continue;
            int level = nearest_int(x[i] * l2 / lx);
            if (level > most) level = most;
            if (level == levels[i]) continue;
            lx += w[i] * x[i] * level;
            l2 += w[i] * level * level;
            if (lx * lx * sum_l2 > sum_lx * sum_lx * l2) {
                levels[i] = static_cast<uint8_t>(level);
                sum_lx = lx;
                sum_l2 = l2;
                changed = true;
            }
        }
        if (!changed) break;
    }
    return sum_l2 > 0 ? sum_lx / sum_l2 : 0;
}

}  // namespace

}  // namespace moe_edge
