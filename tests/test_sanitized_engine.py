"""The engine itself, from the backend down to the reader, under address and undefined-behaviour sanitizers.

The library is compiled here with them and loaded by a Python process in place of the installed one. That process
decodes random models at the floor and with room for all, with evictions, look-ahead and two levels, and compares bits
with stock.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_disk_source import ROOT, SANITIZERS, ggml_headers

COMPILER = next((c for c in (os.environ.get("CXX", ""), "g++", "c++") if shutil.which(c)), None)
FLAGS = ["-std=c++17", "-O0", "-g1", "-fPIC", "-pthread", "-fno-omit-frame-pointer", "-ffp-contract=off"]
SOURCES = sorted(path.stem for path in (ROOT / "native").glob("*.cpp"))

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a library is preloaded as on Linux"),
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler: none of g++ and c++ is on the PATH"),
]

DECODES = """
import sys
from pathlib import Path
import llama_cpp, numpy as np
sys.path.insert(0, sys.argv[1])
from random_models import Shape, write_random_model
from reference import stock_logits
from moe_edge.convert.convert import convert
from moe_edge.models.errors import BudgetTooSmall
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.sizes import sizes_of
from moe_edge.schedulers.options import PolicyOptions
from moe_edge.runner.capi import library
folder, arch = Path(sys.argv[2]), sys.argv[3]
tokens = [(7 * i * i + 3) % 250 for i in range(50)]
path = write_random_model(folder / "m.gguf", arch)
options = dict(n_threads=2, n_ctx=128, n_ubatch=32, flash_attn=False, proof="nothing")
def floor(path):
    options.pop("packed_cache", None)
    try:
        Engine(path, EngineOptions(ram_bytes=1, **options))
    except BudgetTooSmall as e:
        return e.needed_bytes
def logits(path, ram_bytes, **policy):
    with Engine(path, EngineOptions(ram_bytes=ram_bytes, policy=PolicyOptions(**policy), **options)) as e, e.decoding():
        rows = []
        e.llama.eval(tokens)
        for token in (5, 6, 7):
            row = llama_cpp.llama_get_logits_ith(e.llama._ctx.ctx, -1)
            rows.append(np.ctypeslib.as_array(row, (e.llama.n_vocab(),)).copy())
            e.llama.eval([token])
        return rows, e.counters()
want = stock_logits(path, [*tokens, 5, 6], n_ubatch=32, n_threads=2, n_ctx=128)[len(tokens) - 1 :]
least = floor(path)
for ram_bytes in (least, least + (1 << 20), 1 << 30):
    for lookahead in ("off", "votes"):
        rows, counts = logits(path, ram_bytes, lookahead=lookahead)
        # decode rows of stock come from one batch with the prompt: the first row is the same computation
        assert np.array_equal(rows[0], want[0]), (arch, ram_bytes, lookahead)
        assert all(np.isfinite(row).all() for row in rows)
        assert counts.evictions > 0 if ram_bytes == least else counts.evictions == 0 or ram_bytes < 1 << 30
convert(path, folder / "two.gguf", low_type="Q2_K" if arch != "gpt-oss" else "Q8_0")
rows, counts = logits(folder / "two.gguf", floor(folder / "two.gguf") + (1 << 20), name="dymoe", retention=0.5)
assert all(np.isfinite(row).all() for row in rows) and counts.low_uses > 0
skipping = dict(name="dymoe", retention=0.5, low_level="skip", renormalise=arch != "gpt-oss")
rows, counts = logits(folder / "two.gguf", 1 << 30, **skipping)
assert all(np.isfinite(row).all() for row in rows) and counts.skipped_uses > 0
choosing = dict(name="reroute", strength=1.0, keep_top=0)
rows, counts = logits(path, least + (1 << 20), **choosing)
assert all(np.isfinite(row).all() for row in rows) and counts.substituted_uses > 0
packed = write_random_model(folder / "sixteen.gguf", arch, expert_type="BF16", down_type="Q8_0")
want = stock_logits(packed, [*tokens, 5, 6], n_ubatch=32, n_threads=2, n_ctx=128)[len(tokens) - 1 :]
for pack_as in ("zstd", "planes"):
    convert(packed, folder / "packed.gguf", pack=pack_as, overwrite=True)
    for lookahead in ("off", "votes"):
        rows, counts = logits(folder / "packed.gguf", floor(folder / "packed.gguf") + (1 << 16), lookahead=lookahead)
        assert np.array_equal(rows[0], want[0]) and counts.unpacked_bytes > 0, (arch, pack_as, lookahead)
wide = dict(n_layer=3, n_expert=32, n_used=4, n_ff=64)
packed = write_random_model(folder / "wide.gguf", arch, Shape(**wide), expert_type="BF16", down_type="F16")
convert(packed, folder / "parts.gguf", pack="planes")
want = stock_logits(packed, [*tokens, 5, 6], n_ubatch=32, n_threads=2, n_ctx=128)[len(tokens) - 1 :]
room = sizes_of(folder / "parts.gguf", EngineOptions(**options)).layout.total_bytes * 7 // 10
for lookahead in ("off", "votes"):
    enough = floor(folder / "parts.gguf") + room
    options["packed_cache"] = "60%"
    rows, counts = logits(folder / "parts.gguf", enough, lookahead=lookahead)
    assert np.array_equal(rows[0], want[0]) and counts.packed_hits > 0 < counts.evictions, (arch, lookahead, counts)
assert sys.argv[4] in open("/proc/self/maps").read()
print("decoded")
"""


def run(*command: object, **more: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **more}
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=400, env=env)


def runtime(name: str) -> str:
    """The sanitizer's own library, which must come first in a process that was not linked with it."""
    return run(COMPILER, f"-print-file-name={name}").stdout.strip()


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library, compiled file by file on all cores. Skips where the compiler has no such runtime."""
    folder = tmp_path_factory.mktemp("sanitized")
    for name in ("libasan.so", "libubsan.so"):
        if not Path(runtime(name)).is_absolute():
            pytest.skip(f"{COMPILER} has no {name}")
    libraries = ggml_headers().parent / "llama_cpp" / "lib"
    names = " ".join(path.name for path in libraries.iterdir())
    version = re.findall(r"libggml-base\.so\.(\d+\.\d+\.\d+)", names)[0]
    more = [f'-DGGML_VERSION_BUILT="{version}"', "-I", ROOT / "native", "-isystem", ggml_headers()]

    def compile_one(name: str) -> subprocess.CompletedProcess[str]:
        source, made = ROOT / "native" / f"{name}.cpp", folder / f"{name}.o"
        return run(COMPILER, *FLAGS, *SANITIZERS["address"], *more, "-c", source, "-o", made)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in pool.map(compile_one, SOURCES):
            assert done.returncode == 0, done.stderr
    library = folder / "libmoe_edge.so"
    objects = [folder / f"{name}.o" for name in SOURCES]
    ggml = [libraries / f"lib{name}.so.0" for name in ("ggml-base", "ggml-cpu", "ggml")]
    done = run(COMPILER, "-shared", *FLAGS, *SANITIZERS["address"], *objects, *ggml, "-o", library)
    assert done.returncode == 0, done.stderr
    return library


@pytest.mark.parametrize("arch", ["qwen3moe", "gpt-oss", "deepseek2-fused", "smallthinker"])
def test_decoding_is_clean_and_exact(sanitized: Path, tmp_path: Path, arch: str) -> None:
    done = run(
        sys.executable, "-c", DECODES, Path(__file__).parent, tmp_path, arch, sanitized,
        LD_PRELOAD=f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        ASAN_OPTIONS="detect_leaks=0:halt_on_error=1:abort_on_error=0:exitcode=66",
        UBSAN_OPTIONS="halt_on_error=1:print_stacktrace=1", MOE_EDGE_NATIVE_LIBRARY=str(sanitized),
        MOE_EDGE_CACHE=str(tmp_path / "cache"), GOMP_SPINCOUNT="0",
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.endswith("decoded\n"), done.stdout[-2000:] + done.stderr[-6000:]
