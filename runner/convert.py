"""Convert and prove: after writing, the skeleton is loaded with the engine on and one token is decoded.

The proof runs in a process of its own: llama.cpp ends the process on a graph it cannot build, and the converter must
live to remove its files and say why.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from moe_edge.convert.convert import ConvertReport, convert
from moe_edge.models.errors import WorkError


def prove(skeleton: Path) -> None:
    """Decode one token of a converted model in a child process. Raises WorkError with the reason."""
    child = subprocess.run(
        [sys.executable, "-m", "moe_edge.runner.prove", str(skeleton)], capture_output=True, text=True, check=False
    )
    if child.returncode != 0:
        said = [line for line in (child.stderr or child.stdout).splitlines() if line.strip()]
        reason = said[-1] if said else f"llama.cpp ended with status {child.returncode}"
        raise WorkError(f"{skeleton}: the converted model does not run: {reason}")


def convert_and_prove(source: Path, output: Path | None, **options: Any) -> ConvertReport:
    """convert.convert() with the proof; see there for the options and what it raises."""
    return convert(source, output, prove=prove, **options)
