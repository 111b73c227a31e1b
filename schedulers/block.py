"""The order in which a layer's missing experts are brought: ZipMoE's block schedule (arXiv 2601.21198, PAPERS.md).

A miss is a long read and then work for the processor, or work alone, where the packed expert is in memory. Reads go
one after the other on one disk, so they are never to wait: they come first. The processor has nothing to do until the
first of them ends, so work that needs no read fills it, as much of it as the reads take. Within each kind the experts
that most tokens wait for come first; the caller has sorted them so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from typing import TypeVar

T = TypeVar("T")

# Pieces of work in the time of a read: a packed piece of 4 MB comes in 9 ms at 440 MB/s and is unpacked in 2.5.
WORK_IN_A_READ = 4


def block_schedule(reads: Sequence[T], work: Sequence[T], work_in_a_read: float = WORK_IN_A_READ) -> list[T]:
    """All tasks in the order to begin them.

    work_in_a_read: tasks of work alone that the processor does, on all its threads, while one read goes on.
    """
    order: list[T] = []
    n_reads = n_done = at = 0
    for task in reads:
        order.append(task)
        n_reads, n_done = n_reads + 1, n_done + 1  # what is read has work too
        while at < len(work) and n_done + 1 <= n_reads * work_in_a_read:
            order.append(work[at])
            at, n_done = at + 1, n_done + 1
    return [*order, *work[at:]]


@dataclass(frozen=True)
class Task:
    """A miss: seconds of the disk, 0 for one that needs no read, then seconds of one thread."""

    read: float
    work: float


def makespan(order: Sequence[Task], threads: int) -> float:
    """When the last task of a layer is done, as the engine runs them.

    The disk reads in this order, one after the other. A thread that is free takes, of the tasks whose bytes are there,
    the one that comes first in the order.
    """
    arrives, now = [], 0.0
    for task in order:
        now += task.read
        arrives.append(now if task.read else 0.0)
    free = [0.0] * threads
    heapify(free)
    waiting = list(range(len(order)))
    end = 0.0
    while waiting:
        start = max(free[0], min(arrives[i] for i in waiting))
        i = next(i for i in waiting if arrives[i] <= start)
        waiting.remove(i)
        heapreplace(free, start + order[i].work)
        end = max(end, start + order[i].work)
    return end
