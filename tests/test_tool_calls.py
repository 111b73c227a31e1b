"""Tool calls of every family: cut anywhere, several in a reply, between words, damaged, and when nobody may call."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from moe_edge.runner.chatformat import FORMATS
from moe_edge.runner.chatformat.calls import new_call_id, typed_value
from moe_edge.runner.chatformat.format import JsonEnd
from moe_edge.runner.chatformat.parts import Part, Reasoning, Text, ToolArguments, ToolEnd, ToolStart
from moe_edge.runner.template import forms_of, shows_python, with_names

F: tuple[str, dict[str, Any]] = ("f", {"x": 1, "s": 'a "b" \\ {c}\n<d>'})
G: tuple[str, dict[str, Any]] = ("g", {})
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "f", "parameters": {
        "type": "object", "properties": {"x": {"type": "integer"}, "s": {"type": "string"}}}}},
    {"type": "function", "function": {"name": "g", "parameters": {"type": "object", "properties": {}}}},
]  # fmt: skip
S = F[1]["s"]
J = json.dumps(F[1])
K = "<｜tool▁call▁end｜>"

# format -> what a model of the family writes to call f(x=1, s=S) and then g().
BOTH = {
    "hermes": f'<tool_call>\n{{"name": "f", "arguments": {J}}}\n</tool_call>\n'
              '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>',
    "json_lists": f'<TOOLCALL>[{{"name": "f", "arguments": {J}}}, {{"name": "g"}}]</TOOLCALL>',
    "apertus": f'<|tools_prefix|>[{{"f": {J}}}, {{"g": {{}}}}]<|tools_suffix|>',
    "cohere": f'<|START_ACTION|>[\n {{"tool_call_id": "0", "tool_name": "f", "parameters": {J}}},\n'
              ' {"tool_call_id": "1", "tool_name": "g", "parameters": {}}\n]<|END_ACTION|>',
    "mistral": f"[TOOL_CALLS]f[ARGS]{J}[TOOL_CALLS]g[CALL_ID]abcdefghi[ARGS]{{}}",
    "kimi": "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>" + J +
            "<|tool_call_end|><|tool_call_begin|>functions.g:1<|tool_call_argument_begin|>{}<|tool_call_end|>"
            "<|tool_calls_section_end|>",
    "deepseek": f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{J}\n```{K}"
                f"\n<｜tool▁call▁begin｜>g<｜tool▁sep｜>{{}}{K}<｜tool▁calls▁end｜>",
    "deepseek_dsml": '<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="x" string="false">1'
                     f'</｜DSML｜parameter>\n<｜DSML｜parameter name="s" string="true">{S}</｜DSML｜parameter>\n'
                     '</｜DSML｜invoke>\n<｜DSML｜invoke name="g">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>',
    "glm": f"<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>1</arg_value>\n<arg_key>s</arg_key>\n<arg_value>{S}"
           "</arg_value>\n</tool_call>\n<tool_call>g</tool_call>",
    "hunyuan": "<tool_calls:opensource>\n<tool_call:opensource>f<tool_sep:opensource>\n<arg_key:opensource>x"
               "</arg_key:opensource>\n<arg_value:opensource>1</arg_value:opensource>\n<arg_key:opensource>s"
               f"</arg_key:opensource>\n<arg_value:opensource>{S}</arg_value:opensource>\n</tool_call:opensource>\n"
               "<tool_call:opensource>g<tool_sep:opensource>\n</tool_call:opensource>\n</tool_calls:opensource>",
    "qwen_coder": f"<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n<parameter=s>\n{S}\n</parameter>\n"
                  "</function>\n</tool_call>\n<tool_call>\n<function=g>\n</function>\n</tool_call>",
    "seed": f"<seed:tool_call>\n<function=f>\n<parameter=x>1</parameter>\n<parameter=s>{S}</parameter>\n</function>\n"
            "<function=g>\n</function>\n</seed:tool_call>",
    "invoke": '<minimax:tool_call>\n<invoke name="f">\n<parameter name="x">1</parameter>\n'
              f'<parameter name="s">{S}</parameter>\n</invoke>\n<invoke name="g">\n</invoke>\n</minimax:tool_call>',
    "lfm2": f"<|tool_call_start|>[f(x=1, s={S!r}), g()]<|tool_call_end|>",
    "gemma": f'<|tool_call>call:f{{x:1,s:<|"|>{S}<|"|>}}<tool_call|><|tool_call>call:g{{}}<tool_call|>',
    "harmony": f" to=functions.f<|channel|>commentary json<|message|>{J}<|call|><|start|>assistant to=functions.g"
               "<|channel|>commentary json<|message|>{}<|call|>",
    "llama3": f'{{"name": "f", "parameters": {J}}}{{"name": "g", "parameters": {{}}}}',
    "functionary": f"<function=f>{J}</function><function=g>{{}}</function>",
    "solar": f"<|tool_calls|><|tool_call:begin|>c1<|tool_call:name|>f<|tool_call:args|>{J}<|tool_call:end|>"
             "<|tool_call:begin|>c2<|tool_call:name|>g<|tool_call:args|>{}<|tool_call:end|><|calls|>",
}  # fmt: skip
WITHOUT_CALLS = {"plain", "think"}
NAMES = sorted(BOTH)
BEHIND_WORDS = [name for name in NAMES if name not in ("harmony", "llama3")]  # those whose calls may follow text


def parse(name: str, text: str, size: int = 10**9, tools: Any = TOOLS, prompt: str = "") -> list[Part]:
    parser, parts = FORMATS[name].parser(prompt, tools), []
    for at in range(0, len(text), size):
        parts += parser.feed(text[at : at + size])
    return parts + parser.finish()


def calls(parts: list[Part]) -> list[tuple[str, Any]]:
    found: list[tuple[str, str]] = []
    for part in parts:
        if isinstance(part, ToolStart):
            assert part.index == len(found) and part.id
            found.append((part.name, ""))
        elif isinstance(part, ToolArguments):
            found[part.index] = (found[part.index][0], found[part.index][1] + part.text)
    ends = [part.index for part in parts if isinstance(part, ToolEnd)]
    assert ends == list(range(len(found))), "every call ends once, in order"
    return [(name, json.loads(text)) for name, text in found]


def words(parts: list[Part]) -> str:
    return "".join(part.text for part in parts if isinstance(part, Text))


def test_every_format_has_its_calls_here() -> None:
    assert set(FORMATS) == set(BOTH) | WITHOUT_CALLS


@pytest.mark.parametrize("name", NAMES)
def test_two_calls_cut_at_every_place(name: str) -> None:
    text = BOTH[name]
    for size in (len(text), 1, 2, 3, 7, 31):
        parts = parse(name, text, size)
        assert calls(parts) == [F, G], size
        assert not words(parts).strip(), words(parts)


@pytest.mark.parametrize("name", BEHIND_WORDS)
def test_words_before_a_call_are_kept_and_tags_are_never_shown_in_part(name: str) -> None:
    text = "Let me look.\n\n" + BOTH[name]
    first = min(text.index(mark[:2], 5) for mark in (BOTH[name][:6],))
    for size in (1, 5):
        parser, shown = FORMATS[name].parser("", TOOLS), ""
        for at in range(0, len(text), size):
            shown += words(parser.feed(text[at : at + size]))
            assert "Let me look.\n\n".startswith(shown), shown
        parts = parse(name, text, size)
        assert words(parts) == "Let me look." and calls(parts) == [F, G]
    assert first > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_reply_that_ends_anywhere_says_no_more_than_was_written(name: str) -> None:
    """max_tokens may end it: no exception, each call that began ends, names are whole, arguments a beginning."""
    text = BOTH[name]
    whole = [json.dumps(F[1]), json.dumps(F[1], ensure_ascii=False), J]
    for n in range(len(text)):
        parts = parse(name, text[:n], 4)
        starts = [part.name for part in parts if isinstance(part, ToolStart)]
        assert starts == ["f", "g"][: len(starts)]
        assert [p.index for p in parts if isinstance(p, ToolEnd)] == list(range(len(starts)))
        given = "".join(part.text for part in parts if isinstance(part, ToolArguments) and part.index == 0)
        assert any(each.startswith(given.rstrip("}") if given != J else given) for each in whole) or not given, given


@pytest.mark.parametrize("name", BEHIND_WORDS)
def test_without_tools_tags_are_words(name: str) -> None:
    parts = parse(name, BOTH[name], 3, tools=[])
    assert not calls(parts)
    assert words(parts) == BOTH[name] or name == "cohere"


@pytest.mark.parametrize("name", BEHIND_WORDS)
def test_what_is_no_call_comes_back_as_it_was_written(name: str) -> None:
    mark = next(mark for mark in sorted(FORMATS[name].parser("", TOOLS).marks) if BOTH[name].startswith(mark))  # type: ignore[attr-defined]
    for junk in ("", " and so on", "\n\nnothing { here", '{"a": ', "[1, 2", "(((("):
        text = f"See: {mark}{junk}"
        for size in (1, 4, 100):
            assert words(parse(name, text, size)) == text


@pytest.mark.parametrize("name", NAMES)
def test_chance_raises_nothing_and_loses_no_words(name: str) -> None:
    """Pieces of tags, calls and words in any order: nothing is raised, and what is neither tag nor call is there."""
    rng = random.Random(name)
    pieces = [BOTH[name][a : a + rng.randint(1, 25)] for a in range(0, len(BOTH[name]), 9)]
    for case in range(300):
        marks = [f"w{i}x" for i in range(4)]
        text = "".join(rng.choice(pieces) + (f" {marks[i]} " if i < 4 else "") for i in range(8))
        size = rng.choice((1, 3, 17, 400))
        parts = parse(name, text, size)
        everything = "".join(getattr(part, "text", "") + getattr(part, "name", "") for part in parts)
        if not any(isinstance(part, ToolStart) for part in parts) and name not in ("harmony", "cohere", "solar"):
            assert all(mark in everything for mark in marks), (case, text)


def test_thinking_comes_before_calls_and_a_tag_within_it_is_thought() -> None:
    text = "<think>\nI could <tool_call> now.\n</think>\n\n" + BOTH["hermes"]
    parts = parse("hermes", text, 3)
    assert "".join(p.text for p in parts if isinstance(p, Reasoning)) == "I could <tool_call> now."
    assert calls(parts) == [F, G]
    opened = parse("glm", "hm</think>" + BOTH["glm"], 2, prompt="<|assistant|><think>")
    assert "".join(p.text for p in opened if isinstance(p, Reasoning)) == "hm" and calls(opened) == [F, G]
    gemma = parse("gemma", "<|channel>thought\nhm\n<channel|>" + BOTH["gemma"], 2)
    assert "".join(p.text for p in gemma if isinstance(p, Reasoning)) == "hm" and calls(gemma) == [F, G]
    cohere = parse("cohere", "<|START_THINKING|>hm<|END_THINKING|><|START_RESPONSE|>Hi.<|END_RESPONSE|>", 2)
    assert "".join(p.text for p in cohere if isinstance(p, Reasoning)) == "hm" and words(cohere) == "Hi."


def test_arguments_are_told_as_they_come() -> None:
    parser = FORMATS["hermes"].parser("", TOOLS)
    assert parser.feed('<tool_call>{"name": "f", "argum') == []
    begun = parser.feed('ents": {"x": 1')
    assert isinstance(begun[0], ToolStart) and begun[0].name == "f"
    assert begun[1:] == [ToolArguments(0, '{"x": 1')]
    assert parser.feed(', "s": "}') == [ToolArguments(0, ', "s": "}')]
    assert parser.feed('"}}</tool_') == [ToolArguments(0, '"}'), ToolEnd(0)]
    assert parser.feed("call>") + parser.finish() == []


@pytest.mark.parametrize(
    "body",
    ['{"arguments": {"x": 1}, "name": "f"}', '{"name": "f", "arguments": "{\\"x\\": 1}"}',
     '{"id": [1, {"a": "}"}], "name": "f", "parameters": {"x": 1}}', ' \n{ "name" : "f" , "arguments" : {"x": 1} } '],
)  # fmt: skip
def test_other_orders_and_forms_of_json_calls(body: str) -> None:
    for size in (1, 100):
        assert calls(parse("hermes", f"<tool_call>{body}</tool_call>", size)) == [("f", {"x": 1})]


def test_values_take_the_type_that_the_schema_gives_them() -> None:
    schema = {"properties": {
        "s": {"type": "string"}, "n": {"type": "number"}, "b": {"type": "boolean"}, "l": {"type": "array"},
        "either": {"anyOf": [{"type": "integer"}, {"type": "null"}]}, "or_text": {"type": ["string", "integer"]},
        "one_of": {"enum": ["1", "2"]}, "free": {},
    }}  # fmt: skip
    cases = [
        ("s", "12", "12"), ("s", '{"a": 1}', '{"a": 1}'), ("s", "", ""), ("n", "1.5", 1.5), ("n", "many", "many"),
        ("b", "true", True), ("b", "True", True), ("l", "[1, 2]", [1, 2]), ("l", "['a', None]", ["a", None]),
        ("either", "null", None), ("either", "7", 7), ("or_text", "7", "7"), ("one_of", "1", "1"),
        ("free", "7", 7), ("free", '"quoted"', '"quoted"'), ("free", "Paris", "Paris"), ("unknown", "7", 7),
    ]  # fmt: skip
    for key, text, expected in cases:
        found = typed_value(schema, key, text)
        assert (found, type(found)) == (expected, type(expected)), (key, text)
    assert typed_value(None, "x", "[" * 5000) == "[" * 5000


def test_where_json_ends() -> None:
    for text, n in (('{"a": "}\\""} x', 12), ("[1, [2]]]", 8), ('"a\\\\" b', 5), ("12, 3", 2), ("true}", 4)):
        for size in (1, 100):
            end, taken = JsonEnd(), 0
            for at in range(0, len(text), size):
                taken += end.feed(text[at : at + size])
                if end.is_over:
                    break
            assert taken == n, text


def test_ids_suit_the_strictest_template() -> None:
    ids = {new_call_id() for _ in range(100)}
    assert len(ids) > 95 and all(len(each) == 9 and each.isalnum() for each in ids)


# ---- what goes back to the template


def test_arguments_go_back_as_objects_then_as_text() -> None:
    call = {"id": "c", "function": {"name": "f", "arguments": '{"x": 1}'}}
    forms = list(forms_of([{"role": "assistant", "content": "", "tool_calls": [call]}]))
    found = [form[0]["tool_calls"][0]["function"]["arguments"] for form in forms]
    assert found == [{"x": 1}, '{"x": 1}']
    odd = {"id": "c", "function": {"name": "f", "arguments": "{no json"}}
    assert next(iter(forms_of([{"role": "assistant", "content": "", "tool_calls": [odd]}])))[0]["tool_calls"] == [odd]
    assert shows_python(forms[0], "call f with {'x': 1}") and not shows_python(forms[0], 'call f with {"x": 1}')


def test_results_get_the_name_of_their_tool() -> None:
    call = {"id": "c", "function": {"name": "f", "arguments": "{}"}}
    result = {"role": "tool", "tool_call_id": "c", "content": "1"}
    named = with_names([{"role": "assistant", "content": "", "tool_calls": [call]}, result, {**result, "name": "own"}])
    assert [message.get("name") for message in named] == [None, "f", "own"]
    assert with_names([result]) == [result]
