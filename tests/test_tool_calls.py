"""Tool calls of every family: cut anywhere, several in a reply, between words, damaged, and when nobody may call."""

from __future__ import annotations

import json
import random
import re

import pytest
from family_calls import BEHIND_WORDS, BOTH, NAMES, TOOLS, WITHOUT_CALLS, F, G, J, M, S, both, calls, parse, words
from moe_edge.runner.chatformat import FORMATS
from moe_edge.runner.chatformat.calls import new_call_id, typed_value
from moe_edge.runner.chatformat.format import JsonEnd
from moe_edge.runner.chatformat.parts import Reasoning, ToolArguments, ToolEnd, ToolStart
from moe_edge.runner.messages import forms_of, shows_python, with_names


def test_every_format_has_its_calls_here() -> None:
    assert set(FORMATS) == set(BOTH) | WITHOUT_CALLS


@pytest.mark.parametrize("name", NAMES)
def test_two_calls_cut_at_every_place(name: str) -> None:
    text = BOTH[name]
    for size in (len(text), 1, 2, 3, 7, 31):
        parts = parse(name, text, size)
        assert calls(parts) == [F, G], size
        assert not words(parts).strip(), words(parts)


@pytest.mark.parametrize("tool", ["run_command", "no", "mcp__files-x.read", "fetch-url", "GetN", "größe"])
@pytest.mark.parametrize("name", NAMES)
def test_a_tool_may_have_any_name(name: str, tool: str) -> None:
    tools = [{"type": "function", "function": {**TOOLS[0]["function"], "name": tool}}, TOOLS[1]]
    for size in (1, 1000):
        assert calls(parse(name, both(f=tool)[name], size, tools)) == [(tool, F[1]), G]


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


@pytest.mark.parametrize("name", NAMES)
def test_words_between_the_tags_of_a_call_are_not_lost(name: str) -> None:
    text = BOTH[name]
    borders = [at for at in range(1, len(text)) if text[at - 1] in ">]" or text[at] in "<["]
    for at in [0, *borders, len(text)]:
        for size in (1, 1000):
            parts = parse(name, text[:at] + " lost words " + text[at:], size)
            everything = "".join(getattr(part, "text", "") + getattr(part, "name", "") for part in parts)
            within = text[:at].endswith(("[CALL_ID]", "<|tool_call:begin|>", "<|start|>", "<function=", 'name="g'))
            assert "lost words" in everything or within or text[at:].startswith(WITHIN), (text[:at], text[at:])


# In these places the words stand within a tag, or are an id, which is of no use to anybody.
WITHIN = ("<|tool_call:name|>", "[ARGS]", "<|sep|>")


def test_without_tools_a_call_of_gpt_oss_is_words() -> None:
    parts = parse("harmony", "<|channel|>commentary to=functions.f<|message|>{}<|call|>", 3, tools=[])
    assert not calls(parts) and words(parts) == "{}"


@pytest.mark.parametrize("name", ["qwen_coder", "seed", "glm", "invoke", "deepseek_dsml", "hunyuan"])
def test_a_string_between_tags_is_told_as_it_comes(name: str) -> None:
    """It may be a whole file, and a client that hears nothing for minutes hangs up."""
    text = BOTH[name]
    at = text.index(S) + len(S)
    parser = FORMATS[name].parser("", TOOLS)
    begun = "".join(part.text for part in parser.feed(text[: at - 3]) if isinstance(part, ToolArguments))
    assert begun == json.dumps(F[1])[: len(begun)] and len(begun) > 20
    parts = parse(name, text.replace(S, "\n\nif x < 1:\n\n\ty = '</par'\n\n"), 1)
    assert calls(parts)[0][1]["s"].strip("\n") == "if x < 1:\n\n\ty = '</par'"
    assert calls(parse(name, text.replace(S, ""), 1))[0][1] == {"x": 1, "s": ""}


def test_kimi_k3_begins_inside_the_tag_that_the_prompt_has_opened() -> None:
    text = "hm <b>\n<|close|>think<|sep|><|open|>response<|sep|>Let me look.<|close|>response<|sep|>" + BOTH["kimi_k3"]
    for size in (1, 4, 1000):
        parts = parse("kimi_k3", text, size, prompt="...<|open|>think<|sep|>")
        assert "".join(p.text for p in parts if isinstance(p, Reasoning)) == "hm <b>\n"
        assert words(parts) == "Let me look." and calls(parts) == [F, G]
        plain = parse("kimi_k3", "Hi.<|close|>response<|sep|><|end_of_msg|>", size, prompt="<|open|>response<|sep|>")
        assert words(plain) == "Hi."
    said = '<|open|>call tool="a&quot;b" index="1"<|sep|><|open|>json type="object"<|sep|>{"k": [1]}'
    assert calls(parse("kimi_k3", said + "<|close|>json<|sep|><|close|>call<|sep|>", 3)) == [('a"b', {"k": [1]})]


def test_muse_thinks_in_messages_to_itself() -> None:
    text = " to=self<|message|>hm<|eom|><|start|>assistant to=user<|message|>Let me look.<|eom|><|start|>assistant"
    for size in (1, 4, 1000):
        parts = parse("muse", text + BOTH["muse"], size)
        assert "".join(p.text for p in parts if isinstance(p, Reasoning)) == "hm"
        assert words(parts) == "Let me look." and calls(parts) == [F, G]


def test_minimax_m3_reads_values_within_values() -> None:
    schema = {"type": "object", "properties": {
        "o": {"type": "object", "properties": {"n": {"type": "number"}, "item": {"type": "string"}}},
        "l": {"type": "array", "items": {"type": "string"}}, "empty": {"type": "array"}, "free": {},
    }}  # fmt: skip
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    body = "<o><n>1.5</n><item>x</item></o><l><item>1</item><item>2</item></l><empty></empty>"
    body += "<free><item>1</item><item><a>b</a></item></free><text>7 < 8</text>"
    said = M + "<tool_call>" + M + '<invoke name="f">' + re.sub(r"(</?\w+>)", M + r"\1", body)
    said += M + "</invoke>" + M + "</tool_call>"
    wanted = {"o": {"n": 1.5, "item": "x"}, "l": ["1", "2"], "empty": [], "free": [1, {"a": "b"}], "text": "7 < 8"}
    for size in (1, 5, 1000):
        assert calls(parse("minimax_m3", said, size, tools)) == [("f", wanted)]
    for broken in (said.replace("</n>", "</m>"), said.replace("<n>", "n"), said.replace("</o>", "", 1)):
        assert calls(parse("minimax_m3", broken, 7, tools)) == [] and words(parse("minimax_m3", broken, 7, tools))
    assert words(parse("minimax_m3", "</mm:think>Hi.", 2)) == "Hi."


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


BARE = '{"name": "f", "arguments": {"x": 1}}'


@pytest.mark.parametrize("before", ["", "\n ", "<think>\nhm\n</think>\n\n"])
def test_a_model_that_forgets_the_tags_calls_all_the_same(before: str) -> None:
    for size in (1, 3, 1000):
        for text, wanted, said in (
            (BARE, [("f", {"x": 1})], ""),
            (BARE + "\n" + BARE.replace('"f"', '"g"') + "\n", [("f", {"x": 1}), ("g", {"x": 1})], ""),
            (BARE + "\nThat is it.", [("f", {"x": 1})], "That is it."),
            (BARE + '\n{"degrees": 22}', [("f", {"x": 1})], '{"degrees": 22}'),
            (BARE + '\n{"\\d', [("f", {"x": 1})], '{"\\d'),
            (BARE + "\n<tool_call>\n" + BARE + "\n</tool_call>", [("f", {"x": 1})] * 2, ""),
        ):
            parts = parse("hermes", before + text, size)
            assert calls(parts) == wanted and words(parts).strip() == said, (size, text)


@pytest.mark.parametrize(
    "text",
    ['{"name": "Ada", "arguments": {"x": 1}}', '{"name": "f"}', '{"name": "f", "age": 3}', "{}", "{", "{f(1)}",
     '{"arguments": {}, "name": "f"}', '{"title": "f", "name": "f", "arguments": {}}', '{"name": "f", "argu',
     '{"name": "f", "parameters": {"type": "object"}}', '{"name": "f", "description": "d", "arguments": {}}',
     '{"\\d": 1}', '{"a\nb": 1}', '{"name": "f", "arguments": [1]}', f"The call is {BARE}", f"```json\n{BARE}\n```"],
)  # fmt: skip
def test_json_that_calls_no_tool_that_was_offered_is_the_answer(text: str) -> None:
    for size in (1, 5, 1000):
        parts = parse("hermes", text, size)
        assert not calls(parts) and words(parts) == text, size
        assert words(parse("hermes", BARE, size, tools=[])) == BARE


def test_an_answer_in_json_is_not_held_back_until_its_end() -> None:
    parser = FORMATS["hermes"].parser("", TOOLS)
    shown = "".join(words(parser.feed(piece)) for piece in ('{"ti', 'tle": ', '"Emma", "name"'))
    assert shown == '{"title": "Emma", "name"'


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


VALUES = ["NaN", "-Infinity", "1e999", "[NaN]", '{"a": "\\ud800"}', "'\\ud800'", r"'\d+'", "1" * 5000, "[" * 3000,
          "{1, 2}", "b'x'", "1j", "(1, 2)", "{1: 2}", "-" * 20000 + "1", "\0", "é"]  # fmt: skip


@pytest.mark.parametrize("key", ["x", "s", "unknown"])
@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_whatever_a_value_is_the_arguments_are_json_that_can_be_sent(value: str, key: str) -> None:
    """JSON has no NaN and no infinity, and UTF-8 has no half of a pair of UTF-16; Python's json writes them all."""
    inner = json.dumps(f'{{"{key}": {value}}}')
    for name, said in {
        "qwen_coder": f"<tool_call>\n<function=f>\n<parameter={key}>\n{value}\n</parameter>\n</function>\n</tool_call>",
        "glm": f"<tool_call>f\n<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n</tool_call>",
        "lfm2": f"<|tool_call_start|>[f({key}={value})]<|tool_call_end|>",
        "gemma": f"<|tool_call>call:f{{{key}:{value}}}<tool_call|>",
        "hermes": f'<tool_call>{{"name": "f", "arguments": {inner}}}</tool_call>',
    }.items():
        parts = parse(name, said)
        text = "".join(part.text for part in parts if isinstance(part, ToolArguments))
        text.encode()
        if text:
            assert list(json.loads(text, parse_constant=lambda constant: pytest.fail(constant))) == [key]
        else:  # it was no call
            assert words(parts) == said


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
