"""Forced calls in each family's own words: what its grammar can write, its parser reads back, call for call.

Texts are drawn by walking the grammar, and the names of the rules that wrote them say what they mean, so that the
expectation does not come from the parser.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import open_engine
from family_calls import calls, words
from gbnf_walk import Span, Walk
from moe_edge.models.embedded import tiny_model_path
from moe_edge.models.errors import UsageError
from moe_edge.runner.chatformat import FORMATS
from moe_edge.runner.chatformat.forms import THOUGHT, TagArguments
from moe_edge.runner.chatformat.parts import Part, Reasoning
from moe_edge.runner.protocol import Request, ToolChoice
from moe_edge.runner.sampling import Candidates, make_grammar
from moe_edge.runner.serve.forced_call import ForcedCallParser
from moe_edge.runner.serve.grammar import ROOT, Form, reply_form
from moe_edge.runner.tokens import tokenize

# Format -> templates in whose words it writes calls. What a template says decides among a family's variants.
TEMPLATES = {
    "hermes": ["</think>"], "json_lists": ["<TOOLCALL>", "<tool_calls>[ </think>", "<tool_calls>\n", "<|tool_call|>"],
    "apertus": ["<|inner_suffix|>"], "cohere": ["<|END_THINKING|>"], "functionary": [""], "llama3": [""],
    "mistral": ["[ARGS] [/THINK]", "[CALL_ID] [ARGS]", ""], "kimi": ["</think>"], "deepseek": ["</think>", "```json"],
    "deepseek_dsml": ["function_calls </think>", "tool_calls"], "glm": ["</think>"], "hunyuan": [""], "seed": [""],
    "qwen_coder": ["</think>"], "invoke": ["<minimax:tool_call> </think>", '<function name="'], "lfm2": ["</think>"],
    "harmony": [""], "solar": [""], "gemma": ["<channel|>"], "kimi_k3": [""], "muse": [""],
}  # fmt: skip
IN_JSON = {"minimax_m3", "think", "plain"}  # whose calls are plain JSON when they are forced
ONE_CALL = {"harmony", "llama3"}
OPENED = {
    "hermes": "<think>\n", "glm": "<think>", "seed": "<seed:think>", "cohere": "<|START_THINKING|>",
    "hunyuan": "<think:opensource>", "mistral": "[THINK]", "kimi_k3": "<|open|>think<|sep|>", "solar": "<|think|>",
    "gemma": "<|channel>thought\n", "apertus": "<|inner_prefix|>", "minimax_m3": "<mm:think>", "lfm2": "<think>",
    "think": "<think>\n",
}  # fmt: skip


def prompts(name: str) -> set[str]:
    """What a prompt may end with, that leaves the thinking open or does not."""
    return {OPENED[name], "<|open|>response<|sep|>"} if name == "kimi_k3" else {"", OPENED.get(name, "")}


def tool(name: str, properties: dict[str, Any], required: list[str], **more: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": required, **more}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


NAME_AGE = {"name": {"type": "string"}, "age": {"type": "integer"}}
PERSON = {"type": "object", "properties": NAME_AGE, "required": ["name"]}
TOOLS = [
    tool("write", {"path": {"type": "string", "minLength": 1}, "content": {"type": "string"}}, ["path", "content"]),
    tool("mcp__files-read", {
        "who": {"$ref": "#/$defs/Person"} | {"type": "object"}, "tags": {"type": "array", "items": {"type": "string"}},
        "n": {"type": "integer"}, "share": {"type": "number"}, "really": {"type": "boolean"},
    }, ["tags"], **{"$defs": {"Person": PERSON}}),
    tool("now", {}, []),
    tool("pick", {
        "unit": {"type": "string", "enum": ["C", "F", 'a "b"\\'], "description": "one of them"},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]}, "code": {"type": "string", "maxLength": 5},
        "word": {"type": "string", "minLength": 2, "maxLength": 3}, "any": {"type": "object"},
        "maybe": {"type": ["integer", "null"]},
    }, []),
]  # fmt: skip


FLAT = [
    TOOLS[0], TOOLS[2],
    tool("pick", {
        "unit": {"type": "string", "enum": ["C", "F", 'a "b"\\']}, "code": {"type": "string", "maxLength": 5},
        "n": {"type": "integer"}, "share": {"type": "number"}, "really": {"type": "boolean"},
    }, ["n"]),
]  # fmt: skip


def tools_of(name: str) -> list[dict[str, Any]]:
    """Gemma's own words have no lists and objects here."""
    return FLAT if name == "gemma" else TOOLS


def form(name: str, template: str, prompt: str = "", tools: Any = None, **more: Any) -> Form:
    request = Request(messages=({"role": "user", "content": "x"},), tools=tuple(tools or tools_of(name)),
                      tool_choice=more.pop("choice", ToolChoice("required")), **more)  # fmt: skip
    found = reply_form(request, FORMATS[name], template, prompt)
    assert found is not None and found.is_call and found.root == ROOT
    return found


def within(span: Span, spans: list[Span]) -> list[Span]:
    return [each for each in spans if span.start <= each.start and each.end <= span.end and each is not span]


def meant(name: str, template: str, text: str, spans: list[Span]) -> list[tuple[str, Any]]:
    """The calls that a walk has written, by the names of its rules."""
    found = []
    for call in (each for each in spans if each.rule.startswith("call-")):
        _, style, number = call.rule.split("-")
        function = tools_of(name)[int(number)]["function"]
        arguments = FORMATS[name].calls(template)[int(style)].arguments
        inner, value = within(call, spans), {}
        for each in inner:
            key = each.rule.split("-")
            said = text[each.start : each.end]
            if each.rule == f"arguments-{style}-{number}-root":
                value = json.loads(said)
            elif key[0] == "text" and len(key) == 4:
                assert isinstance(arguments, TagArguments) and said.endswith(arguments.end)
                said = said[: -len(arguments.end)]
                if arguments.strips:
                    said = said.removeprefix("\n").removesuffix("\n")
                value[list(function["parameters"]["properties"])[int(key[3])]] = said
            elif key[0] == "json" and key[4:] == ["root"]:
                value[list(function["parameters"]["properties"])[int(key[3])]] = json.loads(said)
        found.append((function["name"], value))
    return found


def parse(name: str, prompt: str, text: str, size: int, tools: Any = None) -> list[Part]:
    parser, parts = FORMATS[name].parser(prompt, tools_of(name) if tools is None else tools), []
    for at in range(0, len(text), size):
        parts += parser.feed(text[at : at + size])
    return parts + parser.finish()


def fits(value: Any, function: dict[str, Any]) -> None:
    properties = function["parameters"]["properties"]
    assert set(function["parameters"]["required"]) <= set(value)
    for key, each in value.items() if properties else ():
        least, most = properties[key].get("minLength", 0), properties[key].get("maxLength", 10**9)
        assert not isinstance(each, str) or least <= len(each) <= most, (key, each)
        assert each in properties[key].get("enum", [each])


def test_every_format_is_here() -> None:
    assert set(TEMPLATES) | IN_JSON == set(FORMATS)
    for name in IN_JSON:
        assert FORMATS[name].calls("") == () and not form(name, "").in_own_words


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_what_the_grammar_writes_the_parser_reads(name: str) -> None:
    rng, n_several, n_thought = random.Random(name), 0, 0
    for template in TEMPLATES[name]:
        for prompt in prompts(name):
            held = form(name, template, prompt)
            assert held.in_own_words, (name, template)
            walk = Walk(held.grammar)
            for case in range(60):
                text, spans = walk.text(ROOT, rng, rng.choice((20, 120, 400)))
                wanted = meant(name, template, text, spans)
                for size in (1, 7, len(text)) if case < 10 else (len(text),):
                    parts = parse(name, prompt, text, size)
                    assert calls(parts) == wanted, (text, size)
                    assert not words(parts).strip(), (text, words(parts))
                thought = "".join(part.text for part in parts if isinstance(part, Reasoning))
                said = next((text[s.start : s.end] for s in spans if s.rule == f"{THOUGHT}-0"), None)
                if said is not None:
                    close = FORMATS[name].thinking.close
                    assert thought.strip() == said[: -len(close)].strip(), text
                    n_thought += 1
                for called, value in wanted:
                    fits(value, next(t["function"] for t in tools_of(name) if t["function"]["name"] == called))
                n_several += len(wanted) > 1
    assert (n_several > 0) == (name not in ONE_CALL)
    assert n_thought > 0 or name in ("llama3", "functionary")


def test_one_call_where_the_client_wants_one_and_the_one_that_it_names() -> None:
    rng = random.Random(1)
    for more in ({"one_tool": True}, {"choice": ToolChoice("required", "write")}):
        for name, (template, *_) in TEMPLATES.items():
            prompt = max(prompts(name))
            walk = Walk(form(name, template, prompt, **more).grammar)
            for _ in range(20):
                text, spans = walk.text(ROOT, rng, 200)
                found = calls(parse(name, prompt, text, len(text)))
                assert len(found) == 1 and ("choice" not in more or found[0][0] == "write")
                assert found == meant(name, template, text, spans) or "choice" in more


@pytest.mark.parametrize("name", sorted([*TEMPLATES, *IN_JSON]))
def test_an_answer_in_a_form_is_no_thinking(name: str) -> None:
    """Whatever the family's thinking is called, and whether or not the prompt has opened it."""
    schema = {"type": "object", "properties": {"x": {"enum": [7]}}, "required": ["x"], "additionalProperties": False}
    rng, n = random.Random(name), 0
    template = FORMATS[name].thinking.close
    for prompt in prompts(name):
        request = Request(messages=({"role": "user", "content": "x"},), schema=schema)
        held = reply_form(request, FORMATS[name], template, prompt)
        assert held is not None and not held.is_call
        walk = Walk(held.grammar)
        for _ in range(40):
            text, _ = walk.text(ROOT, rng, 100)
            parts = parse(name, prompt, text, rng.choice((1, 9, 1000)), [])
            assert json.loads(words(parts)) == {"x": 7}, text
            n += any(isinstance(part, Reasoning) for part in parts)
    assert n > 0 or name in ("plain", "llama3", "functionary")


ODD = {
    "any arguments": tool("f", {}, [], additionalProperties=True),
    "a value of many types": tool("f", {"x": {"type": ["string", "array"]}}, []),
    "a value of no type": tool("f", {"x": {}}, []),
    "a pattern": tool("f", {"x": {"type": "string", "pattern": "^a+$"}}, []),
    "a date": tool("f", {"x": {"type": "string", "format": "date"}}, []),
    "a key with a quote": tool("f", {'x"': {"type": "integer"}}, []),
    "a choice with a tag": tool("f", {"x": {"enum": ["</parameter>"]}}, []),
    "a choice of schemas": {"function": {"name": "f", "parameters": {"anyOf": [{"type": "object"}]}}},
    "a name with a space": tool("f g", {}, []),
}


@pytest.mark.parametrize("why", ODD)
def test_what_tags_cannot_carry_is_plain_json(why: str) -> None:
    found = form("qwen_coder", "", tools=[ODD[why]])
    assert not found.in_own_words
    rng, walk = random.Random(why), Walk(found.grammar)
    for _ in range(10):
        text, spans = walk.text(ROOT, rng, 60)
        parser = ForcedCallParser(FORMATS["qwen_coder"].parser("", [ODD[why]]))
        arguments = next(each for each in spans if each.rule == "arguments-0-0-root")
        said = calls([*parser.feed(text), *parser.finish()])
        assert said == [(ODD[why]["function"]["name"], json.loads(text[arguments.start : arguments.end]))]
    if why not in ("a name with a space",):
        assert form("hermes", "", tools=[ODD[why]]).in_own_words


def test_what_gemmas_words_cannot_carry_is_plain_json() -> None:
    assert form("gemma", "").in_own_words
    for odd in (TOOLS[1], tool("f", {"a:b": {"type": "integer"}}, []), tool("f", {"x": {"type": "object"}}, [])):
        assert not form("gemma", "", tools=[odd]).in_own_words


def test_two_forms_at_a_time_are_refused() -> None:
    request = Request(messages=(), tools=tuple(TOOLS), tool_choice=ToolChoice("required"), json_object=True)
    with pytest.raises(UsageError, match="cannot both be kept to"):
        reply_form(request, FORMATS["hermes"], "", "")


@pytest.fixture(scope="module")
def llama() -> Iterator[Any]:
    with open_engine(tiny_model_path(), "floor", n_ctx=256) as engine:
        yield engine.llama


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_llama_cpp_takes_the_grammar_and_every_text_of_it(name: str, llama: Any) -> None:
    """Our walk reads GBNF as llama.cpp does: what it writes passes there token by token, and nothing more does."""
    import llama_cpp

    rng, candidates = random.Random(name), Candidates(llama.n_vocab())
    for template in TEMPLATES[name]:
        held = form(name, template, OPENED.get(name, ""))
        walk = Walk(held.grammar)
        for length in (30, 150):
            text, _ = walk.text(ROOT, rng, length)
            sampler = make_grammar(llama, held.grammar, held.root)
            try:
                for token in tokenize(llama, text, special=False, add_bos=False):
                    assert candidates.allows(sampler, token), text
                    llama_cpp.llama_sampler_accept(sampler, token)
                assert candidates.allows(sampler, llama.token_eos()), text
                assert not candidates.allows(sampler, tokenize(llama, "~", special=False, add_bos=False)[-1])
            finally:
                llama_cpp.llama_sampler_free(sampler)
