"""What goes wrong with one of several boards: one sentence that names it, and the conversation goes on afterwards."""

from __future__ import annotations

import io
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moe_edge.models.embedded import tiny_model_path
from moe_edge.models.errors import (
    BoardError,
    BudgetTooSmall,
    EngineError,
    MoeEdgeError,
    Stopped,
    UsageError,
    WrongLibrary,
)
from moe_edge.models.store.store import store_path
from moe_edge.runner.chat import Chat
from moe_edge.runner.engine import Engine
from moe_edge.runner.generate import Sampling, generate
from moe_edge.runner.kv.identity import prompt_folder
from moe_edge.runner.kv.session import keep
from moe_edge.runner.kv.state_file import read_header
from moe_edge.runner.workers.board import TIMEOUT_VARIABLE, Board
from moe_edge.runner.workers.guard import check_rpc
from moe_edge.runner.workers.wire import Address
from moe_edge.runner.workers.worker import Worker, _Peer
from random_models import Shape, write_random_model
from test_workers import ENOUGH, OPTIONS, logits_of, on_boards, on_one_machine
from worker_process import Tunnel, WorkerProcess, workers

MODEL = Path(tiny_model_path())
GREEDY = Sampling(temp=0)
PROMPT = "The king said that"
TIMEOUT = 2.0


@pytest.fixture(scope="module")
def board() -> Iterator[WorkerProcess]:
    with workers(MODEL, [ENOUGH]) as made:
        yield made[0]


def text_of(engine: Any, n: int = 12) -> str:
    return generate(engine, PROMPT, n, GREEDY).text


def test_a_board_that_dies_is_named_and_the_conversation_goes_on_when_it_is_back() -> None:
    with workers(MODEL, [ENOUGH, ENOUGH]) as both:
        port, address = both[1].port, both[1].address
        with on_boards(MODEL, [each.address for each in both]) as engine:
            expected = text_of(engine)
            both[1].kill()
            with pytest.raises(BoardError, match=rf"board {address} .*when it is back, go on"):
                text_of(engine)
            with pytest.raises(BoardError, match=rf"board {address} cannot be reached"):
                text_of(engine)
            both[1] = WorkerProcess(MODEL, ENOUGH, port=port)
            assert both[1].address == address
            assert text_of(engine) == expected
            assert text_of(engine) == expected, "and once more, with the prompt in the KV cache"


def test_a_board_that_hangs_is_given_up_within_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TIMEOUT_VARIABLE, str(TIMEOUT))
    with workers(MODEL, [ENOUGH]) as made, on_boards(MODEL, [made[0].address]) as engine:
        expected = text_of(engine)
        made[0].send(signal.SIGSTOP)
        begun = time.monotonic()
        with pytest.raises(BoardError, match=rf"board {made[0].address} did not answer within {TIMEOUT:g} s"):
            text_of(engine)
        assert time.monotonic() - begun < 10 * TIMEOUT
        made[0].send(signal.SIGCONT)
        for _ in range(60):  # it lets the old client go first
            try:
                assert text_of(engine) == expected
                break
            except EngineError as e:
                assert made[0].address in str(e)
            except UsageError as e:
                assert "at work for" in str(e)
            time.sleep(0.5)
        else:
            pytest.fail("the board never came back")


def test_a_board_with_another_model_is_refused(board: WorkerProcess, tmp_path: Path) -> None:
    other = write_random_model(tmp_path / "other.gguf", "olmoe", Shape(n_layer=2))
    with pytest.raises(BoardError, match=rf"board {board.address} has another model: .*copy the same files"):
        on_boards(other, [board.address])


def test_another_file_of_the_same_size_is_refused(tmp_path: Path) -> None:
    ours, theirs = (
        write_random_model(tmp_path / f"{seed}.gguf", "olmoe", Shape(n_layer=2), seed=seed) for seed in (1, 2)
    )
    assert ours.stat().st_size == theirs.stat().st_size
    with workers(theirs, [ENOUGH]) as made:
        with pytest.raises(BoardError, match=rf"board {made[0].address} has another model: .*copy the same files"):
            on_boards(ours, [made[0].address])


def test_a_board_with_too_little_memory_says_how_much_it_needs(tmp_path: Path) -> None:
    with workers(MODEL, ["8MiB"]) as made:
        with (
            pytest.raises(MoeEdgeError, match=rf"board {made[0].address}: --ram 8MiB is too small .*give the worker"),
            on_boards(MODEL, [made[0].address]),
        ):
            pass
        with pytest.raises(BudgetTooSmall, match="what stays on this machine needs"):
            on_boards(MODEL, [made[0].address], replace(OPTIONS, ram_bytes=1 << 20))


def test_a_board_that_refused_its_part_takes_a_smaller_one(tmp_path: Path) -> None:
    """Layers of 6 MiB: a worker's program may hold a MiB more or less each time, which decides nothing here."""
    shape = Shape(n_layer=4, n_embd=256, n_ff=64, n_expert=4, n_used=1, head_dim=128, n_head=16, n_head_kv=16)
    model, options = write_random_model(tmp_path / "m.gguf", "qwen3moe", shape), replace(OPTIONS, n_ctx=512)
    with workers(model, [ENOUGH]) as wide:
        with on_boards(model, [wide[0].address], options) as engine:
            floor = int(engine.boards[0].taken["floor_bytes"])
            buffers = int(engine.boards[0].taken["buffer_bytes"])
            expected = logits_of(engine)
        assert buffers > 20 << 20
        for ram in (floor - buffers // 4, floor - (2 << 20)):  # at a buffer that llama.cpp asks for, and at the last
            with workers(model, [ram]) as made:
                for _ in range(2):
                    with (
                        pytest.raises(MoeEdgeError, match=rf"board {made[0].address}: --ram \d+MiB is too small"),
                        on_boards(model, [made[0].address], options),
                    ):
                        pass
                with on_boards(model, [made[0].address, wide[0].address], options) as engine:
                    assert all(len(each.layers) > 0 for each in engine.boards)
                    assert np.array_equal(logits_of(engine), expected)


def test_a_board_serves_one_client_at_a_time(board: WorkerProcess) -> None:
    with on_boards(MODEL, [board.address]) as engine:
        with pytest.raises(UsageError, match=rf"board {board.address}: is at work for 127.0.0.1:\d+ .*one client"):
            on_boards(MODEL, [board.address])
        assert text_of(engine)
    with on_boards(MODEL, [board.address]) as engine:
        assert text_of(engine)


def test_nobody_there_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(BoardError, match=rf"board 127.0.0.1:{port} cannot be reached .*moe-edge worker"):
        on_boards(MODEL, [f"127.0.0.1:{port}"])


class Impostor:
    """Says `hello` as it is told to."""

    def __init__(self, hello: bytes) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = Address("127.0.0.1", self._server.getsockname()[1])
        threading.Thread(target=self._serve, args=(hello,), daemon=True).start()

    def _serve(self, hello: bytes) -> None:
        connection, _ = self._server.accept()
        with self._server, connection:
            connection.recv(1 << 16)
            connection.sendall(hello)
            if hello:
                connection.recv(1 << 16)


def test_another_version_is_refused_by_name() -> None:
    hello = {"versions": {"moe_edge": "0.0.1", "protocol": 1}, "content_id": "x"}
    board = Board(Impostor(json.dumps(hello).encode() + b"\n").address)
    with pytest.raises(BoardError, match=r"has moe_edge 0\.0\.1 and this machine 9; install the same on both"):
        board.check("x", {"protocol": 1, "moe_edge": "9"})
    board.close()


@pytest.mark.parametrize("hello", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"[1]\n", b"\xff\xfe\n", b""])
def test_what_is_no_worker_is_one_sentence(hello: bytes) -> None:
    impostor = Impostor(hello)
    with pytest.raises(BoardError, match=rf"board {impostor.address} is gone"):
        Board(impostor.address)


def test_a_client_without_a_session_gets_nothing_from_the_rpc_port(board: WorkerProcess) -> None:
    for first in (b"\x0e" + (24).to_bytes(8, "little") + bytes(24), b"R" + b"0" * 32, b"GET / HTTP/1.1\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", board.port), timeout=20) as stranger:
            stranger.sendall(first)
            try:
                assert stranger.recv(64) == b""
            except ConnectionResetError:
                pass
    with on_boards(MODEL, [board.address]) as engine:
        assert text_of(engine)


def test_a_file_that_cannot_be_read_fails_the_reply_and_not_the_board(tmp_path: Path) -> None:
    copy = Path(shutil.copy(MODEL, tmp_path / "model.gguf"))
    if store_path(MODEL).exists():
        shutil.copy(store_path(MODEL), store_path(copy))
    with workers(copy, [ENOUGH]) as made, on_boards(MODEL, [made[0].address]) as engine:
        experts = engine.model.files[0]
        theirs = copy if experts == MODEL else store_path(copy)
        whole = theirs.read_bytes()
        theirs.write_bytes(whole[: len(whole) // 8])
        with pytest.raises(EngineError, match=rf"board {made[0].address}: .*{theirs.name}"):
            text_of(engine)
        theirs.write_bytes(whole)
        with Engine(MODEL, OPTIONS) as alone:
            expected = text_of(alone)
        assert text_of(engine) == expected


def test_a_reply_can_be_stopped_and_the_next_one_is_right(board: WorkerProcess) -> None:
    with on_boards(MODEL, [board.address]) as engine:
        expected = text_of(engine)
        with pytest.raises(Stopped):
            engine.new_conversation()
            with engine.decoding():
                engine.stop()
                time.sleep(0.5)
                engine.llama.eval([5, 6, 7])
        assert text_of(engine) == expected


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_worker_refuses_an_address_that_others_reach(host: str) -> None:
    call = [sys.executable, "-m", "moe_edge.runner.start", "worker", str(MODEL), "--host", host, "--port", "0"]
    done = subprocess.run(call, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "asks nobody for a password" in done.stderr and "--listen-anywhere" in done.stderr


def test_a_llama_cpp_without_rpc_is_told_how_to_get_it() -> None:
    check_rpc(True)
    with pytest.raises(WrongLibrary, match=r"RPC backend.*CMAKE_ARGS=\"-DGGML_RPC=ON\" pip install"):
        check_rpc(False)


def test_while_the_only_board_is_away_no_decode_gives_anything_and_then_the_logits_are_those_of_before() -> None:
    """The Llama object that callers hold is the same one, on new connections."""
    with workers(MODEL, [ENOUGH]) as made, on_boards(MODEL, [made[0].address]) as engine:
        llama, port = engine.llama, made[0].port
        made[0].kill()
        for _ in range(3):
            with pytest.raises(BoardError, match=rf"board 127.0.0.1:{port}"):
                text_of(engine)
        made[0] = WorkerProcess(MODEL, ENOUGH, port=port)
        assert made[0].port == port
        text_of(engine)
        engine.new_conversation()
        assert engine.llama is llama
        assert np.array_equal(logits_of(engine), on_one_machine(MODEL))


@pytest.mark.parametrize("silently", [False, True])
def test_a_network_that_breaks_at_any_byte_is_one_sentence(
    silently: bool, board: WorkerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the board is asked, while weights are sent, in the first decode and later; llama.cpp itself would abort."""
    monkeypatch.setenv(TIMEOUT_VARIABLE, "1")
    whole = Tunnel(board.port)
    with on_boards(MODEL, [f"127.0.0.1:{whole.port}"]) as engine:
        loaded = whole.carried
        text_of(engine)
        n = whole.carried
    whole.close()
    places = (10, 1000, loaded // 3, loaded - 5000, (loaded + n) // 2) if not silently else (n - 2000,)
    for cut in places:
        tunnel = Tunnel(board.port, cut, silently)
        address = f"127.0.0.1:{tunnel.port}"
        for _ in range(100):
            try:
                with on_boards(MODEL, [address]) as engine:
                    text_of(engine, 100)
                pytest.fail(f"nothing was cut after {cut} bytes")
            except UsageError as e:  # the board has not let the client before go yet
                assert "at work for" in str(e)
                tunnel.carried = 0
                time.sleep(0.2)
            except EngineError as e:
                assert f"board {address}" in str(e), cut
                break
        tunnel.close()


def test_a_conversation_whose_board_is_lost_is_not_kept_but_its_messages_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lost board answers with zeros until llama.cpp has come to its end; they must not become a state on disk."""
    monkeypatch.setenv("MOE_EDGE_CACHE", str(tmp_path / "cache"))
    options = replace(OPTIONS, logits_all=False, prompt_cache_bytes=64 << 20)
    path = tmp_path / "session"
    with workers(MODEL, [ENOUGH]) as made:
        with on_boards(MODEL, [made[0].address], options) as engine:
            engine.load()
            chat = Chat(engine, 24, GREEDY, out=io.StringIO(), err=io.StringIO())
            chat.reply("The king said that the old man was in the house by the sea and")
            assert engine.prompts is not None and engine.llama.n_tokens >= 32
            engine.prompts.always = True
            made[0].kill()
            for _ in range(100):
                if not engine.is_whole:
                    break
                time.sleep(0.1)
            assert not engine.is_whole
            keep(path, engine, chat.conversation)
            messages, text = chat.conversation.saved()
        assert list(prompt_folder().glob("*")) == []
        state = read_header(path)
        assert len(state.tokens) == 0 and state.extra["text"] == text != "" and state.extra["messages"] == messages


def test_a_client_waits_for_one_that_is_going_and_not_for_one_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that is started again at once may come before the board has let its first run go."""
    worker = Worker(str(MODEL), OPTIONS, Address("127.0.0.1", 0), measure=lambda _: "nothing here")
    worker._peer = _Peer("the first", time.monotonic())
    going = threading.Timer(0.3, worker._let_go)
    going.start()
    assert worker._speeds(True) == {"why_not": "nothing here"}
    going.join()
    worker._peer = _Peer("the second", time.monotonic())
    monkeypatch.setattr("moe_edge.runner.workers.worker.LETTING_GO_SECONDS", 0.1)
    with pytest.raises(UsageError, match="is at work for the second"):
        worker._speeds(True)
