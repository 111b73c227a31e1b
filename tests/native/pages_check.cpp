// Pages of an injected size: the arena's bookkeeping against what the system says is in memory, a system that refuses to
// take pages back, and what a reader through the page cache leaves in it. Usage: pages_check FOLDER PAGE_BYTES
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "../../native/arena.h"
#include "../../native/disk_source.h"
#include "stress.h"

using namespace moe_edge;

// Bytes of the range that have a page in memory. from: on a border of the system's pages.
static int64_t in_memory(char * from, int64_t n) {
    const auto page = static_cast<int64_t>(sysconf(_SC_PAGESIZE));
    std::vector<unsigned char> flags(static_cast<size_t>((n + page - 1) / page));
#ifdef __APPLE__
    CHECK(mincore(from, static_cast<size_t>(n), reinterpret_cast<char *>(flags.data())) == 0, "%s", strerror(errno));
#else
    CHECK(mincore(from, static_cast<size_t>(n), flags.data()) == 0, "%s", strerror(errno));
#endif
    int64_t present = 0;
    for (unsigned char f : flags) present += f & 1 ? page : 0;
    return present;
}

static void the_arena_commits_whole_pages_and_no_more(const Pages & pages) {
    const auto page = static_cast<size_t>(pages.bytes);
    const size_t slot_bytes = 5 * page - 100, budget = 12 * page;
    Arena arena(slot_bytes, 6, budget, pages);
    CHECK(reinterpret_cast<uintptr_t>(arena.data(0)) % page == 0, "a slot starts on a page");
    CHECK(static_cast<size_t>(arena.data(1) - arena.data(0)) == 5 * page, "slots are whole pages");
    std::vector<int> held;
    for (size_t need : {slot_bytes, page + 1, 2 * page, size_t{1}}) {  // 5 + 2 + 2 + 1 pages
        held.push_back(arena.acquire(need));
        CHECK(held.back() >= 0, "10 of 12 pages");
        memset(arena.data(held.back()), 1, need);
    }
    CHECK(arena.committed_bytes() == 10 * page, "%zu", arena.committed_bytes());
    CHECK(arena.acquire(slot_bytes) == -1 && arena.error().empty(), "15 pages of 12");
    arena.release(held[0]);
    const int small = arena.acquire(page + 1);
    CHECK(small >= 0 && arena.committed_bytes() <= budget, "a free slot serves");
    const int large = arena.acquire(4 * page);
    CHECK(large >= 0 && arena.committed_bytes() <= budget, "slack is trimmed: 4 + 2 + 2 + 2 + 1 pages");
    memset(arena.data(large), 1, 4 * page);
    const int64_t present = in_memory(arena.data(0), static_cast<int64_t>(6 * 5 * page));
    CHECK(present <= static_cast<int64_t>(arena.committed_bytes()), "%lld bytes in memory", static_cast<long long>(present));
    CHECK(arena.peak_committed_bytes() <= budget, "%zu", arena.peak_committed_bytes());
}

static void early_pages_are_those_that_the_budget_is_sure_to_need(const Pages & pages) {
    const auto page = static_cast<size_t>(pages.bytes);
    const std::atomic<bool> go_on{false}, stop{true};
    Arena arena(5 * page, 6, 12 * page, pages);
    arena.commit_early(2 * page, stop);
    CHECK(arena.committed_bytes() == 0, "stopped before: %zu", arena.committed_bytes());
    arena.commit_early(2 * page, go_on);
    // 12 pages are two of the largest units and perhaps more smaller ones: two slots, two pages each
    CHECK(arena.committed_bytes() == 4 * page, "%zu", arena.committed_bytes());
    for (int slot : {0, 1}) {
        CHECK(in_memory(arena.data(slot), static_cast<int64_t>(5 * page)) == static_cast<int64_t>(2 * page), "slot %d", slot);
    }
    CHECK(in_memory(arena.data(2), static_cast<int64_t>(4 * 5 * page)) == 0, "no other slot");
    CHECK(arena.acquire(2 * page) == 0 && arena.committed_bytes() == 4 * page, "the first unit finds them");
    CHECK(arena.acquire(5 * page) == 1 && arena.acquire(5 * page) == 2, "larger ones take the rest");
    CHECK(arena.committed_bytes() == 12 * page && arena.peak_committed_bytes() == 12 * page, "%zu", arena.committed_bytes());

    Arena alike(5 * page, 6, 12 * page, pages);
    const int64_t unit = static_cast<int64_t>(5 * page);
    {
        const EarlyPages early(alike, 5 * page);
        wait_for([&] { return alike.committed_bytes() == 10 * page; }, "two whole units");
    }
    CHECK(in_memory(alike.data(0), 6 * unit) == 2 * unit, "and no more");
    for (int i = 0; i < 100; i++) const EarlyPages again(alike, 5 * page);  // ends whenever it is told to
    CHECK(alike.committed_bytes() == 10 * page, "once");
}

static int refuse(char *, size_t) { return EAGAIN; }

static void pages_that_the_system_keeps_stay_counted(Pages pages) {
    pages.give_back = refuse;
    const auto page = static_cast<size_t>(pages.bytes);
    Arena arena(4 * page, 3, 4 * page, pages);
    const int held = arena.acquire(4 * page);
    arena.release(held);
    // Another slot would need the pages of the free one; the free one itself serves without.
    CHECK(arena.acquire(3 * page) == held, "its own pages");
    CHECK(arena.acquire(page) == -1, "a page more than the budget");
    CHECK(arena.error().find("does not take") != std::string::npos, "says so: '%s'", arena.error().c_str());
    CHECK(arena.committed_bytes() == 4 * page, "%zu", arena.committed_bytes());
}

static int64_t cached(const std::string & path, int64_t offset, int64_t length) {
    const int fd = open(path.c_str(), O_RDONLY);
    void * p = mmap(nullptr, static_cast<size_t>(offset + length), PROT_READ, MAP_SHARED, fd, 0);
    CHECK(fd >= 0 && p != MAP_FAILED, "%s", strerror(errno));
    const int64_t bytes = in_memory(static_cast<char *>(p) + offset, length);
    munmap(p, static_cast<size_t>(offset + length));
    close(fd);
    return bytes;
}

// Neighbouring reads of odd blocks share pages where these are larger than a block.
static bool reads_through_the_cache_leave_nothing(const std::string & folder, const Pages & pages) {
    const std::string path = folder + "/file";
    const int64_t length = 40 * 65536;
    const std::vector<char> bytes = write_file(path, length);
    const int fd = open(path.c_str(), O_RDONLY);
    fsync(fd);
#ifdef POSIX_FADV_DONTNEED
    posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
#endif
    close(fd);
    if (cached(path, 0, length) != 0) return false;  // a file system without another place, as tmpfs
    std::atomic<int> done{0};
    std::vector<char> into(static_cast<size_t>(length + READ_ALIGN));
    {
        DiskSource reader({path}, 2, false, 0, pages, [&](const ReadJob &, const std::string & error) {
            CHECK(error.empty(), "%s", error.c_str());
            done++;
        });
        int n = 0;
        for (int64_t at = 3 * READ_ALIGN; at + 5 * READ_ALIGN < length; at += 7 * READ_ALIGN, n++) {
            ReadJob job;
            job.offset = at, job.length = job.needed = 5 * READ_ALIGN;
            job.dst = into.data() + at;
            reader.submit(job);
        }
        wait_for([&] { return done == n; }, "reads end");
        CHECK(reader.totals().direct_files == 0, "asked for the cache");
    }
    CHECK(memcmp(into.data() + 3 * READ_ALIGN, bytes.data() + 3 * READ_ALIGN, 5 * READ_ALIGN) == 0, "the bytes");
    // The last reads of two threads may meet on one page, which the later one then brings back: nothing else stays.
    CHECK(cached(path, 0, length) <= 2 * pages.bytes, "%lld bytes stay cached", static_cast<long long>(cached(path, 0, length)));
    return true;
}

static void a_range_is_widened_to_the_pages_it_touches(const Pages & pages) {
    const int64_t page = pages.bytes;
    const int64_t cases[][4] = {  // from, bytes, first byte, bytes
        {0, page, 0, page}, {1, 1, 0, page}, {page - 1, 2, 0, 2 * page}, {page, 0, page, 0},
        {3 * page + READ_ALIGN, 2 * page, 3 * page + (page == READ_ALIGN ? page : 0), page == READ_ALIGN ? 2 * page : 3 * page},
    };
    for (const auto & c : cases) {
        const Pages::Range r = pages.around(c[0], c[1]);
        CHECK(r.from == c[2] && r.n == c[3], "%lld + %lld", static_cast<long long>(c[0]), static_cast<long long>(c[1]));
    }
}

static void sizes_that_no_system_has_are_refused() {
    const auto system = static_cast<int64_t>(sysconf(_SC_PAGESIZE));
    for (int64_t bytes : {system / 2, system + 1, 3 * system}) {
        try {
            system_pages(bytes);
            CHECK(false, "pages of %lld", static_cast<long long>(bytes));
        } catch (const std::runtime_error & e) {
            CHECK(strstr(e.what(), "cannot be had"), "%s", e.what());
        }
    }
    CHECK(system_pages().bytes == system, "the system's own");
}

int main(int, char ** argv) {
    const Pages pages = system_pages(atoll(argv[2]));
    sizes_that_no_system_has_are_refused();
    a_range_is_widened_to_the_pages_it_touches(pages);
    the_arena_commits_whole_pages_and_no_more(pages);
    pages_that_the_system_keeps_stay_counted(pages);
    early_pages_are_those_that_the_budget_is_sure_to_need(pages);
    printf("ok%s\n", reads_through_the_cache_leave_nothing(argv[1], pages) ? "" : ", without the page cache");
    return 0;
}
