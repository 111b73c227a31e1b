"""What a model would take, without an engine: llama.cpp is asked what it would allocate, and allocates nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moe_edge.models.formats.gguf import GGUFFile
from moe_edge.models.store.store import ExpertModel
from moe_edge.runner import signals
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.kv.rollback import checkpoints_bytes
from moe_edge.runner.kv.shift import check_shift
from moe_edge.runner.llama import log_megabytes, recurrent_bytes, sliding_window, window_is_kept
from moe_edge.runner.loading import Loading
from moe_edge.runner.native import NativeModel
from moe_edge.schedulers.budget import (
    PROGRAM_ALLOWANCE_BYTES,
    PROGRAM_VARIES_BYTES,
    FixedSizes,
    MemoryPlan,
    plan_memory,
)
from moe_edge.schedulers.layout import Layout
from moe_edge.schedulers.packed import PackedSizes

# llama.cpp's vocabulary with its maps and merges, and ours of the header: measured at 151,936 tokens (docs/LOG.md).
VOCAB_BYTES_PER_TOKEN, VOCAB_BYTES_PER_MERGE = 400, 140
NO_LIMIT = 1 << 62


@dataclass(frozen=True)
class Sizes:
    """A model as it would be loaded. n_ctx, n_ubatch: in tokens. plan: of a budget without limit."""

    model: ExpertModel
    layout: Layout
    plan: MemoryPlan
    n_ctx: int
    n_ubatch: int
    flash_attn: bool
    trained_context: int
    packed: PackedSizes


def sizes_of(path: str | Path, options: EngineOptions, *, named: str | Path | None = None) -> Sizes:
    """Open a model and ask what it would take with these options; their budget is not looked at.

    named: what messages call the model, when `path` only stands for it. Raises what Loading and its proof raise.
    """
    loading = Loading(path, options, named=named)
    loading.prove()
    native = NativeModel(loading.model, n_io_threads=options.n_io_threads, direct_io=options.direct_io)
    try:
        with signals.deferred():  # llama.cpp calls back into Python while it frees
            layout, fixed = layout_of(loading.model, native), fixed_sizes(loading, native)
            packed = native.packed_sizes()
    finally:
        with signals.deferred():
            native.close()
    plan = plan_memory(NO_LIMIT, fixed, layout, loading.model.n_expert_used)
    return Sizes(
        loading.model, layout, plan, loading.n_ctx, loading.n_ubatch, loading.flash_attn, loading.trained_context(),
        packed,
    )  # fmt: skip


def layout_of(model: ExpertModel, native: NativeModel) -> Layout:
    """The units of a model: layers, experts, levels, and the bytes that each takes in memory."""
    return Layout(tuple(layer.n_expert for layer in model.layers), len(model.levels), native.unit_bytes())


def fixed_sizes(loading: Loading, native: NativeModel, program_bytes: int = 0) -> FixedSizes:
    """Everything but experts, in bytes. program_bytes: what the process held before, of nothing that is the model's.

    What it holds above the allowance for the program is counted where the options charge it.
    """
    model, o = loading.model, loading.options
    probe, log = loading.llama(native, no_alloc=True)
    n_vocab = int(probe.n_vocab())
    loading.keeps_window = window_is_kept(probe)
    loading.can_hold = loading.keeps_window or not sliding_window(probe)
    if o.context_shift:
        check_shift(probe, loading.name, o.cache_type_k)
    # while the routers that this has shown are known: those that are announced need some
    scratch = native.scratch_bytes(loading.n_ubatch, model.n_expert_used, o.threads())
    probe.close()
    del probe
    native.unbind()
    n_merges = loading.skeleton.kv.count("tokenizer.ggml.merges")
    vocabulary = n_vocab * VOCAB_BYTES_PER_TOKEN + n_merges * VOCAB_BYTES_PER_MERGE
    # The CPU backend's work buffer, which llama.cpp does not log: inputs of a product in the type of its kernel.
    widest = max((t.shape[0] for t in loading.skeleton.tensors.values() if len(t.shape) > 1), default=0)
    work = loading.n_ubatch * max(4 * widest, 0 if loading.flash_attn else 2 * loading.n_ctx * loading.n_head)
    of = loading.repacked
    return FixedSizes(
        dense_bytes=max(model.dense_bytes + of.twice_bytes, of.reading_bytes) + vocabulary,
        kv_bytes=log_megabytes(log, "KV") + checkpoints_bytes(recurrent_bytes(log)),
        compute_bytes=log_megabytes(log, "compute") + log_megabytes(log, "output") + n_vocab * 16 + work,
        scratch_bytes=scratch,
        program_excess_bytes=(
            max(0, program_bytes + o.beside_bytes - PROGRAM_ALLOWANCE_BYTES) if o.charge_program else 0
        ),
        repacked_bytes=of.nbytes,
        program_varies_bytes=PROGRAM_VARIES_BYTES if o.charge_program else 0,
    )


def head_bytes(skeleton: GGUFFile) -> int:
    """Bytes of the output matrix, which a prompt needs for its last token only."""
    output = skeleton.tensors.get("output.weight") or skeleton.tensors.get("token_embd.weight")
    return output.nbytes if output else 0
