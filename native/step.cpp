#include "step.h"

#include <algorithm>
#include <chrono>
#include <cmath>
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
    prefetches_.clear();
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

// The gate weights, copied: the weighted sum may be given their memory. Equal shares when they are not known.
void StepRunner::take_weights(const ggml_tensor * w) {
    weights_node_ = w;
    step_.weights.resize(static_cast<size_t>(step_.n_tokens * step_.n_used));
    if (!w) {
        std::fill(step_.weights.begin(), step_.weights.end(), 1.0f / static_cast<float>(step_.n_used));
        return;
    }
    for (int64_t t = 0; t < step_.n_tokens; t++) {
        for (int64_t j = 0; j < step_.n_used; j++) {
            step_.weights[static_cast<size_t>(t * step_.n_used + j)] = *reinterpret_cast<const float *>(
                static_cast<const char *>(w->data) + static_cast<size_t>(j) * w->nb[1] + static_cast<size_t>(t) * w->nb[2]);
        }
    }
}

// n: the experts that are asked about, or ME_MEANWHILE. ns: the counter that the time goes to.
bool StepRunner::call_scheduler(int n, std::atomic<int64_t> & ns, bool & resident) {
    Model & m = *step_.model;
    m.mail.prefetch_count[0] = m.mail.part_count[0] = 0;
    const int64_t t0 = now_ns(), looked = m.counters.look_ahead_ns;
    m.step = &view_;
    m.step_layer = step_.layer_pos;
    const int32_t status = m.schedule(m.schedule_user, step_.layer_pos, static_cast<int32_t>(step_.n_tokens), n);
    m.step = nullptr;
    ns += now_ns() - t0 - (m.counters.look_ahead_ns - looked);
    resident = status == ME_SCHEDULE_RESIDENT;
    if (status == ME_SCHEDULE_OK || resident) return take_parts();
    return fail(status == ME_SCHEDULE_STOP ? "stopped" : "the scheduler failed");
}

// What the packed cache is to hold, before anything of the plan is read.
bool StepRunner::take_parts() {
    Model & m = *step_.model;
    const int n = m.mail.part_count[0];
    if (n < 0 || n > m.n_units()) return fail("the scheduler's plan keeps parts of " + std::to_string(n) + " of " + std::to_string(m.n_units()) + " units");
    return m.hold_parts(m.mail.part_units, m.mail.part_masks, n) || fail("");
}

// What the scheduler has to do besides the step: learn, and fetch ahead.
bool StepRunner::meanwhile() {
    if (!later_) return true;
    later_ = false;
    Counters & c = step_.model->counters;
    bool resident = false;
    std::string error;
    if (!call_scheduler(ME_MEANWHILE, waits_ ? c.meanwhile_ns : c.schedule_ns, resident)) return false;
    return (take_prefetches(error) && dispatch_loads(error)) || fail(error);
}

// What the scheduler is told of the step, into the mailbox; the number of its experts.
int StepRunner::write_experts() {
    Model & m = *step_.model;
    const int n = static_cast<int>(by_expert_.size());
    for (int i = 0; i < n; i++) {
        const Group & g = by_expert_[static_cast<size_t>(i)];
        float sum = 0, squares = 0;
        for (int64_t r = g.first_row; r < g.first_row + g.n_rows; r++) {
            const Row & row = step_.rows[static_cast<size_t>(r)];
            const float w = step_.weights[static_cast<size_t>(row.token * step_.n_used + row.slot)];
            sum += w;
            squares += w * w;
        }
        m.mail.experts[i] = g.expert;
        m.mail.counts[i] = static_cast<int32_t>(g.n_rows);
        m.mail.weights[i] = sum;
        m.mail.squares[i] = squares;
    }
    m.mail.prefetch_count[0] = 0;
    return n;
}

bool StepRunner::ask_scheduler() {
    Model & m = *step_.model;
    const int n = write_experts();
    m.mail.order[0] = -1;  // an answer that was never written must not pass for one
    const Layer & layer = m.layers[static_cast<size_t>(step_.layer_pos)];
    view_ = {step_.ids.data(), step_.weights.data(), attention_.take(step_.n_tokens), ffn.input(), static_cast<int32_t>(step_.n_tokens),
             static_cast<int32_t>(step_.n_used), static_cast<int32_t>(layer.n_embd), weights_node_ != nullptr};
    bool resident_step = false;
    m.mail.later[0] = 0;
    if (!call_scheduler(n, m.counters.schedule_ns, resident_step)) return false;
    later_ = m.mail.later[0] != 0;
    if (resident_step) answer_resident(n);
    if (!take_plan(n)) return false;
    m.counters.steps++;
    m.counters.tokens += step_.n_tokens;
    // What was fetched ahead for this layer and is not asked for now is not worth the disk's time.
    if (m.counters.prefetched > 0) m.cancel(layer.first_unit, layer.first_unit + layer.n_expert * m.n_levels);
    return true;
}

// The answer that the scheduler did not write: all at level 0, in the order asked.
void StepRunner::answer_resident(int n) {
    me_mailbox & mail = step_.model->mail;
    for (int i = 0; i < n; i++) {
        mail.order[i] = i;
        mail.level[i] = 0;
        mail.victim_count[i] = 0;
    }
}

// The plan in the mailbox, checked: groups to compute, reads to start, and what is skipped.
bool StepRunner::take_plan(int n) {
    Model & m = *step_.model;
    step_.groups.clear();
    skipped_.clear();
    loads_.clear();
    prefetches_.clear();
    next_load_ = 0;
    waits_ = false;
    busy_.assign(static_cast<size_t>(m.n_units()), 0);
    std::vector<uint8_t> seen(static_cast<size_t>(n), 0);
    int victim = 0;
    for (int i = 0; i < n; i++) {
        const int at = m.mail.order[i], level = m.mail.level[i], n_victims = m.mail.victim_count[i];
        if (at < 0 || at >= n || seen[static_cast<size_t>(at)] || level < ME_LEVEL_SKIP || level >= m.n_levels || n_victims < 0 ||
            victim + n_victims > m.n_units()) {
            return fail("the scheduler's plan is not a permutation of the experts it was asked for");
        }
        seen[static_cast<size_t>(at)] = 1;
        if (!take_planned(by_expert_[static_cast<size_t>(at)], level, m.mail.victims + victim, n_victims)) return false;
        victim += n_victims;
    }
    return true;
}

// One expert of the plan.
bool StepRunner::take_planned(Group g, int level, const int32_t * victims, int n_victims) {
    Model & m = *step_.model;
    if (level == ME_LEVEL_SKIP) {
        if (n_victims > 0) return fail("the scheduler's plan evicts experts for one that it skips");
        skipped_.push_back(g);
        m.counters.skipped_uses++;
        return true;
    }
    m.counters.low_uses += level > 0;
    g.unit = m.layers[static_cast<size_t>(step_.layer_pos)].first_unit + g.expert * m.n_levels + level;
    busy_[static_cast<size_t>(g.unit)] = 1;
    step_.groups.push_back(g);
    const Unit & unit = m.unit(g.unit);
    const bool resident = unit.slot >= 0;
    m.counters.uses++;
    m.counters.hits += resident;
    if (!resident) {
        loads_.push_back({static_cast<int>(step_.groups.size()) - 1, {victims, victims + n_victims}});
        waits_ = true;
        return true;
    }
    if (n_victims > 0) return fail("the scheduler's plan evicts experts for one that is already in memory");
    waits_ |= unit.ready != unit.all_bits();
    if (unit.prefetched || unit.ready != unit.all_bits()) m.need(g.unit);
    return true;
}

// The plan's prefetches; they may not touch what this step uses.
bool StepRunner::take_prefetches(std::string & error) {
    Model & m = *step_.model;
    const int n = m.mail.prefetch_count[0];
    if (n < 0 || n > m.n_units()) {
        error = "the scheduler's plan prefetches " + std::to_string(n) + " of " + std::to_string(m.n_units()) + " units";
        return false;
    }
    auto used = [&](int u) { return std::any_of(step_.groups.begin(), step_.groups.end(), [u](const Group & g) { return g.unit == u; }); };
    int victim = 0;
    for (int i = 0; i < n; i++) {
        Prefetch p{m.mail.prefetch_units[i], {}};
        const int n_victims = m.mail.prefetch_victim_count[i];
        if (p.unit < 0 || p.unit >= m.n_units() || used(p.unit) || n_victims < 0 || victim + n_victims > m.n_units()) {
            error = "the scheduler's plan prefetches an expert that does not exist or that the present step uses";
            return false;
        }
        for (int v = 0; v < n_victims; v++) {
            const int gone = m.mail.prefetch_victims[victim + v];
            if (gone < 0 || gone >= m.n_units() || used(gone)) {
                error = "the scheduler's plan evicts an expert of the present step for one that is not needed yet";
                return false;
            }
            p.victims.push_back(gone);
        }
        victim += n_victims;
        prefetches_.push_back(std::move(p));
    }
    return true;
}

bool StepRunner::dispatch_prefetches(std::string & error) {
    Model & m = *step_.model;
    std::vector<int> units;
    for (const Prefetch & p : prefetches_) {
        for (int v : p.victims) {
            if (m.unit(v).slot < 0) {
                error = "the scheduler's plan evicts an expert that is not in memory";
                return false;
            }
            m.evict(v);
        }
        if (m.unit(p.unit).slot >= 0 || std::find(units.begin(), units.end(), p.unit) != units.end()) {
            error = "the scheduler's plan prefetches an expert that is already in memory";
            return false;
        }
        units.push_back(p.unit);
    }
    prefetches_.clear();
    if (!units.empty() && !m.prefetch(units)) {
        error = "the scheduler's plan exceeds the memory of the expert arena";
        return false;
    }
    return true;
}

// Start every read that can start: in plan order, stopping at the first whose victims this step still needs.
bool StepRunner::dispatch_loads(std::string & error) {
    Model & m = *step_.model;
    while (next_load_ < loads_.size()) {
        Load & load = loads_[next_load_];
        for (int v : load.victims) {
            if (v < 0 || v >= m.n_units() || m.unit(v).slot < 0) {
                error = "the scheduler's plan evicts an expert that is not in memory";
                return false;
            }
            if (busy_[static_cast<size_t>(v)]) return true;
        }
        for (int v : load.victims) m.evict(v);
        if (!m.load(step_.groups[static_cast<size_t>(load.group)].unit)) {
            error = "the scheduler's plan exceeds the memory of the expert arena";
            return false;
        }
        next_load_++;
    }
    return prefetches_.empty() || dispatch_prefetches(error);
}

bool StepRunner::begin(const Stub & stub, const ggml_tensor * product, const ggml_tensor * weights) {
    step_.model = stub.model;
    step_.layer_pos = stub.layer_pos;
    step_.ids_node = product->src[2];
    first_node_ = product;
    if (!group_by_expert(product->src[2])) return false;
    const bool fits = weights && weights->data && weights->ne[1] == step_.n_used && weights->ne[2] == step_.n_tokens;
    take_weights(fits ? weights : nullptr);
    ffn.begin(step_, product->src[1]);
    if (!ask_scheduler()) return false;
    pending_ = true;
    std::string error;
    if (!dispatch_loads(error)) return fail(error);
    return waits_ || meanwhile();
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
        if (!dispatch_loads(error)) return fail(error);
    }
    for (Group & g : step_.groups) {
        if (g.state == Group::DONE) busy_[static_cast<size_t>(g.unit)] = 0;
    }
    return dispatch_loads(error) || fail(error);
}

// All threads on the same experts, as they arrive.
bool StepRunner::compute_together() {
    Model & m = *step_.model;
    for (;;) {
        const int64_t seen = m.arrivals();
        if (m.failed()) return fail("");
        if (asked_to_stop()) return fail("stopped");
        bool progress = false;
        if (!compute_ready(progress)) return false;
        if (std::all_of(step_.groups.begin(), step_.groups.end(), [](const Group & g) { return g.state == Group::DONE; })) return meanwhile();
        if (!progress && later_) {
            if (!meanwhile()) return false;
            continue;
        }
        if (!progress && !m.wait_arrival(seen, 1)) return fail("the scheduler's plan waits for an expert that nothing will bring");
    }
}

// Of the groups that have arrived and nobody has taken: one whose place the next read waits for, else the largest; null
// when there is none.
Group * StepRunner::take_group(bool & all_taken) {
    Model & m = *step_.model;
    Group * best = nullptr;
    all_taken = true;
    auto awaited = [&](const Group & g) {
        if (next_load_ >= loads_.size()) return false;
        const std::vector<int> & victims = loads_[next_load_].victims;
        return std::find(victims.begin(), victims.end(), g.unit) != victims.end();
    };
    for (Group & g : step_.groups) {
        if (g.taken) continue;
        all_taken = false;
        const Unit & u = m.unit(g.unit);
        if (u.slot < 0 || u.ready.load(std::memory_order_acquire) != u.all_bits()) continue;
        if (awaited(g)) {
            best = &g;
            break;
        }
        if (!best || g.n_rows > best->n_rows) best = &g;
    }
    if (best) best->taken = true;
    return best;
}

void StepRunner::work(int thread) {
    Model & m = *step_.model;
    std::string error;
    for (;;) {
        const int64_t seen = m.arrivals();
        Group * g = nullptr;
        bool all_taken = false;
        {
            std::lock_guard<std::mutex> lock(workers_mutex_);
            if (worker_error_.empty() && asked_to_stop()) worker_error_ = "stopped";
            if (!worker_error_.empty() || m.failed()) break;
            g = take_group(all_taken);
        }
        if (all_taken && !g) break;
        if (!g) {
            if (m.wait_arrival(seen, ffn.threads())) continue;
            error = "the scheduler's plan waits for an expert that nothing will bring";
        } else {
            ffn.run_alone(step_, thread, *g, error);
        }
        std::lock_guard<std::mutex> lock(workers_mutex_);
        if (g && error.empty()) {
            busy_[static_cast<size_t>(g->unit)] = 0;
            dispatch_loads(error);
        }
        if (!error.empty()) {
            if (worker_error_.empty()) worker_error_ = error;
            break;
        }
        m.tell_waiters();
    }
    m.tell_waiters();
}

// Each thread takes the next expert that has arrived: no barrier between experts.
bool StepRunner::compute_by_workers() {
    Model & m = *step_.model;
    worker_error_.clear();
    const int64_t t0 = now_ns(), stalled = m.counters.stall_ns;
    std::string error;
    const bool ok = ffn.run_workers(step_, [this](int thread) { work(thread); }, error);
    m.counters.compute_ns += now_ns() - t0 - (m.counters.stall_ns - stalled);
    if (!ok || !worker_error_.empty() || m.failed()) return fail(ok ? worker_error_ : error);
    return true;
}

bool StepRunner::announce(const Stub & before, ggml_tensor * input) {
    Model & m = *before.model;
    Lane & lane = ffn.few_threads(input->ne[1]);
    if (!run_node(m, input, lane)) return false;
    if (m.look.depth == 0 || !m.announce || pending_ || step_.model != &m || step_.layer_pos != before.layer_pos) return true;
    const int layer_pos = before.layer_pos + 1;
    const Router & router = m.layers[static_cast<size_t>(layer_pos)].router;
    // Of several tokens, which ones the last layer will route is not known here.
    if (input->ne[1] == 0 || (router.some_rows && input->ne[1] > 1)) return true;
    const int64_t t0 = now_ns();
    Routed routed{};
    if (!route(m.look, router, input, step_.n_used, lane, routed)) return fail("ggml could not compute a router");
    step_.layer_pos = layer_pos;
    step_.ids_node = nullptr;
    if (!group_by_expert(routed.ids)) return false;
    step_.weights.resize(step_.ids.size());
    for (int64_t t = 0; t < step_.n_tokens; t++) {
        const float * p = static_cast<const float *>(routed.probabilities->data) + t * routed.probabilities->ne[0];
        const int32_t * ids = step_.ids.data() + t * step_.n_used;
        float total = 0;
        for (int64_t j = 0; j < step_.n_used; j++) total += p[ids[j]];
        for (int64_t j = 0; j < step_.n_used; j++) step_.weights[static_cast<size_t>(t * step_.n_used + j)] = p[ids[j]] / total;
    }
    const int n = write_experts();
    m.mail.part_count[0] = 0;
    const int64_t t1 = now_ns();
    const int32_t status = m.announce(m.schedule_user, layer_pos, static_cast<int32_t>(step_.n_tokens), n);
    m.counters.look_ahead_ns += t1 - t0;
    m.counters.schedule_ns += now_ns() - t1;
    if (status != ME_SCHEDULE_OK) return fail(status == ME_SCHEDULE_STOP ? "stopped" : "the scheduler failed");
    if (!take_parts()) return false;
    step_.groups.clear();  // the step before has computed all of its own: they may be evicted
    std::string error;
    // By the second queue, though they are certain: read by all threads at once they slowed attention down and came no
    // sooner, with as many threads as cores.
    return (take_prefetches(error) && dispatch_prefetches(error)) || fail(error);
}

bool StepRunner::select(const Stub & stub, ggml_tensor * ranking) {
    std::string error;
    if (selector_.run(*stub.model, stub.layer_pos, ranking, ffn.few_threads(ranking->ne[1]), error)) return true;
    stub.model->set_error(error);
    return false;
}

bool StepRunner::run_attention(ggml_tensor * node) {
    std::string error;
    if (!ffn.run_node(node, ffn.all_threads(), error)) return false;
    attention_.read(node, ffn.all_threads());
    return true;
}

bool StepRunner::run_node(Model & model, ggml_tensor * node, Lane & lane) {
    std::string error;
    if (ffn.run_node(node, lane, error)) return true;
    model.set_error(error);
    return false;
}

// A skipped expert's rows are zero; the token's other weights may take over its share.
bool StepRunner::drop_skipped() {
    if (step_.model->renormalise && !step_.sum) {
        return fail("gate weights cannot be renormalised in this model, whose weighted sum has another form; leave --renormalise away");
    }
    const Layer & layer = step_.model->layers[static_cast<size_t>(step_.layer_pos)];
    std::vector<float> lost(step_.model->renormalise ? static_cast<size_t>(step_.n_tokens) : 0, 0.0f);
    for (const Group & g : skipped_) {
        for (int64_t r = g.first_row; r < g.first_row + g.n_rows; r++) {
            const Row & row = step_.rows[static_cast<size_t>(r)];
            memset(step_.output(row), 0, static_cast<size_t>(layer.n_embd) * sizeof(float));
            float & w = step_.weights[static_cast<size_t>(row.token * step_.n_used + row.slot)];
            if (!lost.empty()) lost[static_cast<size_t>(row.token)] += w;
            w = 0;
        }
    }
    for (size_t t = 0; t < lost.size(); t++) {
        if (lost[t] == 0) continue;
        float * w = step_.weights.data() + t * static_cast<size_t>(step_.n_used);
        float kept = 0;
        for (int64_t j = 0; j < step_.n_used; j++) kept += w[j];
        for (int64_t j = 0; j < step_.n_used && kept != 0; j++) w[j] *= (kept + lost[t]) / kept;
    }
    return true;
}

static double uniform(uint64_t & state) {  // xorshift64*, in (0, 1)
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return (static_cast<double>((state * 0x2545F4914F6CDD1DULL) >> 11) + 0.5) / 9007199254740992.0;
}

void StepRunner::disturb() {
    Noise & noise = step_.model->noise;
    const int64_t n = step_.model->layers[static_cast<size_t>(step_.layer_pos)].n_embd;
    for (int64_t t = 0; t < step_.n_tokens; t++) {
        float * y = reinterpret_cast<float *>(step_.sum) + t * n;
        double squares = 0;
        for (int64_t i = 0; i < n; i++) squares += static_cast<double>(y[i]) * y[i];
        const double size = noise.relative * std::sqrt(squares / static_cast<double>(n));
        for (int64_t i = 0; i < n; i++) {
            const double g = std::sqrt(-2 * std::log(uniform(noise.state))) * std::cos(6.283185307179586 * uniform(noise.state));
            const float d = static_cast<float>(size * g);
            y[i] += d;
            noise.energy += static_cast<double>(d) * d;
        }
    }
}

bool StepRunner::finish(const Stub & stub, const ggml_tensor * down, const WeightedSum * sum) {
    step_.hidden = down->src[1];
    step_.out = static_cast<char *>(down->data);
    step_.out_nb1 = down->nb[1];
    step_.out_nb2 = down->nb[2];
    step_.sum = sum ? static_cast<char *>(sum->sum->data) : nullptr;
    step_.down_scale = sum && sum->scale ? static_cast<const float *>(sum->scale->data) : nullptr;
    if (sum && sum->weights != weights_node_) take_weights(sum->weights);
    if (!skipped_.empty() && !drop_skipped()) return false;
    // Few rows, or too few experts to go round: latency counts, all threads share each expert. The bits are the same.
    const auto n_threads = static_cast<size_t>(ffn.threads());
    const bool alone = step_.rows.size() >= 32 * n_threads && step_.groups.size() >= 2 * n_threads;
    std::string error;
    if (alone) {
        if (!meanwhile() || !compute_by_workers()) return false;
    } else {
        if (!compute_together()) return false;
        if (!ffn.run_sum(step_, error)) return fail(error);
    }
    if (step_.model->noise.layer_pos == step_.layer_pos) {
        if (!step_.sum) return fail("the MoE output of this model cannot be disturbed: its weighted sum has another form");
        disturb();
    }
    pending_ = false;
    return true;
}

}  // namespace moe_edge
