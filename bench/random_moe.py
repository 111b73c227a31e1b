"""A random model of any shape, with the bytes of a real one. Its routing is random, the worst case for a cache.

python bench/random_moe.py /tmp/bench/random.gguf                                    # 8 x 128 experts, 2.8 GB
python bench/random_moe.py /tmp/bench/30b.gguf --layers 48 --embd 2048 --ff 768      # Qwen3-30B-A3B's, 16.5 GB
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from random_models import ARCHITECTURES, write_big_model


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--arch", choices=ARCHITECTURES, default="qwen3moe")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--embd", type=int, default=2048)
    parser.add_argument("--ff", type=int, default=768)
    parser.add_argument("--used", type=int, default=8, help="experts of a token")
    parser.add_argument("--type", default="Q4_K", help="ggml type of the experts")
    parser.add_argument("--vocab", type=int, default=4096, help="tokens in the vocabulary")
    parser.add_argument("--seed", type=int, default=0)
    o = parser.parse_args(arguments)
    part = o.out.with_name(o.out.name + ".part")
    try:
        write_big_model(part, o.arch, o.layers, o.experts, o.embd, o.ff, o.used, o.type, o.seed, o.vocab)
        os.replace(part, o.out)
    finally:
        part.unlink(missing_ok=True)
    print(f"{o.out}: {o.out.stat().st_size / 1e9:.2f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
