"""How to run a model: the options of an engine, and what is chosen where the user has not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moe_edge.models.store.store import ExpertModel
from moe_edge.runner.neighbours import usable_cores
from moe_edge.runner.prove import DECODES
from moe_edge.schedulers.budget import MIB
from moe_edge.schedulers.layout import Layout
from moe_edge.schedulers.options import PolicyOptions
from moe_edge.schedulers.packed import PackedSizes

MICRO_BATCH = 512  # large, since every micro-batch reads the experts it touches once
LARGER_MICRO_BATCHES = (2048, 1024)
BUFFER_SHARE = 1 / 64  # of the experts, what the buffers of a larger micro-batch may take


def attention_defaults(n_ctx: int, n_head: int, expert_bytes: int, token_bytes: int) -> tuple[bool, int]:
    """(flash_attn, n_ubatch) for a model when the user has not said.

    token_bytes: of the compute buffers for each token of a micro-batch, flash attention given (buffer_bytes()).

    Plain attention, llama-cpp-python's default, keeps scores and softmax of a whole micro-batch: 512 MiB for a context
    of 4,096, 512 a batch and 32 heads. Above 64 MiB it is flash attention, llama.cpp's own default on a CPU, which
    keeps none. Below, a small model gets a smaller micro-batch, so that its buffers do not outweigh its experts.
    Flash against plain: mean KLD 9e-5 on the trained 8-layer tiny model (docs/LOG.md, 2026-11-22).
    A large model gets a larger one, while its buffers stay below BUFFER_SHARE of the experts: Qwen3-30B-A3B 1,024,
    which takes 112 MiB from 6.8 GiB of experts and halves how often a long prompt reads them.
    """
    bytes_per_row = 2 * 4 * n_ctx * n_head
    if bytes_per_row * MICRO_BATCH > 64 * MIB:
        fitting = (n for n in LARGER_MICRO_BATCHES if n <= n_ctx and n * token_bytes <= BUFFER_SHARE * expert_bytes)
        return True, next(fitting, MICRO_BATCH)
    fits = max(8 * MIB, expert_bytes // 8) // bytes_per_row
    return False, max(32, min(MICRO_BATCH, fits // 32 * 32))


def buffer_bytes(n_embd: int, n_used: int) -> int:
    """What llama.cpp's compute buffer takes for each token of a micro-batch, about: the products of each expert, their
    weighted copies, and a layer's own tensors. Of the 30B shape this says 232 KiB, and llama.cpp takes 224."""
    return 4 * n_embd * (3 * n_used + 5)


EXACT = PolicyOptions()
PackedPlanner = Callable[[ExpertModel, Layout, PackedSizes, int, int, "float | None"], tuple[int, str]]
CACHE_TYPES = {"f16": 1, "q8_0": 8, "q4_0": 2}  # ggml's numbers


@dataclass(frozen=True)
class EngineOptions:
    """How to run a model.

    ram_bytes None: `auto`. n_ctx 0: what the model was trained for, at most 4096. n_threads 0: one for each core this
    process may use.

    n_ubatch 0, flash_attn None: chosen from the model and the context by attention_defaults(), never from the budget,
    because both change how sums are rounded.
    disk_bytes_per_second: pace the expert reads as a disk of this speed would; None: as fast as it is.
    charge_program: count what the process held before loading, above PROGRAM_ALLOWANCE_BYTES, against the budget. The
    command line does; a program that embeds the engine knows better what else it holds. beside_bytes: what it will come
    to hold beside the engine, counted like what it held before. map_dense: map the skeleton
    instead of reading it into anonymous memory; for the converter's proof, which decodes one token only.
    warm_start: read the experts that earlier runs used most before the first token, and keep the usage of this one.
    prompt_cache_bytes: how much of the disk conversations may take, to be gone on with in later runs; 0: none are kept.
    cache_type_k, cache_type_v: how keys and values are kept, of CACHE_TYPES; all but f16 are lossy, and need flash
    attention. held_bytes: memory for conversations beside the present one, see runner/kv/held.py; None: `auto`.
    context_shift: a full context forgets its older half and the reply goes on; lossy.
    packed_cache: how much of the experts' memory keeps packed experts, which need no read but must be unpacked: off,
    auto, a size like 400MiB or a share like 50%; see schedulers/split.py.
    packed_planner: says how much that is for auto: (model, layout, packed sizes, bytes for experts, threads, paced
    disk) -> (bytes, why). Measuring the machine is no business of the engine; runner/measure/packed_split.py has one.
    verbose: let llama.cpp write to standard error while it loads.
    repack: of REPACK in runner/dense_repack.py, whether llama.cpp repacks the dense weights for this processor; it
    rounds otherwise, so stock llama.cpp has the same bits with the same setting only.
    proof: what a child process must have shown before this one gives the model to llama.cpp, see runner/prove.py.
    """

    ram_bytes: int | None = None
    n_ctx: int = 0
    n_ubatch: int = 0
    n_threads: int = 0
    policy: PolicyOptions = EXACT
    n_io_threads: int = 4
    direct_io: bool = True
    seed: int | None = None
    logits_all: bool = False
    flash_attn: bool | None = None
    disk_bytes_per_second: int | None = None
    charge_program: bool = False
    beside_bytes: int = 0
    map_dense: bool = False
    warm_start: bool = False
    prompt_cache_bytes: int = 0
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    context_shift: bool = False
    held_bytes: int | None = 0
    packed_cache: str = "off"
    packed_planner: PackedPlanner | None = None
    verbose: bool = False
    repack: str = "auto"
    proof: str = DECODES

    @property
    def lossy_cache(self) -> str:
        """What a lossy KV cache is, for the last line of a reply; empty when it is not lossy."""
        k, v = self.cache_type_k, self.cache_type_v
        return "" if (k, v) == ("f16", "f16") else f"KV cache in {k if k == v else f'{k} and {v}'}"

    def threads(self) -> int:
        if self.n_threads > 0:
            return self.n_threads
        return len(usable_cores())
