// Where the bytes of experts come from: the seam between the model, which knows units and slots, and what delivers them.
// The disk is the first source (disk_source.h). A source knows nothing of experts: it fills `dst` with the bytes that a
// job names and tells when they are there. What those bytes become is a codec's (codec.h).
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace moe_edge {

// Direct reads want offset, length and buffer aligned to the device's block; 4096 covers the disks of today.
constexpr int64_t READ_ALIGN = 4096;

struct ReadJob {
    int file = 0;
    int64_t offset = 0;      // multiple of READ_ALIGN
    int64_t length = 0;      // multiple of READ_ALIGN; may reach past the end of the file
    int64_t needed = 0;      // bytes from offset that must be there
    char * dst = nullptr;    // aligned to READ_ALIGN, room for length bytes; null: into a buffer of the source's, which Done
                             // finds here and may read until it returns
    int64_t tag = 0;         // the caller's
    bool soon = false;       // nobody waits for it yet: read when nothing else is to be read
    char * lent = nullptr;   // the source's own: the buffer that dst points into
};

struct SourceTotals {        // since the source was opened
    int64_t bytes = 0, reads = 0;
    int64_t read_busy_ns = 0;   // summed over the reads
    int64_t busy_ns = 0;        // time in which at least one read was under way
    int64_t soon_bytes = 0, soon_busy_ns = 0;  // of them, read while nobody waited
    int64_t direct_files = 0;   // files that are read past the page cache
    int64_t lent_bytes = 0;     // buffers for jobs without a dst
};

class ExpertSource {
public:
    // (job, error): error is empty when every needed byte is in dst; else what is wrong, without the file's name.
    // Of the job only file and tag are as submitted, and `dst` where the source lent none. It is called on a thread of the
    // source's, while others go on delivering: what it computes there costs no delivery.
    using Done = std::function<void(const ReadJob &, const std::string &)>;
    // What Done is told of a speculative job that was given up while it was read.
    static const std::string CANCELLED;

    virtual ~ExpertSource() = default;  // forgets what has not begun, calling nobody
    virtual void submit(const ReadJob & job) = 0;
    // Of the speculative jobs with first_tag <= tag < end_tag: move them before the needed ones; or forget them, calling
    // nobody, and return their tags. One that is being read may go on for a part of it; then Done is told CANCELLED
    // unless it ended or was promoted before. A promotion just before that call comes too late: whoever is told
    // CANCELLED must look again whether the job is needed.
    virtual void promote(int64_t first_tag, int64_t end_tag) = 0;
    virtual std::vector<int64_t> cancel(int64_t first_tag, int64_t end_tag) = 0;
    // Take as long as a source of this speed would that serves one job after the other; 0: as fast as it goes.
    virtual void pace(int64_t bytes_per_second) = 0;
    virtual std::string name(int file) const = 0;  // for messages
    virtual SourceTotals totals() = 0;
};

}  // namespace moe_edge
