"""Conversations on disk: gone on with in a later run, and never the reason that anything fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moe_edge.models.errors import BadChecksum, BadFile, BadMagic, CutFile
from moe_edge.models.formats.work import is_part
from moe_edge.runner.engine import Engine
from moe_edge.runner.kv.identity import difference, prompt_folder
from moe_edge.runner.kv.prefix import keep_prefix
from moe_edge.runner.kv.prompt_cache import FIRST_SPEED, SUFFIX, pays, trim
from moe_edge.runner.kv.rollback import BEFORE_END
from moe_edge.runner.kv.state_file import load_state, read_header, write_state
from test_every_architecture import last_logits
from test_kv_checkpoints import ATTENTION, RECURRENT, WINDOW, opened, reply, words

N_KILLS = int(os.environ.get("MOE_EDGE_KILLS", "20"))
MIB = 1 << 20


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("MOE_EDGE_CACHE", str(tmp_path / "cache"))
    yield prompt_folder()


def with_cache(folder: Path, arch: str, said: list[str] | None = None, **more: Any) -> Engine:
    """An engine, loaded, whose cache keeps conversations however short."""
    engine = opened(folder, arch, **{"prompt_cache_bytes": 64 * MIB, **more})
    engine._tell = lambda line: (said if said is not None else []).append(line)
    engine.load()
    assert engine.prompts is not None
    engine.prompts.always = True
    return engine


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{SUFFIX}"))


@pytest.mark.parametrize("arch", RECURRENT + ATTENTION)
@pytest.mark.parametrize("thinks", [False, True])
def test_a_later_run_goes_on_where_an_earlier_one_ended(
    tmp_path: Path, own_cache: Path, arch: str, thinks: bool
) -> None:
    """thinks: the second prompt has only a part of the reply."""
    first = words(0, 70)
    with with_cache(tmp_path, arch) as engine:
        made = reply(engine, first)[1]
        said = made[6:] if thinks else made
        second = first + said + words(1, 20)
    assert len(files(own_cache)) == 1
    with with_cache(tmp_path, arch) as engine:
        result, again = reply(engine, second)
    with opened(tmp_path, arch) as engine:
        assert reply(engine, second)[1] == again
    assert result.prompt_tokens - result.reused_tokens <= (20 if not thinks else len(said) + 20 + BEFORE_END)


@pytest.mark.parametrize("arch", RECURRENT + ATTENTION)
def test_going_on_from_a_file_gives_the_bits_of_going_on_in_memory(tmp_path: Path, arch: str) -> None:
    """At every budget: the state was written with all experts in memory, and is gone on with at the floor too."""
    path = tmp_path / "state"
    with opened(tmp_path, arch) as engine, engine.decoding():
        engine.llama.eval(words(0, 70))
        write_state(path, engine.llama, engine.checkpoints, {})
        engine.llama.eval(words(1, 20))
        want, floor = last_logits(engine), engine.plan.floor_bytes
    for ram_bytes in (floor, 1 << 30):
        with opened(tmp_path, arch, ram_bytes=ram_bytes) as engine, engine.decoding():
            load_state(read_header(path), engine.llama, engine.checkpoints)
            engine.llama.eval(words(1, 20))
            assert np.array_equal(last_logits(engine), want)


@pytest.mark.parametrize("arch", WINDOW)
def test_a_state_without_what_the_window_left_is_not_cut(
    tmp_path: Path, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trap: llama.cpp says that it forgot the end, and computes on with cells that are not there.

    So states of models whose windows cannot be copied whole are, and those of earlier versions.
    """
    monkeypatch.setattr("moe_edge.runner.llama.window_is_kept", lambda *_: False)
    monkeypatch.setattr("moe_edge.runner.kv.state_file.window_is_kept", lambda *_: False)
    first, path = words(0, 90), tmp_path / "state"
    second = first[:60] + words(1, 20)

    def went_on() -> tuple[int, Any]:
        """(tokens kept, logits) of the second prompt after the state of the first."""
        with opened(tmp_path, arch) as engine, engine.decoding():
            load_state(read_header(path), engine.llama, engine.checkpoints)
            kept = keep_prefix(engine.llama, engine.checkpoints, second)
            engine.llama.eval(second[kept:])
            return kept, last_logits(engine)

    with opened(tmp_path, arch) as engine:
        reply(engine, first)
        write_state(path, engine.llama, engine.checkpoints, {})
        engine.new_conversation()
        with engine.decoding():
            engine.llama.eval(second)
            want = last_logits(engine)
    assert read_header(path).first > 60 - 32
    kept, logits = went_on()
    assert kept == 0 and np.array_equal(logits, want)
    monkeypatch.setattr("moe_edge.runner.llama.can_cut", lambda *_: True)  # without the rule
    kept, logits = went_on()
    assert kept == 60 and abs(logits - want).max() > 0.01


@pytest.mark.parametrize("arch", WINDOW)
def test_a_file_of_an_earlier_version_without_the_windows_cells_is_not_used(
    tmp_path: Path, arch: str, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = words(0, 90)
    with monkeypatch.context() as earlier:
        for module in ("llama", "sizes", "kv.state_file", "kv.prompt_cache"):
            earlier.setattr(f"moe_edge.runner.{module}.window_is_kept", lambda *_: False)
        with with_cache(tmp_path, arch) as engine:
            reply(engine, first)
            theirs = engine.identity()
    with with_cache(tmp_path, arch) as engine:
        assert reply(engine, [*first, *words(1, 20)])[0].reused_tokens == 0
        assert "sliding_window" in difference(engine.identity(), theirs)
    assert len(files(own_cache)) == 2


@pytest.mark.parametrize("arch", ["qwen3next", "gpt-oss", "qwen3moe"])
def test_damage_of_any_byte_is_an_error_and_never_a_crash(tmp_path: Path, arch: str) -> None:
    path = tmp_path / "state"
    with opened(tmp_path, arch) as engine:
        made = reply(engine, words(0, 70))[1]
        write_state(path, engine.llama, engine.checkpoints, {"store": "x"})
        whole = path.read_bytes()
        for at in [0, 5, 9, 40, 5000, *range(len(whole) // 7, len(whole), len(whole) // 7), *range(-40, 0, 3)]:
            data = bytearray(whole)
            data[at] ^= 0x10
            path.write_bytes(data)
            with pytest.raises(BadFile):
                load_state(read_header(path), engine.llama, engine.checkpoints)
            assert engine.llama.n_tokens == 0  # since the first of them
        for n in (0, 10, 39, 40, 1000, len(whole) - 41, len(whole) - 1):
            path.write_bytes(whole[:n])
            with pytest.raises(CutFile if n < 40 else BadMagic):
                read_header(path)
        path.write_bytes(whole)
        state = read_header(path)
        assert state.lists is not None and sum(n for _, n, _ in state.lists) < state.payload_bytes // 2
        load_state(read_header(path), engine.llama, engine.checkpoints)
        assert engine.llama.n_tokens == 70 + len(made)


def test_a_damaged_file_is_one_sentence_and_a_recompute(tmp_path: Path, own_cache: Path) -> None:
    tokens = words(0, 70)
    with with_cache(tmp_path, "qwen3moe") as engine:
        want = reply(engine, tokens)[1]
    [path] = files(own_cache)
    for at in (700, -8):
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)
        said: list[str] = []
        with with_cache(tmp_path, "qwen3moe", said) as engine:
            result, made = reply(engine, tokens)
        assert (result.reused_tokens, made) == (0, want)
        assert len(said) == 1 and str(path) in said[0] and "damaged" in said[0]
        assert files(own_cache) == [path]  # written again, whole


@pytest.mark.parametrize("more", [{"n_ctx": 128}, {"n_ubatch": 32}, {"flash_attn": True}])
def test_a_state_made_in_another_way_is_not_used(tmp_path: Path, more: dict[str, Any]) -> None:
    tokens = words(0, 70)
    with with_cache(tmp_path, "qwen3moe") as engine:
        reply(engine, tokens)
        ours = engine.identity()
    with with_cache(tmp_path, "qwen3moe", **more) as engine:
        assert reply(engine, tokens)[0].reused_tokens == 0
        assert next(iter(more)) in difference(ours, engine.identity())


def test_with_flash_attention_the_number_of_threads_must_be_the_same(tmp_path: Path) -> None:
    """Over 512 cells the bits differ by it; without flash attention they do not."""
    bits: dict[tuple[bool, int], Any] = {}
    for flash in (False, True):
        for n_threads in (1, 2):
            more = {"flash_attn": flash, "n_threads": n_threads, "n_ctx": 1024, "n_ubatch": 64}
            with opened(tmp_path, "qwen3moe", **more) as engine, engine.decoding():
                engine.llama.eval(words(0, 700))
                engine.llama.eval([17])
                bits[flash, n_threads] = last_logits(engine), engine.identity()
    for flash in (False, True):
        (one, ours), (two, theirs) = bits[flash, 1], bits[flash, 2]
        assert np.array_equal(one, two) != flash
        assert ("n_threads" in difference(ours, theirs)) == flash


def test_a_conversation_that_another_takes_the_place_of_is_written_and_comes_back(
    tmp_path: Path, own_cache: Path
) -> None:
    one, other = words(0, 70), words(9, 70)
    with with_cache(tmp_path, "qwen3moe") as engine:
        made = reply(engine, one)[1]
        assert not files(own_cache)
        reply(engine, other)
        assert len(files(own_cache)) == 1
        assert reply(engine, one + made + words(3, 9))[0].reused_tokens == 70 + len(made)
    assert len(files(own_cache)) == 2  # the longer conversation took the place of its beginning


def test_short_conversations_are_not_written_unless_told_to(tmp_path: Path, own_cache: Path) -> None:
    with opened(tmp_path, "qwen3moe", prompt_cache_bytes=MIB) as engine:
        reply(engine, words(0, 70))
    assert not files(own_cache)


def test_what_pays() -> None:
    assert not pays(0.9, 1, FIRST_SPEED)
    assert pays(1.0, 50_000_000, FIRST_SPEED) and not pays(1.0, 51_000_000, FIRST_SPEED)


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    for at, name in enumerate(("a", "b", "c", "d")):
        (tmp_path / f"{name}{SUFFIX}").write_bytes(bytes(100))
        os.utime(tmp_path / f"{name}{SUFFIX}", (at, at))
    os.utime(tmp_path / f"a{SUFFIX}", (9, 9))
    trim(tmp_path, 300, tmp_path / f"d{SUFFIX}")
    assert [path.stem for path in files(tmp_path)] == ["a", "c", "d"]


WRITER = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_every_architecture import last_logits
from test_kv_checkpoints import opened, words
from test_kv_disk import with_cache
engine = with_cache(Path(sys.argv[2]), "qwen3next")
at = int(sys.argv[3])
with engine.decoding():
    print("ready", flush=True)
    while True:
        at += 1
        engine.llama.reset()
        engine.checkpoints.clear()
        engine.llama.eval(words(at, 40))
        engine.checkpoints.take()
        engine.prompts.store()
"""


def test_kills_during_saving_leave_no_unreadable_file(tmp_path: Path, own_cache: Path) -> None:
    """A process that does nothing but save is killed; then every file with a name is whole, and no part is left."""
    opened(tmp_path, "qwen3next").close()
    n_parts = 0
    for at in range(N_KILLS):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(Path(__file__).parent), str(tmp_path), str(1000 * at)],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
        time.sleep(0.002 + 0.0037 * (at * 7 % 20))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        n_parts += any(is_part(path.name) for path in own_cache.iterdir())
    assert files(own_cache)
    with with_cache(tmp_path, "qwen3next") as engine:
        for path in files(own_cache):
            load_state(read_header(path), engine.llama, engine.checkpoints)
            assert engine.llama.n_tokens == 40
        reply(engine, words(3, 50))
    assert n_parts and not any(is_part(path.name) for path in own_cache.iterdir())


def test_a_file_of_another_kind_says_so(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("dear diary, " * 20)
    with pytest.raises(BadMagic, match="no conversation of moe-edge"):
        read_header(path)
    assert BadChecksum.exit_status == 1
