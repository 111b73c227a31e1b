"""Chat formats: a reply cut anywhere gives the same parts, never half a tag, and what does not parse is text."""

from __future__ import annotations

import random

import pytest
from moe_edge.runner.chatformat import FORMATS, find_format
from moe_edge.runner.chatformat.format import held_back
from moe_edge.runner.chatformat.harmony import TAGS, answers_only
from moe_edge.runner.chatformat.parts import Part, Reasoning, Text, ToolArguments, ToolEnd, ToolStart
from moe_edge.runner.chatformat.think import without_thinking

Whole = tuple[str, str, tuple[tuple[str, str], ...]]  # reasoning, answer, (tool, arguments)


TOOLS = [{"type": "function", "function": {"name": name}} for name in ("f", "get_weather")]


def put_together(parts: list[Part]) -> Whole:
    reasoning = "".join(p.text for p in parts if isinstance(p, Reasoning))
    answer = "".join(p.text for p in parts if isinstance(p, Text))
    names = {p.index: p.name for p in parts if isinstance(p, ToolStart)}
    ended = [p.index for p in parts if isinstance(p, ToolEnd)]
    assert sorted(names) == sorted(ended) == list(range(len(names)))
    calls = tuple(
        (name, "".join(p.text for p in parts if isinstance(p, ToolArguments) and p.index == index))
        for index, name in sorted(names.items())
    )
    return reasoning, answer, calls


def parse(name: str, pieces: list[str], prompt: str = "") -> list[Part]:
    parser = FORMATS[name].parser(prompt, TOOLS)
    parts: list[Part] = []
    for piece in pieces:
        parts += parser.feed(piece)
    return parts + parser.finish()


CASES: list[tuple[str, str, str, Whole]] = [
    ("plain", "", "Hello <think>there</think>.", ("", "Hello <think>there</think>.", ())),
    ("think", "", "<think>\nhm, 1 < 2\n</think>\n\nYes.", ("hm, 1 < 2", "Yes.", ())),
    ("think", "...<think>\n", "hm\n\n ok\n</think>\n\nYes.", ("hm\n\n ok", "Yes.", ())),
    ("think", "", "  Yes, <think> is a tag.", ("", "  Yes, <think> is a tag.", ())),
    ("think", "", "<think>\n\n</think>\n\nYes.", ("", "Yes.", ())),
    ("think", "", "<thin", ("", "<thin", ())),
    ("think", "", "<think>never ends </thi", ("never ends </thi", "", ())),
    ("think", "", "", ("", "", ())),
    (
        "harmony", "",
        "<|channel|>analysis<|message|>Simple.<|end|><|start|>assistant<|channel|>final<|message|>4 < 5.",
        ("Simple.", "4 < 5.", ()),
    ),
    (
        "harmony", "",
        "<|channel|>analysis<|message|>Need weather.<|end|><|start|>assistant<|channel|>commentary "
        'to=functions.get_weather <|constrain|>json<|message|>{"city": "Rome"}<|call|>',
        ("Need weather.", "", (("get_weather", '{"city": "Rome"}'),)),
    ),
    (
        "harmony", "", "<|channel|>commentary<|message|>Let me look.<|end|><|start|>assistant to=functions.f"
        "<|channel|>commentary<|message|>{}<|call|>",
        ("", "Let me look.", (("f", "{}"),)),
    ),
    ("harmony", "", "<|channel|>final<|message|>one<|return|>", ("", "one", ())),
    ("harmony", "", "<|channel|>analysis<|message|>cut o", ("cut o", "", ())),
    ("harmony", "", "just words", ("", "just words", ())),
    ("harmony", "", "just words<|return|>", ("", "just words", ())),
    (
        "harmony", "", "<|channel|>analysis<|message|>a<|end|>b<|start|>assistant<|channel|>final<|message|>c",
        ("a", "bc", ()),
    ),
    ("harmony", "", "<|channel|>final<|message|>one<|end|><|start|>assista", ("", "one", ())),
    ("harmony", "", "<|channel|>final<|mess", ("", "", ())),
    ("harmony", "", " to=functions.f<|channel|>commentary json<|mes", ("", "", ())),
]  # fmt: skip


@pytest.mark.parametrize(("name", "prompt", "text", "whole"), CASES)
def test_a_reply_gives_the_same_parts_however_it_is_cut(name: str, prompt: str, text: str, whole: Whole) -> None:
    assert put_together(parse(name, [text], prompt)) == whole
    assert put_together(parse(name, list(text), prompt)) == whole
    for at in range(len(text) + 1):
        assert put_together(parse(name, [text[:at], text[at:]], prompt)) == whole
    rng = random.Random(5)
    for _ in range(50):
        cuts = sorted(rng.choices(range(len(text) + 1), k=4))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert put_together(parse(name, pieces, prompt)) == whole


@pytest.mark.parametrize(("name", "prompt", "text", "whole"), [case for case in CASES if case[0] == "harmony"])
def test_no_piece_shows_half_a_tag(name: str, prompt: str, text: str, whole: Whole) -> None:
    for part in parse(name, list(text), prompt):
        shown = getattr(part, "text", "")
        assert not any(tag in shown for tag in TAGS) and "<|" not in shown


@pytest.mark.parametrize("name", FORMATS)
def test_any_noise_gives_parts_and_loses_no_plain_text(name: str) -> None:
    rng = random.Random(11)
    vocabulary = ["<think>", "</think>", *TAGS, "a", " ", "\n", "<", "|", ">", "{", '"', "to=functions.x", "final"]
    for _ in range(500):
        pieces = rng.choices(vocabulary, k=rng.randrange(12))
        text = "".join(pieces)
        whole = put_together(parse(name, pieces))
        assert whole == put_together(parse(name, list(text))) == put_together(parse(name, [text]))
        if name == "plain":
            assert whole == ("", text, ())


@pytest.mark.parametrize(
    ("template", "name"),
    [("{{ x }}", "plain"), ("a</think>b", "think"), ("<|channel|> <|message|>", "harmony"), ("", "plain")],
)
def test_the_format_follows_from_the_template(template: str, name: str) -> None:
    assert find_format(template).name == name


def test_what_may_begin_a_mark_is_held_back() -> None:
    assert [held_back(text, ["<b>", "<bc"]) for text in ("a", "a<", "a<b", "a<b>", "")] == [0, 1, 2, 0, 0]


def test_clients_that_send_thinking_back_are_cleaned_up_after() -> None:
    said = {"role": "assistant", "content": "<think>x</think>\n\nYes"}
    assert without_thinking([said])[0]["content"] == "Yes"
    tagged = {"role": "assistant", "content": "<|channel|>analysis<|message|>x<|end|><|channel|>final<|message|>Yes"}
    assert answers_only([tagged])[0]["content"] == "Yes" and tagged["content"] != "Yes"
    calls = {"role": "assistant", "content": "", "reasoning_content": "why", "tool_calls": [{}]}
    assert answers_only([calls])[0]["thinking"] == "why"
