"""Instructions of an expert's product on ARM: row by row, against repacking its matrix and ggml's repacked GEMM.

qemu traces every guest instruction (`-singlestep -d exec,nochain`), and this counts the lines between the marks that
products.cpp writes. Instructions are not seconds: they compare ways of doing one product on one processor, no more.

    python tests/arm/count.py [MACHINE ...]      table on stdout, some minutes
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

from machine import BUILD, LLAMA_CPP, MACHINES, ROOT, SYSROOT, Machine, libraries, run, set_up

TYPES = ("q4_K", "q4_0", "q8_0", "mxfp4")
COLUMNS, WEIGHT_ROWS = 512, 32  # of the matrix: every way is linear in both, but for some hundred instructions
GROUPS = (1, 8, 32, 128)


def compiled(machine: Machine) -> str:
    program, lib = BUILD / f"products-{machine.march}", libraries(machine.march)
    run(
        "aarch64-linux-gnu-g++", "-O2", "-std=c++17", "-I", LLAMA_CPP / "ggml" / "include",
        ROOT / "tests" / "arm" / "products.cpp", "-L", lib, "-lggml", "-lggml-base", "-lggml-cpu", "-o", program,
    )  # fmt: skip
    return str(program)


def counted(machine: Machine, program: str, kind: str) -> Iterator[tuple[str, int, int, str]]:
    """(way, rows of the group, instructions, hash of the output) of each marked stretch."""
    command = [
        "qemu-aarch64-static", "-cpu", machine.cpu, "-L", str(SYSROOT), "-singlestep", "-d", "exec,nochain", program,
        kind, str(COLUMNS), str(WEIGHT_ROWS), *map(str, GROUPS),
    ]  # fmt: skip
    env = {**os.environ, "LD_LIBRARY_PATH": str(libraries(machine.march))}
    counting = ["awk", "/^Trace/ { n++ } /^mark/ { print $2, $3, n, $4; fflush(); n = 0 }"]
    with (
        subprocess.Popen(command, env=env, stderr=subprocess.PIPE) as traced,
        subprocess.Popen(counting, stdin=traced.stderr, stdout=subprocess.PIPE, text=True) as counts,
    ):
        assert counts.stdout is not None
        for line in counts.stdout:
            way, rows, n, bits = line.split()
            yield way, int(rows), int(n), bits
    if traced.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {traced.returncode}")


def main(names: list[str]) -> None:
    set_up()
    print(f"instructions, thousands; a matrix of {WEIGHT_ROWS} rows x {COLUMNS} columns; repack: of the whole matrix")
    heads = "".join(f"{head:>9}" for head in ("rows", "repack", "gemm", "gemv"))
    print(f"{'machine':8}{'type':7}{'group':>6}{heads}  rows/(repack+gemm)  bits")
    for name in names or ["pi5", "i8mm"]:
        program = compiled(MACHINES[name])
        for kind in TYPES:
            found: dict[int, dict[str, tuple[int, str]]] = {n: {} for n in GROUPS}
            for way, rows, n, bits in counted(MACHINES[name], program, kind):
                found[rows][way] = n, bits
            for rows, ways in found.items():
                print(line_of(name, kind, rows, ways), flush=True)


def line_of(name: str, kind: str, rows: int, ways: dict[str, tuple[int, str]]) -> str:
    """One line of the table; bits: which ways give the same output."""
    line = f"{name:8}{kind:7}{rows:6}{ways['rows'][0] / 1e3:9.1f}"
    if "gemm" not in ways:
        return f"{line}  not repacked here"
    repack, gemm, gemv = (ways[way][0] for way in ("repack", "gemm", "gemv"))
    equal = f"gemm {'=' if ways['gemm'][1] == ways['gemv'][1] else '!='} gemv"
    equal += f", {'=' if ways['gemm'][1] == ways['rows'][1] else '!='} rows"
    ratio = ways["rows"][0] / (repack + gemm)
    return f"{line}{repack / 1e3:9.1f}{gemm / 1e3:9.1f}{gemv / 1e3:9.1f}{ratio:12.2f}x         {equal}"


if __name__ == "__main__":
    main(sys.argv[1:])
