"""The budget is kept: measured in a memory cgroup of --ram + 64 MiB, page cache included."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from moe_edge.models.formats.gguf import read_gguf
from moe_edge.models.formats.write import GGUFOutput, TensorSpec, kv_strings
from random_models import Shape, write_big_model, write_random_model

MIB = 1 << 20
ALLOWANCE = 64 * MIB


@dataclass
class Cgroup:
    """A memory cgroup with a limit; v1 or v2."""

    folder: Path
    v2: bool

    def limit(self, n: int) -> None:
        (self.folder / ("memory.max" if self.v2 else "memory.limit_in_bytes")).write_text(str(n))

    def stat(self, name: str) -> int:
        for line in (self.folder / "memory.stat").read_text().splitlines():
            if line.split()[0] == name:
                return int(line.split()[1])
        raise KeyError(name)

    def file_pages_bytes(self) -> int:
        """Page cache charged to the group."""
        return self.stat("file" if self.v2 else "cache")

    def peak_bytes(self) -> int:
        name = "memory.peak" if self.v2 else "memory.max_usage_in_bytes"
        return int((self.folder / name).read_text())

    def run(self, args: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
        procs = self.folder / "cgroup.procs"

        def enter() -> None:
            procs.write_text(str(os.getpid()))

        return subprocess.run(  # type: ignore[call-overload,no-any-return]
            args, preexec_fn=enter, capture_output=True, text=True, check=False, **kwargs
        )


@contextlib.contextmanager
def memory_cgroup(name: str) -> Iterator[Cgroup]:
    """A group of this process's; the test is skipped where none can be made."""
    v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    try:
        if (v1 / "memory.limit_in_bytes").exists():
            group = Cgroup(v1 / f"moe-edge-{name}-{os.getpid()}", False)
        elif "memory" in (v2 / "cgroup.subtree_control").read_text().split():
            group = Cgroup(v2 / f"moe-edge-{name}-{os.getpid()}", True)
        else:
            pytest.skip("no memory cgroup can be made here: the memory controller is not delegated")
        group.folder.mkdir()
        group.limit(1 << 40)
    except OSError as e:
        pytest.skip(f"no memory cgroup can be made here: {e}")
    yield group
    for _ in range(50):
        try:
            group.folder.rmdir()
            return
        except OSError:
            time.sleep(0.1)


@pytest.fixture
def cgroup() -> Iterator[Cgroup]:
    with memory_cgroup("test") as group:
        yield group


def cached_bytes(path: Path) -> int:
    """Bytes of a file that are in the page cache, by mincore(2)."""
    size = path.stat().st_size
    libc = ctypes.CDLL(None, use_errno=True)
    protection = mmap.PROT_READ | mmap.PROT_WRITE  # ctypes takes the address of writable buffers only
    with open(path, "rb") as f, mmap.mmap(f.fileno(), size, prot=protection, flags=mmap.MAP_PRIVATE) as m:
        pages = (ctypes.c_ubyte * (-(-size // mmap.PAGESIZE)))()
        view = ctypes.c_char.from_buffer(m)
        status = libc.mincore(ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(size), pages)
        del view
        assert status == 0, os.strerror(ctypes.get_errno())
    return sum(p & 1 for p in pages) * mmap.PAGESIZE


@pytest.mark.cgroup
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory cgroups are Linux's")
def test_a_gigabyte_of_experts_runs_in_a_third_of_it_and_nothing_is_left_in_the_page_cache(
    tmp_path: Path, cgroup: Cgroup
) -> None:
    model = write_big_model(tmp_path / "big.gguf", n_layer=6, n_expert=64, n_embd=2048, n_ff=768, n_used=8)
    moe_edge = [sys.executable, "-m", "moe_edge.runner.start"]
    shown = subprocess.run([*moe_edge, "show", str(model), "--json"], capture_output=True, check=True).stdout
    facts = json.loads(shown)
    assert facts["expert_bytes"] >= 1_000_000_000
    os.sync()
    with open(model, "rb") as f:
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    cached_before = cached_bytes(model)

    ram = facts["expert_bytes"] // 3
    assert facts["ram_floor_bytes"] < ram < facts["ram_resident_bytes"]
    cgroup.limit(ram + ALLOWANCE)
    prompt = "It was a bright cold day in April, and the clocks were striking thirteen. " * 4
    arguments = ["-p", prompt, "-n", "24", "--temp", "0", "--ram", str(ram), "--json"]
    done = cgroup.run([*moe_edge, "generate", str(model), *arguments])
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)

    assert result["ram_budget_bytes"] == ram
    assert result["prompt_tokens"] > 200 and result["generated_tokens"] > 1
    assert result["expert_evictions"] > 100, "this budget was meant to force evictions"
    assert result["peak_rss_bytes"] <= ram + ALLOWANCE
    assert cgroup.peak_bytes() <= ram + ALLOWANCE
    # file pages: Python and the libraries, read once; none of the experts
    assert cgroup.file_pages_bytes() <= ALLOWANCE
    assert cached_bytes(model) <= cached_before + 4 * MIB


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs /proc/self/io")
def test_what_is_read_before_the_first_token_does_not_grow_with_the_experts(tmp_path: Path) -> None:
    """Same layers and dense weights, four times the experts' bytes: loading reads the same."""
    read = {}
    for name, n_ff in (("one", 256), ("four", 1024)):
        model = write_big_model(tmp_path / f"{name}.gguf", n_layer=4, n_expert=64, n_embd=1024, n_ff=n_ff, n_used=4)
        code = (
            "import sys; from moe_edge.runner.engine import Engine\n"
            "from moe_edge.runner.engine_options import EngineOptions\n"
            "with Engine(sys.argv[1], EngineOptions(ram_bytes=1 << 33, n_ctx=256, n_ubatch=32)) as e:\n"
            "    print(open('/proc/self/io').read().split()[1], e.counters().bytes_read)"
        )
        for _ in range(2):  # the second run finds the skeleton made
            out = subprocess.run([sys.executable, "-c", code, str(model)], capture_output=True, text=True, check=True)
        read[name], experts = (int(n) for n in out.stdout.split())
        assert experts == 0
    assert abs(read["four"] - read["one"]) < 1 * MIB


@pytest.mark.cgroup
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory cgroups are Linux's")
def test_the_first_run_of_a_model_with_its_proof_keeps_within_the_floor(tmp_path: Path, cgroup: Cgroup) -> None:
    """A skeleton is written, a child decodes with it, then this process: all in one group, at the least --ram."""
    model = write_big_model(tmp_path / "big.gguf", n_layer=4, n_expert=32, n_embd=2048, n_ff=768, n_vocab=32000)
    moe_edge = [sys.executable, "-m", "moe_edge.runner.start"]
    shown = subprocess.run([*moe_edge, "show", str(model), "--json"], capture_output=True, check=True).stdout
    ram = -(-json.loads(shown)["ram_floor_bytes"] >> 20) + 1 << 20
    cgroup.limit(ram + ALLOWANCE)
    arguments = ["-p", "The king", "-n", "8", "--temp", "0", "-t", "1", "--ram", str(ram), "--json"]
    environment = {**os.environ, "MOE_EDGE_CACHE": str(tmp_path / "fresh")}
    done = cgroup.run([*moe_edge, "generate", str(model), *arguments], env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["generated_tokens"] == 8
    assert list((tmp_path / "fresh" / "proven").iterdir())


CONVERSATIONS = """
import json, sys
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.generate import Sampling, generate
from moe_edge.runner.memory import peak_rss_bytes
from moe_edge.runner.sizes import sizes_of

path, held, prompts = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
options = dict(n_ctx=768, n_threads=1, prompt_cache_bytes=1 << 30, charge_program=True)
if not prompts:
    print(sizes_of(path, EngineOptions(**options)).plan.floor_bytes)
    sys.exit()
ram = held + int(sys.argv[4])
with Engine(path, EngineOptions(**options, ram_bytes=ram, held_bytes=held)) as engine:
    engine.prompts.always = True
    reused = []
    for seed, n in prompts:
        text = [(7 * i * i + 3 + 11 * seed) % 490 for i in range(n)]
        reused.append(generate(engine, text, 2, Sampling(temp=0), ignore_end=True).reused_tokens)
print(json.dumps({"reused": reused, "peak": peak_rss_bytes(), "ram": ram}))
"""


@pytest.mark.cgroup
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory cgroups are Linux's")
@pytest.mark.parametrize("held", [0, 60 * MIB])
def test_saving_and_restoring_conversations_keeps_the_budget(tmp_path: Path, cgroup: Cgroup, held: int) -> None:
    """States of 44 MiB at the least --ram: a second copy of one, or its pages in the cache, would not fit."""
    shape = Shape(n_layer=8, n_embd=256, n_ff=256, n_expert=4, n_used=1, head_dim=128, n_head=16, n_head_kv=16)
    model = write_random_model(tmp_path / "m.gguf", "qwen3moe", shape)
    environment = {**os.environ, "MOE_EDGE_CACHE": str(tmp_path / "cache")}

    def run(prompts: list[tuple[int, int]], floor: int, inside: bool = True) -> str:
        args = [sys.executable, "-c", CONVERSATIONS, str(model), str(held), json.dumps(prompts), str(floor)]
        go = cgroup.run if inside else subprocess.run
        kwargs = {} if inside else {"capture_output": True, "text": True, "check": False}
        done = go(args, env=environment, **kwargs)  # type: ignore[call-overload]
        assert done.returncode == 0, done.stderr
        return str(done.stdout)

    floor = int(run([], 0, inside=False))
    cgroup.limit(floor + held + ALLOWANCE)
    first = json.loads(run([(1, 700), (2, 650), (1, 720)], floor))
    assert first["reused"][:2] == [0, 0] and first["reused"][2] >= 700  # from memory, or from the disk
    files = list((tmp_path / "cache").parent.rglob("*.kv"))
    assert sum(path.stat().st_size for path in files) > 80 * MIB
    again = json.loads(run([(2, 680)], floor))
    assert again["reused"][0] >= 649
    for each in (first, again):
        # The group has ended whoever went over it. What a process sees of itself has pages of libraries that others
        # brought into memory as well; a second copy of a state would be far above that.
        assert each["ram"] == floor + held and each["peak"] <= floor + held + ALLOWANCE + 16 * MIB
    assert cgroup.peak_bytes() <= floor + held + ALLOWANCE
    assert all(cached_bytes(path) <= path.stat().st_size // 4 for path in files if path.exists())


@pytest.mark.cgroup
@pytest.mark.skipif(sys.platform != "linux", reason="memory cgroups are Linux's")
def test_auto_does_not_shrink_by_a_file_that_was_read_twice(tmp_path: Path, cgroup: Cgroup) -> None:
    cgroup.limit(512 * MIB)
    code = f"""
import os
from moe_edge.runner.memory import auto_budget
before = auto_budget().bytes
path = {str(tmp_path / "file")!r}
with open(path, "wb") as file:
    for _ in range(200):
        file.write(os.urandom(1 << 20))
    os.fsync(file.fileno())
for _ in range(3):
    with open(path, "rb") as file:
        while file.read(1 << 20):
            pass
print(before, auto_budget().bytes)
"""
    done = cgroup.run([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert cgroup.file_pages_bytes() > 150 * MIB, "the file was meant to be in the page cache"
    assert before > 300 * MIB and after > before - 40 * MIB


@pytest.mark.slow
@pytest.mark.parametrize(("n_vocab", "n_merges"), [(1_000, 0), (50_000, 50_000), (150_000, 150_000)])
def test_show_plan_and_generate_name_one_floor_and_loading_keeps_to_it(
    tmp_path: Path, n_vocab: int, n_merges: int
) -> None:
    """Each in a process of its own, as users run them."""
    model = vocabulary_model(tmp_path / "m.gguf", n_vocab, n_merges)
    moe_edge = [sys.executable, "-m", "moe_edge.runner.start"]

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [*moe_edge, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    floor = json.loads(call("show", model, "-t", 1, "--json").stdout)["ram_floor_bytes"]
    run = ("-p", "hi", "-n", 4, "--temp", 0, "-t", 1, "--json")
    done = call("generate", model, *run, "--ram", floor)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["peak_rss_bytes"] <= floor + ALLOWANCE
    below = call("generate", model, *run, "--ram", floor - mmap.PAGESIZE)
    assert below.returncode == 2 and "is too small" in below.stderr
    assert call("plan", model, "-t", 1, "--ram", floor, "--disk", "1GB/s").returncode == 0
    assert call("plan", model, "-t", 1, "--ram", floor - mmap.PAGESIZE, "--disk", "1GB/s").returncode == 1


def vocabulary_model(path: Path, n_vocab: int, n_merges: int) -> Path:
    """A random model with so many tokens and merges; llama.cpp looks up neither when it loads."""
    source = write_random_model(path.with_name("source.gguf"), "qwen3moe", Shape(n_vocab=n_vocab))
    file = read_gguf(source)
    key = "tokenizer.ggml.merges"
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(word) for n in (3, 4) for word in itertools.product(letters, repeat=n)]
    merges = [f"{a} {b}" for a, b in zip(words[:n_merges], reversed(words[:n_merges]), strict=True)]
    records = {each: file.kv.record(each) for each in file.kv} | ({key: kv_strings(key, merges)} if merges else {})
    specs = [TensorSpec(entry.name, entry.shape, entry.type, entry.nbytes) for entry in file.tensors.values()]
    with GGUFOutput(path, records, specs, 32) as out, open(source, "rb") as data:
        for entry in file.tensors.values():
            data.seek(entry.offset)
            out.write(data.read(entry.nbytes))
        out.finish()
        out.commit()
    return path
