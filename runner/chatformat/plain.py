"""A model whose replies are nothing but the answer."""

from __future__ import annotations

from collections.abc import Iterator

from moe_edge.runner.chatformat.format import ChatFormat, StreamParser
from moe_edge.runner.chatformat.parts import Part


class PlainParser(StreamParser):
    """All of it is text."""

    def _parts(self) -> Iterator[Part | None]:
        yield from self._rest()


FORMAT = ChatFormat("plain", 1000, lambda template: True, lambda prompt, tools: PlainParser())
