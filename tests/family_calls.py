"""Two calls in the words of each family of models, and what tests make of a parser's parts."""

from __future__ import annotations

import json
from typing import Any

from moe_edge.runner.chatformat import FORMATS
from moe_edge.runner.chatformat.parts import Part, Text, ToolArguments, ToolEnd, ToolStart

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
M = "]<]minimax[>["


def both(f: str = "f", g: str = "g") -> dict[str, str]:
    """Format -> what a model of the family writes to call f(x=1, s=S) and then g(), by the names they are given."""
    return {
        "hermes": f'<tool_call>\n{{"name": "{f}", "arguments": {J}}}\n</tool_call>\n'
                  f'<tool_call>\n{{"name": "{g}", "arguments": {{}}}}\n</tool_call>',
        "json_lists": f'<TOOLCALL>[{{"name": "{f}", "arguments": {J}}}, {{"name": "{g}"}}]</TOOLCALL>',
        "apertus": f'<|tools_prefix|>[{{"{f}": {J}}}, {{"{g}": {{}}}}]<|tools_suffix|>',
        "cohere": f'<|START_ACTION|>[\n {{"tool_call_id": "0", "tool_name": "{f}", "parameters": {J}}},\n'
                  f' {{"tool_call_id": "1", "tool_name": "{g}", "parameters": {{}}}}\n]<|END_ACTION|>',
        "mistral": f"[TOOL_CALLS]{f}[ARGS]{J}[TOOL_CALLS]{g}[CALL_ID]abcdefghi[ARGS]{{}}",
        "kimi": f"<|tool_calls_section_begin|><|tool_call_begin|>functions.{f}:0<|tool_call_argument_begin|>" + J +
                f"<|tool_call_end|><|tool_call_begin|>functions.{g}:1<|tool_call_argument_begin|>{{}}<|tool_call_end|>"
                "<|tool_calls_section_end|>",
        "deepseek": f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>{f}\n```json\n{J}\n```{K}"
                    f"\n<｜tool▁call▁begin｜>{g}<｜tool▁sep｜>{{}}{K}<｜tool▁calls▁end｜>",
        "deepseek_dsml": f'<｜DSML｜function_calls>\n<｜DSML｜invoke name="{f}">\n<｜DSML｜parameter name="x" '
                         'string="false">1</｜DSML｜parameter>\n<｜DSML｜parameter name="s" '
                         f'string="true">{S}</｜DSML｜parameter>\n</｜DSML｜invoke>\n<｜DSML｜invoke name="{g}">\n'
                         '</｜DSML｜invoke>\n</｜DSML｜function_calls>',
        "glm": f"<tool_call>{f}\n<arg_key>x</arg_key>\n<arg_value>1</arg_value>\n<arg_key>s</arg_key>\n<arg_value>{S}"
               f"</arg_value>\n</tool_call>\n<tool_call>{g}</tool_call>",
        "hunyuan": f"<tool_calls:opensource>\n<tool_call:opensource>{f}<tool_sep:opensource>\n<arg_key:opensource>x"
                   "</arg_key:opensource>\n<arg_value:opensource>1</arg_value:opensource>\n<arg_key:opensource>s"
                   f"</arg_key:opensource>\n<arg_value:opensource>{S}</arg_value:opensource>\n</tool_call:opensource>\n"
                   f"<tool_call:opensource>{g}<tool_sep:opensource>\n</tool_call:opensource>\n</tool_calls:opensource>",
        "qwen_coder": f"<tool_call>\n<function={f}>\n<parameter=x>\n1\n</parameter>\n<parameter=s>\n{S}\n</parameter>\n"
                      f"</function>\n</tool_call>\n<tool_call>\n<function={g}>\n</function>\n</tool_call>",
        "seed": f"<seed:tool_call>\n<function={f}>\n<parameter=x>1</parameter>\n<parameter=s>{S}</parameter>\n"
                f"</function>\n<function={g}>\n</function>\n</seed:tool_call>",
        "invoke": f'<minimax:tool_call>\n<invoke name="{f}">\n<parameter name="x">1</parameter>\n'
                  f'<parameter name="s">{S}</parameter>\n</invoke>\n<invoke name="{g}">\n</invoke>\n'
                  "</minimax:tool_call>",
        "lfm2": f"<|tool_call_start|>[{f}(x=1, s={S!r}), {g}()]<|tool_call_end|>",
        "gemma": f'<|tool_call>call:{f}{{x:1,s:<|"|>{S}<|"|>}}<tool_call|><|tool_call>call:{g}{{}}<tool_call|>',
        "harmony": f" to=functions.{f}<|channel|>commentary json<|message|>{J}<|call|><|start|>assistant"
                   f" to=functions.{g}<|channel|>commentary json<|message|>{{}}<|call|>",
        "llama3": f'{{"name": "{f}", "parameters": {J}}}{{"name": "{g}", "parameters": {{}}}}',
        "functionary": f"<function={f}>{J}</function><function={g}>{{}}</function>",
        "solar": f"<|tool_calls|><|tool_call:begin|>c1<|tool_call:name|>{f}<|tool_call:args|>{J}<|tool_call:end|>"
                 f"<|tool_call:begin|>c2<|tool_call:name|>{g}<|tool_call:args|>{{}}<|tool_call:end|><|calls|>",
        "kimi_k3": f'<|open|>tools<|sep|><|open|>call tool="{f}" index="1"<|sep|><|open|>argument key="x" type="number"'
                   '<|sep|>1<|close|>argument<|sep|><|open|>argument key="s" type="string"<|sep|>'
                   f'{S}<|close|>argument<|sep|><|close|>call<|sep|><|open|>call tool="{g}" index="2"<|sep|>'
                   "<|close|>call<|sep|><|close|>tools<|sep|><|close|>message<|sep|><|end_of_msg|>",
        "minimax_m3": f'{M}<tool_call>\n{M}<invoke name="{f}">{M}<x>1{M}</x>{M}<s>{S}{M}</s>{M}</invoke>\n'
                      f'{M}<invoke name="{g}">{M}</invoke>\n{M}</tool_call>',
        "muse": f' to={f}<|message|><atem:function_calls>\n<atem:invoke name="{f}">\n<atem:parameter name="x">1'
                f'</atem:parameter>\n<atem:parameter name="s">{S}</atem:parameter>\n</atem:invoke>\n'
                f'</atem:function_calls><|eom|><|start|>assistant to={g}<|message|><atem:function_calls>\n'
                f'<atem:invoke name="{g}">\n</atem:invoke>\n</atem:function_calls><|eot|>',
    }  # fmt: skip


BOTH = both()
WITHOUT_CALLS = {"plain", "think"}
NAMES = sorted(BOTH)
MESSAGES = ("harmony", "llama3", "muse", "kimi_k3")  # replies that are made of messages, or are a call as a whole
BEHIND_WORDS = [name for name in NAMES if name not in MESSAGES]  # those whose calls may follow text


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
