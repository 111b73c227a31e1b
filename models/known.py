"""Models of the hub that people run on small machines, to name one where none was given.

Names, types and sizes are what the models' cards say, rounded; the hub was not reachable where this was written. None
was run here: what decides is the plan that `pull` makes from the real header, before anything is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

GB = 10**9
# Of a model's bytes, what should fit into memory to be worth a try: dense weights, KV cache and the experts of a few
# tokens. A rule of thumb for a suggestion only.
LEAST_SHARE = 0.3
SPARE_DISK_BYTES = 2 * GB


@dataclass(frozen=True)
class KnownModel:
    """name: as `pull` takes it. nbytes: of the file, rounded. weights, active: in all, and for a token, in 10^9.

    run_here: whether it has run with moe-edge, on whatever machine.
    """

    name: str
    nbytes: int
    weights: float
    active: float
    license: str
    run_here: bool = False

    def words(self) -> str:
        return f"{self.name}, about {self.nbytes / GB:.1f} GB, {self.active:g} of {self.weights:g} G weights a token"


# The better one answers first, as far as their makers' own tables can be compared.
KNOWN = (
    KnownModel("ggml-org/gpt-oss-120b-GGUF:MXFP4", 63 * GB, 117, 5.1, "Apache-2.0"),
    KnownModel("unsloth/Qwen3-30B-A3B-Instruct-2507-GGUF:Q4_K_M", 18_600_000_000, 30.5, 3.3, "Apache-2.0"),
    KnownModel("ggml-org/gpt-oss-20b-GGUF:MXFP4", 12_100_000_000, 20.9, 3.6, "Apache-2.0"),
    KnownModel("unsloth/Qwen3-30B-A3B-Instruct-2507-GGUF:Q2_K", 11_300_000_000, 30.5, 3.3, "Apache-2.0"),
    KnownModel("LiquidAI/LFM2-8B-A1B-GGUF:Q4_K_M", 5_050_000_000, 8.3, 1.5, "LFM Open License 1.0"),
    KnownModel("ibm-granite/granite-4.0-h-tiny-GGUF:Q4_K_M", 4_240_000_000, 6.9, 1, "Apache-2.0"),
    KnownModel("allenai/OLMoE-1B-7B-0125-Instruct-GGUF:Q4_K_M", 4_210_000_000, 6.9, 1.3, "Apache-2.0"),
    KnownModel("bartowski/granite-3.1-1b-a400m-instruct-GGUF:Q4_K_M", 822_000_000, 1.3, 0.4, "Apache-2.0"),
)


def fitting(memory_bytes: int, disk_bytes: int, known: tuple[KnownModel, ...] | None = None) -> Iterator[KnownModel]:
    """The models worth a try with so much memory and free disk, the best first."""
    for each in KNOWN if known is None else known:
        if each.nbytes * LEAST_SHARE <= memory_bytes and each.nbytes + SPARE_DISK_BYTES <= disk_bytes:
            yield each
