"""Where the embedded tiny model is. It is data of this package: tiny/README.md says what it was trained on."""

from __future__ import annotations

from pathlib import Path

from moe_edge.models.errors import MissingFile

NAME = "tiny-moe-small.Q8_0.gguf"


def tiny_model_path() -> Path:
    """The embedded model, a stock GGUF. Raises MissingFile when the package was installed without its data."""
    path = Path(__file__).parent / "tiny" / NAME
    if not path.exists():
        raise MissingFile(f"{path}: the embedded model is missing; reinstall moe-edge, or name a model")
    return path
