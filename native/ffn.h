// The arithmetic of one MoE layer at the real width, on ggml's own kernels and threads.
// Few rows for an expert: `vec_dot` over its weight rows, shared among the threads of one CPU backend. Many rows: ggml's
// MUL_MAT_ID on that one expert, which is the kernel stock llama.cpp takes for it (tiled where there is one). The choice
// depends on the number of rows alone, never on what is in memory, so the result is the same for every budget.
#pragma once
#include <atomic>
#include <string>
#include <vector>

#include "ggml-backend.h"
#include "graph.h"
#include "model.h"

namespace moe_edge {

// ggml's tiled kernels start at 8 rows (ggml-cpu/tiled, ggml_tiled_min_batch); below, stock uses vec_dot as we do.
constexpr int64_t MANY_ROWS = 8;
constexpr int64_t BATCH_ROWS = 64;              // rows of small groups computed in one graph
constexpr size_t WORK_BYTES = 16u << 20;        // target size of the F32 work area; large groups are cut to fit

struct Row { int32_t token, slot; };            // slot: position among the token's selected experts

struct Group {                                  // the rows of one expert in this step
    int expert = 0;
    int unit = -1;
    int64_t first_row = 0, n_rows = 0;          // in Step::rows
    int64_t hidden_row = 0;                     // of a small group in state HIDDEN
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
    const ggml_tensor * hidden = nullptr;       // the graph's input of the down product: tells the activation
};

struct QuantizeTask;

class Ffn {
public:
    Ffn();
    ~Ffn();
    Ffn(const Ffn &) = delete;
    Ffn & operator=(const Ffn &) = delete;
    void set_threads(int n);
    int threads() const { return n_threads_; }

    // Copy the step's input: F32 [n_embd, 1, n_tokens] with row stride nb2. It may not outlive the first product node.
    void begin(Step & s, const ggml_tensor * x);
    // Hidden rows of `ready`, then the down product of those among them and in `hidden` whose down piece is there.
    // All groups here have fewer than MANY_ROWS rows, at most BATCH_ROWS rows in `ready`.
    bool run_small(Step & s, const std::vector<Group *> & ready, const std::vector<Group *> & hidden, std::string & error);
    bool run_large(Step & s, Group & g, std::string & error);

    static int64_t scratch_bytes(const Model & m, int64_t n_ubatch, int64_t n_used, int n_threads);

private:
    struct Task;  // arguments of the custom nodes
    // The step's input in `type`; adds the task that quantizes it when this step has not done so yet.
    const char * x_rows(ggml_type type, const Step & s, std::vector<QuantizeTask> & tasks);
    ggml_tensor * custom(void (*fn)(ggml_tensor *, int, int, void *), ggml_tensor * after, void * arg);
    bool compute(ggml_cgraph * graph, Step & s, std::string & error);
    bool activation(Step & s, ActivationInputs & in, int64_t n_rows, ggml_tensor ** out, std::string & error);
    ggml_context * fresh_context();
    bool run_large_rows(Step & s, Group & g, int64_t from, int64_t n, std::string & error);
    char * work(size_t bytes);

    ggml_backend_t cpu_ = nullptr;
    int n_threads_ = 1;
    std::vector<char> meta_;                    // holds graph nodes
    ggml_context * ctx_ = nullptr;
    std::vector<char> x_, work_, hidden_;
    size_t work_used_ = 0;
    int64_t next_hidden_ = 0;
    struct Quantized { ggml_type type; std::vector<char> rows; bool valid; };
    std::vector<Quantized> quantized_;
    friend struct FfnTasks;
};

}  // namespace moe_edge
