// The expert arena: slots in one reserved range of address space. A slot holds one unit (an expert at one level).
// Reserving costs nothing; reading into a slot commits its pages, and committed bytes never exceed the budget.
// A released slot keeps its pages for the next unit, so that a miss at a full cache faults in no zeroed page;
// pages are returned only when units of other sizes need the bytes. Owned by Model, called under its mutex.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
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

    Pages pages_;
    void * reserved_ = nullptr;  // the whole mapping; base_ is its first page border
    size_t reserved_bytes_ = 0;
    char * base_ = nullptr;
    std::string error_;
    size_t stride_ = 0, budget_ = 0, committed_ = 0, peak_ = 0;
    std::vector<Slot> slots_;
    std::vector<int> free_;
};

}  // namespace moe_edge
