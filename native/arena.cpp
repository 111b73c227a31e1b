#include "arena.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>

namespace moe_edge {

size_t page_bytes() {
    static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    return bytes;
}

static size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

Arena::Arena(size_t slot_bytes, size_t n_slots, size_t budget_bytes)
    : stride_(round_up(slot_bytes, page_bytes())), budget_(budget_bytes), slots_(n_slots) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS;
#ifdef MAP_NORESERVE
    flags |= MAP_NORESERVE;
#endif
    void * p = mmap(nullptr, std::max(stride_ * n_slots, page_bytes()), PROT_READ | PROT_WRITE, flags, -1, 0);
    if (p == MAP_FAILED) {
        throw std::runtime_error("cannot reserve " + std::to_string(stride_ * n_slots) +
                                 " bytes of address space for the expert arena: " + strerror(errno));
    }
    base_ = static_cast<char *>(p);
#ifdef MADV_NOHUGEPAGE
    // A huge page would commit 2 MiB for the first byte of it: the budget counts what is committed.
    madvise(base_, stride_ * n_slots, MADV_NOHUGEPAGE);
#endif
    free_.reserve(n_slots);
    for (size_t i = n_slots; i-- > 0;) free_.push_back(static_cast<int>(i));
}

Arena::~Arena() { munmap(base_, std::max(stride_ * slots_.size(), page_bytes())); }

void Arena::trim(int slot, size_t keep_bytes) {
    Slot & s = slots_[slot];
    if (s.committed <= keep_bytes) return;
    char * from = data(slot) + keep_bytes;
    const size_t n = s.committed - keep_bytes;
#ifdef __APPLE__
    // MADV_DONTNEED does not return anonymous pages on macOS; a fresh mapping does.
    mmap(from, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
#else
    madvise(from, n, MADV_DONTNEED);
#endif
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
static void populate(char * from, size_t n) {
#ifdef __linux__
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
    madvise(from, n, MADV_POPULATE_WRITE);  // kernels before 5.14 refuse: the reads fault the pages in then
#else
    (void) from;
    (void) n;
#endif
}

int Arena::acquire(size_t need_bytes) {
    if (free_.empty()) return -1;
    const size_t need = round_up(need_bytes, page_bytes());
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
        populate(data(slot) + s.committed, growth);
        s.committed = need;
        committed_ += growth;
        peak_ = std::max(peak_, committed_);
    }
    s.used = need;
    free_.erase(free_.begin() + static_cast<std::ptrdiff_t>(best));
    return slot;
}

void Arena::release(int slot) {
    slots_[slot].used = 0;
    free_.push_back(slot);
}

}  // namespace moe_edge
