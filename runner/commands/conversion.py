"""Convert and prove: after writing, the skeleton is loaded with the engine on and a few tokens are decoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from moe_edge.convert.arriving import Arriving
from moe_edge.convert.checkpoints import open_source
from moe_edge.convert.conversion_plan import ExpertTypes
from moe_edge.convert.convert import ConvertReport, convert
from moe_edge.convert.imatrix import read_imatrix
from moe_edge.convert.quantizing_time import CORE_HOURS
from moe_edge.models.errors import UsageError
from moe_edge.runner.prove import prove


def convert_and_prove(source: Path, output: Path | None, **options: Any) -> ConvertReport:
    """convert.convert() with the proof; see there for the options and what it raises, and CannotRun."""
    return convert(source, output, prove=partial(prove, named=source), **options)


@dataclass(frozen=True)
class ConvertRequest:
    """What `moe-edge convert` can be asked for. overrides: (level, projection) -> type. types: comma-separated."""

    source: Path
    output: Path | None
    high: str | None = None
    low: str | None = None
    overrides: Mapping[tuple[str, str], str] = field(default_factory=dict)
    bits: float | None = None
    low_bits: float | None = None
    types: str | None = None
    calibrate: Path | None = None
    calibrate_tokens: int = 16384
    imatrix: Path | None = None
    allocate: str = "calibrated"
    core_hours: float = CORE_HOURS
    dense_type: str | None = None
    ram_bytes: int | None = None
    n_threads: int = 0
    dry_run: bool = False
    force: bool = False
    pack: str = "none"
    arriving: Arriving | None = None


def run_convert(r: ConvertRequest, tell: Callable[[str], None] = lambda _: None) -> ConvertReport:
    """Do it. tell: called with lines of progress. Raises UsageError for options that do not go together, and what
    convert() and convert_calibrated() raise."""
    if r.bits is not None and (r.high or any(level == "high" for level, _ in r.overrides)):
        raise UsageError("--bits chooses the types of the high level; leave --high, --type and --high-* away")
    if r.low_bits is not None and (r.low or any(level == "low" for level, _ in r.overrides)):
        raise UsageError("--low-bits chooses the types of the low level; leave --low and --low-* away")
    shared = r.bits is not None or r.low_bits is not None
    by_imatrix = r.allocate == "imatrix"
    if by_imatrix:
        _check_imatrix(r, shared)
    elif shared and r.calibrate is None:
        raise UsageError(
            "--bits and --low-bits need a text to measure the experts on: --calibrate TEXT; "
            "or --allocate imatrix --imatrix FILE, which is cheaper and less exact"
        )
    if r.types is not None and not shared:
        raise UsageError("--types is what --bits chooses from; give --bits, or --high TYPE for all")
    if shared and r.dry_run:
        raise UsageError("--dry-run cannot tell what --bits and --low-bits choose: that takes the calibration itself")
    types = ExpertTypes(r.high, r.low, r.overrides)
    if by_imatrix and r.imatrix is not None:
        from moe_edge.runner.calibrate.by_imatrix import types_by_imatrix

        types = types_by_imatrix(
            r.source, r.imatrix, types, tuple(r.types.split(",")) if r.types else None, bits=r.bits,
            low_bits=r.low_bits, core_hours=r.core_hours, n_threads=r.n_threads, tell=tell,
        )  # fmt: skip
    if r.calibrate is None or r.dry_run or r.output is None:
        importance, dense = _imatrix(r)
        return convert_and_prove(
            r.source, r.output, types=types, importance=importance, dense_importance=dense, dense_type=r.dense_type,
            dry_run=r.dry_run, overwrite=r.force, threads=r.n_threads or None, pack=r.pack,
            arriving=r.arriving, progress=None if r.arriving is None else lambda done, total: None,
        )  # fmt: skip
    if r.arriving is not None:
        raise UsageError("--calibrate needs the model twice; pull it first, then convert it")
    from moe_edge.runner.calibrate.calibrate import DEFAULT_TYPES, CalibrateOptions, convert_calibrated

    options = CalibrateOptions(
        text=r.calibrate, types=tuple(r.types.split(",")) if r.types else DEFAULT_TYPES, n_tokens=r.calibrate_tokens,
        imatrix=r.imatrix, ram_bytes=r.ram_bytes, n_threads=r.n_threads, core_hours=r.core_hours,
    )  # fmt: skip
    return convert_calibrated(
        r.source, r.output, types, options, bits=r.bits, low_bits=r.low_bits, dense_type=r.dense_type,
        overwrite=r.force, tell=tell, pack=r.pack,
    )  # fmt: skip


def _check_imatrix(r: ConvertRequest, shared: bool) -> None:
    """Raises UsageError for what does not go with --allocate imatrix."""
    if r.imatrix is None:
        raise UsageError("--allocate imatrix needs an importance matrix to go by: --imatrix FILE")
    if not shared:
        raise UsageError("--allocate imatrix is how --bits and --low-bits choose types; give one of them")
    if r.calibrate is not None:
        raise UsageError("--allocate imatrix does not run the model; leave --calibrate away, or --allocate")


def _imatrix(r: ConvertRequest) -> tuple[Any, Any]:
    if r.imatrix is None:
        return None, None
    found = read_imatrix(r.imatrix)
    return found.expert_importance(open_source(r.source).layers), found.dense_importance()
