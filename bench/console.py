"""What the console of the server's page costs the server: processor time of a poll of /moe-edge/live.

    python bench/console.py --layers 48 --experts 128 --polls 400

A fake model with a real expert cache, half full, behind the real HTTP server. The client is in the same process, so its
part is counted too. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import http.client
import json
import threading
import time
from types import SimpleNamespace
from typing import Any

from moe_edge.runner.fake import FakeModel
from moe_edge.runner.serve.engine_model import EngineModel
from moe_edge.runner.serve.server import Running, ServerOptions
from moe_edge.schedulers.cache import ExpertCache
from moe_edge.schedulers.layout import Layout

POLLS_A_SECOND = 2  # what the page asks while a reply is written


class Modelled(FakeModel):
    """Packs the experts as EngineModel does."""

    def __init__(self, layers: int, experts: int) -> None:
        super().__init__()
        n = layers * experts
        layout = Layout((experts,) * layers, 1, (4096,) * n)
        cache = ExpertCache(layout, 4096 * (n // 2))
        for unit in range(0, n, 2):
            cache.add(unit)
        self._as_engine: Any = SimpleNamespace(
            _engine=SimpleNamespace(layout=layout, policy=SimpleNamespace(cache=cache))
        )

    def recency(self) -> bytes:
        return EngineModel.recency(self._as_engine)


def measure(port: int, polls: int) -> tuple[int, float]:
    """(bytes of an answer, seconds of processor time a poll)."""
    connection = http.client.HTTPConnection("127.0.0.1", port)

    def poll() -> int:
        connection.request("GET", "/moe-edge/live")
        return len(connection.getresponse().read())

    n_bytes = [poll() for _ in range(20)][-1]
    started = time.process_time()
    for _ in range(polls):
        poll()
    connection.close()
    return n_bytes, (time.process_time() - started) / polls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--polls", type=int, default=400)
    o = parser.parse_args()
    running = Running(ServerOptions(port=0), lambda line: None)
    worker = threading.Thread(target=running.work, args=(Modelled(o.layers, o.experts),))
    worker.start()
    try:
        while running.service.loaded is None:
            time.sleep(0.01)
        n_bytes, seconds = measure(running.port, o.polls)
    finally:
        running.close()
        worker.join()
    share = POLLS_A_SECOND * seconds
    print(f"{n_bytes} bytes and {1000 * seconds:.2f} ms of processor time a poll: {100 * share:.2f} % of a core")
    print(json.dumps({"layers": o.layers, "experts": o.experts, "bytes": n_bytes, "seconds_a_poll": seconds,
                      "core_share": share}))  # fmt: skip


if __name__ == "__main__":
    main()
