#include "model.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>

#include "disk_source.h"

namespace moe_edge {

static int64_t floor_to(int64_t n, int64_t to) { return n / to * to; }
static int64_t ceil_to(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

const Piece & Unit::piece(Projection p) const {
    for (int i = 0; i < n_pieces; i++) {
        if (pieces[i].projection == p) return pieces[i];
    }
    return pieces[0];
}

uint32_t Unit::bit(Projection p) const {
    for (int i = 0; i < n_pieces; i++) {
        if (pieces[i].projection == p) return 1u << i;
    }
    return 0;
}

static const char * const PROJECTION_NAMES[] = {"up", "gate", "down", "gate_up"};

static std::string tensor_name(const Layer & layer, Projection projection, int expert) {
    return "tensor 'blk." + std::to_string(layer.number) + ".ffn_" + PROJECTION_NAMES[projection] +
           "_exps.weight' of expert " + std::to_string(expert);
}

Model::Model(const me_model_desc & desc)
    : n_levels(desc.n_levels), pages(system_pages(desc.page_bytes)), n_io_threads_(desc.n_io_threads) {
    units_ = std::vector<Unit>(static_cast<size_t>(add_layers(desc)));
    add_units(desc);
    std::vector<std::string> paths(desc.paths, desc.paths + desc.n_paths);
    source = std::make_unique<DiskSource>(paths, desc.n_io_threads, desc.direct_io != 0, largest_packed_, pages,
                                          [this](const ReadJob & j, const std::string & e) { on_read(j, e); });
}

int Model::add_layers(const me_model_desc & desc) {
    int n_units = 0;
    for (int i = 0; i < desc.n_layers; i++) {
        const me_layer_desc & d = desc.layers[i];
        Layer l;
        l.number = d.layer;
        l.n_expert = d.n_expert;
        l.n_embd = d.n_embd;
        l.n_ff = d.n_ff;
        l.fused = d.fused != 0;
        l.gated = d.gated != 0;
        const size_t n_bias = static_cast<size_t>(d.n_expert) * static_cast<size_t>(d.n_ff);
        if (d.bias_up) l.bias_up.assign(d.bias_up, d.bias_up + n_bias);
        if (d.bias_gate) l.bias_gate.assign(d.bias_gate, d.bias_gate + n_bias);
        l.first_unit = n_units;
        n_units += d.n_expert * n_levels;
        layers.push_back(std::move(l));
    }
    return n_units;
}

void Model::add_units(const me_model_desc & desc) {
    int64_t next = 0;
    for (const Layer & l : layers) {
        for (int e = 0; e < l.n_expert * n_levels; e++) {
            Unit & u = units_[static_cast<size_t>(l.first_unit + e)];
            u.n_pieces = l.fused || !l.gated ? 2 : 3;
            for (int p = 0; p < u.n_pieces; p++) {
                if (next >= desc.n_pieces) throw std::runtime_error("the piece table is shorter than its layers need");
                add_piece(u.pieces[p], desc.pieces[next++], l, e / n_levels);
            }
            lay_out(u);
            largest_unit_ = std::max(largest_unit_, u.bytes);
            smallest_unit_ = std::min(smallest_unit_, u.bytes);
        }
    }
}

void Model::add_piece(Piece & piece, const me_piece_desc & d, const Layer & layer, int expert) const {
    piece.file = d.file;
    piece.type = static_cast<ggml_type>(d.type);
    piece.projection = static_cast<Projection>(d.projection);
    piece.cols = d.cols;
    piece.rows = d.rows;
    piece.offset = d.offset;
    piece.stored_bytes = d.stored_bytes;
    piece.nbytes = d.nbytes;
    piece.codec = d.codec;
    const std::string name = tensor_name(layer, piece.projection, expert);
    if (!knows_codec(piece.codec)) {
        throw std::runtime_error(name + " is stored with codec " + std::to_string(piece.codec) +
                                 ", which this moe-edge does not have; it has 0 (raw) and 1 (planes): install a newer one");
    }
    if (piece.packed() && !planes_of_type(piece.type)) {
        throw std::runtime_error(name + " is packed in planes, which type " + std::to_string(d.type) + " does not have");
    }
    if (piece.packed() && !zstd.usable()) throw std::runtime_error(name + " is packed, and no zstd library was given");
    if (!piece.packed() && piece.stored_bytes != piece.nbytes) {
        throw std::runtime_error(name + " is stored raw in " + std::to_string(piece.stored_bytes) + " bytes but has " +
                                 std::to_string(piece.nbytes) + "; its table of pieces is damaged");
    }
}

void Model::set_arena(int64_t arena_bytes) {
    if (arena) throw std::runtime_error("the arena of this model is already set");
    const int64_t budget = pages.floor(arena_bytes);
    const int64_t n_slots = std::min<int64_t>(n_units(), budget / smallest_unit_ + 1);
    arena = std::make_unique<Arena>(static_cast<size_t>(largest_unit_), static_cast<size_t>(n_slots), static_cast<size_t>(budget),
                                    pages);
}

Model::~Model() {
    if (source) drain();
    source.reset();
}

void Model::lay_out(Unit & u) {
    // A raw piece keeps its offset modulo the block, so that a direct read lands in place without a copy. A packed one is
    // read into a buffer of the source's and unpacked to the start of its place.
    int64_t at = 0;
    for (int p = 0; p < u.n_pieces; p++) {
        Piece & piece = u.pieces[p];
        piece.read_offset = floor_to(piece.offset, READ_ALIGN);
        piece.read_bytes = ceil_to(piece.offset + piece.stored_bytes, READ_ALIGN) - piece.read_offset;
        piece.slot_offset = at;
        at += piece.packed() ? ceil_to(piece.nbytes, READ_ALIGN) : piece.read_bytes;
        if (piece.packed()) largest_packed_ = std::max(largest_packed_, piece.read_bytes);
    }
    u.bytes = pages.ceil(at);
}

bool Model::place(int unit_id) {
    if (!arena) return false;
    Unit & u = unit(unit_id);
    const int slot = arena->acquire(static_cast<size_t>(u.bytes));
    if (!arena->error().empty()) set_error(arena->error());
    if (slot < 0) return false;
    u.slot = slot;
    u.ready = 0;
    return true;
}

void Model::submit(int unit_id, int p, bool soon) {
    Unit & u = unit(unit_id);
    const Piece & piece = u.pieces[p];
    ReadJob job;
    job.file = piece.file;
    job.offset = piece.read_offset;
    job.length = piece.read_bytes;
    job.needed = piece.offset + piece.stored_bytes - piece.read_offset;
    job.dst = piece.packed() ? nullptr : arena->data(u.slot) + piece.slot_offset;
    job.tag = static_cast<int64_t>(unit_id) * MAX_PIECES + p;
    job.soon = soon;
    u.pending |= 1u << p;
    in_flight_++;
    source->submit(job);
}

bool Model::start(int unit_id) {
    if (!place(unit_id)) return false;
    Unit & u = unit(unit_id);
    std::lock_guard<std::mutex> lock(mutex_);
    u.needed = true;
    u.prefetched = u.cancelled = false;
    for (int p = 0; p < u.n_pieces; p++) submit(unit_id, p, false);
    return true;
}

bool Model::load(int unit_id) {
    if (!start(unit_id)) return false;
    counters.loads++;
    return true;
}

bool Model::preload(const std::vector<int> & unit_ids) {
    for (int id : unit_ids) {
        if (id < 0 || id >= n_units() || unit(id).slot >= 0) {
            set_error("unit " + std::to_string(id) + " of " + std::to_string(n_units()) + " cannot be preloaded: it does not exist or is in memory");
        } else if (!start(id)) {
            set_error("preloading exceeds the memory of the expert arena");
        } else {
            counters.preloaded++;
        }
        if (failed()) break;
    }
    {
        std::unique_lock<std::mutex> lock(mutex_);
        arrived_.wait(lock, [&] { return in_flight_ == 0; });
    }
    if (!failed()) return true;
    drain();
    return false;
}

bool Model::prefetch(const std::vector<int> & unit_ids) {
    for (size_t i = 0; i < unit_ids.size(); i++) {
        if (!place(unit_ids[i])) return false;
    }
    std::lock_guard<std::mutex> lock(mutex_);
    for (int id : unit_ids) {
        unit(id).needed = unit(id).cancelled = false;
        unit(id).prefetched = true;
        counters.prefetched++;
    }
    for (int id : unit_ids) {
        for (bool down : {false, true}) {
            for (int p = 0; p < unit(id).n_pieces; p++) {
                if ((unit(id).pieces[p].projection == DOWN) == down) submit(id, p, true);
            }
        }
    }
    return true;
}

void Model::need(int unit_id) {
    Unit & u = unit(unit_id);
    std::lock_guard<std::mutex> lock(mutex_);
    const bool whole = u.ready == u.all_bits();
    if (u.prefetched) {
        counters.prefetch_useful++;
        counters.prefetch_late += !whole;
        u.prefetched = false;
    }
    u.needed = true;
    if (whole) return;
    source->promote(static_cast<int64_t>(unit_id) * MAX_PIECES, static_cast<int64_t>(unit_id + 1) * MAX_PIECES);
    for (int p = 0; p < u.n_pieces; p++) {
        if (!((u.ready | u.pending) & (1u << p))) submit(unit_id, p, false);
    }
}

void Model::cancel_queued(int first_unit, int end_unit) {
    for (int64_t tag : source->cancel(static_cast<int64_t>(first_unit) * MAX_PIECES, static_cast<int64_t>(end_unit) * MAX_PIECES)) {
        Unit & u = unit(static_cast<int>(tag / MAX_PIECES));
        u.pending &= ~(1u << (tag % MAX_PIECES));
        u.cancelled = true;
        in_flight_--;
    }
}

void Model::cancel(int first_unit, int end_unit) {
    std::lock_guard<std::mutex> lock(mutex_);
    cancel_queued(first_unit, end_unit);
    arrived_.notify_all();
}

void Model::settle(Unit & u) {
    if (!u.prefetched) return;
    u.prefetched = false;
    (u.cancelled ? counters.prefetch_cancelled : counters.prefetch_wasted)++;
    for (int p = 0; p < u.n_pieces; p++) {
        if (u.ready & (1u << p)) counters.wasted_bytes += u.pieces[p].read_bytes;
    }
}

void Model::evict(int unit_id) {
    using clock = std::chrono::steady_clock;
    Unit & u = unit(unit_id);
    if (u.slot < 0) return;
    {
        std::unique_lock<std::mutex> lock(mutex_);
        if (u.pending) cancel_queued(unit_id, unit_id + 1);
        if (u.pending) {
            const auto t0 = clock::now();
            arrived_.wait(lock, [&] { return u.pending == 0; });
            counters.stall_ns += std::chrono::duration_cast<std::chrono::nanoseconds>(clock::now() - t0).count();
        }
        settle(u);
    }
    arena->release(u.slot);
    u.slot = -1;
    u.ready = 0;
    counters.evictions++;
}

std::string Model::piece_name(int unit_id, int piece) const {
    const Unit & u = units_[static_cast<size_t>(unit_id)];
    size_t l = layers.size() - 1;
    while (l > 0 && layers[l].first_unit > unit_id) l--;
    const int expert = (unit_id - layers[l].first_unit) / n_levels;
    return source->name(u.pieces[piece].file) + ": " + tensor_name(layers[l], u.pieces[piece].projection, expert);
}

std::string Model::unpack(const ReadJob & job) {
    using clock = std::chrono::steady_clock;
    const Unit & u = unit(static_cast<int>(job.tag / MAX_PIECES));
    const Piece & piece = u.pieces[job.tag % MAX_PIECES];
    if (!piece.packed()) return {};
    const auto t0 = clock::now();
    std::string error = decode_planes(job.dst + (piece.offset - piece.read_offset), piece.stored_bytes, piece.type,
                                      arena->data(u.slot) + piece.slot_offset, piece.nbytes);
    counters.unpack_ns += std::chrono::duration_cast<std::chrono::nanoseconds>(clock::now() - t0).count();
    counters.unpacked_bytes += piece.nbytes;
    return error;
}

// Unpacking happens here, on the thread that has read, before anybody is told; `pending` keeps the slot meanwhile.
void Model::on_read(const ReadJob & job, const std::string & read_error) {
    const std::string error = read_error.empty() ? unpack(job) : read_error;
    std::lock_guard<std::mutex> lock(mutex_);
    Unit & u = unit(static_cast<int>(job.tag / MAX_PIECES));
    const uint32_t bit = 1u << (job.tag % MAX_PIECES);
    u.pending &= ~bit;
    if (error.empty()) {
        u.ready |= bit;
    } else if (error == ExpertSource::CANCELLED && u.needed) {
        // Given up, and needed before this was told: need() still took it for one on its way.
        submit(static_cast<int>(job.tag / MAX_PIECES), static_cast<int>(job.tag % MAX_PIECES), false);
    } else if (error == ExpertSource::CANCELLED) {
        u.cancelled = true;
    } else if (!u.needed) {
        counters.prefetch_failed++;  // read again, and told, by the step that needs it
    } else if (error_.empty()) {
        error_ = piece_name(static_cast<int>(job.tag / MAX_PIECES), static_cast<int>(job.tag % MAX_PIECES)) + " " + error;
    }
    arrivals_++;
    in_flight_--;
    arrived_.notify_all();
}

bool Model::wait_arrival(int64_t seen, int n_waiters) {
    using clock = std::chrono::steady_clock;
    std::unique_lock<std::mutex> lock(mutex_);
    if (arrivals_ != seen || !error_.empty()) return true;
    const bool stalled = n_waiting_ + 1 == n_waiters;
    if (stalled && in_flight_ == 0) return false;
    n_waiting_++;
    if (stalled) stalled_since_ = clock::now();
    arrived_.wait(lock, [&] { return arrivals_ != seen || !error_.empty(); });
    if (n_waiting_-- == n_waiters) {
        counters.stall_ns += std::chrono::duration_cast<std::chrono::nanoseconds>(clock::now() - stalled_since_).count();
    }
    return true;
}

void Model::tell_waiters() {
    std::lock_guard<std::mutex> lock(mutex_);
    arrivals_++;
    arrived_.notify_all();
}

void Model::drain() {
    std::unique_lock<std::mutex> lock(mutex_);
    cancel_queued(0, n_units());
    arrived_.wait(lock, [&] { return in_flight_ == 0; });
    for (int i = 0; i < n_units(); i++) {
        Unit & u = unit(i);
        if (u.slot >= 0 && u.ready != u.all_bits()) {
            settle(u);
            arena->release(u.slot);
            u.slot = -1;
            u.ready = 0;
        }
    }
}

void Model::set_error(const std::string & e) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (error_.empty()) error_ = e;
}

std::string Model::take_error() {
    std::lock_guard<std::mutex> lock(mutex_);
    std::string e;
    e.swap(error_);
    return e;
}

bool Model::failed() {
    std::lock_guard<std::mutex> lock(mutex_);
    return !error_.empty();
}

int Model::layer_pos(int number) const {
    for (size_t i = 0; i < layers.size(); i++) {
        if (layers[i].number == number) return static_cast<int>(i);
    }
    return -1;
}

}  // namespace moe_edge
