#include "model.h"

#include <algorithm>
#include <chrono>
#include <cstring>
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

uint32_t Unit::packed_bits() const {
    uint32_t bits = 0;
    for (int p = 0; p < n_pieces; p++) bits |= pieces[p].packed() ? 1u << p : 0;
    return bits;
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
            part_bytes_.push_back(lay_out_parts(u));
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
                                 ", which this moe-edge does not have; it has 0 (raw), 1 (planes) and 2 (codes): install a newer one");
    }
    if (piece.packed() && !packs_type(piece.codec, piece.type)) {
        throw std::runtime_error(name + " is packed in " + (piece.codec == CODEC_PLANES ? "planes" : "codes") + ", which type " + std::to_string(d.type) + " does not have");
    }
    if (piece.codec == CODEC_PLANES && !zstd.usable()) throw std::runtime_error(name + " is packed, and no zstd library was given");
    if (!piece.packed() && piece.stored_bytes != piece.nbytes) {
        throw std::runtime_error(name + " is stored raw in " + std::to_string(piece.stored_bytes) + " bytes but has " +
                                 std::to_string(piece.nbytes) + "; its table of pieces is damaged");
    }
}

void Model::set_arena(int64_t arena_bytes, int64_t parts_bytes) {
    if (arena) throw std::runtime_error("the arena of this model is already set");
    const int64_t budget = pages.floor(arena_bytes);
    const int64_t n_slots = std::min<int64_t>(n_units(), budget / smallest_unit_ + 1);
    arena = std::make_unique<Arena>(static_cast<size_t>(largest_unit_), static_cast<size_t>(n_slots), static_cast<size_t>(budget),
                                    pages);
    early_pages_ = std::make_unique<EarlyPages>(*arena, static_cast<size_t>(smallest_unit_));
    if (parts_bytes <= 0) return;
    parts = std::make_unique<Parts>(part_bytes_, pages.floor(parts_bytes), pages);
    unpackers_ = std::make_unique<Unpackers>(static_cast<int>(n_io_threads_), [this](int64_t tag) {
        ReadJob job;
        job.tag = tag;
        on_read(job, {});
    });
}

Model::~Model() {
    early_pages_.reset();
    if (source) drain();
    unpackers_.reset();
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

PartBytes Model::lay_out_parts(Unit & u) const {
    PartBytes at{0, 0};
    for (int p = 0; p < u.n_pieces; p++) {
        Piece & piece = u.pieces[p];
        if (!piece.packed()) continue;
        const int64_t cut = planes_cut(piece.type, piece.stored_bytes, piece.nbytes);
        const int64_t at_cut = piece.offset - piece.read_offset + cut;
        const bool can_cut = cut > 0 && at_cut >= 2 * READ_ALIGN;  // the tail may begin a block before, behind the offset
        piece.head_bytes = can_cut ? std::min(ceil_to(at_cut, READ_ALIGN), piece.read_bytes) : piece.read_bytes;
        piece.tail_from = can_cut ? floor_to(at_cut, READ_ALIGN) : piece.read_bytes;
        piece.part_offset[HEAD] = at[HEAD];
        piece.part_offset[TAIL] = at[TAIL];
        at[HEAD] += piece.head_bytes;
        at[TAIL] += piece.read_bytes - piece.tail_from;
    }
    return {pages.ceil(at[HEAD]), pages.ceil(at[TAIL])};
}

bool Model::place(int unit_id) {
    if (!arena) return false;
    early_pages_.reset();
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
    const uint32_t had = u.had[p] = parts_of(unit_id, p);
    const int64_t tag = static_cast<int64_t>(unit_id) * MAX_PIECES + p;
    u.pending |= 1u << p;
    in_flight_++;
    if (piece.packed() && had == piece.all_parts()) {
        unpackers_->submit(tag, soon);
        return;
    }
    const int64_t from = had == HEAD_BIT ? piece.tail_from : 0, to = had == TAIL_BIT ? piece.head_bytes : piece.read_bytes;
    ReadJob job;
    job.file = piece.file;
    job.offset = piece.read_offset + from;
    job.length = to - from;
    job.needed = std::min(piece.offset + piece.stored_bytes - piece.read_offset, to) - from;
    job.dst = piece.packed() ? nullptr : arena->data(u.slot) + piece.slot_offset;
    job.tag = tag;
    job.soon = soon;
    source->submit(job);
}

uint32_t Model::parts_of(int unit_id, int p) const {
    if (!parts) return 0;
    const auto has = [&](int part) { return (parts->filled(unit_id, part) >> p) & 1u; };
    return has(HEAD) * HEAD_BIT | has(TAIL) * TAIL_BIT;
}

uint32_t Model::held_parts(int unit_id) {
    if (!parts) return 0;
    std::lock_guard<std::mutex> lock(mutex_);
    const uint32_t all = unit(unit_id).packed_bits();
    uint32_t held = 0;
    for (int part : {HEAD, TAIL}) {
        const bool whole = parts->has_place(unit_id, part) && parts->filled(unit_id, part) == all;
        held |= whole ? 1u << part : 0;
    }
    return held;
}

int64_t Model::saved_bytes(int unit_id, uint32_t mask) {
    int64_t saved = 0;
    const Unit & u = unit(unit_id);
    for (int p = 0; p < u.n_pieces; p++) {
        const Piece & piece = u.pieces[p];
        if (!piece.packed() || mask == 0) continue;
        if ((mask & piece.all_parts()) == piece.all_parts()) {
            saved += piece.read_bytes;
        } else if (piece.has_tail()) {
            saved += mask & HEAD_BIT ? piece.tail_from : piece.read_bytes - piece.head_bytes;
        }
    }
    return saved;
}

void Model::drop_part(int unit_id, int part) {
    Unit & u = unit(unit_id);
    std::unique_lock<std::mutex> lock(mutex_);
    // What is being delivered may be using it. What is lost here of a prefetched unit is read again when it is needed.
    if (u.pending) cancel_queued(unit_id, unit_id + 1);
    arrived_.wait(lock, [&] { return u.pending == 0; });
    parts->drop(unit_id, part);
}

void Model::drop_empty_parts() {
    for (int i = 0; parts && i < n_units(); i++) {
        for (int part : {HEAD, TAIL}) {
            if (parts->has_place(i, part) && !((held_parts(i) >> part) & 1u)) drop_part(i, part);
        }
    }
}

bool Model::hold_parts(const int32_t * unit_ids, const int32_t * masks, int n) {
    if (n == 0) return true;
    if (!parts) {
        set_error("the scheduler's plan keeps packed experts, and there is no packed cache");
        return false;
    }
    for (int i = 0; i < n; i++) {
        if (unit_ids[i] < 0 || unit_ids[i] >= n_units() || masks[i] < 0 || masks[i] > static_cast<int32_t>(BOTH_PARTS)) {
            set_error("the scheduler's plan keeps parts of an expert that does not exist");
            return false;
        }
        for (int part : {HEAD, TAIL}) {
            if (!((masks[i] >> part) & 1) && parts->has_place(unit_ids[i], part)) drop_part(unit_ids[i], part);
        }
    }
    for (int i = 0; i < n; i++) {
        for (int part : {HEAD, TAIL}) {
            if (!((masks[i] >> part) & 1) || part_bytes(unit_ids[i])[static_cast<size_t>(part)] == 0) continue;
            std::unique_lock<std::mutex> lock(mutex_);
            if (parts->hold(unit_ids[i], part)) continue;
            lock.unlock();
            set_error("the scheduler's plan exceeds the memory of the packed cache");
            return false;
        }
    }
    return true;
}

// A load of a unit of which something is in memory.
void Model::count_parts(int unit_id) {
    if (!parts) return;
    const uint32_t held = held_parts(unit_id);
    const PartBytes & bytes = part_bytes(unit_id);
    const uint32_t all = (bytes[HEAD] ? HEAD_BIT : 0) | (bytes[TAIL] ? TAIL_BIT : 0);
    if (held == 0) return;
    if (held == all) {
        counters.packed_hits++;
    } else {
        (held == HEAD_BIT ? counters.exponent_hits : counters.mantissa_hits)++;
    }
    counters.unread_bytes += saved_bytes(unit_id, held);
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
    count_parts(unit_id);
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
    const int64_t first_tag = static_cast<int64_t>(unit_id) * MAX_PIECES, end_tag = first_tag + MAX_PIECES;
    source->promote(first_tag, end_tag);
    if (unpackers_) unpackers_->promote(first_tag, end_tag);
    for (int p = 0; p < u.n_pieces; p++) {
        if (!((u.ready | u.pending) & (1u << p))) submit(unit_id, p, false);
    }
}

void Model::cancel_queued(int first_unit, int end_unit) {
    const int64_t first_tag = static_cast<int64_t>(first_unit) * MAX_PIECES, end_tag = static_cast<int64_t>(end_unit) * MAX_PIECES;
    std::vector<int64_t> tags = source->cancel(first_tag, end_tag);
    if (unpackers_) {
        const std::vector<int64_t> more = unpackers_->cancel(first_tag, end_tag);
        tags.insert(tags.end(), more.begin(), more.end());
    }
    for (int64_t tag : tags) {
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
    const auto unit_id = static_cast<int>(job.tag / MAX_PIECES), p = static_cast<int>(job.tag % MAX_PIECES);
    const Unit & u = unit(unit_id);
    const Piece & piece = u.pieces[p];
    if (!piece.packed()) return {};
    const auto t0 = clock::now();
    const uint32_t had = u.had[p];
    const int64_t lead = piece.offset - piece.read_offset;
    Stored stored;
    stored.bytes = piece.stored_bytes;
    stored.head = (had & HEAD_BIT ? parts->data(unit_id, HEAD) + piece.part_offset[HEAD] : job.dst) + lead;
    stored.head_bytes = std::min((had == 0 ? piece.read_bytes : piece.head_bytes) - lead, piece.stored_bytes);
    stored.tail_from = piece.tail_from - lead;
    if (had & TAIL_BIT) {
        stored.tail = parts->data(unit_id, TAIL) + piece.part_offset[TAIL];
    } else if (had & HEAD_BIT) {
        stored.tail = job.dst;  // what was read begins there
    } else {
        stored.tail = job.dst + piece.tail_from;
    }
    std::string error = decode_packed(stored, piece.codec, piece.type, arena->data(u.slot) + piece.slot_offset, piece.nbytes);
    counters.unpack_ns += std::chrono::duration_cast<std::chrono::nanoseconds>(clock::now() - t0).count();
    counters.unpacked_bytes += piece.nbytes;
    return error;
}

// What was read of a packed piece goes where the packed cache wants it. Its places stay: they are dropped only when
// nothing of the unit is pending.
void Model::keep_parts(const ReadJob & job) {
    const auto unit_id = static_cast<int>(job.tag / MAX_PIECES), p = static_cast<int>(job.tag % MAX_PIECES);
    const Unit & u = unit(unit_id);
    const Piece & piece = u.pieces[p];
    char * to[N_PARTS] = {nullptr, nullptr};
    {
        std::lock_guard<std::mutex> lock(mutex_);
        for (int part : {HEAD, TAIL}) {
            const bool wanted = parts->has_place(unit_id, part) && !((u.had[p] >> part) & 1u);
            if (wanted) to[part] = parts->data(unit_id, part) + piece.part_offset[part];
        }
    }
    if (to[HEAD]) memcpy(to[HEAD], job.dst, static_cast<size_t>(piece.head_bytes));
    if (to[TAIL] && piece.has_tail()) {
        const int64_t read_from = u.had[p] == HEAD_BIT ? piece.tail_from : 0;
        memcpy(to[TAIL], job.dst + (piece.tail_from - read_from), static_cast<size_t>(piece.read_bytes - piece.tail_from));
    }
    std::lock_guard<std::mutex> lock(mutex_);
    for (int part : {HEAD, TAIL}) {
        if (to[part]) parts->fill(unit_id, part, 1u << p);
    }
}

// Unpacking happens here, on the thread that has read, before anybody is told; `pending` keeps the slot meanwhile.
void Model::on_read(const ReadJob & job, const std::string & read_error) {
    const std::string error = read_error.empty() ? unpack(job) : read_error;
    Unit & u = unit(static_cast<int>(job.tag / MAX_PIECES));
    const auto p = static_cast<int>(job.tag % MAX_PIECES);
    const uint32_t bit = 1u << p;
    if (error.empty() && u.pieces[p].kernel != Kernel::PLAIN) rearrange(u.pieces[p], data(u, u.pieces[p]));
    if (error.empty() && parts && job.dst && u.pieces[p].packed()) {
        u.ready |= bit;
        tell_waiters();  // it can be computed with; what is kept for later is copied meanwhile
        keep_parts(job);
    }
    std::lock_guard<std::mutex> lock(mutex_);
    u.pending &= ~bit;
    if (error.empty()) {
        u.ready |= bit;
    } else if (error == ExpertSource::CANCELLED && u.needed) {
        // Given up, and needed before this was told: need() still took it for one on its way.
        submit(static_cast<int>(job.tag / MAX_PIECES), p, false);
    } else if (error == ExpertSource::CANCELLED) {
        u.cancelled = true;
    } else if (!u.needed) {
        counters.prefetch_failed++;  // read again, and told, by the step that needs it
    } else if (error_.empty()) {
        error_ = piece_name(static_cast<int>(job.tag / MAX_PIECES), p) + " " + error;
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
        for (int part : {HEAD, TAIL}) {
            if (parts && parts->has_place(i, part) && parts->filled(i, part) != u.packed_bits()) parts->drop(i, part);
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
