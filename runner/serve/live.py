"""GET /moe-edge/live: what the console of the page draws again and again, small enough to be asked twice a second."""

from __future__ import annotations

from base64 import b64encode
from typing import Any

from moe_edge.runner.memory import peak_rss_bytes
from moe_edge.runner.protocol import ServedModel
from moe_edge.runner.serve.service import Service


def live_json(service: Service, model: ServedModel) -> dict[str, Any]:
    """Counters, the queue, and a byte for each expert and level, as base64. See docs/SERVER.md."""
    return {
        "numbers": dict(model.numbers()),
        "recency": b64encode(model.recency()).decode(),
        "running": service.n_running,
        "waiting": service.n_waiting,
        "queue_limit": service.limit,
        "peak_rss_bytes": peak_rss_bytes(),
    }
