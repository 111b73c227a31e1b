"""Reading GGUF headers: what GGUFWriter writes is read back, and damaged files end in our errors, never elsewhere."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from moe_edge.models.errors import BadFile, BadMagic, CutFile, MissingFile, MoeEdgeError, UnknownName
from moe_edge.models.formats.ggml_types import find_type, tensor_bytes
from moe_edge.models.formats.gguf import open_gguf, open_headers, read_gguf, read_header
from moe_edge.models.formats.write import GGUFOutput, TensorSpec, encode_kv, kv_string, kv_strings, kv_u32


def write_small(path: Path) -> Path:
    """A GGUF with a value of every kind and three tensors."""
    writer = gguf.GGUFWriter(path, "olmoe")
    writer.add_uint8("k.u8", 200)
    writer.add_int8("k.i8", -3)
    writer.add_uint16("k.u16", 60000)
    writer.add_int16("k.i16", -300)
    writer.add_uint32("k.u32", 4_000_000_000)
    writer.add_int32("k.i32", -70000)
    writer.add_uint64("k.u64", 1 << 60)
    writer.add_int64("k.i64", -(1 << 60))
    writer.add_float32("k.f32", 0.5)
    writer.add_float64("k.f64", 0.1)
    writer.add_bool("k.bool", True)
    writer.add_string("k.string", "Grüße 🦙")
    writer.add_array("k.strings", ["a", "", "ß"])
    writer.add_array("k.numbers", [1, 2, 3])
    writer.add_tensor("one.weight", np.arange(5, dtype=np.float32))
    writer.add_tensor("two.weight", np.arange(64, dtype=np.float16).reshape(2, 32))
    blocks = np.zeros((3, 4, 34), np.uint8)
    writer.add_tensor("three.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def header(n_tensors: int = 0, n_kv: int = 0, version: int = 3, body: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_kv) + body


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def info(name: str = "t", shape: tuple[int, ...] = (4,), type_id: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, type_id, offset)


def test_unknown_type_name_suggests_the_nearest() -> None:
    assert find_type("q4_k").id == 12
    with pytest.raises(UnknownName, match="did you mean 'Q4_K'"):
        find_type("q4k")


def test_header_reads_as_gguf_reader_reads_it(tmp_path: Path) -> None:
    path = write_small(tmp_path / "small.gguf")
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    assert (ours.version, ours.alignment, ours.data_offset) == (3, theirs.alignment, theirs.data_offset)
    names = [key for key in theirs.fields if not key.startswith("GGUF.")]
    assert list(ours.kv) == names
    for key in names:
        assert ours.kv[key] == theirs.fields[key].contents()
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        entry = ours.tensors[tensor.name]
        assert entry.shape == tuple(tensor.shape)
        assert (entry.type, entry.offset, entry.nbytes) == (tensor.tensor_type, tensor.data_offset, tensor.n_bytes)


def test_records_are_the_bytes_of_the_file(tmp_path: Path) -> None:
    path = write_small(tmp_path / "small.gguf")
    kv = read_gguf(path).kv
    records = b"".join(kv.record(key) for key in kv)
    assert path.read_bytes()[24:].startswith(records)
    assert kv.record("k.strings") == kv_strings("k.strings", ["a", "", "ß"])
    assert kv.record("k.u32") == kv_u32("k.u32", 4_000_000_000)
    assert kv.record("k.f64") == encode_kv("k.f64", 0.1, 12)


def test_version_2_is_read(tmp_path: Path) -> None:
    path = write_small(tmp_path / "small.gguf")
    data = bytearray(path.read_bytes())
    data[4] = 2
    path.write_bytes(data)
    assert read_gguf(path).version == 2


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        (b"", BadMagic, "is empty"),
        (b"PK\3\4 this is a zip file", BadMagic, "starts with b'PK"),
        (b"GGUF", CutFile, "the version"),
        (header(version=1), BadFile, "version 1"),
        (header(version=4), BadFile, "version 4"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), BadFile, "big-endian"),
        (header(n_tensors=1 << 60), CutFile, f"{1 << 60} tensors"),
        (header(n_kv=1 << 40), CutFile, f"{1 << 40} key-values"),
        (header(n_kv=1, body=struct.pack("<Q", 1 << 63) + bytes(16)), CutFile, "key-value 0 of 1"),
        (header(n_kv=1, body=string("k") + struct.pack("<IQ", 8, 1 << 62)), CutFile, "key-value 0 of 1"),
        (header(n_kv=1, body=string("k") + struct.pack("<I", 13) + bytes(8)), BadFile, "unknown value type 13"),
        (header(n_kv=1, body=string("k") + struct.pack("<IIQ", 9, 9, 1) + bytes(8)), BadFile, "arrays of value type 9"),
        (header(n_kv=1, body=string("k") + struct.pack("<IIQ", 9, 8, 1 << 61)), CutFile, "key-value 0 of 1"),
        (header(n_kv=1, body=string("k") + struct.pack("<IIQ", 9, 4, 1 << 61)), CutFile, "key-value 0 of 1"),
        (header(n_kv=1, body=struct.pack("<Q", 1) + b"\xff" + struct.pack("<II", 4, 1)), BadFile, "is damaged"),
        (header(n_kv=2, body=2 * kv_u32("k", 1)), BadFile, "'k' appears twice"),
        (header(n_kv=1, body=kv_u32("general.alignment", 24)), BadFile, "alignment is 24"),
        (header(n_kv=1, body=kv_string("general.alignment", "32")), BadFile, "alignment is '32'"),
        (header(1, body=info(shape=(1,) * 5) + bytes(64)), BadFile, "'t' has 5 dimensions"),
        (header(1, body=string("t") + struct.pack("<IIQ", 0, 0, 0) + bytes(64)), BadFile, "0 dimensions"),
        (header(1, body=info(type_id=99) + bytes(64)), BadFile, "'t' has unknown type id 99"),
        (header(1, body=info(shape=(33,), type_id=8) + bytes(64)), BadFile, "not a multiple of Q8_0's block of 32"),
        (header(1, body=info(shape=(0,)) + bytes(64)), BadFile, "impossible shape"),
        (header(1, body=info(shape=(1 << 40, 1 << 40)) + bytes(64)), BadFile, "impossible shape"),
        (header(1, body=info(offset=8) + bytes(64)), BadFile, "offset 8, not a multiple of 32"),
        (header(2, body=2 * info() + bytes(128)), BadFile, "'t' appears twice"),
        (header(1, body=info("blk.3.ffn_up_exps.weight", (16,))), CutFile, "'blk.3.ffn_up_exps.weight' needs bytes"),
        (header(1, body=info(offset=(1 << 64) - 32) + bytes(64)), CutFile, "'t' needs bytes"),
    ],
)
def test_malformed_header_is_refused(tmp_path: Path, data: bytes, error: type[MoeEdgeError], says: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(error) as caught:
        read_gguf(path)
    assert type(caught.value) is error
    assert says in str(caught.value) and "bad.gguf" in str(caught.value)
    if "needs bytes" not in says:  # of a tensor
        with pytest.raises(error) as of_header:
            read_header(path)
        assert str(of_header.value) == str(caught.value)


def test_file_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    data = write_small(tmp_path / "small.gguf").read_bytes()
    last = max(entry.offset + entry.nbytes for entry in read_gguf(tmp_path / "small.gguf").tensors.values())
    path = tmp_path / "cut.gguf"
    for length in range(last):
        path.write_bytes(data[:length])
        with pytest.raises((CutFile, BadMagic)):
            read_gguf(path)


def test_flipped_header_bytes_never_escape_our_errors(tmp_path: Path) -> None:
    data = write_small(tmp_path / "small.gguf").read_bytes()
    path = tmp_path / "flipped.gguf"
    for at in range(read_gguf(tmp_path / "small.gguf").data_offset):
        for flip in (0x01, 0x80, 0xFF):
            path.write_bytes(data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :])
            try:
                file = read_gguf(path)
            except MoeEdgeError:
                continue
            for key in file.kv:
                assert file.kv[key] is not None


def test_cut_file_names_the_tensor(tmp_path: Path) -> None:
    path = write_small(tmp_path / "small.gguf")
    entry = read_gguf(path).tensors["three.weight"]
    path.write_bytes(path.read_bytes()[: entry.offset + 10])
    with pytest.raises(CutFile) as caught:
        read_gguf(path)
    expected = f"needs bytes {entry.offset}-{entry.offset + 408} but the file ends at {entry.offset + 10}"
    assert f"small.gguf: tensor 'three.weight' {expected}" in str(caught.value)


def test_header_is_read_from_a_file_cut_anywhere_after_it(tmp_path: Path) -> None:
    path = write_small(tmp_path / "small.gguf")
    data, whole = path.read_bytes(), read_gguf(path)
    assert read_header(path) == whole
    for length in range(len(data)):
        path.write_bytes(data[:length])
        if length < len(whole.header):
            with pytest.raises((CutFile, BadMagic)):
                read_header(path)
        else:
            cut = read_header(path)
            assert (cut.header, cut.tensors, cut.data_offset) == (whole.header, whole.tensors, whole.data_offset)
            assert cut.file_bytes == length
    assert open_headers(path).tensors == whole.tensors


def test_missing_and_unreadable_paths(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match="no such file"):
        read_gguf(tmp_path / "none.gguf")
    with pytest.raises(MissingFile, match="cannot be read"):
        read_gguf(tmp_path)


def write_split(folder: Path, change: Callable[[int, dict[str, Any]], None] = lambda part, keys: None) -> list[Path]:
    """Three parts of one tensor each; `change` may alter the keys of a part."""
    paths = []
    for part in range(3):
        path = folder / f"m-{part + 1:05d}-of-00003.gguf"
        keys: dict[str, Any] = {"split.no": part, "split.count": 3, "split.tensors.count": 3, "tensor": f"t{part}"}
        change(part, keys)
        writer = gguf.GGUFWriter(path, "olmoe")
        writer.add_uint16("split.no", keys["split.no"])
        writer.add_uint16("split.count", keys["split.count"])
        writer.add_int32("split.tensors.count", keys["split.tensors.count"])
        writer.add_tensor(keys["tensor"], np.full(4, part, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(path)
    return paths


def test_split_model_is_one_model_from_any_part(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    for path in paths:
        model = open_gguf(path)
        assert [part.path for part in model.parts] == paths
        assert [model.tensors[f"t{part}"].path for part in range(3)] == paths
        assert model.architecture == "olmoe" and model.path == paths[0]


def test_missing_parts_are_named(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    paths[1].unlink()
    paths[2].unlink()
    with pytest.raises(MissingFile, match=r"2 of 3 parts missing .*m-00002-of-00003.gguf, m-00003-of-00003.gguf"):
        open_gguf(paths[0])


def test_headers_of_a_split_model_are_enough_but_all_are_needed(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    whole = open_gguf(paths[0])
    for path, part in zip(paths, whole.parts, strict=True):
        path.write_bytes(part.header)
    assert open_headers(paths[1]).tensors == whole.tensors
    with pytest.raises(CutFile, match="'t0' needs bytes"):
        open_gguf(paths[0])
    paths[2].unlink()
    with pytest.raises(MissingFile, match=r"1 of 3 parts missing .*m-00003-of-00003.gguf"):
        open_headers(paths[0])


def test_parts_of_different_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="says it is part 0 of 3, expected 1 of 3"):
        open_gguf(write_split(tmp_path, lambda part, keys: keys.update({"split.no": 0}))[0])
    with pytest.raises(BadFile, match="'t0' is also in"):
        open_gguf(write_split(tmp_path, lambda part, keys: keys.update({"tensor": "t0"}))[0])
    with pytest.raises(BadFile, match="promises 9 tensors"):
        open_gguf(write_split(tmp_path, lambda part, keys: keys.update({"split.tensors.count": 9}))[0])


def test_renamed_part_is_refused(tmp_path: Path) -> None:
    path = write_split(tmp_path)[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(BadFile, match=r"NAME-00001-of-00003.gguf"):
        open_gguf(path)


def test_written_file_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "written.gguf"
    specs = [TensorSpec("a", (33,), 0, 132), TensorSpec("b", (32, 2), 8, 68)]
    kvs = {"general.architecture": kv_string("general.architecture", "olmoe"), "n": kv_u32("n", 0)}
    with GGUFOutput(path, kvs, specs, alignment=32) as output:
        output.write(bytes(range(100)))
        output.write(bytes(range(32)))
        output.write(b"\x07" * 68)
        output.patch("n", kv_u32("n", 7))
        output.finish()
        output.verify()
        assert not path.exists() and output.part.exists()
        output.commit()
    assert not output.part.exists() and path.stat().st_size == output.total_bytes
    reader = gguf.GGUFReader(path)
    assert reader.fields["n"].contents() == 7
    assert bytes(reader.tensors[0].data.tobytes()) == bytes(range(100)) + bytes(range(32))
    assert reader.tensors[1].data.tobytes() == b"\x07" * 68


def test_a_vocabulary_of_150000_is_skipped_fast(tmp_path: Path) -> None:
    path = tmp_path / "vocab.gguf"
    tokens = kv_strings("tokenizer.ggml.tokens", [f"tok{i}" for i in range(150_000)])
    merges = kv_strings("tokenizer.ggml.merges", [f"a{i} b{i}" for i in range(150_000)])
    with GGUFOutput(path, {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges}, []) as output:
        output.finish()
        output.commit()
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        kv = read_gguf(path).kv
        seconds.append(time.perf_counter() - started)
    assert kv["tokenizer.ggml.merges"][-1] == "a149999 b149999"
    assert min(seconds) < 0.15


def test_tensor_bytes_counts_whole_blocks() -> None:
    assert tensor_bytes(12, (512, 3, 2)) == 2 * 144 * 6
