"""Probes say what they measured or why not; limits of memory come from where they are; what was measured is kept."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from moe_edge.models.embedded import tiny_model_path
from moe_edge.models.errors import MissingFile
from moe_edge.runner.measure import doctor as doctor_module
from moe_edge.runner.measure import probe
from moe_edge.runner.measure.doctor import cache_file, doctor, machine_speeds, storage_of
from moe_edge.runner.measure.doctor_text import doctor_text
from moe_edge.runner.measure.probe import DirectReads, ProductSpeeds, ReadSpeed, StorageSpeeds, Unmeasured
from moe_edge.runner.memory import (
    auto_budget,
    auto_budget_bytes,
    available_bytes,
    cgroup_free_bytes,
    cgroup_limits,
    parse_vm_stat,
    usable_bytes,
)

MIB, GIB = 1 << 20, 1 << 30
Q4_K, Q8_0, MXFP4 = 12, 8, 39
on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mincore() and O_DIRECT are Linux's")


# ---- memory, with trees of files as a kernel shows them -----------------------------------------------------


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def meminfo(total: int, available: int) -> dict[str, str]:
    return {"proc/meminfo": f"MemTotal: {total // 1024} kB\nMemFree: 1 kB\nMemAvailable: {available // 1024} kB\n"}


def v2(
    folder: str, limit: int | str, used: int, cached: int = 0, high: int | str = "max", active: int = 0, dirty: int = 0
) -> dict[str, str]:
    return {
        f"sys/fs/cgroup/{folder}/memory.max": f"{limit}\n",
        f"sys/fs/cgroup/{folder}/memory.high": f"{high}\n",
        f"sys/fs/cgroup/{folder}/memory.current": f"{used}\n",
        f"sys/fs/cgroup/{folder}/memory.stat": f"anon 5\nfile 9\nfile_dirty {dirty}\n"
        f"file_writeback 0\ninactive_file {cached}\nactive_file {active}\n",
    }


def v1(folder: str, limit: int, used: int, cached: int = 0, active: int = 0, dirty: int = 0) -> dict[str, str]:
    return {
        f"sys/fs/cgroup/memory/{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"sys/fs/cgroup/memory/{folder}/memory.usage_in_bytes": f"{used}\n",
        f"sys/fs/cgroup/memory/{folder}/memory.stat": f"inactive_file 1\nactive_file 1\ndirty 1\n"
        f"total_inactive_file {cached}\ntotal_active_file {active}\ntotal_dirty {dirty}\ntotal_writeback 0\n",
    }


def test_without_a_limit_a_tenth_of_what_is_available_stays_free(tmp_path: Path) -> None:
    root = write(tmp_path, meminfo(16 * GIB, 10 * GIB))
    auto = auto_budget(root)
    assert auto.bytes == 9 * GIB - 64 * MIB
    assert auto.reason == (
        "--ram auto is 8.94 GiB: 10.00 GiB of 16.00 GiB memory is available, 1.00 GiB of it stays free for other "
        "programs, and 64.0 MiB is for the program itself"
    )
    assert cgroup_free_bytes(root) is None
    assert usable_bytes(root) == 16 * GIB


@pytest.mark.parametrize(("available", "left"), [(4 * GIB, 4 * GIB - 512 * MIB), (GIB, 768 * MIB), (40 * MIB, 0)])
def test_small_machines_keep_more_in_proportion(tmp_path: Path, available: int, left: int) -> None:
    root = write(tmp_path, meminfo(8 * GIB, available))
    assert auto_budget(root).bytes == max(0, left - 64 * MIB)


def test_the_tightest_of_nested_v2_limits_counts(tmp_path: Path) -> None:
    files = meminfo(16 * GIB, 10 * GIB) | {"proc/self/cgroup": "0::/a/b/c\n"}
    files |= v2("a", 4 * GIB, 3 * GIB) | v2("a/b", "max", GIB) | v2("a/b/c", 3 * GIB, GIB)
    root = write(tmp_path, files)
    assert [(c.folder.name, c.free_bytes) for c in cgroup_limits(root)] == [("c", 2 * GIB), ("a", GIB)]
    auto = auto_budget(root)
    assert auto.bytes == GIB * 9 // 10 - 64 * MIB
    assert f"{root}/sys/fs/cgroup/a is limited to 4.00 GiB and has 1.00 GiB free" in auto.reason
    assert usable_bytes(root) == 3 * GIB


def test_v1_limits_and_its_word_for_none(tmp_path: Path) -> None:
    files = meminfo(16 * GIB, 10 * GIB) | {"proc/self/cgroup": "5:cpu:/\n4:memory:/box/job\n0::/\n"}
    root = write(tmp_path, files | v1("box", 2 * GIB, GIB) | v1("box/job", 9223372036854771712, GIB))
    assert [c.folder.name for c in cgroup_limits(root)] == ["box"]
    assert auto_budget(root).bytes == GIB * 9 // 10 - 64 * MIB


def test_file_pages_of_a_group_count_as_free_since_they_are_dropped_on_demand(tmp_path: Path) -> None:
    files = meminfo(16 * GIB, 10 * GIB) | {"proc/self/cgroup": "0::/a\n"}
    root = write(tmp_path, files | v2("a", 4 * GIB, 4 * GIB, cached=3 * GIB))
    assert cgroup_free_bytes(root) == 3 * GIB
    other = write(tmp_path / "1", {"proc/self/cgroup": "4:memory:/a\n"} | v1("a", 4 * GIB, 4 * GIB, cached=GIB))
    assert cgroup_free_bytes(other) == GIB


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_pages_of_files_that_were_read_twice_are_free_but_for_a_margin_and_unwritten_ones_are_not(
    tmp_path: Path, kind: str
) -> None:
    group = {"v1": "4:memory:/a\n", "v2": "0::/a\n"}[kind]
    make = {"v1": v1, "v2": v2}[kind]
    for dirty in (0, GIB):
        files = make("a", 4 * GIB, 4 * GIB, active=2 * GIB, dirty=dirty)  # type: ignore[operator]
        root = write(tmp_path / str(dirty), {"proc/self/cgroup": group} | files)
        assert cgroup_free_bytes(root) == pytest.approx(2 * GIB * 9 // 10 - dirty, abs=1)


def test_memory_high_limits_as_memory_max_does(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/self/cgroup": "0::/a\n"} | v2("a", "max", GIB, high=3 * GIB))
    assert cgroup_free_bytes(root) == 2 * GIB


def test_in_a_container_the_mount_itself_is_the_group(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "4:memory:/docker/0123\n"} | v1("", 2 * GIB, GIB)
    assert cgroup_free_bytes(write(tmp_path, files)) == GIB
    outside = {"proc/self/cgroup": "0::/../../elsewhere\n"} | v2("", 2 * GIB, GIB)
    assert cgroup_free_bytes(write(tmp_path / "1", outside)) == GIB


def test_a_limit_wider_than_the_machine_changes_nothing(tmp_path: Path) -> None:
    files = meminfo(16 * GIB, 10 * GIB) | {"proc/self/cgroup": "0::/a\n"} | v2("a", 64 * GIB, GIB)
    assert auto_budget(write(tmp_path, files)).bytes == 9 * GIB - 64 * MIB


def test_macos_memory_is_read_from_vm_stat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "Mach Virtual Memory Statistics: (page size of 16384 bytes)\nPages free:          1000.\nPages active:  5000.\n"
        "Pages inactive:      2000.\nPages speculative:    300.\nPages wired down:  700.\nPages purgeable:     40.\n"
    )
    assert parse_vm_stat(text) == 16384 * 3340
    assert parse_vm_stat("command not found") is None
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr("moe_edge.runner.memory._macos_available", lambda: 5 * GIB)
    assert available_bytes(tmp_path) == 5 * GIB


def test_this_machine_has_an_automatic_budget_with_a_reason() -> None:
    auto = auto_budget()
    assert auto.bytes == pytest.approx(auto_budget_bytes(), rel=0.2)
    assert auto.reason.startswith("--ram auto is ")


# ---- probes ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("doctor") / "data"
    with open(path, "wb") as f:
        f.write(os.urandom(12 * MIB))
        os.fsync(f.fileno())
    return path


def needs_direct(path: Path) -> None:
    try:
        with probe.open_direct(path):
            return
    except OSError as e:
        pytest.skip(f"no direct reads here: {e}")


def test_every_size_and_depth_is_read(file: Path) -> None:
    needs_direct(file)
    found = probe.storage_speeds(file, cell_seconds=0.02, cell_bytes=4 * MIB)
    assert isinstance(found, StorageSpeeds)
    cells = [(b, d) for b in probe.BLOCKS for d in probe.DEPTHS]
    assert [(c.block_bytes, c.depth) for c in found.random] == [(probe.SMALL_BLOCK, probe.N_READERS), *cells]
    assert min(c.bytes_per_second for c in found.random) > 0 < found.sequential_bytes_per_second
    assert found.small
    assert probe.disk_bytes_per_second(file, 0.05)


def test_speed_between_two_measured_sizes_is_between_theirs() -> None:
    cells = (ReadSpeed(MIB, 1, 1.0), ReadSpeed(MIB, 4, 100.0), ReadSpeed(4 * MIB, 4, 300.0))
    speeds = StorageSpeeds(GIB, 1.0, cells, False)
    assert [speeds.at(n) for n in (1000, MIB, 2 * MIB, 4 * MIB, GIB)] == [100, 100, 200, 300, 300]


def test_file_too_small_to_probe_says_so(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x" * 1000)
    for found in (probe.storage_speeds(tmp_path / "x"), probe.direct_reads(tmp_path / "x")):
        assert isinstance(found, Unmeasured)
        assert "has 1000 bytes" in found.why
    assert not probe.disk_bytes_per_second(tmp_path / "x")


def test_refused_direct_reads_are_a_reason_not_a_number(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def refuse(_: Path) -> Iterator[int]:
        raise OSError(22, "Invalid argument")
        yield 0

    monkeypatch.setattr(probe, "open_direct", refuse)
    assert probe.storage_speeds(file) == Unmeasured(f"direct reads of {file} fail: Invalid argument")
    assert probe.direct_reads(file) == Unmeasured(f"direct reads of {file} fail: Invalid argument")
    assert probe.disk_bytes_per_second(file) is None


@contextlib.contextmanager
def open_plain(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


@on_linux
def test_direct_reads_that_fill_the_page_cache_are_found_out(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "open_direct", open_plain)
    found = probe.direct_reads(file)
    if isinstance(found, DirectReads) and found.method != "mincore":
        pytest.skip("this file system keeps its pages whatever it is told")
    assert found == DirectReads(
        False, "mincore", "0 of 1024 pages were cached before a direct read of them, 1024 after it"
    )


def test_without_mincore_the_speeds_are_compared(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "cached_pages", lambda *_: None)
    monkeypatch.setattr(probe, "open_direct", open_plain)
    found = probe.direct_reads(file)
    assert isinstance(found, DirectReads)
    assert found.method == "speed"
    assert "MB/s from the page cache" in found.detail


@on_linux
def test_cached_pages_are_counted(file: Path) -> None:
    with open(file, "rb") as f:
        f.read()
        assert probe.cached_pages(f.fileno(), MIB, 2 * MIB) == 2 * MIB // 4096 or os.sysconf("SC_PAGESIZE") != 4096


@pytest.mark.parametrize("type_id", [Q4_K, Q8_0, MXFP4])
def test_products_of_many_tokens_are_faster_for_each_than_of_one(type_id: int) -> None:
    found = probe.product_speeds(type_id, 2, nbytes=8 * MIB)
    assert isinstance(found, ProductSpeeds)
    assert 1e7 < found.decode_bytes_per_second < 1e13
    assert 1e7 < found.prefill_bytes_per_second < 1e13
    assert [n for n, _ in found.rows] == [n for n, _ in found.expert_rows] == list(probe.ROWS)
    assert found.expert_rows[0] == found.rows[0] and all(1e7 < rate < 1e14 for _, rate in found.expert_rows)


def test_products_without_ggml_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Any:
        raise OSError("libggml-base.so.0: cannot open shared object file")

    monkeypatch.setattr(probe, "_ggml_libraries", refuse)
    found = probe.product_speeds(Q4_K, 1)
    assert isinstance(found, Unmeasured)
    assert found.why.endswith("libggml-base.so.0: cannot open shared object file")


# ---- the doctor --------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Probes of a few milliseconds, counted."""
    calls = {"storage": 0, "products": 0}
    storage, products, speed = probe.storage_speeds, probe.product_speeds, probe.memory_bytes_per_second

    def few_reads(path: Path) -> StorageSpeeds | Unmeasured:
        calls["storage"] += 1
        return storage(path, cell_seconds=0.01, cell_bytes=2 * MIB)

    def few_products(type_id: int, n_threads: int) -> ProductSpeeds | Unmeasured:
        calls["products"] += 1
        return products(type_id, n_threads, 4 * MIB)

    monkeypatch.setattr(probe, "storage_speeds", few_reads)
    monkeypatch.setattr(probe, "product_speeds", few_products)
    monkeypatch.setattr(probe, "memory_bytes_per_second", lambda n: speed(n, 1, 4 * MIB))
    monkeypatch.setattr(doctor_module, "PROBE_FILE_BYTES", 8 * MIB)
    return calls


def test_doctor_looks_at_the_embedded_model(quick: dict[str, int], tmp_path: Path) -> None:
    needs_direct(tiny_model_path())
    facts = doctor(tiny_model_path(), cache_dir=tmp_path)
    json.dumps(facts)
    assert facts["from_cache"] is False
    assert facts["storage"]["small"] is True
    assert facts["tiny_model"]["layer_seconds"] >= doctor_module.LEAST_LAYER_SECONDS
    assert facts["memory"]["total_bytes"] >= facts["memory"]["available_bytes"] > 0
    text = doctor_text(facts)
    assert "direct reads    yes, verified by" in text or "NO, they go through the page cache" in text
    assert "bounded by the file's size, 16.1 MiB" in text
    assert "its experts are tiny" in text
    assert "--ram auto" in text
    starts = {len(line) - len(line.split("  ", 1)[1].lstrip()) for line in text.splitlines()}
    assert len(starts) == 1


def test_measurements_are_kept_until_asked_for_fresh_ones(quick: dict[str, int], file: Path, tmp_path: Path) -> None:
    needs_direct(file)
    first = doctor(file, cache_dir=tmp_path)
    kept = json.loads(cache_file(file, tmp_path).read_text())
    assert kept["measured"]["storage_date"] == first["storage_date"]
    again = doctor(file, cache_dir=tmp_path)
    assert (again["from_cache"], again["products"], again["storage"]) == (True, first["products"], first["storage"])
    assert "(measured 20" in doctor_text(again)
    assert quick == {"storage": 1, "products": 3}
    doctor(file, cache_dir=tmp_path, fresh=True)
    assert quick == {"storage": 2, "products": 6}
    doctor(file, cache_dir=tmp_path, n_threads=1)
    assert quick == {"storage": 2, "products": 9}


def test_numbers_of_a_small_file_do_not_stand_for_its_device(
    quick: dict[str, int], file: Path, tmp_path: Path
) -> None:
    needs_direct(file)
    doctor(file, cache_dir=tmp_path)
    doctor(tiny_model_path(), cache_dir=tmp_path)
    assert quick["storage"] == 2


def test_damaged_cache_is_measured_again(quick: dict[str, int], file: Path, tmp_path: Path) -> None:
    where = cache_file(file, tmp_path)
    for text in ("{", '{"version": 0, "measured": {"storage": 1}}', "[]"):
        where.write_text(text)
        assert doctor(file, cache_dir=tmp_path)["from_cache"] is False


def test_folder_without_a_large_file_gets_one_for_the_probe_only(quick: dict[str, int], tmp_path: Path) -> None:
    needs_direct(tiny_model_path())
    folder = tmp_path / "models"
    folder.mkdir()
    facts = doctor(folder, cache_dir=tmp_path / "cache")
    assert facts["storage"]["written_for_it"] is True
    assert list(folder.iterdir()) == []
    assert quick["storage"] == 1
    (folder / "large").write_bytes(bytes(9 * MIB))
    facts = doctor(folder, cache_dir=tmp_path / "cache", fresh=True)
    assert facts["storage"]["read_file"] == str(folder / "large")


def test_without_a_path_the_cache_folder_is_probed(quick: dict[str, int], tmp_path: Path) -> None:
    assert doctor(cache_dir=tmp_path / "c")["target"] == str(tmp_path / "c")
    with pytest.raises(MissingFile, match="no such file or folder"):
        doctor(tmp_path / "none", cache_dir=tmp_path)


def test_speeds_for_plan_come_from_the_doctor(quick: dict[str, int], file: Path, tmp_path: Path) -> None:
    needs_direct(file)
    facts = doctor(file, cache_dir=tmp_path)
    speeds = machine_speeds(facts, Q4_K, MIB)
    assert not isinstance(speeds, Unmeasured)
    storage = storage_of(facts)
    assert not isinstance(storage, Unmeasured)
    assert speeds.disk == storage.at(MIB)
    assert speeds.compute == facts["products"]["Q4_K"]["decode_bytes_per_second"] <= speeds.memory
    assert quick["products"] == 3
    other = machine_speeds(facts, MXFP4, MIB, disk_bytes_per_second=440e6)
    assert not isinstance(other, Unmeasured)
    assert (other.disk, quick["products"]) == (440e6, 4)
    facts["storage"] = {"why_not": "a reason"}
    assert machine_speeds(facts, Q4_K, MIB) == Unmeasured("a reason")
    assert "storage         not measured: a reason" in doctor_text(facts)
