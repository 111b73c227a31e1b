"""A model without a model: it answers what it was told to, so that the server is tested in milliseconds.

Its tokens are the bytes of UTF-8 text. It obeys limits, stop texts and stop() as the real one does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moe_edge.models.errors import UsageError
from moe_edge.runner.chatformat.parts import Part, Text, ToolStart
from moe_edge.runner.events import Progress, TokenLogprob
from moe_edge.runner.protocol import (
    Emit,
    End,
    Logprobs,
    ModelFacts,
    Prepared,
    Request,
    Usage,
    check_fits,
    traded_of,
)

Script = Callable[[Request], Sequence[Part | BaseException]]


def says(text: str, *, piece: int = 3) -> Script:
    """Answer every request with this text, a few characters at a time."""
    return lambda request: [Text(text[at : at + piece]) for at in range(0, len(text), piece)]


class FakeModel:
    """script: request -> the parts of its reply; an exception among them is raised there.

    prefill_seconds: how long a prompt takes. token_seconds: how long every part takes. Both can be stopped.
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
        self.facts = ModelFacts(
            name, "fakemoe", n_ctx, n_vocab=256, size_bytes=1000, n_params=250, quantization="F32",
            created=1_700_000_000, capabilities=("completion", "tools"),
        )  # fmt: skip
        self.requests: list[Request] = []
        self.closed = False
        self.running = 0
        self.cancelled = 0
        self.prefill_seconds, self.token_seconds = prefill_seconds, token_seconds
        self._stopped = threading.Event()

    def render(self, request: Request) -> str:
        if request.messages is None:
            prompt = request.prompt
            return prompt if isinstance(prompt, str) else b"".join(self.pieces(prompt)).decode(errors="replace")
        if any(message.get("content") == "REFUSE" for message in request.messages):
            raise UsageError("the model's chat template refuses this conversation")
        return "".join(f"<{m['role']}>{m.get('content') or ''}</{m['role']}>" for m in request.messages) + "<assistant>"

    def prepare(self, request: Request) -> Prepared:
        tokens = tuple(self.tokenize(self.render(request), special=True, add_bos=False))
        check_fits(len(tokens), self.facts.n_ctx)
        room = self.facts.n_ctx - len(tokens)
        return Prepared(request, tokens, min(room, room if request.n_tokens is None else request.n_tokens))

    def run(self, prepared: Prepared, emit: Emit, should_stop: Callable[[], bool]) -> End:
        assert self.running == 0, "two replies at a time"
        self._stopped.clear()
        self.requests.append(prepared.request)
        self.running += 1
        try:
            end = self._run(prepared, emit, should_stop)
            self.cancelled += end.reason == "cancelled"
            return end
        finally:
            self.running -= 1

    def _wait(self, seconds: float, should_stop: Callable[[], bool]) -> bool:
        """True when the wait was stopped."""
        until = time.monotonic() + seconds
        while not should_stop():
            left = until - time.monotonic()
            if left <= 0:
                return False
            self._stopped.wait(min(0.01, left))
        return True

    def _run(self, prepared: Prepared, emit: Emit, should_stop: Callable[[], bool]) -> End:
        request, started, total = prepared.request, time.monotonic(), len(prepared.tokens)
        n, said, called = 0, "", False

        def end(reason: str, stop_text: str | None = None) -> End:
            traded = traded_of(
                hits=3, uses=4, bytes_read=100, low=0, skipped=0, substituted=0, expected_kld=None,
                policy=self.facts.policy,
            )
            return End(reason, Usage(total, 0, n, 0, 0.0, 0.01, time.monotonic() - started, traded), stop_text)

        emit(Progress(0, total))
        if self._wait(self.prefill_seconds, should_stop):
            return end("cancelled")
        emit(Progress(total, total))
        for part in self.script(request):
            if self._wait(self.token_seconds, should_stop):
                return end("cancelled")
            if isinstance(part, BaseException):
                raise part
            n += 1
            called |= isinstance(part, ToolStart)
            if isinstance(part, Text):
                said += part.text
                found = min(((said.index(text), text) for text in request.stop if text in said), default=None)
                if found is not None:
                    if before := said[: found[0]][len(said) - len(part.text) :]:
                        emit(Text(before))
                    return end("stop", found[1])
                if request.logprobs is not None:
                    data = part.text.encode()
                    top = tuple((each, bytes([each]), -1.0 - each) for each in range(request.logprobs))
                    emit(Logprobs((TokenLogprob(data[0] if data else 0, data, -0.5, top),)))
            emit(part)
            if n >= prepared.n_tokens:
                return end("length")
        return end("tool_calls" if called else "stop")

    def stop(self) -> None:
        self._stopped.set()

    def tokenize(self, text: str, *, special: bool, add_bos: bool) -> list[int]:
        return list(text.encode(errors="surrogateescape"))

    def pieces(self, tokens: Sequence[int]) -> list[bytes]:
        if wrong := [token for token in tokens if not 0 <= token < 256]:
            raise UsageError(f"token {wrong[0]} is not in the vocabulary, which has 256")
        return [bytes([token]) for token in tokens]

    def numbers(self) -> Mapping[str, float]:
        return {"expert_uses": 4.0, "expert_hits": 3.0, "expert_misses": 1.0, "expert_bytes_read": 100.0,
                "tokens": 1.0, "budget_bytes": 1e6}  # fmt: skip

    def boards(self) -> Sequence[Mapping[str, Any]]:
        return ()

    def picture(self) -> Mapping[str, Any]:
        return {"memory": [{"name": "dense", "bytes": 1}, {"name": "experts", "bytes": 2}], "layers": [0, 1],
                "resident": [[0, 1], [0]], "levels": ["high"]}  # fmt: skip

    def recency(self) -> bytes:
        return bytes([0, 255, 0])

    def close(self) -> None:
        self.closed = True
