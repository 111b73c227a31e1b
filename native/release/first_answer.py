"""From a bare Python to the first answer: the two commands of the README, their time and the bytes they need.

    python native/release/first_answer.py [--machine x86_64] [--dist dist] [--prove]

In a root with Python and without compiler or network (bare_root.py): `pip install moe-edge`, from a folder with the
wheels of `make wheel` and of the packages they need, then `moe-edge chat`, whose model is in the wheel. Printed: the
seconds of each command, and the bytes that pip would have fetched; what `moe-edge` alone says; and how many pages came
along. --prove also compares every CPU build that this processor can run with stock llama.cpp, bit by bit
(exact_here.py). The last line is JSON. Under emulation the seconds say nothing about a real machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

from bare_root import PIP, PYTHON, emulated, make_root, run_in, why_not
from cpu_choice import VARIANTS
from targets import GLIBC, TARGETS

ROOT = Path(__file__).resolve().parents[2]
MESSAGE = "The king said"
TAB_KEY = ("bash-completion/completions/moe-edge", "zsh/site-functions/_moe-edge",
           "fish/vendor_completions.d/moe-edge.fish")  # fmt: skip
# What the emulator is told to be, for the build that the runtime has to choose there: a Raspberry Pi 4 and a 5.
EMULATED = {"armv8_0": "cortex-a72", "armv8_2_dotprod": "cortex-a76"}
MIRROR = "http://deb.debian.org/debian"


def fetch_wheels(machine: str, dist: Path, into: Path) -> None:
    """The wheels that `pip install moe-edge` takes on this machine, ours from `dist`, the others from the registry."""
    shutil.rmtree(into, ignore_errors=True)
    old, new = GLIBC.split(".")
    tags = [f"manylinux_{old}_{minor}_{machine}" for minor in range(17, int(new) + 1)] + [f"manylinux2014_{machine}"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--only-binary",
               ":all:", "--python-version", PYTHON, "--implementation", "cp", "--abi", f"cp{PYTHON.replace('.', '')}",
               "--abi", "abi3", "--abi", "none", *(f"--platform={tag}" for tag in tags), "--find-links", str(dist),
               "--dest", str(into), "moe-edge"]  # fmt: skip
    if subprocess.run(command, check=False).returncode != 0:
        raise SystemExit(f"the wheels for {machine} could not be fetched; is {dist} filled by `make wheel`?")


def first_answer(machine: str, root: Path, wheels: Path) -> dict[str, object]:
    """Install and ask, in the root. Ends the program with what was said when a command fails."""
    binds = {wheels: "/wheels"}
    started = time.monotonic()
    options = ["--quiet", "--root-user-action=ignore", "--break-system-packages", "--no-index", "--find-links=/wheels"]
    done = run_in(root, ["/usr/bin/python3", "-c", PIP, "install", *options, "moe-edge"], binds=binds)
    installed = time.monotonic()
    _need(done, "pip install moe-edge")
    asked = run_in(root, ["moe-edge", "chat", "--temp", "0", "-n", "32"], given=MESSAGE)
    answered = time.monotonic()
    _need(asked, "moe-edge chat")
    if not asked.stdout.strip():
        raise SystemExit(f"moe-edge chat said nothing: {asked.stderr}")
    files = sorted(wheels.glob("*.whl"))
    return {
        "machine": machine, "emulated": machine != platform.machine(),
        "install_seconds": round(installed - started, 1), "answer_seconds": round(answered - installed, 1),
        "network_bytes": sum(each.stat().st_size for each in files), "files": len(files),
        "largest": {each.name: each.stat().st_size for each in sorted(files, key=lambda f: -f.stat().st_size)[:5]},
        "answer": asked.stdout.strip(),
    }  # fmt: skip


def shipped(root: Path) -> list[str]:
    """What helps who has only the wheel: next steps, pages, manual pages, the Tab key. Ends the program without one."""
    alone = run_in(root, ["moe-edge"])
    _need(alone, "moe-edge")
    pages = run_in(root, ["moe-edge", "docs"])
    _need(pages, "moe-edge docs")
    # Both folders are where man and bash-completion look: beside the folder of the program.
    folder = root / "usr/local/share"
    manual = sorted(path.name for path in (folder / "man/man1").glob("moe-edge*.1"))
    files = [folder / name for name in TAB_KEY]
    if "moe-edge chat" not in alone.stdout or "moe-edge-chat.1" not in manual or not all(map(Path.is_file, files)):
        raise SystemExit(f"{folder} lacks manual pages or shells' files, or moe-edge alone says: {alone.stdout}")
    script = f"source /usr/local/share/{TAB_KEY[0]}; COMP_WORDS=(moe-edge doct); COMP_CWORD=1; " \
             '_moe_edge_completion moe-edge; echo "${COMPREPLY[@]}"'  # fmt: skip
    tab = run_in(root, ["bash", "-c", script])
    _need(tab, "the Tab key in bash")
    if tab.stdout.split() != ["doctor"]:
        raise SystemExit(f"bash completes 'moe-edge doct' to {tab.stdout.split()}")
    n_pages = len(pages.stdout.splitlines()) - 2  # an empty line and where they are come last
    return [*alone.stdout.splitlines(), "",
            f"{n_pages} pages by `moe-edge docs`, {len(manual)} for man; the Tab key works in bash"]  # fmt: skip


def prove(machine: str, root: Path) -> list[str]:
    """Compare each CPU build that this processor has with stock llama.cpp; one line a setting.

    Under emulation each build gets a processor that it is for, and must be the one that is chosen there.
    """
    said: list[str] = []
    binds = {ROOT / "native" / "release": "/release", ROOT / "tests": "/tests"}
    emulation = machine != platform.machine()
    for build in reversed(VARIANTS[machine]):
        ask = "import sys; sys.path.insert(0, '/release'); import cpu_choice as c; m = c.platform.machine(); " \
              f"print(c.processor_features(m) >= set(c.VARIANTS[m]['{build}']))"  # fmt: skip
        environ = {"QEMU_CPU": EMULATED[build]} if emulation else {"MOE_EDGE_CPU": build}
        able = run_in(root, ["/usr/bin/python3", "-c", ask], binds=binds, environ=environ)
        _need(able, "the question what this processor has")
        if able.stdout.strip() != "True":
            said.append(f"{build}: not run, this processor does not have what it needs")
            continue
        command = ["/usr/bin/python3", "/release/exact_here.py", "/tests"]
        done = run_in(root, command, binds=binds, environ=environ)
        _need(done, f"the comparison of {build} with stock llama.cpp")
        if f"({build})" not in done.stdout:
            raise SystemExit(f"another build than {build} was chosen: {done.stdout}")
        said += [f"{environ['QEMU_CPU']}: {line}" if emulation else line for line in done.stdout.splitlines()]
    return said


def _need(done: subprocess.CompletedProcess[str], what: str) -> None:
    if done.returncode != 0:
        raise SystemExit(f"{what} ended with status {done.returncode}: {done.stdout}{done.stderr}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and bytes from a bare Python to the first answer.")
    parser.add_argument("--machine", choices=list(TARGETS), default=platform.machine())
    parser.add_argument("--dist", type=Path, default=ROOT / "dist")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "wheel")
    parser.add_argument("--mirror", default=MIRROR, help=f"of Debian; {MIRROR}")
    parser.add_argument("--prove", action="store_true", help="compare every CPU build with stock llama.cpp")
    given = parser.parse_args()
    if reason := why_not(given.machine):
        raise SystemExit(f"skipped: {reason}")
    pristine, used = (given.build / "roots" / f"{given.machine}{end}" for end in (".pristine", ""))
    make_root(given.machine, pristine, given.mirror)
    shutil.rmtree(used, ignore_errors=True)
    subprocess.run(["cp", "-a", str(pristine), str(used)], check=True)
    wheels = given.build / "wheels" / given.machine
    fetch_wheels(given.machine, given.dist, wheels)
    with emulated(given.machine):
        found = first_answer(given.machine, used.resolve(), wheels.resolve())
        print(f"> {MESSAGE}\n{found['answer']}\n")
        size, n = found["network_bytes"], found["files"]
        print(f"pip install moe-edge: {found['install_seconds']} s, {size:,} bytes in {n} files")
        print(f"moe-edge chat:        {found['answer_seconds']} s, 0 bytes (its model is in the wheel)", flush=True)
        print("> moe-edge", *shipped(used.resolve()), "", sep="\n", flush=True)
        if given.prove:
            found["exact"] = exact = prove(given.machine, used.resolve())
            print(*exact, sep="\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
