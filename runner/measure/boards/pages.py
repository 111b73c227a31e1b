"""The page size, which units of the arena are rounded up to."""

from __future__ import annotations

from collections.abc import Iterator

from moe_edge.runner.measure.boards.finding import NOTE, OK, Check, Finding
from moe_edge.runner.measure.boards.machine import Machine

LARGE_PAGE_BYTES = 64 << 10


def _run(machine: Machine) -> Iterator[Finding]:
    kib = machine.page_bytes // 1024
    if machine.page_bytes < LARGE_PAGE_BYTES:
        note = "" if kib <= 4 else "; an expert takes up to that much more, under 1.5 % of a real one"
        yield Finding("page size", OK, f"{kib} KiB{note}")
        return
    yield Finding(
        "page size", NOTE, f"{kib} KiB",
        f"every expert's place in memory is rounded up to {kib} KiB, and files of other programs take more of it",
        "boot the kernel with pages of 4 or 16 KiB, where the distribution has one",
    )  # fmt: skip


CHECK = Check("page size", 10, _run)
