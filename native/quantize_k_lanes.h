// Q2_K, Q3_K and Q4_K, for registers of LANES floats (quantize_lanes.h): the lanes are groups of weights, each with a scale and a
// minimum of its own, since what one candidate finds decides what the next one is.
namespace moe_edge {

namespace {

constexpr int N_STEPS = 36;

// Scale, minimum and levels of N weights, in every lane for one group of them.
template <int N>
struct Lanes {
    VF x[N], w[N];
    VI level[N];
    VF scale, min, sum_w;
};

template <int N>
TARGET static void scale_and_min(Lanes<N> & g, int most) {
    VF min = g.x[0], max = g.x[0], sum_w = g.w[0], sum_x = g.w[0] * g.x[0];
    for (int i = 1; i < N; i++) {
        min = g.x[i] < min ? g.x[i] : min;
        max = g.x[i] > max ? g.x[i] : max;
        sum_w += g.w[i];
        sum_x += g.w[i] * g.x[i];
    }
    min = min > spread(0) ? spread(0) : min;
    const VI is_flat = max <= min;
    const VF flat_min = min;
    VF inverse = spread(static_cast<float>(most)) / (max - min), best = spread(0);
    g.scale = spread(1) / inverse;
    for (int i = 0; i < N; i++) {
        g.level[i] = between(nearest(inverse * (g.x[i] - min)), 0, most);
        const VF diff = g.scale * to_floats(g.level[i]) + min - g.x[i];
        best += g.w[i] * (diff * diff);
    }
    for (int step = 0; step <= N_STEPS; step++) {
        VF level[N], sum_l = spread(0), sum_l2 = spread(0), sum_xl = spread(0);
        inverse = spread(-0.9f + 0.05f * step + most) / (max - min);
        for (int i = 0; i < N; i++) {
            level[i] = to_floats(between(nearest(inverse * (g.x[i] - min)), 0, most));
            const VF wl = g.w[i] * level[i];
            sum_l += wl;
            sum_l2 += wl * level[i];
            sum_xl += wl * g.x[i];
        }
        const VF d = sum_w * sum_l2 - sum_l * sum_l;
        VF scale = (sum_w * sum_xl - sum_x * sum_l) / d, low = (sum_l2 * sum_x - sum_l * sum_xl) / d, error = spread(0);
        const VI is_above = low > spread(0);
        low = is_above ? spread(0) : low;
        scale = is_above ? sum_xl / sum_l2 : scale;
        for (int i = 0; i < N; i++) {
            const VF diff = scale * level[i] + low - g.x[i];
            error += g.w[i] * (diff * diff);
        }
        const VI is_better = (d > spread(0)) & (error < best);
        for (int i = 0; i < N; i++) g.level[i] = is_better ? to_ints(level[i]) : g.level[i];
        best = is_better ? error : best;
        g.scale = is_better ? scale : g.scale;
        min = is_better ? low : min;
    }
    for (int i = 0; i < N; i++) g.level[i] = is_flat ? spread_int(0) : g.level[i];
    g.scale = is_flat ? spread(0) : g.scale;
    g.min = -(is_flat ? flat_min : min);
    g.sum_w = sum_w;
}

// The same for each group of N of n weights: scales, what to take off, sums of weights, and the levels of all.
template <int N>
TARGET static void scales_and_mins(
    const float * x, const float * weight, int n, int most, float * scales, float * mins, float * sums, uint8_t * levels) {
    Lanes<N> g;
    const int groups = n / N;
    for (int from = 0; from < groups; from += LANES) {
        for (int i = 0; i < N; i++) {
            float xs[LANES], ws[LANES];
            for (int lane = 0; lane < LANES; lane++) {
                const int at = N * (from + lane < groups ? from + lane : from) + i;
                xs[lane] = x[at];
                ws[lane] = weight[at];
            }
            g.x[i] = load(xs);
            g.w[i] = load(ws);
        }
        scale_and_min<N>(g, most);
        for (int lane = 0; lane < LANES && from + lane < groups; lane++) {
            scales[from + lane] = reinterpret_cast<const float *>(&g.scale)[lane];
            mins[from + lane] = reinterpret_cast<const float *>(&g.min)[lane];
            sums[from + lane] = reinterpret_cast<const float *>(&g.sum_w)[lane];
            for (int i = 0; i < N; i++) {
                levels[N * (from + lane) + i] = static_cast<uint8_t>(reinterpret_cast<const int32_t *>(&g.level[i])[lane]);
            }
        }
    }
}

// Levels anew, for the scale and minimum as they are stored.
INLINE void round_to(const float * x, int n, float d, float min, int most, uint8_t * levels) {
    if (d == 0) return;
    int found[LANES];
    for (int i = 0; i < n; i += LANES) {
        store_ints(found, between(nearest((load(x + i) + spread(min)) / spread(d)), 0, most));
        for (int lane = 0; lane < LANES; lane++) levels[i + lane] = static_cast<uint8_t>(found[lane]);
    }
}

INLINE float stored_half(const char * at) {
    ggml_fp16_t half;
    memcpy(&half, at, sizeof(half));
    return ggml_fp16_to_fp32(half);
}

// Two bits of each of 256 levels: four to a byte, of every half of 128 those that are 32 apart.
INLINE void put_two_bits(const uint8_t * levels, char * out) {
    for (int j = 0; j < SUPER; j += 128) {
        for (int i = 0; i < 32; i++) {
            const uint8_t * l = levels + j + i;
            out[j / 4 + i] = static_cast<char>(l[0] | l[32] << 2 | l[64] << 4 | l[96] << 6);
        }
    }
}

constexpr int Q2_K_BYTES = 84, Q2_K_D = 80, Q4_K_BYTES = 144;

TARGET static void q2_k_block(const float * x, const float * importance, char * out) {
    float weight[SUPER], scales[16], mins[16], sums[16];
    uint8_t levels[SUPER], scale_levels[16], min_levels[16];
    weigh(x, importance, sum_of_squares(x) / SUPER, SUPER, weight);
    scales_and_mins<16>(x, weight, SUPER, 3, scales, mins, sums, levels);
    put_half(out + Q2_K_D, qp_quants(16, 15, scales, scale_levels, sums));
    put_half(out + Q2_K_D + 2, qp_quants(16, 15, mins, min_levels, sums));
    const float d = stored_half(out + Q2_K_D), min = stored_half(out + Q2_K_D + 2);
    for (int j = 0; j < 16; j++) {
        const uint8_t both = static_cast<uint8_t>(scale_levels[j] | min_levels[j] << 4);
        out[j] = static_cast<char>(both);
        round_to(x + 16 * j, 16, d * (both & 15), min * (both >> 4), 3, levels + 16 * j);
    }
    put_two_bits(levels, out + 16);
}

TARGET static void q2_k(const QuantizeTask & t) {
    for (int64_t b = 0; b < t.n_rows * t.n_blocks; b++) {
        q2_k_block(t.x + SUPER * b, t.importance + SUPER * (b % t.n_blocks), t.out + Q2_K_BYTES * b);
    }
}

// Eight scales and eight minimums of six bits in twelve bytes: four of each whole, the others in two parts.
INLINE void pack_six(const uint8_t * scales, const uint8_t * mins, uint8_t * out) {
    for (int j = 0; j < 4; j++) {
        out[j] = static_cast<uint8_t>(scales[j] | scales[j + 4] >> 4 << 6);
        out[j + 4] = static_cast<uint8_t>(mins[j] | mins[j + 4] >> 4 << 6);
        out[j + 8] = static_cast<uint8_t>((scales[j + 4] & 15) | (mins[j + 4] & 15) << 4);
    }
}

// The same back. A level that was negative has spoilt bits of another, and what is read is what counts.
INLINE void unpack_six(const uint8_t * from, uint8_t * scales, uint8_t * mins) {
    for (int j = 0; j < 4; j++) {
        scales[j] = from[j] & 63;
        mins[j] = from[j + 4] & 63;
        scales[j + 4] = static_cast<uint8_t>((from[j + 8] & 15) | from[j] >> 6 << 4);
        mins[j + 4] = static_cast<uint8_t>(from[j + 8] >> 4 | from[j + 4] >> 6 << 4);
    }
}

// Two blocks, so that sixteen lanes have work; n: how many there are.
TARGET static void q4_k_blocks(const float * x, const float * const importance[2], int n, char * out) {
    float weight[2 * SUPER], scales[16], mins[16], sums[16];
    uint8_t all[2 * SUPER], scale_levels[8], min_levels[8];
    for (int b = 0; b < n; b++) {
        weigh(x + SUPER * b, importance[b], 2 * sum_of_squares(x + SUPER * b) / SUPER, SUPER, weight + SUPER * b);
    }
    scales_and_mins<32>(x, weight, n * SUPER, 15, scales, mins, sums, all);
    for (int b = 0; b < n; b++, out += Q4_K_BYTES, x += SUPER) {
        uint8_t * levels = all + SUPER * b;
        put_half(out, qp_quants(8, 63, scales + 8 * b, scale_levels, sums + 8 * b));
        put_half(out + 2, qp_quants(8, 63, mins + 8 * b, min_levels, sums + 8 * b));
        pack_six(scale_levels, min_levels, reinterpret_cast<uint8_t *>(out + 4));
        unpack_six(reinterpret_cast<const uint8_t *>(out + 4), scale_levels, min_levels);
        const float d = stored_half(out), min = stored_half(out + 2);
        for (int j = 0; j < 8; j++) round_to(x + 32 * j, 32, d * scale_levels[j], min * min_levels[j], 15, levels + 32 * j);
        for (int j = 0; j < SUPER; j += 64) {
            for (int i = 0; i < 32; i++) out[16 + j / 2 + i] = static_cast<char>(levels[j + i] | levels[j + i + 32] << 4);
        }
    }
}

TARGET static void q4_k(const QuantizeTask & t) {
    const int64_t n = t.n_rows * t.n_blocks;
    for (int64_t b = 0; b < n; b += 2) {
        const float * importance[2] = {t.importance + SUPER * (b % t.n_blocks), t.importance + SUPER * ((b + 1) % t.n_blocks)};
        q4_k_blocks(t.x + SUPER * b, importance, n - b < 2 ? 1 : 2, t.out + Q4_K_BYTES * b);
    }
}

// ---- Q3_K: a scale alone, levels of both signs

constexpr int Q3_K_BYTES = 110, Q3_K_QUANTS = 32, Q3_K_SCALES = 96, Q3_K_D = 108;

// Scale and levels, from 0 with `most` for nothing, of N weights in every lane.
template <int N>
TARGET static VF scale_alone(const VF * x, const VF * w, int most, VI * level) {
    VF largest_size = spread(0), most_far = spread(0), sum_lx = spread(0), sum_l2 = spread(0);
    for (int i = 0; i < N; i++) {
        const VF size = x[i] < spread(0) ? -x[i] : x[i];
        const VI is_more = size > largest_size;
        largest_size = is_more ? size : largest_size;
        most_far = is_more ? x[i] : most_far;
    }
    VF scale = spread(0), best = spread(0);
    for (int turn = 0; turn < 19; turn++) {  // no step first, then -9 to 9
        const int step = turn == 0 ? 0 : turn <= 9 ? turn - 10 : turn - 9;
        const VF inverse = spread(-(most + 0.1f * step)) / most_far;
        VI tried[N];
        sum_lx = sum_l2 = spread(0);
        for (int i = 0; i < N; i++) {
            tried[i] = between(nearest(inverse * x[i]), -most, most - 1);
            const VF l = to_floats(tried[i]);
            sum_lx += w[i] * x[i] * l;
            sum_l2 += w[i] * l * l;
        }
        const VI is_better = turn == 0 ? largest_size >= spread(0) : (sum_l2 > spread(0)) & (sum_lx * sum_lx > best * sum_l2);
        const VF found = turn == 0 ? (sum_l2 != spread(0) ? sum_lx / sum_l2 : spread(0)) : sum_lx / sum_l2;
        scale = is_better ? found : scale;
        best = is_better ? found * sum_lx : best;
        for (int i = 0; i < N; i++) level[i] = is_better ? tried[i] + spread_int(most) : level[i];
    }
    const VI is_flat = largest_size < spread(1e-15f);
    for (int i = 0; i < N; i++) level[i] = is_flat ? spread_int(0) : level[i];
    return is_flat ? spread(0) : scale;
}

// Sixteen groups of sixteen: scales, sums of weights, levels.
TARGET static void scales_alone(const float * x, const float * weight, float * scales, float * sums, uint8_t * levels) {
    for (int from = 0; from < 16; from += LANES) {
        VF v[16], w[16];
        VI level[16] = {};
        VF sum = spread(0);
        for (int i = 0; i < 16; i++) {
            float xs[LANES], ws[LANES];
            for (int lane = 0; lane < LANES; lane++) {
                xs[lane] = x[16 * (from + lane) + i];
                ws[lane] = weight[16 * (from + lane) + i];
            }
            v[i] = load(xs);
            w[i] = load(ws);
            sum += w[i];
        }
        store(scales + from, scale_alone<16>(v, w, 4, level));
        store(sums + from, sum);
        for (int i = 0; i < 16; i++) {
            int found[LANES];
            store_ints(found, level[i]);
            for (int lane = 0; lane < LANES; lane++) levels[16 * (from + lane) + i] = static_cast<uint8_t>(found[lane]);
        }
    }
}

// The scales' own scale, in the first lane, and their levels of six bits.
INLINE float scale_of_scales(const float * scales, const float * sums, uint8_t * levels) {
    VF v[16], w[16];
    VI level[16] = {};
    for (int i = 0; i < 16; i++) {
        v[i] = spread(scales[i]);
        w[i] = spread(sums[i]);
    }
    const VF scale = scale_alone<16>(v, w, 32, level);
    for (int i = 0; i < 16; i++) levels[i] = static_cast<uint8_t>(reinterpret_cast<const int32_t *>(&level[i])[0]);
    return reinterpret_cast<const float *>(&scale)[0];
}

TARGET static void q3_k_block(const float * x, const float * importance, char * out) {
    float weight[SUPER], scales[16], sums[16];
    uint8_t levels[SUPER], scale_levels[16];
    weigh(x, importance, 2 * sum_of_squares(x) / SUPER, SUPER, weight);
    scales_alone(x, weight, scales, sums, levels);
    memset(out, 0, Q3_K_BYTES);
    put_half(out + Q3_K_D, scale_of_scales(scales, sums, scale_levels));
    const float d = stored_half(out + Q3_K_D);
    int found[LANES];
    for (int j = 0; j < 16; j++) {
        out[Q3_K_SCALES + j % 8] |= static_cast<char>((scale_levels[j] & 15) << (j < 8 ? 0 : 4));
        out[Q3_K_SCALES + 8 + j % 4] |= static_cast<char>(scale_levels[j] >> 4 << (2 * (j / 4)));
        const float mine = d * (scale_levels[j] - 32);
        if (mine == 0) continue;
        for (int i = 16 * j; i < 16 * (j + 1); i += LANES) {
            store_ints(found, between(nearest(load(x + i) / spread(mine)), -4, 3));
            for (int lane = 0; lane < LANES; lane++) levels[i + lane] = static_cast<uint8_t>(found[lane] + 4);
        }
    }
    for (int j = 0; j < SUPER; j++) {
        if (levels[j] <= 3) continue;
        out[j % 32] |= static_cast<char>(1 << (j / 32));
        levels[j] = static_cast<uint8_t>(levels[j] - 4);
    }
    put_two_bits(levels, out + Q3_K_QUANTS);
}

TARGET static void q3_k(const QuantizeTask & t) {
    for (int64_t b = 0; b < t.n_rows * t.n_blocks; b++) {
        q3_k_block(t.x + SUPER * b, t.importance + SUPER * (b % t.n_blocks), t.out + Q3_K_BYTES * b);
    }
}

}  // namespace

}  // namespace moe_edge
