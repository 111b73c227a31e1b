// The expert arena: slots in one reserved range of address space. A slot holds one unit (an expert at one level).
// Reserving costs nothing; reading into a slot commits its pages, and committed bytes never exceed the budget.
// A released slot keeps its pages for the next unit, so that a miss at a full cache faults in no zeroed page;
// pages are returned only when units of other sizes need the bytes. Owned by Model; one thread at a time changes it.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#include "pages.h"

namespace moe_edge {

class Arena {
public:
    // slot_bytes: the largest unit. Throws std::runtime_error when the address space cannot be reserved.
    Arena(size_t slot_bytes, size_t n_slots, size_t budget_bytes, const Pages & pages);
    ~Arena();
    Arena(const Arena &) = delete;
    Arena & operator=(const Arena &) = delete;

    // A slot with room for need_bytes, or -1 when that would break the budget, or when the system refuses to take pages
    // back: then error() tells.
    int acquire(size_t need_bytes);
    void release(int slot);
    char * data(int slot) const { return base_ + static_cast<size_t>(slot) * stride_; }

    // Commit pages in the order of their addresses until `stop`, so that the first units need not wait for the system to
    // clear them: of as many slots as the budget is sure to fill, what the smallest unit takes, which each of them will
    // need. Not while anybody else changes the arena.
    void commit_early(size_t smallest_unit_bytes, const std::atomic<bool> & stop);

    const std::string & error() const { return error_; }
    size_t committed_bytes() const { return committed_; }
    size_t peak_committed_bytes() const { return peak_; }

private:
    struct Slot {
        size_t committed = 0;  // bytes of pages that have been handed out and not returned
        size_t used = 0;       // bytes the present unit needs; 0 when free
    };
    void trim(int slot, size_t keep_bytes);
    void make_room(size_t growth, int keep);
    void commit(int slot, size_t growth);

    Pages pages_;
    void * reserved_ = nullptr;  // the whole mapping; base_ is its first page border
    size_t reserved_bytes_ = 0;
    char * base_ = nullptr;
    std::string error_;
    size_t stride_ = 0, budget_ = 0;
    std::atomic<size_t> committed_{0}, peak_{0};  // counters are read at any time
    std::vector<Slot> slots_;
    std::vector<int> free_;
};

// A thread in commit_early(), from its making until it is destroyed, which takes no longer than a MiB does. It uses the time
// in which a model is loaded and a person types: a prompt on all cores would pay for the clearing otherwise.
class EarlyPages {
public:
    EarlyPages(Arena & arena, size_t smallest_unit_bytes);
    ~EarlyPages();
    EarlyPages(const EarlyPages &) = delete;
    EarlyPages & operator=(const EarlyPages &) = delete;

private:
    std::atomic<bool> stop_{false};
    std::thread thread_;
};

}  // namespace moe_edge
