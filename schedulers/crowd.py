"""How many threads to decode with while other programs use the processor. Policy only; runner/neighbours.py measures.

Threads that compute together wait for each other after every operation of a layer. OpenMP's runtime lets them spin
there for about three milliseconds, which is fastest while each has a core of its own. When another program holds one
of the cores, the others spin through its whole time slice, again and again: decode falls to a hundredth. Measured on
two cores (docs/LOG.md, 2026-11-26): sleeping at once costs a tiny model half of its speed when the machine is idle,
and a real one nothing; under load it is as good as one thread on a real model, and one thread is best on a tiny one.
"""

from __future__ import annotations

from dataclasses import dataclass

SLACK_CORES = 0.25  # interrupts, our own readers' kernel work and rounding look like a neighbour of this size
UNPACKING_CORES = 0.1  # of our own readers: threads that spin meanwhile keep them from unpacking (docs/LOG.md)
CALM_WINDOWS = 2  # so many quiet windows in a row before the threads come back


@dataclass(frozen=True)
class ThreadSetting:
    """threads: to compute with. sleep: waiting threads sleep at once instead of spinning."""

    threads: int
    sleep: bool


class CrowdControl:
    """Turns the cores that others use into a ThreadSetting.

    n_threads: what the user asked for. n_cores: the cores this process may use. may_drop: whether fewer threads leave
    the bits of the output as they are; not so with flash attention over 512 and more cells, which sums by thread.
    """

    def __init__(self, n_threads: int, n_cores: int, *, may_drop: bool) -> None:
        self._n_threads, self._n_cores, self._may_drop = n_threads, n_cores, may_drop
        self._calm = 0
        self.setting = self.alone = ThreadSetting(n_threads, sleep=False)

    def update(self, others: float, unpacking: float = 0.0) -> ThreadSetting:
        """What is right now. others: cores that other programs used on average since the last call, 0 to n_cores.

        unpacking: cores that our readers unpacked experts on. They work while the threads that compute wait, so those
        must sleep; there is no need for fewer of them.
        """
        if self._n_threads + others > self._n_cores + SLACK_CORES:
            self._calm = 0
            free = max(1, min(self._n_threads, round(self._n_cores - others)))
            self.setting = ThreadSetting(free if self._may_drop else self._n_threads, sleep=True)
        elif unpacking > UNPACKING_CORES:
            self._calm = 0
            self.setting = ThreadSetting(self._n_threads, sleep=True)
        else:
            self._calm += 1
            if self._calm >= CALM_WINDOWS:
                self.setting = self.alone
        return self.setting
