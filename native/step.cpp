#include "step.h"

#include <algorithm>
#include <chrono>
#include <cstring>

namespace moe_edge {

static int64_t now_ns() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

bool StepRunner::fail(const std::string & why) {
    Model & m = *step_.model;
    m.set_error(why);
    abandon();
    m.drain();
    return false;
}

void StepRunner::abandon() {
    pending_ = false;
    loads_.clear();
    next_load_ = 0;
}

bool StepRunner::group_by_expert(const ggml_tensor * ids) {
    const int n_expert = step_.model->layers[static_cast<size_t>(step_.layer_pos)].n_expert;
    step_.n_used = ids->ne[0];
    step_.n_tokens = ids->ne[1];
    std::vector<int64_t> start(static_cast<size_t>(n_expert) + 1, 0);
    step_.ids.clear();
    for (int64_t t = 0; t < step_.n_tokens; t++) {
        for (int64_t j = 0; j < step_.n_used; j++) {
            // a strided view of the argsort: only nb[] tells where row t starts
            const int32_t e = *reinterpret_cast<const int32_t *>(static_cast<const char *>(ids->data) +
                static_cast<size_t>(t) * ids->nb[1] + static_cast<size_t>(j) * ids->nb[0]);
            if (e < 0 || e >= n_expert) {
                return fail("layer " + std::to_string(step_.model->layers[static_cast<size_t>(step_.layer_pos)].number) +
                            ": the router selected expert " + std::to_string(e) + " of " + std::to_string(n_expert));
            }
            step_.ids.push_back(e);
            start[static_cast<size_t>(e) + 1]++;
        }
    }
    by_expert_.clear();
    for (int e = 0; e < n_expert; e++) {
        const int64_t n = start[static_cast<size_t>(e) + 1];
        start[static_cast<size_t>(e) + 1] += start[static_cast<size_t>(e)];
        if (n == 0) continue;
        Group g;
        g.expert = e;
        g.first_row = start[static_cast<size_t>(e)];
        g.n_rows = n;
        by_expert_.push_back(g);
    }
    step_.rows.resize(step_.ids.size());
    for (int64_t t = 0; t < step_.n_tokens; t++) {
        for (int64_t j = 0; j < step_.n_used; j++) {
            const auto e = static_cast<size_t>(step_.ids[static_cast<size_t>(t * step_.n_used + j)]);
            step_.rows[static_cast<size_t>(start[e]++)] = {static_cast<int32_t>(t), static_cast<int32_t>(j)};
        }
    }
    return true;
}

bool StepRunner::ask_scheduler() {
    Model & m = *step_.model;
    const int n = static_cast<int>(by_expert_.size());
    for (int i = 0; i < n; i++) {
        m.mail.experts[i] = by_expert_[static_cast<size_t>(i)].expert;
        m.mail.counts[i] = static_cast<int32_t>(by_expert_[static_cast<size_t>(i)].n_rows);
    }
    const int64_t t0 = now_ns();
    const int32_t status = m.schedule(m.schedule_user, step_.layer_pos, static_cast<int32_t>(step_.n_tokens), n);
    m.counters.schedule_ns += now_ns() - t0;
    if (status != ME_SCHEDULE_OK) return fail(status == ME_SCHEDULE_STOP ? "stopped" : "the scheduler failed");

    step_.groups.clear();
    loads_.clear();
    next_load_ = 0;
    busy_.assign(static_cast<size_t>(m.n_units()), 0);
    std::vector<uint8_t> seen(static_cast<size_t>(n), 0);
    int victim = 0;
    for (int i = 0; i < n; i++) {
        const int at = m.mail.order[i], level = m.mail.level[i], n_victims = m.mail.victim_count[i];
        if (at < 0 || at >= n || seen[static_cast<size_t>(at)] || level < 0 || level >= m.n_levels || n_victims < 0 ||
            victim + n_victims > m.n_units()) {
            return fail("the scheduler's plan is not a permutation of the experts it was asked for");
        }
        seen[static_cast<size_t>(at)] = 1;
        Group g = by_expert_[static_cast<size_t>(at)];
        g.unit = m.layers[static_cast<size_t>(step_.layer_pos)].first_unit + g.expert * m.n_levels + level;
        busy_[static_cast<size_t>(g.unit)] = 1;
        step_.groups.push_back(g);
        const bool resident = m.unit(g.unit).slot >= 0;
        if (!resident) {
            Load load{i, {}};
            for (int v = 0; v < n_victims; v++) load.victims.push_back(m.mail.victims[victim + v]);
            loads_.push_back(std::move(load));
        } else if (n_victims > 0) {
            return fail("the scheduler's plan evicts experts for one that is already in memory");
        }
        victim += n_victims;
        m.counters.uses++;
        m.counters.hits += resident;
    }
    m.counters.steps++;
    m.counters.tokens += step_.n_tokens;
    return true;
}

// Start every read that can start: in plan order, stopping at the first whose victims this step still needs.
bool StepRunner::dispatch_loads() {
    Model & m = *step_.model;
    while (next_load_ < loads_.size()) {
        Load & load = loads_[next_load_];
        for (int v : load.victims) {
            if (v < 0 || v >= m.n_units() || m.unit(v).slot < 0) return fail("the scheduler's plan evicts an expert that is not in memory");
            if (busy_[static_cast<size_t>(v)]) return true;
        }
        for (int v : load.victims) m.evict(v);
        if (!m.load(step_.groups[static_cast<size_t>(load.group)].unit)) {
            return fail("the scheduler's plan exceeds the memory of the expert arena");
        }
        next_load_++;
    }
    return true;
}

bool StepRunner::begin(const Stub & stub, const ggml_tensor * product) {
    step_.model = stub.model;
    step_.layer_pos = stub.layer_pos;
    step_.ids_node = product->src[2];
    if (!group_by_expert(product->src[2])) return false;
    ffn.begin(step_, product->src[1]);
    if (!ask_scheduler()) return false;
    pending_ = true;
    return dispatch_loads();
}

// Compute what has arrived. Small groups share a graph; a large one has its own.
bool StepRunner::compute_ready(bool & progress) {
    Model & m = *step_.model;
    std::string error;
    progress = false;
    std::vector<Group *> ready, hidden;
    int64_t n_rows = 0, hidden_rows = 0;
    auto missing = [&](const Group & g, bool with_down) {
        const Unit & u = m.unit(g.unit);
        const uint32_t need = with_down ? u.all_bits() : u.all_bits() & ~u.bit(DOWN);
        return u.slot < 0 || (u.ready.load(std::memory_order_acquire) & need) != need;
    };
    for (Group & g : step_.groups) {
        if (g.n_rows >= MANY_ROWS || g.state == Group::DONE) continue;
        if (g.state == Group::WAITING && !missing(g, false) && n_rows + g.n_rows <= BATCH_ROWS) {
            ready.push_back(&g);
            n_rows += g.n_rows;
        } else if (g.state == Group::HIDDEN && !missing(g, true) && hidden_rows + g.n_rows <= BATCH_ROWS) {
            hidden.push_back(&g);
            hidden_rows += g.n_rows;
        }
    }
    if (!ready.empty() || !hidden.empty()) {
        if (!ffn.run_small(step_, ready, hidden, error)) return fail(error);
        progress = true;
    }
    for (Group & g : step_.groups) {
        if (g.n_rows < MANY_ROWS || g.state == Group::DONE || missing(g, true)) continue;
        if (!ffn.run_large(step_, g, error)) return fail(error);
        progress = true;
        busy_[static_cast<size_t>(g.unit)] = 0;
        if (!dispatch_loads()) return false;
    }
    for (Group & g : step_.groups) {
        if (g.state == Group::DONE) busy_[static_cast<size_t>(g.unit)] = 0;
    }
    return dispatch_loads();
}

bool StepRunner::finish(const Stub & stub, const ggml_tensor * down) {
    Model & m = *step_.model;
    step_.hidden = down->src[1];
    step_.out = static_cast<char *>(down->data);
    step_.out_nb1 = down->nb[1];
    step_.out_nb2 = down->nb[2];
    for (;;) {
        const int64_t seen = m.arrivals();
        if (m.failed()) return fail("");
        if (m.stop || (abort && abort(abort_data))) return fail("stopped");
        bool progress = false;
        if (!compute_ready(progress)) return false;
        if (std::all_of(step_.groups.begin(), step_.groups.end(), [](const Group & g) { return g.state == Group::DONE; })) break;
        if (!progress) m.wait_arrival(seen);
    }
    pending_ = false;
    return true;
}

}  // namespace moe_edge
