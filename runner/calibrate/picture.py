"""A calibration as a picture: which experts a text uses, and what lowering each one costs. Needs matplotlib."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from moe_edge.models.errors import MissingFile, UsageError

DECADES = 4  # of the colour scale; what is smaller looks like the smallest


def draw_calibration(facts: Mapping[str, Any], path: Path) -> None:
    """Write two heat maps, layers x experts: counts, and damage at the low level (skipped, in a model of one level).

    facts: those of show.describe_calibration(). Grey: never used, without damage, or no such expert.
    Raises UsageError without matplotlib and for a kind of file it cannot write, MissingFile for a folder that is not
    there or not writable.
    """
    figure_module, colors = _import("matplotlib.figure"), _import("matplotlib.colors")
    damage = np.asarray(facts["damage"])
    lowered = facts["damage_levels"][1]
    maps = (
        ("tokens routed to each expert", np.asarray(facts["counts"], np.float64)),
        (f"nats a token when {'skipped' if lowered == 'skip' else lowered}", damage[..., 1] - damage[..., 0]),
    )
    n_layers, n_experts = maps[0][1].shape
    size = (max(6.0, min(24.0, n_experts * 0.14 + 2)), max(4.0, min(24.0, n_layers * 0.4 + 2)))
    figure = figure_module.Figure(figsize=size, layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    for axis, (title, values) in zip(axes, maps, strict=True):
        shown = np.ma.masked_less_equal(values, 0.0)
        image = axis.imshow(shown, aspect="auto", interpolation="nearest", norm=_norm(colors, shown))
        axis.set_facecolor("0.85")
        axis.set_title(title)
        axis.set_ylabel("block")
        axis.set_yticks(range(n_layers), [str(each["layer"]) for each in facts["layers"]])
        figure.colorbar(image, ax=axis)
    axes[-1].set_xlabel("expert")
    try:
        figure.savefig(path, dpi=120)
    except ValueError as error:
        raise UsageError(f"{path}: cannot be drawn: {error}") from error
    except OSError as error:
        raise MissingFile(f"{path}: cannot be written: {error.strerror or error}") from error


def _norm(colors: Any, values: npt.NDArray[np.float64]) -> Any:
    """Logarithmic, over at most DECADES below the largest."""
    if not np.ma.count(values):
        return None
    largest, least = float(values.max()), float(values.min())
    least = max(least, largest * 10.0**-DECADES)
    return colors.LogNorm(least, largest, clip=True) if least < largest else None


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError("--picture needs matplotlib; install it: pip install 'moe-edge[bench]'") from error
