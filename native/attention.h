// The attention each token of a micro-batch received, for policies that rank experts by heavy-hitter tokens (DyMoE). While
// it is watched, the backend claims the attention nodes of prefill graphs, runs them as the CPU backend would, and reads
// the probabilities: those of the softmax itself, or, where flash attention keeps none, of one extra product of the last
// queries with the keys.
#pragma once
#include <string>
#include <vector>

#include "ffn.h"

namespace moe_edge {

constexpr int64_t WATCHED_TOKENS = 32;  // smaller micro-batches are not watched
constexpr int64_t LAST_QUERIES = 32;    // of the extra product

// Switched on by models, off when the last one says so.
void watch_attention(bool on);
// A softmax over scores, or a flash attention, of a micro-batch worth watching, while somebody watches.
bool is_attention(const ggml_tensor * node);

class AttentionWatch {
public:
    // Read the probabilities of an attention node that has been computed. What it cannot read (ALiBi, soft caps, a cache
    // with holes) leaves no result.
    void read(const ggml_tensor * node, Lane & lane);
    // [n_tokens]: mean over the queries at or behind each token of the probability they gave it, summed over heads;
    // of the last attention node, once. Null when there is none for a micro-batch of n_tokens.
    const float * take(int64_t n_tokens);

private:
    bool find_cells(const ggml_tensor * mask, int64_t n_kv, int64_t n_tokens);
    void add(const float * probabilities, int64_t n_kv, int64_t first_query, int64_t n_queries);

    std::vector<float> received_, taken_;
    std::vector<int64_t> cells_;  // the cell of the KV cache that holds each token of the micro-batch
    std::vector<char> scores_;
    bool known_ = false;
};

}  // namespace moe_edge
