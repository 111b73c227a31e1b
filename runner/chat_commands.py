"""What a line that begins with / does in a chat: one function a command, with the words that /help has for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from moe_edge.models.errors import BadFile, MissingFile, UsageError
from moe_edge.models.formats.files import shown
from moe_edge.models.suggest import did_you_mean
from moe_edge.runner.chatformat.format import Message
from moe_edge.runner.conversation import Conversation
from moe_edge.runner.engine import Engine
from moe_edge.runner.generate import Sampling
from moe_edge.runner.messages import content_text
from moe_edge.runner.thinking import thinking_settings

ROLES = ("system", "user", "assistant", "tool")
THINK = {"on": True, "off": False, "auto": None}


class Chat(Protocol):
    """What the commands need of runner/chat.py's Chat, which knows this module."""

    engine: Engine
    conversation: Conversation
    sampling: Sampling
    last_question: str | None
    before_last: tuple[list[Message], str]

    def say(self, text: str) -> None: ...

    def stats(self) -> str: ...

    def reply(self, message: str) -> Any: ...


@dataclass(frozen=True)
class Command:
    """run(chat, the rest of the line). usage: as /help shows it."""

    usage: str
    words: str
    run: Callable[[Chat, str], None]


def _clear(chat: Chat, _rest: str) -> None:
    chat.conversation.clear()
    chat.engine.new_conversation()
    chat.say("(forgotten)")


def _stats(chat: Chat, _rest: str) -> None:
    chat.say(chat.stats())


def _help(chat: Chat, _rest: str) -> None:
    chat.say(help_text())


def _system(chat: Chat, rest: str) -> None:
    """The system message is the first one; it stays when the oldest go."""
    _need_template(chat, "/system")
    messages = chat.conversation.messages
    has_one = bool(messages) and messages[0]["role"] == "system"
    if not rest:
        chat.say(messages[0]["content"] if has_one else "(no system message)")
        return
    chat.conversation.messages = [{"role": "system", "content": rest}, *messages[1 if has_one else 0 :]]
    chat.say("(system message set)")


def _think(chat: Chat, rest: str) -> None:
    _need_template(chat, "/think")
    if rest not in THINK:
        raise UsageError(f"/think {rest}: is none of on, off, auto{did_you_mean(rest, THINK)}")
    conversation = chat.conversation
    kept = {key: value for key, value in conversation.template_kwargs.items() if key not in thinking_settings(True)}
    conversation.template_kwargs = kept | thinking_settings(THINK[rest])
    chat.say(f"(thinking: {rest})")


def _save(chat: Chat, rest: str) -> None:
    path = _path(rest, "/save")
    conversation = chat.conversation
    data: dict[str, Any] = {"messages": conversation.messages} if conversation.template else {"text": conversation.text}
    try:
        path.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise MissingFile(f"{path}: cannot be written: {error.strerror or error}") from error
    chat.say(f"(saved to {path})")


def _load(chat: Chat, rest: str) -> None:
    path = _path(rest, "/load")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MissingFile(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{path}: is no conversation: {error}") from error
    conversation = chat.conversation
    if conversation.template is None:
        conversation.text = _text_of(data, path)
        chat.say(f"(loaded {len(conversation.text)} characters)")
    else:
        conversation.messages = _messages_of(data, path)
        chat.say(f"(loaded {len(conversation.messages)} messages)")


def _retry(chat: Chat, _rest: str) -> None:
    """The last question again. With a seed of the user's the next one is taken, since the same would say the same."""
    question = chat.last_question
    if question is None:
        raise UsageError("there is no question yet to ask again")
    chat.conversation.restore(chat.before_last)
    if chat.sampling.seed is not None:
        chat.sampling = replace(chat.sampling, seed=(chat.sampling.seed + 1) % 2**32)
    chat.reply(question)


COMMANDS: dict[str, Command] = {
    "/help": Command("/help", "this list", _help),
    "/system": Command("/system TEXT", "what the model is told before all; without TEXT, shows it", _system),
    "/think": Command("/think on|off|auto", "whether the model thinks first; auto: as it is used to", _think),
    "/retry": Command("/retry", "another reply to the last message", _retry),
    "/save": Command("/save FILE", "write the conversation, as JSON", _save),
    "/load": Command("/load FILE", "go on with a saved one", _load),
    "/clear": Command("/clear", "forget the conversation", _clear),
    "/stats": Command("/stats", "what the last reply and the whole session read and hit", _stats),
}
LEAVE = ("/exit", "/quit", "/bye")


def help_text() -> str:
    lines = [(each.usage, each.words) for each in COMMANDS.values()]
    lines += [
        ("/exit", "leave (also Ctrl-D)"),
        ('"""', "begin and end a message of several lines; pasted lines are one message"),
        ("Ctrl-C", "stop the reply"),
    ]
    return "\n".join(f"{usage:18} {words}" for usage, words in lines)


def run_command(chat: Chat, line: str) -> bool:
    """Run the command of a line; False to leave. Raises what the commands raise, and UsageError for an unknown one."""
    name, _, rest = line.strip().partition(" ")
    if name in LEAVE:
        return False
    if name not in COMMANDS:
        raise UsageError(f"unknown command {name}{did_you_mean(name, COMMANDS)}; /help lists them")
    COMMANDS[name].run(chat, rest.strip())
    return True


def _need_template(chat: Chat, name: str) -> None:
    if chat.conversation.template is None:
        raise UsageError(f"{name} needs a model with a chat template; this one continues the text you type")


def _path(text: str, name: str) -> Path:
    if not text:
        raise UsageError(f"{name} needs the name of a file")
    return Path(text).expanduser()


def _text_of(data: Any, path: Path) -> str:
    text = data.get("text") if isinstance(data, dict) else None
    if not isinstance(text, str):
        raise BadFile(f"{path}: has no text, which a model without a chat template goes on with")
    return text


def _messages_of(data: Any, path: Path) -> list[dict[str, Any]]:
    """A list of messages, as /save and OpenAI's interface have them, alone or under `messages`."""
    found = data.get("messages") if isinstance(data, dict) else data
    if not isinstance(found, list):
        raise BadFile(f"{path}: has no list of messages")
    messages = []
    for number, each in enumerate(found):
        says = isinstance(each, dict) and (each.get("content") is not None or each.get("tool_calls"))
        if not says or each.get("role") not in ROLES:
            raise BadFile(
                f"{path}: message {number} is {shown(each)}; it needs a role ({', '.join(ROLES)}) and a content"
            )
        try:
            messages.append({**each, "content": content_text(each)})
        except UsageError as error:
            raise BadFile(f"{path}: message {number}: {error}") from error
    return messages
