"""Damaged files through every parser: whatever is in them, the outcome is a result or one sentence of ours.

python tests/fuzz_parsers.py --cases 100000 --seed 1          # every target in turns; what it finds is kept
python tests/fuzz_parsers.py --cases 1 --seed 1 --only gguf   # a seed and a target repeat a case
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from moe_edge.convert.checkpoints import open_source
from moe_edge.convert.convert import convert
from moe_edge.convert.imatrix import read_imatrix
from moe_edge.models.errors import MoeEdgeError, sentence
from moe_edge.models.formats.gguf import open_gguf, read_gguf
from moe_edge.models.store.store import open_model
from moe_edge.runner.measure.record import load_trace
from moe_edge.runner.warm import load_usage
from moe_edge.schedulers.layout import Layout
from random_models import write_random_model

SECONDS, LONGEST_MESSAGE = 2.0, 1000
NUMBERS = [0, 1, 2, 3, 7, 31, 32, 255, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**53, 2**63 - 1, 2**63, 2**64 - 1]
VALUES: list[Any] = [None, True, 0, -1, 2**63, 1e308, "", "x\x1b[31m", "a" * 400, [], {}, [[]], [None], {"a": 1}]


@dataclass(frozen=True)
class Target:
    """files: name -> whole bytes. headers: how many of them are worth damaging. read: parse what is in the folder."""

    name: str
    files: dict[str, bytes]
    headers: dict[str, int]
    read: Callable[[Path], object]


def damaged(data: bytes, n_header: int, rng: random.Random) -> bytes:
    """One to four changes of the header: bits, numbers, spans cut out, put in or copied; or the file is cut."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, kind = rng.randrange(max(1, min(n_header, len(out)))), rng.random()
        if not out:
            break
        if kind < 0.3:
            out[at] ^= 1 << rng.randrange(8)
        elif kind < 0.6:
            width = rng.choice((4, 8))
            number = (rng.choice(NUMBERS) + rng.choice((0, 0, -1, 1))) % 2 ** (8 * width)
            out[at : at + width] = number.to_bytes(width, "little")
        elif kind < 0.7:
            del out[at : at + rng.choice((1, 4, 8, 24))]
        elif kind < 0.8:
            out[at:at] = rng.randbytes(rng.choice((1, 4, 8, 24)))
        elif kind < 0.93:
            other, size = rng.randrange(max(1, n_header)), rng.choice((4, 8, 16, 64))
            out[at : at + size] = out[other : other + size]
        else:
            del out[rng.randrange(len(out)) :]
    return bytes(out)


def damaged_json(data: bytes, rng: random.Random) -> bytes:
    """A value somewhere becomes another one, goes, or changes its name."""
    if rng.random() < 0.2:
        return damaged(data, len(data), rng)
    value = copy.deepcopy(json.loads(data))
    for _ in range(rng.choice((1, 1, 2))):
        here: Any = value
        while isinstance(here, dict | list) and here:
            key: Any = rng.choice(list(here)) if isinstance(here, dict) else rng.randrange(len(here))
            if not isinstance(here[key], dict | list) or not here[key] or rng.random() < 0.3:
                if rng.random() < 0.2:
                    del here[key]
                else:
                    here[key] = copy.deepcopy(rng.choice(VALUES))
                break
            here = here[key]
    return json.dumps(value).encode()


def header_bytes(path: Path) -> int:
    return len(read_gguf(path).header)


def targets(folder: Path) -> Iterator[Target]:
    """A small sound file of each kind."""
    model = write_random_model(folder / "m.gguf", "qwen3moe")
    cache = folder / "cache"
    files, headers = {"m.gguf": model.read_bytes()}, {"m.gguf": header_bytes(model)}
    yield Target("gguf", files, headers, lambda f: read_gguf(f / "m.gguf"))
    yield Target("stock", files, headers, lambda f: open_model(f / "m.gguf", cache_dir=cache))
    write_random_model(folder / "s.gguf", "olmoe", split=True)
    parts = sorted(folder.glob("s-*.gguf"))
    yield Target(
        "split", {p.name: p.read_bytes() for p in parts}, {p.name: header_bytes(p) for p in parts},
        lambda f: open_gguf(f / parts[0].name),
    )  # fmt: skip
    convert(model, folder / "c.gguf", low_type="Q2_K")
    pair = [folder / "c.gguf", folder / "c.experts.gguf"]
    yield Target(
        "pair", {p.name: p.read_bytes() for p in pair}, {p.name: header_bytes(p) for p in pair},
        lambda f: open_model(f / "c.gguf"),
    )  # fmt: skip
    yield from checkpoint_targets(folder)
    layout = Layout((4, 4), 1, (10,) * 8)
    np.savez_compressed(
        folder / "u.npz", version=np.int32(1), n_experts=np.array([4, 4], np.int32), tokens=np.float64(5),
        counts=np.ones(8),
    )  # fmt: skip
    usage = (folder / "u.npz").read_bytes()
    yield Target("usage", {"u.npz": usage}, {"u.npz": len(usage)}, lambda f: load_usage(f / "u.npz", layout))
    yield Target("trace", {"u.npz": usage}, {"u.npz": len(usage)}, lambda f: load_trace(f / "u.npz"))
    imatrix = struct.pack("<ii", 1, 5) + b"blk.0" + struct.pack("<ii", 1, 4) + struct.pack("<4f", 1, 2, 3, 4)
    for name, data in (("i.dat", imatrix), ("i.gguf", model.read_bytes()[:4000])):
        yield Target(f"imatrix {name}", {name: data}, {name: len(data)}, lambda f, n=name: read_imatrix(f / n))  # type: ignore[misc]


def checkpoint_targets(folder: Path) -> Iterator[Target]:
    from checkpoints import olmoe_config, write_checkpoint

    made = write_checkpoint(folder / "hf", olmoe_config())
    files = {path.name: path.read_bytes() for path in made.iterdir() if path.is_file()}
    headers = {name: 8 + int.from_bytes(data[:8], "little") for name, data in files.items() if name.endswith("tensors")}
    yield Target("checkpoint", files, headers, lambda f: open_source(f))


def one_case(target: Target, folder: Path, seed: str) -> str | None:
    """None, or what is wrong with how it ended."""
    rng = random.Random(seed)
    hurt = rng.choice(sorted(target.files))
    for name, data in target.files.items():
        if name == hurt and name.endswith(".json"):
            data = damaged_json(data, rng)
        elif name == hurt:
            data = damaged(data, target.headers.get(name, len(data)), rng)
        (folder / name).write_bytes(data)
    started = time.process_time()
    try:
        target.read(folder)
    except MoeEdgeError as e:
        text = sentence(e)  # as the command line says it
        if len(text) > LONGEST_MESSAGE or "\n" in text:
            return f"a message of {len(text)} characters or several lines: {text[:200]!r}"
    except MemoryError:
        return "memory ran out"
    except Exception as e:
        return f"{type(e).__name__}: {traceback.format_exc()[-700:]}"
    seconds = time.process_time() - started
    return f"took {seconds:.1f} s" if seconds > SECONDS else None


def fuzz(n_cases: int, seed: int, only: str = "", keep: Path | None = None) -> dict[str, str]:
    """What was found: the case -> why; its files are kept in the folder `keep`."""
    found: dict[str, str] = {}
    counts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as made:
        every = [target for target in targets(Path(made)) if only in target.name]
        folders = []
        for number, _ in enumerate(every):
            folders.append(Path(made) / f"case{number}")
            folders[-1].mkdir()
        for case in range(n_cases):
            at = case % len(every)
            name = f"{every[at].name} {seed} {case // len(every)}"
            counts[every[at].name] += 1
            why = one_case(every[at], folders[at], name)
            if why is not None:
                found[name] = why
                if keep is not None:
                    shutil.copytree(folders[at], keep / name.replace(" ", "-"), dirs_exist_ok=True)
    print(", ".join(f"{name} {n}" for name, n in counts.items()), "cases;", len(found), "findings")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--only", default="", help="targets whose names have this in them")
    parser.add_argument("--keep", type=Path, default=Path("build/fuzz"), help="where failing files go")
    o = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    found = fuzz(o.cases, o.seed, o.only, o.keep)
    for name, why in found.items():
        print(f"{name}: {why}")
    print(f"seed {o.seed}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
