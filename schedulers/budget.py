"""Where the bytes of `--ram` go: dense weights, KV cache, compute, work buffers, and the rest to the expert arena.

Pure: sizes in, plan out. The floor and the comfortable line are computed here and nowhere else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from moe_edge.models.errors import BudgetTooSmall, UsageError
from moe_edge.schedulers.layout import Layout

MIB = 1 << 20

# Python, llama.cpp's code and the libraries: 45-67 MiB resident before a model is loaded (docs/LOG.md). They are not
# the model's; a process never holds more than --ram plus this.
PROGRAM_ALLOWANCE_BYTES = 64 * MIB

# The same program is a little larger or smaller at each start: the kernel decides how much of a library it maps. What
# it holds above the allowance is charged, so a budget that just worked might not work the next time. The number that is
# named where a budget was too small has this much more.
PROGRAM_VARIES_BYTES = 4 * MIB

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}


def parse_bytes(text: str) -> int:
    """'6GiB', '6G', '6GB', '512MiB' or a plain number of bytes -> bytes. GiB means 2^30; G and GB mean 10^9.

    Raises UsageError.
    """
    m = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if not m or m[2] == "i":
        raise UsageError(f"'{text}' is not a size; write for instance 6GiB, 800MiB, or a number of bytes")
    return int(float(m[1]) * _UNITS[m[2]])


def format_bytes(n: int) -> str:
    """Bytes for people: MiB below 1 GiB, else GiB."""
    return f"{n / (1 << 30):.2f} GiB" if n >= 1 << 30 else f"{n / MIB:.1f} MiB"


@dataclass(frozen=True)
class FixedSizes:
    """What the model takes whatever the budget, in bytes.

    dense: skeleton weights with stubs; biases; vocabulary. kv: KV cache. compute: llama.cpp's graph and output buffers.
    scratch: the engine's work buffers. program_excess: what the program holds above PROGRAM_ALLOWANCE_BYTES.
    program_varies: how much more it may be at another start; not counted, only told. held: conversations beside the
    present one. repacked: of dense, what is kept in an order that this processor likes.
    """

    dense_bytes: int
    kv_bytes: int
    compute_bytes: int
    scratch_bytes: int
    program_excess_bytes: int = 0
    held_bytes: int = 0
    repacked_bytes: int = 0
    program_varies_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        work = self.compute_bytes + self.scratch_bytes + self.program_excess_bytes
        return self.dense_bytes + self.kv_bytes + self.held_bytes + work


@dataclass(frozen=True)
class MemoryPlan:
    """The split of one budget. `arena_bytes` is what the experts get; packed_bytes of them are for packed ones."""

    budget_bytes: int
    fixed: FixedSizes
    arena_bytes: int
    floor_bytes: int
    comfortable_bytes: int
    resident_bytes: int
    packed_bytes: int = 0

    @property
    def whole_bytes(self) -> int:
        """What of the experts' memory is for those that can be computed with."""
        return self.arena_bytes - self.packed_bytes

    @property
    def below_comfortable(self) -> bool:
        return self.budget_bytes < self.comfortable_bytes

    def lines(self) -> list[str]:
        """The split, one line, and a warning line where one is due."""
        f = self.fixed
        held = f"conversations {format_bytes(f.held_bytes)}, " if f.held_bytes else ""
        repacked = f" ({format_bytes(f.repacked_bytes)} repacked)" if f.repacked_bytes else ""
        out = [
            f"memory {format_bytes(self.budget_bytes)}: dense {format_bytes(f.dense_bytes)}{repacked}, "
            f"KV cache {format_bytes(f.kv_bytes)}, {held}compute {format_bytes(f.compute_bytes + f.scratch_bytes)}, "
            f"experts {format_bytes(self.arena_bytes)} of {format_bytes(self.resident_bytes - f.total_bytes)}"
            + (f", {format_bytes(self.packed_bytes)} of it for packed ones" if self.packed_bytes else "")
        ]
        if self.below_comfortable:
            out.append(
                "warning: this is below one token's working set: most experts will be read again for every token; "
                f"--ram {format_arg(self.comfortable_bytes)} or more lets experts be reused"
            )
        return out


def format_arg(n: int) -> str:
    """Bytes as a --ram argument that is at least n: whole MiB, rounded up."""
    return f"{-(-n // MIB)}MiB"


def arena_floor_bytes(layout: Layout) -> int:
    """The least arena: one expert in flight for each MoE layer, the largest of the layer; at least two experts."""
    sizes = sorted((layout.largest_bytes(layer) for layer in range(layout.n_layers)), reverse=True)
    return max(sum(sizes), 2 * sizes[0])


def arena_working_set_bytes(layout: Layout, top_k: int) -> int:
    """One token's working set: top-k experts in each MoE layer."""
    return sum(top_k * layout.largest_bytes(layer) for layer in range(layout.n_layers))


def plan_memory(budget_bytes: int, fixed: FixedSizes, layout: Layout, top_k: int) -> MemoryPlan:
    """Split a budget. Raises BudgetTooSmall below the floor, with a number that works at every start."""
    floor = fixed.total_bytes + arena_floor_bytes(layout)
    resident = max(floor, fixed.total_bytes + layout.total_bytes)
    working_set = fixed.total_bytes + arena_working_set_bytes(layout, top_k)
    if budget_bytes < floor:
        enough = floor + fixed.program_varies_bytes
        raise BudgetTooSmall(
            f"--ram {budget_bytes // MIB}MiB is too small: this model needs {format_bytes(floor)} "
            f"(dense {format_bytes(fixed.dense_bytes)}, KV cache {format_bytes(fixed.kv_bytes)}, "
            f"{f'conversations {format_bytes(fixed.held_bytes)}, ' if fixed.held_bytes else ''}"
            f"compute {format_bytes(fixed.compute_bytes + fixed.scratch_bytes + fixed.program_excess_bytes)}, "
            f"experts {format_bytes(arena_floor_bytes(layout))}); "
            f"try --ram {format_arg(enough)} or more, or a smaller --ctx-size",
            enough,
        )
    return MemoryPlan(
        budget_bytes=budget_bytes,
        fixed=fixed,
        arena_bytes=min(budget_bytes - fixed.total_bytes, layout.total_bytes),
        floor_bytes=floor,
        comfortable_bytes=min(max(floor, working_set), resident),
        resident_bytes=resident,
    )
