"""--warm-start: what is kept between runs, that a file of no use costs one sentence and nothing else, and that reading
experts before the first token changes neither bits nor the budget."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import budget_bytes
from moe_edge.models.embedded import tiny_model_path
from moe_edge.models.errors import EngineError
from moe_edge.runner.capi import Counters
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.generate import Sampling, generate
from moe_edge.runner.warm import BATCH_BYTES, WarmStart, load_usage, save_usage, usage_path
from moe_edge.schedulers.eviction import RULES
from moe_edge.schedulers.layout import Layout, Step
from moe_edge.schedulers.options import PolicyOptions
from moe_edge.schedulers.usage import Usage, preload_order
from random_models import write_random_model
from reference import logits_of_context

LAYOUT = Layout((2, 3), 1, (10,) * 5)


def some_usage() -> Usage:
    usage = Usage(LAYOUT.n_experts)
    usage.note(Step(0, [1], [1]))
    usage.note(Step(1, [0, 2], [1, 1]))
    return usage


def test_it_lies_beside_the_cached_skeletons_named_after_the_store(tmp_path: Path) -> None:
    assert usage_path("abc", tmp_path) == tmp_path / "skeletons" / "abc.usage.npz"
    assert usage_path("abc").parent.name == "skeletons"  # tests/conftest.py sets MOE_EDGE_CACHE


def test_what_was_counted_comes_back(tmp_path: Path) -> None:
    path = usage_path("abc", tmp_path)
    assert save_usage(path, some_usage()) is None
    usage, said = load_usage(path, LAYOUT)
    assert (said, usage.tokens, usage.counts) == (None, 1, [0, 1, 1, 0, 1])
    usage.note(Step(0, [0], [1]))
    assert save_usage(path, usage) is None
    assert load_usage(path, LAYOUT)[0].counts == pytest.approx([1, 1, 1, 0, 1], abs=1e-3)
    assert [each.name for each in path.parent.iterdir()] == ["abc.usage.npz"]  # nothing left of the writing


def test_without_a_file_nothing_is_known_and_nothing_said(tmp_path: Path) -> None:
    usage, said = load_usage(tmp_path / "none.npz", LAYOUT)
    assert (said, usage.tokens, usage.rates()) == (None, 0, [0.0] * 5)


@pytest.mark.parametrize("cut", [0, 1, 30, 200, -1, -30])
def test_a_cut_file_is_ignored_with_a_sentence(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "u.npz"
    save_usage(path, some_usage())
    path.write_bytes(path.read_bytes()[:cut])
    usage, said = load_usage(path, LAYOUT)
    assert usage.tokens == 0
    assert said is not None and said.startswith(f"{path}: ") and said.endswith("starting without") and "\n" not in said


@pytest.mark.parametrize("at", range(0, 900, 37))
def test_a_damaged_byte_is_harmless(tmp_path: Path, at: int) -> None:
    path = tmp_path / "u.npz"
    save_usage(path, some_usage())
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 0xFF
    path.write_bytes(data)
    usage, said = load_usage(path, LAYOUT)
    assert usage.counts in ([0.0] * 5, [0, 1, 1, 0, 1]) and (said is None or "starting without" in said)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": np.int32(9)}, "is of version 9, not 1"),
        ({"n_experts": np.array([2, 4], np.int32)}, "does not fit the model"),
        ({"counts": np.zeros(4)}, "does not fit the model"),
        ({"counts": np.array([0, 1, -1, 0, 0.0])}, "does not fit the model"),
        ({"counts": np.array([0, 1, np.nan, 0, 0.0])}, "does not fit the model"),
        ({"tokens": np.float64("nan")}, "does not fit the model"),
        ({"tokens": np.zeros(3)}, "cannot be read"),
        ({"counts": np.array([{}] * 5, object)}, "cannot be read"),
        ({"n_experts": None}, "cannot be read"),
    ],
)
def test_a_file_of_something_else_is_ignored_with_a_sentence(
    tmp_path: Path, change: dict[str, object], says: str
) -> None:
    parts: dict[str, object] = {
        "version": np.int32(1), "n_experts": np.array([2, 3], np.int32), "tokens": np.float64(3), "counts": np.ones(5)
    }  # fmt: skip
    parts |= change
    np.savez(tmp_path / "u.npz", **{name: part for name, part in parts.items() if part is not None})  # type: ignore[arg-type]
    usage, said = load_usage(tmp_path / "u.npz", LAYOUT)
    assert usage.tokens == 0 and said is not None and says in said


def test_a_folder_that_cannot_be_written_is_said_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = save_usage(tmp_path / "file" / "u.npz", some_usage())
    assert said is not None and "the usage cannot be kept" in said
    (tmp_path / "taken.npz").mkdir()
    said = save_usage(tmp_path / "taken.npz", some_usage())
    assert said is not None and "the usage cannot be kept" in said
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "taken.npz"]


def test_numpys_words_about_pickles_are_not_passed_on(tmp_path: Path) -> None:
    (tmp_path / "u.npz").write_text("bad")
    said = load_usage(tmp_path / "u.npz", LAYOUT)[1]
    assert said is not None and "allow_pickle" not in said
    assert said.endswith("cannot be read (damaged, or not a usage file); starting without")


# ---- what is read at load, without an engine


class FakeNative:
    """Notes what is preloaded; every unit has been read in full."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self.batches: list[list[int]] = []

    def preload(self, units: Sequence[int]) -> None:
        self.batches.append(list(units))

    def counters(self) -> Counters:
        return Counters(bytes_read=sum(self._layout.unit_bytes[u] for batch in self.batches for u in batch))


class FakePolicy:
    def __init__(self) -> None:
        self.resident: list[int] | None = None

    def reset(self, resident: Iterable[int]) -> None:
        self.resident = list(resident)


def test_large_reads_are_split_so_that_an_interrupt_is_heard(tmp_path: Path) -> None:
    layout = Layout((8,), 1, (BATCH_BYTES // 2,) * 7 + (2 * BATCH_BYTES,))
    save_usage(tmp_path / "u.npz", Usage((8,), [1.0, 2.0, 3.0, 0.0, 8.0, 7.0, 6.0, 5.0], 8.0))
    native, policy = FakeNative(layout), FakePolicy()
    warm = WarmStart(tmp_path / "u.npz", layout)
    said = warm.preload(native, policy, layout.total_bytes)
    assert native.batches == [[4, 5], [6], [7], [2, 1], [0]]  # 7 alone is more than a batch, 3 was never used
    assert policy.resident == [0, 1, 2, 7, 6, 5, 4]  # the least used goes first
    assert (warm.preloaded.n_experts, warm.preloaded.bytes_read) == (7, 5 * BATCH_BYTES)
    assert said.startswith("warm start: 7 experts, 320.0 MiB read in ")
    assert said.endswith(f" s, by the usage of earlier runs in {tmp_path / 'u.npz'}")


@pytest.mark.parametrize("damaged", [False, True])
def test_without_usage_nothing_is_read_and_the_line_says_why(tmp_path: Path, damaged: bool) -> None:
    path = tmp_path / "u.npz"
    if damaged:
        path.write_bytes(b"PK")
    native, policy = FakeNative(LAYOUT), FakePolicy()
    said = WarmStart(path, LAYOUT).preload(native, policy, 50)
    assert (native.batches, policy.resident) == ([], None)
    if damaged:
        assert said == (
            f"warm start: {path}: the usage of earlier runs cannot be read (damaged, or not a usage file); "
            "starting without"
        )
    else:
        assert said == f"warm start: no usage of earlier runs yet; it will be kept in {path}"


def test_a_run_that_used_nothing_keeps_nothing(tmp_path: Path) -> None:
    warm = WarmStart(tmp_path / "u.npz", LAYOUT)
    assert warm.save() is None and not (tmp_path / "u.npz").exists()
    warm.usage.note(Step(0, [1], [1]))
    assert warm.save() is None and (tmp_path / "u.npz").exists()


# ---- in the engine


TOKENS = [int(t) for t in np.random.default_rng(3).integers(0, 2000, 80)]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test's own."""
    monkeypatch.setenv("MOE_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tiny(share: float = 0.3, path: Path | None = None, **more: object) -> EngineOptions:
    """Options at a share of the way from the floor to all resident."""
    o = EngineOptions(n_ctx=128, n_ubatch=1, **{"n_threads": 1, "logits_all": True, **more})  # type: ignore[arg-type]
    floor, whole = (budget_bytes(path or tiny_model_path(), name, o) for name in ("floor", "resident"))
    return replace(o, ram_bytes=floor + int(share * (whole - floor)))


def logits(engine: Engine, tokens: Sequence[int] = TOKENS) -> np.ndarray:
    with engine.decoding():
        return logits_of_context(engine.llama._ctx.ctx, engine.llama._model.model, list(tokens), 1)


def run_warm(options: EngineOptions, path: Path | None = None) -> tuple[np.ndarray, Counters, Counters, list[str]]:
    """(logits, counts at load, counts of the decode, what was told) of a run with a warm start."""
    told: list[str] = []
    with Engine(path or tiny_model_path(), replace(options, warm_start=True), tell=told.append) as engine:
        loaded = engine.counters()
        assert sorted(engine.policy.resident) == engine.native.resident_units()
        assert loaded.preloaded == len(engine.native.resident_units())
        got = logits(engine)
        c = engine.counters()
        assert c.preloaded + c.loads + c.prefetched - c.evictions == len(engine.native.resident_units())
        assert sorted(engine.policy.resident) == engine.native.resident_units()
        assert c.peak_committed_bytes <= engine.plan.arena_bytes
        assert c.hits + c.loads == c.uses
    return got, loaded, c.since(loaded), told


@pytest.mark.parametrize(
    "policy",
    [PolicyOptions(cache=rule) for rule in RULES] + [PolicyOptions(lookahead="stacked")],
    ids=lambda p: p.cache if p.lookahead == "off" else "look-ahead",
)
def test_a_warm_start_changes_no_bit_and_stays_within_the_arena(cache: Path, policy: PolicyOptions) -> None:
    options = tiny(policy=policy)
    with Engine(tiny_model_path(), options) as engine:
        want = logits(engine)
        assert not list(cache.rglob("*.usage.npz"))  # not asked for
    first, loaded, _, told = run_warm(options)
    assert np.array_equal(first, want)
    assert loaded.bytes_read == 0 and len(told) == 1 and "no usage of earlier runs yet" in told[0]
    second, loaded, c, told = run_warm(options)
    assert np.array_equal(second, want)
    assert c.evictions > 0
    assert loaded.bytes_read > 0 and loaded.peak_committed_bytes > 0 and loaded.steps == 0
    assert len(told) == 1 and f"{loaded.preloaded} experts, " in told[0] and str(cache) in told[0]


def test_the_second_run_misses_less_and_the_arena_is_full_before_it_begins(cache: Path) -> None:
    options = tiny(0.6)
    _, _, cold, _ = run_warm(options)
    _, loaded, warm, _ = run_warm(options)
    with Engine(tiny_model_path(), options) as engine:
        room, largest = engine.plan.arena_bytes - loaded.committed_bytes, max(engine.layout.unit_bytes)
    assert 0 <= room < largest
    assert warm.loads < cold.loads


def test_the_most_used_experts_are_in_memory_the_least_used_of_them_to_go_first(cache: Path) -> None:
    options = tiny(policy=PolicyOptions(cache="lru"))
    run_warm(options)
    with Engine(tiny_model_path(), replace(options, warm_start=True)) as engine:
        usage, _ = load_usage(usage_path(engine.model.store_id), engine.layout)
        want = preload_order(usage, engine.layout, engine.plan.arena_bytes)
        assert usage.tokens == len(TOKENS)
        assert list(engine.policy.resident) == want[::-1]
        p = engine.preloaded
        assert p is not None and p.n_experts == len(want)
        assert p.bytes_read <= sum(engine.layout.unit_bytes[u] for u in want) and p.seconds > 0


@pytest.mark.parametrize("rule", ["auto", "learned", "next-use", "decayed"])
def test_scores_start_from_the_usage(cache: Path, rule: str) -> None:
    options = tiny(policy=PolicyOptions(cache=rule))
    run_warm(options)
    for warm in (True, False):
        with Engine(tiny_model_path(), replace(options, warm_start=warm)) as engine:
            scores = engine.policy.cache._rule._uses.score  # type: ignore[attr-defined]
            assert (max(scores) > 0) == warm
            assert engine.counters().steps == 0


def test_usage_is_kept_after_an_error_and_grows_from_run_to_run(cache: Path) -> None:
    options = tiny(warm_start=True)
    for n_runs in (1, 2):
        with pytest.raises(ZeroDivisionError), Engine(tiny_model_path(), options) as engine:
            path = usage_path(engine.model.store_id)
            logits(engine, TOKENS[:20])
            raise ZeroDivisionError
        assert load_usage(path, engine.layout)[0].tokens == pytest.approx(20 * n_runs, rel=1e-3)
    before = path.read_bytes(), path.stat().st_mtime_ns
    with Engine(tiny_model_path(), options):
        pass  # nothing decoded: what is kept stays as it is
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_a_policy_set_later_counts_on_in_the_same_usage(cache: Path) -> None:
    with Engine(tiny_model_path(), tiny(warm_start=True)) as engine:
        logits(engine, TOKENS[:10])
        engine.set_policy(PolicyOptions(cache="lru"))
        engine.llama._ctx.kv_cache_clear()
        logits(engine, TOKENS[:10])
    assert load_usage(usage_path(engine.model.store_id), engine.layout)[0].tokens == 20


def test_a_usage_that_cannot_be_kept_is_one_sentence(cache: Path) -> None:
    told: list[str] = []
    with Engine(tiny_model_path(), tiny(warm_start=True), tell=told.append) as engine:
        usage_path(engine.model.store_id).mkdir(parents=True)
        logits(engine, TOKENS[:5])
    assert len(told) == 2 and "the usage cannot be kept" in told[1]


def test_a_cut_model_file_fails_the_load_and_names_file_and_tensor(cache: Path, tmp_path: Path) -> None:
    """Converted models are checked for their length when they are opened; one that is cut later is not."""
    path = write_random_model(tmp_path / "m.gguf", "olmoe")
    options = tiny(1.0, path)
    tokens = TOKENS[:1] * 40 + list(range(60, 200))
    with Engine(path, replace(options, warm_start=True, n_ctx=256)) as engine:
        logits(engine, [t % 250 for t in tokens])
    engine = Engine(path, replace(options, warm_start=True))
    last = max(engine.model.pieces, key=lambda p: p.offset)
    os.truncate(path, last.offset + 100)
    sentence = rf"{path}: tensor 'blk\..*_exps\.weight' of expert \d+ needs bytes .*cut short"
    with pytest.raises(EngineError, match=sentence):
        engine.__enter__()
    engine.close()


def test_what_cannot_be_preloaded_is_refused_and_the_engine_goes_on(random_model: Callable[[str], Path]) -> None:
    path = random_model("olmoe")
    options = tiny(0.3, path)
    tokens = [t % 250 for t in TOKENS]
    with Engine(path, options) as engine:
        want = logits(engine, tokens)
    with Engine(path, options) as engine:
        for units, says in (
            ([3, 3], "unit 3 of 16 cannot be preloaded: it does not exist or is in memory"),
            ([16], "unit 16 of 16 cannot"),
            ([-1], "unit -1 of 16 cannot"),
            (range(16), "exceeds the memory of the expert arena|unit 3 of 16 cannot"),
        ):
            with pytest.raises(EngineError, match=says):
                engine.native.preload(units)
        engine.native.preload([])
        assert engine.counters().committed_bytes <= engine.plan.arena_bytes
        engine.policy.reset(engine.native.resident_units())
        assert np.array_equal(logits(engine, tokens), want)
        assert engine.counters().peak_committed_bytes <= engine.plan.arena_bytes


# ---- on the command line


def command(*args: object) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-m", "moe_edge.runner.start", *(str(a) for a in args)]
    return subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=120, input="And the king\n")


@pytest.mark.parametrize("name", ["generate", "chat"])
def test_the_flag_reads_and_keeps_and_without_it_nothing_is_touched(cache: Path, name: str) -> None:
    base = [name, *(["-p", "And the king"] if name == "generate" else []), "-n", 30, "--temp", 0, "--ram", "38MiB"]
    plain = command(*base)
    assert plain.returncode == 0, plain.stderr
    assert "warm start" not in plain.stderr and not list(cache.rglob("*.usage.npz"))
    first, second = command(*base, "--warm-start"), command(*base, "--warm-start")
    assert "warm start: no usage of earlier runs yet" in first.stderr
    assert re.search(r"warm start: \d+ experts, \d+\.\d MiB read in \d+\.\d\d s, by the usage", second.stderr)
    assert plain.stdout == first.stdout == second.stdout != ""
    (path,) = cache.rglob("*.usage.npz")
    path.write_text("bad")
    again = command(*base, "--no-warm-start")
    assert "warm start" not in again.stderr and path.read_text() == "bad"
    damaged = command(*base, "--warm-start")
    assert f"warm start: {path}: the usage of earlier runs cannot be read" in damaged.stderr
    assert damaged.returncode == 0 and damaged.stdout == plain.stdout
    assert "MiB read in" in command(*base, "--warm-start").stderr  # the damaged one was replaced


def test_an_interrupted_run_keeps_its_usage(cache: Path) -> None:
    arguments = ["generate", "-n", "100000", "-c", "8192", "--temp", "0", "--ram", "200MiB", "-t", "1", "--warm-start"]
    child = subprocess.Popen(
        [sys.executable, "-m", "moe_edge.runner.start", *arguments, "-p", "And the king"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    assert len(child.stdout.read(5)) == 5  # it decodes
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130, said
    assert said.splitlines()[-1] == "moe-edge: interrupted"
    assert "MiB read in" in command("generate", "-p", "x", "-n", 1, "--ram", "40MiB", "--warm-start").stderr


def test_the_tokens_of_a_generation_are_the_same_from_a_warm_start(cache: Path) -> None:
    texts = []
    for _ in range(3):
        with Engine(tiny_model_path(), tiny(0.2, warm_start=True, logits_all=False)) as engine:
            result = generate(engine, "In the beginning", 60, Sampling(temp=0))
            texts.append(result.text)
            facts = result.to_json(engine)
        assert result.counters.evictions > 0
        assert (facts["warm_start"]["n_experts"] > 0) == (len(texts) > 1)
    assert len(set(texts)) == 1


def test_a_part_that_is_no_array_is_damage(tmp_path: Path) -> None:
    """numpy gives its plain bytes; found by make fuzz, seed 78."""
    import zipfile

    whole = tmp_path / "whole.npz"
    np.savez(whole, version=np.int32(1), n_experts=np.array([4], np.int32), tokens=np.float64(1), counts=np.ones(4))
    for name in ("version", "n_experts", "tokens", "counts"):
        path = tmp_path / f"{name}.npz"
        with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w") as target:
            for part in source.namelist():
                target.writestr(part, b"no array" if part == f"{name}.npy" else source.read(part))
        _, said = load_usage(path, Layout((4,), 1, (10,) * 4))
        assert said is not None and "cannot be read" in said
