// What the stress tests share: a file of known bytes, a failure that ends the process, waiting with a limit.
#pragma once
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <random>
#include <string>
#include <thread>
#include <vector>

#define CHECK(condition, ...)                                                   \
    do {                                                                        \
        if (!(condition)) {                                                     \
            fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition);     \
            fprintf(stderr, __VA_ARGS__);                                       \
            fputc('\n', stderr);                                                \
            std::_Exit(1);                                                      \
        }                                                                       \
    } while (0)

using Clock = std::chrono::steady_clock;
using Random = std::mt19937;

inline int64_t pick(Random & random, int64_t low, int64_t high) {  // both included
    return std::uniform_int_distribution<int64_t>(low, high)(random);
}

inline double seconds_since(Clock::time_point t) { return std::chrono::duration<double>(Clock::now() - t).count(); }
inline void sleep_us(int64_t us) { std::this_thread::sleep_for(std::chrono::microseconds(us)); }

template <class Condition>
void wait_for(Condition condition, const char * what) {
    const auto t0 = Clock::now();
    while (!condition()) {
        CHECK(seconds_since(t0) < 20, "hangs: %s", what);
        sleep_us(50);
    }
}

// A file of n random bytes, and the bytes.
inline std::vector<char> write_file(const std::string & path, int64_t n) {
    std::vector<char> bytes(static_cast<size_t>(n));
    uint64_t x = 88172645463325252ULL;
    for (char & b : bytes) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        b = static_cast<char>(x >> 32);
    }
    std::ofstream f(path, std::ios::binary);
    f.write(bytes.data(), n);
    f.close();
    CHECK(f.good(), "cannot write %s", path.c_str());
    return bytes;
}
