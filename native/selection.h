// Lets the scheduler take part in a layer's choice of experts: the ranking of the router's scores is claimed, and the
// experts that the scheduler wants instead are put in front of it. llama.cpp then takes their own gate weights, as it
// would for any other token. Used under the step mutex, from the thread that decodes.
#pragma once
#include <string>
#include <vector>

#include "capi.h"
#include "ffn.h"

namespace moe_edge {

class Selector {
public:
    // Compute `ranking`, an ARGSORT [n_expert, n_tokens] of this layer. It is sorted by ggml into memory of our own and
    // written once, when the choice is made: the ids that llama.cpp reads are a view of it. False: error says why.
    bool run(Model & model, int layer_pos, ggml_tensor * ranking, Lane & lane, std::string & error);
    // Bytes that run() keeps for micro-batches of n_tokens.
    static int64_t bytes(int64_t n_expert, int64_t n_tokens);

private:
    bool sort(const ggml_tensor * ranking, Lane & lane);
    bool ask(Model & model, int layer_pos, std::string & error);
    void mail_one(const Model & model) const;
    bool write(Model & model, const Layer & layer, ggml_tensor * ranking, std::string & error);

    me_selection_view view_{};
    std::vector<int32_t> order_, selected_;
    std::vector<uint8_t> wanted_;
};

}  // namespace moe_edge
