"""Several boards: the bits of one machine at every budget, each board within its own, and no expert on the wire."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from every_architecture import write_tiny_model
from moe_edge.models.embedded import tiny_model_path
from moe_edge.models.errors import BoardError, UsageError
from moe_edge.models.formats.gguf import read_gguf
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.generate import generate
from moe_edge.runner.prove import LOADS
from moe_edge.runner.sampling import Sampling
from moe_edge.runner.serve.engine_model import EngineModel
from moe_edge.runner.workers.boards_engine import BoardsEngine
from moe_edge.runner.workers.wire import parse_addresses
from moe_edge.schedulers.workers import Split
from random_models import Shape, write_random_model
from serving import serving
from worker_process import Tunnel, WorkerProcess, workers

PROMPT = [int(t) for t in np.random.default_rng(3).integers(5, 250, 40)]
MORE = [17, 99, 4, 200]
OPTIONS = EngineOptions(n_threads=1, n_ctx=128, n_ubatch=16, logits_all=True, proof=LOADS)
ENOUGH = "300MiB"
ALLOWANCE = 64 << 20  # as tests of the memory limit have it


def logits_of(engine: Engine) -> Any:
    """Of a prompt in several micro-batches and some single tokens."""
    with engine.decoding():
        engine.llama.eval(PROMPT)
        for token in MORE:
            engine.llama.eval([token])
        return np.array(engine.llama.scores[: len(PROMPT) + len(MORE)], copy=True)


def on_boards(
    model: Path, addresses: list[str], options: EngineOptions = OPTIONS, split: Split = "auto"
) -> BoardsEngine:
    return BoardsEngine(model, options, parse_addresses(",".join(addresses)), split=split)


def on_one_machine(model: Path) -> Any:
    with Engine(model, OPTIONS) as engine:
        return logits_of(engine)


def check_bits(model: Path, n_boards: int) -> None:
    """At a budget with everything in memory, then at the least each board says it needs."""
    expected = on_one_machine(model)
    assert np.isfinite(expected).all()
    with workers(model, [ENOUGH] * n_boards) as boards, on_boards(model, [b.address for b in boards]) as engine:
        assert np.array_equal(logits_of(engine), expected)
        assert engine.counters().evictions == 0
        floors = [int(board.taken["floor_bytes"]) for board in engine.boards]
        split = tuple(len(board.layers) for board in engine.boards)  # which the floors are of
    with workers(model, floors) as boards, on_boards(model, [b.address for b in boards], split=split) as engine:
        assert np.array_equal(logits_of(engine), expected)
        assert engine.counters().evictions > 0
        for board, process, floor in zip(engine.boards, boards, floors, strict=True):
            status = board.status()
            assert status["counters"]["uses"] > 0
            assert status["counters"]["peak_committed_bytes"] <= board.taken["arena_bytes"]
            if sys.platform == "linux":
                assert process.peak_rss_bytes() <= floor + ALLOWANCE
            stubs = sum(
                tensor.nbytes
                for name, tensor in read_gguf(engine.model.skeleton).tensors.items()
                if "_exps." in name and int(name.split(".")[1]) in board.layers
            )
            assert board.traffic().stub_bytes == stubs


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["qwen3moe", "olmoe", "deepseek2", "gpt-oss"])
def test_two_boards_give_the_bits_of_one_machine(arch: str, tmp_path: Path) -> None:
    """Of 3 layers, so that one board has two; the first of deepseek2 has no experts."""
    check_bits(write_random_model(tmp_path / "model.gguf", arch, Shape(n_layer=3)), 2)


@pytest.mark.slow
def test_three_boards_give_the_bits_of_the_trained_model() -> None:
    check_bits(Path(tiny_model_path()), 3)


@pytest.fixture(scope="module")
def board() -> Iterator[WorkerProcess]:
    """One worker with the trained model, for tests that leave it as it was."""
    with workers(Path(tiny_model_path()), [ENOUGH]) as made:
        yield made[0]


@pytest.mark.parametrize("arch", ["qwen3moe", "gpt-oss"])
def test_every_split_gives_the_same_bits(arch: str, tmp_path: Path) -> None:
    """Every pair of lengths, then what memory and the measured speeds say, and what is not the model's."""
    model = write_random_model(tmp_path / "model.gguf", arch, Shape(n_layer=4))
    expected = on_one_machine(model)
    with workers(model, [ENOUGH] * 2) as both:
        addresses = [each.address for each in both]
        splits: list[Split] = [(1, 3), (2, 2), (3, 1), "memory", "speed", "auto"]
        for split in splits:
            with on_boards(model, addresses, split=split) as engine:
                assert np.array_equal(logits_of(engine), expected), split
                counts = tuple(len(board.layers) for board in engine.boards)
                assert counts == split or isinstance(split, str)
        with pytest.raises(UsageError, match="--split 1,2 has 3 layers, and the model 4"):
            on_boards(model, addresses, split=(1, 2))


@pytest.mark.parametrize("arch", ["qwen35moe", "lfm2moe", "granitehybrid", "kimi-linear"])
def test_hybrid_models_and_their_prompt_cache_go_on_after_a_restart(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state of a recurrent layer lies on its board: it is stored here and given back to a new worker."""
    monkeypatch.setenv("MOE_EDGE_CACHE", str(tmp_path / "cache"))
    model = write_tiny_model(tmp_path / "m.gguf", arch)
    options = replace(OPTIONS, logits_all=False, prompt_cache_bytes=64 << 20)
    with Engine(model, replace(options, prompt_cache_bytes=0)) as alone:
        first, second = (generate(alone, list(PROMPT), n, Sampling(temp=0), ignore_end=True).text for n in (8, 16))
    with workers(model, [ENOUGH]) as made:
        with on_boards(model, [made[0].address], replace(options, logits_all=True)) as engine:
            assert np.array_equal(logits_of(engine), on_one_machine(model))
            assert engine.prompts is not None
        with on_boards(model, [made[0].address], options) as engine:
            assert generate(engine, list(PROMPT), 8, Sampling(temp=0), ignore_end=True).text == first
            port = made[0].port
            made[0].kill()
            with pytest.raises(BoardError, match=rf"board {made[0].host}:{port} "):
                generate(engine, list(PROMPT), 16, Sampling(temp=0), ignore_end=True)
            made[0] = WorkerProcess(model, "200MiB", port=port)
            assert made[0].port == port
            assert generate(engine, list(PROMPT), 16, Sampling(temp=0), ignore_end=True).text == second
            assert engine.prompts is not None
            engine.prompts.always = True  # as it is closed
            whole = list(engine.llama.input_ids[: engine.llama.n_tokens])
        longer = [int(token) for token in whole] + MORE
        made[0].kill()
        made[0] = WorkerProcess(model, ENOUGH, port=port)
        assert made[0].port == port
        with on_boards(model, [made[0].address], options) as engine:
            engine.load()
            engine.prompts.always = True  # type: ignore[union-attr]
            result = generate(engine, longer, 8, Sampling(temp=0), ignore_end=True)
            assert result.reused_tokens == len(whole) > len(PROMPT)
            engine.prompts.always = False  # type: ignore[union-attr]
        with Engine(model, replace(options, prompt_cache_bytes=64 << 20)) as alone:
            assert generate(alone, longer, 8, Sampling(temp=0), ignore_end=True).text == result.text


def test_no_expert_crosses_a_tunnel(board: WorkerProcess) -> None:
    """Everything that goes to the board, looked through for each expert's first bytes."""
    model = Path(tiny_model_path())
    tunnel = Tunnel(board.port)
    try:
        with on_boards(model, [f"127.0.0.1:{tunnel.port}"]) as engine:
            assert np.array_equal(logits_of(engine), on_one_machine(model))
            pieces, files = engine.model.pieces, engine.model.files
            carried = bytes(tunnel.data)
            traffic = engine.boards[0].traffic()
        assert traffic.bytes_sent <= len(carried)
        read = [file.read_bytes() for file in files]
        assert not [p.name for p in pieces if read[p.file][p.offset : p.offset + 64] in carried]
        dense = read_gguf(engine.model.skeleton).tensors["blk.0.attn_q.weight"]
        start = engine.model.skeleton.read_bytes()[dense.offset : dense.offset + 64]
        assert start in carried, "a dense weight was meant to be found where an expert was looked for"
    finally:
        tunnel.close()


def test_a_graph_that_is_used_again_is_not_sent_again(board: WorkerProcess) -> None:
    with on_boards(Path(tiny_model_path()), [board.address]) as engine:
        logits_of(engine)
        before = engine.boards[0].traffic()
        with engine.decoding():
            for token in MORE * 3:
                engine.llama.eval([token])
        after = engine.boards[0].traffic()
    assert after.graphs - before.graphs == 3 * len(MORE)
    assert after.new_graphs - before.new_graphs <= 1


def test_the_command_line_gives_the_text_of_one_machine_and_a_line_for_the_board(board: WorkerProcess) -> None:
    model = str(tiny_model_path())
    call = [sys.executable, "-m", "moe_edge.runner.start", "generate", model, "-p", "The king", "-n", "24"]
    call += ["--temp", "0", "-t", "1", "-c", "256"]
    alone = subprocess.run([*call, "--json"], capture_output=True, text=True, check=True)
    there = subprocess.run([*call, "--json", "--workers", board.address], capture_output=True, text=True, check=True)
    one, other = json.loads(alone.stdout), json.loads(there.stdout)
    assert one["text"] == other["text"] and one["expert_uses"] == other["expert_uses"] > 0
    assert [each["board"] for each in other["boards"]] == [board.address] and one["boards"] == []
    said = subprocess.run([*call, "--workers", board.address], capture_output=True, text=True, check=True)
    assert f"board {board.address}: layers 0 to 3" in said.stderr.splitlines()[-1]


def test_metrics_have_a_line_for_the_board(board: WorkerProcess) -> None:
    model = Path(tiny_model_path())
    with on_boards(model, [board.address]) as engine:
        served = EngineModel(engine, name="tiny", defaults=Sampling(temp=0))
        with serving(served) as server:
            server.post("/v1/completions", {"prompt": "The king", "max_tokens": 4})
            lines = server.get("/metrics").text.splitlines()
            picture, live = server.get("/moe-edge/picture").json(), server.get("/moe-edge/live").json()
    found = {line.split("{")[0]: float(line.split()[-1]) for line in lines if f'board="{board.address}"' in line}
    assert found["moe_edge_board_expert_uses_total"] > 0 and found["moe_edge_board_up"] == 1
    assert found["moe_edge_board_bytes_sent_total"] > 0 and found["moe_edge_board_rss_bytes"] > 1 << 20
    assert [each["layers"] for each in picture["boards"]] == [[0, 3]]
    resident = [level for layer in picture["resident"] for level in layer]
    assert sum(map(bool, base64.b64decode(live["recency"]))) == sum(map(bool, resident)) > 0


def test_plan_asks_the_board_and_says_what_binds(board: WorkerProcess) -> None:
    call = [sys.executable, "-m", "moe_edge.runner.start", "plan", str(tiny_model_path()), "-c", "256", "-t", "1"]
    call += ["--workers", board.address]
    done = subprocess.run([*call, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["will_run"] and found["tokens_per_second"] > 0
    (only,) = found["boards"]
    assert only["layers"] == [0, 3] and only["binds"] in ("disk", "compute", "memory bandwidth", "network")
    assert 0 < only["network"]["latency_seconds"] < 1 and only["network"]["bytes_per_second"] > 1e5
    assert len(found["more_boards"]) == 4, "the model has so many layers"
    said = subprocess.run(call, capture_output=True, text=True)
    assert f"board {board.address}: layers 0 to 3" in said.stdout and "tok/s" in said.stdout
