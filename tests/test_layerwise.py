"""The prototype that computes several micro-batches layer by layer keeps stock's bits, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from every_architecture import write_tiny_model
from random_models import Shape, write_random_model

BENCH = Path(__file__).resolve().parents[1] / "bench"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the prototype finds ggml by its names on Linux")


def ran(script: str, *arguments: str) -> Any:
    done = subprocess.run(
        [sys.executable, str(BENCH / script), *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("arch", ["qwen3moe", "gpt-oss", "gemma4", "qwen35moe", "lfm2moe", "deepseek2"])
@pytest.mark.parametrize("flash", [(), ("--flash",)])
def test_micro_batches_layer_by_layer_have_the_bits_of_one_after_the_other(
    tmp_path: Path, arch: str, flash: tuple[str, ...]
) -> None:
    path = tmp_path / "m.gguf"
    write_tiny_model(path, arch)
    found = ran("layerwise.py", str(path), "--tokens", "300", "-ub", "64", *flash)
    assert found["micro_batches"] == 5 and found["one_piece"]
    assert found["same"] == {"logits": True, "kv_cache": True, "tokens_that_follow": True}


def test_a_layer_after_the_other_reads_each_expert_once(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "m.gguf", "qwen3moe", Shape(n_layer=4))
    found = ran("layerwise.py", str(path), "--tokens", "300", "-ub", "64")
    touched = found["experts_touched"]
    assert all(found["same"].values()) and 20 <= touched <= 32
    one_after_the_other, by_layer = found["reads_by_share_one_batch_after_the_other_and_layer_by_layer"]["0.4"]
    assert by_layer == touched and one_after_the_other > 3 * touched, "8 experts of a layer fit, those of all do not"


def test_the_parts_of_a_compute_buffer_are_named(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "m.gguf", "qwen3moe")
    found = ran("compute_buffer.py", str(path), "-ub", "64", "--ctx-size", "512", "--flash")["64"]
    assert found["bytes"] == sum(found["tensors"].values()) <= found["span"]
    assert found["tensors"]["ffn_moe_gate"] == found["tensors"]["ffn_moe_up"] == 64 * 2 * 256 * 4
