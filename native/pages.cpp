#include "pages.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <stdexcept>

namespace moe_edge {

static int give_back_to_system(char * from, size_t n) {
#ifdef __APPLE__
    // MADV_DONTNEED does not return anonymous pages on macOS; a fresh mapping in their place does.
    return mmap(from, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == from ? 0 : errno;
#else
    return madvise(from, n, MADV_DONTNEED) == 0 ? 0 : errno;
#endif
}

int64_t Pages::system_bytes() {
    static const auto system = static_cast<int64_t>(sysconf(_SC_PAGESIZE));
    return system;
}

Pages system_pages(int64_t bytes) {
    const int64_t system = Pages::system_bytes();
    if (bytes == 0) bytes = system;
    if (bytes < system || (bytes & (bytes - 1)) != 0) {
        throw std::runtime_error("pages of " + std::to_string(bytes) + " bytes cannot be had: the system has pages of " +
                                 std::to_string(system) + ", and larger ones are a power of two");
    }
    return {bytes, give_back_to_system};
}

}  // namespace moe_edge
