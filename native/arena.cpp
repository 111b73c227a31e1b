#include "arena.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <system_error>

namespace moe_edge {

constexpr size_t EARLY_BYTES = 1u << 20;  // committed between two looks at `stop`: about 0.3 ms

static size_t whole(const Pages & pages, size_t n) { return static_cast<size_t>(pages.ceil(static_cast<int64_t>(n))); }

Arena::Arena(size_t slot_bytes, size_t n_slots, size_t budget_bytes, const Pages & pages)
    : pages_(pages), stride_(whole(pages, slot_bytes)), budget_(budget_bytes), slots_(n_slots) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS;
#ifdef MAP_NORESERVE
    flags |= MAP_NORESERVE;
#endif
    const auto page = static_cast<size_t>(pages.bytes);
    reserved_bytes_ = stride_ * n_slots + page;  // the system aligns to its own pages, which may be smaller
    reserved_ = mmap(nullptr, reserved_bytes_, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (reserved_ == MAP_FAILED) {
        throw std::runtime_error("cannot reserve " + std::to_string(stride_ * n_slots) +
                                 " bytes of address space for the expert arena: " + strerror(errno));
    }
    base_ = static_cast<char *>(reserved_);
    base_ += (page - reinterpret_cast<uintptr_t>(base_) % page) % page;
#ifdef MADV_NOHUGEPAGE
    // A huge page would commit 2 MiB for the first byte of it: the budget counts what is committed.
    madvise(reserved_, reserved_bytes_, MADV_NOHUGEPAGE);
#endif
    free_.reserve(n_slots);
    for (size_t i = n_slots; i-- > 0;) free_.push_back(static_cast<int>(i));
}

Arena::~Arena() { munmap(reserved_, reserved_bytes_); }

void Arena::trim(int slot, size_t keep_bytes) {
    Slot & s = slots_[slot];
    if (s.committed <= keep_bytes) return;
    char * from = data(slot) + keep_bytes;
    const size_t n = s.committed - keep_bytes;
    const int wrong = pages_.give_back(from, n);
    if (wrong != 0) {  // they stay counted, so the budget holds
        error_ = "the system does not take " + std::to_string(n) + " bytes of the expert arena back: " + strerror(wrong);
        return;
    }
    s.committed = keep_bytes;
    committed_ -= n;
}

void Arena::make_room(size_t growth, int keep) {
    for (int f : free_) {
        if (committed_ + growth <= budget_) return;
        if (f != keep) trim(f, 0);
    }
    for (size_t i = 0; i < slots_.size() && committed_ + growth > budget_; i++) {
        if (static_cast<int>(i) != keep) trim(static_cast<int>(i), slots_[i].used);
    }
}

// Fault the pages in here, one thread in address order, so that they are neighbours in physical memory as well. Left to
// the reader threads they come out interleaved, and products on them ran 10 to 20 % slower (LOG 2026-11-22).
static void populate(char * from, size_t n, const Pages & pages) {
#ifdef __linux__
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
    if (madvise(from, n, MADV_POPULATE_WRITE) == 0) return;  // kernels before 5.14 refuse
#endif
    const auto page = static_cast<size_t>(pages.system_bytes());
    for (size_t at = 0; at < n; at += page) *const_cast<volatile char *>(from + at) = 0;  // nothing is there yet
}

void Arena::commit(int slot, size_t growth) {
    Slot & s = slots_[static_cast<size_t>(slot)];
    populate(data(slot) + s.committed, growth, pages_);
    s.committed += growth;
    committed_ += growth;
    peak_ = std::max<size_t>(peak_, committed_);
}

void Arena::commit_early(size_t smallest_unit_bytes, const std::atomic<bool> & stop) {
    const size_t need = std::min(whole(pages_, smallest_unit_bytes), stride_);
    const size_t n = std::min(slots_.size(), budget_ / std::max<size_t>(stride_, 1));
    for (size_t i = 0; i < n; i++) {
        while (slots_[i].committed < need) {
            const size_t growth = std::min(need - slots_[i].committed, EARLY_BYTES);
            if (stop || committed_ + growth > budget_) return;
            commit(static_cast<int>(i), growth);
        }
    }
}

int Arena::acquire(size_t need_bytes) {
    if (free_.empty()) return -1;
    const size_t need = whole(pages_, need_bytes);
    // Best fit among free slots: least growth first, then least slack. Few are free at a time.
    size_t best = free_.size() - 1;
    auto cost = [&](int slot) {
        const size_t c = slots_[slot].committed;
        return c >= need ? c - need : (need - c) * 2 + stride_;
    };
    for (size_t i = free_.size(), seen = 0; i-- > 0 && seen < 64; seen++) {
        if (cost(free_[i]) < cost(free_[best])) best = i;
    }
    const int slot = free_[best];
    Slot & s = slots_[slot];
    if (s.committed < need) {
        const size_t growth = need - s.committed;
        if (committed_ + growth > budget_) make_room(growth, slot);
        if (committed_ + growth > budget_) return -1;
        commit(slot, growth);
    }
    s.used = need;
    free_.erase(free_.begin() + static_cast<std::ptrdiff_t>(best));
    return slot;
}

void Arena::release(int slot) {
    slots_[slot].used = 0;
    free_.push_back(slot);
}

EarlyPages::EarlyPages(Arena & arena, size_t smallest_unit_bytes) {
    try {
        thread_ = std::thread([this, &arena, smallest_unit_bytes] { arena.commit_early(smallest_unit_bytes, stop_); });
    } catch (const std::system_error &) {  // no thread is to be had: units commit their pages as they come
    }
}

EarlyPages::~EarlyPages() {
    stop_ = true;
    if (thread_.joinable()) thread_.join();
}

}  // namespace moe_edge
