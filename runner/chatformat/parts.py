"""The parts of a reply: what a parser makes of a model's raw text, and what is shown and kept of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """A piece of the answer; whole characters."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """A piece of the thinking that some models show before their answer."""

    text: str


@dataclass(frozen=True)
class ToolStart:
    """A tool call begins. index: from 0, in this reply. id: made by us."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ToolArguments:
    """A piece of the call's arguments, which together are one JSON object."""

    index: int
    text: str


@dataclass(frozen=True)
class ToolEnd:
    """The call's arguments are whole."""

    index: int


Part = Text | Reasoning | ToolStart | ToolArguments | ToolEnd
