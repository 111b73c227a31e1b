"""`moe-edge chat`: a conversation in a terminal, and one shot from a pipe.

A model with a chat template is talked to through it (llama-cpp-python renders it); a model without one continues the
text, which is what a base model can do.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TextIO

from moe_edge.models.errors import MoeEdgeError, Stopped, UsageError, printable, sentence
from moe_edge.runner import terminal
from moe_edge.runner.engine import Engine
from moe_edge.runner.generate import Generation, LookAheadState, Sampling, generate, tokenize

HELP = """\
/help          this list
/clear         forget the conversation
/stats         what the last reply and the whole session read and hit
/exit          leave (also Ctrl-D)
\"\"\"            begin and end a message of several lines
Ctrl-C         stop the reply"""


@dataclass
class Conversation:
    """Messages so far, and how to turn them into a prompt."""

    engine: Engine
    template: Any = None  # llama-cpp-python's formatter, or None for a base model
    messages: list[dict[str, str]] = field(default_factory=list)
    text: str = ""  # base model: the running text

    def add(self, role: str, content: str) -> None:
        if self.template is None:
            self.text += content
        else:
            self.messages.append({"role": role, "content": content})

    def saved(self) -> tuple[list[dict[str, str]], str]:
        """The conversation as it is, for restore() after a turn that failed."""
        return list(self.messages), self.text

    def restore(self, saved: tuple[list[dict[str, str]], str]) -> None:
        self.messages, self.text = saved

    def clear(self) -> None:
        self.messages.clear()
        self.text = ""

    def _render(self, messages: list[dict[str, str]]) -> Any:
        try:
            return self.template(messages=messages)
        except Exception as e:  # a template is a program of the model's author: it may raise anything
            raise UsageError(f"the model's chat template refuses this conversation: {e}") from e

    def prompt(self, n_reply: int) -> tuple[list[int], list[str], int]:
        """(tokens, stop texts, messages dropped): the oldest turns go when the context is too small for all."""
        n_ctx = int(self.engine.llama.n_ctx())
        room = max(n_ctx - n_reply, n_ctx // 2)
        if self.template is None:
            tokens = tokenize(self.engine, self.text)
            return tokens[-room:], [], 0
        dropped = 0
        while True:
            r = self._render(self.messages[dropped:])
            tokens = tokenize(self.engine, r.prompt, special=True, add_bos=not r.added_special)
            if len(tokens) <= room or dropped + 1 >= len(self.messages):
                break
            dropped += 2 if dropped + 2 < len(self.messages) else 1
        del self.messages[:dropped]
        stop = [r.stop] if isinstance(r.stop, str) else list(r.stop or [])
        return tokens, stop, dropped


def chat_template(engine: Engine) -> Any:
    """llama-cpp-python's formatter for the model's own template; None when the model has none."""
    text = engine.llama.metadata.get("tokenizer.chat_template")
    if not text:
        return None
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    llama = engine.llama

    def piece(token: int) -> str:
        return llama._model.token_get_text(token) if token != -1 else ""

    return Jinja2ChatFormatter(
        template=text,
        eos_token=piece(llama.token_eos()),
        bos_token=piece(llama.token_bos()),
        stop_token_ids=[llama.token_eos()],
    )


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


@dataclass
class Chat:
    """The terminal conversation. `out` gets replies, `err` everything else."""

    engine: Engine
    n_tokens: int = 512
    sampling: Sampling = field(default_factory=Sampling)
    out: TextIO = field(default_factory=lambda: sys.stdout)
    err: TextIO = field(default_factory=lambda: sys.stderr)
    last: Generation | None = None

    def __post_init__(self) -> None:
        self.conversation = Conversation(self.engine, chat_template(self.engine))

    def say(self, text: str) -> None:
        with contextlib.suppress(OSError):  # that it cannot be said is no reason to stop
            print(printable(text, terminal.LINES), file=self.err, flush=True)

    def reply(self, message: str) -> Generation | None:
        """One turn: prints the reply as it comes and the statistics line. None when it was stopped before a token."""
        c = self.conversation
        before = c.saved()
        c.add("user", message)
        shown: list[str] = []
        interrupt = Interrupt(self.engine)

        def show(text: str) -> None:
            interrupt.replying = True
            shown.append(text)
            terminal.put(self.out, terminal.shown(text, self.out))

        result: Generation | None = None
        try:
            with interrupt.caught():
                tokens, stop, dropped = c.prompt(self.n_tokens)
                if dropped:
                    self.say(f"(the context is full: {dropped} of the oldest messages are no longer seen)")
                if not interrupt.pressed:
                    result = generate(
                        self.engine, tokens, self.n_tokens, self.sampling,
                        on_text=show, stop=stop, should_stop=lambda: interrupt.pressed > 0,
                    )  # fmt: skip
        except Stopped:
            pass
        except MoeEdgeError:
            c.restore(before)
            raise
        finally:
            terminal.put(self.out, "\n")
        c.add("assistant", "".join(shown))
        self.last = result
        self.say(result.line() if result is not None else "[stopped]")
        return result

    def command(self, line: str) -> bool:
        """Run a /command; False to leave."""
        name = line.split()[0]
        if name in ("/exit", "/quit", "/bye"):
            return False
        if name == "/clear":
            self.conversation.clear()
            self.engine.new_conversation()
            self.say("(forgotten)")
        elif name == "/stats":
            self.say(self.stats())
        elif name == "/help":
            self.say(HELP)
        else:
            self.say(f"unknown command {name}; /help lists them")
        return True

    def stats(self) -> str:
        total = self.engine.counters()
        lines = [] if self.last is None else [f"last reply {self.last.line()}"]
        rate = 100 * total.hits / total.uses if total.uses else 0.0
        lines.append(
            f"session: {total.uses} expert uses, {rate:.0f} % hits, {total.loads} loads, {total.evictions} evictions, "
            f"{total.bytes_read / 2**20:.0f} MiB read, {total.stall_seconds:.1f} s waited for the disk, "
            f"policy {self.engine.policy.name}, {total.low_uses} low-precision uses, {total.skipped_uses} skipped"
        )
        ahead = LookAheadState.of(self.engine.policy)
        if ahead is not None:
            lines.append(f"session: {ahead.text(total)}")
        lines += self.engine.plan.lines()
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


def read_message() -> str:
    """One message from the terminal; a line of \"\"\" begins a message of several lines, another ends it."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for input())
    line = input("> ")
    if not line.startswith('"""'):
        return line
    lines = [line[3:]]
    while not lines[-1].rstrip().endswith('"""'):
        lines.append(input("... "))
    lines[-1] = lines[-1].rstrip()[:-3]
    return "\n".join(lines).strip("\n")
