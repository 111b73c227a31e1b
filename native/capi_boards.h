// The C interface of several boards, for runner/workers/guard.py. As capi.h: nothing throws or ends the process.
#pragma once
#include "capi.h"

#ifdef __cplusplus
extern "C" {
#endif

struct me_board_numbers {
    int64_t buffer_bytes, peak_buffer_bytes, denied_bytes, graphs, new_graphs, compute_ns, bytes_in, bytes_out;
};
struct me_guard_numbers {
    int64_t bytes_sent, bytes_received, commands, graphs, new_graphs, stub_bytes, wait_ns;
};

typedef struct me_guard me_guard;

// Whether this llama.cpp was built with its RPC backend.
ME_API int32_t me_rpc_is_built(void);

// ---- a board
// ggml's RPC server at "127.0.0.1:PORT", with our one device; returns only when it could not start, or cannot go on.
// Once a process. pool: of me_threadpool_new, or null.
ME_API int32_t me_board_run(const char * endpoint, int32_t n_threads, void * pool, char * error);
// Whose experts the graphs from now on need, until the next call; null: nobody's. Waits for a graph under way.
ME_API void me_board_use(me_model * model);
// What all buffers of a client may take; forgets what was refused to the client before.
ME_API void me_board_limit(int64_t bytes);
ME_API void me_board_counts(struct me_board_numbers * out);
// One connection of a client, to its end.
ME_API void me_board_relay(int32_t client, int32_t server);

// ---- the client
ME_API me_guard * me_guard_new(void);
ME_API void me_guard_free(me_guard * guard);  // when no relay of it runs
ME_API void me_guard_relay(me_guard * guard, int32_t llama, int32_t board);
ME_API void me_guard_counts(me_guard * guard, struct me_guard_numbers * out);
ME_API int32_t me_guard_is_lost(me_guard * guard);
ME_API int32_t me_guard_is_waiting(me_guard * guard);  // for the board's answer
ME_API void me_guard_lose(me_guard * guard);
ME_API int32_t me_guard_take_failed(me_guard * guard);  // whether a graph has failed since the last call
// The device of the RPC server at an endpoint, for llama_model_params.devices; null when llama.cpp has no RPC backend.
ME_API void * me_rpc_device(const char * endpoint);
// ggml's buffer type of ordinary memory, for llama_model_params.tensor_buft_overrides.
ME_API void * me_cpu_buffer_type(void);

#ifdef __cplusplus
}
#endif
