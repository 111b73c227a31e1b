#include "capi_boards.h"

#include <cstdio>

#include "board.h"
#include "ggml-rpc.h"
#include "handle.h"
#include "relay.h"

using namespace moe_edge;

struct me_guard {
    Guard guard;
};

// The functions of the RPC backend come from its registry: a llama.cpp without it has no library to link.
template <typename F>
static F rpc_function(const char * name) {
    ggml_backend_reg_t reg = ggml_backend_reg_by_name("RPC");
    return reg ? reinterpret_cast<F>(ggml_backend_reg_get_proc_address(reg, name)) : nullptr;
}

int32_t me_rpc_is_built(void) { return ggml_backend_reg_by_name("RPC") != nullptr; }

int32_t me_board_run(const char * endpoint, int32_t n_threads, void * pool, char * error) {
    const auto start = rpc_function<decltype(&ggml_backend_rpc_start_server)>("ggml_backend_rpc_start_server");
    if (!start) {
        snprintf(error, ME_ERROR_BYTES, "llama.cpp was built without its RPC backend");
        return ME_FAILED;
    }
    ggml_backend_dev_t device = board_device(n_threads, pool);
    start(endpoint, nullptr, static_cast<size_t>(n_threads), 1, &device);
    snprintf(error, ME_ERROR_BYTES, "ggml's RPC server at %s has ended", endpoint);
    return ME_FAILED;
}

void me_board_use(me_model * model) {
    Board & board = the_board();
    std::lock_guard<std::mutex> lock(board.compute);
    board.model = model ? &model->model : nullptr;
}

void me_board_limit(int64_t bytes) {
    Board & b = the_board();
    b.limit_bytes = bytes;
    b.denied_bytes = 0;
    b.peak_buffer_bytes = b.buffer_bytes.load();
}

void me_board_counts(me_board_numbers * out) {
    const Board & b = the_board();
    *out = {b.buffer_bytes, b.peak_buffer_bytes, b.denied_bytes, b.graphs, b.new_graphs, b.compute_ns, b.bytes_in, b.bytes_out};
}

void me_board_relay(int32_t client, int32_t server) { relay_board(client, server); }

me_guard * me_guard_new(void) { return new me_guard(); }
void me_guard_free(me_guard * guard) { delete guard; }
void me_guard_relay(me_guard * guard, int32_t llama, int32_t board) { relay_guard(guard->guard, llama, board); }
void me_guard_counts(me_guard * guard, me_guard_numbers * out) {
    const Guard & g = guard->guard;
    *out = {g.bytes_sent, g.bytes_received, g.commands, g.graphs, g.new_graphs, g.stub_bytes, g.wait_ns};
}
int32_t me_guard_is_lost(me_guard * guard) { return guard->guard.lost; }
int32_t me_guard_is_waiting(me_guard * guard) { return guard->guard.waiting > 0; }
void me_guard_lose(me_guard * guard) { guard->guard.lost = true; }
int32_t me_guard_take_failed(me_guard * guard) { return guard->guard.failed.exchange(false); }

void * me_rpc_device(const char * endpoint) {
    const auto add = rpc_function<decltype(&ggml_backend_rpc_add_server)>("ggml_backend_rpc_add_server");
    ggml_backend_reg_t reg = add ? add(endpoint) : nullptr;
    return reg && ggml_backend_reg_dev_count(reg) > 0 ? ggml_backend_reg_dev_get(reg, 0) : nullptr;
}

void * me_cpu_buffer_type(void) { return ggml_backend_cpu_buffer_type(); }
