// Runs one MoE layer of one micro-batch: asks the scheduler once, starts the reads in its order, and computes each
// expert as it arrives. A victim that this step still needs is evicted only after it has been computed.
#pragma once
#include <atomic>
#include <mutex>
#include <string>
#include <vector>

#include "attention.h"
#include "ffn.h"
#include "selection.h"

namespace moe_edge {

class StepRunner {
public:
    Ffn ffn;
    ggml_abort_callback abort = nullptr;
    void * abort_data = nullptr;

    // At the first expert product of a layer: copy the input, schedule, start reading. False: the model has the error.
    // `weights`: the gate weights, or null when the graph does not show them.
    bool begin(const Stub & stub, const ggml_tensor * product, const ggml_tensor * weights);
    // At the down product: compute everything into it.
    // `sum`: where the weighted sum behind it goes, or null when its nodes come one by one.
    bool finish(const Stub & stub, const ggml_tensor * down, const WeightedSum * sum);
    // Compute `input`, the next router's, behind the layer of `before` (early_input). Unless look-ahead is off, tell the
    // scheduler which experts it selects, and start reading what that fetches for them.
    bool announce(const Stub & before, ggml_tensor * input);
    // Compute the ranking of a layer's experts, with those in front that the scheduler selects.
    bool select(const Stub & stub, ggml_tensor * ranking);
    bool run_node(Model & model, ggml_tensor * node) { return run_node(model, node, ffn.all_threads()); }
    bool run_attention(ggml_tensor * node);
    bool begun(const Stub & stub, const ggml_tensor * node) const {
        return pending_ && node != first_node_ && step_.model == stub.model && step_.layer_pos == stub.layer_pos && step_.ids_node == node->src[2];
    }
    void abandon();

private:
    struct Load { int group; std::vector<int> victims; };
    struct Prefetch { int unit; std::vector<int> victims; };
    bool run_node(Model & model, ggml_tensor * node, Lane & lane);
    bool group_by_expert(const ggml_tensor * ids);
    void take_weights(const ggml_tensor * weights);
    bool drop_skipped();
    void disturb();
    int write_experts();
    bool ask_scheduler();
    void answer_resident(int n);
    bool take_plan(int n);
    bool take_planned(Group g, int level, const int32_t * victims, int n_victims);
    bool call_scheduler(int n, std::atomic<int64_t> & ns, bool & resident);
    bool take_parts();
    bool meanwhile();
    bool take_prefetches(std::string & error);
    bool dispatch_loads(std::string & error);
    bool dispatch_prefetches(std::string & error);
    bool compute_ready(bool & progress);
    bool compute_together();
    bool compute_by_workers();
    void work(int thread);
    Group * take_group(bool & all_taken);
    bool asked_to_stop() const { return step_.model->stop || (abort && abort(abort_data)); }
    bool fail(const std::string & why);

    AttentionWatch attention_;
    Selector selector_;
    Step step_;
    me_step_view view_{};      // of the present step
    bool later_ = false;       // the scheduler wants to be called again before the step ends
    bool waits_ = false;       // some read of this step had not ended when it began
    bool pending_ = false;
    const ggml_tensor * first_node_ = nullptr;  // seen again: the step before was abandoned, this is a new one
    const ggml_tensor * weights_node_ = nullptr;  // whose values step_.weights holds
    std::vector<Group> skipped_;
    std::vector<Load> loads_;
    size_t next_load_ = 0;
    std::vector<Prefetch> prefetches_;  // to be started when all loads are
    std::vector<uint8_t> busy_;  // unit id -> this step still needs it
    std::vector<Group> by_expert_;
    std::mutex workers_mutex_;  // guards groups' taken and state, loads_ and busy_ while workers run
    std::string worker_error_;
};

}  // namespace moe_edge
