"""A store of format version 1 that was written once and is kept: it opens, checks, and says what it said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from make_golden_store import GOLDEN, N_TOKENS, PROMPT, answer
from moe_edge.models.errors import MoeEdgeError
from moe_edge.models.formats.gguf import read_gguf
from moe_edge.models.store.source import FORMAT_VERSION
from moe_edge.models.store.store import open_model, store_path

RECORDED = json.loads(GOLDEN.with_name("golden-v1.json").read_text())


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    for path in (GOLDEN, store_path(GOLDEN)):
        shutil.copy(path, tmp_path)
    return tmp_path / GOLDEN.name


def test_it_is_of_version_1_and_opens_with_every_checksum(golden: Path) -> None:
    assert read_gguf(golden).kv[FORMAT_VERSION] == read_gguf(store_path(golden)).kv[FORMAT_VERSION] == 1
    model = open_model(golden, verify=True)
    assert model.levels == ("high", "low") and len(model.pieces) == 2 * 4 * 3 * 2
    assert model.architecture == "qwen3moe" and not model.in_place


def test_it_says_what_it_said(golden: Path) -> None:
    assert RECORDED["prompt"] == PROMPT and len(RECORDED["tokens"]) >= N_TOKENS - 1
    assert answer(golden) == RECORDED["tokens"]


def test_a_store_of_a_later_version_is_refused_by_its_number(golden: Path) -> None:
    key = FORMAT_VERSION.encode()
    data = golden.read_bytes()
    at = data.index(key) + len(key) + 4
    golden.write_bytes(data[:at] + bytes([9]) + data[at + 1 :])
    with pytest.raises(MoeEdgeError, match="9"):
        open_model(golden)
