"""A bare Debian in a folder: Python and its libraries, no compiler and no pip in the path, for x86-64 or aarch64.

The packages are fetched by debootstrap and only unpacked, so nothing of another architecture has to run. Needs root for
chroot and namespaces. aarch64 runs under qemu-user where the machine is another one (Debian's qemu-user-static).
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

SUITE, PYTHON = "bookworm", "3.11"
PACKAGES = "python3,python3-pip-whl,python3-distutils"
DEBIAN_NAMES = {"x86_64": "amd64", "aarch64": "arm64"}
COMPILERS = ("cc", "gcc", "g++", "c++", "clang", "cmake", "ninja", "make")
PIP = "import glob, runpy, sys; sys.path.insert(0, glob.glob('/usr/share/python-wheels/pip-*.whl')[0]); " \
      "sys.argv[0] = 'pip'; runpy.run_module('pip', run_name='__main__')"  # fmt: skip

# /proc/sys/fs/binfmt_misc/register's line for ELF files of aarch64, as qemu's own qemu-binfmt-conf.sh describes them
BINFMT = Path("/proc/sys/fs/binfmt_misc")
EMULATOR, OURS = "qemu-aarch64-static", "moe-edge-aarch64"
MAGIC = r"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
MASK = r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"


def why_not(machine: str) -> str:
    """Why no root of this machine can be made and entered here, in one sentence; empty when it can."""
    if os.name != "posix" or platform.system() != "Linux" or os.geteuid() != 0:
        return "a bare root needs Linux and root rights"
    needed = ["debootstrap", "unshare", "chroot", "dpkg-deb"]
    if machine != platform.machine():
        needed.append(EMULATOR)
    if lacking := [name for name in needed if shutil.which(name) is None]:
        return f"{', '.join(lacking)} is not installed; apt-get install debootstrap util-linux qemu-user-static"
    return ""


def make_root(machine: str, folder: Path, mirror: str) -> None:
    """Make the root, or keep the one that is there. Raises subprocess.CalledProcessError when a step fails."""
    done = folder / ".unpacked"
    if done.exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    options = [f"--arch={DEBIAN_NAMES[machine]}", "--foreign", "--variant=minbase", f"--include={PACKAGES}"]
    subprocess.run(["debootstrap", *options, SUITE, str(folder), mirror], check=True, stdout=subprocess.DEVNULL)
    for package in sorted((folder / "var/cache/apt/archives").glob("*.deb")):
        files = subprocess.run(["dpkg-deb", "--fsys-tarfile", package], check=True, capture_output=True).stdout
        # /bin and /lib are links into /usr, which an archive with a folder of that name would replace
        subprocess.run(["tar", "-x", "--keep-directory-symlink", "-C", folder], input=files, check=True)
        package.unlink()
    for name in ("proc", "dev", "sys"):  # debootstrap may make a link to the folder of the system it runs on
        if (folder / name).is_symlink():
            (folder / name).unlink()
            (folder / name).mkdir()
    found = [name for name in COMPILERS if (folder / "usr/bin" / name).exists()]
    assert not found, f"{folder} was to have no compiler, but it has {found}"
    done.touch()


@contextlib.contextmanager
def emulated(machine: str) -> Iterator[None]:
    """Within it the kernel starts programs of this machine by qemu; nothing is changed on a machine of that kind."""
    if machine == platform.machine():
        yield
        return
    if not (BINFMT / "register").exists():
        subprocess.run(["mount", "-t", "binfmt_misc", "binfmt_misc", str(BINFMT)], check=True)
    if (BINFMT / "qemu-aarch64").exists():  # the system's own
        yield
        return
    (BINFMT / "register").write_text(f":{OURS}:M::{MAGIC}:{MASK}:{shutil.which(EMULATOR)}:OCF")
    try:
        yield
    finally:
        (BINFMT / OURS).write_text("-1")


def run_in(
    root: Path, command: Sequence[str], *, given: str = "", environ: Mapping[str, str] | None = None,
    binds: Mapping[Path, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command in the root, without network, in namespaces of its own. binds: folder here -> folder there."""
    lines = ["set -e", f'mount -t proc proc "{root}/proc"', f'mount --rbind /dev "{root}/dev"']
    for here, there in (binds or {}).items():
        (root / there.lstrip("/")).mkdir(parents=True, exist_ok=True)
        lines.append(f'mount --bind "{here}" "{root}{there}"')
    lines.append(f'exec chroot "{root}" "$@"')
    return subprocess.run(
        ["unshare", "--mount", "--net", "--pid", "--fork", "sh", "-c", "\n".join(lines), "sh", *command],
        input=given, env={"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/root", "LANG": "C.UTF-8",
                          **(environ or {})},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
