// Threads for work that needs no read: packed pieces that lie in memory are unpacked here, while others are read. They
// sleep while there is nothing to do. One belongs to one Model; every function may be called from any thread.
// Speculative work is begun only while no needed work waits.
#pragma once
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace moe_edge {

class Unpackers {
public:
    using Work = std::function<void(int64_t tag)>;

    Unpackers(int n_threads, Work work);
    ~Unpackers();  // forgets what has not begun
    Unpackers(const Unpackers &) = delete;
    Unpackers & operator=(const Unpackers &) = delete;

    void submit(int64_t tag, bool soon);
    // Of the speculative work with first_tag <= tag < end_tag that has not begun: do it before what is needed, or forget
    // it and return its tags.
    void promote(int64_t first_tag, int64_t end_tag);
    std::vector<int64_t> cancel(int64_t first_tag, int64_t end_tag);

private:
    void run();
    std::vector<int64_t> take_soon(int64_t first_tag, int64_t end_tag);  // under mutex_

    Work work_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::deque<int64_t> needed_, soon_;
    bool stop_ = false;
    std::vector<std::thread> threads_;
};

}  // namespace moe_edge
