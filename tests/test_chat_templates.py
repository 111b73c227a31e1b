"""Chat formats against the templates that llama.cpp's source carries: render, reply, parse, feed back, render again.

The reply is the family's own: an assistant's turn with a call, as the template itself writes it, cut out of the prompt.
`make reference` unpacks the templates into build/llama.cpp; they are read there and nowhere else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import open_engine
from moe_edge.models.embedded import tiny_model_path
from moe_edge.models.errors import UsageError
from moe_edge.runner.chatformat.format import Parser
from moe_edge.runner.chatformat.parts import Part, Reasoning, Text, ToolArguments, ToolEnd, ToolStart
from moe_edge.runner.template import ChatTemplate
from moe_edge.runner.thinking import thinking_settings

FOLDER = Path(__file__).resolve().parents[1] / "build" / "llama.cpp" / "models" / "templates"
TEMPLATES = sorted(path.name for path in FOLDER.glob("*.jinja"))
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {
        "name": "get_weather", "description": "Weather of a city.",
        "parameters": {
            "type": "object", "additionalProperties": False, "required": ["city", "days"],
            "properties": {
                "city": {"type": "string", "description": "where"}, "days": {"type": "integer", "description": "n"},
                "deep": {"type": "object", "description": "more"},
            },
        },
    }},
    {"type": "function", "function": {
        "name": "now", "description": "The time.",
        "parameters": {"type": "object", "properties": {}, "required": []},
    }},
]  # fmt: skip
ARGUMENTS = {"city": "São Paulo", "days": 3, "deep": {"a": [1, "x < y"], "b": None}}
QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How is the weather?"}]

# Template -> why no call of it can be read. An entry that works fails its test.
CANNOT = {
    "meetkai-functionary-medium-v3.2.jinja": "its notation is not read yet",
    "GigaChat3-10B-A1.8B.jinja": "a call is a message of another role",
    "fireworks-ai-llama-3-firefunction-v2.jinja": "wants functions in place of tools",
    "CohereForAI-c4ai-command-r-plus-tool_use.jinja": "wants tools of another form",
    "llama-cpp-deepseek-r1.jinja": "does not render tools in Python's Jinja",
    # these write nothing of a call that the assistant made
    "HuggingFaceTB-SmolLM3-3B.jinja": "its template leaves calls out",
    "LFM2-8B-A1B.jinja": "its template leaves calls out",
    "LFM2.5-Instruct.jinja": "its template leaves calls out",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B.jinja": "its template leaves calls out",
    "google-gemma-2-2b-it.jinja": "its template leaves calls out",
    "ibm-granite-granite-3.3-2B-Instruct.jinja": "its template leaves calls out",
    "llama-cpp-rwkv-world.jinja": "its template leaves calls out",
    "microsoft-Phi-3.5-mini-instruct.jinja": "its template leaves calls out",
}

pytestmark = pytest.mark.skipif(
    not TEMPLATES and not os.environ.get("CI"), reason="no templates in build/llama.cpp; make reference unpacks them"
)


@pytest.fixture(scope="module")
def llama() -> Iterator[Any]:
    with open_engine(tiny_model_path(), "floor", n_ctx=256) as engine:
        yield engine.llama


def turn(content: str, calls: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """An assistant's message as OpenAI's clients send it back."""
    return {
        "role": "assistant", "content": content,
        "tool_calls": [
            {"id": f"call0000{i}", "type": "function",
             "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}}
            for i, (name, arguments) in enumerate(calls)
        ],
    }  # fmt: skip


def result(number: int) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"call0000{number}", "content": '{"sky": "blue"}'}


def reply_of(template: ChatTemplate, message: dict[str, Any]) -> tuple[str, str]:
    """(the prompt, what a model would write behind it to say `message`)."""
    prompt = template.render(QUESTION, TOOLS)
    whole = template.render([*QUESTION, message, result(0)], TOOLS)
    start = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
    if (opened := whole.rfind("<", 0, start)) >= 0 and ">" not in whole[opened:start]:
        start = opened  # they parted within a tag
    said = whole[start:].split('"sky"')[0].split('\\"sky')[0]  # and the beginning of the result's turn
    said = said.split("<|call|>")[0]  # where gpt-oss stops
    closing = next((close for open_, close in THINKING if prompt.rstrip().endswith(open_) and close not in said), "")
    return prompt, closing + said


def without_nulls(value: dict[str, Any]) -> dict[str, Any]:
    """What MiniMax M3's template leaves of arguments."""
    return {
        key: without_nulls(each) if isinstance(each, dict) else each for key, each in value.items() if each is not None
    }


THINKING = (("<think>", "</think>"), ("<|START_THINKING|>", "<|END_THINKING|>"), ("[THINK]", "[/THINK]"))


# What is asked for -> what the prompt then ends with, or has in it, by template.
SETTINGS = [
    ("Qwen-Qwen3-0.6B.jinja", False, None, "<think>\n\n</think>\n\n"),
    ("GLM-4.6.jinja", False, None, "<think></think>"),
    ("tencent-Hy3.jinja", False, None, "<think:opensource></think:opensource>"),
    ("tencent-Hy3.jinja", None, "medium", "<think:opensource>"),
    ("tencent-Hy3.jinja", True, None, "<think:opensource>"),
    ("MiniMax-M3.jinja", True, None, "<mm:think>"),
    ("MiniMax-M3.jinja", False, None, "</mm:think>"),
    ("Kimi-K3.jinja", None, "low", "thinking_effort=low"),
    ("Kimi-K3.jinja", None, "medium", "thinking_effort=high"),
    ("Kimi-K3.jinja", False, None, "<|open|>response<|sep|>"),
    ("openai-gpt-oss-120b.jinja", False, None, "Reasoning: low"),
    ("openai-gpt-oss-120b.jinja", None, "high", "Reasoning: high"),
    ("ByteDance-Seed-OSS.jinja", False, None, "</seed:think>"),
    ("Cohere2MoE.jinja", False, None, "<|END_THINKING|>"),
    ("muse-glimmer.jinja", None, "low", "Reasoning strength: low."),
    ("deepseek-ai-DeepSeek-V3.1.jinja", True, None, "<think>"),
    ("deepseek-ai-DeepSeek-V3.1.jinja", False, None, "</think>"),
]


@pytest.mark.parametrize(("name", "think", "effort", "words"), SETTINGS)
def test_a_family_is_told_to_think_in_its_own_words(
    name: str, think: bool | None, effort: str | None, words: str, llama: Any
) -> None:
    template = ChatTemplate((FOLDER / name).read_text(), llama, name)
    asked = template.render(QUESTION, **thinking_settings(think, effort))
    if words.startswith("<"):
        assert asked.rstrip().endswith(words.rstrip())
    else:
        assert words in asked


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_takes_every_setting(name: str, llama: Any) -> None:
    template = ChatTemplate((FOLDER / name).read_text(), llama, name)
    for think in (True, False, None):
        for effort in ("none", "minimal", "low", "medium", "high", "xhigh", "max", None):
            try:
                prompt = template.render(QUESTION, **thinking_settings(think, effort))
            except UsageError:
                assert name in CANNOT
                continue
            template.format.parser(prompt, TOOLS)


def parts_of(parser: Parser, text: str, size: int) -> list[Part]:
    parts: list[Part] = []
    for at in range(0, len(text), size):
        parts += parser.feed(text[at : at + size])
    return parts + parser.finish()


def calls_of(parts: list[Part]) -> list[tuple[str, Any]]:
    names = {part.index: part.name for part in parts if isinstance(part, ToolStart)}
    texts = dict.fromkeys(names, "")
    for part in parts:
        if isinstance(part, ToolArguments):
            texts[part.index] += part.text
    assert sorted(p.index for p in parts if isinstance(p, ToolEnd)) == sorted(names)
    return [(names[index], json.loads(texts[index])) for index in sorted(names)]


def words(parts: list[Part]) -> str:
    return "".join(part.text for part in parts if isinstance(part, Text))


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_call_in_the_templates_own_words_is_read_and_goes_back(name: str, llama: Any) -> None:
    try:
        check(ChatTemplate((FOLDER / name).read_text(), llama, name))
    except Exception as error:
        if name in CANNOT:
            return
        raise AssertionError(f"{name}: {error}") from error
    assert name not in CANNOT, f"{name} works: take it out of CANNOT"


def check(template: ChatTemplate) -> None:
    message = turn("", [("get_weather", ARGUMENTS)])
    prompt, said = reply_of(template, message)
    expected = [("get_weather", without_nulls(ARGUMENTS) if template.format.name == "minimax_m3" else ARGUMENTS)]
    for size in (len(said), 1, 2, 7):
        parts = parts_of(template.format.parser(prompt, TOOLS), said, size)
        found = calls_of(parts)
        assert found == expected, f"{template.format.name}, {size} characters at a time: {found} of {said!r}"
    for n in range(len(said)):  # cut anywhere: no exception, and no argument that was not written
        parts = parts_of(template.format.parser(prompt, TOOLS), said[:n], 5)
        assert all(not isinstance(part, Reasoning) or "get_weather" not in part.text for part in parts)
    again = [*QUESTION, message, result(0), {"role": "assistant", "content": "It is blue."}]
    third = [*again, {"role": "user", "content": "And now?"}, turn("", [("now", {})]), result(0)]
    assert "blue" in template.render([*QUESTION, message, result(0)], TOOLS)
    assert "And now?" in template.render([*again, {"role": "user", "content": "And now?"}], TOOLS)
    assert "And now?" in template.render(third, TOOLS)
