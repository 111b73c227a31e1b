"""`moe-edge show`: what a model is and what memory it needs, without loading its weights."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from moe_edge.convert.ggml_types import type_name
from moe_edge.runner.engine import Engine, EngineOptions
from moe_edge.schedulers.budget import format_bytes

NO_LIMIT = 1 << 62


def describe(path: str | Path, *, n_ctx: int = 0, n_ubatch: int = 0, n_threads: int = 0) -> dict[str, Any]:
    """The facts of `show --json`. The ram_* figures are for this context and micro-batch, and are --ram values."""
    engine = Engine(path, EngineOptions(ram_bytes=NO_LIMIT, n_ctx=n_ctx, n_ubatch=n_ubatch, n_threads=n_threads))
    try:
        m, plan = engine.model, engine.plan
        by_type = Counter((p.name.split("ffn_")[1].split("_exps")[0], p.type) for p in m.pieces)
        return {
            "model": str(path),
            "architecture": m.architecture,
            "skeleton": str(m.skeleton),
            "files": [str(f) for f in m.files],
            "in_place": m.in_place,
            "store_id": m.store_id,
            "n_moe_layers": len(m.layers),
            "moe_layers": [layer.layer for layer in m.layers],
            "n_expert": max(layer.n_expert for layer in m.layers),
            "n_expert_used": m.n_expert_used,
            "n_embd": m.layers[0].n_embd,
            "n_ff_expert": m.layers[0].n_ff,
            "levels": list(m.levels),
            "expert_types": {
                f"{projection} {type_name(t)}": n for (projection, t), n in sorted(by_type.items())
            },
            "n_ctx": engine.n_ctx,
            "n_ubatch": engine.n_ubatch,
            "flash_attn": engine.flash_attn,
            "dense_bytes": m.dense_bytes,
            "expert_bytes": m.expert_bytes,
            "kv_bytes": plan.fixed.kv_bytes,
            "compute_bytes": plan.fixed.compute_bytes + plan.fixed.scratch_bytes,
            "largest_expert_bytes": max(engine.layout.unit_bytes),
            "ram_floor_bytes": plan.floor_bytes,
            "ram_comfortable_bytes": plan.comfortable_bytes,
            "ram_resident_bytes": plan.resident_bytes,
        }
    finally:
        engine.close()


def describe_text(f: dict[str, Any]) -> str:
    types = ", ".join(f"{name} ({n})" for name, n in f["expert_types"].items())
    where = "read in place from the stock GGUF" if f["in_place"] else f"store {f['store_id'][:8]}"
    return "\n".join(
        [
            f"{f['model']}: {f['architecture']}, {f['n_moe_layers']} MoE layers of {f['n_expert']} experts, "
            f"top {f['n_expert_used']}, width {f['n_embd']}/{f['n_ff_expert']}",
            f"experts      {format_bytes(f['expert_bytes'])}  {types}; {where}",
            f"dense        {format_bytes(f['dense_bytes'])}",
            f"KV cache     {format_bytes(f['kv_bytes'])} for {f['n_ctx']} tokens",
            f"compute      {format_bytes(f['compute_bytes'])}",
            f"--ram floor  {format_bytes(f['ram_floor_bytes'])}: it runs, most experts read again for every token",
            f"--ram good   {format_bytes(f['ram_comfortable_bytes'])}: one token's experts fit, so they can be reused",
            f"--ram all    {format_bytes(f['ram_resident_bytes'])}: nothing is read twice",
        ]
    )
