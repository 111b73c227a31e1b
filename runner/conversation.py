"""A conversation: messages so far, and how they become the tokens of a prompt that fits the context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe_edge.runner.chatformat.format import Message
from moe_edge.runner.engine import Engine
from moe_edge.runner.template import ChatTemplate
from moe_edge.runner.tokens import tokenize


@dataclass(frozen=True)
class Prompt:
    """tokens: what to evaluate. text: as rendered. stop: texts that end the reply. dropped: messages left out for good,
    the oldest ones."""

    tokens: list[int]
    text: str
    stop: list[str] = field(default_factory=list)
    dropped: int = 0


@dataclass
class Conversation:
    """Messages so far. template None: a base model, whose text goes on. template_kwargs: what the template is told."""

    engine: Engine
    template: ChatTemplate | None = None
    messages: list[Message] = field(default_factory=list)
    text: str = ""
    tools: Sequence[Mapping[str, Any]] = ()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def add(self, role: str, content: str) -> None:
        if self.template is None:
            self.text += content
        else:
            self.messages.append({"role": role, "content": content})

    def saved(self) -> tuple[list[Message], str]:
        """The conversation as it is, for restore() after a turn that failed."""
        return list(self.messages), self.text

    def restore(self, saved: tuple[list[Message], str]) -> None:
        self.messages, self.text = saved

    def clear(self) -> None:
        self.messages.clear()
        self.text = ""

    def prompt(self, n_reply: int) -> Prompt:
        """The prompt, with room for a reply of n_reply tokens, or for half a context if that is less.

        When the context is full, the oldest messages go, down to half of it at once: one turn at a time would change
        the beginning of every prompt from then on, and nothing of the KV cache could be used again. The system message
        stays. Raises UsageError when the template refuses the messages.
        """
        n_ctx = self.engine.n_ctx
        room = max(n_ctx - n_reply, n_ctx // 2)
        if self.template is None:
            tokens = tokenize(self.engine.llama, self.text, special=False, add_bos=True)
            return Prompt(tokens if len(tokens) <= room else tokens[-(n_ctx // 2) :], self.text)
        dropped = 0
        tokens, text = self._tokens(self.messages)
        while len(tokens) > (room if dropped == 0 else n_ctx // 2):
            shorter = without_oldest_turn(self.messages)
            if len(shorter) == len(self.messages):
                break
            dropped += len(self.messages) - len(shorter)
            self.messages = shorter
            tokens, text = self._tokens(self.messages)
        stop = [self.template.eos_text] if self.template.eos_text else []
        return Prompt(tokens, text, stop, dropped)

    def _tokens(self, messages: Sequence[Message]) -> tuple[list[int], str]:
        assert self.template is not None
        return self.template.tokens(messages, self.tools, **self.template_kwargs)


def without_oldest_turn(messages: list[Message]) -> list[Message]:
    """The messages but for the oldest question and all that answers it; the last question stays whatever it is."""
    head = [message for message in messages[:1] if message["role"] == "system"]
    rest = messages[len(head) :]
    later = [at for at, message in enumerate(rest) if at > 0 and message["role"] == "user"]
    return head + rest[later[0] :] if later else messages
