"""A calibration as key-values of the expert store, and back (docs/FORMAT.md).

All numbers are f32 or u32. The table of settings has a fixed number of rows, with names as numbers, so that it can be
written when the model is complete and measured: no offset changes, and the store id covers tensors only.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from moe_edge.models.calibration import Calibration, Setting, Substitution
from moe_edge.models.errors import BadFile, UsageError
from moe_edge.models.formats.floats import Float64Array
from moe_edge.models.formats.gguf import GGUFFile, read_gguf
from moe_edge.models.formats.keyvalues import ARRAY, KeyValues
from moe_edge.models.formats.write import F32, U32, kv_f32s, kv_string, kv_strings, kv_u32, kv_u32s, replace_kvs

VERSION = 1
PREFIX = "moe_edge.calibration."
SETTING_ROWS = 16
QUANTILES = 101
SUBSTITUTION_BINS = 10
# numbers in the file; never reorder
POLICIES = ("exact", "dymoe", "hobbit", "damage", "reroute")
LOW_LEVELS = ("low", "skip", "")

_U32_MAX = 2**32 - 1
_NUMBERS = ("knob", "kld", "bytes_share", "expected")



def calibration_kvs(calibration: Calibration) -> dict[str, bytes]:
    """The key-values of `calibration`, encoded. Raises UsageError for what the format cannot hold."""
    n_layers, n_experts = calibration.counts.shape
    kvs = [
        _u32("version", VERSION),
        (PREFIX + "text_sha256", kv_string(PREFIX + "text_sha256", calibration.text_sha256)),
        _u32("n_tokens", calibration.n_tokens),
        (PREFIX + "levels", kv_strings(PREFIX + "levels", calibration.levels)),
        _u32("n_layers", n_layers),
        _u32("n_experts", n_experts),
        _u32s("counts", calibration.counts.ravel().tolist()),
    ]
    for name, shape in _shapes(n_layers, n_experts, len(calibration.levels)).items():
        values = np.asarray(getattr(calibration, name))
        if values.shape != shape:
            raise UsageError(f"the calibration's {name} has shape {list(values.shape)}, expected {list(shape)}")
        kvs.append(_f32s(name, values.ravel()))
    if calibration.substitution is not None:
        kvs += _substitution_kvs(calibration.substitution, n_layers)
    return dict(kvs) | _settings_kvs(calibration.settings)


def _substitution_kvs(measured: Substitution, n_layers: int) -> list[tuple[str, bytes]]:
    shapes = {"factor": (n_layers, SUBSTITUTION_BINS), "gates": (n_layers,), "scale": (n_layers,)}
    for name, shape in shapes.items():
        found = getattr(measured, name).shape
        if found != shape:
            raise UsageError(f"the calibration's substitution.{name} has shape {list(found)}, expected {list(shape)}")
    return [
        _f32s("substitution.factor", measured.factor.ravel()),
        _u32s("substitution.gates", measured.gates.tolist()),
        _f32s("substitution.scale", measured.scale),
    ]


def read_calibration(kv: KeyValues, where: str = "calibration") -> Calibration | None:
    """The calibration among a store's key-values, None when it has none.

    Raises BadFile, naming `where`, for one that is damaged or of a newer version.
    """
    if PREFIX + "version" not in kv:
        return None
    reader = _Reader(kv, where)
    version = reader.number("version")
    if version > VERSION:
        raise BadFile(f"{where}: its calibration has version {version}, this moe-edge reads {VERSION}; update it")
    levels = tuple(reader.value("levels", list))
    n_layers, n_experts = reader.number("n_layers"), reader.number("n_experts")
    arrays = {name: reader.floats(name, shape) for name, shape in _shapes(n_layers, n_experts, len(levels)).items()}
    return Calibration(
        text_sha256=reader.value("text_sha256", str),
        n_tokens=reader.number("n_tokens"),
        levels=levels,
        counts=np.asarray(reader.array("counts", U32, n_layers * n_experts), np.int64).reshape(n_layers, n_experts),
        settings=reader.settings(),
        substitution=reader.substitution(n_layers),
        **arrays,
    )


def patch_settings(store_path: str | os.PathLike[str], settings: Sequence[Setting]) -> None:
    """Put `settings` into a sealed store, in the place of those it has; all other bytes stay.

    Stopped half way it leaves a store with the old settings or with none: the count is set last.
    Raises UsageError for a store without a calibration and for more settings than it has rows, and what read_gguf
    raises.
    """
    file = read_gguf(store_path)
    records = _settings_kvs(settings)
    count = PREFIX + "settings.count"
    if any(len(record) != _record_bytes(file, key) for key, record in records.items()):
        raise UsageError(f"{file.path}: has no calibration to put settings into; convert the model with one")
    done = records.pop(count)
    replace_kvs(file, {count: kv_u32(count, 0)})
    replace_kvs(file, {**records, count: done})


def _shapes(n_layers: int, n_experts: int, n_levels: int) -> dict[str, tuple[int, ...]]:
    """The f32 arrays and their shapes."""
    return {
        "mean_gate": (n_layers, n_experts),
        "squares": (n_layers, n_experts),
        "sensitivity": (n_layers,),
        "error": (n_layers, n_experts, n_levels + 1),
        "cumulated": (QUANTILES,),
        "use_damage": (n_layers, QUANTILES),
    }


def _settings_kvs(settings: Sequence[Setting]) -> dict[str, bytes]:
    if len(settings) > SETTING_ROWS:
        raise UsageError(f"{len(settings)} settings do not fit the {SETTING_ROWS} rows of a store's calibration")
    for each in settings:
        if each.policy not in POLICIES or each.low_level not in LOW_LEVELS:
            raise UsageError(f"cannot store the setting '{each.policy}' with low level '{each.low_level}'")
    unused = SETTING_ROWS - len(settings)
    policies = [POLICIES.index(each.policy) for each in settings] + [0] * unused
    low_levels = [LOW_LEVELS.index(each.low_level) for each in settings] + [0] * unused
    kvs = [_u32("settings.count", len(settings)), _u32s("settings.policy", policies)]
    kvs.append(_u32s("settings.low_level", low_levels))
    for name in _NUMBERS:
        values = [getattr(each, name) for each in settings] + [0.0] * unused
        kvs.append(_f32s(f"settings.{name}", np.asarray(values)))
    return dict(kvs)


def _u32(name: str, value: int) -> tuple[str, bytes]:
    if not 0 <= value <= _U32_MAX:
        raise UsageError(f"the calibration's {name} is {value}, expected 0 to {_U32_MAX}")
    return PREFIX + name, kv_u32(PREFIX + name, value)


def _u32s(name: str, values: Sequence[int]) -> tuple[str, bytes]:
    if values and not 0 <= min(values) <= max(values) <= _U32_MAX:
        raise UsageError(f"the calibration's {name} are {min(values)} to {max(values)}, expected 0 to {_U32_MAX}")
    return PREFIX + name, kv_u32s(PREFIX + name, values)


def _f32s(name: str, values: npt.NDArray[Any]) -> tuple[str, bytes]:
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float32)
    if not np.isfinite(rounded).all():
        raise UsageError(f"the calibration's {name} holds numbers that are not finite")
    return PREFIX + name, kv_f32s(PREFIX + name, rounded.tolist())


def _record_bytes(file: GGUFFile, key: str) -> int:
    return len(file.kv.record(key)) if key in file.kv else -1


class _Reader:
    """Key-values of a calibration, each checked for its type and length."""

    def __init__(self, kv: KeyValues, where: str) -> None:
        self.kv = kv
        self.where = where

    def value(self, name: str, kind: type) -> Any:
        found = self.kv.get(PREFIX + name)
        if not isinstance(found, kind) or isinstance(found, bool):
            raise BadFile(f"{self.where}: {PREFIX}{name} is {found!r}, expected a value of type {kind.__name__}")
        return found

    def number(self, name: str) -> int:
        found = self.value(name, int)
        if not 0 <= found <= _U32_MAX:
            raise BadFile(f"{self.where}: {PREFIX}{name} is {found}, expected 0 to {_U32_MAX}")
        return int(found)

    def array(self, name: str, element_type: int, length: int) -> list[Any]:
        key = PREFIX + name
        if key not in self.kv or self.kv.types(key) != (ARRAY, element_type):
            raise BadFile(f"{self.where}: {key} is missing or has another type")
        values: list[Any] = self.kv[key]
        if len(values) != length:
            raise BadFile(f"{self.where}: {key} has {len(values)} numbers, expected {length}")
        return values

    def floats(self, name: str, shape: tuple[int, ...]) -> Float64Array:
        length = int(np.prod(shape, dtype=object))
        values = np.asarray(self.array(name, F32, length), np.float64)
        if not np.isfinite(values).all():
            raise BadFile(f"{self.where}: {PREFIX}{name} holds numbers that are not finite")
        return values.reshape(shape)

    def substitution(self, n_layers: int) -> Substitution | None:
        """None in a calibration that was made before it was measured."""
        if PREFIX + "substitution.factor" not in self.kv:
            return None
        return Substitution(
            self.floats("substitution.factor", (n_layers, SUBSTITUTION_BINS)),
            np.asarray(self.array("substitution.gates", U32, n_layers), np.int64),
            self.floats("substitution.scale", (n_layers,)),
        )

    def settings(self) -> tuple[Setting, ...]:
        count = self.number("settings.count")
        policies = self._names("settings.policy", POLICIES, count)
        low_levels = self._names("settings.low_level", LOW_LEVELS, count)
        numbers = (self.floats(f"settings.{name}", (SETTING_ROWS,))[:count].tolist() for name in _NUMBERS)
        return tuple(Setting(*row) for row in zip(policies, low_levels, *numbers, strict=True))

    def _names(self, name: str, known: tuple[str, ...], count: int) -> list[str]:
        numbers = self.array(name, U32, SETTING_ROWS)[:count]
        if count > SETTING_ROWS or any(number >= len(known) for number in numbers):
            raise BadFile(f"{self.where}: {PREFIX}{name} holds {numbers}, expected {count} numbers below {len(known)}")
        return [known[number] for number in numbers]
