"""Bodies that nobody means to send: the server answers with 200 or 4xx, never 5xx, and goes on.

They are made from the server's own /openapi.json: each field as described, or as anything else. How many:
MOE_EDGE_FUZZ_BODIES, 300 unless it says otherwise, to each of three models: one that is none, the embedded one, and a
random one that thinks and has a chat template with tools.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx
import pytest
from conftest import open_engine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moe_edge.models.embedded import tiny_model_path
from moe_edge.runner.fake import FakeModel
from moe_edge.runner.protocol import ServedModel
from moe_edge.runner.sampling import Sampling
from moe_edge.runner.serve.engine_model import EngineModel
from moe_edge.runner.serve.openapi import description
from scripted import write_scripted_model
from serving import PATIENCE, Server, serving

BODIES = int(os.environ.get("MOE_EDGE_FUZZ_BODIES", "300"))

WORDS = ["user", "assistant", "tool", "function", "auto", "required", "json", "f"]
TYPES: list[Any] = ["string", "integer", "number", "boolean", "null", "array", "object", "x", ["string"]]
PARTS = ["text", "input_text", "image_url", "tool_result", "thinking"]
GRAMMARS = [
    'root ::= "a"', "root ::= [a-z]+", "root ::=", "root ::= root", "(((", 'root ::= "\\x00"',
    "root ::= [\\U0010FFFF]", "",
]  # fmt: skip

texts = st.text(max_size=12) | st.sampled_from(WORDS)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=12
)
schemas = st.recursive(
    st.fixed_dictionaries(
        {"type": st.sampled_from(TYPES)},
        optional={
            "enum": st.lists(scalars, max_size=3), "const": scalars, "maxLength": st.integers(-2, 2000),
            "pattern": st.sampled_from(["^a+$", "^[", "^(a|b){2,3}$", "(", "^\\d{3}$", "a{5000}"]) | texts,
            "minimum": scalars, "$ref": texts, "format": st.sampled_from(["date", "uuid", "x"]),
        },
    ),
    lambda inner: st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(["object", "array"]), "properties": st.dictionaries(texts, inner, max_size=3),
            "required": st.lists(texts, max_size=2), "items": inner, "anyOf": st.lists(inner, max_size=2),
            "additionalProperties": st.booleans() | inner, "minItems": st.integers(-1, 1500),
        },
    ),
    max_leaves=6,
)
parts = st.fixed_dictionaries(
    {"type": st.sampled_from(PARTS)}, optional={"text": texts, "content": texts, "thinking": texts}
)
functions = st.fixed_dictionaries({"name": texts, "arguments": anything})
calls = st.lists(st.fixed_dictionaries({"function": functions}), max_size=2)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "developer", "tool"]) | texts},
        optional={"content": texts | st.lists(parts, max_size=3) | anything, "tool_calls": calls, "name": anything},
    ),
    max_size=4,
)
tools = st.lists(
    st.fixed_dictionaries(
        {"type": st.just("function")},
        optional={
            "function": st.fixed_dictionaries({"name": texts}, optional={"parameters": schemas | anything}),
            "name": texts, "input_schema": schemas,
        },
    ),
    max_size=2,
)  # fmt: skip
grammars = st.sampled_from(GRAMMARS) | st.text(alphabet='rot:=" ()[]|+*?{}\n', max_size=30)
forms = st.fixed_dictionaries(
    {"type": st.just("json_schema"), "json_schema": st.fixed_dictionaries({"schema": schemas})}
)
KNOWN: Mapping[str, st.SearchStrategy[Any]] = {
    "messages": messages, "input": messages | texts, "tools": tools, "grammar": grammars, "response_format": forms,
    "format": schemas | st.just("json"), "output_config": st.fixed_dictionaries({"format": st.fixed_dictionaries(
        {"type": st.just("json_schema"), "schema": schemas})}),
    "tool_choice": st.sampled_from(["auto", "none", "required", {"type": "any"}, {"type": "function", "name": "f"}]),
    "tokens": st.lists(st.integers(-5, 300), max_size=5), "prompt": texts | st.lists(st.integers(-5, 300), max_size=5),
    "max_tokens": st.integers(1, 6), "max_completion_tokens": st.integers(1, 6),
}  # fmt: skip
OF_TYPE: Mapping[str, st.SearchStrategy[Any]] = {
    "string": texts, "integer": st.integers(-2, 100), "number": st.floats(-1, 3), "boolean": st.booleans(),
    "object": st.dictionaries(texts, anything, max_size=3), "array": st.lists(anything, max_size=3),
}  # fmt: skip


def field(name: str, schema: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    """Values as described most of the time."""
    if name in KNOWN:
        described = KNOWN[name]
    elif "anyOf" in schema:
        described = st.one_of(*(OF_TYPE[each["type"]] for each in schema["anyOf"]))
    else:
        described = OF_TYPE[schema["type"]]
    return st.one_of(described, described, described, anything)


def posts() -> dict[str, st.SearchStrategy[Any]]:
    """A strategy of bodies for every path that takes one."""
    found: dict[str, st.SearchStrategy[Any]] = {}
    for path, methods in description()["paths"].items():
        if "post" in methods:
            schema = methods["post"]["requestBody"]["content"]["application/json"]["schema"]
            fields = {name: field(name, each) for name, each in schema["properties"].items()}
            needed = {name: fields.pop(name) for name in schema.get("required", ())}
            found[path] = st.fixed_dictionaries(needed, optional=fields) | anything
    return found


POSTS = posts()
requests = st.sampled_from(sorted(POSTS)).flatmap(lambda path: st.tuples(st.just(path), POSTS[path]))


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}{{ c.function.arguments }}{% endfor %}<|im_end|>{% endfor %}"
    "{% for tool in tools or [] %}{{ tool.function | tojson }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{# </think> #}{% endif %}"
)


@pytest.fixture(scope="module", params=["fake", "embedded", "templated"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model: ServedModel
    if request.param == "fake":
        with serving(FakeModel(n_ctx=300)) as made:
            yield made
        return
    path = tiny_model_path()
    if request.param == "templated":
        path = tmp_path_factory.mktemp("fuzz") / "templated.gguf"
        path = write_scripted_model(path, ["a"], template=TEMPLATE, more_tokens=["<think>", "</think>"])
    with open_engine(path, "resident", n_ctx=128, n_ubatch=32, n_threads=1) as engine:
        model = EngineModel(engine, name="tiny", defaults=Sampling(temp=0.8), n_tokens=4)
        with serving(model) as made:
            yield made


@pytest.fixture(scope="module")
def send(server: Server) -> Iterator[Callable[[str, bytes], httpx.Response]]:
    with httpx.Client(base_url=server.url, verify=False, timeout=PATIENCE) as client:
        yield lambda path, data: client.post(path, content=data)


def check(answer: httpx.Response) -> None:
    assert answer.status_code == 200 or 400 <= answer.status_code < 500, (answer.status_code, answer.text)
    assert "fault of moe-edge" not in answer.text and "server_error" not in answer.text, answer.text
    if answer.status_code != 200:
        assert "error" in answer.json() and len(answer.content) < 5000


often = settings(
    max_examples=max(1, BODIES // 2), deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip


@often
@given(asked=requests)
def test_json_of_every_kind_is_answered_or_refused(
    send: Callable[[str, bytes], httpx.Response], asked: tuple[str, Any]
) -> None:
    path, body = asked
    check(send(path, json.dumps(body).encode()))


@often
@given(path=st.sampled_from(sorted(POSTS)), data=st.binary(max_size=60) | st.text(alphabet='{}[]":,\\u0', max_size=40))
def test_bytes_of_every_kind_are_answered_or_refused(
    send: Callable[[str, bytes], httpx.Response], path: str, data: bytes | str
) -> None:
    answer = send(path, data if isinstance(data, bytes) else data.encode())
    check(answer)


def test_afterwards_the_server_answers_as_ever(server: Server) -> None:
    assert server.get("/health").json() == {"status": "ok"}
    answer = server.post("/v1/completions", {"prompt": "The king", "max_tokens": 3, "temperature": 0})
    assert answer.status_code == 200 and answer.json()["choices"][0]["text"]
