// Parts of packed experts, kept in memory as they are stored: the packed cache. A unit may have two, see Part; a product
// cannot use them, but a unit of which a part is here needs only the rest read, and one that is all here needs no read.
// Bytes come from the memory of the expert arena. Which units have parts is the scheduler's to say; a part has a place
// before it has bytes. Owned by Model; places change under its mutex only, and never while the unit is being delivered.
#pragma once
#include <array>
#include <cstdint>
#include <vector>

#include "arena.h"

namespace moe_edge {

// HEAD: of each packed piece what lies before its cut (codec.h), the exponents. TAIL: what lies behind it, signs and
// mantissas. A piece that has no cut is all HEAD.
enum Part { HEAD = 0, TAIL = 1 };
constexpr int N_PARTS = 2;
constexpr uint32_t HEAD_BIT = 1, TAIL_BIT = 2, BOTH_PARTS = 3;
using PartBytes = std::array<int64_t, N_PARTS>;

class Parts {
public:
    // bytes: of each unit, in whole pages. Throws std::runtime_error when the address space cannot be reserved.
    Parts(const std::vector<PartBytes> & bytes, int64_t budget_bytes, const Pages & pages);

    // Give a part a place; false when the budget has no room for it. Nothing to do for one of no bytes.
    bool hold(int unit, int part);
    void drop(int unit, int part);
    bool has_place(int unit, int part) const { return state(unit).slot[static_cast<size_t>(part)] >= 0; }
    char * data(int unit, int part) const { return arena_.data(state(unit).slot[static_cast<size_t>(part)]); }
    // Bit p: the part of pieces[p] is in its place.
    uint32_t filled(int unit, int part) const { return state(unit).filled[static_cast<size_t>(part)]; }
    void fill(int unit, int part, uint32_t bit) { states_[static_cast<size_t>(unit)].filled[static_cast<size_t>(part)] |= bit; }

    int64_t committed_bytes() const { return static_cast<int64_t>(arena_.committed_bytes()); }
    int64_t peak_committed_bytes() const { return static_cast<int64_t>(arena_.peak_committed_bytes()); }

private:
    struct State {
        std::array<int, N_PARTS> slot{-1, -1};
        std::array<uint32_t, N_PARTS> filled{0, 0};
    };
    const State & state(int unit) const { return states_[static_cast<size_t>(unit)]; }

    std::vector<PartBytes> bytes_;
    std::vector<State> states_;
    Arena arena_;
};

}  // namespace moe_edge
