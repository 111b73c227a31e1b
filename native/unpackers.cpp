#include "unpackers.h"

#include <utility>

namespace moe_edge {

Unpackers::Unpackers(int n_threads, Work work) : work_(std::move(work)) {
    for (int i = 0; i < n_threads; i++) threads_.emplace_back([this] { run(); });
}

Unpackers::~Unpackers() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
    }
    wake_.notify_all();
    for (auto & t : threads_) t.join();
}

void Unpackers::submit(int64_t tag, bool soon) {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        (soon ? soon_ : needed_).push_back(tag);
    }
    wake_.notify_one();
}

std::vector<int64_t> Unpackers::take_soon(int64_t first_tag, int64_t end_tag) {
    std::vector<int64_t> taken;
    std::deque<int64_t> rest;
    for (int64_t tag : soon_) {
        if (tag >= first_tag && tag < end_tag) {
            taken.push_back(tag);
        } else {
            rest.push_back(tag);
        }
    }
    soon_.swap(rest);
    return taken;
}

void Unpackers::promote(int64_t first_tag, int64_t end_tag) {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        const std::vector<int64_t> tags = take_soon(first_tag, end_tag);
        needed_.insert(needed_.begin(), tags.begin(), tags.end());
    }
    wake_.notify_all();
}

std::vector<int64_t> Unpackers::cancel(int64_t first_tag, int64_t end_tag) {
    std::lock_guard<std::mutex> lock(mutex_);
    return take_soon(first_tag, end_tag);
}

void Unpackers::run() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
        wake_.wait(lock, [this] { return stop_ || !needed_.empty() || !soon_.empty(); });
        if (stop_) return;
        std::deque<int64_t> & from = needed_.empty() ? soon_ : needed_;
        const int64_t tag = from.front();
        from.pop_front();
        lock.unlock();
        work_(tag);
        lock.lock();
    }
}

}  // namespace moe_edge
