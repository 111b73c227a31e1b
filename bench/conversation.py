"""What a conversation costs the second time: in memory, from the disk, and after a thousand kills.

    python bench/conversation.py turn MODEL --tokens 4000      # second turn of a conversation of so many tokens
    python bench/conversation.py restore MODEL --tokens 20000  # a prefix from the disk, against reading its bytes
    python bench/conversation.py kills MODEL --kills 1000      # kills at random moments of saving

Run it alone on the machine. Each command checks its result: the text of a second turn is that of a run without a cache,
and every file that a kill leaves under its name can be gone on with. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe_edge.models.formats.work import is_part
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.generate import Generation, Sampling, generate
from moe_edge.runner.kv.identity import prompt_folder
from moe_edge.runner.kv.prompt_cache import SUFFIX
from moe_edge.runner.kv.state_file import BLOCK, load_state, read_header
from moe_edge.runner.memory import peak_rss_bytes
from moe_edge.schedulers.budget import PROGRAM_ALLOWANCE_BYTES, parse_bytes

GREEDY = Sampling(temp=0)
N_REPLY = 32
MOST_OF_READING = 1.3  # of the time that a file's bytes take to read
NEW_TOKENS = 200  # of the second question


def words(n: int, n_vocab: int, seed: int) -> list[int]:
    """Tokens that mean nothing, but no control tokens of the first 300."""
    rng = random.Random(seed)
    return [rng.randrange(min(300, n_vocab // 2), n_vocab) for _ in range(n)]


def options_of(o: argparse.Namespace, n_ctx: int, cache: bool) -> EngineOptions:
    return EngineOptions(
        ram_bytes=None if o.ram == "auto" else parse_bytes(o.ram), n_ctx=n_ctx, n_threads=o.threads,
        prompt_cache_bytes=(1 << 40) if cache else 0, charge_program=True,
    )  # fmt: skip


@contextmanager
def loaded(o: argparse.Namespace, n_ctx: int, *, cache: bool = True) -> Iterator[Engine]:
    """cache: keep every conversation on disk, whatever it costs."""
    with Engine(o.model, options_of(o, n_ctx, cache)) as engine:
        if engine.prompts is not None:
            engine.prompts.always = True
        yield engine


def drop_pages(path: Path) -> None:
    """Out of the page cache, where the system can be told so."""
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds_of(work: Callable[[], Any]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


def turns(engine: Engine, first: list[int], question: list[int]) -> tuple[Generation, Generation, list[int]]:
    """Two turns, and the tokens of the second prompt."""
    one = generate(engine, first, N_REPLY, GREEDY, ignore_end=True)
    said = engine.llama.input_ids[len(first) : engine.llama.n_tokens].tolist()
    prompt = [*first, *said, *question]
    return one, generate(engine, prompt, N_REPLY, GREEDY, ignore_end=True), prompt


# ---- the second turn


def measure_turn(o: argparse.Namespace) -> dict[str, Any]:
    n_ctx = o.tokens + NEW_TOKENS + 3 * N_REPLY
    with loaded(o, n_ctx, cache=False) as engine:
        n_vocab = int(engine.llama.n_vocab())
        first, question = words(o.tokens, n_vocab, 1), words(NEW_TOKENS, n_vocab, 2)
        one, two, prompt = turns(engine, first, question)
        engine.new_conversation()
        whole = generate(engine, prompt, N_REPLY, GREEDY, ignore_end=True)
        budget = engine.plan.budget_bytes
    with loaded(o, n_ctx) as engine:
        generate(engine, first, N_REPLY, GREEDY, ignore_end=True)
    with loaded(o, n_ctx) as engine:
        later = generate(engine, prompt, N_REPLY, GREEDY, ignore_end=True)
    evaluated = [g.prompt_tokens - g.reused_tokens for g in (two, later)]
    return {
        "tokens": o.tokens, "first_ttft_s": one.ttft_seconds, "second_ttft_s": two.ttft_seconds,
        "second_ttft_from_disk_s": later.ttft_seconds, "whole_ttft_s": whole.ttft_seconds,
        "evaluated": evaluated[0], "evaluated_from_disk": evaluated[1], "new_tokens": NEW_TOKENS,
        "text_equal_to_memory": later.text == two.text, "text_equal_to_whole": whole.text == two.text,
        "ok": max(evaluated) <= NEW_TOKENS + 64 and later.text == two.text
        and peak_rss_bytes() <= budget + PROGRAM_ALLOWANCE_BYTES,
        "peak_rss_bytes": peak_rss_bytes(), "budget_bytes": budget,
    }  # fmt: skip


# ---- a prefix from the disk


def read_all(path: Path) -> None:
    block = bytearray(BLOCK)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(block):
            pass


def measure_restore(o: argparse.Namespace) -> dict[str, Any]:
    n_ctx = o.tokens + 3 * N_REPLY
    with loaded(o, n_ctx) as engine:
        n_vocab = int(engine.llama.n_vocab())
        tokens = words(o.tokens, n_vocab, 1)
        with engine.decoding():
            for at in range(0, o.tokens, engine.n_ubatch):
                engine.llama.eval(tokens[at : at + engine.n_ubatch])
    path = max(prompt_folder().glob(f"*{SUFFIX}"), key=lambda each: each.stat().st_size)
    reading, restoring = [], []
    with loaded(o, n_ctx, cache=False) as engine:
        for _ in range(o.rounds):  # in turns, so that a slow minute of the disk meets both
            drop_pages(path)
            reading.append(seconds_of(lambda: read_all(path)))
            drop_pages(path)
            with engine.decoding():
                restoring.append(seconds_of(lambda: load_state(read_header(path), engine.llama, engine.checkpoints)))
        kept, budget = int(engine.llama.n_tokens), engine.plan.budget_bytes
    times = [b / a for a, b in zip(reading, restoring, strict=True)]
    return {
        "tokens": o.tokens, "file_bytes": path.stat().st_size, "read_s": reading, "restore_s": restoring,
        "times_of_reading": statistics.median(times), "restored_tokens": kept,
        "bytes_per_second": path.stat().st_size / statistics.median(reading),
        "ok": statistics.median(times) <= MOST_OF_READING and kept == o.tokens
        and peak_rss_bytes() <= budget + PROGRAM_ALLOWANCE_BYTES,
        "peak_rss_bytes": peak_rss_bytes(), "budget_bytes": budget,
    }  # fmt: skip


# ---- kills


def save_for_ever(o: argparse.Namespace) -> None:
    """What is killed: one process that does nothing but save a conversation, a token longer each time."""
    with loaded(o, 8 * o.tokens) as engine, engine.decoding():
        assert engine.prompts is not None
        n_vocab = int(engine.llama.n_vocab())
        engine.llama.eval(words(o.tokens, n_vocab, o.seed))
        print("ready", flush=True)
        while True:
            engine.prompts.store()
            engine.llama.eval([300 + engine.llama.n_tokens % 100])


def measure_kills(o: argparse.Namespace) -> dict[str, Any]:
    rng, folder = random.Random(o.seed), prompt_folder()
    parts = 0
    for kill in range(o.kills):
        args = [sys.executable, __file__, "save", str(o.model), "--tokens", str(o.tokens), "--ram", o.ram]
        args += ["--threads", str(o.threads), "--seed", str(1000 * kill)]
        with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as writer:
            assert writer.stdout is not None
            if writer.stdout.readline() != b"ready\n":
                raise SystemExit(f"{o.model}: a process that saves did not start")
            time.sleep(rng.uniform(0.0, o.longest))
            writer.send_signal(signal.SIGKILL)
        parts += any(is_part(path.name) for path in folder.iterdir())
        if kill % 50 == 49:
            print(f"{kill + 1} kills, {parts} left a part file", file=sys.stderr, flush=True)
            _trim_to(folder, 40)
    unreadable, n_files = [], 0
    with loaded(o, 8 * o.tokens, cache=False) as engine, engine.decoding():
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            n_files += 1
            try:
                load_state(read_header(path), engine.llama, engine.checkpoints)
            except Exception as e:  # whatever it is, it is what this looks for
                unreadable.append(f"{path.name}: {e}")
    return {"kills": o.kills, "left_a_part": parts, "files": n_files, "unreadable": unreadable,
            "ok": not unreadable and n_files > 0 and parts > 0}  # fmt: skip


def _trim_to(folder: Path, n: int) -> None:
    """Of the whole files that were written, the last n stay; all of them were read by then."""
    files = sorted(folder.glob(f"*{SUFFIX}"), key=lambda each: each.stat().st_mtime_ns)
    for path in files[:-n]:
        read_header(path)
        path.unlink(missing_ok=True)


COMMANDS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "turn": measure_turn, "restore": measure_restore, "kills": measure_kills,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*COMMANDS, "save"])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, help="of the conversation; 4,000, 20,000 for restore, 200 for kills")
    parser.add_argument("--ram", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3, help="of restore")
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--longest", type=float, default=0.2, help="seconds of saving before a kill, at the most")
    parser.add_argument("--seed", type=int, default=0)
    o = parser.parse_args(arguments)
    o.tokens = o.tokens or {"turn": 4000, "restore": 20000}.get(o.what, 200)
    if o.what == "save":
        save_for_ever(o)
    with tempfile.TemporaryDirectory(dir=o.model.parent) as folder:  # on the model's disk, and nobody else's files
        os.environ["MOE_EDGE_CACHE"] = str(Path(folder) / "cache")
        result = COMMANDS[o.what](o)
    print(json.dumps({"what": o.what, "model": str(o.model), "ram": o.ram, **result}))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
