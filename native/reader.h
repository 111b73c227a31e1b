// Reads expert bytes from disk past the page cache: a small pool of threads that sleep while there is nothing to do.
// One Reader belongs to one Model. submit() may be called from any thread; the callback runs on a reader thread.
// Two queues: needed now, and maybe soon. A speculative job is read only while no needed one is queued or being read, one
// at a time and SOON_BYTES at a time, so a needed read never waits behind more than that. Then the rest of it waits.
#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace moe_edge {

// Direct reads want offset, length and buffer aligned to the device's block; 4096 covers the disks of today.
constexpr int64_t READ_ALIGN = 4096;

constexpr int64_t SOON_BYTES = 512 << 10;

struct ReadJob {
    int file = 0;
    int64_t offset = 0;      // multiple of READ_ALIGN
    int64_t length = 0;      // multiple of READ_ALIGN; may reach past the end of the file
    int64_t needed = 0;      // bytes from offset that must be there
    char * dst = nullptr;    // aligned to READ_ALIGN, room for length bytes
    int64_t tag = 0;         // the caller's
    bool soon = false;       // nobody waits for it yet: read when nothing else is to be read
};

class Reader {
public:
    // on_done(job, error): error is empty when every needed byte is in dst; else what is wrong, without the file's name.
    // Of the job only file and tag are as submitted. The destructor forgets what has not begun, calling nobody.
    using Done = std::function<void(const ReadJob &, const std::string &)>;
    // Throws std::runtime_error naming the file that cannot be opened.
    Reader(const std::vector<std::string> & paths, int n_threads, bool direct, Done on_done);
    ~Reader();
    void submit(const ReadJob & job);
    // Of the speculative jobs with first_tag <= tag < end_tag: move them before the needed ones; or forget them, calling
    // nobody: their tags. One that is being read goes on until a multiple of SOON_BYTES, and on_done is told CANCELLED
    // unless it ended or was promoted before. A promotion between the last part and that call comes too late: whoever is
    // told CANCELLED must look again whether the job is needed.
    static const std::string CANCELLED;
    void promote(int64_t first_tag, int64_t end_tag);
    std::vector<int64_t> cancel(int64_t first_tag, int64_t end_tag);
    // Take as long as a disk of this speed would that serves one read after the other; 0: as fast as it goes.
    void pace(int64_t bytes_per_second);

    int n_files() const { return static_cast<int>(files_.size()); }
    const std::string & path(int file) const { return files_[static_cast<size_t>(file)].path; }
    bool direct(int file) const { return files_[static_cast<size_t>(file)].direct; }
    int64_t bytes_read() const { return bytes_; }
    int64_t reads() const { return reads_; }
    double busy_seconds() const { return static_cast<double>(busy_ns_) * 1e-9; }
    int64_t soon_bytes() const { return soon_bytes_; }     // read in parts, while speculative
    int64_t soon_busy_ns() const { return soon_busy_ns_; }
    int64_t disk_busy_ns();                                // time in which at least one read was under way

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

    std::vector<File> files_;
    Done on_done_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::deque<ReadJob> queue_, soon_;
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
