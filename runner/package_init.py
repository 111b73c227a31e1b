"""Run Mixture-of-Experts language models on machines whose memory is too small for them.

    import moe_edge

    with moe_edge.load("model.gguf", ram="6GiB") as model:
        print(model.generate("The king said").text)
        for event in model.stream([{"role": "user", "content": "Hello"}]):
            print(event)

Importing this costs nothing: what runs a model is imported by load().
"""

TYPE_CHECKING = False  # `typing` takes its time, in which Ctrl-C would meet nobody who says "interrupted"
if TYPE_CHECKING:
    from typing import Any

    from moe_edge.models.errors import (
        BadChecksum,
        BadFile,
        BudgetTooSmall,
        CannotRun,
        CutFile,
        EngineError,
        MissingFile,
        MoeEdgeError,
        NotMoE,
        Stopped,
        UnknownName,
        UsageError,
        WorkError,
    )
    from moe_edge.runner.api import Done, Event, Model, Reply, load

__all__ = [
    "BadChecksum",
    "BadFile",
    "BudgetTooSmall",
    "CannotRun",
    "CutFile",
    "Done",
    "EngineError",
    "Event",
    "MissingFile",
    "Model",
    "MoeEdgeError",
    "NotMoE",
    "Reply",
    "Stopped",
    "UnknownName",
    "UsageError",
    "WorkError",
    "load",
]
_OF_API = ("Done", "Event", "Model", "Reply", "load")


def __getattr__(name: str) -> "Any":
    """What is in __all__, imported when it is first asked for; and the version."""
    if name in __all__ and name not in _OF_API:
        from moe_edge.models import errors

        return getattr(errors, name)
    if name in _OF_API:
        from moe_edge.runner import api

        return getattr(api, name)
    if name == "__version__":
        from importlib import metadata

        return metadata.version("moe-edge")
    raise AttributeError(f"module 'moe_edge' has no attribute '{name}'")
