"""How many bytes of a prompt's next layer to read ahead, from what the layers before it took.

Pure: sums of the engine in, bytes out. Places for what is read ahead hold nothing else, so each micro-batch reads that
much more; but each layer hides that much less. So what pays is what the disk can read between two MoE layers, while
attention is computed, and only where computing waits for reads at all. Source: FIRM-MoE's resource-adaptive preloading
(PAPERS.md, section 3); measured in docs/LOG.md, 2026-11-28.
"""

from __future__ import annotations

from dataclasses import dataclass

# Of the arena: where the window starts, and where it ends however long attention takes.
PROMPT_SHARE = 0.03
MOST_SHARE = 0.25
# What a layer does not wait for may be too much: so much of the window goes.
DECAY = 0.05
# Of a layer's time: waiting that is no reason to read more.
LEAST_STALL = 0.01


@dataclass(frozen=True)
class PromptSums:
    """Sums since some start. seconds: of the clock; step_seconds: of them within MoE layers, stall_seconds: waiting for
    reads there; disk_busy_seconds: with a read in flight. bytes_read: by them, as many as they take unpacked: the
    window is of places in memory."""

    seconds: float
    step_seconds: float
    stall_seconds: float
    disk_busy_seconds: float
    bytes_read: int


class PromptWindow:
    """The window of one prompt. bytes: of the next layer's experts, besides those that free room takes.

    layer() is fed once a layer, with sums at the moment when its reads have been asked for. begin() starts anew;
    first_layer() a micro-batch, before whose layer there is more than one attention.
    """

    def __init__(self, arena_bytes: int) -> None:
        self._least, self._most = PROMPT_SHARE * arena_bytes, MOST_SHARE * arena_bytes
        self.begin()

    def begin(self) -> None:
        self.bytes = self._least
        self._last: PromptSums | None = None

    def first_layer(self, now: PromptSums) -> None:
        self._last = now

    def layer(self, now: PromptSums) -> None:
        """A layer's reads have been asked for: what the layer before it took is known."""
        last, self._last = self._last, now
        if last is None:
            return
        seconds, stall = now.seconds - last.seconds, now.stall_seconds - last.stall_seconds
        busy, nbytes = now.disk_busy_seconds - last.disk_busy_seconds, now.bytes_read - last.bytes_read
        if stall <= LEAST_STALL * seconds:
            self.bytes = max(self._least, (1 - DECAY) * self.bytes)
        elif busy > 0:
            between = max(0.0, seconds - (now.step_seconds - last.step_seconds))
            self.bytes = min(self._most, max(self._least, nbytes / busy * between))
