"""Finding an architecture or a Hugging Face class, and what changes when experts are cut down to width-1 stubs.

The families (models/families) know which metadata key sizes the expert tensors of each llama.cpp architecture, and
which other keys must change with it so that the dense tensors keep their shape. Every entry was tried on tiny random
models (widths measured by changing one key at a time); what was not tried is refused by name.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from moe_edge.models.errors import BadFile, UnknownArchitecture, UnknownName, printable
from moe_edge.models.families import ARCHITECTURES, CHECKPOINTS, REFUSED, REFUSED_CLASSES
from moe_edge.models.families.family import Architecture, Checkpoint
from moe_edge.models.suggest import did_you_mean

KeyValue = int | list[int]

SHARED_WIDTH = "expert_shared_feed_forward_length"
SHARED_COUNT = "expert_shared_count"
U32_MAX = 2**32 - 1
LONGEST_NAME = 40  # characters of a name from a file that a message repeats


def find_architecture(name: str, where: str) -> Architecture:
    """The architecture called `name`; `where` (a file) is named in the error.

    Raises UnknownName for one that is refused (with the reason), and UnknownArchitecture for one not in the table.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    if name in REFUSED:
        raise UnknownName(f"{where}: architecture '{name}' is not supported: {REFUSED[name]}")
    called = printable(name if len(name) <= LONGEST_NAME else name[:LONGEST_NAME] + "...")
    near = difflib.get_close_matches(name[:LONGEST_NAME], ARCHITECTURES, n=1)
    guess = f"; did you mean '{near[0]}'?" if near else ""
    raise UnknownArchitecture(f"{where}: unknown architecture '{called}'{guess}", name)


def find_hf_class(name: str, where: str) -> Checkpoint:
    """How a Hugging Face model class is converted. Raises UnknownName for a class that convert/hf.py cannot read."""
    if name in CHECKPOINTS:
        return CHECKPOINTS[name]
    if name in REFUSED_CLASSES:
        raise UnknownName(
            f"{where}: a checkpoint of class '{name}' is not converted: {REFUSED_CLASSES[name]}; a GGUF of it runs, "
            "with llama.cpp's answers"
        )
    hint = did_you_mean(name, CHECKPOINTS)
    raise UnknownName(
        f"{where}: cannot convert a checkpoint of class '{name}'{hint}; "
        "convert it with llama.cpp's convert_hf_to_gguf.py and give moe-edge the GGUF"
    )


def stub_overrides(
    arch: Architecture,
    kv: Mapping[str, object],
    widths: Mapping[int, int],
    shared_width: int | None,
) -> dict[str, KeyValue]:
    """Keys of the skeleton that differ from the source, so that width-1 stubs load beside unchanged dense weights.

    kv: the source's keys and values, with the architecture's prefix; a list where the value is per layer.
    widths: layer -> real expert width, from the tensors (never from the keys).
    shared_width: width of the shared-expert tensors, None when there are none.
    Returns full key -> value; a list has the source's length.
    Raises BadFile when no set of keys can describe the model.
    """
    width_key = arch.key(arch.width_key)
    overrides: dict[str, KeyValue] = {width_key: _ones_like(kv.get(width_key))}
    states_shared_width = bool(kv.get(arch.key(SHARED_WIDTH)))
    if arch.state_shared_width and shared_width is not None and not states_shared_width:
        overrides[arch.key(SHARED_WIDTH)] = shared_width
    if arch.count_times_width and not (arch.shared_width_wins and states_shared_width):
        overrides |= _scaled_count(arch, kv, widths)
    return overrides


def _ones_like(value: object) -> KeyValue:
    return [1] * len(value) if isinstance(value, list) else 1


def _scaled_count(arch: Architecture, kv: Mapping[str, object], widths: Mapping[int, int]) -> dict[str, KeyValue]:
    """C * W for the shared-expert count C: the shared expert stays C * W wide when the width becomes 1."""
    key = arch.key(SHARED_COUNT)
    count = kv.get(key, 0)
    if not count:
        return {}
    distinct = sorted(set(widths.values()))
    if len(distinct) != 1:
        raise BadFile(
            f"{key}: the shared expert's width follows the expert width, which differs between layers "
            f"({distinct}); such a model cannot be given stubs"
        )
    if isinstance(count, list):
        return {key: [_checked_product(key, int(each), distinct[0]) for each in count]}
    if not isinstance(count, int):
        raise BadFile(f"{key}: expected a number, found {count!r}")
    return {key: _checked_product(key, count, distinct[0])}


def _checked_product(key: str, count: int, width: int) -> int:
    if not 0 <= count * width <= U32_MAX:
        raise BadFile(f"{key}: {count} shared experts of width {width} do not fit a 32-bit key")
    return count * width
