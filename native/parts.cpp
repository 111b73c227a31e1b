#include "parts.h"

#include <algorithm>

namespace moe_edge {

static size_t largest(const std::vector<PartBytes> & bytes) {
    int64_t most = 1;
    for (const PartBytes & b : bytes) most = std::max({most, b[HEAD], b[TAIL]});
    return static_cast<size_t>(most);
}

// Places are as large as the largest part, in address space; what is committed is what parts take.
static size_t n_places(const std::vector<PartBytes> & bytes, int64_t budget) {
    int64_t least = INT64_MAX, n = 0;
    for (const PartBytes & b : bytes) {
        for (int64_t size : b) {
            if (size > 0) least = std::min(least, size);
            n += size > 0;
        }
    }
    return n == 0 ? 0 : static_cast<size_t>(std::min(n, budget / least + 1));
}

Parts::Parts(const std::vector<PartBytes> & bytes, int64_t budget_bytes, const Pages & pages)
    : bytes_(bytes), states_(bytes.size()),
      arena_(largest(bytes), n_places(bytes, budget_bytes), static_cast<size_t>(budget_bytes), pages) {}

bool Parts::hold(int unit, int part) {
    State & s = states_[static_cast<size_t>(unit)];
    const int64_t need = bytes_[static_cast<size_t>(unit)][static_cast<size_t>(part)];
    int & slot = s.slot[static_cast<size_t>(part)];
    if (need == 0 || slot >= 0) return true;
    slot = arena_.acquire(static_cast<size_t>(need));
    s.filled[static_cast<size_t>(part)] = 0;
    return slot >= 0;
}

void Parts::drop(int unit, int part) {
    State & s = states_[static_cast<size_t>(unit)];
    int & slot = s.slot[static_cast<size_t>(part)];
    if (slot < 0) return;
    arena_.release(slot);
    slot = -1;
    s.filled[static_cast<size_t>(part)] = 0;
}

}  // namespace moe_edge
