"""Instructions of an expert's product on ARM: row by row, against a matrix that is repacked as it is read.

qemu traces every guest instruction (`-singlestep -d exec,nochain`), and this counts the lines between the marks that
products.cpp writes. Instructions are not seconds: they compare ways of doing one product on one processor, no more.

    python tests/arm/count.py [MACHINE ...] [TYPE ...]      table on stdout, some minutes a type
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

from machine import BUILD, LLAMA_CPP, MACHINES, ROOT, SYSROOT, Machine, libraries, run, set_up

TYPES = ("q4_0", "mxfp4", "iq4_nl", "q8_0", "q4_K", "q5_K", "q6_K")
COLUMNS, WEIGHT_ROWS = 512, 64  # of the matrix: every way is linear in both, but for some hundred instructions
GROUPS = (1, 8, 32)  # more rows take as much a row as 32


def compiled(machine: Machine) -> str:
    program, lib = BUILD / f"products-{machine.march}", libraries(machine.march)
    run(
        "aarch64-linux-gnu-g++", "-O2", "-std=c++17", "-I", LLAMA_CPP / "ggml" / "include",
        "-I", ROOT / "native", ROOT / "tests" / "arm" / "products.cpp", ROOT / "native" / "repack.cpp",
        "-L", lib, "-lggml", "-lggml-base", "-lggml-cpu", "-o", program,
    )  # fmt: skip
    return str(program)


def counted(machine: Machine, program: str, kind: str) -> Iterator[tuple[int, str, int, str]]:
    """(rows of the group, way, instructions, hash of the output or nothing) of each marked stretch."""
    command = [
        "qemu-aarch64-static", "-cpu", machine.cpu, "-L", str(SYSROOT), "-singlestep", "-d", "exec,nochain", program,
        kind, str(COLUMNS), str(WEIGHT_ROWS), *map(str, GROUPS),
    ]  # fmt: skip
    env = {**os.environ, "LD_LIBRARY_PATH": str(libraries(machine.march))}
    counting = ["awk", "/^Trace/ { n++ } /^mark/ { print $2, $3, n; fflush(); n = 0 } /^bits/ { print $1, $2, 0 }"]
    marked: list[tuple[int, str, int]] = []
    with (
        subprocess.Popen(command, env=env, stderr=subprocess.PIPE) as traced,
        subprocess.Popen(counting, stdin=traced.stderr, stdout=subprocess.PIPE, text=True) as counts,
    ):
        assert counts.stdout is not None
        for line in counts.stdout:
            way, rows, n = line.split()
            if way == "bits":
                group, last, instructions = marked.pop()
                yield group, last, instructions, rows
            else:
                if marked:
                    yield (*marked.pop(), "")
                marked.append((int(rows), way, int(n)))
    if traced.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {traced.returncode}")


def main(arguments: list[str]) -> None:
    set_up()
    machines = [name for name in arguments if name in MACHINES] or ["pi5", "i8mm"]
    kinds = [kind for kind in arguments if kind not in MACHINES] or TYPES
    print(f"instructions, thousands; a matrix of {WEIGHT_ROWS} rows x {COLUMNS} columns; repack: of the whole matrix")
    heads = "".join(f"{head:>9}" for head in ("rows", "repack", "ours"))
    print(f"{'machine':8}{'type':7}{'group':>6}{heads}  rows/ours  uses that pay a repack   by    bits of gemv")
    for name in machines:
        program = compiled(MACHINES[name])
        for kind in kinds:
            found: dict[int, dict[str, tuple[int, str]]] = {n: {} for n in GROUPS}
            for rows, way, n, bits in counted(MACHINES[name], program, kind):
                found[rows][way] = n, bits
            for rows, ways in found.items():
                print(line_of(name, kind, rows, ways), flush=True)


def line_of(name: str, kind: str, rows: int, ways: dict[str, tuple[int, str]]) -> str:
    """One line of the table. The last column: whose output has the bits of gemv, stock's for repacked experts."""
    plain = ways["rows"][0]
    line = f"{name:8}{kind:7}{rows:6}{plain / 1e3:9.1f}"
    ours = next((way for way in ("ours_gemm", "ours_gemv") if way in ways), None)
    if ours is None:
        return f"{line}  not repacked here"
    repack, n = ways["in_place"][0] - ways["copy"][0], ways[ours][0]
    pays = f"{repack / (plain - n):12.1f}" if n < plain else f"{'never':>12}"
    equal = " ".join(way for way in ("rows", "gemm", ours) if ways[way][1] == ways["gemv"][1])
    return f"{line}{repack / 1e3:9.1f}{n / 1e3:9.1f}{plain / n:10.2f}x{pays}{ours[5:]:>17}    {equal}"


if __name__ == "__main__":
    main(sys.argv[1:])
