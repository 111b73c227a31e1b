"""Models that contradict themselves: whatever llama.cpp does with them, the user reads one sentence with its reason."""

from __future__ import annotations

import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from altered import alter, mutate, renamed, reshaped, without
from moe_edge.convert.convert import convert
from moe_edge.models.errors import CannotRun, MoeEdgeError
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions

MOE_EDGE = [sys.executable, "-m", "moe_edge.runner.start"]
RUN = ("-n", 2, "-t", 1, "--temp", 0, "--ram", "200MiB")


def words(change: Callable[[list[Any]], list[Any]]) -> Callable[[str, Any], Any]:
    return lambda key, value: change(value) if key == "tokenizer.ggml.tokens" else value


def typed(name: str, type_id: int) -> Callable[[Any], Any]:
    return lambda entry: replace(entry, type=type_id) if entry.name == name else entry


# architecture, what is altered, what the sentence must say
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "9 of 8 experts used": (
        "qwen3moe", {"set": {"qwen3moe.expert_used_count": 9}}, r"GGML_ASSERT\(n_expert_used_max <= .*n_expert\)"),
    "no expert count": ("qwen3moe", {"drop": ["qwen3moe.expert_count"]}, r"GGML_ASSERT\(n_expert_used"),
    "used counts for each layer": (
        "qwen3moe", {"set": {"qwen3moe.expert_used_count": [2, 3]}}, r"GGML_ASSERT\("),
    "no expert used": ("qwen3moe", {"set": {"qwen3moe.expert_used_count": 0}}, "expert_used_count is 0"),
    "16 experts of 8": (
        "qwen3moe", {"set": {"qwen3moe.expert_count": 16}}, r"'blk\.0\.ffn_gate_inp\.weight' has wrong shape"),
    "4e9 experts": ("qwen3moe", {"set": {"qwen3moe.expert_count": 4 * 10**9}}, "GGML_ASSERT.*MAX_EXPERTS"),
    "no heads": (
        "qwen3moe", {"set": {"qwen3moe.attention.head_count": 0}}, r"'blk\.0\.attn_q\.weight' has wrong shape"),
    "3 heads": ("olmoe", {"set": {"olmoe.attention.head_count": 3}}, "."),
    "rotating 7 values": (
        "qwen3moe", {"set": {"qwen3moe.rope.dimension_count": 7}}, r"GGML_ASSERT\(n_embd_head == n_rot"),
    "unknown rope scaling": ("qwen3moe", {"set": {"qwen3moe.rope.scaling.type": "x"}}, "GGML_ASSERT.*rope_scaling"),
    "one layer too many": (
        "qwen3moe", {"set": {"qwen3moe.block_count": 3}}, r"'blk\.2\.attn_norm\.weight' not found"),
    "1e9 layers": ("qwen3moe", {"set": {"qwen3moe.block_count": 10**9}}, "GGML_ASSERT.*MAX_LAYERS"),
    "width as text": ("qwen3moe", {"set": {"qwen3moe.embedding_length": "256"}}, "embedding_length has wrong type"),
    "an epsilon of nan": (
        "qwen3moe", {"set": {"qwen3moe.attention.layer_norm_rms_epsilon": math.nan}}, r"GGML_ASSERT\(eps >= 0"),
    "a rope base of 0": ("qwen3moe", {"set": {"qwen3moe.rope.freq_base": 0.0}}, "logits are not finite"),
    "a router missing": (
        "qwen3moe", {"tensors": without("blk.1.ffn_gate_inp.weight")}, r"'blk\.1\.ffn_gate_inp\.weight' not found"),
    "a router turned over": (
        "qwen3moe", {"tensors": reshaped("blk.1.ffn_gate_inp.weight", 8, 256)}, r"inp\.weight' has wrong shape"),
    "a norm misnamed": (
        "gpt-oss", {"tensors": renamed("blk.0.attn_sinks.weight", "blk.0.attn_sunk.weight")}, "attn_sinks.weight' not"),
    "a norm in F16": ("qwen3moe", {"tensors": typed("output_norm.weight", 1)}, "unsupported types"),
    "a token twice": ("qwen3moe", {"change": words(lambda v: [*v[:5], v[4], *v[6:]])}, r"GGML_ASSERT\(id_to_token"),
    "tokens missing": ("qwen3moe", {"change": words(lambda v: v[:400])}, "token_embd.weight' has wrong shape"),
    "no merges": ("qwen3moe", {"drop": ["tokenizer.ggml.merges"]}, "cannot find tokenizer merges"),
    "unknown pre-tokenizer": ("qwen3moe", {"set": {"tokenizer.ggml.pre": "klingon"}}, "pre-tokenizer type: 'klingon'"),
    "another tokenizer's tokens": ("qwen3moe", {"set": {"tokenizer.ggml.model": "llama"}}, r"unordered_map"),
    "types of 3 tokens": ("qwen3moe", {"set": {"tokenizer.ggml.token_type": [1, 2, 3]}}, "toktypes"),
    "an unknown gating function": ("deepseek2", {"set": {"deepseek2.expert_gating_func": 9}}, "fatal error"),
    "3 groups of 8 experts": (
        "deepseek2", {"set": {"deepseek2.expert_group_count": 3, "deepseek2.expert_group_used_count": 2}},
        r"GGML_ASSERT.*n_expert_groups"),
    "dense layers that are none": (
        "deepseek2", {"set": {"deepseek2.leading_dense_block_count": 2}}, r"'blk\.1\.ffn_gate\.weight' not found"),
    "escapes in a name": (
        "qwen3moe", {"set": {"tokenizer.ggml.pre": "\x1b[2J\r\u202ex"}}, r"type: '\\x1b\[2J \\u202ex'"),
}  # fmt: skip
# What llama.cpp notices only when it computes: `show` and `plan`, which read no weights, know nothing of it.
WHEN_COMPUTING = {
    "an epsilon of nan", "a rope base of 0", "a norm in F16", "another tokenizer's tokens",
}  # fmt: skip


def one_sentence(where: Path, *args: object) -> str:
    """What a call that fails says; checks that it is one sentence, and that nothing is left behind in `where`."""
    before = {path for path in where.rglob("*") if path.is_file()}
    done = subprocess.run(
        [*MOE_EDGE, *(str(a) for a in args)], input=b"hello\n", capture_output=True, check=False, timeout=120, cwd=where
    )
    said = done.stderr.decode()
    assert done.returncode == 1, said
    assert "Traceback" not in said and "fault of moe-edge" not in said
    assert len(said.splitlines()) == 1 and said.startswith("moe-edge: "), said
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", said)
    assert not {path for path in where.rglob("*") if path.is_file()} - before
    return said


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a cache of its own, for what must leave no file behind."""
    monkeypatch.setenv("MOE_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize("name", CASES)
def test_generate_says_why(name: str, home: Path, random_model: Callable[[str], Path]) -> None:
    arch, changes, why = CASES[name]
    model = alter(random_model(arch), home / "model.gguf", **changes)
    said = one_sentence(home, "generate", model, "-p", "hello", *RUN)
    assert said.startswith(f"moe-edge: {model}: ") and re.search(why, said), said


@pytest.mark.parametrize("command", ["chat", "show", "plan", "convert"])
@pytest.mark.parametrize("name", ["9 of 8 experts used", "a router missing", "unknown pre-tokenizer", "no expert used"])
def test_so_does_every_command(name: str, command: str, home: Path, random_model: Callable[[str], Path]) -> None:
    arch, changes, why = CASES[name]
    model = alter(random_model(arch), home / "model.gguf", **changes)
    more = {"chat": RUN, "plan": ("--disk", "1GB/s"), "convert": ("-o", home / "out.gguf", "-t", 1)}.get(command, ())
    said = one_sentence(home, command, model, *more)
    assert said.startswith(f"moe-edge: {model}: ") and re.search(why, said), said


@pytest.mark.parametrize("name", sorted(WHEN_COMPUTING))
def test_convert_computes_and_leaves_nothing(name: str, home: Path, random_model: Callable[[str], Path]) -> None:
    arch, changes, why = CASES[name]
    model = alter(random_model(arch), home / "model.gguf", **changes)
    assert re.search(why, one_sentence(home, "convert", model, "-o", home / "out.gguf", "-t", 1))


def test_a_skeleton_altered_after_its_conversion_is_proved_again(
    home: Path, random_model: Callable[[str], Path]
) -> None:
    convert(random_model("qwen3moe"), home / "m.gguf")
    with Engine(home / "m.gguf", EngineOptions(n_threads=1)):
        pass  # proved
    alter(home / "m.gguf", home / "altered.gguf", {"qwen3moe.expert_used_count": 9})
    (home / "altered.gguf").replace(home / "m.gguf")
    said = one_sentence(home, "generate", home / "m.gguf", "-p", "hello", *RUN)
    assert f"{home / 'm.gguf'}: " in said and "n_expert_used_max" in said


def test_from_python_it_is_our_error_and_the_process_lives(home: Path, random_model: Callable[[str], Path]) -> None:
    model = alter(random_model("qwen3moe"), home / "m.gguf", {"qwen3moe.expert_used_count": 9})
    with pytest.raises(CannotRun, match="n_expert_used_max"):
        Engine(model, EngineOptions(n_threads=1))
    with pytest.raises(CannotRun, match="not found"):
        broken = alter(random_model("olmoe"), home / "b.gguf", tensors=without("blk.0.attn_norm.weight"))
        Engine(broken, EngineOptions(n_threads=1))


def test_the_load_in_this_process_gives_the_reason_too(home: Path, random_model: Callable[[str], Path]) -> None:
    broken = alter(random_model("olmoe"), home / "b.gguf", tensors=without("blk.0.attn_norm.weight"))
    with pytest.raises(MoeEdgeError, match=r"b\.gguf: .*'blk\.0\.attn_norm\.weight' not found"):
        Engine(broken, EngineOptions(n_threads=1, proof="nothing"))


def test_a_proof_costs_once(home: Path, random_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_edge.runner import child

    calls: list[str] = []
    run = child.run

    def counted(function: str, seconds: float, **arguments: Any) -> child.Ended:
        calls.append(arguments["what"])
        return run(function, seconds, **arguments)

    monkeypatch.setattr(child, "run", counted)
    options = EngineOptions(n_threads=1)
    for _ in range(2):
        Engine(random_model("olmoe"), options).close()
    assert calls == ["decodes"]
    Engine(random_model("olmoe"), replace(options, proof="loads")).close()  # whoever decodes also loads
    assert calls == ["decodes"]
    copy = home / "copy.gguf"
    copy.write_bytes(random_model("olmoe").read_bytes())
    Engine(copy, options).close()  # the same model elsewhere
    assert calls == ["decodes"]
    Engine(copy, replace(options, flash_attn=True)).close()  # another graph
    assert calls == ["decodes", "decodes"]


def test_a_child_is_bounded_in_time_and_in_what_it_says(tmp_path: Path) -> None:
    from moe_edge.runner import child

    def ended(code: str, seconds: float = 60) -> child.Ended:
        script = tmp_path / "child.py"
        script.write_text(code)
        return child.run("runpy:run_path", seconds, path_name=str(script))

    assert ended("") == child.Ended(0, "", "")
    assert ended("import time\ntime.sleep(100)", 0.5).status == child.TIMED_OUT
    assert ended("print(1)\nraise SystemExit(3)") == child.Ended(3, "1\n", "")
    assert ended("import os\nos.abort()").status == -6
    flood = ended("print('x' * 1000000)\nprint('end')")
    assert flood.out.endswith("x\nend\n") and len(flood.out) == child.KEPT_BYTES
    assert not list(tmp_path.glob("core*"))


def test_mutated_headers_end_in_a_sentence_or_a_reply(
    home: Path, random_model: Callable[[str], Path]
) -> None:
    """A short run with a fixed seed; the long one is `make fuzz`."""
    rng = random.Random(int(os.environ.get("MOE_EDGE_FUZZ_SEED", "20261126")))
    arches = ("qwen3moe", "olmoe", "deepseek2", "gpt-oss")
    refused = 0
    for _ in range(int(os.environ.get("MOE_EDGE_FUZZ_CASES", "24"))):
        model = home / "m.gguf"
        what = mutate(rng, random_model(rng.choice(arches)), model)
        done = subprocess.run(
            [*MOE_EDGE, "generate", str(model), "-p", "hello", *(str(a) for a in RUN)],
            capture_output=True, check=False, timeout=120, cwd=home,
        )  # fmt: skip
        said = done.stderr.decode()
        assert done.returncode in (0, 1, 2), (what, done.returncode, said)
        assert "Traceback" not in said and "fault of moe-edge" not in said, (what, said)
        if done.returncode:
            refused += 1
            assert said.splitlines()[-1].startswith("moe-edge: "), (what, said)
            assert not list(home.glob("cache/skeletons/*")), (what, said)
        for path in home.glob("cache/skeletons/*"):
            path.unlink()
        assert [path.name for path in home.iterdir() if path.name != "cache"] == ["m.gguf"], what
    assert refused > 5
