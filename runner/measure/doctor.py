"""`moe-edge doctor`: what this machine can do for a model: storage, memory, compute, limits and versions.

The measured part is cached beside the skeletons, per device and machine, since it takes some ten seconds; what can be
looked up is looked up each time. A probe that cannot run leaves {"why_not": reason} in the place of its numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from moe_edge.models.embedded import tiny_model_path
from moe_edge.models.errors import MissingFile, MoeEdgeError, WrongLibrary
from moe_edge.models.formats.ggml_types import BY_NAME, type_name
from moe_edge.models.formats.work import new_file
from moe_edge.models.store.skeleton import cache_folder
from moe_edge.runner import memory
from moe_edge.runner.llama_package import cpu_build, import_llama, installed_packages, llama_build
from moe_edge.runner.measure import probe
from moe_edge.runner.measure.boards import findings
from moe_edge.runner.measure.boards.machine import Machine
from moe_edge.runner.measure.probe import DirectReads, ProductSpeeds, ReadSpeed, StorageSpeeds, Unmeasured
from moe_edge.runner.neighbours import usable_cores
from moe_edge.schedulers.budget import MIB, format_bytes
from moe_edge.schedulers.estimate import LAYER_SECONDS, MachineSpeeds

VERSION = 3  # 2: products by the tokens at once; 3: those of experts by themselves
PROBE_FILE_BYTES = 256 * MIB
PRODUCT_TYPES = ("Q4_K", "Q8_0", "F16")
TINY_TOKENS = 48
LEAST_LAYER_SECONDS = 30e-6  # the engine's own share (DESIGN.md); less means that the products were disturbed

Facts = dict[str, Any]
Tell = Callable[[str], None]


def doctor(
    path: str | os.PathLike[str] | None = None,
    *,
    n_threads: int = 0,
    fresh: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    tell: Tell = lambda _: None,
) -> Facts:
    """Everything `doctor --json` prints.

    path: the model file, or the folder models are in, whose storage counts; None: the cache folder. In a folder its
    largest file is read; where all are under 256 MiB, one of that size is written for the probe and removed.
    n_threads 0: one for each core this process may use. fresh: measure again, whatever is cached.
    Raises MissingFile for a path that is not there.
    """
    target = _target(path, cache_dir)
    threads = n_threads or n_cores()
    versions = version_facts()
    measured = _measured(target, threads, fresh, cache_dir, tell)
    return {
        "target": str(target),
        **measured,
        "memory": memory_facts(),
        "cores": core_facts(threads),
        "versions": versions,
        "board": board_facts(target, versions),
    }


def is_measured(
    path: str | os.PathLike[str], *, n_threads: int = 0, cache_dir: str | os.PathLike[str] | None = None
) -> bool:
    """Whether doctor() would only have to read what it kept. Raises MissingFile for a path that is not there."""
    target = _target(path, cache_dir)
    kept = _read_cache(cache_file(target, cache_dir))
    return _storage_serves(kept.get("storage"), target) and _computing_serves(kept, n_threads or n_cores())


def probed_file(files: Iterable[Path]) -> Path:
    """The file of a model that its disk is measured with, or their folder where the largest file is short."""
    largest = max(files, key=lambda file: file.stat().st_size)
    return largest if largest.stat().st_size >= probe.BLOCK_BYTES else largest.absolute().parent


def n_cores() -> int:
    """Cores this process may use."""
    return len(usable_cores())


def _target(path: str | os.PathLike[str] | None, cache_dir: str | os.PathLike[str] | None) -> Path:
    if path is not None:
        target = Path(path)
        if not target.exists():
            raise MissingFile(f"{target}: no such file or folder")
        return target
    folder = cache_folder(cache_dir).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise MissingFile(f"{folder}: cannot create the cache folder: {e.strerror}; set MOE_EDGE_CACHE") from e
    return folder


# ---- measuring, and its cache ------------------------------------------------------------------------------


def cache_file(target: Path, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Where the measurements of this machine and of the target's device are kept."""
    key = "\0".join((platform.node(), platform.machine(), cpu_name(), str(target.stat().st_dev)))
    digest = hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()[:16]
    return cache_folder(cache_dir).parent / f"doctor-{digest}.json"


def _measured(
    target: Path, n_threads: int, fresh: bool, cache_dir: str | os.PathLike[str] | None, tell: Tell
) -> Facts:
    """The measured facts: from the cache, where it has what is asked for, else measured and kept."""
    file = cache_file(target, cache_dir)
    kept = {} if fresh else _read_cache(file)
    if not _storage_serves(kept.get("storage"), target):
        tell(f"reading {target} directly: about 4 seconds and at most 1.5 GiB")
        kept["storage"], kept["storage_date"] = _measure_storage(target, tell), _now()
        kept["from_cache"] = False
    if not _computing_serves(kept, n_threads):
        tell("measuring memory and products: about 5 seconds")
        kept.update(_measure_speeds(n_threads), compute_date=_now(), from_cache=False)
    if not kept.setdefault("from_cache", True):
        _write_cache(file, kept)
    kept["cache_file"] = str(file)
    return kept


def _storage_serves(kept: Facts | None, target: Path) -> bool:
    """Whether kept numbers will do: those of a small or unreadable file only for that very file."""
    if kept is None:
        return False
    if "why_not" in kept or kept["small"]:
        return bool(kept["path"] == str(target.absolute()))
    return True


def _computing_serves(kept: Facts, n_threads: int) -> bool:
    return bool(kept.get("n_threads") == n_threads and kept.get("libraries") == _libraries())


def _measure_storage(target: Path, tell: Tell) -> Facts:
    path = target
    if target.is_dir():
        try:
            files = [f for f in target.iterdir() if f.is_file() and not f.is_symlink()]
            sizes = {f: f.stat().st_size for f in files}
        except OSError as e:
            return {"path": str(target.absolute()), "why_not": f"{target}: cannot be listed: {e.strerror}"}
        path = max(sizes, key=lambda f: sizes[f], default=target)
        if sizes.get(path, 0) < PROBE_FILE_BYTES:
            return _measure_new_file(target, tell)
    return {"path": str(target.absolute()), "read_file": str(path), "written_for_it": False, **_storage_facts(path)}


def _measure_new_file(folder: Path, tell: Tell) -> Facts:
    """Probe a file of random bytes, which exists for as long as it takes."""
    tell(f"no file of {format_bytes(PROBE_FILE_BYTES)} in {folder}: writing one for the probe")
    facts: Facts = {"path": str(folder.absolute()), "read_file": None, "written_for_it": True}
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".moe-edge-doctor-") as file:
            for _ in range(PROBE_FILE_BYTES // (4 * MIB)):
                file.write(os.urandom(4 * MIB))
            file.flush()
            os.fsync(file.fileno())
            return {**facts, **_storage_facts(Path(file.name))}
    except OSError as e:
        return {**facts, "why_not": f"{folder}: cannot write a file to read: {e.strerror or e}"}


def _storage_facts(path: Path) -> Facts:
    speeds = probe.storage_speeds(path)
    if isinstance(speeds, Unmeasured):
        return {"why_not": speeds.why}
    cells = [asdict(cell) for cell in speeds.random]
    return {**asdict(speeds), "random": cells, "direct": _or_why(probe.direct_reads(path))}


def _measure_speeds(n_threads: int) -> Facts:
    """Memory, products, and the overhead of a layer. Products before the engine, whose threads would spin beside."""
    products = {name: _or_why(probe.product_speeds(BY_NAME[name].id, n_threads)) for name in PRODUCT_TYPES}
    return {
        "n_threads": n_threads,
        "libraries": _libraries(),
        "memory_bytes_per_second": probe.memory_bytes_per_second(n_threads),
        "products": products,
        "tiny_model": _tiny_model_facts(n_threads, products["Q8_0"]),
    }


def _tiny_model_facts(n_threads: int, products: Facts) -> Facts:
    """Decode with the embedded model, all resident. Its experts are tiny: what it shows is the overhead of a layer."""
    from moe_edge.runner.engine import Engine
    from moe_edge.runner.engine_options import EngineOptions
    from moe_edge.runner.sizes import NO_LIMIT

    try:
        options = EngineOptions(ram_bytes=NO_LIMIT, n_ctx=128, n_threads=n_threads, seed=0)
        with Engine(tiny_model_path(), options) as engine, engine.decoding():
            engine.llama.eval(list(range(32)))
            before, seconds = engine.counters(), []
            for token in range(TINY_TOKENS):
                started = time.perf_counter()
                engine.llama.eval([token])
                seconds.append(time.perf_counter() - started)
            done = engine.counters().since(before)
            expert_bytes = done.uses * engine.model.expert_bytes / len(engine.layout.unit_bytes)
            n_layers, dense_bytes = engine.layout.n_layers, engine.model.dense_bytes
    except MoeEdgeError as e:
        return {"why_not": str(e)}
    token_seconds = statistics.median(seconds)
    rate = products.get("decode_bytes_per_second", float("inf"))
    in_products = (dense_bytes + expert_bytes / TINY_TOKENS) / rate
    return {
        "tokens_per_second": 1 / token_seconds,
        "expert_bytes_per_second": expert_bytes / done.compute_seconds,
        "layer_seconds": max(LEAST_LAYER_SECONDS, (token_seconds - in_products) / n_layers),
    }


def _or_why(result: DirectReads | ProductSpeeds | Unmeasured) -> Facts:
    return {"why_not": result.why} if isinstance(result, Unmeasured) else asdict(result)


def _read_cache(file: Path) -> Facts:
    """What is kept; nothing of another version of this file or of a damaged one."""
    try:
        kept = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return kept["measured"] if isinstance(kept, dict) and kept.get("version") == VERSION else {}


def _write_cache(file: Path, measured: Facts) -> None:
    """A cache that cannot be written is not an error: the next call measures again."""
    kept = {key: value for key, value in measured.items() if key != "from_cache"}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with new_file(file) as part:
            part.write(json.dumps({"version": VERSION, "measured": kept}, indent=1).encode())
    except OSError:
        pass


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _libraries() -> str:
    """Packages and builds, by which measurements are kept."""
    try:
        build = llama_build()
    except WrongLibrary:
        build = "no llama.cpp"
    return f"{build}, moe-edge {metadata.version('moe-edge')}"


# ---- what is looked up -------------------------------------------------------------------------------------


def memory_facts(root: Path = memory.ROOT) -> Facts:
    """Memory, limits, and what `--ram auto` comes to, in bytes."""
    auto = memory.auto_budget(root)
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    return {
        "total_bytes": memory.total_bytes(root),
        "available_bytes": memory.available_bytes(root),
        "cgroup_limits": [
            {"folder": str(c.folder), "limit_bytes": c.limit_bytes, "free_bytes": c.free_bytes}
            for c in memory.cgroup_limits(root)
        ],
        "address_space_limit_bytes": None if address_space == resource.RLIM_INFINITY else address_space,
        "page_bytes": memory.page_bytes(),
        "auto_bytes": auto.bytes,
        "auto_reason": auto.reason,
    }


def core_facts(n_threads: int) -> Facts:
    return {"name": cpu_name(), "cores": os.cpu_count() or 1, "usable_cores": n_cores(), "threads": n_threads}


def cpu_name() -> str:
    """The processor's own name where /proc/cpuinfo has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith(("model name", "Model"))]
    return next(iter(names), "") or platform.processor() or platform.machine()


def version_facts() -> Facts:
    """Versions, and how llama.cpp was built; why_not in the place of what cannot be loaded."""
    facts: Facts = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("moe-edge", "numpy")}, **installed_packages(),
    }
    try:
        import_llama()
        from llama_cpp import llama_cpp as bindings
        from moe_edge.runner.capi import library, loaded_ggml_version

        facts["cpu_build"] = cpu_build()
        facts["ggml"] = loaded_ggml_version()
        info = bindings.llama_print_system_info().decode()
        facts["openmp"] = "OPENMP = 1" in info
        features = info.split(":", 1)[-1].split("|")
        facts["cpu_features"] = [each.split("=")[0].strip() for each in features if "= 1" in each]
        library()
    except (ImportError, OSError, MoeEdgeError) as e:
        facts["why_not"] = str(e)
    return facts


def board_facts(target: Path, versions: Facts) -> list[Facts]:
    """The traps of this machine, as dictionaries of Finding: name, state, found, cost, mend."""
    features = versions.get("cpu_features")
    build = None if features is None else frozenset(features)
    machine = Machine(target=Path(os.path.realpath(target)), build_features=build)
    return [asdict(finding) for finding in findings(machine)]


# ---- for plan ----------------------------------------------------------------------------------------------


def storage_of(facts: Facts) -> StorageSpeeds | Unmeasured:
    """The storage speeds of doctor()'s answer."""
    s = facts["storage"]
    if "why_not" in s:
        return Unmeasured(s["why_not"])
    cells = tuple(ReadSpeed(**cell) for cell in s["random"])
    return StorageSpeeds(s["file_bytes"], s["sequential_bytes_per_second"], cells, s["small"])


def machine_speeds(
    facts: Facts, type_id: int, read_bytes: int, *,
    disk_bytes_per_second: float | None = None, dense_type: int | None = None,
) -> MachineSpeeds | Unmeasured:  # fmt: skip
    """The speeds that plan needs, from doctor()'s answer.

    type_id: the ggml type of the experts; measured now when it is not among doctor's. read_bytes: of one projection,
    which is what the engine reads at a time. disk_bytes_per_second: instead of the measured one. dense_type: of most
    of the other weights; None: as the experts'.
    """
    disk = disk_bytes_per_second
    if disk is None:
        storage = storage_of(facts)
        if isinstance(storage, Unmeasured):
            return storage
        disk = storage.at(read_bytes)
    products = _products(facts, type_id)
    if "why_not" in products:
        return Unmeasured(products["why_not"])
    dense = products if dense_type in (None, type_id) else _products(facts, dense_type)
    return MachineSpeeds(
        disk=disk,
        # products that read faster than the probe of the memory show that it was disturbed
        memory=max(facts["memory_bytes_per_second"], products["decode_bytes_per_second"]),
        compute=products["decode_bytes_per_second"],
        prefill=products["prefill_bytes_per_second"],
        layer_seconds=facts["tiny_model"].get("layer_seconds", LAYER_SECONDS),
        expert_rows=_curve(products, "expert_rows"),
        dense_rows=_curve(dense, "rows"),
        attention=facts["products"].get("F16", {}).get("prefill_bytes_per_second", 0.0),
    )


def _products(facts: Facts, type_id: int) -> Facts:
    return facts["products"].get(type_name(type_id)) or _or_why(probe.product_speeds(type_id, facts["n_threads"]))


def _curve(products: Facts, name: str) -> tuple[tuple[int, float], ...]:
    return tuple((int(n), float(rate)) for n, rate in products.get(name, ()))


def kept_speeds(
    target: Path, type_id: int, read_bytes: int, *, disk_bytes_per_second: float | None = None
) -> MachineSpeeds | None:
    """machine_speeds() of what doctor() has kept of this machine and the target's device; None when it has not.

    Measures nothing but products of a type that doctor() did not, about a second.
    """
    try:
        kept = _read_cache(cache_file(target))
    except OSError:
        return None
    if not {"storage", "products", "memory_bytes_per_second", "tiny_model", "n_threads"} <= kept.keys():
        return None
    speeds = machine_speeds(kept, type_id, read_bytes, disk_bytes_per_second=disk_bytes_per_second)
    return None if isinstance(speeds, Unmeasured) else speeds


def with_overrides(speeds: MachineSpeeds, **given: float | None) -> MachineSpeeds:
    """`speeds` with those of disk, memory, compute, prefill, layer_seconds that are not None."""
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return replace(speeds, **changes)
