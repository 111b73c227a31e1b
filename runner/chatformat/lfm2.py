"""LFM2: calls as Python writes them, `<|tool_call_start|>[get_weather(city="Paris")]<|tool_call_end|>`."""

from __future__ import annotations

import ast
from collections.abc import Container, Mapping, Sequence
from typing import Any

from moe_edge.runner.chatformat.calls import CallParser, NotACall, Tools, Waiting, as_json, python_expression
from moe_edge.runner.chatformat.format import ChatFormat
from moe_edge.runner.chatformat.forms import CallForm, TagArguments
from moe_edge.runner.chatformat.gbnf import quote
from moe_edge.runner.chatformat.shapes import between_tags
from moe_edge.runner.chatformat.think import CLOSE, OPEN, opened_by, without_thinking

BEGIN, END = "<|tool_call_start|>", "<|tool_call_end|>"
_JSON_WORDS = {"true": True, "false": False, "null": None}


class Lfm2Parser(CallParser):
    """A list of calls is told when it is whole: Python's values are no JSON."""

    marks = (BEGIN,)

    def __init__(self, opened: bool, tools: Tools) -> None:
        super().__init__(opened, tools)

    def read_calls(self, mark: str) -> Waiting:
        text, _ = yield from self.until(END)
        calls = calls_of(text, self.tools)
        for name, arguments in calls:  # all of them can be told, or none is
            self.name(name)
            as_json(arguments)
        for name, arguments in calls:
            yield from self.whole(name, arguments)


def calls_of(text: str, names: Container[str] = ()) -> list[tuple[str, dict[str, Any]]]:
    """(name, arguments) of each call in `[f(x=1), g()]`. names: of tools, for those that are no names to Python.

    Raises NotACall for anything else.
    """
    text = text.strip()
    try:
        tree = python_expression(text)
        calls = tree.elts if isinstance(tree, ast.List | ast.Tuple) else [tree]
        found = [_call(each, text, names) for each in calls]
    except (SyntaxError, ValueError, MemoryError, RecursionError, TypeError, KeyError) as error:
        raise NotACall from error
    if not found:
        raise NotACall
    return found


def _call(node: ast.expr, text: str, names: Container[str]) -> tuple[str, dict[str, Any]]:
    if isinstance(node, ast.Dict):  # some write JSON between the tags
        call = _value(node)
        return str(call["name"]), dict(call.get("arguments") or {})
    name = None
    if isinstance(node, ast.BinOp):  # `get-weather(x=1)`: to Python a difference
        head, _, rest = (ast.get_source_segment(text, node) or "").partition("(")
        if head.strip() in names:
            name, node = head.strip(), python_expression(f"f({rest}")
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("not a call by names")
    arguments = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError("a mapping in the place of a name")
        arguments[keyword.arg] = _value(keyword.value)
    return name or ast.unparse(node.func), arguments


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Name):
        if node.id in _JSON_WORDS:
            return _JSON_WORDS[node.id]
        raise ValueError(node.id)
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(each) for each in node.elts]
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {str(_value(key)): _value(value) for key, value in pairs if key is not None}
    return ast.literal_eval(node)


def make_parser(prompt: str, tools: Sequence[Mapping[str, Any]]) -> Lfm2Parser:
    return Lfm2Parser(opened_by(prompt), tools)


FORM = CallForm(
    lambda name: quote(f"{name}("), quote(")"),
    TagArguments(lambda key, kind: quote(f"{key}="), "", "", '"," " "?', strips=False, guard=(BEGIN, END), python=True),
    quote(f"{BEGIN}["), quote(f"]{END}"), '"," " "?',
)  # fmt: skip

FORMAT = ChatFormat(
    "lfm2", 80, lambda template: BEGIN in template or "<|tool_list_start|>" in template, make_parser,
    tags=(OPEN, CLOSE, BEGIN, END), prepare=without_thinking, thinking=between_tags(), calls=lambda template: (FORM,),
)  # fmt: skip
