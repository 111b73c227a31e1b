"""Collects what the files of a folder offer, so that a new rule or policy is one new file and nothing else.

Each file of the folder may end with one entry under an agreed name. An entry has a `name` and an `order`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from typing import Protocol, TypeVar


class Entry(Protocol):
    """What every entry has, whatever else it holds."""

    @property
    def name(self) -> str: ...

    @property
    def order(self) -> int:
        """Where it stands in lists, lowest first."""
        ...


AnyEntry = TypeVar("AnyEntry", bound=Entry)


def collect(package: str, folders: Iterable[str], attribute: str, kind: type[AnyEntry]) -> dict[str, AnyEntry]:
    """name -> entry, by order: the `attribute` of each module of a package that has one of this kind.

    Raises TypeError when two files offer the same name, which is a fault of ours.
    """
    found = []
    for module in pkgutil.iter_modules(list(folders)):
        entry = getattr(importlib.import_module(f"{package}.{module.name}"), attribute, None)
        if isinstance(entry, kind):
            found.append(entry)
    by_name = {entry.name: entry for entry in sorted(found, key=lambda entry: (entry.order, entry.name))}
    if len(by_name) != len(found):
        raise TypeError(f"{package}: two files offer the same {attribute}: {sorted(entry.name for entry in found)}")
    return by_name
