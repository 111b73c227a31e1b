"""The access log: one line for each request, for people or as JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from moe_edge.models.errors import printable
from moe_edge.runner.protocol import End

QUIET = ("/health", "/v1/health", "/metrics", "/moe-edge/picture", "/moe-edge/live")  # asked by machines all the time


@dataclass
class Entry:
    """What is known of one request by its end. finish: of a reply, else empty."""

    method: str
    path: str
    client: str = ""
    started: float = field(default_factory=time.monotonic)
    status: int = 0
    end: End | None = None
    finish: str = ""

    def as_dict(self) -> dict[str, Any]:
        known: dict[str, Any] = {
            "time": time.time(), "client": self.client, "method": self.method, "endpoint": self.path,
            "status": self.status, "total_s": round(time.monotonic() - self.started, 4),
        }  # fmt: skip
        if self.finish:
            known["finish"] = self.finish
        if self.end is not None:
            u = self.end.usage
            known |= {
                "prompt": u.prompt_tokens, "cached": u.cached_tokens, "generated": u.generated_tokens,
                "queue_s": round(u.queue_seconds, 4), "ttft_s": round(u.ttft_seconds, 4),
                "tok_s": round(u.tokens_per_second, 2), "moe_edge": dict(u.traded),
            }  # fmt: skip
        return known

    def line(self) -> str:
        d = self.as_dict()
        said = f"{self.method} {self.path} {self.status}"
        if self.end is not None:
            said += (
                f" prompt {d['prompt']} cached {d['cached']} ttft {d['ttft_s']:.2f} s, "
                f"{d['generated']} tokens at {d['tok_s']:.1f} tok/s"
            )
            if d["queue_s"] >= 0.01:
                said += f", waited {d['queue_s']:.2f} s"
        if self.finish:
            said += f", {self.finish}"
        return f"{said}, total {d['total_s']:.2f} s"


class AccessLog:
    """say: writes a line. as_json: one object a line."""

    def __init__(self, say: Callable[[str], None], *, as_json: bool = False) -> None:
        self._say, self._as_json = say, as_json

    def write(self, entry: Entry) -> None:
        if entry.path in QUIET and entry.status < 400:
            return
        if self._as_json:
            self._say(json.dumps(entry.as_dict(), separators=(",", ":")))
        else:
            self._say(printable(entry.line()))
