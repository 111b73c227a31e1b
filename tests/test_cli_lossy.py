"""Two levels, lossy policies and calibrations as a user meets them: the command line in its own process."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from moe_edge.models.embedded import tiny_model_path
from random_models import Shape, write_random_model
from test_cli import fails, fails_last, run, told

ROOT = Path(__file__).parent.parent
GENERATE = ("-p", "In the beginning God created", "-n", 24, "--temp", 0, "-c", 256, "-t", 1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = Shape(n_expert=8, n_used=3, n_ff=1024)  # experts of 12 MiB: a MiB more or less of memory decides nothing
    return write_random_model(tmp_path_factory.mktemp("source") / "m.gguf", "qwen3moe", shape, expert_type="F16")


@pytest.fixture(scope="module")
def small_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For what takes long: experts of 3 MiB."""
    folder = tmp_path_factory.mktemp("small")
    return write_random_model(folder / "m.gguf", "qwen3moe", Shape(n_expert=8, n_used=3), expert_type="F16")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes((ROOT / "tests/data/readme.txt").read_bytes())
    return path


@pytest.fixture(scope="module")
def two_levels(source: Path) -> Path:
    """Converted as in the README, without a calibration."""
    out = source.with_name("two.gguf")
    done = run("convert", source, "-o", out, "--high", "Q4_K", "--low", "Q2_K", "--high-down", "Q6_K", "-t", 1)
    assert done.returncode == 0, done.stderr
    assert "high: 5.19 bits per weight on average: 32 x Q4_K, 16 x Q6_K" in done.stdout
    assert "low: 2.62 bits per weight on average: 48 x Q2_K" in done.stdout
    return out


@pytest.fixture(scope="module")
def calibrated(small_source: Path, text: Path) -> Path:
    out = small_source.with_name("calibrated.gguf")
    done = run(
        "convert", small_source, "-o", out, "--bits", 6, "--types", "Q4_0,Q5_0,Q8_0", "--low", "Q4_0",
        "--calibrate", text, "--calibrate-tokens", 512, "-t", 1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"^setting: dymoe 0.9, low: KLD", done.stderr, re.MULTILINE)
    assert re.search(r"high: (5.9[5-9]|6.00) bits per weight", done.stdout)
    assert sorted(p.name for p in out.parent.glob("calibrated*")) == ["calibrated.experts.gguf", "calibrated.gguf"]
    return out


def generated(*args: object) -> dict[str, object]:
    done = run("generate", *args, *GENERATE, "--json")
    assert done.returncode == 0, done.stderr
    result: dict[str, object] = json.loads(done.stdout)
    assert result["generated_tokens"] == 24
    return result


def least_ram(*args: object) -> tuple[object, ...]:
    """--ram with the number that a call with too little names: far from all experts fit, they have to be read again."""
    found = re.search(r"try (--ram) (\d+MiB)", fails_last(2, *args, "--ram", "1MiB"))
    assert found
    return found[1], found[2]


def test_show_tells_both_levels(two_levels: Path) -> None:
    facts = told("show", two_levels, "--json", "-t", 1)
    assert facts["levels"] == ["high", "low"]
    assert facts["level_types"]["high"] == {"down Q6_K": 16, "gate Q4_K": 16, "up Q4_K": 16}
    assert facts["bits_per_weight"]["low"] == 2.625
    assert "  low        2.62 bits a weight" in run("show", two_levels, "-t", 1).stdout


def test_dymoe_reads_low_copies_and_says_so(two_levels: Path) -> None:
    exact = generated(two_levels)
    assert (exact["low_precision_uses"], exact["skipped_uses"], exact["policy"]) == (0, 0, "exact")
    lossy = generated(two_levels, "--policy", "dymoe", "--retention", 0.5)
    assert lossy["policy"] == "dymoe" and lossy["low_precision_uses"] > 0 and lossy["skipped_uses"] == 0  # type: ignore
    assert lossy["expected_kld_per_token"] is None
    assert lossy["policy_options"]["retention"] == 0.5  # type: ignore[index]
    skipping = generated(two_levels, "--policy", "dymoe", "--retention", 0.5, "--low-level", "skip", "--renormalise")
    assert skipping["skipped_uses"] > 0 and skipping["low_precision_uses"] == 0  # type: ignore[operator]
    hobbit = generated(two_levels, "--policy", "hobbit", "--t1", 0.4, "--t2", 0.7)
    assert hobbit["low_precision_uses"] > 0 and hobbit["skipped_uses"] > 0  # type: ignore[operator]


def test_lossy_policies_read_less_where_memory_is_short(two_levels: Path) -> None:
    ram = least_ram("generate", two_levels, *GENERATE)
    exact = generated(two_levels, *ram)
    low = generated(two_levels, *ram, "--policy", "dymoe", "--retention", 0.5)
    skipping = generated(two_levels, *ram, "--policy", "dymoe", "--retention", 0.5, "--low-level", "skip")
    bytes_ = [each["expert_bytes_read"] for each in (exact, low, skipping)]
    assert bytes_ == sorted(bytes_, reverse=True) and len(set(bytes_)) == 3  # type: ignore[type-var]


def test_the_last_line_of_a_reply_names_what_was_traded(two_levels: Path, calibrated: Path) -> None:
    plain = run("generate", two_levels, *GENERATE).stderr.splitlines()
    assert "low" not in plain[-1] and "lossy" not in "".join(plain)
    done = run("generate", two_levels, *GENERATE, "--policy", "dymoe", "--retention", 0.5).stderr.splitlines()
    assert re.search(r", [1-9]\d* % low, 0 % skipped \(not calibrated\)\]$", done[-1])
    assert any(line.startswith("lossy: policy dymoe, retention 0.5 (cosine depth") for line in done)
    assert any("damage is not known" in line for line in done)
    skipping = ("--policy", "dymoe", "--retention", 0.5, "--low-level", "skip")
    done = run(
        "chat", calibrated, *skipping, "-n", 8, "-c", 256, "-t", 1, "--temp", 0, stdin="hello\n"
    ).stderr.splitlines()
    assert re.search(r", 0 % low, [1-9]\d* % skipped \([\d.e-]+ nats/token expected\)\]$", done[-1])
    assert any("(calibrated depth schedule), the rest skip" in line for line in done)


def test_a_calibrated_model_tells_what_it_expects_to_lose(calibrated: Path) -> None:
    for knobs in (("dymoe", "--retention", 0.5), ("damage", "--price", 1), ("hobbit", "--t1", 0.3)):
        assert generated(calibrated, "--policy", *knobs)["expected_kld_per_token"] > 0, knobs  # type: ignore[operator]
    assert generated(calibrated)["expected_kld_per_token"] == 0


def test_max_kld_prints_the_setting_it_chose_before_it_runs(calibrated: Path) -> None:
    exact = run("generate", calibrated, *GENERATE, "--max-kld", 0, "--json")
    chosen = [line for line in exact.stderr.splitlines() if line.startswith("--max-kld 0:")]
    assert len(chosen) == 1, exact.stderr
    result = json.loads(exact.stdout)
    # a setting that lowers only what is the same at both levels may have a KLD of 0
    assert result["policy"] == "exact" or "measured at 0 nats" in chosen[0]
    lossy = run("generate", calibrated, *GENERATE, "--max-kld", 10, "--json")
    line = next(line for line in lossy.stderr.splitlines() if line.startswith("--max-kld 10:"))
    found = re.fullmatch(
        r"--max-kld 10: --policy (dymoe|damage) (--retention|--price) [\d.e-]+ --low-level (low|skip), "
        r"measured at [\d.e-]+ nats per token and (\d+)% of the bytes of exact", line,
    )  # fmt: skip
    assert found, line
    result = json.loads(lossy.stdout)
    assert result["policy"] == found[1] and result["low_precision_uses"] + result["skipped_uses"] > 0
    rows = told("show", calibrated, "--calibration", "--json")["settings"]
    assert int(found[4]) == round(100 * min(row["bytes_share"] for row in rows))


EVAL_KEYS = {
    "model", "tokens", "scored_tokens", "nll", "nll_se", "perplexity", "kld_mean", "kld_p99", "kld_max",
    "top1_agreement", "expert_bytes_per_token", "expert_hit_rate", "tok_s", "policy", "policy_options", "reference",
    "reference_nll", "n_chunks", "n_ctx", "text_sha256", "ram_budget_bytes",
}  # fmt: skip


def test_eval_measures_a_policy_against_exact(two_levels: Path, text: Path) -> None:
    small: tuple[object, ...] = ("-f", text, "-c", 128, "--chunks", 1, "-t", 1)
    small += least_ram("eval", two_levels, *small)  # with all of them in memory after the reference nothing goes low
    exact = told("eval", two_levels, *small, "--json")
    assert exact.keys() >= EVAL_KEYS and exact["kld_mean"] is None and exact["policy"] == "exact"
    assert (exact["tokens"], exact["scored_tokens"]) == (128, 63)
    dymoe = ("--policy", "dymoe", "--retention", 0.5)
    prefill = told("eval", two_levels, *small, *dymoe, "--json")
    assert prefill["reference"] == "exact" and prefill["kld_mean"] > 0 and 0 < prefill["top1_agreement"] <= 1
    assert prefill["reference_nll"] == exact["nll"] and prefill["policy_options"]["retention"] == 0.5
    decode = told("eval", two_levels, *small, *dymoe, "--decode", "--json")
    assert decode["one_by_one"] and decode["tokens"] == 128 and decode["kld_mean"] > 0
    said = run("eval", two_levels, *small, *dymoe)
    assert "perplexity  " in said.stdout and "KLD         mean" in said.stdout and "against exact" in said.stdout
    assert "policy      dymoe (retention 0.5) at" in said.stdout


def test_eval_measures_a_model_against_another(two_levels: Path, source: Path, text: Path) -> None:
    result = told("eval", two_levels, "-f", text, "-c", 128, "--chunks", 1, "-t", 1, "--reference", source, "--json")
    assert result["reference"] == str(source) and result["kld_mean"] > 0 and result["policy"] == "exact"
    same = told("eval", source, "-f", text, "-c", 128, "--chunks", 1, "-t", 1, "--reference", source, "--json")
    assert same["kld_max"] == 0 and same["top1_agreement"] == 1


def test_show_calibration_on_the_command_line(calibrated: Path, two_levels: Path, tmp_path: Path) -> None:
    done = run("show", calibrated, "--calibration")
    assert (
        done.returncode == 0 and "calibrated on 512 tokens" in done.stdout and "settings, for --max-kld" in done.stdout
    )
    assert len(told("show", calibrated, "--calibration", "--json")["counts"]) == 2
    assert "convert it with one" in fails(2, "show", two_levels, "--calibration")
    assert "calibration" in fails(2, "show", "--picture", tmp_path / "p.png")
    assert not list(tmp_path.iterdir())


WAYS_OUT = [
    (("--policy", "dymoe"), "no low level; convert it with --low TYPE, or use --low-level skip, or --retention 1"),
    (("--policy", "dymoe", "--retention", 1.5), "--retention 1.5 is outside 0 to 1"),
    (("--policy", "dymoe", "--low-level", "none"), "unknown low level 'none'; known: low, skip"),
    (("--policy", "dymoe", "--retention", 1, "--depth", "calibrated"), "needs a calibration"),
    (("--policy", "dymoe", "--retention", 1, "--importance", "mass"), "unknown importance 'mass'; known: auto, gate"),
    (("--policy", "damage"), "convert it with --calibrate"),
    (("--policy", "hobbit", "--t1", 0.9, "--t2", 0.5), "do not satisfy 0 <= t1 <= t2 <= 1"),
    (("--t1", 0.5), "use --policy hobbit"),
    (("--max-kld", 0.1), "convert it with --calibrate"),
    (("--max-kld", -1), "is not a bound"),
    (("--policy", "lossy"), "known: exact, dymoe, hobbit, damage"),
]


@pytest.mark.parametrize(
    ("args", "says"), WAYS_OUT, ids=lambda v: " ".join(map(str, v)) if isinstance(v, tuple) else ""
)
def test_a_wrong_knob_is_a_wrong_call_with_a_way_out(args: tuple[object, ...], says: str) -> None:
    assert says in fails_last(2, "generate", tiny_model_path(), "-p", "x", "-n", 1, "--ram", "40MiB", "-t", 1, *args)


@pytest.mark.parametrize(
    ("args", "status", "says"),
    [
        (("--bits", 3), 2, "--calibrate TEXT"),
        (("--bits", 3, "--high", "Q4_K"), 2, "--bits chooses the types of the high level"),
        (("--types", "Q4_K"), 2, "--bits"),
        (("--bits", 5, "--calibrate", "{text}", "--dry-run"), 2, "--dry-run cannot tell what --bits"),
        (("--low-down", "Q4_K"), 2, "needs a low level"),
        (("--high", "Q4_K", "--low", "Q1_Z"), 2, "Q1_Z"),
        (("--bits", 1, "--types", "Q4_0,Q8_0", "--calibrate", "{text}"), 2, "need at least 4.5 bits a weight"),
        (("--high", "Q4_0", "--calibrate", "{text}", "--calibrate-tokens", 100), 2, "512"),
        (("--high", "Q4_0", "--calibrate", "nowhere.txt"), 1, "nowhere.txt"),
        (("--high", "Q4_0", "--imatrix", "nowhere.gguf"), 1, "nowhere.gguf"),
        (("--high", "IQ2_XXS"), 2, "importance"),
    ],
    ids=lambda v: " ".join(map(str, v)) if isinstance(v, tuple) else "",
)
def test_a_conversion_that_cannot_be_is_refused_and_leaves_nothing(
    source: Path, text: Path, tmp_path: Path, args: tuple[object, ...], status: int, says: str
) -> None:
    given = [text if a == "{text}" else a for a in args]
    assert says in fails_last(status, "convert", source, "-o", tmp_path / "c.gguf", "-t", 1, *given)
    assert not list(tmp_path.iterdir())
