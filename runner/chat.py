"""`moe-edge chat`: a conversation in a terminal, and one shot from a pipe.

A model with a chat template is talked to through it; a model without one continues the text, which is what a base
model can do. What a model thinks before it answers is shown dimmed on a terminal and not at all in a pipe, and is no
part of the conversation.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TextIO

from moe_edge.models.errors import MoeEdgeError, Stopped, printable, sentence
from moe_edge.runner import terminal
from moe_edge.runner.chat_commands import run_command
from moe_edge.runner.chatformat.format import Message
from moe_edge.runner.chatformat.parts import Part, Reasoning, Text, ToolArguments, ToolStart
from moe_edge.runner.chatformat.plain import PlainParser
from moe_edge.runner.conversation import Conversation, Prompt
from moe_edge.runner.engine import Engine
from moe_edge.runner.generate import Generation, LookAheadState, Sampling, generate
from moe_edge.runner.message_input import read_message
from moe_edge.runner.template import ChatTemplate, template_text
from moe_edge.runner.tokens import find_tokens


def chat_template(engine: Engine) -> ChatTemplate | None:
    """The model's own template; None when it has none. Raises UsageError when it cannot be read."""
    text = template_text(engine.metadata)
    return ChatTemplate(text, engine.llama, engine.name) if text else None


@dataclass
class Interrupt:
    """Ctrl-C while a reply is made: the reply ends after the present token; before the first token, or when pressed
    again, at the next expert, which costs the KV cache."""

    engine: Engine
    pressed: int = 0
    replying: bool = False  # a token has come

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.pressed += 1
        if not self.replying or self.pressed > 1:
            self.engine.stop()

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        previous = signal.signal(signal.SIGINT, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)


class Shown:
    """The parts of a reply as the user sees them; `answer` is what becomes part of the conversation."""

    DIM, PLAIN = "\x1b[2m", "\x1b[0m"

    def __init__(self, out: TextIO) -> None:
        self.answer = ""
        self._out, self._terminal, self._dim = out, out.isatty(), False

    def add(self, parts: Sequence[Part]) -> None:
        for part in parts:
            if isinstance(part, Reasoning) and self._terminal:
                self._write(part.text, dim=True)
            elif isinstance(part, Text):
                self._write(part.text, dim=False)
                self.answer += part.text
            elif isinstance(part, ToolStart | ToolArguments) and self._terminal:
                self._write(f"{part.name} " if isinstance(part, ToolStart) else part.text, dim=True)

    def _write(self, text: str, *, dim: bool) -> None:
        if dim != self._dim:
            self._out.write(self.DIM if dim else f"{self.PLAIN}\n\n")
            self._dim = dim
        terminal.put(self._out, terminal.shown(text, self._out))

    def finish(self) -> None:
        """The reply is over, or was stopped."""
        terminal.put(self._out, f"{self.PLAIN}\n" if self._dim else "\n")


@dataclass
class Chat:
    """The terminal conversation. `out` gets replies, `err` everything else."""

    engine: Engine
    n_tokens: int = 512
    sampling: Sampling = field(default_factory=Sampling)
    out: TextIO = field(default_factory=lambda: sys.stdout)
    err: TextIO = field(default_factory=lambda: sys.stderr)
    last: Generation | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    last_question: str | None = None
    before_last: tuple[list[Message], str] = field(default_factory=lambda: ([], ""))  # for /retry

    def __post_init__(self) -> None:
        template = chat_template(self.engine)
        self.conversation = Conversation(self.engine, template, template_kwargs=dict(self.template_kwargs))

    def say(self, text: str) -> None:
        with contextlib.suppress(OSError):  # that it cannot be said is no reason to stop
            print(printable(text, terminal.LINES), file=self.err, flush=True)

    def reply(self, message: str) -> Generation | None:
        """One turn: prints the reply as it comes and the statistics line. None when it was stopped before a token.

        A turn without an answer is no part of the conversation: templates refuse an empty one.
        """
        c = self.conversation
        before = c.saved()
        self.last_question, self.before_last = message, before
        c.add("user", message)
        interrupt, shown = Interrupt(self.engine), Shown(self.out)
        result: Generation | None = None
        try:
            with interrupt.caught():
                prompt = c.prompt(self.n_tokens)
                if prompt.dropped:
                    self.say(f"(the context is full: {prompt.dropped} of the oldest messages are no longer seen)")
                if not interrupt.pressed:
                    result = self._generate(prompt, shown, interrupt)
        except Stopped:
            pass
        except MoeEdgeError:
            c.restore(before)
            raise
        finally:
            shown.finish()
        if shown.answer.strip() or c.template is None:
            c.add("assistant", shown.answer)
        else:
            c.restore(before)
        self.last = result
        self.say(result.line() if result is not None else "[stopped]")
        return result

    def _generate(self, prompt: Prompt, shown: Shown, interrupt: Interrupt) -> Generation:
        template = self.conversation.template
        parser = template.format.parser(prompt.text, ()) if template else PlainParser()
        visible = find_tokens(self.engine.llama, template.format.tags) if template else frozenset()

        def show(text: str) -> None:
            interrupt.replying = True
            shown.add(parser.feed(text))

        result = generate(
            self.engine, prompt.tokens, self.n_tokens, self.sampling,
            on_text=show, stop=prompt.stop, visible=visible, should_stop=lambda: interrupt.pressed > 0,
        )  # fmt: skip
        shown.add(parser.finish())
        return result

    def command(self, line: str) -> bool:
        """Run a /command; False to leave. What is wrong with it is said."""
        try:
            return run_command(self, line)
        except MoeEdgeError as error:
            self.say(f"error: {sentence(error)}")
            return True

    def stats(self) -> str:
        total = self.engine.counters()
        lines = [] if self.last is None else [f"last reply {self.last.line()}"]
        rate = 100 * total.hits / total.uses if total.uses else 0.0
        lines.append(
            f"session: {total.uses} expert uses, {rate:.0f} % hits, {total.loads} loads, {total.evictions} evictions, "
            f"{total.bytes_read / 2**20:.0f} MiB read, {total.stall_seconds:.1f} s waited for the disk, "
            f"policy {self.engine.policy.name}, {total.low_uses} low-precision uses, {total.skipped_uses} skipped, "
            f"{total.substituted_uses} substituted"
        )
        ahead = LookAheadState.of(self.engine.policy)
        if ahead is not None:
            lines.append(f"session: {ahead.text(total)}")
        lines += self.engine.plan.lines() + self.engine.board_lines()
        return "\n".join(lines)

    def loop(self) -> None:
        """Read messages until /exit or Ctrl-D."""
        if self.conversation.template is None:
            self.say("(this model has no chat template: it continues the text you type)")
        self.say("/help lists the commands; Ctrl-C stops a reply, Ctrl-D leaves")
        while True:
            try:
                message = read_message()
            except EOFError:
                self.say("")
                return
            except KeyboardInterrupt:
                self.say("(Ctrl-D or /exit leaves)")
                continue
            if not message.strip():
                continue
            if message.startswith("/") and "\n" not in message:
                if not self.command(message.strip()):
                    return
                continue
            try:
                self.reply(message)
            except MoeEdgeError as e:
                self.say(f"error: {sentence(e)}")
