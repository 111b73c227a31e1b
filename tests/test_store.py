"""Opening models: pairs and stock GGUFs; every altered, cut or missing file is named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from checkpoints import (
    N_EMBD,
    N_EXPERT,
    N_FF,
    piece_bytes,
    write_stock,
)
from moe_edge.convert.convert import convert
from moe_edge.models.errors import (
    BadChecksum,
    BadFile,
    BadMagic,
    CutFile,
    MissingFile,
    MoeEdgeError,
    UsageError,
    WrongStore,
)
from moe_edge.models.formats.gguf import open_gguf, read_gguf
from moe_edge.models.store.skeleton import skeleton_for
from moe_edge.models.store.store import open_model


@pytest.fixture
def pair(stock: Path, tmp_path: Path) -> Path:
    convert(stock, tmp_path / "m.gguf")
    return tmp_path / "m.gguf"


def flip_byte(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def test_altered_expert_is_found_by_verify(pair: Path) -> None:
    model = open_model(pair)
    piece = model.pieces[7]
    flip_byte(model.files[0], piece.offset + 100)
    open_model(pair)
    with pytest.raises(BadChecksum) as caught:
        open_model(pair, verify=True)
    assert piece.name in str(caught.value) and "m.experts.gguf" in str(caught.value)


def test_store_of_another_conversion_is_wrong(pair: Path, stock: Path, tmp_path: Path) -> None:
    other = convert(stock, tmp_path / "other.gguf", type="Q4_0")
    mine = open_model(pair).store_id
    shutil.copy(tmp_path / "other.experts.gguf", tmp_path / "m.experts.gguf")
    with pytest.raises(WrongStore) as caught:
        open_model(pair)
    assert mine in str(caught.value) and other.store_id in str(caught.value)


def test_missing_store_is_named_with_the_command(pair: Path) -> None:
    pair.with_name("m.experts.gguf").unlink()
    with pytest.raises(MissingFile, match=r"m\.experts\.gguf: .*moe-edge convert stock\.gguf -o .*m\.gguf"):
        open_model(pair)


def test_cut_store_names_the_tensor(pair: Path) -> None:
    store = pair.with_name("m.experts.gguf")
    store.write_bytes(store.read_bytes()[:-10])
    with pytest.raises(CutFile, match=r"tensor 'blk\.1\.ffn_down_exps\.3\.weight' needs bytes \d+-\d+ but"):
        open_model(pair)


def test_store_without_magic_is_refused(pair: Path) -> None:
    pair.with_name("m.experts.gguf").write_bytes(b"not a model at all")
    with pytest.raises(BadMagic):
        open_model(pair)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (b"blk.1.ffn_up_exps.2.weight", b"blk.1.ffn_up_exps.9.weight", "'blk.1.ffn_up_exps.2.weight' is missing"),
        (b"blk.1.ffn_up_exps.2.weight", b"blk.1.ffn_xx_exps.2.weight", "is not one of an expert store"),
        (b"\x04\x00\x00\x00high", b"\x04\x00\x00\x00hihi", "levels ['hihi']"),
        (b"moe_edge.checksums", b"moe_edge.checkswms", "has 0 checksums"),
        (b"moe_edge.format_version\x04\0\0\0\1", b"moe_edge.format_version\x04\0\0\0\3", "format version 3"),
        (b"moe_edge.kind", b"moe_edge.kinb", "expected a moe-edge experts file"),
    ],
)
def test_store_that_is_not_what_it_claims_is_refused(pair: Path, old: bytes, new: bytes, says: str) -> None:
    store = pair.with_name("m.experts.gguf")
    data = store.read_bytes()
    if b"high" in old:  # the length of a string is eight bytes
        old, new = (each[:4] + bytes(4) + each[4:] for each in (old, new))
    assert data.count(old) == 1
    store.write_bytes(data.replace(old, new))
    with pytest.raises(BadFile) as caught:
        open_model(pair)
    assert says in str(caught.value)


def test_flipped_store_header_never_escapes_our_errors(pair: Path) -> None:
    store = pair.with_name("m.experts.gguf")
    data, n = store.read_bytes(), len(read_gguf(store).header)
    refused = 0
    for at in range(0, n, 3):
        with open(store, "r+b") as file:
            file.seek(at)
            file.write(bytes([data[at] ^ 0x11]))
        try:
            open_model(pair)
        except MoeEdgeError:
            refused += 1
        with open(store, "r+b") as file:
            file.seek(at)
            file.write(data[at : at + 1])
    assert refused > 0.85 * len(range(0, n, 3))  # the rest is in names and numbers that nothing depends on


def test_store_given_as_model_names_its_skeleton(pair: Path) -> None:
    with pytest.raises(UsageError, match=r"give its skeleton, .*m\.gguf"):
        open_model(pair.with_name("m.experts.gguf"))


def test_folder_with_one_model_is_that_model(pair: Path, stock: Path) -> None:
    assert open_model(pair.parent).skeleton == pair
    shutil.copy(stock, pair.parent / "second.gguf")
    with pytest.raises(MissingFile, match=r"exactly one GGUF model, found 2: m\.gguf, second\.gguf"):
        open_model(pair.parent)


def test_checkpoint_folder_names_the_command(checkpoint: Path) -> None:
    with pytest.raises(MissingFile, match="moe-edge convert"):
        open_model(checkpoint)


def test_stock_gguf_is_read_in_place(stock: Path, tmp_path: Path) -> None:
    model = open_model(stock, tmp_path)
    assert model.in_place and model.checksums is None and model.files == (stock,)
    assert model.skeleton.parent == tmp_path / "skeletons"
    stacked = open_gguf(stock).tensors["blk.0.ffn_down_exps.weight"]
    piece = model.pieces[3 * 2 + 2]
    assert piece.name == "blk.0.ffn_down_exps.weight[2]" and (piece.cols, piece.rows) == (N_FF, N_EMBD)
    assert (
        piece.offset == stacked.offset + 2 * stacked.nbytes // N_EXPERT and piece.nbytes == stacked.nbytes // N_EXPERT
    )
    assert model.expert_bytes == sum(p.nbytes for p in model.pieces) == 6 * stacked.nbytes
    kv = read_gguf(model.skeleton).kv
    stat = stock.stat()
    assert kv["moe_edge.in_place"] is True and kv["moe_edge.store_id"] == model.store_id
    assert kv["moe_edge.source"] == str(stock) and kv["moe_edge.source_files"] == [str(stock)]
    assert kv["moe_edge.source_identity"] == [f"{stat.st_size}:{stat.st_mtime_ns}"]
    assert open_model(model.skeleton) == model
    with pytest.raises(UsageError, match="carries no checksums"):
        open_model(stock, tmp_path, verify=True)


def test_cached_skeleton_is_found_again_until_the_source_changes(stock: Path, tmp_path: Path) -> None:
    source = Path(shutil.copy(stock, tmp_path / "s.gguf"))
    first = skeleton_for(source, tmp_path)
    written = first.stat().st_mtime_ns
    assert skeleton_for(source, tmp_path) == first and first.stat().st_mtime_ns == written
    os.utime(source, ns=(1, 1))
    assert skeleton_for(source, tmp_path) != first
    with pytest.raises(WrongStore, match="was made for"):
        open_model(first)
    assert not list((tmp_path / "skeletons").glob("*.part"))


def test_damaged_cached_skeleton_is_written_again(stock: Path, tmp_path: Path) -> None:
    first = skeleton_for(stock, tmp_path)
    whole = first.read_bytes()
    first.write_bytes(whole[:5000])
    assert skeleton_for(stock, tmp_path) == first and first.read_bytes() == whole


def test_cache_folder_follows_the_environment(stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOE_EDGE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert skeleton_for(stock).parent == tmp_path / "xdg" / "moe-edge" / "skeletons"
    monkeypatch.setenv("MOE_EDGE_CACHE", str(tmp_path / "own"))
    assert skeleton_for(stock).parent == tmp_path / "own" / "skeletons"


def test_split_stock_gguf_is_read_in_place(stock: Path, tmp_path: Path) -> None:
    whole = gguf.GGUFReader(stock)
    tensors, parts = whole.tensors, [tmp_path / f"s-0000{n}-of-00002.gguf" for n in (1, 2)]
    for number, path in enumerate(parts):
        writer = gguf.GGUFWriter(path, "olmoe")
        if number == 0:
            writer.add_uint32("olmoe.feed_forward_length", N_FF)
            writer.add_uint32("olmoe.expert_used_count", 2)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        for tensor in tensors[number::2]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    split, one = open_model(parts[1], tmp_path), open_model(stock, tmp_path)
    assert split.files == tuple(parts) and {piece.file for piece in split.pieces} == {0, 1}
    assert [piece_bytes(split, n) for n in range(24)] == [piece_bytes(one, n) for n in range(24)]
    assert not [key for key in read_gguf(split.skeleton).kv if key.startswith("split.")]
    assert convert(parts[0], tmp_path / "m.gguf").store_id == convert(stock, tmp_path / "n.gguf").store_id


def test_experts_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    path = write_stock(tmp_path / "m.gguf")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"blk.1.ffn_gate_exps.weight", b"blk.1.ffn_gate_expz.weight"))
    assert open_model(path, tmp_path).layers[1].projections == ("up", "down")
    path.write_bytes(data.replace(b"blk.1.ffn_down_exps.weight", b"blk.1.ffn_down_expz.weight"))
    with pytest.raises(BadFile, match="layer 1 has expert tensors"):
        open_model(path, tmp_path)


def test_opening_a_model_imports_neither_gguf_nor_numpy(stock: Path, tmp_path: Path) -> None:
    script = (
        "import sys\nfrom moe_edge.models.store.store import open_model\n"
        f"open_model({str(stock)!r}, {str(tmp_path)!r})\n"
        "assert not {'gguf', 'numpy', 'llama_cpp'} & set(sys.modules), 'heavy imports'\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_store_of_18432_tensors_opens_in_half_a_second(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "qwen3moe")
    writer.add_uint32("qwen3moe.expert_feed_forward_length", 1)
    writer.add_uint32("qwen3moe.expert_used_count", 8)
    for layer in range(48):
        for name in ("gate", "up", "down"):
            writer.add_tensor(f"blk.{layer}.ffn_{name}_exps.weight", np.ones((128, 1, 1), np.float32))
    writer.add_tensor("token_embd.weight", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    convert(tmp_path / "big.gguf", tmp_path / "m.gguf", threads=1)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        assert len(open_model(tmp_path / "m.gguf").pieces) == 18432
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.5, seconds
