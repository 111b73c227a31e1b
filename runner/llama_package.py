"""Which installed package brings llama.cpp: llama-cpp-python, or moe-edge-runtime, which has it ready for use.

Both have the folder `llama_cpp`, so one of them is used and two are a fault. Nothing else asks for either by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata

from moe_edge.models.errors import WrongLibrary

COMPILED, READY = "llama-cpp-python", "moe-edge-runtime"
WORKING = {COMPILED: "0.3.36", READY: "0.3.36.*"}


def installed_packages() -> dict[str, str]:
    """Name -> version of those of the two that are installed."""
    found = {}
    for name in WORKING:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return found


def only_package(installed: Mapping[str, str]) -> tuple[str, str]:
    """(name, version) of the one package that brings llama.cpp. Raises WrongLibrary when there is none, or both."""
    if not installed:
        raise WrongLibrary(
            f"no package that brings llama.cpp is installed; pip install '{COMPILED}=={WORKING[COMPILED]}', which "
            f"needs a C++ compiler, or '{READY}=={WORKING[READY]}', which does not"
        )
    if len(installed) > 1:
        raise WrongLibrary(
            f"{COMPILED} {installed[COMPILED]} and {READY} {installed[READY]} are both installed, in the same folder; "
            f"pip uninstall -y {COMPILED} {READY}, then pip install '{READY}=={WORKING[READY]}'"
        )
    ((name, version),) = installed.items()
    return name, version


def llama_package() -> tuple[str, str]:
    """(name, version) of the package that brings llama.cpp here. Raises WrongLibrary when there is none, or both."""
    return only_package(installed_packages())


def llama_build() -> str:
    """Package, version and, of several CPU builds, the loaded one, like `moe-edge-runtime 0.3.36.1 (avx2)`.

    Two builds round sums differently. Raises WrongLibrary when llama.cpp cannot be loaded.
    """
    name, version = llama_package()
    cpu = cpu_build()
    return f"{name} {version} ({cpu})" if cpu else f"{name} {version}"


def cpu_build() -> str | None:
    """Which CPU build of moe-edge-runtime is loaded; None with libraries that have one only. Raises WrongLibrary."""
    import_llama()
    try:
        from llama_cpp import _cpu_choice
    except ImportError:
        return None
    return str(_cpu_choice.chosen) if _cpu_choice.chosen else None


def import_llama() -> None:
    """Import llama_cpp, for those who do so first. Raises WrongLibrary with the reason why it cannot be loaded."""
    name, version = llama_package()
    try:
        import llama_cpp  # noqa: F401
    except (ImportError, OSError, RuntimeError) as e:  # RuntimeError: llama-cpp-python's, of a library that is missing
        raise WrongLibrary(f"{name} {version} cannot be loaded: {e}") from e
