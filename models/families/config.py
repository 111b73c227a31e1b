"""A config.json, read with distrust; and the key-values that all architectures have of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_edge.models.errors import BadFile, UnknownName
from moe_edge.models.formats.files import shown
from moe_edge.models.formats.safetensors import as_object

Value = int | float | bool | str | list[int] | list[bool]
Keys = dict[str, Value]  # key without the architecture's prefix -> value

F32_MAX = 3.4e38
MAX_ITEMS = 1 << 12  # of a list with a value for each layer

# What releases of transformers and the models' own code call the same thing; where several are there they must agree.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
USED_COUNTS = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_k", "moe_topk")


class Config:
    """config.json of a checkpoint; of a model with several, its text part. path: for messages."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self.values = values
        rope = as_object(values.get("rope_parameters"), path, "rope_parameters")
        scaling = as_object(values.get("rope_scaling"), path, "rope_scaling")
        self.rope: dict[str, Any] = {**scaling, **rope}  # of transformers 5, or of the releases before
        if "type" in self.rope:
            self.rope.setdefault("rope_type", self.rope["type"])
        if values.get("rope_theta") is not None:
            self.rope.setdefault("rope_theta", values["rope_theta"])

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it is; `default` also where it is null."""
        value = self.values.get(key)
        return default if value is None else value

    def count(self, key: str, default: int | None = None) -> int:
        """A positive whole number. Raises BadFile."""
        return self._count(key, self.get(key, default), 1)

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number that may be 0. Raises BadFile."""
        return self._count(key, self.get(key, default), 0)

    def _count(self, key: str, value: Any, least: int) -> int:
        if type(value) is not int or not least <= value < 1 << 31:
            wanted = "a positive number" if least else "a number of 0 or more"
            raise BadFile(f"{self.path}: {key} is {shown(value)}, expected {wanted}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number. Raises BadFile."""
        return self.as_number(key, self.get(key, default))

    def as_number(self, key: str, value: Any) -> float:
        """`value`, which stands under `key` somewhere. Raises BadFile unless it is a positive number."""
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= F32_MAX:
            raise BadFile(f"{self.path}: {key} is {shown(value)}, expected a positive number")
        return float(value)

    def texts(self, key: str) -> list[str]:
        """A list of words, one for each layer. Raises BadFile."""
        value = self.get(key, [])
        if not isinstance(value, list) or len(value) > MAX_ITEMS or not all(isinstance(each, str) for each in value):
            raise BadFile(f"{self.path}: {key} is {shown(value)}, expected a list of names")
        return value

    def same_count(self, key: str, default: int | None = None) -> int:
        """A number, or a list of it for each layer. Raises UnknownName when the layers differ."""
        value = self.get(key, default)
        if not isinstance(value, list):
            return self._count(key, value, 1)
        if not value or len(value) > MAX_ITEMS:
            raise BadFile(f"{self.path}: {key} is {shown(value)}, expected a positive number")
        if any(each != value[0] for each in value):
            raise UnknownName(f"{self.path}: {key} differs between layers, which llama.cpp does not follow")
        return self._count(key, value[0], 1)

    @property
    def n_layer(self) -> int:
        return self.count("num_hidden_layers")

    @property
    def n_embd(self) -> int:
        return self.count("hidden_size")

    @property
    def n_head(self) -> int:
        return self.count("num_attention_heads")

    @property
    def n_head_kv(self) -> int:
        return self.count("num_key_value_heads", self.n_head)

    @property
    def head_dim(self) -> int:
        """As stated, or what the width leaves to each head."""
        return self.count("head_dim", self.n_embd // self.n_head)

    @property
    def n_expert(self) -> int:
        """Experts of a layer, under whichever name. Raises BadFile when there is none, and when two contradict."""
        return self._agreed(EXPERT_COUNTS, "how many experts a layer has", "the number of experts")

    @property
    def n_expert_used(self) -> int:
        """Experts of each token, under whichever name. Raises BadFile as n_expert does."""
        used = self._agreed(USED_COUNTS, "how many experts a token uses", "the number of experts a token uses")
        if used > self.n_expert:
            raise BadFile(f"{self.path}: num_experts_per_tok is {used}, above num_experts")
        return used

    def _agreed(self, names: Sequence[str], what: str, about: str) -> int:
        named = {key: self.same_count(key) for key in names if self.get(key) is not None}
        if not named:
            raise BadFile(f"{self.path}: does not say {what}; it has none of {', '.join(names)}")
        if len(set(named.values())) > 1:
            said = ", ".join(f"{key} is {count}" for key, count in named.items())
            raise BadFile(f"{self.path}: contradicts itself about {about}: {said}")
        return next(iter(named.values()))


def common_keys(config: Config) -> Keys:
    """The key-values that every architecture has, without its prefix, as llama.cpp's converter writes them.

    Raises BadFile, and UnknownName for a rope that llama.cpp does not have.
    """
    keys: Keys = {
        "block_count": config.n_layer,
        "context_length": config.count("max_position_embeddings"),
        "embedding_length": config.n_embd,
        "attention.head_count": config.n_head,
        "attention.head_count_kv": config.n_head_kv,
        "expert_count": config.n_expert,
        "expert_used_count": config.n_expert_used,
    }
    if config.get("intermediate_size") is not None:
        keys["feed_forward_length"] = config.count("intermediate_size")
    for name in ("rms_norm_eps", "norm_eps"):
        if config.get(name) is not None:
            keys["attention.layer_norm_rms_epsilon"] = config.number(name)
            break
    if config.get("head_dim") is not None:
        keys |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    for name, key in (("n_group", "expert_group_count"), ("topk_group", "expert_group_used_count")):
        if config.get(name) is not None:
            keys[key] = config.count(name)
    return keys | rope_keys(config, config.rope)


def rope_keys(config: Config, rope: Mapping[str, Any]) -> Keys:
    """freq_base and the scaling of a rope. Raises UnknownName for a scaling that llama.cpp does not have."""
    kind = rope.get("rope_type") or "default"
    keys: Keys = {}
    if rope.get("rope_theta") is not None:
        keys["rope.freq_base"] = config.as_number("rope_theta", rope["rope_theta"])
    if kind == "default":
        return keys
    if kind == "dynamic" and rope.get("alpha") is not None:
        return _stretched(config, rope)
    if kind not in ("linear", "yarn"):
        raise UnknownName(
            f"{config.path}: rope_parameters has rope_type '{kind}'; known: default, linear, yarn, dynamic with alpha"
        )
    keys |= {"rope.scaling.type": kind, "rope.scaling.factor": config.as_number("factor", rope.get("factor"))}
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings", config.get("max_position_embeddings"))
        keys["rope.scaling.original_context_length"] = int(config.as_number("original context", original))
        for name, key in (
            ("extrapolation_factor", "ext_factor"),
            ("attention_factor", "attn_factor"),
            ("beta_fast", "beta_fast"),
            ("beta_slow", "beta_slow"),
        ):
            if rope.get(name) is not None:
                keys[f"rope.scaling.yarn_{key}"] = config.as_number(name, rope[name])
    return keys


def _stretched(config: Config, rope: Mapping[str, Any]) -> Keys:
    """A rope whose base grows with a factor alpha, once and for all, which llama.cpp has as another base.

    Hunyuan states alpha = 1000, with which it reads 256 Ki tokens whatever max_position_embeddings says.
    """
    alpha, base = (config.as_number(name, rope.get(name)) for name in ("alpha", "rope_theta"))
    dim = config.head_dim
    if dim <= 2:
        raise BadFile(f"{config.path}: head_dim is {dim}, too small for a rope with alpha")
    keys: Keys = {
        "rope.freq_base": base * alpha ** (dim / (dim - 2)),
        "rope.scaling.type": "none",
        "rope.scaling.factor": 1.0,
    }
    if alpha == 1000:
        keys |= {"rope.scaling.original_context_length": 1 << 18, "context_length": 1 << 18}
    return keys
