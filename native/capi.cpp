#include "capi.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <exception>

#include "attention.h"
#include "backend.h"
#include "ffn.h"
#include "ggml-cpu.h"
#include "ggml_abi.h"
#include "graph.h"
#include "handle.h"
#include "repack.h"
#include "selection.h"

using namespace moe_edge;

void * me_threadpool_new(int32_t n_threads) {
    ggml_threadpool_params params = ggml_threadpool_params_default(n_threads);
    ggml_threadpool * pool = ggml_threadpool_new(&params);
    set_shared_pool(pool, n_threads);
    return pool;
}

void me_threadpool_free(void * pool) {
    forget_shared_pool(static_cast<ggml_threadpool *>(pool));
    ggml_threadpool_free(static_cast<ggml_threadpool *>(pool));
}

static void say(char * error, const char * text) { snprintf(error, ME_ERROR_BYTES, "%s", text); }

#define NAME(name) #name " "
static const char COUNTER_NAMES[] = ME_COUNTERS(NAME) ME_SOURCE_COUNTERS(NAME);
#undef NAME
static const int32_t STRUCT_SIZES[] = {sizeof(me_piece_desc), sizeof(me_layer_desc), sizeof(me_mailbox), sizeof(me_model_desc),
                                       sizeof(me_step_view), sizeof(me_selection_view), sizeof(me_counters), sizeof(me_abi_info)};

void me_abi(me_abi_info * out) {
    out->backend_api = ME_BACKEND_API_VERSION;
    // struct ggml_object: two sizes, a pointer, an enum and padding (ggml.c)
    out->tensor_overhead = static_cast<int32_t>(sizeof(ggml_tensor) + 4 * sizeof(void *));
    out->ggml_version_built = GGML_VERSION_BUILT;
    out->counters = COUNTER_NAMES;
    out->struct_names = "me_piece_desc me_layer_desc me_mailbox me_model_desc me_step_view me_selection_view me_counters me_abi_info";
    out->struct_sizes = STRUCT_SIZES;
}

int32_t me_loaded_tensor_overhead(void) { return static_cast<int32_t>(ggml_tensor_overhead()); }

int32_t me_register(char * error) {
    try {
        register_backend();
        return ME_OK;
    } catch (const std::exception & e) {
        say(error, e.what());
        return ME_FAILED;
    }
}

void me_log(int32_t level, const char * text, void * user) {
    log_without_repacking(static_cast<ggml_log_level>(level), text, user);
}

int32_t me_kernel(int32_t type, int64_t n_cols, int64_t n_rows, int32_t repacking) {
    return static_cast<int32_t>(kernel_of(static_cast<ggml_type>(type), n_cols, n_rows, repacking));
}

void me_set_zstd(void * create, void * free, void * decompress, void * is_error) {
    zstd.create = reinterpret_cast<decltype(zstd.create)>(create);
    zstd.free = reinterpret_cast<decltype(zstd.free)>(free);
    zstd.decompress = reinterpret_cast<decltype(zstd.decompress)>(decompress);
    zstd.is_error = reinterpret_cast<decltype(zstd.is_error)>(is_error);
}

int32_t me_use_code_unpacker(int32_t which) { return use_code_unpacker(which) ? ME_OK : ME_FAILED; }

int32_t me_unpack(const char * stored, int64_t stored_bytes, int32_t codec, int32_t type, char * out, int64_t nbytes,
                  char * error) {
    Stored whole;
    whole.head = stored;
    whole.head_bytes = whole.tail_from = whole.bytes = stored_bytes;
    const std::string wrong = decode_packed(whole, codec, type, out, nbytes);
    if (wrong.empty()) return ME_OK;
    say(error, wrong.c_str());
    return ME_FAILED;
}

int32_t me_multiply_rows(int32_t type, int64_t n_cols, int64_t n_weight_rows, const char * weights, const char * rows,
                         int64_t n_rows, float * out) {
    const auto weight_type = static_cast<ggml_type>(type);
    const size_t row = ggml_row_size(ggml_get_type_traits_cpu(weight_type)->vec_dot_type, n_cols);
    std::vector<Operand> operands;
    for (int64_t r = 0; r < n_rows; r++) operands.push_back({rows + static_cast<size_t>(r) * row, out + r * n_weight_rows});
    return multiply_few_rows(weight_type, n_cols, weights, 0, n_weight_rows, operands.data(), n_rows) ? ME_OK : ME_FAILED;
}

me_model * me_model_open(const me_model_desc * desc, char * error) {
    try {
        auto * m = new me_model(*desc);
        Ffn::choose_kernels(m->model, desc->repacking);
        m->model.schedule = desc->schedule;
        m->model.announce = desc->announce;
        m->model.select = desc->select;
        m->model.schedule_user = desc->schedule_user;
        m->model.mail = desc->mail;
        return m;
    } catch (const std::exception & e) {
        say(error, e.what());
        return nullptr;
    }
}

int32_t me_model_set_arena(me_model * m, int64_t arena_bytes, int64_t packed_bytes, char * error) {
    try {
        m->model.set_arena(arena_bytes, packed_bytes);
        return ME_OK;
    } catch (const std::exception & e) {
        say(error, e.what());
        return ME_FAILED;
    }
}

int32_t me_model_preload(me_model * handle, const int32_t * units, int32_t n, char * error) {
    Model & m = handle->model;
    std::lock_guard<std::mutex> lock(m.step_mutex);
    if (m.preload(std::vector<int>(units, units + n))) return ME_OK;
    say(error, m.take_error().c_str());
    return ME_FAILED;
}

void me_model_close(me_model * m) {
    disarm(&m->model);
    unbind(&m->model);
    if (m->model.watches_attention) watch_attention(false);
    me_model_set_selecting(m, 0);
    delete m;
}

int32_t me_model_arm(me_model * m, char *) {
    arm(&m->model);
    return ME_OK;
}
void me_model_disarm(me_model * m) { disarm(&m->model); }
void me_model_unbind(me_model * m) { unbind(&m->model); }
int32_t me_model_bound_tensors(me_model * m) { return bound_tensors(&m->model); }

void me_model_counters(me_model * handle, me_counters * out) {
    const Model & m = handle->model;
    const SourceTotals read = m.source->totals();
#define COPY(name) out->name = m.counters.name;
    ME_COUNTERS(COPY)
#undef COPY
    out->reads = read.reads;
    out->bytes_read = read.bytes;
    out->read_busy_ns = read.read_busy_ns;
    out->disk_busy_ns = read.busy_ns;
    out->prefetch_bytes = read.soon_bytes;
    out->prefetch_busy_ns = read.soon_busy_ns;
    out->direct_files = read.direct_files;
    out->lent_bytes = read.lent_bytes;
    out->packed_bytes = m.parts ? m.parts->committed_bytes() : 0;
    out->peak_packed_bytes = m.parts ? m.parts->peak_committed_bytes() : 0;
    out->committed_bytes = m.arena ? static_cast<int64_t>(m.arena->committed_bytes()) : 0;
    out->peak_committed_bytes = m.arena ? static_cast<int64_t>(m.arena->peak_committed_bytes()) : 0;
}

int32_t me_model_take_error(me_model * m, char * error) {
    const std::string e = m->model.take_error();
    say(error, e.c_str());
    return e.empty() ? 0 : 1;
}

void me_model_resident(me_model * handle, uint8_t * out) {
    Model & m = handle->model;
    std::lock_guard<std::mutex> lock(m.step_mutex);
    for (int i = 0; i < m.n_units(); i++) out[i] = m.unit(i).slot >= 0;
}

void me_model_unit_bytes(me_model * handle, int64_t * out) {
    Model & m = handle->model;
    for (int i = 0; i < m.n_units(); i++) out[i] = m.unit(i).bytes;
}

void me_model_part_bytes(me_model * handle, int64_t * out) {
    Model & m = handle->model;
    for (int i = 0; i < m.n_units(); i++, out += N_PARTS + BOTH_PARTS) {
        out[HEAD] = m.part_bytes(i)[HEAD];
        out[TAIL] = m.part_bytes(i)[TAIL];
        for (uint32_t mask = 1; mask <= BOTH_PARTS; mask++) out[N_PARTS + mask - 1] = m.saved_bytes(i, mask);
    }
}

void me_model_held_parts(me_model * handle, uint8_t * out) {
    Model & m = handle->model;
    std::lock_guard<std::mutex> lock(m.step_mutex);
    for (int i = 0; i < m.n_units(); i++) out[i] = static_cast<uint8_t>(m.held_parts(i));
}

void me_model_drop_empty_parts(me_model * handle) {
    Model & m = handle->model;
    std::lock_guard<std::mutex> lock(m.step_mutex);
    m.drop_empty_parts();
}

int32_t me_model_step(me_model * m, me_step_view * out) {
    if (!m->model.step) return 0;
    *out = *m->model.step;
    return 1;
}

int32_t me_model_set_lookahead(me_model * m, int32_t depth, int32_t width, int32_t rescale, char * error) {
    int n_expert = 0;
    for (const Layer & l : m->model.layers) n_expert = std::max(n_expert, l.n_expert);
    if (depth < 0 || depth > ME_MAX_AHEAD || width < 0 || width > n_expert) {
        snprintf(error, ME_ERROR_BYTES, "look-ahead of %d layers and %d experts: the limits are %d and %d", depth, width, ME_MAX_AHEAD, n_expert);
        return ME_FAILED;
    }
    std::lock_guard<std::mutex> lock(m->model.step_mutex);
    m->model.look.depth = width > 0 ? depth : 0;
    m->model.look.width = width;
    m->model.look.rescale = rescale != 0;
    return ME_OK;
}

int32_t me_model_ahead(me_model * m, int32_t most) {
    if (!m->model.step || m->model.look.depth == 0) return 0;
    const auto t0 = std::chrono::steady_clock::now();
    const int32_t n = look_ahead(m->model, m->model.step_layer, m->model.step->input, m->model.step->n_tokens, most);
    m->model.counters.look_ahead_ns += std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - t0).count();
    return n;
}

int32_t me_model_known_routers(me_model * m) {
    int32_t n = 0;
    for (const Layer & l : m->model.layers) n += l.router.weight != nullptr;
    return n;
}

int32_t me_model_early_routers(me_model * m) {
    int32_t n = 0;
    for (const Layer & l : m->model.layers) n += l.router.early;
    return n;
}

void me_model_set_selecting(me_model * m, int32_t on) {
    const bool wanted = on != 0 && m->model.select;
    if (m->model.selecting.exchange(wanted) != wanted) count_selecting(wanted ? 1 : -1);
}

int32_t me_model_check_selecting(me_model * m, char * error) {
    for (const Layer & l : m->model.layers) {
        if (l.router.sorts && !l.router.shared && l.n_used > 0) continue;
        snprintf(error, ME_ERROR_BYTES, l.router.shared ? "block %d uses its choice of experts for more than its experts"
                                                        : "llama.cpp's graph does not show how block %d chooses its experts", l.number);
        return ME_FAILED;
    }
    return ME_OK;
}

int32_t me_model_selection(me_model * m, me_selection_view * out) {
    if (!m->model.selection) return 0;
    *out = *m->model.selection;
    return 1;
}

int32_t me_model_gating(me_model * m, int32_t layer_pos, float * scale) {
    if (layer_pos < 0 || layer_pos >= static_cast<int32_t>(m->model.layers.size())) return ME_GATES_UNKNOWN;
    const Router & r = m->model.layers[static_cast<size_t>(layer_pos)].router;
    *scale = r.gate_scale;
    return r.gates;
}

void me_model_watch_attention(me_model * m) {
    if (!m->model.watches_attention) watch_attention(true);
    m->model.watches_attention = true;
}

void me_model_set_renormalise(me_model * m, int32_t on) { m->model.renormalise = on != 0; }

double me_model_set_noise(me_model * m, int32_t layer_pos, float relative, uint64_t seed) {
    const double added = m->model.noise.energy;
    m->model.noise = {layer_pos, relative, seed | 1, 0.0};
    return added;
}

void me_model_pace(me_model * m, int64_t bytes_per_second) { m->model.source->pace(bytes_per_second); }

void me_model_set_stop(me_model * m, int32_t stop) { m->model.stop = stop != 0; }

int64_t me_model_scratch_bytes(me_model * m, int64_t n_ubatch, int32_t n_used, int32_t n_threads) {
    int64_t selection = 0;
    for (const Layer & l : m->model.layers) selection = std::max(selection, Selector::bytes(l.n_expert, n_ubatch));
    return Ffn::scratch_bytes(m->model, n_ubatch, n_used, n_threads) + m->model.unpacking_bytes() + (m->model.selecting ? selection : 0);
}
