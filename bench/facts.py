"""What a result depends on: the machine, the versions, the commit, the model."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from moe_edge.models.errors import NotMoE
from moe_edge.models.formats.ggml_types import type_name
from moe_edge.models.formats.gguf import GGUFModel, open_gguf

GIB = 1 << 30
PACKAGES = ("moe-edge", "llama-cpp-python", "moe-edge-runtime", "numpy", "gguf")


@dataclass(frozen=True)
class ModelFacts:
    """Sizes in bytes. active_bytes: weights a token needs, dense and top-k experts."""

    name: str
    architecture: str
    header_sha256: str
    file_bytes: int
    expert_bytes: int
    dense_bytes: int
    active_expert_bytes: int
    types: tuple[str, ...]
    shape: str

    @property
    def active_bytes(self) -> int:
        return self.dense_bytes + self.active_expert_bytes


def model_facts(path: Path) -> ModelFacts:
    """Read from the header of a stock GGUF. Raises what open_gguf raises, and NotMoE."""
    model = open_gguf(path)
    arch = model.architecture
    experts = [entry for name, entry in model.tensors.items() if "_exps." in name]
    n_expert, n_used = (model.kv.get(f"{arch}.{key}", 0) for key in ("expert_count", "expert_used_count"))
    if not experts or not n_expert:
        raise NotMoE(f"{path}: holds no experts; compare.py takes a stock GGUF of a Mixture-of-Experts model")
    expert_bytes = sum(entry.nbytes for entry in experts)
    return ModelFacts(
        name=path.name,
        architecture=arch,
        header_sha256=hashlib.sha256(b"".join(part.header for part in model.parts)).hexdigest()[:16],
        file_bytes=sum(part.file_bytes for part in model.parts),
        expert_bytes=expert_bytes,
        dense_bytes=_dense_bytes(model),
        active_expert_bytes=expert_bytes * n_used // n_expert,
        types=tuple(sorted({type_name(entry.type) for entry in experts})),
        shape=f"{model.kv.get(f'{arch}.block_count')} layers, {n_expert} experts, top {n_used}",
    )


def _dense_bytes(model: GGUFModel) -> int:
    """What every token reads; of an embedding that is not also the output, only a row is."""
    unread = "token_embd.weight" if "output.weight" in model.tensors else ""
    return sum(e.nbytes for name, e in model.tensors.items() if "_exps." not in name and name != unread)


def machine_facts() -> dict[str, Any]:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(memory / GIB, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": commit(),
    }


def machine_name() -> str:
    """A file name for this machine: CPU, cores, memory."""
    facts = machine_facts()
    text = f"{facts['cpu']} {facts['cores']}c {round(facts['memory_gib'])}g"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def cpu_name() -> str:
    """As the system calls it; boards without a model name in /proc/cpuinfo have one in the device tree."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    if match:
        return match[1].strip()
    board = Path("/proc/device-tree/model")
    return board.read_text().strip("\0\n") if board.exists() else platform.processor() or platform.machine()


def commit() -> str:
    """The commit of this checkout, with a + when files differ from it; empty outside of one."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "--short=12", "HEAD")
    return head + ("+" if head and git("status", "--porcelain", "--untracked-files=no") else "")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
