#include "relay.h"

#include <errno.h>
#include <sys/socket.h>
#include <sys/types.h>

#include <chrono>
#include <cstring>
#include <unordered_map>
#include <vector>

#include "board.h"
#include "ggml-rpc.h"
#include "ggml.h"

namespace moe_edge {

namespace {

// ggml-rpc.cpp, enum rpc_cmd of protocol 7.0.
enum Command : uint8_t {
    ALLOC_BUFFER, GET_ALIGNMENT, GET_MAX_SIZE, BUFFER_GET_BASE, FREE_BUFFER, BUFFER_CLEAR, SET_TENSOR, SET_TENSOR_HASH,
    GET_TENSOR, COPY_TENSOR, GRAPH_COMPUTE, GET_DEVICE_MEMORY, INIT_TENSOR, GET_ALLOC_SIZE, HELLO, DEVICE_COUNT,
    GRAPH_RECOMPUTE, MEMSET_TENSOR, NONE, COUNT
};
static_assert(RPC_PROTO_MAJOR_VERSION == 7, "another RPC protocol: compare the commands and their answers");

bool has_answer(uint8_t command) {
    switch (command) {
        case ALLOC_BUFFER: case GET_ALIGNMENT: case GET_MAX_SIZE: case BUFFER_GET_BASE: case SET_TENSOR_HASH: case GET_TENSOR:
        case COPY_TENSOR: case GET_DEVICE_MEMORY: case GET_ALLOC_SIZE: case HELLO: case DEVICE_COUNT:
            return true;
        default:
            return false;
    }
}

// rpc_tensor, packed: where its name is, and its size.
constexpr size_t NAME_AT = 8 + 4 + 8 + 2 * 4 * GGML_MAX_DIMS + 4 + GGML_MAX_OP_PARAMS + 4 + 8 * GGML_MAX_SRC + 8 + 8 + 8;
constexpr size_t TENSOR_BYTES = NAME_AT + GGML_MAX_NAME + 4;
static_assert(TENSOR_BYTES % 8 == 0, "rpc_tensor is a multiple of 8 bytes");

constexpr uint64_t CHUNK = 256 << 10;
constexpr uint64_t SMALL = 64 << 10;        // no command but SET_TENSOR and GRAPH_COMPUTE carries more
constexpr uint64_t GRAPH_MOST = 256 << 20;  // the largest graph we pass on
constexpr size_t HEAD = 1 + 8;

#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0  // macOS: the sockets carry SO_NOSIGPIPE, set in Python
#endif

bool send_all(int fd, const void * data, size_t n) {
    const char * p = static_cast<const char *>(data);
    while (n > 0) {
        const ssize_t done = send(fd, p, n, MSG_NOSIGNAL);
        if (done < 0 && errno == EINTR) continue;
        if (done <= 0) return false;
        p += done;
        n -= static_cast<size_t>(done);
    }
    return true;
}

bool receive_all(int fd, void * data, size_t n) {
    char * p = static_cast<char *>(data);
    while (n > 0) {
        const ssize_t done = recv(fd, p, n, 0);
        if (done < 0 && errno == EINTR) continue;
        if (done <= 0) return false;
        p += done;
        n -= static_cast<size_t>(done);
    }
    return true;
}

struct Request {
    uint8_t command = NONE;
    uint64_t size = 0;
    std::vector<char> start;  // of its data, as far as it is looked at or small
};

bool receive_head(int fd, Request & r) {
    char head[HEAD];
    if (!receive_all(fd, head, HEAD)) return false;
    r.command = static_cast<uint8_t>(head[0]);
    memcpy(&r.size, head + 1, 8);
    if (r.command >= COUNT) return false;
    const bool large = r.command == SET_TENSOR || r.command == GRAPH_COMPUTE;
    if (!large && r.size > SMALL) return false;
    r.start.resize(static_cast<size_t>(r.size < CHUNK ? r.size : CHUNK));
    return receive_all(fd, r.start.data(), r.start.size());
}

// Head and start to `to`, then the rest of the data, a chunk at a time. `to` < 0, or one that breaks: the rest is only
// taken. False when `from` breaks; `sent` says whether all reached `to`.
bool pass_request(int from, int to, const Request & r, bool & sent) {
    std::vector<char> first(HEAD + r.start.size());
    first[0] = static_cast<char>(r.command);
    memcpy(first.data() + 1, &r.size, 8);
    memcpy(first.data() + HEAD, r.start.data(), r.start.size());
    sent = to >= 0 && send_all(to, first.data(), first.size());
    std::vector<char> chunk;
    for (uint64_t left = r.size - r.start.size(); left > 0;) {
        chunk.resize(static_cast<size_t>(left < CHUNK ? left : CHUNK));
        if (!receive_all(from, chunk.data(), chunk.size())) return false;
        sent = sent && send_all(to, chunk.data(), chunk.size());
        left -= chunk.size();
    }
    return true;
}

bool answer(int fd, const std::vector<char> & data, const char * status) {
    const uint64_t size = data.size();
    std::vector<char> all;
    if (status) all.push_back(*status);
    all.insert(all.end(), reinterpret_cast<const char *>(&size), reinterpret_cast<const char *>(&size) + 8);
    all.insert(all.end(), data.begin(), data.end());
    return send_all(fd, all.data(), all.size());
}

// What llama.cpp is told in place of a lost board: enough to come to the end of what it is doing. No buffer is given, so
// that a load fails; numbers that it computes with are the CPU backend's; all data are zeros.
std::vector<char> stand_in(const Request & r) {
    uint64_t numbers[2] = {0, 0};
    size_t n = 8;
    switch (r.command) {
        case HELLO: {
            std::vector<char> hello(4 + r.start.size(), 0);
            hello[0] = RPC_PROTO_MAJOR_VERSION;
            hello[1] = RPC_PROTO_MINOR_VERSION;
            hello[2] = RPC_PROTO_PATCH_VERSION;
            return hello;
        }
        case GET_TENSOR: {
            uint64_t size = 0;
            if (r.start.size() >= 8) memcpy(&size, r.start.data() + r.start.size() - 8, 8);
            return std::vector<char>(static_cast<size_t>(size), 0);
        }
        case ALLOC_BUFFER: case GET_DEVICE_MEMORY: n = 16; break;
        case GET_ALIGNMENT: numbers[0] = 64; break;
        case GET_MAX_SIZE: numbers[0] = SIZE_MAX; break;
        case BUFFER_GET_BASE: numbers[0] = 4096; break;
        case DEVICE_COUNT: numbers[0] = 1; n = 4; break;
        case SET_TENSOR_HASH: case COPY_TENSOR: numbers[0] = 1; n = 1; break;
        default: break;  // GET_ALLOC_SIZE: llama.cpp takes at least the size of the tensor
    }
    const char * p = reinterpret_cast<const char *>(numbers);
    return std::vector<char>(p, p + n);
}

// Both look only at their own machine's order of bytes, as ggml does.
void count_request(Guard & g, const Request & r) {
    g.commands++;
    g.bytes_sent += static_cast<int64_t>(HEAD + r.size);
    g.graphs += r.command == GRAPH_COMPUTE || r.command == GRAPH_RECOMPUTE;
    g.new_graphs += r.command == GRAPH_COMPUTE;
    if (r.command != SET_TENSOR || r.start.size() < TENSOR_BYTES) return;
    const char * name = r.start.data() + NAME_AT;
    const void * end = memchr(name, 0, GGML_MAX_NAME);
    if (end && strstr(name, "_exps.")) g.stub_bytes += static_cast<int64_t>(r.size - TENSOR_BYTES - 1 - 8);
}

// The board's answer to llama.cpp. False when llama.cpp is gone; sets `lost` when the board is, and completes the answer.
bool pass_answer(Guard & g, int llama, int board, const Request & r) {
    char head[1 + 8];
    const auto t0 = std::chrono::steady_clock::now();
    g.waiting++;
    if (!receive_all(board, head, sizeof(head))) g.lost = true;
    g.waiting--;
    g.wait_ns += std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - t0).count();
    if (g.lost) return answer(llama, stand_in(r), nullptr);
    if (head[0]) g.failed = true;
    uint64_t size = 0;
    memcpy(&size, head + 1, 8);
    g.bytes_received += static_cast<int64_t>(sizeof(head) + size);
    if (!send_all(llama, &size, 8)) return false;
    std::vector<char> chunk;
    for (uint64_t left = size; left > 0; left -= chunk.size()) {
        chunk.assign(static_cast<size_t>(left < CHUNK ? left : CHUNK), 0);
        if (!g.lost && !receive_all(board, chunk.data(), chunk.size())) g.lost = true;
        if (!send_all(llama, chunk.data(), chunk.size())) return false;
    }
    return true;
}

// The capabilities in a HELLO would have both ends move to another transport, past the relays.
void keep_to_tcp(Request & r) {
    if (r.command == HELLO) memset(r.start.data(), 0, r.start.size());
}

// Within the board's limit, or refused: what a client asks for is added up as the server grants it.
class Buffers {
public:
    explicit Buffers(Board & board) : board_(board) {}
    ~Buffers() {
        for (const auto & b : sizes_) board_.buffer_bytes -= b.second;
    }
    bool fits(const Request & r) {
        if (r.command != ALLOC_BUFFER || r.start.size() != 12) return true;
        uint64_t size = 0;
        memcpy(&size, r.start.data() + 4, 8);
        const int64_t left = board_.limit_bytes - board_.buffer_bytes;
        if (left >= 0 && size <= static_cast<uint64_t>(left)) return true;
        board_.denied_bytes = size > INT64_MAX ? INT64_MAX : static_cast<int64_t>(size);
        return false;
    }
    void granted(const std::vector<char> & response) {
        uint64_t buffer = 0, size = 0;
        if (response.size() != 16) return;
        memcpy(&buffer, response.data(), 8);
        memcpy(&size, response.data() + 8, 8);
        if (buffer == 0) return;
        sizes_[buffer] = static_cast<int64_t>(size);
        const int64_t now = board_.buffer_bytes += static_cast<int64_t>(size);
        if (now > board_.peak_buffer_bytes) board_.peak_buffer_bytes = now;
    }
    void freed(const Request & r) {
        uint64_t buffer = 0;
        if (r.start.size() != 8) return;
        memcpy(&buffer, r.start.data(), 8);
        const auto it = sizes_.find(buffer);
        if (it == sizes_.end()) return;
        board_.buffer_bytes -= it->second;
        sizes_.erase(it);
    }

private:
    Board & board_;
    std::unordered_map<uint64_t, int64_t> sizes_;
};

bool pass_server_answer(Board & board, Buffers & buffers, int client, int server, const Request & r) {
    uint64_t size = 0;
    if (!receive_all(server, &size, 8)) return false;
    // The server has computed everything before this answer, so what failed is known now.
    const char failed = board.failed.exchange(false) ? 1 : 0;
    std::vector<char> data(static_cast<size_t>(size < CHUNK ? size : CHUNK));
    if (!receive_all(server, data.data(), data.size())) return false;
    if (r.command == ALLOC_BUFFER) buffers.granted(data);
    board.bytes_out += static_cast<int64_t>(1 + 8 + size);
    std::vector<char> head(1 + 8 + data.size());
    head[0] = failed;
    memcpy(head.data() + 1, &size, 8);
    memcpy(head.data() + 9, data.data(), data.size());
    if (!send_all(client, head.data(), head.size())) return false;
    for (uint64_t left = size - data.size(); left > 0; left -= data.size()) {
        data.resize(static_cast<size_t>(left < CHUNK ? left : CHUNK));
        if (!receive_all(server, data.data(), data.size()) || !send_all(client, data.data(), data.size())) return false;
    }
    return true;
}

}  // namespace

void relay_guard(Guard & g, int llama, int board) {
    if (board < 0) g.lost = true;
    Request r;
    while (receive_head(llama, r)) {
        keep_to_tcp(r);
        bool sent = false;
        if (!pass_request(llama, g.lost ? -1 : board, r, sent)) return;
        if (!sent) g.lost = true;
        count_request(g, r);
        if (!has_answer(r.command)) continue;
        if (g.lost ? !answer(llama, stand_in(r), nullptr) : !pass_answer(g, llama, board, r)) return;
    }
}

void relay_board(int client, int server) {
    Board & board = the_board();
    board.forget_graphs();
    board.failed = false;
    Buffers buffers(board);
    Request r;
    while (receive_head(client, r)) {
        board.bytes_in += static_cast<int64_t>(HEAD + r.size);
        const uint64_t most = r.command == GRAPH_COMPUTE ? GRAPH_MOST : static_cast<uint64_t>(board.limit_bytes) + SMALL;
        if (r.size > most) return;
        if (!buffers.fits(r)) {
            const char fine = 0;
            if (!answer(client, std::vector<char>(16, 0), &fine)) return;
            continue;
        }
        if (r.command == GRAPH_COMPUTE || r.command == GRAPH_RECOMPUTE) board.announce_graph(r.command == GRAPH_COMPUTE);
        if (r.command == FREE_BUFFER) buffers.freed(r);
        bool sent = false;
        if (!pass_request(client, server, r, sent) || !sent) return;
        if (has_answer(r.command) && !pass_server_answer(board, buffers, client, server, r)) return;
    }
}

}  // namespace moe_edge
