// The source of experts that lie in files: reads them past the page cache, with a small pool of threads that sleep while
// there is nothing to do. One belongs to one Model. submit() may be called from any thread.
// Two queues: needed now, and maybe soon. A speculative job is read only while no needed one is queued or being read, one
// at a time and SOON_BYTES at a time, so a needed read never waits behind more than that. Then the rest of it waits.
#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "pages.h"
#include "source.h"

namespace moe_edge {

constexpr int64_t SOON_BYTES = 512 << 10;

class DiskSource final : public ExpertSource {
public:
    // largest_lent: the longest job that will come without a dst; 0: none will.
    // Throws std::runtime_error naming the file that cannot be opened.
    DiskSource(const std::vector<std::string> & paths, int n_threads, bool direct, int64_t largest_lent, const Pages & pages,
               Done on_done);
    ~DiskSource() override;
    void submit(const ReadJob & job) override;
    void promote(int64_t first_tag, int64_t end_tag) override;
    std::vector<int64_t> cancel(int64_t first_tag, int64_t end_tag) override;
    void pace(int64_t bytes_per_second) override;
    std::string name(int file) const override { return files_[static_cast<size_t>(file)].path; }
    SourceTotals totals() override;

private:
    struct File {
        std::string path;
        int fd = -1;
        std::atomic<bool> direct{false};
        File() = default;
        File(File && o) noexcept : path(std::move(o.path)), fd(o.fd), direct(o.direct.load()) { o.fd = -1; }
    };
    void work();
    bool soon_may_start() const { return !soon_.empty() && queue_.empty() && running_ == 0; }
    std::string read(const ReadJob & job, int64_t & got);
    std::string read_paced(const ReadJob & job, std::chrono::steady_clock::time_point until, int64_t & got);
    std::chrono::steady_clock::time_point reserve(int64_t length);
    bool read_soon(ReadJob & job, std::unique_lock<std::mutex> & lock, std::string & error);
    void open(const std::string & path, bool direct);
    void drop_cached(const File & f, int64_t offset, int64_t length) const;
    void lend(ReadJob & job);        // under mutex_, like the next
    void take_back(ReadJob & job);

    std::vector<File> files_;
    Done on_done_;
    Pages pages_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::deque<ReadJob> queue_, soon_;
    // Buffers for jobs without a dst. A thread has at most one job, and one speculative job may wait half read.
    struct Free { void operator()(char * p) const; };
    std::vector<std::unique_ptr<char, Free>> buffers_;
    std::vector<char *> free_buffers_;
    int64_t largest_lent_;
    int running_ = 0;
    int64_t soon_tag_ = -1;  // of the speculative job that is being read, and what is to become of it
    bool soon_promoted_ = false, soon_cancelled_ = false;
    std::chrono::steady_clock::time_point running_since_, paced_until_;
    int64_t pace_ = 0;
    int64_t disk_busy_ns_ = 0;
    bool stop_ = false;
    std::vector<std::thread> threads_;
    std::atomic<int64_t> bytes_{0}, reads_{0}, busy_ns_{0}, soon_bytes_{0}, soon_busy_ns_{0};
};

}  // namespace moe_edge
