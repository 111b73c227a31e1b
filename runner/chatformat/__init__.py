"""Chat formats: how a family of models marks its thinking, its tool calls and its answer.

One file a format; this one only collects them. To add a format, write a file that ends with `FORMAT = ChatFormat(...)`.
It is chosen by what the model's own chat template contains, see ChatFormat.recognises.
"""

from __future__ import annotations

from moe_edge.models.registry import collect
from moe_edge.runner.chatformat.format import ChatFormat

FORMATS = collect(__name__, __path__, "FORMAT", ChatFormat)


def find_format(template: str) -> ChatFormat:
    """The format of a model by its chat template: the first that recognises it; the last one takes all."""
    return next(each for each in FORMATS.values() if each.recognises(template))
