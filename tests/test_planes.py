"""Packed experts: the same bits from fewer bytes, at every budget, for every type; damage is a sentence, no crash."""

from __future__ import annotations

import ctypes
import dataclasses
import struct
from pathlib import Path

import numpy as np
import pytest
from checkpoints import piece_bytes
from conftest import open_engine
from moe_edge.convert.convert import convert
from moe_edge.models.errors import BadChecksum, BadFile, MissingFile, MoeEdgeError
from moe_edge.models.formats.ggml_types import BF16, BY_NAME, F16, type_name
from moe_edge.models.formats.gguf import read_gguf
from moe_edge.models.store.experts import RAW
from moe_edge.models.store.planes import (
    CODES,
    FIELDS,
    HEADER,
    PLANES,
    TYPICAL_SHARE,
    can_pack,
    most_bytes,
    pack,
    unpack,
    usual_codec,
)
from moe_edge.models.store.store import CODECS, PACKED_COLS, open_model, verify_store
from moe_edge.runner import zstd
from moe_edge.runner.capi import ERROR_BYTES, library
from moe_edge.runner.measure.plan import plan
from moe_edge.runner.measure.show import describe, describe_text
from moe_edge.runner.native import NativeModel
from moe_edge.schedulers.estimate import MachineSpeeds, ModelWork, estimate
from moe_edge.schedulers.layout import Layout
from moe_edge.schedulers.options import PolicyOptions
from random_models import Shape, write_random_model
from random_numbers import quantize
from reference import logits_of_context, stock_logits
from test_exact import engine_logits, some_tokens
from test_store import flip_byte

TYPES = [(type_id, codec) for type_id in sorted(FIELDS) for codec in (PLANES, CODES) if can_pack(type_id, codec)]
NAMES = [f"{type_name(type_id)}-{codec}" for type_id, codec in TYPES]


def matrix(type_id: int, n: int, seed: int = 0) -> bytes:
    """n Gaussian weights of a type; n is a multiple of 256."""
    values = np.random.default_rng(seed).normal(0, 0.02, (n // 256, 256)).astype(np.float32)
    return quantize(values, type_name(type_id)).tobytes()


def native_unpack(data: bytes, type_id: int, codec: int, nbytes: int) -> bytes | str:
    """What the native library makes of it: the matrix, or its sentence."""
    lib = library()
    lib.me_set_zstd(*zstd.zstd_functions())
    out, error = ctypes.create_string_buffer(nbytes + 64), ctypes.create_string_buffer(ERROR_BYTES)
    out[nbytes:] = b"\xa5" * 64  # type: ignore[call-overload]
    failed = lib.me_unpack(data, len(data), codec, type_id, out, nbytes, error)
    assert out.raw[nbytes:] == b"\xa5" * 64, "it wrote past the matrix"
    return error.value.decode() if failed else out.raw[:nbytes]


# ---- the codec


@pytest.mark.parametrize("n", [256, 256 * 7, 65536, 65536 * 2 + 256 * 3])
@pytest.mark.parametrize(("type_id", "codec"), TYPES, ids=NAMES)
def test_what_was_packed_comes_back_from_both_decoders(type_id: int, codec: int, n: int) -> None:
    raw = matrix(type_id, n)
    packed = pack(raw, type_id, codec)
    assert len(packed) <= most_bytes(type_id, len(raw))
    assert unpack(packed, type_id, codec, len(raw), "m") == raw == native_unpack(packed, type_id, codec, len(raw))


@pytest.mark.parametrize(("type_id", "codec"), TYPES, ids=NAMES)
def test_bytes_of_any_kind_come_back(type_id: int, codec: int) -> None:
    """Zeros, noise, and every 16-bit pattern, NaN and infinities among them: packing knows nothing of values."""
    block = 2 if type_id in (F16, BF16) else sum(FIELDS[type_id])
    noise = np.random.default_rng(3).bytes(block * 5000)
    every = np.arange(65536, dtype="<u2").tobytes()
    for raw in (bytes(block * 70000), noise, every[: len(every) // block * block]):
        packed = pack(raw, type_id, codec)
        assert native_unpack(packed, type_id, codec, len(raw)) == raw == unpack(packed, type_id, codec, len(raw), "m")
    assert len(pack(noise, type_id, codec)) <= most_bytes(type_id, len(noise))


@pytest.mark.parametrize(("type_id", "codec"), TYPES, ids=NAMES)
def test_gaussian_weights_get_as_short_as_plan_says(type_id: int, codec: int) -> None:
    raw = matrix(type_id, 1 << 20)
    assert len(pack(raw, type_id, codec)) / len(raw) == pytest.approx(TYPICAL_SHARE[codec, type_id], abs=0.025)


def test_damage_is_a_sentence_and_nothing_is_written_past_the_matrix() -> None:
    random, told = np.random.default_rng(5), 0
    for type_id, codec in ((BF16, PLANES), (BF16, CODES), (F16, CODES), (BY_NAME["Q8_0"].id, PLANES)):
        raw = matrix(type_id, 65536 * 3)
        packed = pack(raw, type_id, codec)
        table = HEADER.size + 4 * len(FIELDS[type_id]) * 3
        for case in range(600):
            damaged = bytearray(packed)
            if case % 3 == 0:
                damaged = damaged[: random.integers(0, len(damaged))]
            else:
                for _ in range(random.integers(1, 4)):
                    at = random.integers(0, table + 200 if case % 3 == 1 else len(damaged))
                    damaged[at] = random.integers(0, 256)
            found = native_unpack(bytes(damaged), type_id, codec, len(raw))
            if isinstance(found, str):
                assert "convert" in found or "fewer bytes" in found, found
                told += 1
            try:
                unpack(bytes(damaged), type_id, codec, len(raw), "m")
            except BadFile as error:
                assert str(error).startswith("m ")
    assert told > 1000


@pytest.mark.parametrize("codec", [PLANES, CODES])
def test_huge_numbers_in_a_header_are_refused(codec: int) -> None:
    raw = matrix(BF16, 65536)
    packed = bytearray(pack(raw, BF16, codec))
    for offset, value in ((8, 0), (8, 1), (12, 2**31), (24, 2**32 - 1), (28, 2), (32, 2**32 - 1)):
        damaged = bytearray(packed)
        damaged[offset : offset + 4] = struct.pack("<I", value)
        assert isinstance(native_unpack(bytes(damaged), BF16, codec, len(raw)), str), offset


# ---- models


def both(tmp_path: Path, expert_type: str, packed: str = "planes") -> tuple[Path, Path, Path]:
    """(stock, converted raw, converted and packed) of one random model."""
    stock = write_random_model(tmp_path / "stock.gguf", "qwen3moe", expert_type=expert_type)
    for pack_as in ("none", packed):
        convert(stock, tmp_path / f"{pack_as}.gguf", pack=pack_as)
    return stock, tmp_path / "none.gguf", tmp_path / f"{packed}.gguf"


@pytest.mark.parametrize(
    ("expert_type", "packed_as"),
    [*((name, "planes") for name in ("BF16", "F16", "Q8_0", "Q4_0", "Q4_K", "Q2_K", "MXFP4")), ("BF16", "zstd"),
     ("F16", "zstd")],
)  # fmt: skip
def test_packed_experts_give_stock_bits_at_every_budget(tmp_path: Path, expert_type: str, packed_as: str) -> None:
    stock, _, packed = both(tmp_path, expert_type, packed_as)
    codec = usual_codec(BY_NAME[expert_type].id) if packed_as == "planes" else PLANES
    assert all(piece.codec == codec for piece in open_model(packed).pieces)
    expected = [stock_logits(stock, some_tokens(n), 64, 2, n_ctx=640) for n in (3, 100)]
    for budget in ("floor", "middle", "resident"):
        for ours, theirs in zip(engine_logits(packed, budget, (3, 100), 64, 2), expected, strict=True):
            assert np.array_equal(ours, theirs), budget


@pytest.mark.parametrize("packed_as", ["planes", "zstd"])
def test_the_store_is_smaller_and_holds_the_same_matrices(tmp_path: Path, packed_as: str) -> None:
    _, raw, packed = both(tmp_path, "BF16", packed_as)
    whole, short = open_model(raw, verify=True), open_model(packed, verify=True)
    assert short.expert_bytes == whole.expert_bytes == whole.stored_expert_bytes
    assert short.stored_expert_bytes < (0.76 if packed_as == "planes" else 0.72) * whole.expert_bytes
    for index, (a, b) in enumerate(zip(whole.pieces, short.pieces, strict=True)):
        assert (a.name, a.type, a.cols, a.rows, a.nbytes) == (b.name, b.type, b.cols, b.rows, b.nbytes)
        data = short.files[0].read_bytes()[b.offset : b.offset + b.stored_bytes]
        assert unpack(data, b.type, b.codec, b.nbytes, b.name) == piece_bytes(whole, index)
    assert read_gguf(short.files[0]).kv["moe_edge.format_version"] == 2
    assert read_gguf(whole.files[0]).kv["moe_edge.format_version"] == 1


def test_auto_packs_16_bit_floats_only_and_biases_stay_raw(tmp_path: Path) -> None:
    source = write_random_model(tmp_path / "s.gguf", "gpt-oss", expert_type="BF16", down_type="Q8_0")
    convert(source, tmp_path / "m.gguf", pack="auto")
    model = open_model(tmp_path / "m.gguf", verify=True)
    codecs = {type_name(p.type): p.codec for p in model.pieces}
    assert codecs == {"BF16": CODES, "Q8_0": RAW}
    assert model.biases and all(piece.codec == RAW for piece in model.biases.values())
    with pytest.raises(MoeEdgeError, match="unknown packing 'zip'"):
        convert(source, tmp_path / "n.gguf", pack="zip")


@pytest.mark.parametrize(("lookahead", "packed_as"), [("stacked", "planes"), ("off", "planes"), ("stacked", "zstd")])
def test_reading_ahead_levels_and_cancelled_reads_do_not_change_bits(
    tmp_path: Path, lookahead: str, packed_as: str
) -> None:
    """Experts of more than a part (512 KiB stored), so that speculative reads stop and go on in lent buffers."""
    stock = write_random_model(
        tmp_path / "s.gguf", "qwen3moe", Shape(n_layer=3, n_embd=512, n_ff=1024, n_expert=8, n_used=2),
        expert_type="BF16",
    )  # fmt: skip
    convert(stock, tmp_path / "m.gguf", pack=packed_as, low_type="Q4_0")
    tokens = some_tokens(24)
    expected = stock_logits(stock, tokens, 1, 2, n_ctx=256)
    with open_engine(tmp_path / "m.gguf", "middle", n_ctx=256, n_ubatch=1, n_threads=2, logits_all=True) as engine:
        engine.set_policy(PolicyOptions("exact", lookahead=lookahead))
        with engine.decoding():
            llama = engine.llama
            found = logits_of_context(llama._ctx.ctx, llama._model.model, tokens, 1)
        counters = engine.counters()
    assert np.array_equal(found, expected)
    assert counters.evictions > 0 and counters.unpacked_bytes > counters.bytes_read > 0
    assert counters.unpack_seconds > 0 and counters.lent_bytes > 0
    if lookahead != "off":
        assert counters.prefetched > 0


def test_buffers_are_in_the_plan(tmp_path: Path) -> None:
    _, raw, packed = both(tmp_path, "BF16")
    with open_engine(raw, "floor", n_ctx=256) as plain, open_engine(packed, "floor", n_ctx=256) as engine:
        needed = engine.plan.fixed.scratch_bytes - plain.plan.fixed.scratch_bytes
        assert plain.counters().lent_bytes == 0
        lent = engine.counters().lent_bytes
        assert lent >= 6 * max(piece.stored_bytes for piece in engine.model.pieces)
        assert needed == lent + 8 * (512 << 10)  # four threads that read, four that only unpack


# ---- what is wrong


def test_a_damaged_piece_is_named_with_its_file(tmp_path: Path) -> None:
    _, _, packed = both(tmp_path, "BF16")
    model = open_model(packed)
    piece = model.pieces[0]
    flip_byte(model.files[0], piece.offset + 1)  # its magic
    with pytest.raises(BadChecksum, match=r"blk\.0\.ffn_up_exps\.0\.weight"):
        verify_store(model.files[0])
    with open_engine(packed, "resident", n_ctx=256) as engine, pytest.raises(MoeEdgeError) as error:
        with engine.decoding():
            engine.llama.eval(some_tokens(200))
    assert str(model.files[0]) in str(error.value) and "of expert" in str(error.value), error.value
    assert "is packed with a header of another matrix" in str(error.value)


@pytest.mark.parametrize(("key", "value"), [(CODECS, 7), (CODECS, 2), (PACKED_COLS, 33), (PACKED_COLS, 0)])
def test_keys_that_cannot_be_are_refused(tmp_path: Path, key: str, value: int) -> None:
    _, _, packed = both(tmp_path, "Q8_0")
    store = open_model(packed).files[0]
    file = read_gguf(store)
    record = file.kv.record(key)
    data = bytearray(store.read_bytes())
    at = bytes(data).index(record) + len(record) - 4 * len(file.tensors)
    data[at : at + 4] = struct.pack("<I", value)
    store.write_bytes(data)
    with pytest.raises((BadFile, BadChecksum)) as error:
        NativeModel(open_model(packed))
    assert str(store) in str(error.value) and "blk.0" in str(error.value)


def test_without_any_zstd_the_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, packed = both(tmp_path, "BF16", "zstd")
    in_codes = tmp_path / "codes.gguf"
    convert(tmp_path / "stock.gguf", in_codes, pack="auto")
    zstd.zstd_functions.cache_clear()
    monkeypatch.setattr(zstd, "_candidates", lambda: iter(["/nowhere/libzstd.so.1"]))
    try:
        with pytest.raises(MissingFile, match=r"/nowhere/libzstd\.so\.1.*pip install"):
            NativeModel(open_model(packed))
        NativeModel(open_model(in_codes))  # needs none
    finally:
        zstd.zstd_functions.cache_clear()


def test_the_python_packages_own_zstd_works_where_the_system_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zstd, "SYSTEM", {})
    zstd.zstd_functions.cache_clear()
    try:
        raw = matrix(BF16, 65536)
        assert native_unpack(pack(raw, BF16, PLANES), BF16, PLANES, len(raw)) == raw
    finally:
        zstd.zstd_functions.cache_clear()


# ---- what plan and show say


@pytest.mark.parametrize(("packed_as", "codec"), [("planes", "codes"), ("zstd", "planes")])
def test_show_and_plan_name_the_codec_and_what_it_saves(tmp_path: Path, packed_as: str, codec: str) -> None:
    _, raw, packed = both(tmp_path, "BF16", packed_as)
    model, facts = open_model(packed), describe(packed)
    share = 100 * model.stored_expert_bytes / model.expert_bytes
    assert facts["codecs"] == {codec: len(model.pieces)} and facts["stored_expert_bytes"] == model.stored_expert_bytes
    assert f"{share:.1f} % of that: {codec} ({len(model.pieces)})" in describe_text(facts)
    assert describe(raw)["codecs"] == {"raw": len(model.pieces)} and "packed" not in describe_text(describe(raw))
    speeds = MachineSpeeds(4e8, 1e12, 1e12, 1e12, unpack=7e9)
    notes = plan(packed, speeds=speeds).notes
    saved = f"packed ({codec}): {share:.1f} % of the experts' bytes"
    assert f"{saved}; this machine unpacks 7.0 GB of experts a second" in notes
    assert not any(note.startswith("packed (") for note in plan(raw, speeds=speeds).notes)


def test_packed_experts_come_faster_from_a_slow_disk_and_no_faster_than_they_unpack() -> None:
    raw = ModelWork(Layout((8,) * 4, 1, (1 << 20,) * 32), top_k=2, dense_bytes=1 << 20)
    packed = dataclasses.replace(raw, stored_share=0.67)

    def seconds(work: ModelWork, disk: float, unpack: float = 4e9) -> float:
        speeds = MachineSpeeds(disk=disk, memory=1e12, compute=1e12, prefill=1e12, layer_seconds=0, unpack=unpack)
        return 1 / estimate(work, 4 << 20, speeds, hit_rate=0.0).tokens_per_second.expected

    assert seconds(raw, 4e8) / seconds(packed, 4e8) == pytest.approx(1 / 0.67, rel=0.01)
    assert seconds(packed, 1e11, unpack=1e9) == pytest.approx(8 * (1 << 20) / 1e9, rel=0.05)
    found = estimate(packed, 4 << 20, MachineSpeeds(4e8, 1e12, 1e12, 1e12), hit_rate=0.0)
    assert found.read_bytes.expected == pytest.approx(0.67 * 8 * (1 << 20))
