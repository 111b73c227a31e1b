// native/disk_source alone: small cases with one answer, then threads that submit, promote, cancel and pace by chance.
// disk_source_stress FOLDER SEED SECONDS
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>

#include "disk_source.h"
#include "stress.h"

using namespace moe_edge;

constexpr int64_t PART = SOON_BYTES;
constexpr int64_t LARGEST_LENT = 4 * PART;
constexpr int64_t FILE_BYTES = 16 * PART + 3 * READ_ALIGN + 1234;  // ends within a part and within a block

static std::string file_path;
static std::vector<char> file_bytes;

// One submitted job. Its memory is freed as soon as the reader should be done with it, so that sanitizers see a late write.
struct Job {
    ReadJob job;
    std::atomic<int> told{0};             // calls of on_done
    std::atomic<bool> submitted{false};
    std::atomic<bool> cancel_asked{false};
    bool kept = false;                    // promoted before anybody cancelled it: must be read
    bool returned = false;                // by cancel()
    bool lent = false;                    // read into a buffer of the reader's
    bool live = true;                     // neither told nor returned
    std::string error;                    // of on_done

    ~Job() { free(); }
    void make(int64_t tag, int64_t offset, int64_t length, int64_t needed, bool soon, bool in_lent = false) {
        lent = in_lent;
        void * dst = lent ? nullptr : std::aligned_alloc(READ_ALIGN, static_cast<size_t>(length));
        job = {0, offset, length, needed, static_cast<char *>(dst), tag, soon};
    }
    void free() {
        std::free(job.dst);
        job.dst = nullptr;
        live = false;
    }
    bool past_end() const { return job.offset + job.needed > FILE_BYTES; }
    // On the reader's thread.
    void done(const ReadJob & said, const std::string & why) {
        CHECK(said.tag == job.tag, "tag %lld", static_cast<long long>(said.tag));
        CHECK(!told, "job %lld is told twice: %s, %s", static_cast<long long>(job.tag), error.c_str(), why.c_str());
        CHECK(live, "job %lld ends after its memory was given back", static_cast<long long>(job.tag));
        if (why.empty()) {
            const char * bytes = lent ? said.dst : job.dst;
            if (lent) sleep_us(static_cast<int>(job.tag % 200));  // as if it were unpacked: nobody may write there
            CHECK(!past_end() && memcmp(bytes, file_bytes.data() + job.offset, static_cast<size_t>(job.needed)) == 0,
                  "job %lld: wrong bytes", static_cast<long long>(job.tag));
        } else if (why == ExpertSource::CANCELLED) {
            CHECK(job.soon && cancel_asked, "job %lld was never cancelled", static_cast<long long>(job.tag));
        } else {
            CHECK(past_end() && why.find("it looks cut short") != std::string::npos, "%s", why.c_str());
        }
        error = why;
        free();
        told++;
    }
};

// ---- small cases. False: a busy machine let the moment pass.

struct Few {
    std::vector<std::unique_ptr<Job>> jobs;
    std::mutex mutex;
    std::vector<int64_t> ended;  // tags, in the order told
    DiskSource reader;

    explicit Few(int n_threads = 1)
        : reader({file_path}, n_threads, true, LARGEST_LENT, system_pages(), [this](const ReadJob & j, const std::string & e) {
              std::lock_guard<std::mutex> lock(mutex);
              ended.push_back(j.tag);
              jobs[static_cast<size_t>(j.tag)]->done(j, e);
          }) {}
    Job & submit(int64_t offset, int64_t length, int64_t needed, bool soon) {
        Job * j;
        {
            std::lock_guard<std::mutex> lock(mutex);
            jobs.push_back(std::make_unique<Job>());
            j = jobs.back().get();
            j->make(static_cast<int64_t>(jobs.size()) - 1, offset, length, needed, soon);
        }
        reader.submit(j->job);
        return *j;
    }
    std::vector<int64_t> cancel(const Job & j) {
        jobs[static_cast<size_t>(j.job.tag)]->cancel_asked = true;
        return reader.cancel(j.job.tag, j.job.tag + 1);
    }
    Clock::time_point began;
    bool within_parts(int n) const { return seconds_since(began) < 0.05 * n; }  // since slow(), none ended but the first n - 1
    void wait(const Job & j) {
        wait_for([&] { return j.told > 0; }, "a job");
    }
    // A part takes 50 ms now; returns while the first one of this job is being read.
    Job & slow(int64_t parts) {
        reader.pace(PART * 20);
        began = Clock::now();
        Job & j = submit(0, parts * PART, parts * PART, true);
        wait_for([&] { return reader.totals().reads > 0; }, "the first part");
        return j;
    }
};

static bool a_cancelled_job_stops_behind_its_part() {
    Few few;
    Job & j = few.slow(8);
    CHECK(few.cancel(j).empty(), "it is being read");
    if (!few.within_parts(1)) return false;
    few.wait(j);
    CHECK(j.error == ExpertSource::CANCELLED && few.reader.totals().reads == 1, "%s, %d reads", j.error.c_str(), static_cast<int>(few.reader.totals().reads));
    CHECK(few.reader.totals().soon_bytes == PART && few.reader.totals().bytes == PART, "the bytes of one part");
    return true;
}

static bool a_promoted_job_is_read_to_its_end_whatever_is_cancelled_before_or_after() {
    for (bool before : {false, true}) {
        Few few;
        Job & j = few.slow(4);
        if (before) few.cancel(j);
        few.reader.promote(j.job.tag, j.job.tag + 1);
        CHECK(few.cancel(j).empty(), "a promoted job was cancelled");
        if (!few.within_parts(1)) return false;
        few.reader.pace(0);
        few.wait(j);
        CHECK(j.error.empty() && few.reader.totals().reads == 2, "'%s', %d reads: one part, then the rest at once", j.error.c_str(), static_cast<int>(few.reader.totals().reads));
    }
    return true;
}

static bool a_needed_job_goes_between_two_parts() {
    for (int threads : {1, 3}) {
        Few few(threads);
        Job & soon = few.slow(2), & queued = few.submit(0, PART, PART, true), & now = few.submit(PART, PART, PART, false);
        if (!few.within_parts(1)) return false;
        few.reader.pace(0);
        few.wait(soon);
        few.wait(queued);
        CHECK(few.ended.front() == now.job.tag, "the needed job was not the first");
        // Several threads read the other two beside each other, and either may end first.
        CHECK(threads > 1 || (few.ended == std::vector<int64_t>{now.job.tag, soon.job.tag, queued.job.tag}), "another order");
    }
    return true;
}

static bool a_paused_job_is_cancelled_with_its_rest() {
    Few few;
    Job & soon = few.slow(4), & now = few.submit(PART, PART, PART, false);
    if (!few.within_parts(1)) return false;
    wait_for([&] { return few.reader.totals().reads > 1; }, "the needed job to begin");
    const std::vector<int64_t> cancelled = few.cancel(soon);
    if (!few.within_parts(2)) return false;
    CHECK((cancelled == std::vector<int64_t>{soon.job.tag}), "it waits in the queue");
    soon.free();
    few.wait(now);
    sleep_us(1000);
    CHECK(soon.told == 0 && few.reader.totals().reads == 2, "the rest was read");
    return true;
}

static void the_file_may_end_within_any_part() {
    Few few(2);
    for (bool soon : {true, false}) {
        for (int64_t parts_before : {0, 1, 2}) {
            const int64_t offset = (16 - parts_before) * PART, needed = FILE_BYTES - offset;
            Job & fits = few.submit(offset, (parts_before + 1) * PART, needed, soon);
            Job & cut = few.submit(offset, (parts_before + 1) * PART, needed + 1, soon);
            few.wait(fits);
            few.wait(cut);
            CHECK(fits.error.empty() && cut.error.find("the file ends at " + std::to_string(FILE_BYTES)) != std::string::npos,
                  "'%s', '%s'", fits.error.c_str(), cut.error.c_str());
        }
    }
}

static void no_pace_ends_the_wait_for_a_slow_disk() {
    Few few(2);
    few.reader.pace(2 * PART);  // 0.5 s
    few.submit(0, PART, PART, false);
    wait_for([&] { return few.reader.totals().reads == 1; }, "the first read");
    few.reader.pace(0);
    const auto t0 = Clock::now();
    few.wait(few.submit(0, PART, PART, false));
    CHECK(seconds_since(t0) < 0.3, "%.2f s", seconds_since(t0));
}

static void the_disk_is_busy_while_something_is_read_and_only_then() {
    Few few(3);
    few.reader.pace(PART * 25);
    const auto t0 = Clock::now();
    for (int i = 0; i < 3; i++) few.submit(0, PART, PART, i == 2);
    few.wait(*few.jobs.back());
    const double wall = seconds_since(t0);
    sleep_us(2000);
    const int64_t busy = few.reader.totals().busy_ns;
    CHECK(busy > 100e6 && busy < (wall + 0.01) * 1e9, "%lld ns in %.3f s", static_cast<long long>(busy), wall);
    sleep_us(10000);
    CHECK(few.reader.totals().busy_ns == busy, "busy while idle");
}

// ---- by chance

struct Chance {
    static constexpr int64_t MOST = 4000;
    std::vector<Job> jobs{MOST};
    std::atomic<int64_t> next{0}, open{0};
    std::mutex control;  // promote and cancel one at a time: what a job must become is known then
    DiskSource reader;

    Chance(int n_threads, bool direct)
        : reader({file_path}, n_threads, direct, LARGEST_LENT, system_pages(), [this](const ReadJob & j, const std::string & e) {
              jobs[static_cast<size_t>(j.tag)].done(j, e);
              open--;
          }) {}

    void submit(Random & random) {
        const int64_t tag = next++;
        if (tag >= MOST) return;
        const bool soon = pick(random, 0, 7) > 0;
        const int64_t length = READ_ALIGN * (pick(random, 0, 1) ? pick(random, 1, 20) : pick(random, 1, 4 * PART / READ_ALIGN));
        const int64_t offset = READ_ALIGN * pick(random, 0, FILE_BYTES / READ_ALIGN - (pick(random, 0, 9) ? length / READ_ALIGN : 0));
        Job & j = jobs[static_cast<size_t>(tag)];
        j.make(tag, offset, length, pick(random, std::max<int64_t>(1, length - 2 * READ_ALIGN), length), soon,
               pick(random, 0, 1) == 1);
        if (j.past_end() && pick(random, 0, 1) && FILE_BYTES > offset) j.job.needed = FILE_BYTES - offset;
        open++;
        reader.submit(j.job);
        j.submitted = true;
    }
    // The newest jobs, those around the one that is being read, or all.
    void range(Random & random, int64_t & first, int64_t & end) {
        const int64_t all = std::min(next.load(), MOST);
        const int64_t width = pick(random, 0, 30) ? pick(random, 1, 6) : all;
        end = std::max<int64_t>(0, all - pick(random, 0, 20));
        if (pick(random, 0, 2)) {
            int64_t oldest = 0;
            while (oldest < all && (jobs[static_cast<size_t>(oldest)].told || jobs[static_cast<size_t>(oldest)].returned)) oldest++;
            end = std::min(all, oldest + width);
        }
        first = std::max<int64_t>(0, end - width);
    }
    void promote(Random & random) {
        int64_t first, end;
        std::lock_guard<std::mutex> lock(control);
        range(random, first, end);
        for (int64_t t = first; t < end; t++) {
            Job & j = jobs[static_cast<size_t>(t)];
            if (j.submitted && !j.cancel_asked) j.kept = true;
        }
        reader.promote(first, end);
    }
    void cancel(Random & random) {
        int64_t first, end;
        std::lock_guard<std::mutex> lock(control);
        range(random, first, end);
        for (int64_t t = first; t < end; t++) {
            Job & j = jobs[static_cast<size_t>(t)];
            if (!j.kept) j.cancel_asked = true;  // CANCELLED is not taken from one that must be read
        }
        for (int64_t t : reader.cancel(first, end)) {
            Job & j = jobs[static_cast<size_t>(t)];
            CHECK(t >= first && t < end && j.job.soon && !j.kept && !j.returned && !j.told, "job %lld", static_cast<long long>(t));
            j.returned = true;
            j.free();
            open--;
        }
    }
};

static int64_t by_chance(uint32_t seed) {
    Random random(seed);
    const int n_threads = static_cast<int>(pick(random, 1, 4));
    const int n_callers = static_cast<int>(pick(random, 1, 4));
    const int64_t n_jobs = pick(random, 20, 80);
    auto chance = std::make_unique<Chance>(n_threads, pick(random, 0, 1) == 1);
    Chance & c = *chance;
    const auto t0 = Clock::now();
    std::vector<std::thread> callers;
    for (int i = 0; i < n_callers; i++) {
        callers.emplace_back([&c, n_jobs, seed, i] {
            Random mine(seed * 31 + static_cast<uint32_t>(i));
            const int64_t paces[] = {0, 0, int64_t(8) << 30, int64_t(1) << 30};
            const int64_t submits = pick(mine, 1, 6), patience = pick(mine, 1, 300);
            while (c.next < n_jobs) {
                const int64_t what = pick(mine, 0, 9);
                if (what < submits) c.submit(mine);
                else if (what < 8) pick(mine, 0, 5) ? c.cancel(mine) : c.promote(mine);
                else if (what == 8) c.reader.pace(paces[pick(mine, 0, 3)]);
                else sleep_us(pick(mine, 0, patience));
            }
        });
    }
    for (std::thread & t : callers) t.join();
    wait_for([&] { return c.open == 0; }, "jobs that nobody cancelled");
    const int64_t n = std::min(c.next.load(), Chance::MOST);
    int64_t cancelled = 0;
    for (int64_t t = 0; t < n; t++) {
        const Job & j = c.jobs[static_cast<size_t>(t)];
        CHECK(j.told + j.returned == 1, "job %lld: told %d times", static_cast<long long>(t), j.told.load());
        cancelled += j.error == ExpertSource::CANCELLED;
    }
    CHECK(c.reader.totals().soon_bytes <= c.reader.totals().bytes, "more read ahead than read");
    CHECK(c.reader.totals().busy_ns <= seconds_since(t0) * 1e9, "busier than time passed");
    // A reader that goes with work in its queues tells of some and forgets the others.
    c.reader.pace(pick(random, 0, 1) ? int64_t(1) << 30 : 0);
    for (int i = 0; i < 12; i++) c.submit(random);
    sleep_us(pick(random, 0, 1) * pick(random, 0, 2000));
    return cancelled;
}

int main(int argc, char ** argv) {
    CHECK(argc == 4, "usage: disk_source_stress FOLDER SEED SECONDS");
    alarm(100);
    file_path = std::string(argv[1]) + "/reader.bin";
    file_bytes = write_file(file_path, FILE_BYTES);
    for (auto in_time : {a_cancelled_job_stops_behind_its_part, a_promoted_job_is_read_to_its_end_whatever_is_cancelled_before_or_after,
                         a_needed_job_goes_between_two_parts, a_paused_job_is_cancelled_with_its_rest}) {
        int tries = 1;
        while (!in_time()) CHECK(++tries < 20, "the moment was never met");
    }
    the_file_may_end_within_any_part();
    no_pace_ends_the_wait_for_a_slow_disk();
    the_disk_is_busy_while_something_is_read_and_only_then();
    const auto t0 = Clock::now();
    const double limit = std::atof(argv[3]);
    int64_t rounds = 0, cancelled = 0;
    for (; rounds == 0 || seconds_since(t0) < limit; rounds++) cancelled += by_chance(static_cast<uint32_t>(std::atoi(argv[2]) + rounds));
    printf("%lld rounds by chance, %lld jobs cancelled within\n", static_cast<long long>(rounds), static_cast<long long>(cancelled));
}
