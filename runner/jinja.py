"""Chat templates as programs: Jinja2 in its sandbox, with what Hugging Face gives templates besides.

A template may write files of no kind and change nothing that it is given; lists that it makes itself it may append to,
as those of Kimi K2 do. That is why the environment is our own: llama-cpp-python's forbids it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEnvironment
from moe_edge.models.errors import UsageError
from moe_edge.runner.chatformat.format import Message

Render = Callable[..., str]


class _Generation(Extension):
    """`{% generation %}` marks an assistant's words for training; what stands in it is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, list):
            return SandboxedEnvironment.is_safe_attribute(self, obj, attr, value)
        return super().is_safe_attribute(obj, attr, value)


def compile_template(text: str, eos_text: str, bos_text: str) -> Render:
    """The template as a function: (messages, tools, **settings) -> the prompt, which ends where a reply begins.

    Messages and tools stay as they are, whatever the template does. Raises UsageError with Jinja's words when the text
    is no template; the function raises whatever the template does.
    """
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        template = environment.from_string(text)
    except (jinja2.TemplateError, RecursionError) as e:
        raise UsageError(f"its chat template cannot be read: {e}") from e

    def render(
        messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, settings: Mapping[str, Any]
    ) -> str:
        given = {"add_generation_prompt": True, "eos_token": eos_text, "bos_token": bos_text, **settings}
        return template.render(messages=copy.deepcopy(messages), tools=copy.deepcopy(tools), **given)

    return render


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as Hugging Face's templates have it: letters as they are, keys in the order they came, nothing for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
