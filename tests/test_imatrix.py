"""Importance matrices as llama-imatrix writes them: means, counts, and files that are not one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from moe_edge.convert.imatrix import fill_unused, read_imatrix
from moe_edge.models.errors import BadFile, BadMagic, CutFile, MissingFile, MoeEdgeError
from moe_edge.models.store.experts import MoELayer

LAYER = MoELayer(0, 2, 4, 3, False, True, ("up", "gate", "down"))
FUSED = MoELayer(0, 2, 4, 3, True, True, ("gate_up", "down"))

SUMS = {
    "blk.0.ffn_up_exps.weight": ([[2, 4, 6, 8], [0, 0, 0, 0]], [[2], [0]]),
    "blk.0.ffn_gate_exps.weight": ([[2, 4, 6, 8], [0, 0, 0, 0]], [[2], [0]]),
    "blk.0.ffn_down_exps.weight": ([[3, 0, 9], [0, 0, 0]], [[3], [0]]),
    "blk.0.attn_q.weight": ([5, 0, 10, 20], [10]),
    "blk.0.attn_k.weight": ([5, 0, 10, 20], [0]),
}


def write_imatrix(path: Path, sums: dict[str, Any] = SUMS, kind: str | None = "imatrix", **tensors: Any) -> Path:
    """`tensors`: more, or instead of one; None leaves it out; `__` stands for a dot."""
    writer = gguf.GGUFWriter(path, "")
    writer.kv_data[0].clear()  # llama-imatrix writes no architecture
    if kind is not None:
        writer.add_string("general.type", kind)
    writer.add_array("imatrix.datasets", ["wiki.txt"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 512)
    found = {}
    for name, (squares, counts) in sums.items():
        found[f"{name}.in_sum2"], found[f"{name}.counts"] = squares, counts
    found |= {name.replace("__", "."): value for name, value in tensors.items()}
    for name, value in found.items():
        if value is not None:
            writer.add_tensor(name, value if isinstance(value, np.ndarray) else np.array(value, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_sums_become_means_and_counts_stay(tmp_path: Path) -> None:
    found = read_imatrix(write_imatrix(tmp_path / "i.gguf"))
    assert (found.datasets, found.chunk_count, found.chunk_size) == (("wiki.txt",), 3, 512)
    assert found.squares["blk.0.ffn_up_exps.weight"].tolist() == [[1, 2, 3, 4], [0, 0, 0, 0]]
    assert found.squares["blk.0.attn_q.weight"].tolist() == [[0.5, 0, 1, 2]]
    assert found.counts["blk.0.ffn_down_exps.weight"].tolist() == [3, 0]
    assert {name: rows.tolist() for name, rows in found.dense_importance().items()} == {
        "blk.0.attn_q.weight": [0.5, 0, 1, 2]
    }
    assert found.routing_counts([LAYER]).tolist() == [[2, 0]]


def test_experts_get_their_rows_and_unused_ones_none(tmp_path: Path) -> None:
    found = read_imatrix(write_imatrix(tmp_path / "i.gguf")).expert_importance([LAYER])
    assert {key: rows.tolist() for key, rows in found.items()} == {
        (0, 0, "up"): [1, 2, 3, 4], (0, 0, "gate"): [1, 2, 3, 4], (0, 0, "down"): [1, 0, 3],
    }  # fmt: skip


def test_fused_and_split_models_use_each_other(tmp_path: Path) -> None:
    split = read_imatrix(write_imatrix(tmp_path / "split.gguf"))
    assert split.expert_importance([FUSED])[0, 0, "gate_up"].tolist() == [1, 2, 3, 4]
    sums = {"blk.0.ffn_gate_up_exps.weight": SUMS["blk.0.ffn_up_exps.weight"]}
    fused = read_imatrix(write_imatrix(tmp_path / "fused.gguf", sums))
    assert set(fused.expert_importance([LAYER])) == {(0, 0, "up"), (0, 0, "gate")}
    assert fused.routing_counts([LAYER]).tolist() == [[2, 0]]


def test_unused_expert_gets_the_mean_of_its_layer() -> None:
    rows = {0: [1.0, 3.0], 1: [3.0, 5.0], 3: [0.0, 0.0]}
    layers = [MoELayer(number, 4, 2, 2, False, False, ("up", "down")) for number in (5, 6)]
    filled = fill_unused({(5, each, "up"): np.array(row, np.float32) for each, row in rows.items()}, layers)
    assert {key: values.tolist() for key, values in filled.items()} == {
        (5, 0, "up"): [1, 3], (5, 1, "up"): [3, 5], (5, 2, "up"): [2, 4], (5, 3, "up"): [2, 4],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"blk__0__attn_q__weight__counts": None}, "'blk.0.attn_q.weight.counts' is missing"),
        ({"blk__0__attn_q__weight__in_sum2": None}, "'blk.0.attn_q.weight.in_sum2' is missing"),
        ({"blk__0__attn_q__weight__counts": [-1]}, "not finite or negative"),
        ({"blk__0__attn_q__weight__counts": [1.5]}, "not whole numbers"),
        ({"blk__0__attn_q__weight__in_sum2": [1, np.nan]}, "not finite or negative"),
        ({"blk__0__attn_q__weight__in_sum2": [1, -2]}, "not finite or negative"),
        ({"blk__0__attn_q__weight__counts": [1, 2]}, "4 columns for each of 2 counts"),
        ({"blk__0__attn_q__weight__counts": np.ones(4, np.float16)}, "is F16, expected F32"),
        ({"blk__0__attn_q__weight": [1, 2]}, "is not one of an importance matrix"),
    ],
)
def test_damaged_matrix_names_the_tensor(tmp_path: Path, tensors: dict[str, Any], says: str) -> None:
    path = write_imatrix(tmp_path / "i.gguf", **tensors)
    with pytest.raises(BadFile) as caught:
        read_imatrix(path)
    assert says in str(caught.value) and "i.gguf" in str(caught.value)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=r"general\.type is None, expected 'imatrix'"):
        read_imatrix(write_imatrix(tmp_path / "none.gguf", kind=None))
    with pytest.raises(BadFile, match=r"general\.type is 'model'"):
        read_imatrix(write_imatrix(tmp_path / "model.gguf", kind="model"))
    with pytest.raises(BadFile, match="without tensors"):
        read_imatrix(write_imatrix(tmp_path / "empty.gguf", {}))
    (tmp_path / "old.dat").write_bytes(b"\x10\0\0\0\x08\0\0\0blk.0.ff")
    with pytest.raises(BadMagic, match="llama-imatrix --output-format gguf"):
        read_imatrix(tmp_path / "old.dat")
    with pytest.raises(MissingFile):
        read_imatrix(tmp_path / "nothing.gguf")


@pytest.mark.parametrize(
    ("use", "says"),
    [
        (lambda m: m.expert_importance([MoELayer(0, 3, 4, 3, False, True, LAYER.projections)]), "expected 3 of 4"),
        (lambda m: m.expert_importance([MoELayer(0, 2, 4, 5, False, True, LAYER.projections)]), "expected 2 of 5"),
        (lambda m: m.routing_counts([MoELayer(0, 3, 4, 3, False, True, LAYER.projections)]), "2 counts, expected 3"),
        (lambda m: m.routing_counts([MoELayer(7, 2, 4, 3, False, True, LAYER.projections)]), "experts in layer 7"),
    ],
)
def test_matrix_of_another_model_is_refused(tmp_path: Path, use: Callable[[Any], object], says: str) -> None:
    found = read_imatrix(write_imatrix(tmp_path / "i.gguf"))
    with pytest.raises(BadFile, match=says):
        use(found)


def test_cut_or_flipped_matrix_never_escapes_our_errors(tmp_path: Path) -> None:
    path = write_imatrix(tmp_path / "i.gguf")
    data = path.read_bytes()
    path.write_bytes(data[:-40])
    with pytest.raises(CutFile):
        read_imatrix(path)
    refused = 0
    for at in range(0, len(data), 3):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x11]) + data[at + 1 :])
        try:
            read_imatrix(path)
        except MoeEdgeError:
            refused += 1
    assert refused > 0.6 * len(range(0, len(data), 3))  # the rest are other numbers, which an imatrix may hold
