"""/metrics for Prometheus: llama-server's names, and moe-edge's own beside them.

Counters of the engine are read when somebody asks; only what one reply took is counted here.
"""

from __future__ import annotations

from collections.abc import Iterator

from moe_edge.runner.memory import peak_rss_bytes
from moe_edge.runner.protocol import End
from moe_edge.runner.serve.service import Service
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

disable_created_metrics()  # type: ignore[no-untyped-call]  # a series of its own for the birth of each counter is noise
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
SECONDS_A_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)

# Of ServedModel.numbers(): name -> (is it a counter, what it is).
NUMBERS = {
    "expert_hits": (True, "Expert uses that found the expert in memory."),
    "expert_misses": (True, "Expert uses that had to wait for a read of their own."),
    "expert_bytes_read": (True, "Bytes of experts read from the disk."),
    "expert_evictions": (True, "Experts that left memory."),
    "stall_seconds": (True, "Time that computing waited for the disk."),
    "low_uses": (True, "Expert uses in low precision."),
    "skipped_uses": (True, "Expert uses that were left out."),
    "substituted_uses": (True, "Expert uses of tokens that went to another expert than the router chose."),
    "prefetched": (True, "Experts read ahead."),
    "prefetch_useful": (True, "Experts read ahead that were then used."),
    "prefetch_wasted": (True, "Experts read ahead that left unused."),
    "prefix_tokens_reused": (True, "Prompt tokens that a known conversation began with."),
    "conversations_held": (False, "Conversations in memory, the present one among them."),
    "held_bytes": (False, "Bytes of those beside the present one."),
    "conversations_restored": (True, "Conversations put back from memory."),
    "conversations_spilled": (True, "Conversations that left memory for others."),
    "budget_bytes": (False, "The memory that the model may take, --ram."),
    "arena_bytes": (False, "The part of it that holds experts."),
}


# Of each report of ServedModel.boards(): name -> (is it a counter, what it is).
OF_BOARDS = {
    "expert_uses": (True, "Experts that the board computed."),
    "expert_hits": (True, "Of those, found in its memory."),
    "expert_bytes_read": (True, "Bytes of experts read from its disk."),
    "stall_seconds": (True, "Time that computing waited for its disk."),
    "compute_seconds": (True, "Time that it spent on its layers, stalls included."),
    "network_seconds": (True, "Time that was waited for its answers beyond that."),
    "bytes_sent": (True, "Bytes that were sent to it."),
    "bytes_received": (True, "Bytes that came from it."),
    "rss_bytes": (False, "Memory that it holds."),
    "arena_bytes": (False, "The part that holds experts."),
    "up": (False, "1 while it answers."),
}


class Metrics:
    """Counts of one server."""

    def __init__(self, service: Service) -> None:
        self._registry = CollectorRegistry()
        self._prompt = self._counter("llamacpp:prompt_tokens", "Prompt tokens evaluated.")
        self._prompt_seconds = self._counter("llamacpp:prompt_seconds", "Time of evaluating prompts.")
        self._said = self._counter("llamacpp:tokens_predicted", "Tokens generated.")
        self._said_seconds = self._counter("llamacpp:tokens_predicted_seconds", "Time of generating.")
        self._cached = self._counter("moe_edge_cached_prompt_tokens", "Prompt tokens that were in the KV cache.")
        self._prompt_rate = self._gauge("llamacpp:prompt_tokens_seconds", "Prompt tokens a second, last reply.")
        self._said_rate = self._gauge("llamacpp:predicted_tokens_seconds", "Tokens a second, last reply.")
        self._replies = Counter(
            "moe_edge_replies", "Replies by how they ended.", ["finish"], registry=self._registry
        )
        self._ttft = Histogram(
            "moe_edge_ttft_seconds", "From a request to its first token, waiting included.", buckets=SECONDS,
            registry=self._registry,
        )  # fmt: skip
        self._tpot = Histogram(
            "moe_edge_tpot_seconds", "Of each token after the first.", buckets=SECONDS_A_TOKEN, registry=self._registry
        )
        self._registry.register(_OfTheModel(service))
        service.on_end = self.count

    def _counter(self, name: str, words: str) -> Counter:
        return Counter(name, words, registry=self._registry)

    def _gauge(self, name: str, words: str) -> Gauge:
        return Gauge(name, words, registry=self._registry)

    def count(self, end: End) -> None:
        """A reply is over."""
        usage = end.usage
        self._prompt.inc(usage.prompt_tokens - usage.cached_tokens)
        self._cached.inc(usage.cached_tokens)
        self._prompt_seconds.inc(usage.ttft_seconds)
        self._said.inc(usage.generated_tokens)
        self._said_seconds.inc(usage.decode_seconds)
        self._replies.labels(end.reason).inc()
        if usage.ttft_seconds > 0:
            self._prompt_rate.set((usage.prompt_tokens - usage.cached_tokens) / usage.ttft_seconds)
        if usage.generated_tokens > 0:
            self._ttft.observe(usage.queue_seconds + usage.ttft_seconds)
        if usage.generated_tokens > 1:
            self._said_rate.set(usage.tokens_per_second)
            self._tpot.observe(usage.decode_seconds / (usage.generated_tokens - 1))

    def count_failed(self) -> None:
        self._replies.labels("error").inc()

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _OfTheModel(Collector):
    """What the engine and the queue know now."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        s = self._service
        yield GaugeMetricFamily("llamacpp:requests_processing", "Requests being answered.", s.n_running)
        yield GaugeMetricFamily("llamacpp:requests_deferred", "Requests that wait.", s.n_waiting)
        yield GaugeMetricFamily("moe_edge_queue_limit", "Requests that may wait.", s.limit)
        yield GaugeMetricFamily("moe_edge_peak_rss_bytes", "Most memory this process has held.", peak_rss_bytes())
        model = s.loaded
        if model is None:
            return
        numbers = model.numbers()
        for name, (counts, words) in NUMBERS.items():
            if name in numbers:
                family = CounterMetricFamily if counts else GaugeMetricFamily
                yield family(f"moe_edge_{name}", words, numbers[name])
        boards = model.boards()
        for name, (counts, words) in OF_BOARDS.items() if boards else ():
            kind = CounterMetricFamily if counts else GaugeMetricFamily
            metric = kind(f"moe_edge_board_{name}", words, labels=["board"])
            for board in boards:
                metric.add_metric([board["board"]], float(board[name]))
            yield metric
