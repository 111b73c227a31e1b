"""The converted models that bench/pareto.py compares, made once each."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from moe_edge.convert.checkpoints import open_source
from moe_edge.convert.conversion_plan import ExpertTypes
from moe_edge.convert.convert import convert
from moe_edge.convert.stacked import write_stacked
from moe_edge.models.errors import UsageError
from moe_edge.models.store.experts import Piece
from moe_edge.models.store.store import open_model, store_path
from moe_edge.runner.calibrate.calibrate import CalibrateOptions, Calibrator
from moe_edge.runner.measure.logits import (
    read_text,
)
from pareto_settings import Options, tell


class Models:
    """The source as a GGUF, and conversions of it in DIR/models, made when asked for; use in `with`.

    The calibration is measured once, and only when a model is missing.
    """

    def __init__(self, o: Options) -> None:
        self.options, self.folder = o, o.out / "models"
        self._stack = contextlib.ExitStack()
        self._calibrator: Calibrator | None = None

    def __enter__(self) -> Models:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_same()
        self.source = self.options.source
        if open_source(self.source).is_checkpoint:
            self.source = self.folder / "source.gguf"
            if not self.source.exists():
                tell("writing the checkpoint as BF16")
                write_stacked(self.options.source, self.source, "BF16")
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def _check_same(self) -> None:
        """Refuse models that were made of something else."""
        o, note = self.options, self.folder / "made-from.json"
        files = open_source(o.source).files
        made_from = {
            "source": [[path.name, path.stat().st_size, int(path.stat().st_mtime)] for path in files],
            "calibration": hashlib.sha256(read_text(o.calibrate)).hexdigest(),
            "calibrate_tokens": o.calibrate_tokens,
            "types": list(o.types),
        }
        if note.exists() and json.loads(note.read_text()) != made_from:
            raise UsageError(f"{self.folder} holds models of another source or calibration; give another --out")
        note.write_text(json.dumps(made_from))

    def calibrator(self) -> Calibrator:
        if self._calibrator is None:
            o = self.options
            options = CalibrateOptions(
                o.calibrate, o.types, o.calibrate_tokens, settings_tokens=0, n_threads=o.n_threads
            )  # fmt: skip
            self._calibrator = self._stack.enter_context(Calibrator(self.source, self.folder, options, tell))
        return self._calibrator

    def get(self, high: str, low: str | None = None, how: str = "global") -> Path:
        """high: a type, or bits a weight as a number, shared out as `how` says. low: the low level's type."""
        bits = None if not is_number(high) else float(high)
        name = (f"{how}-{bits:g}" if bits is not None else high) + (f"+{low}" if low else "")
        path = self.folder / f"{name}.gguf"
        if path.exists() and store_path(path).exists():
            return path
        calibrator = self.calibrator()
        homes = calibrator.allocate(bits, how) if bits is not None else {}
        tell(f"converting {name}")
        types = ExpertTypes(None if homes else high, low, homes=homes)
        if low is not None:
            calibrator.convert(path, types, overwrite=True)
        else:  # the same weights without the table of damage, which exact does not need and which takes longest
            convert(
                self.source, path, types=types, importance=calibrator.importance,
                dense_importance=calibrator.dense_importance, threads=self.options.n_threads or None, overwrite=True,
            )  # fmt: skip
        return path


def is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


def bits_a_weight(path: Path, level: int = 0) -> float:
    """Bits really stored for a weight of the experts at one level."""
    model = open_model(path)
    pieces: list[Piece] = []
    at = 0
    for layer in model.layers:
        for _ in range(layer.n_expert):
            for each in range(len(model.levels)):
                mine = model.pieces[at : at + len(layer.projections)]
                at += len(layer.projections)
                pieces += mine if each == level else []
    return 8 * sum(p.nbytes for p in pieces) / sum(p.cols * p.rows for p in pieces)
