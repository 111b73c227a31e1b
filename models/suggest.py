"""Suggestions for a name that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Mapping


def did_you_mean(name: str, known: Mapping[str, object]) -> str:
    """`; did you mean 'lfu'? known: lfu, lru`, to append to a message about an unknown name."""
    near = difflib.get_close_matches(name, known, n=1)
    guess = f"; did you mean '{near[0]}'?" if near else ";"
    return f"{guess} known: {', '.join(sorted(known))}"
