// native/model's loading and native/disk_source, without ggml's library: what native/step.cpp does with them, by chance.
// model_stress FOLDER SEED SECONDS
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <mutex>

#include "disk_source.h"
#include "model.h"
#include "stress.h"

using namespace moe_edge;

constexpr int N_LAYERS = 3, N_EXPERTS = 6, N_UNITS = N_LAYERS * N_EXPERTS;
constexpr int BAD = N_UNITS - 1;  // the file ends within its last piece

static std::string file_path;
static std::vector<char> file_bytes;
static std::vector<me_piece_desc> pieces;

// Model::on_read is private, and the moment before it is what matters here: pointers to private members may be taken in
// an explicit instantiation.
using OnRead = void (Model::*)(const ReadJob &, const std::string &);
OnRead private_on_read();
template <OnRead function> struct Open {
    friend OnRead private_on_read() { return function; }
};
template struct Open<&Model::on_read>;

static void make_pieces() {
    Random random(1);
    int64_t at = 100;
    for (int i = 0; i < 3 * N_UNITS; i++) {
        const int64_t n = i % 4 == 0 ? SOON_BYTES * 2 + pick(random, 1, SOON_BYTES) : pick(random, 1000, 60000);
        pieces.push_back({0, GGML_TYPE_F32, i % 3, 0, at, n, n, 1, 1});
        at += n + pick(random, 0, 5000);
    }
    file_bytes = write_file(file_path, pieces.back().offset + pieces.back().nbytes - 10);
}

struct Opened : Model {
    // before: called on the reader's thread in place of on_read, which it calls by tell().
    Opened(int n_threads, bool direct, int64_t arena_bytes, std::function<void(const ReadJob &, const std::string &)> before)
        : Model(desc(n_threads, direct)) {
        source = std::make_unique<DiskSource>(std::vector<std::string>{file_path}, n_threads, direct, 0, pages, std::move(before));
        set_arena(arena_bytes);
    }
    void tell(const ReadJob & job, const std::string & error) { (this->*private_on_read())(job, error); }

private:
    static me_model_desc desc(int n_threads, bool direct) {
        static const char * path;
        static me_layer_desc layers[N_LAYERS];
        path = file_path.c_str();
        for (int i = 0; i < N_LAYERS; i++) layers[i] = {i, N_EXPERTS, 1, 1, 0, 1, nullptr, nullptr};
        me_model_desc d{};
        d.paths = &path;
        d.layers = layers;
        d.pieces = pieces.data();
        d.n_pieces = static_cast<int64_t>(pieces.size());
        d.n_paths = 1;
        d.n_layers = N_LAYERS;
        d.n_levels = 1;
        d.n_io_threads = n_threads;
        d.direct_io = direct;
        return d;
    }
};

static void check_bytes(Model & m, int unit) {
    Unit & u = m.unit(unit);
    CHECK(u.slot >= 0 && u.ready == u.all_bits(), "unit %d", unit);
    for (int p = 0; p < u.n_pieces; p++) {
        const Piece & piece = u.pieces[p];
        CHECK(memcmp(m.data(u, piece), file_bytes.data() + piece.offset, static_cast<size_t>(piece.nbytes)) == 0, "unit %d, piece %d", unit, p);
    }
}

// Wait as a step does; false on an error.
static bool wait_whole(Model & m, const std::vector<int> & units, int n_waiters, const std::function<void()> & meanwhile) {
    const auto t0 = Clock::now();
    for (;;) {
        const int64_t seen = m.arrivals();
        if (m.failed()) return false;
        bool whole = true;
        for (int id : units) whole &= m.unit(id).ready == m.unit(id).all_bits();
        if (whole) return true;
        CHECK(seconds_since(t0) < 20, "hangs: a step");
        meanwhile();
        CHECK(m.wait_arrival(seen, n_waiters), "a needed piece is lost: nothing will bring it");
    }
}

// A piece is cancelled while a part of it is read; before the model is told, a step needs it.
static void a_piece_needed_just_after_its_reading_was_given_up_is_read_again() {
    std::atomic<int> cancelled{0};
    std::atomic<bool> go{false};
    Opened * model = nullptr;
    Opened m(2, true, 64 << 20, [&](const ReadJob & job, const std::string & error) {
        if (error == ExpertSource::CANCELLED) {
            cancelled++;
            wait_for([&] { return go.load(); }, "the step");
        }
        model->tell(job, error);
    });
    model = &m;
    m.source->pace(SOON_BYTES * 50);
    CHECK(m.prefetch({0}), "unit 0");
    while (cancelled == 0) {  // its first piece has three parts
        wait_for([&] { return m.source->totals().reads > 0; }, "a part");
        m.cancel(0, N_EXPERTS);
        if (m.unit(0).pending == 0) return;
        sleep_us(1000);
    }
    m.source->pace(0);
    m.need(0);
    go = true;
    CHECK(wait_whole(m, {0}, 1, [] {}), "%s", m.take_error().c_str());
    check_bytes(m, 0);
}

// ---- by chance

struct Chance {
    Random random;
    int n_threads = static_cast<int>(pick(random, 1, 4));
    int64_t budget = pick(random, 4, 10) << 20;
    int64_t delay_us = pick(random, 0, 2) * 200;
    std::atomic<int64_t> told{0};
    Opened m;
    int64_t errors = 0;

    explicit Chance(uint32_t seed)
        : random(seed), m(n_threads, pick(random, 0, 1) == 1, budget, [this](const ReadJob & j, const std::string & e) {
              const int64_t n = told++;
              if (delay_us && (n % 3 == 0 || e == ExpertSource::CANCELLED)) sleep_us((n * 7919) % delay_us);  // widens the gap behind a read
              m.tell(j, e);
          }) {}
    bool absent(int unit) { return m.unit(unit).slot < 0; }

    // Evict by chance, sparing some units, until one more fits; false when none is left.
    bool make_room(int unit, const std::vector<int> & spared) {
        for (;;) {
            int64_t used = m.unit(unit).bytes;
            std::vector<int> victims;
            for (int i = 0; i < N_UNITS; i++) {
                if (absent(i)) continue;
                used += m.unit(i).bytes;
                if (std::find(spared.begin(), spared.end(), i) == spared.end()) victims.push_back(i);
            }
            if (used <= budget) return true;
            if (victims.empty()) return false;
            m.evict(victims[static_cast<size_t>(pick(random, 0, static_cast<int64_t>(victims.size()) - 1))]);
        }
    }
    void prefetch(std::vector<int> spared) {
        std::vector<int> units;
        for (int64_t n = pick(random, 1, 4); n > 0; n--) {
            const int unit = static_cast<int>(pick(random, 0, N_UNITS - 1));
            if (!absent(unit) || std::find(units.begin(), units.end(), unit) != units.end()) continue;
            units.push_back(unit);
        }
        std::vector<int> fit;
        int64_t used = 0;
        for (int i = 0; i < N_UNITS; i++) used += absent(i) ? 0 : m.unit(i).bytes;
        for (int unit : units) {
            for (int v = 0; v < N_UNITS && used + m.unit(unit).bytes > budget; v++) {
                const int victim = (v + unit) % N_UNITS;
                if (absent(victim) || std::find(spared.begin(), spared.end(), victim) != spared.end()) continue;
                used -= m.unit(victim).bytes;
                m.evict(victim);
            }
            if (used + m.unit(unit).bytes > budget) break;
            used += m.unit(unit).bytes;
            fit.push_back(unit);
        }
        CHECK(m.prefetch(fit), "the arena has no room for what was counted");
    }
    void step() {
        const int layer = static_cast<int>(pick(random, 0, N_LAYERS - 1)), first = layer * N_EXPERTS;
        std::vector<int> units;
        for (int e = 0; e < N_EXPERTS; e++) {
            if (pick(random, 0, 2) == 0 && units.size() < 2) units.push_back(first + e);
        }
        if (pick(random, 0, 3) == 0) {
            m.cancel(first, first + N_EXPERTS);
            sleep_us(pick(random, 0, 1) * pick(random, 0, 300));
        }
        std::vector<int> loads;
        for (int unit : units) {
            if (absent(unit)) loads.push_back(unit);
            else if (m.unit(unit).prefetched || m.unit(unit).ready != m.unit(unit).all_bits()) m.need(unit);
        }
        m.cancel(first, first + N_EXPERTS);
        for (int unit : loads) {
            CHECK(make_room(unit, units), "two units fit");
            CHECK(m.load(unit), "unit %d", unit);
        }
        bool asked = pick(random, 0, 1) == 1, ok = true;
        std::mutex mutex;  // of the workers
        auto meanwhile = [&] {
            std::lock_guard<std::mutex> lock(mutex);
            if (!asked) prefetch(units);
            asked = true;
        };
        if (pick(random, 0, 3)) {
            ok = wait_whole(m, units, 1, meanwhile);
        } else {
            bool other = true;
            std::thread worker([&] {
                other = wait_whole(m, units, 2, meanwhile);
                m.tell_waiters();
            });
            ok = wait_whole(m, units, 2, [] {});
            m.tell_waiters();
            worker.join();
            ok = ok && other;
        }
        if (ok) {
            for (int unit : units) check_bytes(m, unit);
            return;
        }
        const std::string error = m.take_error();
        CHECK(std::find(units.begin(), units.end(), BAD) != units.end() && error.find("'blk.2.ffn_down_exps.weight' of expert 5") != std::string::npos,
              "%s", error.c_str());
        errors++;
        m.drain();
        for (int i = 0; i < N_UNITS; i++) CHECK(absent(i) || m.unit(i).ready == m.unit(i).all_bits(), "unit %d", i);
    }
    void run() {
        const int64_t paces[] = {0, 0, int64_t(4) << 30, int64_t(500) << 20};
        for (int i = 0; i < 60; i++) {
            const int64_t what = pick(random, 0, 19), layer = pick(random, 0, N_LAYERS - 1);
            if (what < 9) step();
            else if (what < 14) prefetch({});
            else if (what < 16) m.cancel(static_cast<int>(layer) * N_EXPERTS, static_cast<int>(layer + 1) * N_EXPERTS);
            else if (what < 17) m.evict(static_cast<int>(pick(random, 0, N_UNITS - 1)));
            else if (what < 18) m.drain();
            else if (what < 19) m.source->pace(paces[pick(random, 0, 3)]);
            else sleep_us(pick(random, 0, 2000));
        }
        m.source->pace(0);
        if (pick(random, 0, 1)) return;  // the destructor drains
        m.drain();
        for (int i = 0; i < N_UNITS; i++) {
            if (!absent(i)) check_bytes(m, i);
            m.evict(i);
            CHECK(m.unit(i).pending == 0, "unit %d", i);
        }
        const Counters & c = m.counters;
        CHECK(c.prefetched == c.prefetch_useful + c.prefetch_wasted + c.prefetch_cancelled, "%lld prefetched, %lld useful, %lld wasted, %lld cancelled",
              static_cast<long long>(c.prefetched), static_cast<long long>(c.prefetch_useful), static_cast<long long>(c.prefetch_wasted),
              static_cast<long long>(c.prefetch_cancelled));
        CHECK(m.arena->peak_committed_bytes() <= static_cast<size_t>(budget), "the budget");
    }
};

int main(int argc, char ** argv) {
    CHECK(argc == 4, "usage: model_stress FOLDER SEED SECONDS");
    alarm(100);
    file_path = std::string(argv[1]) + "/model.bin";
    make_pieces();
    a_piece_needed_just_after_its_reading_was_given_up_is_read_again();
    const auto t0 = Clock::now();
    const double limit = std::atof(argv[3]);
    int64_t rounds = 0, errors = 0, prefetched = 0, useful = 0, cancelled = 0;
    for (; rounds == 0 || seconds_since(t0) < limit; rounds++) {
        Chance chance(static_cast<uint32_t>(std::atoi(argv[2]) + rounds));
        chance.run();
        errors += chance.errors;
        prefetched += chance.m.counters.prefetched;
        useful += chance.m.counters.prefetch_useful;
        cancelled += chance.m.counters.prefetch_cancelled;
    }
    printf("%lld rounds by chance, %lld units prefetched, %lld useful, %lld cancelled, %lld steps failed as they should\n", static_cast<long long>(rounds),
           static_cast<long long>(prefetched), static_cast<long long>(useful), static_cast<long long>(cancelled), static_cast<long long>(errors));
}
