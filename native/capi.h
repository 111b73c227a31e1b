// The C interface that runner/native.py binds with ctypes. Every function that can fail returns a status and leaves a
// sentence in `error` (ME_ERROR_BYTES long, owned by the caller). Nothing here throws or ends the process.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define ME_API __attribute__((visibility("default")))
#define ME_ERROR_BYTES 1024

enum me_status { ME_OK = 0, ME_FAILED = 1 };
enum me_schedule_status {
    ME_SCHEDULE_OK = 0,
    ME_SCHEDULE_STOP = 1,
    ME_SCHEDULE_ERROR = 2,
    ME_SCHEDULE_RESIDENT = 3,  // all are in memory at level 0: compute them in the order asked; nothing was written
};

// Which matrices are multiplied by ggml's repacked kernels: those of types that gain by it on this processor, all that ggml
// can repack, none. See native/repack.h.
enum me_repacking { ME_REPACK_AUTO = 0, ME_REPACK_ALWAYS = 1, ME_REPACK_NEVER = 2 };

struct me_piece_desc {  // one projection of one expert at one level
    int32_t file, type, projection, codec;  // codec: see native/codec.h
    int64_t offset, stored_bytes, nbytes, cols, rows;  // stored_bytes from offset in the file; nbytes of the matrix
};

struct me_layer_desc {
    int32_t layer, n_expert, n_embd, n_ff, fused, gated;
    const float * bias_up;    // [n_expert][n_ff] or null; copied
    const float * bias_gate;
};

#define ME_MAX_AHEAD 8      // layers of look-ahead
#define ME_LEVEL_SKIP (-1)  // a level: the expert is not computed, its output is zero

// Buffers that Python owns and both sides use, valid as long as the model. Sizes: experts, counts, weights, squares,
// order, level, victim_count: the largest n_expert; victims: number of units.
struct me_mailbox {
    int32_t * experts;       // native -> Python: the distinct experts this micro-batch selected in this layer
    int32_t * counts;        //   how many tokens go to each,
    float * weights;         //   the sum of the gate weights of those tokens,
    float * squares;         //   and the sum of their squares
    int32_t * order;         // Python -> native: a permutation of 0..n-1, the order to fetch in
    int32_t * level;         //   level of each step, or ME_LEVEL_SKIP
    int32_t * victim_count;  //   how many victims step i evicts before its read
    int32_t * victims;       //   their unit ids, step after step
    int32_t * later;                  // [1] Python -> native, 0 unless written: call again, see ME_MEANWHILE
    int32_t * prefetch_count;         // [1] Python -> native, 0 unless written: units to read when the disk has nothing
    int32_t * prefetch_units;         //   else to do; absent ones that this step does not use; [number of units]
    int32_t * prefetch_victim_count;  //   what each evicts before its read, none of this step's,
    int32_t * prefetch_victims;       //   unit after unit; the step's own victims go first
    int32_t * part_count;             // [1] Python -> native, with every answer, 0 unless written: what the packed cache
    int32_t * part_units;             //   is to hold from now on of these units; [number of units]
    int32_t * part_masks;             //   1: exponents, 2: signs and mantissas, 3: both, 0: nothing; see native/parts.h
    int32_t * ahead_counts;           // [ME_MAX_AHEAD] native -> Python, by me_model_ahead: experts predicted for the
    int32_t * ahead_experts;          //   layers behind this one, [depth][width], most probable first; room for
    float * ahead_scores;             //   ME_MAX_AHEAD times the largest n_expert; and their router probabilities
    int32_t * select_order;  // [largest n_expert] native -> Python, for one token: see me_select_fn
    float * select_scores;
    float * select_gates;
    int32_t * selected;      // Python -> native: the experts chosen, in any order
};

// Called once for each MoE layer and micro-batch, on the thread that runs llama_decode. When the answer set `later`,
// once more with n_experts = ME_MEANWHILE before the step ends: while it waits for its reads, or at once when it waits for
// none. That is the time to learn and to fetch ahead; only prefetch_* is taken from that answer.
#define ME_MEANWHILE (-1)
typedef int32_t (*me_schedule_fn)(void * user, int32_t layer_pos, int32_t n_tokens, int32_t n_experts);

// Called behind a layer of `layer_pos` - 1, while look-ahead is on, when layer `layer_pos` routes before its attention: the
// mailbox holds the experts that it will use, `weights` being the router's probabilities, those of each token 1 together.
// The answer is prefetches only; what the step before used may be among the victims. With ME_SCHEDULE_OK, STOP or ERROR.
typedef me_schedule_fn me_announce_fn;

// Called while selecting is on (me_model_set_selecting), before each layer chooses its experts. For one token the mailbox
// holds all experts of the layer, best first by the model's own ranking, with the scores that rank them and the values
// that llama.cpp makes their gate weights of; `selected` takes n_used distinct experts. For more tokens all is in
// me_model_selection. With ME_SCHEDULE_OK, STOP, ERROR, or RESIDENT: the model's own choice, nothing was written.
typedef int32_t (*me_select_fn)(void * user, int32_t layer_pos, int32_t n_tokens, int32_t n_used);

struct me_model_desc {
    const char ** paths;
    const me_layer_desc * layers;
    const me_piece_desc * pieces;  // order: layer, expert, level, projection
    int64_t n_pieces;
    int32_t n_paths, n_layers, n_levels, n_io_threads, direct_io;
    int32_t page_bytes;            // 0: the system's; more: as if its pages were so large
    int32_t repacking;             // an me_repacking
    me_schedule_fn schedule;
    me_announce_fn announce;  // or null
    me_select_fn select;      // or null
    void * schedule_user;
    me_mailbox mail;
};

// The step the scheduler is being asked about, token by token; pointers are valid inside the callback only.
struct me_step_view {
    const int32_t * experts;   // [n_tokens][n_used]
    const float * weights;     // [n_tokens][n_used]; equal shares when the graph does not show the gate weights
    const float * attention;   // [n_tokens], or null when it is not watched
    const float * input;       // [n_tokens][n_embd], what the experts multiply
    int32_t n_tokens, n_used, n_embd, weights_known;
};

// What a layer chooses its experts by; pointers are valid inside me_select_fn only.
struct me_selection_view {
    const float * scores;    // [n_tokens][n_expert], what the model ranks by; -inf: of a group that is left out
    const float * gates;     // [n_tokens][n_expert], what the gate weights are made of; null where the graph hides it
    const int32_t * order;   // [n_tokens][n_expert], the experts, best first
    int32_t * selected;      // [n_tokens][n_used], to be written
    int32_t n_tokens, n_expert, n_used, reserved;
};

// Counts since the model was opened; int64_t each.
//   steps: MoE layers run, one for each layer and micro-batch. tokens: token-layers.
//   uses, hits: distinct experts computed in a step, and those of them that were in memory. low_uses, skipped_uses: those
//     computed below level 0; those not computed (not counted in uses).
//   substituted_uses: of all tokens, uses that went to another expert than the router's own choice.
//   bytes_read: as stored. read_busy_ns: summed over reads; disk_busy_ns: any read under way; prefetch_busy_ns: a
//     speculative one.
//   prefetched units are read ahead. Each is once useful (a step used it), wasted or cancelled (evicted unused: wholly
//     read or not). late: useful ones that were not whole when their step began. failed: reads that failed while no step
//     needed them. prefetch_bytes: read ahead (part of bytes_read); wasted_bytes: of those, evicted unused.
//   look_ahead_ns: asking the routers. meanwhile_ns: scheduling while the step waited for reads; not in schedule_ns.
//   preloaded: units read by me_model_preload. unpack_ns, unpacked_bytes: of packed pieces, summed over the threads that
//     read; the bytes are those of the matrices. lent_bytes: of the buffers that packed pieces are read into.
//   packed_hits, exponent_hits, mantissa_hits: loads of units that the packed cache held whole, or in that part only;
//     unread_bytes: what they did not read. packed_bytes, peak_packed_bytes: of the packed cache, in memory.
#define ME_COUNTERS(X) \
    X(steps) X(tokens) X(uses) X(hits) X(low_uses) X(skipped_uses) X(loads) X(evictions) X(graphs) X(prefetched) \
    X(prefetch_useful) X(prefetch_late) X(prefetch_wasted) X(prefetch_cancelled) X(prefetch_failed) X(wasted_bytes) \
    X(preloaded) X(stall_ns) X(compute_ns) X(schedule_ns) X(step_ns) X(look_ahead_ns) X(meanwhile_ns) \
    X(unpack_ns) X(unpacked_bytes) X(substituted_uses) X(packed_hits) X(exponent_hits) X(mantissa_hits) X(unread_bytes)
#define ME_SOURCE_COUNTERS(X) \
    X(reads) X(bytes_read) X(read_busy_ns) X(disk_busy_ns) X(prefetch_bytes) X(prefetch_busy_ns) X(direct_files) \
    X(committed_bytes) X(peak_committed_bytes) X(lent_bytes) X(packed_bytes) X(peak_packed_bytes)

#define ME_FIELD(name) int64_t name;
struct me_counters { ME_COUNTERS(ME_FIELD) ME_SOURCE_COUNTERS(ME_FIELD) };
#undef ME_FIELD

struct me_abi_info {
    int32_t backend_api, tensor_overhead;  // as built: see me_loaded_tensor_overhead
    const char * ggml_version_built;
    const char * counters;     // their names in the order of me_counters, separated by blanks
    const char * struct_names; // of the structs that cross, separated by blanks, and their sizes in bytes
    const int32_t * struct_sizes;
};

typedef struct me_model me_model;

// A ggml thread pool for builds of ggml without OpenMP, which would otherwise create and join threads for every graph.
// The engine's own graphs of n_threads threads use it from then on; attach it to the llama context as well. Null frees
// nothing: me_threadpool_free does, after the context is gone.
ME_API void * me_threadpool_new(int32_t n_threads);
ME_API void me_threadpool_free(void * pool);

// Products of a matrix with rows in the type that its products take, by the kernel that experts in their own order get;
// out [n_rows][n_weight_rows]. On the calling thread. ME_FAILED, and nothing is done, where experts get ggml's products.
ME_API int32_t me_multiply_rows(int32_t type, int64_t n_cols, int64_t n_weight_rows, const char * weights, const char * rows,
                                int64_t n_rows, float * out);

ME_API void me_abi(struct me_abi_info * out);
// ggml_tensor_overhead() of the ggml that is loaded now: the size of a ggml_tensor and its header.
ME_API int32_t me_loaded_tensor_overhead(void);
ME_API int32_t me_register(char * error);
// A ggml_log_callback whose user data is another one: it hands on what it hears, without the line that ggml writes for each
// matrix it repacks. Whoever takes ggml's log should take it through this one.
ME_API void me_log(int32_t level, const char * text, void * user);
// How experts' matrices of this type and shape are multiplied: 0 as they are, 1 repacked, each row of the input by itself,
// 2 repacked, rows together. repacking: an me_repacking.
ME_API int32_t me_kernel(int32_t type, int64_t n_cols, int64_t n_rows, int32_t repacking);
// zstd's ZSTD_createDCtx, ZSTD_freeDCtx, ZSTD_decompressDCtx and ZSTD_isError; before a model with packed pieces is opened.
ME_API void me_set_zstd(void * create, void * free, void * decompress, void * is_error);
// Unpack one matrix of nbytes of a ggml type from `stored`; for checks. And what of exponents.h unpacks codec `codes`: 0
// C++ alone, 1 AVX2, 2 AVX-512, 3 NEON. ME_FAILED: this processor does not have it, and nothing changes.
ME_API int32_t me_unpack(const char * stored, int64_t stored_bytes, int32_t codec, int32_t type, char * out, int64_t nbytes,
                         char * error);
ME_API int32_t me_use_code_unpacker(int32_t which);
ME_API me_model * me_model_open(const struct me_model_desc * desc, char * error);
// Reserve the arena, and beside it the packed cache (0: none); once, before the first decode. Units are loaded only after.
ME_API int32_t me_model_set_arena(me_model * model, int64_t arena_bytes, int64_t packed_bytes, char * error);
ME_API void me_model_close(me_model * model);
// Read absent units into the arena, in this order, and wait for them; not within a step. Nobody uses them yet: they count
// as preloaded, not as loads. On failure those that were read stay; the sentence names file and tensor.
ME_API int32_t me_model_preload(me_model * model, const int32_t * units, int32_t n, char * error);
// Between arm and disarm, expert stubs that llama.cpp shows for the first time are bound to this model.
ME_API int32_t me_model_arm(me_model * model, char * error);
ME_API void me_model_disarm(me_model * model);
ME_API void me_model_unbind(me_model * model);
ME_API int32_t me_model_bound_tensors(me_model * model);
ME_API void me_model_counters(me_model * model, struct me_counters * out);
// 1 when the model had an error since the last call; its sentence is in `error`.
ME_API int32_t me_model_take_error(me_model * model, char * error);
ME_API void me_model_resident(me_model * model, uint8_t * out);  // one byte for each unit
ME_API void me_model_unit_bytes(me_model * model, int64_t * out);
// For each unit: what its exponents and its signs and mantissas take in the packed cache; and what need not be read when
// it holds the former, the latter, both. Zeros for units that are not packed. out: [units][5].
ME_API void me_model_part_bytes(me_model * model, int64_t * out);
ME_API void me_model_held_parts(me_model * model, uint8_t * out);  // the mask of each unit
// Take back the places of packed parts that were never filled, as of a read ahead that was given up. Not within a step: for
// a scheduler that begins with what me_model_held_parts tells, and would not know of them.
ME_API void me_model_drop_empty_parts(me_model * model);
// 0 when no step is being scheduled.
ME_API int32_t me_model_step(me_model * model, struct me_step_view * out);
// Ask the routers of the next `depth` layers for their best `width` experts, by me_model_ahead. 0: never. rescale: correct
// the input for the difference of the layers' norm weights.
ME_API int32_t me_model_set_lookahead(me_model * model, int32_t depth, int32_t width, int32_t rescale, char * error);
// Within the callback: fills the mailbox's ahead_* for at most `most` layers. Returns their number, 0 for steps of more
// than 4 tokens.
ME_API int32_t me_model_ahead(me_model * model, int32_t most);
ME_API int32_t me_model_known_routers(me_model * model);
ME_API int32_t me_model_early_routers(me_model * model);  // those that are announced, see me_announce_fn
// From now on, in graphs built from now on, let me_select_fn choose the experts of each token.
ME_API void me_model_set_selecting(me_model * model, int32_t on);
// Whether every layer's choice can be taken over, as llama.cpp's graphs have shown so far; else the reason, in `error`.
ME_API int32_t me_model_check_selecting(me_model * model, char * error);
// Within me_select_fn: 1, and the view; else 0.
ME_API int32_t me_model_selection(me_model * model, struct me_selection_view * out);
// How llama.cpp makes a layer's gate weights of the `gates` of the experts that were chosen: ME_GATES_*, and the factor.
enum me_gates { ME_GATES_UNKNOWN = 0, ME_GATES_PLAIN = 1, ME_GATES_NORMALISED = 2, ME_GATES_SOFTMAX = 3 };
ME_API int32_t me_model_gating(me_model * model, int32_t layer_pos, float * scale);
// Watch the attention each token receives, for me_step_view, in graphs built from now on; until the model is closed.
ME_API void me_model_watch_attention(me_model * model);
// After a skip, scale the token's other gate weights up to the old sum.
ME_API void me_model_set_renormalise(me_model * model, int32_t on);
// Add Gaussian noise to the MoE output of one layer, `relative` times the root mean square of each token's row; for
// calibration. layer_pos -1: none. Returns the squared noise added since the last call.
ME_API double me_model_set_noise(me_model * model, int32_t layer_pos, float relative, uint64_t seed);
// Pace expert reads as a disk of this speed would that serves one read after the other; 0: not at all.
ME_API void me_model_pace(me_model * model, int64_t bytes_per_second);
ME_API void me_model_set_stop(me_model * model, int32_t stop);
ME_API int64_t me_model_scratch_bytes(me_model * model, int64_t n_ubatch, int32_t n_used, int32_t n_threads);

// ---- repacked dense weights
// Whether ggml's CPU_REPACK buffers take a matrix of this ggml type on this processor; n_expert above 1: a stack of them.
ME_API int32_t me_repacks(int32_t type, int64_t cols, int64_t rows, int64_t n_expert);
// While on, a load that wants ggml's extra buffer types finds CPU_REPACK among them and no other: AMX crashes on some
// machines. Process-wide; not while a model is loaded in another thread.
ME_API void me_only_repack(int32_t on);
// Give memory that was freed back to the system, where its library keeps it.
ME_API void me_trim_memory(void);

#ifdef __cplusplus
}
#endif
