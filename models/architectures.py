"""What differs between architectures when their experts are cut down to width-1 stubs.

Knows which metadata key sizes the expert tensors of each llama.cpp architecture, and which other keys must
change with it so that the dense tensors keep their shape. Pure: no files, no GGUF. Every entry was tried on
tiny random models (widths measured by changing one key at a time); what was not tried is refused by name.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from moe_edge.models.errors import BadFile, UnknownArchitecture, UnknownName, printable

KeyValue = int | list[int]

EXPERT_WIDTH = "expert_feed_forward_length"
DENSE_WIDTH = "feed_forward_length"
SHARED_WIDTH = "expert_shared_feed_forward_length"
SHARED_COUNT = "expert_shared_count"
U32_MAX = 2**32 - 1
LONGEST_NAME = 40  # characters of a name from a file that a message repeats


@dataclass(frozen=True)
class Architecture:
    """One llama.cpp architecture.

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


def _table() -> dict[str, Architecture]:
    by_expert_width = (
        "qwen2moe qwen3moe qwen3next qwen35moe qwen4exp ernie4_5-moe lfm2moe gemma4 gpt-oss grok grovemoe "
        "maple mellum mimo2 nemotron_h_moe qwen3vlmoe smallthinker step35"
    )
    by_dense_width = (
        "olmoe phimoe llama granitemoe granite_swa minimax-01 minimax-m2 arctic dbrx granite granitehybrid mistral3"
    )
    by_count = (
        "deepseek2 glm4moe dots1 afmoe bailingmoe deepseek deepseek2-ocr deepseek32 glm-dsa kimi-linear "
        "mistral4 minimax-m3 deepseek4 kimi-k3 glm5-next hy_v4 dots3note"
    )
    entries = [Architecture(name) for name in by_expert_width.split()]
    entries += [Architecture(name, DENSE_WIDTH) for name in by_dense_width.split()]
    entries += [Architecture(name, count_times_width=True) for name in by_count.split()]
    entries += [Architecture(name, state_shared_width=True) for name in "cohere2moe laguna exaone-moe hy_v3".split()]
    entries += [
        Architecture("hunyuan-moe", DENSE_WIDTH, state_shared_width=True),
        Architecture("bailingmoe2", count_times_width=True, shared_width_wins=True),
        Architecture("bailingmoe3", count_times_width=True, shared_width_wins=True),
    ]
    return {entry.name: entry for entry in entries}


ARCHITECTURES: Mapping[str, Architecture] = _table()

# Tried, and known not to work: stubs of width 1 would change the shape of dense tensors.
DIFFUSION = "it writes by diffusion, all tokens at once and without a KV cache; llama.cpp's llama-diffusion-cli runs it"
REFUSED: Mapping[str, str] = {
    "llada-moe": DIFFUSION,
    "rnd1": DIFFUSION,
    "llama4": "its shared expert has the width of the experts and no key of its own",
    "jamba": "its dense layers have the width of the experts",
}

# Hugging Face classes that convert.hf reads, and the llama.cpp architecture of each.
HF_CLASSES: Mapping[str, str] = {"OlmoeForCausalLM": "olmoe", "Qwen3MoeForCausalLM": "qwen3moe"}


def find_architecture(name: str, where: str) -> Architecture:
    """The architecture called `name`; `where` (a file) is named in the error.

    Raises UnknownName for one that is refused (with the reason), and UnknownArchitecture for one not in the table.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    if name in REFUSED:
        raise UnknownName(f"{where}: architecture '{name}' is not supported: {REFUSED[name]}")
    called = printable(name if len(name) <= LONGEST_NAME else name[:LONGEST_NAME] + "...")
    near = difflib.get_close_matches(name[:LONGEST_NAME], ARCHITECTURES, n=1)
    guess = f"; did you mean '{near[0]}'?" if near else ""
    raise UnknownArchitecture(f"{where}: unknown architecture '{called}'{guess}", name)


def find_hf_class(name: str, where: str) -> Architecture:
    """The architecture of a Hugging Face model class. Raises UnknownName for a class convert.hf cannot read."""
    if name in HF_CLASSES:
        return ARCHITECTURES[HF_CLASSES[name]]
    hint = did_you_mean(name, HF_CLASSES)
    raise UnknownName(
        f"{where}: cannot convert a checkpoint of class '{name}'{hint}; "
        "convert it with llama.cpp's convert_hf_to_gguf.py and give moe-edge the GGUF"
    )


def did_you_mean(name: str, known: Mapping[str, object]) -> str:
    """`; did you mean 'lfu'? known: lfu, lru`, to append to a message about an unknown name."""
    near = difflib.get_close_matches(name, known, n=1)
    guess = f"; did you mean '{near[0]}'?" if near else ";"
    return f"{guess} known: {', '.join(sorted(known))}"


def stub_overrides(
    arch: Architecture,
    kv: Mapping[str, object],
    widths: Mapping[int, int],
    shared_width: int | None,
) -> dict[str, KeyValue]:
    """Keys of the skeleton that differ from the source, so that width-1 stubs load beside unchanged dense weights.

    kv: the source's keys and values, with the architecture's prefix; a list where the value is per layer.
    widths: layer -> real expert width, from the tensors (never from the keys).
    shared_width: width of the shared-expert tensors, None when there are none.
    Returns full key -> value; a list has the source's length.
    Raises BadFile when no set of keys can describe the model.
    """
    width_key = arch.key(arch.width_key)
    overrides: dict[str, KeyValue] = {width_key: _ones_like(kv.get(width_key))}
    states_shared_width = bool(kv.get(arch.key(SHARED_WIDTH)))
    if arch.state_shared_width and shared_width is not None and not states_shared_width:
        overrides[arch.key(SHARED_WIDTH)] = shared_width
    if arch.count_times_width and not (arch.shared_width_wins and states_shared_width):
        overrides |= _scaled_count(arch, kv, widths)
    return overrides


def _ones_like(value: object) -> KeyValue:
    return [1] * len(value) if isinstance(value, list) else 1


def _scaled_count(arch: Architecture, kv: Mapping[str, object], widths: Mapping[int, int]) -> dict[str, KeyValue]:
    """C * W for the shared-expert count C: the shared expert stays C * W wide when the width becomes 1."""
    key = arch.key(SHARED_COUNT)
    count = kv.get(key, 0)
    if not count:
        return {}
    distinct = sorted(set(widths.values()))
    if len(distinct) != 1:
        raise BadFile(
            f"{key}: the shared expert's width follows the expert width, which differs between layers "
            f"({distinct}); such a model cannot be given stubs"
        )
    if isinstance(count, list):
        return {key: [_checked_product(key, int(each), distinct[0]) for each in count]}
    if not isinstance(count, int):
        raise BadFile(f"{key}: expected a number, found {count!r}")
    return {key: _checked_product(key, count, distinct[0])}


def _checked_product(key: str, count: int, width: int) -> int:
    if not 0 <= count * width <= U32_MAX:
        raise BadFile(f"{key}: {count} shared experts of width {width} do not fit a 32-bit key")
    return count * width
