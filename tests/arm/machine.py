"""An ARM machine without a board: llama.cpp and moe-edge cross-built, run by qemu on this one.

Makes, under build/arm: a root of Debian's arm64 packages (Python 3.11, libgomp, libstdc++), a virtual environment whose
`python` runs through qemu-aarch64-static, llama.cpp from the source package of llama-cpp-python, and moe-edge as it
would be installed. Each part is made once and again when what it is made from changes. Child processes of the emulated
Python are emulated too, because sys.executable is that same wrapper: no binfmt_misc and no chroot, so no root either,
except for `apt-get install` of missing tools.

    python tests/arm/machine.py                  set up everything
    python tests/arm/machine.py pi5 -m pytest    then run this Python on that machine
    python tests/arm/machine.py test [MACHINE]   the tests of on_arm.py on one machine, or on all
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import requires, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "arm"
SYSROOT, SITE = BUILD / "root", BUILD / "env" / "lib" / "python3.11" / "site-packages"
PYTHON = BUILD / "env" / "bin" / "python"
VERSION = "0.3.36"  # of llama-cpp-python
SDIST = ROOT / "build" / "sdist" / f"llama_cpp_python-{VERSION}.tar.gz"
SOURCE = BUILD / f"llama_cpp_python-{VERSION}"
LLAMA_CPP = SOURCE / "vendor" / "llama.cpp"
TOOLS = {  # program: Debian package
    "qemu-aarch64-static": "qemu-user-static",
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "cmake": "cmake",
    "ninja": "ninja-build",
}
ARM_PACKAGES = ("python3", "libgomp1", "libstdc++6")
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
TEST_WHEELS = ("pytest>=8", "tokenizers>=0.20", "diskcache>=5.6.1", "typing-extensions>=4.5")
ROOMS = ("convert", "models", "schedulers", "runner")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


@dataclass(frozen=True)
class Machine:
    """cpu: what qemu calls the processor. march: what llama.cpp's CPU library is compiled for."""

    cpu: str
    march: str


MACHINES = {
    "pi4": Machine("cortex-a72", "armv8-a"),
    "pi5": Machine("cortex-a76", "armv8.2-a+dotprod+fp16"),
    "i8mm": Machine("max", "armv8.2-a+dotprod+fp16+i8mm"),
}


class CannotSetUp(Exception):
    """One sentence: what is missing and the way out."""


def run(*command: str | os.PathLike[str], env: dict[str, str] | None = None) -> None:
    """Run it, quietly unless it fails. Raises CannotSetUp with the end of what it said."""
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(env or {})}, check=False)
    if done.returncode != 0:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise CannotSetUp(f"{' '.join(map(str, command))[:300]} ended with {done.returncode}:\n{said}")


def once(name: str, depends: Iterable[str | Path], make: Callable[[], None]) -> None:
    """Call `make` unless the part `name` was made from the same strings and file contents before."""
    digest = hashlib.sha256()
    for each in depends:
        digest.update(each.read_bytes() if isinstance(each, Path) else str(each).encode())
    stamp = BUILD / "made" / name
    if stamp.exists() and stamp.read_text() == digest.hexdigest():
        return
    print(f"arm: making {name}", flush=True)
    make()
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.write_text(digest.hexdigest())


def install_tools() -> None:
    """The programs of TOOLS, by apt-get where they are missing. Raises CannotSetUp where that cannot be."""
    missing = sorted(package for program, package in TOOLS.items() if not shutil.which(program))
    if not missing:
        return
    command = "apt-get install " + " ".join(missing)
    if not shutil.which("apt-get"):
        raise CannotSetUp(f"emulating ARM needs {' '.join(missing)}, and this machine has no apt-get to install them")
    if os.geteuid() != 0:
        raise CannotSetUp(f"emulating ARM needs packages that only root can install; run: sudo {command}")
    run("apt-get", "update", "-qq")
    run(*"apt-get install -y -qq --no-install-recommends".split(), *missing, env={"DEBIAN_FRONTEND": "noninteractive"})


def make_root() -> None:
    """Unpack arm64 packages of Debian, by an apt-get of its own that knows nothing of this machine's."""
    if not shutil.which("apt-get") or not KEYRING.exists():
        raise CannotSetUp(f"the arm64 root is made from Debian's packages, which need apt-get and {KEYRING}")
    apt = BUILD / "apt"
    shutil.rmtree(apt, ignore_errors=True)
    shutil.rmtree(SYSROOT, ignore_errors=True)
    for folder in ("state/lists/partial", "cache/archives/partial"):
        (apt / folder).mkdir(parents=True)
    mirror = os.environ.get("DEBIAN_MIRROR", "http://deb.debian.org/debian")
    (apt / "sources.list").write_text(f"deb [signed-by={KEYRING}] {mirror} bookworm main\n")
    (apt / "status").write_text("")
    (apt / "apt.conf").write_text(
        f'Dir::State "{apt}/state"; Dir::State::status "{apt}/status"; Dir::Cache "{apt}/cache";\n'
        f'Dir::Etc::sourcelist "{apt}/sources.list"; Dir::Etc::sourceparts "-";\n'
        'APT::Architecture "arm64"; APT::Architectures { "arm64"; };\n'
        'APT::Install-Recommends "false"; APT::Sandbox::User "";\n'
    )
    env = {"APT_CONFIG": str(apt / "apt.conf")}
    run("apt-get", "update", "-qq", env=env)
    run(*"apt-get install -y -qq --download-only".split(), *ARM_PACKAGES, env=env)
    for package in sorted((apt / "cache" / "archives").glob("*.deb")):
        run("dpkg-deb", "-x", package, SYSROOT)
    shutil.rmtree(apt)


def make_environment() -> None:
    """A virtual environment around the emulated Python, with arm64 wheels of what moe-edge and its tests need."""
    shutil.rmtree(BUILD / "env", ignore_errors=True)
    SITE.mkdir(parents=True)
    PYTHON.parent.mkdir(parents=True)
    PYTHON.write_text(
        f'#!/bin/sh\nexec qemu-aarch64-static -cpu "${{MOE_EDGE_ARM_CPU:-max}}" -L "{SYSROOT}" -0 "{PYTHON}" '
        f'"{SYSROOT}/usr/bin/python3.11" "$@"\n'
    )
    PYTHON.chmod(0o755)
    home = SYSROOT / "usr" / "bin"
    (BUILD / "env" / "pyvenv.cfg").write_text(f"home = {home}\ninclude-system-site-packages = false\n")
    wanted = [each for each in _dependencies() if not each.startswith("llama-cpp-python")]
    run(
        sys.executable, *"-m pip install --quiet --disable-pip-version-check --no-compile --only-binary=:all:".split(),
        *"--python-version 3.11 --implementation cp --target".split(), SITE,
        *(word for platform in PLATFORMS for word in ("--platform", platform)), *wanted, *TEST_WHEELS,
    )  # fmt: skip


def _dependencies() -> list[str]:
    """What the moe-edge of this Python says it needs, without its extras."""
    return [each for each in requires("moe-edge") or () if "extra ==" not in each]


def unpack_source() -> None:
    """llama-cpp-python's source package; its Python files become the package of the emulated machine."""
    if not SDIST.exists():
        run(
            sys.executable, *"-m pip download --quiet --disable-pip-version-check --no-deps".split(),
            *"--no-build-isolation --no-binary :all: --dest".split(), SDIST.parent, f"llama-cpp-python=={VERSION}",
        )  # fmt: skip
    shutil.rmtree(SOURCE, ignore_errors=True)
    with tarfile.open(SDIST) as archive:
        archive.extractall(BUILD, filter="data")


def build_llama() -> None:
    """libllama alone: ggml, with the arithmetic, is built once for each processor."""
    cross("llama", LLAMA_CPP, ["llama"], "-DGGML_CPU=OFF", "-DCMAKE_CXX_FLAGS_RELEASE=-O1", *LLAMA_OPTIONS)


def build_ggml(march: str) -> None:
    """ggml for one processor, in the folder LLAMA_CPP_LIB_PATH is set to, libllama beside it."""
    cross(f"ggml/{march}", LLAMA_CPP, ["ggml", "ggml-base", "ggml-cpu"], f"-DGGML_CPU_ARM_ARCH={march}", *LLAMA_OPTIONS)
    for built in (BUILD / "llama" / "bin").glob("libllama.so*"):
        shutil.copy2(built, libraries(march), follow_symlinks=False)


LLAMA_OPTIONS = (
    "-DGGML_NATIVE=OFF", "-DGGML_CCACHE=OFF", "-DBUILD_SHARED_LIBS=ON", "-DLLAMA_CURL=OFF",
    "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON", "-DCMAKE_INSTALL_RPATH=$ORIGIN",
    *(f"-DLLAMA_BUILD_{part}=OFF" for part in ("COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER", "APP")),
)  # fmt: skip


def libraries(march: str) -> Path:
    """The folder of llama.cpp's libraries for one processor."""
    return BUILD / "ggml" / march / "bin"


def cross(folder: str, source: Path, targets: list[str], *options: str) -> None:
    """Configure and build with Debian's aarch64 compiler, at a low priority."""
    tools = ("-DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc", "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++")
    system = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", "-DCMAKE_BUILD_TYPE=Release")
    run("cmake", "-G", "Ninja", "-S", source, "-B", BUILD / folder, *system, *tools, *options)
    run("nice", "-n", "10", "ninja", f"-j{os.cpu_count() or 2}", "-C", BUILD / folder, *targets)


def install_llama_cpp() -> None:
    """llama-cpp-python's Python files, and what pip would say of them."""
    shutil.rmtree(SITE / "llama_cpp", ignore_errors=True)
    shutil.copytree(SOURCE / "llama_cpp", SITE / "llama_cpp")
    info = SITE / f"llama_cpp_python-{VERSION}.dist-info"
    info.mkdir(exist_ok=True)
    shutil.copy2(SOURCE / "PKG-INFO", info / "METADATA")


def install_moe_edge() -> None:
    """The package as a wheel would put it there, with its library cross-built."""
    lib = libraries(next(iter(MACHINES.values())).march)
    options = (f"-DGGML_INCLUDE={LLAMA_CPP}/ggml/include", f"-DGGML_LIB={lib}")
    cross("native", ROOT / "native", ["moe_edge"], *options)
    package = SITE / "moe_edge"
    shutil.rmtree(package, ignore_errors=True)
    for room in ROOMS:
        shutil.copytree(ROOT / room, package / room, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy2(BUILD / "native" / "libmoe_edge.so", package / "runner")
    shutil.copy2(ROOT / "runner" / "package_init.py", package / "__init__.py")
    shutil.copy2(ROOT / "runner" / "py.typed", package / "py.typed")
    info = SITE / "moe_edge-0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: moe-edge\nVersion: {version('moe-edge')}\n")


def set_up() -> None:
    """Everything, or what is missing of it. Raises CannotSetUp."""
    BUILD.mkdir(parents=True, exist_ok=True)
    install_tools()
    once("root", ARM_PACKAGES, make_root)
    once("environment", [str(BUILD), *_dependencies(), *TEST_WHEELS, *PLATFORMS], make_environment)
    once("source", [VERSION], unpack_source)
    once("llama", [VERSION, *LLAMA_OPTIONS], build_llama)
    for march in {machine.march for machine in MACHINES.values()}:
        once(f"ggml-{march}", [VERSION, *LLAMA_OPTIONS], lambda march=march: build_ggml(march))  # type: ignore[misc]
    once("llama_cpp", [str(BUILD), VERSION, *_dependencies(), *TEST_WHEELS], install_llama_cpp)
    files = sorted(p for room in (*ROOMS, "native") for p in (ROOT / room).rglob("*") if p.is_file() and _is_source(p))
    once("moe_edge", [str(BUILD), *files, ROOT / "pyproject.toml", *_dependencies(), *TEST_WHEELS], install_moe_edge)


def _is_source(path: Path) -> bool:
    return "__pycache__" not in path.parts and path.suffix not in (".pyc", ".so")


def emulate(name: str, *arguments: str) -> int:
    """Run the emulated Python on the machine of this name; its exit code."""
    machine = MACHINES[name]
    env = {
        **os.environ,
        "MOE_EDGE_ARM_CPU": machine.cpu,
        "MOE_EDGE_ARM_MACHINE": name,
        "LLAMA_CPP_LIB_PATH": str(libraries(machine.march)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_WAIT_POLICY": "passive",  # spinning threads of an emulated machine starve each other
    }
    return subprocess.run([PYTHON, *arguments], env=env, cwd=ROOT, check=False).returncode


def test(names: Sequence[str]) -> int:
    """The tests of on_arm.py on these machines, one after the other; 0 when all pass."""
    failed = []
    for name in names:
        print(f"arm: {name}, {MACHINES[name].cpu} with libraries for {MACHINES[name].march}", flush=True)
        if emulate(name, *"-m pytest -q -p no:cacheprovider tests/arm/on_arm.py".split()) != 0:
            failed.append(name)
    if failed:
        print(f"arm: tests failed on {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def main(arguments: list[str]) -> int:
    testing = arguments[:1] == ["test"]
    named = arguments[1:] if testing else arguments[:1]
    unknown = [name for name in named if name not in MACHINES]
    if unknown:
        print(f"unknown machine '{unknown[0]}'; known: {', '.join(MACHINES)}", file=sys.stderr)
        return 2
    try:
        set_up()
    except CannotSetUp as e:
        print(e, file=sys.stderr)
        return 1
    if testing:
        return test(named or list(MACHINES))
    return emulate(*arguments) if arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
