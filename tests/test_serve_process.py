"""`moe-edge serve` as a process: signals, systemd, ports, what it keeps, and the memory it may take."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from random_models import write_big_model
from serving import PATIENCE, eventually, exchange, raw_request, request
from test_memory_limit import ALLOWANCE, Cgroup, cgroup

__all__ = ["cgroup"]
SERVE = [sys.executable, "-m", "moe_edge.runner.start", "serve"]
LINUX = sys.platform == "linux"


class Process:
    """A server in a process of its own. lines: what it has said."""

    def __init__(self, arguments: list[str], environment: dict[str, str], enter: Callable[[], None] | None) -> None:
        self.child = subprocess.Popen(
            [*SERVE, *arguments], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, preexec_fn=enter,
        )  # fmt: skip
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.child.stderr is not None
        for line in self.child.stderr:
            self.lines.append(line.rstrip())

    def said(self, words: str) -> bool:
        return eventually(lambda: any(words in line for line in self.lines) or self.child.poll() is not None)

    @property
    def url(self) -> str:
        assert self.said("listening at"), self.lines
        found = re.search(r"http://[\d.:]+", "\n".join(self.lines))
        assert found is not None, self.lines
        return found[0]

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def ready(self) -> Process:
        assert self.said("ready at") and self.child.poll() is None, self.lines
        return self

    def ends(self) -> int:
        status = self.child.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return status


@contextmanager
def process(
    *arguments: str, environment: dict[str, str] | None = None, enter: Callable[[], None] | None = None
) -> Iterator[Process]:
    server = Process(["--port", "0", "-t", "1", *arguments], environment or {}, enter)
    try:
        yield server
    finally:
        if server.child.poll() is None:
            server.child.kill()
        server.ends()
        assert server.child.stderr is not None
        server.child.stderr.close()


SMALL = ("--ram", "60MiB", "-c", "512")


def test_a_port_of_zero_is_chosen_and_printed_and_sigterm_ends_with_zero() -> None:
    with process(*SMALL) as server:
        server.ready()
        assert server.port > 0 and request("GET", server.url + "/health").status_code == 200
        answer = request("POST", server.url + "/v1/completions", json={"prompt": "The king", "max_tokens": 4})
        assert answer.json()["usage"]["completion_tokens"] == 4
        server.child.send_signal(signal.SIGTERM)
        assert server.ends() == 0, server.lines


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_stream_with_its_last_event(number: int) -> None:
    with process(*SMALL, "-c", "4096") as server:
        server.ready()
        with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as there:
            body = {"messages": [{"role": "user", "content": "The king"}], "max_tokens": 100_000, "stream": True}
            there.sendall(raw_request("/v1/messages", body))
            got = there.recv(1000)
            server.child.send_signal(number)
            while piece := there.recv(65536):
                got += piece
        assert b"message_stop" in got and server.ends() == 0, server.lines


def test_a_signal_while_the_model_loads_ends_with_zero(tmp_path: Path) -> None:
    model = write_big_model(tmp_path / "big.gguf", n_layer=4, n_expert=32, n_embd=1024, n_ff=512)
    with process(str(model), "--ram", "700MiB") as server:
        assert server.said("listening at")
        server.child.send_signal(signal.SIGTERM)
        assert server.ends() == 0, server.lines
    assert not list(tmp_path.glob("*.part"))


def test_a_second_signal_ends_at_once() -> None:
    with process(*SMALL, "-c", "4096") as server:
        server.ready()
        with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as there:
            there.sendall(raw_request("/v1/completions", {"prompt": "The king", "max_tokens": 4000, "stream": True}))
            assert there.recv(10)
            server.child.send_signal(signal.SIGTERM)
            # Two that are sent together are one: the second comes when the first has been heard.
            assert eventually(lambda: _refuses(server.port) or server.child.poll() is not None)
            server.child.send_signal(signal.SIGTERM)
            assert server.ends() == -signal.SIGTERM


def _refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return True
    return False


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told_when_the_model_is_loaded(tmp_path: Path, abstract: bool) -> None:
    if abstract and not LINUX:
        pytest.skip("abstract sockets are Linux's")
    name = f"@moe-edge-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as there:
        there.bind(name.replace("@", "\0", 1) if abstract else name)
        there.settimeout(PATIENCE)
        with process(*SMALL, environment={"NOTIFY_SOCKET": name}) as server:
            assert there.recv(100) == b"READY=1"
            assert request("GET", server.url + "/health").status_code == 200
            server.child.send_signal(signal.SIGTERM)
            assert there.recv(100) == b"STOPPING=1" and server.ends() == 0


def test_what_experts_were_used_is_kept_for_a_warm_start(tmp_path: Path) -> None:
    environment = {"MOE_EDGE_CACHE": str(tmp_path)}
    with process(*SMALL, "--warm-start", environment=environment) as server:
        server.ready()
        request("POST", server.url + "/v1/completions", json={"prompt": "The king", "max_tokens": 20})
        server.child.send_signal(signal.SIGTERM)
        assert server.ends() == 0, server.lines
    with process(*SMALL, "--warm-start", environment=environment) as server:
        server.ready()
        assert any("warm start" in line and "no usage" not in line for line in server.lines), server.lines


def test_wrong_calls_exit_with_two_and_a_taken_port_with_one() -> None:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*SERVE, *arguments], capture_output=True, text=True, timeout=60, check=False)

    network = call("--host", "0.0.0.0", "--port", "0")
    assert network.returncode == 2 and "--no-api-key" in network.stderr
    assert call("--port", "70000").returncode == 2
    missing = call("--port", "0", "no-such-model.gguf")
    assert missing.returncode == 1 and "no-such-model.gguf" in missing.stderr
    with socket.create_server(("127.0.0.1", 0)) as taken:
        answer = call("--port", str(taken.getsockname()[1]))
        assert answer.returncode == 1 and "try another --port" in answer.stderr


def test_the_key_may_come_from_the_environment() -> None:
    with process(*SMALL, environment={"MOE_EDGE_API_KEY": "from-there"}) as server:
        server.ready()
        assert request("GET", server.url + "/v1/models").status_code == 401
        headers = {"Authorization": "Bearer from-there"}
        assert request("GET", server.url + "/v1/models", headers=headers).status_code == 200


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_requests_leave_nothing_behind() -> None:
    """Memory and file descriptors of a server after 60 requests, and after 200 more of which some are left."""

    def held(pid: int) -> tuple[int, int]:
        status = Path(f"/proc/{pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]), len(os.listdir(f"/proc/{pid}/fd"))

    def ask(n: int) -> None:
        for at in range(n):
            prompt = f"The king number {at % 7} " + "said " * (at % 40)
            body = {"prompt": prompt, "max_tokens": 4, "stream": at % 2 == 0}
            sent = raw_request("/v1/completions", body, headers="Connection: close\r\n")
            exchange(server.port, sent, at_most=1 << 20 if at % 5 else 50)

    with process(*SMALL) as server:
        server.ready()
        ask(60)
        kib, fds = held(server.child.pid)
        ask(200)
        assert eventually(lambda: held(server.child.pid)[1] <= fds)
        assert held(server.child.pid)[0] < kib + 6 * 1024
        assert request("GET", server.url + "/health").status_code == 200


@pytest.mark.cgroup
@pytest.mark.slow
@pytest.mark.skipif(not LINUX, reason="memory cgroups are Linux's")
def test_the_budget_is_kept_with_the_server_running(tmp_path: Path, cgroup: Cgroup) -> None:
    model = write_big_model(tmp_path / "big.gguf", n_layer=4, n_expert=48, n_embd=1024, n_ff=768, n_vocab=32000)
    shown = subprocess.run([*SERVE[:-1], "show", str(model), "--json"], capture_output=True, check=True).stdout
    facts = json.loads(shown)
    ram = (facts["ram_floor_bytes"] + facts["expert_bytes"] // 3) >> 20 << 20
    cgroup.limit(ram + ALLOWANCE)

    def enter() -> None:
        (cgroup.folder / "cgroup.procs").write_text(str(os.getpid()))

    with process(str(model), "--ram", str(ram), "-c", "2048", enter=enter) as server:
        server.ready()
        tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
        for n in range(12):
            body: dict[str, Any] = {
                "messages": [{"role": "user", "content": f"{n} words and words " * 40}], "max_tokens": 12,
                "tools": [tool], "tool_choice": "required" if n % 3 == 0 else "auto", "logprobs": True,
            }  # fmt: skip
            answer = request("POST", server.url + "/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
        assert request("GET", server.url + "/metrics").status_code == 200
        assert cgroup.peak_bytes() <= ram + ALLOWANCE
        server.child.send_signal(signal.SIGTERM)
        assert server.ends() == 0, server.lines
    assert cgroup.peak_bytes() <= ram + ALLOWANCE
