"""`pull --then convert`: the same bytes as a conversion of what was pulled first, with two layers on disk at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from checkpoints import qwen3_config, write_checkpoint
from hub_server import FakeHub, hub_running
from moe_edge.convert.convert import convert
from moe_edge.models.errors import BadChecksum, DiskFull, MoeEdgeError, UsageError
from moe_edge.models.formats.gguf import TensorEntry
from moe_edge.models.formats.safetensors import INDEX_NAME, open_safetensors
from moe_edge.runner.commands import pulled_conversion
from moe_edge.runner.commands.pulled_conversion import PulledConversion, pull_and_convert
from moe_edge.runner.hub import download
from moe_edge.runner.hub.client import Hub
from moe_edge.runner.hub.layers import Range, layers_of, ranges_of
from moe_edge.runner.hub.names import HubName
from random_models import Shape, write_random_model
from test_safetensors import write_safetensors

REPO = "user/tiny-moe"
START = [sys.executable, "-m", "moe_edge.runner.start"]
SUFFIXES = (".gguf", ".experts.gguf")


def shards(folder: Path) -> None:
    """Two files instead of one, by turns, so that every layer and every expert spans both."""
    whole = open_safetensors(folder)
    weight_map: dict[str, str] = {}
    for number in (1, 2):
        name = f"model-{number:05d}-of-00002.safetensors"
        mine = sorted(whole.tensors)[number - 1 :: 2]
        tensors = {
            each: ("BF16", np.frombuffer(whole.read_raw(each), "<u2").reshape(whole.tensors[each].shape))
            for each in mine
        }
        write_safetensors(folder / name, tensors)
        weight_map |= {each: name for each in mine}
    (folder / "model.safetensors").unlink()
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each named as its repository, since the name is in what is made of it."""
    folder = tmp_path_factory.mktemp("sources")
    made = {}
    for name, fused in (("plain", False), ("fused", True)):
        (folder / name).mkdir()
        made[name] = write_checkpoint(folder / name / "tiny-moe", qwen3_config(), fused)
    shards(made["plain"])
    made["gguf"] = write_random_model(folder / "m-Q8_0.gguf", "qwen3moe", Shape(n_layer=3))
    return made


def served(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else [each for each in path.iterdir() if each.is_file()]
    return {each.name: each.read_bytes() for each in files}


@pytest.fixture(params=["plain", "fused", "gguf"])
def source(request: pytest.FixtureRequest, sources: dict[str, Path]) -> Path:
    return sources[request.param]


@pytest.fixture
def hub(source: Path) -> Iterator[FakeHub]:
    with hub_running(FakeHub(REPO, served(source))) as running:
        yield running


def client(hub: FakeHub) -> Hub:
    return Hub(hub.url, "", pause=0.01)


def run(hub: FakeHub, out: Path, *arguments: str, check: bool = False) -> None:
    pull_and_convert(client(hub), HubName(REPO), ["-o", str(out), "-t", "1", *arguments], check, False)


def files_of(out: Path) -> list[bytes]:
    return [out.with_name(out.name.removesuffix(".gguf") + suffix).read_bytes() for suffix in SUFFIXES]


def expected(source: Path, folder: Path, **options: object) -> list[bytes]:
    convert(source, folder / "expected.gguf", threads=1, **options)  # type: ignore[arg-type]
    return files_of(folder / "expected.gguf")


# ---- the same bytes


def test_the_result_is_that_of_a_conversion_after_the_download(
    hub: FakeHub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[PulledConversion] = []

    class Watched(PulledConversion):
        def finished(self) -> None:
            made.append(self)
            mirrors = [each for each in self._mirror.remote if each.exists()]
            on_disk = sum(each.stat().st_blocks * 512 for each in mirrors)
            assert on_disk < 0.6 * sum(each.stat().st_size for each in mirrors)  # holes, but for headers
            super().finished()

    monkeypatch.setattr(pulled_conversion, "PulledConversion", Watched)
    run(hub, tmp_path / "out.gguf", "--high", "Q4_0", check=True)
    assert files_of(tmp_path / "out.gguf") == expected(source, tmp_path, type="Q4_0")
    largest = max(each.nbytes for each in layers_of(made[0]._tensors, 0))
    assert 0 < made[0].most_bytes <= 2 * largest
    whole = sum(len(data) for data in hub.files.values())
    assert made[0].most_bytes < whole
    assert hub.sent <= 2 * whole + (6 << 20)  # once to convert, once more for --check, and headers
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(
        [f"{name}{suffix}" for name in ("out", "expected") for suffix in SUFFIXES]
    )


def test_two_levels_read_every_layer_once(hub: FakeHub, source: Path, tmp_path: Path) -> None:
    run(hub, tmp_path / "out.gguf", "--high", "Q5_0", "--low", "Q4_0")
    assert files_of(tmp_path / "out.gguf") == expected(source, tmp_path, type="Q5_0", low_type="Q4_0")
    assert hub.sent <= sum(len(data) for data in hub.files.values()) + (6 << 20)


@pytest.mark.parametrize("source", ["plain"], indirect=True)
def test_a_hub_that_cuts_and_expires_changes_nothing(hub: FakeHub, source: Path, tmp_path: Path) -> None:
    hub.cut = lambda path, n: 100_000 if n % 3 == 0 else None
    hub.expire = 5
    run(hub, tmp_path / "out.gguf", "--high", "Q4_0")
    assert files_of(tmp_path / "out.gguf") == expected(source, tmp_path, type="Q4_0")


# ---- stopped and gone on with


def stop_after(n: int, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    """Raise when the journal has been written n times."""
    count = 0
    write = download.replace_text

    def counted(path: Path, text: str) -> None:
        nonlocal count
        write(path, text)
        count += 1
        if count == n:
            raise error()

    monkeypatch.setattr(pulled_conversion, "replace_text", counted)


@pytest.mark.parametrize("n", [1, 4])
def test_it_goes_on_at_the_layer_where_it_was_stopped(
    n: int, hub: FakeHub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.gguf"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(n, patch, KeyboardInterrupt)
        run(hub, out, "--high", "Q4_0")
    assert not out.exists()
    journal = json.loads((tmp_path / "out.gguf.moe-edge-pull/journal.json").read_text())
    assert journal["store"]
    read: list[int] = []

    class Watched(PulledConversion):
        def begin(self, tensors: Sequence[tuple[str, TensorEntry]]) -> int:
            read.append(len(tensors))
            return super().begin(tensors)

    monkeypatch.setattr(pulled_conversion, "PulledConversion", Watched)
    run(hub, out, "--high", "Q4_0")
    assert files_of(out) == expected(source, tmp_path, type="Q4_0")
    assert not (tmp_path / "out.gguf.moe-edge-pull").exists()
    run(hub, tmp_path / "again.gguf", "--high", "Q4_0")
    assert read[0] == read[1] - len(journal["store"]) - len(journal["skeleton"])


@pytest.mark.parametrize("source", ["plain"], indirect=True)
def test_a_killed_process_is_gone_on_with(hub: FakeHub, source: Path, tmp_path: Path) -> None:
    out, folder = tmp_path / "out.gguf", tmp_path / "out.gguf.moe-edge-pull"
    hub.slow = 0.01
    call = [*START, "pull", REPO, "--then", "convert", "-o", str(out), "--high", "Q4_0", "-t", "1"]
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_TOKEN_PATH": str(tmp_path / "none")}
    child = subprocess.Popen(call, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment)
    end = time.monotonic() + 120
    while not (folder / "journal.json").exists() and child.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert (folder / "journal.json").exists() and not out.exists()
    hub.slow = 0.0
    done = subprocess.run(call, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "written, read back and checked" in done.stdout
    assert files_of(out) == expected(source, tmp_path, type="Q4_0")
    assert not folder.exists()


@pytest.mark.parametrize("source", ["gguf"], indirect=True)
@pytest.mark.parametrize("spoil", ["types", "journal", "hub", "part"])
def test_what_is_of_another_conversion_is_begun_anew(
    spoil: str, hub: FakeHub, source: Path, tmp_path: Path, sources: dict[str, Path]
) -> None:
    out = tmp_path / "out.gguf"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(2, patch, KeyboardInterrupt)
        run(hub, out, "--high", "Q4_0")
    if spoil == "journal":
        (tmp_path / "out.gguf.moe-edge-pull/journal.json").write_text('{"store": [1')
    elif spoil == "part":
        (tmp_path / "out.gguf.moe-edge-pull/out.experts.gguf").unlink()
    elif spoil == "hub":
        data = bytearray(hub.files[source.name])
        data[-100:] = bytes(100)
        hub.files[source.name] = bytes(data)
        source = tmp_path / source.name
        source.write_bytes(data)
    types = "Q5_0" if spoil == "types" else "Q4_0"
    run(hub, out, "--high", types)
    assert files_of(out) == expected(source, tmp_path, type=types)


# ---- refused


@pytest.mark.parametrize("source", ["gguf"], indirect=True)
def test_bytes_that_are_not_what_the_hub_says_get_no_name(hub: FakeHub, source: Path, tmp_path: Path) -> None:
    hub.other_sha256 = {source.name: "0" * 64}
    with pytest.raises(BadChecksum, match="the hub says 0000"):
        run(hub, tmp_path / "out.gguf", "--high", "Q4_0", check=True)
    assert not [each for each in tmp_path.iterdir() if each.suffix == ".gguf"]
    assert not (tmp_path / "out.gguf.moe-edge-pull").exists()


@pytest.mark.parametrize("source", ["gguf"], indirect=True)
def test_what_was_written_and_damaged_meanwhile_is_found_and_thrown_away(
    hub: FakeHub, source: Path, tmp_path: Path
) -> None:
    out, store = tmp_path / "out.gguf", tmp_path / "out.gguf.moe-edge-pull/out.experts.gguf"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(1, patch, KeyboardInterrupt)
        run(hub, out, "--high", "Q4_0")
    data = bytearray(store.read_bytes())
    data[len(data) // 2] ^= 1
    store.write_bytes(data)
    with pytest.raises(BadChecksum, match="reads back differently"):
        run(hub, out, "--high", "Q4_0")
    assert not out.exists() and not store.parent.exists()
    run(hub, out, "--high", "Q4_0")
    assert files_of(out) == expected(source, tmp_path, type="Q4_0")


@pytest.mark.parametrize("source", ["gguf"], indirect=True)
def test_room_for_the_result_and_two_layers_is_asked_for_first(
    hub: FakeHub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1 << 20}))
    with pytest.raises(DiskFull, match="two layers on their way"):
        run(hub, tmp_path / "out.gguf", "--high", "Q4_0")
    assert hub.sent <= 2 << 20


@pytest.mark.parametrize("source", ["gguf"], indirect=True)
def test_a_hub_that_goes_away_is_one_error_and_leaves_what_was_written(
    hub: FakeHub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_edge.runner.hub.layers.TRIES", 2)
    out = tmp_path / "out.gguf"
    asked = 0

    def cut(path: str, n: int) -> int | None:
        nonlocal asked
        asked += 1
        return 0 if asked > 4 else None

    hub.cut = cut
    with pytest.raises(MoeEdgeError, match="broke 2 times"):
        run(hub, out, "--high", "Q4_0")
    assert not out.exists()
    hub.cut = lambda path, n: None
    run(hub, out, "--high", "Q4_0")
    assert files_of(out) == expected(source, tmp_path, type="Q4_0")


@pytest.mark.parametrize("source", ["gguf"], indirect=True)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--pack", "auto"), "--pack"), (("--calibrate", "x.txt"), "--calibrate reads the model twice"),
        (("--bits", "4", "--calibrate", "x"), "reads the model twice"),
    ],
)  # fmt: skip
def test_what_needs_the_model_twice_is_refused(
    arguments: tuple[str, ...], words: str, hub: FakeHub, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=words):
        run(hub, tmp_path / "out.gguf", *arguments)
    assert not list(tmp_path.iterdir()) and not hub.requests


def test_the_command_line_keeps_the_two_apart(tmp_path: Path) -> None:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*START, "pull", *arguments], capture_output=True, text=True, timeout=60, check=False)

    for text in ("--then chat", "--then", "--best --then convert -o x.gguf", "-t 3 --then convert -o x.gguf",
                 "--check", "--then convert",
                 "--then convert --bogus"):  # fmt: skip
        wrong = ("a/b", *text.split())
        done = call(*wrong)
        assert done.returncode == 2 and "Traceback" not in done.stderr, (wrong, done.stderr)


# ---- layers


def entry(offset: int, nbytes: int, path: str = "a") -> TensorEntry:
    return TensorEntry("t", (nbytes,), 24, Path(path), offset, nbytes)


def test_ranges_that_are_near_are_one_and_know_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_edge.runner.hub.layers.GAP_BYTES", 10)
    found = ranges_of([entry(100, 50), entry(155, 10), entry(500, 5), entry(120, 10), entry(7, 3, "b")])
    assert found == (
        Range(Path("a"), 100, 165, 0), Range(Path("a"), 500, 505, 65), Range(Path("b"), 7, 10, 70),
    )  # fmt: skip
    layer = layers_of([("x", entry(100, 50)), ("y", entry(155, 10))], 3)
    assert [(each.number, each.n_tensors) for each in layer] == [(0, 4), (1, 5)]
    assert layer[0].find(Path("a"), 120, 130) == 20 and layer[0].find(Path("a"), 140, 151) is None
    assert layer[0].find(Path("b"), 120, 130) is None and layer[0].find(Path("a"), 0, 1) is None


def test_layers_are_blocks_that_follow_one_another() -> None:
    names = ["blk.0.a", "blk.0.b", "blk.1.a", "output.weight", "token_embd.weight", "blk.0.c"]
    found = layers_of([(name, entry(10 * i, 10)) for i, name in enumerate(names)], 0)
    assert [each.n_tensors for each in found] == [2, 3, 4, 5, 6]


