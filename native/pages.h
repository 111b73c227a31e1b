// Pages of the system's memory, as the arena, the units and the reader round to them: one value, handed down from the
// model's description, so that 16 KiB pages (Raspberry Pi 5, Apple silicon) can be tried on a machine with smaller ones.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace moe_edge {

struct Pages {
    int64_t bytes = 0;                               // a power of two, and a multiple of the system's
    // Return these whole pages to the system, so that they read as zeros when touched again. 0, or an errno.
    int (*give_back)(char * from, size_t n) = nullptr;

    static int64_t system_bytes();                   // of the system's own pages, which may be smaller

    int64_t floor(int64_t n) const { return n / bytes * bytes; }
    int64_t ceil(int64_t n) const { return (n + bytes - 1) / bytes * bytes; }
    struct Range { int64_t from, n; };
    Range around(int64_t from, int64_t n) const {  // the whole pages that these bytes touch
        return {floor(from), ceil(from + n) - floor(from)};
    }
};

// The system's pages, or larger ones of so many bytes. Throws std::runtime_error when the system cannot have such.
Pages system_pages(int64_t bytes = 0);

}  // namespace moe_edge
