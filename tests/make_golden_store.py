"""Writes tests/data/golden-v1.*: a converted random model as format version 1 has it. Run once; the files are kept.

They stand for the files that users have: whatever the format becomes, these open and say the same.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from moe_edge.convert.convert import convert
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.generate import Sampling, generate
from random_models import Shape, write_random_model

GOLDEN = Path(__file__).resolve().parent / "data" / "golden-v1.gguf"
PROMPT, N_TOKENS = list(range(97, 117)), 24
OPTIONS = EngineOptions(n_ctx=128, n_threads=1, flash_attn=False, n_ubatch=32)


def answer(model: Path) -> list[int]:
    """The tokens of a greedy reply."""
    with Engine(model, OPTIONS) as engine:
        generate(engine, PROMPT, N_TOKENS, Sampling(temp=0), ignore_end=True)
        tokens: list[int] = engine.llama.input_ids[len(PROMPT) : engine.llama.n_tokens].tolist()
        return tokens


def main() -> None:
    shape = Shape(n_layer=2, n_embd=64, n_ff=32, n_expert=4, n_used=2, n_vocab=512)
    with tempfile.TemporaryDirectory() as work:
        source = write_random_model(Path(work) / "source.gguf", "qwen3moe", shape, expert_type="Q8_0")
        convert(source, GOLDEN, low_type="Q4_0", overwrite=True)
    recorded = {"prompt": PROMPT, "tokens": answer(GOLDEN)}
    GOLDEN.with_name("golden-v1.json").write_text(json.dumps(recorded) + "\n")


if __name__ == "__main__":
    main()
