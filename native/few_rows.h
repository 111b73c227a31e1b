// Products of one expert's weight rows with the rows of a group: a weight row's block is unpacked once for all of them,
// where ggml's `vec_dot` unpacks it once for each, and its tiled products first unpack many into memory, which few rows
// do not pay for. Every result is ggml's bit by bit: sums inside a block are of whole numbers, which are exact in any
// order, and the floats of the blocks are added in the order of the product that stock takes for that many rows. For types
// without tiled products that is `vec_dot`, for any number of rows: BF16 and F16 (float_rows_lanes.h), those with blocks of
// 32 weights (blocks_of_32.h). Rows that are no numbers (NaN) are the exception: nothing is promised for them.
// A kernel is used only where it gave ggml's bits in a trial in this process, since another build of ggml, or one for an
// older processor, may add in another order. x86-64 only; elsewhere there is none.
#pragma once
#include <cstdint>

#include "ggml.h"

namespace moe_edge {

struct Operand { const char * x; float * out; };  // a row in the vec_dot type of the weights; its products, by weight row

constexpr int FEW_ROWS = 7;                       // added as vec_dot does; more of them as tiled products do
constexpr int MOST_FEW_ROWS = 48;                 // above, ggml's tiled products are as fast
constexpr int64_t FEW_ROWS_BLOCKS = 64;           // widest row, in blocks of 256
constexpr int64_t FEW_ROWS_STEP = 64;             // rows of types without such blocks are a multiple of it

struct FewRowsTask {
    int64_t n_blocks;                 // of the type: of 256 columns, of 32, of one
    const char * weights;             // of the first weight row
    int64_t weight_row_bytes, n_weight_rows;
    const Operand * operands;         // n_rows of them; out is where the first weight row's product goes
    int n_rows;
};

using FewRowsKernel = void (*)(const FewRowsTask &);

// Whose order of additions. The last addition of a block in tiled products is a multiplication and an addition in C++:
// ggml's compiler made one rounding of it (FUSED) or left it two.
enum class RowOrder { VEC_DOT, TILED, TILED_FUSED };

// The kernels of an instruction set, null for what it has none for; whether this processor has the instructions.
// VEC_DOT takes 1 to FEW_ROWS rows, the others FEW_ROWS + 1 and more; those of types with one product take any number.
struct FewRowsSet {
    const char * name;
    bool (*usable)();
    FewRowsKernel (*kernel)(ggml_type type, RowOrder order);
};

// Fastest first; a null pointer ends them.
extern const FewRowsSet * const FEW_ROWS_SETS[];

// Whether the kernel gives ggml's bits on made-up weights and rows. ggml's CPU backend is initialised.
bool few_rows_agrees(FewRowsKernel kernel, ggml_type type, RowOrder order);

// Make the trials, if nobody has: a few milliseconds.
void try_few_rows();

// The kernel for weights of this type and width with that many rows; null: take ggml's product, since there is no kernel
// or it would not be faster (docs/LOG.md, "rows of one expert").
FewRowsKernel few_rows_kernel(ggml_type type, int64_t n_cols, int64_t n_rows);

// Weight rows [from, to) of a matrix times the rows; their out is where the matrix' first product goes. False, and nothing
// is done, where there is no kernel.
bool multiply_few_rows(ggml_type type, int64_t n_cols, const char * weights, int64_t from, int64_t to, const Operand * operands,
                       int64_t n_operands);

}  // namespace moe_edge
