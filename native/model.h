// One opened expert model: which bytes of which file make which expert, what of it is in memory, and the counters.
// A unit is one expert of one layer at one level; its projections ("pieces") are read apart and waited for apart.
// Created and freed by Python (capi.h); used by one llama context at a time:
// a step spans several calls of the backend, and two contexts would evict each other's experts. Engine makes one.
#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "arena.h"
#include "capi.h"
#include "codec.h"
#include "ggml.h"
#include "parts.h"
#include "repack.h"
#include "router.h"
#include "source.h"
#include "unpackers.h"

namespace moe_edge {

enum Projection { UP = 0, GATE = 1, DOWN = 2, GATE_UP = 3 };
constexpr int MAX_PIECES = 3;

struct Piece {
    int file = 0;
    ggml_type type = GGML_TYPE_F32;
    Projection projection = UP;
    Kernel kernel = Kernel::PLAIN;
    int64_t cols = 0, rows = 0;
    int64_t offset = 0, stored_bytes = 0;  // in the file
    int64_t nbytes = 0;                    // what the products read: the whole matrix
    int32_t codec = CODEC_RAW;             // what turns the one into the other
    int64_t read_offset = 0, read_bytes = 0;  // the aligned range that covers it
    // Of the aligned range, when packed: HEAD is [0, head_bytes), TAIL [tail_from, read_bytes), which is nothing for a
    // piece without a cut; the block that holds the cut is in both. And where each lies among its unit's parts.
    int64_t head_bytes = 0, tail_from = 0;
    int64_t part_offset[N_PARTS] = {0, 0};
    int64_t slot_offset = 0;               // where read_offset lands in the slot, or what a packed piece unpacks to
    bool packed() const { return codec != CODEC_RAW; }
    bool has_tail() const { return tail_from < read_bytes; }
    uint32_t all_parts() const { return has_tail() ? BOTH_PARTS : HEAD_BIT; }
    int64_t data_offset() const { return slot_offset + (packed() ? 0 : offset - read_offset); }
};

struct Unit {
    int n_pieces = 0;
    Piece pieces[MAX_PIECES];
    int64_t bytes = 0;       // committed when resident: the aligned ranges, or what they unpack to, in whole pages
    int slot = -1;           // -1: absent
    std::atomic<uint32_t> ready{0};  // bit p: pieces[p] is in memory
    // What follows is for units read ahead; guarded by the model's mutex. A unit with a slot that is not whole has the
    // rest of its pieces on the way, or lost them (cancelled, or a read that failed while nobody needed it).
    uint32_t pending = 0;    // bit p: pieces[p] is queued or being read
    bool needed = false;     // a step waits for it, or has used it: errors count
    bool prefetched = false; // and not used since
    bool cancelled = false;  // lost a piece before it started, since it was prefetched
    const Piece & piece(Projection p) const;
    uint32_t bit(Projection p) const;
    uint32_t all_bits() const { return (1u << n_pieces) - 1; }
    uint32_t packed_bits() const;
    uint32_t had[MAX_PIECES] = {0, 0, 0};  // the parts of each piece that were in memory when it was asked for
};

struct Layer {
    int number = 0;  // the block, as in blk.N
    int n_expert = 0;
    int64_t n_embd = 0, n_ff = 0;
    bool fused = false, gated = true;
    std::vector<float> bias_up, bias_gate;  // [n_expert][n_ff], empty when the model has none
    int first_unit = 0;
    int n_used = 0;              // experts of a token; known once llama.cpp's graph has been seen
    int activation_tensors = 0;  // of the experts' width in one graph; known once llama.cpp's graph has been seen
    Router router;
};

struct Counters {  // see capi.h
#define ME_FIELD(name) std::atomic<int64_t> name{0};
    ME_COUNTERS(ME_FIELD)
#undef ME_FIELD
};

struct Noise {  // see me_model_set_noise
    int layer_pos = -1;
    float relative = 0;
    uint64_t state = 1;
    double energy = 0;
};

class Model {
public:
    // Throws std::runtime_error with a sentence for the user.
    explicit Model(const me_model_desc & desc);
    ~Model();
    // parts_bytes: of the packed cache, beside the arena; 0: none.
    void set_arena(int64_t arena_bytes, int64_t parts_bytes = 0);

    Unit & unit(int layer_pos, int expert, int level) {
        return units_[static_cast<size_t>(layers[static_cast<size_t>(layer_pos)].first_unit + expert * n_levels + level)];
    }
    Unit & unit(int id) { return units_[static_cast<size_t>(id)]; }
    int n_units() const { return static_cast<int>(units_.size()); }
    char * data(const Unit & u, const Piece & p) const { return arena->data(u.slot) + p.data_offset(); }

    // Start reading an absent unit; false when the arena has no room for it under the budget.
    bool load(int unit_id);
    // Read absent units in this order and wait for them, outside a step; false, with an error, when one cannot be read.
    bool preload(const std::vector<int> & unit_ids);
    // As load() for units that no step needs yet, in this order, gate and up before down.
    bool prefetch(const std::vector<int> & unit_ids);
    // A step needs a unit that has a slot: what is queued of it comes first, what was lost is read again.
    void need(int unit_id);
    // Forget what is queued of the prefetched units first_unit <= id < end_unit that no step has needed.
    void cancel(int first_unit, int end_unit);
    // What is queued of it is cancelled; a piece that is being read is waited for, at most one of a prefetched unit.
    void evict(int unit_id);
    // What the packed cache is to hold from now on: of unit_ids[i] the parts in masks[i], of others what it held. A part
    // that has just been given its place is filled when the unit is read next. False, with an error, beyond its budget.
    bool hold_parts(const int32_t * unit_ids, const int32_t * masks, int n);
    // Take back the places of parts that are not whole. Not within a step.
    void drop_empty_parts();
    // Bit b: part b of the unit is there, whole.
    uint32_t held_parts(int unit_id);
    // Bytes a part takes; bytes that need not be read when the parts of `mask` are there.
    const PartBytes & part_bytes(int unit_id) const { return part_bytes_[static_cast<size_t>(unit_id)]; }
    int64_t saved_bytes(int unit_id, uint32_t mask);
    // Sleep until something has changed since `seen` (a value of arrivals()): a piece arrived, a worker finished, an error.
    // n_waiters: threads that may wait at the same time; time in which all of them wait is counted as stall.
    // False when nothing can change any more: no read is in flight and no other thread is at work.
    bool wait_arrival(int64_t seen, int n_waiters);
    void tell_waiters();
    int64_t arrivals() { std::lock_guard<std::mutex> l(mutex_); return arrivals_; }
    // Wait for reads in flight, then drop every unit that is not whole. After an error.
    void drain();
    std::string take_error();
    void set_error(const std::string & e);
    bool failed();

    int layer_pos(int number) const;
    // What reading packed pieces takes beside the arena: buffers, and for each thread a chunk and zstd's context.
    int64_t unpacking_bytes() const { return largest_packed_ ? source->totals().lent_bytes + 2 * n_io_threads_ * UNPACK_BYTES : 0; }
    int64_t io_threads() const { return n_io_threads_; }
    std::vector<Layer> layers;
    int n_levels = 1;
    // Of pieces whose kernel wants another order than the file's: puts the matrix into it, before anyone reads it.
    void (*rearrange)(const Piece & piece, char * data) = nullptr;
    int64_t rearranging_bytes = 0, tile_bytes = 0;  // what that takes on each thread that reads, products on each that computes
    const Pages pages;  // of the arena, the units and the reader
    me_schedule_fn schedule = nullptr, announce = nullptr;
    me_select_fn select = nullptr;
    void * schedule_user = nullptr;
    me_mailbox mail{};
    std::atomic<bool> stop{false};
    std::atomic<bool> renormalise{false};
    const me_step_view * step = nullptr;  // while the scheduler is asked, about
    int step_layer = -1;                  // this layer
    Noise noise;
    LookAhead look;
    bool watches_attention = false;
    std::atomic<bool> selecting{false};                // see me_model_set_selecting
    const me_selection_view * selection = nullptr;     // while it chooses
    std::unique_ptr<Arena> arena;
    std::unique_ptr<Parts> parts;  // null without a packed cache
    std::unique_ptr<ExpertSource> source;
    Counters counters;
    std::mutex step_mutex;

private:
    int add_layers(const me_model_desc & desc);  // returns the number of units
    void add_units(const me_model_desc & desc);
    void add_piece(Piece & piece, const me_piece_desc & desc, const Layer & layer, int expert) const;
    void lay_out(Unit & u);
    PartBytes lay_out_parts(Unit & u) const;
    std::string piece_name(int unit_id, int piece) const;  // "FILE: tensor '...' of expert E"
    void on_read(const ReadJob & job, const std::string & error);
    std::string unpack(const ReadJob & job);  // into its slot; returns what is wrong
    uint32_t parts_of(int unit_id, int piece) const;  // that are in memory; under mutex_
    void keep_parts(const ReadJob & job);  // of what was read
    void count_parts(int unit_id);
    void drop_part(int unit_id, int part);
    bool place(int unit_id);  // gives it a slot
    bool start(int unit_id);  // and reads it there
    void submit(int unit_id, int piece, bool soon);  // under mutex_
    void cancel_queued(int first_unit, int end_unit);  // under mutex_
    void settle(Unit & u);  // count a prefetched unit that is evicted; under mutex_

    std::vector<Unit> units_;
    std::vector<PartBytes> part_bytes_;  // of each unit
    std::unique_ptr<EarlyPages> early_pages_;  // from set_arena() to the first unit
    std::unique_ptr<Unpackers> unpackers_;  // with a packed cache
    int64_t n_io_threads_ = 0;
    int64_t largest_unit_ = 0, smallest_unit_ = INT64_MAX, largest_packed_ = 0;
    std::mutex mutex_;
    std::condition_variable arrived_;
    int64_t arrivals_ = 0, in_flight_ = 0;
    int n_waiting_ = 0;
    std::chrono::steady_clock::time_point stalled_since_;
    std::string error_;
};

}  // namespace moe_edge
