"""A model's chat template: rendered, and turned into tokens that no user can forge.

What a user writes is never a control token, even if it spells one: before rendering, each such name in a message, in a
tool's definition or in a setting gets a mark in front of it, and behind the marks the rendered prompt is read as
letters. A text without such names is not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moe_edge.models.errors import UsageError
from moe_edge.runner.chatformat import find_format
from moe_edge.runner.chatformat.format import ChatFormat, Message
from moe_edge.runner.jinja import compile_template
from moe_edge.runner.marks import marked, marked_message, new_mark, tokenize_marked
from moe_edge.runner.messages import forms_of, plain_message, shows_python, with_names
from moe_edge.runner.tokens import bos_wanted, special_names, token_bytes, tokenize

KEY = "tokenizer.chat_template"


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
            compile_template(whole, "", "")
            metadata[key] = whole
        except UsageError:
            del metadata[key]
    return metadata


class ChatTemplate:
    """The template of one loaded model. Raises UsageError when it cannot be read."""

    def __init__(self, text: str, llama: Any, where: str) -> None:
        self.text = text
        self.format: ChatFormat = find_format(text)
        self._llama = llama
        self.eos_text = _piece(llama, llama.token_eos())
        try:
            self._render = compile_template(text, self.eos_text, _piece(llama, llama.token_bos()))
        except UsageError as e:
            raise UsageError(f"{where}: {e}; `moe-edge generate` continues texts without one") from e

    def render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), **kwargs: Any) -> str:
        """The prompt. A template that refuses the messages gets them in other forms that mean the same.

        kwargs: settings of the template by name. Raises UsageError with the template's own words when it refuses all
        of them.
        """
        settings = self.format.settings(kwargs)
        prepared = self.format.prepare([plain_message(message) for message in messages])
        first: Exception | None = None
        no_tools = (None, []) if not tools else (list(tools),)  # some templates ask for the one, some for the other
        python: str | None = None  # a prompt in which arguments stand as Python writes them
        for form in forms_of(with_names(prepared)):
            for given in no_tools:
                try:
                    prompt = self._render(form, given, settings)
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
        mark = new_mark()
        safe = [marked_message(message, names, mark) for message in messages]
        prompt = self.render(safe, marked(tools, names, mark), **marked(kwargs, names, mark))
        tokens = tokenize_marked(prompt, mark, names, lambda text, special: self._tokenize(text, special))
        bos = bos_wanted(self._llama)
        if bos is not None and tokens[:1] != [bos]:
            tokens.insert(0, bos)
        return tokens, prompt.replace(mark, "")

    def _tokenize(self, text: str, special: bool) -> list[int]:
        return tokenize(self._llama, text, special=special, add_bos=False)


def _piece(llama: Any, token: int) -> str:
    return token_bytes(llama, token, special=True).decode(errors="replace") if token >= 0 else ""
