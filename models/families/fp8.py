"""FP8 checkpoints: a matrix of 8-bit floats with scales beside it, seen as the BF16 matrix it stands for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from moe_edge.models.errors import BadFile, MissingFile
from moe_edge.models.families.tensors import FP8_BLOCK, dequantized_fp8
from moe_edge.models.formats.derived import DerivedEntry
from moe_edge.models.formats.gguf import TensorEntry
from moe_edge.models.formats.safetensors import SafeTensor

FP8 = "F8_E4M3"
SCALES = ("_scale_inv", "_scale")  # behind the name of the weight; both multiply it


@dataclass(frozen=True)
class Fp8Tensor(SafeTensor):
    """The BF16 matrix. raw() and entry() give it, dequantized as it is read."""

    weight: SafeTensor
    scale: SafeTensor

    def raw(self) -> TensorEntry:
        return dequantized_fp8(self.name, self.weight, self.scale)

    def entry(self, name: str, start: int = 0, shape: tuple[int, ...] | None = None) -> TensorEntry:
        whole = dequantized_fp8(name, self.weight, self.scale)
        if shape is None and start == 0:
            return whole
        assert shape is not None
        first, count = start // 2, math.prod(shape)
        return DerivedEntry(
            name,
            shape,
            whole.type,
            whole.path,
            whole.offset,
            2 * count,
            (whole,),
            (self.shape,),
            lambda parts: parts[0].bits.reshape(-1)[first : first + count],
        )


def with_scales(tensors: Mapping[str, SafeTensor]) -> tuple[dict[str, SafeTensor], list[str]]:
    """(the tensors, FP8 ones joined with their scales; names of the scales, which nothing else needs).

    Raises MissingFile for a matrix without scales, BadFile for scales whose shape does not fit.
    """
    found: dict[str, SafeTensor] = {}
    scales = []
    for name, tensor in tensors.items():
        if tensor.dtype != FP8:
            continue
        scale = next((tensors[name + end] for end in SCALES if name + end in tensors), None)
        if scale is None:
            raise MissingFile(f"{tensor.path}: tensor '{name}' is FP8 and has no scales ('{name}{SCALES[0]}')")
        _check(tensor, scale)
        scales.append(scale.name)
        found[name] = Fp8Tensor(
            name, "BF16", tensor.shape, tensor.path, tensor.offset, 2 * math.prod(tensor.shape), tensor, scale
        )
    useless = [name for name in tensors if name.endswith((".input_scale", ".activation_scale"))]
    rest = {name: each for name, each in tensors.items() if name not in scales and name not in useless}
    return {**rest, **found}, [*scales, *useless]


def _check(tensor: SafeTensor, scale: SafeTensor) -> None:
    if len(tensor.shape) != 2:
        raise BadFile(f"{tensor.path}: tensor '{tensor.name}' is FP8 of shape {list(tensor.shape)}, expected a matrix")
    n_rows, n_cols = tensor.shape
    blocks = (-(-n_rows // FP8_BLOCK), -(-n_cols // FP8_BLOCK))
    if scale.shape not in ((), (1,), (n_rows, 1), blocks):
        raise BadFile(
            f"{scale.path}: tensor '{scale.name}' has shape {list(scale.shape)}, expected {list(blocks)} for blocks of "
            f"{FP8_BLOCK} x {FP8_BLOCK}, [{n_rows}, 1] for rows, or one number"
        )
