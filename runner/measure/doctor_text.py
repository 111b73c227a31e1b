"""What `moe-edge doctor` says to people: one aligned line for each thing, with its verdict."""

from __future__ import annotations

import sys

from moe_edge.models.errors import printable
from moe_edge.runner.llama_package import WORKING
from moe_edge.runner.measure.boards.finding import COSTS, NOTE
from moe_edge.runner.measure.doctor import Facts, doctor
from moe_edge.schedulers.budget import MIB, format_bytes


def doctor_text(facts: Facts) -> str:
    """The measured part, then the board's findings, each that costs something with the line that mends it."""
    rows = [("target", facts["target"] + ("" if not facts["from_cache"] else f" (measured {facts['storage_date']})"))]
    rows += _storage_rows(facts["storage"])
    rows += _compute_rows(facts)
    rows += _memory_rows(facts["memory"])
    c, v = facts["cores"], facts["versions"]
    rows.append(("cores", f"{c['usable_cores']} of {c['cores']} usable, {c['threads']} threads: {c['name']}"))
    libraries = ", ".join(f"{name} {v[name]}" for name in (*WORKING, "moe-edge") if name in v)
    rows.append(("versions", f"{v['system']}, python {v['python']}, {libraries}"))
    if "why_not" in v:
        rows.append(("engine", f"does not load: {v['why_not']}"))
    else:
        built = f", built for {v['cpu_build']}" if v.get("cpu_build") else ""
        threads = "OpenMP yes" if v["openmp"] else "OpenMP no: own thread pool"
        rows.append(("engine", f"loads, ggml {v['ggml']}{built}, {threads}"))
    rows += _board_rows(facts["board"])
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:<{width}}{text}" for name, text in rows)


def _storage_rows(s: Facts) -> list[tuple[str, str]]:
    if "why_not" in s:
        return [("storage", f"not measured: {s['why_not']}")]
    direct = s["direct"]
    if "why_not" in direct:
        verdict = f"not tested: {direct['why_not']}"
    elif direct["bypass"]:
        verdict = f"yes, verified by {direct['method']}: {direct['detail']}"
    else:
        verdict = f"NO, they go through the page cache ({direct['method']}: {direct['detail']})"
    rows = [("direct reads", verdict)]
    rows.append(("sequential", f"{s['sequential_bytes_per_second'] / 1e6:.0f} MB/s"))
    for block in sorted({cell["block_bytes"] for cell in s["random"]}):
        cells = [cell for cell in s["random"] if cell["block_bytes"] == block]
        rates = ", ".join(f"{c['bytes_per_second'] / 1e6:.0f} ({c['depth']})" for c in cells)
        size = f"{block // MIB} MiB" if block >= MIB else f"{block // 1024} KiB"
        rows.append((f"random {size}", f"{rates} MB/s (at a time)"))
    best = max(cell["bytes_per_second"] for cell in s["random"])
    rows.append(("storage", f"{_storage_verdict(best)}{_storage_note(s)}"))
    return rows


def _storage_verdict(best: float) -> str:
    for least, words in ((2e9, "fast, NVMe class"), (4e8, "usable, SATA SSD class"), (8e7, "slow, SD card class")):
        if best >= least:
            return words
    return "very slow, hard disk class: give the experts all the memory there is"


def _storage_note(s: Facts) -> str:
    if s["small"]:
        return f"; bounded by the file's size, {format_bytes(s['file_bytes'])}: caches below us answer repeated reads"
    return "; of a file written just now, which the drive's cache may flatter" if s["written_for_it"] else ""


def _compute_rows(facts: Facts) -> list[tuple[str, str]]:
    memory_rate = facts["memory_bytes_per_second"]
    rows = [("memory speed", f"{memory_rate / 1e9:.1f} GB/s, {facts['n_threads']} threads")]
    for name, p in facts["products"].items():
        if "why_not" in p:
            rows.append((f"{name} products", f"not measured: {p['why_not']}"))
            continue
        rate = p["decode_bytes_per_second"]
        rows.append((
            f"{name} products",
            f"decode {rate / 1e9:.1f} GB/s of weights ({100 * rate / memory_rate:.0f} % of memory speed), "
            f"prefill {p['prefill_bytes_per_second'] / 1e9:.0f} GB/s of weights x tokens",
        ))  # fmt: skip
    tiny = facts["tiny_model"]
    if "why_not" in tiny:
        rows.append(("embedded model", f"not measured: {tiny['why_not']}"))
    else:
        rows.append((
            "embedded model",
            f"{tiny['tokens_per_second']:.0f} tok/s, {1e6 * tiny['layer_seconds']:.0f} us a layer besides products; "
            f"its experts are tiny, overheads keep them at {tiny['expert_bytes_per_second'] / 1e9:.1f} GB/s",
        ))  # fmt: skip
    return rows


def _memory_rows(m: Facts) -> list[tuple[str, str]]:
    rows = [
        ("memory", f"{format_bytes(m['available_bytes'])} of {format_bytes(m['total_bytes'])} available, "
                   f"pages of {m['page_bytes'] // 1024} KiB"),
    ]  # fmt: skip
    for c in m["cgroup_limits"]:
        limit, free = format_bytes(c["limit_bytes"]), format_bytes(c["free_bytes"])
        rows.append(("cgroup limit", f"{limit}, {free} free: {c['folder']}"))
    if not m["cgroup_limits"]:
        rows.append(("cgroup limit", "none"))
    if m["address_space_limit_bytes"] is not None:
        rows.append(("ulimit -v", f"{format_bytes(m['address_space_limit_bytes'])}: the arena reserves address space"))
    rows.append(("--ram auto", m["auto_reason"].removeprefix("--ram auto is ")))
    return rows


def _board_rows(found: list[Facts]) -> list[tuple[str, str]]:
    rows = []
    for each in found:
        mark = {COSTS: "COSTS: ", NOTE: "note: "}.get(each["state"], "")
        rows.append((each["name"], mark + printable(each["found"])))
        rows += [("", f"{label}: {printable(each[key])}") for label, key in (("cost", "cost"), ("mend", "mend"))
                 if each[key]]  # fmt: skip
    return rows


if __name__ == "__main__":
    print(doctor_text(doctor(*sys.argv[1:2], tell=lambda text: print(text, file=sys.stderr))))
