// The arithmetic of one MoE layer at the real width, on ggml's own kernels and threads. Two ways to share the work: all
// threads on the same experts, row chunk by row chunk (decode: latency), or each thread an expert of its own (prefill:
// no barrier between experts, and whoever is free takes the next one that has arrived).
// A matrix that ggml repacks is multiplied tile by tile (repack.h), for any number of rows. Others as follows.
// Few rows for an expert: dot products with its weight rows, shared among the threads of one CPU backend, by `vec_dot` or a
// kernel of ours with its bits (few_rows.h). Many rows: ggml's MUL_MAT_ID on that one expert, which is the kernel stock
// llama.cpp takes for it (tiled where there is one), or again a kernel of ours with its bits. The choice depends on the
// number of rows and the type alone, never on what is in memory, so the result is the same for every budget.
#pragma once
#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "activation.h"
#include "ggml-backend.h"
#include "graph.h"
#include "model.h"
#include "repack.h"

namespace moe_edge {

// ggml's tiled kernels start at 8 rows (ggml-cpu/tiled, ggml_tiled_min_batch); below, stock uses vec_dot as we do.
constexpr int64_t MANY_ROWS = 8;
constexpr int64_t BATCH_ROWS = 64;              // rows of small groups computed in one graph
constexpr size_t WORK_BYTES = 4u << 20;         // target size of a lane's work area; larger groups are cut, which changes no bit

struct Row { int32_t token, slot; };            // slot: position among the token's selected experts

struct Group {                                  // the rows of one expert in this step
    int expert = 0;
    int unit = -1;
    int64_t first_row = 0, n_rows = 0;          // in Step::rows
    int64_t hidden_row = 0;                     // of a small group in state HIDDEN
    bool taken = false;                         // by a worker
    enum State { WAITING, HIDDEN, DONE } state = WAITING;
};

struct Step {                                   // one MoE layer of one micro-batch
    Model * model = nullptr;
    int layer_pos = -1;
    const ggml_tensor * ids_node = nullptr;
    int64_t n_tokens = 0, n_used = 0;
    std::vector<int32_t> ids;                   // [n_tokens][n_used]
    std::vector<Row> rows;                      // sorted by expert
    std::vector<Group> groups;                  // in the order of the plan
    // output of the down product: F32 [n_embd, n_used, n_tokens]
    char * out = nullptr;
    size_t out_nb1 = 0, out_nb2 = 0;
    std::vector<float> weights;                 // [n_tokens][n_used], when the sum is ours to make
    const float * down_scale = nullptr;         // [n_expert], multiplies an expert's output before its weight does; or null
    char * sum = nullptr;                       // F32 [n_embd, n_tokens], or null
    const ggml_tensor * hidden = nullptr;       // the graph's input of the down product: tells the activation

    char * output(const Row & row) const {
        return out + static_cast<size_t>(row.slot) * out_nb1 + static_cast<size_t>(row.token) * out_nb2;
    }
};

struct QuantizeTask;

// The pool that lanes of n_threads threads share with llama.cpp, which never runs at the same time as they do; for builds
// without OpenMP. Null: each graph makes its threads, or OpenMP has them.
void set_shared_pool(ggml_threadpool * pool, int n_threads);
void forget_shared_pool(ggml_threadpool * pool);

// What one graph needs: nodes, work memory, and a CPU backend to run it on.
struct Lane {
    explicit Lane(int n_threads);
    ~Lane();
    Lane(const Lane &) = delete;
    Lane & operator=(const Lane &) = delete;
    ggml_context * fresh_context();       // forgets the nodes and the work memory of the graph before
    char * work(size_t bytes);            // null when it is used up

    ggml_backend_t cpu;
    ggml_context * ctx = nullptr;
    std::vector<Tile *> tiles;            // of each thread
    std::vector<char> meta, work_area, hidden;  // hidden: F32 rows between activation and down product
    size_t used = 0;
    int64_t next_hidden = 0;
};

class Ffn {
public:
    Ffn();
    void set_threads(int n);
    int threads() const { return n_threads_; }
    Lane & all_threads() { return *all_; }
    // For little work: one thread when tokens are few, so that no thread waits for another.
    Lane & few_threads(int64_t n_tokens) { return n_tokens <= AHEAD_TOKENS ? *own_[0] : *all_; }
    const float * input() const { return reinterpret_cast<const float *>(x_.data()); }  // [n_tokens][n_embd], after begin()

    // Copy the step's input: F32 [n_embd, 1, n_tokens] with row stride nb2. It may not outlive the first product node.
    void begin(Step & s, const ggml_tensor * x);

    // All threads together. Hidden rows of `ready`, then the down product of those among them and in `hidden` whose
    // down piece is there. Groups here have fewer than MANY_ROWS rows, `ready` has at most BATCH_ROWS together.
    bool run_small(Step & s, const std::vector<Group *> & ready, const std::vector<Group *> & hidden, std::string & error);
    bool run_large(Step & s, Group & g, std::string & error);

    // Each thread on its own. `worker` is called once on each thread with its number and may call run_alone for groups
    // whose pieces are all there; different threads, different groups.
    bool run_workers(Step & s, const std::function<void(int)> & worker, std::string & error);
    // The weighted sum of a finished step, when it has one; run_workers does it by itself.
    bool run_sum(Step & s, std::string & error);
    // One of llama.cpp's own nodes, as the CPU backend would.
    static bool run_node(ggml_tensor * node, Lane & lane, std::string & error);
    bool run_alone(Step & s, int thread, Group & g, std::string & error);

    // How each matrix of the model is multiplied, for its whole life. repacking: an me_repacking.
    static void choose_kernels(Model & m, int32_t repacking);
    static int64_t scratch_bytes(const Model & m, int64_t n_ubatch, int64_t n_used, int n_threads);

private:
    friend struct FfnTasks;
    struct Task;  // arguments of the custom nodes
    // The step's input in `type`; adds the task that quantizes it when this step has not done so yet.
    const char * x_rows(ggml_type type, const Step & s, std::vector<QuantizeTask> & tasks);
    bool small(Lane & lane, Step & s, const std::vector<Group *> & ready, const std::vector<Group *> & hidden, std::string & error);
    bool add_hidden(Lane & lane, ggml_cgraph * graph, Step & s, const std::vector<Group *> & ready, Task & quantize, Task & dots,
                    std::string & error);
    void up_dots(const Step & s, const Group & g, const ActivationInputs & in, int64_t at, Task & quantize, Task & dots);
    static void place_hidden(Lane & lane, Step & s, const std::vector<Group *> & ready, std::vector<Group *> & down);
    bool add_down(Lane & lane, ggml_cgraph * graph, Step & s, const std::vector<Group *> & down, Task & quantize, Task & dots,
                  std::string & error);
    bool whole(Lane & lane, Step & s, Group & g, std::string & error);
    bool large(Lane & lane, Step & s, Group & g, std::string & error);
    ggml_tensor * gathered(Lane & lane, const Step & s, const Group & g, int64_t from, int64_t n, ggml_type type, Task & quantize,
                           Task & gather, std::string & error);
    static void scatter_rows(const Step & s, const Group & g, int64_t from, int64_t n, const ggml_tensor * y, Task & scatter);
    bool large_rows(Lane & lane, Step & s, Group & g, int64_t from, int64_t n, std::string & error);
    ggml_tensor * dot_product(Lane & lane, const Step & s, const Group & g, int64_t from, int64_t n, const Piece & piece,
                              Task & quantize, Task & dots, std::string & error);
    static bool dot_down(Lane & lane, ggml_cgraph * graph, const Step & s, const Group & g, int64_t from, ggml_tensor * h,
                         Task & quantize, Task & dots, std::string & error);
    void reserve(Lane & lane, const Step & s, int64_t hidden_rows);

    int n_threads_ = 0;
    std::vector<std::unique_ptr<Tile>> tiles_;  // of each thread
    std::unique_ptr<Lane> all_;               // every thread
    std::vector<std::unique_ptr<Lane>> own_;  // one for each thread
    std::vector<char> x_;
    struct Quantized { ggml_type type; std::vector<char> rows; bool valid; };
    std::vector<Quantized> quantized_;
};

}  // namespace moe_edge
