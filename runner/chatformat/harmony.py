"""gpt-oss: OpenAI's harmony format. A reply is a row of messages, each on a channel.

`<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...`: analysis is the thinking,
final the answer, commentary a call to a tool when it has a recipient (`to=functions.NAME`), else words for the user.
The tags are control tokens, so the text must be made with their names in it. OpenAI's template raises when it is given
a content with tags in it: the history holds the answer alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moe_edge.runner.chatformat.calls import new_call_id
from moe_edge.runner.chatformat.format import ChatFormat, Message, StreamParser, held_back
from moe_edge.runner.chatformat.forms import CallForm, JsonArguments, Thinking
from moe_edge.runner.chatformat.gbnf import optional, quote
from moe_edge.runner.chatformat.parts import Part, Reasoning, Text, ToolArguments, ToolEnd, ToolStart
from moe_edge.runner.chatformat.think import least_effort

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
TAGS = (START, CHANNEL, MESSAGE, CONSTRAIN, END, CALL, RETURN)
_RECIPIENT = re.compile(r"to=(?:functions\.)?([^\s<]+)")
_CHANNEL = re.compile(re.escape(CHANNEL) + r"\s*(\w+)")


# What a message's header is made of; the rest of it is words of a model that does not keep to the format.
_HEADER = re.compile(
    r"<\|start\|>\s*\w*|<\|channel\|>\s*\w*|<\|constrain\|>\s*\w*|\bto=\S*|(?<!\S)(?:json|code)(?!\S)|"
    + "|".join(map(re.escape, TAGS))
)  # fmt: skip


class HarmonyParser(StreamParser):
    """One message after the other. calls: whether there are tools; without them a call is words."""

    def __init__(self, calls: bool = True) -> None:
        self._calls, self._n_tools = calls, 0
        super().__init__()

    def _parts(self) -> Iterator[Part | None]:
        while True:
            header, mark = "", None
            while mark is None:
                text, mark = self.scan.until([MESSAGE, END, CALL, RETURN])
                header += text
                if mark is None and self.scan.ended:
                    break
                if mark is None:
                    yield None
            words = _HEADER.sub("", header[: len(header) - held_back(header, TAGS)] if mark is None else header)
            if words.strip():
                yield Text(words)
            if mark is None:
                return
            if mark == MESSAGE:
                yield from self._message(header)

    def _message(self, header: str) -> Iterator[Part | None]:
        channel = found[1] if (found := _CHANNEL.search(header)) else "final"
        recipient = found[1] if (found := _RECIPIENT.search(header)) else None
        tool = self._calls and recipient is not None and channel != "analysis"
        if tool:
            index, self._n_tools = self._n_tools, self._n_tools + 1
            yield ToolStart(index, new_call_id(), recipient or "")
        while True:
            text, mark = self.scan.until([END, CALL, RETURN, START, CHANNEL])
            if tool and mark is None and self.scan.ended:
                text = text[: len(text) - held_back(text, TAGS)]  # a tag that was cut is no argument
            if text:
                yield ToolArguments(index, text) if tool else Reasoning(text) if channel == "analysis" else Text(text)
            if mark is not None or self.scan.ended:
                if tool:
                    yield ToolEnd(index)
                if mark in (START, CHANNEL):
                    self.scan.text = mark + self.scan.text
                return
            yield None


def answers_only(messages: list[Message]) -> list[Message]:
    """Contents without channels, should a client send them back; thinking under the name this template looks for.

    The template keeps the thinking of a message that calls tools, while the turn goes on.
    """
    cleaned = []
    for each in messages:
        message = dict(each)
        if message.get("role") == "assistant":
            content = message.get("content")
            if isinstance(content, str) and any(tag in content for tag in TAGS):
                parser = HarmonyParser()
                parts = parser.feed(content) + parser.finish()
                message["content"] = "".join(part.text for part in parts if isinstance(part, Text))
            thinking = message.pop("reasoning_content", None)
            if thinking and message.get("tool_calls"):
                message["thinking"] = thinking
        cleaned.append(message)
    return cleaned


def make_parser(prompt: str, tools: Sequence[Mapping[str, Any]]) -> HarmonyParser:
    return HarmonyParser(bool(tools))


THINKING = Thinking(
    f"{CHANNEL}analysis{MESSAGE}", END, after=quote(f"{START}assistant"), answer=quote(f"{CHANNEL}final{MESSAGE}"),
    always=True, bare=False,
)  # fmt: skip
# As the template writes a call, and as the models like to; a reply ends with its first.
FORMS = tuple(
    CallForm(head, optional(quote(CALL)), JsonArguments(guard=TAGS))
    for head in (
        lambda name: quote(f" to=functions.{name}{CHANNEL}commentary json{MESSAGE}"),
        lambda name: quote(f"{CHANNEL}commentary to=functions.{name} {CONSTRAIN}json{MESSAGE}"),
    )
)

FORMAT = ChatFormat(
    "harmony", 10, lambda template: CHANNEL in template and MESSAGE in template, make_parser, tags=TAGS,
    prepare=answers_only, settings=least_effort, thinking=THINKING, calls=lambda template: FORMS,
)  # fmt: skip
