#include "disk_source.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <chrono>
#include <cstring>
#include <stdexcept>

namespace moe_edge {

const std::string ExpertSource::CANCELLED = "cancelled";

DiskSource::DiskSource(const std::vector<std::string> & paths, int n_threads, bool direct, int64_t largest_lent,
                       const Pages & pages, Done on_done)
    : on_done_(std::move(on_done)), pages_(pages), largest_lent_(largest_lent) {
    for (int i = 0; largest_lent > 0 && i < n_threads + 2; i++) {
        void * p = nullptr;
        if (posix_memalign(&p, READ_ALIGN, static_cast<size_t>(largest_lent)) != 0) {
            throw std::runtime_error("no memory for " + std::to_string(n_threads + 2) + " read buffers of " +
                                     std::to_string(largest_lent) + " bytes");
        }
        buffers_.emplace_back(static_cast<char *>(p));
        free_buffers_.push_back(buffers_.back().get());
    }
    files_.reserve(paths.size());
    try {
        for (const auto & p : paths) open(p, direct);
    } catch (...) {
        for (auto & f : files_) ::close(f.fd);
        throw;
    }
    for (int i = 0; i < n_threads; i++) threads_.emplace_back([this] { work(); });
}

// Without read-ahead, which would bring pages past the end of a read that nobody drops.
static void read_at_random(int fd) {
#if defined(POSIX_FADV_RANDOM)
    posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM);
#else
    (void) fd;
#endif
}

void DiskSource::open(const std::string & path, bool direct) {
    File f;
    f.path = path;
#ifdef O_DIRECT
    if (direct) {
        f.fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
        f.direct = f.fd >= 0;
    }
#endif
    if (f.fd < 0) f.fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (f.fd < 0) throw std::runtime_error(path + ": cannot be opened: " + strerror(errno));
#ifdef F_NOCACHE
    if (direct) f.direct = fcntl(f.fd, F_NOCACHE, 1) == 0;
#endif
    if (!f.direct) read_at_random(f.fd);
    files_.push_back(std::move(f));
}

// The kernel drops whole pages only, and where they are larger than a block the first and last are shared with neighbours
// that have been read or will be: dropped with this one, else they would stay for good.
void DiskSource::drop_cached(const File & f, int64_t offset, int64_t length) const {
#if defined(POSIX_FADV_DONTNEED)
    const Pages::Range range = pages_.around(offset, length);
    posix_fadvise(f.fd, range.from, range.n, POSIX_FADV_DONTNEED);
#else
    (void) f, (void) offset, (void) length;
#endif
}

void DiskSource::Free::operator()(char * p) const { std::free(p); }

// There is one: each thread has at most one job, and at most two more are half read, a speculative one and one that was
// promoted.
void DiskSource::lend(ReadJob & job) {
    if (job.dst) return;
    job.lent = job.dst = free_buffers_.back();
    free_buffers_.pop_back();
}

void DiskSource::take_back(ReadJob & job) {
    if (job.lent) free_buffers_.push_back(job.lent);
    job.lent = nullptr;
}

DiskSource::~DiskSource() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
    }
    wake_.notify_all();
    for (auto & t : threads_) t.join();
    for (auto & f : files_) {
        if (f.fd >= 0) ::close(f.fd);
    }
}

void DiskSource::submit(const ReadJob & job) {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        (job.soon ? soon_ : queue_).push_back(job);
    }
    wake_.notify_one();
}

void DiskSource::promote(int64_t first_tag, int64_t end_tag) {
    std::lock_guard<std::mutex> lock(mutex_);
    std::deque<ReadJob> rest, first;
    for (ReadJob & j : soon_) {
        const bool mine = j.tag >= first_tag && j.tag < end_tag;
        if (mine) j.soon = false;
        (mine ? first : rest).push_back(j);
    }
    soon_.swap(rest);
    queue_.insert(queue_.begin(), first.begin(), first.end());
    if (soon_tag_ >= first_tag && soon_tag_ < end_tag) {
        soon_promoted_ = true;
        soon_cancelled_ = false;
    }
    wake_.notify_all();
}

std::vector<int64_t> DiskSource::cancel(int64_t first_tag, int64_t end_tag) {
    std::lock_guard<std::mutex> lock(mutex_);
    std::vector<int64_t> tags;
    std::deque<ReadJob> rest;
    for (ReadJob & j : soon_) {
        if (j.tag >= first_tag && j.tag < end_tag) {
            take_back(j);
            tags.push_back(j.tag);
        } else {
            rest.push_back(j);
        }
    }
    soon_.swap(rest);
    if (soon_tag_ >= first_tag && soon_tag_ < end_tag && !soon_promoted_) soon_cancelled_ = true;
    return tags;
}

void DiskSource::pace(int64_t bytes_per_second) {
    std::lock_guard<std::mutex> lock(mutex_);
    pace_ = bytes_per_second;
    if (pace_ <= 0) paced_until_ = {};  // reads that start now do not wait for the slow disk that was
}

SourceTotals DiskSource::totals() {
    using namespace std::chrono;
    SourceTotals t;
    t.bytes = bytes_;
    t.reads = reads_;
    t.read_busy_ns = busy_ns_;
    t.soon_bytes = soon_bytes_;
    t.soon_busy_ns = soon_busy_ns_;
    for (const File & f : files_) t.direct_files += f.direct;
    t.lent_bytes = largest_lent_ * static_cast<int64_t>(buffers_.size());
    std::lock_guard<std::mutex> lock(mutex_);
    t.busy_ns = disk_busy_ns_ + (running_ ? duration_cast<nanoseconds>(steady_clock::now() - running_since_).count() : 0);
    return t;
}

// When a read of this length that starts now may end; see pace().
std::chrono::steady_clock::time_point DiskSource::reserve(int64_t length) {
    using namespace std::chrono;
    if (pace_ > 0) {
        const auto ns = static_cast<int64_t>(1e9 * static_cast<double>(length) / static_cast<double>(pace_));
        paced_until_ = std::max(paced_until_, steady_clock::now()) + nanoseconds(ns);
    }
    return paced_until_;
}

std::string DiskSource::read_paced(const ReadJob & job, std::chrono::steady_clock::time_point until, int64_t & got) {
    const auto t0 = std::chrono::steady_clock::now();
    std::string error = read(job, got);
    std::this_thread::sleep_until(until);  // long past when nothing paces
    busy_ns_ += std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - t0).count();
    return error;
}

// Part by part, as long as nothing is needed. False: the rest is back in a queue. `lock` is held on entry and exit.
bool DiskSource::read_soon(ReadJob & job, std::unique_lock<std::mutex> & lock, std::string & error) {
    soon_tag_ = job.tag;
    soon_promoted_ = soon_cancelled_ = false;
    bool ended = true;
    for (;;) {
        ReadJob part = job;
        part.length = std::min(job.length, SOON_BYTES);
        part.needed = std::min(job.needed, part.length);
        const auto until = reserve(part.length);
        lock.unlock();
        int64_t got = 0;
        const auto t0 = std::chrono::steady_clock::now();
        error = read_paced(part, until, got);
        soon_busy_ns_ += std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - t0).count();
        soon_bytes_ += got;
        lock.lock();
        job.offset += part.length;
        job.dst += part.length;
        job.length -= part.length;
        job.needed -= part.needed;
        if (!error.empty() || job.needed <= 0) break;
        if (soon_cancelled_) {
            error = CANCELLED;
            break;
        }
        if (!soon_promoted_ && queue_.empty() && running_ == 1 && !stop_) continue;
        job.soon = !soon_promoted_;
        (soon_promoted_ ? queue_ : soon_).push_front(job);
        ended = false;
        break;
    }
    soon_tag_ = -1;
    return ended;
}

void DiskSource::work() {
    using namespace std::chrono;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
        wake_.wait(lock, [this] { return stop_ || !queue_.empty() || soon_may_start(); });
        if (stop_) return;
        std::deque<ReadJob> & from = queue_.empty() ? soon_ : queue_;
        ReadJob job = from.front();
        from.pop_front();
        lend(job);
        if (running_++ == 0) running_since_ = steady_clock::now();
        std::string error;
        bool ended = true;
        if (job.soon) {
            ended = read_soon(job, lock, error);
        } else {
            const auto until = reserve(job.length);
            lock.unlock();
            int64_t got = 0;
            error = read_paced(job, until, got);
            lock.lock();
        }
        if (--running_ == 0) disk_busy_ns_ += duration_cast<nanoseconds>(steady_clock::now() - running_since_).count();
        if (soon_may_start()) wake_.notify_one();  // while this thread is busy with what came
        if (!ended) continue;
        lock.unlock();
        if (job.lent) job.dst = job.lent;  // read_soon moves dst on
        on_done_(job, error);
        lock.lock();
        take_back(job);
    }
}

std::string DiskSource::read(const ReadJob & job, int64_t & got) {
    File & f = files_[static_cast<size_t>(job.file)];
    while (got < job.length) {
        [[maybe_unused]] const bool was_direct = f.direct;  // another thread may give direct reads up meanwhile
        const ssize_t n = pread(f.fd, job.dst + got, static_cast<size_t>(job.length - got), job.offset + got);
        if (n > 0) {
            got += n;
            // A direct read that stops off the block grid has met the end of the file.
            if (got >= job.needed && n % READ_ALIGN != 0) break;
            continue;
        }
        if (n == 0) break;
        if (errno == EINTR) continue;
#ifdef O_DIRECT
        if (errno == EINVAL && was_direct) {
            // The file system took O_DIRECT at open but not this read: read through the cache and drop it after.
            fcntl(f.fd, F_SETFL, fcntl(f.fd, F_GETFL) & ~O_DIRECT);
            f.direct = false;
            read_at_random(f.fd);
            continue;
        }
#endif
        return "read of " + std::to_string(job.length) + " bytes at " + std::to_string(job.offset) +
               " failed: " + strerror(errno);
    }
    bytes_ += got;
    reads_ += 1;
    if (!f.direct) drop_cached(f, job.offset, job.length);
    if (got < job.needed) {
        return "needs bytes " + std::to_string(job.offset) + "-" + std::to_string(job.offset + job.needed) +
               " but the file ends at " + std::to_string(job.offset + got) + "; it looks cut short";
    }
    return {};
}

}  // namespace moe_edge
