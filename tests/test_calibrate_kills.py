"""A calibrated conversion that is killed goes on where it was, and makes the bytes of one that was not."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from moe_edge.models.store.store import open_model
from moe_edge.runner.calibrate.journal import Journal, WrittenLayers
from random_models import Shape, write_random_model

ROOT = Path(__file__).parent.parent
PROGRAM = """
import sys
from pathlib import Path
from moe_edge.convert.conversion_plan import ExpertTypes
from moe_edge.runner.calibrate import measured_settings
from moe_edge.runner.calibrate.calibrate import CalibrateOptions, convert_calibrated
grid = measured_settings._grid
measured_settings._grid = lambda *a: grid(*a)[:1]  # each takes as long as all the rest
source, text, output = map(Path, sys.argv[1:4])
options = CalibrateOptions(
    text, types=("Q4_0", "Q5_0", "Q8_0"), n_tokens=2048, sensitivity_tokens=512, settings_tokens=512, n_threads=1,
    ram_bytes=1 << 30,
)
convert_calibrated(source, output, ExpertTypes(), options, bits=5.5, low_bits=4.75, tell=lambda s: print(s, flush=True))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = Shape(n_layer=3, n_expert=16, n_used=2)
    return write_random_model(tmp_path_factory.mktemp("source") / "m.gguf", "qwen3moe", shape, expert_type="F16")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(b"".join((ROOT / name).read_bytes() for name in ("README.md", "docs/FORMAT.md", "docs/LOG.md")))
    return path


def run(
    source: Path, text: Path, output: Path, lines: int | None = None, seconds: float = 0.0
) -> tuple[int, list[str]]:
    """Status and lines of a conversion in a process of its own, killed so many seconds after so many lines."""
    arguments = [sys.executable, "-c", PROGRAM, str(source), str(text), str(output)]
    told = []
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            told.append(line)
            if len(told) == lines:
                time.sleep(seconds)
                child.kill()
    assert child.returncode in (0, -9)
    return child.returncode, told


@pytest.fixture(scope="module")
def unbroken(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], bytes]:
    """The lines of a run that nobody kills, and the bytes of both files."""
    output = tmp_path_factory.mktemp("unbroken") / "c.gguf"
    status, lines = run(source, text, output)
    assert status == 0
    return lines, bytes_of(output)


def bytes_of(output: Path) -> bytes:
    assert sorted(p.name for p in output.parent.iterdir()) == ["c.experts.gguf", "c.gguf"]
    open_model(output, verify=True)
    return output.read_bytes() + output.with_name("c.experts.gguf").read_bytes()


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_random_moments_it_makes_the_bytes_of_an_unbroken_run(
    source: Path, text: Path, tmp_path: Path, unbroken: tuple[list[str], bytes], seed: int
) -> None:
    """Each run is killed at a moment after a line by chance of those that are still to come."""
    lines, want = unbroken
    chance, output, kills = random.Random(seed), tmp_path / "c.gguf", 0
    again: list[str] = []
    for _ in range(5):
        status, some = run(source, text, output, chance.randint(1, max(2, len(lines) // 4)), chance.uniform(0, 0.3))
        again += some
        if status == 0:
            break
        kills += 1
        assert not output.exists(), "what is not whole has no name"
    else:
        status, some = run(source, text, output)
        again += some
    assert kills > 0 and status == 0
    assert bytes_of(output) == want
    # a chunk's line comes when it is kept: told once more at most for a kill between the two
    told = sum(line.startswith("watching") for line in again)
    assert told <= sum(line.startswith("watching") for line in lines) + kills


def test_the_time_is_told_before_most_of_the_work_and_as_it_goes(unbroken: tuple[list[str], bytes]) -> None:
    lines = unbroken[0]
    first = next(i for i, line in enumerate(lines) if line.startswith("forecast: "))
    assert not any(line.startswith(("sensitivity", "importance", "errors", "levels", "setting")) for line in
                   lines[:first])  # fmt: skip
    assert "in all" in lines[first] and "left: " in lines[first]


def test_a_journal_of_something_else_is_thrown_away_and_a_torn_file_is_not_there(tmp_path: Path) -> None:
    folder = tmp_path / "j"
    journal = Journal(folder, "one")
    journal.save("a", {"x": np.arange(3)})
    again = Journal(folder, "one").load("a")
    assert again is not None and again["x"].tolist() == [0, 1, 2]
    whole = (folder / "a.npz").read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 1):
        (folder / "a.npz").write_bytes(whole[:cut])
        assert Journal(folder, "one").load("a") is None
    (folder / "a.npz").write_bytes(whole)
    assert Journal(folder, "two").load("a") is None and not (folder / "a.npz").exists()


def test_layers_that_were_written_are_forgotten_when_their_files_are_shorter_than_they_were(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", "one")
    written = WrittenLayers(journal)
    assert written.resume("x") == ([], [])
    (written.folder / "s").write_bytes(b"12345")
    state = '{"identity": "x", "store": [1, 2], "skeleton": [], "parts": {"s": 5}}'
    journal.write_text("written.json", state)
    assert WrittenLayers(journal).resume("x") == ([1, 2], [])
    assert WrittenLayers(journal).resume("y") == ([], [])
    (written.folder / "s").write_bytes(b"1234")
    assert WrittenLayers(journal).resume("x") == ([], [])
