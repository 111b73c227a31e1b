"""A GGUF with its header changed: keys set, dropped or retyped, tensors renamed, dropped or reshaped; the data stays.

For models that contradict themselves. Nothing is checked here: what comes out may be as wrong as the test wants it.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_edge.models.formats.gguf import TensorEntry, read_gguf
from moe_edge.models.formats.write import encode_kv

U32, F32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9


def value_type_of(value: Any) -> tuple[int, int | None]:
    """(value type, element type) that llama.cpp's own converter would choose for a Python value."""
    if isinstance(value, list):
        return ARRAY, value_type_of(value[0])[0] if value else U32
    for kind, code in ((bool, BOOL), (int, U32), (float, F32), (str, STRING)):
        if isinstance(value, kind):
            return code, None
    raise TypeError(type(value))


def alter(
    source: Path,
    target: Path,
    set: Mapping[str, Any] | None = None,
    drop: Collection[str] = (),
    tensors: Callable[[TensorEntry], TensorEntry | None] = lambda entry: entry,
    change: Callable[[str, Any], Any] = lambda _key, value: value,
) -> Path:
    """Write `source` with another header to `target`.

    set: key -> value, in the type the key has, else the usual one. drop: keys left out. tensors: entry -> the entry to
    write in its place (its offset stays), or None for none. change: (key, value) -> value of every key, for lists.
    """
    file = read_gguf(source)
    records = {key: file.kv.record(key) for key in file.kv if key not in drop}
    for key in list(records):
        value = file.kv[key]
        new = change(key, value)
        if new is not value:
            records[key] = encode_kv(key, new, *file.kv.types(key))
    for key, value in (set or {}).items():
        same = key in file.kv and isinstance(value, list) == isinstance(file.kv[key], list)
        types = file.kv.types(key) if same and type(value) is type(file.kv[key]) else value_type_of(value)
        records[key] = encode_kv(key, value, *types)
    entries = [new for entry in file.tensors.values() if (new := tensors(entry)) is not None]
    header = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(entries), len(records)))
    for record in records.values():
        header += record
    for entry in entries:
        name = entry.name.encode()
        header += struct.pack("<Q", len(name)) + name + struct.pack("<I", len(entry.shape))
        header += struct.pack(f"<{len(entry.shape)}QIQ", *entry.shape, entry.type, entry.offset - file.data_offset)
    header += bytes(-len(header) % file.alignment)
    target.write_bytes(bytes(header) + source.read_bytes()[file.data_offset :])
    return target


def renamed(old: str, new: str) -> Callable[[TensorEntry], TensorEntry]:
    """For alter(tensors=...): the tensor `old` under another name."""
    return lambda entry: replace(entry, name=new) if entry.name == old else entry


def without(*names: str) -> Callable[[TensorEntry], TensorEntry | None]:
    """For alter(tensors=...): leave tensors out."""
    return lambda entry: None if entry.name in names else entry


def reshaped(name: str, *shape: int) -> Callable[[TensorEntry], TensorEntry]:
    """For alter(tensors=...): another shape, row length first."""
    return lambda entry: replace(entry, shape=shape) if entry.name == name else entry


# What is put in the place of a number, besides random ones: the ends of every range, and what others confuse.
NUMBERS = (0, 1, 2, 3, 7, 8, 9, 31, 32, 33, 63, 64, 255, 256, 257, 511, 512, 4096, 65535, 2**16, 2**31 - 1, 2**32 - 1)


def mutate(rng: random.Random, source: Path, target: Path) -> str:
    """Write `source` with one to three random changes of its header to `target`; returns what was changed."""
    file = read_gguf(source)
    keys = [key for key in file.kv if not key.startswith("general.name")]
    names = list(file.tensors)
    set_, drop, entries, notes = {}, [], {}, []
    for _ in range(rng.choice((1, 1, 2, 3))):
        kind = rng.random()
        if kind < 0.55:
            key = rng.choice(keys)
            value = _other(rng, file.kv[key])
            set_[key] = value
            notes.append(f"{key} = {str(value)[:60]}")
        elif kind < 0.65:
            drop.append(rng.choice(keys))
            notes.append(f"no {drop[-1]}")
        else:
            name = rng.choice(names)
            entries[name] = _other_entry(rng, file.tensors[name], names)
            notes.append(f"{name} -> {entries[name] and (entries[name].name, entries[name].shape, entries[name].type)}")  # type: ignore[union-attr]
    alter(source, target, {k: v for k, v in set_.items() if k not in drop}, drop, lambda e: entries.get(e.name, e))
    return "; ".join(notes)


def _other(rng: random.Random, value: Any) -> Any:
    """Another value, mostly of the same type and within what the type holds."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, list):
        cut = [each for each in value if rng.random() < 0.99]
        return rng.choice((value[: len(value) // 2], cut, value + value[:1], value[::-1], value[:1] * len(value)))
    if isinstance(value, int):
        return rng.choice((rng.choice(NUMBERS), max(0, value + rng.choice((-1, 1))), 2 * value, value // 2))
    if isinstance(value, float):
        return rng.choice((0.0, -1.0, 1e30, 1e-30, float("inf"), float("nan"), 2 * value))
    if isinstance(value, str):
        return rng.choice(("", "x", value * 2, value[:-1], "llama", "default", "\x1b[31m\n", value.upper()))
    raise TypeError(type(value))


def _other_entry(rng: random.Random, entry: TensorEntry, names: list[str]) -> TensorEntry | None:
    choice = rng.randrange(5)
    if choice == 0:
        return None
    if choice == 1:
        name = entry.name.replace("blk.0", "blk.1") if rng.random() < 0.5 else entry.name.replace("weight", "bias")
        return replace(entry, name=name)
    if choice == 2:
        return replace(entry, shape=entry.shape[::-1])
    if choice == 3:
        shape = [rng.choice((each, each // 2, 2 * each, 1)) for each in entry.shape]
        return replace(entry, shape=tuple(max(1, each) for each in shape))
    return replace(entry, type=rng.choice((0, 1, 8, 12, 14, 24, 25, 28, 30)))
