"""What to say where no model was named: what is in the cache, else one of the hub that fits this machine."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from moe_edge.models.errors import MoeEdgeError
from moe_edge.models.known import KnownModel, fitting
from moe_edge.runner.hub.hub_cache import Stored, cache_folder, stored_models
from moe_edge.runner.hub.names import hub_name, quant_of
from moe_edge.runner.memory import auto_budget_bytes

Ask = Callable[[str, bool], bool]  # a question, and what a bare Enter means
Tell = Callable[[str], None]
EMBEDDED = "the embedded tiny model answers, which is there to show that everything works"


def stored_name(model: Stored) -> str:
    """As it can be named: `user/repo:QUANT`."""
    return f"{model.repo}:{quant_of(model.files[0].name) or model.files[0].name}"


def in_cache() -> list[Stored]:
    """The models in the cache, the one used last first; none when it cannot be read."""
    with contextlib.suppress(OSError):
        return list(stored_models())
    return []


def free_disk_bytes() -> int:
    """Free bytes where the cache is, or will be; 0 when nobody knows."""
    folder = cache_folder()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def suggestion() -> KnownModel | None:
    """The best of the known models that this machine has memory and disk for."""
    return next(fitting(auto_budget_bytes(), free_disk_bytes()), None)


def offer_model(ask: Ask | None, tell: Tell) -> Path | None:
    """A model to talk to where none was named: of the cache or of the hub, after a yes; None for the embedded one.

    ask: None where nobody can be asked. What goes wrong with a download is told, and is no error: there is a model.
    """
    stored = in_cache()
    if ask is None:
        tell(f"no model was named: {EMBEDDED}. {_better(stored)}")
        return None
    if stored:
        if ask(f"No model was named. Talk to {stored_name(stored[0])}, which is here?", True):
            with contextlib.suppress(OSError):
                os.utime(stored[0].files[0])
            return stored[0].files[0]
        tell(EMBEDDED)
        return None
    known = suggestion()
    if known is None:
        tell(f"no model was named, and none that is known fits memory and disk here: {EMBEDDED}")
        return None
    tell(f"No model was named, and none is here. This one should fit: {known.words()} ({known.license}).")
    if not known.run_here:
        tell("It was not run with moe-edge by those who wrote this; its header is looked at before the download.")
    if not ask("Download it?", False):
        tell(f"{EMBEDDED}; moe-edge pull {known.name} brings the other")
        return None
    try:
        return _bring(known, ask, tell)
    except MoeEdgeError as error:
        tell(f"{error}; {EMBEDDED}")
        return None


def _better(stored: list[Stored]) -> str:
    if stored:
        return f"moe-edge chat {stored_name(stored[0])} asks one that is here"
    known = suggestion()
    return f"moe-edge pull {known.name} brings a real one" if known else "moe-edge pull USER/REPO brings a real one"


def _bring(known: KnownModel, ask: Ask, tell: Tell) -> Path | None:
    """The model in the cache, if its header says that it runs here, or the user wants it anyway."""
    from moe_edge.runner.hub.client import Hub
    from moe_edge.runner.hub.progress import shown_progress
    from moe_edge.runner.hub.pull import fetch, find_choice, missing_bytes, plan_choice

    name = hub_name(known.name)
    assert name is not None, known.name
    hub = Hub()
    choice = find_choice(hub, name)
    plan = plan_choice(hub, choice)
    tell(plan.text())
    left = missing_bytes(hub, choice)
    if not plan.will_run:
        tell(f"{choice.name} is not downloaded: {EMBEDDED}; moe-edge pull {name.repo} --best looks for another quant")
        return None
    if left > 1.1 * known.nbytes and not ask(f"It has {left / 1e9:.1f} GB. Download it all the same?", False):
        tell(EMBEDDED)
        return None
    with shown_progress(left, tell) as progress:
        return fetch(hub, choice, progress)
