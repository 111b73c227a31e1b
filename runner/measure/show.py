"""`moe-edge show`: what a model is and what memory it needs, without loading its weights; and what a calibration found.

Facts are JSON values; the functions that make text and pictures take nothing else.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from moe_edge.models.calibration import Calibration
from moe_edge.models.errors import UsageError, printable
from moe_edge.models.formats.floats import Float64Array
from moe_edge.models.formats.ggml_types import type_name
from moe_edge.models.store.planes import CODEC_NAMES
from moe_edge.models.store.store import ExpertModel, level_of, open_model
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.prove import LOADS
from moe_edge.runner.sizes import sizes_of
from moe_edge.schedulers.budget import format_bytes
from moe_edge.schedulers.policies import find_policy
from moe_edge.schedulers.policies.depth import calibrated, cosine
from moe_edge.schedulers.policies.hobbit import fit_thresholds

SHOWN_RETENTION = 0.75
SHOWN_FRAGILE = 10


def describe(path: str | Path, *, n_ctx: int = 0, n_ubatch: int = 0, n_threads: int = 0) -> dict[str, Any]:
    """The facts of `show --json`. The ram_* figures are for this context and micro-batch, and are --ram values."""
    options = EngineOptions(n_ctx=n_ctx, n_ubatch=n_ubatch, n_threads=n_threads, proof=LOADS)
    sizes = sizes_of(path, options)
    m, plan = sizes.model, sizes.plan
    types = level_types(m)
    by_type = sum((Counter(of_level) for of_level in types.values()), Counter())
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
        "expert_types": dict(sorted(by_type.items())),
        "level_types": types,
        "bits_per_weight": bits_per_weight(m),
        "is_calibrated": m.calibration is not None,
        "n_ctx": sizes.n_ctx,
        "n_ubatch": sizes.n_ubatch,
        "flash_attn": sizes.flash_attn,
        "dense_bytes": m.dense_bytes,
        "repacked_bytes": plan.fixed.repacked_bytes,
        "expert_bytes": m.expert_bytes,
        "stored_expert_bytes": m.stored_expert_bytes,
        "codecs": dict(Counter(CODEC_NAMES.get(p.codec, "raw") for p in m.pieces)),
        "kv_bytes": plan.fixed.kv_bytes,
        "compute_bytes": plan.fixed.compute_bytes + plan.fixed.scratch_bytes,
        "largest_expert_bytes": max(sizes.layout.unit_bytes),
        "ram_floor_bytes": plan.floor_bytes,
        "ram_comfortable_bytes": plan.comfortable_bytes,
        "ram_resident_bytes": plan.resident_bytes,
    }


def level_types(model: ExpertModel) -> dict[str, dict[str, int]]:
    """level -> `down Q6_K` -> number of tensors."""
    found: dict[str, Counter[str]] = {level: Counter() for level in model.levels}
    for p in model.pieces:
        projection = p.name.split("ffn_")[1].split("_exps")[0]
        found[level_of(p.name)][f"{projection} {type_name(p.type)}"] += 1
    return {level: dict(sorted(of_level.items())) for level, of_level in found.items()}


def bits_per_weight(model: ExpertModel) -> dict[str, float]:
    """level -> bits of the experts for each of their weights, on average."""
    nbytes, weights = Counter[str](), Counter[str]()
    for p in model.pieces:
        level = level_of(p.name)
        nbytes[level] += p.nbytes
        weights[level] += p.cols * p.rows
    return {level: 8 * nbytes[level] / weights[level] for level in model.levels}


def describe_text(f: dict[str, Any]) -> str:
    where = "read in place from the stock GGUF" if f["in_place"] else f"store {f['store_id'][:8]}"
    levels = [
        f"  {level:<11}{f['bits_per_weight'][level]:.2f} bits a weight: "
        + ", ".join(f"{name} ({n})" for name, n in f["level_types"][level].items())
        for level in f["levels"]
    ]
    return "\n".join(
        [
            f"{printable(f['model'])}: {printable(f['architecture'])}, "
            f"{f['n_moe_layers']} MoE layers of {f['n_expert']} experts, "
            f"top {f['n_expert_used']}, width {f['n_embd']}/{f['n_ff_expert']}",
            f"experts      {format_bytes(f['expert_bytes'])}, {where}"
            + (", calibrated: see --calibration" if f["is_calibrated"] else ""),
            *_packed_line(f),
            *levels,
            f"dense        {format_bytes(f['dense_bytes'])}"
            + (f", {format_bytes(f['repacked_bytes'])} of it repacked" if f["repacked_bytes"] else ""),
            f"KV cache     {format_bytes(f['kv_bytes'])} for {f['n_ctx']} tokens",
            f"compute      {format_bytes(f['compute_bytes'])}",
            f"--ram floor  {format_bytes(f['ram_floor_bytes'])}: it runs, most experts read again for every token",
            f"--ram good   {format_bytes(f['ram_comfortable_bytes'])}: one token's experts fit, so they can be reused",
            f"--ram all    {format_bytes(f['ram_resident_bytes'])}: nothing is read twice",
        ]
    )


def _packed_line(f: dict[str, Any]) -> list[str]:
    """What packed experts take on disk; nothing where none is packed."""
    named = [f"{name} ({n})" for name, n in f["codecs"].items() if name != "raw"]
    share = f["stored_expert_bytes"] / f["expert_bytes"]
    stored = f"{format_bytes(f['stored_expert_bytes'])} on disk, {100 * share:.1f} % of that: {', '.join(named)}"
    return [f"  packed     {stored}"] if named else []


def describe_calibration(path: str | Path) -> dict[str, Any]:
    """The facts of `show --calibration --json`: every array of the Calibration, and what the text shows of them.

    Arrays are [L], [L][E] or [L][E][level]; rows of narrower layers end in zeros. Only headers are read.
    Raises UsageError for a model without a calibration, and what open_model raises.
    """
    model = open_model(Path(path))
    c = model.calibration
    if c is None:
        raise UsageError(
            f"{path}: has no calibration; convert it with one: moe-edge convert SOURCE -o NAME.gguf --calibrate TEXT"
        )
    columns = (*c.levels, "skip")
    t1, t2 = fit_thresholds(c)
    return {
        "model": str(path),
        "text_sha256": c.text_sha256,
        "n_tokens": c.n_tokens,
        "levels": list(c.levels),
        "damage_levels": list(columns),
        "bits_per_weight": bits_per_weight(model),
        "layers": _layer_facts(model, c, columns),
        "fragile": _most_fragile(model, c),
        "hobbit": {"t1": t1, "t2": t2},
        "settings": [asdict(s) for s in c.settings],
        "sensitivity": c.sensitivity.tolist(),
        "counts": c.counts.tolist(),
        "mean_gate": c.mean_gate.tolist(),
        "squares": c.squares.tolist(),
        "error": c.error.tolist(),
        "damage": c.damage().tolist(),
        "cumulated": c.cumulated.tolist(),
        "use_damage": c.use_damage.tolist(),
    }


def _layer_facts(model: ExpertModel, c: Calibration, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    ours, plain = calibrated(SHOWN_RETENTION, c), cosine(SHOWN_RETENTION, len(model.layers))
    facts = []
    for i, layer in enumerate(model.layers):
        counts = c.counts[i, : layer.n_expert]
        uses = max(1, int(counts.sum()))
        of_level = c.damage()[i].sum(axis=0)
        facts.append(
            {
                "layer": layer.layer,
                "n_expert": layer.n_expert,
                "sensitivity": float(c.sensitivity[i]),
                "most_used": {"expert": int(counts.argmax()), "share": int(counts.max()) / uses},
                "least_used": {"expert": int(counts.argmin()), "share": int(counts.min()) / uses},
                "mean_gate": float((c.mean_gate[i, : layer.n_expert] * counts).sum()) / uses,
                "damage": dict(zip(columns, of_level.tolist(), strict=True)),
                "retention_calibrated": ours[i],
                "retention_cosine": plain[i],
            }
        )
    return facts


def lowering_damage(c: Calibration) -> Float64Array:
    """[L, E]: nats a token above level 0 with that expert alone always at the low level; one level: skipped."""
    damage = c.damage()
    lowered: Float64Array = np.maximum(0.0, damage[..., 1] - damage[..., 0])
    return lowered


def _most_fragile(model: ExpertModel, c: Calibration) -> list[dict[str, Any]]:
    damage = lowering_damage(c)
    top = np.argsort(-damage, axis=None, kind="stable")[: min(SHOWN_FRAGILE, np.count_nonzero(damage))]
    found = []
    for i, expert in zip(*(each.tolist() for each in np.unravel_index(top, damage.shape)), strict=True):
        layer, uses = model.layers[i], int(c.counts[i].sum())
        share = int(c.counts[i, expert]) / max(1, uses)
        found.append({"layer": layer.layer, "expert": expert, "damage": float(damage[i, expert]), "share": share})
    return found


def calibration_text(f: dict[str, Any]) -> str:
    """The calibration for people; damage in nats a token."""
    columns = f["damage_levels"]
    bits = ", ".join(f"{level} {n:.2f} bits a weight" for level, n in f["bits_per_weight"].items())
    lines = [
        f"{printable(f['model'])}: calibrated on {f['n_tokens']} tokens of the text {f['text_sha256'][:16]}; {bits}",
        "",
        "most and least used expert, with its share of the uses; mean gate weight; nats a token with all experts at a "
        f"level; r at retention {SHOWN_RETENTION:g}:",
        "block  sensitivity  most used   least used   gate"
        + "".join(f"{name:>10}" for name in columns)
        + "  calibrated  cosine",
    ]
    lines += [_layer_line(each, columns) for each in f["layers"]]
    lowered = columns[1]
    lines += ["", f"most damage when {'skipped' if lowered == 'skip' else lowered}, alone (nats a token):"]
    lines += [
        f"  block {each['layer']} expert {each['expert']}: {each['damage']:.3g}, {each['share']:.1%} of the uses"
        for each in f["fragile"]
    ]
    lines += ["", f"hobbit: t1 {f['hobbit']['t1']:.3f}, t2 {f['hobbit']['t2']:.3f}"]
    if not f["settings"]:
        return "\n".join([*lines, "no settings were measured: --max-kld will not work"])
    lines += ["", "settings, for --max-kld", "policy  knob              rest        KLD  bytes of exact"]
    return "\n".join(lines + [_setting_line(each) for each in f["settings"]])


def _layer_line(each: dict[str, Any], columns: list[str]) -> str:
    most, least = each["most_used"], each["least_used"]
    return (
        f"{each['layer']:>5}  {each['sensitivity']:>11.3g}  "
        f"{most['expert']:>4} {most['share']:>5.1%}  {least['expert']:>5} {least['share']:>5.1%}  "
        f" {each['mean_gate']:.3f}"
        + "".join(f"{each['damage'][name]:>10.3g}" for name in columns)
        + f"{each['retention_calibrated']:>12.2f}{each['retention_cosine']:>8.2f}"
    )


def _setting_line(each: dict[str, Any]) -> str:
    main = find_policy(each["policy"]).main_knob
    knob = main.name if main is not None else "knob"
    return (
        f"{each['policy']:<7} {knob:<9} {each['knob']:<7.3g} {each['low_level']:<5} {each['kld']:>9.3g}  "
        f"{each['bytes_share']:.0%}"
    )
