"""gpt-oss: experts in MXFP4 with biases, gate and up rows in turn."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from moe_edge.models.families.config import Config
from moe_edge.models.families.family import Architecture, Checkpoint, Experts, Family, Named, Tensors, Value
from moe_edge.models.families.tensors import computed, moved, mxfp4, slice_of
from moe_edge.models.formats.derived import DerivedEntry
from moe_edge.models.formats.gguf import TensorEntry
from moe_edge.models.formats.safetensors import SafeTensor

if TYPE_CHECKING:  # numpy: not for the runtime, see derived.py
    from moe_edge.models.formats.derived import Array

EXPERTS = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up|down)_proj(_blocks|_scales|_bias)?")
ROWS = {"gate": (0, 2), "up": (1, 2), "down": (0, 1)}  # first row and step, of those that the checkpoint stacks


def keys(config: Config) -> Mapping[str, Value | None]:
    return {
        "attention.sliding_window": config.count("sliding_window"),
        "expert_feed_forward_length": config.count("intermediate_size"),
    }


def rename(config: Config, name: str) -> str | None:
    return f"{name}.weight" if name.endswith(".sinks") else name


def experts(config: Config, name: str, tensor: SafeTensor, tensors: Tensors) -> Experts | None:
    match = EXPERTS.fullmatch(name)
    if match is None:
        return None
    layer, stacked, kind = int(match[1]), match[2], match[3]
    if kind in ("_scales", "_bias"):  # come with the blocks; see biases() and dense()
        return {}
    found: dict[tuple[int, int, str], TensorEntry] = {}
    for expert in range(min(tensor.shape[0], 1 << 13)):
        one = slice_of(tensor, expert)
        for projection in ("gate", "up") if stacked == "gate_up" else ("down",):
            label = f"{tensor.name}[{expert}].{projection}"
            first, step = ROWS[projection]
            if kind == "_blocks":
                scales = slice_of(tensors[name.replace("_blocks", "_scales")], expert)
                found[layer, expert, projection] = mxfp4(label, one, scales, first, step)
            else:
                found[layer, expert, projection] = turned(label, one, first, step)
    return found


def turned(name: str, tensor: SafeTensor, first: int, step: int) -> DerivedEntry:
    """A float expert, which is stored [in, out]; every step-th output from the first."""
    import numpy as np

    n_in, n_out = tensor.shape
    shape = (len(range(first, n_out, step)), n_in)

    def turn(bits: Array) -> Array:
        return np.ascontiguousarray(bits.T[first::step])

    return moved(name, tensor, shape, turn)


def biases(config: Config, tensors: Tensors) -> Mapping[tuple[int, str], DerivedEntry]:
    found = {}
    for name, tensor in tensors.items():
        match = EXPERTS.fullmatch(name)
        if match and match[2] == "gate_up" and match[3] == "_bias":
            for projection in ("gate", "up"):
                label = f"blk.{match[1]}.ffn_{projection}_exps.bias"
                found[int(match[1]), projection] = part_of_bias(label, tensor, *ROWS[projection])
    return found


def part_of_bias(name: str, tensor: SafeTensor, first: int, step: int) -> DerivedEntry:
    shape = (tensor.shape[0], len(range(first, tensor.shape[1], step)))
    return computed(name, [tensor], shape, lambda parts: parts[0].floats()[:, first::step])


def down_bias(config: Config, tensors: Tensors) -> Sequence[Named]:
    """The bias behind the down product, which stays with the dense tensors."""
    return [
        Named(
            f"blk.{match[1]}.ffn_down_exps.bias",
            computed(name, [tensor], tensor.shape, lambda parts: parts[0].floats()),
            is_gguf=True,
        )
        for name, tensor in tensors.items()
        if (match := EXPERTS.fullmatch(name)) and match[2] == "down" and match[3] == "_bias"
    ]


FAMILY = Family(
    "gpt-oss",
    (Architecture("gpt-oss"),),
    (
        Checkpoint(
            ("GptOssForCausalLM",),
            "gpt-oss",
            keys=keys,
            defaults={"rms_norm_eps": 1e-5, "rope_theta": 150000.0, "swiglu_limit": 7.0, "swiglu_alpha": 1.702},
            rename=rename,
            experts=experts,
            biases=biases,
            extra=down_bias,
            needs_output=True,
            fixed={"swiglu_limit": 7.0, "swiglu_alpha": 1.702},
        ),
    ),
    order=60,
)
