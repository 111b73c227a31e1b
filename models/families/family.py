"""What a family of models is to moe-edge: its llama.cpp architectures, and how its checkpoints become GGUF.

A family is one file of this folder that ends with `FAMILY = Family(...)`. What llama.cpp knows by itself (the graph,
the router, the activation) is not repeated here; what it must be told in key-values is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe_edge.models.families.config import Config, Keys, Value
from moe_edge.models.formats.derived import DerivedEntry
from moe_edge.models.formats.gguf import TensorEntry
from moe_edge.models.formats.safetensors import SafeTensor

EXPERT_WIDTH = "expert_feed_forward_length"
DENSE_WIDTH = "feed_forward_length"

__all__ = ["Architecture", "Checkpoint", "Family", "Keys", "Named", "Value"]



@dataclass(frozen=True)
class Architecture:
    """One llama.cpp architecture, and what changes in its key-values when its experts are cut to width-1 stubs.

    name: value of `general.architecture`, also the prefix of its keys.
    width_key: the key, without prefix, that sizes the expert tensors.
    count_times_width: the shared expert is width * `expert_shared_count` wide, unless `shared_width_wins`
        and the model states its shared width: the count must grow as the width shrinks.
    shared_width_wins: `expert_shared_feed_forward_length`, when present, sizes the shared expert instead.
    state_shared_width: without `expert_shared_feed_forward_length` the shared expert follows the width key:
        the key must be added, with the width the tensors have.
    """

    name: str
    width_key: str = EXPERT_WIDTH
    count_times_width: bool = False
    shared_width_wins: bool = False
    state_shared_width: bool = False

    def key(self, suffix: str) -> str:
        """`qwen3moe.expert_count` for `expert_count`."""
        return f"{self.name}.{suffix}"


@dataclass(frozen=True)
class Named:
    """A dense tensor under a Hugging Face name that gguf's table knows, or (`is_gguf`) under its GGUF name."""

    name: str
    entry: TensorEntry
    is_gguf: bool = False


# (layer, expert, projection) -> its bytes
Experts = Mapping[tuple[int, int, str], TensorEntry]
Tensors = Mapping[str, SafeTensor]


@dataclass(frozen=True)
class Checkpoint:
    """Hugging Face classes that are converted alike.

    classes: the first is the name in transformers. architecture: of llama.cpp.
    keys: what the key-values say beyond common_keys(); a value of None takes a common one out.
    defaults: what transformers takes for settings that config.json leaves out.
    fixed: setting -> what llama.cpp's graph takes for granted, or a tuple of what it can; others are refused by name.
    rename: Hugging Face name -> the name gguf's table knows; None leaves the tensor out.
    dense: (config, name, tensor, all tensors) -> what it becomes; None: itself.
    experts: (config, name, tensor, all tensors) -> experts that it holds; None: it holds none. Besides those forms that
    convert/hf.py knows by itself.
    biases: (config, tensors) -> (layer, "up" | "gate") -> F32 [n_ff, n_expert].
    needs_output: llama.cpp's graph has no tied embedding: output.weight must be there.
    extra: (config) -> dense tensors that no tensor of the checkpoint becomes, with their values.
    """

    classes: tuple[str, ...]
    architecture: str
    keys: Callable[[Config], Mapping[str, Value | None]] = lambda config: {}
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    rename: Callable[[Config, str], str | None] = lambda config, name: name
    dense: Callable[[Config, str, SafeTensor, Tensors], Sequence[Named] | None] = lambda *_: None
    experts: Callable[[Config, str, SafeTensor, Tensors], Experts | None] = lambda *_: None
    biases: Callable[[Config, Tensors], Mapping[tuple[int, str], DerivedEntry]] = lambda *_: {}
    needs_output: bool = False
    extra: Callable[[Config, Tensors], Sequence[Named]] = lambda *_: ()


@dataclass(frozen=True)
class Family:
    """architectures: those that run. refused: name -> why it does not. checkpoints: those that are converted.

    refused_classes: Hugging Face class -> why it is not converted, though a GGUF of it is taken.
    order: where it stands in lists, lowest first.
    """

    name: str
    architectures: tuple[Architecture, ...] = ()
    checkpoints: tuple[Checkpoint, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    refused_classes: Mapping[str, str] = field(default_factory=dict)
    order: int = 100
