"""A model without a model: it answers what it was told to, so that fronts are tested in milliseconds.

Its tokens are the bytes of UTF-8 text. It obeys limits, stop texts and stop() as the real one does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moe_edge.runner.protocol import (
    ContextFull,
    Emit,
    End,
    Event,
    ModelFacts,
    Prepared,
    Progress,
    Request,
    Text,
    ToolStart,
    Usage,
    traded_of,
)

Script = Callable[[Request], Sequence[Event | BaseException]]


def says(text: str, *, piece: int = 3) -> Script:
    """Answer every request with this text, a few characters at a time."""
    return lambda request: [Text(text[at : at + piece]) for at in range(0, len(text), piece)]


class FakeModel:
    """script: request -> the events of its reply, without the End; an exception among them is raised there.

    prefill_seconds: how long a prompt takes, in steps of 10 ms between which it can be stopped. token_seconds: how
    long every event takes.
    """

    def __init__(
        self,
        script: Script | None = None,
        *,
        n_ctx: int = 4096,
        name: str = "fake",
        prefill_seconds: float = 0.0,
        token_seconds: float = 0.0,
    ) -> None:
        self.script = script or says("Hello there.")
        self.facts = ModelFacts(name, "fakemoe", n_ctx, size_bytes=1000, quantization="F32", created=1_700_000_000)
        self.requests: list[Request] = []
        self.closed = False
        self.running = 0
        self._prefill_seconds, self._token_seconds = prefill_seconds, token_seconds
        self._stop = threading.Event()

    def render(self, request: Request) -> str:
        if request.messages is None:
            return request.prompt if isinstance(request.prompt, str) else bytes(request.prompt).decode()
        return "".join(f"<{m['role']}>{m.get('content') or ''}</{m['role']}>" for m in request.messages) + "<assistant>"

    def prepare(self, request: Request) -> Prepared:
        tokens = tuple(self.tokenize(self.render(request), special=True, add_bos=False))
        if len(tokens) >= self.facts.n_ctx:
            raise ContextFull(
                f"the prompt has {len(tokens)} tokens but the context holds {self.facts.n_ctx}",
                len(tokens), self.facts.n_ctx,
            )  # fmt: skip
        room = self.facts.n_ctx - len(tokens)
        return Prepared(request, tokens, min(room, room if request.n_tokens is None else request.n_tokens))

    def run(self, prepared: Prepared, emit: Emit) -> End:
        self._stop.clear()
        self.requests.append(prepared.request)
        self.running += 1
        try:
            return self._run(prepared, emit)
        finally:
            self.running -= 1

    def _run(self, prepared: Prepared, emit: Emit) -> End:
        started, total = time.monotonic(), len(prepared.tokens)
        n = 0

        def end(reason: str, stop_text: str | None = None) -> End:
            traded = traded_of(
                hits=3, uses=4, bytes_read=100, low=0, skipped=0, expected_kld=None, policy=self.facts.policy
            )
            return End(reason, Usage(total, 0, n, 0, 0.0, 0.01, time.monotonic() - started, traded), stop_text)

        emit(Progress(0, total))
        while time.monotonic() - started < self._prefill_seconds:
            if self._stop.wait(0.01):
                return end("cancelled")
        emit(Progress(total, total))
        said, called = "", False
        for event in self.script(prepared.request):
            if self._stop.wait(self._token_seconds) if self._token_seconds else self._stop.is_set():
                return end("cancelled")
            if isinstance(event, BaseException):
                raise event
            n += 1
            called |= isinstance(event, ToolStart)
            if isinstance(event, Text):
                said += event.text
                for text in prepared.request.stop:
                    if text in said:
                        before = said[: said.index(text)][len(said) - len(event.text) :]
                        if before:
                            emit(Text(before))
                        return end("stop", text)
            emit(event)
            if n >= prepared.n_tokens:
                return end("length")
        return end("tool_calls" if called else "stop")

    def stop(self) -> None:
        self._stop.set()

    def tokenize(self, text: str, *, special: bool, add_bos: bool) -> list[int]:
        return list(text.encode(errors="surrogateescape"))

    def pieces(self, tokens: Sequence[int]) -> list[bytes]:
        return [bytes([token]) for token in tokens]

    def numbers(self) -> Mapping[str, float]:
        return {"expert_hits": 3.0, "expert_uses": 4.0, "expert_bytes_read": 100.0, "budget_bytes": 1e6}

    def picture(self) -> Mapping[str, Any]:
        return {"memory": [["dense", 1], ["experts", 2]], "layers": [2, 2], "resident": [[0, 1], [0]]}

    def close(self) -> None:
        self.closed = True
