// IQ2_XXS and IQ3_XXS, for registers of LANES floats (quantize_lanes.h): 32 weights have a scale, and each 8 or 4 of them are
// a point of the grid. The lanes are candidates for the scale.
namespace moe_edge {

namespace {

constexpr int GROUP = 32;  // weights of a scale

struct Group {
    float x[GROUP];       // their sizes; one of eight may be negative, so that the signs are even in number
    float weight[GROUP];  // of a squared error
    float root[GROUP];    // its square root, which weighs the distance to points
    uint8_t signs[4];     // of eight each, without the last
};

INLINE void take_signs(const float * from, Group & g) {
    for (int k = 0; k < 4; k++) {
        const float * v = from + 8 * k;
        const float * w = g.weight + 8 * k;
        float * x = g.x + 8 * k;
        int flips = 0, signs = 0;
        for (int i = 0; i < 8; i++) {
            const bool negative = !(v[i] >= 0);
            x[i] = negative ? -v[i] : v[i];
            flips += negative;
            signs |= negative << i;
        }
        if (flips % 2) {
            int least = 0;
            float smallest = w[0] * v[0] * v[0];
            for (int i = 1; i < 8; i++) {
                const float each = w[i] * v[i] * v[i];
                if (each < smallest) {
                    smallest = each;
                    least = i;
                }
            }
            x[least] = -x[least];
            signs ^= 1 << least;
        }
        g.signs[k] = static_cast<uint8_t>(signs & 127);
    }
}

// The place, chunk by chunk, of the least number, which lane l found in chunk at[l]: the first where some are equal.
INLINE int first_of_least(VF best, VI at, int n_chunks) {
    unsigned equal = least_lanes(best);
    if (n_chunks == 1) return __builtin_ctz(equal);
    int chunks[LANES], first = INT32_MAX;
    store_ints(chunks, at);
    for (; equal; equal &= equal - 1) {
        const int lane = __builtin_ctz(equal), place = chunks[lane] * LANES + lane;
        if (place < first) first = place;
    }
    return first;
}

// The point nearest to x / scale of those near an address that has none: ggml's sums, a lane for each point.
template <int D>
INLINE int nearest_point(const Grid & grid, int address, const float * x, const float * w, float scale) {
    const Grid::Place & place = grid.places[address];
    const int n = (place.n_near + LANES - 1) / LANES;
    const uint8_t * values = grid.near.data() + static_cast<int64_t>(place.first) * D;
    VF best = spread(FLT_MAX);
    VI at = spread_int(0);
    for (int c = 0; c < n; c++) {
        VF distance = spread(0);
        for (int i = 0; i < D; i++, values += LANES) {
            const VF diff = spread(scale) * bytes(values) - spread(x[i]);
            distance += spread(w[i]) * diff * diff;
        }
        const Mask is_nearer = less(distance, best);
        best = pick(is_nearer, distance, best);
        at = pick_int(is_nearer, spread_int(c), at);
    }
    return grid.near_points[place.first + first_of_least(best, at, n)];
}

// The points nearest to x / scale for many scales, a lane each, where all have one address. low, high: the numbers of each
// lane's point, a byte each, the first four and the others. A point has the sums a of w * q * q and b of 2 * w * q * x. Its
// distance is scale * (scale * a - b), and a part that is the same for all points. That rounds otherwise than ggml's sum does.
// unsure: lanes where the two nearest points differ by no more than the doubt.
template <int D>
struct Nearest {
    VI low, high;
    unsigned unsure;
};

constexpr int MOST_NEAR = 256;  // points of the grid

// a and b of all points near a place.
template <int D>
INLINE void moments(const Grid & grid, const Grid::Place & place, const float * x, const float * w, float * a, float * b) {
    const uint8_t * values = grid.near.data() + static_cast<int64_t>(place.first) * D;
    for (int from = 0; from < place.n_near; from += LANES) {
        VF sum_a = spread(0), sum_b = spread(0);
        for (int i = 0; i < D; i++, values += LANES) {
            const VF q = bytes(values), wq = spread(w[i]) * q;
            sum_a = fused(wq, q, sum_a);
            sum_b = fused(wq, spread(2 * x[i]), sum_b);
        }
        store(a + from, sum_a);
        store(b + from, sum_b);
    }
}

template <int D>
INLINE Nearest<D> nearest_points(const Grid & grid, const Grid::Place & place, const float * x, const float * w, VF doubt, VF scale) {
    float a[MOST_NEAR], b[MOST_NEAR];
    moments<D>(grid, place, x, w, a, b);
    const uint8_t * near = grid.near_points.data() + place.first;
    VF best = spread(FLT_MAX), second = spread(FLT_MAX);
    Nearest<D> found;
    found.low = found.high = spread_int(0);
    for (int j = 0; j < place.n_near; j++) {
        const VF distance = scale * fused(scale, spread(a[j]), spread(-b[j]));
        const Mask is_nearer = less(distance, best);
        const uint64_t word = grid.words[near[j]];
        second = smaller(second, larger(distance, best));
        best = smaller(distance, best);
        found.low = pick_int(is_nearer, spread_int(static_cast<int>(word)), found.low);
        if (D > 4) found.high = pick_int(is_nearer, spread_int(static_cast<int>(word >> 32)), found.high);
    }
    found.unsure = ~bits_of(less(doubt, second - best));
    return found;
}

// What candidates for a group's scale make of it, a lane each: the odd numbers, and which parts were points as they were.
template <int D>
struct Tried {
    VF q[GROUP];
    uint32_t on_grid[LANES];
};

template <int D>
INLINE void try_part(const Grid & grid, const float * x, const float * w, int k, VI address, VF scale, unsigned lanes, Tried<D> & t) {
    int addresses[LANES], low[LANES], high[LANES];
    float scales[LANES], sum_w = 0, sum_wxx = 0;
    store_ints(addresses, address);
    for (int i = 0; i < D; i++) {
        sum_w += w[i];
        sum_wxx += w[i] * x[i] * x[i];
    }
    // With u = 2^-24 and M = sum of w * (scale * q)^2 + w * x * x for the largest q: ggml's sum is within 25 u M of the exact
    // one (7 of the differences, 4 of the products, 14 of the additions), ours within 22 u M (9 of a and b, 2 behind them, of
    // parts that are at most 2 M). Two points and both sums make 94 u M. The doubt is 256 u M, and no less than FLT_MIN for
    // numbers so small that they round otherwise.
    const VF largest_q = spread(D == 8 ? 5 : 15) * scale;
    const VF doubt = fused(spread(128 * FLT_EPSILON), fused(largest_q * largest_q, spread(sum_w), spread(sum_wxx)), spread(FLT_MIN));
    VI all_low = spread_int(0), all_high = spread_int(0);
    while (lanes) {
        const int each = addresses[__builtin_ctz(lanes)];
        const Mask same = equal(address, spread_int(each));
        const unsigned here = bits_of(same) & lanes;
        lanes &= ~here;
        const Grid::Place & place = grid.places[each];
        if (place.n_near == 0) {
            const uint64_t word = grid.words[place.point];
            all_low = pick_int(same, spread_int(static_cast<int>(word)), all_low);
            all_high = pick_int(same, spread_int(static_cast<int>(word >> 32)), all_high);
            for (unsigned left = here; left; left &= left - 1) t.on_grid[__builtin_ctz(left)] |= 1u << k;
            continue;
        }
        Nearest<D> found = nearest_points<D>(grid, place, x, w, doubt, scale);
        if (found.unsure & here) {
            store(scales, scale);
            store_ints(low, found.low);
            store_ints(high, found.high);
            for (unsigned left = found.unsure & here; left; left &= left - 1) {
                const int lane = __builtin_ctz(left);
                const uint64_t word = grid.words[nearest_point<D>(grid, each, x, w, scales[lane])];
                low[lane] = static_cast<int>(word);
                high[lane] = static_cast<int>(word >> 32);
            }
            found.low = load_ints(low);
            found.high = load_ints(high);
        }
        all_low = pick_int(same, found.low, all_low);
        all_high = pick_int(same, found.high, all_high);
    }
    for (int i = 0; i < D; i++) t.q[D * k + i] = to_floats(((i < 4 ? all_low : all_high) >> (8 * (i % 4))) & spread_int(255));
}

template <int D>
INLINE void try_scales(const Grid & grid, const Group & g, int most, VF inverse, int n_lanes, Tried<D> & t) {
    const VF scale = spread(1.f) / inverse;
    for (int lane = 0; lane < LANES; lane++) t.on_grid[lane] = 0;
    for (int k = 0; k < GROUP / D; k++) {
        VI address = spread_int(0);
        for (int i = 0; i < D; i++) {
            const VF v = inverse * spread(g.x[D * k + i]) - spread(1.f);
            address |= between(nearest(spread(0.5f) * v), 0, most) << (grid.bits * i);
        }
        try_part<D>(grid, g.x + D * k, g.root + D * k, k, address, scale, (1u << n_lanes) - 1, t);
    }
}

// The best of n candidates for a scale, `offsets` over `over` being their inverses. q: the numbers it makes, if any is better
// than none; returns which parts of it were points.
template <int D>
INLINE uint32_t best_scale(
    const Grid & grid, const Group & g, int most, const float * offsets, int n, float over, float & scale, float * q) {
    uint32_t on_grid = ~0u;
    float best = 0;
    float sums_qx[LANES], sums_q2[LANES];
    Tried<D> t;
    for (int from = 0; from < n; from += LANES) {
        const int n_lanes = n - from < LANES ? n - from : LANES;
        try_scales<D>(grid, g, most, load(offsets + from) / spread(over), n_lanes, t);
        VF sum_qx = spread(0), sum_q2 = spread(0);
        for (int i = 0; i < GROUP; i++) {
            const VF w = spread(g.weight[i]);
            sum_qx += w * spread(g.x[i]) * t.q[i];
            sum_q2 += w * t.q[i] * t.q[i];
        }
        store(sums_qx, sum_qx);
        store(sums_q2, sum_q2);
        int winner = -1;
        for (int lane = 0; lane < n_lanes; lane++) {
            const float qx = sums_qx[lane], q2 = sums_q2[lane];
            if (q2 > 0 && qx * qx > best * q2) {
                scale = qx / q2;
                best = scale * qx;
                winner = lane;
            }
        }
        if (winner < 0) continue;
        on_grid = t.on_grid[winner];
        for (int i = 0; i < GROUP; i++) q[i] = reinterpret_cast<const float *>(&t.q[i])[winner];
    }
    return on_grid;
}

// Once more at the scale that was found, for parts that are not in `kept`; then the scale that is best for what came out.
template <int D>
INLINE void refine(const Grid & grid, const Group & g, int most, uint32_t kept, float & scale, float * q) {
    const float inverse = 1 / scale;
    for (int k = 0; k < GROUP / D; k++) {
        if (kept >> k & 1) continue;
        const float * x = g.x + D * k;
        int address = 0;
        for (int i = 0; i < D; i++) {
            address |= between(nearest_int(0.5f * (inverse * x[i] - 1)), 0, most) << (grid.bits * i);
        }
        const Grid::Place & place = grid.places[address];
        const int p = place.n_near == 0 ? place.point : nearest_point<D>(grid, address, x, g.root + D * k, scale);
        for (int i = 0; i < D; i++) q[D * k + i] = static_cast<float>(grid.points[p * D + i]);
    }
    float sum_qx = 0, sum_q2 = 0;
    for (int i = 0; i < GROUP; i++) {
        sum_qx += g.weight[i] * g.x[i] * q[i];
        sum_q2 += g.weight[i] * q[i] * q[i];
    }
    if (sum_q2 > 0) scale = sum_qx / sum_q2;
}

// The points of a group's parts; a negative scale goes to the signs.
template <int D>
INLINE void finish_group(const Grid & grid, Group & g, float & scale, const float * q, uint8_t * points) {
    if (scale < 0) {
        scale = -scale;
        for (int k = 0; k < 4; k++) g.signs[k] = static_cast<uint8_t>(~g.signs[k] & 127);
    }
    for (int k = 0; k < GROUP / D; k++) {
        int address = 0;
        for (int i = 0; i < D; i++) address |= (static_cast<int>(q[D * k + i]) - 1) / 2 << (grid.bits * i);
        points[k] = static_cast<uint8_t>(grid.places[address].point);
    }
}

INLINE uint32_t packed_signs(const Group & g) {
    return g.signs[0] | g.signs[1] << 7 | g.signs[2] << 14 | static_cast<uint32_t>(g.signs[3]) << 21;
}
INLINE float largest(const float * x) {
    float max = x[0];
    for (int i = 1; i < GROUP; i++) max = max > x[i] ? max : x[i];
    return max;
}
INLINE void prepare_group(const float * x, const float * importance, float sigma2, Group & g) {
    weigh(x, importance, sigma2, GROUP, g.weight);
    for (int i = 0; i < GROUP; i += LANES) store(g.root + i, root(load(g.weight + i)));
    take_signs(x, g);
}
// The scales of a block's eight groups in four bits each, beside what is in their words; returns the scale of scales.
INLINE float put_scales(const float * scales, float max, uint32_t * words, int step) {
    const float d = max / 31, inverse = 1 / d;
    for (int ib = 0; ib < SUPER / GROUP; ib++) {
        const int level = between(nearest_int(0.5f * (inverse * scales[ib] - 1)), 0, 15);
        words[ib * step] |= static_cast<uint32_t>(level) << 28;
    }
    return d;
}

constexpr int N_IQ2 = 13, N_IQ3 = 31;         // candidates for a scale
constexpr int IQ2_LEVELS = 3, IQ3_LEVELS = 8;  // numbers a weight may be
constexpr int IQ2_BYTES = 66, IQ3_BYTES = 98;

// The scale; -1: all its weights are nothing.
INLINE float iq2_group(const QuantizeTask & t, const float * offsets, Group & g, uint8_t * points) {
    if (largest(g.x) < 1e-15f) return -1;
    uint8_t levels[GROUP];
    float q[GROUP];
    float scale = qp_quants(GROUP, IQ2_LEVELS + 1, g.x, levels, g.weight);
    const float max = scale * IQ2_LEVELS;
    if (max <= 0) return -1;
    best_scale<8>(*t.grid, g, IQ2_LEVELS - 1, offsets, N_IQ2, max, scale, q);
    if (scale > 0) refine<8>(*t.grid, g, IQ2_LEVELS - 1, 0, scale, q);
    finish_group<8>(*t.grid, g, scale, q, points);
    return scale;
}

TARGET static void iq2_block(const QuantizeTask & t, const float * x, const float * importance, const float * offsets, char * out) {
    uint32_t words[SUPER / GROUP * 2] = {};
    float scales[SUPER / GROUP], max = 0;
    const float sigma2 = sum_of_squares(x) / SUPER;
    for (int ib = 0; ib < SUPER / GROUP; ib++) {
        Group g;
        uint8_t points[GROUP / 8] = {};
        prepare_group(x + GROUP * ib, importance + GROUP * ib, sigma2, g);
        scales[ib] = iq2_group(t, offsets, g, points);
        if (scales[ib] < 0) {
            scales[ib] = 0;
            continue;
        }
        memcpy(&words[2 * ib], points, sizeof(points));
        words[2 * ib + 1] = packed_signs(g);
        max = max > scales[ib] ? max : scales[ib];
    }
    memset(out, 0, IQ2_BYTES);
    if (!(max > 0)) return;
    put_half(out, put_scales(scales, max, words + 1, 2));
    memcpy(out + 2, words, sizeof(words));
}

TARGET static void iq2_xxs(const QuantizeTask & t) {
    float offsets[(N_IQ2 + LANES) / LANES * LANES];
    for (int i = 0; i < static_cast<int>(sizeof(offsets) / sizeof(float)); i++) offsets[i] = 2 * IQ2_LEVELS - 1 + (i - 6) * 0.1f;
    for (int64_t b = 0; b < t.n_rows * t.n_blocks; b++) {
        iq2_block(t, t.x + SUPER * b, t.importance + SUPER * (b % t.n_blocks), offsets, t.out + IQ2_BYTES * b);
    }
}

INLINE float iq3_group(const QuantizeTask & t, const float * offsets, Group & g, uint8_t * points) {
    const float max = largest(g.x);
    if (max < 1e-8f) return -1;
    float q[GROUP], scale = max / (2 * IQ3_LEVELS - 1);
    for (int i = 0; i < GROUP; i++) q[i] = 1;
    const uint32_t kept = best_scale<4>(*t.grid, g, IQ3_LEVELS - 1, offsets, N_IQ3, max, scale, q);
    if ((kept & 255) != 255 && scale > 0) refine<4>(*t.grid, g, IQ3_LEVELS - 1, kept, scale, q);
    finish_group<4>(*t.grid, g, scale, q, points);
    return scale;
}

TARGET static void iq3_block(const QuantizeTask & t, const float * x, const float * importance, const float * offsets, char * out) {
    uint8_t points[SUPER / 4] = {};
    uint32_t words[SUPER / GROUP] = {};
    float scales[SUPER / GROUP], max = 0;
    const float sigma2 = 2 * sum_of_squares(x) / SUPER;
    for (int ib = 0; ib < SUPER / GROUP; ib++) {
        Group g;
        prepare_group(x + GROUP * ib, importance + GROUP * ib, sigma2, g);
        scales[ib] = iq3_group(t, offsets, g, points + 8 * ib);
        if (scales[ib] < 0) {
            scales[ib] = 0;
            continue;
        }
        words[ib] = packed_signs(g);
        max = max > scales[ib] ? max : scales[ib];
    }
    memset(out, 0, IQ3_BYTES);
    if (!(max > 0)) return;
    put_half(out, put_scales(scales, max, words, 1) * 1.0125f);
    memcpy(out + 2, points, sizeof(points));
    memcpy(out + 2 + sizeof(points), words, sizeof(words));
}

TARGET static void iq3_xxs(const QuantizeTask & t) {
    float offsets[(N_IQ3 + LANES) / LANES * LANES];
    for (int i = 0; i < static_cast<int>(sizeof(offsets) / sizeof(float)); i++) offsets[i] = 2 * IQ3_LEVELS - 1 + (i - 15) * 0.2f;
    for (int64_t b = 0; b < t.n_rows * t.n_blocks; b++) {
        iq3_block(t, t.x + SUPER * b, t.importance + SUPER * (b % t.n_blocks), offsets, t.out + IQ3_BYTES * b);
    }
}

}  // namespace

}  // namespace moe_edge
