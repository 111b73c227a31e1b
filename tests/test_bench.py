"""The comparison measures what it says: same tokens for all arms, caps that hold, rows that can be read again."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import compare
import facts
import limits
import report
import texts
from moe_edge.models.errors import NotMoE, UsageError
from random_models import Shape, write_random_model
from report import COLD, WARM, Case, Sample
from worker import ARMS, Job

MIB = 1 << 20
N_PROMPT, N_TOKENS = 12, 5
NO_LIMITS = Case(None, None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "tiny.gguf"
    return write_random_model(path, "olmoe", Shape(n_expert=8, n_used=2))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("It was the best of times, it was the worst of times.\n" * 20)
    return path


def can_limit() -> bool:
    try:
        with limits.Limits(64 * MIB, None, Path(__file__)):
            return True
    except limits.NotPossible:
        return False


needs_cgroup = pytest.mark.skipif(not can_limit(), reason="this process cannot create a memory cgroup")


def job(arm: str, model: Path, tokens: list[list[int]], join: list[str] | None = None) -> Job:
    return Job(arm, str(model), tokens, N_PROMPT, 256, 32, 2, None if arm != "moe-edge" else 64 * MIB, join or [])


def values(tok_s: float, argmax: list[int], nll: float = 2.0, **decode: float) -> dict[str, Any]:
    """A pass as worker.py reports it."""
    return {
        "tok_s": tok_s, "tpot_median_s": 1 / tok_s, "tpot_p90_s": 1 / tok_s, "tpot_mean_s": 1 / tok_s, "ttft_s": 1.0,
        "load_s": 0.5, "n_decoded": 4, "nll": nll, "peak_rss_bytes": 100 * MIB, "cgroup_peak_bytes": None,
        "cached_bytes": None, "prefill": {"disk_bytes": 8 * MIB}, "decode": {"disk_bytes": 4 * MIB, **decode},
        "argmax": argmax, "argmax_sha256": str(argmax),
    }  # fmt: skip


def test_every_arm_predicts_the_same_from_the_same_tokens(model: Path, text: Path) -> None:
    tokens = texts.pick_tokens(model, text.read_text(), 2, N_PROMPT + N_TOKENS + 1)
    results = {arm: compare.run_worker(job(arm, model, tokens), 60) for arm in ARMS}
    for arm, result in results.items():
        assert "error" not in result, (arm, result)
        assert [p["n_decoded"] for p in result["passes"]] == [N_TOKENS, N_TOKENS]
        assert [len(p["argmax"]) for p in result["passes"]] == [N_TOKENS + 1, N_TOKENS + 1]
    first, *others = ([p["nll"] for p in result["passes"]] for result in results.values())
    for losses in others:
        assert losses == pytest.approx(first, abs=0.05)
    edge = results["moe-edge"]["passes"][0]
    assert edge["decode"]["uses"] == N_TOKENS * 2 * 2  # layers, experts of a token
    assert results["stock-mmap"]["passes"][0]["argmax"] == results["stock-read"]["passes"][0]["argmax"]


def test_arm_that_fails_says_why_and_does_not_raise(model: Path, tmp_path: Path) -> None:
    result = compare.run_worker(job("stock-mmap", tmp_path / "none.gguf", [[1] * 20]), 60)
    assert result["error"].endswith("none.gguf: stock llama.cpp does not load it")
    too_small = Job("moe-edge", str(model), [[1] * 20], N_PROMPT, 256, 32, 2, 1 * MIB, [])
    assert compare.run_worker(too_small, 60)["error"].startswith("BudgetTooSmall: --ram 1MiB is too small")


@pytest.mark.slow
def test_comparison_prints_a_table_and_json_and_appends_rows(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows_file = tmp_path / "rows.csv"
    call = [str(model), "--rounds", "1", "--texts", "2", "--prompt", "12", "--tokens", "5", "--text", str(text)]
    call += ["--keep-caches", "--arms", "stock-read,moe-edge", "--csv", str(rows_file)]
    assert compare.main(call) == 0
    out = capsys.readouterr().out
    data = json.loads(out.splitlines()[-1])
    assert [(row["arm"], row["state"]) for row in data["rows"]] == [
        ("stock-read", COLD), ("moe-edge", COLD), ("stock-read", WARM), ("moe-edge", WARM),
    ]  # fmt: skip
    assert data["problems"] == []
    assert data["model"]["header_sha256"] == facts.model_facts(model).header_sha256
    assert data["samples"][0]["values"]["same_argmax"] == 1.0
    assert "ceiling, cap none, disk as it is: disk " in out
    assert "moe-edge against stock-read: " in out
    with open(rows_file) as file:
        assert [row["arm"] for row in csv.DictReader(file)] == [row["arm"] for row in data["rows"]]


@pytest.mark.cgroup
@needs_cgroup
def test_process_above_its_cap_is_killed_and_the_groups_are_removed(model: Path) -> None:
    code = "import sys; [open(p, 'w').write('0') for p in sys.argv[1:]]; b'x' * (200 << 20)"
    with limits.Limits(64 * MIB, None, model) as groups:
        folders = list(groups.groups)
        done = subprocess.run([sys.executable, "-c", code, *groups.join], check=False)
        assert done.returncode == compare.SIGKILL_STATUS
        assert limits.read_usage(groups.join).peak_bytes == pytest.approx(64 * MIB, rel=0.05)
    assert folders
    assert not any(folder.exists() for folder in folders)


@pytest.mark.cgroup
@needs_cgroup
def test_moe_edge_runs_inside_its_cap_and_reports_what_the_group_saw(model: Path) -> None:
    with limits.Limits(256 * MIB, None, model) as groups:
        result = compare.run_worker(job("moe-edge", model, [[1] * 20], groups.join), 60)
    assert "error" not in result, result
    assert 0 < result["cgroup_peak_bytes"] <= 256 * MIB
    assert result["cached_bytes"] is not None


def test_cap_above_the_own_limit_is_not_possible(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "own_limit_bytes", lambda: 100 * MIB)
    with pytest.raises(limits.NotPossible, match="is itself limited to 104857600 bytes"):
        limits.Limits(200 * MIB, None, model).__enter__()


def test_limit_that_cannot_be_made_is_a_row_with_the_reason(
    model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "CGROUP", Path("/nonexistent"))
    case = Case(64 * MIB, None)
    options = compare.Options(model, (case,), n_texts=1, n_prompt=N_PROMPT, n_tokens=N_TOKENS, text=text)
    rows = report.make_rows(compare.Comparison(options).run())
    assert [row.missing for row in rows] == ["no control groups at /nonexistent"] * 3
    assert "N/A: 64 MiB, as it is, moe-edge: no control groups at /nonexistent" in report.table(rows)


def test_rows_have_median_and_spread_and_cold_comes_first() -> None:
    samples = [Sample(NO_LIMITS, "moe-edge", WARM, i, 0, values(t, [1])) for i, t in enumerate((10.0, 30.0, 20.0))]
    samples.append(Sample(NO_LIMITS, "moe-edge", COLD, 0, 0, values(5.0, [1], hits=3, uses=4, stall_seconds=0.1)))
    cold, warm = report.make_rows(samples)
    assert (cold.state, cold.n, warm.n) == (COLD, 1, 3)
    assert warm.numbers["tok_s"] == report.Spread(20.0, 10.0, 30.0)
    assert warm.numbers["disk_mib_token"].median == 1.0
    assert cold.numbers["hit_rate"].median == 0.75
    assert cold.numbers["stall_ms_token"].median == pytest.approx(25.0)
    assert "| 20.00 (10.00-30.00) |" in report.table([cold, warm])


def test_ratios_compare_the_same_case_and_state() -> None:
    samples = [
        Sample(NO_LIMITS, "stock-mmap", COLD, 0, 0, values(2.0, [1])),
        Sample(NO_LIMITS, "moe-edge", COLD, 0, 0, values(10.0, [1])),
        Sample(NO_LIMITS, "moe-edge", WARM, 0, 0, values(20.0, [1])),
    ]
    assert report.ratios(report.make_rows(samples)) == [
        "cap none, disk as it is, cold: moe-edge against stock-mmap: 5.00x tok/s, 1.00x TTFT, 1.00x load + TTFT"
    ]


def test_wrong_results_are_found() -> None:
    tight = Case(64 * MIB, None)
    good = Sample(NO_LIMITS, "stock-mmap", COLD, 0, 0, values(1.0, [1, 2, 3, 4]))
    edge = Sample(NO_LIMITS, "moe-edge", COLD, 0, 0, values(1.0, [1, 2, 3, 5]))
    assert compare.problems([good, edge]) == []
    assert compare.mark_agreement([good, edge], ARMS)[1].values["same_argmax"] == 0.75
    other = Sample(tight, "moe-edge", COLD, 0, 0, values(1.0, [1, 2, 3, 4]))
    assert compare.problems([edge, other]) == ["text 0: moe-edge's argmax differs between runs or budgets"]
    nan = Sample(NO_LIMITS, "stock-read", COLD, 0, 0, values(1.0, [0], nll=float("nan")))
    assert compare.problems([good, nan]) == ["text 0: stock-read has NLL nan, another arm 2.0000"]


def test_csv_of_another_version_is_not_mixed_with_ours(tmp_path: Path) -> None:
    rows = report.make_rows([Sample(NO_LIMITS, "moe-edge", COLD, 0, 0, values(5.0, [1]))])
    for _ in range(2):
        report.write_csv(tmp_path / "m.csv", rows, {"commit": "abc"})
    assert len((tmp_path / "m.csv").read_text().splitlines()) == 3
    (tmp_path / "m.csv").write_text("other,columns\n")
    with pytest.raises(UsageError, match="has other columns than this version writes"):
        report.write_csv(tmp_path / "m.csv", rows, {"commit": "abc"})


def test_caps_and_speeds_are_read_as_people_write_them() -> None:
    assert [compare.parse_cap(t, 1000) for t in ("1.5GiB", "55%", "none")] == [3 << 29, 550, None]
    assert [compare.parse_speed(t) for t in ("440MB/s", "90MB", "none")] == [440_000_000, 90_000_000, None]
    with pytest.raises(UsageError, match="--cap x%: is not a percentage"):
        compare.parse_cap("x%", 1000)


def test_plot_without_matplotlib_names_the_install_command(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert compare.main([str(model), "--plot", "x.png"]) == 2
    assert capsys.readouterr().err == "compare.py: --plot needs matplotlib; install it: pip install matplotlib\n"


def test_unknown_arm_and_short_text_are_wrong_calls(
    model: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main([str(model), "--arms", "mmap"]) == 2
    assert "unknown arm 'mmap'; known: stock-mmap, stock-read, moe-edge" in capsys.readouterr().err
    assert compare.main([str(model), "--text", str(text), "--texts", "4", "--tokens", "900"]) == 2
    assert "tokens, 4 of 1413 are needed; try a longer --text" in capsys.readouterr().err


def test_model_facts_count_what_a_token_reads(model: Path, tmp_path: Path) -> None:
    found = facts.model_facts(model)
    assert found.active_expert_bytes == found.expert_bytes // 4
    assert found.shape == "2 layers, 8 experts, top 2"
    assert found.dense_bytes + found.expert_bytes < found.file_bytes
    with pytest.raises(NotMoE):
        facts.model_facts(_dense_model(tmp_path / "dense.gguf"))


def _dense_model(path: Path) -> Path:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_model_without_a_tokenizer_gets_random_tokens(tmp_path: Path) -> None:
    bare = write_random_model(tmp_path / "bare.gguf", "olmoe", vocab=False)
    first, second = texts.pick_tokens(bare, "", 2, 9)
    assert len(first) == len(second) == 9
    assert first != second
    assert texts.pick_tokens(bare, "", 2, 9) == [first, second]
