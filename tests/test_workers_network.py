"""Boards as separate machines, as far as one machine can be several: network namespaces, latency, memory cgroups."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
from boards import Latency  # not every kernel has netem, so latency is added by a relay
from moe_edge.models.formats.gguf import read_gguf
from random_models import write_big_model
from test_memory_limit import ALLOWANCE, MIB, memory_cgroup
from test_workers import OPTIONS, logits_of, on_boards, on_one_machine
from worker_process import WorkerProcess

pytestmark = [
    pytest.mark.slow,
    pytest.mark.cgroup,
    pytest.mark.skipif(sys.platform != "linux", reason="network namespaces and memory cgroups are Linux's"),
]
BOARDS = 2
_numbers = itertools.count()


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


@contextlib.contextmanager
def namespace(number: int) -> Iterator[tuple[str, str]]:
    """(name, address) of a network namespace that only this machine reaches; the test skips where none can be made."""
    # A link goes a moment after its namespace, so no name is used twice.
    unique = f"{os.getpid() % 100000}x{next(_numbers)}"
    name, link = f"moe{unique}", f"mv{unique}"
    here, there = f"10.213.{number}.1", f"10.213.{number}.2"
    try:
        run("ip", "netns", "add", name)
    except OSError as e:
        pytest.skip(f"no network namespace can be made here: {e}")
    try:
        try:
            run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
            run("ip", "addr", "add", f"{here}/24", "dev", link)
            run("ip", "link", "set", link, "up")
            run("ip", "-n", name, "addr", "add", f"{there}/24", "dev", "eth0")
            run("ip", "-n", name, "link", "set", "eth0", "up")
            run("ip", "-n", name, "link", "set", "lo", "up")
        except OSError as e:
            pytest.skip(f"no virtual network can be made here: {e}")
        yield name, there
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.parametrize("milliseconds", [0, 1])
def test_boards_in_namespaces_and_cgroups_of_their_own_give_the_bits_of_one_machine(
    milliseconds: int, tmp_path: Path
) -> None:
    with contextlib.ExitStack() as stack:
        places = [stack.enter_context(namespace(number)) for number in range(BOARDS)]
        groups = [stack.enter_context(memory_cgroup(f"board{number}")) for number in range(BOARDS)]
        model = write_big_model(tmp_path / "big.gguf", n_layer=4, n_expert=32, n_embd=1024, n_ff=512, n_used=4)
        expected = on_one_machine(model)
        experts = sum(t.nbytes for name, t in read_gguf(model).tensors.items() if "_exps." in name)
        ram = experts // (2 * BOARDS) + 40 * MIB  # half of its own layers' experts, and what is not experts
        boards = []
        for (name, address), group in zip(places, groups, strict=True):
            group.limit(ram + ALLOWANCE)
            enter = ["sh", "-c", f'echo $$ > {group.folder}/cgroup.procs; exec "$@"', "sh"]
            worker = WorkerProcess(
                model, ram, host=address, before=[*enter, "ip", "netns", "exec", name], more=["--listen-anywhere"]
            )
            stack.callback(worker.end)
            boards.append((worker, group))
        addresses = [worker.address for worker, _ in boards]
        if milliseconds:
            relays = [Latency(worker.port, milliseconds / 2000, worker.host) for worker, _ in boards]
            for relay in relays:
                stack.callback(relay.close)
            addresses = [f"127.0.0.1:{relay.port}" for relay in relays]
        with on_boards(model, addresses, OPTIONS) as engine:
            for board in engine.boards if milliseconds else ():
                assert board.probe().latency_seconds >= milliseconds / 1000
            assert np.array_equal(logits_of(engine), expected)
            assert engine.counters().evictions > 0
            for board in engine.boards:
                assert board.taken["arena_bytes"] < board.taken["resident_bytes"] - board.taken["fixed_bytes"]
        for worker, group in boards:
            assert worker.process.poll() is None, "the board was killed in its memory cgroup"
            assert group.peak_bytes() <= ram + ALLOWANCE
