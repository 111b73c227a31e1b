"""Which keys of a skeleton change with the width, per architecture, and which architectures are refused."""

from __future__ import annotations

import pytest
from moe_edge.models.architectures import find_architecture, stub_overrides
from moe_edge.models.errors import (
    BadFile,
    UnknownName,
)
from moe_edge.models.families import ARCHITECTURES


def test_width_key_becomes_one_and_lists_keep_their_length() -> None:
    assert stub_overrides(ARCHITECTURES["olmoe"], {}, {0: 64}, None) == {"olmoe.feed_forward_length": 1}
    kv = {"qwen3moe.expert_feed_forward_length": [64, 64, 64]}
    assert stub_overrides(ARCHITECTURES["qwen3moe"], kv, {0: 64}, None) == {
        "qwen3moe.expert_feed_forward_length": [1, 1, 1]
    }


def test_shared_expert_keeps_its_width() -> None:
    deepseek = stub_overrides(ARCHITECTURES["deepseek2"], {"deepseek2.expert_shared_count": 2}, {1: 64, 2: 64}, 128)
    assert deepseek == {"deepseek2.expert_feed_forward_length": 1, "deepseek2.expert_shared_count": 128}
    hunyuan = stub_overrides(ARCHITECTURES["hunyuan-moe"], {}, {0: 64}, 96)
    assert hunyuan == {"hunyuan-moe.feed_forward_length": 1, "hunyuan-moe.expert_shared_feed_forward_length": 96}
    bailing = ARCHITECTURES["bailingmoe2"]
    kv = {"bailingmoe2.expert_shared_count": 2, "bailingmoe2.expert_shared_feed_forward_length": 80}
    assert stub_overrides(bailing, kv, {0: 64}, 160) == {"bailingmoe2.expert_feed_forward_length": 1}
    assert stub_overrides(bailing, {"bailingmoe2.expert_shared_count": 2}, {0: 64}, 128) == {
        "bailingmoe2.expert_feed_forward_length": 1, "bailingmoe2.expert_shared_count": 128
    }  # fmt: skip


def test_shared_width_that_no_key_can_say_is_refused() -> None:
    with pytest.raises(BadFile, match=r"differs between layers \(\[64, 96\]\)"):
        stub_overrides(ARCHITECTURES["glm4moe"], {"glm4moe.expert_shared_count": 1}, {0: 64, 1: 96}, 64)


def test_unknown_and_refused_architectures_are_named() -> None:
    with pytest.raises(UnknownName, match=r"m\.gguf: unknown architecture 'qwen3mo'; did you mean 'qwen3moe'"):
        find_architecture("qwen3mo", "m.gguf")
    with pytest.raises(UnknownName, match="'llama4' is not supported: its shared expert"):
        find_architecture("llama4", "m.gguf")
    with pytest.raises(UnknownName, match="'jamba' is not supported: its dense layers"):
        find_architecture("jamba", "m.gguf")
