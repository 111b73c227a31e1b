"""`moe-edge` alone: what to type next on this machine."""

from __future__ import annotations

import sys

from moe_edge.models.errors import printable

MOST_STORED = 3


def first_steps() -> str:
    """A few lines; nothing is loaded and nobody is asked for it."""
    from moe_edge.runner.hub.offer import in_cache, stored_name, suggestion

    rows = []
    stored = in_cache()
    has_terminal = sys.stdin is not None and sys.stdin.isatty()
    if stored:
        for each in stored[:MOST_STORED]:
            name = printable(stored_name(each))
            rows.append((_talk(name, has_terminal), f"{each.nbytes / 1e9:.1f} GB, in the cache"))
        rows.append((f"moe-edge serve {printable(stored_name(stored[0]))}", "a page and an interface for programs"))
    else:
        known = suggestion()
        if known is not None:
            rows.append((f"moe-edge pull {known.name}", f"about {known.nbytes / 1e9:.1f} GB, should fit this machine"))
            rows.append((_talk(known.name, has_terminal), "talk to it"))
        else:
            rows.append(("moe-edge pull USER/REPO --plan-only", "would a model of the hub run here?"))
        rows.append((_talk("", has_terminal), "the embedded tiny model, to see that everything works"))
    rows.append(("moe-edge doctor", "what this machine can do, and its traps"))
    rows.append(("moe-edge docs", "the pages that explain it; no network is needed"))
    rows.append(("moe-edge --help", "all commands"))
    return "\n".join(f"{words}:\n    {command}" for command, words in rows)


def _talk(name: str, has_terminal: bool) -> str:
    call = f"moe-edge chat {name}".rstrip()
    return call if has_terminal else f"echo 'Hello' | {call}"
