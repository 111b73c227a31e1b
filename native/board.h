// One board of several: a device of ours that computes whole layers for a client. ggml's RPC server runs it. Expert
// nodes go to a StepRunner, runs of all other nodes to the CPU backend, in the order of the graph.
//
// A process is at most one board. The RPC server ends the process when a graph fails, so a graph never does: the failure
// is noted here, and the relay (relay.h) tells the client of it with the next answer.
#pragma once
#include <atomic>
#include <cstdint>
#include <deque>
#include <mutex>

#include "ggml-backend.h"

namespace moe_edge {

class Model;

struct Board {
    std::mutex compute;        // held while a graph is computed; guards model
    Model * model = nullptr;   // whose experts; null: none, and graphs with expert products fail
    std::atomic<bool> failed{false};  // a graph has, since the client was told last
    std::atomic<int64_t> limit_bytes{0};   // of the client's buffers: weights, KV cache, compute
    std::atomic<int64_t> buffer_bytes{0}, peak_buffer_bytes{0}, denied_bytes{0};
    std::atomic<int64_t> graphs{0}, new_graphs{0}, compute_ns{0}, bytes_in{0}, bytes_out{0};

    // Whether the next graph that the server computes is new, or the one before again. The relay says so as it passes the
    // command on; the server computes in the same order.
    void announce_graph(bool is_new);
    bool take_graph();
    void forget_graphs();

private:
    std::mutex kinds_mutex_;
    std::deque<bool> kinds_;
};

Board & the_board();
// The device that the RPC server is given. n_threads: of its CPU backend. pool: a ggml_threadpool, or null with OpenMP.
ggml_backend_dev_t board_device(int n_threads, void * pool);

}  // namespace moe_edge
