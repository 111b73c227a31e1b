"""The Python face: what `import moe_edge` offers, as a program uses it."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import moe_edge
import pytest
from moe_edge.models.embedded import tiny_model_path
from moe_edge.runner.chatformat.parts import Reasoning, Text, ToolStart
from scripted import write_scripted_model

ROOT = Path(__file__).resolve().parents[1]


def test_importing_it_loads_nothing_heavy() -> None:
    code = (
        "import sys, moe_edge; heavy = {'numpy', 'llama_cpp', 'click', 'moe_edge.runner.api'} & set(sys.modules); "
        "assert not heavy, heavy; assert moe_edge.__version__; moe_edge.load; import moe_edge.runner.api"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there() -> None:
    for name in moe_edge.__all__:
        assert getattr(moe_edge, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = moe_edge.lod
    assert issubclass(moe_edge.BudgetTooSmall, moe_edge.MoeEdgeError)


def test_generate_is_the_command_lines_and_the_same_at_every_budget() -> None:
    with moe_edge.load(n_ctx=256, n_threads=1) as model:
        plan = model.plan
        whole = model.generate("The king said", 24, temp=0)
        assert whole.generated_tokens == 24 and whole.finish_reason == "length" and whole.policy == "exact"
        assert model.llama.n_ctx() >= 256 and model.stats["uses"] > 0
    with moe_edge.load(ram=plan.floor_bytes, n_ctx=256, n_threads=1) as model:
        small = model.generate("The king said", 24, temp=0)
        assert small.text == whole.text and small.bytes_read > whole.bytes_read
        again = model.generate("The king said", 24, temp=0)
        assert again.text == whole.text and again.cached_tokens > 0


def test_a_stream_gives_the_text_in_pieces_and_then_the_whole() -> None:
    with moe_edge.load(n_ctx=256, n_threads=1) as model:
        events = list(model.stream("In the beginning", 16, temp=0))
    done = events[-1]
    assert isinstance(done, moe_edge.Done) and all(isinstance(each, Text) for each in events[:-1])
    assert "".join(each.text for each in events if isinstance(each, Text)) == done.reply.text
    assert len(events) > 8


def test_leaving_a_stream_stops_it_and_the_model_goes_on() -> None:
    with moe_edge.load(n_ctx=1024, n_threads=1) as model:
        before = model.stats["tokens"]
        for event in model.stream("The king said", 1000, temp=0):
            assert isinstance(event, Text)
            break
        assert model.stats["tokens"] - before < 4 * 200  # of 1,000 tokens in 4 layers
        left = model.stream("The queen said", 900, temp=0)
        next(left)
        left.close()  # type: ignore[attr-defined]
        assert model.generate("The king said", 4, temp=0).generated_tokens == 4


def test_several_threads_may_ask_and_get_what_they_would_alone() -> None:
    prompts = ["The king said", "In the beginning", "Thou art", "def f(x):"]
    with moe_edge.load(n_ctx=256, n_threads=1) as model:
        alone = [model.generate(each, 12, temp=0).text for each in prompts]
        found: dict[int, str] = {}

        def ask(i: int) -> None:
            found[i] = model.generate(prompts[i], 12, temp=0).text

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [found[i] for i in range(len(prompts))] == alone


def test_chat_goes_through_the_models_own_template(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{# </think> #}"
    model_path = write_scripted_model(tmp_path / "m.gguf", ["<think>", "hm", "</think>", "Yes."], template=template)
    with moe_edge.load(model_path, n_ctx=256, n_threads=1) as model:
        reply = model.chat([{"role": "user", "content": "Well?"}], 64, temp=0)
        assert (reply.reasoning, reply.text, reply.finish_reason) == ("hm", "Yes.", "stop")
        kinds = {type(each) for each in model.stream([{"role": "user", "content": "Well?"}], 64, temp=0)}
        assert kinds == {Reasoning, Text, moe_edge.Done} and ToolStart not in kinds


def test_a_base_model_cannot_chat_and_says_what_can() -> None:
    with moe_edge.load(n_ctx=256, n_threads=1) as model:
        with pytest.raises(moe_edge.UsageError, match=r"no chat template; use generate\(\)"):
            model.chat([{"role": "user", "content": "Hello"}])
        assert model.generate("Hello", 2).generated_tokens == 2  # and goes on


def test_wrong_calls_are_sentences() -> None:
    with pytest.raises(moe_edge.UsageError, match="no option 'retenton'"):
        moe_edge.load(retenton=0.5)
    with pytest.raises(moe_edge.UnknownName):
        moe_edge.load(policy="dimoe")
    with pytest.raises(moe_edge.BudgetTooSmall):
        moe_edge.load(ram="4MiB")
    with pytest.raises(moe_edge.MissingFile):
        moe_edge.load("/nowhere/model.gguf")
    with moe_edge.load(n_ctx=128, n_threads=1) as model:
        with pytest.raises(moe_edge.UsageError, match="no option 'temperature'"):
            model.generate("x", temperature=0)
        with pytest.raises(moe_edge.UsageError, match="the context holds 128"):
            model.generate("word " * 500)
    with pytest.raises(moe_edge.EngineError, match="closed"):
        model.generate("x")
    model.close()


def test_a_policy_and_its_knobs_are_named_as_on_the_command_line(tmp_path: Path) -> None:
    from moe_edge.convert.convert import convert

    convert(tiny_model_path(), tmp_path / "m.gguf", low_type="Q2_K")
    with moe_edge.load(tmp_path / "m.gguf", n_ctx=128, n_threads=1, policy="dymoe", retention=0.5) as model:
        reply = model.generate("The king said", 8, temp=0)
    assert reply.policy == "dymoe" and reply.low_uses > 0


@pytest.mark.parametrize("name", ["generate.py", "chat.py", "budget.py"])
def test_examples_run(name: str) -> None:
    done = subprocess.run([sys.executable, ROOT / "examples" / name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    if name == "budget.py":
        assert "the same text at every budget" in done.stdout
