// Products by ggml's repacked kernels, which interleave the rows of a matrix and pass over several at a time. A matrix is
// repacked where it lies as soon as it has been read, and takes no more room. Files keep their form.
// ggml's repacked products round otherwise than its vec_dot, and stock llama.cpp takes them for one row as for many. So a
// matrix is multiplied either this way or row by row, whatever the number of rows: its bits are those of stock with that
// matrix in the buffer type CPU_REPACK, or without. Everything goes through ggml's public interface.
#pragma once
#include <cstdint>
#include <vector>

#include "few_rows.h"
#include "ggml-backend.h"
#include "ggml.h"

namespace moe_edge {

// ggml's buffer types besides ordinary memory, as llama.cpp finds them: null-terminated, of a vector that ggml makes once and
// llama.cpp reads at every load that wants them; or null.
ggml_backend_buffer_type_t * extra_buffer_types();
bool is_repacked_buffer_type(ggml_backend_buffer_type_t type);
// CPU_REPACK, or null where ggml has none.
ggml_backend_buffer_type_t repacked_buffer_type();

// How a matrix is multiplied. PLAIN: as it is. GEMV: repacked, each row of the input by itself, as stock does with experts.
// GEMM: repacked, rows of the input together; only where that gives the bits of GEMV, which is tried on this machine.
enum class Kernel { PLAIN, GEMV, GEMM };

// repacking: an me_repacking of capi.h. Asks ggml once for each type; any thread.
Kernel kernel_of(ggml_type type, int64_t n_cols, int64_t n_weight_rows, int32_t repacking);

// Interleave the rows of a matrix that has just been read, as its kernel wants them; any thread. Takes REPACK_BYTES, or
// eight rows if those are more, on each thread that calls it.
constexpr size_t REPACK_BYTES = 64u << 10;
void repack_in_place(ggml_type type, int64_t n_cols, int64_t n_weight_rows, char * weights);

struct DotTask {  // out[0..n_weight_rows) = weights . x, for the rows of one group
    const char * weights;
    ggml_type type;
    Kernel kernel;
    int64_t n_cols, n_weight_rows;
    const Operand * operands;  // their x: F32 unless the kernel is PLAIN, then what its vec_dot takes
    int64_t n_operands;
};

// Multiplies a part of a repacked matrix on one thread. Its memory grows at the first product, to bytes() at most.
class Tile {
public:
    Tile();
    ~Tile();
    Tile(const Tile &) = delete;
    Tile & operator=(const Tile &) = delete;

    // Weight rows that are multiplied at a time.
    static int64_t rows(ggml_type type, int64_t n_cols);
    static int64_t bytes(ggml_type type, int64_t n_cols);
    // Weight rows [from, to) of the task, at most rows() of them, `from` a multiple of 8. False when ggml fails.
    bool multiply(const DotTask & t, int64_t from, int64_t to);

private:
    bool multiply_operands(const DotTask & t, int64_t from, int64_t to, const Operand * operands, int64_t n);

    ggml_backend_t cpu_ = nullptr;
    ggml_threadpool * pool_ = nullptr;
    std::vector<char> meta_, x_, out_;
};

// A callback of ggml's log that gives what it hears to the callback that `user` is, without the line that ggml writes for
// each matrix it repacks.
void log_without_repacking(ggml_log_level level, const char * text, void * user);

}  // namespace moe_edge
