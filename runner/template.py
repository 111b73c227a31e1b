"""A model's chat template: rendered by llama-cpp-python's Jinja, turned into tokens that no user can forge.

What a user writes is never a control token, even if it spells one: before rendering, each such name in a content gets a
mark in front of it, and behind the marks the rendered prompt is read as letters. A text without such names is not
touched.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from moe_edge.models.errors import UsageError
from moe_edge.runner.chatformat import find_format
from moe_edge.runner.chatformat.format import ChatFormat, Message
from moe_edge.runner.tokens import bos_wanted, special_names, token_bytes, tokenize

KEY = "tokenizer.chat_template"
MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # noncharacters: no text of anybody's has them


def template_text(kv: Mapping[str, Any]) -> str:
    """The template in a GGUF's metadata; empty when it has none. kv: of our own reader, which loses no byte."""
    text = kv.get(KEY)
    return text if isinstance(text, str) else ""


def metadata_for_llama(theirs: Callable[[], dict[str, str]], kv: Mapping[str, Any]) -> dict[str, str]:
    """What `Llama` is to take for the model's metadata: templates whole, and without those that cannot be read.

    llama-cpp-python loses a byte of a value of 1,024 bytes, and its constructor reads every template, so that one that
    is broken stops even those who need none. kv: of our own reader.
    """
    metadata = theirs()
    for key in [key for key in metadata if key.startswith(KEY)]:
        whole = kv.get(key)
        if not isinstance(whole, str):
            continue
        try:
            _compile(whole, "", "")
            metadata[key] = whole
        except UsageError:
            del metadata[key]
    return metadata


def _compile(text: str, eos_text: str, bos_text: str) -> Any:
    """llama-cpp-python's formatter. Raises UsageError with Jinja's words."""
    from jinja2 import TemplateError
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    try:
        return Jinja2ChatFormatter(template=text, eos_token=eos_text, bos_token=bos_text)
    except (TemplateError, RecursionError) as e:
        raise UsageError(f"its chat template cannot be read: {e}") from e


class ChatTemplate:
    """The template of one loaded model. Raises UsageError when it cannot be read."""

    def __init__(self, text: str, llama: Any, where: str) -> None:
        self.text = text
        self.format: ChatFormat = find_format(text)
        self._llama = llama
        self.eos_text = _piece(llama, llama.token_eos())
        try:
            self._jinja = _compile(text, self.eos_text, _piece(llama, llama.token_bos()))
        except UsageError as e:
            raise UsageError(f"{where}: {e}; `moe-edge generate` continues texts without one") from e

    def render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), **kwargs: Any) -> str:
        """The prompt. A template that refuses the messages gets them in other forms that mean the same.

        Raises UsageError with the template's own words when it refuses all of them.
        """
        prepared = self.format.prepare([plain_message(message) for message in messages])
        first: Exception | None = None
        no_tools = (None, []) if not tools else (list(tools),)  # some templates ask for the one, some for the other
        python: str | None = None  # a prompt in which arguments stand as Python writes them
        for form in forms_of(with_names(prepared)):
            for given in no_tools:
                try:
                    prompt = str(self._jinja(messages=form, tools=given, **kwargs).prompt)
                except Exception as e:  # a template is a program of the model's author: it may raise anything
                    first = first or e
                    continue
                if not shows_python(form, prompt):
                    return prompt
                python = python or prompt
        if python is not None:
            return python
        raise UsageError(f"the model's chat template refuses this conversation: {first}") from first

    def tokens(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), **kwargs: Any
    ) -> tuple[list[int], str]:
        """(tokens, the prompt as text). BOS is added where the vocabulary wants it and the template has none."""
        names = special_names(self._llama)
        mark = _free_mark(messages)
        marked = [marked_message(message, names, mark) for message in messages]
        prompt = self.render(marked, tools, **kwargs)
        tokens = tokenize_marked(prompt, mark, names, lambda text, special: self._tokenize(text, special))
        bos = bos_wanted(self._llama)
        if bos is not None and tokens[:1] != [bos]:
            tokens.insert(0, bos)
        return tokens, prompt.replace(mark, "")

    def _tokenize(self, text: str, special: bool) -> list[int]:
        return tokenize(self._llama, text, special=special, add_bos=False)


def _piece(llama: Any, token: int) -> str:
    return token_bytes(llama, token, special=True).decode(errors="replace") if token >= 0 else ""


# ---- messages


def plain_message(message: Message) -> Message:
    """developer is system; a content that is missing is empty, as templates add strings to it."""
    role = "system" if message["role"] == "developer" else message["role"]
    return {**message, "role": role, "content": message.get("content") or ""}


def forms_of(messages: list[Message]) -> Iterable[list[Message]]:
    """The messages as they are, then in forms for templates that are strict.

    Arguments of tool calls are objects, then JSON text: some templates go through them, some write them as they are.
    Without a system role: its text heads the first message of the user. With strict turns: messages of one role in a
    row are one.
    """
    for given in forms_of_arguments(messages):
        yield from _forms_of_turns(given)


def _forms_of_turns(messages: list[Message]) -> Iterable[list[Message]]:
    yield messages
    merged = merge_turns(messages)
    if merged != messages:
        yield merged
    if messages and messages[0]["role"] == "system":
        rest = [dict(message) for message in messages[1:]]
        first = next((message for message in rest if message["role"] == "user"), None)
        if first is not None:
            first["content"] = f"{messages[0]['content']}\n\n{first['content']}"
            yield rest
            yield merge_turns(rest)


def forms_of_arguments(messages: list[Message]) -> Iterable[list[Message]]:
    """The messages with the arguments of tool calls as objects, then as text; once where nobody calls."""
    yield [_with_arguments(message, _as_object) for message in messages]
    if any(message.get("tool_calls") for message in messages):
        yield [_with_arguments(message, _as_text) for message in messages]


def _with_arguments(message: Message, form: Callable[[Any], Any]) -> Message:
    calls = message.get("tool_calls")
    if not calls:
        return message
    changed = [
        {**call, "function": {**call["function"], "arguments": form(call["function"].get("arguments"))}}
        if isinstance(call.get("function"), Mapping) else call
        for call in calls
    ]  # fmt: skip
    return {**message, "tool_calls": changed}


def _as_object(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return {} if arguments is None else arguments
    try:
        found = json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        return arguments  # what a model wrote that is no JSON stays what it wrote
    return found if isinstance(found, dict) else arguments


def _as_text(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)


def shows_python(messages: Sequence[Message], prompt: str) -> bool:
    """Whether arguments of a call stand in the prompt as Python writes a dictionary: no model was trained on that."""
    for message in messages:
        for call in message.get("tool_calls") or ():
            arguments = call.get("function", {}).get("arguments")
            if isinstance(arguments, Mapping) and arguments and str(dict(arguments)) in prompt:
                return True
    return False


def with_names(messages: list[Message]) -> list[Message]:
    """Results of tools with the name of their tool, which some templates ask for and clients leave out."""
    called = {
        call.get("id"): call["function"].get("name")
        for message in messages
        for call in message.get("tool_calls") or ()
        if isinstance(call.get("function"), Mapping)
    }
    named = []
    for message in messages:
        name = called.get(message.get("tool_call_id"))
        lacks_one = message["role"] == "tool" and not message.get("name")
        named.append({**message, "name": name} if lacks_one and name else message)
    return named


def merge_turns(messages: Sequence[Message]) -> list[Message]:
    """Messages of one role in a row put together; those with tool calls stand alone."""
    merged: list[Message] = []
    for message in messages:
        last = merged[-1] if merged else None
        if (
            last is not None and last["role"] == message["role"] and message["role"] in ("user", "assistant", "system")
            and "tool_calls" not in last and "tool_calls" not in message
        ):  # fmt: skip
            merged[-1] = {**last, "content": f"{last['content']}\n\n{message['content']}"}
        else:
            merged.append(message)
    return merged


# ---- marks


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _strings(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _strings(each)


def _free_mark(messages: Sequence[Message]) -> str:
    used = {mark for text in _strings(list(messages)) for mark in MARKS if mark in text}
    return next((mark for mark in MARKS if mark not in used), MARKS[0])


def marked_message(message: Message, names: Sequence[str], mark: str) -> Message:
    """The message with a mark before each control token's name in what somebody wrote; roles and types stay."""
    return {
        key: value if key in ("role", "type", "id", "tool_call_id") else _marked(value, names, mark)
        for key, value in message.items()
    }


def _marked(value: Any, names: Sequence[str], mark: str) -> Any:
    if isinstance(value, str):
        return mark_names(value, names, mark)
    if isinstance(value, Mapping):
        return {key: _marked(each, names, mark) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(each, names, mark) for each in value]
    return value


def mark_names(text: str, names: Sequence[str], mark: str) -> str:
    """names: the longest first, so that one within another is not marked as well."""
    if not any(name in text for name in names):
        return text
    out, at = [], 0
    while at < len(text):
        name = next((name for name in names if text.startswith(name, at)), None)
        if name is None:
            out.append(text[at])
            at += 1
        else:
            out.append(mark + name)
            at += len(name)
    return "".join(out)


def tokenize_marked(
    prompt: str, mark: str, names: Sequence[str], tokenize: Callable[[str, bool], list[int]]
) -> list[int]:
    """Tokens of a rendered prompt: a name behind a mark is letters, all else as the template meant it.

    A name is given to the tokenizer in two parts, since added tokens are found in letters too. A mark whose name the
    template cut off marks nothing.
    """
    head, *rest = prompt.split(mark)
    tokens = tokenize(head, True) if head else []
    for part in rest:
        name = next((name for name in names if part.startswith(name)), "")
        if name:
            tokens += tokenize(name[0], False) + tokenize(name[1:], False)
        if part[len(name) :]:
            tokens += tokenize(part[len(name) :], True)
    return tokens
