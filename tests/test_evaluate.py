"""`eval` against perplexity.cpp's arithmetic, written out literally, on logits of stock llama.cpp."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from conftest import budget_bytes
from moe_edge.models.embedded import tiny_model_path
from moe_edge.models.errors import DiskFull, EngineError, MissingFile, UsageError
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.measure import evaluate as module
from moe_edge.runner.measure.evaluate import Evaluation, eval_options, evaluate
from moe_edge.runner.measure.logits import PassWork, cut_chunks, kld_of_rows, logits_pass, nll_of_rows, scored_positions
from moe_edge.schedulers.options import PolicyOptions
from moe_edge.schedulers.policies.exact import ExactLru
from random_models import Shape, write_random_model
from reference import logits_of_context, stock_context, stock_model

ROOT = Path(__file__).parent.parent
OPTIONS = EngineOptions(n_threads=1)  # two wait for each other where the cores are busy: 120 s for 10
RELATIVE = 1e-6


# ---- perplexity.cpp, line by line --------------------------------------------------------------------------


@dataclass
class Literal:
    """What llama-perplexity would print."""

    nll: float
    nll_se: float
    kld: np.ndarray | None = None
    same_top: float | None = None


def log_softmax(logits: np.ndarray, token: int) -> float:
    """perplexity.cpp, log_softmax(int n_vocab, const float * logits, int tok): floats, but sum_exp is a double."""
    max_logit = logits[0]
    for logit in logits[1:]:
        max_logit = max(max_logit, logit)
    sum_exp = 0.0
    for e in np.exp(logits - max_logit):
        sum_exp += float(e)
    return float(logits[token] - max_logit) - math.log(sum_exp)


def kl_divergence(base: np.ndarray, logits: np.ndarray) -> float:
    """The sum of perplexity.cpp's --kl-divergence, all in doubles, without its 16-bit log probabilities."""
    p, q = base.astype(np.float64), logits.astype(np.float64)
    log_p = p - (p.max() + math.log(np.exp(p - p.max()).sum()))
    log_q = q - (q.max() + math.log(np.exp(q - q.max()).sum()))
    return float(sum(np.exp(log_p) * (log_p - log_q)))


def stock_chunks(path: Path, text: bytes, n_ctx: int, n_chunks: int, e: Evaluation) -> Iterator[tuple[list[int], Any]]:
    """(tokens, logits of all positions) of each chunk, as perplexity() of perplexity.cpp makes them."""
    with (
        stock_model(path) as model,
        stock_context(
            model, n_ctx=n_ctx, n_batch=e.n_ubatch, n_ubatch=e.n_ubatch, n_threads=1, flash_attention=e.flash_attn
        ) as ctx,
    ):
        vocab = llama_cpp.llama_model_get_vocab(model)
        tokens = (llama_cpp.llama_token * (len(text) + 8))()
        n = llama_cpp.llama_tokenize(vocab, text, len(text), tokens, len(tokens), True, False)
        assert n >= n_ctx * n_chunks
        for i in range(n_chunks):
            chunk = list(tokens[i * n_ctx : (i + 1) * n_ctx])
            feed = list(chunk)
            if llama_cpp.llama_vocab_get_add_bos(vocab):
                feed[0] = llama_cpp.llama_vocab_bos(vocab)
            yield chunk, logits_of_context(ctx, model, feed, e.n_ubatch)


def literal(path: Path, text: bytes, e: Evaluation, base: Path | None = None) -> Literal:
    """The figures for the chunks of an evaluation; base: the reference model."""
    nll = nll2 = 0.0
    count = same = 0
    kld: list[float] = []
    first = e.n_ctx // 2
    bases = stock_chunks(base, text, e.n_ctx, e.n_chunks, e) if base else None
    for tokens, logits in stock_chunks(path, text, e.n_ctx, e.n_chunks, e):
        theirs = next(bases)[1] if bases else None
        for j in range(first, e.n_ctx - 1):
            v = -log_softmax(logits[j], tokens[j + 1])
            nll += v
            nll2 += v * v
            count += 1
            if theirs is not None:
                kld.append(kl_divergence(theirs[j], logits[j]))
                same += int(theirs[j].argmax() == logits[j].argmax())
    nll2 /= count
    nll /= count
    se = math.sqrt((nll2 - nll * nll) / (count - 1))
    return Literal(nll, se, np.array(kld) if kld else None, same / count if kld else None)


# ---- fixtures ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 20 kB of prose and code."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    texts = [ROOT / "tests/data" / f"{name}.txt" for name in ("readme", "format", "makefile")]
    path.write_bytes(b"".join(each.read_bytes() for each in texts))
    return path


@pytest.fixture
def temp_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the reference's logits go."""
    folder = tmp_path / "temp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def with_budget(path: Path, name: str, n_ctx: int) -> EngineOptions:
    o = eval_options(path, OPTIONS, n_ctx)
    return replace(OPTIONS, ram_bytes=budget_bytes(path, name, o))


@dataclass
class FakeLossy:
    """Stands in for a lossy policy until it is there: another name, and a note of what was set."""

    made: list[str]

    def __call__(self, options: PolicyOptions, layout: Any, arena_bytes: int, *_: Any) -> ExactLru:
        self.made.append(options.name)
        policy = ExactLru(layout, arena_bytes)
        policy.name = options.name
        return policy


@pytest.fixture
def lossy(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    made: list[str] = []
    monkeypatch.setattr("moe_edge.runner.engine.make_policy", FakeLossy(made))
    return made


# ---- the numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_ctx", "n_ubatch"), [(128, 0), (128, 48), (64, 1)])
def test_perplexity_is_that_of_perplexity_cpp_on_stock_logits(text: Path, n_ctx: int, n_ubatch: int) -> None:
    path = tiny_model_path()
    e = evaluate(path, text, replace(OPTIONS, n_ubatch=n_ubatch), n_ctx=n_ctx, n_chunks=3)
    want = literal(path, text.read_bytes()[:-1], e)
    assert e.nll == pytest.approx(want.nll, rel=RELATIVE)
    assert e.nll_se == pytest.approx(want.nll_se, rel=1e-5)
    assert e.perplexity == pytest.approx(math.exp(want.nll), rel=RELATIVE * 10)
    assert (e.n_chunks, e.tokens, e.scored_tokens) == (3, 3 * n_ctx, 3 * (n_ctx // 2 - 1))
    assert e.nll < 8.0, "not a trained model"


def test_one_by_one_is_that_of_perplexity_cpp_with_batches_of_one(text: Path) -> None:
    path = tiny_model_path()
    e = evaluate(path, text, OPTIONS, n_ctx=64, n_chunks=2, one_by_one=True)
    assert e.n_ubatch == 1
    assert e.nll == pytest.approx(literal(path, text.read_bytes()[:-1], e).nll, rel=RELATIVE)


def test_every_chunk_begins_with_bos_where_the_model_adds_one(
    text: Path, tmp_path: Path, random_model: Callable[[str], Path]
) -> None:
    data = random_model("olmoe").read_bytes()
    key = b"tokenizer.ggml.add_bos_token" + struct.pack("<I", 7)
    assert data.count(key + b"\0") == 1
    path = tmp_path / "bos.gguf"
    path.write_bytes(data.replace(key + b"\0", key + b"\1"))
    e = evaluate(path, text, OPTIONS, n_ctx=64, n_chunks=2)
    assert e.nll == pytest.approx(literal(path, text.read_bytes()[:-1], e).nll, rel=RELATIVE)
    without = evaluate(random_model("olmoe"), text, OPTIONS, n_ctx=64, n_chunks=2)
    assert e.nll != without.nll


def test_kld_is_that_of_perplexity_cpp_between_two_models(text: Path, tmp_path: Path) -> None:
    coarse = write_random_model(tmp_path / "coarse.gguf", "qwen3moe", expert_type="Q4_K")
    fine = write_random_model(tmp_path / "fine.gguf", "qwen3moe", expert_type="Q8_0")
    e = evaluate(coarse, text, OPTIONS, reference=fine, n_ctx=64, n_chunks=2)
    want = literal(coarse, text.read_bytes()[:-1], e, fine)
    assert want.kld is not None
    assert e.nll == pytest.approx(want.nll, rel=RELATIVE)
    assert e.reference_nll == pytest.approx(literal(fine, text.read_bytes()[:-1], e).nll, rel=RELATIVE)
    assert e.kld_mean == pytest.approx(want.kld.mean(), rel=RELATIVE)
    assert e.kld_median == pytest.approx(np.median(want.kld), rel=RELATIVE)
    assert e.kld_p99 == pytest.approx(np.percentile(want.kld, 99), rel=RELATIVE)
    assert e.kld_max == pytest.approx(want.kld.max(), rel=RELATIVE)
    assert e.kld_se == pytest.approx(want.kld.std() / math.sqrt(len(want.kld) - 1), rel=RELATIVE)
    assert e.top1_agreement == want.same_top
    assert want.kld.mean() > 1e-4, "the two models are too alike for this test"
    assert e.reference == str(fine)


@pytest.mark.parametrize("arch", [None, "gpt-oss"])
def test_floor_and_resident_budgets_give_the_same_nll_and_no_divergence(
    text: Path, arch: str | None, random_model: Callable[[str], Path]
) -> None:
    path = random_model(arch) if arch else tiny_model_path()
    floor, resident = (
        evaluate(path, text, with_budget(path, budget, 128), reference=path, n_ctx=128, n_chunks=2)
        for budget in ("floor", "resident")
    )
    assert floor.nll == resident.nll == floor.reference_nll
    assert (floor.kld_mean, floor.kld_max, floor.kld_se, floor.top1_agreement) == (0.0, 0.0, 0.0, 1.0)
    assert floor.expert_bytes_per_token > resident.expert_bytes_per_token
    assert floor.ram_budget_bytes < resident.ram_budget_bytes


def test_pieces_of_a_few_rows_change_nothing(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_model_path()
    whole = evaluate(path, text, OPTIONS, reference=path, n_ctx=64, n_chunks=2)
    monkeypatch.setattr(module, "BLOCK_VALUES", 3 * 4096)
    pieces = evaluate(path, text, OPTIONS, reference=path, n_ctx=64, n_chunks=2)
    assert pieces.nll == whole.nll and pieces.kld_max == 0.0


# ---- passes and counters -----------------------------------------------------------------------------------


def test_exact_reference_runs_first_on_an_engine_of_its_own(text: Path, lossy: list[str], temp_folder: Path) -> None:
    told: list[str] = []
    o = replace(OPTIONS, policy=PolicyOptions("hobbit", t1=0.5))
    e = evaluate(tiny_model_path(), text, o, n_ctx=64, n_chunks=2, tell=told.append)
    assert lossy == ["exact", "hobbit", "hobbit"]  # the second is a check: a bad knob shows before any pass
    assert [line.split(",")[0] for line in told] == [
        f"{who}: chunk {i} of 2" for who in ("reference", "hobbit") for i in (1, 2)
    ]
    assert (e.policy, e.reference, e.kld_mean, e.top1_agreement) == ("hobbit", "exact", 0.0, 1.0)
    assert e.tokens == 2 * 64, "the reference's tokens are not counted"
    assert "policy      hobbit (t1 0.5) at" in e.text()
    assert not list(temp_folder.iterdir())


def test_exact_is_not_compared_with_itself(text: Path) -> None:
    told: list[str] = []
    e = evaluate(tiny_model_path(), text, OPTIONS, n_ctx=64, n_chunks=2, tell=told.append)
    assert len(told) == 2
    facts = json.loads(json.dumps(e.to_json(), allow_nan=False))
    nothing = {k for k, v in facts.items() if v is None}
    assert nothing >= {"kld_mean", "kld_se", "kld_median", "kld_p99", "kld_max", "top1_agreement", "reference"}
    assert facts["text_sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert facts["perplexity"] == pytest.approx(math.exp(facts["nll"]))
    assert "exact is not compared with itself" in e.text()


def test_a_lossy_policy_without_reference_is_not_compared(text: Path, lossy: list[str]) -> None:
    o = replace(OPTIONS, policy=PolicyOptions("dymoe"))
    e = evaluate(tiny_model_path(), text, o, reference=None, n_ctx=64, n_chunks=1)
    assert lossy == ["dymoe"] and e.kld_mean is None
    assert "no reference" in e.text()


def test_one_by_one_takes_a_step_of_each_layer_for_each_token(text: Path) -> None:
    o = eval_options(tiny_model_path(), OPTIONS, 64, one_by_one=True)
    with Engine(tiny_model_path(), o) as engine:
        chunks = cut_chunks(module.tokenize_text(engine, text.read_bytes()), 64, n_chunks=2)  # type: ignore[attr-defined]
        work = PassWork()
        before = engine.counters()
        blocks = [(b.chunk, b.position) for b in logits_pass(engine, chunks, one_by_one=True, work=work)]
        c = engine.counters().since(before)
        layers = len(engine.model.layers)
        assert work.tokens == c.tokens // layers == chunks.size
        assert c.steps == chunks.size * layers
        assert c.uses == chunks.size * layers * engine.model.n_expert_used
        assert engine.llama.n_tokens == 0
    assert blocks == [(chunk, position) for chunk in range(2) for position in scored_positions(64)]


def test_one_by_one_has_the_memory_of_decode(text: Path) -> None:
    path = tiny_model_path()
    ram = budget_bytes(path, "middle", replace(OPTIONS, n_ctx=64))
    with Engine(path, replace(OPTIONS, n_ctx=64, ram_bytes=ram)) as engine:
        arena = engine.plan.arena_bytes
    e = evaluate(path, text, replace(OPTIONS, ram_bytes=ram), n_ctx=64, n_chunks=1, one_by_one=True)
    assert e.arena_bytes == arena


def test_bytes_per_token_are_those_of_the_pass_under_test(text: Path) -> None:
    path = tiny_model_path()
    o = eval_options(path, with_budget(path, "floor", 64), 64)
    e = evaluate(path, text, o, n_ctx=64, n_chunks=2)
    with Engine(path, o) as engine:
        chunks = cut_chunks(module.tokenize_text(engine, text.read_bytes()), 64, n_chunks=2)  # type: ignore[attr-defined]
        for _ in logits_pass(engine, chunks):
            pass
        assert engine.counters().bytes_read == pytest.approx(e.expert_bytes_per_token * chunks.size)
    assert e.tok_s > 0 and 0 <= e.expert_hit_rate <= 1


def test_generate_after_a_pass_does_not_reuse_its_cache(text: Path) -> None:
    from moe_edge.runner.generate import Sampling, generate

    o = eval_options(tiny_model_path(), OPTIONS, 64, one_by_one=True)
    with Engine(tiny_model_path(), o) as engine:
        chunks = cut_chunks(module.tokenize_text(engine, text.read_bytes()), 64, n_chunks=1)  # type: ignore[attr-defined]
        want = generate(engine, chunks[0].tolist()[:40], 8, Sampling(temp=0)).text
        for _ in logits_pass(engine, chunks, one_by_one=True):
            break
        after = generate(engine, chunks[0].tolist()[:40], 8, Sampling(temp=0))
    assert after.text == want and after.reused_tokens == 0


def test_micro_batches_keep_the_logits_below_64_mib(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "wide.gguf", "olmoe", Shape(n_vocab=151_936, n_embd=64, n_ff=64, head_dim=32))
    o = eval_options(path, OPTIONS, 512)
    assert o.n_ubatch == 96 and o.logits_all
    assert eval_options(path, replace(OPTIONS, n_ubatch=256), 512).n_ubatch == 256
    assert eval_options(path, OPTIONS, 512, one_by_one=True).logits_all is False


# ---- errors and temporary files ----------------------------------------------------------------------------


def test_short_text_names_both_numbers(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("The king said")
    with pytest.raises(UsageError, match=r"the text has \d tokens but one chunk needs 512"):
        evaluate(tiny_model_path(), path, OPTIONS)
    path.write_text("")
    with pytest.raises(UsageError, match="the text has 0 tokens"):
        evaluate(tiny_model_path(), path, OPTIONS)


def test_missing_text_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(MissingFile, match=f"{path}: cannot read the text"):
            evaluate(tiny_model_path(), path, OPTIONS)


@pytest.mark.parametrize(("n_ctx", "said"), [(6, "at least 8"), (65, "even"), (4096, "trained for 2048")])
def test_chunks_of_an_impossible_length_are_refused(text: Path, n_ctx: int, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        evaluate(tiny_model_path(), text, OPTIONS, n_ctx=n_ctx)


def test_no_chunks_are_refused(text: Path) -> None:
    with pytest.raises(UsageError, match="0 chunks"):
        evaluate(tiny_model_path(), text, OPTIONS, n_ctx=64, n_chunks=0)


def test_models_of_different_vocabularies_are_refused(text: Path, random_model: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match=r"a vocabulary of 4096 tokens but .* has 512"):
        evaluate(tiny_model_path(), text, OPTIONS, reference=random_model("olmoe"), n_ctx=64)


def test_models_that_cut_the_text_differently_are_refused(text: Path, tmp_path: Path) -> None:
    same_size = write_random_model(tmp_path / "m.gguf", "olmoe", Shape(n_vocab=4096))
    with pytest.raises(UsageError, match="make different tokens"):
        evaluate(tiny_model_path(), text, OPTIONS, reference=same_size, n_ctx=64, n_chunks=1)


def test_text_that_is_not_utf8_is_evaluated(tmp_path: Path) -> None:
    path = tmp_path / "latin1.txt"
    path.write_bytes("Ägypten und die Könige. ".encode("latin-1") * 20)
    assert math.isfinite(evaluate(tiny_model_path(), path, OPTIONS, n_ctx=32).nll)


def test_more_chunks_than_the_text_has_are_all_of_them(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("In the beginning God created the heaven and the earth. " * 10)
    e = evaluate(tiny_model_path(), path, OPTIONS, n_ctx=32, n_chunks=1000)
    assert e.n_chunks == e.text_chunks > 1


@pytest.mark.parametrize("error", [EngineError("a read failed"), KeyboardInterrupt()])
def test_nothing_stays_in_the_temporary_folder_after_a_failure(
    text: Path, temp_folder: Path, lossy: list[str], error: BaseException
) -> None:
    def fail_in_second_pass(line: str) -> None:
        if line.startswith("hobbit"):
            raise error

    o = replace(OPTIONS, policy=PolicyOptions("hobbit"))
    before = set(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else set()
    with pytest.raises(type(error)):
        evaluate(tiny_model_path(), text, o, n_ctx=64, n_chunks=1, tell=fail_in_second_pass)
    assert not list(temp_folder.iterdir())
    if before:
        open_files = (os.path.realpath(f"/proc/self/fd/{fd}") for fd in set(os.listdir("/proc/self/fd")) - before)
        assert not [f for f in open_files if str(temp_folder) in f]


def test_full_temporary_folder_is_said_before_the_reference_runs(
    text: Path, temp_folder: Path, lossy: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1 << 20}))
    told: list[str] = []
    o = replace(OPTIONS, policy=PolicyOptions("hobbit"))
    # 10 chunks x 31 positions x 4096 logits x 4 bytes = 4.8 MiB
    with pytest.raises(DiskFull, match=r"has 1.0 MiB free but the reference's logits take 4.8 MiB"):
        evaluate(tiny_model_path(), text, o, n_ctx=64, n_chunks=10, tell=told.append)
    assert not told


# ---- arithmetic and cutting by hand ------------------------------------------------------------------------


def test_chunks_are_consecutive_and_the_rest_is_dropped() -> None:
    assert cut_chunks(list(range(10)), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert cut_chunks(list(range(10)), 4, n_chunks=1, bos=99).tolist() == [[99, 1, 2, 3]]
    assert list(scored_positions(8)) == [4, 5, 6]


def test_nll_and_kld_of_two_even_tokens() -> None:
    even, three_to_one = np.array([[0, 0]], np.float32), np.log(np.array([[3, 1]], np.float32))
    assert nll_of_rows(even, np.array([1], np.int32)) == pytest.approx([math.log(2)])
    assert nll_of_rows(three_to_one, np.array([1], np.int32)) == pytest.approx([math.log(4)])
    want = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert kld_of_rows(even, three_to_one) == pytest.approx([want])
    assert kld_of_rows(even, even + 7).tolist() == [0.0]


def test_tokens_both_models_exclude_do_not_diverge() -> None:
    rows = np.array([[0, 1, -math.inf]], np.float32)
    assert kld_of_rows(rows, rows).tolist() == [0.0]


def test_logits_that_are_no_numbers_are_refused(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "nll_of_rows", lambda rows, tokens: np.full(len(rows), math.nan))
    with pytest.raises(EngineError, match="not finite"):
        evaluate(tiny_model_path(), text, OPTIONS, n_ctx=64, n_chunks=1)


def test_rows_are_of_each_position(tmp_path: Path, text: Path) -> None:
    """The whole path at once: rows against logits of all positions of one chunk, to the bit."""
    path = tiny_model_path()
    o = eval_options(path, replace(OPTIONS, n_ubatch=16), 64)
    tokens: Sequence[int]
    with Engine(path, o) as engine:
        chunks = cut_chunks(module.tokenize_text(engine, text.read_bytes()), 64, n_chunks=1)  # type: ignore[attr-defined]
        ours = np.concatenate([block.rows.copy() for block in logits_pass(engine, chunks)])
        tokens = chunks[0].tolist()
    with stock_model(path) as model, stock_context(model, n_ctx=64, n_batch=16, n_ubatch=16, n_threads=1) as ctx:
        stock = logits_of_context(ctx, model, tokens, 16)
    assert np.array_equal(ours, stock[list(scored_positions(64))])
