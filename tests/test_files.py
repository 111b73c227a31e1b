"""Files as they are met in the world: overwritten, damaged, attacked, raced for, half written."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from moe_edge.convert.convert import convert
from moe_edge.models.errors import BadFile, EngineError, MissingFile, MoeEdgeError, UsageError
from moe_edge.models.formats.gguf import read_gguf
from moe_edge.models.store.skeleton import cache_folder, skeleton_for
from moe_edge.models.store.store import open_model, store_path, verify_store
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.generate import Sampling, generate
from random_models import write_random_model

MOE_EDGE = [sys.executable, "-m", "moe_edge.runner.start"]
OPTIONS = EngineOptions(n_threads=1, n_ctx=64, proof="nothing")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOE_EDGE_CACHE", str(tmp_path / "cache"))
    return cache_folder()


def text_of(path: Path) -> str:
    with Engine(path, OPTIONS) as engine:
        return generate(engine, "hello world", 8, Sampling(temp=0), ignore_end=True).text


# The command line, with the peak of its memory behind its last words: that of a child is not told apart from ours.
WATCHED = [
    sys.executable, "-c",
    "import sys\n"
    "from moe_edge.models import errors\n"
    "from moe_edge.runner import terminal\n"
    "from moe_edge.runner.cli import main\n"
    "from moe_edge.runner.memory import peak_rss_bytes\n"
    "from moe_edge.runner.start import run\n"
    "terminal.complain = lambda e: terminal.say(f'moe-edge: {errors.sentence(e)} peak {peak_rss_bytes()}')\n"
    "run(main)\n",
]  # fmt: skip


def run(
    *arguments: object, command: list[str] = MOE_EDGE, **more: object
) -> subprocess.CompletedProcess[str]:
    command = [*command, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **more)  # type: ignore[call-overload,no-any-return]


def fails(*arguments: object, status: int | None = 1, **more: object) -> str:
    """The one sentence that a command ends with; status None: a wrong call or failed work."""
    done = run(*arguments, **more)  # type: ignore[arg-type]
    assert done.returncode in ((1, 2) if status is None else (status,)), done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("moe-edge: ") and len(lines[0]) < 2100, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


# ---- the cached skeleton


def other_dense_weights(path: Path) -> None:
    """Other bytes in a dense tensor; name, size and time of the file stay, as in images with fixed dates."""
    before = path.stat()
    entry = read_gguf(path).tensors["output.weight"]
    with open(path, "r+b") as file:
        file.seek(entry.offset + entry.nbytes // 3)
        file.write(random.Random(3).randbytes(entry.nbytes // 2))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_another_model_of_the_same_name_size_and_time_gets_its_own_skeleton(tmp_path: Path, cache: Path) -> None:
    path = write_random_model(tmp_path / "m.gguf", "qwen3moe", dense_type="F32")
    first, before = skeleton_for(path), text_of(path)
    other_dense_weights(path)
    assert skeleton_for(path) != first
    fresh = shutil.copy(path, tmp_path / "fresh.gguf")
    assert text_of(path) == text_of(Path(fresh)) != before


@pytest.mark.parametrize("damage", ["cut", "longer", "flipped in the header", "flipped in the weights", "empty"])
def test_a_damaged_skeleton_is_made_again(tmp_path: Path, cache: Path, damage: str) -> None:
    path = write_random_model(tmp_path / "m.gguf", "olmoe", dense_type="F32")
    skeleton = skeleton_for(path)
    whole, before = skeleton.read_bytes(), text_of(path)
    bad = bytearray(whole)
    if damage == "cut":
        del bad[len(bad) // 2 :]
    elif damage == "longer":
        bad += b"\0" * 64
    elif damage == "empty":
        bad.clear()
    else:
        at = 60 if damage == "flipped in the header" else len(bad) - len(bad) // 3
        bad[at] ^= 0x55
    skeleton.write_bytes(bad)
    assert text_of(path) == before
    assert skeleton.read_bytes() == whole


def test_names_in_the_cache_are_short_whatever_the_users_are(tmp_path: Path, cache: Path) -> None:
    source = write_random_model(tmp_path / "m.gguf", "olmoe")
    longest = tmp_path / ("ü" * 120 + ".gguf")  # 245 bytes
    source.rename(longest)
    assert len(os.fsencode(skeleton_for(longest).name)) < 100
    odd = tmp_path / os.fsdecode(b"\xff\xfe name\n.gguf")
    longest.rename(odd)
    assert skeleton_for(odd).name.isascii()


def test_links_to_one_file_share_a_skeleton(tmp_path: Path, cache: Path) -> None:
    blob = write_random_model(tmp_path / "blob", "olmoe")
    for commit in ("a", "b"):
        (tmp_path / commit).mkdir()
        (tmp_path / commit / "model.gguf").symlink_to(blob)
    assert skeleton_for(tmp_path / "a" / "model.gguf") == skeleton_for(tmp_path / "b" / "model.gguf")


def test_a_skeleton_whose_proof_fails_has_no_name(tmp_path: Path, cache: Path) -> None:
    path = write_random_model(tmp_path / "m.gguf", "olmoe")

    def refuse(_skeleton: Path) -> None:
        raise BadFile("refused")

    with pytest.raises(BadFile, match="refused"):
        skeleton_for(path, prove=refuse)
    assert not [each for each in cache.rglob("*") if each.suffix == ".gguf"]


# ---- experts that change while they are read


def cut(path: Path) -> None:
    os.truncate(path, 400_000)


def overwrite(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(200_000)
        file.write(random.Random(1).randbytes(1_000_000))


@pytest.mark.parametrize(("change", "says"), [(cut, "was cut from"), (overwrite, "was overwritten")])
def test_a_file_that_is_written_to_in_place_is_noticed(
    tmp_path: Path, cache: Path, change: Callable[[Path], None], says: str
) -> None:
    path = write_random_model(tmp_path / "m.gguf", "qwen3moe")
    with Engine(path, OPTIONS) as engine:
        generate(engine, "hello", 3, Sampling(temp=0))
        time.sleep(0.02)
        change(path)
        with pytest.raises(EngineError, match=rf"m\.gguf: {says}.*load the model again"):
            generate(engine, "other words", 3, Sampling(temp=0))


@pytest.mark.parametrize("how", ["renamed over", "deleted"])
def test_a_file_that_is_replaced_stays_what_was_opened(tmp_path: Path, cache: Path, how: str) -> None:
    path = write_random_model(tmp_path / "m.gguf", "qwen3moe")
    want = text_of(path)
    other = write_random_model(tmp_path / "other.gguf", "qwen3moe", seed=9)
    with Engine(path, OPTIONS) as engine:
        if how == "deleted":
            path.unlink()
        else:
            os.replace(other, path)
        assert generate(engine, "hello world", 8, Sampling(temp=0), ignore_end=True).text == want


# ---- headers that attack


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def header(n_tensors: int, kvs: list[bytes]) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, len(kvs)) + b"".join(kvs)


ARCHITECTURE = string(b"general.architecture") + struct.pack("<I", 8) + string(b"qwen3moe")


def sparse_array(path: Path) -> None:
    """10^8 numbers, which cost the file nothing."""
    data = header(0, [ARCHITECTURE, string(b"x") + struct.pack("<IIQ", 9, 10, 10**8)])
    path.write_bytes(data)
    os.truncate(path, len(data) + 8 * 10**8)


def sparse_strings(path: Path) -> None:
    """10^8 empty strings."""
    data = header(0, [ARCHITECTURE, string(b"x") + struct.pack("<IIQ", 9, 8, 10**8)])
    path.write_bytes(data)
    os.truncate(path, len(data) + 8 * 10**8)


def a_million_tensors(path: Path) -> None:
    infos = b"".join(string(b"t%d" % i) + struct.pack("<IQIQ", 1, 1, 0, 32 * i) for i in range(1_000_000))
    data = header(1_000_000, [ARCHITECTURE]) + infos
    path.write_bytes(data)
    os.truncate(path, len(data) + 32 + 32 * 1_000_000)


def a_long_name(path: Path) -> None:
    name = struct.pack("<I", 8) + string(b"\x1b[31m" * 200_000)
    path.write_bytes(header(0, [string(b"general.architecture") + name]))


def a_promise_of_everything(path: Path) -> None:
    path.write_bytes(header(2**62, [ARCHITECTURE]))


def a_fifo(path: Path) -> None:
    os.mkfifo(path)


def zeros_for_ever(path: Path) -> None:
    path.symlink_to("/dev/zero")


ATTACKS = [
    sparse_array, sparse_strings, a_million_tensors, a_long_name, a_promise_of_everything, a_fifo, zeros_for_ever,
]  # fmt: skip


def checkpoint(folder: Path, index: bytes, config: dict[str, object] | None = None) -> Path:
    folder.mkdir()
    basic = {"architectures": ["OlmoeForCausalLM"], "num_hidden_layers": 1, "num_experts": 2, "hidden_size": 32}
    (folder / "config.json").write_text(json.dumps({**basic, **(config or {})}))
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(index)) + index)
    return folder


def test_headers_that_attack_are_refused_in_little_time_and_memory(tmp_path: Path) -> None:
    """One process for each; what it took is asked of the kernel."""
    cases: dict[str, Path] = {}
    for attack in ATTACKS:
        cases[attack.__name__] = tmp_path / f"{attack.__name__}.gguf"
        attack(cases[attack.__name__])
    entry = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    cases["duplicate keys"] = checkpoint(
        tmp_path / "duplicates", ("{" + ",".join(f'"same":{entry}' for _ in range(40_000)) + "}").encode()
    )
    cases["layers"] = checkpoint(tmp_path / "layers", b"{}", {"num_hidden_layers": 10**9})
    cases["deep"] = checkpoint(tmp_path / "deep", b"[" * 200_000)
    for name, path in cases.items():
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        said = fails("convert", path, "-o", tmp_path / "out.gguf", command=WATCHED)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        said, _, peak_bytes = said.rpartition(" peak ")
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        assert seconds < 3 and time.monotonic() - started < 20, (name, seconds)
        assert int(peak_bytes) < 256 << 20, name
        assert "\x1b" not in said and path.name.split(".")[0] in said, (name, said)
        assert not list(tmp_path.glob("out*")), name


# ---- folders


def test_a_folder_gives_its_model_and_skips_what_lies_beside_it(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write_random_model(folder / "real.gguf", "olmoe").rename(folder / "Real.GGUF")
    for name in ("._Real.gguf", "mmproj-F16.gguf", "imatrix_unsloth.gguf", ".hidden.gguf"):
        (folder / name).write_bytes(b"no model")
    assert open_model(folder).files[0].name == "Real.GGUF"


def test_a_folder_without_a_model_says_what_would_be_needed(tmp_path: Path) -> None:
    clip = string(b"general.architecture") + struct.pack("<I", 8) + string(b"clip")
    (tmp_path / "mmproj.gguf").write_bytes(header(0, [clip]) + b"\0" * 32)
    (tmp_path / "notes.txt").write_text("x")
    said = fails("show", tmp_path)
    assert ".gguf" in said and "config.json" in said


# ---- writing: whole pairs, or nothing


def left_in(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


def test_a_conversion_that_fails_its_proof_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    source = write_random_model(tmp_path / "m.gguf", "olmoe")
    out = tmp_path / "out"
    out.mkdir()
    seen: list[list[str]] = []

    def refuse(skeleton: Path) -> None:
        seen.append(left_in(out))
        open_model(skeleton)
        raise BadFile("refused")

    with pytest.raises(BadFile, match="refused"):
        convert(source, out / "a.gguf", prove=refuse)
    assert left_in(out) == [] and "a.gguf" not in seen[0] and "a.experts.gguf" not in seen[0]
    convert(source, out / "a.gguf")
    before = {each: (out / each).read_bytes() for each in left_in(out)}
    with pytest.raises(BadFile, match="refused"):
        convert(source, out / "a.gguf", overwrite=True, prove=refuse)
    assert {each: (out / each).read_bytes() for each in left_in(out)} == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda n: n.name)
def test_a_conversion_that_is_ended_leaves_no_names_and_the_next_one_works(tmp_path: Path, number: int) -> None:
    source = write_random_model(tmp_path / "m.gguf", "qwen3moe")
    out = tmp_path / "out"
    out.mkdir()
    rng = random.Random(number)
    for _ in range(4):
        child = subprocess.Popen(
            [*MOE_EDGE, "convert", str(source), "-o", str(out / "a.gguf"), "--high", "Q6_K", "-t", "1"],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        time.sleep(rng.uniform(0.3, 1.2))
        child.send_signal(number)
        _, said = child.communicate(timeout=60)
        names = {name for name in left_in(out) if not name.startswith(".moe-edge-")}
        assert names in (set(), {"a.gguf", "a.experts.gguf"}), (names, said)
        if names:
            verify_store(store_path(out / "a.gguf"))
            open_model(out / "a.gguf")
            for name in names:
                (out / name).unlink()
    done = run("convert", source, "-o", out / "a.gguf", "-t", 1)
    assert done.returncode == 0, done.stderr
    assert left_in(out) == ["a.experts.gguf", "a.gguf"]  # what was killed is cleaned up


def test_of_two_conversions_to_one_output_one_wins_whole(tmp_path: Path) -> None:
    source = write_random_model(tmp_path / "m.gguf", "qwen3moe")
    out = tmp_path / "o.gguf"
    for _ in range(2):
        children = [
            subprocess.Popen([*MOE_EDGE, "convert", str(source), "-o", str(out), "--force", "-t", "1", "--high", kind],
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            for kind in ("Q8_0", "Q6_K")
        ]  # fmt: skip
        said = [child.communicate(timeout=120)[1] for child in children]
        assert [child.returncode for child in children] == [0, 0], said
        verify_store(store_path(out))
        open_model(out, verify=True)
    assert left_in(tmp_path) == ["m.gguf", "o.experts.gguf", "o.gguf"]


def test_many_at_once_share_one_cache(tmp_path: Path, cache: Path) -> None:
    path = write_random_model(tmp_path / "m.gguf", "olmoe")
    found: list[object] = []

    def make() -> None:
        try:
            found.append(skeleton_for(path))
        except MoeEdgeError as e:
            found.append(e)

    threads = [threading.Thread(target=make) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 6 and len(set(found)) == 1 and isinstance(found[0], Path)
    assert [each.name for each in cache.iterdir() if each.suffix == ".gguf"] == [found[0].name]


# ---- what earlier runs left


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 not a zip", b"\x93NUMPY\x01\0", os.urandom(3000)])
def test_a_damaged_usage_file_is_ignored_and_replaced(tmp_path: Path, damage: bytes) -> None:
    path = write_random_model(tmp_path / "m.gguf", "olmoe")
    home = {**os.environ, "MOE_EDGE_CACHE": str(tmp_path / "cache")}
    call = ("generate", path, "-p", "hello", "-n", 4, "--temp", 0, "-t", 1, "-c", 64, "--warm-start")
    assert run(*call, env=home).returncode == 0
    (usage,) = (tmp_path / "cache").rglob("*.usage.npz")
    usage.write_bytes(damage)
    done = run(*call, env=home)
    assert done.returncode == 0 and "Traceback" not in done.stderr and "starting without" in done.stderr
    assert usage.read_bytes() != damage
    again = run(*call, env=home)
    assert again.returncode == 0 and "warm start: " in again.stderr and "starting without" not in again.stderr


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 not a zip", b"\x93NUMPY\x01\0" + b"(" * 200])
def test_a_damaged_trace_is_one_sentence(tmp_path: Path, damage: bytes) -> None:
    trace = tmp_path / "t.npz"
    trace.write_bytes(damage)
    assert "t.npz" in fails("simulate", trace)


def test_other_types_in_json_are_named(tmp_path: Path) -> None:
    texts = [b"[]", b'{"architectures": 5}', b"\xff", b'{"architectures": [7]}']
    for number, text in enumerate(texts):
        folder = checkpoint(tmp_path / str(number), b"{}")
        (folder / "config.json").write_bytes(text)
        assert "config.json" in fails("convert", folder, "-o", tmp_path / "o.gguf", status=None)


def test_no_home_and_no_entry_among_users_is_one_sentence(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "m.gguf", "olmoe")
    code = (
        "import os, pwd, sys\n"
        "def gone(*_): raise KeyError('nobody')\n"
        "pwd.getpwuid = gone\n"
        "from moe_edge.models.store.skeleton import skeleton_for\n"
        "from moe_edge.models.errors import MissingFile\n"
        "try: skeleton_for(sys.argv[1])\n"
        "except MissingFile as e: print(e)\n"
    )
    bare = {key: value for key, value in os.environ.items() if key not in ("HOME", "MOE_EDGE_CACHE", "XDG_CACHE_HOME")}
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, env=bare, timeout=60)
    assert "MOE_EDGE_CACHE" in done.stdout, done.stderr


def test_files_that_cannot_be_read_name_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_random_model(tmp_path / "m.gguf", "olmoe")
    real = os.pread

    def broken(fd: int, n: int, offset: int) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises((MissingFile, BadFile), match=r"m\.gguf.*[Ii]nput/output error"):
        open_model(path, cache_dir=tmp_path / "c")
    monkeypatch.setattr(os, "pread", real)
    with pytest.raises((UsageError, MissingFile)):
        open_model(tmp_path / "absent.gguf")
