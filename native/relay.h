// What stands between llama.cpp and ggml's RPC server on either side of the network. Both ends of a connection are ours:
// the client's relay (a guard) and the board's, so the wire between them may say more than ggml's protocol does: every
// answer begins with one byte, 1 when a graph has failed since the answer before.
//
// The guard is there because llama.cpp ends the process when a connection breaks (ggml-rpc.cpp, RPC_STATUS_ASSERT) and
// waits for ever when a board hangs. When the board is lost the guard answers in its place, with zeros, until llama.cpp
// has freed what it had; `lost` says that nothing computed since is of use.
// The board's relay keeps the client's buffers within the board's limit, and tells the device which graphs are new.
//
// One call a connection; it returns when either side has closed. Neither closes the descriptors it was given.
#pragma once
#include <atomic>
#include <cstdint>

namespace moe_edge {

struct Guard {
    std::atomic<bool> lost{false}, failed{false};
    std::atomic<int> waiting{0};         // relays that wait for an answer
    std::atomic<int64_t> bytes_sent{0}, bytes_received{0}, commands{0}, graphs{0}, new_graphs{0};
    std::atomic<int64_t> stub_bytes{0};  // of expert tensors, as llama.cpp sends them
    std::atomic<int64_t> wait_ns{0};     // for answers
};

// llama: the connection that llama.cpp made. board: the one to the board, or -1 when it could not be made.
void relay_guard(Guard & guard, int llama, int board);
// client: the connection from a guard. server: the one to ggml's RPC server in this process.
void relay_board(int client, int server);

}  // namespace moe_edge
