"""What bench/pareto.py runs: its options, and the settings of policies that they stand for."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_edge.models.errors import UsageError
from moe_edge.runner.engine_options import EXACT as EXACT_OPTIONS
from moe_edge.schedulers.options import PolicyOptions
from rivals import Rival

# ---- what to run -------------------------------------------------------------------------------------------

PARTS = ("static", "dynamic", "ablation")


def tell(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)



@dataclass(frozen=True)
class Options:
    """What to run; see --help."""

    source: Path
    calibrate: Path
    text: Path
    out: Path
    parts: tuple[str, ...] = PARTS
    bits: tuple[float, ...] = (2.5, 3.0, 3.5)
    types: tuple[str, ...] = ("IQ2_XXS", "Q2_K", "IQ3_XXS", "Q3_K", "Q4_K", "Q6_K")
    plain: tuple[str, ...] = ("IQ2_XXS", "Q2_K", "IQ3_XXS", "Q3_K", "Q4_K")
    pairs: tuple[tuple[str, str], ...] = (("Q4_K", "Q2_K"),)
    exact: tuple[str, ...] = ("Q2_K", "IQ3_XXS", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "2.5", "3", "3.5")
    share: float = 1 / 3
    retentions: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9)
    thresholds: tuple[str, ...] = ("fit", "0.6:0.9", "0.2:1", "0.4:1", "0.6:1", "0.8:1")
    prices: tuple[float, ...] = (0.0003, 0.001, 0.003, 0.01)
    strengths: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)
    prior: tuple[float, ...] = (0.1, 0.2, 0.4)
    cold: tuple[float, ...] = (0.1, 0.25, 0.5)
    below: tuple[float, ...] = (0.1, 0.15, 0.2)
    ablation_retentions: tuple[float, ...] = (0.4, 0.6, 0.75, 0.9)  # below 1/k the guard of one expert decides
    calibrate_tokens: int = 16384
    n_ctx: int = 512
    n_chunks: int = 16
    n_decode_chunks: int = 8
    n_ubatch: int = 0
    n_threads: int = 0
    again: bool = False


@dataclass(frozen=True)
class Setting:
    """One way to serve a model. family: the curve its row is a point of; label: the row. rival: in place of options."""

    family: str
    label: str
    options: PolicyOptions = EXACT_OPTIONS
    rival: Rival | None = None
    renormalise: bool = False

    @property
    def name(self) -> str:
        return f"{self.family} {self.label}".strip()


EXACT = Setting("exact", "")
REPLACING = ", replacing"  # how the families end whose policy may replace an expert by another
OURS = ("dymoe", "hobbit", "damage", "reroute")  # how the families under test begin


def dynamic_settings(o: Options) -> list[Setting]:
    """Of a model with two levels: ours, then the rivals, each without and with the other weights scaled up."""
    settings = [
        Setting(f"dymoe {low}", f"{r:g}", PolicyOptions("dymoe", retention=r, low_level=low))
        for low in ("low", "skip")
        for r in o.retentions
    ]
    settings += [Setting("hobbit", text, hobbit_options(text)) for text in o.thresholds]
    settings += damage_settings(o) + reroute_settings(o)
    numbers: dict[str, Sequence[float]] = {
        "top-k less": (1, 2), "top-k less on miss": (1, 2), "weight below": o.below, "weight below on miss": o.below,
        "cold dropped": o.cold,
    }
    settings += [Setting("cache-prior", f"{v:g}", rival=Rival("cache-prior", v)) for v in o.prior]  # fmt: skip
    for name, values in numbers.items():
        for renormalise in (False, True):
            family = name + (", renormalised" if renormalise else "")
            settings += [Setting(family, f"{v:g}", rival=Rival(name, v), renormalise=renormalise) for v in values]
    return settings


def damage_settings(o: Options) -> list[Setting]:
    """Without replacing an expert by another, and with it."""
    return [
        Setting(f"damage {low}{name}", f"{p:g}", PolicyOptions("damage", price=p, low_level=low, substitute=how))
        for name, how in (("", "off"), (REPLACING, "auto"))
        for low in ("low", "skip")
        for p in o.prices
    ]


def reroute_settings(o: Options) -> list[Setting]:
    return [
        Setting(f"reroute {kind}", f"{s:g}", PolicyOptions("reroute", strength=s, score_range=kind))
        for kind in ("mean", "token")
        for s in o.strengths
    ]


def hobbit_options(text: str) -> PolicyOptions:
    """`fit`, or `T1:T2`. Raises UsageError."""
    if text == "fit":
        return PolicyOptions("hobbit")
    try:
        t1, t2 = map(float, text.split(":"))
    except ValueError as error:
        raise UsageError(f"'{text}' is no pair of thresholds; write fit, or for instance 0.6:0.9") from error
    return PolicyOptions("hobbit", t1=t1, t2=t2)


ABLATION: dict[str, dict[str, Any]] = {  # family -> knobs of dymoe, decode
    "flat, gate": {"depth": "flat", "importance": "gate"},
    "cosine, gate": {"depth": "cosine", "importance": "gate"},
    "calibrated, gate": {"depth": "calibrated", "importance": "gate"},
    "flat, damage": {"depth": "flat", "importance": "damage"},
    "calibrated, damage": {"depth": "calibrated", "importance": "damage"},
    "calibrated, damage, no reuse": {"depth": "calibrated", "importance": "damage", "reuse": False},
    "skip": {"depth": "calibrated", "importance": "damage", "low_level": "skip"},
    "skip, renormalised": {"depth": "calibrated", "importance": "damage", "low_level": "skip", "renormalise": True},
}
PREFILL: dict[str, dict[str, Any]] = {  # the same for prefill
    f"prefill {rule}": {"depth": "calibrated", "prefill_importance": rule} for rule in ("mass", "attention", "damage")
}
COMPARISONS = (  # (what, against what), at equal bytes
    ("cosine, gate", "flat, gate"), ("calibrated, gate", "flat, gate"), ("calibrated, gate", "cosine, gate"),
    ("flat, damage", "flat, gate"), ("calibrated, damage", "calibrated, gate"), ("calibrated, damage", "flat, gate"),
    ("calibrated, damage, no reuse", "calibrated, damage"), ("hobbit low", "calibrated, damage"),
    ("damage low", "calibrated, damage"), ("damage low", "hobbit low"), ("damage skip", "damage low"),
    ("skip", "calibrated, damage"), ("skip, renormalised", "skip"), ("prefill attention", "prefill mass"),
    ("prefill damage", "prefill mass"), ("prefill damage", "prefill attention"),
)  # fmt: skip


def ablation_settings(o: Options, variants: dict[str, dict[str, Any]]) -> list[Setting]:
    return [
        Setting(family, f"{r:g}", PolicyOptions("dymoe", retention=r, **knobs))
        for family, knobs in variants.items()
        for r in o.ablation_retentions
    ]
